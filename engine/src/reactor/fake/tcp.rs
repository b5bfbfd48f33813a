//! TCP in memory. It models the behaviour of Linux that a relay can observe:
//!
//! - Bytes wait in the sender's queue until the receiver's window has room; those bytes are the unacknowledged ones.
//! - A reset discards the sender's queue, but never bytes that the receiver already has. The receiver reads those first,
//!   then the error, which a read or a send returns once (`sock_error()`); a read after that returns an end.
//! - An end that preceded a reset is returned before it (the kernel checks `SOCK_DONE` before `sk_err`).
//! - A close with unread bytes is a reset; so is the arrival of bytes at a closed end.
//! - Only a sender that found no room gets an edge when there is room (`SOCK_NOSPACE`).
//! - A read stops before an urgent byte. One that starts there passes it; a splice does not (tcp_read_sock()).
//! - An unconnected socket polls as writable and hung up; one whose connect is in progress as nothing (tcp_poll()).

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::bytes::{Bytes, Run};
use super::faults::Knob;
use super::net::{EndId, File, HOST, Net, Newcomer};
use crate::command::Family;
use crate::reactor::{Connected, Readiness, TransferMode};
use crate::sys::SocketError;

#[derive(Debug)]
pub(super) struct End {
    peer: Option<EndId>,
    /// The namespace of the socket; `None` for the host.
    pub(super) namespace: Option<u64>,
    pub(super) family: Family,
    inbox: Bytes,
    outbox: Bytes,
    /// The capacity of the inbox.
    window: usize,
    /// The capacity of the outbox.
    send_buffer: usize,
    /// Whether a send found no room since the last edge.
    no_space: bool,
    /// An urgent byte in the inbox, by its distance from the front.
    urgent: Option<usize>,
    /// The number of bytes that have arrived in the inbox so far.
    arrived: u64,
    pub(super) connect: Connect,
    fin_sent: bool,
    fin_in: bool,
    broken: bool,
    /// Whether the error of a reset is still to be returned.
    error_pending: bool,
    closed: bool,
    pub(super) reset_on_close: bool,
    held: bool,
    /// The relay's other end of the same relayed connection.
    partner: Option<EndId>,
}

/// The connect of an end.
#[derive(Clone, Copy, Debug)]
pub(super) enum Connect {
    /// It was not called.
    No,
    /// It is in progress.
    InProgress(SocketAddr, Option<Instant>, ConnectOutcome),
    Done,
    /// The socket is connected to itself, at that address.
    OwnPeer(SocketAddr),
    Failed(SocketError),
}

/// The planned end of a connect.
#[derive(Clone, Copy, Debug)]
pub(super) enum ConnectOutcome {
    /// The network decides.
    Reach,
    OwnPeer,
    Fail(SocketError),
}

/// The result of a read by a far end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FarRead {
    /// No byte has arrived.
    Empty,
    /// Bytes.
    Bytes(Bytes),
    /// A FIN.
    Eof,
    /// A reset.
    Reset,
}

impl Net {
    pub(super) fn end(&mut self, namespace: Option<u64>, family: Family, window: usize) -> EndId {
        let send_buffer = self.dice.size(1, 6000);
        self.ends.push(End {
            peer: None,
            namespace,
            family,
            inbox: Bytes::default(),
            outbox: Bytes::default(),
            window,
            send_buffer,
            no_space: false,
            urgent: None,
            arrived: 0,
            connect: Connect::No,
            fin_sent: false,
            fin_in: false,
            broken: false,
            error_pending: false,
            closed: false,
            reset_on_close: false,
            held: false,
            partner: None,
        });
        self.ends.len() - 1
    }

    pub(super) fn join(&mut self, one: EndId, other: EndId) {
        for (end, peer) in [(one, other), (other, one)] {
            self.ends[end].peer = Some(peer);
            self.ends[end].connect = Connect::Done;
        }
    }

    /// Joins an unconnected end to the server at `address`, if one listens.
    pub(super) fn reach(&mut self, end: EndId, namespace: u64, address: SocketAddr) -> bool {
        let servers = self.namespaces.get(&namespace).map(|namespace| &namespace.servers);
        let Some(window) = servers.and_then(|servers| servers.get(&address)).copied() else { return false };
        let server = self.end(Some(namespace), self.ends[end].family, window);
        self.join(end, server);
        self.newcomers.push(Newcomer { end: server, namespace, address });
        self.changed = true;
        true
    }

    /// Records that both ends belong to one relayed connection.
    pub(super) fn pair(&mut self, one: EndId, other: EndId) {
        self.ends[one].partner = Some(other);
        self.ends[other].partner = Some(one);
    }

    /// Starts a connect whose fate is decided.
    pub(super) fn start_connect(
        &mut self,
        id: EndId,
        address: SocketAddr,
        at: Option<Instant>,
        outcome: ConnectOutcome,
    ) {
        self.ends[id].connect = Connect::InProgress(address, at, outcome);
        self.connecting.push(id);
    }

    /// Ends the connects that are due.
    pub(super) fn connects_due(&mut self) {
        for id in std::mem::take(&mut self.connecting) {
            match self.ends[id].connect {
                Connect::InProgress(..) if self.ends[id].closed => {}
                Connect::InProgress(address, Some(at), outcome) if at <= self.now => {
                    self.finish_connect(id, address, outcome);
                }
                Connect::InProgress(..) => self.connecting.push(id),
                _ => {}
            }
        }
    }

    pub(super) fn finish_connect(&mut self, id: EndId, address: SocketAddr, outcome: ConnectOutcome) {
        let namespace = self.ends[id].namespace.unwrap_or(HOST);
        let connect = match outcome {
            ConnectOutcome::Fail(error) => Connect::Failed(error),
            ConnectOutcome::OwnPeer => Connect::OwnPeer(address),
            ConnectOutcome::Reach if self.reach(id, namespace, address) => Connect::Done,
            ConnectOutcome::Reach => Connect::Failed(SocketError::Refused),
        };
        self.ends[id].connect = connect;
        self.edges.insert(File::End(id));
    }

    pub(super) fn next_connect(&self) -> Option<Instant> {
        let connects = self.connecting.iter().map(|id| &self.ends[*id]).filter(|end| !end.closed);
        let times = connects.filter_map(|end| match end.connect {
            Connect::InProgress(_, at, _) => at,
            _ => None,
        });
        times.min()
    }

    /// Returns the result of a connect.
    pub(super) fn connect_result(&mut self, id: EndId) -> Connected {
        let end = &mut self.ends[id];
        match end.connect {
            Connect::Failed(error) => Connected::Failed(error),
            _ if std::mem::replace(&mut end.error_pending, false) => {
                self.faults.note(Knob::ResetOnConnect);
                Connected::Reset
            }
            Connect::No | Connect::InProgress(..) => Connected::Failed(SocketError::Reset),
            Connect::Done | Connect::OwnPeer(_) => Connected::Established,
        }
    }

    pub(super) fn poll_end(&self, id: EndId) -> Readiness {
        let end = &self.ends[id];
        let mut ready = Readiness::empty();
        match end.connect {
            Connect::No => return Readiness::OUT | Readiness::HUP,
            Connect::InProgress(..) => return ready,
            Connect::Failed(_) => {
                return Readiness::IN | Readiness::OUT | Readiness::RDHUP | Readiness::HUP | Readiness::ERR;
            }
            Connect::Done | Connect::OwnPeer(_) => {}
        }
        let ended = end.fin_in || end.broken;
        ready.set(Readiness::IN, end.inbox.count() > 0 || ended);
        ready.set(Readiness::RDHUP, ended);
        ready.set(Readiness::PRI, end.urgent.is_some());
        let has_room = end.outbox.count() < end.send_buffer;
        ready.set(Readiness::OUT, has_room || end.broken || end.fin_sent);
        ready.set(Readiness::HUP, end.broken || (end.fin_sent && end.fin_in));
        ready.set(Readiness::ERR, end.error_pending);
        ready
    }

    /// Returns how many bytes a read in this mode takes at most, and whether an urgent byte stops it at once.
    pub(super) fn readable(&self, id: EndId, mode: TransferMode) -> (usize, bool) {
        let end = &self.ends[id];
        match (end.urgent, mode) {
            (Some(0), TransferMode::Splice) => (0, true),
            (Some(0), TransferMode::Copy) | (None, _) => (end.inbox.count(), false),
            (Some(distance), _) => (distance, false),
        }
    }

    /// Takes bytes out of the inbox.
    pub(super) fn take(&mut self, id: EndId, into: &mut Bytes, most: usize) -> usize {
        let end = &mut self.ends[id];
        let taken = into.pull(&mut end.inbox, most);
        end.urgent = end.urgent.and_then(|distance| distance.checked_sub(taken));
        if let Some(peer) = end.peer {
            self.flow(peer);
        }
        taken
    }

    /// Returns the event after the last byte: a FIN, an error that is returned once, or none yet.
    pub(super) fn after_the_last_byte(&mut self, id: EndId) -> Option<Result<(), SocketError>> {
        let end = &mut self.ends[id];
        if end.fin_in {
            return Some(Ok(()));
        }
        if std::mem::replace(&mut end.error_pending, false) {
            return Some(Err(SocketError::Reset));
        }
        if end.broken {
            self.faults.note(Knob::ResetReadAsEof);
            return Some(Ok(()));
        }
        None
    }

    /// Queues bytes while there is room.
    pub(super) fn send(&mut self, id: EndId, bytes: &mut Bytes, most: usize) -> Result<usize, SocketError> {
        let end = &mut self.ends[id];
        if end.broken || end.fin_sent || end.peer.is_none() {
            end.error_pending = false;
            return Err(SocketError::Reset);
        }
        let room = end.send_buffer.saturating_sub(end.outbox.count());
        let sent = end.outbox.pull(bytes, room.min(most));
        end.no_space = bytes.count() > 0;
        if end.no_space && end.outbox.count() < end.send_buffer {
            // Room is reported soon after a send that was short although there was room.
            end.no_space = false;
            self.edges.insert(File::End(id));
        }
        self.flow(id);
        Ok(sent)
    }

    /// Reports the state of an end again.
    pub(super) fn set_edge(&mut self, id: EndId) {
        self.edges.insert(File::End(id));
    }

    /// Writes `count` bytes of `stream` from `start`, for a far end. Returns the number accepted, `None` after a reset.
    pub fn write(&mut self, id: EndId, stream: u32, start: u64, count: usize) -> Option<usize> {
        let mut bytes = Bytes::default();
        bytes.push(Run { stream, start, count });
        self.send(id, &mut bytes, count).ok()
    }

    /// Reads, for a far end.
    pub fn read(&mut self, id: EndId, most: usize) -> FarRead {
        if self.ends[id].inbox.count() > 0 {
            let mut bytes = Bytes::default();
            self.take(id, &mut bytes, most);
            return FarRead::Bytes(bytes);
        }
        let end = &self.ends[id];
        match (end.fin_in, end.broken) {
            (true, _) => FarRead::Eof,
            (_, true) => FarRead::Reset,
            _ => FarRead::Empty,
        }
    }

    /// Sends the FIN, after the queued bytes.
    ///
    /// # Errors
    /// The connection was reset.
    pub fn shutdown(&mut self, id: EndId) -> Result<(), SocketError> {
        if self.ends[id].broken {
            return Err(SocketError::Reset);
        }
        self.ends[id].fin_sent = true;
        self.flow(id);
        Ok(())
    }

    /// Closes an end like close(2).
    pub fn close(&mut self, id: EndId) {
        let end = &mut self.ends[id];
        if std::mem::replace(&mut end.closed, true) || end.broken {
            return;
        }
        let over = end.fin_sent && end.fin_in && end.outbox.count() == 0;
        if !over && (end.reset_on_close || end.inbox.count() > 0) {
            return self.send_reset(id);
        }
        end.fin_sent = true;
        self.flow(id);
        if let Some(peer) = self.ends[id].peer {
            self.flow(peer);
        }
    }

    /// Closes an end with a reset.
    pub fn reset(&mut self, id: EndId) {
        self.ends[id].reset_on_close = true;
        self.close(id);
    }

    /// Sends a reset from the owner of `id`.
    fn send_reset(&mut self, id: EndId) {
        let end = &mut self.ends[id];
        end.broken = true;
        end.inbox.clear();
        if end.outbox.clear() > 0 {
            self.faults.note(Knob::ResetDiscarded);
        }
        if let Some(peer) = self.ends[id].peer {
            self.reset_arrives(peer);
        }
    }

    fn reset_arrives(&mut self, id: EndId) {
        let end = &mut self.ends[id];
        if !std::mem::replace(&mut end.broken, true) {
            end.error_pending = true;
            end.outbox.clear();
            self.changed = true;
            self.edges.insert(File::End(id));
        }
    }

    pub(super) fn unacknowledged(&self, id: EndId) -> usize {
        self.ends[id].outbox.count()
    }

    pub(super) fn is_connected(&self, id: EndId) -> bool {
        matches!(self.ends[id].connect, Connect::Done)
    }

    /// Moves bytes from a sender's queue while the receiver's window has room.
    fn flow(&mut self, id: EndId) {
        let end = &self.ends[id];
        let Some(peer) = end.peer else { return };
        if end.broken || end.held {
            return;
        }
        if end.outbox.count() > 0 {
            if self.ends[peer].closed {
                // A kernel that receives bytes for a closed socket answers with a reset.
                self.ends[peer].broken = true;
                self.reset_arrives(id);
                return;
            }
            let room = self.ends[peer].window.saturating_sub(self.ends[peer].inbox.count());
            if room > 0 && self.faults.strikes(Knob::SlowAcknowledge, &mut self.dice) {
                let until = self.now + Duration::from_micros(self.dice.range(1, 30_000));
                self.ends[id].held = true;
                self.held.push((until, id));
                return;
            }
            self.move_bytes(id, peer, room);
        }
        if self.ends[id].outbox.count() == 0
            && self.ends[id].fin_sent
            && !std::mem::replace(&mut self.ends[peer].fin_in, true)
        {
            self.changed = true;
            self.edges.insert(File::End(peer));
        }
    }

    fn move_bytes(&mut self, id: EndId, peer: EndId, most: usize) {
        let mut outbox = std::mem::take(&mut self.ends[id].outbox);
        let moved = self.ends[peer].inbox.pull(&mut outbox, most);
        self.ends[id].outbox = outbox;
        if moved == 0 {
            return;
        }
        self.changed = true;
        self.edges.insert(File::End(peer));
        self.ends[peer].arrived += moved as u64;
        let there = self.ends[peer].inbox.count();
        if self.ends[peer].urgent.is_none() && self.faults.strikes(Knob::Urgent, &mut self.dice) {
            self.ends[peer].urgent = Some(self.dice.size(there - moved, there - 1));
        }
        if std::mem::replace(&mut self.ends[id].no_space, false) {
            self.edges.insert(File::End(id));
        }
    }

    /// Moves the bytes whose delay is over.
    pub(super) fn flow_due(&mut self) {
        let now = self.now;
        let due: Vec<EndId> = self.held.iter().filter(|(at, _)| *at <= now).map(|(_, id)| *id).collect();
        self.held.retain(|(at, _)| *at > now);
        for id in due {
            self.ends[id].held = false;
            self.flow(id);
        }
    }

    /// Returns the relay's end of a far end's connection.
    pub fn near(&self, far: EndId) -> Option<EndId> {
        self.ends[far].peer
    }

    /// Returns the far end at the other side of the relay, once the connection is relayed.
    pub fn opposite(&self, far: EndId) -> Option<EndId> {
        let partner = self.ends[self.ends[far].peer?].partner?;
        self.ends[partner].peer
    }

    /// Returns the number of bytes that have arrived at an end so far.
    pub fn arrived(&self, end: EndId) -> u64 {
        self.ends[end].arrived
    }

    /// Whether a reset has reached an end, or was sent by it.
    pub fn is_broken(&self, end: EndId) -> bool {
        self.ends[end].broken
    }

    /// Whether the relay, or the simulation, has closed its descriptor of this end.
    pub fn is_closed(&self, end: EndId) -> bool {
        self.ends[end].closed
    }
}
