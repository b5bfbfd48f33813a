//! Descriptors whose readiness a task can await.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Registers a descriptor with the runtime.
///
/// # Errors
/// Those of `epoll_ctl(2)`; for sockets and pidfds only running out of memory or watches is known.
#[expect(
    deprecated,
    reason = "what takes its place is unsafe, for types whose descriptor may change or close under it; an `OwnedFd` does neither"
)]
pub(crate) fn watched(descriptor: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(descriptor, interest)
}
