//! The session of one broker on the host's side (wire specification, A.3 and A.6). Pure: events and the time go in,
//! actions come out.
//!
//! ```text
//! !
//! //!            due            opened, hello sent         ack
//!  Resting ───────► Connecting ───────► Greeting ───────► Up
//!     ▲  1, 2, 4, 10, 10 … s │              │             │
//! !
//! //!     └──────────────────────┴──────────────┴─────────────┘  failed, lost, refused temporarily, no answer in time
//! !
//! //!                                                         stop, token refused ──► Stopped, from every state
//! ```
//!
//! A session survives the loss of its WebSocket. The stream numbers continue; the state of the container does not: each
//! connection starts with no announced port and no open stream.
//!
//! | stream | waits for | ends by |
//! | --- | --- | --- |
//! | opening | the container's answer, for [`DIAL_MAX`] | a nack, a close, the timeout, the loss: the dial is refused |
//! | open | either end | its pump, which notifies the container itself; a loss resets it |
//! | flushing | its client, which still reads the data that the container sent before its close | its pump; a loss of
//! the WebSocket does not affect it |
//!
//! What never happens: the token is sent to a container that must answer a challenge; a message is sent before the
//! hello or, except for the hello, before a positive answer to it; a stream number in use is assigned to another
//! stream; a dial gets two answers or none; a result is sent for a port that was not announced over this connection;
//! two connection attempts run at once, or one starts after the stop.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::num::NonZeroU16;
use std::time::{Duration, Instant};

use landfall_engine::opener::DialFailure;

use super::message::{Credential, Extensions, Frame, Side, StreamId, ToContainer, ToHost};
use crate::forwarding::broker_link::Announcement;
use crate::model::announcement::{Announced, EXCLUDED, ForwardResult};
use crate::model::name::escape;
use crate::model::registration::Token;

/// The time limit of a connection attempt, from the look-up of the port to the open WebSocket (wire specification,
/// A.6.1).
pub const CONNECT_MAX: Duration = Duration::from_secs(15);
/// The time limit for the container's answer to the hello. The specification sets no limit, and a silent peer
/// would be waited for until it ends.
pub const HELLO_ANSWER_MAX: Duration = Duration::from_secs(15);
/// The time limit for the container's answer to a `relay-open`: the engine's limit for a connection to any server.
pub const DIAL_MAX: Duration = Duration::from_secs(10);
/// The maximum of streams of one container, including those that are opening or flushing. Further dials are refused.
pub const STREAMS_MAX: usize = 4_096;
/// The delay after the first consecutive failure, the second, and so on; the last one repeats (wire specification,
/// A.6.2). An answered hello resets the count.
const RETRY_DELAYS: [Duration; 4] =
    [Duration::from_secs(1), Duration::from_secs(2), Duration::from_secs(4), Duration::from_secs(10)];
/// The highest stream number; 1 follows it (wire specification, A.3.6).
const STREAM_ID_MAX: i64 = 2_147_483_647;
/// The refusals after which the token is not sent again (wire specification, A.3.4).
const FATAL_REFUSALS: [&str; 2] = ["invalid token", "expected broker-hello first"];
/// The reason if a container that must answer a challenge does not answer it.
const NO_ANSWER: &str = "the program there does not prove that it is this container, which has to prove it; it got no \
                         token (if it is landfall agent of an earlier release, put this one into the image)";
/// The maximum of different reasons that are reported for one outage.
const REASONS_MAX: usize = 4;
/// The maximum of listeners of one container that are passed on to forwarding. Each takes memory there for a few bytes
/// of a message, and at most a quarter of them can be forwarded.
pub const LISTENING_MAX: usize = 1_024;
/// The maximum length of a text of the container in notices, in characters.
const TEXT_CHARS_MAX: usize = 200;

/// The identity of a dial: the engine's channel and the dial on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DialKey {
    /// The channel, as numbered by its server; numbers are not reused.
    pub channel: u64,
    /// The dial, as numbered by the engine on that channel.
    pub dial: u64,
}

/// An event of the session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// A deadline may have passed.
    Time,
    /// The attempt succeeded: a WebSocket is open. `Some`: the peer has proved that it holds the token, and this is our
    /// own proof. `None`: the peer did not answer the challenge, like the reference implementation.
    Opened(Option<String>),
    /// The attempt failed, or the WebSocket was lost; the reason, for people.
    Lost(String),
    /// A text message arrived.
    Text(ToHost),
    /// A frame of a stream arrived in a binary message.
    Binary(StreamId, Frame),
    /// The engine requests a connection to this port of the container.
    Dial(DialKey, NonZeroU16),
    /// The engine has closed a channel, so its dials need no answer.
    ChannelClosed(u64),
    /// Forwarding reports the result for a port.
    Result(ForwardResult),
    /// A stream's pump has ended. It has notified the container itself.
    StreamEnded(StreamId),
    /// The broker must stop.
    Stop,
}

/// An action, to perform in order.
#[derive(Debug)]
pub enum Action {
    /// Start a connection attempt: look up the port, connect, perform the handshake.
    Connect,
    /// Abandon the attempt, or close the WebSocket.
    Disconnect,
    /// Send this message to the container.
    Send(ToContainer),
    /// Report this to forwarding.
    Announce(Announcement),
    /// The container has connected to its server: answer the dial with a socket, and start the stream's pump. Frames
    /// that were delivered earlier for the stream are relayed first.
    StartStream {
        /// The stream.
        stream: StreamId,
        /// The dial that waits for it.
        key: DialKey,
    },
    /// Answer a dial with a refusal.
    Refuse {
        /// The dial.
        key: DialKey,
        /// Why.
        why: DialFailure,
    },
    /// Pass a frame to a stream that is opening or open.
    Deliver(StreamId, Frame),
    /// Reset a stream if its pump runs, and drop the frames that were delivered for it.
    ResetStream(StreamId),
    /// Report this text to people.
    Notice(String),
    /// The container has answered a challenge for the first time. From now on it must.
    Answered,
    /// The token was refused permanently, for this reason; no action follows.
    Rejected(String),
}

/// The state of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Waiting { until: Instant },
    Connecting { until: Instant },
    AwaitingAck { until: Instant },
    Up,
    Stopped,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stream {
    Opening { key: DialKey },
    Open,
    Flushing,
}

/// The session machine of one broker.
#[derive(Debug)]
pub struct Session {
    token: Token,
    /// Whether the container must answer a challenge, and never gets the token.
    must_answer: bool,
    /// Whether it has answered one over this connection.
    has_answered: bool,
    offered: Extensions,
    used: Extensions,
    phase: Phase,
    /// The number of consecutive failures.
    failures: usize,
    /// The notices about the current outage.
    reported: Reported,
    streams: BTreeMap<StreamId, Stream>,
    /// The deadlines of dials, in ascending order. Entries after the first may belong to answered dials.
    dials_due: VecDeque<(Instant, StreamId, DialKey)>,
    next_stream: i64,
    /// The listening ports that were passed on to forwarding over this connection.
    listening: BTreeSet<NonZeroU16>,
    /// The ports that the container announced or requested over this connection, for which results are sent.
    announced: BTreeSet<NonZeroU16>,
}

/// The reported reasons of an outage, each once.
#[derive(Clone, Debug, Default)]
struct Reported {
    failures: Vec<String>,
    refusal: bool,
}

impl Session {
    /// Creates a session that connects immediately, and sends `token` or proves that it holds it. A container that
    /// `must_answer` a challenge never gets the token itself.
    pub fn new(token: Token, must_answer: bool, offered: Extensions, now: Instant) -> Session {
        Session {
            token,
            must_answer,
            has_answered: false,
            offered,
            used: Extensions::NONE,
            phase: Phase::Waiting { until: now },
            failures: 0,
            reported: Reported::default(),
            streams: BTreeMap::new(),
            dials_due: VecDeque::new(),
            next_stream: 1,
            listening: BTreeSet::new(),
            announced: BTreeSet::new(),
        }
    }

    /// Returns the extensions in use: those that both sides listed.
    pub fn used(&self) -> Extensions {
        self.used
    }

    /// Returns whether the session was stopped, or its token was refused permanently.
    pub fn is_stopped(&self) -> bool {
        self.phase == Phase::Stopped
    }

    /// Returns the next time at which [`Input::Time`] has an effect.
    pub fn due(&self) -> Option<Instant> {
        let phase = match self.phase {
            Phase::Waiting { until } | Phase::Connecting { until } | Phase::AwaitingAck { until } => {
                Some(until)
            }
            Phase::Up | Phase::Stopped => None,
        };
        let dial = self.dials_due.front().map(|(until, ..)| *until);
        phase.into_iter().chain(dial).min()
    }

    /// Handles an event and appends the actions.
    pub fn on(&mut self, input: Input, now: Instant, out: &mut Vec<Action>) {
        if self.phase == Phase::Stopped {
            return self.on_after_stop(input, out);
        }
        self.handle(input, now, out);
        // Deadlines of answered dials are removed, so that they cause no wake-up and do not accumulate.
        while let Some((_, stream, key)) = self.dials_due.front()
            && self.streams.get(stream) != Some(&Stream::Opening { key: *key })
        {
            self.dials_due.pop_front();
        }
    }

    fn handle(&mut self, input: Input, now: Instant, out: &mut Vec<Action>) {
        match input {
            Input::Time => self.on_time(now, out),
            Input::Opened(proof) => self.on_opened(proof, now, out),
            Input::Lost(why) => self.on_lost(&why, now, out),
            Input::Text(message) => self.on_text(message, now, out),
            Input::Binary(stream, frame) if self.used.binary => {
                self.on_text(ToHost::Relay(stream, frame), now, out);
            }
            Input::Binary(..) => {}
            Input::Dial(key, port) => self.dial(key, port, now, out),
            Input::ChannelClosed(channel) => self.close_channel(channel, out),
            Input::Result(result) => {
                if self.phase == Phase::Up && self.announced.contains(&result.port) {
                    out.push(Action::Send(ToContainer::ForwardResult(result)));
                }
            }
            Input::StreamEnded(stream) => drop(self.streams.remove(&stream)),
            Input::Stop => {
                self.stop(out);
                out.push(Action::Notice("stopped".to_owned()));
            }
        }
    }

    /// Refuses dials after the stop.
    fn on_after_stop(&mut self, input: Input, out: &mut Vec<Action>) {
        if let Input::Dial(key, _) = input {
            out.push(Action::Refuse { key, why: DialFailure::Refused });
        }
    }

    fn on_time(&mut self, now: Instant, out: &mut Vec<Action>) {
        match self.phase {
            Phase::Waiting { until } if until <= now => {
                self.phase = Phase::Connecting { until: now + CONNECT_MAX };
                out.push(Action::Connect);
            }
            Phase::Connecting { until } if until <= now => {
                out.push(Action::Disconnect);
                self.on_lost(&format!("no answer within {} s", CONNECT_MAX.as_secs()), now, out);
            }
            Phase::AwaitingAck { until } if until <= now => {
                out.push(Action::Disconnect);
                self.on_lost(
                    &format!("no answer to the hello within {} s", HELLO_ANSWER_MAX.as_secs()),
                    now,
                    out,
                );
            }
            _ => {}
        }
        while let Some((_, stream, key)) = self.dials_due.pop_front_if(|(until, ..)| *until <= now) {
            self.abandon(stream, key, DialFailure::TimedOut, out);
        }
    }

    fn on_opened(&mut self, proof: Option<String>, now: Instant, out: &mut Vec<Action>) {
        if !matches!(self.phase, Phase::Connecting { .. }) {
            return;
        }
        self.has_answered = proof.is_some();
        let credential = match proof {
            Some(proof) => Credential::Proof(proof),
            None if self.must_answer => {
                out.push(Action::Disconnect);
                return self.on_lost(NO_ANSWER, now, out);
            }
            None => Credential::Token(self.token.reveal().to_owned()),
        };
        self.phase = Phase::AwaitingAck { until: now + HELLO_ANSWER_MAX };
        self.used = Extensions::NONE;
        self.listening.clear();
        self.announced.clear();
        out.push(Action::Send(ToContainer::Hello { credential, extensions: self.offered }));
    }

    /// Handles a lost connection, or a failed attempt. Clients still receive the data of streams that the container had
    /// closed.
    fn on_lost(&mut self, why: &str, now: Instant, out: &mut Vec<Action>) {
        if matches!(self.phase, Phase::Waiting { .. }) {
            return;
        }
        let was_up = self.phase == Phase::Up;
        self.end_streams(|stream| stream != Stream::Flushing, out);
        if was_up {
            out.push(Action::Announce(Announcement::Down));
        }
        let (why, known) = (self.sanitised(why), &mut self.reported.failures);
        if !known.contains(&why) && known.len() < REASONS_MAX {
            let what = if was_up { "the connection is lost" } else { "cannot connect" };
            out.push(Action::Notice(format!("{what}, and is tried again until it works: {why}")));
            known.push(why);
        }
        self.schedule_attempt(now);
    }

    fn schedule_attempt(&mut self, now: Instant) {
        let delay = RETRY_DELAYS[self.failures.min(RETRY_DELAYS.len() - 1)];
        self.failures = self.failures.saturating_add(1);
        self.phase = Phase::Waiting { until: now + delay };
    }

    fn on_text(&mut self, message: ToHost, now: Instant, out: &mut Vec<Action>) {
        match (self.phase, message) {
            (Phase::AwaitingAck { .. }, ToHost::HelloAck { extensions }) => self.on_accepted(extensions, out),
            (Phase::AwaitingAck { .. } | Phase::Up, ToHost::HelloNack { reason }) => {
                self.on_refused(&reason, now, out);
            }
            (Phase::Up, message) => self.on_message(message, out),
            // Messages before the answer to the hello are ignored.
            _ => {}
        }
    }

    fn on_accepted(&mut self, extensions: Extensions, out: &mut Vec<Action>) {
        self.phase = Phase::Up;
        self.used = self.offered.and(extensions);
        self.failures = 0;
        self.reported = Reported::default();
        out.push(Action::Notice("connected".to_owned()));
        if self.has_answered && !std::mem::replace(&mut self.must_answer, true) {
            out.push(Action::Answered);
        }
        out.push(Action::Announce(Announcement::Up));
        out.push(Action::Send(ToContainer::Subscribe));
    }

    fn on_refused(&mut self, reason: &str, now: Instant, out: &mut Vec<Action>) {
        let sanitised = self.sanitised(reason);
        if FATAL_REFUSALS.contains(&reason) {
            self.stop(out);
            out.push(Action::Notice(format!("the token is refused, and not presented again: {sanitised}")));
            out.push(Action::Rejected(reason.to_owned()));
            return;
        }
        out.push(Action::Disconnect);
        if !std::mem::replace(&mut self.reported.refusal, true) {
            out.push(Action::Notice(format!("the hello is refused for now: {sanitised}")));
        }
        // The refusal was already reported.
        self.reported.failures.push(sanitised);
        self.on_lost(reason, now, out);
        self.reported.failures.pop();
    }

    /// Handles a message of a container that has accepted the hello.
    fn on_message(&mut self, message: ToHost, out: &mut Vec<Action>) {
        match message {
            ToHost::Snapshot(listeners) => {
                // Listeners that forwarding already has come first, so that new ones do not displace them at the limit.
                let known = std::mem::take(&mut self.listening);
                let (before, new): (Vec<_>, Vec<_>) =
                    listeners.into_iter().partition(|listener| known.contains(&listener.port));
                let opened =
                    before.into_iter().chain(new).filter(|listener| self.record_listener(listener.port, out));
                let opened = opened.collect();
                listening(opened, Vec::new(), true, out);
            }
            ToHost::Opened(listener) => {
                if self.listening.contains(&listener.port) || self.record_listener(listener.port, out) {
                    listening(vec![listener], Vec::new(), false, out);
                }
            }
            ToHost::Closed(port) => {
                if self.listening.remove(&port) {
                    listening(Vec::new(), vec![port], false, out);
                }
            }
            ToHost::ForwardRequest { target, candidates, reason: _ } => {
                self.announced.insert(target);
                out.push(Action::Announce(Announcement::Reserve { target, candidates }));
            }
            ToHost::OpenAck(stream) => self.on_ack(stream, out),
            ToHost::OpenNack { stream, reason: _ } => {
                if let Some(Stream::Opening { key }) = self.streams.get(&stream).copied() {
                    self.refuse(stream, key, DialFailure::Refused, out);
                }
            }
            ToHost::Relay(stream, frame) => self.relay(stream, frame, out),
            // A second answer to the hello is ignored.
            ToHost::HelloAck { .. } | ToHost::HelloNack { .. } => {}
        }
    }

    fn dial(&mut self, key: DialKey, port: NonZeroU16, now: Instant, out: &mut Vec<Action>) {
        if self.phase != Phase::Up {
            return out.push(Action::Refuse { key, why: DialFailure::Refused });
        }
        if self.streams.len() >= STREAMS_MAX {
            return out.push(Action::Refuse { key, why: DialFailure::Exhausted });
        }
        let stream = self.number();
        self.streams.insert(stream, Stream::Opening { key });
        self.dials_due.push_back((now + DIAL_MAX, stream, key));
        out.push(Action::Send(ToContainer::Open { stream, port }));
    }

    /// Returns the next free stream number. One is always free, since there are far fewer streams than numbers.
    fn number(&mut self) -> StreamId {
        loop {
            let stream = StreamId(self.next_stream);
            self.next_stream = if self.next_stream >= STREAM_ID_MAX { 1 } else { self.next_stream + 1 };
            if !self.streams.contains_key(&stream) {
                return stream;
            }
        }
    }

    fn on_ack(&mut self, stream: StreamId, out: &mut Vec<Action>) {
        match self.streams.get_mut(&stream) {
            Some(state @ Stream::Opening { .. }) => {
                let Stream::Opening { key } = std::mem::replace(state, Stream::Open) else { return };
                out.push(Action::StartStream { stream, key });
            }
            Some(Stream::Open | Stream::Flushing) => {}
            // The dial was abandoned in the meantime, so the container closes its connection.
            None => out.push(close(stream)),
        }
    }

    fn relay(&mut self, stream: StreamId, frame: Frame, out: &mut Vec<Action>) {
        let Some(state) = self.streams.get_mut(&stream) else { return };
        let ends = match &frame {
            Frame::Data(payload) if payload.is_empty() => return,
            Frame::Credit(_) if !self.used.credit => return,
            Frame::Eof if !self.used.half_close => return,
            Frame::Reset if !self.used.reset => return,
            Frame::Data(_) | Frame::Credit(_) | Frame::Eof => false,
            Frame::Close(_) | Frame::Reset => true,
        };
        match *state {
            Stream::Opening { key } if ends => self.refuse(stream, key, DialFailure::Refused, out),
            Stream::Opening { .. } => out.push(Action::Deliver(stream, frame)),
            Stream::Open => {
                if ends {
                    *state = Stream::Flushing;
                }
                out.push(Action::Deliver(stream, frame));
            }
            Stream::Flushing => {}
        }
    }

    /// Removes a stream that is not open yet, and refuses its dial.
    fn refuse(&mut self, stream: StreamId, key: DialKey, why: DialFailure, out: &mut Vec<Action>) {
        self.streams.remove(&stream);
        out.push(Action::ResetStream(stream));
        out.push(Action::Refuse { key, why });
    }

    /// Refuses the dial of an opening stream, and closes the stream in the container. The reference implementation
    /// handles this close only after it has connected, so its late ack is answered with another close.
    fn abandon(&mut self, stream: StreamId, key: DialKey, why: DialFailure, out: &mut Vec<Action>) {
        if self.streams.get(&stream) == Some(&Stream::Opening { key }) {
            self.refuse(stream, key, why, out);
            out.push(close(stream));
        }
    }

    fn close_channel(&mut self, channel: u64, out: &mut Vec<Action>) {
        let waiting: Vec<(StreamId, DialKey)> = self
            .streams
            .iter()
            .filter_map(|(stream, state)| match state {
                Stream::Opening { key } if key.channel == channel => Some((*stream, *key)),
                _ => None,
            })
            .collect();
        for (stream, key) in waiting {
            self.abandon(stream, key, DialFailure::Refused, out);
        }
    }

    /// Records that a port listens. Returns whether to pass it on to forwarding: it was not recorded before, and fewer
    /// than [`LISTENING_MAX`] others are. A port above that limit is reported to the container as excluded.
    fn record_listener(&mut self, port: NonZeroU16, out: &mut Vec<Action>) -> bool {
        if self.listening.contains(&port) {
            return false;
        }
        if self.listening.len() < LISTENING_MAX {
            self.announced.insert(port);
            return self.listening.insert(port);
        }
        let result = ForwardResult { port, result: Err(EXCLUDED.to_owned()) };
        out.push(Action::Send(ToContainer::ForwardResult(result)));
        false
    }

    /// Ends the streams that `which` selects, without a message to the container.
    fn end_streams(&mut self, which: impl Fn(Stream) -> bool, out: &mut Vec<Action>) {
        self.streams.retain(|stream, state| {
            if !which(*state) {
                return true;
            }
            out.push(Action::ResetStream(*stream));
            if let Stream::Opening { key } = state {
                out.push(Action::Refuse { key: *key, why: DialFailure::Refused });
            }
            false
        });
        self.dials_due.clear();
    }

    fn stop(&mut self, out: &mut Vec<Action>) {
        self.end_streams(|_| true, out);
        self.phase = Phase::Stopped;
        out.push(Action::Disconnect);
    }

    /// Formats a text of the peer for a notice: at most [`TEXT_CHARS_MAX`] characters on one line, and without the
    /// token, which the peer knows.
    fn sanitised(&self, text: &str) -> String {
        let text = text.replace(self.token.reveal(), "***");
        escape(&text).chars().take(TEXT_CHARS_MAX).collect()
    }
}

fn listening(opened: Vec<Announced>, closed: Vec<NonZeroU16>, whole: bool, out: &mut Vec<Action>) {
    out.push(Action::Announce(Announcement::Listening { opened, closed, whole }));
}

/// Returns the message that closes a stream from the host's side.
fn close(stream: StreamId) -> Action {
    Action::Send(ToContainer::Relay(stream, Frame::Close(Side::Downstream)))
}

#[cfg(test)]
mod tests;
