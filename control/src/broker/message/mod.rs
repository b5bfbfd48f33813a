//! The messages of the port broker (wire specification, A.3.1, A.3.2 and A.3.7), as text, as binary frames and as values.
//! Pure.
//!
//! Each message is one JSON object in one text frame, with a `type`. Unknown types and unknown fields are ignored; so is a
//! message of a known type whose fields do not fit, which is told to whoever logs ([`Unreadable`]).
//!
//! # Extensions
//!
//! `broker-hello` and `broker-hello-ack` of ours carry `extensions`, a list of names. One is used only when both sides
//! list it, so a peer of the reference sees nothing of them.
//!
//! | name | what changes |
//! | --- | --- |
//! | `binary` | payload travels in binary frames: the byte 1, the stream id as four bytes (big endian), the payload |
//! | `credit` | a sender sends no more payload on a stream than it was granted: [`INITIAL_CREDIT_BYTES`] at first, then what each `relay-credit {streamId, bytes}` adds |
//! | `half-close` | `relay-eof {streamId}` ends one direction; the other one runs on |
//! | `reset` | `relay-reset {streamId}` instead of `relay-close` where the connection was reset; nothing follows |

//!
//! What a peer writes is read with tolerance, where a wrong reading can do no harm: 1.0 is 1, a `side` that is missing is
//! the sender's, and a refusal without a reason is a refusal.

use crate::model::announcement::{Announced, ForwardResult};
use std::fmt;
use std::num::NonZeroU16;

use bytes::Bytes;

pub use binary::{BINARY_HEADER_BYTES, binary_header, from_binary, to_binary};
pub use text::relay_text;

mod binary;
mod text;

/// What a sender may send on a fresh stream before it is granted more, where both sides know `credit`.
pub const INITIAL_CREDIT_BYTES: u32 = 1024 * 1024;

/// The most payload of one message, in bytes before base64 (wire specification, A.3.6).
pub const PAYLOAD_BYTES_MAX: usize = 64 * 1024;

/// The largest message that is read. A peer's runtime allows 16 MiB; none of ours is near it.
pub const MESSAGE_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Why a message could not be read. It quotes nothing of the message, which may hold a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    /// It is no JSON.
    #[error("invalid json")]
    Json,
    /// A message of a known type lacks a field, or has something else in it.
    #[error("{kind}: {field} is missing or not what it should be")]
    Field {
        /// The type.
        kind: &'static str,
        /// The field.
        field: &'static str,
    },
    /// A message of a type that is never this long.
    #[error("{kind}: {bytes} bytes are too many")]
    TooLong {
        /// The type.
        kind: &'static str,
        /// Its length.
        bytes: usize,
    },
    /// A binary frame that is shorter than its header.
    #[error("a binary frame is cut short")]
    CutShort,
}

/// A stream, as its host numbered it: from 1 up. The container takes any integer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StreamId(pub i64);

/// Which extensions are offered, or in use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extensions {
    /// Binary frames.
    pub binary: bool,
    /// Credit windows.
    pub credit: bool,
    /// Half-close.
    pub half_close: bool,
    /// Reset.
    pub reset: bool,
}

impl Extensions {
    /// All that this release knows.
    pub const ALL: Extensions = Extensions { binary: true, credit: true, half_close: true, reset: true };
    /// The protocol of the reference.
    pub const NONE: Extensions = Extensions { binary: false, credit: false, half_close: false, reset: false };

    /// Those that both have.
    #[must_use]
    pub fn and(self, other: Extensions) -> Extensions {
        Extensions {
            binary: self.binary && other.binary,
            credit: self.credit && other.credit,
            half_close: self.half_close && other.half_close,
            reset: self.reset && other.reset,
        }
    }
}

/// The end of a stream at which something happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The client on the host. The host's side always says this.
    Downstream,
    /// The server in the container. The container's side always says this.
    Upstream,
}

/// Something on one stream, from either side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Payload; empty payload means nothing.
    Data(Bytes),
    /// The connection is closed in both directions.
    Close(Side),
    /// More may be sent: so many bytes (extension `credit`).
    Credit(u32),
    /// Nothing more comes in this direction (extension `half-close`).
    Eof,
    /// The connection was reset (extension `reset`).
    Reset,
}

/// The part of a hello by which the container recognises its host.
#[derive(Clone, PartialEq, Eq)]
pub enum Credential {
    /// The broker token itself, to a peer of the reference.
    Token(String),
    /// A proof that the host holds the token ([`challenge`](super::challenge)).
    Proof(String),
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Credential::Token(_) => "Token(***)",
            Credential::Proof(_) => "Proof(***)",
        })
    }
}

/// A message to the container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToContainer {
    /// `broker-hello`
    Hello {
        /// The token, or a proof that the host holds it.
        credential: Credential,
        /// What the host's side offers.
        extensions: Extensions,
    },
    /// `port-watch-subscribe`
    Subscribe,
    /// `port-watch-unsubscribe`
    Unsubscribe,
    /// `port-forward-result`
    ForwardResult(ForwardResult),
    /// `relay-open`
    Open {
        /// The new stream.
        stream: StreamId,
        /// The port in the container.
        port: NonZeroU16,
    },
    /// `relay-data`, `relay-close` and those of the extensions.
    Relay(StreamId, Frame),
}

/// A message to the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToHost {
    /// `broker-hello-ack`
    HelloAck {
        /// What the container's side offers.
        extensions: Extensions,
    },
    /// `broker-hello-nack`
    HelloNack {
        /// Why.
        reason: String,
    },
    /// `port-forward-request`
    ForwardRequest {
        /// The port in the container.
        target: NonZeroU16,
        /// Ports on the host, the best first. Numbers that are no ports are left out.
        candidates: Vec<NonZeroU16>,
        /// What for.
        reason: Option<String>,
    },
    /// `port-listen-snapshot`
    Snapshot(Vec<Announced>),
    /// `port-listen-opened`
    Opened(Announced),
    /// `port-listen-closed`
    Closed(NonZeroU16),
    /// `relay-open-ack`
    OpenAck(StreamId),
    /// `relay-open-nack`
    OpenNack {
        /// Which stream.
        stream: StreamId,
        /// Why.
        reason: String,
    },
    /// `relay-data`, `relay-close` and those of the extensions.
    Relay(StreamId, Frame),
}
