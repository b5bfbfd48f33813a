//! The memory of a shard: one warm buffer, and a bounded number of buffers and pipes to lend, which are created when first
//! needed.
//!
//! A [`PooledBuffer`] returns to its pool when it is dropped. Free ones are reused last in, first out, because the last one
//! is still in the cache. A pipe returns only if it is empty: one that still holds bytes of a broken connection is closed,
//! since the next borrower would send them. A buffer is never zeroed: only bytes that a read wrote are used.

use std::cell::RefCell;
use std::rc::Rc;

use rustix::fd::OwnedFd;
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};

use super::{Held, TransferMode};
use crate::limits::Limits;

/// The buffers and pipes of one shard.
#[derive(Clone, Debug)]
pub struct Pool(Rc<RefCell<Stores>>);

#[derive(Debug)]
struct Stores {
    buffer_bytes: usize,
    pipe_bytes: usize,
    buffers: Store,
    pipes: Store,
}

/// The memory of one kind: the free items, and the number of lent ones.
#[derive(Debug)]
struct Store {
    free: Vec<PooledBuffer>,
    lent: usize,
    lent_max: usize,
    kept_max: usize,
}

impl Store {
    fn new(lent_max: usize, kept_max: usize) -> Store {
        Store { free: Vec::new(), lent: 0, lent_max, kept_max }
    }

    fn can_lend(&self) -> bool {
        self.lent < self.lent_max
    }

    /// Takes a free item, or creates one while fewer than the bound are lent.
    fn take(&mut self, make: impl FnOnce() -> Option<Kind>) -> Option<PooledBuffer> {
        if !self.can_lend() {
            return None;
        }
        let buffer = match self.free.pop() {
            Some(buffer) => buffer,
            None => PooledBuffer::new(make()?),
        };
        self.lent += 1;
        Some(buffer)
    }

    fn give_back(&mut self, buffer: Option<PooledBuffer>) {
        self.lent -= 1;
        if let Some(buffer) = buffer
            && self.free.len() < self.kept_max
        {
            self.free.push(buffer);
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
        // Above `fs.pipe-user-pages-soft` the kernel refuses the size, and the pipe keeps 64 KiB or one page, which would
        // move less than a copy. Such a pipe is not used.
        let capacity = fcntl_setpipe_size(&write, bytes)
            .or_else(|_| rustix::pipe::fcntl_getpipe_size(&write))
            .unwrap_or(0);
        (capacity >= 64 * 1024).then_some(Pipe { read, write })
    }
}

impl Pool {
    /// Creates an empty pool with the bounds of `limits`.
    pub fn new(limits: &Limits) -> Pool {
        Pool(Rc::new(RefCell::new(Stores {
            buffer_bytes: limits.buffer_bytes,
            pipe_bytes: limits.pipe_bytes,
            buffers: Store::new(limits.buffers_max, limits.buffers_kept),
            pipes: Store::new(limits.pipes_max, limits.pipes_kept),
        })))
    }

    /// Whether fewer items of this kind are lent than the bound.
    pub fn can_lend(&self, mode: TransferMode) -> bool {
        let stores = self.0.borrow();
        match mode {
            TransferMode::Copy => stores.buffers.can_lend(),
            TransferMode::Splice => stores.pipes.can_lend(),
        }
    }

    /// Lends an empty buffer or pipe; `None` at the bound, or if no pipe can be created.
    pub fn lend(&self, mode: TransferMode) -> Option<PooledBuffer> {
        let mut stores = self.0.borrow_mut();
        let (buffer_bytes, pipe_bytes) = (stores.buffer_bytes, stores.pipe_bytes);
        let mut buffer = match mode {
            TransferMode::Copy => {
                stores.buffers.take(|| Some(Kind::Buffer(Vec::with_capacity(buffer_bytes))))
            }
            TransferMode::Splice => stores.pipes.take(|| Pipe::make(pipe_bytes).map(Kind::Pipe)),
        }?;
        if let Some(memory) = &mut buffer.0 {
            memory.home = Some(self.clone());
        }
        Some(buffer)
    }

    /// Creates a buffer that does not count against the bound and does not return to the pool.
    pub(super) fn warm_buffer(&self) -> PooledBuffer {
        let bytes = self.0.borrow().buffer_bytes;
        PooledBuffer::new(Kind::Buffer(Vec::with_capacity(bytes)))
    }

    /// Returns the numbers of lent buffers and pipes.
    pub fn lent(&self) -> (usize, usize) {
        let stores = self.0.borrow();
        (stores.buffers.lent, stores.pipes.lent)
    }
}

#[derive(Debug)]
enum Kind {
    /// The length of the vector is the end of the held bytes.
    Buffer(Vec<u8>),
    Pipe(Pipe),
}

/// A buffer or pipe and its contents. A free one has no home, since the pool would otherwise own itself.
#[derive(Debug)]
struct Memory {
    kind: Kind,
    /// For a buffer, the start of the held bytes; for a pipe, their number.
    position: usize,
    home: Option<Pool>,
}

/// A borrowed buffer or pipe. One pointer wide, since each connection has room for two. It is `None` only inside `drop`.
#[derive(Debug)]
pub struct PooledBuffer(Option<Box<Memory>>);

/// The destination of a read.
pub(super) enum Content<'a> {
    /// The empty buffer.
    Buffer(&'a mut Vec<u8>),
    /// The end of the pipe to write to.
    Pipe(&'a OwnedFd),
}

impl PooledBuffer {
    /// Creates an item without a home.
    fn new(kind: Kind) -> PooledBuffer {
        PooledBuffer(Some(Box::new(Memory { kind, position: 0, home: None })))
    }

    /// Returns the destination for a read; `None` only inside `drop`. A buffer is then empty.
    pub(super) fn space(&mut self) -> Option<Content<'_>> {
        let memory = self.0.as_deref_mut()?;
        Some(match &mut memory.kind {
            Kind::Buffer(bytes) => {
                memory.position = 0;
                bytes.clear();
                Content::Buffer(bytes)
            }
            Kind::Pipe(pipe) => Content::Pipe(&pipe.write),
        })
    }

    /// Records that `bytes` were moved into the pipe.
    pub(super) fn filled_pipe(&mut self, bytes: usize) {
        if let Some(Memory { kind: Kind::Pipe(_), position, .. }) = self.0.as_deref_mut() {
            *position += bytes;
        }
    }

    /// Returns the bytes in a buffer; an empty slice for a pipe.
    pub(super) fn slice(&self) -> &[u8] {
        match self.0.as_deref() {
            Some(Memory { kind: Kind::Buffer(bytes), position, .. }) => &bytes[*position..],
            _ => &[],
        }
    }

    /// Returns the read end of a pipe; `None` for a buffer.
    pub(super) fn pipe(&self) -> Option<&OwnedFd> {
        match &self.0.as_deref()?.kind {
            Kind::Pipe(pipe) => Some(&pipe.read),
            Kind::Buffer(_) => None,
        }
    }

    /// Records that `bytes` of the held bytes were written.
    pub(super) fn sent(&mut self, bytes: usize) {
        debug_assert!(bytes <= self.bytes(), "more was written than was held");
        match self.0.as_deref_mut() {
            Some(Memory { kind: Kind::Buffer(_), position, .. }) => *position += bytes,
            Some(Memory { kind: Kind::Pipe(_), position, .. }) => *position -= bytes,
            None => {}
        }
    }

    /// Copies `bytes` into an empty buffer.
    pub(super) fn fill_from(&mut self, bytes: &[u8]) {
        if let Some(Content::Buffer(buffer)) = self.space() {
            buffer.extend_from_slice(bytes);
        }
    }
}

impl Held for PooledBuffer {
    fn bytes(&self) -> usize {
        match self.0.as_deref() {
            Some(Memory { kind: Kind::Buffer(bytes), position, .. }) => bytes.len() - position,
            Some(Memory { kind: Kind::Pipe(_), position, .. }) => *position,
            None => 0,
        }
    }

    fn mode(&self) -> TransferMode {
        match self.0.as_deref() {
            Some(Memory { kind: Kind::Pipe(_), .. }) => TransferMode::Splice,
            _ => TransferMode::Copy,
        }
    }
}

impl Drop for PooledBuffer {
    fn drop(&mut self) {
        let empty = self.bytes() == 0;
        let Some(mut memory) = self.0.take() else { return };
        let Some(home) = memory.home.take() else { return };
        let mut stores = home.0.borrow_mut();
        match &mut memory.kind {
            Kind::Buffer(bytes) => {
                bytes.clear();
                memory.position = 0;
                stores.buffers.give_back(Some(PooledBuffer(Some(memory))));
            }
            Kind::Pipe(_) => stores.pipes.give_back(empty.then(|| PooledBuffer(Some(memory)))),
        }
    }
}
