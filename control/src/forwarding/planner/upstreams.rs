//! The upstreams of containers: claimed, added, removed, and moved to another engine. Pure.

use std::collections::BTreeSet;
use std::num::NonZeroU16;

use landfall_engine::command::{Command, Ending, ForwardId, UpstreamId};

use super::{Change, ClosedReason, Plan, Planner, Status, Upstream};
use crate::forwarding::planner::observation::Listeners;
use crate::model::registration::ContainerName;

/// The bit of a cookie that marks an upstream for which a session dials. The kernel counts the cookies of namespaces up
/// from one.
const DIALLED: u64 = 1 << 63;

/// Whether a driver chose this cookie for an upstream for which a session dials.
pub(super) fn is_dialled(cookie: u64) -> bool {
    cookie & DIALLED != 0
}

/// The result of entering a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Admission {
    /// The engine has its namespace already.
    Known(UpstreamId),
    /// The namespace is to be added to the engine, under this id.
    Add(UpstreamId),
    /// Another container has its namespace.
    Shared(ContainerName),
    /// It is no longer to be forwarded.
    Unwanted,
}

impl Planner {
    /// Handles the entry of a container whose namespace has this cookie.
    pub fn container_entered(&mut self, name: &ContainerName, cookie: u64) -> Admission {
        if self.desired_container(name).is_none() {
            return Admission::Unwanted;
        }
        if let Some(other_owner) = self.other_owner(name, cookie) {
            return Admission::Shared(other_owner.clone());
        }
        let same = |upstream: &Upstream| upstream.stays() && upstream.cookie == cookie;
        for upstream in self.upstreams.values_mut() {
            if upstream.stays() && upstream.owner.as_ref() == Some(name) && upstream.cookie != cookie {
                upstream.dismissed = Some(ClosedReason::HostError);
            }
        }
        self.on_watched(name);
        self.dirty_set.mark(name);
        let own = |upstream: &Upstream| upstream.owner.as_ref() == Some(name);
        let holds = |id: &UpstreamId| self.forwards.of_upstream(*id).next().is_some();
        // If two upstreams have the namespace, one with forwards is preferred.
        let known = self.upstreams.iter().filter(|(_, upstream)| same(upstream));
        let known = known.max_by_key(|(id, upstream)| (own(upstream), holds(id))).map(|(id, _)| *id);
        let Some(id) = known else {
            return Admission::Add(self.add_upstream(name, |_| cookie));
        };
        if let Some(upstream) = self.upstreams.get_mut(&id) {
            upstream.owner = Some(name.clone());
        }
        // A container that waits for one of these ports can now be given the name of its owner.
        let held: Vec<NonZeroU16> =
            self.forwards.of_upstream(id).map(|(_, forward)| forward.host_port).collect();
        held.into_iter().for_each(|port| self.mark_port_waiters(port));
        Admission::Known(id)
    }

    /// The container other than `name` that has the namespace with this cookie.
    pub fn other_owner(&self, name: &ContainerName, cookie: u64) -> Option<&ContainerName> {
        let same = self.upstreams.values().filter(|upstream| upstream.stays() && upstream.cookie == cookie);
        same.filter_map(|upstream| upstream.owner.as_ref()).find(|owner| *owner != name)
    }

    /// Notes that a container can no longer be entered. The next step closes its watched ports.
    pub fn container_lost(&mut self, name: &ContainerName) {
        self.dirty_set.mark(name);
        for upstream in self.upstreams.values_mut() {
            if upstream.owner.as_ref() == Some(name) && !upstream.dialled {
                upstream.dismissed.get_or_insert(ClosedReason::HostError);
            }
        }
    }

    /// Renames a container, whose forwards stay open. Its ports are reported as closed under the old name and opened
    /// under the new one.
    pub fn renamed(&mut self, from: &ContainerName, to: &ContainerName) -> Vec<Change> {
        let mut changes = Vec::new();
        let mut held = Vec::new();
        for (id, upstream) in &mut self.upstreams {
            let is_own = upstream.owner.as_ref() == Some(from) && upstream.stays() && !upstream.dialled;
            if !is_own {
                continue;
            }
            upstream.owner = Some(to.clone());
            let open = self.forwards.of_upstream(*id).filter(|(_, forward)| forward.status == Status::Open);
            for (_, forward) in open {
                let (port, host_port) = (forward.target_port, forward.host_port);
                held.push(host_port);
                let seen = upstream.seen.as_ref().and_then(|seen| seen.at(port));
                let bind = seen.map_or("0.0.0.0", Listeners::bind_address);
                let why = ClosedReason::Deregistered;
                changes.push(Change::Closed { name: from.clone(), port, host_port, why });
                changes.push(Change::Opened { name: to.clone(), port, host_port, bind });
            }
        }
        if let Some(failures) = self.failures.remove(from) {
            self.failures.entry(to.clone()).or_default().extend(failures);
        }
        for (port, hold) in self.port_holds.iter_mut().filter(|(_, hold)| *hold == from) {
            *hold = to.clone();
            held.push(*port);
        }
        held.into_iter().for_each(|port| self.mark_port_waiters(port));
        self.dirty_set.mark(from);
        self.dirty_set.mark(to);
        changes
    }

    /// Notes that another engine has replaced the attached one. It holds these upstreams and forwards under the same
    /// ids, and reports all listeners again.
    pub fn moved(&mut self, upstreams: &BTreeSet<UpstreamId>, forwards: &BTreeSet<ForwardId>) -> Vec<Change> {
        let lost = self.forwards.all().map(|(id, _)| id).filter(|id| !forwards.contains(id));
        let lost: Vec<ForwardId> = lost.collect();
        let changes = lost.into_iter().filter_map(|id| self.forget(id, ClosedReason::HostError)).collect();
        self.upstreams.retain(|id, _| upstreams.contains(id));
        for upstream in self.upstreams.values_mut() {
            upstream.seen = None;
        }
        self.partial.clear();
        self.mark_all();
        changes
    }

    /// Adds an upstream for which the session dials. Returns its id and its cookie; `None` if none is needed.
    pub fn dial(&mut self, name: &ContainerName) -> Option<(UpstreamId, u64)> {
        if !self.wants_dialled_upstream(name) {
            return None;
        }
        let id = self.add_upstream(name, |id| DIALLED | u64::from(id.0));
        self.on_dialled(name);
        self.dirty_set.mark(name);
        self.upstreams.get(&id).map(|upstream| (id, upstream.cookie))
    }

    /// Whether a container has a broker with something to forward, and no upstream.
    pub fn wants_dialled_upstream(&self, name: &ContainerName) -> bool {
        self.has_broker_to_serve(name)
            && self.desired_container(name).is_some()
            && self.upstream_of(name).is_none()
    }

    /// The upstream of a container and its cookie, if the session dials for it.
    pub fn dialled(&self, name: &ContainerName) -> Option<(UpstreamId, u64)> {
        self.upstream_of(name)
            .filter(|(_, upstream)| upstream.dialled)
            .map(|(id, upstream)| (id, upstream.cookie))
    }

    fn add_upstream(&mut self, name: &ContainerName, cookie: impl Fn(UpstreamId) -> u64) -> UpstreamId {
        let id = UpstreamId(self.next_upstream);
        self.next_upstream = self.next_upstream.wrapping_add(1);
        let cookie = cookie(id);
        let (owner, dialled) = (Some(name.clone()), is_dialled(cookie));
        let added = Upstream { cookie, owner, seen: None, dialled, dismissed: None, removing: false };
        self.upstreams.insert(id, added);
        id
    }

    /// Removes upstreams without a container.
    pub(super) fn remove_upstreams(&mut self, plan: &mut Plan) {
        for (id, upstream) in &mut self.upstreams {
            let is_wanted = match &upstream.owner {
                Some(owner) => self.positions.contains_key(owner),
                None => !self.sweeping,
            };
            if !is_wanted {
                // The wire has no other reason for brokers (wire specification, A.6.6).
                let why =
                    if upstream.dialled { ClosedReason::BrokerStopped } else { ClosedReason::Deregistered };
                upstream.dismissed.get_or_insert(why);
            }
            let Some(why) = upstream.dismissed.filter(|_| !upstream.removing) else { continue };
            upstream.removing = true;
            if let Some(owner) = &upstream.owner {
                self.failures.remove(owner);
                self.dirty_set.mark(owner);
            }
            let ids: Vec<ForwardId> = self.forwards.of_upstream(*id).map(|(id, _)| id).collect();
            for forward in ids {
                if let Some(forward) = self.forwards.get_mut(forward).filter(|forward| forward.is_live()) {
                    forward.status = Status::Closing { why };
                }
            }
            // Connections over a stopped broker cannot continue; all others may finish.
            let cut = upstream.dialled && why == ClosedReason::BrokerStopped;
            let ending = if cut { Ending::Reset } else { Ending::Drain };
            plan.commands.push(Command::RemoveUpstream { upstream: *id, ending });
        }
    }

    /// The upstream of a container that is not being removed.
    pub(super) fn upstream_of(&self, name: &ContainerName) -> Option<(UpstreamId, &Upstream)> {
        let own = |upstream: &Upstream| upstream.owner.as_ref() == Some(name) && upstream.stays();
        self.upstreams.iter().find(|(_, upstream)| own(upstream)).map(|(id, upstream)| (*id, upstream))
    }
}
