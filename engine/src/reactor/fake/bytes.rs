//! Simulated bytes. The relay never inspects the bytes that it moves, so a simulated byte is only its stream and its
//! position. A byte that is lost, doubled or out of order is detected by its number.

use std::cell::Cell;
use std::collections::VecDeque;
use std::rc::Rc;

use crate::limits::Limits;
use crate::reactor::{Held, TransferMode};

/// Consecutive bytes of one stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The number of the stream.
    pub stream: u32,
    /// The position of the first byte.
    pub start: u64,
    /// The number of bytes.
    pub count: usize,
}

/// A queue of bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bytes {
    runs: VecDeque<Run>,
    count: usize,
}

impl Bytes {
    /// Returns the number of bytes.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Appends bytes.
    pub fn push(&mut self, run: Run) {
        if run.count == 0 {
            return;
        }
        self.count += run.count;
        if let Some(last) = self.runs.back_mut()
            && last.stream == run.stream
            && last.start + last.count as u64 == run.start
        {
            last.count += run.count;
        } else {
            self.runs.push_back(run);
        }
    }

    /// Moves up to `count` bytes from the front of `from` to the end.
    pub fn pull(&mut self, from: &mut Bytes, count: usize) -> usize {
        let count = count.min(from.count);
        let mut left = count;
        while left > 0 {
            let Some(first) = from.runs.front_mut() else { break };
            let taken = left.min(first.count);
            let run = Run { stream: first.stream, start: first.start, count: taken };
            first.start += taken as u64;
            first.count -= taken;
            if first.count == 0 {
                from.runs.pop_front();
            }
            from.count -= taken;
            left -= taken;
            self.push(run);
        }
        count
    }

    /// Drops all bytes, and returns their number.
    pub fn clear(&mut self) -> usize {
        self.runs.clear();
        std::mem::take(&mut self.count)
    }

    /// Returns the runs, from the front.
    pub fn runs(&self) -> impl Iterator<Item = Run> {
        self.runs.iter().copied()
    }
}

/// The numbers of lent buffers and pipes, and their bounds.
#[derive(Debug)]
pub(super) struct Pool {
    lent: [Cell<usize>; 2],
    most: [usize; 2],
    bytes: [usize; 2],
}

impl Pool {
    pub(super) fn new(limits: &Limits) -> Rc<Pool> {
        Rc::new(Pool {
            lent: [Cell::new(0), Cell::new(0)],
            most: [limits.buffers_max, limits.pipes_max],
            bytes: [limits.buffer_bytes, limits.pipe_bytes],
        })
    }

    pub(super) fn lent(&self) -> (usize, usize) {
        (self.lent[0].get(), self.lent[1].get())
    }

    pub(super) fn can_lend(&self, mode: TransferMode) -> bool {
        self.lent[mode as usize].get() < self.most[mode as usize]
    }

    /// Returns the capacity of a buffer or pipe.
    pub(super) fn capacity(&self, mode: TransferMode) -> usize {
        self.bytes[mode as usize]
    }

    pub(super) fn lend(self: &Rc<Pool>, mode: TransferMode) -> FakeBuffer {
        let lent = &self.lent[mode as usize];
        lent.set(lent.get() + 1);
        FakeBuffer { pool: Some(self.clone()), mode, bytes: Bytes::default() }
    }
}

/// A simulated buffer or pipe.
#[derive(Debug)]
pub struct FakeBuffer {
    /// Absent for the warm buffer of a shard, which is not lent.
    pool: Option<Rc<Pool>>,
    mode: TransferMode,
    pub(super) bytes: Bytes,
}

impl FakeBuffer {
    pub(super) fn warm() -> FakeBuffer {
        FakeBuffer { pool: None, mode: TransferMode::Copy, bytes: Bytes::default() }
    }
}

impl Held for FakeBuffer {
    fn bytes(&self) -> usize {
        self.bytes.count()
    }

    fn mode(&self) -> TransferMode {
        self.mode
    }
}

impl Drop for FakeBuffer {
    fn drop(&mut self) {
        if let Some(pool) = &self.pool {
            let lent = &pool.lent[self.mode as usize];
            lent.set(lent.get() - 1);
        }
    }
}
