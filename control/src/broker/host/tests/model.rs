//! A model test: for any sequence of events, the session keeps the invariants of its documentation.

use proptest::prelude::*;

use super::*;

/// Generates events from a small range of numbers, so that they interact.
fn inputs() -> impl Strategy<Value = (Input, u64)> {
    let stream = || (0_i64..12).prop_map(StreamId);
    let port = || (1_u16..6).prop_map(at);
    let frame = prop_oneof![
        Just(Frame::Data(Bytes::from_static(b"x"))),
        Just(Frame::Close(Side::Upstream)),
        Just(Frame::Credit(1)),
        Just(Frame::Eof),
        Just(Frame::Reset),
    ];
    let extensions = prop_oneof![Just(Extensions::ALL), Just(Extensions::NONE)];
    let reason = prop_oneof![30 => Just("busy"), 1 => Just("invalid token")];
    let message = prop_oneof![
        4 => extensions.prop_map(|extensions| ToHost::HelloAck { extensions }),
        1 => reason.prop_map(|reason| ToHost::HelloNack { reason: reason.to_owned() }),
        2 => prop::collection::vec(port(), 0..4).prop_map(|ports| {
            ToHost::Snapshot(ports.into_iter().map(|port| Announced { port, loopback: false }).collect())
        }),
        2 => port().prop_map(|port| ToHost::Opened(Announced { port, loopback: true })),
        1 => port().prop_map(ToHost::Closed),
        1 => port().prop_map(|target| ToHost::ForwardRequest { target, candidates: vec![target], reason: None }),
        8 => stream().prop_map(ToHost::OpenAck),
        2 => stream().prop_map(|stream| ToHost::OpenNack { stream, reason: String::new() }),
        8 => (stream(), frame).prop_map(|(stream, frame)| ToHost::Relay(stream, frame)),
    ];
    let input = prop_oneof![
        6 => Just(Input::Time),
        6 => prop_oneof![Just(None), Just(Some("proof".to_owned()))].prop_map(Input::Opened),
        2 => Just(lost()),
        30 => message.prop_map(Input::Text),
        2 => stream().prop_map(|stream| Input::Binary(stream, Frame::Data(Bytes::from_static(b"x")))),
        10 => (1_u64..3, port()).prop_map(|(channel, port)| Input::Dial(DialKey { channel, dial: 0 }, port)),
        1 => (1_u64..3).prop_map(Input::ChannelClosed),
        3 => port().prop_map(|port| Input::Result(ForwardResult { port, result: Ok(port) })),
        4 => stream().prop_map(Input::StreamEnded),
    ];
    (input, prop_oneof![3 => Just(0), 1 => 0_u64..12_000])
}

/// The state of a session as derived from its messages and actions.
#[derive(Default)]
struct Model {
    attempt: bool,
    open: bool,
    greeted: bool,
    up: bool,
    stopped: bool,
    /// Whether the peer has answered the challenge over this connection.
    answered: bool,
    must_answer: bool,
    /// Streams from their opening until they are reset or have ended, and whether their pump was started.
    streams: BTreeMap<StreamId, bool>,
    unanswered: BTreeSet<DialKey>,
    announced: BTreeSet<NonZeroU16>,
}

impl Model {
    /// Returns whether the event is possible: an attempt that was not started does not succeed, and a stream without a
    /// pump does not end.
    fn is_possible(&self, input: &Input) -> bool {
        match input {
            Input::Opened(_) => self.attempt,
            Input::Lost(_) => self.attempt || self.open,
            Input::Text(_) | Input::Binary(..) => self.open,
            Input::StreamEnded(stream) => self.streams.get(stream) == Some(&true),
            _ => true,
        }
    }

    fn record_input(&mut self, input: &Input) {
        match input {
            Input::Opened(proof) => {
                (self.attempt, self.open, self.answered) = (false, true, proof.is_some());
            }
            Input::Lost(_) => (self.attempt, self.open, self.greeted) = (false, false, false),
            Input::StreamEnded(stream) => drop(self.streams.remove(stream)),
            Input::Dial(key, _) => assert!(self.unanswered.insert(*key)),
            Input::Stop => self.stopped = true,
            Input::Text(ToHost::Snapshot(listeners)) if self.up => {
                self.announced.extend(listeners.iter().map(|listener| listener.port));
            }
            Input::Text(
                ToHost::Opened(Announced { port, .. }) | ToHost::ForwardRequest { target: port, .. },
            ) if self.up => {
                self.announced.insert(*port);
            }
            _ => {}
        }
    }

    fn record_action(&mut self, action: &Action) {
        match action {
            Action::Connect => {
                assert!(!self.attempt && !self.open && !self.stopped);
                self.attempt = true;
            }
            Action::Disconnect => (self.attempt, self.open, self.greeted) = (false, false, false),
            Action::Send(ToContainer::Hello { credential, .. }) => {
                assert!(self.open && !self.greeted);
                match credential {
                    Credential::Token(_) => assert!(!self.must_answer && !self.answered),
                    Credential::Proof(_) => assert!(self.answered),
                }
                self.greeted = true;
                self.announced.clear();
            }
            Action::Send(message) => {
                assert!(self.open && self.up, "{message:?}");
                match message {
                    ToContainer::Open { stream, .. } => {
                        assert!((1..=STREAM_ID_MAX).contains(&stream.0));
                        assert_eq!(self.streams.insert(*stream, false), None, "{stream:?} is in use");
                    }
                    ToContainer::ForwardResult(result) => assert!(self.announced.contains(&result.port)),
                    _ => {}
                }
            }
            Action::Announce(Announcement::Up) => assert!(!std::mem::replace(&mut self.up, true)),
            Action::Announce(Announcement::Down) => assert!(std::mem::replace(&mut self.up, false)),
            Action::Announce(_) => assert!(self.up),
            Action::StartStream { stream, key } => {
                assert_eq!(self.streams.insert(*stream, true), Some(false));
                assert!(self.unanswered.remove(key));
            }
            Action::Refuse { key, .. } => assert!(self.unanswered.remove(key)),
            Action::Deliver(stream, _) => assert!(self.streams.contains_key(stream)),
            Action::ResetStream(stream) => assert!(self.streams.remove(stream).is_some()),
            Action::Notice(text) => assert!(!text.contains(TOKEN)),
            Action::Answered => assert!(self.answered && !std::mem::replace(&mut self.must_answer, true)),
            Action::Rejected(_) => assert!(!std::mem::replace(&mut self.stopped, true)),
        }
    }
}

proptest! {
    #[test]
    fn for_any_events_the_session_keeps_its_invariants(
        events in prop::collection::vec(inputs(), 0..100),
        first in prop_oneof![Just(1), Just(STREAM_ID_MAX - 3)],
    ) {
        let mut bench = Bench::new(Extensions::ALL);
        bench.session.next_stream = first;
        let mut model = Model::default();
        let mut dials = 0;
        let stop = (Input::Stop, 0);
        for (mut input, later) in events.into_iter().chain([stop]) {
            bench.now += Duration::from_millis(later);
            if let Input::Dial(key, _) = &mut input {
                dials += 1;
                key.dial = dials;
            }
            if let Input::Text(ToHost::OpenAck(stream) | ToHost::Relay(stream, _))
                | Input::StreamEnded(stream) = &mut input
                && first != 1 && stream.0 > 4
            {
                stream.0 += STREAM_ID_MAX - 8;
            }
            if model.is_possible(&input) {
                model.record_input(&input);
                bench.on(input);
                for action in std::mem::take(&mut bench.out) {
                    model.record_action(&action);
                }
            }
        }
        prop_assert!(model.unanswered.is_empty());
        prop_assert!(model.streams.is_empty());
        prop_assert_eq!(bench.session.due(), None);
    }
}
