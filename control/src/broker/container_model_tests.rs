//! A model test: for any sequence of events, the actions of a session are consistent.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

/// An event of a session.
#[derive(Clone, Debug)]
enum SessionEvent {
    ReceivedMessage(ReceivedMessage),
    Reading(Vec<WireListener>),
    /// The outcome of the connect attempt at this index among those in progress.
    Connected(usize, bool),
    Over(usize),
    Requested(u16),
    HelloDue,
    Gone,
}

fn frames() -> impl Strategy<Value = Frame> {
    prop_oneof![
        Just(data("x")),
        Just(Frame::Close(Side::Downstream)),
        Just(Frame::Credit(1)),
        Just(Frame::Eof),
        Just(Frame::Reset),
    ]
}

fn events() -> impl Strategy<Value = SessionEvent> {
    let stream = || 1..5_i64;
    let number = || 1..6_u16;
    let extensions = prop_oneof![Just(Extensions::NONE), Just(Extensions::ALL)];
    let token = prop_oneof![9 => Just(TOKEN), 1 => Just("wrong")];
    let message = prop_oneof![
        4 => (token, extensions).prop_map(|(token, extensions)| ToContainer::Hello { credential: Credential::Token(token.to_owned()), extensions }),
        2 => Just(ToContainer::Subscribe),
        1 => Just(ToContainer::Unsubscribe),
        1 => number().prop_map(|number| ToContainer::ForwardResult(ForwardResult { port: port(number), result: Ok(port(number)) })),
        5 => (stream(), number()).prop_map(|(stream, number)| ToContainer::Open { stream: StreamId(stream), port: port(number) }),
        5 => (stream(), frames()).prop_map(|(stream, frame)| ToContainer::Relay(StreamId(stream), frame)),
    ];
    let received = prop_oneof![
        20 => message.prop_map(ReceivedMessage::Message),
        1 => Just(ReceivedMessage::UnknownType),
        1 => Just(ReceivedMessage::NotAMessage("invalid json".to_owned())),
        1 => stream().prop_map(|stream| ReceivedMessage::InvalidOpen(StreamId(stream))),
    ];
    let reading = proptest::collection::btree_map(1..9_u16, any_bool(), 0..6).prop_shuffle_rows();
    prop_oneof![
        10 => received.prop_map(SessionEvent::ReceivedMessage),
        4 => reading.prop_map(SessionEvent::Reading),
        6 => (0..4_usize, any_bool()).prop_map(|(which, ok)| SessionEvent::Connected(which, ok)),
        2 => (0..4_usize).prop_map(SessionEvent::Over),
        1 => number().prop_map(SessionEvent::Requested),
        1 => Just(SessionEvent::HelloDue),
        1 => Just(SessionEvent::Gone),
    ]
}

fn any_bool() -> proptest::bool::Any {
    proptest::bool::ANY
}

/// Shuffled rows.
trait Rows {
    fn prop_shuffle_rows(self) -> BoxedStrategy<Vec<WireListener>>;
}

impl<S: Strategy<Value = BTreeMap<u16, bool>> + 'static> Rows for S {
    fn prop_shuffle_rows(self) -> BoxedStrategy<Vec<WireListener>> {
        let bind = |loopback| if loopback { BindAddr::Loopback } else { BindAddr::Any };
        self.prop_map(move |rows| {
            rows.into_iter().map(|(number, loopback)| listener(number, bind(loopback))).collect::<Vec<_>>()
        })
        .prop_shuffle()
        .boxed()
    }
}

/// The state of a shell that performs every action of a session.
#[derive(Default)]
struct World {
    let_in: bool,
    closed: bool,
    watching: bool,
    /// Connect attempts without an outcome, with their streams.
    connecting: Vec<(Attempt, StreamId)>,
    abandoned: BTreeSet<Attempt>,
    /// Running pumps.
    pumps: BTreeMap<StreamId, Attempt>,
    /// The ports that the host knows to be listening.
    host: Option<BTreeSet<NonZeroU16>>,
}

impl World {
    fn perform(&mut self, actions: Vec<Action>, outcome_of: Option<(Attempt, StreamId)>) {
        for action in actions {
            assert!(!self.closed, "{action:?} after the end");
            match action {
                Action::Accept(_) => self.let_in = true,
                Action::Close { .. } => self.closed = true,
                Action::Watch => {
                    assert!(self.let_in && !self.watching);
                    self.watching = true;
                    self.host = None;
                }
                Action::StopWatch => {
                    assert!(self.watching);
                    self.watching = false;
                }
                Action::Connect { attempt, stream, .. } => {
                    assert!(self.let_in && !self.pumps.contains_key(&stream));
                    self.connecting.push((attempt, stream));
                }
                Action::Abandon(attempt) => {
                    assert!(self.connecting.iter().any(|(known, _)| *known == attempt));
                    self.abandoned.insert(attempt);
                }
                Action::Relay(attempt, stream) => {
                    assert_eq!(outcome_of, Some((attempt, stream)), "the attempt has a socket");
                    assert!(!self.abandoned.contains(&attempt), "the stream was closed");
                    assert_eq!(self.pumps.insert(stream, attempt), None);
                }
                Action::Deliver(stream, _) => assert!(self.pumps.contains_key(&stream)),
                Action::Forget(stream) => assert!(self.pumps.remove(&stream).is_some()),
                Action::Send(ToHost::Snapshot(all)) => {
                    assert!(self.watching && self.host.is_none());
                    self.host = Some(all.iter().map(|one| one.port).collect());
                }
                Action::Send(ToHost::Opened(one)) => {
                    assert!(self.host.as_mut().expect("a snapshot precedes changes").insert(one.port));
                }
                Action::Send(ToHost::Closed(one)) => {
                    assert!(self.host.as_mut().expect("a snapshot precedes changes").remove(&one));
                }
                Action::Send(ToHost::HelloAck { .. } | ToHost::HelloNack { .. }) => assert!(!self.let_in),
                Action::Send(_) | Action::Result(_) => assert!(self.let_in),
                Action::Log(_) => {}
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn for_any_events_the_actions_are_consistent(events in proptest::collection::vec(events(), 0..80)) {
        let (mut session, mut reserved, mut world) = (session(), Reserved::default(), World::default());
        for event in events {
            let mut outcome_of = None;
            let actions = match event {
                SessionEvent::ReceivedMessage(received) => session.on_message(received, &reserved),
                SessionEvent::Reading(reading) => {
                    let ports = reading.iter().map(|one| one.port).collect();
                    let actions = session.on_reading(reading);
                    world.perform(actions, None);
                    if world.watching {
                        prop_assert_eq!(world.host.as_ref(), Some(&ports), "the host has the current listeners");
                    }
                    continue;
                }
                SessionEvent::Connected(which, ok) if which < world.connecting.len() => {
                    let (attempt, stream) = world.connecting.remove(which);
                    outcome_of = Some((attempt, stream));
                    session.on_connect_outcome(attempt, stream, if ok { Ok(()) } else { Err("no".to_owned()) })
                }
                SessionEvent::Over(which) => {
                    let Some((&stream, &attempt)) = world.pumps.iter().nth(which) else { continue };
                    session.on_pump_end(attempt, stream, None)
                }
                SessionEvent::Requested(target) => {
                    reserved.insert(request(target, None));
                    session.on_request(&reserved)
                }
                SessionEvent::HelloDue => session.on_hello_timeout(),
                SessionEvent::Gone => {
                    let actions = session.on_disconnect();
                    world.perform(actions, None);
                    prop_assert!(world.pumps.is_empty() && !world.watching, "no pump and no watch remains");
                    prop_assert!(world.connecting.iter().all(|(attempt, _)| world.abandoned.contains(attempt)));
                    world.closed = true;
                    continue;
                }
                SessionEvent::Connected(..) => continue,
            };
            world.perform(actions, outcome_of);
        }
    }
}
