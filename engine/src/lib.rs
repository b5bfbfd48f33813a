//! landfall's relay engine: host listeners on loopback, connects inside another network namespace, bytes moved by
//! the kernel.
//!
//! # The path of a byte
//!
//! A client connects to 127.0.0.1 or `::1`. [`shard`] accepts, takes a socket from the stock that an [`opener`] made inside
//! the namespace, and connects it to the server's loopback address there. Where no opener of ours may enter, the sockets come
//! from an agent inside, which is not trusted, or the driver connects for each client. From then on the [`reactor`] reports
//! when a socket is readable, and the shard reads and writes at once: through its one warm buffer while messages are small,
//! through a pipe (splice(2)) when they are bulk. Whatever is not that (a blocked write, a FIN, a reset) is decided by the
//! pure machine of [`relay`]. The reactor runs on io_uring, or on epoll where that is forbidden.
//!
//! # Map
//!
//! | Module | Content |
//! | --- | --- |
//! | [`command`] | commands in, events out: the whole contract with the driver of the engine |
//! | [`engine`] | the threads: a conductor over shards and the watch |
//! | [`process`], [`channel`] | the same contract between processes, with descriptors next to the messages |
//! | [`shard`] | the loop of one thread, and its connections, listeners, upstreams |
//! | [`relay`], [`error`] | one connection, pure; why it ended, and which side ended it |
//! | [`reactor`] | the readiness table, its pollers, and calls on sockets that never wait |
//! | [`sys`] | system calls without a safe wrapper; the meaning of errno |
//! | [`opener`] | the process that enters a namespace and makes sockets there; it alone has privilege |
//! | [`watch`] | the listeners inside: `sock_diag`, or `/proc/net/tcp` and its fuzzed parser |
//! | [`native`] | sockets of the host for servers in a sandbox, without a relay |
//! | [`limits`] | every bound |
//! | [`table`] | slots with generations |
//!
//! # What never happens
//!
//! - No call on a socket waits, and no socket is closed while its registration could still report under a live key.
//! - A direction holds one buffer or pipe at most, and none unless its destination is blocked.
//! - A FIN is passed on after every byte that preceded it, a reset as a reset.
//! - No socket listens on anything but loopback, and none connects to a namespace other than the one it was checked for.
//!
//! # Absent on purpose
//!
//! No async runtime, no Docker, no names of containers, no policy of ports, no log: events report what happens.

pub mod channel;
pub mod command;
pub mod engine;
pub mod error;
pub mod limits;
mod listener;
pub mod native;
pub mod opener;
pub mod process;
pub mod reactor;
pub mod relay;
pub mod shard;
pub mod sys;
pub mod table;
pub mod watch;

pub use engine::{Engine, EngineOptions, Handle, StartError};
pub use reactor::RingChoice;
