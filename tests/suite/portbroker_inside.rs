//! `landfall agent` with slow, invalid or hostile hosts and servers: the repairs of A.3.5 and A.3.6 of the wire
//! specification on the container's side, and claims 9 and 24 there.

use std::io::{ErrorKind, Write};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use landfall_tests::broker::{
    Agent, CONTAINER_PORT, Peer, Received, ack, close_downstream, data, dial, open, payload, stream,
    try_dial, welcome, welcome_with,
};
use landfall_tests::case::Case;
use landfall_tests::process::{descriptors_of, resident_bytes_of};
use landfall_tests::{
    End, Home, NEGATIVE_WAIT, Namespace, Pattern, Server, connect_from, expect_bytes, is_long, note,
    read_some, read_to_end, wait_until,
};
use serde_json::json;

use crate::portbroker_container::{Inside, TOKEN, ports};

pub(crate) const CASES: &[Case] = &[
    Case::once("portbroker_agent_answers_http_as_specified", http_answers),
    Case::once("portbroker_agent_reaches_a_server_on_ipv6_only", v6_alone),
    Case::once("portbroker_agent_reports_changes_in_order", order_of_changes),
    Case::once("portbroker_agent_serialises_subscriptions", subscriptions),
    Case::once("portbroker_agent_ignores_invalid_messages", invalid_messages),
    Case::once("portbroker_agent_loses_no_byte_to_a_slow_server", slow_server),
    Case::once("portbroker_agent_uses_bounded_memory_for_a_host_that_never_reads", host_never_reads),
    Case::once(
        "portbroker_agent_drops_a_connection_that_was_closed_while_connecting",
        closed_while_connecting,
    ),
    Case::once("c09_broker_cycles_leak_no_descriptor_in_the_agent", cycles_leak_no_descriptor),
    Case::once("c24_agent_disconnects_hosts_that_send_no_hello", no_hello),
    Case::once("c24_agent_survives_slow_and_oversized_requests", slow_clients),
];

/// Sends bytes to the agent's port, and returns everything that comes back.
#[track_caller]
fn http(namespace: &Namespace, request: &str) -> String {
    let mut stream = connect_from(namespace, SocketAddr::from(([127, 0, 0, 1], CONTAINER_PORT)));
    stream.write_all(request.as_bytes()).unwrap();
    let (mut all, mut buffer) = (Vec::new(), [0; 4096]);
    while let Ok(count @ 1..) = read_some(&stream, &mut buffer) {
        all.extend_from_slice(&buffer[..count]);
    }
    String::from_utf8_lossy(&all).into_owned()
}

#[track_caller]
fn assert_answer(answer: &str, status: &str, text: &str) {
    let status = format!("HTTP/1.1 {status} ");
    assert!(answer.starts_with(&status) && answer.trim_end().ends_with(text), "{answer:?}");
}

const UPGRADE: &str = "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n";

fn http_answers() {
    let home = Home::new();
    let inside = Inside::start(&home);
    let get = |path: &str, headers: &str| {
        http(
            &inside.namespace,
            &format!("GET {path} HTTP/1.1\r\nhost: 127.0.0.1:41234\r\nconnection: close\r\n{headers}\r\n"),
        )
    };
    assert_answer(&get("/portbroker", ""), "400", "upgrade failed");
    assert_answer(&get("/", ""), "404", "");
    assert_answer(&get("/other", ""), "404", "");
    // Without a token in its environment the agent upgrades no connection.
    let (disabled, shared) = (Namespace::new(), home.folder("shared"));
    let mut command = Agent::command(&home, "");
    command.args(["--directory", shared.to_str().unwrap()]);
    let _agent = Agent::spawn(&home, &disabled, command);
    let answer = http(&disabled, &format!("GET /portbroker HTTP/1.1\r\nhost: x\r\n{UPGRADE}\r\n"));
    assert_answer(&answer, "404", "portbroker disabled");
    assert!(try_dial(&disabled).is_err());
}

fn v6_alone() {
    let home = Home::new();
    let inside = Inside::start(&home);
    let server = Server::listen(&inside.namespace, "[::1]:5173");
    let mut host = inside.host();
    host.send_message(&json!({"type": "port-watch-subscribe"}));
    assert_eq!(ports(&host.message()), [(5173, "127.0.0.1".to_owned())]);
    host.send_message(&open(1, 5173));
    assert_eq!(host.message(), ack(1));
    let upstream = server.accept();
    host.send_message(&data(1, b"v6"));
    expect_bytes(&upstream, b"v6");
}

/// First all openings in the order of the new scan, then all closings in the order of the previous scan; a change of the
/// address alone is not a change.
fn order_of_changes() {
    let home = Home::new();
    let inside = Inside::start(&home);
    let mut old: Vec<Server> = (0..8)
        .map(|index| Server::listen(&inside.namespace, &format!("127.0.0.1:{}", 4000 + index)))
        .collect();
    let mut host = inside.host();
    host.send_message(&json!({"type": "port-watch-subscribe"}));
    let before: Vec<u64> = ports(&host.message()).into_iter().map(|(port, _)| port).collect();
    // Usually all of it between two scans: a listener moves to every address, eight end, eight start.
    let moved = Server::listen(&inside.namespace, "127.0.0.1:5000");
    assert_eq!(host.message()["port"], 5000);
    drop(moved);
    let _moved = Server::listen(&inside.namespace, "0.0.0.0:5000");
    old.clear();
    let new: Vec<Server> = (0..8)
        .map(|index| Server::listen(&inside.namespace, &format!("127.0.0.1:{}", 6000 + index)))
        .collect();
    let changes: Vec<(String, u64)> = (0..16)
        .map(|_| {
            let message = host.message();
            (message["type"].as_str().unwrap().to_owned(), message["port"].as_u64().unwrap())
        })
        .collect();
    let of = |kind: &str| -> Vec<u64> {
        changes.iter().filter(|(reported, _)| reported == kind).map(|(_, port)| *port).collect()
    };
    let closed = of("port-listen-closed");
    assert_eq!(of("port-listen-opened").len(), new.len(), "{changes:?}");
    // A scan may fall between the two halves; then each half keeps its order as well.
    assert_eq!(closed, before, "closings in the order of the reading before: {changes:?}");
    let openings_first = changes[..8].iter().all(|(kind, _)| kind == "port-listen-opened");
    let closings_first = changes[..8].iter().all(|(kind, _)| kind == "port-listen-closed");
    assert!(openings_first || closings_first, "{changes:?}");
    assert!(host.is_silent_for(3 * NEGATIVE_WAIT), "a change of the address alone");
}

fn subscriptions() {
    let home = Home::new();
    let inside = Inside::start(&home);
    let mut host = inside.host();
    let (subscribe, unsubscribe) =
        (json!({"type": "port-watch-subscribe"}), json!({"type": "port-watch-unsubscribe"}));
    // Two subscriptions have the effect of one.
    host.send_message(&subscribe);
    host.send_message(&subscribe);
    host.receive("port-listen-snapshot");
    let server = Server::listen(&inside.namespace, "127.0.0.1:5173");
    host.receive("port-listen-opened");
    assert!(host.is_silent_for(3 * NEGATIVE_WAIT), "two timers");
    // A subscription that is withdrawn before its scan.
    host.send_message(&unsubscribe);
    for _ in 0..20 {
        host.send_message(&subscribe);
        host.send_message(&unsubscribe);
    }
    drop(server);
    host.is_silent_for(NEGATIVE_WAIT);
    while host.kept("port-listen-snapshot") > 0 {
        host.receive("port-listen-snapshot");
        host.is_silent_for(NEGATIVE_WAIT);
    }
    let _server = Server::listen(&inside.namespace, "127.0.0.1:5174");
    assert!(host.is_silent_for(4 * NEGATIVE_WAIT), "an unsubscribe was lost");
    // Each connection has its own subscription.
    let mut other = inside.host();
    other.send_message(&subscribe);
    other.receive("port-listen-snapshot");
    assert!(host.is_silent_for(NEGATIVE_WAIT));
}

fn invalid_messages() {
    let home = Home::new();
    let inside = Inside::start(&home);
    let (_server, mut host, upstream) = inside.stream(1);
    for text in ["", "nonsense", "{", "[]", "null", "7", "{}", "{\"type\":7}"] {
        host.send_text(text);
    }
    host.send_text(&"[".repeat(100_000));
    for message in [
        json!({"type": "future-thing"}),
        json!({"type": "relay-open"}),
        json!({"type": "relay-open", "streamId": 2}),
        json!({"type": "relay-open", "streamId": 2, "port": 0}),
        json!({"type": "relay-open", "streamId": 2, "port": 65_536}),
        json!({"type": "relay-open", "streamId": "x", "port": 5173}),
        json!({"type": "relay-data", "streamId": 1}),
        json!({"type": "relay-data", "streamId": 77, "bytes": "AAAA"}),
        json!({"type": "relay-close", "streamId": 77, "side": "downstream"}),
        json!({"type": "port-forward-result"}),
        json!({"type": "port-forward-result", "port": 5173, "ok": "yes"}),
        json!({"type": "relay-credit", "streamId": 1, "bytes": 1}),
        json!({"type": "relay-eof", "streamId": 1}),
        json!({"type": "relay-reset", "streamId": 1}),
    ] {
        host.send_message(&message);
    }
    host.send_binary(&[1, 0, 0, 0, 1, 66, 66, 66]);
    host.send_message(&data(1, b"fine"));
    expect_bytes(&upstream, b"fine");
    host.ping();
    wait_until("the log", || {
        let printed = inside.agent.printed();
        if printed.contains("unexpected") && printed.contains("invalid json") { Ok(()) } else { Err(printed) }
    });
}

fn slow_server() {
    const COUNT: u64 = 12 << 20;
    let home = Home::new();
    let inside = Inside::start(&home);
    let (_server, mut host, upstream) = inside.stream(1);
    let mut block = vec![0; 65_536];
    for position in (0..COUNT).step_by(block.len()) {
        Pattern::new(1).fill(position, &mut block);
        host.send_message(&data(1, &block));
    }
    host.send_message(&close_downstream(1));
    // The host has sent everything, and the server has read no byte.
    host.ping();
    let mut checker = Pattern::new(1).checker();
    assert_eq!(read_to_end(&upstream, &mut checker), End::Eof);
    assert_eq!(checker.position(), COUNT);
}

/// At most a few megabytes are buffered for a host that does not read, far below the 16 MiB at which the reference's runtime
/// fails; the servers are held back, and no byte is lost.
fn host_never_reads() {
    const STREAMS: i64 = 20;
    let home = Home::new();
    let inside = Inside::start(&home);
    let server = Server::listen(&inside.namespace, "127.0.0.1:5173");
    let mut host = inside.host();
    let mut upstreams = Vec::new();
    for id in 1..=STREAMS {
        host.send_message(&open(id, 5173));
        host.receive_exactly(&ack(id));
        upstreams.push(server.accept());
    }
    let before = resident_bytes_of(inside.agent.pid());
    let mut block = vec![0; 65_536];
    let mut sent = Vec::new();
    for mut upstream in &upstreams {
        upstream.set_nonblocking(true).unwrap();
        let (mut position, mut refused) = (0, 0);
        wait_until("the way to be full", || {
            Pattern::new(3).fill(position, &mut block);
            match upstream.write(&block) {
                Ok(count) => (position, refused) = (position + count as u64, 0),
                Err(error) if error.kind() == ErrorKind::WouldBlock => refused += 1,
                Err(error) => panic!("{error}"),
            }
            if refused >= 20 { Ok(()) } else { Err(position) }
        });
        sent.push(position);
    }
    let grown = resident_bytes_of(inside.agent.pid()).saturating_sub(before) >> 20;
    assert!(grown < 64, "{grown} MiB for a host that reads nothing");
    // Another host is served in the meantime.
    let (mut other, small) = (inside.host(), &server);
    other.send_message(&open(1, 5173));
    assert_eq!(other.message(), ack(1));
    small.accept().write_all(b"other").unwrap();
    assert_eq!(other.receive_data(1, 5), b"other");
    // The host reads now.
    let mut checkers: Vec<_> = sent.iter().map(|_| Pattern::new(3).checker()).collect();
    while checkers.iter().zip(&sent).any(|(checker, sent)| checker.position() < *sent) {
        let message = host.receive("relay-data");
        let bytes = payload(&message);
        assert!(bytes.len() <= 65_536, "{} bytes in a message", bytes.len());
        checkers[usize::try_from(stream(&message) - 1).unwrap()].check(&bytes);
    }
    note!("{STREAMS} servers held: {} KiB sent, {grown} MiB in the agent", sent.iter().sum::<u64>() >> 10);
}

/// A server whose backlog is full, so that a connection to it stays pending until the server accepts.
struct Busy {
    server: Server,
    _waiting: Vec<std::net::TcpStream>,
}

impl Busy {
    fn listen(namespace: &Namespace, port: u16) -> Busy {
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let server = Server::listen_backlog(namespace, address, 0, None);
        // One connection is queued; the SYN of a second one would not be answered.
        let waiting = vec![connect_from(namespace, address)];
        Busy { server, _waiting: waiting }
    }
}

fn closed_while_connecting() {
    let home = Home::new();
    let inside = Inside::start(&home);
    let busy = Busy::listen(&inside.namespace, 5173);
    let mut host = inside.host();
    let before = descriptors_of(inside.agent.pid());
    for id in 1..=50 {
        host.send_message(&open(id, 5173));
        host.send_message(&data(id, b"dropped"));
        host.send_message(&close_downstream(id));
    }
    // No connect is answered, and none stays.
    assert!(host.is_silent_for(NEGATIVE_WAIT), "an ack of a stream that was closed");
    wait_until("the descriptors to be back", || match descriptors_of(inside.agent.pid()) {
        count if count <= before => Ok(()),
        count => Err((count, before)),
    });
    drop(busy.server.accept());
    assert!(host.is_silent_for(NEGATIVE_WAIT));
    host.ping();
}

fn cycles_leak_no_descriptor() {
    let cycles: i64 = if is_long() { 10_000 } else { 1_500 };
    let home = Home::new();
    let inside = Inside::start(&home);
    let server = Server::listen(&inside.namespace, "127.0.0.1:5173");
    server.serve_in_turn(4, |mut stream| {
        let mut buffer = [0; 1024];
        while let Ok(count @ 1..) = read_some(&stream, &mut buffer) {
            if stream.write_all(&buffer[..count]).is_err() {
                return;
            }
        }
    });
    let busy = Busy::listen(&inside.namespace, 5174);
    let run = |host: &mut Peer, from: i64, until: i64| {
        for id in from..until {
            match id % 4 {
                // Opened, used, and closed by the host.
                0 => {
                    host.send_message(&open(id, 5173));
                    host.receive_exactly(&ack(id));
                    host.send_message(&data(id, b"x"));
                    host.receive_data(id, 1);
                    host.send_message(&close_downstream(id));
                }
                // Closed before it can be open.
                1 => {
                    host.send_message(&open(id, 5174));
                    host.send_message(&close_downstream(id));
                }
                // Closed while it opens.
                2 => {
                    host.send_message(&open(id, 5173));
                    host.send_message(&close_downstream(id));
                }
                // Refused.
                _ => {
                    host.send_message(&open(id, 5999));
                    host.receive("relay-open-nack");
                }
            }
            if id % 100 == 0 {
                host.discard_kept();
            }
        }
    };
    let mut host = inside.host();
    run(&mut host, 1, 41);
    host.hang_up();
    // A first round fills all caches; no client is connected before and after.
    let alone = || {
        let mut last = (0, 0);
        wait_until("the agent to be at rest", || {
            let now = descriptors_of(inside.agent.pid());
            last = if now == last.0 { (now, last.1 + 1) } else { (now, 0) };
            if last.1 > 50 { Ok(now) } else { Err(now) }
        })
    };
    let before = alone();
    let resident = resident_bytes_of(inside.agent.pid());
    let mut host = inside.host();
    run(&mut host, 41, cycles);
    // Some streams are open when the connection is lost, and some are pending.
    for id in 0..20 {
        host.send_message(&open(1_000_000 + id, 5173 + u16::try_from(id % 2).unwrap()));
    }
    host.hang_up();
    wait_until("the descriptors to be back", || match descriptors_of(inside.agent.pid()) {
        count if count <= before => Ok(()),
        count => Err((count, before)),
    });
    let grown = resident_bytes_of(inside.agent.pid()).saturating_sub(resident) >> 20;
    assert!(grown < 8, "{grown} MiB after {cycles} cycles");
    drop(busy);
}

/// Five seconds for the first message.
fn no_hello() {
    let home = Home::new();
    let inside = Inside::start(&home);
    let begun = Instant::now();
    let mut silent = dial(&inside.namespace);
    let mut pinging = dial(&inside.namespace);
    pinging.ping();
    let late = silent.receive_end();
    let waited = begun.elapsed();
    assert!((4500..8000).contains(&waited.as_millis()), "{late:?} after {waited:?}");
    assert!(matches!(pinging.receive_end(), Received::Closed(..) | Received::Lost));
    // A host that sent its hello stays connected.
    let mut host = inside.host();
    host.ping();
}

fn slow_clients() {
    let home = Home::new();
    let inside = Inside::start(&home);
    let before = resident_bytes_of(inside.agent.pid());
    let address = SocketAddr::from(([127, 0, 0, 1], CONTAINER_PORT));
    // Many connections that send no byte, or half a head.
    let slow: Vec<_> = (0..200)
        .map(|index| {
            let mut stream = connect_from(&inside.namespace, address);
            let head = ["", "GET /portbroker HTTP/1.1\r\nhost: x\r\n", "\x16\x03\x01", "GET"][index % 4];
            stream.write_all(head.as_bytes()).unwrap();
            stream
        })
        .collect();
    inside.host().ping();
    // A head without an end.
    let mut endless = connect_from(&inside.namespace, address);
    endless.set_write_timeout(Some(Duration::from_secs(2))).unwrap();
    let _ = endless.write_all(b"GET /portbroker HTTP/1.1\r\nx: ");
    let (line, mut taken) = ([b'x'; 65_536], 0);
    while taken < 64 << 20 && endless.write_all(&line).is_ok() {
        taken += line.len();
    }
    assert!(taken < 64 << 20, "a head of {taken} bytes was read");
    // Before the hello a peer can send only little: a frame of gigabytes, and a message of many frames, are refused.
    for frame in [[0x81_u8, 0xff, 0x40, 0, 0, 0, 0, 0, 0, 0], [0x01, 0xff, 0, 0, 0, 0, 0x01, 0, 0, 0]] {
        let host = dial(&inside.namespace);
        let mut message_sender = host.message_sender();
        let _ = message_sender.try_write_raw(&frame);
        for _ in 0..200 {
            if message_sender.try_write_raw(&line).is_err() {
                break;
            }
        }
        inside.host().ping();
    }
    // After it, a message over the limit ends the connection.
    let (mut host, _) = welcome_with(&inside.namespace, &json!({"type": "broker-hello", "token": TOKEN}));
    let mut message_sender = host.message_sender();
    let giant = std::thread::spawn(move || {
        message_sender.try_send_message(&json!({"type": "x".repeat(17 << 20)})).is_ok()
    });
    host.receive_end();
    host.hang_up();
    let _ = giant.join().unwrap();
    let grown = resident_bytes_of(inside.agent.pid()).saturating_sub(before) >> 20;
    assert!(grown < 96, "{grown} MiB for strangers");
    welcome(&inside.namespace, TOKEN).ping();
    drop(slow);
}
