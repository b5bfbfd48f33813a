//! The reasons why a relayed connection ended.

use std::fmt;

use crate::relay::Side;

/// The reason why a relayed connection ended. The variant names the side that caused the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndReason {
    /// A FIN in each direction, after every byte.
    Completed,
    /// One side reset the connection, so the other side was reset, too.
    ResetBy(Side),
    /// No server listens inside, or it stopped listening.
    Refused,
    /// The server inside did not answer in time.
    TimedOut,
    /// Every ephemeral port inside is in use.
    PortsExhausted,
    /// Descriptors ran out in the engine or the opener.
    DescriptorsExhausted,
    /// The upstream was lost.
    UpstreamLost,
    /// The driver removed the forward or the upstream.
    Removed,
}

impl fmt::Display for EndReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            EndReason::Completed => "completed",
            EndReason::ResetBy(Side::Downstream) => "reset by the client",
            EndReason::ResetBy(Side::Upstream) => "reset by the server",
            EndReason::Refused => "no server listens inside",
            EndReason::TimedOut => "the server did not answer in time",
            EndReason::PortsExhausted => "every ephemeral port inside is in use",
            EndReason::DescriptorsExhausted => "descriptors ran out",
            EndReason::UpstreamLost => "the upstream was lost",
            EndReason::Removed => "removed",
        })
    }
}
