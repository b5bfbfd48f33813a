//! One direction of a connection: read, write what was read, read again. Pure.
//!
//! | read side | write side | means |
//! | --- | --- | --- |
//! | Open | Open | bytes flow, or nothing comes at the moment |
//! | Eof | FinSent | this direction has ended cleanly; the other one runs on |
//! | Broken | Open | the source was reset; what came before it has been passed on |
//! | any | Broken | the destination was reset; nothing can be passed on any more |
//!
//! A direction holds one loan at most, from the end of a read to the end of its write, and does not read meanwhile:
//! that is the whole of backpressure. While it waits for bytes it holds nothing.

use crate::limits::Limits;
use crate::ring::Way;

/// The source's part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReadSide {
    Open,
    Eof,
    Broken,
}

/// The destination's part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WriteSide {
    Open,
    FinSent,
    Broken,
}

/// What it is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Activity {
    /// Nothing is in flight.
    Idle,
    /// A read is in flight.
    Reading,
    /// There is something to read, and it waits for a loan.
    Starved,
    /// A write is in flight.
    Writing,
    /// A write is in flight, and the destination does not take it at the moment.
    Blocked,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Half {
    pub(super) read: ReadSide,
    pub(super) write: WriteSide,
    pub(super) activity: Activity,
    way: Way,
    /// Full reads in a row while it copies; small moves in a row while it splices.
    streak: u8,
    /// The last read found as much as it could take, so there is probably more.
    eager: bool,
}

impl Half {
    pub(super) const fn new() -> Half {
        Half {
            read: ReadSide::Open,
            write: WriteSide::Open,
            activity: Activity::Idle,
            way: Way::Copy,
            streak: 0,
            eager: false,
        }
    }

    pub(super) fn in_flight(&self) -> bool {
        matches!(self.activity, Activity::Reading | Activity::Writing | Activity::Blocked)
    }

    /// Nothing more will come out of this direction, and nothing is on its way.
    pub(super) fn drained(&self) -> bool {
        self.read != ReadSide::Open && self.activity == Activity::Idle
    }

    /// Begins a read, and tells how.
    pub(super) fn begin_read(&mut self) -> (Way, bool) {
        self.activity = Activity::Reading;
        (self.way, self.eager)
    }

    /// A pipe could not be had: this direction copies, and may be promoted again later.
    pub(super) fn demote(&mut self) {
        self.way = Way::Copy;
        self.streak = 0;
        self.eager = true;
    }

    /// Learns from a read of `bytes` how the next one should be done. A direction that fills its buffer again and again
    /// is bulk and is spliced; one whose moves have become small is copied, which is cheaper for messages.
    pub(super) fn account(&mut self, bytes: usize, full: bool, limits: &Limits) {
        self.eager = full;
        let (counts, bound, next) = match self.way {
            Way::Copy => (full, limits.promote_after, Way::Splice),
            Way::Splice => (bytes < limits.lease_bytes / 4, limits.demote_after, Way::Copy),
        };
        self.streak = if counts { self.streak.saturating_add(1) } else { 0 };
        if self.streak >= bound {
            self.way = next;
            self.streak = 0;
        }
    }
}
