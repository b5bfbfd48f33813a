//! The vocabulary between a relay machine and its shard. Pure.

use std::time::Instant;

use crate::error::EndReason;
use crate::ring::Way;

/// One of the two ends of a relayed connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The client that dialled us.
    Downstream = 0,
    /// The server inside the container.
    Upstream = 1,
}

impl Side {
    /// Both sides.
    pub const ALL: [Side; 2] = [Side::Downstream, Side::Upstream];

    /// The other end.
    pub fn other(self) -> Side {
        match self {
            Side::Downstream => Side::Upstream,
            Side::Upstream => Side::Downstream,
        }
    }

    /// The direction that reads from this side.
    pub fn outgoing(self) -> Direction {
        match self {
            Side::Downstream => Direction::Up,
            Side::Upstream => Direction::Down,
        }
    }

    /// The direction that writes to this side.
    pub fn incoming(self) -> Direction {
        self.other().outgoing()
    }
}

/// One direction of a relayed connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the client to the server.
    Up = 0,
    /// From the server to the client.
    Down = 1,
}

impl Direction {
    /// Both directions.
    pub const ALL: [Direction; 2] = [Direction::Up, Direction::Down];

    /// Where it reads.
    pub fn from(self) -> Side {
        match self {
            Direction::Up => Side::Downstream,
            Direction::Down => Side::Upstream,
        }
    }

    /// Where it writes.
    pub fn to(self) -> Side {
        self.from().other()
    }
}

/// An operation of one connection, of which there is at most one in flight each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// The read or the write of a direction; it never has both.
    Half(Direction),
    /// The watch for a break of a side that is not read at the moment.
    Watch(Side),
    /// The connect to the server.
    Connect,
}

impl Operation {
    /// How many may be in flight at a time: the connect is over before anything else begins, and shares the first place.
    pub const PLACES: usize = 4;

    /// Where its key is kept, below [`Operation::PLACES`].
    pub fn place(self) -> usize {
        self.index() % Operation::PLACES
    }

    /// Its number in a token.
    pub fn index(self) -> usize {
        match self {
            Operation::Half(direction) => direction as usize,
            Operation::Watch(side) => 2 + side as usize,
            Operation::Connect => 4,
        }
    }

    /// The operation of that number.
    pub fn of_index(index: usize) -> Option<Operation> {
        Some(match index {
            0 => Operation::Half(Direction::Up),
            1 => Operation::Half(Direction::Down),
            2 => Operation::Watch(Side::Downstream),
            3 => Operation::Watch(Side::Upstream),
            4 => Operation::Connect,
            _ => return None,
        })
    }
}

/// How a read ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadEnd {
    /// Bytes came; the shard holds them until [`Action::Write`].
    Bytes {
        /// How many.
        bytes: usize,
        /// As many as a lease holds, or more: a hint that there are others.
        full: bool,
    },
    /// The peer's FIN.
    Eof,
    /// There is something to read and nothing to read it into.
    NoLoan,
    /// The connection to that side is broken.
    Broken,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// Both sides are connected.
    Begin,
    /// [`Action::Read`] ended.
    Read(Direction, ReadEnd),
    /// A direction that had no loan may try again.
    LoanFree(Direction),
    /// [`Action::Write`] could not be done at once; it goes on.
    Blocked(Direction),
    /// [`Action::Write`] sent everything.
    Wrote(Direction),
    /// [`Action::Write`] found the side broken; the bytes are gone.
    WriteFailed(Direction),
    /// [`Action::Watch`] found the side broken; the watch is over.
    Broke(Side),
    /// [`Action::SendFin`] found the side broken.
    FinFailed(Side),
    /// An operation ended because of [`Action::Cancel`]; what it held is gone.
    Cancelled(Operation),
    /// The answer to [`Action::MeasureUnacknowledged`].
    Unacknowledged(Side, usize),
    /// The deadline of [`Action::SetDeadline`] has passed.
    Deadline,
    /// The engine ends the connection: it is reset on both sides.
    Abort(EndReason),
}

/// What a machine asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Read from the direction's source.
    Read {
        /// Which direction.
        direction: Direction,
        /// Into a buffer or a pipe.
        way: Way,
        /// There is probably something already.
        eager: bool,
    },
    /// Write what was read to the direction's destination.
    Write(Direction),
    /// Send the FIN to a side.
    SendFin(Side),
    /// Tell when a side breaks.
    Watch(Side),
    /// End an operation; [`Input::Cancelled`] or its own end follows.
    Cancel(Operation),
    /// Tell how many bytes a side has not acknowledged.
    MeasureUnacknowledged(Side),
    /// Give [`Input::Deadline`] at that time, instead of at any earlier one.
    SetDeadline(Instant),
    /// Close both sockets; nothing is in flight any more.
    Finish {
        /// For each side (by its number): the close is a reset.
        reset: [bool; 2],
        /// Why it is over.
        reason: EndReason,
    },
}

/// Actions in the order in which they are to be carried out.
pub type Actions = Vec<Action>;
