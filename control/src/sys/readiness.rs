//! Descriptors that a task can wait for.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Has the runtime watch a descriptor.
///
/// # Errors
/// Those of `epoll_ctl(2)`; none is known for sockets and pidfds but running out of memory or watches.
#[expect(
    deprecated,
    reason = "what takes its place is unsafe, for types whose descriptor may change or close under it; an `OwnedFd` does neither"
)]
pub(crate) fn watched(descriptor: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(descriptor, interest)
}
