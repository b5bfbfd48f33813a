//! The rows of the wire specification, A.14, "container-server", as far as they are the session's; those about sockets are
//! told again by the agent's own tests. Then a model, with random inputs.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::broker::challenge::Challenge;
use crate::broker::message::Side;

const TOKEN: &str = "right-token";

fn port(number: u16) -> NonZeroU16 {
    NonZeroU16::new(number).unwrap()
}

fn session() -> Session {
    Session::new(Token::new(TOKEN).unwrap(), None)
}

fn hello(token: &str) -> Heard {
    hello_with(token, Extensions::NONE)
}

fn hello_with(token: &str, extensions: Extensions) -> Heard {
    Heard::Message(ToContainer::Hello { credential: Credential::Token(token.to_owned()), extensions })
}

#[test]
fn a_proof_counts_once_its_challenge_was_answered_and_no_other_one_does() {
    let name = crate::model::registration::ContainerName::new("shop").unwrap();
    let challenge = || Challenge::new(name.clone(), [1; 32]);
    let answer = || challenge().answer(Token::new(TOKEN).unwrap(), [2; 32]);
    let proof = challenge().check(&Token::new(TOKEN).unwrap(), &answer().header()).unwrap();
    let hello = |proof: &str| {
        let credential = Credential::Proof(proof.to_owned());
        Heard::Message(ToContainer::Hello { credential, extensions: Extensions::NONE })
    };
    let with = |answer| Session::new(Token::new(TOKEN).unwrap(), answer);
    let lets_in = |mut session: Session, heard| {
        session.heard(heard, &Reserved::default());
        session.is_authenticated()
    };
    assert!(lets_in(with(Some(answer())), hello(&proof)));
    assert!(lets_in(with(Some(answer())), hello_with(TOKEN, Extensions::NONE)), "a host of the reference");
    assert!(!lets_in(with(None), hello(&proof)));
    let own = answer().header().rsplit(' ').next().unwrap().to_owned();
    for wrong in [own.as_str(), TOKEN, ""] {
        assert!(!lets_in(with(Some(answer())), hello(wrong)), "{wrong}");
    }
    let later = challenge().answer(Token::new(TOKEN).unwrap(), [3; 32]);
    assert!(!lets_in(with(Some(later)), hello(&proof)), "of an earlier connection");
}

fn says(session: &mut Session, message: ToContainer) -> Vec<Ask> {
    session.heard(Heard::Message(message), &Reserved::default())
}

fn authenticated_with(extensions: Extensions) -> Session {
    let mut session = session();
    session.heard(hello_with(TOKEN, extensions), &Reserved::default());
    assert!(session.is_authenticated());
    session
}

fn authenticated() -> Session {
    authenticated_with(Extensions::NONE)
}

/// What is said to the host, alone.
fn said(asks: Vec<Ask>) -> Vec<ToHost> {
    asks.into_iter()
        .filter_map(|ask| match ask {
            Ask::Say(message) => Some(message),
            _ => None,
        })
        .collect()
}

fn listener(number: u16, bind_addr: BindAddr) -> WireListener {
    WireListener { port: port(number), bind_addr }
}

fn any(ports: &[u16]) -> Vec<WireListener> {
    ports.iter().map(|&number| listener(number, BindAddr::Any)).collect()
}

fn told(number: u16) -> Announced {
    Announced { port: port(number), loopback: false }
}

fn data(text: &'static str) -> Frame {
    Frame::Data(Bytes::from_static(text.as_bytes()))
}

/// The attempt that `relay-open` began.
fn open(session: &mut Session, stream: i64, number: u16) -> Attempt {
    let asks = says(session, ToContainer::Open { stream: StreamId(stream), port: port(number) });
    match asks[..] {
        [Ask::Connect { attempt, stream: of, port: to }] => {
            assert_eq!((of, to), (StreamId(stream), port(number)));
            attempt
        }
        _ => panic!("{asks:?}"),
    }
}

fn opened(session: &mut Session, stream: i64) -> Attempt {
    let attempt = open(session, stream, 5173);
    let asks = session.connected(attempt, StreamId(stream), Ok(()));
    assert_eq!(asks, [Ask::Say(ToHost::OpenAck(StreamId(stream))), Ask::Relay(attempt, StreamId(stream))]);
    attempt
}

fn request(target: u16, reason: Option<&str>) -> ForwardRequest {
    let candidates = vec![port(target), port(target + 1)];
    ForwardRequest { target: port(target), candidates, reason: reason.map(str::to_owned) }
}

#[test]
fn rejects_non_hello_first_message() {
    for first in [Heard::Message(ToContainer::Subscribe), Heard::OtherType, Heard::Unfit("x".to_owned())] {
        let mut session = session();
        let expected = [
            Ask::Tell(ContainerEvent::AuthFailed { reason: "first message was not broker-hello" }),
            Ask::Say(ToHost::HelloNack { reason: "expected broker-hello first".to_owned() }),
            Ask::Close { code: 1008, reason: "auth required" },
        ];
        assert_eq!(session.heard(first, &Reserved::default()), expected);
        assert_eq!(session.heard(hello(TOKEN), &Reserved::default()), [], "it is too late");
    }
}

#[test]
fn rejects_hello_with_wrong_token() {
    for wrong in [hello("wrong-token"), hello(""), Heard::TokenlessHello] {
        let expected = [
            Ask::Tell(ContainerEvent::AuthFailed { reason: "token mismatch" }),
            Ask::Say(ToHost::HelloNack { reason: "invalid token".to_owned() }),
            Ask::Close { code: 1008, reason: "invalid token" },
        ];
        let mut session = session();
        assert_eq!(session.heard(wrong, &Reserved::default()), expected);
        assert_eq!(session.heard(hello(TOKEN), &Reserved::default()), []);
    }
}

#[test]
fn accepts_hello_with_correct_token() {
    let mut session = session();
    let ack = |extensions| Ask::Say(ToHost::HelloAck { extensions });
    let expected = [ack(Extensions::NONE), Ask::LetIn(Extensions::NONE), Ask::Tell(ContainerEvent::Authed)];
    assert_eq!(session.heard(hello(TOKEN), &Reserved::default()), expected);
    for again in [hello(TOKEN), hello("wrong-token"), Heard::TokenlessHello] {
        assert_eq!(session.heard(again, &Reserved::default()), [], "a second hello is ignored");
    }
    assert!(session.is_authenticated());
}

#[test]
fn extensions_are_listed_to_who_lists_some_and_used_where_both_do() {
    let credit = Extensions { credit: true, ..Extensions::NONE };
    let mut session = session();
    let asks = session.heard(hello_with(TOKEN, credit), &Reserved::default());
    assert_eq!(asks[0], Ask::Say(ToHost::HelloAck { extensions: Extensions::ALL }));
    assert_eq!(asks[1], Ask::LetIn(credit));
}

#[test]
fn who_says_no_hello_in_time_is_closed_without_a_nack() {
    let mut session = session();
    assert_eq!(session.heard(Heard::Noise("invalid json".to_owned()), &Reserved::default()).len(), 1);
    let asks = session.hello_is_due();
    assert!(matches!(asks[..], [Ask::Tell(_), Ask::Close { code: 1008, .. }]), "{asks:?}");
    assert_eq!(session.heard(hello(TOKEN), &Reserved::default()), []);
    assert_eq!(authenticated().hello_is_due(), []);
}

#[test]
fn subscribe_sends_a_snapshot_of_current_listen_ports() {
    let mut session = authenticated();
    let asks = says(&mut session, ToContainer::Subscribe);
    assert_eq!(asks, [Ask::Watch, Ask::Tell(ContainerEvent::Subscribed)]);
    assert_eq!(says(&mut session, ToContainer::Subscribe), [], "a second one does nothing");
    assert_eq!(session.reading(any(&[5173])), [Ask::Say(ToHost::Snapshot(vec![told(5173)]))]);
}

#[test]
fn an_empty_reading_is_a_snapshot_too() {
    let mut session = authenticated();
    says(&mut session, ToContainer::Subscribe);
    assert_eq!(session.reading(Vec::new()), [Ask::Say(ToHost::Snapshot(Vec::new()))]);
    assert_eq!(session.reading(Vec::new()), []);
}

#[test]
fn emits_port_listen_opened_and_closed_across_polling_ticks() {
    let mut session = authenticated();
    says(&mut session, ToContainer::Subscribe);
    session.reading(any(&[1, 2, 3]));
    let expected =
        [ToHost::Opened(told(9)), ToHost::Opened(told(8)), ToHost::Closed(port(1)), ToHost::Closed(port(3))];
    assert_eq!(
        said(session.reading(any(&[9, 2, 8]))),
        expected,
        "the new in their order, then the old in theirs"
    );
    assert_eq!(session.reading(any(&[9, 2, 8])), []);
    let moved = vec![listener(9, BindAddr::Loopback), listener(2, BindAddr::Any), listener(8, BindAddr::Any)];
    assert_eq!(session.reading(moved), [], "where it is bound is no difference");
}

#[test]
fn unsubscribe_stops_the_polling_timer() {
    let mut session = authenticated();
    assert_eq!(says(&mut session, ToContainer::Unsubscribe), [], "nobody watches");
    says(&mut session, ToContainer::Subscribe);
    session.reading(any(&[5173]));
    let asks = says(&mut session, ToContainer::Unsubscribe);
    assert_eq!(asks, [Ask::Unwatch, Ask::Tell(ContainerEvent::Unsubscribed)]);
    assert_eq!(session.reading(any(&[])), [], "a late reading says nothing");
    says(&mut session, ToContainer::Subscribe);
    assert_eq!(said(session.reading(any(&[7]))), [ToHost::Snapshot(vec![told(7)])], "a fresh snapshot");
}

#[test]
fn relay_open_succeeds_and_acks() {
    let mut session = authenticated();
    for stream in [1, -1, i64::MAX, 0] {
        opened(&mut session, stream);
    }
}

#[test]
fn relay_open_failure_sends_nack_with_reason() {
    let mut session = authenticated();
    let attempt = open(&mut session, 7, 5173);
    let reason = "ECONNREFUSED: Connection refused".to_owned();
    let nack = ToHost::OpenNack { stream: StreamId(7), reason: reason.clone() };
    let event = ContainerEvent::RelayOpenFailed { stream_id: 7, port: 5173, reason: reason.clone() };
    let asks = session.connected(attempt, StreamId(7), Err(reason));
    assert_eq!(asks, [Ask::Say(nack), Ask::Tell(event)]);
    open(&mut session, 7, 5173);
}

#[test]
fn an_id_in_use_and_a_port_that_is_none_are_nacked() {
    let mut session = authenticated();
    opened(&mut session, 7);
    let asks = said(says(&mut session, ToContainer::Open { stream: StreamId(7), port: port(80) }));
    assert!(matches!(asks[..], [ToHost::OpenNack { stream: StreamId(7), .. }]), "{asks:?}");
    let asks = said(session.heard(Heard::UnfitOpen(StreamId(8)), &Reserved::default()));
    assert!(matches!(asks[..], [ToHost::OpenNack { stream: StreamId(8), .. }]), "{asks:?}");
    let frame = ToContainer::Relay(StreamId(7), data("x"));
    assert_eq!(says(&mut session, frame), [Ask::Deliver(StreamId(7), data("x"))], "the stream goes on");
}

#[test]
fn relay_data_flows_from_the_host_after_open_and_is_dropped_before() {
    let mut session = authenticated();
    let frame = || ToContainer::Relay(StreamId(1), data("bytes"));
    assert_eq!(says(&mut session, frame()), [], "an unknown stream");
    let attempt = open(&mut session, 1, 5173);
    assert_eq!(says(&mut session, frame()), [], "a stream that connects");
    session.connected(attempt, StreamId(1), Ok(()));
    assert_eq!(says(&mut session, frame()), [Ask::Deliver(StreamId(1), data("bytes"))]);
}

#[test]
fn relay_close_from_host_ends_the_upstream_connection_and_says_nothing() {
    let mut session = authenticated();
    let attempt = opened(&mut session, 1);
    let close = Frame::Close(Side::Downstream);
    let asks = says(&mut session, ToContainer::Relay(StreamId(1), close.clone()));
    assert_eq!(asks, [Ask::Deliver(StreamId(1), close.clone()), Ask::Forget(StreamId(1))]);
    assert_eq!(says(&mut session, ToContainer::Relay(StreamId(1), close)), []);
    assert_eq!(session.over(attempt, StreamId(1), None), []);
}

#[test]
fn relay_close_during_connect_drops_the_connection_without_an_ack() {
    let mut session = authenticated();
    let first = open(&mut session, 1, 5173);
    let close = ToContainer::Relay(StreamId(1), Frame::Close(Side::Downstream));
    assert_eq!(says(&mut session, close), [Ask::Abandon(first)]);
    assert_eq!(session.connected(first, StreamId(1), Ok(())), [], "no ack, no pump");
    let second = open(&mut session, 1, 5173);
    assert_eq!(session.connected(first, StreamId(1), Ok(())), [], "nor for the next stream of that id");
    assert_eq!(session.connected(second, StreamId(1), Ok(())).len(), 2);
}

#[test]
fn the_end_of_an_upstream_frees_its_id() {
    let mut session = authenticated();
    let attempt = opened(&mut session, 1);
    assert_eq!(session.over(attempt, StreamId(1), None), [Ask::Forget(StreamId(1))]);
    let next = opened(&mut session, 1);
    assert_eq!(session.over(attempt, StreamId(1), None), [], "the end of another stream");
    let asks = session.over(next, StreamId(1), Some("EPIPE".to_owned()));
    let event = ContainerEvent::RelayDataError { stream_id: 1, reason: "EPIPE".to_owned() };
    assert_eq!(asks, [Ask::Forget(StreamId(1)), Ask::Tell(event)]);
}

#[test]
fn frames_of_extensions_that_were_not_agreed_are_ignored() {
    let frames = [Frame::Eof, Frame::Credit(9), Frame::Reset];
    for frame in &frames {
        let mut session = authenticated();
        opened(&mut session, 1);
        assert_eq!(says(&mut session, ToContainer::Relay(StreamId(1), frame.clone())), []);
        let mut session = authenticated_with(Extensions::ALL);
        opened(&mut session, 1);
        let asks = says(&mut session, ToContainer::Relay(StreamId(1), frame.clone()));
        assert_eq!(asks[0], Ask::Deliver(StreamId(1), frame.clone()));
    }
    let mut session = authenticated_with(Extensions::ALL);
    let attempt = open(&mut session, 1, 5173);
    assert_eq!(says(&mut session, ToContainer::Relay(StreamId(1), Frame::Reset)), [Ask::Abandon(attempt)]);
}

#[test]
fn close_ends_all_open_upstreams_and_the_watcher() {
    let mut session = authenticated();
    says(&mut session, ToContainer::Subscribe);
    opened(&mut session, 1);
    opened(&mut session, 2);
    let attempt = open(&mut session, 3, 5173);
    let asks = session.gone();
    assert_eq!(asks[0], Ask::Unwatch);
    for expected in [Ask::Forget(StreamId(1)), Ask::Forget(StreamId(2)), Ask::Abandon(attempt)] {
        assert!(asks.contains(&expected), "{asks:?}");
    }
    assert_eq!(asks.len(), 4);
    assert_eq!(session.connected(attempt, StreamId(3), Ok(())), []);
    assert_eq!(session.reading(any(&[1])), []);
    assert_eq!(session.gone(), []);
}

#[test]
fn forwards_results_to_who_waits_and_none_before_the_hello() {
    let results = [Ok(port(5173)), Err("policy excluded".to_owned())];
    for result in results {
        let result = ForwardResult { port: port(5173), result };
        let mut session = authenticated();
        let asks = says(&mut session, ToContainer::ForwardResult(result.clone()));
        assert_eq!(asks, [Ask::Result(result.clone())]);
        let mut stranger = crate::broker::container::tests::session();
        let asks = says(&mut stranger, ToContainer::ForwardResult(result));
        assert!(!asks.iter().any(|ask| matches!(ask, Ask::Result(_))), "{asks:?}");
    }
}

#[test]
fn a_published_request_is_sent_after_the_hello_and_never_before() {
    let mut reserved = Reserved::default();
    let mut session = session();
    assert!(reserved.remember(request(4848, Some("dashboard"))));
    assert_eq!(session.requested(&reserved), []);
    let asks = said(session.heard(hello(TOKEN), &reserved));
    let message = request(4848, Some("dashboard")).message();
    assert_eq!(asks, [ToHost::HelloAck { extensions: Extensions::NONE }, message.clone()]);
    assert_eq!(session.requested(&reserved), [], "it was told once");
    assert!(reserved.remember(request(5000, None)));
    assert_eq!(said(session.requested(&reserved)), [request(5000, None).message()]);
    assert!(reserved.remember(request(4848, Some("dashboard"))));
    assert_eq!(said(session.requested(&reserved)), [message], "whoever asks again is answered again");
}

#[test]
fn a_reconnect_repeats_the_requests_in_their_first_order() {
    let mut reserved = Reserved::default();
    for target in [300, 100, 200] {
        assert!(reserved.remember(request(target, None)));
    }
    assert!(reserved.remember(request(300, Some("newer"))));
    let mut session = session();
    let asks = said(session.heard(hello(TOKEN), &reserved));
    let expected = [
        ToHost::HelloAck { extensions: Extensions::NONE },
        request(300, Some("newer")).message(),
        request(100, None).message(),
        request(200, None).message(),
    ];
    assert_eq!(asks, expected);
}

#[test]
fn nonsense_is_told_for_a_while_and_closes_nothing() {
    let mut session = authenticated();
    let mut lines = 0;
    for _ in 0..1000 {
        lines += session.heard(Heard::Noise("invalid json".to_owned()), &Reserved::default()).len();
        lines += session.heard(Heard::Unfit("relay-data: bytes".to_owned()), &Reserved::default()).len();
    }
    assert_eq!(lines, usize::try_from(UNEXPECTED_MAX).unwrap());
    assert!(session.is_authenticated());
}

#[test]
fn streams_are_bounded() {
    let mut session = authenticated();
    for stream in 0..i64::try_from(STREAMS_MAX).unwrap() {
        open(&mut session, stream, 1);
    }
    let asks = said(says(&mut session, ToContainer::Open { stream: StreamId(-1), port: port(1) }));
    assert!(matches!(asks[..], [ToHost::OpenNack { .. }]), "{asks:?}");
}

/// Anything that can happen to a session.
#[derive(Clone, Debug)]
enum Happening {
    Heard(Heard),
    Reading(Vec<WireListener>),
    /// The outcome of the attempt with this place among those under way.
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

fn happenings() -> impl Strategy<Value = Happening> {
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
    let heard = prop_oneof![
        20 => message.prop_map(Heard::Message),
        1 => Just(Heard::OtherType),
        1 => Just(Heard::Noise("invalid json".to_owned())),
        1 => stream().prop_map(|stream| Heard::UnfitOpen(StreamId(stream))),
    ];
    let reading = proptest::collection::btree_map(1..9_u16, any_bool(), 0..6).prop_shuffle_rows();
    prop_oneof![
        10 => heard.prop_map(Happening::Heard),
        4 => reading.prop_map(Happening::Reading),
        6 => (0..4_usize, any_bool()).prop_map(|(which, ok)| Happening::Connected(which, ok)),
        2 => (0..4_usize).prop_map(Happening::Over),
        1 => number().prop_map(Happening::Requested),
        1 => Just(Happening::HelloDue),
        1 => Just(Happening::Gone),
    ]
}

fn any_bool() -> proptest::bool::Any {
    proptest::bool::ANY
}

/// Rows in any order.
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

/// What whoever obeys a session would have.
#[derive(Default)]
struct World {
    let_in: bool,
    closed: bool,
    watching: bool,
    /// Attempts that were asked for and have no outcome yet, with their streams.
    connecting: Vec<(Attempt, StreamId)>,
    abandoned: BTreeSet<Attempt>,
    /// Pumps that run.
    pumps: BTreeMap<StreamId, Attempt>,
    /// What the host knows to listen.
    host: Option<BTreeSet<NonZeroU16>>,
}

impl World {
    fn obey(&mut self, asks: Vec<Ask>, outcome_of: Option<(Attempt, StreamId)>) {
        for ask in asks {
            assert!(!self.closed, "{ask:?} after the end");
            match ask {
                Ask::LetIn(_) => self.let_in = true,
                Ask::Close { .. } => self.closed = true,
                Ask::Watch => {
                    assert!(self.let_in && !self.watching);
                    self.watching = true;
                    self.host = None;
                }
                Ask::Unwatch => {
                    assert!(self.watching);
                    self.watching = false;
                }
                Ask::Connect { attempt, stream, .. } => {
                    assert!(self.let_in && !self.pumps.contains_key(&stream));
                    self.connecting.push((attempt, stream));
                }
                Ask::Abandon(attempt) => {
                    assert!(self.connecting.iter().any(|(known, _)| *known == attempt));
                    self.abandoned.insert(attempt);
                }
                Ask::Relay(attempt, stream) => {
                    assert_eq!(outcome_of, Some((attempt, stream)), "a socket is there");
                    assert!(!self.abandoned.contains(&attempt), "a stream that was closed");
                    assert_eq!(self.pumps.insert(stream, attempt), None);
                }
                Ask::Deliver(stream, _) => assert!(self.pumps.contains_key(&stream)),
                Ask::Forget(stream) => assert!(self.pumps.remove(&stream).is_some()),
                Ask::Say(ToHost::Snapshot(all)) => {
                    assert!(self.watching && self.host.is_none());
                    self.host = Some(all.iter().map(|one| one.port).collect());
                }
                Ask::Say(ToHost::Opened(one)) => {
                    assert!(self.host.as_mut().expect("a snapshot came first").insert(one.port));
                }
                Ask::Say(ToHost::Closed(one)) => {
                    assert!(self.host.as_mut().expect("a snapshot came first").remove(&one));
                }
                Ask::Say(ToHost::HelloAck { .. } | ToHost::HelloNack { .. }) => assert!(!self.let_in),
                Ask::Say(_) | Ask::Result(_) => assert!(self.let_in),
                Ask::Tell(_) => {}
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_the_world_is_consistent(happenings in proptest::collection::vec(happenings(), 0..80)) {
        let (mut session, mut reserved, mut world) = (session(), Reserved::default(), World::default());
        for happening in happenings {
            let mut outcome_of = None;
            let asks = match happening {
                Happening::Heard(heard) => session.heard(heard, &reserved),
                Happening::Reading(reading) => {
                    let ports = reading.iter().map(|one| one.port).collect();
                    let asks = session.reading(reading);
                    world.obey(asks, None);
                    if world.watching {
                        prop_assert_eq!(world.host.as_ref(), Some(&ports), "the host knows what listens");
                    }
                    continue;
                }
                Happening::Connected(which, ok) if which < world.connecting.len() => {
                    let (attempt, stream) = world.connecting.remove(which);
                    outcome_of = Some((attempt, stream));
                    session.connected(attempt, stream, if ok { Ok(()) } else { Err("no".to_owned()) })
                }
                Happening::Over(which) => {
                    let Some((&stream, &attempt)) = world.pumps.iter().nth(which) else { continue };
                    session.over(attempt, stream, None)
                }
                Happening::Requested(target) => {
                    reserved.remember(request(target, None));
                    session.requested(&reserved)
                }
                Happening::HelloDue => session.hello_is_due(),
                Happening::Gone => {
                    let asks = session.gone();
                    world.obey(asks, None);
                    prop_assert!(world.pumps.is_empty() && !world.watching, "nothing is left");
                    prop_assert!(world.connecting.iter().all(|(attempt, _)| world.abandoned.contains(attempt)));
                    world.closed = true;
                    continue;
                }
                Happening::Connected(..) => continue,
            };
            world.obey(asks, outcome_of);
        }
    }
}
