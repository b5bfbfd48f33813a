//! Why a relayed connection ended, and whose doing it was.

use std::fmt;

use crate::relay::Side;

/// Why a relayed connection ended. The first question of every incident, whose fault it was, is in the name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndReason {
    /// A FIN in each direction, after every byte.
    Completed,
    /// One side broke the connection off, and the other was reset in turn.
    ResetBy(Side),
    /// Nothing listens inside, or it listens no more.
    Refused,
    /// The server inside did not answer in time.
    TimedOut,
    /// Every ephemeral port inside is in use.
    PortsExhausted,
    /// Descriptors ran out on our side or the opener's.
    DescriptorsExhausted,
    /// The way into the container is gone.
    UpstreamLost,
    /// The driver asked for it.
    Removed,
}

impl fmt::Display for EndReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            EndReason::Completed => "completed",
            EndReason::ResetBy(Side::Downstream) => "reset by the client",
            EndReason::ResetBy(Side::Upstream) => "reset by the server",
            EndReason::Refused => "nothing listens inside",
            EndReason::TimedOut => "the server did not answer in time",
            EndReason::PortsExhausted => "every ephemeral port inside is in use",
            EndReason::DescriptorsExhausted => "descriptors ran out",
            EndReason::UpstreamLost => "the way into the container is gone",
            EndReason::Removed => "removed",
        })
    }
}
