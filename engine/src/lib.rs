//! landfall's relay engine: host listeners on loopback, connects inside another network namespace, bytes moved by
//! the kernel.
//!
//! # The way of a byte
//!
//! A client dials 127.0.0.1 or `::1`. [`shard`] accepts, takes a socket from the stock that an [`opener`] made inside the
//! namespace, and connects it to the server's loopback address there. Where nobody of ours may go in, the sockets come from
//! an agent inside, which is believed nothing, or the driver dials for each client. From then on the connection is a pure
//! machine of [`relay`]: two halves that read, write, and read again, through a buffer while messages are small and through
//! a pipe (splice(2)) when they are bulk. What the machine asks for is done by a [`ring`]: io_uring, or epoll where that is
//! forbidden.
//!
//! # Map
//!
//! | Module | What |
//! | --- | --- |
//! | [`command`] | commands in, events out: the whole contract with whoever drives the engine |
//! | [`engine`] | the threads: a conductor over shards and the watch |
//! | [`process`], [`channel`] | the same contract between processes, with descriptors beside the messages |
//! | [`shard`] | the loop of one thread, and what it keeps: connections, listeners, upstreams |
//! | [`relay`], [`error`] | one connection, pure; why it ended, and whose doing it was |
//! | [`ring`] | operations and their completions |
//! | [`sys`] | system calls without a safe wrapper; the meaning of errno |
//! | [`opener`] | the process that enters a namespace and makes sockets there; it alone has privilege |
//! | [`watch`] | who listens inside: `sock_diag`, or `/proc/net/tcp` and its fuzzed parser |
//! | [`native`] | sockets of the host for servers in a sandbox, without a relay |
//! | [`limits`] | every bound |
//! | [`table`] | slots with generations |
//!
//! # What never happens
//!
//! - No descriptor is closed and no buffer reused while an operation on it is in flight.
//! - A direction holds one loan at most, and none while it waits for bytes.
//! - A FIN is passed on after every byte that came before it, a reset as a reset.
//! - Nothing listens on anything but loopback, and nothing connects to a namespace other than the one it was checked for.
//!
//! # Absent on purpose
//!
//! No async runtime, no Docker, no names of containers, no policy of ports, no log: what happens is told by events.

pub mod channel;
pub mod command;
pub mod engine;
pub mod error;
pub mod limits;
mod listener;
pub mod native;
pub mod opener;
pub mod process;
pub mod relay;
pub mod ring;
pub mod shard;
pub mod sys;
pub mod table;
mod upstream;
pub mod watch;

pub use engine::{Engine, EngineOptions, Handle, StartError};
pub use ring::RingChoice;
