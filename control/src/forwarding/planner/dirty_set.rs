//! The containers that a step plans. Pure.
//!
//! A container is planned when something changed about it, or at a time that its last plan named. A change is a mark
//! and not a queue: however many changes came since the last plan, one plan from the current state handles them.
//!
//! A container decides how often its listeners change, so planning it is paid by credit, as the scans of the engine's
//! watch are. A plan is charged by the work that it took ([`PlanWork`]), which is counted and not measured, so that the
//! same events give the same plans. A container whose debt is above [`CREDIT`] keeps its mark and waits until that is
//! paid off, one second in a second. A plan for a dozen listeners, all of them to be opened, costs 13 ms.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::model::registration::ContainerName;

/// The highest debt without waiting: nearly a thousand listeners opened or closed at once.
const CREDIT: Duration = Duration::from_secs(1);

/// The work of one plan.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct PlanWork {
    /// Ports and forwards that were looked up.
    pub(super) lookups: u64,
    /// Commands for the engine.
    pub(super) commands: usize,
}

impl PlanWork {
    /// The cost: about ten times the processor time that the work takes in both processes, so that one container uses
    /// at most a tenth of a core.
    fn cost(self) -> Duration {
        let commands =
            Duration::from_millis(1).saturating_mul(u32::try_from(self.commands).unwrap_or(u32::MAX));
        Duration::from_micros(2).saturating_mul(u32::try_from(self.lookups).unwrap_or(u32::MAX)) + commands
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct DirtySet {
    /// Containers that changed since they were planned.
    changed: BTreeSet<ContainerName>,
    /// When a container is planned although nothing changes.
    due: BTreeMap<ContainerName, Instant>,
    /// When a container has paid for its plans, if that is in the future.
    paid: BTreeMap<ContainerName, Instant>,
    /// Containers whose rows may have changed since they were read.
    stale: BTreeSet<ContainerName>,
}

impl DirtySet {
    /// Marks a container as changed.
    pub(super) fn mark(&mut self, name: &ContainerName) {
        // It is usually marked already, and the check saves a clone.
        if !self.changed.contains(name) {
            self.changed.insert(name.clone());
        }
    }

    /// Marks a container whose rows changed in a way that needs no plan.
    pub(super) fn mark_stale(&mut self, name: &ContainerName) {
        if !self.stale.contains(name) {
            self.stale.insert(name.clone());
        }
    }

    /// Marks a container whose registration changed. Its user did that, so its debt is cleared.
    pub(super) fn mark_paid(&mut self, name: &ContainerName) {
        self.paid.remove(name);
        self.mark(name);
    }

    /// Removes the containers that are not to be forwarded.
    pub(super) fn retain(&mut self, is_wanted: impl Fn(&ContainerName) -> bool) {
        self.changed.retain(&is_wanted);
        self.due.retain(|name, _| is_wanted(name));
        self.paid.retain(|name, _| is_wanted(name));
    }

    /// Removes and returns the containers that are planned now.
    pub(super) fn take(&mut self, now: Instant) -> BTreeSet<ContainerName> {
        self.paid.retain(|_, paid| *paid > now);
        let due = self.due.iter().filter(|(_, due)| **due <= now).map(|(name, _)| name.clone());
        self.changed.extend(due);
        let wait: BTreeSet<ContainerName> =
            self.changed.iter().filter(|name| self.waits_until(name) > Some(now)).cloned().collect();
        let mut taken = std::mem::replace(&mut self.changed, wait);
        taken.retain(|name| !self.changed.contains(name));
        self.due.retain(|name, _| !taken.contains(name) && !self.changed.contains(name));
        taken
    }

    /// Notes that a container was planned, and is to be planned again at `due`.
    pub(super) fn planned(
        &mut self,
        name: &ContainerName,
        now: Instant,
        work: PlanWork,
        due: Option<Instant>,
    ) {
        let paid = self.paid.get(name).map_or(now, |paid| (*paid).max(now)) + work.cost();
        self.paid.insert(name.clone(), paid);
        if let Some(due) = due {
            self.due.insert(name.clone(), due);
        }
        self.mark_stale(name);
    }

    fn waits_until(&self, name: &ContainerName) -> Option<Instant> {
        self.paid.get(name).and_then(|paid| paid.checked_sub(CREDIT))
    }

    /// When the next container is planned if nothing changes until then.
    pub(super) fn next(&self) -> Option<Instant> {
        let waiting = self.changed.iter().filter_map(|name| self.waits_until(name));
        self.due.values().copied().chain(waiting).min()
    }

    /// Removes and returns the containers whose rows are to be read again.
    pub(super) fn take_stale(&mut self) -> BTreeSet<ContainerName> {
        std::mem::take(&mut self.stale)
    }
}
