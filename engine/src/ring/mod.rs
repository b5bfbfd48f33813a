//! The ring: what a shard may ask of the kernel, and the one place where errno is understood.
//!
//! A shard submits an [`Op`] under a [`Token`] of its own choosing. The ring either answers at once
//! ([`Submitted::Done`]) or keeps the operation and answers from [`Ring::turn`]. An operation owns what it works on,
//! a clone of the socket and the [`Loan`] it carries, from `submit` to its completion. So a descriptor cannot be
//! closed, nor a buffer reused, while the kernel may still touch it: closing a descriptor does not complete its
//! pending operations (`io_uring_cancelation(7)`). Whoever wants out cancels and waits for the completion.
//!
//! Three rings obey this contract: `uring` (io_uring), `epoll`, and `fake` (in memory, seeded, with faults). What a
//! shard can observe is the same on all three; one suite of conformance cases runs on each.
//!
//! Time is not an operation: a shard keeps its own deadlines and hands the nearest one to [`Ring::turn`], which saves
//! an operation and its cancellation for each connection.

use std::fmt;
use std::net::SocketAddr;
use std::num::{NonZeroU16, NonZeroU64};
use std::sync::Arc;
use std::time::Instant;

use rustix::fd::OwnedFd;
use rustix::io::Errno;

use crate::command::{Family, RingKind, RingReport};
use crate::limits::Limits;
use crate::opener::DialFailure;
use crate::opener::client::StockError;
use crate::sys::SocketError;

pub(crate) mod attempt;
mod epoll;
#[cfg(feature = "fake-ring")]
pub mod fake;
mod pool;
mod uring;
mod work;

pub use epoll::EpollRing;
pub use pool::{Loan, Pool};
pub use uring::UringRing;

/// A shard's own name for an operation in flight, given back with its completion. No two operations in flight share one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token(pub u64);

/// A ring's name for an operation in flight, by which it is cancelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OpKey(pub NonZeroU64);

impl OpKey {
    /// The key of a place in a ring's entries. It is one higher than the two numbers put together, so that it is never zero.
    fn new(generation: u32, index: u32) -> OpKey {
        OpKey(NonZeroU64::MIN.saturating_add(u64::from(generation) << 32 | u64::from(index)))
    }

    /// The generation and the index that a key was made of.
    fn parts(self) -> (u32, u32) {
        halves_of(self.0.get() - 1)
    }
}

/// The upper and the lower half of a number.
fn halves_of(number: u64) -> (u32, u32) {
    let lower = u32::try_from(number & u64::from(u32::MAX)).unwrap_or(u32::MAX);
    (u32::try_from(number >> 32).unwrap_or(u32::MAX), lower)
}

/// How a direction moves its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Through a buffer.
    Copy,
    /// Through a pipe, by splice(2): the pages change hands.
    Splice,
}

/// Bytes on loan from a ring's pool: a buffer or a pipe. It goes back to the pool when it is dropped.
pub trait Borrowed: fmt::Debug {
    /// Bytes held and not yet sent.
    fn bytes(&self) -> usize;
    /// Whether it is a buffer or a pipe.
    fn way(&self) -> Way;
}

/// One operation. Everything in it belongs to the ring until its completion.
#[derive(Debug)]
pub enum Op<R: Ring + ?Sized> {
    /// Takes one connection from a listener's queue.
    Accept {
        /// The listener.
        listener: R::Socket,
    },
    /// Connects an unconnected socket.
    Connect {
        /// The socket, made inside the namespace.
        socket: R::Socket,
        /// Where to.
        address: SocketAddr,
    },
    /// Waits until there is something to read, only then takes a loan from the pool, and reads into it.
    Recv {
        /// The socket.
        socket: R::Socket,
        /// Into a buffer or into a pipe.
        way: Way,
        /// There probably is something already: try before waiting.
        eager: bool,
    },
    /// Sends all that the loan holds. Completes when it is empty, or on an error.
    Send {
        /// The socket.
        socket: R::Socket,
        /// What to send.
        loan: R::Loan,
    },
    /// Waits until the connection is broken: a reset, or a FIN in each direction. The peer's FIN alone may put it to sleep;
    /// then nothing but a cancel ends it, and a later reset is told by the next send or read.
    Watch {
        /// The socket.
        socket: R::Socket,
    },
    /// Asks an opener channel for unconnected sockets and waits for them.
    Stock {
        /// The channel.
        channel: R::Socket,
        /// Of which family.
        family: Family,
        /// How many.
        count: u16,
        /// `SO_NETNS_COOKIE` that each must carry.
        netns_cookie: u64,
    },
    /// Sends a driver the request to dial, as soon as the channel has room.
    Ask {
        /// The channel.
        channel: R::Socket,
        /// Which dial; never used again on this channel.
        dial: u64,
        /// The port inside.
        port: NonZeroU16,
    },
    /// Waits for a driver's next answer to any dial, or for its end.
    Hear {
        /// The channel.
        channel: R::Socket,
    },
}

/// What an operation came to.
#[derive(Debug)]
pub enum Outcome<R: Ring + ?Sized> {
    /// [`Op::Accept`]: the connection and the family by which the client came.
    Accepted(Result<(R::Socket, Family), SocketError>),
    /// [`Op::Connect`].
    Connected(Result<(), SocketError>),
    /// [`Op::Recv`].
    Received(Received<R::Loan>),
    /// [`Op::Send`]: the loan, empty where all was sent.
    Sent(R::Loan, Result<(), SocketError>),
    /// [`Op::Watch`]: the connection is broken.
    Broken,
    /// [`Op::Stock`].
    Stocked(Result<Vec<R::Socket>, StockError>),
    /// [`Op::Ask`]: the request is on its way.
    Asked(Result<(), StockError>),
    /// [`Op::Hear`].
    Heard(Result<Dialled<R::Socket>, StockError>),
    /// Cancelled before it did anything further. A send gives its loan back with what it still holds.
    Cancelled(Option<R::Loan>),
}

impl<R: Ring + ?Sized> Outcome<R> {
    /// Whether it tells that a connection is broken.
    pub fn tells_a_break(&self) -> bool {
        matches!(self, Outcome::Sent(_, Err(_)) | Outcome::Received(Received::Failed(_)) | Outcome::Broken)
    }
}

/// How a driver answered a dial.
#[derive(Debug)]
pub struct Dialled<S> {
    /// Which one.
    pub dial: u64,
    /// The connected socket, or why there is none.
    pub result: Result<S, DialFailure>,
}

/// What a read came to.
#[derive(Debug)]
pub enum Received<L> {
    /// At least one byte.
    Bytes(L),
    /// The peer's FIN, after every byte.
    Eof,
    /// There is something to read, but nothing of this kind to read it into.
    NoLoan(Way),
    /// The connection is broken; every byte that came before was delivered.
    Failed(SocketError),
}

/// The answer to [`Ring::submit`].
#[derive(Debug)]
pub enum Submitted<R: Ring + ?Sized> {
    /// It is over already; no completion follows.
    Done(Outcome<R>),
    /// It is in flight; its completion will come from [`Ring::turn`].
    Pending(OpKey),
}

/// An operation that was in flight and is over.
#[derive(Debug)]
pub struct Completion<R: Ring + ?Sized> {
    /// The token it was submitted under.
    pub token: Token,
    /// What it came to.
    pub outcome: Outcome<R>,
}

/// The ring itself has failed; its shard cannot go on.
#[derive(Debug, thiserror::Error)]
#[error("the {kind} ring failed to {doing}: {source}")]
pub struct RingError {
    /// Which ring.
    pub kind: RingKind,
    /// What it was doing.
    pub doing: &'static str,
    /// What the kernel said.
    pub source: Errno,
}

/// What a shard asks of the kernel.
pub trait Ring: fmt::Debug {
    /// A socket, or another descriptor that operations work on. Clones share it; the last one closes it.
    type Socket: Clone + fmt::Debug;
    /// Bytes on loan.
    type Loan: Borrowed;

    /// Starts an operation.
    fn submit(&mut self, token: Token, op: Op<Self>) -> Submitted<Self>;

    /// Asks for an operation to end. It still completes, as cancelled or with what it came to just before; only then is it over.
    fn cancel(&mut self, key: OpKey);

    /// Appends the operations that are over to `completions`. Waits until there is one, until `until` has passed
    /// (`None`: for ever), or until the ring's [`Waker`] was used.
    ///
    /// # Errors
    /// The ring itself is broken.
    fn turn(
        &mut self,
        until: Option<Instant>,
        completions: &mut Vec<Completion<Self>>,
    ) -> Result<(), RingError>;

    /// The ring's clock: the kernel's monotonic one, or the simulation's.
    fn now(&self) -> Instant;

    /// A handle by which another thread ends the wait of [`Ring::turn`].
    fn waker(&self) -> Waker;

    /// Whether a loan of this kind can be had now.
    fn can_lend(&self, way: Way) -> bool;

    /// Sends the FIN.
    ///
    /// # Errors
    /// The connection is broken.
    fn shutdown_write(&mut self, socket: &Self::Socket) -> Result<(), SocketError>;

    /// Makes the close of `socket` a reset (`SO_LINGER` with zero seconds), which also discards what is not yet acknowledged.
    fn reset_on_close(&mut self, socket: &Self::Socket);

    /// Bytes that the peer has not yet acknowledged; 0 where nobody can tell any more.
    fn unacknowledged_bytes(&mut self, socket: &Self::Socket) -> usize;

    /// Whether a connected socket is its own peer: what a connect to a loopback port of the ephemeral range may come to
    /// when nobody listens there (simultaneous open, RFC 9293 3.5).
    fn is_own_peer(&mut self, socket: &Self::Socket) -> bool;

    /// Takes over a descriptor made elsewhere.
    fn adopt(&mut self, descriptor: OwnedFd) -> Self::Socket;

    /// Gives a socket up, to be adopted by another ring.
    ///
    /// # Errors
    /// The socket itself, where something else still holds it, or it is no descriptor.
    fn disown(&mut self, socket: Self::Socket) -> Result<OwnedFd, Self::Socket>;

    /// A second descriptor of a socket, to be used by another process; `None` when none is left, or it is no descriptor.
    fn duplicate(&self, socket: &Self::Socket) -> Option<OwnedFd>;
}

/// Ends another thread's wait in [`Ring::turn`].
#[derive(Clone, Debug)]
pub struct Waker(Option<Arc<OwnedFd>>);

impl Waker {
    /// One that writes to an eventfd which the ring watches.
    pub fn new(eventfd: Arc<OwnedFd>) -> Waker {
        Waker(Some(eventfd))
    }

    /// One for a ring that never waits.
    pub fn none() -> Waker {
        Waker(None)
    }

    /// Ends the wait, or the next one.
    pub fn wake(&self) {
        if let Some(eventfd) = &self.0 {
            // The counter is full only if it was never read, and then the ring is awake anyway.
            let _ = rustix::io::write(eventfd, &1u64.to_ne_bytes());
        }
    }
}

/// Which ring an engine is asked to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RingChoice {
    /// io_uring where it works, else epoll.
    #[default]
    Auto,
    /// io_uring or nothing.
    IoUring,
    /// epoll.
    Epoll,
}

/// Why io_uring cannot be used here, for people, and whether epoll may take its place.
#[derive(Debug, thiserror::Error)]
#[error("{reason}")]
pub struct Unusable {
    /// What is in the way, and where it is set.
    pub reason: String,
    /// True when the machine forbids or lacks io_uring; false when something merely ran out.
    pub fall_back: bool,
}

fn ran_out(of: &str, errno: Errno) -> Unusable {
    Unusable { reason: format!("could not get {of}: {errno}"), fall_back: false }
}

/// Finds out which ring works on this thread's machine.
///
/// # Errors
/// [`RingChoice::IoUring`] was asked for and does not work, or it ran out of memory or descriptors rather than being forbidden.
pub fn choose(choice: RingChoice, limits: &Limits) -> Result<RingReport, Unusable> {
    match choice {
        RingChoice::Epoll => {
            Ok(RingReport { kind: RingKind::Epoll, reason: Some("epoll was asked for".into()) })
        }
        RingChoice::IoUring => {
            UringRing::self_test(limits).map(|()| RingReport { kind: RingKind::IoUring, reason: None })
        }
        RingChoice::Auto => match UringRing::self_test(limits) {
            Ok(()) => Ok(RingReport { kind: RingKind::IoUring, reason: None }),
            Err(unusable) if unusable.fall_back => {
                Ok(RingReport { kind: RingKind::Epoll, reason: Some(unusable.reason) })
            }
            Err(unusable) => Err(unusable),
        },
    }
}
