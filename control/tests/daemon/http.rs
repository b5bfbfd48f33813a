//! The HTTP endpoint, for each row of the wire specification, A.2.

use std::io::{Read, Write};
use std::net::TcpStream;

use serde_json::{Value, json};

use crate::support::{Daemon, WAIT_MAX, http, post};

const OWN: &str = "Authorization: Bearer token-of-a\r\n";

fn daemon() -> (tempfile::TempDir, Daemon, u16) {
    let home = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(home.path(), &["--http-port", "0"]);
    daemon.register("a", "token-of-a");
    daemon.register("b", "token-of-b");
    let port = daemon.http_port();
    (home, daemon, port)
}

fn refused(status: u16, reason: &str) -> (u16, Value) {
    (status, json!({"ok": false, "reason": reason}))
}

#[test]
fn the_checks_are_in_the_specified_order() {
    let (_home, _daemon, port) = daemon();
    let not_found = refused(404, "not found");
    assert_eq!(http(port, b"GET /rpc HTTP/1.1\r\nHost: localhost\r\n\r\n"), not_found);
    assert_eq!(http(port, b"POST /rpc/ HTTP/1.1\r\nHost: localhost\r\n\r\n"), not_found);
    let missing = refused(401, "missing bearer token");
    let long = "x".repeat(70_000);
    assert_eq!(post(port, "", &long), missing);
    assert_eq!(post(port, "Authorization: bearer token-of-a\r\n", "{}"), missing);
    assert_eq!(post(port, "Authorization: Bearer \r\n", "{}"), missing);
    let too_long = refused(413, "request exceeds buffer limit");
    assert_eq!(post(port, OWN, &long), too_long);
    let chunked = format!(
        "POST /rpc HTTP/1.1\r\nHost: localhost\r\n{OWN}Transfer-Encoding: chunked\r\n\r\n{:x}\r\n{long}\r\n0\r\n\r\n",
        long.len()
    );
    assert_eq!(http(port, chunked.as_bytes()), too_long);
    assert_eq!(post(port, OWN, "nonsense"), refused(400, "invalid request json"));
    assert_eq!(post(port, OWN, "null"), refused(400, "invalid request"));
    let other = refused(403, "http transport only supports restart and secrets-patch");
    for kind in ["list", "register", "shutdown", "describe", "events", "nothing"] {
        let body = json!({"kind": kind, "containerName": "a"}).to_string();
        assert_eq!(post(port, OWN, &body), other, "{kind}");
    }
    let restart = |name: &str| json!({"kind": "restart", "containerName": name}).to_string();
    let not_yours = refused(403, "invalid restart token");
    for name in ["b", "unknown", ""] {
        assert_eq!(post(port, OWN, &restart(name)), not_yours, "{name}");
    }
    assert_eq!(post(port, OWN, "{\"kind\":\"restart\"}"), not_yours);
    assert_eq!(post(port, "Authorization: Bearer token-of-b\r\n", &restart("a")), not_yours);
    let (status, answer) = post(port, OWN, "{\"kind\":\"restart\",\"containerName\":\"a\",\"build\":1}");
    assert_eq!((status, &answer["reason"]), (200, &"restart.build must be a boolean if provided".into()));
    let scheduled = json!({"ok": true, "result": {"containerName": "a", "scheduled": true}});
    assert_eq!(post(port, OWN, &restart("a")), (200, scheduled));
}

#[test]
fn the_longest_body_is_65536_bytes() {
    let (_home, _daemon, port) = daemon();
    let padded = |length: usize| {
        let body = format!("{{\"kind\":\"nothing\",\"x\":\"{}\"}}", "x".repeat(length - 25));
        assert_eq!(body.len(), length);
        body
    };
    assert_eq!(post(port, OWN, &padded(65_536)).0, 403);
    assert_eq!(post(port, OWN, &padded(65_537)).0, 413);
}

#[test]
fn a_request_under_another_hosts_name_is_refused_before_all_else() {
    let (_home, _daemon, port) = daemon();
    let under = |host: &str| http(port, format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n").as_bytes());
    for host in ["evil.example", "evil.example:8974", "127.0.0.1.evil.example", "192.0.2.1"] {
        assert_eq!(under(host), refused(403, "host not allowed"), "{host}");
    }
    for host in ["127.0.0.1:1", "localhost", "[::1]:8974", "host.docker.internal:8974"] {
        assert_eq!(under(host), refused(404, "not found"), "{host}");
    }
    assert_eq!(http(port, b"GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n").0, 403);
    assert_eq!(http(port, b"GET / HTTP/1.0\r\n\r\n"), refused(404, "not found"));
}

#[test]
fn a_slow_head_times_out_and_a_half_closed_client_is_answered() {
    let (_home, _daemon, port) = daemon();
    let mut slow = TcpStream::connect(("127.0.0.1", port)).unwrap();
    slow.set_read_timeout(Some(WAIT_MAX)).unwrap();
    slow.write_all(b"POST /rpc HTTP/1.1\r\nHost: loc").unwrap();
    let mut quick = TcpStream::connect(("127.0.0.1", port)).unwrap();
    quick.set_read_timeout(Some(WAIT_MAX)).unwrap();
    quick.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    quick.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = String::new();
    quick.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    let mut answer = String::new();
    slow.read_to_string(&mut answer).unwrap();
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 408"), "{answer}");
}

#[test]
fn an_oversized_head_is_refused() {
    let (_home, _daemon, port) = daemon();
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(WAIT_MAX)).unwrap();
    let head = format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(100_000));
    let _ = stream.write_all(head.as_bytes());
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
}

#[test]
fn clients_of_one_listener_cannot_block_those_of_another() {
    let home = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(home.path(), &["--http-port", "0", "--http-bind", "127.0.0.9"]);
    let port = daemon.http_port();
    let idle: Vec<TcpStream> = (0..80).map(|_| TcpStream::connect(("127.0.0.1", port)).unwrap()).collect();
    let mut stream = TcpStream::connect(("127.0.0.9", port)).unwrap();
    stream.set_read_timeout(Some(WAIT_MAX)).unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    drop(idle);
}
