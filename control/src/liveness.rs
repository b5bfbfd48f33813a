//! Whether a registered container still exists (wire specification, A.7.6). A container that is stopped exists; one that
//! cannot be asked about is unknown, and unknown never counts as gone.

use futures_util::future::BoxFuture;

use crate::registration::model::Registration;

/// The answer of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Liveness {
    /// It exists, running or not.
    Alive,
    /// It does not.
    Gone,
    /// Nobody could be asked.
    Unknown,
}

/// Who answers it for a registration. Bounded in time by whoever implements it.
pub trait Probe: Send + Sync {
    /// Looks now.
    fn probe<'a>(&'a self, registration: &'a Registration) -> BoxFuture<'a, Liveness>;
}
