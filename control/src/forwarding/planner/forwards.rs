//! The forwards of all containers, indexed by id, by host port, and by upstream and container port. Pure.
//!
//! Each kind of look-up has an index, so that planning one container never iterates over the forwards of all. The table
//! counts the forwards that it returns, and the planner charges the container for them
//! ([`crate::forwarding::planner::dirty_set`]).

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU16;

use landfall_engine::command::{ForwardId, UpstreamId};

use super::Forward;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Forwards {
    by_id: BTreeMap<ForwardId, Forward>,
    /// The kernel allows one forward for each; an engine of another release could report two.
    by_host_port: BTreeSet<(NonZeroU16, ForwardId)>,
    by_target: BTreeSet<(UpstreamId, NonZeroU16, ForwardId)>,
    lookups: Cell<u64>,
}

/// The greatest id, as the end of a range.
const LAST: ForwardId = ForwardId(u32::MAX);
const FIRST: ForwardId = ForwardId(0);

impl Forwards {
    /// Adds a forward under an unused id.
    pub(super) fn insert(&mut self, id: ForwardId, forward: Forward) {
        self.by_host_port.insert((forward.host_port, id));
        self.by_target.insert((forward.upstream, forward.target_port, id));
        self.by_id.insert(id, forward);
    }

    pub(super) fn remove(&mut self, id: ForwardId) -> Option<Forward> {
        let forward = self.by_id.remove(&id)?;
        self.by_host_port.remove(&(forward.host_port, id));
        self.by_target.remove(&(forward.upstream, forward.target_port, id));
        Some(forward)
    }

    pub(super) fn clear(&mut self) {
        *self = Forwards { lookups: self.lookups.clone(), ..Forwards::default() };
    }

    pub(super) fn get(&self, id: ForwardId) -> Option<&Forward> {
        self.count(1);
        self.by_id.get(&id)
    }

    /// Returns a forward to change its state. Its ports and its upstream must not change: they are indexed.
    pub(super) fn get_mut(&mut self, id: ForwardId) -> Option<&mut Forward> {
        self.count(1);
        self.by_id.get_mut(&id)
    }

    /// The forward that binds a host port, or is opening it.
    pub(super) fn at_host_port(&self, port: NonZeroU16) -> Option<&Forward> {
        let (_, id) = self.by_host_port.range((port, FIRST)..=(port, LAST)).next()?;
        self.get(*id)
    }

    /// The forwards of one upstream.
    pub(super) fn of_upstream(&self, upstream: UpstreamId) -> impl Iterator<Item = (ForwardId, &Forward)> {
        self.in_range((upstream, NonZeroU16::MIN, FIRST), (upstream, NonZeroU16::MAX, LAST))
    }

    /// The forwards to one container port.
    pub(super) fn of_target(
        &self,
        upstream: UpstreamId,
        target: NonZeroU16,
    ) -> impl Iterator<Item = (ForwardId, &Forward)> {
        self.in_range((upstream, target, FIRST), (upstream, target, LAST))
    }

    fn in_range(
        &self,
        first: (UpstreamId, NonZeroU16, ForwardId),
        last: (UpstreamId, NonZeroU16, ForwardId),
    ) -> impl Iterator<Item = (ForwardId, &Forward)> {
        let found = self.by_target.range(first..=last);
        found.filter_map(|(.., id)| self.get(*id).map(|forward| (*id, forward)))
    }

    /// Every forward.
    pub(super) fn all(&self) -> impl Iterator<Item = (ForwardId, &Forward)> {
        self.by_id.iter().inspect(|_| self.count(1)).map(|(id, forward)| (*id, forward))
    }

    fn count(&self, lookups: u64) {
        self.lookups.set(self.lookups.get().wrapping_add(lookups));
    }

    /// The number of forwards returned so far.
    pub(super) fn lookups(&self) -> u64 {
        self.lookups.get()
    }
}
