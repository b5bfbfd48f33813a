//! The table of forwards, as the daemon sends it and a client shows it: plain values. Pure.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// The engine, and every registered container with its ports.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ForwardTable {
    /// The attached engine; `None` before a container needs one.
    pub engine: Option<EngineFacts>,
    /// Every registration, in the order of registration.
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
    /// The reason that the ring is not io_uring, if it is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Its process id, if the kernel reported it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// The number of engines of earlier versions that finish their connections.
    pub draining: u32,
}

/// One registered container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerState {
    /// Its name.
    pub container_name: String,
    /// The attach method: `process 42`, `docker`, or a path such as `/run/netns/x`. A container that is only remembered
    /// has none.
    #[serde(rename = "way", default, skip_serializing_if = "Option::is_none")]
    pub attach_method: Option<String>,
    /// The reachability.
    pub state: Reachability,
    /// The reason for that state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Its ports, in ascending order.
    pub forwards: Vec<ForwardRow>,
    /// The number of further ports that listen without a forward. The list of those is bounded.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub omitted: usize,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde gives a reference")]
fn is_zero(count: &usize) -> bool {
    *count == 0
}

/// The reachability of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reachability {
    /// It is about to be entered, or has not been started.
    Waiting,
    /// The ports that listen in it are known.
    Reached,
    /// It cannot be entered, for `reason`; it is tried again.
    Unreachable,
    /// None of its ports may be forwarded, or forwarding was not requested.
    Off,
}

/// One port that listens in the container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ForwardRow {
    /// The container's port.
    pub port: u16,
    /// The port on the host.
    pub host_port: u16,
    /// The state of the port.
    pub state: RowState,
    /// How its connections reach the server.
    #[serde(default)]
    pub path: ForwardPath,
    /// The addresses of the host that native sockets are bound to. `::` stands for every loopback address.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpAddr>,
    /// The reason that it is not open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The name of the process that listens. The process chooses it: escape it before printing it to a terminal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<String>,
    /// The id of that process on the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// The purpose of the port, as text from the container's configuration: escape it before printing it to a terminal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// Whether messages about the opening and closing of the port are suppressed.
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
    /// Whether it is the default.
    pub fn is_relay(&self) -> bool {
        *self == ForwardPath::Relay
    }
}

/// The state of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RowState {
    /// The engine was commanded to open it and has not answered.
    Opening,
    /// It is open on the host.
    Open,
    /// The engine was commanded to close it.
    Closing,
    /// It could not be opened; it is retried.
    Failed,
    /// The policy denies it.
    Denied,
    /// Docker publishes it on the host, so landfall does not forward it.
    Published,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn table_round_trips_through_json() {
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
