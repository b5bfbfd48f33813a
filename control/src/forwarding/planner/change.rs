//! What changed, for those who are told. Pure.

use std::num::NonZeroU16;

use crate::model::announcement::ForwardResult;
use crate::model::registration::ContainerName;

/// Why a port no longer answers; the texts are those of the wire specification, A.13.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClosedReason {
    /// Nothing listens inside any more, or it may not be exposed any more.
    ContainerReleased,
    /// The container or the engine went away.
    HostError,
    /// The container is no longer registered.
    Deregistered,
    /// The engine is stopped on purpose.
    BrokerStopped,
}

impl ClosedReason {
    /// The wire's word.
    pub fn as_str(self) -> &'static str {
        match self {
            ClosedReason::ContainerReleased => "container-released",
            ClosedReason::HostError => "host-error",
            ClosedReason::Deregistered => "deregistered",
            ClosedReason::BrokerStopped => "broker-stopped",
        }
    }
}

/// What changed, as far as somebody is told of it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields say what they are")]
pub enum Change {
    /// The port answers on the host, at `host_port`; `bind` is where its server listens.
    Opened { name: ContainerName, port: NonZeroU16, host_port: NonZeroU16, bind: &'static str },
    /// The port answers on the host, on the server's own native socket, at the same port.
    OpenedNative { name: ContainerName, port: NonZeroU16, bind: &'static str },
    /// It no longer does.
    Closed { name: ContainerName, port: NonZeroU16, host_port: NonZeroU16, why: ClosedReason },
    /// It could not be opened. Told once, however often it is tried again.
    Failed { name: ContainerName, port: NonZeroU16, reason: String },
    /// The engine let go of a container that it was not told to let go of.
    Lost { name: ContainerName, dialled: bool, reason: String },
    /// What the container is told of a port that it announced or reserved (`port-forward-result`).
    Result { name: ContainerName, result: ForwardResult },
}

impl Change {
    /// What the container is told of its port.
    pub(super) fn result(
        name: &ContainerName,
        port: NonZeroU16,
        result: Result<NonZeroU16, String>,
    ) -> Change {
        Change::Result { name: name.clone(), result: ForwardResult { port, result } }
    }
}
