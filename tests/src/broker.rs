//! Peers of the port broker that implement only its wire protocol: a scripted container for our daemon, a scripted daemon
//! for our agent, and the agent itself in a namespace.
//!
//! A case drives its peer from its own thread: it sends a message and waits for a message. Other messages that arrive
//! meanwhile are kept in order, and the case can read them later. A peer reads only when its case asks it to: a peer that
//! its case leaves alone stalls.

mod agent;
mod container;
mod host;
mod peer;
mod published;
mod recorder;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

pub use agent::Agent;
pub use container::{Container, forward_events};
pub use host::{HOST_HEADER, dial, try_dial, try_dial_with, welcome, welcome_with};
pub use peer::{MessageSender, Peer, Received};
pub use published::Published;
pub use recorder::Recorder;

/// The port of the container's own server (wire specification, A.0.1).
pub const CONTAINER_PORT: u16 = 8973;

/// The path of the container's WebSocket.
pub const PATH: &str = "/portbroker";

/// A `broker-hello` as a peer of the reference sends it.
pub fn hello(token: &str) -> Value {
    json!({"type": "broker-hello", "token": token})
}

/// `relay-open`
pub fn open(stream: i64, port: u16) -> Value {
    json!({"type": "relay-open", "streamId": stream, "port": port})
}

/// `relay-open-ack`
pub fn ack(stream: i64) -> Value {
    json!({"type": "relay-open-ack", "streamId": stream})
}

/// `relay-open-nack`
pub fn nack(stream: i64, reason: &str) -> Value {
    json!({"type": "relay-open-nack", "streamId": stream, "reason": reason})
}

/// `relay-data`
pub fn data(stream: i64, bytes: &[u8]) -> Value {
    json!({"type": "relay-data", "streamId": stream, "bytes": STANDARD.encode(bytes)})
}

/// `relay-close` as the daemon sends it.
pub fn close_downstream(stream: i64) -> Value {
    json!({"type": "relay-close", "streamId": stream, "side": "downstream"})
}

/// `relay-close` as the container sends it.
pub fn close_upstream(stream: i64) -> Value {
    json!({"type": "relay-close", "streamId": stream, "side": "upstream"})
}

/// `port-listen-snapshot` of ports that listen on every address.
pub fn snapshot(ports: &[u16]) -> Value {
    let ports: Vec<Value> = ports.iter().map(|port| json!({"port": port, "bindAddr": "0.0.0.0"})).collect();
    json!({"type": "port-listen-snapshot", "ports": ports})
}

/// `port-listen-opened` on loopback.
pub fn opened(port: u16) -> Value {
    json!({"type": "port-listen-opened", "port": port, "bindAddr": "127.0.0.1"})
}

/// `port-listen-closed`
pub fn closed(port: u16) -> Value {
    json!({"type": "port-listen-closed", "port": port})
}

/// `port-forward-request`, without a reason.
pub fn request(target: u16, candidates: &[u16]) -> Value {
    json!({"type": "port-forward-request", "targetPort": target, "hostCandidates": candidates})
}

/// `port-forward-result` of a port that is forwarded.
pub fn forwarded(port: u16, host: u16) -> Value {
    json!({"type": "port-forward-result", "port": port, "ok": true, "hostPort": host})
}

/// `port-forward-result` of a port that is not.
pub fn not_forwarded(port: u16, reason: &str) -> Value {
    json!({"type": "port-forward-result", "port": port, "ok": false, "reason": reason})
}

/// Returns the payload of a `relay-data`.
///
/// # Panics
/// If it is not standard base64 with padding.
#[track_caller]
pub fn payload(message: &Value) -> Vec<u8> {
    let text = message["bytes"].as_str().unwrap_or_else(|| panic!("no bytes: {message}"));
    STANDARD.decode(text).unwrap_or_else(|error| panic!("{error}: {message}"))
}

/// Returns the stream of a message.
///
/// # Panics
/// If the message names no stream.
#[track_caller]
pub fn stream(message: &Value) -> i64 {
    message["streamId"].as_i64().unwrap_or_else(|| panic!("no stream: {message}"))
}
