//! The steps from an accepted client to a connected server: a socket from the stock, a connect, perhaps to a second family;
//! or a request to a driver that connects, and its answer.

use super::upstream::{Answer, UpstreamError};
use super::{Relayed, Shard, Stage, Timer, side_token};
use crate::command::{Ending, Family};
use crate::error::EndReason;
use crate::opener::DialFailure;
use crate::reactor::{Connected, Poller, Readiness, SocketIo, SocketOf};
use crate::relay::{Dial, DialStep, Input, Side};
use crate::sys::SocketError;
use crate::table::SlotId;

impl<P: Poller> Shard<P> {
    /// Puts a client into the table and connects to the server for it.
    pub(super) fn dial(&mut self, listener: SlotId, downstream: SocketOf<P>, dial: Dial) {
        let step = dial.attempt();
        let id = self.connections.insert(Relayed {
            listener,
            keys: [None, None],
            held: [None, None],
            yielded: [false; 2],
            stage: Stage::Dialling(dial),
            deadline: None,
        });
        // The bytes of the client are reported with the result of the connect, and relayed in the same turn.
        let key = self.reactor.register(downstream, side_token(Side::Downstream, id));
        if let Some(connection) = self.connections.entry_mut(id) {
            connection.keys[Side::Downstream as usize] = Some(key);
        }
        self.step_dial(id, step);
    }

    fn step_dial(&mut self, id: SlotId, step: DialStep) {
        match step {
            DialStep::Attempt(family, _) => self.take_socket(id, family),
            DialStep::Established => self.establish(id, false),
            DialStep::Failed(reason) => self.fail(id, reason),
        }
    }

    fn take_socket(&mut self, id: SlotId, family: Family) {
        let Some(connection) = self.connections.entry(id) else { return };
        let Some(listener) = self.listeners.entry(connection.listener) else { return };
        let upstream_slot = listener.upstream_slot;
        let Some(upstream) = self.upstreams.entry_mut(upstream_slot).filter(|upstream| upstream.is_open())
        else {
            return self.fail(id, EndReason::UpstreamLost);
        };
        if upstream.is_host() {
            return self.connect_on_the_host(id, family);
        }
        if upstream.dials.is_some() {
            return self.ask_to_dial(id, upstream_slot);
        }
        if !upstream.is_possible(family) {
            return self.on_connected(id, Connected::Failed(SocketError::Unreachable));
        }
        match upstream.take(family) {
            Some(socket) => {
                self.connect(id, socket);
                self.refill(upstream_slot);
            }
            None => {
                upstream.wait(family, id);
                self.start_deadline(id);
                self.refill(upstream_slot);
            }
        }
    }

    fn connect_on_the_host(&mut self, id: SlotId, family: Family) {
        match self.reactor.io().host_socket(family) {
            Ok(socket) => self.connect(id, socket),
            Err(error) => {
                if error == SocketError::Exhausted {
                    self.degrade(
                        "no descriptors are left for connections to the host, so some are reset (ulimit -n)",
                    );
                }
                self.on_connected(id, Connected::Failed(error));
            }
        }
    }

    /// Starts the deadline of a connection that has to wait, unless it runs already.
    fn start_deadline(&mut self, id: SlotId) {
        let at = self.now + self.limits.connect_timeout;
        if let Some(connection) = self.connections.entry_mut(id)
            && connection.deadline.is_none()
        {
            Self::set_timer(&mut self.timers, Timer::Connection(id), &mut connection.deadline, Some(at));
        }
    }

    /// Starts the deadlines of the first `count` fresh dials that are still in progress.
    pub(super) fn time_dials(&mut self, count: usize) {
        for index in 0..count {
            let Some(id) = self.fresh_dials.get(index).copied() else { break };
            if self.connections.entry(id).is_some_and(|one| matches!(one.stage, Stage::Dialling(_))) {
                self.start_deadline(id);
            }
        }
        self.fresh_dials.drain(..count);
    }

    fn connect(&mut self, id: SlotId, socket: SocketOf<P>) {
        let Some(connection) = self.connections.entry_mut(id) else { return };
        let Stage::Dialling(dial) = &connection.stage else { return };
        let DialStep::Attempt(_, address) = dial.attempt() else { return };
        let started = self.reactor.io().connect(&socket, address);
        if let Some(failed @ Connected::Failed(_)) = started {
            drop(socket);
            return self.on_connected(id, failed);
        }
        // Not earlier: an unconnected socket is reported as writable and hung up (tcp_poll()).
        let key = self.reactor.register(socket, side_token(Side::Upstream, id));
        connection.keys[Side::Upstream as usize] = Some(key);
        match started {
            Some(connected) => self.on_connected(id, connected),
            None => self.fresh_dials.push(id),
        }
    }

    /// Handles a change of readiness of a socket whose connect was in progress.
    pub(super) fn on_connecting(&mut self, id: SlotId) {
        let Some(connection) = self.connections.entry(id) else { return };
        let Some(key) = connection.keys[Side::Upstream as usize] else { return };
        let ready = self.reactor.readiness(key);
        if ready.intersects(Readiness::ERR | Readiness::HUP) {
            let result = self.reactor.on_socket(key, |io, socket| io.connect_result(socket));
            self.on_connected(id, result.unwrap_or(Connected::Failed(SocketError::Reset)));
        } else if ready.contains(Readiness::OUT) {
            self.on_connected(id, Connected::Established);
        }
    }

    fn on_connected(&mut self, id: SlotId, connected: Connected) {
        let own_peer = !matches!(connected, Connected::Failed(_)) && self.is_own_peer(id);
        let Some(connection) = self.connections.entry_mut(id) else { return };
        let Stage::Dialling(dial) = &mut connection.stage else { return };
        let result = match connected {
            Connected::Established | Connected::Reset => Ok(()),
            Connected::Failed(error) => Err(error),
        };
        let step = dial.on_connected(result, own_peer);
        if step != DialStep::Established
            && let Some(key) = connection.keys[Side::Upstream as usize].take()
        {
            // A socket whose connect failed is not reused; one that connected to itself must not stay in TIME_WAIT.
            if own_peer {
                self.reactor.on_socket(key, |io, socket| io.reset_on_close(socket));
            }
            self.reactor.close(key);
        }
        match step {
            DialStep::Established => self.establish(id, connected == Connected::Reset),
            step => self.step_dial(id, step),
        }
    }

    /// Whether a dial connected the socket to itself, because no server listens.
    fn is_own_peer(&mut self, id: SlotId) -> bool {
        let Some(connection) = self.connections.entry(id) else { return false };
        let Stage::Dialling(dial) = &connection.stage else { return false };
        let DialStep::Attempt(_, address) = dial.attempt() else { return false };
        let upstream = self.listeners.entry(connection.listener).map(|listener| listener.upstream_slot);
        let upstream = upstream.and_then(|slot| self.upstreams.entry(slot));
        if upstream.is_some_and(|upstream| !upstream.may_connect_to_itself(address.port())) {
            return false;
        }
        let Some(key) = connection.keys[Side::Upstream as usize] else { return false };
        self.reactor.on_socket(key, |io, socket| io.is_own_peer(socket, address)).unwrap_or(false)
    }

    /// Ends a connection whose server cannot be reached. The client gets a reset, since a clean end would look like an
    /// answer.
    pub(super) fn fail(&mut self, id: SlotId, reason: EndReason) {
        let Some(connection) = self.connections.entry_mut(id) else { return };
        match connection.stage {
            Stage::Dialling(_) => {}
            Stage::Asking(dial) => {
                let listener = self.listeners.entry(connection.listener);
                let upstream = listener.and_then(|listener| self.upstreams.entry_mut(listener.upstream_slot));
                if let Some(dials) = upstream.and_then(|upstream| upstream.dials.as_mut()) {
                    dials.end(dial);
                }
            }
            Stage::Relaying(_) => return,
        }
        self.end(id, [true; 2], reason);
    }

    pub(super) fn on_connection_deadline(&mut self, id: SlotId) {
        let Some(connection) = self.connections.entry(id) else { return };
        match connection.stage {
            Stage::Relaying(_) => self.drive(id, Input::Deadline),
            Stage::Dialling(_) => {
                // Without a socket, the relay or the opener ran out of them.
                let waits_for_socket = connection.keys[Side::Upstream as usize].is_none();
                let reason =
                    if waits_for_socket { EndReason::DescriptorsExhausted } else { EndReason::TimedOut };
                self.fail(id, reason);
            }
            Stage::Asking(_) => self.fail(id, EndReason::TimedOut),
        }
    }

    /// Requests a connection from the driver for a client, with the same time limit as for a connect.
    fn ask_to_dial(&mut self, id: SlotId, upstream_slot: SlotId) {
        let Some(connection) = self.connections.entry_mut(id) else { return };
        let Some(listener) = self.listeners.entry(connection.listener) else { return };
        let Some(upstream) = self.upstreams.entry_mut(upstream_slot) else { return };
        let Some(dials) = &mut upstream.dials else { return };
        connection.stage = Stage::Asking(dials.start(id, listener.target_port));
        self.start_deadline(id);
        self.send_dials(upstream_slot);
    }

    /// Handles answers on the channel of an upstream, room in it, its end, and the end of a pause.
    pub(super) fn on_upstream_ready(&mut self, id: SlotId) {
        while let Some(upstream) = self.upstreams.entry_mut(id) {
            match upstream.next_answer(&mut self.reactor) {
                Ok(None) => break,
                Ok(Some(Answer::Sockets(family, sockets))) => self.on_sockets(id, family, sockets),
                Ok(Some(Answer::Dialled(dial, result))) => self.on_dialled(id, dial, result),
                // The remaining answers are read after a pause.
                Err(error) => return self.on_upstream_error(id, error),
            }
        }
        self.refill(id);
        self.send_dials(id);
    }

    fn pause_upstream(&mut self, id: SlotId) {
        let until = self.now + self.limits.exhausted_pause;
        if let Some(upstream) = self.upstreams.entry_mut(id).filter(|upstream| upstream.is_open()) {
            Self::set_timer(&mut self.timers, Timer::Upstream(id), &mut upstream.paused_until, Some(until));
        }
    }

    /// Requests sockets if the stock of an upstream is low.
    pub(super) fn refill(&mut self, id: SlotId) {
        let Some(upstream) = self.upstreams.entry_mut(id) else { return };
        if let Err(error) = upstream.refill(&mut self.reactor, &self.limits) {
            self.on_upstream_error(id, error);
        }
    }

    fn send_dials(&mut self, id: SlotId) {
        let Some(upstream) = self.upstreams.entry_mut(id) else { return };
        if let Err(error) = upstream.send_dials(&mut self.reactor) {
            self.on_upstream_error(id, error);
        }
    }

    fn on_sockets(&mut self, id: SlotId, family: Family, sockets: Vec<SocketOf<P>>) {
        let Some(upstream) = self.upstreams.entry_mut(id) else { return };
        for (connection, socket) in upstream.stocked(family, sockets) {
            self.connect(connection, socket);
        }
    }

    fn on_dialled(&mut self, id: SlotId, dial: u64, result: Result<SocketOf<P>, DialFailure>) {
        let dials = self.upstreams.entry_mut(id).and_then(|upstream| upstream.dials.as_mut());
        let waiting = dials.and_then(|dials| dials.end(dial));
        let connection = waiting.filter(|connection| self.connections.entry(*connection).is_some());
        match (connection, result) {
            (Some(connection), Ok(socket)) => {
                let key = self.reactor.register(socket, side_token(Side::Upstream, connection));
                if let Some(entry) = self.connections.entry_mut(connection) {
                    entry.keys[Side::Upstream as usize] = Some(key);
                }
                self.establish(connection, false);
            }
            (Some(connection), Err(why)) => self.fail(connection, end_reason(why)),
            // The client of this dial is gone. The server gets a reset, like a server whose client reset the connection.
            (None, Ok(socket)) => self.reactor.io().reset_on_close(&socket),
            (None, Err(_)) => {}
        }
    }

    fn on_upstream_error(&mut self, id: SlotId, error: UpstreamError) {
        match error {
            UpstreamError::Exhausted(what) => {
                self.pause_upstream(id);
                self.degrade(what);
            }
            UpstreamError::Unsupported(family) => {
                let Some(upstream) = self.upstreams.entry_mut(id) else { return };
                for connection in upstream.impossible(family) {
                    self.on_connected(connection, Connected::Failed(SocketError::Unreachable));
                }
                self.on_upstream_ready(id);
            }
            UpstreamError::Lost(reason) => self.close_upstream(id, Ending::Drain, Some(reason)),
        }
    }
}

fn end_reason(why: DialFailure) -> EndReason {
    match why {
        DialFailure::Refused => EndReason::Refused,
        DialFailure::TimedOut => EndReason::TimedOut,
        DialFailure::Exhausted => EndReason::DescriptorsExhausted,
    }
}
