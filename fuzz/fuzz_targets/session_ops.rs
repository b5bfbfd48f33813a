//! Both sides of a broker session, with any sequence of operations: messages before and after the hello, invalid frames,
//! dials, their results, lost connections, time, the stop. The invariants are in the sources of the state machines: no
//! message is sent too early, every dial has one result, no stream id is assigned twice, and every list is bounded.

#![no_main]

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU16;
use std::time::{Duration, Instant};

use landfall::broker::container::{self, Attempt, ContainerEvent, ForwardRequest, ReceivedMessage, Reserved};
use landfall::broker::host::{self, Action, DialKey, Input};
use landfall::broker::message::{
    Credential, Extensions, Frame, StreamId, ToContainer, ToHost, Unreadable, from_binary,
};
use landfall::model::announcement::ForwardResult;
use landfall::model::registration::Token;
use landfall_engine::watch::parse::{BindAddr, WireListener};
use libfuzzer_sys::fuzz_target;

const TOKEN: &str = "the-token-of-this-container";

/// An operation: a kind, a number and some bytes.
type Op = (u8, u16, Vec<u8>);

fuzz_target!(|input: (bool, Vec<Op>)| {
    let (of_host, ops) = input;
    if of_host { drive_host(&ops) } else { drive_container(&ops) }
});

fn port(number: u16) -> NonZeroU16 {
    NonZeroU16::new(number).unwrap_or(NonZeroU16::MIN)
}

fn token() -> Token {
    Token::new(TOKEN).expect("it is not empty")
}

/// Few streams, so that messages hit existing ones; and a few invalid ids.
fn stream(number: u16) -> StreamId {
    StreamId(match number % 16 {
        15 => i64::MIN,
        14 => i64::MAX,
        13 => 0,
        near => i64::from(near) + 1,
    })
}

fn extensions(number: u16) -> Extensions {
    Extensions {
        binary: number & 1 != 0,
        credit: number & 2 != 0,
        half_close: number & 4 != 0,
        reset: number & 8 != 0,
    }
}

fn frame(number: u16, bytes: &[u8]) -> Frame {
    match number / 16 % 5 {
        0 => Frame::Data(bytes.to_vec().into()),
        1 => Frame::Close(landfall::broker::message::Side::Upstream),
        2 => Frame::Credit(u32::from(number)),
        3 => Frame::Eof,
        _ => Frame::Reset,
    }
}

/// The state that the shell of the host's machine would have.
#[derive(Default)]
struct Host {
    /// A connection attempt or a connection exists.
    connected: bool,
    /// The connection is open, and the hello was sent.
    hello_sent: bool,
    /// The peer has answered the challenge of this connection, and in `must_answer`, that of an earlier one.
    has_answered: bool,
    must_answer: bool,
    up: bool,
    stopped: bool,
    /// The dials without a result.
    waiting: BTreeSet<DialKey>,
    dials: u64,
    /// The stream ids in use: opened ones, and those whose pump has started.
    opening: BTreeSet<StreamId>,
    begun: BTreeSet<StreamId>,
}

fn drive_host(ops: &[Op]) {
    let mut now = Instant::now();
    let mut machine = host::Session::new(token(), false, Extensions::ALL, now);
    let mut shell = Host::default();
    for (kind, number, bytes) in ops {
        let input = match kind % 11 {
            0 => {
                now += Duration::from_millis(u64::from(*number));
                Input::Time
            }
            1 if shell.connected && !shell.hello_sent => {
                shell.has_answered = number % 2 == 1;
                Input::Opened(shell.has_answered.then(|| "proof".to_owned()))
            }
            2 if shell.connected => {
                (shell.connected, shell.hello_sent, shell.up) = (false, false, false);
                Input::Lost(String::from_utf8_lossy(bytes).into_owned())
            }
            3 if shell.hello_sent => Input::Text(to_host(*number, bytes)),
            4 if shell.hello_sent => match ToHost::from_text(&String::from_utf8_lossy(bytes)) {
                Ok(Some(message)) => Input::Text(message),
                Ok(None) | Err(_) => continue,
            },
            5 if shell.hello_sent => match from_binary(bytes.clone().into()) {
                Ok(Some((stream, frame))) => Input::Binary(stream, frame),
                Ok(None) | Err(_) => continue,
            },
            6 => {
                shell.dials += 1;
                let key = DialKey { channel: u64::from(number % 3), dial: shell.dials };
                assert!(shell.waiting.insert(key));
                Input::Dial(key, port(*number))
            }
            7 => Input::ChannelClosed(u64::from(number % 3)),
            8 => {
                let result = if bytes.is_empty() { Ok(port(*number)) } else { Err("EADDRINUSE".to_owned()) };
                Input::Result(ForwardResult { port: port(*number), result })
            }
            9 => match shell.begun.pop_first() {
                Some(stream) => Input::StreamEnded(stream),
                None => continue,
            },
            10 => Input::Stop,
            _ => continue,
        };
        let stops = matches!(input, Input::Stop);
        let mut actions = Vec::new();
        machine.on(input, now, &mut actions);
        shell.stopped |= stops;
        for action in actions {
            shell.obey(action);
        }
        assert_eq!(machine.is_stopped(), shell.stopped);
        assert!(shell.opening.len() <= host::STREAMS_MAX);
        assert!(!shell.stopped || shell.waiting.is_empty(), "a dial waits on after the stop");
        assert!(machine.due().is_none_or(|due| due <= now + host::CONNECT_MAX));
    }
    // Every dial has a result after its timeout.
    let mut actions = Vec::new();
    now += host::DIAL_MAX;
    machine.on(Input::Time, now, &mut actions);
    actions.into_iter().for_each(|action| shell.obey(action));
    assert!(shell.waiting.is_empty(), "{:?} wait on", shell.waiting);
}

impl Host {
    fn obey(&mut self, action: Action) {
        match action {
            Action::Connect => {
                assert!(!self.connected && !self.stopped, "an attempt beside another, or after the stop");
                self.connected = true;
            }
            Action::Disconnect => (self.connected, self.hello_sent, self.up) = (false, false, false),
            Action::Send(ToContainer::Hello { credential, .. }) => {
                assert!(self.connected && !self.hello_sent);
                match credential {
                    Credential::Token(token) => {
                        assert!(token == TOKEN && !self.has_answered && !self.must_answer);
                    }
                    Credential::Proof(proof) => assert!(proof == "proof" && self.has_answered),
                }
                self.hello_sent = true;
            }
            Action::Send(message) => self.check_sent(&message),
            Action::Announce(landfall::forwarding::broker_link::Announcement::Up) => {
                assert!(self.hello_sent && !self.up);
                self.up = true;
            }
            Action::Announce(landfall::forwarding::broker_link::Announcement::Down) => {}
            Action::Announce(_) => assert!(self.up, "something was announced before the hello was answered"),
            Action::StartStream { stream, key } => {
                assert!(self.waiting.remove(&key), "a second answer");
                assert!(self.opening.remove(&stream), "a stream that was not opened");
                self.begun.insert(stream);
            }
            Action::Refuse { key, .. } => assert!(self.waiting.remove(&key), "a second answer"),
            Action::Deliver(stream, _) => {
                assert!(self.opening.contains(&stream) || self.begun.contains(&stream));
            }
            Action::ResetStream(stream) => {
                self.opening.remove(&stream);
                self.begun.remove(&stream);
            }
            Action::Notice(text) => assert!(!text.contains(TOKEN), "the token was sent"),
            Action::Answered => {
                assert!(self.has_answered && !self.must_answer);
                self.must_answer = true;
            }
            Action::Rejected(_) => self.stopped = true,
        }
    }

    fn check_sent(&mut self, message: &ToContainer) {
        assert!(self.up, "sent before the hello was answered: {message:?}");
        let text = message.to_text();
        assert_eq!(ToContainer::from_text(&text).as_ref(), Ok(&Some(message.clone())), "{text}");
        if let ToContainer::Open { stream, .. } = message {
            assert!((1..=2_147_483_647).contains(&stream.0));
            assert!(!self.begun.contains(stream), "a number in use");
            assert!(self.opening.insert(*stream), "a number in use");
        }
    }
}

fn to_host(number: u16, bytes: &[u8]) -> ToHost {
    let listener = |byte: &u8| landfall::model::announcement::Announced {
        port: port(u16::from(*byte)),
        loopback: byte.is_multiple_of(2),
    };
    let (stream, port) = (stream(number >> 4), port(number >> 4));
    let first = listener(bytes.first().unwrap_or(&0));
    match number % 10 {
        0 => ToHost::HelloAck { extensions: extensions(number >> 4) },
        1 => ToHost::HelloNack { reason: nack_reason(number >> 4, bytes) },
        2 => ToHost::ForwardRequest { target: port, candidates: vec![port; bytes.len()], reason: None },
        3 => ToHost::Snapshot(bytes.iter().map(listener).collect()),
        4 => ToHost::Opened(first),
        5 => ToHost::Closed(first.port),
        6 | 7 => ToHost::OpenAck(stream),
        8 => ToHost::OpenNack { stream, reason: String::from_utf8_lossy(bytes).into_owned() },
        _ => ToHost::Relay(stream, frame(number, bytes)),
    }
}

fn nack_reason(number: u16, bytes: &[u8]) -> String {
    match number % 8 {
        0 => "invalid token".to_owned(),
        1 => "expected broker-hello first".to_owned(),
        2 => format!("not {TOKEN}"),
        _ => String::from_utf8_lossy(bytes).into_owned(),
    }
}

/// The state that the shell of the container's machine would have.
#[derive(Default)]
struct Container {
    /// The extensions, once the host is authenticated.
    let_in: Option<Extensions>,
    ended: bool,
    watching: bool,
    connecting: BTreeMap<Attempt, StreamId>,
    /// Streams whose pump runs and receives data.
    open: BTreeMap<StreamId, Attempt>,
    /// The running pumps.
    pumps: Vec<(Attempt, StreamId)>,
    unexpected: usize,
}

fn drive_container(ops: &[Op]) {
    let mut machine = container::Session::new(token(), None);
    let mut shell = Container::default();
    let mut reserved = Reserved::default();
    for (kind, number, bytes) in ops {
        let asks = match kind % 9 {
            0 | 1 => machine.on_message(ReceivedMessage::Message(to_container(*number, bytes)), &reserved),
            2 => machine.on_message(heard(&String::from_utf8_lossy(bytes)), &reserved),
            3 => match from_binary(bytes.clone().into()) {
                Ok(Some((stream, frame))) => {
                    machine.on_message(ReceivedMessage::Message(ToContainer::Relay(stream, frame)), &reserved)
                }
                Ok(None) => machine.on_message(ReceivedMessage::UnknownType, &reserved),
                Err(error) => machine.on_message(ReceivedMessage::NotAMessage(error.to_string()), &reserved),
            },
            4 => {
                let candidates = vec![port(*number); bytes.len()];
                reserved.insert(ForwardRequest { target: port(*number), candidates, reason: None });
                assert!(reserved.last() <= ops.len() as u64);
                machine.on_request(&reserved)
            }
            5 if shell.watching => machine.on_reading(bytes.iter().map(reading).collect()),
            6 => match shell.connecting.pop_first() {
                Some((attempt, stream)) => {
                    let outcome = if number % 2 == 0 { Ok(()) } else { Err("ECONNREFUSED".to_owned()) };
                    machine.on_connect_outcome(attempt, stream, outcome)
                }
                None => continue,
            },
            7 => match shell.pumps.pop() {
                Some((attempt, stream)) => {
                    machine.on_pump_end(attempt, stream, (number % 2 == 0).then(|| "EPIPE".to_owned()))
                }
                None => continue,
            },
            8 if number % 8 == 0 => machine.on_disconnect(),
            8 if number % 8 == 1 => machine.on_hello_timeout(),
            _ => continue,
        };
        let is_over = *kind % 9 == 8 && number % 8 == 0;
        shell.obey(asks);
        if is_over {
            assert!(shell.open.is_empty() && shell.connecting.is_empty() && !shell.watching);
            shell.ended = true;
        }
        assert!(shell.open.len() + shell.connecting.len() <= container::STREAMS_MAX);
        assert_eq!(machine.is_authenticated(), shell.let_in.is_some() && !shell.ended);
    }
}

impl Container {
    fn obey(&mut self, asks: Vec<container::Action>) {
        let mut acknowledged = None;
        for ask in asks {
            assert!(
                !self.ended || matches!(ask, container::Action::Log(ContainerEvent::RelayDataError { .. })),
                "{ask:?}"
            );
            if let Some(stream) = acknowledged.take() {
                assert!(
                    matches!(ask, container::Action::Relay(_, of) if of == stream),
                    "an acknowledgement without a socket"
                );
            }
            match ask {
                container::Action::Send(message) => {
                    let first = matches!(message, ToHost::HelloAck { .. } | ToHost::HelloNack { .. });
                    assert!(first != self.let_in.is_some(), "out of its time: {message:?}");
                    let text = message.to_text();
                    assert!(!text.contains(TOKEN));
                    assert_eq!(ToHost::from_text(&text), Ok(Some(message.clone())), "{text}");
                    if let ToHost::OpenAck(stream) = message {
                        acknowledged = Some(stream);
                    }
                }
                container::Action::Accept(extensions) => assert!(self.let_in.replace(extensions).is_none()),
                container::Action::Close { code, .. } => {
                    assert!(self.let_in.is_none() && code == container::REFUSED);
                    self.ended = true;
                }
                container::Action::Log(ContainerEvent::Unexpected { .. }) => {
                    self.unexpected += 1;
                    assert!(self.unexpected <= 100, "the log grows without a bound");
                }
                container::Action::Log(_) => {}
                ask => self.act(ask),
            }
        }
        assert!(acknowledged.is_none(), "an acknowledgement without a socket");
    }

    /// Handles the actions that require an authenticated host.
    fn act(&mut self, ask: container::Action) {
        let extensions = self.let_in.expect("nothing is done before the hello");
        match ask {
            container::Action::Watch => assert!(!std::mem::replace(&mut self.watching, true)),
            container::Action::StopWatch => assert!(std::mem::replace(&mut self.watching, false)),
            container::Action::Connect { attempt, stream, .. } => {
                assert!(!self.open.contains_key(&stream), "the stream is open");
                assert!(self.connecting.insert(attempt, stream).is_none());
            }
            container::Action::Abandon(attempt) => assert!(self.connecting.remove(&attempt).is_some()),
            container::Action::Relay(attempt, stream) => {
                assert!(self.open.insert(stream, attempt).is_none());
                self.pumps.push((attempt, stream));
            }
            container::Action::Deliver(stream, frame) => {
                assert!(self.open.contains_key(&stream), "delivered to an unknown stream");
                assert!(match frame {
                    Frame::Data(_) | Frame::Close(_) => true,
                    Frame::Credit(_) => extensions.credit,
                    Frame::Eof => extensions.half_close,
                    Frame::Reset => extensions.reset,
                });
            }
            container::Action::Forget(stream) => assert!(self.open.remove(&stream).is_some()),
            container::Action::Result(_) => {}
            container::Action::Send(_)
            | container::Action::Accept(_)
            | container::Action::Close { .. }
            | container::Action::Log(_) => {
                unreachable!("dealt with above")
            }
        }
    }
}

fn reading(byte: &u8) -> WireListener {
    let bind_addr = if byte.is_multiple_of(2) { BindAddr::Loopback } else { BindAddr::Any };
    WireListener { port: port(u16::from(byte / 2)), bind_addr }
}

/// Parses a text frame.
fn heard(text: &str) -> ReceivedMessage {
    match ToContainer::from_text(text) {
        Ok(Some(message)) => ReceivedMessage::Message(message),
        Ok(None) => ReceivedMessage::UnknownType,
        Err(Unreadable::Field { kind: "broker-hello", .. }) => ReceivedMessage::TokenlessHello,
        Err(error @ Unreadable::Field { .. }) => ReceivedMessage::InvalidFields(error.to_string()),
        Err(error) => ReceivedMessage::NotAMessage(error.to_string()),
    }
}

fn to_container(number: u16, bytes: &[u8]) -> ToContainer {
    let (stream, port) = (stream(number >> 4), port(number >> 4));
    match number % 10 {
        0 | 1 => ToContainer::Hello {
            credential: Credential::Token(TOKEN.to_owned()),
            extensions: extensions(number >> 4),
        },
        2 => {
            let text = String::from_utf8_lossy(bytes).into_owned();
            let credential = if number & 16 == 0 { Credential::Token(text) } else { Credential::Proof(text) };
            ToContainer::Hello { credential, extensions: Extensions::ALL }
        }
        3 => ToContainer::Subscribe,
        4 => ToContainer::Unsubscribe,
        5 => ToContainer::ForwardResult(ForwardResult { port, result: Ok(port) }),
        6 | 7 => ToContainer::Open { stream, port },
        _ => ToContainer::Relay(stream, frame(number, bytes)),
    }
}
