//! What the conductor tells: each thing in as many events as fit messages.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use super::Conductor;
use crate::command::{Event, ForwardId, ForwardState, Listening, Told, UpstreamId, UpstreamState};
use crate::shard::Lent;

/// How many forwards of a state fit one event, and so one message (about 330 bytes of JSON each).
const FORWARDS_PER_STATE: usize = 256;
/// How many listeners fit one event (about 100 bytes of JSON each).
const LISTENERS_PER_EVENT: usize = 1_024;

impl Conductor {
    pub(super) fn tell(&self, event: Event) {
        // Nobody listens any more only while the engine is being dropped.
        let _ = self.events.send(event.into());
    }

    /// Tells what the shards hold, joined by forward, and before it what listens inside, where that was asked for.
    pub(super) fn tell_state(&mut self, parts: Vec<ForwardState>) {
        let mut forwards: BTreeMap<ForwardId, ForwardState> = BTreeMap::new();
        for part in parts {
            match forwards.entry(part.forward) {
                Entry::Vacant(vacant) => {
                    vacant.insert(part);
                }
                Entry::Occupied(mut known) => {
                    known.get_mut().listening |= part.listening;
                    known.get_mut().stats.add(&part.stats);
                }
            }
        }
        let forwards: Vec<ForwardState> = forwards.into_values().collect();
        if self.with_observed.pop_front().unwrap_or(true) {
            self.tell_observed();
        }
        let upstreams: Vec<UpstreamState> = self
            .upstreams
            .iter()
            .map(|(&upstream, held)| UpstreamState { upstream, netns_cookie: held.netns_cookie })
            .collect();
        in_parts(&forwards, FORWARDS_PER_STATE, |forwards, more| {
            self.tell(Event::State { upstreams: upstreams.clone(), forwards, more });
        });
    }

    /// Tells all that listens in the namespaces that have been read. Nothing can come between this and the listeners that
    /// were told before, since both are told here.
    fn tell_observed(&self) {
        for (&upstream, held) in &self.upstreams {
            let Some(listening) = &held.listening else { continue };
            let listening: Vec<Listening> = listening.iter().copied().collect();
            in_parts(&listening, LISTENERS_PER_EVENT, |listening, more| {
                self.tell(Event::Observed { upstream, listening, more });
            });
        }
    }

    pub(super) fn tell_lent(&mut self, listeners: Vec<Lent>) {
        let count = u32::try_from(listeners.len()).unwrap_or(u32::MAX);
        for Lent {
            forward: ForwardState { forward, upstream, host_port, target_port, reach, .. },
            sockets,
        } in listeners
        {
            if let Some(placed) = self.forwards.get_mut(&forward) {
                placed.lent = true;
            }
            let event = Event::ListenerLent { forward, upstream, host_port, target_port, reach };
            let _ = self.events.send(Told { event, descriptors: sockets });
        }
        self.tell(Event::ListenersLent { count });
    }

    /// Tells of listeners in as many events as fit messages. What closed comes first, since a server that was replaced is in both.
    pub(super) fn tell_listeners(&self, upstream: UpstreamId, opened: &[Listening], closed: &[Listening]) {
        if opened.len() + closed.len() <= LISTENERS_PER_EVENT {
            let (opened, closed) = (opened.to_vec(), closed.to_vec());
            return self.tell(Event::Listeners { upstream, opened, closed });
        }
        for closed in closed.chunks(LISTENERS_PER_EVENT) {
            self.tell(Event::Listeners { upstream, opened: Vec::new(), closed: closed.to_vec() });
        }
        for opened in opened.chunks(LISTENERS_PER_EVENT) {
            self.tell(Event::Listeners { upstream, opened: opened.to_vec(), closed: Vec::new() });
        }
    }
}

/// Gives out `all` in parts of `most` with whether another one follows; the only part of nothing is empty.
fn in_parts<T: Clone>(all: &[T], most: usize, mut give: impl FnMut(Vec<T>, bool)) {
    let parts = all.len().div_ceil(most).max(1);
    let mut chunks = all.chunks(most);
    for part in 1..=parts {
        give(chunks.next().unwrap_or_default().to_vec(), part < parts);
    }
}
