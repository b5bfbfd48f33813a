//! landfall's relay engine: host listeners on loopback, connects inside another network namespace, bytes moved by
//! the kernel. Synchronous; no async runtime, no Docker, no container names.

pub mod channel;
pub mod command;
pub mod engine;
pub mod error;
pub mod limits;
mod listener;
pub mod opener;
pub mod process;
pub mod relay;
pub mod ring;
pub mod shard;
pub mod table;
mod upstream;
pub mod watch;

pub use engine::{Engine, EngineOptions, Handle, StartError};
pub use ring::RingChoice;
