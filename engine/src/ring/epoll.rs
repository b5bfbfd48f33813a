//! The epoll ring: what runs where io_uring is forbidden or missing, and the oracle of the other.
//!
//! A descriptor is registered once, edge-triggered, when an operation first waits for it, and its registration widens
//! when another needs more; there is no `epoll_ctl` for each wait. An edge is told once, so nothing may be forgotten:
//!
//! - An operation that was tried in vain waits for the next edge. One that comes between the try and the next
//!   `epoll_wait` is queued by the kernel, for the queue is emptied nowhere else.
//! - An edge that nobody waited for is remembered in [`Registration::ready`], which holds what the kernel told last; an
//!   operation that begins without a try and finds it there is tried at the next turn ([`EpollRing::try_due`]).
//!   The memory may be out of date in one direction only: it may name bytes that were read since. A try finds that
//!   out, and where a try would be a lie (a connect that never began is writable, too), poll(2) is asked first.
//! - `ep_send_events()` in fs/eventpoll.c asks the file again before it tells an edge, so what is told is the state at
//!   that moment, and replaces the memory.
//!
//! A registration neither keeps its descriptor open nor outlives it: it holds a [`Weak`] and is known by a number and
//! a generation. The kernel forgets it when the last descriptor of the open file closes. Where another process holds one
//! too, the kernel keeps telling edges of a descriptor that we closed; their generation is over, and nobody hears them.

use std::fmt;
use std::os::fd::AsRawFd;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::fd::OwnedFd;
use rustix::io::Errno;

use super::ran_out;
use super::work::{Next, Work};
use super::{Completion, Loan, Op, OpKey, Outcome, Pool, Ring, RingError, Submitted, Token};
use super::{Unusable, Waker, Way, attempt};
use crate::command::RingKind;
use crate::limits::Limits;
use crate::sys::{SocketError, unacknowledged_bytes};

/// Edges taken from the kernel at once; the rest stays queued there.
const EVENTS_MAX: usize = 512;
/// The longest single wait. A later deadline waits again, so that no kernel older than 5.11 is asked for more milliseconds
/// than it can count (`epoll_wait(2)`).
const WAIT_MAX: Duration = Duration::from_secs(24 * 60 * 60);
/// The data of the wake-up. Descriptor numbers stay below 2^31.
const DATA_WAKE: u64 = u64::MAX;

/// The ring over epoll.
pub struct EpollRing {
    epoll: OwnedFd,
    pool: Pool,
    entries: Vec<Entry>,
    free: Vec<u32>,
    /// By descriptor number.
    registrations: Vec<Registration>,
    /// Operations that began without a try while their descriptor was remembered as ready.
    due: Vec<OpKey>,
    /// Completions that need no edge, told at the next turn.
    settled: Vec<(Token, Outcome<EpollRing>)>,
    eventfd: Arc<OwnedFd>,
    events: Vec<Event>,
}

struct Entry {
    generation: u32,
    state: EntryState,
}

enum EntryState {
    Free,
    /// In the `waiting` list of its descriptor.
    Waiting {
        token: Token,
        work: Work,
    },
    /// Nothing will happen until it is cancelled.
    Dormant {
        token: Token,
    },
}

/// What epoll knows of one descriptor number.
struct Registration {
    /// The tenant of the number. As the allocation lives while this does, two tenants never look the same.
    socket: Weak<OwnedFd>,
    generation: u32,
    /// What the kernel was asked to tell.
    interest: PollFlags,
    /// What it told last, less what was found used up since.
    ready: PollFlags,
    /// Entries that wait for it.
    waiting: Vec<u32>,
}

impl Registration {
    /// Of a number that nobody has had yet.
    fn vacant() -> Registration {
        Registration {
            socket: Weak::new(),
            generation: 0,
            interest: PollFlags::empty(),
            ready: PollFlags::empty(),
            waiting: Vec::new(),
        }
    }
}

impl EpollRing {
    /// A ring for the calling thread.
    ///
    /// # Errors
    /// Descriptors or memory ran out.
    pub fn new(limits: &Limits) -> Result<EpollRing, Unusable> {
        let epoll =
            epoll::create(CreateFlags::CLOEXEC).map_err(|errno| ran_out("an epoll descriptor", errno))?;
        let eventfd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| ran_out("an eventfd", errno))?;
        // Every write to an eventfd is an edge, so its counter need not be read; it is full after 2^64 - 2 of them.
        epoll::add(&epoll, &eventfd, EventData::new_u64(DATA_WAKE), EventFlags::IN | EventFlags::ET)
            .map_err(|errno| ran_out("a place in epoll", errno))?;
        Ok(EpollRing {
            epoll,
            pool: Pool::new(limits),
            entries: Vec::new(),
            free: Vec::new(),
            registrations: Vec::new(),
            due: Vec::new(),
            settled: Vec::new(),
            eventfd: Arc::new(eventfd),
            events: Vec::with_capacity(EVENTS_MAX),
        })
    }

    /// Buffers and pipes on loan now.
    pub fn lent(&self) -> (usize, usize) {
        self.pool.lent()
    }

    /// Makes sure that the kernel tells what `work` waits for, and gives the descriptor's number.
    fn register(&mut self, work: &Work) -> Result<usize, Errno> {
        let socket = work.socket();
        let number = usize::try_from(socket.as_raw_fd()).map_err(|_| Errno::BADF)?;
        if self.registrations.len() <= number {
            self.registrations.resize_with(number + 1, Registration::vacant);
        }
        let registration = &mut self.registrations[number];
        let known = std::ptr::eq(registration.socket.as_ptr(), Rc::as_ptr(socket));
        if !known {
            // Nobody waits for the tenant before: whoever waits keeps it open.
            debug_assert!(registration.waiting.is_empty(), "an operation outlived its descriptor");
            registration.generation = registration.generation.wrapping_add(1);
            registration.socket = Weak::new();
            (registration.interest, registration.ready) = (PollFlags::empty(), PollFlags::empty());
        }
        let interest = registration.interest | told(work);
        if known && interest == registration.interest {
            return Ok(number);
        }
        let data = EventData::new_u64(u64::from(registration.generation) << 32 | number as u64);
        let flags = EventFlags::from_bits_truncate(u32::from(interest.bits())) | EventFlags::ET;
        if known {
            // It tells at once what is ready already (ep_modify()).
            epoll::modify(&self.epoll, socket, data, flags)?;
        } else {
            match epoll::add(&self.epoll, socket, data, flags) {
                // The same descriptor was given away and adopted again.
                Err(Errno::EXIST) => epoll::modify(&self.epoll, socket, data, flags)?,
                result => result?,
            }
            registration.socket = Rc::downgrade(socket);
        }
        registration.interest = interest;
        Ok(number)
    }

    /// Keeps work until its descriptor is ready.
    fn wait_for(&mut self, token: Token, work: Work, was_tried: bool) -> Submitted<EpollRing> {
        let number = match self.register(&work) {
            Ok(number) => number,
            // More watches than `fs.epoll.max_user_watches`.
            Err(Errno::NOSPC) => return Submitted::Done(work.into_failed(SocketError::Exhausted)),
            Err(errno) => return Submitted::Done(work.into_failed(SocketError::of(errno))),
        };
        let registration = &mut self.registrations[number];
        if was_tried {
            registration.ready -= work.interest();
        }
        let is_due = registration.ready.intersects(heard(&work));
        let index = self.claim();
        let key = self.key_of(index);
        self.fill(index, token, work);
        if is_due {
            self.due.push(key);
        }
        Submitted::Pending(key)
    }

    /// Tries what may be ready without an edge to come.
    fn try_due(&mut self, completions: &mut Vec<Completion<EpollRing>>) {
        let mut due = std::mem::take(&mut self.due);
        for key in due.drain(..) {
            let can_copy = self.pool.can_lend(Way::Copy);
            let Some((index, entry)) = self.find(key) else { continue };
            let EntryState::Waiting { work, .. } = &entry.state else { continue };
            let (number, heard) = (number_of(work), heard(work));
            let ready = match work {
                // A read in vain costs no more than to ask first.
                Work::Recv { way: Way::Copy, .. } if can_copy => heard,
                Work::Stock { .. } | Work::Hear { .. } => heard,
                work => poll_now(work),
            };
            if ready.intersects(heard) {
                if let Some(registration) = self.registrations.get_mut(number) {
                    registration.waiting.retain(|waiting| *waiting != index);
                }
                completions.extend(self.step(index, ready));
            } else if let Some(registration) = self.registrations.get_mut(number) {
                registration.ready -= heard;
            }
        }
        self.due = due;
    }

    /// Waits once, does the work of what became ready, and tells whether the waker was used.
    fn wait(
        &mut self,
        limit: Option<Duration>,
        completions: &mut Vec<Completion<EpollRing>>,
    ) -> Result<bool, RingError> {
        let mut events = std::mem::take(&mut self.events);
        events.clear();
        // A wait in whole milliseconds is rounded up by rustix, so it never ends before the deadline.
        let limit = limit.and_then(|limit| Timespec::try_from(limit.min(WAIT_MAX)).ok());
        let waited = epoll::wait(&self.epoll, spare_capacity(&mut events), limit.as_ref());
        let mut woken = false;
        for Event { flags, data, .. } in events.iter().copied() {
            match data.u64() {
                DATA_WAKE => woken = true,
                data => self.on_edge(data, flags, completions),
            }
        }
        self.events = events;
        match waited {
            Ok(_) | Err(Errno::INTR) => Ok(woken),
            Err(source) => Err(RingError { kind: RingKind::Epoll, doing: "wait", source }),
        }
    }

    fn on_edge(&mut self, data: u64, flags: EventFlags, completions: &mut Vec<Completion<EpollRing>>) {
        let (generation, number) = super::halves_of(data);
        let Some(registration) = self.registrations.get_mut(number as usize) else { return };
        if registration.generation != generation {
            return;
        }
        let ready = PollFlags::from_bits_truncate(u16::try_from(flags.bits()).unwrap_or(u16::MAX));
        registration.ready = ready;
        let mut waiting = std::mem::take(&mut registration.waiting);
        for index in waiting.drain(..) {
            completions.extend(self.step(index, ready));
        }
        // Those that wait on are in a new list; the room of the longer one is kept.
        if let Some(registration) = self.registrations.get_mut(number as usize)
            && registration.waiting.is_empty()
        {
            registration.waiting = waiting;
        }
    }

    /// Does the work of one entry, which is in no `waiting` list, if `ready` is what it waits for.
    fn step(&mut self, index: u32, ready: PollFlags) -> Option<Completion<EpollRing>> {
        let entry = self.entries.get_mut(index as usize)?;
        let EntryState::Waiting { token, work } = std::mem::replace(&mut entry.state, EntryState::Free)
        else {
            return None;
        };
        if !ready.intersects(heard(&work)) {
            self.fill(index, token, work);
            return None;
        }
        match work.ready(ready, &self.pool) {
            Next::Done(outcome) => {
                self.release(index);
                Some(Completion { token, outcome })
            }
            Next::Wait(work) => {
                if let Some(registration) = self.registrations.get_mut(number_of(&work)) {
                    registration.ready -= work.interest();
                }
                self.fill(index, token, work);
                None
            }
            Next::Never => {
                self.leave_dormant(index, token);
                None
            }
        }
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

    /// The entry of `key`, if it is still the one that it was made for.
    fn find(&mut self, key: OpKey) -> Option<(u32, &mut Entry)> {
        let (generation, index) = key.parts();
        let entry = self.entries.get_mut(index as usize)?;
        (entry.generation == generation).then_some((index, entry))
    }

    /// Puts work into an entry and the entry into the list of its descriptor, which is registered.
    fn fill(&mut self, index: u32, token: Token, work: Work) {
        if let Some(registration) = self.registrations.get_mut(number_of(&work)) {
            registration.waiting.push(index);
        }
        if let Some(entry) = self.entries.get_mut(index as usize) {
            entry.state = EntryState::Waiting { token, work };
        }
    }

    fn leave_dormant(&mut self, index: u32, token: Token) {
        if let Some(entry) = self.entries.get_mut(index as usize) {
            entry.state = EntryState::Dormant { token };
        }
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

impl fmt::Debug for EpollRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EpollRing")
            .field("in_flight", &(self.entries.len() - self.free.len()))
            .finish_non_exhaustive()
    }
}

impl Ring for EpollRing {
    type Socket = Rc<OwnedFd>;
    type Loan = Loan;

    fn submit(&mut self, token: Token, op: Op<EpollRing>) -> Submitted<EpollRing> {
        let is_tried =
            matches!(op, Op::Accept { .. } | Op::Recv { eager: true, .. } | Op::Send { .. } | Op::Ask { .. });
        match Work::begin(op, &self.pool) {
            Next::Done(outcome) => Submitted::Done(outcome),
            Next::Wait(work) => self.wait_for(token, work, is_tried),
            Next::Never => {
                let index = self.claim();
                self.leave_dormant(index, token);
                Submitted::Pending(self.key_of(index))
            }
        }
    }

    fn cancel(&mut self, key: OpKey) {
        let Some((index, entry)) = self.find(key) else { return };
        let (token, outcome) = match std::mem::replace(&mut entry.state, EntryState::Free) {
            EntryState::Free => return,
            EntryState::Dormant { token } => (token, Outcome::Cancelled(None)),
            EntryState::Waiting { token, work } => {
                if let Some(registration) = self.registrations.get_mut(number_of(&work)) {
                    registration.waiting.retain(|waiting| *waiting != index);
                }
                (token, work.into_cancelled())
            }
        };
        self.release(index);
        self.settled.push((token, outcome));
    }

    fn turn(
        &mut self,
        until: Option<Instant>,
        completions: &mut Vec<Completion<EpollRing>>,
    ) -> Result<(), RingError> {
        let before = completions.len();
        completions.extend(self.settled.drain(..).map(|(token, outcome)| Completion { token, outcome }));
        self.try_due(completions);
        loop {
            let limit = if completions.len() > before {
                Some(Duration::ZERO)
            } else {
                until.map(|at| at.saturating_duration_since(self.now()))
            };
            let woken = self.wait(limit, completions)?;
            let over = until.is_some_and(|at| at <= self.now());
            if woken || over || completions.len() > before {
                return Ok(());
            }
        }
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

fn number_of(work: &Work) -> usize {
    usize::try_from(work.socket().as_raw_fd()).unwrap_or(usize::MAX)
}

/// What the kernel is asked to tell for `work`. A watch hears of a FIN as it does from io_uring, and sleeps from then on.
fn told(work: &Work) -> PollFlags {
    match work {
        Work::Watch { .. } => PollFlags::RDHUP,
        work => work.interest(),
    }
}

/// What wakes `work`; the kernel tells ERR and HUP unasked.
fn heard(work: &Work) -> PollFlags {
    told(work) | PollFlags::ERR | PollFlags::HUP
}

/// What `work` waits for and has, by poll(2); ERR if it cannot be asked.
fn poll_now(work: &Work) -> PollFlags {
    let mut polled = [PollFd::new(work.socket().as_ref(), told(work))];
    match rustix::event::poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
        Ok(_) => polled[0].revents(),
        Err(_) => PollFlags::ERR,
    }
}
