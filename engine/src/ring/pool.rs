//! What a shard has to lend: buffers and pipes, bounded in number, made when first needed.
//!
//! A [`Loan`] owns its buffer or pipe and puts it back when it is dropped, so nothing on loan can be forgotten. Free
//! ones are taken last in, first out, because the last one is still warm in the cache. A pipe goes back only when it
//! is empty: one that still holds bytes of a broken connection is closed instead, or the next borrower would send them.

use std::cell::RefCell;
use std::rc::Rc;

use rustix::fd::OwnedFd;
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};

use super::{Borrowed, Way};
use crate::limits::Limits;

/// The buffers and pipes of one shard.
#[derive(Clone, Debug)]
pub struct Pool(Rc<RefCell<Shelves>>);

#[derive(Debug)]
struct Shelves {
    lease_bytes: usize,
    pipe_bytes: usize,
    leases: Shelf<Box<Held>>,
    pipes: Shelf<Box<Held>>,
}

/// Things of one kind: those free, and how many are lent.
#[derive(Debug)]
struct Shelf<T> {
    free: Vec<T>,
    lent: usize,
    lent_max: usize,
    kept_max: usize,
}

impl<T> Shelf<T> {
    fn new(lent_max: usize, kept_max: usize) -> Shelf<T> {
        Shelf { free: Vec::new(), lent: 0, lent_max, kept_max }
    }

    fn can_lend(&self) -> bool {
        self.lent < self.lent_max
    }

    /// Takes a free one, or makes one while fewer than the bound are lent.
    fn take(&mut self, make: impl FnOnce() -> Option<T>) -> Option<T> {
        if !self.can_lend() {
            return None;
        }
        let thing = self.free.pop().or_else(make)?;
        self.lent += 1;
        Some(thing)
    }

    fn give_back(&mut self, thing: Option<T>) {
        self.lent -= 1;
        if let Some(thing) = thing
            && self.free.len() < self.kept_max
        {
            self.free.push(thing);
        }
    }
}

#[derive(Debug)]
struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
}

impl Pipe {
    fn make(bytes: usize) -> Option<Pipe> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).ok()?;
        // A user over `fs.pipe-user-pages-soft` is refused the size and keeps what the kernel gave: 64 KiB, or one
        // page, which would move less than a copy. Such a pipe is not worth having.
        let capacity = fcntl_setpipe_size(&write, bytes)
            .or_else(|_| rustix::pipe::fcntl_getpipe_size(&write))
            .unwrap_or(0);
        (capacity >= 64 * 1024).then_some(Pipe { read, write })
    }
}

impl Pool {
    /// An empty pool with the bounds of `limits`.
    pub fn new(limits: &Limits) -> Pool {
        Pool(Rc::new(RefCell::new(Shelves {
            lease_bytes: limits.lease_bytes,
            pipe_bytes: limits.pipe_bytes,
            leases: Shelf::new(limits.leases_max, limits.leases_kept),
            pipes: Shelf::new(limits.pipes_max, limits.pipes_kept),
        })))
    }

    /// Whether [`Pool::lend`] has one of this kind below its bound.
    pub fn can_lend(&self, way: Way) -> bool {
        let shelves = self.0.borrow();
        match way {
            Way::Copy => shelves.leases.can_lend(),
            Way::Splice => shelves.pipes.can_lend(),
        }
    }

    /// Lends an empty buffer or pipe; `None` when the bound is reached, or no pipe can be made.
    pub fn lend(&self, way: Way) -> Option<Loan> {
        let mut shelves = self.0.borrow_mut();
        let (lease_bytes, pipe_bytes) = (shelves.lease_bytes, shelves.pipe_bytes);
        let mut held = match way {
            Way::Copy => shelves
                .leases
                .take(|| Some(Held::new(Thing::Buffer(vec![0; lease_bytes].into_boxed_slice())))),
            Way::Splice => shelves.pipes.take(|| Pipe::make(pipe_bytes).map(Thing::Pipe).map(Held::new)),
        }?;
        held.home = Some(self.clone());
        Some(Loan(Some(held)))
    }

    /// Buffers and pipes that are lent now.
    pub fn lent(&self) -> (usize, usize) {
        let shelves = self.0.borrow();
        (shelves.leases.lent, shelves.pipes.lent)
    }
}

#[derive(Debug)]
enum Thing {
    Buffer(Box<[u8]>),
    Pipe(Pipe),
}

/// A buffer or pipe and how much it holds. On the shelf it is empty and has no home, or the pool would own itself.
#[derive(Debug)]
struct Held {
    thing: Thing,
    /// The bytes from `start` to `end` of a buffer are held; of a pipe only the difference counts.
    start: usize,
    end: usize,
    home: Option<Pool>,
}

impl Held {
    fn new(thing: Thing) -> Box<Held> {
        Box::new(Held { thing, start: 0, end: 0, home: None })
    }
}

/// A buffer or a pipe on loan, and how much it holds. One pointer wide, since each connection has room for two; it is
/// `None` only inside `drop`.
#[derive(Debug)]
pub struct Loan(Option<Box<Held>>);

/// What a loan is, for whoever moves bytes.
pub(super) enum Contents<'a> {
    /// The whole buffer.
    Buffer(&'a mut [u8]),
    /// The two ends of the pipe.
    Pipe { read: &'a OwnedFd, write: &'a OwnedFd },
}

impl Loan {
    pub(super) fn contents(&mut self) -> Contents<'_> {
        match self.0.as_deref_mut().map(|held| &mut held.thing) {
            Some(Thing::Buffer(bytes)) => Contents::Buffer(bytes),
            Some(Thing::Pipe(pipe)) => Contents::Pipe { read: &pipe.read, write: &pipe.write },
            None => Contents::Buffer(&mut []),
        }
    }

    /// The bytes that a buffer holds; nothing for a pipe.
    pub(super) fn held(&self) -> &[u8] {
        match self.0.as_deref() {
            Some(Held { thing: Thing::Buffer(bytes), start, end, .. }) => &bytes[*start..*end],
            _ => &[],
        }
    }

    /// An empty loan was filled with `bytes`.
    pub(super) fn filled(&mut self, bytes: usize) {
        if let Some(held) = &mut self.0 {
            debug_assert!(held.start == held.end, "a loan is filled only when it is empty");
            (held.start, held.end) = (0, bytes);
        }
    }

    /// `bytes` of what it holds are sent.
    pub(super) fn sent(&mut self, bytes: usize) {
        if let Some(held) = &mut self.0 {
            debug_assert!(bytes <= held.end - held.start, "more was sent than was held");
            held.start += bytes;
        }
    }
}

impl Borrowed for Loan {
    fn bytes(&self) -> usize {
        self.0.as_ref().map_or(0, |held| held.end - held.start)
    }

    fn way(&self) -> Way {
        match self.0.as_deref() {
            Some(Held { thing: Thing::Pipe(_), .. }) => Way::Splice,
            _ => Way::Copy,
        }
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        let empty = self.bytes() == 0;
        let Some(mut held) = self.0.take() else { return };
        let Some(home) = held.home.take() else { return };
        let mut shelves = home.0.borrow_mut();
        match held.thing {
            Thing::Buffer(_) => {
                (held.start, held.end) = (0, 0);
                shelves.leases.give_back(Some(held));
            }
            Thing::Pipe(_) => shelves.pipes.give_back(empty.then_some(held)),
        }
    }
}
