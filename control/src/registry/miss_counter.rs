//! When a container that is not found is taken to be gone (wire specification, A.7.7). Pure.
//!
//! A look at a container counts for the very registration that it was taken for: registering anew begins at none, so a
//! container that was removed and made again is never dropped for what its predecessor missed. Alive clears the count,
//! unknown leaves it as it is.
//!
//! Between looks there is usually a whole turn. After a hint (Docker said that something happened to the container) the
//! looks follow each other sooner, but not at once: whoever replaces a container removes the old one first, and the
//! registration is to outlive that moment. Only a container that was seen alive can go soon: one that is registered before
//! it is made, as the reference does, has all its turns. So there is a first look, soon after the registration; it counts
//! for a container and never against it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::store::Registered;
use crate::docker::liveness::Liveness;
use crate::model::registration::{ContainerName, Registration};

/// Why a container is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum LookReason {
    /// It has just been registered.
    First,
    /// It is its turn, or it was missed a moment ago.
    LookTurn,
    /// Something may have happened to it.
    Hint,
}

/// What is asked to be looked at ahead of its turn, and why; of two reasons the one that counts more.
pub(super) type Hints = BTreeMap<String, LookReason>;

/// What is known of every registration that was looked at.
pub(super) struct MissCounter {
    /// How many misses in a row are too many.
    limit: u32,
    /// How long after a miss that a hint led to the next look follows.
    spacing: Duration,
    of: HashMap<ContainerName, Seen>,
}

struct Seen {
    registration: Arc<Registration>,
    /// Whether it was ever found.
    was_alive: bool,
    /// How often in a row it was missed.
    count: u32,
    /// When to look again, if sooner than at the next turn.
    again: Option<Instant>,
}

impl Seen {
    fn new(registration: &Arc<Registration>) -> Seen {
        Seen { registration: Arc::clone(registration), was_alive: false, count: 0, again: None }
    }
}

impl MissCounter {
    pub(super) fn new(limit: u32, spacing: Duration) -> MissCounter {
        MissCounter { limit, spacing, of: HashMap::new() }
    }

    /// Takes a look into account; whether the container is gone now.
    pub(super) fn seen(
        &mut self,
        registration: &Arc<Registration>,
        liveness: Liveness,
        look: LookReason,
        now: Instant,
    ) -> bool {
        let name = registration.container_name.clone();
        let seen = self.of.entry(name).or_insert_with(|| Seen::new(registration));
        if !Arc::ptr_eq(&seen.registration, registration) {
            *seen = Seen::new(registration);
        }
        match liveness {
            Liveness::Alive => (seen.was_alive, seen.count, seen.again) = (true, 0, None),
            // Looking sooner will not help: who could be asked is not there.
            Liveness::Unknown => seen.again = None,
            Liveness::Gone if look == LookReason::First => {}
            Liveness::Gone => {
                let soon = look == LookReason::Hint || seen.again.is_some();
                seen.count += 1;
                seen.again = (soon && seen.was_alive).then(|| now + self.spacing);
            }
        }
        let gone = seen.count >= self.limit.max(1);
        if gone {
            self.of.remove(&registration.container_name);
        }
        gone
    }

    /// Forgets registrations that are no more.
    pub(super) fn keep_only(&mut self, known: &Registered) {
        self.of.retain(|name, seen| {
            known.find(name.as_str()).is_some_and(|current| Arc::ptr_eq(current, &seen.registration))
        });
    }

    /// Who has to be looked at now, ahead of the turn.
    pub(super) fn due(&self, now: Instant) -> Vec<Arc<Registration>> {
        let due = self.of.values().filter(|seen| seen.again.is_some_and(|again| again <= now));
        due.map(|seen| Arc::clone(&seen.registration)).collect()
    }

    /// When the next of them is.
    pub(super) fn next_look(&self) -> Option<Instant> {
        self.of.values().filter_map(|seen| seen.again).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const SPACING: Duration = Duration::from_secs(2);

    fn registration() -> Arc<Registration> {
        let serde_json::Value::Object(fields) = json!({"containerName": "a", "cwd": "/a"}) else {
            unreachable!()
        };
        Arc::new(Registration::from_fields(fields).unwrap())
    }

    /// The looks in turn; the number of the one at which the container was gone.
    fn gone_at(looks: &[Liveness]) -> Option<usize> {
        let (mut misses, one) = (MissCounter::new(3, SPACING), registration());
        looks.iter().position(|look| misses.seen(&one, *look, LookReason::LookTurn, Instant::now()))
    }

    #[test]
    fn three_misses_in_a_row_are_needed_and_unknown_is_not_one() {
        use Liveness::{Alive, Gone, Unknown};
        assert_eq!(gone_at(&[Gone, Gone, Gone]), Some(2));
        assert_eq!(gone_at(&[Gone, Gone, Alive, Gone, Gone]), None);
        assert_eq!(gone_at(&[Gone, Unknown, Unknown, Gone, Unknown, Gone]), Some(5));
        assert_eq!(gone_at(&[Unknown; 10]), None);
        assert!(MissCounter::new(1, SPACING).seen(
            &registration(),
            Gone,
            LookReason::LookTurn,
            Instant::now()
        ));
    }

    #[test]
    fn a_registration_is_not_dropped_for_what_its_predecessor_missed() {
        let (mut misses, old, new, now) =
            (MissCounter::new(3, SPACING), registration(), registration(), Instant::now());
        for _ in 0..2 {
            assert!(!misses.seen(&old, Liveness::Gone, LookReason::LookTurn, now));
        }
        for _ in 0..2 {
            assert!(!misses.seen(&new, Liveness::Gone, LookReason::LookTurn, now));
        }
        assert!(misses.seen(&new, Liveness::Gone, LookReason::LookTurn, now));
    }

    #[test]
    fn a_hint_brings_the_looks_together_until_one_says_otherwise() {
        let (mut misses, one, now) = (MissCounter::new(3, SPACING), registration(), Instant::now());
        misses.seen(&one, Liveness::Alive, LookReason::First, now);
        misses.seen(&one, Liveness::Gone, LookReason::LookTurn, now);
        assert_eq!(misses.next_look(), None);
        misses.seen(&one, Liveness::Gone, LookReason::Hint, now);
        assert_eq!(misses.next_look(), Some(now + SPACING));
        assert!(misses.due(now).is_empty());
        assert_eq!(misses.due(now + SPACING).len(), 1);
        misses.seen(&one, Liveness::Unknown, LookReason::LookTurn, now);
        assert_eq!(misses.next_look(), None);
        misses.seen(&one, Liveness::Alive, LookReason::LookTurn, now);
        misses.seen(&one, Liveness::Gone, LookReason::Hint, now);
        misses.seen(&one, Liveness::Gone, LookReason::LookTurn, now + SPACING);
        assert_eq!(misses.next_look(), Some(now + SPACING + SPACING));
        misses.keep_only(&Registered::default());
        assert_eq!(misses.next_look(), None);
        assert!(misses.of.is_empty());
    }

    #[test]
    fn a_container_that_was_never_there_has_all_its_turns() {
        let (mut misses, one, now) = (MissCounter::new(3, SPACING), registration(), Instant::now());
        for _ in 0..5 {
            assert!(
                !misses.seen(&one, Liveness::Gone, LookReason::First, now),
                "a first look counts against it"
            );
        }
        for _ in 0..2 {
            assert!(!misses.seen(&one, Liveness::Gone, LookReason::Hint, now));
            assert_eq!(misses.next_look(), None);
        }
        assert!(misses.seen(&one, Liveness::Gone, LookReason::LookTurn, now));
    }
}
