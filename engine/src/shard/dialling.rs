//! From an accepted client to a connected server: a socket from the stock, a connect, perhaps a second family.

use super::{KIND_STOCK, Relayed, Shard, Stage, Timer};
use crate::command::{Ending, Family};
use crate::error::EndReason;
use crate::opener::client::StockError;
use crate::relay::{Connection, Dial, DialStep, Input, Operation, Side};
use crate::ring::{Op, Outcome, Ring, Submitted};
use crate::sys::SocketError;
use crate::table::{SlotId, TokenParts};

impl<R: Ring> Shard<R> {
    /// Puts a client into the table and dials for it.
    pub(super) fn dial(&mut self, listener: SlotId, downstream: R::Socket, dial: Dial) {
        let step = dial.attempt();
        let id = self.connections.insert(Relayed {
            listener,
            sockets: [Some(downstream), None],
            loans: [None, None],
            deferred: [None, None],
            keys: [None; Operation::PLACES],
            stage: Stage::Dialling(dial),
            deadline: None,
        });
        self.step_dial(id, step);
    }

    fn step_dial(&mut self, id: SlotId, step: DialStep) {
        match step {
            DialStep::Attempt(family, _) => self.take_socket(id, family),
            DialStep::Established => self.establish(id),
            DialStep::Failed(reason) => self.fail(id, reason),
        }
    }

    fn take_socket(&mut self, id: SlotId, family: Family) {
        let Some(connection) = self.connections.entry(id) else { return };
        let Some(listener) = self.listeners.entry(connection.listener) else { return };
        let upstream_slot = listener.upstream_slot;
        let Some(upstream) = self.upstreams.entry_mut(upstream_slot) else {
            return self.fail(id, EndReason::UpstreamLost);
        };
        if upstream.closing.is_some() {
            return self.fail(id, EndReason::UpstreamLost);
        }
        if upstream.dials.is_some() {
            return self.ask_to_dial(id, upstream_slot);
        }
        if !upstream.is_possible(family) {
            return self.on_connected(id, Err(SocketError::Unreachable));
        }
        match upstream.take(family) {
            Some(socket) => {
                self.connect(id, socket);
                self.refill(upstream_slot);
            }
            None => {
                upstream.wait(family, id);
                self.await_with_deadline(id);
                self.refill(upstream_slot);
            }
        }
    }

    /// Starts the clock of a connection that has to wait for something, unless it runs already.
    pub(super) fn await_with_deadline(&mut self, id: SlotId) {
        let at = self.now + self.limits.connect_timeout;
        if let Some(connection) = self.connections.entry_mut(id)
            && connection.deadline.is_none()
        {
            Self::set_timer(&mut self.timers, Timer::Connection(id), &mut connection.deadline, Some(at));
        }
    }

    fn connect(&mut self, id: SlotId, socket: R::Socket) {
        let Some(connection) = self.connections.entry_mut(id) else { return };
        let Stage::Dialling(dial) = &connection.stage else { return };
        let DialStep::Attempt(_, address) = dial.attempt() else { return };
        connection.sockets[Side::Upstream as usize] = Some(socket.clone());
        let kind = u8::try_from(Operation::Connect.index()).unwrap_or(0);
        match self.ring.submit(TokenParts { kind, id }.pack(), Op::Connect { socket, address }) {
            Submitted::Done(Outcome::Connected(result)) => self.on_connected(id, result),
            Submitted::Done(other) => drop(other),
            Submitted::Pending(key) => {
                connection.keys[Operation::Connect.place()] = Some(key);
                self.await_with_deadline(id);
            }
        }
    }

    pub(super) fn on_connect_completion(&mut self, id: SlotId, outcome: Outcome<R>) {
        let Some(connection) = self.connections.entry(id) else { return };
        if let Stage::Failing(reason) = connection.stage {
            self.end_failed(id, reason);
            return;
        }
        match outcome {
            Outcome::Connected(result) => self.on_connected(id, result),
            other => {
                drop(other);
                self.fail(id, EndReason::Removed);
            }
        }
    }

    fn on_connected(&mut self, id: SlotId, result: Result<(), SocketError>) {
        let Some(connection) = self.connections.entry_mut(id) else { return };
        let Stage::Dialling(dial) = &mut connection.stage else { return };
        let own_peer = match (&connection.sockets[Side::Upstream as usize], result) {
            (Some(socket), Ok(())) => self.ring.is_own_peer(socket),
            _ => false,
        };
        let step = dial.on_connected(result, own_peer);
        if step != DialStep::Established {
            // A socket whose connect failed is not used again; one that met itself must not linger in TIME_WAIT.
            if let Some(socket) = connection.sockets[Side::Upstream as usize].take()
                && own_peer
            {
                self.ring.reset_on_close(&socket);
            }
        }
        self.step_dial(id, step);
    }

    pub(super) fn establish(&mut self, id: SlotId) {
        if let Some(connection) = self.connections.entry_mut(id) {
            connection.stage = Stage::Relaying(Connection::new());
            Self::set_timer(&mut self.timers, Timer::Connection(id), &mut connection.deadline, None);
            self.drive(id, Input::Begin);
        }
    }

    /// There is no way to the server: the client gets a reset, never a clean end that would look like an answer.
    pub(super) fn fail(&mut self, id: SlotId, reason: EndReason) {
        let Some(connection) = self.connections.entry_mut(id) else { return };
        match connection.stage {
            Stage::Dialling(_) => {}
            Stage::Asking(dial) => {
                let upstream =
                    self.listeners.entry(connection.listener).map(|listener| listener.upstream_slot);
                let upstream = upstream.and_then(|slot| self.upstreams.entry_mut(slot));
                if let Some(dials) = upstream.and_then(|upstream| upstream.dials.as_mut()) {
                    dials.end(dial);
                }
            }
            Stage::Failing(_) | Stage::Relaying(_) => return,
        }
        connection.stage = Stage::Failing(reason);
        match connection.keys[Operation::Connect.place()] {
            Some(key) => self.ring.cancel(key),
            None => self.end_failed(id, reason),
        }
    }

    fn end_failed(&mut self, id: SlotId, reason: EndReason) {
        self.end(id, [true; 2], reason);
    }

    /// Asks for sockets if the stock of an upstream is low.
    pub(super) fn refill(&mut self, id: SlotId) {
        loop {
            let Some(upstream) = self.upstreams.entry_mut(id) else { return };
            let Some((family, count)) = upstream.wanted(&self.limits) else { return };
            let op = Op::Stock {
                channel: upstream.channel.clone(),
                family,
                count,
                netns_cookie: upstream.netns_cookie,
            };
            match self.ring.submit(TokenParts { kind: KIND_STOCK, id }.pack(), op) {
                Submitted::Pending(key) => {
                    upstream.asking = Some((family, key));
                    return;
                }
                Submitted::Done(Outcome::Stocked(result)) => self.on_stock(id, family, result),
                Submitted::Done(other) => return drop(other),
            }
        }
    }

    pub(super) fn on_stocked(&mut self, id: SlotId, outcome: Outcome<R>) {
        let Some(upstream) = self.upstreams.entry_mut(id) else { return };
        let Some((family, _)) = upstream.asking.take() else { return };
        if upstream.closing.is_some() {
            drop(outcome);
            return self.forget_upstream(id);
        }
        if let Outcome::Stocked(result) = outcome {
            self.on_stock(id, family, result);
        }
        self.refill(id);
    }

    fn on_stock(&mut self, id: SlotId, family: Family, result: Result<Vec<R::Socket>, StockError>) {
        let Some(upstream) = self.upstreams.entry_mut(id) else { return };
        match result {
            Ok(sockets) => {
                for (connection, socket) in upstream.stocked(family, sockets) {
                    self.connect(connection, socket);
                }
            }
            Err(StockError::Exhausted(_)) => {
                let until = self.now + self.limits.exhausted_pause;
                Self::set_timer(
                    &mut self.timers,
                    Timer::Upstream(id),
                    &mut upstream.resting_until,
                    Some(until),
                );
                self.degrade(
                    "no descriptors are left for sockets inside, so new connections wait (ulimit -n)",
                );
            }
            Err(StockError::Refused(_)) => {
                for connection in upstream.impossible(family) {
                    self.on_connected(connection, Err(SocketError::Unreachable));
                }
            }
            Err(error @ (StockError::Gone | StockError::Hostile(_))) => {
                self.let_go_of_upstream(id, Ending::Drain, Some(error.to_string()));
            }
        }
    }

    pub(super) fn on_connection_deadline(&mut self, id: SlotId) {
        let Some(connection) = self.connections.entry(id) else { return };
        match connection.stage {
            Stage::Relaying(_) => self.drive(id, Input::Deadline),
            Stage::Dialling(_) => {
                // Without a socket it is our side, or the opener's, that ran out.
                let waits_for_socket = connection.sockets[Side::Upstream as usize].is_none();
                let reason =
                    if waits_for_socket { EndReason::DescriptorsExhausted } else { EndReason::TimedOut };
                self.fail(id, reason);
            }
            Stage::Asking(_) => self.fail(id, EndReason::TimedOut),
            Stage::Failing(_) => {}
        }
    }
}
