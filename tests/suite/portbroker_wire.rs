//! The daemon's side of the port broker with a slow, invalid or hostile container: the repairs of A.3.6 of the wire
//! specification, and claims 23 and 24 on this channel.

use std::io::{ErrorKind, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use landfall_tests::broker::{
    Container, Peer, ack, close_downstream, close_upstream, closed, data, forwarded, nack, not_forwarded,
    opened, payload, request, snapshot, stream,
};
use landfall_tests::case::Case;
use landfall_tests::process::{descendants, resident_bytes_of};
use landfall_tests::rpc::{ask, http_port, names};
use landfall_tests::{
    Checker, End, Home, Pattern, expect_bytes, http, note, read_to_end, send_all, wait_until,
};
use serde_json::{Value, json};

use crate::portbroker_host::{NAME, Scene, TOKEN};

pub(crate) const CASES: &[Case] = &[
    Case::once("portbroker_invalid_messages_are_ignored", invalid_messages),
    Case::once("portbroker_an_ack_of_an_unknown_stream_is_answered_with_a_close", unknown_ack),
    Case::once("portbroker_messages_of_unknown_streams_reach_no_client", invented_streams),
    Case::once("portbroker_data_before_the_ack_is_kept", data_before_ack),
    Case::once("portbroker_pieces_are_small_and_no_byte_is_lost", pieces_are_small),
    Case::once("portbroker_a_slow_client_gets_every_byte", slow_client),
    Case::once("portbroker_a_client_that_never_reads_uses_bounded_memory", client_never_reads),
    Case::once("portbroker_a_container_that_stops_reading_blocks_its_own_clients", container_stops_reading),
    Case::once("portbroker_a_large_stream_leaves_room_for_small_ones", fair),
    Case::once("c23_a_container_acts_only_for_itself_over_its_broker", only_for_itself),
    Case::once("c23_a_container_gets_no_more_ports_than_its_quota", quota),
    Case::once("c24_a_broker_token_appears_in_no_output", token_appears_nowhere),
    Case::once("c24_a_flooding_container_blocks_no_other_client", flood_blocks_no_other_client),
    Case::once("c24_oversized_messages_end_only_their_connection", giant_messages),
    Case::once("c24_peers_without_the_broker_protocol_are_disconnected", no_broker),
];

/// The longest time for an answer during an attack.
const AT_ONCE: Duration = Duration::from_secs(1);

/// Requests the list. Returns how long the answer took.
#[track_caller]
fn lists_at_once(home: &Home) -> Duration {
    let begun = Instant::now();
    assert!(!names(home).is_empty());
    let took = begun.elapsed();
    assert!(took < AT_ONCE, "list took {took:?}");
    took
}

/// The longest time for an answer while an unoptimised build that shares its processors parses a flood. Without a flood it
/// is [`AT_ONCE`].
const IN_A_FLOOD: Duration = Duration::from_secs(5);

/// Asserts that the connection works: a port that is announced is forwarded and relayed.
#[track_caller]
fn works(scene: &mut Scene<'_>, port: u16) {
    scene.peer.send_message(&opened(port));
    scene.peer.receive_exactly(&forwarded(port, port));
    let (mut client, id) = scene.connected(port);
    client.write_all(b"ping").unwrap();
    assert_eq!(scene.peer.receive_data(id, 4), b"ping");
    scene.peer.send_message(&data(id, b"pong"));
    expect_bytes(&client, b"pong");
}

fn invalid_messages() {
    let home = Home::new();
    let mut scene = Scene::forwarding(&home, &[5173]);
    let (client, id) = scene.connected(5173);
    for text in
        ["", "nonsense", "{", "[]", "null", "7", "\"relay-data\"", "{}", "{\"type\":7}", "{\"type\":\"\"}"]
    {
        scene.peer.send_text(text);
    }
    let deep = "[".repeat(100_000);
    scene.peer.send_text(&deep);
    scene.peer.send_text(&format!("{{\"type\":\"relay-data\",\"streamId\":{id},\"x\":{deep}"));
    for message in [
        json!({"type": "future-thing", "streamId": id}),
        json!({"type": "relay-data"}),
        json!({"type": "relay-data", "streamId": id}),
        json!({"type": "relay-data", "streamId": id, "bytes": 7}),
        json!({"type": "relay-data", "streamId": "x", "bytes": "AAAA"}),
        json!({"type": "relay-close"}),
        json!({"type": "relay-open", "streamId": id, "port": 1}),
        json!({"type": "broker-hello", "token": TOKEN}),
        json!({"type": "broker-hello-ack"}),
        json!({"type": "broker-hello-ack", "extensions": ["binary", "credit"]}),
        json!({"type": "port-listen-snapshot"}),
        json!({"type": "port-listen-snapshot", "ports": "all"}),
        json!({"type": "port-listen-opened", "port": "3000", "bindAddr": "127.0.0.1"}),
        json!({"type": "port-listen-opened", "port": 0, "bindAddr": "127.0.0.1"}),
        json!({"type": "port-listen-opened", "port": 65_536, "bindAddr": "127.0.0.1"}),
        json!({"type": "port-listen-closed"}),
        json!({"type": "port-listen-closed", "port": 9}),
        json!({"type": "port-forward-request", "targetPort": 4848}),
        json!({"type": "relay-credit", "streamId": id, "bytes": 4_294_967_295_u32}),
        json!({"type": "relay-eof", "streamId": id}),
        json!({"type": "relay-reset", "streamId": id}),
    ] {
        scene.peer.send_message(&message);
    }
    // No extension is in use, so a binary frame is ignored, too.
    scene.peer.send_binary(&[1, 0, 0, 0, 1, 66, 66, 66]);
    scene.peer.send_binary(&[]);
    // A piece with invalid base64 must not become other bytes; the specification does not say whether its stream stays open.
    scene.peer.send_message(&data(id, b"fine"));
    expect_bytes(&client, b"fine");
    // A message with unknown fields is not ignored.
    scene.peer.send_message(&json!({"type": "port-listen-opened", "port": 3000, "bindAddr": "0.0.0.0", "pid": 7, "extra": {"x": []}}));
    scene.peer.receive_exactly(&forwarded(3000, 3000));
    works(&mut scene, 3001);
}

fn unknown_ack() {
    let home = Home::new();
    let mut scene = Scene::forwarding(&home, &[5173]);
    for id in [7, -1, 2_147_483_648] {
        scene.peer.send_message(&ack(id));
        assert_eq!(
            scene.peer.receive("relay-close"),
            close_downstream(id),
            "it would stay open in the container"
        );
    }
    works(&mut scene, 3000);
}

fn invented_streams() {
    let home = Home::new();
    let mut scene = Scene::forwarding(&home, &[5173]);
    let (client, id) = scene.connected(5173);
    for other in [id + 1, 0, -1, i64::from(u32::MAX) + id, i64::MAX] {
        scene.peer.send_message(&data(other, b"strange"));
        scene.peer.send_message(&close_upstream(other));
        scene.peer.send_message(&nack(other, "strange"));
    }
    scene.peer.send_message(&data(id, b"own"));
    expect_bytes(&client, b"own");
    works(&mut scene, 3000);
}

fn data_before_ack() {
    let home = Home::new();
    let mut scene = Scene::forwarding(&home, &[5173]);
    let (client, id) = scene.client(5173);
    scene.peer.send_message(&data(id, b"early, "));
    scene.peer.send_message(&ack(id));
    scene.peer.send_message(&data(id, b"and late"));
    expect_bytes(&client, b"early, and late");
}

fn pieces_are_small() {
    const COUNT: u64 = 4 << 20;
    let home = Home::new();
    let mut scene = Scene::forwarding(&home, &[5173]);
    let (client, id) = scene.connected(5173);
    let sending = std::thread::spawn(move || {
        send_all(&client, Pattern::new(1), COUNT);
        client
    });
    let mut checker = Pattern::new(1).checker();
    while checker.position() < COUNT {
        let message = scene.peer.receive("relay-data");
        let bytes = payload(&message);
        assert!(stream(&message) == id && bytes.len() <= 65_536, "{} bytes in one message", bytes.len());
        checker.check(&bytes);
    }
    drop(sending.join().unwrap());
    assert_eq!(scene.peer.receive("relay-close"), close_downstream(id));
}

/// Sends the bytes of a pattern from one position to another on a stream, in pieces of 64 KiB.
fn send_pattern(peer: &mut Peer, id: i64, pattern: Pattern, from: u64, until: u64) {
    let mut block = vec![0; 65_536];
    let mut position = from;
    while position < until {
        let count = usize::try_from((until - position).min(65_536)).unwrap();
        pattern.fill(position, &mut block[..count]);
        peer.send_message(&data(id, &block[..count]));
        position += count as u64;
    }
}

/// Bytes after a partial write to the client are queued; a close waits for the queue.
fn slow_client() {
    // Below every cap that A.3.6 suggests, and above every socket buffer.
    const COUNT: u64 = 12 << 20;
    let home = Home::new();
    let mut scene = Scene::forwarding(&home, &[5173]);
    let (client, id) = scene.connected(5173);
    send_pattern(&mut scene.peer, id, Pattern::new(1), 0, COUNT);
    scene.peer.send_message(&close_upstream(id));
    // The daemon has read everything by now, and the client has read no byte.
    works(&mut scene, 3000);
    let mut checker = Pattern::new(1).checker();
    assert_eq!(read_to_end(&client, &mut checker), End::Eof);
    assert_eq!(checker.position(), COUNT);
}

fn client_never_reads() {
    const EACH: u64 = 96 << 20;
    let home = Home::new();
    let mut scene = Scene::forwarding(&home, &[5173]);
    let before = resident_bytes_of(scene.daemon.pid());
    let (client, id) = scene.connected(5173);
    let (other, kept) = scene.connected(5173);
    let mut message_sender = scene.peer.message_sender();
    let flood = std::thread::spawn(move || {
        let block = data(id, &[7; 65_536]);
        for _ in 0..EACH / 65_536 {
            message_sender.try_send_message(&block).unwrap();
        }
    });
    // The daemon reads everything, and the stream exceeded its cap long before.
    flood.join().unwrap();
    assert_eq!(scene.peer.receive("relay-close"), close_downstream(id), "a stream over its cap is closed");
    // The client can still read the bytes that were delivered before; then the end.
    let mut bytes = 0_u64;
    let mut buffer = vec![0; 1 << 20];
    while let Ok(count @ 1..) = landfall_tests::read_some(&client, &mut buffer) {
        bytes += count as u64;
    }
    assert!(bytes < EACH, "nothing was dropped of {bytes} bytes");
    scene.peer.send_message(&data(kept, b"alive"));
    expect_bytes(&other, b"alive");
    lists_at_once(&home);
    let grown = resident_bytes_of(scene.daemon.pid()).saturating_sub(before) >> 20;
    assert!(grown < 128, "{grown} MiB for one client that does not read");
    works(&mut scene, 3000);
}

fn container_stops_reading() {
    const CLIENTS: usize = 30;
    let home = Home::new();
    let mut scene = Scene::forwarding(&home, &[5173]);
    let before = resident_bytes_of(scene.daemon.pid());
    let clients: Vec<(TcpStream, i64)> = (0..CLIENTS).map(|_| scene.connected(5173)).collect();
    // The container does not read the daemon's messages from here on.
    let sent: Vec<u64> = clients.iter().map(|(client, _)| fill_pattern(client)).collect();
    lists_at_once(&home);
    let grown = resident_bytes_of(scene.daemon.pid()).saturating_sub(before) >> 20;
    // 8 MiB for a connection by A.3.6, including base64 and data in transit.
    assert!(grown < 64, "{grown} MiB for {CLIENTS} clients of a container that takes nothing");
    // The container reads again, and no byte was lost or reordered.
    let mut left: Vec<(i64, Checker, u64)> =
        clients.iter().zip(&sent).map(|((_, id), sent)| (*id, Pattern::new(5).checker(), *sent)).collect();
    while left.iter().any(|(_, checker, sent)| checker.position() < *sent) {
        let message = scene.peer.receive("relay-data");
        let entry = left.iter_mut().find(|(id, ..)| *id == stream(&message)).unwrap();
        entry.1.check(&payload(&message));
    }
    note!("{CLIENTS} clients held: {} KiB sent, {grown} MiB in the daemon", sent.iter().sum::<u64>() >> 10);
}

/// Writes a pattern until the socket accepts no more bytes. Returns how many it accepted.
fn fill_pattern(mut client: &TcpStream) -> u64 {
    client.set_nonblocking(true).unwrap();
    let (mut block, mut sent, mut refused) = (vec![0; 65_536], 0, 0);
    wait_until("the way to be full", || {
        Pattern::new(5).fill(sent, &mut block);
        match client.write(&block) {
            Ok(count) => (sent, refused) = (sent + count as u64, 0),
            Err(error) if error.kind() == ErrorKind::WouldBlock => refused += 1,
            Err(error) => panic!("{error} after {sent} bytes"),
        }
        if refused >= 20 { Ok(()) } else { Err(sent) }
    });
    client.set_nonblocking(false).unwrap();
    sent
}

/// One client sends more than the container reads; another sends small messages at the same time, which are sent between the
/// pieces of the first.
fn fair() {
    let home = Home::new();
    let mut scene = Scene::forwarding(&home, &[5173]);
    let (large, large_id) = scene.connected(5173);
    let (mut small, small_id) = scene.connected(5173);
    let mut between = Vec::new();
    for _ in 0..10 {
        // The container does not read, so all queues fill up, and the small message is queued behind them.
        fill_pattern(&large);
        small.write_all(b"?").unwrap();
        fill_pattern(&large);
        let mut pieces = 0;
        loop {
            let message = scene.peer.receive("relay-data");
            if stream(&message) == small_id {
                break;
            }
            assert_eq!(stream(&message), large_id);
            pieces += 1;
        }
        between.push(pieces);
    }
    between.sort_unstable();
    // Bytes that are already in the socket's buffer are sent first, a bounded amount; the megabyte in the stream's own queue
    // is not.
    let median = between[between.len() / 2];
    assert!(median < 120, "pieces of 64 KiB before each small one: {between:?}");
    note!("64 KiB pieces of a large stream that go before one byte of another: {between:?}");
}

fn only_for_itself() {
    let home = Home::new();
    let mut scene = Scene::forwarding(&home, &[5173]);
    let other = Container::listen("token-of-b").allowing(json!({"allow": [6000]}));
    other.register(&home, "b");
    let mut b = other.welcome();
    b.send_message(&snapshot(&[6000, 5173]));
    b.receive_exactly(&not_forwarded(5173, "policy excluded"));
    b.receive_exactly(&forwarded(6000, 6000));
    // Both have a stream 1. Messages of B about its stream cause neither data nor an end at A's client.
    let (client, id) = scene.connected(5173);
    b.send_message(&data(id, b"from b"));
    b.send_message(&close_upstream(id));
    b.send_message(&closed(5173));
    b.send_message(&closed(6000));
    b.send_message(&opened(6000));
    b.receive_exactly(&forwarded(6000, 6000));
    scene.peer.send_message(&data(id, b"from a"));
    expect_bytes(&client, b"from a");
    // B cannot request the port of A, nor the daemon's own ports.
    let http = http_port(&home);
    b.send_message(&request(6000, &[5173]));
    assert_eq!(b.receive("port-forward-result")["ok"], false);
    b.send_message(&request(6000, &[http]));
    assert_eq!(b.receive("port-forward-result")["ok"], false);
    // A broker token authenticates no other channel.
    let restart = json!({"kind": "restart", "containerName": NAME});
    assert_eq!(http::ask(http, Some(TOKEN), &restart).status, 403);
    // Two containers that announce the same port: the first keeps it.
    let third = Container::listen("token-of-c");
    third.register(&home, "c");
    let mut c = third.welcome();
    c.send_message(&snapshot(&[5173]));
    let result = c.receive("port-forward-result");
    assert_eq!((&result["port"], &result["ok"]), (&json!(5173), &json!(false)), "{result}");
    scene.client(5173);
}

fn quota() {
    let home = Home::new();
    let mut scene = Scene::open(&home, json!({"allow": "*"}));
    let all: Vec<u16> = (20_000..20_400).collect();
    scene.peer.send_message(&snapshot(&all));
    let mut granted = 0;
    for _ in &all {
        let result = scene.peer.receive("port-forward-result");
        if result["ok"] == true {
            granted += 1;
        } else {
            assert!(result["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{result}");
        }
    }
    assert_eq!(granted, 256);
    // Reserved forwards count as well.
    scene.peer.send_message(&request(30_000, &[30_000]));
    assert_eq!(scene.peer.receive("port-forward-result")["ok"], false);
    lists_at_once(&home);
}

fn token_appears_nowhere() {
    const CANARY: &str = "canary-3f9c2b7a61d84e05";
    let home = Home::new();
    let daemon = home.daemon();
    let container = Container::listen(CANARY);
    container.register(&home, NAME);
    // The token is in every place that could be logged: a refusal that repeats it, a lost connection, invalid messages, a
    // stop.
    let mut peer = container.accept_hello();
    peer.send_message(&json!({"type": "broker-hello-nack", "reason": "try later"}));
    peer.receive_end();
    let mut peer = container.welcome();
    peer.send_text("not json");
    peer.send_message(&snapshot(&[5173]));
    peer.receive_exactly(&forwarded(5173, 5173));
    let mut seen = Vec::new();
    let mut look = |what: String, text: &[u8]| {
        if text.windows(CANARY.len()).any(|window| window == CANARY.as_bytes()) {
            seen.push(what);
        }
    };
    for pid in descendants() {
        for file in ["cmdline", "environ", "comm"] {
            look(
                format!("{file} of {pid}"),
                &std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default(),
            );
        }
    }
    for kind in ["list", "describe", "version", "http-info"] {
        look(kind.to_owned(), ask(&home, &json!({"kind": kind})).to_string().as_bytes());
    }
    let status = json!({"kind": "status", "containerName": NAME});
    look("status".to_owned(), ask(&home, &status).to_string().as_bytes());
    for verb in [&["ls"][..], &["ls", "--json"], &["status"], &["status", "--json"], &["logs"], &["doctor"]] {
        let output = home.run(verb);
        look(format!("landfall {verb:?}"), &[output.stdout, output.stderr].concat());
    }
    drop(peer);
    let mut peer = container.accept_hello();
    peer.send_message(&json!({"type": "broker-hello-nack", "reason": "invalid token"}));
    home.wait_for_event("registration-skipped", |event| event["containerName"] == NAME);
    look("stderr".to_owned(), home.stderr().as_bytes());
    for (path, content) in home.files() {
        look(path.display().to_string(), &content);
    }
    drop(daemon);
    assert!(seen.is_empty(), "the token is in {seen:?}");
}

fn flood_blocks_no_other_client() {
    let home = Home::new();
    let mut scene = Scene::forwarding(&home, &[5173]);
    let before = resident_bytes_of(scene.daemon.pid());
    let (client, id) = scene.connected(5173);
    let mut message_sender = scene.peer.message_sender();
    let rounds = if landfall_tests::is_long() { 40 } else { 1 };
    // A separate thread sends everything as fast as the daemon reads it; answers are read and discarded.
    let flood = std::thread::spawn(move || {
        let every: Vec<u16> = (1..=u16::MAX).collect();
        for round in 0..rounds {
            let mut send_message = |message: &Value| message_sender.try_send_message(message).unwrap();
            send_message(&snapshot(&every));
            (1..=4_000).for_each(|port| send_message(&request(port * 16, &[port])));
            for port in 40_000..42_000 {
                send_message(&opened(port));
                send_message(&closed(port));
            }
            for stream in 0..4_000 {
                send_message(&ack(1_000_000 + stream));
                send_message(&data(2_000_000 + stream, &[7; 1024]));
            }
            let long = "x".repeat(2 << 20);
            send_message(&json!({"type": long, "reason": long}));
            send_message(
                &json!({"type": "port-forward-request", "targetPort": 3000 + round, "hostCandidates": vec![1; 200_000], "reason": long}),
            );
            send_message(&snapshot(&[5173]));
        }
        message_sender
    });
    let mut slowest = Duration::ZERO;
    scene.peer.discard_until(|| {
        let begun = Instant::now();
        assert!(!names(&home).is_empty());
        slowest = slowest.max(begun.elapsed());
        assert!(slowest < IN_A_FLOOD, "list took {slowest:?}");
        flood.is_finished()
    });
    let mut message_sender = flood.join().unwrap();
    // Existing forwards continue, and messages after the flood are processed.
    message_sender.try_send_message(&data(id, b"after all")).unwrap();
    std::thread::scope(|scope| {
        let reading = scope.spawn(|| expect_bytes(&client, b"after all"));
        scene.peer.discard_until(|| reading.is_finished());
    });
    let grown = resident_bytes_of(scene.daemon.pid()).saturating_sub(before) >> 20;
    assert!(grown < 192, "{grown} MiB after the flood");
    note!("a flood: list within {slowest:?}, {grown} MiB");
    // Another container is served as well.
    let other = Container::listen("other");
    other.register(&home, "other");
    let mut peer = other.welcome();
    peer.send_message(&snapshot(&[6001]));
    peer.receive("port-forward-result");
}

fn giant_messages() {
    let home = Home::new();
    let mut scene = Scene::forwarding(&home, &[5173]);
    let before = resident_bytes_of(scene.daemon.pid());
    for giant in ["message", "frame"] {
        let speaking = scene.peer.message_sender();
        let flood = std::thread::spawn(move || {
            let mut message_sender = speaking;
            if giant == "message" {
                // Larger than the peers of this protocol allow.
                let _ = message_sender.try_send_message(&json!({"type": "x".repeat(17 << 20)}));
            } else {
                // A text frame with an announced length of 2^62 bytes, and some of them.
                let _ = message_sender.try_write_raw(&[0x81, 127, 0x40, 0, 0, 0, 0, 0, 0, 0]);
                let block = vec![b'x'; 1 << 20];
                for _ in 0..64 {
                    if message_sender.try_write_raw(&block).is_err() {
                        return;
                    }
                }
            }
        });
        scene.peer.receive_end();
        lists_at_once(&home);
        scene.peer.hang_up();
        flood.join().unwrap();
        let grown = resident_bytes_of(scene.daemon.pid()).saturating_sub(before) >> 20;
        assert!(grown < 96, "{grown} MiB after a giant {giant}");
        scene.peer = scene.container.welcome();
    }
    works(&mut scene, 3000);
}

/// Any program may listen at the published port. Each connection is a failed attempt, and uses no lasting resources.
fn no_broker() {
    let home = Home::new();
    let daemon = home.daemon();
    let container = Container::listen(TOKEN);
    container.register(&home, NAME);
    let before = resident_bytes_of(daemon.pid());
    let mut garbage = container.accept_raw();
    lists_at_once(&home);
    // A head without an end.
    let line = [b'x'; 65_536];
    let _ = garbage.write_all(b"HTTP/1.1 101 Switching Protocols\r\nx: ");
    let mut taken = 0;
    garbage.set_write_timeout(Some(Duration::from_secs(2))).unwrap();
    while taken < 64 << 20 && garbage.write_all(&line).is_ok() {
        taken += line.len();
    }
    assert!(taken < 64 << 20, "a head of {taken} bytes was read");
    let grown = resident_bytes_of(daemon.pid()).saturating_sub(before) >> 20;
    assert!(grown < 16, "{grown} MiB for a head without an end");
    drop(garbage);
    lists_at_once(&home);
    // Another server has the port.
    let mut web = container.accept_raw();
    let _ = web.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 19\r\n\r\nportbroker disabled");
    drop(web);
    container.welcome().ping();
}
