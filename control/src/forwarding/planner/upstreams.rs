//! The ways into containers, as the engine knows them: claimed, added, let go of, and moved. Pure.

use std::collections::BTreeSet;
use std::num::NonZeroU16;

use landfall_engine::command::{Command, Ending, ForwardId, UpstreamId};

use super::{Change, ClosedReason, Plan, Planner, Status, Upstream};
use crate::forwarding::planner::observation::Listeners;
use crate::model::registration::ContainerName;

/// The bit of a cookie that says that the driver chose it. The kernel counts those of namespaces up from one.
const DIALLED: u64 = 1 << 63;

/// Whether a cookie is one that a driver chose for an upstream for which it dials.
pub(super) fn is_dialled(cookie: u64) -> bool {
    cookie & DIALLED != 0
}

/// What becomes of a container that was entered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Admission {
    /// The engine has its namespace already.
    Known(UpstreamId),
    /// The engine is to be given its namespace, under this number.
    Add(UpstreamId),
    /// Its namespace is that of another container.
    Shared(ContainerName),
    /// Nobody wants it any more.
    Unwanted,
}

impl Planner {
    /// A container was entered, and its namespace has this cookie.
    pub fn reached(&mut self, name: &ContainerName, cookie: u64) -> Admission {
        if self.wish_of(name).is_none() {
            return Admission::Unwanted;
        }
        if let Some(fellow) = self.fellow(name, cookie) {
            return Admission::Shared(fellow.clone());
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
        // Were there two of one namespace, the one with forwards is worth more.
        let known = self.upstreams.iter().filter(|(_, upstream)| same(upstream));
        let known = known.max_by_key(|(id, upstream)| (own(upstream), holds(id))).map(|(id, _)| *id);
        let Some(id) = known else {
            return Admission::Add(self.add_upstream(name, |_| cookie));
        };
        if let Some(upstream) = self.upstreams.get_mut(&id) {
            upstream.owner = Some(name.clone());
        }
        // Another container that waits for one of these ports can name its owner from now on.
        let held: Vec<NonZeroU16> =
            self.forwards.of_upstream(id).map(|(_, forward)| forward.host_port).collect();
        held.into_iter().for_each(|port| self.wake(port));
        Admission::Known(id)
    }

    /// Another container than this one that has the namespace with this cookie.
    pub fn fellow(&self, name: &ContainerName, cookie: u64) -> Option<&ContainerName> {
        let same = self.upstreams.values().filter(|upstream| upstream.stays() && upstream.cookie == cookie);
        same.filter_map(|upstream| upstream.owner.as_ref()).find(|owner| *owner != name)
    }

    /// A container cannot be entered any more; the ports that were watched are let go of with the next step.
    pub fn left(&mut self, name: &ContainerName) {
        self.dirty_set.mark(name);
        for upstream in self.upstreams.values_mut() {
            if upstream.owner.as_ref() == Some(name) && !upstream.dialled {
                upstream.dismissed.get_or_insert(ClosedReason::HostError);
            }
        }
    }

    /// A container is known by another name from now on, and what it has stays as it is. Whoever is told hears that its ports
    /// are the other name's.
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
        held.into_iter().for_each(|port| self.wake(port));
        self.dirty_set.mark(from);
        self.dirty_set.mark(to);
        changes
    }

    /// The engine was relieved by another one, which holds these upstreams and these forwards under the same numbers and
    /// tells anew what listens.
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

    /// The number and the cookie of a new upstream for which the driver dials; none where there is nothing to dial for.
    pub fn dial(&mut self, name: &ContainerName) -> Option<(UpstreamId, u64)> {
        if !self.wants_dialler(name) {
            return None;
        }
        let id = self.add_upstream(name, |id| DIALLED | u64::from(id.0));
        self.on_dialled(name);
        self.dirty_set.mark(name);
        self.upstreams.get(&id).map(|upstream| (id, upstream.cookie))
    }

    /// Whether a container has a broker with something to forward, and no way in.
    pub fn wants_dialler(&self, name: &ContainerName) -> bool {
        self.has_broker_to_serve(name) && self.wish_of(name).is_some() && self.upstream_of(name).is_none()
    }

    /// The upstream for which the driver dials, where that is how a container is reached; with its cookie.
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
        let added = Upstream { cookie, owner, seen: None, dialled, dismissed: None, leaving: false };
        self.upstreams.insert(id, added);
        id
    }

    /// Lets go of upstreams that have no container any more.
    pub(super) fn dismiss(&mut self, plan: &mut Plan) {
        for (id, upstream) in &mut self.upstreams {
            let is_wanted = match &upstream.owner {
                Some(owner) => self.places.contains_key(owner),
                None => !self.sweeping,
            };
            if !is_wanted {
                // The wire's brokers know no other reason (wire specification, A.6.6).
                let why =
                    if upstream.dialled { ClosedReason::BrokerStopped } else { ClosedReason::Deregistered };
                upstream.dismissed.get_or_insert(why);
            }
            let Some(why) = upstream.dismissed.filter(|_| !upstream.leaving) else { continue };
            upstream.leaving = true;
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
            // What goes over a broker ends with it; what is dialled otherwise from now on may finish.
            let cut = upstream.dialled && why == ClosedReason::BrokerStopped;
            let ending = if cut { Ending::Reset } else { Ending::Drain };
            plan.commands.push(Command::RemoveUpstream { upstream: *id, ending });
        }
    }

    /// The upstream of a container that stays.
    pub(super) fn upstream_of(&self, name: &ContainerName) -> Option<(UpstreamId, &Upstream)> {
        let own = |upstream: &Upstream| upstream.owner.as_ref() == Some(name) && upstream.stays();
        self.upstreams.iter().find(|(_, upstream)| own(upstream)).map(|(id, upstream)| (*id, upstream))
    }
}
