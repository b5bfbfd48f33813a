//! The container's side of one host connection: what is said, watched and connected, and when (wire specification, A.3.2 to
//! A.3.6 and A.3.8). Pure: what happened goes in, what is to be done comes out, in order.
//!
//! ```text
//!            hello, right token                      (all of it, until the WebSocket closes)
//!  Hello ───────────────────────────► Authenticated ─────────────────────────────────────────► Ended
//!    │  anything else, or no hello in time: a nack at most, and 1008                              ▲
//!    └──────────────────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! - Nothing is acted on before the hello, and nothing at all after the end.
//! - Readings are compared here, so a subscribe, its unsubscribe and the next subscribe never mix: the first reading after a
//!   subscribe is a snapshot.
//! - A stream is connecting or open. One that is closed while it connects is forgotten at once; the attempt's number tells
//!   its late outcome from that of another stream with the same id, and the connection is dropped without a word.
//! - Reserved requests are numbered as they come ([`Reserved`]); a session knows up to which number it has told them. So one
//!   that comes in the moment of the hello is told once, and none is told before.

use std::collections::{HashMap, HashSet};
use std::num::NonZeroU16;
use std::time::Duration;

use landfall_engine::watch::parse::{BindAddr, WireListener};
use serde::Serialize;

use super::challenge::Answer;
use super::message::{Credential, Extensions, Frame, StreamId, ToContainer, ToHost};
use crate::model::announcement::{Announced, ForwardResult};
use crate::model::registration::Token;

/// How long a host has for its hello. A correct one says it at once.
pub const HELLO_TIME_MAX: Duration = Duration::from_secs(5);
/// The close code of a host that was not let in (wire specification, A.3.4).
pub const REFUSED: u16 = 1008;
/// Streams of one host connection, connecting or open. Each holds a descriptor; a host has not even as many ports to dial from.
pub const STREAMS_MAX: usize = 16 * 1024;
/// Targets for which a reserved forward is remembered.
pub const RESERVED_MAX: usize = 256;
/// Lines of [`ContainerEvent::Unexpected`] for one connection: a host that talks nonsense shall not fill a disk with it.
const UNEXPECTED_MAX: u32 = 16;

/// What is logged (wire specification, A.13). No token, no payload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case", rename_all_fields = "camelCase")]
#[expect(
    missing_docs,
    reason = "the fields are those of the wire specification, A.13, and say what they are"
)]
pub enum ContainerEvent {
    /// A host was not let in.
    AuthFailed { reason: &'static str },
    /// A host was.
    Authed,
    /// It watches ports from now on.
    Subscribed,
    /// It no longer does.
    Unsubscribed,
    /// The server inside was not reached.
    RelayOpenFailed { stream_id: i64, port: u16, reason: String },
    /// A stream ended before its bytes were through.
    RelayDataError { stream_id: i64, reason: String },
    /// A message made no sense.
    Unexpected { reason: String },
}

/// A message as far as it could be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// One that is understood.
    Message(ToContainer),
    /// Its `type` is none that is known: ignored, but it is not a hello.
    OtherType,
    /// A hello without a token.
    TokenlessHello,
    /// Its `type` is known and is not that of a hello, and its fields do not fit.
    Unfit(String),
    /// A `relay-open` to what is no port.
    UnfitOpen(StreamId),
    /// It is no message at all.
    Noise(String),
}

/// One connect attempt of one session; never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Attempt(pub u64);

/// What the session wants done, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Send this.
    Say(ToHost),
    /// The host is let in, and these extensions are in use from now on. What was asked before this goes without them.
    LetIn(Extensions),
    /// Close the WebSocket when everything said so far is sent.
    Close {
        /// The close code.
        code: u16,
        /// The close reason.
        reason: &'static str,
    },
    /// Read what listens now and at every interval, and tell each reading that worked.
    Watch,
    /// No longer. A reading under way is of no use.
    Unwatch,
    /// Connect to 127.0.0.1, or else `::1`.
    Connect {
        /// To be told with the outcome.
        attempt: Attempt,
        /// For which stream.
        stream: StreamId,
        /// The port.
        port: NonZeroU16,
    },
    /// Give the attempt up, and close what it opens.
    Abandon(Attempt),
    /// The socket that the attempt brought is this stream's from now on.
    Relay(Attempt, StreamId),
    /// This came for an open stream.
    Deliver(StreamId, Frame),
    /// No more comes for the stream: when what was delivered is written it is over.
    Forget(StreamId),
    /// Whoever waits for it is told.
    Result(ForwardResult),
    /// To the log.
    Tell(ContainerEvent),
}

/// A reserved forward that a program in the container asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForwardRequest {
    /// The port in the container.
    pub target: NonZeroU16,
    /// Ports on the host, the best first.
    pub candidates: Vec<NonZeroU16>,
    /// What for.
    pub reason: Option<String>,
}

impl ForwardRequest {
    fn message(&self) -> ToHost {
        ToHost::ForwardRequest {
            target: self.target,
            candidates: self.candidates.clone(),
            reason: self.reason.clone(),
        }
    }
}

/// The requests of the process's life, one for each target, in the order in which the targets were first asked for.
#[derive(Clone, Debug, Default)]
pub struct Reserved {
    requests: Vec<(u64, ForwardRequest)>,
    last: u64,
}

impl Reserved {
    /// Remembers a request in place of an earlier one for the same target, which keeps its place. False where there are
    /// [`RESERVED_MAX`] targets already.
    pub fn remember(&mut self, request: ForwardRequest) -> bool {
        let number = self.last + 1;
        let room = self.requests.len() < RESERVED_MAX;
        match self.requests.iter_mut().find(|(_, known)| known.target == request.target) {
            Some(known) => *known = (number, request),
            None if room => self.requests.push((number, request)),
            None => return false,
        }
        self.last = number;
        true
    }

    /// The number of the newest one; 0 before the first.
    pub fn last(&self) -> u64 {
        self.last
    }

    /// Those that came after number `told`, as they came.
    fn since(&self, told: u64) -> impl Iterator<Item = &ForwardRequest> {
        let mut newer: Vec<_> = self.requests.iter().filter(|(number, _)| *number > told).collect();
        newer.sort_by_key(|(number, _)| *number);
        newer.into_iter().map(|(_, request)| request)
    }
}

#[derive(Debug)]
enum Phase {
    Hello,
    /// Reserved requests up to this number are told.
    Authenticated {
        extensions: Extensions,
        told: u64,
    },
    Ended,
}

#[derive(Debug)]
struct Stream {
    attempt: Attempt,
    port: NonZeroU16,
    open: bool,
}

/// The machine.
#[derive(Debug)]
pub struct Session {
    token: Token,
    /// The host's challenge, as it was answered.
    answer: Option<Answer>,
    phase: Phase,
    /// None while nobody watches; nothing in it until the first reading.
    watch: Option<Option<Vec<WireListener>>>,
    streams: HashMap<StreamId, Stream>,
    attempts: u64,
    unexpected: u32,
}

impl Session {
    /// The session of a host that has connected, and whose challenge was answered if it sent one.
    pub fn new(token: Token, answer: Option<Answer>) -> Session {
        Session {
            token,
            answer,
            phase: Phase::Hello,
            watch: None,
            streams: HashMap::new(),
            attempts: 0,
            unexpected: 0,
        }
    }

    /// Whether the host is let in and has not gone.
    pub fn is_authenticated(&self) -> bool {
        matches!(self.phase, Phase::Authenticated { .. })
    }

    /// The host said something.
    pub fn heard(&mut self, heard: Heard, reserved: &Reserved) -> Vec<Ask> {
        match (&self.phase, heard) {
            (Phase::Ended, _) => Vec::new(),
            (_, Heard::Noise(reason)) => self.unexpected(reason),
            (Phase::Hello, Heard::Message(ToContainer::Hello { credential, extensions })) => {
                let is_right = match credential {
                    Credential::Token(token) => self.token.matches(&token),
                    Credential::Proof(proof) => {
                        self.answer.as_ref().is_some_and(|answer| answer.accepts(&proof))
                    }
                };
                match is_right {
                    true => self.let_in(extensions, reserved),
                    false => self.refuse("token mismatch", "invalid token", "invalid token"),
                }
            }
            (Phase::Hello, Heard::TokenlessHello) => {
                self.refuse("token mismatch", "invalid token", "invalid token")
            }
            (Phase::Hello, _) => self.refuse(
                "first message was not broker-hello",
                "expected broker-hello first",
                "auth required",
            ),
            (Phase::Authenticated { .. }, Heard::Message(message)) => self.message(message),
            (Phase::Authenticated { .. }, Heard::Unfit(reason)) => self.unexpected(reason),
            (Phase::Authenticated { .. }, Heard::UnfitOpen(stream)) => {
                vec![nack(stream, "the port is none: 1 to 65535 are")]
            }
            (Phase::Authenticated { .. }, Heard::OtherType | Heard::TokenlessHello) => Vec::new(),
        }
    }

    /// [`HELLO_TIME_MAX`] has passed since the host connected.
    ///
    /// There is no nack: a host takes one for a wrong token, and stops for good (A.6.7). This one may only be slow.
    pub fn hello_is_due(&mut self) -> Vec<Ask> {
        match self.phase {
            Phase::Hello => {
                self.phase = Phase::Ended;
                let reason = "first message was not broker-hello";
                vec![
                    Ask::Tell(ContainerEvent::AuthFailed { reason }),
                    Ask::Close { code: REFUSED, reason: "no hello in time" },
                ]
            }
            Phase::Authenticated { .. } | Phase::Ended => Vec::new(),
        }
    }

    /// A program in the container has asked for a reserved forward.
    pub fn requested(&mut self, reserved: &Reserved) -> Vec<Ask> {
        let Phase::Authenticated { told, .. } = &mut self.phase else { return Vec::new() };
        let asks = reserved.since(*told).map(|request| Ask::Say(request.message())).collect();
        *told = reserved.last();
        asks
    }

    /// What listens was read. A reading that failed is not told: it is no change.
    pub fn reading(&mut self, now: Vec<WireListener>) -> Vec<Ask> {
        let Some(known) = &mut self.watch else { return Vec::new() };
        match known.replace(now) {
            None => {
                let all = known.iter().flatten().map(announced).collect();
                vec![Ask::Say(ToHost::Snapshot(all))]
            }
            Some(before) => difference(&before, known.as_deref().unwrap_or_default()),
        }
    }

    /// An attempt to connect has come to its end. Where no [`Ask::Relay`] follows, its socket is to be closed.
    pub fn connected(&mut self, attempt: Attempt, stream: StreamId, outcome: Result<(), String>) -> Vec<Ask> {
        let Some(known) = self.streams.get_mut(&stream) else { return Vec::new() };
        if known.attempt != attempt || known.open {
            return Vec::new();
        }
        match outcome {
            Ok(()) => {
                known.open = true;
                vec![Ask::Say(ToHost::OpenAck(stream)), Ask::Relay(attempt, stream)]
            }
            Err(reason) => {
                let port = known.port.get();
                self.streams.remove(&stream);
                let event =
                    ContainerEvent::RelayOpenFailed { stream_id: stream.0, port, reason: reason.clone() };
                vec![nack(stream, &reason), Ask::Tell(event)]
            }
        }
    }

    /// The pump of a stream is done, and has said so to the host as far as that is needed. `error` is why it was not an
    /// orderly end.
    pub fn over(&mut self, attempt: Attempt, stream: StreamId, error: Option<String>) -> Vec<Ask> {
        let mut asks = Vec::new();
        if self.streams.get(&stream).is_some_and(|known| known.attempt == attempt) {
            self.streams.remove(&stream);
            asks.push(Ask::Forget(stream));
        }
        let event = |reason| ContainerEvent::RelayDataError { stream_id: stream.0, reason };
        asks.extend(error.map(|reason| Ask::Tell(event(reason))));
        asks
    }

    /// The WebSocket is closed.
    pub fn gone(&mut self) -> Vec<Ask> {
        self.phase = Phase::Ended;
        let mut asks = Vec::new();
        if self.watch.take().is_some() {
            asks.push(Ask::Unwatch);
        }
        asks.extend(self.streams.drain().map(|(stream, known)| match known.open {
            true => Ask::Forget(stream),
            false => Ask::Abandon(known.attempt),
        }));
        asks
    }

    fn let_in(&mut self, offered: Extensions, reserved: &Reserved) -> Vec<Ask> {
        // A host that lists none is the reference's, and sees none.
        let listed = if offered == Extensions::NONE { Extensions::NONE } else { Extensions::ALL };
        let extensions = offered.and(listed);
        self.phase = Phase::Authenticated { extensions, told: reserved.last() };
        let mut asks = vec![Ask::Say(ToHost::HelloAck { extensions: listed }), Ask::LetIn(extensions)];
        asks.push(Ask::Tell(ContainerEvent::Authed));
        asks.extend(reserved.requests.iter().map(|(_, request)| Ask::Say(request.message())));
        asks
    }

    fn refuse(&mut self, told: &'static str, nack: &'static str, close: &'static str) -> Vec<Ask> {
        self.phase = Phase::Ended;
        vec![
            Ask::Tell(ContainerEvent::AuthFailed { reason: told }),
            Ask::Say(ToHost::HelloNack { reason: nack.to_owned() }),
            Ask::Close { code: REFUSED, reason: close },
        ]
    }

    fn unexpected(&mut self, reason: String) -> Vec<Ask> {
        self.unexpected = self.unexpected.saturating_add(1);
        match self.unexpected <= UNEXPECTED_MAX {
            true => vec![Ask::Tell(ContainerEvent::Unexpected { reason })],
            false => Vec::new(),
        }
    }

    fn message(&mut self, message: ToContainer) -> Vec<Ask> {
        match message {
            // A second one is ignored, whatever its token.
            ToContainer::Hello { .. } => Vec::new(),
            ToContainer::Subscribe if self.watch.is_some() => Vec::new(),
            ToContainer::Subscribe => {
                self.watch = Some(None);
                vec![Ask::Watch, Ask::Tell(ContainerEvent::Subscribed)]
            }
            ToContainer::Unsubscribe if self.watch.is_none() => Vec::new(),
            ToContainer::Unsubscribe => {
                self.watch = None;
                vec![Ask::Unwatch, Ask::Tell(ContainerEvent::Unsubscribed)]
            }
            ToContainer::ForwardResult(result) => vec![Ask::Result(result)],
            ToContainer::Open { stream, port } => self.open(stream, port),
            ToContainer::Relay(stream, frame) => self.frame(stream, frame),
        }
    }

    fn open(&mut self, stream: StreamId, port: NonZeroU16) -> Vec<Ask> {
        if self.streams.contains_key(&stream) {
            return vec![nack(stream, "the stream is open already")];
        }
        if self.streams.len() >= STREAMS_MAX {
            return vec![nack(stream, "too many streams are open")];
        }
        self.attempts += 1;
        let attempt = Attempt(self.attempts);
        self.streams.insert(stream, Stream { attempt, port, open: false });
        vec![Ask::Connect { attempt, stream, port }]
    }

    fn frame(&mut self, stream: StreamId, frame: Frame) -> Vec<Ask> {
        let Some(known) = self.streams.get(&stream) else { return Vec::new() };
        let (open, attempt) = (known.open, known.attempt);
        if !self.knows(&frame) {
            return Vec::new();
        }
        let ends = matches!(frame, Frame::Close(_) | Frame::Reset);
        if ends {
            self.streams.remove(&stream);
        }
        match (open, ends) {
            (true, true) => vec![Ask::Deliver(stream, frame), Ask::Forget(stream)],
            (true, false) => vec![Ask::Deliver(stream, frame)],
            (false, true) => vec![Ask::Abandon(attempt)],
            // The wire has it dropped (A.3.6); a host holds it back until the acknowledgement.
            (false, false) => Vec::new(),
        }
    }

    /// Whether the frame belongs to the protocol as it was agreed.
    fn knows(&self, frame: &Frame) -> bool {
        let Phase::Authenticated { extensions, .. } = &self.phase else { return false };
        match frame {
            Frame::Data(_) | Frame::Close(_) => true,
            Frame::Credit(_) => extensions.credit,
            Frame::Eof => extensions.half_close,
            Frame::Reset => extensions.reset,
        }
    }
}

fn nack(stream: StreamId, reason: &str) -> Ask {
    Ask::Say(ToHost::OpenNack { stream, reason: reason.to_owned() })
}

fn announced(listener: &WireListener) -> Announced {
    Announced { port: listener.port, loopback: listener.bind_addr == BindAddr::Loopback }
}

/// First what opened, in the order of the new reading, then what closed, in the order of the one before. Where a port is bound
/// is no difference.
fn difference(before: &[WireListener], now: &[WireListener]) -> Vec<Ask> {
    let ports = |all: &[WireListener]| all.iter().map(|one| one.port).collect::<HashSet<_>>();
    let (old, new) = (ports(before), ports(now));
    let opened = now.iter().filter(|one| !old.contains(&one.port)).map(announced).map(ToHost::Opened);
    let closed = before.iter().map(|one| one.port).filter(|port| !new.contains(port)).map(ToHost::Closed);
    opened.chain(closed).map(Ask::Say).collect()
}

#[cfg(test)]
#[path = "container_tests.rs"]
mod tests;
