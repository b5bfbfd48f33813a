//! The port broker: ports of a container that is reached through a program inside it, over one WebSocket
//! (wire specification, A.3 to A.6).
//!
//! ```text
//!  engine ── "dial 5173" ──► driver ── relay-open ──► WebSocket ──► container ── connect ──► 127.0.0.1:5173
//!         ◄── one socket ──         ◄─ relay-open-ack ─
//!         ══ TCP, loopback ══ pump ══ relay-data ══════════════════ pump ══════ TCP ═══════
//! ```
//!
//! The host's side dials the WebSocket; the container's side ([`crate::agent`]) answers on it. Both are a session machine
//! (pure: messages and time in, messages and asks out), a shell around it, and for each open stream one pump, which is the
//! same on both sides. The engine gets a TCP socket for each stream, so it relays as it always does, and knows a FIN, a reset
//! and a slow reader by what TCP says of them.

pub mod brokers;
pub mod challenge;
mod connection;
pub mod container;
mod dials;
mod driver;
pub mod host;
pub mod message;
pub mod outbox;
pub mod pair;
pub mod pump;
mod stream;
pub mod wire;
