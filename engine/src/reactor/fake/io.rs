//! The calls on simulated sockets.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use rustix::fd::OwnedFd;
use rustix::io::Errno;

use super::bytes::{FakeBuffer, Pool};
use super::faults::Knob;
use super::net::{EndId, FakeNet, FakeSocket, File, HOST};
use super::tcp::{Connect, ConnectOutcome};
use crate::channel::ChannelError;
use crate::command::Family;
use crate::limits::Limits;
use crate::reactor::{Connected, Held, Readiness, Received, Sent, SocketIo, TransferMode};
use crate::sys::{SocketError, SocketFacts};

/// Consecutive accepts that fail when a listener fails.
const ACCEPTS_FAILING: u32 = 40;

/// The I/O functions, and the memory pool of the shard.
#[derive(Debug)]
pub struct FakeIo {
    pub(super) net: FakeNet,
    pool: Rc<Pool>,
}

impl FakeIo {
    /// Creates the I/O functions for sockets of `net`.
    pub fn new(net: FakeNet, limits: &Limits) -> FakeIo {
        FakeIo { net, pool: Pool::new(limits) }
    }

    /// Returns the numbers of lent buffers and pipes.
    pub fn lent(&self) -> (usize, usize) {
        self.pool.lent()
    }

    pub(super) fn strikes(&self, knob: Knob) -> bool {
        let net = &mut *self.net.net();
        net.faults.strikes(knob, &mut net.dice)
    }

    pub(super) fn pause(&self, most: Duration) -> Instant {
        let net = &mut *self.net.net();
        let most = u64::try_from(most.as_micros()).unwrap_or(u64::MAX);
        net.now + Duration::from_micros(net.dice.range(1, most))
    }

    /// Chooses the end of a connect, and its time; `None` means never.
    fn choose_outcome(&self, can_connect_to_itself: bool) -> (Option<Instant>, ConnectOutcome) {
        let now = self.net.net().now;
        if self.strikes(Knob::ConnectUnanswered) {
            return (None, ConnectOutcome::Reach);
        }
        if self.strikes(Knob::ConnectTimedOut) {
            return (Some(now + Duration::from_secs(3)), ConnectOutcome::Fail(SocketError::TimedOut));
        }
        let at = if self.strikes(Knob::SlowConnect) { self.pause(Duration::from_millis(300)) } else { now };
        let failures = [
            (Knob::ConnectRefused, SocketError::Refused),
            (Knob::ConnectUnreachable, SocketError::Unreachable),
            (Knob::PortsExhausted, SocketError::PortsExhausted),
        ];
        let failure = failures.into_iter().find(|(knob, _)| self.strikes(*knob));
        match failure {
            Some((_, error)) => (Some(at), ConnectOutcome::Fail(error)),
            None if can_connect_to_itself && self.strikes(Knob::OwnPeer) => {
                (Some(at), ConnectOutcome::OwnPeer)
            }
            None => (Some(at), ConnectOutcome::Reach),
        }
    }
}

fn end_of(socket: &FakeSocket) -> Option<EndId> {
    match socket.0.file {
        File::End(id) => Some(id),
        _ => None,
    }
}

impl SocketIo for FakeIo {
    type Socket = FakeSocket;
    type Buffer = FakeBuffer;

    fn now(&self) -> Instant {
        self.net.net().now
    }

    fn accept(&mut self, listener: &FakeSocket) -> Option<Result<FakeSocket, SocketError>> {
        let File::Listener(index) = listener.0.file else {
            return Some(Err(SocketError::Other(Errno::INVAL)));
        };
        if self.net.net().listeners[index].queue.is_empty() {
            return None;
        }
        if self.strikes(Knob::AcceptFails) {
            self.net.net().listeners[index].failing = ACCEPTS_FAILING;
        }
        let failing = self.net.net().listeners[index].failing;
        if failing > 0 {
            self.net.net().listeners[index].failing = failing - 1;
            return Some(Err(SocketError::Other(Errno::INVAL)));
        }
        if self.strikes(Knob::AcceptExhausted) {
            return Some(Err(SocketError::Exhausted));
        }
        if self.strikes(Knob::AcceptStray) {
            return Some(Err(SocketError::Other(Errno::PROTO)));
        }
        let end = self.net.net().listeners[index].queue.pop_front()?;
        Some(Ok(self.net.descriptor(File::End(end))))
    }

    fn host_socket(&mut self, family: Family) -> Result<FakeSocket, SocketError> {
        if self.strikes(Knob::NoHostSocket) {
            return Err(SocketError::Exhausted);
        }
        let end = {
            let net = &mut *self.net.net();
            let window = net.dice.size(1, 5000);
            net.end(None, family, window)
        };
        Ok(self.net.descriptor(File::End(end)))
    }

    fn connect(&mut self, socket: &FakeSocket, address: SocketAddr) -> Option<Connected> {
        let Some(id) = end_of(socket) else {
            return Some(Connected::Failed(SocketError::Other(Errno::INVAL)));
        };
        let family = if address.is_ipv4() { Family::V4 } else { Family::V6 };
        assert_eq!(
            self.net.net().ends[id].family,
            family,
            "a socket connects to an address of its own family"
        );
        assert!(matches!(self.net.net().ends[id].connect, Connect::No), "a socket connects once");
        let can_connect_to_itself = {
            let net = self.net.net();
            let there = net.namespaces.get(&net.ends[id].namespace.unwrap_or(HOST));
            there.is_none_or(|there| there.ephemeral.is_none_or(|range| range.contains(address.port())))
        };
        let (at, outcome) = self.choose_outcome(can_connect_to_itself);
        self.net.net().start_connect(id, address, at, outcome);
        if at.is_some_and(|at| at <= self.now()) && self.strikes(Knob::ConnectAtOnce) {
            let net = &mut *self.net.net();
            net.finish_connect(id, address, outcome);
            return Some(net.connect_result(id));
        }
        None
    }

    fn connect_result(&mut self, socket: &FakeSocket) -> Connected {
        let failed = Connected::Failed(SocketError::Other(Errno::INVAL));
        end_of(socket).map_or(failed, |id| self.net.net().connect_result(id))
    }

    fn receive(&mut self, socket: &FakeSocket, buffer: &mut FakeBuffer) -> Received {
        let Some(id) = end_of(socket) else { return Received::Failed(SocketError::Other(Errno::INVAL)) };
        let mode = buffer.mode();
        if mode == TransferMode::Copy {
            buffer.bytes.clear();
        }
        assert_eq!(buffer.bytes(), 0, "a pipe is empty before it is filled");
        let capacity = self.pool.capacity(mode);
        let net = &mut *self.net.net();
        let (there, urgent) = net.readable(id, mode);
        let there = there.min(capacity);
        if there == 0 {
            return match (urgent, net.poll_end(id).intersects(Readiness::RDHUP)) {
                (true, true) => Received::Eof,
                (true, false) => Received::Empty,
                (false, _) => match net.after_the_last_byte(id) {
                    None => Received::Empty,
                    Some(Ok(())) => Received::Eof,
                    Some(Err(error)) => Received::Failed(error),
                },
            };
        }
        let short = there > 1 && net.faults.strikes(Knob::ShortRecv, &mut net.dice);
        let most = if short { net.dice.size(1, there - 1) } else { there };
        net.take(id, &mut buffer.bytes, most);
        if short {
            net.set_edge(id);
        }
        Received::Bytes(most)
    }

    fn send(&mut self, socket: &FakeSocket, buffer: &mut FakeBuffer) -> Sent {
        let Some(id) = end_of(socket) else { return Sent::Failed(SocketError::Other(Errno::INVAL)) };
        let net = &mut *self.net.net();
        let held = buffer.bytes();
        let short = held > 1 && net.faults.strikes(Knob::ShortSend, &mut net.dice);
        let most = if short { net.dice.size(1, held - 1) } else { held };
        match net.send(id, &mut buffer.bytes, most) {
            Err(error) => {
                net.faults.note(Knob::SendFailed);
                Sent::Failed(error)
            }
            Ok(_) if buffer.bytes() == 0 => Sent::All,
            Ok(_) => Sent::Blocked,
        }
    }

    fn lend(&mut self, mode: TransferMode) -> Option<FakeBuffer> {
        // A buffer is lent only after `can_lend` permitted the read that fills it.
        let denied = mode == TransferMode::Splice && self.strikes(Knob::NoPipe);
        (!denied && self.pool.can_lend(mode)).then(|| self.pool.lend(mode))
    }

    fn can_lend(&self, mode: TransferMode) -> bool {
        if mode == TransferMode::Splice || !self.pool.can_lend(mode) {
            return self.pool.can_lend(mode);
        }
        if self.net.net().no_buffer_until.is_none() && self.strikes(Knob::NoBuffer) {
            let until = self.pause(Duration::from_millis(1));
            self.net.net().no_buffer_until = Some(until);
        }
        self.net.net().no_buffer_until.is_none()
    }

    fn warm_buffer(&mut self) -> FakeBuffer {
        FakeBuffer::warm()
    }

    fn keep(&mut self, warm: &mut FakeBuffer) -> Option<FakeBuffer> {
        // The read was permitted, so a buffer is free.
        let mut held = self.pool.lend(TransferMode::Copy);
        let count = warm.bytes();
        held.bytes.pull(&mut warm.bytes, count);
        Some(held)
    }

    fn have_urgent(&mut self, sockets: &[&FakeSocket]) -> Vec<bool> {
        let net = self.net.net();
        sockets.iter().map(|socket| net.poll(socket.0.file).contains(Readiness::PRI)).collect()
    }

    fn shutdown_write(&mut self, socket: &FakeSocket) -> Result<(), SocketError> {
        let Some(id) = end_of(socket) else { return Err(SocketError::Other(Errno::INVAL)) };
        let net = &mut *self.net.net();
        let result = net.shutdown(id);
        if result.is_err() {
            net.faults.note(Knob::FinFailed);
        }
        result
    }

    fn reset_on_close(&mut self, socket: &FakeSocket) {
        if let Some(id) = end_of(socket) {
            self.net.net().ends[id].reset_on_close = true;
        }
    }

    fn unacknowledged_bytes(&mut self, socket: &FakeSocket) -> usize {
        end_of(socket).map_or(0, |id| self.net.net().unacknowledged(id))
    }

    fn is_own_peer(&mut self, socket: &FakeSocket, address: SocketAddr) -> bool {
        let Some(id) = end_of(socket) else { return false };
        matches!(self.net.net().ends[id].connect, Connect::OwnPeer(own) if own == address)
    }

    fn pair(&mut self, one: &FakeSocket, other: &FakeSocket) {
        if let (Some(one), Some(other)) = (end_of(one), end_of(other)) {
            self.net.net().pair(one, other);
        }
    }

    fn send_message(&mut self, channel: &FakeSocket, text: &[u8]) -> Result<(), ChannelError> {
        self.request(channel.0.file, text)
    }

    fn receive_message(
        &mut self,
        channel: &FakeSocket,
        bytes_max: usize,
    ) -> Result<(Vec<u8>, Vec<FakeSocket>), ChannelError> {
        let received = self.message(channel.0.file)?;
        if received.0.len() > bytes_max {
            return Err(ChannelError::Cut { bytes_max });
        }
        Ok(received)
    }

    fn facts(&self, socket: &FakeSocket) -> SocketFacts {
        let net = self.net.net();
        let (family, listens, id) = match socket.0.file {
            File::End(id) => (Some(net.ends[id].family), false, Some(id)),
            File::Listener(index) => (Some(net.listeners[index].family), true, None),
            _ => (None, false, None),
        };
        let is_connected = id.is_some_and(|id| net.is_connected(id));
        let unspecified = SocketAddr::from(([0, 0, 0, 0], u16::from(is_connected)));
        SocketFacts {
            is_socket: true,
            family,
            is_stream: family.is_some(),
            is_tcp: family.is_some(),
            listens,
            local: Some(unspecified),
            is_connected,
            nonblocking: true,
            netns_cookie: id.and_then(|id| net.ends[id].namespace),
        }
    }

    fn netns_cookie(&self, socket: &FakeSocket) -> Option<u64> {
        end_of(socket).and_then(|id| self.net.net().ends[id].namespace)
    }

    fn tune(&mut self, _: &FakeSocket) {}

    fn adopt(&mut self, descriptor: OwnedFd) -> FakeSocket {
        drop(descriptor);
        self.net.descriptor(File::Adopted)
    }

    fn disown(&mut self, socket: FakeSocket) -> Result<OwnedFd, FakeSocket> {
        Err(socket)
    }

    fn duplicate(&self, _: &FakeSocket) -> Option<OwnedFd> {
        None
    }
}
