//! The events that the conductor sends, split so that each fits one message.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use super::Conductor;
use crate::command::{Event, EventMessage, ForwardId, ForwardState, Listening, UpstreamId, UpstreamState};
use crate::shard::Lent;

/// The number of forwards that fit one event, and so one message (about 330 bytes of JSON each).
const FORWARDS_PER_STATE: usize = 256;
/// The number of listeners that fit one event (about 100 bytes of JSON each).
const LISTENERS_PER_EVENT: usize = 1_024;

impl Conductor {
    pub(super) fn emit(&self, event: Event) {
        // The send fails only while the engine is being dropped.
        let _ = self.events.send(event.into());
    }

    /// Sends the state, joined by forward from the parts of the shards. If the driver requested it, the listeners inside
    /// precede.
    pub(super) fn emit_state(&mut self, parts: Vec<ForwardState>) {
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
            self.emit_observed();
        }
        let upstreams: Vec<UpstreamState> = self
            .upstreams
            .iter()
            .map(|(&upstream, held)| UpstreamState { upstream, netns_cookie: held.netns_cookie })
            .collect();
        in_parts(&forwards, FORWARDS_PER_STATE, |forwards, more| {
            self.emit(Event::State { upstreams: upstreams.clone(), forwards, more });
        });
    }

    /// Sends all listeners of the namespaces that have been read. This agrees with the changes sent before, because the same
    /// thread sends both.
    fn emit_observed(&self) {
        for (&upstream, held) in &self.upstreams {
            let Some(listening) = &held.listening else { continue };
            let listening: Vec<Listening> = listening.iter().copied().collect();
            in_parts(&listening, LISTENERS_PER_EVENT, |listening, more| {
                self.emit(Event::Observed { upstream, listening, more });
            });
        }
    }

    pub(super) fn emit_lent(&mut self, listeners: Vec<Lent>) {
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
            let _ = self.events.send(EventMessage { event, descriptors: sockets });
        }
        self.emit(Event::ListenersLent { count });
    }

    /// Sends listeners in events that fit messages. Closed ones come first, since a server that was replaced is in both lists.
    pub(super) fn emit_listeners(&self, upstream: UpstreamId, opened: &[Listening], closed: &[Listening]) {
        if opened.len() + closed.len() <= LISTENERS_PER_EVENT {
            let (opened, closed) = (opened.to_vec(), closed.to_vec());
            return self.emit(Event::Listeners { upstream, opened, closed });
        }
        for closed in closed.chunks(LISTENERS_PER_EVENT) {
            self.emit(Event::Listeners { upstream, opened: Vec::new(), closed: closed.to_vec() });
        }
        for opened in opened.chunks(LISTENERS_PER_EVENT) {
            self.emit(Event::Listeners { upstream, opened: opened.to_vec(), closed: Vec::new() });
        }
    }
}

/// Passes `all` to `give` in parts of at most `most`, with whether another part follows. An empty list is one empty part.
fn in_parts<T: Clone>(all: &[T], most: usize, mut give: impl FnMut(Vec<T>, bool)) {
    let parts = all.len().div_ceil(most).max(1);
    let mut chunks = all.chunks(most);
    for part in 1..=parts {
        give(chunks.next().unwrap_or_default().to_vec(), part < parts);
    }
}
