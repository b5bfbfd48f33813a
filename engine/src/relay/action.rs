//! The inputs and actions of a relay's state machine. Pure.

use std::time::Instant;

use crate::error::EndReason;
use crate::reactor::TransferMode;

/// One of the two ends of a relayed connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The client, whose connection a listener accepted.
    Downstream = 0,
    /// The server to which the relay connected.
    Upstream = 1,
}

impl Side {
    /// Both sides.
    pub const ALL: [Side; 2] = [Side::Downstream, Side::Upstream];

    /// Returns the other end.
    pub fn other(self) -> Side {
        match self {
            Side::Downstream => Side::Upstream,
            Side::Upstream => Side::Downstream,
        }
    }

    /// Returns the direction that reads from this side.
    pub fn outgoing(self) -> Direction {
        match self {
            Side::Downstream => Direction::Up,
            Side::Upstream => Direction::Down,
        }
    }

    /// Returns the direction that writes to this side.
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

    /// Returns the side that it reads from.
    pub fn from(self) -> Side {
        match self {
            Direction::Up => Side::Downstream,
            Direction::Down => Side::Upstream,
        }
    }

    /// Returns the side that it writes to.
    pub fn to(self) -> Side {
        self.from().other()
    }
}

/// The reason why a direction stopped reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadEnd {
    /// The peer's FIN.
    Eof,
    /// The connection to the source is broken; every byte that preceded the break was read.
    Broken,
    /// The source has bytes that cannot be moved in this mode: no buffer or pipe is free, or they cannot be spliced.
    Unavailable(TransferMode),
}

/// An event of a connection. A read and a write that succeed are no events: see
/// [`Connection::moved`](super::Connection::moved).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// Both sides are connected.
    Start,
    /// A direction that reads stopped.
    Read(Direction, ReadEnd),
    /// A direction that waited for a buffer may try again.
    BufferFree(Direction),
    /// The destination did not accept everything that was read; the shard holds the rest.
    Blocked(Direction),
    /// The held bytes are written.
    Wrote(Direction),
    /// The destination is broken; the bytes that were being written are lost.
    WriteFailed(Direction),
    /// The kernel reported an error of a side (POLLERR). A hang-up without an error means a FIN in each direction, and is
    /// not reported.
    Broke(Side),
    /// [`Action::SendFin`] found the side broken.
    FinFailed(Side),
    /// The answer to [`Action::MeasureUnacknowledged`].
    Unacknowledged(Side, usize),
    /// The deadline of [`Action::SetDeadline`] has passed.
    Deadline,
    /// The engine ends the connection: it is reset on both sides.
    Abort(EndReason),
}

/// A request of a machine to its shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Move what the direction's source has, now and whenever it has more, until a [`Input::Read`], [`Input::Blocked`] or
    /// [`Input::WriteFailed`] of this direction.
    Read(Direction),
    /// Drop the held bytes of this direction.
    Discard(Direction),
    /// Send the FIN to a side.
    SendFin(Side),
    /// Return how many bytes a side has not acknowledged.
    MeasureUnacknowledged(Side),
    /// Give [`Input::Deadline`] at that time, instead of at any earlier one.
    SetDeadline(Instant),
    /// Close both sockets.
    Finish {
        /// For each side (by its number): the close is a reset.
        reset: [bool; 2],
        /// Why the connection ended.
        reason: EndReason,
    },
}

/// Actions in the order in which they are to be carried out.
pub type Actions = Vec<Action>;
