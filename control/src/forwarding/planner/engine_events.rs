//! The planner's reactions to the engine's events. Pure.

use std::time::Instant;

use landfall_engine::command::{Event, ForwardId, ForwardState, UpstreamId};

use super::announced::NotForwarded;
use super::{Change, ClosedReason, Failure, Forward, Planner, Status};
use crate::forwarding::planner::observation::{Listeners, Observation};

impl Planner {
    /// Handles an event of the engine. An event about an unknown upstream or forward changes nothing.
    pub fn on_engine_event(&mut self, event: &Event, now: Instant) -> Vec<Change> {
        match event {
            Event::Listeners { upstream, opened, closed } => {
                if let Some(known) = self.upstreams.get_mut(upstream) {
                    known.seen.get_or_insert_default().update(opened, closed);
                    self.forget_stubs(*upstream);
                    self.mark_owner(*upstream);
                }
            }
            Event::Observed { upstream, listening, more } => {
                self.partial.entry(*upstream).or_default().extend(listening);
                if !more {
                    let whole = self.partial.remove(upstream).unwrap_or_default();
                    if let Some(known) = self.upstreams.get_mut(upstream) {
                        known.seen = Some(Observation::whole(&whole));
                        self.forget_stubs(*upstream);
                        self.mark_owner(*upstream);
                    }
                }
            }
            Event::State { forwards, .. } => self.count(forwards),
            Event::ListenerOpened { forward, .. } => return self.on_opened(*forward),
            Event::ListenerFailed { forward, failure, .. } => {
                let reason = format!("{} ({})", failure.detail, failure.address);
                return self.on_failed(*forward, reason, now).into_iter().collect();
            }
            Event::ListenerClosed { forward, .. } => {
                return self.forget(*forward, ClosedReason::HostError).into_iter().collect();
            }
            Event::UpstreamRemoved { upstream, reason } => {
                self.mark_owner(*upstream);
                let ids: Vec<ForwardId> = self.forwards.of_upstream(*upstream).map(|(id, _)| id).collect();
                let mut changes: Vec<Change> =
                    ids.into_iter().filter_map(|id| self.forget(id, ClosedReason::HostError)).collect();
                if let Some(known) = self.upstreams.remove(upstream)
                    && !known.removing
                    && let Some(name) = known.owner
                {
                    let reason =
                        reason.clone().unwrap_or_else(|| "the engine removed its upstream".to_owned());
                    changes.push(Change::Lost { name, dialled: known.dialled, reason });
                }
                return changes;
            }
            _ => {}
        }
        Vec::new()
    }

    /// Marks the container behind an upstream.
    fn mark_owner(&mut self, upstream: UpstreamId) {
        if let Some(owner) = self.upstreams.get(&upstream).and_then(|upstream| upstream.owner.as_ref()) {
            self.dirty_set.mark(owner);
        }
    }

    /// Removes a forward from the table. Its host port is free from now on.
    fn remove(&mut self, id: ForwardId) -> Option<Forward> {
        let forward = self.forwards.remove(id)?;
        self.mark_owner(forward.upstream);
        self.mark_port_waiters(forward.host_port);
        Some(forward)
    }

    fn on_opened(&mut self, id: ForwardId) -> Vec<Change> {
        let Some(forward) = self.forwards.get_mut(id).filter(|forward| forward.status == Status::Opening)
        else {
            return Vec::new();
        };
        forward.status = Status::Open;
        forward.reported_open = true;
        let (port, host_port) = (forward.target_port, forward.host_port);
        let (reserved, upstream) = (forward.reserved, forward.upstream);
        self.mark_owner(upstream);
        let Some(upstream) = self.upstreams.get(&upstream) else { return Vec::new() };
        let Some(name) = upstream.owner.clone() else { return Vec::new() };
        if reserved {
            return self.on_reserved(&name, port, host_port);
        }
        // For an announced port, the wire's event has the address on which the host listens.
        let seen = upstream.seen.as_ref().filter(|_| !upstream.dialled).and_then(|seen| seen.at(port));
        let unseen = if upstream.dialled { "127.0.0.1" } else { "0.0.0.0" };
        let bind = seen.map_or(unseen, Listeners::bind_address);
        if let Some(failures) = self.failures.get_mut(&name) {
            failures.remove(&port);
        }
        let mut changes: Vec<Change> = self.end_lingering(host_port).into_iter().collect();
        changes.push(Change::Opened { name, port, host_port, bind });
        changes
    }

    fn on_failed(&mut self, id: ForwardId, reason: String, now: Instant) -> Option<Change> {
        let forward = self.remove(id)?;
        let upstream = self.upstreams.get(&forward.upstream).filter(|upstream| !upstream.removing)?;
        let name = upstream.owner.clone()?;
        let port = forward.target_port;
        // If it was closed meanwhile, no result is expected.
        let waits = forward.status == Status::Opening;
        if forward.reserved {
            return waits.then(|| self.on_reserve_failed(&name, port, reason, now)).flatten();
        }
        if upstream.dialled {
            if waits {
                self.record_attempt(&name, port, Some(NotForwarded::Failed(reason.clone())));
            }
            return waits.then_some(Change::Failed { name, port, reason });
        }
        let failure = Failure { at: Some(now), reason: reason.clone() };
        let before = self.failures.entry(name.clone()).or_default().insert(port, failure);
        before.is_none().then_some(Change::Failed { name, port, reason })
    }

    /// Removes a forward that has ended; `why` is the reason unless a command closed it.
    pub(super) fn forget(&mut self, id: ForwardId, why: ClosedReason) -> Option<Change> {
        let forward = self.remove(id)?;
        let upstream = self.upstreams.get(&forward.upstream)?;
        let name = upstream.owner.clone()?;
        let (port, host_port) = (forward.target_port, forward.host_port);
        let why = match forward.status {
            Status::Closing { why } => why,
            Status::Opening | Status::Open => {
                if upstream.dialled && !forward.reserved {
                    self.retry_announced(&name, port);
                }
                why
            }
        };
        forward.reported_open.then_some(Change::Closed { name, port, host_port, why })
    }

    fn count(&mut self, forwards: &[ForwardState]) {
        for state in forwards {
            let Some(known) = self.forwards.get_mut(state.forward).filter(|known| known.stats != state.stats)
            else {
                continue;
            };
            known.stats = state.stats;
            let owner = self.upstreams.get(&known.upstream).and_then(|upstream| upstream.owner.as_ref());
            owner.into_iter().for_each(|owner| self.dirty_set.mark_stale(owner));
        }
    }
}
