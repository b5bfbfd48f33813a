//! Opening and closing listeners; open connections end only if requested.

use std::net::TcpListener;
use std::num::NonZeroU16;

use landfall_engine::RingChoice;
use landfall_engine::command::{Command, Ending, Event, Family, ForwardId, ListenFailureKind, Reach};
use landfall_tests::case::Case;
use landfall_tests::{End, Pattern, Relay, Server, connect, finish, read_exactly, send_all};

use crate::observe::ends_by;

pub(crate) const CASES: &[Case] = &[
    Case::each_ring("draining_a_listener_frees_its_port_and_keeps_its_connections", drains),
    Case::each_ring("resetting_a_listener_resets_its_connections", resets),
    Case::each_ring("a_port_in_use_is_reported_without_side_effects", taken),
    Case::each_ring("a_port_can_be_opened_and_closed_repeatedly", again_and_again),
    Case::each_ring("the_counters_of_the_engine_add_up", adds_up),
    Case::each_ring("a_draining_engine_finishes_open_connections", engine_drains),
];

fn drains(ring: RingChoice) {
    let mut relay = Relay::start(ring);
    let server = Server::listen(&relay.inside, "127.0.0.1:3000");
    let forward = relay.forward(3000);
    let client = connect(forward.v4());
    let accepted = server.accept();
    let closed = relay.driver.close(forward.id, Ending::Drain);
    assert_eq!((closed.accepted, closed.open), (1, 1));
    // Another process can bind the port from now on.
    for address in ["127.0.0.1:3000", "[::1]:3000"] {
        drop(TcpListener::bind(address).unwrap_or_else(|error| panic!("{address}: {error}")));
    }
    let again = relay.forward(3000);
    for (from, to) in [(&client, &accepted), (&accepted, &client)] {
        send_all(from, Pattern::new(1), 100_000);
        read_exactly(to, &mut Pattern::new(1).checker(), 100_000);
    }
    let state = relay.driver.describe();
    assert!(state.iter().any(|state| state.forward == again.id && state.listening), "{state:?}");
    finish(&client);
    assert_eq!(ends_by(&accepted), End::Eof);
    finish(&accepted);
    assert_eq!(ends_by(&client), End::Eof);
}

fn resets(ring: RingChoice) {
    let mut relay = Relay::start(ring);
    let server = Server::listen(&relay.inside, "127.0.0.1:3000");
    let other = Server::listen(&relay.inside, "127.0.0.1:3001");
    let (forward, untouched) = (relay.forward(3000), relay.forward(3001));
    let (client, accepted) = (connect(forward.v4()), server.accept());
    let (bystander, answering) = (connect(untouched.v4()), other.accept());
    relay.driver.close(forward.id, Ending::Reset);
    assert_eq!(ends_by(&client), End::Reset);
    assert_eq!(ends_by(&accepted), End::Reset);
    send_all(&answering, Pattern::new(1), 1000);
    read_exactly(&bystander, &mut Pattern::new(1).checker(), 1000);
}

fn taken(ring: RingChoice) {
    let mut relay = Relay::start(ring);
    for (number, address) in (100..).zip(["127.0.0.1:3000", "[::1]:3000", "0.0.0.0:3000", "[::]:3000"]) {
        let holder = TcpListener::bind(address).unwrap();
        let failure = relay
            .driver
            .open(ForwardId(number), Relay::UPSTREAM, (3000, 3000), Reach::UNKNOWN)
            .expect_err("the port is taken");
        assert_eq!(failure.kind, ListenFailureKind::Taken, "{address}: {failure:?}");
        assert_eq!(failure.address.port(), 3000);
        drop(holder);
        assert!(relay.driver.describe().is_empty());
    }
    // The port is free again, and no descriptor of the failed attempts is left.
    let server = Server::listen(&relay.inside, "127.0.0.1:3000");
    let forward = relay.forward(3000);
    for family in Family::ALL {
        let client = connect(forward.at(family));
        drop(server.accept());
        assert_eq!(ends_by(&client), End::Eof);
    }
}

fn again_and_again(ring: RingChoice) {
    let mut relay = Relay::start(ring);
    let server = Server::listen(&relay.inside, "127.0.0.1:3000");
    for round in 0..100 {
        let forward = relay.forward(3000);
        let client = connect(forward.at(Family::ALL[round % 2]));
        drop(server.accept());
        assert_eq!(ends_by(&client), End::Eof);
        let ending = if round % 3 == 0 { Ending::Reset } else { Ending::Drain };
        relay.driver.close(forward.id, ending);
        let refused = std::net::TcpStream::connect(forward.v4()).expect_err("it is closed");
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    }
    // Repeating it, and closing a forward that never existed, has no effect.
    let never = relay.driver.close(ForwardId(9999), Ending::Drain);
    assert_eq!(never.accepted, 0);
}

fn adds_up(ring: RingChoice) {
    const UP: u64 = 123_456;
    const DOWN: u64 = 65_432;
    let mut relay = Relay::start(ring);
    let server = Server::listen(&relay.inside, "127.0.0.1:3000");
    let forward = relay.forward(3000);
    let pairs: Vec<_> = (0..4).map(|_| (connect(forward.v4()), server.accept())).collect();
    for (client, accepted) in &pairs {
        send_all(client, Pattern::new(1), UP);
        read_exactly(accepted, &mut Pattern::new(1).checker(), UP);
        send_all(accepted, Pattern::new(2), DOWN);
        read_exactly(client, &mut Pattern::new(2).checker(), DOWN);
    }
    let open = relay.stats(forward);
    assert_eq!((open.accepted, open.open, open.bytes_up, open.bytes_down), (4, 4, 4 * UP, 4 * DOWN));
    let mut pairs = pairs.into_iter();
    let mut next = || pairs.next().unwrap();
    let (client, _accepted) = next();
    landfall_tests::reset(client);
    relay.stats_become(forward, "a reset by the client", |stats| {
        stats.reset_by_downstream == 1 && stats.open == 3
    });
    let (_client, accepted) = next();
    landfall_tests::reset(accepted);
    relay.stats_become(forward, "a reset by the server", |stats| {
        stats.reset_by_upstream == 1 && stats.open == 2
    });
    drop(next());
    relay.stats_become(forward, "a clean end", |stats| stats.completed == 1 && stats.open == 1);
    drop(server);
    connect(forward.v4());
    relay.stats_become(forward, "a refusal", |stats| stats.refused == 1 && stats.open == 1);
    let (_client, _accepted) = next();
    let state = relay.driver.describe();
    assert_eq!(state.len(), 1);
    assert_eq!(state[0].upstream, Relay::UPSTREAM);
    assert_eq!((state[0].host_port, state[0].target_port), (PORT, PORT));
    assert!(state[0].listening);
    assert_eq!(state[0].stats.accepted, 5);
}

const PORT: NonZeroU16 = NonZeroU16::new(3000).unwrap();

fn engine_drains(ring: RingChoice) {
    let mut relay = Relay::start(ring);
    let server = Server::listen(&relay.inside, "127.0.0.1:3000");
    let forward = relay.forward(3000);
    let client = connect(forward.v4());
    let accepted = server.accept();
    relay.driver.apply(Command::Drain);
    relay
        .driver
        .expect("the listener to close", |event| matches!(event, Event::ListenerClosed { .. }).then_some(()));
    let refused = std::net::TcpStream::connect(forward.v4()).expect_err("it drains");
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    send_all(&client, Pattern::new(1), 1_000_000 / 10);
    read_exactly(&accepted, &mut Pattern::new(1).checker(), 100_000);
    let early = relay.driver.pending();
    assert!(!early.contains(&Event::Stopped), "it stopped while a connection was open");
    drop(client);
    assert_eq!(ends_by(&accepted), End::Eof);
    drop(accepted);
    relay.driver.expect("the end", |event| matches!(event, Event::Stopped).then_some(()));
}
