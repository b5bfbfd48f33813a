//! The io_uring poller.
//!
//! Each socket has one multishot `POLL_ADD`, edge-triggered, for its life; a turn submits new and removed registrations and
//! reaps the reports in one `io_uring_enter`. A deadline is a timer whose poll ends the wait: a time limit of the wait itself
//! is set and cancelled each time, which costs half a microsecond. The calls that move bytes are non-blocking ones on this
//! thread: `IORING_OP_SPLICE` and `IORING_OP_SHUTDOWN` always go to a worker thread (`REQ_F_FORCE_ASYNC`, io_uring/splice.c
//! and net.c), and a send on loopback runs the receiver's half of TCP inside the call in any case.
//!
//! A registration is removed by `ASYNC_CANCEL` under its key. `POLL_REMOVE` is not used: it fails with EALREADY while a
//! report is being prepared (`io_poll_disarm()` in io_uring/poll.c), and the registration would hold the file for ever. The
//! cancel always succeeds, and the last report of the registration, without MORE, follows.
//!
//! Requests name descriptors, never memory. They are submitted in the order in which they were queued, so a registration
//! whose descriptor was closed before it was submitted is followed by its own removal; if the number belongs to another
//! file by then, that file is registered under a key whose generation is over, and removed at once.
//!
//! The ring is restricted to the requests that it makes (`IORING_REGISTER_RESTRICTIONS`), since io_uring bypasses seccomp.

#![expect(unsafe_code, reason = "io_uring is driven through shared memory")]

mod setup;

use std::collections::VecDeque;
use std::fmt;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::{EnterFlags, IoUring, cqueue, opcode, squeue, types};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::time::{Itimerspec, TimerfdTimerFlags, Timespec, timerfd_settime};

use super::{INTEREST, KernelIo, Key, Notice, Poller, Reactor, ReactorError, Readiness, Unusable, Waker};
use crate::command::RingKind;
use crate::limits::Limits;

/// Requests that fit one submission; a fuller turn is submitted in several.
const SUBMISSION_ENTRIES: u32 = 512;
/// Completions that fit the ring; the kernel keeps the rest (`IORING_FEAT_NODROP`).
const COMPLETION_ENTRIES: u32 = 4_096;
/// The `user_data` of cancel requests, of the wake-up and of the timer, which are not keys.
const USER_DATA_CANCEL: u64 = u64::MAX;
const USER_DATA_WAKE: u64 = u64::MAX - 1;
const USER_DATA_TIMER: u64 = u64::MAX - 2;
/// The time after which submissions that keep failing end the ring.
const FAILING_MAX: Duration = Duration::from_secs(1);
/// The longest pause between two failing submissions; the first is one millisecond.
const FAILING_PAUSE_MAX: Duration = Duration::from_millis(64);

/// The poller over io_uring.
pub struct Uring {
    ring: IoUring,
    /// Requests that do not fit the submission queue.
    pending: VecDeque<squeue::Entry>,
    eventfd: Arc<OwnedFd>,
    wake_armed: bool,
    timer: OwnedFd,
    timer_armed: bool,
    /// When the timer expires; `None` where it is not set. It may be earlier than the present deadline.
    timer_at: Option<Instant>,
    /// [`EnterFlags::NO_IOWAIT`] where the kernel has it (6.15): without it an idle ring counts as waiting for a disk.
    waiting: EnterFlags,
    failing: Option<Failing>,
}

/// Consecutive failing submissions.
struct Failing {
    since: Instant,
    pause: Duration,
}

impl Uring {
    /// Creates a poller for the calling thread, which must be the only one that uses it. Waits up to one second for locked
    /// memory that rings of ended processes still hold.
    ///
    /// # Errors
    /// io_uring is forbidden or too old here, or a resource ran out.
    pub fn new() -> Result<Uring, Unusable> {
        let ring = setup::set_up()?;
        let eventfd = setup::eventfd()?;
        let no_iowait = ring.params().is_feature_no_iowait();
        let waiting = if no_iowait { EnterFlags::NO_IOWAIT } else { EnterFlags::empty() };
        Ok(Uring {
            ring,
            pending: VecDeque::new(),
            eventfd: Arc::new(eventfd),
            wake_armed: false,
            timer: setup::timer()?,
            timer_armed: false,
            timer_at: None,
            waiting,
            failing: None,
        })
    }

    /// Creates a reactor over a new poller.
    ///
    /// # Errors
    /// See [`Uring::new`].
    pub fn reactor(limits: &Limits) -> Result<Reactor<Uring>, Unusable> {
        Ok(Reactor::new(Uring::new()?, KernelIo::new(limits), limits))
    }

    /// Queues a request after all earlier ones.
    fn push(&mut self, request: squeue::Entry) {
        if !self.pending.is_empty() || !self.push_now(&request) {
            self.pending.push_back(request);
        }
    }

    fn push_now(&mut self, request: &squeue::Entry) -> bool {
        // SAFETY: `push` demands that everything the request points to stays valid until its completion. The requests made
        // in this file are POLL_ADD and ASYNC_CANCEL; neither points to memory. A descriptor that POLL_ADD names may be
        // closed before the request is submitted, which is not a matter of memory (see the head of this file).
        unsafe { self.ring.submission().push(request) }.is_ok()
    }

    /// Moves pending requests into the submission queue, submitting full ones.
    fn flush_pending(&mut self) -> Result<(), ReactorError> {
        while let Some(request) = self.pending.pop_front() {
            if !self.push_now(&request) {
                self.pending.push_front(request);
                let submitted = self.ring.submit();
                if !self.note(submitted.map(drop))? {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Arms the polls of the eventfd and of the timer. Every write to an eventfd and every expiry of a timer is an edge, so
    /// neither is read; the counter of an eventfd is full after 2^64 - 2 writes.
    fn arm_own(&mut self) {
        if !std::mem::replace(&mut self.wake_armed, true) {
            self.push(poll_request(self.eventfd.as_raw_fd(), Readiness::IN, USER_DATA_WAKE));
        }
        if !std::mem::replace(&mut self.timer_armed, true) {
            self.push(poll_request(self.timer.as_raw_fd(), Readiness::IN, USER_DATA_TIMER));
        }
    }

    /// Has the timer end the wait at `at`, or earlier. False if that time has passed.
    fn set_timer(&mut self, at: Instant) -> Result<bool, ReactorError> {
        let left = at.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        if self.timer_at.is_none_or(|set| at < set) {
            let once = Timespec { tv_sec: 0, tv_nsec: 0 };
            let value = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 });
            let time = Itimerspec { it_interval: once, it_value: value };
            timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &time)
                .map_err(|source| ReactorError { kind: RingKind::IoUring, doing: "set its timer", source })?;
            self.timer_at = Some(at);
        }
        Ok(true)
    }

    /// Submits the queued requests and, with `wait`, waits until a completion arrives.
    fn enter(&mut self, wait: bool) -> Result<(), ReactorError> {
        let submitted = match wait {
            true => self.wait_for_one(),
            // Submits without waiting.
            false => self.ring.submit().map(drop),
        };
        self.note(submitted).map(drop)
    }

    fn wait_for_one(&mut self) -> std::io::Result<()> {
        let to_submit = u32::try_from(self.ring.submission().len()).unwrap_or(u32::MAX);
        let flags = EnterFlags::GETEVENTS | self.waiting;
        // SAFETY: `enter` demands parameters that fit io_uring_enter(2). `to_submit` is the length of the submission queue,
        // whose requests are valid (see `push_now`). Without an argument the kernel gets a null signal mask, which it
        // ignores, and the size of one.
        unsafe { self.ring.submitter().enter::<libc::sigset_t>(to_submit, 1, flags.bits(), None) }.map(drop)
    }

    /// Evaluates the result of a submission. True if it succeeded; false if it is to be repeated.
    fn note(&mut self, submitted: std::io::Result<()>) -> Result<bool, ReactorError> {
        let errno = match submitted {
            Ok(()) => {
                self.failing = None;
                return Ok(true);
            }
            Err(error) => Errno::from_io_error(&error).unwrap_or(Errno::IO),
        };
        match errno {
            // A signal arrived.
            Errno::INTR => {
                self.failing = None;
                Ok(true)
            }
            // Completions must be reaped first, or the kernel is out of memory.
            Errno::BUSY | Errno::AGAIN | Errno::NOMEM => {
                let failing = self.failing.get_or_insert_with(|| Failing {
                    since: Instant::now(),
                    pause: Duration::from_millis(1),
                });
                if failing.since.elapsed() >= FAILING_MAX {
                    return Err(failed(errno));
                }
                std::thread::sleep(failing.pause);
                failing.pause = (2 * failing.pause).min(FAILING_PAUSE_MAX);
                Ok(false)
            }
            errno => Err(failed(errno)),
        }
    }

    fn reap(&mut self, notices: &mut Vec<Notice>) {
        for completion in self.ring.completion() {
            let armed = cqueue::more(completion.flags());
            match completion.user_data() {
                USER_DATA_CANCEL => {}
                USER_DATA_WAKE => self.wake_armed = armed,
                USER_DATA_TIMER => {
                    self.timer_armed = armed;
                    self.timer_at = None;
                }
                number => {
                    if let Some(key) = Key::of_number(number) {
                        notices.push(Notice { key, readiness: readiness_of(completion.result()), armed });
                    }
                }
            }
        }
    }
}

fn failed(source: Errno) -> ReactorError {
    ReactorError { kind: RingKind::IoUring, doing: "submit", source }
}

fn readiness_of(result: i32) -> Result<Readiness, Errno> {
    if result < 0 {
        return Err(Errno::from_raw_os_error(-result));
    }
    // A report of a single wake-up carries the bits of that wake-up (`io_poll_check_events()` in io_uring/poll.c), and every
    // wake-up for received bytes includes PRI (`sock_def_readable()` in net/core/sock.c).
    Ok(Readiness::from_bits_truncate(u16::try_from(result).unwrap_or(u16::MAX)) - Readiness::PRI)
}

fn poll_request(descriptor: i32, interest: Readiness, user_data: u64) -> squeue::Entry {
    // Multishot without IORING_POLL_ADD_LEVEL is edge-triggered.
    opcode::PollAdd::new(types::Fd(descriptor), u32::from(interest.bits()))
        .multi(true)
        .build()
        .user_data(user_data)
}

impl fmt::Debug for Uring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Uring").field("descriptor", &self.ring.as_raw_fd()).finish_non_exhaustive()
    }
}

impl Poller for Uring {
    type Io = KernelIo;

    fn reports_urgent(&self) -> bool {
        false
    }

    fn arm(&mut self, socket: &OwnedFd, key: Key) -> Result<(), Errno> {
        self.push(poll_request(socket.as_raw_fd(), INTEREST, key.number()));
        Ok(())
    }

    fn disarm(&mut self, _: &OwnedFd, key: Key, _: bool) -> bool {
        // A cancel that succeeds posts no completion of its own; the registration's last completion is sufficient.
        let request = opcode::AsyncCancel::new(key.number()).build();
        self.push(request.flags(squeue::Flags::SKIP_SUCCESS).user_data(USER_DATA_CANCEL));
        false
    }

    fn wait(&mut self, until: Option<Instant>, notices: &mut Vec<Notice>) -> Result<(), ReactorError> {
        self.arm_own();
        self.flush_pending()?;
        let is_due = match until {
            Some(at) => !self.set_timer(at)?,
            None => false,
        };
        self.enter(self.pending.is_empty() && !is_due)?;
        self.reap(notices);
        Ok(())
    }

    fn waker(&self) -> Waker {
        Waker::new(self.eventfd.clone())
    }
}
