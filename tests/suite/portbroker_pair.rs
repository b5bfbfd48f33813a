//! Our daemon and our agent together: the rows of `broker.test.ts` (wire specification, A.14), and the claims about relayed
//! connections, over each attach method that uses an agent.

use std::io::{ErrorKind, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::time::{Duration, Instant};

use landfall_tests::broker::{Agent, CONTAINER_PORT, Published};
use landfall_tests::case::Case;
use landfall_tests::process::{descriptors_of, resident_bytes_of, running};
use landfall_tests::{
    Conversation, Daemon, End, Flood, Home, Namespace, Pattern, Rng, Server, TIMEOUT, answer, connect,
    expect_bytes, finish, is_long, note, read_exactly, read_some, read_to_end, reset, rpc, seed, send_all,
    wait_until,
};
use rustix::net::sockopt;
use serde_json::{Value, json};

use crate::observe::{ends_by, read_rest, write_reports_that_the_peer_is_gone};
use crate::portbroker_host::{NAME, assert_unbound, events, events_become, status_ports_become};

pub(crate) const CASES: &[Case] = &[
    Case::once("a14_broker_full_handshake_to_bytes_and_close", full_handshake),
    Case::once("a14_broker_container_releases_port", releases_port),
    Case::once("a14_broker_disabled_by_an_empty_allow_list", disabled),
    Case::once("a14_broker_deny_excludes_from_snapshot_end_to_end", deny),
    Case::once("a14_broker_bytes_flow_downstream", downstream),
    Case::once("c01_every_byte_arrives_once_over_the_broker", || duplex_streams(Kind::Extended)),
    Case::once("c01_every_byte_arrives_once_over_the_plain_broker", || duplex_streams(Kind::Plain)),
    Case::once("c01_every_byte_arrives_once_over_agent_descriptors", || duplex_streams(Kind::Descriptors)),
    Case::once("c02_half_close_is_preserved_over_the_broker", || half_close(Kind::Extended)),
    Case::once("c02_half_close_is_preserved_over_agent_descriptors", || half_close(Kind::Descriptors)),
    Case::once("c03_reset_is_preserved_over_the_broker", || resets(Kind::Extended)),
    Case::once("c03_reset_is_preserved_over_agent_descriptors", || resets(Kind::Descriptors)),
    Case::once("c03_a_killed_daemon_causes_a_reset_not_a_fin", killed_daemon),
    Case::once("c04_a_dead_port_behind_an_agent_never_looks_alive", dead_port),
    Case::once("c05_a_slow_reader_gets_every_byte_over_the_broker", || slow_reader(Kind::Extended)),
    Case::once("c05_a_slow_reader_gets_every_byte_over_agent_descriptors", || slow_reader(Kind::Descriptors)),
    Case::once("c05_stalled_readers_block_no_other_stream_over_the_broker", || stalled(Kind::Extended)),
    Case::once("c05_stalled_readers_block_no_other_stream_over_the_plain_broker", || stalled(Kind::Plain)),
    Case::once("c05_stalled_readers_block_no_other_stream_over_agent_descriptors", || {
        stalled(Kind::Descriptors)
    }),
    Case::once("c09_broker_cycles_leak_no_resource", || cycles(Kind::Extended)),
    Case::once("c09_plain_broker_cycles_leak_no_resource", || cycles(Kind::Plain)),
    Case::once("c09_agent_descriptor_cycles_leak_no_resource", || cycles(Kind::Descriptors)),
    Case::once("c19_connections_survive_a_killed_daemon_over_agent_descriptors", daemon_killed),
];

/// An attach method that uses an agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The WebSocket with all extensions of our two sides.
    Extended,
    /// The WebSocket with the protocol of the reference.
    Plain,
    /// Sockets from the agent's directory.
    Descriptors,
}

const TOKEN: &str = "token-of-a-pair";

/// A daemon on the host, an agent inside, and the connection between them.
struct BrokerPair<'a> {
    home: &'a Home,
    daemon: Daemon<'a>,
    agent: Agent,
    inside: Namespace,
    _published: Published,
}

impl<'a> BrokerPair<'a> {
    fn open(home: &'a Home, kind: Kind) -> BrokerPair<'a> {
        BrokerPair::allowing(home, kind, &json!({"allow": "*"}))
    }

    fn allowing(home: &'a Home, kind: Kind, policy: &Value) -> BrokerPair<'a> {
        let inside = Namespace::new();
        let shared = home.folder("shared");
        let mut command = Agent::command(home, TOKEN);
        let mut daemon = home.start();
        if kind == Kind::Plain {
            command.env("LANDFALL_BROKER_EXTENSIONS", "none");
            daemon = daemon.variable("LANDFALL_BROKER_EXTENSIONS", "none");
        }
        if kind == Kind::Descriptors {
            command.args(["--directory", shared.to_str().unwrap()]);
        }
        let agent = Agent::spawn(home, &inside, command);
        let published = Published::start(inside.duplicate(), CONTAINER_PORT);
        let daemon = daemon.wait_until_ready();
        let way = match kind {
            Kind::Descriptors => json!({"kind": "agent", "directory": shared}),
            Kind::Extended | Kind::Plain => json!({"kind": "websocket"}),
        };
        let fields =
            json!({"wsHostPort": published.port(), "portForward": policy, "brokerToken": TOKEN, "way": way});
        rpc::register_with(home, NAME, &fields);
        BrokerPair { home, daemon, agent, inside, _published: published }
    }

    /// Returns a server inside, once its port answers on the host.
    #[track_caller]
    fn server(&self, port: u16) -> Server {
        let server = Server::listen(&self.inside, &format!("127.0.0.1:{port}"));
        wait_until("the port to be forwarded", || {
            let ports = crate::portbroker_host::status_ports(self.home);
            if ports.as_array().unwrap().contains(&json!(port)) { Ok(()) } else { Err(ports) }
        });
        server
    }

    /// Returns the numbers of descriptors of the daemon, its engine and the agent.
    fn held(&self) -> [usize; 3] {
        let engines = running("_engine");
        assert_eq!(engines.len(), 1);
        [self.daemon.pid(), engines[0], self.agent.pid()].map(descriptors_of)
    }

    /// The same, once it has not changed for a while.
    #[track_caller]
    fn rest(&self) -> [usize; 3] {
        let mut last = ([0; 3], 0);
        wait_until("everybody to be at rest", || {
            let now = self.held();
            last = if now == last.0 { (now, last.1 + 1) } else { (now, 0) };
            if last.1 > 50 { Ok(now) } else { Err(now) }
        })
    }
}

fn client(port: u16) -> TcpStream {
    connect((Ipv4Addr::LOCALHOST, port))
}

fn full_handshake() {
    for kind in [Kind::Extended, Kind::Plain] {
        let home = Home::new();
        let pair = BrokerPair::open(&home, kind);
        let server = pair.server(5173);
        let mut visitor = client(5173);
        let mut upstream = server.accept();
        visitor.write_all(b"ping").unwrap();
        expect_bytes(&upstream, b"ping");
        upstream.write_all(b"pong").unwrap();
        expect_bytes(&visitor, b"pong");
        drop(visitor);
        let _ = ends_by(&upstream);
        events_become(&home, &["opened 5173 5173 127.0.0.1"]);
    }
}

fn releases_port() {
    let home = Home::new();
    let pair = BrokerPair::open(&home, Kind::Extended);
    drop(pair.server(5173));
    events_become(&home, &["opened 5173 5173 127.0.0.1", "closed 5173 5173 container-released"]);
    status_ports_become(&home, &[]);
    assert_unbound(5173);
}

fn disabled() {
    let home = Home::new();
    let pair = BrokerPair::allowing(&home, Kind::Extended, &json!({"allow": []}));
    let _server = Server::listen(&pair.inside, "127.0.0.1:5173");
    // Two scans would have taken place.
    std::thread::sleep(Duration::from_millis(1200));
    assert_unbound(5173);
    assert!(events(&home).is_empty());
    assert!(!pair.agent.printed().contains("authed"), "the broker connected");
}

fn deny() {
    let home = Home::new();
    let pair = BrokerPair::allowing(&home, Kind::Extended, &json!({"allow": "*", "deny": [9229]}));
    let _denied = Server::listen(&pair.inside, "127.0.0.1:9229");
    let _allowed = pair.server(5173);
    assert_unbound(9229);
    events_become(&home, &["opened 5173 5173 127.0.0.1"]);
}

fn downstream() {
    let home = Home::new();
    let pair = BrokerPair::open(&home, Kind::Plain);
    let server = pair.server(5173);
    let visitor = client(5173);
    let mut upstream = server.accept();
    upstream.write_all(b"server speaks first").unwrap();
    expect_bytes(&visitor, b"server speaks first");
    drop(upstream);
    assert_eq!(ends_by(&visitor), End::Eof);
}

/// The longest direction of a stream, in bytes.
const LENGTH_MAX: usize = 1 << 20;

/// Both directions at once, with random lengths and pauses. No side ends before both have received everything, so that the
/// result is the same whether or not a FIN passes. Returns the number of bytes.
fn duplex(stream: &TcpStream, seed: u64, end: u64, confirms: bool) -> u64 {
    let length = |end: u64| Rng::new(seed ^ end).length(LENGTH_MAX) as u64;
    std::thread::scope(|scope| {
        let sending = scope.spawn(move || {
            let (mut stream, own) = (stream, length(end));
            let (mut rng, mut position) = (Rng::new(seed ^ end ^ 7), 0);
            while position < own {
                let piece = (1 + rng.length(256 * 1024) as u64).min(own - position);
                let mut bytes = vec![0; usize::try_from(piece).unwrap()];
                Pattern::new(seed ^ end).fill(position, &mut bytes);
                stream.write_all(&bytes).unwrap();
                position += piece;
                if rng.one_in(8) {
                    std::thread::sleep(Duration::from_micros(rng.below(4000)));
                }
            }
        });
        let other = end ^ 1;
        read_exactly(stream, &mut Pattern::new(seed ^ other).checker(), length(other));
        sending.join().unwrap();
    });
    let mut stream = stream;
    if confirms {
        stream.write_all(b"!").unwrap();
        let _ = read_some(stream, &mut [0]);
    } else {
        expect_bytes(stream, b"!");
    }
    length(0) + length(1)
}

fn duplex_streams(kind: Kind) {
    const AT_ONCE: u64 = 10;
    let count = if is_long() { 1000 } else { 40 };
    let home = Home::new();
    let pair = BrokerPair::open(&home, kind);
    let server = pair.server(5173);
    let mut bytes = 0;
    for batch in 0..count / AT_ONCE {
        std::thread::scope(|scope| {
            let mut running = Vec::new();
            for index in 0..AT_ONCE {
                let seed = seed() ^ ((batch * AT_ONCE + index) << 32);
                // One by one, so that the two ends of a connection can be matched.
                let (visitor, upstream) = (client(5173), server.accept());
                running.push(scope.spawn(move || duplex(&visitor, seed, 0, false)));
                running.push(scope.spawn(move || duplex(&upstream, seed, 1, true)));
            }
            bytes += running.into_iter().map(|end| end.join().unwrap()).sum::<u64>() / 2;
        });
    }
    note!("{count} streams, {} MB", bytes / 1_000_000);
}

fn half_close(kind: Kind) {
    const BACK: u64 = 10 << 20;
    let home = Home::new();
    let pair = BrokerPair::open(&home, kind);
    let server = pair.server(5173);
    for upstream_first in [false, true] {
        let (visitor, upstream) = (client(5173), server.accept());
        let (one, other) = if upstream_first { (upstream, visitor) } else { (visitor, upstream) };
        send_all(&one, Pattern::new(1), 1000);
        finish(&one);
        assert_eq!(read_rest(&other, &mut Pattern::new(1).checker()), (1000, End::Eof), "{upstream_first}");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                send_all(&other, Pattern::new(2), BACK);
                finish(&other);
            });
            assert_eq!(read_rest(&one, &mut Pattern::new(2).checker()), (BACK, End::Eof), "{upstream_first}");
        });
    }
    // Both ends at once, and right after connecting.
    for bytes in [0, 1, 100_000] {
        let visitor = client(5173);
        send_all(&visitor, Pattern::new(1), bytes);
        finish(&visitor);
        let upstream = server.accept();
        send_all(&upstream, Pattern::new(2), bytes);
        finish(&upstream);
        assert_eq!(read_rest(&upstream, &mut Pattern::new(1).checker()), (bytes, End::Eof));
        assert_eq!(read_rest(&visitor, &mut Pattern::new(2).checker()), (bytes, End::Eof));
    }
}

fn resets(kind: Kind) {
    const BYTES: u64 = 40_000;
    let home = Home::new();
    let pair = BrokerPair::open(&home, kind);
    let server = pair.server(5173);
    for by_upstream in [false, true] {
        let pair = || {
            let (visitor, upstream) = (client(5173), server.accept());
            if by_upstream { (upstream, visitor) } else { (visitor, upstream) }
        };
        // Before any data.
        let (breaker, other) = pair();
        reset(breaker);
        assert_eq!(read_rest(&other, &mut Pattern::new(1).checker()), (0, End::Reset), "{by_upstream}");
        assert!(write_reports_that_the_peer_is_gone(&other));
        // After data in both directions, which arrived.
        let (breaker, other) = pair();
        let mut checker = Pattern::new(1).checker();
        send_all(&breaker, Pattern::new(1), BYTES);
        read_exactly(&other, &mut checker, BYTES);
        send_all(&other, Pattern::new(2), BYTES);
        read_exactly(&breaker, &mut Pattern::new(2).checker(), BYTES);
        reset(breaker);
        assert_eq!(read_rest(&other, &mut checker), (BYTES, End::Reset), "{by_upstream}");
        // By the end that received the FIN: the other end must not see a clean end.
        let (breaker, other) = pair();
        finish(&other);
        assert_eq!(ends_by(&breaker), End::Eof);
        reset(breaker);
        assert_eq!(ends_by(&other), End::Reset, "{by_upstream}");
    }
}

fn killed_daemon() {
    let home = Home::new();
    let BrokerPair { daemon, agent: _agent, inside, _published, .. } =
        BrokerPair::open(&home, Kind::Extended);
    let server = Server::listen(&inside, "127.0.0.1:5173");
    status_ports_become(&home, &[5173]);
    let (visitor, mut upstream) = (client(5173), server.accept());
    upstream.write_all(b"half an ans").unwrap();
    expect_bytes(&visitor, b"half an ans");
    daemon.kill();
    assert_eq!(ends_by(&visitor), End::Reset, "half an answer with a clean end");
    let _ = ends_by(&upstream);
}

fn dead_port() {
    for kind in [Kind::Extended, Kind::Plain, Kind::Descriptors] {
        let home = Home::new();
        let pair = BrokerPair::open(&home, kind);
        let server = pair.server(5173);
        // The server has ended, and the agent has not noticed yet.
        drop(server);
        for _ in 0..20 {
            let Ok(visitor) = TcpStream::connect((Ipv4Addr::LOCALHOST, 5173)) else { break };
            visitor.set_read_timeout(Some(TIMEOUT)).unwrap();
            assert_eq!(ends_by(&visitor), End::Reset, "{kind:?}");
        }
        wait_until("the port to refuse", || match TcpStream::connect((Ipv4Addr::LOCALHOST, 5173)) {
            Err(_) => Ok(()),
            Ok(_) => Err("it answers"),
        });
    }
}

fn slow_reader(kind: Kind) {
    /// Bytes a second, and how many are read at a time.
    const RATE: u64 = 10_000_000;
    const STEP: u64 = 100_000;
    let count: u64 = if is_long() { 1 << 30 } else { 64 << 20 };
    let home = Home::new();
    let pair = BrokerPair::open(&home, kind);
    let server = pair.server(5173);
    let (visitor, upstream) = (client(5173), server.accept());
    let before = resident_bytes_of(pair.daemon.pid());
    let sending = std::thread::spawn(move || {
        upstream.set_write_timeout(None).unwrap();
        send_all(&upstream, Pattern::new(1), count);
        finish(&upstream);
        upstream
    });
    let (begun, mut checker, mut most) = (Instant::now(), Pattern::new(1).checker(), 0);
    while checker.position() < count {
        let until = (checker.position() + STEP).min(count);
        read_exactly(&visitor, &mut checker, until);
        if until.is_multiple_of(20 * STEP) {
            most = most.max(resident_bytes_of(pair.daemon.pid()));
        }
        // The pace is the test, not a wait for a state.
        let due = Duration::from_secs_f64(until as f64 / RATE as f64);
        std::thread::sleep(due.saturating_sub(begun.elapsed()));
    }
    assert_eq!(read_to_end(&visitor, &mut checker), End::Eof);
    drop(sending.join().unwrap());
    let grown = most.saturating_sub(before) >> 20;
    assert!(grown < 24, "{grown} MiB for one slow reader");
    note!("{} MiB at {:.1} MB/s", count >> 20, count as f64 / 1e6 / begun.elapsed().as_secs_f64());
}

/// Returns the time to fetch a few streams at once.
fn fetch(port: u16, streams: u64, each: u64) -> Duration {
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..streams {
            scope.spawn(move || {
                let mut visitor = client(port);
                visitor.write_all(&each.to_le_bytes()).unwrap();
                read_exactly(&visitor, &mut Pattern::new(4).checker(), each);
            });
        }
    });
    begun.elapsed()
}

fn stalled(kind: Kind) {
    /// The most bytes sent to each stalled stream where only a cap holds it back: 200 of them stay below the cap of a
    /// connection.
    const PLAIN: u64 = 512 * 1024;
    // A window for each stream takes time to fill.
    let count = if kind == Kind::Extended && !is_long() { 50 } else { 200 };
    let home = Home::new();
    let pair = BrokerPair::open(&home, kind);
    let sources = pair.server(5173);
    pair.server(5174).serve(|mut stream| {
        let mut wanted = [0; 8];
        if std::io::Read::read_exact(&mut stream, &mut wanted).is_ok() {
            send_all(&stream, Pattern::new(4), u64::from_le_bytes(wanted));
            let _ = read_some(&stream, &mut [0]);
        }
    });
    let each = 4 << 20;
    fetch(5174, 4, 1 << 20);
    let alone = fetch(5174, 4, each).min(fetch(5174, 4, each));
    let before = resident_bytes_of(pair.daemon.pid()) + resident_bytes_of(pair.agent.pid());
    let mut stalled: Vec<(TcpStream, TcpStream, u64)> = (0..count)
        .map(|_| {
            let (visitor, upstream) = (client(5173), sources.accept());
            // Data in the kernel's buffers at either end is not part of the claim.
            sockopt::set_socket_recv_buffer_size(&visitor, 64 * 1024).unwrap();
            sockopt::set_socket_send_buffer_size(&upstream, 64 * 1024).unwrap();
            upstream.set_nonblocking(true).unwrap();
            (visitor, upstream, 0)
        })
        .collect();
    let (mut block, mut quiet) = (vec![0; 65_536], 0);
    wait_until("every way to be full", || {
        let mut moved = 0;
        for (_, upstream, sent) in &mut stalled {
            if kind == Kind::Plain && *sent >= PLAIN {
                continue;
            }
            Pattern::new(1).fill(*sent, &mut block);
            match upstream.write(&block) {
                Ok(bytes) => (*sent, moved) = (*sent + bytes as u64, moved + bytes),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => panic!("a stalled reader's server after {sent} bytes: {error}"),
            }
        }
        quiet = if moved == 0 { quiet + 1 } else { 0 };
        if quiet >= 50 { Ok(()) } else { Err(moved) }
    });
    let grown =
        (resident_bytes_of(pair.daemon.pid()) + resident_bytes_of(pair.agent.pid())).saturating_sub(before);
    let grown = grown >> 20;
    // A window for each stream, on either side of the WebSocket.
    assert!(grown < 2 * count + 64, "{grown} MiB for {count} stalled readers");
    let beside = fetch(5174, 4, each).min(fetch(5174, 4, each));
    let share = alone.as_secs_f64() / beside.as_secs_f64();
    note!("beside {count} stalled readers ({grown} MiB): {:.0} % of the speed without them", share * 100.0);
    // The claim is 80 %. It is reported without a limit, because other cases run at the same time. A stream that is blocked
    // does not arrive at all, which fails the case.
    // The stalled readers that read now get every byte.
    for (index, (visitor, upstream, sent)) in stalled.into_iter().enumerate() {
        if index % 20 == 0 {
            read_exactly(&visitor, &mut Pattern::new(1).checker(), sent);
        }
        drop((visitor, upstream));
    }
}

fn cycles(kind: Kind) {
    let count = if is_long() { 10_000 } else { 400 };
    let home = Home::new();
    let pair = BrokerPair::open(&home, kind);
    pair.server(3000).serve_in_turn(8, answer);
    let quiet = pair.server(5173);
    pair.server(5174).serve_in_turn(2, reset);
    pair.server(5175).serve_in_turn(2, drop);
    // A first round fills all caches.
    let round = |visits: u64| {
        let flood = Flood::start(3000, 4);
        // In parts, because each part is awaited with the default timeout.
        (0..visits / 40).for_each(|_| flood.wait_for_progress(40));
        flood.end();
        for index in 0..visits / 10 {
            match index % 4 {
                // Closed before the server can have accepted.
                0 => reset(client(5173)),
                1 => drop(client(5173)),
                // Without the extension a reset arrives as an end, except for a reset before the stream is open.
                2 => {
                    let end = ends_by(&client(5174));
                    assert!(end == End::Reset || kind == Kind::Plain, "{end:?}");
                }
                _ => assert_eq!(ends_by(&client(5175)), End::Eof),
            }
        }
        while quiet.has_pending_connection() {
            drop(quiet.accept());
        }
    };
    round(40);
    let before = pair.rest();
    let resident = [pair.daemon.pid(), pair.agent.pid()].map(resident_bytes_of);
    round(count);
    // The engine keeps sockets of the agent in stock: at rest between half of its target and all of it, and the target
    // doubles when the stock runs out. A leak of one per connection would be many more.
    let stocked = [0, if kind == Kind::Descriptors { 32 } else { 0 }, 0];
    // Some connections are open when the agent's connection is lost.
    wait_until("the descriptors to be back", || {
        while quiet.has_pending_connection() {
            drop(quiet.accept());
        }
        let now = pair.held();
        if (0..3).all(|who| now[who] <= before[who] + stocked[who]) { Ok(()) } else { Err((now, before)) }
    });
    let now = [pair.daemon.pid(), pair.agent.pid()].map(resident_bytes_of);
    let grown: Vec<usize> =
        now.iter().zip(&resident).map(|(now, before)| now.saturating_sub(*before) >> 20).collect();
    assert!(grown.iter().all(|grown| *grown < 16), "{grown:?} MiB after {count} cycles");
}

/// The engine has its sockets from the agent itself, so open connections stay open.
fn daemon_killed() {
    let home = Home::new();
    let BrokerPair { daemon, agent: _agent, inside, _published, .. } =
        BrokerPair::open(&home, Kind::Descriptors);
    let server = Server::listen(&inside, "127.0.0.1:5173");
    status_ports_become(&home, &[5173]);
    let mut conversation = Conversation::start(5173, &server, 1);
    conversation.wait_for_progress();
    daemon.kill();
    conversation.wait_for_progress();
    let _daemon = home.daemon();
    conversation.wait_for_progress();
    status_ports_become(&home, &[5173]);
    let mut other = Conversation::start(5173, &server, 2);
    other.wait_for_progress();
    conversation.end();
    other.end();
}
