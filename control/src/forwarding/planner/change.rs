//! The changes that a step or an event reports. Pure.

use std::num::NonZeroU16;

use crate::model::announcement::ForwardResult;
use crate::model::registration::ContainerName;

/// The reason that a port has closed; the texts are those of the wire specification, A.13.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClosedReason {
    /// The container no longer listens, or the policy no longer allows the port.
    ContainerReleased,
    /// The container or the engine has ended.
    HostError,
    /// The container is no longer registered.
    Deregistered,
    /// The engine is stopped on purpose.
    BrokerStopped,
}

impl ClosedReason {
    /// The text of the wire specification.
    pub fn as_str(self) -> &'static str {
        match self {
            ClosedReason::ContainerReleased => "container-released",
            ClosedReason::HostError => "host-error",
            ClosedReason::Deregistered => "deregistered",
            ClosedReason::BrokerStopped => "broker-stopped",
        }
    }
}

/// A change that is reported.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields say what they are")]
pub enum Change {
    /// The port is open on the host, at `host_port`; `bind` is the address on which its server listens.
    Opened { name: ContainerName, port: NonZeroU16, host_port: NonZeroU16, bind: &'static str },
    /// The port is open on the host, on the server's own native socket, at the same port.
    OpenedNative { name: ContainerName, port: NonZeroU16, bind: &'static str },
    /// The port is no longer open.
    Closed { name: ContainerName, port: NonZeroU16, host_port: NonZeroU16, why: ClosedReason },
    /// The port could not be opened. Reported once, however often it is tried again.
    Failed { name: ContainerName, port: NonZeroU16, reason: String },
    /// The engine has removed the upstream of a container without a command.
    Lost { name: ContainerName, dialled: bool, reason: String },
    /// The result for a port that the container announced or reserved (`port-forward-result`).
    Result { name: ContainerName, result: ForwardResult },
}

impl Change {
    /// Creates a result.
    pub(super) fn result(
        name: &ContainerName,
        port: NonZeroU16,
        result: Result<NonZeroU16, String>,
    ) -> Change {
        Change::Result { name: name.clone(), result: ForwardResult { port, result } }
    }
}
