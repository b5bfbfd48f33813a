//! The HTTP endpoint, row by row of the wire specification, A.2, and the clients that it refuses.

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use landfall_tests::case::Case;
use landfall_tests::http::{Answer, Web, ask, ask_text, post};
use landfall_tests::rpc::{self, http_port, register_with};
use landfall_tests::{FakeDocker, Home, NEGATIVE_WAIT, wait_until};
use serde_json::{Value, json};

pub(crate) const CASES: &[Case] = &[
    Case::once("c24_http_checks_are_made_in_their_order", checks_in_order),
    Case::once(
        "c24_http_rejects_oversized_unauthenticated_requests_before_reading_them",
        oversized_unauthenticated,
    ),
    Case::once("c24_http_a_body_over_the_limit_is_refused_in_any_framing", oversized_body),
    Case::once("c24_http_a_foreign_host_header_is_refused", foreign_hosts),
    Case::once("c24_http_the_bearer_token_is_parsed_as_specified", bearer_forms),
    Case::once("c23_http_a_container_acts_for_itself_alone", for_itself_alone),
    Case::once("http_a_connection_announces_whether_it_can_be_reused", connection_reuse),
    Case::once("http_chunked_bodies_and_http_1_0_are_supported", other_framings),
    Case::once("c24_http_a_slow_client_is_disconnected", slow_client),
    Case::once("c24_http_invalid_http_is_refused", invalid_http),
    Case::once("c24_http_a_thousand_half_open_connections_do_not_stop_the_daemon", half_open),
    Case::once("http_control_uses_the_preferred_port_when_it_is_free", preferred_port),
    Case::once("http_control_falls_back_to_an_ephemeral_port_when_the_preferred_port_is_busy", fallback_port),
    Case::once("http_the_port_stays_the_same_across_daemons", same_port),
    Case::once("c24_a_token_appears_in_no_output", token_in_no_output),
];

const TOKEN: &str = "dGhlIHRva2VuIG9mIGEgY29udGFpbmVyIGluc3RhbmNl";
const OTHER: &str = "YW5vdGhlciB0b2tlbiBvZiBhbm90aGVyIGNvbnRhaW5l";

fn restart(name: &str) -> Value {
    json!({"kind": "restart", "containerName": name, "build": false})
}

#[track_caller]
fn assert_refused(answer: &Answer, status: u16, reason: &str) {
    assert_eq!((answer.status, answer.reason()), (status, reason), "{answer:?}");
}

const ONLY: &str = "http transport only supports restart and secrets-patch";

fn checks_in_order() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &["a"]);
    let _daemon = home.daemon();
    register_with(&home, "a", &json!({"restartToken": TOKEN}));
    let port = http_port(&home);
    let head = |line: &str, more: &str| format!("{line}\r\nhost: 127.0.0.1:{port}\r\n{more}\r\n");
    let bearer = format!("authorization: Bearer {TOKEN}\r\n");

    // 1: every other property is wrong as well.
    for line in [
        "GET /rpc HTTP/1.1",
        "POST / HTTP/1.1",
        "POST /rpc/ HTTP/1.1",
        "POST /RPC HTTP/1.1",
        "PUT /rpc HTTP/1.1",
        "OPTIONS /rpc HTTP/1.1",
    ] {
        assert_refused(&ask_text(port, head(line, "")), 404, "not found");
        assert_refused(&ask_text(port, head(line, &bearer)), 404, "not found");
    }
    // 2: no token; the body is too long, invalid JSON, and of a wrong kind.
    let long = "content-length: 70000\r\n";
    assert_refused(&ask_text(port, head("POST /rpc HTTP/1.1", "")), 401, "missing bearer token");
    assert_refused(&ask_text(port, head("POST /rpc HTTP/1.1", long)), 401, "missing bearer token");
    // 3 and 4: with any token.
    let any = "authorization: Bearer x\r\n";
    let announced = head("POST /rpc HTTP/1.1", &format!("{any}{long}"));
    assert_refused(&ask_text(port, announced), 413, "request exceeds buffer limit");
    // 5
    for body in ["", "nonsense", "{\"kind\":"] {
        assert_refused(&ask_text(port, post(port, Some("x"), body)), 400, "invalid request json");
    }
    for body in ["null", "[]", "7", "\"restart\""] {
        let answer = ask_text(port, post(port, Some("x"), body));
        assert_eq!(answer.status, 400, "{body}: {answer:?}");
    }
    // 6
    for kind in [
        "register",
        "deregister",
        "list",
        "status",
        "version",
        "http-info",
        "shutdown",
        "describe",
        "events",
        "grant",
        "revoke",
        "dance",
    ] {
        let request = json!({"kind": kind, "containerName": "a", "cwd": "/", "what": ["rebuild"]});
        assert_refused(&ask(port, Some(TOKEN), &request), 403, ONLY);
    }
    assert_refused(&ask(port, Some(TOKEN), &json!({"containerName": "a"})), 403, ONLY);
    // 7: before every check of the handler, whose result would be different.
    let wrong = json!({"kind": "restart", "containerName": "a", "build": "yes"});
    assert_refused(&ask(port, Some("x"), &wrong), 403, "invalid restart token");
    assert_refused(&ask(port, Some(TOKEN), &restart("unknown")), 403, "invalid restart token");
    assert_refused(&ask(port, Some(TOKEN), &json!({"kind": "restart"})), 403, "invalid restart token");
    // 8: a refusal of the handler still has status 200.
    let answer = ask(port, Some(TOKEN), &wrong);
    assert_refused(&answer, 200, "restart.build must be a boolean if provided");
    assert_eq!(docker.changes(), Vec::<String>::new());
    // The query is ignored, and this request succeeds.
    let text = post(port, Some(TOKEN), &restart("a").to_string()).replacen("/rpc", "/rpc?x=/y", 1);
    let answer = ask_text(port, text);
    assert_eq!(answer.status, 200);
    assert_eq!(answer.body, json!({"ok": true, "result": {"containerName": "a", "scheduled": true}}));
    home.wait_for_event("restart-completed", |event| event["containerName"] == "a");
}

fn oversized_unauthenticated() {
    let home = Home::new();
    let _daemon = home.daemon();
    let port = http_port(&home);
    // As the reference's own client does it: in one write.
    let mut web = Web::connect(port);
    let _ = web.try_send(post(port, None, &"x".repeat(70_000)));
    assert_refused(&web.answer(), 401, "missing bearer token");
    // The answer arrives although no byte of the body was sent.
    let mut web = Web::connect(port);
    web.send(format!("POST /rpc HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-length: 70000\r\n\r\n"));
    assert_refused(&web.answer(), 401, "missing bearer token");
}

fn oversized_body() {
    let home = Home::new();
    let _daemon = home.daemon();
    register_with(&home, "a", &json!({"restartToken": TOKEN}));
    let port = http_port(&home);
    let body = |length: usize| {
        let request = json!({"kind": "secrets-patch", "containerName": "a", "pad": ""}).to_string();
        request.replace("\"pad\":\"\"", &format!("\"pad\":\"{}\"", "x".repeat(length - request.len())))
    };
    let whole = ask_text(port, post(port, Some(TOKEN), &body(65_536)));
    assert_eq!(whole.status, 200, "{whole:?}");
    let mut web = Web::connect(port);
    let _ = web.try_send(post(port, Some(TOKEN), &body(65_537)));
    assert_refused(&web.answer(), 413, "request exceeds buffer limit");
    // Without an announced length the endpoint counts the body's bytes.
    let mut web = Web::connect(port);
    let _ = web.try_send(format!(
        "POST /rpc HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nauthorization: Bearer {TOKEN}\r\ntransfer-encoding: chunked\r\n\r\n"
    ));
    let piece = body(65_536);
    let _ = web.try_send(format!("{:x}\r\n{piece}\r\n1\r\n \r\n", piece.len()));
    assert_refused(&web.answer(), 413, "request exceeds buffer limit");
    // The endpoint neither waits for an endless body nor stores it.
    let mut web = Web::connect(port);
    let _ = web.try_send(format!(
        "POST /rpc HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nauthorization: Bearer {TOKEN}\r\ntransfer-encoding: chunked\r\n\r\nffffffff\r\n"
    ));
    let piece = vec![b'x'; 1 << 20];
    let sent = (0..512).take_while(|_| web.try_send(&piece).is_ok()).count();
    assert!(sent < 512, "half a gibibyte was taken");
}

fn foreign_hosts() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &["a"]);
    let _daemon = home.daemon();
    register_with(&home, "a", &json!({"restartToken": TOKEN}));
    let port = http_port(&home);
    let with_host = |host: &str| {
        let request = post(
            port,
            Some(TOKEN),
            &json!({"kind": "restart", "containerName": "a", "build": 7}).to_string(),
        );
        ask_text(port, request.replacen(&format!("host: 127.0.0.1:{port}"), host, 1))
    };
    // The header that browsers send after a foreign name was bound to this address, and variants of it.
    for host in [
        format!("host: evil.example:{port}"),
        "host: evil.example".to_owned(),
        format!("host: 127.0.0.1.evil.example:{port}"),
        format!("host: localhost.evil.example:{port}"),
        format!("host: 127.0.0.1:{port}@evil.example"),
        format!("host: 169.254.169.254:{port}"),
        "host: ".to_owned(),
        format!("host: 127.0.0.1:{port}\r\nhost: evil.example"),
    ] {
        let answer = with_host(&host);
        assert!((400..500).contains(&answer.status), "{host}: {answer:?}");
        assert!(!answer.reason().contains("boolean"), "{host} reached the handler: {answer:?}");
    }
    for host in ["127.0.0.1", "localhost", "host.docker.internal", "LOCALHOST", "[::1]"] {
        let answer = with_host(&format!("host: {host}:{port}"));
        assert!(answer.reason().contains("boolean"), "{host}: {answer:?}");
    }
    assert_eq!(docker.changes(), Vec::<String>::new());
}

fn bearer_forms() {
    let home = Home::new();
    let _daemon = home.daemon();
    register_with(&home, "a", &json!({"restartToken": TOKEN}));
    let port = http_port(&home);
    let body = json!({"kind": "restart", "containerName": "a", "build": 7}).to_string();
    let with = |authorization: &str| {
        let request = post(port, Some(TOKEN), &body);
        ask_text(port, request.replacen(&format!("authorization: Bearer {TOKEN}"), authorization, 1))
    };
    for missing in [
        "x-nothing: 1".to_owned(),
        format!("authorization: {TOKEN}"),
        format!("authorization: bearer {TOKEN}"),
        format!("authorization: BEARER {TOKEN}"),
        format!("authorization: Basic {TOKEN}"),
        "authorization: Bearer ".to_owned(),
        "authorization: Bearer".to_owned(),
    ] {
        assert_refused(&with(&missing), 401, "missing bearer token");
    }
    for wrong in [
        format!("authorization: Bearer {}", &TOKEN[1..]),
        format!("authorization: Bearer {}", &TOKEN[..TOKEN.len() - 1]),
        format!("authorization: Bearer {TOKEN}x"),
        format!("authorization: Bearer {}", TOKEN.to_ascii_lowercase()),
        "authorization: Bearer null".to_owned(),
        "authorization: Bearer undefined".to_owned(),
    ] {
        assert_refused(&with(&wrong), 403, "invalid restart token");
    }
    for right in [format!("authorization: Bearer {TOKEN}"), format!("Authorization:Bearer {TOKEN}")] {
        assert_refused(&with(&right), 200, "restart.build must be a boolean if provided");
    }
}

fn for_itself_alone() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &["a", "b", "c"]);
    let _daemon = home.daemon();
    register_with(&home, "a", &json!({"restartToken": TOKEN}));
    register_with(&home, "b", &json!({"restartToken": OTHER}));
    register_with(&home, "c", &json!({"brokerToken": "broker-of-c"}));
    let port = http_port(&home);
    let patch = |name: &str| json!({"kind": "secrets-patch", "containerName": name, "patch": {"mcp": {"server": "s", "credential": {}}}});
    // Another container's token, another container's name, a container without a token, and the token of another channel.
    for (name, token) in
        [("a", OTHER), ("b", TOKEN), ("c", TOKEN), ("c", OTHER), ("c", "broker-of-c"), ("c", "undefined")]
    {
        assert_refused(&ask(port, Some(token), &restart(name)), 403, "invalid restart token");
        assert_refused(&ask(port, Some(token), &patch(name)), 403, "invalid restart token");
    }
    // A new instance has a new token, and the old token is invalid.
    register_with(&home, "a", &json!({"restartToken": "new"}));
    assert_refused(&ask(port, Some(TOKEN), &restart("a")), 403, "invalid restart token");
    // After a registration without a token, HTTP is closed to the container; with an empty one, too.
    for fields in [json!({}), json!({"restartToken": ""})] {
        register_with(&home, "b", &fields);
        assert_refused(&ask(port, Some(OTHER), &restart("b")), 403, "invalid restart token");
    }
    assert_eq!(rpc::ask(&home, &json!({"kind": "deregister", "containerName": "a"})), json!({"ok": true}));
    assert_refused(&ask(port, Some("new"), &restart("a")), 403, "invalid restart token");
    assert_eq!(docker.changes(), Vec::<String>::new());
    assert!(!home.folder("a").join("secrets.json").exists());
}

fn connection_reuse() {
    let home = Home::new();
    let _daemon = home.daemon();
    let port = http_port(&home);
    let mut web = Web::connect(port);
    for _ in 0..3 {
        web.send(post(port, Some("x"), &restart("a").to_string()));
        let answer = web.answer();
        assert_refused(&answer, 403, "invalid restart token");
        // Whether a connection can be reused is the daemon's choice; it announces the choice, and a client can rely on it.
        if answer.header("connection").as_deref() == Some("close") {
            assert!(web.is_closed());
            web = Web::connect(port);
        }
    }
    // Of two pipelined requests the first is answered; the second may be answered or dropped.
    let mut web = Web::connect(port);
    web.send(format!("{}{}", post(port, None, ""), post(port, Some("x"), "no")));
    assert_eq!(web.answer().status, 401);
    assert!(web.any_answer().is_none_or(|answer| answer.status == 400));
}

fn other_framings() {
    let home = Home::new();
    let _daemon = home.daemon();
    let port = http_port(&home);
    let body = restart("a").to_string();
    let (left, right) = body.split_at(5);
    let chunked = format!(
        "POST /rpc HTTP/1.1\r\nhost: localhost:{port}\r\nauthorization: Bearer x\r\ntransfer-encoding: chunked\r\n\r\n{:x}\r\n{left}\r\n{:x}\r\n{right}\r\n0\r\n\r\n",
        left.len(),
        right.len()
    );
    assert_refused(&ask_text(port, chunked), 403, "invalid restart token");
    let old = post(port, Some("x"), &body).replacen("HTTP/1.1", "HTTP/1.0", 1);
    let mut web = Web::connect(port);
    web.send(old);
    assert_refused(&web.answer(), 403, "invalid restart token");
    assert!(web.is_closed());
    // A client that sends `Expect: 100-continue` gets the permission or the answer.
    let mut web = Web::connect(port);
    web.send(post(port, Some("x"), "").replacen(
        "content-length: 0",
        &format!("expect: 100-continue\r\ncontent-length: {}", body.len()),
        1,
    ));
    let mut answer = web.any_answer().unwrap();
    if answer.status == 100 {
        web.send(&body);
        answer = web.answer();
    }
    assert!([403, 417].contains(&answer.status), "{answer:?}");
}

fn slow_client() {
    let home = Home::new();
    let _daemon = home.daemon();
    let port = http_port(&home);
    let limit = Duration::from_secs(60);
    // One client sends nothing, one never ends its head, one never ends its body.
    let silent = Web::connect(port).with_read_timeout(limit);
    let mut in_head = Web::connect(port).with_read_timeout(limit);
    in_head.send(format!("POST /rpc HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nx-slow: "));
    let mut in_body = Web::connect(port).with_read_timeout(limit);
    in_body.send(format!(
        "POST /rpc HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nauthorization: Bearer x\r\ncontent-length: 100\r\n\r\n{{"
    ));
    let start = Instant::now();
    for (what, mut web) in [("head", in_head), ("body", in_body), ("silence", silent)] {
        // The daemon may answer before it closes the connection.
        while let Some(answer) = web.any_answer() {
            assert!(answer.status >= 400, "{what}: {answer:?}");
        }
        assert!(
            start.elapsed() < Duration::from_secs(35),
            "{what}: cut off after {:?} only",
            start.elapsed()
        );
    }
    assert!(start.elapsed() > NEGATIVE_WAIT, "the time limit is zero");
}

fn invalid_http() {
    let home = Home::new();
    let mut daemon = home.daemon();
    let port = http_port(&home);
    let giant = format!("POST /rpc HTTP/1.1\r\nhost: x\r\nx: {}\r\n\r\n", "y".repeat(2 << 20));
    let many = format!("POST /rpc HTTP/1.1\r\nhost: x\r\n{}\r\n", "a: b\r\n".repeat(100_000));
    let junk: [&[u8]; 6] = [
        b"{\"kind\":\"list\"}\n\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST /rpc HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        giant.as_bytes(),
        many.as_bytes(),
    ];
    for bytes in junk {
        let mut web = Web::connect(port);
        let _ = web.try_send(bytes);
        if let Some(answer) = web.any_answer() {
            assert!(answer.status >= 400, "{answer:?}");
        }
    }
    assert!(daemon.has_ended().is_none());
    assert_eq!(ask(port, Some("x"), &restart("a")).status, 403);
}

fn half_open() {
    let home = Home::new();
    let mut daemon = home.daemon();
    let port = http_port(&home);
    let mut crowd = Vec::new();
    for index in 0..1000 {
        let Ok(stream) =
            TcpStream::connect_timeout(&([127, 0, 0, 1], port).into(), Duration::from_millis(200))
        else {
            // All places are in use: the daemon may leave clients in the kernel's backlog.
            break;
        };
        if index % 2 == 0 {
            let _ = std::io::Write::write_all(&mut (&stream), b"POST /rpc HTTP/1.1\r\n");
        }
        crowd.push(stream);
    }
    // The Unix socket is not affected.
    assert_eq!(rpc::names(&home), Vec::<String>::new());
    assert!(daemon.has_ended().is_none());
    drop(crowd);
    // Places are free again as soon as the daemon has seen the clients close.
    wait_until("an answer after the crowd", || {
        let mut web = Web::connect(port);
        let _ = web.try_send(post(port, Some("x"), &restart("a").to_string()));
        let answer = web.any_answer();
        if answer.as_ref().is_some_and(|answer| answer.status == 403) { Ok(()) } else { Err(answer) }
    });
}

fn preferred_port() {
    let home = Home::new();
    let _daemon = home.daemon();
    assert_eq!(http_port(&home), 8974);
    let event = home.wait_for_event("daemon-http-listening", |event| event["host"] == "127.0.0.1");
    assert_eq!(event["port"], 8974);
    assert!(home.events().iter().all(|event| event["kind"] != "daemon-http-port-fallback"));
    // Events arrive in the order in which the listeners open: the HTTP listener opens before the socket.
    let events = home.events();
    let at = |kind: &str| events.iter().position(|event| event["kind"] == kind).unwrap();
    assert!(at("daemon-http-listening") < at("daemon-listening"));
    assert_eq!(events[at("daemon-listening")]["socket"], home.socket().to_str().unwrap());
}

fn fallback_port() {
    let home = Home::new();
    let busy = TcpListener::bind((Ipv4Addr::LOCALHOST, 8974)).unwrap();
    let daemon = home.daemon();
    let port = http_port(&home);
    assert_ne!(port, 8974);
    let event = home.wait_for_event("daemon-http-port-fallback", |_| true);
    assert_eq!((&event["preferred"], &event["actual"]), (&json!(8974), &json!(port)));
    assert_eq!(ask(port, Some("x"), &restart("a")).status, 403);
    daemon.shut_down();
    // The next daemon uses the preferred port again.
    drop(busy);
    let _daemon = home.daemon();
    assert_eq!(http_port(&home), 8974);
}

fn same_port() {
    let home = Home::new();
    for round in 0..3 {
        let daemon = home.daemon();
        assert_eq!(http_port(&home), 8974, "round {round}");
        // Connections of the previous daemon stay in TIME_WAIT, and must not block the port.
        let mut web = Web::connect(8974);
        web.send(post(8974, Some("x"), &restart("a").to_string()));
        assert_eq!(web.answer().status, 403);
        if round == 0 {
            daemon.kill();
        } else {
            daemon.shut_down();
        }
    }
    // A given port, and any free port with 0.
    let daemon = home.start().argument("--http-port").argument("9111").wait_until_ready();
    assert_eq!(http_port(&home), 9111);
    daemon.shut_down();
    let _daemon = home.start().argument("--http-port").argument("0").wait_until_ready();
    assert_ne!(http_port(&home), 0);
}

fn token_in_no_output() {
    let home = Home::new();
    let _docker = FakeDocker::start(&home, &["a"]);
    let daemon = home.daemon();
    let (token, broker) = ("canary-1-restart-token", "canary-2-broker-token");
    let mut received = Vec::new();
    let mut live = rpc::Wire::connect(&home);
    live.send("{\"kind\":\"events\"}\n");
    let fields = json!({"restartToken": token, "brokerToken": broker, "wsHostPort": 4000, "portForward": {"allow": [3000]}});
    register_with(&home, "a", &fields);
    let port = http_port(&home);
    // Valid tokens, and invalid ones that look like them, in fields where they do not belong.
    for (name, presented) in [("a", token), ("a", broker), ("b", token), ("a", "canary-3-guess")] {
        received.push(ask(port, Some(presented), &restart(name)).body.to_string());
        let body = json!({"kind": presented, "containerName": presented, "restartToken": presented});
        received.push(ask(port, Some(presented), &body).body.to_string());
    }
    home.wait_for_event("restart-completed", |_| true);
    for request in [
        json!({"kind": "list"}),
        json!({"kind": "status", "containerName": "a"}),
        json!({"kind": "describe"}),
        json!({"kind": "register", "containerName": "a", "cwd": "/", "restartToken": [token]}),
        json!({"kind": "register", "containerName": "a", "cwd": "/", "brokerToken": {"x": broker}}),
        json!({"kind": "register", "containerName": "a", "cwd": 7, "restartToken": token, "brokerToken": broker}),
    ] {
        received.push(rpc::ask(&home, &request).to_string());
    }
    // The daemon does not repeat an invalid line either.
    received.push(rpc::exchange(&home, format!("{{\"restartToken\":\"{token}\"\n")).to_string());
    for verb in
        [&["status"][..], &["status", "a"], &["ls"], &["ls", "--json"], &["status", "a", "--json"], &["logs"]]
    {
        let output = home.run(verb);
        received.push(
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr),
        );
    }
    received.push(
        String::from_utf8_lossy(&std::fs::read(format!("/proc/{}/cmdline", daemon.pid())).unwrap())
            .into_owned(),
    );
    // The event about an invalid registration file with a token in it does not contain the token.
    daemon.shut_down();
    received.push(live.rest());
    home.write_registration(
        "torn",
        format!("{{\"containerName\":\"torn\",\"restartToken\":\"{token}\",\"cwd\":"),
    );
    home.write_registration(
        "odd",
        json!({"containerName": "odd", "cwd": "/", "restartToken": [token]}).to_string(),
    );
    let daemon = home.daemon();
    home.wait_for_event("registration-skipped", |event| event["containerName"] == "odd");
    home.wait_for_event("registration-skipped", |event| event["containerName"] == "torn");
    daemon.shut_down();
    received.push(home.stderr());
    let leak = received.iter().find(|text| text.contains("canary"));
    assert!(leak.is_none(), "token in an output: {leak:?}");
    let kept: Vec<_> =
        home.files().into_iter().filter(|(_, bytes)| bytes.windows(6).any(|six| six == b"canary")).collect();
    assert!(!kept.is_empty(), "the canary is not where it should be");
    for (path, _) in kept {
        assert!(path.starts_with(home.path().join("run/registrations")), "kept in {}", path.display());
    }
    wait_until("the log to be written", || if home.events().is_empty() { Err("empty") } else { Ok(()) });
}
