//! landfall's relay engine: host listeners on loopback, connects inside another network namespace, bytes moved by
//! the kernel. Synchronous; no async runtime, no Docker, no container names.

pub mod channel;
pub mod command;
pub mod limits;
pub mod opener;
pub mod process;
/// The rings.
pub mod ring {
    #[path = "cookie_tmp.rs"]
    pub mod uring;
}
