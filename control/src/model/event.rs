//! What happens in the daemon, as one value for each kind (wire specification, A.13), and the journal that they go to:
//! a line of the log each, and a message to whoever listens just now. Tokens and payloads are in none of them. Pure.

use std::num::NonZeroU16;

use serde::{Deserialize, Serialize};

use crate::model::forward_table::ForwardPath;

/// One thing that happened. The JSON form has `kind` and the fields of A.13.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", rename_all_fields = "camelCase")]
#[expect(
    missing_docs,
    reason = "the fields are those of the wire specification, A.13, and say what they are"
)]
pub enum Event {
    /// The RPC socket accepts.
    DaemonListening { socket: String },
    /// The HTTP endpoint accepts on this address; one event for each.
    DaemonHttpListening { host: String, port: u16 },
    /// Its preferred port was in use.
    DaemonHttpPortFallback { preferred: u16, actual: u16 },
    /// An orderly stop has begun.
    DaemonStopping,
    /// Somebody asked for it over the socket.
    ShutdownRequested,
    /// A container is known that was not.
    Register { container_name: String },
    /// A container is not known any more; `reason` is `requested` or `gone`.
    Deregister { container_name: String, reason: String },
    /// A file was not taken in, or a registration was dropped for a reason of its own.
    RegistrationSkipped { container_name: String, reason: String },
    /// The host's user granted rights to a container.
    Grant { container_name: String, what: Vec<String> },
    /// The host's user took rights away from a container.
    Revoke { container_name: String, what: Vec<String> },
    /// A restart was acknowledged.
    RestartScheduled { container_name: String, build: bool },
    /// It is done.
    RestartCompleted { container_name: String },
    /// It is not.
    RestartFailed { container_name: String, reason: String },
    /// What became of a port.
    PortForwardEvent { event: PortForwardEvent },
    /// What became of a host port on the tailnet.
    TailscaleServeEvent { event: TailscaleServeEvent },
    /// A job's tick began. `job` is its name in the folder's configuration.
    JobTickStart { container_name: String, job: String },
    /// Its gate said no.
    JobTickSkipped { container_name: String, job: String, reason: String },
    /// Its command succeeded.
    JobTickOk { container_name: String, job: String },
    /// Its command says that it may succeed another time (exit status 75).
    JobTickTransientFailure { container_name: String, job: String, reason: String },
    /// Its command says that somebody has to sign in (exit status 77).
    JobTickReauthRequired { container_name: String, job: String, reason: String },
    /// Its command failed, or was ended because it took too long.
    JobTickError { container_name: String, job: String, error: String },
    /// Its success restarts the container.
    JobRestartScheduled { container_name: String, job: String },
    /// That restart was refused.
    JobRestartFailed { container_name: String, job: String, reason: String },
    /// The engine was started or taken over; `ring` moves its bytes, `reason` says why that is not io_uring.
    EngineAttached { version: String, ring: String, reason: Option<String>, started: bool },
    /// The engine's channel ended.
    EngineLost { reason: String },
    /// An engine of another version was relieved by a new one and finishes its connections.
    EngineUpgraded { from: String, to: String },
    /// A container's namespace is entered.
    ContainerReached {
        container_name: String,
        #[serde(rename = "way")]
        attach_method: String,
    },
    /// It cannot be, or no longer is.
    ContainerUnreachable { container_name: String, reason: String },
    /// A listener was too slow and has lost this many of the oldest lines. Told to that listener alone.
    EventsLost { count: u64 },
    /// Anything else that somebody should know.
    Notice { text: String },
}

/// What became of a port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", rename_all_fields = "camelCase")]
#[expect(
    missing_docs,
    reason = "the fields are those of the wire specification, A.13, and say what they are"
)]
pub enum PortForwardEvent {
    /// It answers on the host.
    PortForwardOpened {
        container_name: String,
        port: NonZeroU16,
        host_port: NonZeroU16,
        bind_addr: String,
        /// Ours alone: what the port is for, where the registration says so.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        label: Option<String>,
        /// Ours alone: `native` where the server listens on a socket of the host, and absent where it is relayed.
        #[serde(default, skip_serializing_if = "ForwardPath::is_relay")]
        path: ForwardPath,
        /// Ours alone: people are not to be told.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        silent: bool,
    },
    /// It no longer does; `reason` is one of A.13's.
    PortForwardClosed { container_name: String, port: NonZeroU16, host_port: NonZeroU16, reason: String },
    /// It could not be listened on; `reason` holds the symbolic error name.
    PortForwardFailed { container_name: String, port: NonZeroU16, reason: String },
}

/// What became of a host port on the tailnet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", rename_all_fields = "camelCase")]
#[expect(
    missing_docs,
    reason = "the fields are those of the wire specification, A.13, and say what they are"
)]
pub enum TailscaleServeEvent {
    /// It is served.
    TailscaleServeOpened { container_name: String, port: NonZeroU16 },
    /// It no longer is.
    TailscaleServeClosed { container_name: String, port: NonZeroU16 },
    /// Tailscale does not run, so nothing was tried.
    TailscaleServeSkipped { container_name: String, port: NonZeroU16, reason: String },
    /// Tailscale refused; `command` is `serve` or `off`.
    TailscaleServeFailed { container_name: String, port: NonZeroU16, command: String, reason: String },
}
