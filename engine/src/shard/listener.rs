//! A forward in a shard's table: its listening sockets, its target, its counters.

use std::num::NonZeroU16;
use std::time::{Duration, Instant};

use crate::command::{Family, ForwardId, ForwardState, ForwardStats, Reach, UpstreamId};
use crate::reactor::Key;
use crate::table::SlotId;

/// One forward.
#[derive(Debug)]
pub(super) struct Listener {
    pub(super) forward: ForwardId,
    pub(super) upstream: UpstreamId,
    pub(super) upstream_slot: SlotId,
    pub(super) host_port: NonZeroU16,
    pub(super) target_port: NonZeroU16,
    pub(super) reach: Reach,
    /// The listening sockets that the kernel has not closed.
    pub(super) sockets: Vec<Accepting>,
    /// Whether it accepts. Otherwise it exists until its sockets are closed and its connections have ended.
    pub(super) open: bool,
    /// Whether [`Report::ListenerClosed`](super::Report::ListenerClosed) was reported.
    pub(super) reported_closed: bool,
    /// Whether it is in [`Shard::accept_later`](super::Shard).
    pub(super) queued: bool,
    /// The end of a pause in accepting.
    pub(super) paused_until: Option<Instant>,
    /// Consecutive failed accepts, other than by a shortage.
    pub(super) failures: u32,
    /// The next pause after too many failures.
    pub(super) pause: Duration,
    pub(super) stats: ForwardStats,
}

/// A listening socket.
#[derive(Clone, Copy, Debug)]
pub(super) struct Accepting {
    /// Its index among the listener's sockets, which its token carries. It stays the same when other sockets close first.
    pub(super) index: usize,
    pub(super) key: Key,
    /// The family of its clients' connections.
    pub(super) family: Family,
}

impl Listener {
    /// Returns the listener's entry in a state report.
    pub(super) fn state(&self) -> ForwardState {
        ForwardState {
            forward: self.forward,
            upstream: self.upstream,
            host_port: self.host_port,
            target_port: self.target_port,
            reach: self.reach,
            listening: self.open,
            stats: self.stats,
        }
    }
}
