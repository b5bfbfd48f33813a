//! A port that a program inside a container announces, and the result that it receives (wire specification, A.3). Pure.

use std::num::NonZeroU16;

/// The reason of a result for a port that may not be forwarded (wire specification, A.5).
pub const EXCLUDED: &str = "policy excluded";

/// A port that listens in the container, as it was announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Announced {
    /// The port.
    pub port: NonZeroU16,
    /// Whether it listens on 127.0.0.1 alone (`127.0.0.1`) or on every address (`0.0.0.0`).
    pub loopback: bool,
}

/// The result for a port, as it is sent to the container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForwardResult {
    /// The port in the container.
    pub port: NonZeroU16,
    /// The port on the host, or the reason that it is not forwarded.
    pub result: Result<NonZeroU16, String>,
}
