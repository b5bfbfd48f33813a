//! Accepting connections: as many as there is room for, with a pause when descriptors run out or accepts keep failing.

use std::time::Duration;

use super::listener::Accepting;
use super::{Report, Shard, Timer};
use crate::command::Family;
use crate::reactor::{EventKind, Poller, SocketIo, SocketOf};
use crate::relay::Dial;
use crate::sys::SocketError;
use crate::table::SlotId;

/// Consecutive failed accepts of one listener after which it pauses. Linux also reports errors of a new connection by
/// accept(2), which end that connection; an error of the listener itself persists.
const FAILURES_MAX: u32 = 16;
/// The first such pause, doubled each time.
const FAILURE_PAUSE_FIRST: Duration = Duration::from_millis(100);
const FAILURE_PAUSE_MAX: Duration = Duration::from_secs(30);

impl<P: Poller> Shard<P> {
    /// Handles an event of a listening socket.
    pub(super) fn on_listener_event(&mut self, id: SlotId, index: usize, event: EventKind) {
        match event {
            EventKind::Ready => self.accept(id, index),
            EventKind::Closed => {
                let Some(listener) = self.listeners.entry_mut(id) else { return };
                listener.sockets.retain(|accepting| accepting.index != index);
                self.remove_listener_if_done(id);
            }
        }
    }

    /// Accepts on every socket of a listener.
    pub(super) fn accept_all(&mut self, id: SlotId) {
        let sockets = self.listeners.entry(id).map_or(Vec::new(), |listener| listener.sockets.clone());
        for Accepting { index, .. } in sockets {
            self.accept(id, index);
        }
    }

    fn has_room(&self) -> bool {
        self.connections.len() < self.limits.connections_max as usize
    }

    /// Accepts until the backlog is empty, or the budget of this listener is used up.
    fn accept(&mut self, id: SlotId, index: usize) {
        for _ in 0..self.limits.accept_burst {
            if !self.has_room() {
                // Clients wait in the kernel's queue; none is lost.
                break;
            }
            let Some(listener) = self.listeners.entry_mut(id) else { return };
            if !listener.open || listener.paused_until.is_some() {
                return;
            }
            let accepting = listener.sockets.iter().find(|accepting| accepting.index == index);
            let Some(Accepting { key, family, .. }) = accepting.copied() else { return };
            match self.reactor.accept(key) {
                None => return,
                Some(Ok(socket)) => self.on_accepted(id, socket, family),
                Some(Err(error)) => self.on_accept_failed(id, error),
            }
        }
        // One entry for all its sockets, so that a listener that repeatedly finds no room does not fill the queue.
        if let Some(listener) = self.listeners.entry_mut(id)
            && !std::mem::replace(&mut listener.queued, true)
        {
            self.accept_later.push_back(id);
        }
    }

    fn on_accepted(&mut self, id: SlotId, socket: SocketOf<P>, client_family: Family) {
        if let Some(listener) = self.listeners.entry_mut(id)
            && listener.failures > 0
        {
            if listener.failures > FAILURES_MAX {
                let port = listener.host_port;
                let what = format!("the listener on port {port} accepts connections again");
                self.reports.push(Report::Recovered { what });
            }
            listener.failures = 0;
            listener.pause = FAILURE_PAUSE_FIRST;
        }
        if let Some(socket) = self.pass_to_peer(id, socket, client_family) {
            self.start_connection(id, socket, client_family);
        }
    }

    fn on_accept_failed(&mut self, id: SlotId, error: SocketError) {
        if error == SocketError::Exhausted {
            self.degrade("no descriptors are left, so new connections wait; raise the limit (ulimit -n)");
            return self.pause(id, self.limits.exhausted_pause);
        }
        let Some(listener) = self.listeners.entry_mut(id) else { return };
        listener.failures = listener.failures.saturating_add(1);
        if listener.failures < FAILURES_MAX {
            return;
        }
        if listener.failures == FAILURES_MAX {
            let port = listener.host_port;
            let what = format!("the listener on port {port} fails to accept connections: {error}");
            self.reports.push(Report::Degraded { what });
            listener.pause = FAILURE_PAUSE_FIRST;
            // From now on the listener pauses after each failure.
            listener.failures += 1;
        }
        let pause = listener.pause;
        listener.pause = (2 * pause).min(FAILURE_PAUSE_MAX);
        self.pause(id, pause);
    }

    fn pause(&mut self, id: SlotId, pause: Duration) {
        let until = self.now + pause;
        if let Some(listener) = self.listeners.entry_mut(id) {
            Self::set_timer(&mut self.timers, Timer::Listener(id), &mut listener.paused_until, Some(until));
        }
    }

    /// Passes a client to the shard with the fewest connections, if that is another one; otherwise returns it.
    fn pass_to_peer(
        &mut self,
        id: SlotId,
        socket: SocketOf<P>,
        client_family: Family,
    ) -> Option<SocketOf<P>> {
        let listener = self.listeners.entry(id)?;
        let Some(peers) = &mut self.peers else { return Some(socket) };
        let Some(peer) = peers.less_loaded_than(self.connections.len()) else { return Some(socket) };
        match self.reactor.io().disown(socket) {
            Ok(socket) => {
                peers.send(peer, listener.forward, socket, client_family);
                None
            }
            Err(socket) => Some(socket),
        }
    }

    /// Connects to the server for an accepted client.
    pub(super) fn start_connection(&mut self, listener: SlotId, socket: SocketOf<P>, client_family: Family) {
        let Some(entry) = self.listeners.entry_mut(listener) else { return };
        entry.stats.accepted += 1;
        entry.stats.open += 1;
        let (reach, port) = (entry.reach, entry.target_port);
        self.dial(listener, socket, Dial::new(client_family, reach, port));
    }

    pub(super) fn can_accept_later(&self) -> bool {
        !self.accept_later.is_empty() && self.has_room()
    }

    pub(super) fn resume_accepting(&mut self) {
        if !self.can_accept_later() {
            return;
        }
        for _ in 0..self.accept_later.len() {
            let Some(id) = self.accept_later.pop_front() else { return };
            if let Some(listener) = self.listeners.entry_mut(id) {
                listener.queued = false;
                self.accept_all(id);
            }
        }
    }
}
