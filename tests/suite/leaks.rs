//! Claim 9: connections leak no resource, however they end.

use std::io::{Read, Write};
use std::sync::atomic::{AtomicU64, Ordering};

use landfall_engine::RingChoice;
use landfall_engine::command::{Ending, Family};
use landfall_engine::limits::Limits;
use landfall_tests::case::Case;
use landfall_tests::process::{descriptors, resident_bytes, threads};
use landfall_tests::{Driver, Namespace, Relay, Rng, Server, finish, is_long, note, reset, seed, wait_until};

pub(crate) const CASES: &[Case] = &[
    Case::each_ring("c09_churn_with_random_aborts_leaks_no_resource", churn),
    Case::each_ring("c09_stopped_engines_and_removed_upstreams_leak_no_resource", engines_and_upstreams),
];

/// Threads of the server inside.
const SERVERS: usize = 8;

pub(crate) fn churn(ring: RingChoice) {
    let count: u64 = if is_long() { 1_000_000 } else { 20_000 };
    // A client port in TIME_WAIT is not available to the next client.
    Namespace::current().set_sysctl("ipv4/ip_local_port_range", "10000 65535");
    let mut driver = Driver::start(Limits::default(), ring);
    let inside = Namespace::new();
    inside.set_sysctl("ipv4/ip_local_port_range", "10000 65535");
    let before = (descriptors(), threads());
    driver.add_upstream(Relay::UPSTREAM, &inside, None);
    let mut relay = Relay::of(driver, inside);
    serve_with_random_aborts(Server::listen(&relay.inside, "[::]:3000"));
    let forward = relay.forward(3000);
    let next = AtomicU64::new(0);
    let mut resident = 0;
    for (part, target) in [count / 4, count].into_iter().enumerate() {
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    while let number @ 0.. = next.fetch_add(1, Ordering::Relaxed)
                        && number < target
                    {
                        let family = if number % 2 == 0 { Family::V4 } else { Family::V6 };
                        visit(forward.at(family), number);
                    }
                });
            }
        });
        next.store(target, Ordering::Relaxed);
        let stats = relay.stats_become(forward, "all to be over", |stats| stats.open == 0);
        assert_eq!(stats.accepted, target, "{stats:?}");
        let ended = stats.completed + stats.reset_by_downstream + stats.reset_by_upstream;
        assert_eq!(ended + stats.refused + stats.exhausted, target, "{stats:?}");
        assert_eq!((stats.refused, stats.exhausted), (0, 0), "{stats:?}");
        if part == 0 {
            resident = resident_bytes();
        } else {
            let grown = resident_bytes().saturating_sub(resident);
            assert!(grown < 4 * 1024 * 1024, "{count} connections left {grown} bytes");
            note!("{stats:?}");
        }
    }
    relay.driver.remove_upstream(Relay::UPSTREAM, Ending::Drain);
    // The server inside holds its listener and its threads; the relay holds no descriptor of a connection.
    wait_until("descriptors and threads to be as before", || {
        let now = (descriptors(), threads());
        if now == (before.0 + 1, before.1 + SERVERS) { Ok(()) } else { Err((now, before)) }
    });
}

/// Reads and answers, and aborts at random points.
fn serve_with_random_aborts(server: Server) {
    let number = AtomicU64::new(0);
    server.serve_in_turn(SERVERS, move |mut stream| {
        let mut rng = Rng::new(seed() ^ number.fetch_add(1, Ordering::Relaxed) ^ 0x5e17);
        let mut buffer = vec![0; 16 * 1024];
        while let Ok(bytes @ 1..) = landfall_tests::read_some(&stream, &mut buffer) {
            if rng.one_in(20) {
                return reset(stream);
            }
            if rng.one_in(20) || stream.write_all(&buffer[..bytes]).is_err() {
                return;
            }
        }
    });
}

/// One client, which ends in one of many ways.
fn visit(address: std::net::SocketAddr, number: u64) {
    let mut rng = Rng::new(seed() ^ number);
    let mut stream = landfall_tests::connect(address);
    if rng.one_in(10) {
        return reset(stream);
    }
    let message = vec![7; rng.length(16 * 1024)];
    let mut answer = vec![0; message.len()];
    // The server may have aborted at any of these.
    if stream.write_all(&message).is_err() || rng.one_in(10) {
        return reset(stream);
    }
    let finished = rng.one_in(3);
    if finished {
        let _ = stream.shutdown(std::net::Shutdown::Write);
    }
    let _ = stream.read_exact(&mut answer);
    if finished && rng.one_in(2) {
        // The server's FIN or its reset.
        let _ = stream.read(&mut [0]);
    }
    if rng.one_in(2) {
        reset(stream);
    }
}

pub(crate) fn engines_and_upstreams(ring: RingChoice) {
    let once = || {
        let mut relay = Relay::start(ring);
        let server = Server::listen(&relay.inside, "127.0.0.1:3000");
        let forward = relay.forward(3000);
        let client = landfall_tests::connect(forward.v4());
        finish(&client);
        let accepted = server.accept();
        // Stopped while a connection is open.
        drop(relay);
        drop((client, accepted));
    };
    once();
    let before = wait_for_quiet();
    for _ in 0..20 {
        once();
    }
    wait_until("descriptors and threads to be as before", || {
        let now = (descriptors(), threads());
        if now == before { Ok(()) } else { Err((now, before)) }
    });
}

/// Threads that wait for the exit of an opener end shortly after it.
fn wait_for_quiet() -> (usize, usize) {
    wait_until("one thread", || match threads() {
        1 => Ok((descriptors(), 1)),
        more => Err(more),
    })
}
