//! The Unix socket (wire specification, A.1).

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;

use serde_json::{Value, json};

use crate::support::Daemon;

const REFUSED: &str = "{\"ok\":false,\"reason\":\"request exceeds buffer limit\"}\n";
const NOT_JSON: &str = "{\"ok\":false,\"reason\":\"invalid request json\"}\n";

fn daemon() -> (tempfile::TempDir, Daemon) {
    let home = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(home.path(), &["--http-port", "0"]);
    (home, daemon)
}

#[test]
fn a_container_is_registered_listed_described_and_deregistered() {
    let (home, daemon) = daemon();
    assert_eq!(daemon.raw(b"{\"kind\":\"list\"}\n"), "{\"ok\":true,\"result\":{\"registrations\":[]}}\n");
    daemon.register("coder", "t");
    daemon.register("coder", "t");
    let listed = daemon.ask(&json!({"kind": "list"}));
    let entry = json!({"containerName": "coder", "cwd": "/somewhere"});
    assert_eq!(listed, json!({"ok": true, "result": {"registrations": [entry]}}));
    let status = daemon.ask(&json!({"kind": "status", "containerName": "coder"}));
    let expected = json!({"containerName": "coder", "cwd": "/somewhere", "forwardedPorts": []});
    assert_eq!(status, json!({"ok": true, "result": expected}));
    let mode = std::fs::metadata(home.path().join("run/hostd.sock")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    for name in ["coder", "coder", "never", "../x"] {
        let answer = daemon.ask(&json!({"kind": "deregister", "containerName": name}));
        assert_eq!(answer, json!({"ok": true}), "{name}");
    }
    let status = daemon.ask(&json!({"kind": "status", "containerName": "coder"}));
    assert_eq!(status, json!({"ok": false, "reason": "not registered: coder"}));
}

#[test]
fn describe_returns_the_state_without_secrets() {
    let (_home, daemon) = daemon();
    daemon.register("coder", "canary");
    let described = daemon.ask(&json!({"kind": "describe"}));
    assert!(!described.to_string().contains("canary"));
    let described = &described["result"];
    assert_eq!(described["pid"], daemon.child.id());
    assert_eq!(described["httpPort"], daemon.http_port());
    assert_eq!(described["version"], daemon.ask(&json!({"kind": "version"}))["result"]["version"]);
    assert_eq!(described["containers"][0]["containerName"], "coder");
    assert_eq!(described["containers"][0]["state"], "off");
}

#[test]
fn an_invalid_request_is_answered_with_the_specified_text() {
    let (_home, daemon) = daemon();
    for line in ["", "nonsense", "{\"kind\":\"list\"", "{} {}"] {
        assert_eq!(daemon.raw(format!("{line}\n").as_bytes()), NOT_JSON, "{line}");
    }
    assert_eq!(daemon.raw(b"{\"kind\":\"\xff\"}\n"), NOT_JSON);
    assert_eq!(daemon.raw(b"null\n"), "{\"ok\":false,\"reason\":\"invalid request\"}\n");
    assert_eq!(daemon.raw(b"{}\n"), "{\"ok\":false,\"reason\":\"unknown request kind\"}\n");
    assert_eq!(daemon.raw(b"{\"kind\":\"list\"}"), "", "a line needs a newline");
}

#[test]
fn a_line_is_at_most_65536_bytes_long_and_its_refusal_arrives() {
    let (_home, daemon) = daemon();
    let padded = |length: usize| {
        let mut line = format!("{{\"kind\":\"list\",\"x\":\"{}\"}}", "x".repeat(length - 22));
        assert_eq!(line.len(), length);
        line.push('\n');
        line
    };
    assert!(daemon.raw(padded(65_535).as_bytes()).starts_with("{\"ok\":true"));
    assert_eq!(daemon.raw(padded(65_536).as_bytes()), REFUSED);
    assert_eq!(daemon.raw(&vec![b'x'; 65_537]), REFUSED);
    assert_eq!(daemon.raw(&vec![b'x'; 1024 * 1024]), REFUSED);
}

#[test]
fn only_the_first_of_several_lines_is_processed() {
    let (_home, daemon) = daemon();
    let answer = daemon.raw(b"{\"kind\":\"list\"}\n{\"kind\":\"shutdown\"}\n");
    assert_eq!(answer, "{\"ok\":true,\"result\":{\"registrations\":[]}}\n");
    daemon.ask(&json!({"kind": "version"}));
}

#[test]
fn a_request_may_arrive_in_chunks_that_split_a_character() {
    let (_home, daemon) = daemon();
    let mut stream = daemon.connect();
    for byte in "{\"kind\":\"status\",\"containerName\":\"ä\u{1f980}\"}\n".as_bytes() {
        stream.write_all(&[*byte]).unwrap();
    }
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "{\"ok\":false,\"reason\":\"not registered: ä\u{1f980}\"}\n");
}

#[test]
fn a_client_without_a_complete_line_is_disconnected() {
    let (_home, daemon) = daemon();
    let mut stream = daemon.connect();
    stream.write_all(b"{\"kind\":").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "");
}

#[test]
fn events_are_streamed_and_filtered_by_container() {
    let (_home, daemon) = daemon();
    let follow = |request: Value| {
        let mut stream = daemon.connect();
        stream.write_all(format!("{request}\n").as_bytes()).unwrap();
        // A subscriber may close its write side and continue to read.
        stream.shutdown(Shutdown::Write).unwrap();
        let mut lines = BufReader::new(stream).lines().map(|line| line.unwrap());
        assert_eq!(lines.next().unwrap(), "{\"ok\":true}");
        lines.map(|line| serde_json::from_str::<Value>(&line).unwrap())
    };
    let mut all = follow(json!({"kind": "events"}));
    let mut one = follow(json!({"kind": "events", "containerName": "second"}));
    daemon.register("first", "t");
    daemon.register("second", "t");
    for name in ["first", "second"] {
        let event = all.next().unwrap();
        assert_eq!((&event["kind"], &event["containerName"]), (&"register".into(), &name.into()));
    }
    assert_eq!(one.next().unwrap()["containerName"], "second");
}

#[test]
fn a_restart_is_checked_in_the_specified_order() {
    let home = tempfile::tempdir().unwrap();
    let without = Daemon::start(home.path(), &["--http-port", "0", "--no-restart"]);
    let restart = json!({"kind": "restart", "containerName": "coder", "build": "yes"});
    let refused = |daemon: &Daemon, request: &Value| daemon.ask(request)["reason"].clone();
    assert_eq!(refused(&without, &restart), "restart capability not enabled on this daemon");
    drop(without);
    let daemon = Daemon::start(home.path(), &["--http-port", "0"]);
    assert_eq!(refused(&daemon, &restart), "restart.build must be a boolean if provided");
    let restart = json!({"kind": "restart", "containerName": "coder", "build": true});
    assert_eq!(refused(&daemon, &restart), "not registered: coder");
}
