//! Decides when a container that is not found is considered gone (wire specification, A.7.7). Pure.
//!
//! Misses are counted for one registration. A new registration starts at zero, so a recreated container is never dropped for
//! the misses of its predecessor. Alive resets the count; unknown leaves it unchanged.
//!
//! Probes are normally one interval apart. After a hint (Docker reported an event of the container) they follow each other
//! sooner, but not at once: a client that replaces a container removes the old one first, and the registration must survive
//! that time. The short spacing applies only to a container that was seen alive. A container that is registered before it is
//! created, as the reference does, has all its intervals. Therefore a first probe runs soon after the registration; it can
//! mark a container as alive, and never counts as a miss.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::store::Registered;
use crate::docker::liveness::Liveness;
use crate::model::registration::{ContainerName, Registration};

/// The reason for a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum ProbeReason {
    /// The container has just been registered.
    First,
    /// The interval has passed, or a recent probe missed it.
    Interval,
    /// Something may have happened to the container.
    Hint,
}

/// The names to probe ahead of their interval, each with the greater of its reasons.
pub(super) type Hints = BTreeMap<String, ProbeReason>;

/// The counters of all registrations that were probed.
pub(super) struct MissCounter {
    /// The number of consecutive misses after which a container is gone.
    limit: u32,
    /// The delay from a miss after a hint to the next probe.
    spacing: Duration,
    entries: HashMap<ContainerName, Misses>,
}

struct Misses {
    registration: Arc<Registration>,
    /// Whether a probe ever found it.
    was_alive: bool,
    /// The number of consecutive misses.
    count: u32,
    /// The time of the next probe, if it is before the next interval.
    next_probe: Option<Instant>,
}

impl Misses {
    fn new(registration: &Arc<Registration>) -> Misses {
        Misses { registration: Arc::clone(registration), was_alive: false, count: 0, next_probe: None }
    }
}

impl MissCounter {
    pub(super) fn new(limit: u32, spacing: Duration) -> MissCounter {
        MissCounter { limit, spacing, entries: HashMap::new() }
    }

    /// Records the result of a probe. Returns whether the container is gone.
    pub(super) fn record(
        &mut self,
        registration: &Arc<Registration>,
        liveness: Liveness,
        reason: ProbeReason,
        now: Instant,
    ) -> bool {
        let name = registration.container_name.clone();
        let misses = self.entries.entry(name).or_insert_with(|| Misses::new(registration));
        if !Arc::ptr_eq(&misses.registration, registration) {
            *misses = Misses::new(registration);
        }
        match liveness {
            Liveness::Alive => (misses.was_alive, misses.count, misses.next_probe) = (true, 0, None),
            // Docker is unreachable, so an earlier probe would not help.
            Liveness::Unknown => misses.next_probe = None,
            Liveness::Gone if reason == ProbeReason::First => {}
            Liveness::Gone => {
                let soon = reason == ProbeReason::Hint || misses.next_probe.is_some();
                misses.count += 1;
                misses.next_probe = (soon && misses.was_alive).then(|| now + self.spacing);
            }
        }
        let gone = misses.count >= self.limit.max(1);
        if gone {
            self.entries.remove(&registration.container_name);
        }
        gone
    }

    /// Drops the counters of registrations that no longer exist.
    pub(super) fn keep_only(&mut self, known: &Registered) {
        self.entries.retain(|name, misses| {
            known.find(name.as_str()).is_some_and(|current| Arc::ptr_eq(current, &misses.registration))
        });
    }

    /// Returns the registrations that are to be probed now, ahead of their interval.
    pub(super) fn due(&self, now: Instant) -> Vec<Arc<Registration>> {
        let due = self
            .entries
            .values()
            .filter(|misses| misses.next_probe.is_some_and(|next_probe| next_probe <= now));
        due.map(|misses| Arc::clone(&misses.registration)).collect()
    }

    /// Returns the time of the next such probe.
    pub(super) fn next_probe(&self) -> Option<Instant> {
        self.entries.values().filter_map(|misses| misses.next_probe).min()
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

    /// Records these results in order. Returns the index of the one at which the container was gone.
    fn gone_at(results: &[Liveness]) -> Option<usize> {
        let (mut misses, one) = (MissCounter::new(3, SPACING), registration());
        results
            .iter()
            .position(|liveness| misses.record(&one, *liveness, ProbeReason::Interval, Instant::now()))
    }

    #[test]
    fn three_consecutive_misses_are_needed_and_unknown_does_not_count() {
        use Liveness::{Alive, Gone, Unknown};
        assert_eq!(gone_at(&[Gone, Gone, Gone]), Some(2));
        assert_eq!(gone_at(&[Gone, Gone, Alive, Gone, Gone]), None);
        assert_eq!(gone_at(&[Gone, Unknown, Unknown, Gone, Unknown, Gone]), Some(5));
        assert_eq!(gone_at(&[Unknown; 10]), None);
        assert!(MissCounter::new(1, SPACING).record(
            &registration(),
            Gone,
            ProbeReason::Interval,
            Instant::now()
        ));
    }

    #[test]
    fn a_registration_is_not_dropped_for_the_misses_of_its_predecessor() {
        let (mut misses, old, new, now) =
            (MissCounter::new(3, SPACING), registration(), registration(), Instant::now());
        for _ in 0..2 {
            assert!(!misses.record(&old, Liveness::Gone, ProbeReason::Interval, now));
        }
        for _ in 0..2 {
            assert!(!misses.record(&new, Liveness::Gone, ProbeReason::Interval, now));
        }
        assert!(misses.record(&new, Liveness::Gone, ProbeReason::Interval, now));
    }

    #[test]
    fn a_hint_shortens_the_spacing_until_another_result() {
        let (mut misses, one, now) = (MissCounter::new(3, SPACING), registration(), Instant::now());
        misses.record(&one, Liveness::Alive, ProbeReason::First, now);
        misses.record(&one, Liveness::Gone, ProbeReason::Interval, now);
        assert_eq!(misses.next_probe(), None);
        misses.record(&one, Liveness::Gone, ProbeReason::Hint, now);
        assert_eq!(misses.next_probe(), Some(now + SPACING));
        assert!(misses.due(now).is_empty());
        assert_eq!(misses.due(now + SPACING).len(), 1);
        misses.record(&one, Liveness::Unknown, ProbeReason::Interval, now);
        assert_eq!(misses.next_probe(), None);
        misses.record(&one, Liveness::Alive, ProbeReason::Interval, now);
        misses.record(&one, Liveness::Gone, ProbeReason::Hint, now);
        misses.record(&one, Liveness::Gone, ProbeReason::Interval, now + SPACING);
        assert_eq!(misses.next_probe(), Some(now + SPACING + SPACING));
        misses.keep_only(&Registered::default());
        assert_eq!(misses.next_probe(), None);
        assert!(misses.entries.is_empty());
    }

    #[test]
    fn a_container_that_was_never_alive_has_all_its_intervals() {
        let (mut misses, one, now) = (MissCounter::new(3, SPACING), registration(), Instant::now());
        for _ in 0..5 {
            assert!(
                !misses.record(&one, Liveness::Gone, ProbeReason::First, now),
                "the first probe counts as a miss"
            );
        }
        for _ in 0..2 {
            assert!(!misses.record(&one, Liveness::Gone, ProbeReason::Hint, now));
            assert_eq!(misses.next_probe(), None);
        }
        assert!(misses.record(&one, Liveness::Gone, ProbeReason::Interval, now));
    }
}
