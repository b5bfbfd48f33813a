//! What is forwarded just now, as the daemon tells it and a client shows it: plain values, the same on both sides.
//! Pure.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// The engine, and every registered container with its ports.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ForwardTable {
    /// The engine that is attached; none runs before somebody needs one.
    pub engine: Option<EngineFacts>,
    /// Every registration, in the order in which they came.
    pub containers: Vec<ContainerState>,
}

/// The engine that moves the bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EngineFacts {
    /// Its build.
    pub version: String,
    /// `io_uring` or `epoll`.
    pub ring: String,
    /// Why it is not io_uring, where it is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Its process, where the kernel told it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// How many engines of an earlier version finish their connections beside it.
    pub draining: u32,
}

/// One registered container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerState {
    /// Its name.
    pub container_name: String,
    /// How it is reached: `process 42`, `docker`, or a path such as `/run/netns/x`. A container that is only
    /// remembered has none.
    #[serde(rename = "way", default, skip_serializing_if = "Option::is_none")]
    pub attach_method: Option<String>,
    /// How far that got.
    pub state: Reachability,
    /// Why no further.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Its ports, the lowest first.
    pub forwards: Vec<ForwardRow>,
    /// How many more ports listen without a forward. Only so many of those are listed.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub omitted: usize,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde gives a reference")]
fn is_zero(count: &usize) -> bool {
    *count == 0
}

/// How far a container is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reachability {
    /// It is about to be entered, or has not been started.
    Waiting,
    /// What listens in it is known.
    Reached,
    /// It cannot be entered; `reason` says why, and it is tried again.
    Unreachable,
    /// Nothing of it may be forwarded, or nobody asked for that.
    Off,
}

/// One port that listens inside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ForwardRow {
    /// The port inside.
    pub port: u16,
    /// The port on the host.
    pub host_port: u16,
    /// What became of it.
    pub state: RowState,
    /// How its connections reach the server.
    #[serde(default)]
    pub path: ForwardPath,
    /// The addresses of the host that native sockets are bound to. `::` stands for every loopback address.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpAddr>,
    /// Why it is not open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The name of the process that listens. It is the process's own choice: escape it before it reaches a terminal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<String>,
    /// That process, as the host numbers it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// What it is for, in the words of whoever made the container: escape it before it reaches a terminal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// People are not told of it as it comes and goes.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub silent: bool,
    /// Connections open now.
    pub connections: u64,
    /// Connections accepted since it was opened.
    pub accepted: u64,
    /// Bytes from clients to the server.
    pub bytes_up: u64,
    /// Bytes from the server to clients.
    pub bytes_down: u64,
}

/// How the connections of a port reach its server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ForwardPath {
    /// Through the engine.
    #[default]
    Relay,
    /// The server listens on a socket of the host.
    Native,
}

impl ForwardPath {
    /// Whether it is the usual one.
    pub fn is_relay(&self) -> bool {
        *self == ForwardPath::Relay
    }
}

/// What became of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RowState {
    /// The engine was asked and has not answered.
    Opening,
    /// It answers on the host.
    Open,
    /// The engine was asked to close it.
    Closing,
    /// It could not be opened; it is tried again.
    Failed,
    /// It may not be.
    Denied,
    /// Docker has it answer on the host by itself, so it is left to Docker.
    Published,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_table_is_read_as_it_is_written() {
        let table = ForwardTable {
            engine: Some(EngineFacts {
                version: "x".to_owned(),
                ring: "epoll".to_owned(),
                reason: Some("io_uring is forbidden".to_owned()),
                pid: Some(7),
                draining: 1,
            }),
            containers: vec![ContainerState {
                container_name: "coder".to_owned(),
                attach_method: Some("docker".to_owned()),
                state: Reachability::Reached,
                reason: None,
                forwards: vec![ForwardRow {
                    port: 5173,
                    host_port: 5173,
                    state: RowState::Open,
                    path: ForwardPath::Native,
                    addresses: vec![IpAddr::from([127, 0, 0, 1])],
                    reason: None,
                    process: Some("node".to_owned()),
                    pid: Some(42),
                    label: Some("Web".to_owned()),
                    silent: true,
                    connections: 1,
                    accepted: 2,
                    bytes_up: 3,
                    bytes_down: 4,
                }],
                omitted: 9,
            }],
        };
        let written = json!({
            "engine": {
                "version": "x", "ring": "epoll", "reason": "io_uring is forbidden", "pid": 7, "draining": 1
            },
            "containers": [{
                "containerName": "coder", "way": "docker", "state": "reached",
                "forwards": [{
                    "port": 5173, "hostPort": 5173, "state": "open", "path": "native",
                    "addresses": ["127.0.0.1"], "process": "node", "pid": 42,
                    "label": "Web", "silent": true,
                    "connections": 1, "accepted": 2, "bytesUp": 3, "bytesDown": 4
                }],
                "omitted": 9
            }]
        });
        assert_eq!(serde_json::to_value(&table).unwrap(), written);
        assert_eq!(serde_json::from_value::<ForwardTable>(written).unwrap(), table);
    }
}
