//! The reactor: readiness of sockets, and calls on them that never wait.
//!
//! # One byte
//!
//! A client writes. The kernel wakes the registration of the accepted socket, and [`Poller::wait`] returns a [`Notice`] with
//! its [`Key`]. The reactor sets "readable" in the table entry of that key and gives the shard an [`Event`] with the entry's
//! [`Token`]. The shard finds the connection and calls [`Reactor::transfer`], which reads into the shard's one warm buffer
//! and writes from there to the other socket. The read returned less than the buffer holds, so the socket is empty and its
//! "readable" is cleared: no second read is tried, and the next byte causes the next notice.
//!
//! # The table
//!
//! Each socket is registered once, for its life, for every event, edge-triggered: with a multishot poll on io_uring, with
//! EPOLLET on epoll. An edge is reported once, so the table remembers it:
//!
//! - A notice sets bits of [`Readiness`]. Only a call that disproves a bit clears it: one that would have had to wait, or
//!   that moved less than it could. Edges that arrive while a write is blocked, or while a direction waits for others, are
//!   therefore still in the table when it continues.
//! - A short read proves that the socket is empty only if no FIN, hang-up, error or urgent byte was reported with it: a read
//!   stops before each of those. io_uring cannot report an urgent byte ([`Poller::reports_urgent`]). After a short read on
//!   io_uring the socket is therefore recorded as doubted, and one poll checks all doubted sockets `DOUBT` (20 ms) later.
//!   Only urgent bytes wait for that.
//! - A hang-up (HUP) means a FIN in each direction, or a reset; only ERR is an error.
//! - A multishot poll may end when the completion queue overflows. The reactor registers the socket again, and the kernel
//!   then reports its current state.
//! - A registration holds the open file. It is therefore removed before the socket is closed, and the entry is freed only
//!   after the poller's last notice for it. A later notice has an old generation and is dropped.
//!
//! Two pollers implement [`Poller`] over the kernel, [`Uring`] and [`Epoll`]; `fake` simulates one with every fault that a
//! kernel may show. The calls on sockets are [`SocketIo`]: [`KernelIo`], or simulated. A shard observes the same on each,
//! and one suite of conformance cases runs on both kernel pollers.
//!
//! Time is not an operation: a shard keeps its own deadlines and passes the nearest one to [`Reactor::turn`].

use std::fmt;
use std::time::{Duration, Instant};

use crate::channel::ChannelError;
use crate::limits::Limits;
use crate::sys::SocketError;

mod choice;
mod epoll;
#[cfg(feature = "fake-reactor")]
pub mod fake;
mod io;
mod poller;
mod pool;
mod socket_io;
mod table;
mod transfer;
mod uring;

pub use choice::{RingChoice, Unusable, choose};
pub use epoll::Epoll;
pub use io::KernelIo;
pub use poller::{BufferOf, Key, Notice, Poller, ReactorError, SocketOf, Waker};
pub use pool::{Pool, PooledBuffer};
pub use rustix::event::PollFlags as Readiness;
pub use socket_io::{Connected, Held, Received, Sent, SocketIo, TransferMode};
pub use transfer::Transfer;
pub use uring::Uring;

use table::{State, Table};

/// Every event that a registration asks for. ERR and HUP are always reported.
const INTEREST: Readiness = Readiness::IN.union(Readiness::OUT).union(Readiness::RDHUP).union(Readiness::PRI);
/// The events that make a read worth trying. A read stops before each but the first, so a short read disproves only that.
const READABLE: Readiness =
    Readiness::IN.union(Readiness::PRI).union(Readiness::RDHUP).union(Readiness::HUP).union(Readiness::ERR);

/// The longest wait of an urgent byte that the poller does not report.
const DOUBT: Duration = Duration::from_millis(20);

/// The shard's identifier of a registered socket, returned with its events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token(pub u64);

/// An event of a registered socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// The token under which the socket was registered.
    pub token: Token,
    /// The kind of the event.
    pub kind: EventKind,
}

/// The kinds of [`Event`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// The readiness of the socket changed; [`Reactor::readiness`] returns it.
    Ready,
    /// The kernel has closed a socket that was closed with [`Reactor::close_and_report`].
    Closed,
}

/// A reactor: one poller, the sockets registered with it, and the shard's warm buffer.
pub struct Reactor<P: Poller> {
    // The poller is dropped first: its registrations end before the sockets are closed.
    poller: P,
    io: P::Io,
    table: Table<SocketOf<P>>,
    /// Holds bytes only within one call of [`Reactor::transfer`].
    warm: Option<BufferOf<P>>,
    /// The size of the warm buffer. A read of this many bytes filled it.
    buffer_bytes: usize,
    notices: Vec<Notice>,
    /// Events without a notice, returned by the next turn.
    queued: Vec<Event>,
    /// Sockets that the kernel refused to register.
    refused: Vec<Key>,
    /// Sockets whose last read may have stopped at an urgent byte, and the time of their check.
    doubts: Vec<Key>,
    doubts_due: Option<Instant>,
}

impl<P: Poller> Reactor<P> {
    /// Creates a reactor without sockets.
    pub fn new(poller: P, mut io: P::Io, limits: &Limits) -> Reactor<P> {
        let warm = Some(io.warm_buffer());
        let buffer_bytes = limits.buffer_bytes;
        Reactor {
            poller,
            io,
            table: Table::new(),
            warm,
            buffer_bytes,
            notices: Vec::new(),
            queued: Vec::new(),
            refused: Vec::new(),
            doubts: Vec::new(),
            doubts_due: None,
        }
    }

    /// Whether the pool is below its bound for this mode.
    pub fn can_lend(&self, mode: TransferMode) -> bool {
        self.io.can_lend(mode)
    }

    /// Returns the calls on sockets that are not registered.
    pub fn io(&mut self) -> &mut P::Io {
        &mut self.io
    }

    /// Returns the time.
    pub fn now(&self) -> Instant {
        self.io.now()
    }

    /// Returns a handle with which another thread ends the wait of [`Reactor::turn`].
    pub fn waker(&self) -> Waker {
        self.poller.waker()
    }

    /// Registers a socket. Its events carry `token`. If the kernel refuses, the socket has no events until
    /// [`Reactor::register_again`] succeeds.
    pub fn register(&mut self, socket: SocketOf<P>, token: Token) -> Key {
        let key = self.table.insert(socket, token);
        self.arm(key);
        key
    }

    /// Whether the kernel refused to register a socket: it has no memory for another registration (ENOMEM), or the user has
    /// too many (ENOSPC, `fs.epoll.max_user_watches`).
    pub fn has_refused(&self) -> bool {
        !self.refused.is_empty()
    }

    /// Registers the sockets again that the kernel refused.
    pub fn register_again(&mut self) {
        for key in std::mem::take(&mut self.refused) {
            if self.table.entry(key).is_some_and(|entry| entry.state == State::Refused) {
                self.arm(key);
            }
        }
    }

    fn arm(&mut self, key: Key) {
        let Some(entry) = self.table.entry_mut(key) else { return };
        let Some(socket) = &entry.socket else { return };
        match self.poller.arm(socket, key) {
            Ok(()) => entry.state = State::Armed,
            Err(_) => {
                entry.state = State::Refused;
                self.refused.push(key);
            }
        }
    }

    /// Closes a socket. No event of it follows.
    pub fn close(&mut self, key: Key) {
        self.end(key, false);
    }

    /// Closes a socket, and reports with [`EventKind::Closed`] when the kernel has closed it, too.
    pub fn close_and_report(&mut self, key: Key) {
        self.end(key, true);
    }

    fn end(&mut self, key: Key, report: bool) {
        let Some(entry) = self.table.entry_mut(key) else { return };
        let Some(socket) = entry.socket.take() else { return };
        let over = entry.state != State::Armed || self.poller.disarm(&socket, key, report);
        // A registration that is being removed still holds the file. Its removal, which is queued before any later request
        // of this shard, closes the file and sends the FIN.
        drop(socket);
        let token = entry.token;
        if over {
            self.table.free(key);
            if report {
                self.queued.push(Event { token, kind: EventKind::Closed });
            }
        } else {
            entry.state = State::Leaving { report };
        }
    }

    /// Returns the number of sockets that are registered or whose last notice is outstanding.
    pub fn registered(&self) -> usize {
        self.table.len()
    }

    /// Returns the socket of a key.
    pub fn socket(&self, key: Key) -> Option<&SocketOf<P>> {
        self.table.entry(key)?.socket.as_ref()
    }

    /// Returns the reported and not disproved readiness of a socket; empty for an unknown key.
    pub fn readiness(&self, key: Key) -> Readiness {
        self.table.entry(key).map_or(Readiness::empty(), |entry| entry.ready)
    }

    /// Whether a read is worth trying.
    pub fn is_readable(&self, key: Key) -> bool {
        self.readiness(key).intersects(READABLE)
    }

    /// Waits for events and appends them. Returns when there is an event, when `until` has passed (`None`: no limit), or
    /// when the [`Waker`] was used.
    ///
    /// # Errors
    /// The poller is broken.
    pub fn turn(&mut self, until: Option<Instant>, events: &mut Vec<Event>) -> Result<(), ReactorError> {
        if !self.doubts.is_empty() && self.doubts_due.is_none() {
            self.doubts_due = Some(self.io.now() + DOUBT);
        }
        let until = match self.queued.is_empty() {
            true => until.into_iter().chain(self.doubts_due).min(),
            false => Some(self.io.now()),
        };
        let mut notices = std::mem::take(&mut self.notices);
        let waited = self.poller.wait(until, &mut notices);
        for notice in notices.drain(..) {
            self.on_notice(notice, events);
        }
        self.notices = notices;
        if self.doubts_due.is_some_and(|due| due <= self.io.now()) {
            self.resolve_doubts(events);
        }
        events.append(&mut self.queued);
        waited
    }

    /// Checks whether the doubted sockets have an urgent byte.
    fn resolve_doubts(&mut self, events: &mut Vec<Event>) {
        self.doubts_due = None;
        let doubts = std::mem::take(&mut self.doubts);
        let sockets = doubts.iter().filter_map(|key| Some((*key, self.table.entry(*key)?.socket.as_ref()?)));
        let (keys, sockets): (Vec<Key>, Vec<&SocketOf<P>>) = sockets.unzip();
        let urgent = self.io.have_urgent(&sockets);
        for (key, urgent) in keys.into_iter().zip(urgent) {
            let Some(entry) = self.table.entry_mut(key) else { continue };
            entry.doubted = false;
            if urgent {
                entry.ready |= Readiness::IN | Readiness::PRI;
                events.push(Event { token: entry.token, kind: EventKind::Ready });
            }
        }
    }

    /// Records that a read of `key` may have stopped at an urgent byte.
    fn doubt(&mut self, key: Key) {
        if !self.poller.reports_urgent()
            && let Some(entry) = self.table.entry_mut(key)
            && !std::mem::replace(&mut entry.doubted, true)
        {
            self.doubts.push(key);
        }
    }

    fn on_notice(&mut self, notice: Notice, events: &mut Vec<Event>) {
        let Notice { key, readiness, armed } = notice;
        // A notice with an old generation finds no entry.
        let Some(entry) = self.table.entry_mut(key) else { return };
        let token = entry.token;
        match (entry.state, readiness) {
            (State::Leaving { report }, _) => {
                if !armed {
                    self.table.free(key);
                    if report {
                        events.push(Event { token, kind: EventKind::Closed });
                    }
                }
            }
            (State::Armed, Ok(readiness)) => {
                entry.ready |= readiness;
                if !readiness.is_empty() {
                    events.push(Event { token, kind: EventKind::Ready });
                }
                if !armed {
                    self.arm(key);
                }
            }
            (State::Armed, Err(_)) => {
                entry.state = State::Refused;
                self.refused.push(key);
            }
            (State::Refused | State::Free, _) => {}
        }
    }

    /// Accepts one connection; `None` if the backlog is empty.
    pub fn accept(&mut self, listener: Key) -> Option<Result<SocketOf<P>, SocketError>> {
        let entry = self.table.entry_mut(listener).filter(|entry| entry.ready.intersects(READABLE))?;
        let accepted = self.io.accept(entry.socket.as_ref()?);
        if accepted.is_none() {
            entry.ready -= READABLE;
        }
        accepted
    }

    /// Receives one message of at most `bytes_max` and the attached sockets from a channel.
    ///
    /// # Errors
    /// See [`SocketIo::receive_message`].
    pub fn receive_message(
        &mut self,
        channel: Key,
        bytes_max: usize,
    ) -> Result<(Vec<u8>, Vec<SocketOf<P>>), ChannelError> {
        let Some(entry) = self.table.entry_mut(channel) else { return Err(ChannelError::Gone) };
        if !entry.ready.intersects(READABLE) {
            return Err(ChannelError::WouldBlock);
        }
        let Some(socket) = &entry.socket else { return Err(ChannelError::Gone) };
        let received = self.io.receive_message(socket, bytes_max);
        if matches!(received, Err(ChannelError::WouldBlock)) {
            entry.ready -= READABLE;
        }
        received
    }

    /// Records that two sockets belong to one relayed connection.
    pub fn pair(&mut self, one: Key, other: Key) {
        if let (Some(one), Some(other)) = (self.table.entry(one), self.table.entry(other))
            && let (Some(one), Some(other)) = (&one.socket, &other.socket)
        {
            self.io.pair(one, other);
        }
    }

    /// Calls `call` with the I/O functions and the socket of `key`; `None` for an unknown key.
    pub fn on_socket<T>(&mut self, key: Key, call: impl FnOnce(&mut P::Io, &SocketOf<P>) -> T) -> Option<T> {
        let socket = self.table.entry(key)?.socket.as_ref()?;
        Some(call(&mut self.io, socket))
    }
}

impl<P: Poller> fmt::Debug for Reactor<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reactor")
            .field("poller", &self.poller)
            .field("registered", &self.table.len())
            .finish_non_exhaustive()
    }
}
