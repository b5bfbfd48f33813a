//! The events of the daemon (wire specification, A.13). Each is recorded in the journal: a line of the log, and a
//! message to every subscriber. No event contains a token or a payload. Pure.

use std::num::NonZeroU16;

use serde::{Deserialize, Serialize};

use crate::model::forward_table::ForwardPath;

/// One event. The JSON form has `kind` and the fields of A.13.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", rename_all_fields = "camelCase")]
#[expect(
    missing_docs,
    reason = "the fields are those of the wire specification, A.13, and say what they are"
)]
pub enum Event {
    /// The RPC socket accepts connections.
    DaemonListening { socket: String },
    /// The HTTP endpoint accepts connections on this address; one event for each address.
    DaemonHttpListening { host: String, port: u16 },
    /// The preferred port of the HTTP endpoint was in use.
    DaemonHttpPortFallback { preferred: u16, actual: u16 },
    /// An orderly stop has started.
    DaemonStopping,
    /// A client requested the stop over the socket.
    ShutdownRequested,
    /// A container was registered that was not before.
    Register { container_name: String },
    /// A registration was removed; `reason` is `requested` or `gone`.
    Deregister { container_name: String, reason: String },
    /// A file was not read as a registration, or a registration was dropped for a reason of its own.
    RegistrationSkipped { container_name: String, reason: String },
    /// The host's user granted rights to a container.
    Grant { container_name: String, what: Vec<String> },
    /// The host's user took rights away from a container.
    Revoke { container_name: String, what: Vec<String> },
    /// A restart was acknowledged.
    RestartScheduled { container_name: String, build: bool },
    /// The restart is complete.
    RestartCompleted { container_name: String },
    /// The restart failed.
    RestartFailed { container_name: String, reason: String },
    /// A port of a container changed.
    PortForwardEvent { event: PortForwardEvent },
    /// A host port on the tailnet changed.
    TailscaleServeEvent { event: TailscaleServeEvent },
    /// A job's tick started. `job` is its name in the folder's configuration.
    JobTickStart { container_name: String, job: String },
    /// The job's gate refused.
    JobTickSkipped { container_name: String, job: String, reason: String },
    /// The job's command succeeded.
    JobTickOk { container_name: String, job: String },
    /// The job's command may succeed another time (exit status 75).
    JobTickTransientFailure { container_name: String, job: String, reason: String },
    /// The job's command needs the user to sign in (exit status 77).
    JobTickReauthRequired { container_name: String, job: String, reason: String },
    /// The job's command failed, or was ended because it took too long.
    JobTickError { container_name: String, job: String, error: String },
    /// The job's success restarts the container.
    JobRestartScheduled { container_name: String, job: String },
    /// That restart was refused.
    JobRestartFailed { container_name: String, job: String, reason: String },
    /// The engine was started or attached; `ring` is its I/O interface, `reason` is why that is not io_uring.
    EngineAttached { version: String, ring: String, reason: Option<String>, started: bool },
    /// The engine's channel ended.
    EngineLost { reason: String },
    /// An engine of another version was replaced by a new one and finishes its connections.
    EngineUpgraded { from: String, to: String },
    /// A container was entered, or is reached over its WebSocket.
    ContainerReached {
        container_name: String,
        #[serde(rename = "way")]
        attach_method: String,
    },
    /// The container could not be entered, or is no longer reached.
    ContainerUnreachable { container_name: String, reason: String },
    /// A subscriber was too slow and has lost this many of the oldest lines. Sent to that subscriber alone.
    EventsLost { count: u64 },
    /// Any other event that the user should know.
    Notice { text: String },
}

/// A change of a port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", rename_all_fields = "camelCase")]
#[expect(
    missing_docs,
    reason = "the fields are those of the wire specification, A.13, and say what they are"
)]
pub enum PortForwardEvent {
    /// The port is open on the host.
    PortForwardOpened {
        container_name: String,
        port: NonZeroU16,
        host_port: NonZeroU16,
        bind_addr: String,
        /// Landfall's own field: the purpose of the port, if the registration has it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        label: Option<String>,
        /// Landfall's own field: `native` if the server listens on a socket of the host, absent if the port is relayed.
        #[serde(default, skip_serializing_if = "ForwardPath::is_relay")]
        path: ForwardPath,
        /// Landfall's own field: programs show no message about this port.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        silent: bool,
    },
    /// The port is no longer open; `reason` is one of A.13's.
    PortForwardClosed { container_name: String, port: NonZeroU16, host_port: NonZeroU16, reason: String },
    /// The port could not be opened; `reason` contains the symbolic error name.
    PortForwardFailed { container_name: String, port: NonZeroU16, reason: String },
}

/// A change of a host port on the tailnet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", rename_all_fields = "camelCase")]
#[expect(
    missing_docs,
    reason = "the fields are those of the wire specification, A.13, and say what they are"
)]
pub enum TailscaleServeEvent {
    /// The port is served.
    TailscaleServeOpened { container_name: String, port: NonZeroU16 },
    /// The port is no longer served.
    TailscaleServeClosed { container_name: String, port: NonZeroU16 },
    /// Tailscale does not run, so no command was tried.
    TailscaleServeSkipped { container_name: String, port: NonZeroU16, reason: String },
    /// Tailscale refused; `command` is `serve` or `off`.
    TailscaleServeFailed { container_name: String, port: NonZeroU16, command: String, reason: String },
}
