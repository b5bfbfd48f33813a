//! One direction of a connection: moves bytes from the source to the destination. Pure.
//!
//! | read side | write side | meaning |
//! | --- | --- | --- |
//! | Open | Open | bytes flow, or the source is empty at present |
//! | Eof | FinSent | this direction has ended cleanly; the other one runs on |
//! | Broken | Open | the source was reset; the bytes that preceded it have been passed on |
//! | any | Broken | the destination was reset; no byte can be passed on |
//!
//! A direction that reads holds no memory: its bytes pass through the shard's buffer within one call. Only bytes that the
//! destination did not accept are held, in one pooled buffer or pipe, and the direction does not read until they are
//! written. This is the backpressure of the relay.

use crate::limits::Limits;
use crate::reactor::TransferMode;

/// The state of the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReadSide {
    Open,
    Eof,
    Broken,
}

/// The state of the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WriteSide {
    Open,
    FinSent,
    Broken,
}

/// The current activity of a direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Activity {
    /// It has ended, or has not started.
    Idle,
    /// Bytes are moved whenever the source has some.
    Reading,
    /// The source has bytes, but no buffer is free.
    Starved,
    /// The shard holds bytes that the destination did not accept.
    Blocked,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Half {
    pub(super) read: ReadSide,
    pub(super) write: WriteSide,
    pub(super) activity: Activity,
    pub(super) mode: TransferMode,
    /// Consecutive full reads while it copies; consecutive small moves while it splices.
    streak: u8,
}

impl Half {
    pub(super) const fn new() -> Half {
        Half {
            read: ReadSide::Open,
            write: WriteSide::Open,
            activity: Activity::Idle,
            mode: TransferMode::Copy,
            streak: 0,
        }
    }

    /// Whether this direction has passed on everything that its source can send.
    pub(super) fn drained(&self) -> bool {
        self.read != ReadSide::Open && self.activity == Activity::Idle
    }

    /// Copies from now on, because no pipe is free or the bytes cannot be spliced. It may be promoted again later.
    pub(super) fn demote(&mut self) {
        self.mode = TransferMode::Copy;
        self.streak = 0;
    }

    /// Chooses the mode of the next move after one of `bytes`. A direction that fills its buffer several times in a row
    /// carries bulk data and is spliced; one whose moves have become small is copied, which is cheaper for messages.
    pub(super) fn account(&mut self, bytes: usize, full: bool, limits: &Limits) {
        let (counts, bound, next) = match self.mode {
            TransferMode::Copy => (full, limits.promote_after, TransferMode::Splice),
            TransferMode::Splice => {
                (bytes < limits.buffer_bytes / 4, limits.demote_after, TransferMode::Copy)
            }
        };
        self.streak = if counts { self.streak.saturating_add(1) } else { 0 };
        if self.streak >= bound {
            self.mode = next;
            self.streak = 0;
        }
    }
}
