//! Claim 4: a dead port never looks alive. The client sees a reset, not a clean end that it could take for an answer.

use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use landfall_engine::RingChoice;
use landfall_engine::command::{Family, Reach};
use landfall_engine::limits::Limits;
use landfall_tests::case::Case;
use landfall_tests::{End, Relay, Server, connect, note};

use crate::observe::ends_by;

pub(crate) const CASES: &[Case] = &[
    Case::each_ring("c04_a_refused_connect_is_a_reset", a_refused_connect_is_a_reset),
    Case::each_ring("c04_a_connect_that_times_out_is_a_reset", a_connect_that_times_out_is_a_reset),
    Case::each_ring("c04_a_connect_to_itself_is_a_reset", a_connect_to_itself_is_a_reset),
    Case::each_ring("c04_connections_are_refused_after_the_server_ends", a_server_that_ends),
];

pub(crate) fn a_refused_connect_is_a_reset(ring: RingChoice) {
    let mut relay = Relay::start(ring);
    let reaches = [
        Reach::UNKNOWN,
        Reach { v4: true, v6: false },
        Reach { v4: false, v6: true },
        Reach { v4: false, v6: false },
    ];
    for (index, reach) in (0..).zip(reaches) {
        let forward = relay.forward_reach(3000 + index, reach);
        for family in Family::ALL {
            assert_eq!(ends_by(&connect(forward.at(family))), End::Reset, "{reach:?}, by {family:?}");
        }
        let stats = relay.stats_become(forward, "both to be over", |stats| stats.open == 0);
        assert_eq!((stats.accepted, stats.refused), (2, 2), "{stats:?}");
    }
}

fn a_connect_that_times_out_is_a_reset(ring: RingChoice) {
    let limits = Limits { connect_timeout: Duration::from_millis(200), ..Limits::default() };
    let mut relay = Relay::start_with(limits, ring);
    let address: SocketAddr = ([127, 0, 0, 1], 3000).into();
    let server = Server::listen_backlog(&relay.inside, address, 0, None);
    // When the backlog is full, the kernel drops SYNs (tcp_conn_request() in net/ipv4/tcp_input.c).
    let mut filling = Vec::new();
    let full = relay.inside.run(|| {
        (0..10).any(|_| match TcpStream::connect_timeout(&address, Duration::from_millis(100)) {
            Ok(stream) => {
                filling.push(stream);
                false
            }
            Err(error) => error.kind() == std::io::ErrorKind::TimedOut,
        })
    });
    assert!(full, "the queue of a listener without a backlog took {}", filling.len());
    let forward = relay.forward_reach(3000, Reach { v4: true, v6: false });
    let begun = Instant::now();
    assert_eq!(ends_by(&connect(forward.v4())), End::Reset);
    assert!(begun.elapsed() >= Duration::from_millis(200), "{:?}", begun.elapsed());
    let stats = relay.stats_become(forward, "it to be over", |stats| stats.open == 0);
    assert_eq!(stats.refused, 1, "{stats:?}");
    // The server accepts the waiting connections, and new ones succeed again.
    for _ in 0..filling.len() {
        server.accept();
    }
    let client = connect(forward.v4());
    drop(server.accept());
    assert_eq!(ends_by(&client), End::Eof);
}

pub(crate) fn a_connect_to_itself_is_a_reset(ring: RingChoice) {
    let mut relay = Relay::start(ring);
    relay.inside.set_sysctl("ipv4/ip_local_port_range", "40000 40001");
    let ports = [40_000, 40_001];
    // Verifies the premise: without a relay, a client inside does connect to itself.
    let met = relay.inside.run(|| {
        let itself = |stream: &TcpStream| stream.local_addr().ok() == stream.peer_addr().ok();
        (0..50)
            .filter(|_| {
                TcpStream::connect(("127.0.0.1", ports[0])).is_ok_and(|stream| {
                    let met = itself(&stream);
                    landfall_tests::reset(stream);
                    met
                })
            })
            .count()
    });
    assert!(met > 0, "no connect ever met itself");
    note!("{met} of 50 direct connects met themselves");
    for port in ports {
        let forward = relay.forward_reach(port, Reach { v4: true, v6: false });
        for _ in 0..50 {
            assert_eq!(ends_by(&connect(forward.v4())), End::Reset);
        }
        let stats = relay.stats_become(forward, "all to be over", |stats| stats.open == 0);
        assert_eq!((stats.refused, stats.completed), (50, 0), "{stats:?}");
    }
}

pub(crate) fn a_server_that_ends(ring: RingChoice) {
    let mut relay = Relay::start(ring);
    let server = Server::listen(&relay.inside, "127.0.0.1:3000");
    let forward = relay.forward(3000);
    let first = connect(forward.v4());
    let accepted = server.accept();
    drop(server);
    assert_eq!(ends_by(&connect(forward.v4())), End::Reset);
    // The open connection is independent of the listener.
    landfall_tests::send_all(&accepted, landfall_tests::Pattern::new(1), 10);
    drop(accepted);
    let mut checker = landfall_tests::Pattern::new(1).checker();
    assert_eq!(landfall_tests::read_to_end(&first, &mut checker), End::Eof);
    // A new server is found again, behind the same listener.
    drop(first);
    let server = Server::listen(&relay.inside, "127.0.0.1:3000");
    let client = connect(forward.v4());
    drop(server.accept());
    assert_eq!(ends_by(&client), End::Eof);
}
