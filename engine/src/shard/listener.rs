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
    /// Whether it accepts; otherwise it waits for its sockets to be closed, and then for its connections.
    pub(super) open: bool,
    /// [`Report::ListenerClosed`](super::Report::ListenerClosed) was given.
    pub(super) reported_closed: bool,
    /// It is in [`Shard::accept_later`](super::Shard).
    pub(super) queued: bool,
    /// It does not accept until then.
    pub(super) resting_until: Option<Instant>,
    /// Accepts that failed in a row, other than by a shortage.
    pub(super) failures: u32,
    /// The next pause after too many of them.
    pub(super) pause: Duration,
    pub(super) stats: ForwardStats,
}

/// A listening socket.
#[derive(Clone, Copy, Debug)]
pub(super) struct Accepting {
    /// Its number among the listener's sockets, which its token carries. It stays when others close before it.
    pub(super) index: usize,
    pub(super) key: Key,
    /// The family by which its clients come.
    pub(super) family: Family,
}

impl Listener {
    /// Returns what is reported of it.
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
