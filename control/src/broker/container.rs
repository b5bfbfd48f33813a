//! The container's side of one host connection: its messages, watches and connections (wire specification, A.3.2 to
//! A.3.6 and A.3.8). Pure: events go in, actions come out, in order.
//!
//! ```text
//!            hello, right token                      (all of it, until the WebSocket closes)
//!  Hello ───────────────────────────► Authenticated ─────────────────────────────────────────► Ended
//! !
//! //!    │  anything else, or no hello in time: at most a nack, then 1008                             ▲
//!    └──────────────────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! - No message has an effect before the hello, and none after the end.
//! - Readings of listeners are compared here, so a subscription, its end and the next one never mix: the first reading
//!   after a subscription is sent as a snapshot.
//! - A stream is connecting or open. A stream that is closed while it connects is removed at once. The number of the
//!   connect attempt distinguishes its late outcome from that of another stream with the same id; the late connection
//!   is dropped without a message.
//! - Reserved requests are numbered in order of arrival ([`Reserved`]), and a session stores the number up to which it
//!   has sent them. So a request that arrives together with the hello is sent once, and none is sent before the hello.

use std::collections::{HashMap, HashSet};
use std::num::NonZeroU16;
use std::time::Duration;

use landfall_engine::watch::parse::{BindAddr, WireListener};
use serde::Serialize;

use super::challenge::Answer;
use super::message::{Credential, Extensions, Frame, StreamId, ToContainer, ToHost};
use crate::model::announcement::{Announced, ForwardResult};
use crate::model::registration::Token;

/// The time limit for a host's hello. A correct host sends it at once.
pub const HELLO_TIME_MAX: Duration = Duration::from_secs(5);
/// The close code for a host that was refused (wire specification, A.3.4).
pub const REFUSED: u16 = 1008;
/// The maximum of streams of one host connection, connecting or open. Each holds a descriptor. A host has too few ports
/// to dial more.
pub const STREAMS_MAX: usize = 16 * 1024;
/// The maximum of targets for which a reserved forward is remembered.
pub const RESERVED_MAX: usize = 256;
/// The maximum of [`ContainerEvent::Unexpected`] lines for one connection, so that a faulty host cannot fill a disk
/// with them.
const UNEXPECTED_MAX: u32 = 16;

/// An event for the log (wire specification, A.13). It contains no token and no payload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case", rename_all_fields = "camelCase")]
#[expect(
    missing_docs,
    reason = "the fields are those of the wire specification, A.13, and are described there"
)]
pub enum ContainerEvent {
    /// A host was refused.
    AuthFailed { reason: &'static str },
    /// A host was accepted.
    Authed,
    /// The host subscribed to listeners.
    Subscribed,
    /// The host ended its subscription.
    Unsubscribed,
    /// Connecting to the server inside failed.
    RelayOpenFailed { stream_id: i64, port: u16, reason: String },
    /// A stream ended before all its bytes were relayed.
    RelayDataError { stream_id: i64, reason: String },
    /// A message was invalid.
    Unexpected { reason: String },
}

/// A received message, as far as it could be parsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReceivedMessage {
    /// A valid message.
    Message(ToContainer),
    /// Its `type` is unknown. It is ignored, but it does not count as a hello.
    UnknownType,
    /// A hello without a token.
    TokenlessHello,
    /// Its `type` is known and not that of a hello, and its fields are invalid.
    InvalidFields(String),
    /// A `relay-open` with an invalid port.
    InvalidOpen(StreamId),
    /// The text is not a message.
    NotAMessage(String),
}

/// The id of one connect attempt of a session; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Attempt(pub u64);

/// An action of the session, for the shell to perform in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send this message.
    Send(ToHost),
    /// The host is accepted, and these extensions are in use from now on. Earlier messages do not use them.
    Accept(Extensions),
    /// Close the WebSocket after all earlier messages are sent.
    Close {
        /// The close code.
        code: u16,
        /// The close reason.
        reason: &'static str,
    },
    /// Read the listeners now and at every interval, and pass each successful reading to the session.
    Watch,
    /// Stop reading. A reading in progress is discarded.
    StopWatch,
    /// Connect to 127.0.0.1, or else `::1`.
    Connect {
        /// The id to report with the outcome.
        attempt: Attempt,
        /// The stream.
        stream: StreamId,
        /// The port.
        port: NonZeroU16,
    },
    /// Abandon the attempt, and close its connection if it succeeds.
    Abandon(Attempt),
    /// Relay between the socket of the attempt and this stream.
    Relay(Attempt, StreamId),
    /// Pass a frame to an open stream.
    Deliver(StreamId, Frame),
    /// No frames follow for the stream: it ends when the delivered data is written.
    Forget(StreamId),
    /// Report the result to the program that waits for it.
    Result(ForwardResult),
    /// Write the event to the log.
    Log(ContainerEvent),
}

/// A request of a program in the container for a reserved forward.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForwardRequest {
    /// The port in the container.
    pub target: NonZeroU16,
    /// Candidate ports on the host, in order of preference.
    pub candidates: Vec<NonZeroU16>,
    /// The purpose.
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

/// The requests of all programs since the start of the agent, one for each target, in the order in which the targets
/// were first requested.
#[derive(Clone, Debug, Default)]
pub struct Reserved {
    requests: Vec<(u64, ForwardRequest)>,
    last: u64,
}

impl Reserved {
    /// Stores a request. It replaces an earlier request for the same target, and keeps its position. Returns false if
    /// there are [`RESERVED_MAX`] targets already.
    pub fn insert(&mut self, request: ForwardRequest) -> bool {
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

    /// Returns the number of the newest request; 0 before the first.
    pub fn last(&self) -> u64 {
        self.last
    }

    /// Returns the requests after number `sent`, in order of arrival.
    fn since(&self, sent: u64) -> impl Iterator<Item = &ForwardRequest> {
        let mut newer: Vec<_> = self.requests.iter().filter(|(number, _)| *number > sent).collect();
        newer.sort_by_key(|(number, _)| *number);
        newer.into_iter().map(|(_, request)| request)
    }
}

#[derive(Debug)]
enum Phase {
    Hello,
    /// Reserved requests up to the number `sent` are sent.
    Authenticated {
        extensions: Extensions,
        sent: u64,
    },
    Ended,
}

#[derive(Debug)]
struct Stream {
    attempt: Attempt,
    port: NonZeroU16,
    open: bool,
}

/// The session machine of one host connection.
#[derive(Debug)]
pub struct Session {
    token: Token,
    /// Our answer to the host's challenge, if it sent one.
    answer: Option<Answer>,
    phase: Phase,
    /// `None` without a subscription; `Some(None)` until its first reading.
    watch: Option<Option<Vec<WireListener>>>,
    streams: HashMap<StreamId, Stream>,
    attempts: u64,
    unexpected: u32,
}

impl Session {
    /// Creates the session of a connected host. `answer` is our answer to its challenge, if it sent one.
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

    /// Returns whether the host is accepted and still connected.
    pub fn is_authenticated(&self) -> bool {
        matches!(self.phase, Phase::Authenticated { .. })
    }

    /// Handles a message of the host.
    pub fn on_message(&mut self, received: ReceivedMessage, reserved: &Reserved) -> Vec<Action> {
        match (&self.phase, received) {
            (Phase::Ended, _) => Vec::new(),
            (_, ReceivedMessage::NotAMessage(reason)) => self.unexpected(reason),
            (Phase::Hello, ReceivedMessage::Message(ToContainer::Hello { credential, extensions })) => {
                let is_right = match credential {
                    Credential::Token(token) => self.token.matches(&token),
                    Credential::Proof(proof) => {
                        self.answer.as_ref().is_some_and(|answer| answer.accepts(&proof))
                    }
                };
                match is_right {
                    true => self.accept(extensions, reserved),
                    false => self.refuse("token mismatch", "invalid token", "invalid token"),
                }
            }
            (Phase::Hello, ReceivedMessage::TokenlessHello) => {
                self.refuse("token mismatch", "invalid token", "invalid token")
            }
            (Phase::Hello, _) => self.refuse(
                "first message was not broker-hello",
                "expected broker-hello first",
                "auth required",
            ),
            (Phase::Authenticated { .. }, ReceivedMessage::Message(message)) => self.message(message),
            (Phase::Authenticated { .. }, ReceivedMessage::InvalidFields(reason)) => self.unexpected(reason),
            (Phase::Authenticated { .. }, ReceivedMessage::InvalidOpen(stream)) => {
                vec![nack(stream, "the port is not from 1 to 65535")]
            }
            (Phase::Authenticated { .. }, ReceivedMessage::UnknownType | ReceivedMessage::TokenlessHello) => {
                Vec::new()
            }
        }
    }

    /// Handles the timeout of the hello, [`HELLO_TIME_MAX`] after the host connected.
    ///
    /// It sends no nack, since a host treats a nack as a wrong token and stops permanently (A.6.7), and this host may
    /// only be slow.
    pub fn on_hello_timeout(&mut self) -> Vec<Action> {
        match self.phase {
            Phase::Hello => {
                self.phase = Phase::Ended;
                let reason = "first message was not broker-hello";
                vec![
                    Action::Log(ContainerEvent::AuthFailed { reason }),
                    Action::Close { code: REFUSED, reason: "no hello in time" },
                ]
            }
            Phase::Authenticated { .. } | Phase::Ended => Vec::new(),
        }
    }

    /// Sends new reserved requests, after a program in the container has added one.
    pub fn on_request(&mut self, reserved: &Reserved) -> Vec<Action> {
        let Phase::Authenticated { sent, .. } = &mut self.phase else { return Vec::new() };
        let actions = reserved.since(*sent).map(|request| Action::Send(request.message())).collect();
        *sent = reserved.last();
        actions
    }

    /// Handles a reading of the listeners. A failed reading is not passed in: it is not a change.
    pub fn on_reading(&mut self, now: Vec<WireListener>) -> Vec<Action> {
        let Some(known) = &mut self.watch else { return Vec::new() };
        match known.replace(now) {
            None => {
                let all = known.iter().flatten().map(announced).collect();
                vec![Action::Send(ToHost::Snapshot(all))]
            }
            Some(before) => difference(&before, known.as_deref().unwrap_or_default()),
        }
    }

    /// Handles the outcome of a connect attempt. Unless an [`Action::Relay`] follows, the caller closes the socket.
    pub fn on_connect_outcome(
        &mut self,
        attempt: Attempt,
        stream: StreamId,
        outcome: Result<(), String>,
    ) -> Vec<Action> {
        let Some(known) = self.streams.get_mut(&stream) else { return Vec::new() };
        if known.attempt != attempt || known.open {
            return Vec::new();
        }
        match outcome {
            Ok(()) => {
                known.open = true;
                vec![Action::Send(ToHost::OpenAck(stream)), Action::Relay(attempt, stream)]
            }
            Err(reason) => {
                let port = known.port.get();
                self.streams.remove(&stream);
                let event =
                    ContainerEvent::RelayOpenFailed { stream_id: stream.0, port, reason: reason.clone() };
                vec![nack(stream, &reason), Action::Log(event)]
            }
        }
    }

    /// Handles the end of a stream's pump, which has sent the host the messages that this needs. `error` is the reason
    /// if the end was not orderly.
    pub fn on_pump_end(&mut self, attempt: Attempt, stream: StreamId, error: Option<String>) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.streams.get(&stream).is_some_and(|known| known.attempt == attempt) {
            self.streams.remove(&stream);
            actions.push(Action::Forget(stream));
        }
        let event = |reason| ContainerEvent::RelayDataError { stream_id: stream.0, reason };
        actions.extend(error.map(|reason| Action::Log(event(reason))));
        actions
    }

    /// Handles the end of the WebSocket.
    pub fn on_disconnect(&mut self) -> Vec<Action> {
        self.phase = Phase::Ended;
        let mut actions = Vec::new();
        if self.watch.take().is_some() {
            actions.push(Action::StopWatch);
        }
        actions.extend(self.streams.drain().map(|(stream, known)| match known.open {
            true => Action::Forget(stream),
            false => Action::Abandon(known.attempt),
        }));
        actions
    }

    fn accept(&mut self, offered: Extensions, reserved: &Reserved) -> Vec<Action> {
        // A host that offers no extensions may be the reference implementation, and gets none listed.
        let listed = if offered == Extensions::NONE { Extensions::NONE } else { Extensions::ALL };
        let extensions = offered.and(listed);
        self.phase = Phase::Authenticated { extensions, sent: reserved.last() };
        let mut actions =
            vec![Action::Send(ToHost::HelloAck { extensions: listed }), Action::Accept(extensions)];
        actions.push(Action::Log(ContainerEvent::Authed));
        actions.extend(reserved.requests.iter().map(|(_, request)| Action::Send(request.message())));
        actions
    }

    fn refuse(&mut self, logged: &'static str, nack: &'static str, close: &'static str) -> Vec<Action> {
        self.phase = Phase::Ended;
        vec![
            Action::Log(ContainerEvent::AuthFailed { reason: logged }),
            Action::Send(ToHost::HelloNack { reason: nack.to_owned() }),
            Action::Close { code: REFUSED, reason: close },
        ]
    }

    fn unexpected(&mut self, reason: String) -> Vec<Action> {
        self.unexpected = self.unexpected.saturating_add(1);
        match self.unexpected <= UNEXPECTED_MAX {
            true => vec![Action::Log(ContainerEvent::Unexpected { reason })],
            false => Vec::new(),
        }
    }

    fn message(&mut self, message: ToContainer) -> Vec<Action> {
        match message {
            // A second hello is ignored, whatever its token.
            ToContainer::Hello { .. } => Vec::new(),
            ToContainer::Subscribe if self.watch.is_some() => Vec::new(),
            ToContainer::Subscribe => {
                self.watch = Some(None);
                vec![Action::Watch, Action::Log(ContainerEvent::Subscribed)]
            }
            ToContainer::Unsubscribe if self.watch.is_none() => Vec::new(),
            ToContainer::Unsubscribe => {
                self.watch = None;
                vec![Action::StopWatch, Action::Log(ContainerEvent::Unsubscribed)]
            }
            ToContainer::ForwardResult(result) => vec![Action::Result(result)],
            ToContainer::Open { stream, port } => self.open(stream, port),
            ToContainer::Relay(stream, frame) => self.frame(stream, frame),
        }
    }

    fn open(&mut self, stream: StreamId, port: NonZeroU16) -> Vec<Action> {
        if self.streams.contains_key(&stream) {
            return vec![nack(stream, "the stream is already open")];
        }
        if self.streams.len() >= STREAMS_MAX {
            return vec![nack(stream, "too many streams are open")];
        }
        self.attempts += 1;
        let attempt = Attempt(self.attempts);
        self.streams.insert(stream, Stream { attempt, port, open: false });
        vec![Action::Connect { attempt, stream, port }]
    }

    fn frame(&mut self, stream: StreamId, frame: Frame) -> Vec<Action> {
        let Some(known) = self.streams.get(&stream) else { return Vec::new() };
        let (open, attempt) = (known.open, known.attempt);
        if !self.is_negotiated(&frame) {
            return Vec::new();
        }
        let ends = matches!(frame, Frame::Close(_) | Frame::Reset);
        if ends {
            self.streams.remove(&stream);
        }
        match (open, ends) {
            (true, true) => vec![Action::Deliver(stream, frame), Action::Forget(stream)],
            (true, false) => vec![Action::Deliver(stream, frame)],
            (false, true) => vec![Action::Abandon(attempt)],
            // The specification requires such frames to be dropped (A.3.6); a host waits for the acknowledgement before
            // it sends any.
            (false, false) => Vec::new(),
        }
    }

    /// Returns whether the frame belongs to the negotiated protocol.
    fn is_negotiated(&self, frame: &Frame) -> bool {
        let Phase::Authenticated { extensions, .. } = &self.phase else { return false };
        match frame {
            Frame::Data(_) | Frame::Close(_) => true,
            Frame::Credit(_) => extensions.credit,
            Frame::Eof => extensions.half_close,
            Frame::Reset => extensions.reset,
        }
    }
}

fn nack(stream: StreamId, reason: &str) -> Action {
    Action::Send(ToHost::OpenNack { stream, reason: reason.to_owned() })
}

fn announced(listener: &WireListener) -> Announced {
    Announced { port: listener.port, loopback: listener.bind_addr == BindAddr::Loopback }
}

/// Returns the opened ports in the order of the new reading, then the closed ports in the order of the previous one. A
/// change of the bind address alone is not a difference.
fn difference(before: &[WireListener], now: &[WireListener]) -> Vec<Action> {
    let ports = |all: &[WireListener]| all.iter().map(|one| one.port).collect::<HashSet<_>>();
    let (old, new) = (ports(before), ports(now));
    let opened = now.iter().filter(|one| !old.contains(&one.port)).map(announced).map(ToHost::Opened);
    let closed = before.iter().map(|one| one.port).filter(|port| !new.contains(port)).map(ToHost::Closed);
    opened.chain(closed).map(Action::Send).collect()
}

#[cfg(test)]
#[path = "container_tests.rs"]
mod tests;
