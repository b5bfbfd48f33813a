//! The session of one broker on the host's side (wire specification, A.3 and A.6). Pure: what happened and the time go in,
//! what has to be done comes out.
//!
//! ```text
//!            due            opened, hello said         ack
//!  Resting ───────► Connecting ───────► Greeting ───────► Up
//!     ▲  1, 2, 4, 10, 10 … s │              │             │
//!     └──────────────────────┴──────────────┴─────────────┘  failed, lost, refused for now, no answer in time
//!                                                         stop, token refused ──► Stopped, from anywhere
//! ```
//!
//! A session lives across the losses of its WebSocket. What it numbers streams with goes on; what it knows of the container
//! does not: each connection begins with nothing announced and no stream open.
//!
//! | stream | what it waits for | which ends it |
//! | --- | --- | --- |
//! | opening | the container's answer, for [`DIAL_MAX`] | a nack, a close, the time, the loss: the dial is refused |
//! | open | either end | its pump, which tells the container itself; the loss cuts it |
//! | flushing | its client, which still takes what the container sent before its close | its pump; a loss of the WebSocket does not matter to it |
//!
//! What never happens: the token sent to a container that must answer a challenge; a message before the hello or, but for the hello, before its answer is yes; a number that is in use
//! given to another stream; a dial with two answers or none; a result for a port that was not announced over this
//! connection; a connection attempt beside another one, or after the stop.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::num::NonZeroU16;
use std::time::{Duration, Instant};

use landfall_engine::opener::DialFailure;

use super::message::{Credential, Extensions, Frame, Side, StreamId, ToContainer, ToHost};
use crate::forwarding::broker_link::Announcement;
use crate::model::announcement::{Announced, EXCLUDED, ForwardResult};
use crate::model::name::escape;
use crate::model::registration::Token;

/// How long a connection attempt may take, from the look-up of the port to the open WebSocket (wire specification, A.6.1).
pub const CONNECT_MAX: Duration = Duration::from_secs(15);
/// How long the container may take to answer the hello. The specification has no bound; one that is silent would be waited
/// for until it ends.
pub const GREETING_MAX: Duration = Duration::from_secs(15);
/// How long the container may take to answer a `relay-open`: as long as the engine lets its client wait for any server.
pub const DIAL_MAX: Duration = Duration::from_secs(10);
/// How many streams one container has at most, those that are opening or flushing among them. One more is refused.
pub const STREAMS_MAX: usize = 4_096;
/// How long to rest after the first failure in a row, the second, and so on; the last one for ever (wire specification,
/// A.6.2). An answered hello begins anew.
const RESTS: [Duration; 4] =
    [Duration::from_secs(1), Duration::from_secs(2), Duration::from_secs(4), Duration::from_secs(10)];
/// The highest number of a stream; 1 comes after it (wire specification, A.3.6).
const STREAM_ID_MAX: i64 = 2_147_483_647;
/// The refusals after which the token is not presented again (wire specification, A.3.4).
const FATAL_REFUSALS: [&str; 2] = ["invalid token", "expected broker-hello first"];
/// The reason when a container that must answer a challenge does not answer it.
const NO_ANSWER: &str = "the program there does not prove that it is this container, which has to prove it; it got no \
                         token (if it is landfall agent of an earlier release, put this one into the image)";
/// The number of different reasons that are reported for one outage.
const REASONS_MAX: usize = 4;
/// The most listeners of one container that are passed on to forwarding. Each takes memory there for a few bytes of the
/// container's, and no more than a quarter of them can be forwarded.
pub const LISTENING_MAX: usize = 1_024;
/// How much of a container's own words is told to people, in characters.
const WORDS_CHARS_MAX: usize = 200;

/// Which dial of which of the engine's channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DialKey {
    /// The channel, as its server numbered it; no number is given twice.
    pub channel: u64,
    /// The dial, as the engine numbered it on that channel.
    pub dial: u64,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// Nothing but time.
    Time,
    /// The attempt succeeded: a WebSocket is open. The other end has proved that it holds the token, and this is our own
    /// proof; or it was not able to, as a peer of the reference.
    Opened(Option<String>),
    /// The attempt failed, or the WebSocket is lost; why, for people.
    Lost(String),
    /// A text message came.
    Text(ToHost),
    /// Something on a stream came in a binary frame.
    Binary(StreamId, Frame),
    /// The engine wants a connection to this port of the container.
    Dial(DialKey, NonZeroU16),
    /// The engine has closed a channel: nobody waits for its dials.
    ChannelClosed(u64),
    /// Forwarding knows what became of a port.
    Result(ForwardResult),
    /// A stream's pump is done. It has told the container what there was to tell.
    StreamEnded(StreamId),
    /// The broker is to end.
    Stop,
}

/// What has to be done, in this order.
#[derive(Debug)]
pub enum Action {
    /// Begin a connection attempt: look up the port, connect, shake hands.
    Connect,
    /// Abandon the attempt, or close the WebSocket.
    Disconnect,
    /// Say this to the container.
    Say(ToContainer),
    /// Tell forwarding.
    Announce(Announcement),
    /// The container reached its server: answer the dial with a socket, and begin the stream's pump. What was delivered
    /// for the stream already comes first.
    Begin {
        /// The stream.
        stream: StreamId,
        /// The dial that waits for it.
        key: DialKey,
    },
    /// Answer a dial: no connection.
    Refuse {
        /// The dial.
        key: DialKey,
        /// Why.
        why: DialFailure,
    },
    /// Something came for a stream that is opening or open.
    Deliver(StreamId, Frame),
    /// Cut a stream off, if it has begun, and forget what was delivered for it.
    Cut(StreamId),
    /// Tell people.
    Notice(String),
    /// The container has answered a challenge for the first time: from now on it has to.
    Answered,
    /// The token was refused for good, for this reason; nothing follows.
    Rejected(String),
}

/// Where the connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Resting { until: Instant },
    Connecting { until: Instant },
    Greeting { until: Instant },
    Up,
    Stopped,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stream {
    Opening { key: DialKey },
    Open,
    Flushing,
}

/// One broker's session.
#[derive(Debug)]
pub struct Session {
    token: Token,
    /// The container has to answer a challenge, and never gets the token.
    must_answer: bool,
    /// It has done so over this connection.
    has_answered: bool,
    offered: Extensions,
    used: Extensions,
    phase: Phase,
    /// Failures in a row.
    failures: usize,
    /// What people were told of the present outage.
    told: Told,
    streams: BTreeMap<StreamId, Stream>,
    /// When dials have waited long enough, the earliest first. Those behind one that waits may be answered.
    dials_due: VecDeque<(Instant, StreamId, DialKey)>,
    next_stream: i64,
    /// The ports that listen, as forwarding knows them from this connection.
    listening: BTreeSet<NonZeroU16>,
    /// The ports that the container announced or asked for over this connection: those that it is sent results of.
    announced: BTreeSet<NonZeroU16>,
}

/// What was reported of an outage: each reason once.
#[derive(Clone, Debug, Default)]
struct Told {
    failures: Vec<String>,
    refusal: bool,
}

impl Session {
    /// A session that connects at once and presents `token`, or proves that it holds it. A container that `must_answer` a
    /// challenge never gets the token itself.
    pub fn new(token: Token, must_answer: bool, offered: Extensions, now: Instant) -> Session {
        Session {
            token,
            must_answer,
            has_answered: false,
            offered,
            used: Extensions::NONE,
            phase: Phase::Resting { until: now },
            failures: 0,
            told: Told::default(),
            streams: BTreeMap::new(),
            dials_due: VecDeque::new(),
            next_stream: 1,
            listening: BTreeSet::new(),
            announced: BTreeSet::new(),
        }
    }

    /// The extensions in use: those that both sides listed.
    pub fn used(&self) -> Extensions {
        self.used
    }

    /// Whether it was told to stop, or was refused for good.
    pub fn is_stopped(&self) -> bool {
        self.phase == Phase::Stopped
    }

    /// When [`Input::Time`] has something to do.
    pub fn due(&self) -> Option<Instant> {
        let phase = match self.phase {
            Phase::Resting { until } | Phase::Connecting { until } | Phase::Greeting { until } => Some(until),
            Phase::Up | Phase::Stopped => None,
        };
        let dial = self.dials_due.front().map(|(until, ..)| *until);
        phase.into_iter().chain(dial).min()
    }

    /// Takes in what happened.
    pub fn on(&mut self, input: Input, now: Instant, out: &mut Vec<Action>) {
        if self.phase == Phase::Stopped {
            return self.on_after_stop(input, out);
        }
        self.take(input, now, out);
        // Nobody wakes up for a dial that was answered, and those that were do not pile up.
        while let Some((_, stream, key)) = self.dials_due.front()
            && self.streams.get(stream) != Some(&Stream::Opening { key: *key })
        {
            self.dials_due.pop_front();
        }
    }

    fn take(&mut self, input: Input, now: Instant, out: &mut Vec<Action>) {
        match input {
            Input::Time => self.pass_time(now, out),
            Input::Opened(proof) => self.greet(proof, now, out),
            Input::Lost(why) => self.lose(&why, now, out),
            Input::Text(message) => self.hear(message, now, out),
            Input::Binary(stream, frame) if self.used.binary => {
                self.hear(ToHost::Relay(stream, frame), now, out);
            }
            Input::Binary(..) => {}
            Input::Dial(key, port) => self.dial(key, port, now, out),
            Input::ChannelClosed(channel) => self.close_channel(channel, out),
            Input::Result(result) => {
                if self.phase == Phase::Up && self.announced.contains(&result.port) {
                    out.push(Action::Say(ToContainer::ForwardResult(result)));
                }
            }
            Input::StreamEnded(stream) => drop(self.streams.remove(&stream)),
            Input::Stop => {
                self.stop(out);
                out.push(Action::Notice("stopped".to_owned()));
            }
        }
    }

    /// Whoever dials still gets an answer.
    fn on_after_stop(&mut self, input: Input, out: &mut Vec<Action>) {
        if let Input::Dial(key, _) = input {
            out.push(Action::Refuse { key, why: DialFailure::Refused });
        }
    }

    fn pass_time(&mut self, now: Instant, out: &mut Vec<Action>) {
        match self.phase {
            Phase::Resting { until } if until <= now => {
                self.phase = Phase::Connecting { until: now + CONNECT_MAX };
                out.push(Action::Connect);
            }
            Phase::Connecting { until } if until <= now => {
                out.push(Action::Disconnect);
                self.lose(&format!("no answer within {} s", CONNECT_MAX.as_secs()), now, out);
            }
            Phase::Greeting { until } if until <= now => {
                out.push(Action::Disconnect);
                self.lose(&format!("no answer to the hello within {} s", GREETING_MAX.as_secs()), now, out);
            }
            _ => {}
        }
        while let Some((_, stream, key)) = self.dials_due.pop_front_if(|(until, ..)| *until <= now) {
            self.abandon(stream, key, DialFailure::TimedOut, out);
        }
    }

    fn greet(&mut self, proof: Option<String>, now: Instant, out: &mut Vec<Action>) {
        if !matches!(self.phase, Phase::Connecting { .. }) {
            return;
        }
        self.has_answered = proof.is_some();
        let credential = match proof {
            Some(proof) => Credential::Proof(proof),
            None if self.must_answer => {
                out.push(Action::Disconnect);
                return self.lose(NO_ANSWER, now, out);
            }
            None => Credential::Token(self.token.reveal().to_owned()),
        };
        self.phase = Phase::Greeting { until: now + GREETING_MAX };
        self.used = Extensions::NONE;
        self.listening.clear();
        self.announced.clear();
        out.push(Action::Say(ToContainer::Hello { credential, extensions: self.offered }));
    }

    /// The connection is gone, or never was. What the container had sent whole is still taken by its clients.
    fn lose(&mut self, why: &str, now: Instant, out: &mut Vec<Action>) {
        if matches!(self.phase, Phase::Resting { .. }) {
            return;
        }
        let was_up = self.phase == Phase::Up;
        self.end_streams(|stream| stream != Stream::Flushing, out);
        if was_up {
            out.push(Action::Announce(Announcement::Down));
        }
        let (why, known) = (self.shown(why), &mut self.told.failures);
        if !known.contains(&why) && known.len() < REASONS_MAX {
            let what = if was_up { "the connection is lost" } else { "cannot connect" };
            out.push(Action::Notice(format!("{what}, and is tried again until it works: {why}")));
            known.push(why);
        }
        self.rest(now);
    }

    fn rest(&mut self, now: Instant) {
        let rest = RESTS[self.failures.min(RESTS.len() - 1)];
        self.failures = self.failures.saturating_add(1);
        self.phase = Phase::Resting { until: now + rest };
    }

    fn hear(&mut self, message: ToHost, now: Instant, out: &mut Vec<Action>) {
        match (self.phase, message) {
            (Phase::Greeting { .. }, ToHost::HelloAck { extensions }) => self.come_up(extensions, out),
            (Phase::Greeting { .. } | Phase::Up, ToHost::HelloNack { reason }) => {
                self.be_refused(&reason, now, out);
            }
            (Phase::Up, message) => self.obey(message, out),
            // Nothing counts before the hello is answered.
            _ => {}
        }
    }

    fn come_up(&mut self, extensions: Extensions, out: &mut Vec<Action>) {
        self.phase = Phase::Up;
        self.used = self.offered.and(extensions);
        self.failures = 0;
        self.told = Told::default();
        out.push(Action::Notice("connected".to_owned()));
        if self.has_answered && !std::mem::replace(&mut self.must_answer, true) {
            out.push(Action::Answered);
        }
        out.push(Action::Announce(Announcement::Up));
        out.push(Action::Say(ToContainer::Subscribe));
    }

    fn be_refused(&mut self, reason: &str, now: Instant, out: &mut Vec<Action>) {
        let shown = self.shown(reason);
        if FATAL_REFUSALS.contains(&reason) {
            self.stop(out);
            out.push(Action::Notice(format!("the token is refused, and not presented again: {shown}")));
            out.push(Action::Rejected(reason.to_owned()));
            return;
        }
        out.push(Action::Disconnect);
        if !std::mem::replace(&mut self.told.refusal, true) {
            out.push(Action::Notice(format!("the hello is refused for now: {shown}")));
        }
        // The refusal was reported already.
        self.told.failures.push(shown);
        self.lose(reason, now, out);
        self.told.failures.pop();
    }

    /// A message of a container that knows us.
    fn obey(&mut self, message: ToHost, out: &mut Vec<Action>) {
        match message {
            ToHost::Snapshot(listeners) => {
                // Those that forwarding knows come first, so that none of them is lost to a new one.
                let known = std::mem::take(&mut self.listening);
                let (before, new): (Vec<_>, Vec<_>) =
                    listeners.into_iter().partition(|listener| known.contains(&listener.port));
                let opened =
                    before.into_iter().chain(new).filter(|listener| self.listens(listener.port, out));
                let opened = opened.collect();
                listening(opened, Vec::new(), true, out);
            }
            ToHost::Opened(listener) => {
                if self.listening.contains(&listener.port) || self.listens(listener.port, out) {
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
            ToHost::OpenAck(stream) => self.begin(stream, out),
            ToHost::OpenNack { stream, reason: _ } => {
                if let Some(Stream::Opening { key }) = self.streams.get(&stream).copied() {
                    self.refuse(stream, key, DialFailure::Refused, out);
                }
            }
            ToHost::Relay(stream, frame) => self.relay(stream, frame, out),
            // One answer is enough.
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
        out.push(Action::Say(ToContainer::Open { stream, port }));
    }

    /// The next number that is free. There is one: streams are far fewer than numbers.
    fn number(&mut self) -> StreamId {
        loop {
            let stream = StreamId(self.next_stream);
            self.next_stream = if self.next_stream >= STREAM_ID_MAX { 1 } else { self.next_stream + 1 };
            if !self.streams.contains_key(&stream) {
                return stream;
            }
        }
    }

    fn begin(&mut self, stream: StreamId, out: &mut Vec<Action>) {
        match self.streams.get_mut(&stream) {
            Some(state @ Stream::Opening { .. }) => {
                let Stream::Opening { key } = std::mem::replace(state, Stream::Open) else { return };
                out.push(Action::Begin { stream, key });
            }
            Some(Stream::Open | Stream::Flushing) => {}
            // Its dial was given up meanwhile: the container is not to keep a connection that nobody wants.
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

    /// Forgets a stream that was never open, and answers its dial.
    fn refuse(&mut self, stream: StreamId, key: DialKey, why: DialFailure, out: &mut Vec<Action>) {
        self.streams.remove(&stream);
        out.push(Action::Cut(stream));
        out.push(Action::Refuse { key, why });
    }

    /// The same, and the container need not try any longer. A container of the reference only heeds this once it has
    /// connected, so its late ack is answered with a close again.
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

    /// Notes that a port listens. Returns whether forwarding is to know it: it was not noted before, and fewer than
    /// [`LISTENING_MAX`] others were. A port beyond those is excluded.
    fn listens(&mut self, port: NonZeroU16, out: &mut Vec<Action>) -> bool {
        if self.listening.contains(&port) {
            return false;
        }
        if self.listening.len() < LISTENING_MAX {
            self.announced.insert(port);
            return self.listening.insert(port);
        }
        let result = ForwardResult { port, result: Err(EXCLUDED.to_owned()) };
        out.push(Action::Say(ToContainer::ForwardResult(result)));
        false
    }

    /// Ends those streams that `which` names, without a word to the container.
    fn end_streams(&mut self, which: impl Fn(Stream) -> bool, out: &mut Vec<Action>) {
        self.streams.retain(|stream, state| {
            if !which(*state) {
                return true;
            }
            out.push(Action::Cut(*stream));
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

    /// A text of the other side as it is shown to people: short, on one line, and without the token, which it knows.
    fn shown(&self, text: &str) -> String {
        let text = text.replace(self.token.reveal(), "***");
        escape(&text).chars().take(WORDS_CHARS_MAX).collect()
    }
}

fn listening(opened: Vec<Announced>, closed: Vec<NonZeroU16>, whole: bool, out: &mut Vec<Action>) {
    out.push(Action::Announce(Announcement::Listening { opened, closed, whole }));
}

/// The host's side ends a stream.
fn close(stream: StreamId) -> Action {
    Action::Say(ToContainer::Relay(stream, Frame::Close(Side::Downstream)))
}

#[cfg(test)]
mod tests;
