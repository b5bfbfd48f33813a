//! The interface between a reactor and a source of readiness.

use std::fmt;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Instant;

use rustix::fd::OwnedFd;
use rustix::io::Errno;

use super::{Readiness, SocketIo};
use crate::command::RingKind;

/// The reactor's identifier of a registered socket. It is never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(NonZeroU64);

impl Key {
    /// Packs an entry's generation and index, plus one, so that the number is never zero.
    pub(super) fn new(generation: u32, index: u32) -> Key {
        Key(NonZeroU64::MIN.saturating_add(u64::from(generation) << 32 | u64::from(index)))
    }

    /// Returns the generation and the index.
    pub(super) fn parts(self) -> (u32, u32) {
        let number = self.0.get() - 1;
        let lower = u32::try_from(number & u64::from(u32::MAX)).unwrap_or(u32::MAX);
        (u32::try_from(number >> 32).unwrap_or(u32::MAX), lower)
    }

    /// Returns the key as the number that pollers carry.
    pub(super) fn number(self) -> u64 {
        self.0.get()
    }

    pub(super) fn of_number(number: u64) -> Option<Key> {
        NonZeroU64::new(number).map(Key)
    }
}

/// The socket type of a poller.
pub type SocketOf<P> = <<P as Poller>::Io as SocketIo>::Socket;
/// The buffer type of a poller.
pub type BufferOf<P> = <<P as Poller>::Io as SocketIo>::Buffer;

/// A report of a poller on one registration.
#[derive(Clone, Copy, Debug)]
pub struct Notice {
    /// The key of the registration.
    pub key: Key,
    /// The events for which the socket is ready; an error if the registration failed.
    pub readiness: Result<Readiness, Errno>,
    /// Whether the registration is still armed.
    pub armed: bool,
}

/// A source of readiness.
pub trait Poller: fmt::Debug {
    /// The calls on the registered sockets.
    type Io: SocketIo;

    /// Whether a notice reports an urgent byte of the socket (PRI).
    fn reports_urgent(&self) -> bool;

    /// Registers a socket, edge-triggered. The first notice reports its current state. If the registration fails later, a
    /// notice reports that.
    ///
    /// # Errors
    /// The kernel refused.
    fn arm(&mut self, socket: &SocketOf<Self>, key: Key) -> Result<(), Errno>;

    /// Removes a registration; the caller closes the socket next. Returns true if no notice of this key can follow;
    /// otherwise one follows whose `armed` is false, and it is the last. `shared`: other processes may hold the open file,
    /// which then outlives our descriptor.
    fn disarm(&mut self, socket: &SocketOf<Self>, key: Key, shared: bool) -> bool;

    /// Appends notices. Waits until there is one, until `until` has passed (`None`: no limit), or until the [`Waker`] was
    /// used.
    ///
    /// # Errors
    /// The poller itself is broken.
    fn wait(&mut self, until: Option<Instant>, notices: &mut Vec<Notice>) -> Result<(), ReactorError>;

    /// Returns a handle with which another thread ends the wait.
    fn waker(&self) -> Waker;
}

/// The poller has failed; its shard cannot continue.
#[derive(Debug, thiserror::Error)]
#[error("{kind} failed to {doing}: {source}")]
pub struct ReactorError {
    /// The kind of the poller.
    pub kind: RingKind,
    /// The operation.
    pub doing: &'static str,
    /// The error of the kernel.
    pub source: Errno,
}

/// Ends another thread's wait in [`Reactor::turn`](super::Reactor::turn).
#[derive(Clone, Debug)]
pub struct Waker(Option<Arc<OwnedFd>>);

impl Waker {
    /// Creates a waker that writes to an eventfd which the poller watches.
    pub fn new(eventfd: Arc<OwnedFd>) -> Waker {
        Waker(Some(eventfd))
    }

    /// Creates a waker for a poller that never waits.
    pub fn none() -> Waker {
        Waker(None)
    }

    /// Ends the wait, or the next one.
    pub fn wake(&self) {
        if let Some(eventfd) = &self.0 {
            // The counter is full only after 2^64 - 2 writes.
            let _ = rustix::io::write(eventfd, &1u64.to_ne_bytes());
        }
    }
}
