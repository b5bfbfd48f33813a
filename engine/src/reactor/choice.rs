//! The choice of a poller: io_uring where it works, else epoll with the reason.

use rustix::io::Errno;

use super::Uring;
use crate::command::{RingKind, RingReport};
use crate::limits::Limits;

/// The poller that an engine is to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RingChoice {
    /// io_uring where it works, else epoll.
    #[default]
    Auto,
    /// io_uring, or an error.
    IoUring,
    /// epoll.
    Epoll,
}

/// The reason why io_uring is unusable, and whether epoll may replace it.
#[derive(Debug, thiserror::Error)]
#[error("{reason}")]
pub struct Unusable {
    /// The obstacle, and where it is configured.
    pub reason: String,
    /// True when the machine forbids, lacks or denies io_uring; false when epoll would need the same resource.
    pub fall_back: bool,
}

/// The error for a resource that ran out.
pub(super) fn ran_out(of: &str, errno: Errno) -> Unusable {
    Unusable { reason: format!("could not create {of}: {errno}"), fall_back: false }
}

/// Determines which poller works on this machine and thread.
///
/// # Errors
/// [`RingChoice::IoUring`] was requested and does not work, or descriptors ran out.
pub fn choose(choice: RingChoice, limits: &Limits) -> Result<RingReport, Unusable> {
    match choice {
        RingChoice::Epoll => {
            Ok(RingReport { kind: RingKind::Epoll, reason: Some("epoll was requested".into()) })
        }
        RingChoice::IoUring => {
            Uring::self_test(limits).map(|()| RingReport { kind: RingKind::IoUring, reason: None })
        }
        RingChoice::Auto => match Uring::self_test(limits) {
            Ok(()) => Ok(RingReport { kind: RingKind::IoUring, reason: None }),
            Err(unusable) if unusable.fall_back => {
                Ok(RingReport { kind: RingKind::Epoll, reason: Some(unusable.reason) })
            }
            Err(unusable) => Err(unusable),
        },
    }
}
