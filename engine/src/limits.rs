//! All bounds of the engine, and the relations between them.
//!
//! A bound makes overload a tested path. Sizes end in `_bytes`, counts in `_max`.

use std::time::Duration;

/// The bounds of one engine. [`Limits::default`] is right for a workstation; tests make them small.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Threads that relay. On two cores one is best: two give 10 % more requests per second and 20 % less bulk throughput.
    pub shards: u16,
    /// Relayed connections of one shard, including those that wait. Further clients wait in the kernel's queue.
    pub connections_max: u32,
    /// Size of one buffer. A read that fills it indicates bulk data.
    pub buffer_bytes: usize,
    /// Buffers of one shard that may hold bytes of blocked writes. Allocated when first needed.
    pub buffers_max: usize,
    /// Free buffers kept for reuse; others are returned to the allocator.
    pub buffers_kept: usize,
    /// Capacity of one pipe. An unprivileged user may hold 64 MiB of pipes in all (`pipe-user-pages-soft`).
    pub pipe_bytes: usize,
    /// Pipes of one shard.
    pub pipes_max: usize,
    /// Free pipes kept for reuse.
    pub pipes_kept: usize,
    /// Bytes that one direction may move per turn before other connections are served.
    pub turn_bytes: usize,
    /// Consecutive full reads after which a direction is spliced.
    pub promote_after: u8,
    /// Consecutive small moves after which a spliced direction is copied again.
    pub demote_after: u8,
    /// The maximum of sockets that one upstream stocks for each family. The stock starts small and doubles after it ran dry.
    pub stock_max: usize,
    /// The initial stock of an upstream.
    pub stock_min: usize,
    /// Time limit for connecting a client to the server inside.
    pub connect_timeout: Duration,
    /// Time limit for the other side to read the bytes that preceded a reset.
    pub reset_drain_timeout: Duration,
    /// Backlog of a host listener; the kernel caps it at `net.core.somaxconn`.
    pub backlog: u16,
    /// Connections that one listener accepts per turn before other sockets are served.
    pub accept_burst: u32,
    /// Time without accepting after descriptors ran out.
    pub exhausted_pause: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            shards: default_shards(),
            connections_max: 65_536,
            buffer_bytes: BUFFER_BYTES,
            buffers_max: 4_096,
            buffers_kept: 64,
            pipe_bytes: PIPE_BYTES,
            pipes_max: 64,
            pipes_kept: 16,
            turn_bytes: TURN_BYTES,
            promote_after: 2,
            demote_after: 4,
            stock_max: 128,
            stock_min: 8,
            connect_timeout: Duration::from_secs(10),
            reset_drain_timeout: Duration::from_secs(300),
            backlog: 4_096,
            accept_burst: 64,
            exhausted_pause: Duration::from_millis(100),
        }
    }
}

/// One shard up to four cores, then one for every four, since the programs at both ends need cores too.
fn default_shards() -> u16 {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    u16::try_from(cores / 4).unwrap_or(u16::MAX).clamp(1, 8)
}

const BUFFER_BYTES: usize = 64 * 1024;
const PIPE_BYTES: usize = 256 * 1024;
const TURN_BYTES: usize = 1024 * 1024;

/// `SCM_MAX_FD` of the kernel (`include/net/scm.h`): the most descriptors of one message.
pub const DESCRIPTORS_PER_MESSAGE_MAX: usize = 253;

/// The longest command or event, in bytes of JSON: below the default send buffer of a Unix socket (`net.core.wmem_default`),
/// so that a datagram of this size is never refused. A longer state is sent in several events.
pub const MESSAGE_BYTES_MAX: usize = 128 * 1024;

// One turn moves several full buffers and a full pipe, or promotion would never happen within a turn.
const _: () = assert!(TURN_BYTES >= 4 * BUFFER_BYTES && TURN_BYTES >= 2 * PIPE_BYTES);
// A pipe holds at least a buffer, or promotion would move less at a time than the copy it replaces.
const _: () = assert!(PIPE_BYTES >= BUFFER_BYTES);
