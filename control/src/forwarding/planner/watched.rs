//! Ports of containers that are entered: what the engine's watch sees is open, and is tried again until it is. Pure.

use std::num::NonZeroU16;

use landfall_engine::command::{Command, Ending, ForwardId};

use super::verdict::Verdict;
use super::{Change, ClosedReason, Failure, LINGER, Plan, Planned, Planner, RETRY, Status};
use crate::model::registration::ContainerName;

/// Who stands in the way of a host port.
pub(super) enum Holder {
    /// Nobody.
    Free,
    /// Somebody who answers or closes soon.
    Soon,
    /// Somebody who stays, for this reason that people are told.
    Taken(String),
    /// A container that had it until its engine was lost and may come for it.
    Heir(String),
}

impl Planner {
    /// Closes what is not wanted, and tells the reach of what is.
    pub(super) fn close_watched(&mut self, one: &Planned, plan: &mut Plan) {
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

    pub(super) fn open_watched(&mut self, one: &mut Planned, plan: &mut Plan) {
        let Planned { name, verdicts: Some(verdicts), work, .. } = one else { return };
        let Some((upstream, _)) = self.upstream_of(name) else { return };
        self.forget_waiting(name, |port| verdicts.contains_key(&port));
        let mut failures = self.failures.remove(name).unwrap_or_default();
        // A failure is remembered only while the port is still wanted.
        failures.retain(|port, _| matches!(verdicts.get(port), Some(Verdict::Wanted(_))));
        work.tasks += verdicts.len() as u64;
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
                Holder::Soon => continue,
                Holder::Taken(reason) | Holder::Heir(reason) => {
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

    /// Who stands between a container and a host port.
    pub(super) fn holder(&self, name: &ContainerName, port: NonZeroU16) -> Holder {
        let theirs = |owner: &ContainerName| {
            format!("EADDRINUSE: port {port} is forwarded to container \"{owner}\", which had it first")
        };
        if let Some(owner) = self.native_holder(name, port) {
            return Holder::Taken(theirs(owner));
        }
        let Some(forward) = self.forwards.at_host_port(port) else {
            return match self.port_holds.get(&port).filter(|hold| *hold != name) {
                Some(hold) => Holder::Heir(theirs(hold)),
                None => Holder::Free,
            };
        };
        match self.owner_of(forward) {
            _ if !forward.is_live() => Holder::Soon,
            Some(owner) if owner != name => Holder::Taken(theirs(owner)),
            Some(_) => Holder::Taken(format!(
                "EADDRINUSE: port {port} of the host leads to port {} of this container",
                forward.target_port
            )),
            // One that nobody has claimed.
            None => Holder::Soon,
        }
    }
}
