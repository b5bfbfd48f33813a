//! The epoll poller: used where io_uring is forbidden or missing, and where epoll was measured to be better.
//!
//! A descriptor is added once, edge-triggered, and never modified. `ep_send_events()` in fs/eventpoll.c polls the file again
//! before it reports an edge, so a report is the state at that time. Closing the last descriptor of an open file removes it
//! from epoll without a call. If another process may hold the file, too, it is removed explicitly. A report of a file that
//! is still held elsewhere has an old generation.

use std::fmt;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec};
use rustix::fd::OwnedFd;
use rustix::io::Errno;

use super::choice::ran_out;
use super::{INTEREST, KernelIo, Key, Notice, Poller, Reactor, ReactorError, Readiness, Unusable, Waker};
use crate::command::RingKind;
use crate::limits::Limits;

/// Reports taken from the kernel at once; the rest remains queued there.
const EVENTS_MAX: usize = 512;
/// The longest single wait. A later deadline takes several waits, because kernels before 5.11 limit the milliseconds
/// (`epoll_wait(2)`).
const WAIT_MAX: Duration = Duration::from_secs(24 * 60 * 60);
/// The data of the wake-up event, which is not a key.
const DATA_WAKE: u64 = u64::MAX;

/// The poller over epoll.
pub struct Epoll {
    epoll: OwnedFd,
    eventfd: Arc<OwnedFd>,
    events: Vec<epoll::Event>,
}

impl Epoll {
    /// Creates a poller for the calling thread.
    ///
    /// # Errors
    /// Descriptors or memory ran out.
    pub fn new() -> Result<Epoll, Unusable> {
        let epoll =
            epoll::create(CreateFlags::CLOEXEC).map_err(|errno| ran_out("an epoll descriptor", errno))?;
        let eventfd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| ran_out("an eventfd", errno))?;
        // Every write to an eventfd is an edge, so its counter need not be read; it is full after 2^64 - 2 writes.
        epoll::add(&epoll, &eventfd, EventData::new_u64(DATA_WAKE), EventFlags::IN | EventFlags::ET)
            .map_err(|errno| ran_out("an epoll registration", errno))?;
        Ok(Epoll { epoll, eventfd: Arc::new(eventfd), events: Vec::with_capacity(EVENTS_MAX) })
    }

    /// Creates a reactor over a new poller.
    ///
    /// # Errors
    /// See [`Epoll::new`].
    pub fn reactor(limits: &Limits) -> Result<Reactor<Epoll>, Unusable> {
        Ok(Reactor::new(Epoll::new()?, KernelIo::new(limits), limits))
    }
}

impl fmt::Debug for Epoll {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Epoll").field("descriptor", &self.epoll.as_raw_fd()).finish_non_exhaustive()
    }
}

impl Poller for Epoll {
    type Io = KernelIo;

    fn reports_urgent(&self) -> bool {
        true
    }

    fn arm(&mut self, socket: &OwnedFd, key: Key) -> Result<(), Errno> {
        let data = EventData::new_u64(key.number());
        let flags = EventFlags::from_bits_truncate(u32::from(INTEREST.bits())) | EventFlags::ET;
        match epoll::add(&self.epoll, socket, data, flags) {
            // The descriptor was given away, and the same open file came back under the same number.
            Err(Errno::EXIST) => epoll::modify(&self.epoll, socket, data, flags),
            result => result,
        }
    }

    fn disarm(&mut self, socket: &OwnedFd, _: Key, shared: bool) -> bool {
        if shared {
            // The only error is that it was not registered.
            let _ = epoll::delete(&self.epoll, socket);
        }
        true
    }

    fn wait(&mut self, until: Option<Instant>, notices: &mut Vec<Notice>) -> Result<(), ReactorError> {
        loop {
            // rustix rounds a wait up to whole milliseconds, so it never ends before the deadline.
            let left = until.map(|at| at.saturating_duration_since(Instant::now()));
            let limit = left.and_then(|left| Timespec::try_from(left.min(WAIT_MAX)).ok());
            self.events.clear();
            match epoll::wait(&self.epoll, spare_capacity(&mut self.events), limit.as_ref()) {
                Ok(0) if left.is_some_and(|left| left > WAIT_MAX) => continue,
                Ok(_) | Err(Errno::INTR) => {}
                Err(source) => return Err(ReactorError { kind: RingKind::Epoll, doing: "wait", source }),
            }
            for epoll::Event { flags, data, .. } in self.events.iter().copied() {
                let bits = u16::try_from(flags.bits()).unwrap_or(u16::MAX);
                let readiness = Ok(Readiness::from_bits_truncate(bits));
                if data.u64() != DATA_WAKE
                    && let Some(key) = Key::of_number(data.u64())
                {
                    notices.push(Notice { key, readiness, armed: true });
                }
            }
            return Ok(());
        }
    }

    fn waker(&self) -> Waker {
        Waker::new(self.eventfd.clone())
    }
}
