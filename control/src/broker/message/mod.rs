//! The messages of the port broker (wire specification, A.3.1, A.3.2 and A.3.7), as text, as binary messages and as
//! values. Pure.
//!
//! Each message is one JSON object in one text message, with a `type`. Unknown types and unknown fields are ignored. A
//! message of a known type with invalid fields is ignored, too, and is reported to the caller ([`Unreadable`]).
//!
//! # Extensions
//!
//! `broker-hello` and `broker-hello-ack` of landfall carry `extensions`, a list of names. An extension is used only if
//! both sides list it, so it is invisible to a peer of the reference implementation.
//!
//! | name | what changes |
//! | --- | --- |
//! | `binary` | payload is sent in binary messages: the byte 1, the stream id as four bytes (big endian), the payload |
//! | `credit` | a sender sends no more payload on a stream than it was granted: [`INITIAL_CREDIT_BYTES`] at first, then
//! the sum of all `relay-credit {streamId, bytes}` |
//! | `half-close` | `relay-eof {streamId}` ends one direction; the other one continues |
//! | `reset` | `relay-reset {streamId}` instead of `relay-close` if the connection was reset; no message follows |
//!
//! Messages of a peer are parsed leniently if that is harmless: 1.0 is 1, a missing `side` is the sender's, and a
//! refusal may lack a reason.

use crate::model::announcement::{Announced, ForwardResult};
use std::fmt;
use std::num::NonZeroU16;

use bytes::Bytes;

pub use binary::{BINARY_HEADER_BYTES, binary_header, from_binary, to_binary};
pub use text::relay_text;

mod binary;
mod text;

/// The credit of a new stream, in bytes, if both sides use `credit`.
pub const INITIAL_CREDIT_BYTES: u32 = 1024 * 1024;

/// The maximum of payload in one message, in bytes before base64 (wire specification, A.3.6).
pub const PAYLOAD_BYTES_MAX: usize = 64 * 1024;

/// The largest message that is read, in bytes. A peer's runtime allows 16 MiB; our own messages are much smaller.
pub const MESSAGE_BYTES_MAX: usize = 16 * 1024 * 1024;

/// The reason why a message could not be parsed. It quotes no part of the message, which may contain a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    /// The text is not JSON.
    #[error("invalid json")]
    Json,
    /// A message of a known type lacks a field, or the field has an invalid value.
    #[error("{kind}: {field} is missing or invalid")]
    Field {
        /// The type.
        kind: &'static str,
        /// The field.
        field: &'static str,
    },
    /// The message exceeds the length limit of its type.
    #[error("{kind}: {bytes} bytes exceed the limit")]
    TooLong {
        /// The type.
        kind: &'static str,
        /// Its length.
        bytes: usize,
    },
    /// A binary message is shorter than its header.
    #[error("a binary frame is truncated")]
    CutShort,
}

/// The id of a stream, assigned by its host from 1 upwards. The container accepts any integer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StreamId(pub i64);

/// The set of extensions that is offered, or in use.
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
    /// All extensions of this release.
    pub const ALL: Extensions = Extensions { binary: true, credit: true, half_close: true, reset: true };
    /// The protocol of the reference implementation.
    pub const NONE: Extensions = Extensions { binary: false, credit: false, half_close: false, reset: false };

    /// Returns the extensions that both sets contain.
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

/// The end of a stream at which an event occurred.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The client on the host. The host's side always sends this.
    Downstream,
    /// The server in the container. The container's side always sends this.
    Upstream,
}

/// A frame of one stream, in either direction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Payload; empty payload has no effect.
    Data(Bytes),
    /// The connection is closed in both directions.
    Close(Side),
    /// Additional credit in bytes (extension `credit`).
    Credit(u32),
    /// The end of this direction (extension `half-close`).
    Eof,
    /// The connection was reset (extension `reset`).
    Reset,
}

/// The part of a hello that authenticates the host.
#[derive(Clone, PartialEq, Eq)]
pub enum Credential {
    /// The broker token itself, for a peer of the reference implementation.
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
        /// The extensions that the host's side offers.
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
    /// `relay-data`, `relay-close` and the frames of the extensions.
    Relay(StreamId, Frame),
}

/// A message to the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToHost {
    /// `broker-hello-ack`
    HelloAck {
        /// The extensions that the container's side offers.
        extensions: Extensions,
    },
    /// `broker-hello-nack`
    HelloNack {
        /// The reason.
        reason: String,
    },
    /// `port-forward-request`
    ForwardRequest {
        /// The port in the container.
        target: NonZeroU16,
        /// Candidate ports on the host, in order of preference. Invalid ports are skipped.
        candidates: Vec<NonZeroU16>,
        /// The purpose.
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
        /// The stream.
        stream: StreamId,
        /// The reason.
        reason: String,
    },
    /// `relay-data`, `relay-close` and the frames of the extensions.
    Relay(StreamId, Frame),
}
