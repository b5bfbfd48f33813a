//! landfall's relay engine: host listeners on loopback, connects inside another network namespace, bytes moved by
//! the kernel. Synchronous; no async runtime, no Docker, no container names.

pub mod command;
pub mod limits;
pub mod watch;
