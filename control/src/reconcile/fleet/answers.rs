//! What the engine says, taken in.

use std::time::Instant;

use landfall_engine::command::{Event, ForwardId, ForwardState};

use super::{Change, ClosedReason, Failure, Fleet, Status};
use crate::reconcile::observation::Observation;

impl Fleet {
    /// Takes in an event of the engine; what it says of something unknown changes nothing.
    pub fn hear(&mut self, event: &Event, now: Instant) -> Vec<Change> {
        match event {
            Event::Listeners { upstream, opened, closed } => {
                if let Some(known) = self.upstreams.get_mut(upstream) {
                    known.seen.get_or_insert_default().update(opened, closed);
                }
            }
            Event::Observed { upstream, listening, more } => {
                self.partial.entry(*upstream).or_default().extend(listening);
                if !more {
                    let whole = self.partial.remove(upstream).unwrap_or_default();
                    if let Some(known) = self.upstreams.get_mut(upstream) {
                        known.seen = Some(Observation::whole(whole));
                    }
                }
            }
            Event::State { forwards, .. } => self.count(forwards),
            Event::ListenerOpened { forward, .. } => return self.on_opened(*forward).into_iter().collect(),
            Event::ListenerFailed { forward, failure, .. } => {
                let reason = format!("{} ({})", failure.detail, failure.address);
                return self.on_failed(*forward, reason, now).into_iter().collect();
            }
            Event::ListenerClosed { forward, .. } => {
                return self.forget(*forward, ClosedReason::HostError).into_iter().collect();
            }
            Event::UpstreamRemoved { upstream, reason } => {
                let ids = self.forwards.iter().filter(|(_, forward)| forward.upstream == *upstream);
                let ids: Vec<ForwardId> = ids.map(|(id, _)| *id).collect();
                let mut changes: Vec<Change> =
                    ids.into_iter().filter_map(|id| self.forget(id, ClosedReason::HostError)).collect();
                if let Some(known) = self.upstreams.remove(upstream)
                    && !known.leaving
                    && let Some(name) = known.owner
                {
                    let reason = reason.clone().unwrap_or_else(|| "the engine let go of it".to_owned());
                    changes.push(Change::Lost { name, reason });
                }
                return changes;
            }
            _ => {}
        }
        Vec::new()
    }

    fn on_opened(&mut self, id: ForwardId) -> Option<Change> {
        let forward = self.forwards.get_mut(&id)?;
        if forward.status != Status::Opening {
            return None;
        }
        forward.status = Status::Open;
        forward.told = true;
        let port = forward.host_port;
        let upstream = self.upstreams.get(&forward.upstream)?;
        let bind = upstream.seen.as_ref().map_or("0.0.0.0", |seen| seen.bind_address(port));
        let name = upstream.owner.clone()?;
        self.failures.remove(&(name.clone(), port));
        Some(Change::Opened { name, port, bind })
    }

    fn on_failed(&mut self, id: ForwardId, reason: String, now: Instant) -> Option<Change> {
        let forward = self.forwards.remove(&id)?;
        let upstream = self.upstreams.get(&forward.upstream).filter(|upstream| !upstream.leaving)?;
        let name = upstream.owner.clone()?;
        let port = forward.host_port;
        let failure = Failure { at: Some(now), reason: reason.clone() };
        let before = self.failures.insert((name.clone(), port), failure);
        before.is_none().then_some(Change::Failed { name, port, reason })
    }

    /// Forgets a forward that is gone; `why` holds where nobody asked for that.
    pub(super) fn forget(&mut self, id: ForwardId, why: ClosedReason) -> Option<Change> {
        let forward = self.forwards.remove(&id)?;
        let why = match forward.status {
            Status::Closing { why } => why,
            Status::Opening | Status::Open => why,
        };
        let name = self.upstreams.get(&forward.upstream)?.owner.clone()?;
        forward.told.then_some(Change::Closed { name, port: forward.host_port, why })
    }

    fn count(&mut self, forwards: &[ForwardState]) {
        for state in forwards {
            if let Some(known) = self.forwards.get_mut(&state.forward) {
                known.stats = state.stats;
            }
        }
    }
}
