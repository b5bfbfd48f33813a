//! Taking connections in: accepting as long as there is room, resting when descriptors run out.

use super::{KIND_ACCEPT, Shard, Timer};
use crate::command::Family;
use crate::ring::{Op, Outcome, Ring, Submitted};
use crate::sys::SocketError;
use crate::table::{SlotId, TokenParts};

impl<R: Ring> Shard<R> {
    /// Accepts on every socket of a listener that has no accept in flight.
    pub(super) fn accept_all(&mut self, id: SlotId) {
        let sockets = self.listeners.entry(id).map_or(0, |listener| listener.sockets.len());
        for index in 0..sockets {
            self.accept(id, index);
        }
    }

    fn has_room(&self) -> bool {
        self.connections.len() < self.limits.connections_max as usize
    }

    /// Accepts until nobody waits, or this listener has had its turn.
    fn accept(&mut self, id: SlotId, index: usize) {
        for _ in 0..self.limits.accept_burst {
            if !self.has_room() {
                // Clients wait in the kernel's queue, and nothing is lost.
                break;
            }
            let Some(listener) = self.listeners.entry_mut(id) else { return };
            if !listener.open || listener.resting_until.is_some() {
                return;
            }
            let Some(accepting) = listener.sockets.get_mut(index) else { return };
            if accepting.key.is_some() {
                return;
            }
            let kind = KIND_ACCEPT + u8::try_from(index).unwrap_or(0);
            let op = Op::Accept { listener: accepting.socket.clone() };
            match self.ring.submit(TokenParts { kind, id }.pack(), op) {
                Submitted::Pending(key) => {
                    accepting.key = Some(key);
                    return;
                }
                Submitted::Done(outcome) => self.on_accepted(id, outcome),
            }
        }
        // Once for all its sockets, or a listener that finds no room again and again would fill the queue.
        if let Some(listener) = self.listeners.entry_mut(id)
            && !std::mem::replace(&mut listener.queued, true)
        {
            self.accept_later.push_back(id);
        }
    }

    pub(super) fn on_accept_completion(&mut self, id: SlotId, index: usize, outcome: Outcome<R>) {
        let Some(listener) = self.listeners.entry_mut(id) else { return };
        // Not by position: a socket that had no accept in flight when the listener closed is gone already.
        if let Some(accepting) = listener.sockets.iter_mut().find(|accepting| accepting.index == index) {
            accepting.key = None;
        }
        if listener.open {
            self.on_accepted(id, outcome);
            self.accept(id, index);
        } else {
            // A client that was accepted while the listener closed goes on; it was told that it is connected.
            self.on_accepted(id, outcome);
            if let Some(listener) = self.listeners.entry_mut(id)
                && listener.sockets.iter().all(|accepting| accepting.key.is_none())
            {
                listener.sockets.clear();
            }
            self.forget_listener(id);
        }
    }

    fn on_accepted(&mut self, id: SlotId, outcome: Outcome<R>) {
        match outcome {
            Outcome::Accepted(Ok((socket, came_by))) => {
                if let Some(socket) = self.hand_over(id, socket, came_by) {
                    self.begin(id, socket, came_by);
                }
            }
            Outcome::Accepted(Err(SocketError::Exhausted)) => {
                self.degrade("no descriptors are left, so new connections wait; raise the limit (ulimit -n)");
                self.rest(id);
            }
            // Linux hands errors of the new connection to accept(2); the listener is as well as before.
            Outcome::Accepted(Err(_)) => {}
            other => drop(other),
        }
    }

    fn rest(&mut self, id: SlotId) {
        let until = self.now + self.limits.exhausted_pause;
        if let Some(listener) = self.listeners.entry_mut(id) {
            Self::set_timer(&mut self.timers, Timer::Listener(id), &mut listener.resting_until, Some(until));
        }
    }

    /// Gives a client to the shard with the fewest connections, if that is another one; else gives it back.
    fn hand_over(&mut self, id: SlotId, socket: R::Socket, came_by: Family) -> Option<R::Socket> {
        let listener = self.listeners.entry(id)?;
        let Some(peers) = &mut self.peers else { return Some(socket) };
        // While a listener closes, the others may have forgotten it already.
        let peer = if listener.open { peers.emptier_than(self.connections.len()) } else { None };
        let Some(peer) = peer else { return Some(socket) };
        match self.ring.disown(socket) {
            Ok(socket) => {
                peers.send(peer, listener.forward, socket, came_by);
                None
            }
            Err(socket) => Some(socket),
        }
    }

    /// A client is in: finds its way to the server.
    pub(super) fn begin(&mut self, listener: SlotId, socket: R::Socket, came_by: Family) {
        let Some(entry) = self.listeners.entry_mut(listener) else { return };
        entry.stats.accepted += 1;
        entry.stats.open += 1;
        let (reach, port) = (entry.reach, entry.target_port);
        self.dial(listener, socket, crate::relay::Dial::new(came_by, reach, port));
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
