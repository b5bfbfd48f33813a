//! The io_uring ring.
//!
//! The kernel is asked for readiness through the ring (`POLL_ADD`), one entry for each operation that cannot be done at
//! once, and everything of a turn is submitted and reaped by one `io_uring_enter`. The calls that move bytes are plain
//! non-blocking ones on this thread, for `IORING_OP_SPLICE` and `IORING_OP_SHUTDOWN` always go to a worker thread
//! (`REQ_F_FORCE_ASYNC`, io_uring/splice.c and net.c), and a send on loopback runs the receiver's half of TCP inside the
//! call either way.
//!
//! An [`Entry`] owns the sockets and the loan of its operation from `submit` until the completion of the last request
//! that was made for it. Its index and generation are the `user_data` of that request, and an entry is reused only
//! after that completion, so a late completion finds either its own entry or none.
//!
//! The ring is restricted to the three requests that it makes (`IORING_REGISTER_RESTRICTIONS`), since io_uring
//! bypasses seccomp.

#![expect(unsafe_code, reason = "io_uring is driven through shared memory")]

mod setup;

use std::fmt;
use std::num::NonZeroU64;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use rustix::event::{EventfdFlags, PollFlags};
use rustix::fd::OwnedFd;
use rustix::io::Errno;

use super::work::{Next, Work};
use super::{Completion, Loan, Op, OpKey, Outcome, Pool, Ring, RingError, Submitted, Token};
use super::{Unusable, Waker, Way, attempt};
use crate::command::RingKind;
use crate::limits::Limits;
use crate::sys::{SocketError, unacknowledged_bytes};

/// Requests that fit one submission; a fuller turn is submitted in several.
const SUBMISSION_ENTRIES: u32 = 512;
/// Completions that fit the ring; the kernel keeps what does not (`IORING_FEAT_NODROP`).
const COMPLETION_ENTRIES: u32 = 4_096;
/// The `user_data` of cancel requests and of the wake-up, which belong to no entry. Indices stay below 2^32 - 2.
const USER_DATA_CANCEL: u64 = u64::MAX;
const USER_DATA_WAKE: u64 = u64::MAX - 1;

/// The ring over io_uring.
pub struct UringRing {
    uring: IoUring,
    pool: Pool,
    entries: Vec<Entry>,
    free: Vec<u32>,
    /// Completions that needed no request, told at the next turn.
    settled: Vec<(Token, Outcome<UringRing>)>,
    eventfd: Arc<OwnedFd>,
    wake_armed: bool,
}

struct Entry {
    generation: u32,
    state: EntryState,
}

enum EntryState {
    Free,
    /// A request is in flight for this work.
    Armed {
        token: Token,
        work: Work,
        cancelled: bool,
    },
    /// The work is over, its request that tells more than once is not.
    Ending {
        token: Token,
        /// Boxed, or every waiting entry would be as large as the largest outcome.
        outcome: Box<Outcome<UringRing>>,
    },
    /// Nothing is in flight and nothing will happen until it is cancelled.
    Dormant {
        token: Token,
    },
}

impl UringRing {
    /// A ring for the calling thread, which must be the only one that uses it.
    ///
    /// # Errors
    /// io_uring is forbidden or too old here, or something ran out.
    pub fn new(limits: &Limits) -> Result<UringRing, Unusable> {
        let uring = setup::set_up()?;
        let eventfd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| super::ran_out("an eventfd", errno))?;
        Ok(UringRing {
            uring,
            pool: Pool::new(limits),
            entries: Vec::new(),
            free: Vec::new(),
            settled: Vec::new(),
            eventfd: Arc::new(eventfd),
            wake_armed: false,
        })
    }

    /// Buffers and pipes on loan now.
    pub fn lent(&self) -> (usize, usize) {
        self.pool.lent()
    }

    fn claim(&mut self) -> u32 {
        if let Some(index) = self.free.pop() {
            return index;
        }
        let index = u32::try_from(self.entries.len()).unwrap_or(u32::MAX);
        self.entries.push(Entry { generation: 0, state: EntryState::Free });
        index
    }

    fn key_of(&self, index: u32) -> OpKey {
        let generation = self.entries.get(index as usize).map_or(0, |entry| entry.generation);
        OpKey::new(generation, index)
    }

    /// The entry of `user_data`, if it is still the one that it was made for.
    fn find(&mut self, user_data: u64) -> Option<(u32, &mut Entry)> {
        let (generation, index) = OpKey(NonZeroU64::new(user_data)?).parts();
        let entry = self.entries.get_mut(index as usize)?;
        (entry.generation == generation).then_some((index, entry))
    }

    fn push(&mut self, request: &squeue::Entry) {
        loop {
            // SAFETY: `push` demands that everything the request points to stays valid until its completion. The
            // requests made in this file are POLL_ADD and ASYNC_CANCEL; neither points to memory. POLL_ADD names a
            // descriptor, which stays open because the entry of its `user_data` holds a clone of the socket until the
            // completion is reaped (the eventfd is held by the ring itself, which outlives its requests).
            let pushed = unsafe { self.uring.submission().push(request) };
            if pushed.is_ok() {
                return;
            }
            // The queue is full. A submission that the kernel cannot take now (EBUSY, EAGAIN) has run the completions
            // that were due, so the next one finds room.
            let _ = self.uring.submit();
        }
    }

    fn arm_wake(&mut self) {
        if !self.wake_armed {
            let request = opcode::PollAdd::new(types::Fd(self.eventfd.as_raw_fd()), poll_bits(PollFlags::IN))
                .build()
                .user_data(USER_DATA_WAKE);
            self.push(&request);
            self.wake_armed = true;
        }
    }

    /// Submits what is queued and waits, for at most `limit`, until something is complete.
    fn enter(&mut self, limit: Option<Duration>) -> Result<(), RingError> {
        let result = match limit {
            // Only what is due already. TASKRUN_FLAG tells `submit` whether that needs a call at all.
            Some(Duration::ZERO) => self.uring.submit(),
            Some(limit) => {
                let timespec = Timespec::new().sec(limit.as_secs()).nsec(limit.subsec_nanos());
                self.uring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&timespec))
            }
            None => self.uring.submit_and_wait(1),
        };
        match result {
            Ok(_) => Ok(()),
            Err(error) => match error.raw_os_error().map(Errno::from_raw_os_error) {
                // The time is over, a signal came, or completions must be reaped first.
                Some(Errno::TIME | Errno::INTR | Errno::BUSY | Errno::AGAIN) => Ok(()),
                errno => Err(RingError {
                    kind: RingKind::IoUring,
                    doing: "submit",
                    source: errno.unwrap_or(Errno::IO),
                }),
            },
        }
    }

    fn reap(&mut self, completions: &mut Vec<Completion<UringRing>>) {
        loop {
            // Completing one may queue a request, so the queue is borrowed for one entry at a time.
            let Some(cqe) = self.uring.completion().next() else { return };
            match cqe.user_data() {
                USER_DATA_CANCEL => {}
                USER_DATA_WAKE => {
                    self.wake_armed = false;
                    let mut count = [0; 8];
                    // Whether or not it still counted something, it is awake.
                    let _ = rustix::io::read(&*self.eventfd, &mut count);
                }
                user_data => {
                    let more = cqueue::more(cqe.flags());
                    if let Some(completion) = self.complete(user_data, cqe.result(), more) {
                        completions.push(completion);
                    }
                }
            }
        }
    }

    /// The request of one entry tells something, and perhaps `more` later: does the work, and requests again if it still
    /// cannot be done.
    fn complete(&mut self, user_data: u64, result: i32, more: bool) -> Option<Completion<UringRing>> {
        let (index, entry) = self.find(user_data)?;
        let (token, outcome) = match std::mem::replace(&mut entry.state, EntryState::Free) {
            EntryState::Armed { token, work, cancelled } => {
                if cancelled || result == -Errno::CANCELED.raw_os_error() {
                    (token, work.into_cancelled())
                } else if result < 0 {
                    (token, work.into_failed(SocketError::of(Errno::from_raw_os_error(-result))))
                } else {
                    let events = PollFlags::from_bits_truncate(u16::try_from(result).unwrap_or(u16::MAX));
                    let outcome = self.step(index, token, work, events, more)?;
                    if more {
                        self.push(&cancel_request(user_data));
                    }
                    (token, outcome)
                }
            }
            EntryState::Ending { token, outcome } => (token, *outcome),
            state @ (EntryState::Free | EntryState::Dormant { .. }) => {
                entry.state = state;
                return None;
            }
        };
        if more {
            self.set_state(index, EntryState::Ending { token, outcome: Box::new(outcome) });
            return None;
        }
        self.release(index);
        Some(Completion { token, outcome })
    }

    /// Does the work of one entry, or puts it back to wait.
    fn step(
        &mut self,
        index: u32,
        token: Token,
        work: Work,
        events: PollFlags,
        more: bool,
    ) -> Option<Outcome<UringRing>> {
        match work.ready(events, &self.pool) {
            Next::Done(outcome) => return Some(outcome),
            Next::Wait(work) if more => {
                self.set_state(index, EntryState::Armed { token, work, cancelled: false });
            }
            Next::Wait(work) => {
                // RDHUP is in every poll (IO_POLL_UNMASK) and stays, so after the peer's FIN a send that asked once more would be
                // answered at once, for as long as the peer does not read. A request that tells more than once tells it once.
                let multishot = events.contains(PollFlags::RDHUP);
                self.fill(index, token, work, multishot);
            }
            Next::Never => {
                self.leave_dormant(index, token);
            }
        }
        None
    }

    /// Puts work into an entry and requests readiness for it.
    fn fill(&mut self, index: u32, token: Token, work: Work, multishot: bool) -> OpKey {
        let key = self.key_of(index);
        let request = poll_request(&work, key, multishot);
        self.set_state(index, EntryState::Armed { token, work, cancelled: false });
        self.push(&request);
        key
    }

    fn set_state(&mut self, index: u32, state: EntryState) {
        if let Some(entry) = self.entries.get_mut(index as usize) {
            entry.state = state;
        }
    }

    fn leave_dormant(&mut self, index: u32, token: Token) -> OpKey {
        self.set_state(index, EntryState::Dormant { token });
        self.key_of(index)
    }

    /// Ends an entry's use; what still names its generation finds nothing.
    fn release(&mut self, index: u32) {
        if let Some(entry) = self.entries.get_mut(index as usize) {
            entry.generation = entry.generation.wrapping_add(1);
            entry.state = EntryState::Free;
            self.free.push(index);
        }
    }
}

impl fmt::Debug for UringRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UringRing")
            .field("in_flight", &(self.entries.len() - self.free.len()))
            .finish_non_exhaustive()
    }
}

impl Ring for UringRing {
    type Socket = Rc<OwnedFd>;
    type Loan = Loan;

    fn submit(&mut self, token: Token, op: Op<UringRing>) -> Submitted<UringRing> {
        match Work::begin(op, &self.pool) {
            Next::Done(outcome) => Submitted::Done(outcome),
            Next::Wait(work) => {
                let index = self.claim();
                Submitted::Pending(self.fill(index, token, work, false))
            }
            Next::Never => {
                let index = self.claim();
                Submitted::Pending(self.leave_dormant(index, token))
            }
        }
    }

    fn cancel(&mut self, key: OpKey) {
        let Some((index, entry)) = self.find(key.0.get()) else { return };
        match &mut entry.state {
            // What is ending was over before.
            EntryState::Free | EntryState::Ending { .. } => {}
            EntryState::Dormant { token } => {
                let token = *token;
                self.release(index);
                self.settled.push((token, Outcome::Cancelled(None)));
            }
            EntryState::Armed { cancelled, .. } => {
                if !std::mem::replace(cancelled, true) {
                    self.push(&cancel_request(key.0.get()));
                }
            }
        }
    }

    fn turn(
        &mut self,
        until: Option<Instant>,
        completions: &mut Vec<Completion<UringRing>>,
    ) -> Result<(), RingError> {
        self.arm_wake();
        let settled = !self.settled.is_empty();
        completions.extend(self.settled.drain(..).map(|(token, outcome)| Completion { token, outcome }));
        let limit = if settled {
            Some(Duration::ZERO)
        } else {
            until.map(|at| at.saturating_duration_since(self.now()))
        };
        self.enter(limit)?;
        self.reap(completions);
        Ok(())
    }

    fn now(&self) -> Instant {
        Instant::now()
    }

    fn waker(&self) -> Waker {
        Waker::new(self.eventfd.clone())
    }

    fn can_lend(&self, way: Way) -> bool {
        self.pool.can_lend(way)
    }

    fn shutdown_write(&mut self, socket: &Rc<OwnedFd>) -> Result<(), SocketError> {
        attempt::shutdown_write(socket)
    }

    fn reset_on_close(&mut self, socket: &Rc<OwnedFd>) {
        attempt::reset_on_close(socket);
    }

    fn unacknowledged_bytes(&mut self, socket: &Rc<OwnedFd>) -> usize {
        unacknowledged_bytes(socket)
    }

    fn is_own_peer(&mut self, socket: &Rc<OwnedFd>) -> bool {
        attempt::is_own_peer(socket)
    }

    fn adopt(&mut self, descriptor: OwnedFd) -> Rc<OwnedFd> {
        Rc::new(descriptor)
    }

    fn disown(&mut self, socket: Rc<OwnedFd>) -> Result<OwnedFd, Rc<OwnedFd>> {
        Rc::try_unwrap(socket)
    }

    fn duplicate(&self, socket: &Rc<OwnedFd>) -> Option<OwnedFd> {
        socket.try_clone().ok()
    }
}

impl Drop for UringRing {
    /// Nothing that a request still names may be closed before the request is over; the kernel ends the requests of a ring
    /// some time after its descriptor is closed. They are only polls, each of which holds its own reference to the
    /// file, so the entries may go: what could be reused by mistake is memory, and polls have none.
    fn drop(&mut self) {
        self.entries.clear();
    }
}

fn poll_bits(flags: PollFlags) -> u32 {
    u32::from(flags.bits())
}

fn cancel_request(user_data: u64) -> squeue::Entry {
    opcode::AsyncCancel::new(user_data).build().user_data(USER_DATA_CANCEL)
}

fn poll_request(work: &Work, key: OpKey, multishot: bool) -> squeue::Entry {
    let descriptor = types::Fd(work.socket().as_raw_fd());
    opcode::PollAdd::new(descriptor, poll_bits(work.interest()))
        .multi(multishot)
        .build()
        .user_data(key.0.get())
}
