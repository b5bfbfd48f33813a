//! A ring in memory: seeded, with a clock of its own, and with everything a kernel may do to a shard.
//!
//! A simulation holds the [`FakeNet`], drives the far ends (clients on the host, servers inside), and turns the shard.
//! When nothing can happen at once, [`Ring::turn`] moves the clock to the next thing that will. Where the contract
//! leaves a choice (an operation is over at once or later, in which order completions come, whether a cancel wins),
//! the [`Dice`] choose. What the contract forbids a shard ends the run: a token used twice, or a socket let go of while
//! an operation on it is in flight.

mod bytes;
mod dials;
mod faults;
mod net;

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::rc::Rc;
use std::time::{Duration, Instant};

use rustix::fd::OwnedFd;
use rustix::io::Errno;

use self::bytes::Pool;
use self::net::What;
use super::{
    Borrowed, Completion, Dialled, Op, OpKey, Outcome, Received, Ring, RingError, Submitted, Token, Waker,
    Way,
};
use crate::command::Family;
use crate::limits::Limits;
use crate::opener::client::StockError;
use crate::opener::{Failure, FailureKind};
use crate::sys::SocketError;
use crate::table::TokenParts;

pub use self::bytes::{Bytes, FakeLoan, Run};
pub use self::faults::{Dice, Faults, Knob};
pub use self::net::{EndId, FakeNet, FakeSocket, FarRead, Net, Newcomer};

/// The simulated ring.
pub struct FakeRing {
    net: FakeNet,
    pool: Rc<Pool>,
    flights: BTreeMap<u64, Flight>,
    tokens: HashSet<Token>,
    keys: u64,
}

/// An operation in flight.
#[derive(Debug)]
struct Flight {
    token: Token,
    op: Op<FakeRing>,
    cancelled: bool,
    /// It is not over before this turn.
    not_before: u64,
    /// Its delay was decided.
    delayed: bool,
    /// What was decided when it began.
    fate: Fate,
}

#[derive(Debug)]
enum Fate {
    /// It is over when the network says so.
    Open,
    /// A connect is over at that time.
    Connect(Option<Instant>, ConnectFate),
    /// An opener answers at that time.
    Stock(Instant),
    /// A watch that has seen a FIN and goes on.
    Watch,
    /// A watch that tells nothing any more.
    Asleep,
}

#[derive(Clone, Copy, Debug)]
enum ConnectFate {
    /// As the network says.
    Reach,
    OwnPeer,
    Fail(SocketError),
}

/// What a try came to.
enum Tried {
    Over(Outcome<FakeRing>),
    Waits(Op<FakeRing>, Fate),
}

impl FakeRing {
    /// A ring over `net`, with pools as `limits` say.
    pub fn new(net: FakeNet, limits: &Limits) -> FakeRing {
        FakeRing { net, pool: Pool::new(limits), flights: BTreeMap::new(), tokens: HashSet::new(), keys: 0 }
    }

    /// Buffers and pipes on loan now.
    pub fn lent(&self) -> (usize, usize) {
        self.pool.lent()
    }

    /// The operations in flight.
    pub fn in_flight(&self) -> usize {
        self.flights.len()
    }

    fn strikes(&self, knob: Knob) -> bool {
        let net = &mut *self.net.net();
        net.faults.strikes(knob, &mut net.dice)
    }

    fn pause(&self, most: Duration) -> Instant {
        let net = &mut *self.net.net();
        let most = u64::try_from(most.as_micros()).unwrap_or(u64::MAX);
        net.now + Duration::from_micros(net.dice.range(1, most))
    }

    fn fate(&self, op: &Op<FakeRing>) -> Fate {
        match op {
            Op::Connect { .. } => self.connect_fate(),
            Op::Stock { .. } if self.strikes(Knob::StockSlow) => {
                Fate::Stock(self.pause(Duration::from_millis(200)))
            }
            Op::Stock { .. } => Fate::Stock(self.net.net().now),
            Op::Ask { .. } if self.strikes(Knob::ChannelFull) => {
                Fate::Stock(self.pause(Duration::from_millis(200)))
            }
            Op::Ask { .. } => Fate::Stock(self.net.net().now),
            _ => Fate::Open,
        }
    }

    fn connect_fate(&self) -> Fate {
        let now = self.net.net().now;
        if self.strikes(Knob::ConnectUnanswered) {
            return Fate::Connect(None, ConnectFate::Reach);
        }
        if self.strikes(Knob::ConnectTimedOut) {
            let at = now + Duration::from_secs(3);
            return Fate::Connect(Some(at), ConnectFate::Fail(SocketError::TimedOut));
        }
        let at = if self.strikes(Knob::SlowConnect) { self.pause(Duration::from_millis(300)) } else { now };
        let failures = [
            (Knob::ConnectRefused, SocketError::Refused),
            (Knob::ConnectUnreachable, SocketError::Unreachable),
            (Knob::PortsExhausted, SocketError::PortsExhausted),
        ];
        let failure = failures.into_iter().find(|(knob, _)| self.strikes(*knob));
        match failure {
            Some((_, fault)) => Fate::Connect(Some(at), ConnectFate::Fail(fault)),
            None if self.strikes(Knob::OwnPeer) => Fate::Connect(Some(at), ConnectFate::OwnPeer),
            None => Fate::Connect(Some(at), ConnectFate::Reach),
        }
    }

    /// Whether a try would bring an end, or at least a step.
    fn is_ready(&self, op: &Op<FakeRing>, fate: &Fate) -> bool {
        let net = self.net.net();
        match (op, fate) {
            (Op::Accept { listener }, _) => match listener.0.what {
                What::Listener(index) => !net.listeners[index].queue.is_empty(),
                _ => true,
            },
            (Op::Connect { .. }, Fate::Connect(at, _)) => at.is_some_and(|at| at <= net.now),
            (Op::Stock { .. } | Op::Ask { .. }, Fate::Stock(at)) => *at <= net.now,
            (Op::Hear { channel }, _) => match channel.0.what {
                What::Driver(namespace) => {
                    net.is_gone(namespace) || net.next_answer(namespace).is_some_and(|at| at <= net.now)
                }
                _ => true,
            },
            (Op::Recv { socket, .. }, _) => of_end(socket).is_none_or(|id| net.is_readable(id)),
            (Op::Send { socket, .. }, _) => of_end(socket).is_none_or(|id| net.is_writable(id)),
            (Op::Watch { socket }, Fate::Open | Fate::Watch) => match socket.0.what {
                What::End(id) => net.is_hung_up(id) || (net.has_fin(id) && matches!(fate, Fate::Open)),
                What::Channel(namespace) => net.namespaces.get(&namespace).is_none_or(|there| there.gone),
                _ => true,
            },
            _ => false,
        }
    }

    fn attempt(&self, op: Op<FakeRing>, fate: Fate) -> Tried {
        if !self.is_ready(&op, &fate) {
            return Tried::Waits(op, fate);
        }
        match (op, fate) {
            (Op::Accept { listener }, _) => Tried::Over(Outcome::Accepted(self.accept(&listener))),
            (Op::Connect { socket, address }, Fate::Connect(_, fate)) => {
                Tried::Over(Outcome::Connected(self.connect(&socket, address, fate)))
            }
            (Op::Recv { socket, way, .. }, _) => Tried::Over(Outcome::Received(self.recv(&socket, way))),
            (Op::Send { socket, loan }, _) => self.send(socket, loan),
            (Op::Watch { socket }, _) => self.watch(socket),
            (Op::Stock { channel, family, count, .. }, _) => {
                Tried::Over(Outcome::Stocked(self.stock(&channel, family, count)))
            }
            (Op::Ask { channel, dial, port }, _) => {
                Tried::Over(Outcome::Asked(self.ask(&channel, dial, port)))
            }
            (Op::Hear { channel }, _) => Tried::Over(Outcome::Heard(self.hear(&channel))),
            (op, fate) => Tried::Waits(op, fate),
        }
    }

    fn accept(&self, listener: &FakeSocket) -> Result<(FakeSocket, Family), SocketError> {
        let What::Listener(index) = listener.0.what else { return Err(SocketError::Other(Errno::INVAL)) };
        if self.strikes(Knob::AcceptExhausted) {
            return Err(SocketError::Exhausted);
        }
        if self.strikes(Knob::AcceptStray) {
            return Err(SocketError::Other(Errno::PROTO));
        }
        let mut net = self.net.net();
        let end = net.listeners[index].queue.pop_front().ok_or(SocketError::Other(Errno::AGAIN))?;
        let family = net.ends[end].family;
        drop(net);
        Ok((self.net.descriptor(What::End(end)), family))
    }

    fn connect(
        &self,
        socket: &FakeSocket,
        address: SocketAddr,
        fate: ConnectFate,
    ) -> Result<(), SocketError> {
        let Some(id) = of_end(socket) else { return Err(SocketError::Other(Errno::INVAL)) };
        let mut net = self.net.net();
        let family = if address.is_ipv4() { Family::V4 } else { Family::V6 };
        assert_eq!(net.ends[id].family, family, "a socket is connected to an address of its own family");
        let Some(namespace) = net.ends[id].namespace else { return Err(SocketError::Other(Errno::INVAL)) };
        match fate {
            ConnectFate::Fail(fault) => Err(fault),
            ConnectFate::OwnPeer => {
                net.ends[id].own_peer = true;
                Ok(())
            }
            ConnectFate::Reach if net.is_served(namespace, address) => {
                net.reach(id, namespace, address);
                Ok(())
            }
            ConnectFate::Reach => Err(SocketError::Refused),
        }
    }

    fn recv(&self, socket: &FakeSocket, way: Way) -> Received<FakeLoan> {
        let Some(id) = of_end(socket) else { return Received::Failed(SocketError::Other(Errno::INVAL)) };
        // As the real rings do, it takes the loan first, even if it then finds an end.
        let knob = if way == Way::Copy { Knob::NoLease } else { Knob::NoPipe };
        if !self.pool.can_lend(way) || self.strikes(knob) {
            return Received::NoLoan(way);
        }
        let mut loan = self.pool.lend(way);
        let net = &mut *self.net.net();
        let there = net.readable(id).min(self.pool.capacity(way));
        if there == 0 {
            return match net.ending(id) {
                Ok(()) => Received::Eof,
                Err(fault) => Received::Failed(fault),
            };
        }
        let short = there > 1 && net.faults.strikes(Knob::ShortRecv, &mut net.dice);
        let most = if short { net.dice.size(1, there - 1) } else { there };
        net.take(id, &mut loan.bytes, most);
        Received::Bytes(loan)
    }

    fn send(&self, socket: FakeSocket, mut loan: FakeLoan) -> Tried {
        let Some(id) = of_end(&socket) else {
            return Tried::Over(Outcome::Sent(loan, Err(SocketError::Other(Errno::INVAL))));
        };
        let net = &mut *self.net.net();
        let held = loan.bytes();
        let short = held > 1 && net.faults.strikes(Knob::ShortSend, &mut net.dice);
        let most = if short { net.dice.size(1, held - 1) } else { held };
        match net.send(id, &mut loan.bytes, most) {
            Err(fault) => {
                net.faults.note(Knob::SendFailed);
                Tried::Over(Outcome::Sent(loan, Err(fault)))
            }
            Ok(_) if loan.bytes() == 0 => Tried::Over(Outcome::Sent(loan, Ok(()))),
            Ok(_) => Tried::Waits(Op::Send { socket, loan }, Fate::Open),
        }
    }

    fn watch(&self, socket: FakeSocket) -> Tried {
        let net = &mut *self.net.net();
        match socket.0.what {
            What::End(id) if !net.is_hung_up(id) => {
                // io_uring's poll tells a FIN once, and then the watch is of no use any more.
                if net.faults.strikes(Knob::WatchAsleep, &mut net.dice) {
                    Tried::Waits(Op::Watch { socket }, Fate::Asleep)
                } else {
                    Tried::Waits(Op::Watch { socket }, Fate::Watch)
                }
            }
            _ => Tried::Over(Outcome::Broken),
        }
    }

    fn stock(&self, channel: &FakeSocket, family: Family, count: u16) -> Result<Vec<FakeSocket>, StockError> {
        let What::Channel(namespace) = channel.0.what else { return Err(StockError::Gone) };
        if self.strikes(Knob::StockGone) {
            self.net.net().end_opener(namespace);
        }
        if self.net.net().namespaces.get(&namespace).is_none_or(|namespace| namespace.gone) {
            return Err(StockError::Gone);
        }
        if self.strikes(Knob::StockHostile) {
            return Err(StockError::Hostile("a socket of another namespace".into()));
        }
        if self.strikes(Knob::StockExhausted) {
            return Err(StockError::Exhausted("too many open files".into()));
        }
        if self.strikes(Knob::StockRefused) {
            let detail = "address family not supported".into();
            return Err(StockError::Refused(Failure { kind: FailureKind::Unsupported, detail }));
        }
        let asked = usize::from(count);
        let fewer = asked > 1 && self.strikes(Knob::StockFewer);
        let mut net = self.net.net();
        let count = if fewer { net.dice.size(1, asked - 1) } else { asked };
        let ends: Vec<EndId> = (0..count)
            .map(|_| {
                let window = net.dice.size(1, 5000);
                net.end(Some(namespace), family, window)
            })
            .collect();
        drop(net);
        Ok(ends.into_iter().map(|end| self.net.descriptor(What::End(end))).collect())
    }

    /// One look at every operation in flight; tells whether one was put off.
    fn look(&mut self, completions: &mut Vec<Completion<FakeRing>>) -> bool {
        let mut keys: Vec<u64> = self.flights.keys().copied().collect();
        let turn = self.net.net().turns;
        let mut put_off = false;
        if keys.len() > 1 && self.strikes(Knob::Reordered) {
            self.net.net().dice.shuffle(&mut keys);
        }
        for key in keys {
            let Some(flight) = self.flights.get_mut(&key) else { continue };
            if flight.not_before > turn {
                put_off = true;
                continue;
            }
            let (cancelled, delayed) = (flight.cancelled, flight.delayed);
            let Some(flight) = self.flights.get(&key) else { continue };
            let ready = self.is_ready(&flight.op, &flight.fate);
            if !cancelled && !ready {
                continue;
            }
            let late = if cancelled { Knob::CancelLate } else { Knob::Delayed };
            if !delayed && self.strikes(late) {
                let turns = self.net.net().dice.range(1, 5);
                if let Some(flight) = self.flights.get_mut(&key) {
                    flight.not_before = turn + turns;
                    flight.delayed = true;
                }
                put_off = true;
                continue;
            }
            self.finish_flight(key, completions);
            // A send that took a part goes on at the next look.
            let goes_on =
                self.flights.get(&key).is_some_and(|flight| self.is_ready(&flight.op, &flight.fate));
            put_off |= goes_on;
        }
        put_off
    }

    /// Tries an operation; if it is over, it is told.
    fn finish_flight(&mut self, key: u64, completions: &mut Vec<Completion<FakeRing>>) {
        let Some(mut flight) = self.flights.remove(&key) else { return };
        let socket = socket_of(&flight.op).clone();
        let loses = flight.cancelled && {
            let net = &mut *self.net.net();
            net.faults.might(Knob::CancelLost, &mut net.dice)
        };
        let tried = if flight.cancelled && !loses {
            Tried::Waits(flight.op, flight.fate)
        } else {
            self.attempt(flight.op, flight.fate)
        };
        let outcome = match tried {
            Tried::Over(outcome) => {
                if flight.cancelled {
                    self.net.net().faults.note(Knob::CancelLost);
                }
                outcome
            }
            Tried::Waits(Op::Send { loan, .. }, _) if flight.cancelled => {
                self.net.net().faults.note(Knob::SendCancelled);
                Outcome::Cancelled(Some(loan))
            }
            Tried::Waits(..) if flight.cancelled => Outcome::Cancelled(None),
            Tried::Waits(op, fate) => {
                flight.op = op;
                flight.fate = fate;
                flight.delayed = false;
                self.flights.insert(key, flight);
                return;
            }
        };
        // This clone is one; the shard's own must be another.
        assert!(
            Rc::strong_count(&socket.0) > 1,
            "{:?} was let go of while {:?} was in flight",
            socket,
            TokenParts::unpack(flight.token)
        );
        self.tokens.remove(&flight.token);
        completions.push(Completion { token: flight.token, outcome });
    }

    /// When something is due by itself.
    fn next_event(&self) -> Option<Instant> {
        let net = self.net.net();
        let fates = self.flights.values().filter_map(|flight| match flight.fate {
            Fate::Connect(at, _) => at,
            Fate::Stock(at) => Some(at),
            _ => match &flight.op {
                Op::Hear { channel } => match channel.0.what {
                    What::Driver(namespace) => net.next_answer(namespace),
                    _ => None,
                },
                _ => None,
            },
        });
        fates.chain(net.next_flow()).chain(net.act_at).min()
    }
}

impl fmt::Debug for FakeRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FakeRing")
            .field("lent", &self.lent())
            .field("flights", &self.flights)
            .finish_non_exhaustive()
    }
}

fn of_end(socket: &FakeSocket) -> Option<EndId> {
    match socket.0.what {
        What::End(id) => Some(id),
        _ => None,
    }
}

fn socket_of(op: &Op<FakeRing>) -> &FakeSocket {
    match op {
        Op::Accept { listener: socket }
        | Op::Connect { socket, .. }
        | Op::Recv { socket, .. }
        | Op::Send { socket, .. }
        | Op::Watch { socket }
        | Op::Stock { channel: socket, .. }
        | Op::Ask { channel: socket, .. }
        | Op::Hear { channel: socket } => socket,
    }
}

impl Ring for FakeRing {
    type Socket = FakeSocket;
    type Loan = FakeLoan;

    fn submit(&mut self, token: Token, op: Op<FakeRing>) -> Submitted<FakeRing> {
        let TokenParts { kind, id } = TokenParts::unpack(token);
        assert!(!self.tokens.contains(&token), "{kind} of {id:?} was submitted while it was in flight");
        if let (Op::Recv { socket, .. }, 0 | 1) = (&op, kind)
            && let What::End(end) = socket.0.what
        {
            self.net.net().link(id, usize::from(kind), end);
        }
        let fate = self.fate(&op);
        let tried = if self.strikes(Knob::Done) { self.attempt(op, fate) } else { Tried::Waits(op, fate) };
        match tried {
            Tried::Over(outcome) => Submitted::Done(outcome),
            Tried::Waits(op, fate) => {
                self.keys += 1;
                self.tokens.insert(token);
                let flight = Flight { token, op, cancelled: false, not_before: 0, delayed: false, fate };
                self.flights.insert(self.keys, flight);
                Submitted::Pending(OpKey(NonZeroU64::MIN.saturating_add(self.keys)))
            }
        }
    }

    fn cancel(&mut self, key: OpKey) {
        if let Some(flight) = self.flights.get_mut(&(key.0.get() - 1)) {
            flight.cancelled = true;
            flight.delayed = false;
        }
    }

    fn turn(
        &mut self,
        until: Option<Instant>,
        completions: &mut Vec<Completion<FakeRing>>,
    ) -> Result<(), RingError> {
        loop {
            self.net.net().turns += 1;
            self.net.net().stirred = false;
            self.net.net().flow_due();
            let put_off = self.look(completions);
            // What moved may be for a far end, so the simulation has its turn.
            let stirred = self.net.net().stirred;
            if !completions.is_empty() || stirred || self.strikes(Knob::SpuriousWakeup) {
                return Ok(());
            }
            let now = self.net.net().now;
            if until.is_some_and(|until| until <= now) {
                return Ok(());
            }
            if put_off {
                continue;
            }
            let Some(next) = self.next_event().into_iter().chain(until).min() else {
                self.net.net().deadlocked = true;
                return Ok(());
            };
            let net = &mut *self.net.net();
            net.now = net.now.max(next);
            if net.act_at.is_some_and(|at| at <= net.now) {
                return Ok(());
            }
        }
    }

    fn now(&self) -> Instant {
        self.net.net().now
    }

    fn waker(&self) -> Waker {
        Waker::none()
    }

    fn can_lend(&self, way: Way) -> bool {
        self.pool.can_lend(way)
    }

    fn shutdown_write(&mut self, socket: &FakeSocket) -> Result<(), SocketError> {
        let Some(id) = of_end(socket) else { return Err(SocketError::Other(Errno::INVAL)) };
        let net = &mut *self.net.net();
        let result = net.shutdown(id);
        if result.is_err() {
            net.faults.note(Knob::FinFailed);
        }
        result
    }

    fn reset_on_close(&mut self, socket: &FakeSocket) {
        if let Some(id) = of_end(socket) {
            self.net.net().ends[id].reset_on_close = true;
        }
    }

    fn unacknowledged_bytes(&mut self, socket: &FakeSocket) -> usize {
        of_end(socket).map_or(0, |id| self.net.net().unacknowledged(id))
    }

    fn is_own_peer(&mut self, socket: &FakeSocket) -> bool {
        of_end(socket).is_some_and(|id| self.net.net().ends[id].own_peer)
    }

    fn adopt(&mut self, descriptor: OwnedFd) -> FakeSocket {
        drop(descriptor);
        self.net.descriptor(What::Adopted)
    }

    fn disown(&mut self, socket: FakeSocket) -> Result<OwnedFd, FakeSocket> {
        Err(socket)
    }

    fn duplicate(&self, _: &FakeSocket) -> Option<OwnedFd> {
        None
    }
}
