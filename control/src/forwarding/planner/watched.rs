//! The ports of entered containers: the listeners that the engine's watch sees are opened, and tried again until they
//! are open. Pure.

use std::num::NonZeroU16;

use landfall_engine::command::{Command, Ending, ForwardId};

use super::verdict::Verdict;
use super::{Change, ClosedReason, Failure, LINGER, Plan, PlannedContainer, Planner, RETRY, Status};
use crate::model::registration::ContainerName;

/// The state of a host port, as seen by one container.
pub(super) enum Holder {
    /// The port is free.
    Free,
    /// A forward is closing, or no container has claimed its upstream yet: the state changes soon.
    Changing,
    /// Another forward has the port, for this reason.
    Taken(String),
    /// The port is held for a container that had it when the engine was lost.
    Held(String),
}

impl Planner {
    /// Closes forwards that are not wanted, and updates the reach of the others.
    pub(super) fn close_watched(&mut self, one: &PlannedContainer, plan: &mut Plan) {
        let Some(verdicts) = &one.verdicts else { return };
        let Some((upstream, _)) = self.upstream_of(&one.name) else { return };
        let mut ids: Vec<ForwardId> = self.forwards.of_upstream(upstream).map(|(id, _)| id).collect();
        // In the order in which they were opened.
        ids.sort_unstable();
        let broker = self.brokers.get(&one.name);
        for id in ids {
            let Some(forward) = self.forwards.get_mut(id).filter(|forward| forward.is_live()) else {
                continue;
            };
            if forward.reserved {
                continue;
            }
            let expired = match verdicts.get(&forward.target_port) {
                _ if forward.host_port != forward.target_port => true,
                _ if broker.is_some_and(|broker| broker.reserves(forward.target_port)) => true,
                Some(Verdict::Wanted(reach)) => {
                    forward.unseen = None;
                    if forward.reach != *reach {
                        forward.reach = *reach;
                        plan.commands.push(Command::SetReach { forward: id, reach: *reach });
                    }
                    false
                }
                Some(Verdict::Denied(_) | Verdict::Published(..)) => true,
                None => {
                    let since = *forward.unseen.get_or_insert(plan.now);
                    plan.now.saturating_duration_since(since) >= LINGER
                }
            };
            if expired {
                forward.status = Status::Closing { why: ClosedReason::ContainerReleased };
                plan.commands.push(Command::CloseListener { forward: id, ending: Ending::Drain });
            }
        }
    }

    pub(super) fn open_watched(&mut self, one: &mut PlannedContainer, plan: &mut Plan) {
        let PlannedContainer { name, verdicts: Some(verdicts), work, .. } = one else { return };
        let Some((upstream, _)) = self.upstream_of(name) else { return };
        self.forget_waiting(name, |port| verdicts.contains_key(&port));
        let mut failures = self.failures.remove(name).unwrap_or_default();
        // A failure is kept only while the port is wanted.
        failures.retain(|port, _| matches!(verdicts.get(port), Some(Verdict::Wanted(_))));
        work.lookups += verdicts.len() as u64;
        for (port, verdict) in &*verdicts {
            let Verdict::Wanted(reach) = verdict else { continue };
            if self.brokers.get(name).is_some_and(|broker| broker.reserves(*port)) {
                continue;
            }
            let holder = self.forwards.at_host_port(*port).filter(|forward| !forward.reserved);
            if holder.is_some_and(|forward| self.owner_of(forward) == Some(name)) {
                continue;
            }
            if self.awaits_report(name, *port, plan.now) {
                continue;
            }
            match self.holder(name, *port) {
                Holder::Free => {}
                Holder::Changing => continue,
                Holder::Taken(reason) | Holder::Held(reason) => {
                    if failures.insert(*port, Failure { at: None, reason: reason.clone() }).is_none() {
                        plan.changes.push(Change::Failed { name: name.clone(), port: *port, reason });
                    }
                    continue;
                }
            }
            let rests = failures.get(port).and_then(|failure| failure.at);
            if rests.is_some_and(|at| plan.now.saturating_duration_since(at) < RETRY) {
                continue;
            }
            plan.commands.push(self.open_one(upstream, *port, *port, *reach, false));
        }
        if !failures.is_empty() {
            self.failures.insert(name.clone(), failures);
        }
    }

    /// The state of a host port for a container.
    pub(super) fn holder(&self, name: &ContainerName, port: NonZeroU16) -> Holder {
        let theirs = |owner: &ContainerName| {
            format!("EADDRINUSE: port {port} is forwarded to container \"{owner}\", which had it first")
        };
        if let Some(owner) = self.native_holder(name, port) {
            return Holder::Taken(theirs(owner));
        }
        let Some(forward) = self.forwards.at_host_port(port) else {
            return match self.port_holds.get(&port).filter(|hold| *hold != name) {
                Some(hold) => Holder::Held(theirs(hold)),
                None => Holder::Free,
            };
        };
        match self.owner_of(forward) {
            _ if !forward.is_live() => Holder::Changing,
            Some(owner) if owner != name => Holder::Taken(theirs(owner)),
            Some(_) => Holder::Taken(format!(
                "EADDRINUSE: port {port} of the host leads to port {} of this container",
                forward.target_port
            )),
            // No container has claimed its upstream.
            None => Holder::Changing,
        }
    }
}
