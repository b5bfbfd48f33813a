//! The port broker: relays ports of a container through an agent inside it, over one WebSocket (wire specification, A.3
//! to A.6).
//!
//! ```text
//!  engine ── "dial 5173" ──► driver ── relay-open ──► WebSocket ──► container ── connect ──► 127.0.0.1:5173
//!         ◄── one socket ──         ◄─ relay-open-ack ─
//!         ══ TCP, loopback ══ pump ══ relay-data ══════════════════ pump ══════ TCP ═══════
//! ```
//!
//! The host's side opens the WebSocket; the container's side ([`crate::agent`]) accepts it. Each side consists of a
//! session machine (pure: messages and time in, messages and actions out), an I/O shell around it, and one pump for
//! each open stream, which is the same on both sides. A host session is connecting, waiting for the hello's answer, or
//! watching ([`host`]); a container session waits for the hello, is authenticated, or has ended ([`container`]). The
//! engine gets a TCP socket for each stream, so it relays as for any other container, and TCP itself signals a FIN, a
//! reset and a slow reader.
//!
//! The token is never sent to a program that has not proved that it holds it, if the registration requires the proof
//! ([`challenge`]), and no message of a stream is sent before the container has acknowledged the stream's opening.

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
