//! The rows of the wire specification, A.14, "container-server", that concern the session; those about sockets are in
//! the agent's own tests. The module `model` tests random events.

use bytes::Bytes;

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

fn hello(token: &str) -> ReceivedMessage {
    hello_with(token, Extensions::NONE)
}

fn hello_with(token: &str, extensions: Extensions) -> ReceivedMessage {
    ReceivedMessage::Message(ToContainer::Hello {
        credential: Credential::Token(token.to_owned()),
        extensions,
    })
}

#[test]
fn only_the_proof_for_the_answered_challenge_is_accepted() {
    let name = crate::model::registration::ContainerName::new("shop").unwrap();
    let challenge = || Challenge::new(name.clone(), [1; 32]);
    let answer = || challenge().answer(Token::new(TOKEN).unwrap(), [2; 32]);
    let proof = challenge().check(&Token::new(TOKEN).unwrap(), &answer().header()).unwrap();
    let hello = |proof: &str| {
        let credential = Credential::Proof(proof.to_owned());
        ReceivedMessage::Message(ToContainer::Hello { credential, extensions: Extensions::NONE })
    };
    let with = |answer| Session::new(Token::new(TOKEN).unwrap(), answer);
    let is_accepted = |mut session: Session, received| {
        session.on_message(received, &Reserved::default());
        session.is_authenticated()
    };
    assert!(is_accepted(with(Some(answer())), hello(&proof)));
    assert!(
        is_accepted(with(Some(answer())), hello_with(TOKEN, Extensions::NONE)),
        "a host of the reference"
    );
    assert!(!is_accepted(with(None), hello(&proof)));
    let own = answer().header().rsplit(' ').next().unwrap().to_owned();
    for wrong in [own.as_str(), TOKEN, ""] {
        assert!(!is_accepted(with(Some(answer())), hello(wrong)), "{wrong}");
    }
    let later = challenge().answer(Token::new(TOKEN).unwrap(), [3; 32]);
    assert!(!is_accepted(with(Some(later)), hello(&proof)), "the proof of an earlier connection");
}

fn receive(session: &mut Session, message: ToContainer) -> Vec<Action> {
    session.on_message(ReceivedMessage::Message(message), &Reserved::default())
}

fn authenticated_with(extensions: Extensions) -> Session {
    let mut session = session();
    session.on_message(hello_with(TOKEN, extensions), &Reserved::default());
    assert!(session.is_authenticated());
    session
}

fn authenticated() -> Session {
    authenticated_with(Extensions::NONE)
}

/// Returns only the messages to the host.
fn sent_messages(actions: Vec<Action>) -> Vec<ToHost> {
    actions
        .into_iter()
        .filter_map(|action| match action {
            Action::Send(message) => Some(message),
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

fn announced_on_any(number: u16) -> Announced {
    Announced { port: port(number), loopback: false }
}

fn data(text: &'static str) -> Frame {
    Frame::Data(Bytes::from_static(text.as_bytes()))
}

/// Sends a `relay-open`, and returns its connect attempt.
fn open(session: &mut Session, stream: i64, number: u16) -> Attempt {
    let actions = receive(session, ToContainer::Open { stream: StreamId(stream), port: port(number) });
    match actions[..] {
        [Action::Connect { attempt, stream: of, port: to }] => {
            assert_eq!((of, to), (StreamId(stream), port(number)));
            attempt
        }
        _ => panic!("{actions:?}"),
    }
}

fn opened(session: &mut Session, stream: i64) -> Attempt {
    let attempt = open(session, stream, 5173);
    let actions = session.on_connect_outcome(attempt, StreamId(stream), Ok(()));
    assert_eq!(
        actions,
        [Action::Send(ToHost::OpenAck(StreamId(stream))), Action::Relay(attempt, StreamId(stream))]
    );
    attempt
}

fn request(target: u16, reason: Option<&str>) -> ForwardRequest {
    let candidates = vec![port(target), port(target + 1)];
    ForwardRequest { target: port(target), candidates, reason: reason.map(str::to_owned) }
}

#[test]
fn rejects_non_hello_first_message() {
    for first in [
        ReceivedMessage::Message(ToContainer::Subscribe),
        ReceivedMessage::UnknownType,
        ReceivedMessage::InvalidFields("x".to_owned()),
    ] {
        let mut session = session();
        let expected = [
            Action::Log(ContainerEvent::AuthFailed { reason: "first message was not broker-hello" }),
            Action::Send(ToHost::HelloNack { reason: "expected broker-hello first".to_owned() }),
            Action::Close { code: 1008, reason: "auth required" },
        ];
        assert_eq!(session.on_message(first, &Reserved::default()), expected);
        assert_eq!(session.on_message(hello(TOKEN), &Reserved::default()), [], "the session has ended");
    }
}

#[test]
fn rejects_hello_with_wrong_token() {
    for wrong in [hello("wrong-token"), hello(""), ReceivedMessage::TokenlessHello] {
        let expected = [
            Action::Log(ContainerEvent::AuthFailed { reason: "token mismatch" }),
            Action::Send(ToHost::HelloNack { reason: "invalid token".to_owned() }),
            Action::Close { code: 1008, reason: "invalid token" },
        ];
        let mut session = session();
        assert_eq!(session.on_message(wrong, &Reserved::default()), expected);
        assert_eq!(session.on_message(hello(TOKEN), &Reserved::default()), []);
    }
}

#[test]
fn accepts_hello_with_correct_token() {
    let mut session = session();
    let ack = |extensions| Action::Send(ToHost::HelloAck { extensions });
    let expected =
        [ack(Extensions::NONE), Action::Accept(Extensions::NONE), Action::Log(ContainerEvent::Authed)];
    assert_eq!(session.on_message(hello(TOKEN), &Reserved::default()), expected);
    for again in [hello(TOKEN), hello("wrong-token"), ReceivedMessage::TokenlessHello] {
        assert_eq!(session.on_message(again, &Reserved::default()), [], "a second hello is ignored");
    }
    assert!(session.is_authenticated());
}

#[test]
fn extensions_are_listed_for_a_host_that_lists_some_and_used_if_both_list_them() {
    let credit = Extensions { credit: true, ..Extensions::NONE };
    let mut session = session();
    let actions = session.on_message(hello_with(TOKEN, credit), &Reserved::default());
    assert_eq!(actions[0], Action::Send(ToHost::HelloAck { extensions: Extensions::ALL }));
    assert_eq!(actions[1], Action::Accept(credit));
}

#[test]
fn a_host_without_a_hello_in_time_is_closed_without_a_nack() {
    let mut session = session();
    assert_eq!(
        session
            .on_message(ReceivedMessage::NotAMessage("invalid json".to_owned()), &Reserved::default())
            .len(),
        1
    );
    let actions = session.on_hello_timeout();
    assert!(matches!(actions[..], [Action::Log(_), Action::Close { code: 1008, .. }]), "{actions:?}");
    assert_eq!(session.on_message(hello(TOKEN), &Reserved::default()), []);
    assert_eq!(authenticated().on_hello_timeout(), []);
}

#[test]
fn subscribe_sends_a_snapshot_of_current_listen_ports() {
    let mut session = authenticated();
    let actions = receive(&mut session, ToContainer::Subscribe);
    assert_eq!(actions, [Action::Watch, Action::Log(ContainerEvent::Subscribed)]);
    assert_eq!(receive(&mut session, ToContainer::Subscribe), [], "a second one does nothing");
    assert_eq!(
        session.on_reading(any(&[5173])),
        [Action::Send(ToHost::Snapshot(vec![announced_on_any(5173)]))]
    );
}

#[test]
fn an_empty_reading_is_sent_as_a_snapshot() {
    let mut session = authenticated();
    receive(&mut session, ToContainer::Subscribe);
    assert_eq!(session.on_reading(Vec::new()), [Action::Send(ToHost::Snapshot(Vec::new()))]);
    assert_eq!(session.on_reading(Vec::new()), []);
}

#[test]
fn emits_port_listen_opened_and_closed_across_polling_ticks() {
    let mut session = authenticated();
    receive(&mut session, ToContainer::Subscribe);
    session.on_reading(any(&[1, 2, 3]));
    let expected = [
        ToHost::Opened(announced_on_any(9)),
        ToHost::Opened(announced_on_any(8)),
        ToHost::Closed(port(1)),
        ToHost::Closed(port(3)),
    ];
    assert_eq!(
        sent_messages(session.on_reading(any(&[9, 2, 8]))),
        expected,
        "opened ports in the new order, then closed ports in the old order"
    );
    assert_eq!(session.on_reading(any(&[9, 2, 8])), []);
    let moved = vec![listener(9, BindAddr::Loopback), listener(2, BindAddr::Any), listener(8, BindAddr::Any)];
    assert_eq!(session.on_reading(moved), [], "a changed bind address is not a difference");
}

#[test]
fn unsubscribe_stops_the_polling_timer() {
    let mut session = authenticated();
    assert_eq!(receive(&mut session, ToContainer::Unsubscribe), [], "there is no subscription");
    receive(&mut session, ToContainer::Subscribe);
    session.on_reading(any(&[5173]));
    let actions = receive(&mut session, ToContainer::Unsubscribe);
    assert_eq!(actions, [Action::StopWatch, Action::Log(ContainerEvent::Unsubscribed)]);
    assert_eq!(session.on_reading(any(&[])), [], "a late reading is ignored");
    receive(&mut session, ToContainer::Subscribe);
    assert_eq!(
        sent_messages(session.on_reading(any(&[7]))),
        [ToHost::Snapshot(vec![announced_on_any(7)])],
        "a fresh snapshot"
    );
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
    let actions = session.on_connect_outcome(attempt, StreamId(7), Err(reason));
    assert_eq!(actions, [Action::Send(nack), Action::Log(event)]);
    open(&mut session, 7, 5173);
}

#[test]
fn an_id_in_use_and_an_invalid_port_are_nacked() {
    let mut session = authenticated();
    opened(&mut session, 7);
    let actions =
        sent_messages(receive(&mut session, ToContainer::Open { stream: StreamId(7), port: port(80) }));
    assert!(matches!(actions[..], [ToHost::OpenNack { stream: StreamId(7), .. }]), "{actions:?}");
    let actions =
        sent_messages(session.on_message(ReceivedMessage::InvalidOpen(StreamId(8)), &Reserved::default()));
    assert!(matches!(actions[..], [ToHost::OpenNack { stream: StreamId(8), .. }]), "{actions:?}");
    let frame = ToContainer::Relay(StreamId(7), data("x"));
    assert_eq!(
        receive(&mut session, frame),
        [Action::Deliver(StreamId(7), data("x"))],
        "the stream continues"
    );
}

#[test]
fn relay_data_flows_from_the_host_after_open_and_is_dropped_before() {
    let mut session = authenticated();
    let frame = || ToContainer::Relay(StreamId(1), data("bytes"));
    assert_eq!(receive(&mut session, frame()), [], "an unknown stream");
    let attempt = open(&mut session, 1, 5173);
    assert_eq!(receive(&mut session, frame()), [], "a connecting stream");
    session.on_connect_outcome(attempt, StreamId(1), Ok(()));
    assert_eq!(receive(&mut session, frame()), [Action::Deliver(StreamId(1), data("bytes"))]);
}

#[test]
fn relay_close_from_host_ends_the_upstream_connection_without_an_answer() {
    let mut session = authenticated();
    let attempt = opened(&mut session, 1);
    let close = Frame::Close(Side::Downstream);
    let actions = receive(&mut session, ToContainer::Relay(StreamId(1), close.clone()));
    assert_eq!(actions, [Action::Deliver(StreamId(1), close.clone()), Action::Forget(StreamId(1))]);
    assert_eq!(receive(&mut session, ToContainer::Relay(StreamId(1), close)), []);
    assert_eq!(session.on_pump_end(attempt, StreamId(1), None), []);
}

#[test]
fn relay_close_during_connect_drops_the_connection_without_an_ack() {
    let mut session = authenticated();
    let first = open(&mut session, 1, 5173);
    let close = ToContainer::Relay(StreamId(1), Frame::Close(Side::Downstream));
    assert_eq!(receive(&mut session, close), [Action::Abandon(first)]);
    assert_eq!(session.on_connect_outcome(first, StreamId(1), Ok(())), [], "no ack, no pump");
    let second = open(&mut session, 1, 5173);
    assert_eq!(
        session.on_connect_outcome(first, StreamId(1), Ok(())),
        [],
        "also not for the next stream with that id"
    );
    assert_eq!(session.on_connect_outcome(second, StreamId(1), Ok(())).len(), 2);
}

#[test]
fn the_end_of_an_upstream_frees_its_id() {
    let mut session = authenticated();
    let attempt = opened(&mut session, 1);
    assert_eq!(session.on_pump_end(attempt, StreamId(1), None), [Action::Forget(StreamId(1))]);
    let next = opened(&mut session, 1);
    assert_eq!(session.on_pump_end(attempt, StreamId(1), None), [], "the end of another stream");
    let actions = session.on_pump_end(next, StreamId(1), Some("EPIPE".to_owned()));
    let event = ContainerEvent::RelayDataError { stream_id: 1, reason: "EPIPE".to_owned() };
    assert_eq!(actions, [Action::Forget(StreamId(1)), Action::Log(event)]);
}

#[test]
fn frames_of_extensions_that_were_not_negotiated_are_ignored() {
    let frames = [Frame::Eof, Frame::Credit(9), Frame::Reset];
    for frame in &frames {
        let mut session = authenticated();
        opened(&mut session, 1);
        assert_eq!(receive(&mut session, ToContainer::Relay(StreamId(1), frame.clone())), []);
        let mut session = authenticated_with(Extensions::ALL);
        opened(&mut session, 1);
        let actions = receive(&mut session, ToContainer::Relay(StreamId(1), frame.clone()));
        assert_eq!(actions[0], Action::Deliver(StreamId(1), frame.clone()));
    }
    let mut session = authenticated_with(Extensions::ALL);
    let attempt = open(&mut session, 1, 5173);
    assert_eq!(
        receive(&mut session, ToContainer::Relay(StreamId(1), Frame::Reset)),
        [Action::Abandon(attempt)]
    );
}

#[test]
fn close_ends_all_open_upstreams_and_the_watcher() {
    let mut session = authenticated();
    receive(&mut session, ToContainer::Subscribe);
    opened(&mut session, 1);
    opened(&mut session, 2);
    let attempt = open(&mut session, 3, 5173);
    let actions = session.on_disconnect();
    assert_eq!(actions[0], Action::StopWatch);
    for expected in [Action::Forget(StreamId(1)), Action::Forget(StreamId(2)), Action::Abandon(attempt)] {
        assert!(actions.contains(&expected), "{actions:?}");
    }
    assert_eq!(actions.len(), 4);
    assert_eq!(session.on_connect_outcome(attempt, StreamId(3), Ok(())), []);
    assert_eq!(session.on_reading(any(&[1])), []);
    assert_eq!(session.on_disconnect(), []);
}

#[test]
fn results_are_passed_on_after_the_hello_only() {
    let results = [Ok(port(5173)), Err("policy excluded".to_owned())];
    for result in results {
        let result = ForwardResult { port: port(5173), result };
        let mut session = authenticated();
        let actions = receive(&mut session, ToContainer::ForwardResult(result.clone()));
        assert_eq!(actions, [Action::Result(result.clone())]);
        let mut unauthenticated = crate::broker::container::tests::session();
        let actions = receive(&mut unauthenticated, ToContainer::ForwardResult(result));
        assert!(!actions.iter().any(|action| matches!(action, Action::Result(_))), "{actions:?}");
    }
}

#[test]
fn a_reserved_request_is_sent_after_the_hello_and_never_before() {
    let mut reserved = Reserved::default();
    let mut session = session();
    assert!(reserved.insert(request(4848, Some("dashboard"))));
    assert_eq!(session.on_request(&reserved), []);
    let actions = sent_messages(session.on_message(hello(TOKEN), &reserved));
    let message = request(4848, Some("dashboard")).message();
    assert_eq!(actions, [ToHost::HelloAck { extensions: Extensions::NONE }, message.clone()]);
    assert_eq!(session.on_request(&reserved), [], "it is sent once");
    assert!(reserved.insert(request(5000, None)));
    assert_eq!(sent_messages(session.on_request(&reserved)), [request(5000, None).message()]);
    assert!(reserved.insert(request(4848, Some("dashboard"))));
    assert_eq!(sent_messages(session.on_request(&reserved)), [message], "a repeated request is sent again");
}

#[test]
fn a_reconnect_repeats_the_requests_in_their_first_order() {
    let mut reserved = Reserved::default();
    for target in [300, 100, 200] {
        assert!(reserved.insert(request(target, None)));
    }
    assert!(reserved.insert(request(300, Some("newer"))));
    let mut session = session();
    let actions = sent_messages(session.on_message(hello(TOKEN), &reserved));
    let expected = [
        ToHost::HelloAck { extensions: Extensions::NONE },
        request(300, Some("newer")).message(),
        request(100, None).message(),
        request(200, None).message(),
    ];
    assert_eq!(actions, expected);
}

#[test]
fn invalid_messages_are_logged_up_to_a_limit_and_close_nothing() {
    let mut session = authenticated();
    let mut lines = 0;
    for _ in 0..1000 {
        lines += session
            .on_message(ReceivedMessage::NotAMessage("invalid json".to_owned()), &Reserved::default())
            .len();
        lines += session
            .on_message(ReceivedMessage::InvalidFields("relay-data: bytes".to_owned()), &Reserved::default())
            .len();
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
    let actions =
        sent_messages(receive(&mut session, ToContainer::Open { stream: StreamId(-1), port: port(1) }));
    assert!(matches!(actions[..], [ToHost::OpenNack { .. }]), "{actions:?}");
}

#[path = "container_model_tests.rs"]
mod model;
