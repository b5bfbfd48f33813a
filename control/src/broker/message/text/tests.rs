use super::*;
use proptest::prelude::*;
use serde_json::json;

fn port(port: u16) -> NonZeroU16 {
    NonZeroU16::new(port).unwrap()
}

fn value(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

#[test]
fn messages_to_the_container_match_the_specification() {
    let hello = |extensions| ToContainer::Hello { credential: Credential::Token("t\"1".into()), extensions };
    let proof =
        ToContainer::Hello { credential: Credential::Proof("p".into()), extensions: Extensions::NONE };
    let result = |result| ToContainer::ForwardResult(ForwardResult { port: port(5173), result });
    for (message, expected) in [
        (hello(Extensions::NONE), json!({"type": "broker-hello", "token": "t\"1"})),
        (proof, json!({"type": "broker-hello", "proof": "p"})),
        (
            hello(Extensions::ALL),
            json!({"type": "broker-hello", "token": "t\"1", "extensions": ["binary", "credit", "half-close", "reset"]}),
        ),
        (ToContainer::Subscribe, json!({"type": "port-watch-subscribe"})),
        (ToContainer::Unsubscribe, json!({"type": "port-watch-unsubscribe"})),
        (
            result(Ok(port(4849))),
            json!({"type": "port-forward-result", "port": 5173, "ok": true, "hostPort": 4849}),
        ),
        (
            result(Err("policy excluded".into())),
            json!({"type": "port-forward-result", "port": 5173, "ok": false, "reason": "policy excluded"}),
        ),
        (
            ToContainer::Open { stream: StreamId(7), port: port(80) },
            json!({"type": "relay-open", "streamId": 7, "port": 80}),
        ),
        (
            ToContainer::Relay(StreamId(7), Frame::Data(Bytes::from_static(b"a?>"))),
            json!({"type": "relay-data", "streamId": 7, "bytes": "YT8+"}),
        ),
        (
            ToContainer::Relay(StreamId(7), Frame::Close(Side::Downstream)),
            json!({"type": "relay-close", "streamId": 7, "side": "downstream"}),
        ),
        (
            ToContainer::Relay(StreamId(7), Frame::Credit(9)),
            json!({"type": "relay-credit", "streamId": 7, "bytes": 9}),
        ),
        (ToContainer::Relay(StreamId(7), Frame::Eof), json!({"type": "relay-eof", "streamId": 7})),
        (ToContainer::Relay(StreamId(7), Frame::Reset), json!({"type": "relay-reset", "streamId": 7})),
    ] {
        assert_eq!(value(&message.to_text()), expected);
        assert_eq!(ToContainer::from_text(&expected.to_string()), Ok(Some(message)));
    }
}

#[test]
fn messages_to_the_host_match_the_specification() {
    let request = |reason: Option<&str>| ToHost::ForwardRequest {
        target: port(4848),
        candidates: vec![port(4848), port(4849)],
        reason: reason.map(str::to_owned),
    };
    let announced = |number, loopback| Announced { port: port(number), loopback };
    for (message, expected) in [
        (ToHost::HelloAck { extensions: Extensions::NONE }, json!({"type": "broker-hello-ack"})),
        (
            ToHost::HelloAck { extensions: Extensions { credit: true, ..Extensions::NONE } },
            json!({"type": "broker-hello-ack", "extensions": ["credit"]}),
        ),
        (
            ToHost::HelloNack { reason: "invalid token".into() },
            json!({"type": "broker-hello-nack", "reason": "invalid token"}),
        ),
        (
            request(None),
            json!({"type": "port-forward-request", "targetPort": 4848, "hostCandidates": [4848, 4849]}),
        ),
        (
            request(Some("dashboard")),
            json!({"type": "port-forward-request", "targetPort": 4848, "hostCandidates": [4848, 4849], "reason": "dashboard"}),
        ),
        (
            ToHost::Snapshot(vec![announced(5173, true), announced(80, false)]),
            json!({"type": "port-listen-snapshot", "ports": [
                {"port": 5173, "bindAddr": "127.0.0.1"}, {"port": 80, "bindAddr": "0.0.0.0"},
            ]}),
        ),
        (
            ToHost::Opened(announced(5173, true)),
            json!({"type": "port-listen-opened", "port": 5173, "bindAddr": "127.0.0.1"}),
        ),
        (ToHost::Closed(port(5173)), json!({"type": "port-listen-closed", "port": 5173})),
        (ToHost::OpenAck(StreamId(1)), json!({"type": "relay-open-ack", "streamId": 1})),
        (
            ToHost::OpenNack { stream: StreamId(1), reason: "refused".into() },
            json!({"type": "relay-open-nack", "streamId": 1, "reason": "refused"}),
        ),
        (
            ToHost::Relay(StreamId(1), Frame::Close(Side::Upstream)),
            json!({"type": "relay-close", "streamId": 1, "side": "upstream"}),
        ),
    ] {
        assert_eq!(value(&message.to_text()), expected);
        assert_eq!(ToHost::from_text(&expected.to_string()), Ok(Some(message)));
    }
}

#[test]
fn numbers_are_accepted_in_the_notation_of_javascript() {
    let id = |text: &str| ToHost::from_text(&format!(r#"{{"type":"relay-open-ack","streamId":{text}}}"#));
    let unfit = Err(Unreadable::Field { kind: "relay-open-ack", field: "streamId" });
    for (text, number) in [("1", 1), ("1.0", 1), ("-3", -3), ("0", 0), ("-0.0", 0), ("2e9", 2_000_000_000)] {
        assert_eq!(id(text), Ok(Some(ToHost::OpenAck(StreamId(number)))), "{text}");
    }
    for text in ["1.5", "\"1\"", "null", "true", "[1]", "{\"a\":1}", "18446744073709551615", "1e19"] {
        assert_eq!(id(text), unfit, "{text}");
    }
    let closed = |text: &str| ToHost::from_text(&format!(r#"{{"type":"port-listen-closed","port":{text}}}"#));
    assert_eq!(closed("5173.0"), Ok(Some(ToHost::Closed(port(5173)))));
    for text in ["0", "65536", "1.5", "-1", "\"80\"", "1e300"] {
        assert_eq!(
            closed(text),
            Err(Unreadable::Field { kind: "port-listen-closed", field: "port" }),
            "{text}"
        );
    }
}

#[test]
fn unknown_types_are_ignored_and_invalid_json_is_an_error() {
    for text in
        [r#"{"type":"relay-pause","streamId":1}"#, r#"{"type":7}"#, "{}", "[]", "null", r#""type""#, "7"]
    {
        assert_eq!(ToHost::from_text(text), Ok(None), "{text}");
        assert_eq!(ToContainer::from_text(text), Ok(None), "{text}");
    }
    // Each side parses only the messages that are sent to it.
    assert_eq!(ToHost::from_text(r#"{"type":"broker-hello","token":"t"}"#), Ok(None));
    assert_eq!(ToContainer::from_text(r#"{"type":"relay-open-ack","streamId":1}"#), Ok(None));
    for text in ["", "nope", "{", r#"{"type":"relay-eof","streamId":1} trailing"#, r#"{"type":}"#] {
        assert_eq!(ToHost::from_text(text), Err(Unreadable::Json), "{text}");
        assert_eq!(ToContainer::from_text(text), Err(Unreadable::Json), "{text}");
    }
}

#[test]
fn payload_that_is_not_base64_is_an_error() {
    let data =
        |bytes: &str| ToHost::from_text(&format!(r#"{{"type":"relay-data","streamId":1,"bytes":{bytes}}}"#));
    for bytes in [r#""YQ""#, r#""Y""#, r#""YQ==="#, r#""_-_-""#, r#""Y Q=""#, "7", "null"] {
        let read = data(&format!("{bytes}{}", if bytes.ends_with("===") { "\"" } else { "" }));
        assert_eq!(read, Err(Unreadable::Field { kind: "relay-data", field: "bytes" }), "{bytes}");
    }
    let payload = |payload: &'static [u8]| {
        Ok(Some(ToHost::Relay(StreamId(1), Frame::Data(Bytes::from_static(payload)))))
    };
    assert_eq!(data(r#""""#), payload(b""));
    // Other writers of JSON escape the slash.
    assert_eq!(data(r#""\/\u002f\/\/""#), payload(b"\xff\xff\xff"));
}

#[test]
fn harmless_deviations_are_accepted() {
    let text =
        r#" { "x" : {"type":[{}]}, "streamId":4, "side":"left", "streamId" : 5, "type" : "relay-close" } "#;
    assert_eq!(ToHost::from_text(text), Ok(Some(ToHost::Relay(StreamId(5), Frame::Close(Side::Upstream)))));
    assert_eq!(
        ToContainer::from_text(text),
        Ok(Some(ToContainer::Relay(StreamId(5), Frame::Close(Side::Downstream))))
    );
    let hello = |extensions: &str| {
        ToContainer::from_text(&format!(r#"{{"type":"broker-hello","token":"t","extensions":{extensions}}}"#))
    };
    for odd in ["7", "{}", "\"credit\"", "null", "[7,\"compression\"]"] {
        let credential = Credential::Token("t".into());
        let none = ToContainer::Hello { credential, extensions: Extensions::NONE };
        assert_eq!(hello(odd), Ok(Some(none)), "{odd}");
    }
    assert_eq!(
        ToHost::from_text(
            r#"{"type":"port-forward-request","targetPort":1,"hostCandidates":[0,"a",2.0,70000,3],"reason":7}"#
        ),
        Ok(Some(ToHost::ForwardRequest {
            target: port(1),
            candidates: vec![port(2), port(3)],
            reason: None
        }))
    );
    assert_eq!(
        ToHost::from_text(r#"{"type":"port-listen-snapshot","ports":[{"port":0},{"port":7},7]}"#),
        Ok(Some(ToHost::Snapshot(vec![Announced { port: port(7), loopback: false }])))
    );
    assert_eq!(
        ToHost::from_text(r#"{"type":"relay-open-nack","streamId":1}"#),
        Ok(Some(ToHost::OpenNack { stream: StreamId(1), reason: String::new() }))
    );
}

#[test]
fn known_types_with_invalid_fields_are_errors_without_quotes() {
    for (text, said) in [
        (r#"{"type":"broker-hello"}"#, "broker-hello: token is missing or invalid"),
        (r#"{"type":"broker-hello","token":7}"#, "broker-hello: token is missing or invalid"),
        (r#"{"type":"relay-open","streamId":1}"#, "relay-open: port is missing or invalid"),
        (
            r#"{"type":"port-forward-result","port":1,"ok":1}"#,
            "port-forward-result: ok is missing or invalid",
        ),
        (r#"{"type":"relay-credit","streamId":1,"bytes":-1}"#, "relay-credit: bytes is missing or invalid"),
        (r#"{"type":"broker-hello","token":"sec"#, "invalid json"),
    ] {
        assert_eq!(ToContainer::from_text(text).unwrap_err().to_string(), said);
    }
    for text in [
        r#"{"type":"port-listen-snapshot"}"#,
        r#"{"type":"port-listen-opened","port":"80"}"#,
        r#"{"type":"port-forward-request","targetPort":80}"#,
        r#"{"type":"port-forward-request","hostCandidates":[]}"#,
    ] {
        assert!(matches!(ToHost::from_text(text), Err(Unreadable::Field { .. })), "{text}");
    }
}

#[test]
fn c24_a_long_message_takes_little_memory_or_is_refused() {
    let listed = format!(
        r#"{{"type":"port-listen-snapshot","ports":[{}{{"port":7}}]}}"#,
        "[[1,1]],1,{},".repeat(9_999)
    );
    let seven = Announced { port: port(7), loopback: false };
    assert_eq!(ToHost::from_text(&listed), Ok(Some(ToHost::Snapshot(vec![seven]))));
    let again = format!(
        r#"{{"type":"port-listen-snapshot","ports":[{}{{"port":7}}]}}"#,
        r#"{"port":7.0},"#.repeat(9_999)
    );
    assert_eq!(ToHost::from_text(&again), Ok(Some(ToHost::Snapshot(vec![seven]))));
    let candidates = "1,".repeat(FIELDS_BYTES_MAX / 2);
    let asked =
        format!(r#"{{"type":"port-forward-request","targetPort":1,"hostCandidates":[{candidates}1]}}"#);
    assert!(matches!(
        ToHost::from_text(&asked),
        Err(Unreadable::TooLong { kind: "port-forward-request", .. })
    ));
}

fn any_port() -> impl Strategy<Value = NonZeroU16> {
    (1..=u16::MAX).prop_map(port)
}

fn any_extensions() -> impl Strategy<Value = Extensions> {
    any::<[bool; 4]>().prop_map(|[binary, credit, half_close, reset]| Extensions {
        binary,
        credit,
        half_close,
        reset,
    })
}

fn any_relay() -> impl Strategy<Value = (StreamId, Frame)> {
    let frame = prop_oneof![
        any::<Vec<u8>>().prop_map(|payload| Frame::Data(payload.into())),
        Just(Frame::Close(Side::Downstream)),
        Just(Frame::Close(Side::Upstream)),
        any::<u32>().prop_map(Frame::Credit),
        Just(Frame::Eof),
        Just(Frame::Reset),
    ];
    (any::<i64>().prop_map(StreamId), frame)
}

fn any_announced() -> impl Strategy<Value = Announced> {
    (any_port(), any::<bool>()).prop_map(|(port, loopback)| Announced { port, loopback })
}

fn to_container() -> impl Strategy<Value = ToContainer> {
    let result = prop_oneof![any_port().prop_map(Ok), any::<String>().prop_map(Err)];
    prop_oneof![
        (any::<String>(), any::<bool>(), any_extensions()).prop_map(|(text, proof, extensions)| {
            let credential = if proof { Credential::Proof(text) } else { Credential::Token(text) };
            ToContainer::Hello { credential, extensions }
        }),
        Just(ToContainer::Subscribe),
        Just(ToContainer::Unsubscribe),
        (any_port(), result)
            .prop_map(|(port, result)| ToContainer::ForwardResult(ForwardResult { port, result })),
        (any::<i64>(), any_port())
            .prop_map(|(stream, port)| ToContainer::Open { stream: StreamId(stream), port }),
        any_relay().prop_map(|(stream, frame)| ToContainer::Relay(stream, frame)),
    ]
}

fn to_host() -> impl Strategy<Value = ToHost> {
    prop_oneof![
        any_extensions().prop_map(|extensions| ToHost::HelloAck { extensions }),
        any::<String>().prop_map(|reason| ToHost::HelloNack { reason }),
        (any_port(), prop::collection::vec(any_port(), 0..12), any::<Option<String>>())
            .prop_map(|(target, candidates, reason)| ToHost::ForwardRequest { target, candidates, reason }),
        // One entry per port, as after parsing.
        prop::collection::btree_map(any_port(), any::<bool>(), 0..20).prop_map(|ports| {
            ToHost::Snapshot(ports.into_iter().map(|(port, loopback)| Announced { port, loopback }).collect())
        }),
        any_announced().prop_map(ToHost::Opened),
        any_port().prop_map(ToHost::Closed),
        any::<i64>().prop_map(|stream| ToHost::OpenAck(StreamId(stream))),
        (any::<i64>(), any::<String>())
            .prop_map(|(stream, reason)| ToHost::OpenNack { stream: StreamId(stream), reason }),
        any_relay().prop_map(|(stream, frame)| ToHost::Relay(stream, frame)),
    ]
}

proptest! {
    #[test]
    fn a_message_to_the_container_is_read_back(message in to_container()) {
        prop_assert_eq!(ToContainer::from_text(&message.to_text()), Ok(Some(message)));
    }

    #[test]
    fn a_message_to_the_host_is_read_back(message in to_host()) {
        prop_assert_eq!(ToHost::from_text(&message.to_text()), Ok(Some(message)));
    }

    #[test]
    fn payload_takes_four_thirds_and_a_header(payload: Vec<u8>, stream: i64) {
        let text = relay_text(StreamId(stream), &Frame::Data(Bytes::from(payload.clone())));
        prop_assert!(text.len() <= payload.len().div_ceil(3) * 4 + 64);
    }

    #[test]
    fn arbitrary_text_does_not_panic(text: String) {
        let _ = ToHost::from_text(&text);
        let _ = ToContainer::from_text(&text);
    }
}
