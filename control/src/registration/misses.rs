//! When a container that is not found is taken to be gone (wire specification, A.7.7). Pure.
//!
//! A look at a container counts for the very registration that it was taken for: registering anew begins at none, so a
//! container that was removed and made again is never dropped for what its predecessor missed. Alive clears the count,
//! unknown leaves it as it is.
//!
//! Between looks there is usually a whole turn. After a hint (Docker said that something happened to the container) the
//! looks follow each other sooner, but not at once: whoever replaces a container removes the old one first, and the
//! registration is to outlive that moment.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::model::{ContainerName, Registration};
use super::store::Registered;
use crate::liveness::Liveness;

/// The counts of every container that was missed at its last look.
pub(super) struct Misses {
    /// How many in a row are too many.
    limit: u32,
    /// How long after a miss that a hint led to the next look follows.
    spacing: Duration,
    of: HashMap<ContainerName, Missed>,
}

struct Missed {
    registration: Arc<Registration>,
    count: u32,
    /// When to look again, if sooner than at the next turn.
    again: Option<Instant>,
}

impl Misses {
    pub(super) fn new(limit: u32, spacing: Duration) -> Misses {
        Misses { limit, spacing, of: HashMap::new() }
    }

    /// Takes a look into account; whether the container is gone now. `soon` asks for further looks ahead of the turn.
    pub(super) fn seen(
        &mut self,
        registration: &Arc<Registration>,
        liveness: Liveness,
        soon: bool,
        now: Instant,
    ) -> bool {
        let name = &registration.container_name;
        match liveness {
            Liveness::Alive => {
                self.of.remove(name);
                false
            }
            Liveness::Unknown => {
                // Looking sooner will not help: who could be asked is not there.
                if let Some(missed) = self.of.get_mut(name) {
                    missed.again = None;
                }
                false
            }
            Liveness::Gone => {
                let fresh = Missed { registration: Arc::clone(registration), count: 0, again: None };
                let missed = self.of.entry(name.clone()).or_insert(fresh);
                if !Arc::ptr_eq(&missed.registration, registration) {
                    *missed = Missed { registration: Arc::clone(registration), count: 0, again: None };
                }
                missed.count += 1;
                missed.again = (soon || missed.again.is_some()).then(|| now + self.spacing);
                let gone = missed.count >= self.limit;
                if gone {
                    self.of.remove(name);
                }
                gone
            }
        }
    }

    /// Forgets the counts of registrations that are no more.
    pub(super) fn keep_only(&mut self, known: &Registered) {
        self.of.retain(|name, missed| {
            known.find(name.as_str()).is_some_and(|current| Arc::ptr_eq(current, &missed.registration))
        });
    }

    /// Who has to be looked at now, ahead of the turn.
    pub(super) fn due(&self, now: Instant) -> Vec<Arc<Registration>> {
        let due = self.of.values().filter(|missed| missed.again.is_some_and(|again| again <= now));
        due.map(|missed| Arc::clone(&missed.registration)).collect()
    }

    /// When the next of them is.
    pub(super) fn next_look(&self) -> Option<Instant> {
        self.of.values().filter_map(|missed| missed.again).min()
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
        let (mut misses, one) = (Misses::new(3, SPACING), registration());
        looks.iter().position(|look| misses.seen(&one, *look, false, Instant::now()))
    }

    #[test]
    fn three_misses_in_a_row_are_needed_and_unknown_is_not_one() {
        use Liveness::{Alive, Gone, Unknown};
        assert_eq!(gone_at(&[Gone, Gone, Gone]), Some(2));
        assert_eq!(gone_at(&[Gone, Gone, Alive, Gone, Gone]), None);
        assert_eq!(gone_at(&[Gone, Unknown, Unknown, Gone, Unknown, Gone]), Some(5));
        assert_eq!(gone_at(&[Unknown; 10]), None);
        assert!(Misses::new(1, SPACING).seen(&registration(), Gone, false, Instant::now()));
    }

    #[test]
    fn a_registration_is_not_dropped_for_what_its_predecessor_missed() {
        let (mut misses, old, new, now) =
            (Misses::new(3, SPACING), registration(), registration(), Instant::now());
        for _ in 0..2 {
            assert!(!misses.seen(&old, Liveness::Gone, false, now));
        }
        for _ in 0..2 {
            assert!(!misses.seen(&new, Liveness::Gone, false, now));
        }
        assert!(misses.seen(&new, Liveness::Gone, false, now));
    }

    #[test]
    fn a_hint_brings_the_looks_together_until_one_says_otherwise() {
        let (mut misses, one, now) = (Misses::new(3, SPACING), registration(), Instant::now());
        misses.seen(&one, Liveness::Gone, false, now);
        assert_eq!(misses.next_look(), None);
        misses.seen(&one, Liveness::Gone, true, now);
        assert_eq!(misses.next_look(), Some(now + SPACING));
        assert!(misses.due(now).is_empty());
        assert_eq!(misses.due(now + SPACING).len(), 1);
        misses.seen(&one, Liveness::Unknown, false, now);
        assert_eq!(misses.next_look(), None);
        misses.seen(&one, Liveness::Alive, false, now);
        misses.seen(&one, Liveness::Gone, true, now);
        misses.seen(&one, Liveness::Gone, false, now + SPACING);
        assert_eq!(misses.next_look(), Some(now + SPACING + SPACING));
        misses.keep_only(&Registered::default());
        assert_eq!(misses.next_look(), None);
        assert!(misses.of.is_empty());
    }
}
