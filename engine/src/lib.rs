//! landfall's relay engine. It listens on the host's loopback addresses, connects inside another network namespace, and lets
//! the kernel move the bytes.
//!
//! # The path of a byte
//!
//! A client connects to 127.0.0.1 or `::1`. [`shard`] accepts, takes a socket from the stock that an [`opener`] created
//! inside the namespace, and connects it to the server's loopback address there. If no opener of landfall may enter the
//! namespace, an untrusted agent inside provides the sockets, or the driver connects for each client. From then on the
//! [`reactor`] reports when a socket is readable, and the shard reads and writes at once: through its one warm buffer while
//! messages are small, through a pipe (splice(2)) when they are bulk. The pure state machine of [`relay`] handles all other
//! cases (a blocked write, a FIN, a reset). The reactor runs on io_uring, or on epoll where io_uring is forbidden.
//!
//! # Map
//!
//! | Module | Content |
//! | --- | --- |
//! | [`command`] | commands in, events out: the contract with the driver of the engine |
//! | [`engine`] | the threads: a conductor over shards and the watch |
//! | [`process`], [`channel`] | the same contract between processes, with descriptors attached to the messages |
//! | [`shard`] | the loop of one thread, and its connections, listeners, upstreams |
//! | [`relay`], [`error`] | one connection, pure; the reasons why it ended |
//! | [`reactor`] | the readiness table, its pollers, and calls on sockets that never wait |
//! | [`sys`] | system calls without a safe wrapper; the meaning of errno |
//! | [`opener`] | the process that enters a namespace and creates sockets there; only it has privileges |
//! | [`watch`] | the listeners inside: `sock_diag`, or `/proc/net/tcp` and its fuzzed parser |
//! | [`native`] | sockets of the host for servers in a sandbox, without a relay |
//! | [`limits`] | every bound |
//! | [`table`] | slots with generations |
//!
//! # What never happens
//!
//! - No call on a socket waits, and no socket is closed while its registration could still report under a live key.
//! - A direction holds at most one buffer or pipe, and only while its destination is blocked.
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
