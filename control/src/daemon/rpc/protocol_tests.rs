use super::*;
use proptest::prelude::*;
use serde_json::json;

fn parse(value: &Value) -> Result<Request, String> {
    Request::from_line(value.to_string().as_bytes()).map_err(|error| error.to_string())
}

fn refusal(line: &[u8]) -> String {
    Request::from_line(line).unwrap_err().to_string()
}

#[test]
fn invalid_json_and_invalid_requests_have_different_errors() {
    for line in
        [&b""[..], b"{", b"nonsense", b"{} {}", b"\xff\xfe", b"{\"kind\":\"\xff\"}", b"\xef\xbb\xbf{}"]
    {
        assert_eq!(refusal(line), "invalid request json", "{line:?}");
    }
    for line in ["null", "1", "\"list\"", "[]", "[{\"kind\":\"list\"}]", "true"] {
        assert_eq!(refusal(line.as_bytes()), "invalid request", "{line}");
    }
    for line in ["{}", "{\"kind\":null}", "{\"kind\":1}", "{\"kind\":\"List\"}", "{\"kind\":\"\"}"] {
        assert_eq!(refusal(line.as_bytes()), "unknown request kind", "{line}");
    }
}

#[test]
fn deeply_nested_json_is_refused() {
    assert_eq!(refusal(&vec![b'['; 60_000]), "invalid request json");
}

#[test]
fn white_space_and_unknown_fields_are_ignored() {
    assert_eq!(Request::from_line(b" {\"kind\":\"list\",\"more\":[1]} \r"), Ok(Request::List));
}

#[test]
fn each_kind_is_parsed() {
    let name = || "coder".to_owned();
    assert_eq!(parse(&json!({"kind": "version"})), Ok(Request::Version));
    assert_eq!(parse(&json!({"kind": "http-info"})), Ok(Request::HttpInfo));
    assert_eq!(parse(&json!({"kind": "describe"})), Ok(Request::Describe));
    let status = Request::Status { container_name: name() };
    assert_eq!(parse(&json!({"kind": "status", "containerName": "coder"})), Ok(status));
    let deregister = Request::Deregister { container_name: Some(name()), keep_grants: false };
    assert_eq!(parse(&json!({"kind": "deregister", "containerName": "coder"})), Ok(deregister));
    let events = Request::Events { container_name: Some(name()) };
    assert_eq!(parse(&json!({"kind": "events", "containerName": "coder"})), Ok(events));
    assert_eq!(parse(&json!({"kind": "events"})), Ok(Request::Events { container_name: None }));
    let shutdown = |drain_engine| Ok(Request::Shutdown { drain_engine });
    assert_eq!(parse(&json!({"kind": "shutdown"})), shutdown(false));
    assert_eq!(parse(&json!({"kind": "shutdown", "engine": "drain"})), shutdown(true));
    let keeps = parse(&json!({"kind": "deregister", "containerName": "coder", "grants": "keep"}));
    assert_eq!(keeps, Ok(Request::Deregister { container_name: Some(name()), keep_grants: true }));
    let grant = Request::Grant { container_name: name(), rights: vec![Right::Rebuild] };
    assert_eq!(parse(&json!({"kind": "grant", "containerName": "coder", "what": ["rebuild"]})), Ok(grant));
    let what = vec!["tool:x".to_owned()];
    let revoke = Request::Revoke { container_name: ContainerName::new("coder").unwrap(), what };
    assert_eq!(parse(&json!({"kind": "revoke", "containerName": "coder", "what": ["tool:x"]})), Ok(revoke));
    let register = parse(&json!({"kind": "register", "containerName": "coder", "cwd": "/c", "later": 1}));
    let Ok(Request::Register(registration)) = register else { panic!("{register:?}") };
    assert_eq!(registration.container_name.as_str(), "coder");
    assert_eq!(registration.unknown, *json!({"later": 1}).as_object().unwrap());
}

#[test]
fn an_invalid_field_is_named() {
    let refused = |value: Value| parse(&value).unwrap_err();
    assert_eq!(refused(json!({"kind": "register", "containerName": "a"})), "invalid register: cwd");
    assert_eq!(
        refused(json!({"kind": "register", "containerName": "../x", "cwd": "/c"})),
        "failed to persist registration: invalid container name for registration file: \"../x\""
    );
    assert_eq!(refused(json!({"kind": "status"})), "invalid status: containerName");
    assert_eq!(refused(json!({"kind": "secrets-patch"})), "invalid secrets-patch: containerName");
    assert_eq!(refused(json!({"kind": "shutdown", "engine": "now"})), "invalid shutdown: engine");
    assert_eq!(refused(json!({"kind": "events", "containerName": 7})), "invalid events: containerName");
    let deregister = json!({"kind": "deregister", "containerName": "a", "grants": "drop"});
    assert_eq!(refused(deregister), "invalid deregister: grants");
    for kind in ["grant", "revoke"] {
        assert_eq!(
            refused(json!({"kind": kind, "what": ["rebuild"]})),
            format!("invalid {kind}: containerName")
        );
        for what in [json!(null), json!("rebuild"), json!([]), json!(["rebuild", 7])] {
            let request = json!({"kind": kind, "containerName": "a", "what": what});
            assert_eq!(refused(request), format!("invalid {kind}: what"));
        }
    }
    let unknown = json!({"kind": "grant", "containerName": "a", "what": ["rebuild", "root"]});
    assert_eq!(refused(unknown), "unknown grant: root");
    let revoke = json!({"kind": "revoke", "containerName": "../a", "what": ["rebuild"]});
    assert_eq!(refused(revoke), "invalid revoke: containerName");
}

#[test]
fn deregister_without_a_valid_name_is_not_an_error() {
    assert_eq!(
        parse(&json!({"kind": "deregister"})),
        Ok(Request::Deregister { container_name: None, keep_grants: false })
    );
    let number = parse(&json!({"kind": "deregister", "containerName": 7}));
    assert_eq!(number, Ok(Request::Deregister { container_name: None, keep_grants: false }));
}

#[test]
fn errors_of_a_restart_are_reported_on_demand() {
    let restart = |value: Value| match parse(&value) {
        Ok(Request::Restart(restart)) => restart,
        other => panic!("{other:?}"),
    };
    let whole = restart(json!({"kind": "restart", "containerName": "coder", "build": true}));
    assert_eq!((whole.build(), whole.container_name()), (Ok(true), Ok("coder")));
    assert_eq!(restart(json!({"kind": "restart", "containerName": "coder"})).build(), Ok(false));
    for build in [json!("yes"), json!(1), json!(null)] {
        let text = restart(json!({"kind": "restart", "build": build})).build().unwrap_err().to_string();
        assert_eq!(text, "restart.build must be a boolean if provided");
    }
    let nameless = restart(json!({"kind": "restart"})).container_name().unwrap_err().to_string();
    assert_eq!(nameless, "invalid restart: containerName");
}

#[test]
fn debug_output_omits_a_patch() {
    let patch = json!({"mcp": {"server": "s", "credential": {"tokens": "canary"}}});
    let request = parse(&json!({"kind": "secrets-patch", "containerName": "coder", "patch": patch}));
    let Ok(Request::SecretsPatch(found)) = &request else { panic!() };
    assert_eq!(found.patch, patch);
    assert!(!format!("{request:?}").contains("canary"));
}

#[test]
fn only_requests_about_registrations_wait_for_replay() {
    let waits = |value: Value| parse(&value).unwrap().waits_for_replay();
    for kind in ["list", "http-info", "version", "shutdown", "describe", "events"] {
        assert!(!waits(json!({"kind": kind})), "{kind}");
    }
    for kind in ["register", "deregister", "status", "restart", "secrets-patch"] {
        assert!(waits(json!({"kind": kind, "containerName": "a", "cwd": "/"})), "{kind}");
    }
    for kind in ["grant", "revoke"] {
        assert!(waits(json!({"kind": kind, "containerName": "a", "what": ["rebuild"]})), "{kind}");
    }
}

#[test]
fn a_response_is_one_line_with_ok_and_at_most_one_other_field() {
    assert_eq!(Response::Done.to_json(), r#"{"ok":true}"#);
    assert_eq!(Response::result(json!({"port": 8974})).to_json(), r#"{"ok":true,"result":{"port":8974}}"#);
    assert_eq!(Response::refused("a\nb").to_json(), r#"{"ok":false,"reason":"a\nb"}"#);
}

proptest! {
    #[test]
    fn any_bytes_are_a_request_or_refused_without_a_panic(
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        let _ = Request::from_line(&bytes);
    }
}
