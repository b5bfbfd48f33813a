//! Ports of containers that are entered: what the engine's watch sees is open, and is tried again until it is.

use std::collections::BTreeMap;
use std::num::NonZeroU16;
use std::time::Instant;

use landfall_engine::command::{Command, Ending, UpstreamId};

use super::verdict::Verdict;
use super::{Change, ClosedReason, Failure, Fleet, LINGER, RETRY, Status};
use crate::registration::model::ContainerName;

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

impl Fleet {
    /// Closes what is not wanted, and tells the reach of what is.
    pub(super) fn close_watched(
        &mut self,
        verdicts: &BTreeMap<UpstreamId, BTreeMap<NonZeroU16, Verdict>>,
        now: Instant,
        commands: &mut Vec<Command>,
    ) {
        for (id, forward) in &mut self.forwards {
            let due = forward.is_live() && !forward.reserved;
            let Some(ports) = verdicts.get(&forward.upstream).filter(|_| due) else { continue };
            let owner = self.upstreams.get(&forward.upstream).and_then(|upstream| upstream.owner.as_ref());
            let broker = owner.and_then(|owner| self.brokers.get(owner));
            let expired = match ports.get(&forward.target_port) {
                _ if forward.host_port != forward.target_port => true,
                _ if broker.is_some_and(|broker| broker.reserves(forward.target_port)) => true,
                Some(Verdict::Wanted(reach)) => {
                    forward.unseen = None;
                    if forward.reach != *reach {
                        forward.reach = *reach;
                        commands.push(Command::SetReach { forward: *id, reach: *reach });
                    }
                    false
                }
                Some(Verdict::Denied(_) | Verdict::Published(..)) => true,
                None => {
                    let since = *forward.unseen.get_or_insert(now);
                    now.saturating_duration_since(since) >= LINGER
                }
            };
            if expired {
                forward.status = Status::Closing { why: ClosedReason::ContainerReleased };
                commands.push(Command::CloseListener { forward: *id, ending: Ending::Drain });
            }
        }
    }

    pub(super) fn open_watched(
        &mut self,
        name: &ContainerName,
        upstream: UpstreamId,
        ports: &BTreeMap<NonZeroU16, Verdict>,
        now: Instant,
        commands: &mut Vec<Command>,
        changes: &mut Vec<Change>,
    ) {
        // A failure is remembered only while somebody still waits for the port.
        self.failures
            .retain(|(owner, port), _| owner != name || matches!(ports.get(port), Some(Verdict::Wanted(_))));
        for (port, verdict) in ports {
            let Verdict::Wanted(reach) = verdict else { continue };
            if self.brokers.get(name).is_some_and(|broker| broker.reserves(*port)) {
                continue;
            }
            let own = |forward: &&super::Forward| forward.host_port == *port && !forward.reserved;
            if self.forwards_of(name).any(|forward| own(&forward)) {
                continue;
            }
            match self.holder(name, *port) {
                Holder::Free => {}
                Holder::Soon => continue,
                Holder::Taken(reason) | Holder::Heir(reason) => {
                    let failure = Failure { at: None, reason: reason.clone() };
                    if self.failures.insert((name.clone(), *port), failure).is_none() {
                        changes.push(Change::Failed { name: name.clone(), port: *port, reason });
                    }
                    continue;
                }
            }
            let rests = self.failures.get(&(name.clone(), *port)).and_then(|failure| failure.at);
            if rests.is_some_and(|at| now.saturating_duration_since(at) < RETRY) {
                continue;
            }
            commands.push(self.open_one(upstream, *port, *port, *reach, false));
        }
    }

    /// Who stands between a container and a host port.
    pub(super) fn holder(&self, name: &ContainerName, port: NonZeroU16) -> Holder {
        let theirs = |owner: &ContainerName| {
            format!("EADDRINUSE: port {port} is forwarded to container \"{owner}\", which had it first")
        };
        let Some(forward) = self.forwards.values().find(|forward| forward.host_port == port) else {
            return match self.heirs.get(&port).filter(|heir| *heir != name) {
                Some(heir) => Holder::Heir(theirs(heir)),
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
