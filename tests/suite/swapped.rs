//! A listener inside a container leads to a server on the host: the same relay with the roles swapped. And a listener whose
//! accept fails is retried only after a pause.

use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};

use landfall_engine::RingChoice;
use landfall_engine::command::{
    Command, Ending, Event, Family, ForwardId, UpstreamId, UpstreamKind, WatchSources,
};
use landfall_engine::limits::Limits;
use landfall_engine::opener::FailureKind;
use landfall_engine::opener::client::Opener;
use landfall_tests::case::Case;
use landfall_tests::process::engine_idle_share;
use landfall_tests::{
    Driver, End, Forward, Namespace, Pattern, Relay, Server, connect_from, finish, read_to_end, send_all,
};
use rustix::net::Shutdown;

use crate::half_close::ten_mebibytes_come_back;
use crate::observe::{Path, Side, ends_by};
use crate::reset::SCRIPTS;

pub(crate) const CASES: &[Case] = &[
    Case::each_ring("c02_a_listener_inside_leads_to_a_host_server", half_close),
    Case::each_ring("c03_resets_are_preserved_by_a_listener_inside", resets),
    Case::each_ring("c04_a_listener_inside_resets_for_a_dead_host_port", dead_port),
    Case::each_ring("a_listener_inside_serves_both_families_and_closes", both_families),
    Case::each_ring("a_failing_listener_pauses_and_is_reported_once", failing),
];

const HOST: UpstreamId = UpstreamId(9);

/// A listener inside that leads to a port of the host.
pub(crate) struct Inside {
    pub(crate) relay: Relay,
    pub(crate) forward: Forward,
    /// The listener's address inside.
    pub(crate) address: SocketAddr,
}

/// Adds the host as an upstream.
fn add_host(driver: &mut Driver) {
    driver.add_entered(HOST, UpstreamKind::Host, (0, WatchSources::default(), Vec::new()));
}

/// Accepts from listening sockets that lead to a port of the host.
#[track_caller]
fn adopt(driver: &mut Driver, forward: ForwardId, host_port: u16, sockets: Vec<OwnedFd>) {
    let target_port = host_port.try_into().unwrap();
    driver.apply_with(Command::AdoptListener { forward, upstream: HOST, target_port }, sockets);
    driver.expect("the listener", |event| match event {
        Event::ListenerOpened { forward: opened, .. } if *opened == forward => Some(()),
        Event::ListenerFailed { failure, .. } => panic!("{failure:?}"),
        _ => None,
    });
}

fn opener(inside: &Namespace) -> Opener {
    Opener::spawn(&std::env::current_exe().unwrap(), inside.target()).unwrap()
}

/// Opens a listener inside, on 127.0.0.1, for a port of the host.
pub(crate) fn lead_out(ring: RingChoice, host_port: u16) -> Inside {
    let inside = Namespace::new();
    let mut driver = Driver::start(Limits::default(), ring);
    add_host(&mut driver);
    let (socket, port) = opener(&inside).listen(Family::V4, 0).unwrap();
    let id = ForwardId(1);
    adopt(&mut driver, id, host_port, vec![socket]);
    let address = Family::V4.loopback(port);
    Inside { relay: Relay::of(driver, inside), forward: Forward { id, host_port }, address }
}

fn half_close(ring: RingChoice) {
    ten_mebibytes_come_back(Path::swapped(ring));
}

fn resets(ring: RingChoice) {
    let (path, direct) = (Path::swapped(ring), Path::direct());
    for (name, script) in SCRIPTS {
        for side in [Side::Client, Side::Server] {
            assert_eq!(script(&path, side), script(&direct, side), "{name}, by the {side:?}");
        }
    }
}

fn dead_port(ring: RingChoice) {
    // Currently free, and in the range from which the kernel takes the ports of connecting sockets.
    let port = Server::listen(&Namespace::current(), "127.0.0.1:0").port();
    let mut inside = lead_out(ring, port);
    for _ in 0..20 {
        let client = connect_from(&inside.relay.inside, inside.address);
        assert_eq!(ends_by(&client), End::Reset);
    }
    let forward = inside.forward;
    let stats = inside.relay.stats_become(forward, "the refusals", |stats| stats.refused == 20);
    assert_eq!(stats.open, 0);
}

fn both_families(ring: RingChoice) {
    let inside = Namespace::new();
    let mut opener = opener(&inside);
    let mut driver = Driver::start(Limits::default(), ring);
    add_host(&mut driver);
    let servers = ["127.0.0.1:0", "[::1]:0"].map(|address| Server::listen(&Namespace::current(), address));
    for (id, (family, server)) in (1u32..).zip(Family::ALL.into_iter().zip(&servers)) {
        let (socket, port) = opener.listen(family, 0).unwrap();
        // The container holds the port from now on.
        match opener.listen(family, port.get()) {
            Err(error) => assert_eq!(error.kind(), Some(FailureKind::InUse), "{error}"),
            Ok(_) => panic!("{port} was given twice"),
        }
        adopt(&mut driver, ForwardId(id), server.port(), vec![socket]);
        // Either family of a client reaches the one family of the server.
        let client = connect_from(&inside, family.loopback(port));
        let accepted = server.accept();
        send_all(&client, Pattern::new(1), 100_000);
        finish(&client);
        assert_eq!(read_to_end(&accepted, &mut Pattern::new(1).checker()), End::Eof);
        drop(accepted);
        assert_eq!(ends_by(&client), End::Eof);
        let stats = driver.close(ForwardId(id), Ending::Drain);
        assert_eq!(stats.accepted, 1, "{stats:?}");
        // The port is free again.
        drop(opener.listen(family, port.get()).unwrap());
    }
    driver.remove_upstream(HOST, Ending::Drain);
}

/// Another holder of the socket stops it from listening (shutdown(2)), after which every accept fails.
fn failing(ring: RingChoice) {
    let server = Server::listen(&Namespace::current(), "127.0.0.1:0");
    let inside = Namespace::new();
    let (socket, _) = opener(&inside).listen(Family::V4, 0).unwrap();
    let (other_socket, other_port) = opener(&inside).listen(Family::V4, 0).unwrap();
    let mut driver = Driver::start(Limits::default(), ring);
    add_host(&mut driver);
    let holder = socket.as_fd().try_clone_to_owned().unwrap();
    adopt(&mut driver, ForwardId(1), server.port(), vec![socket]);
    adopt(&mut driver, ForwardId(2), server.port(), vec![other_socket]);
    rustix::net::shutdown(&holder, Shutdown::Both).unwrap();
    let what = driver.expect("the report", |event| match event {
        Event::Degraded { what } => Some(what.clone()),
        _ => None,
    });
    assert!(what.contains("fails to accept"), "{what}");
    engine_idle_share("a listener that fails");
    // The other listener is served in the meantime.
    let client = connect_from(&inside, Family::V4.loopback(other_port));
    let accepted = server.accept();
    drop(client);
    assert_eq!(ends_by(&accepted), End::Eof);
    let again = driver.pending();
    assert!(!again.iter().any(|event| matches!(event, Event::Degraded { .. })), "{again:?}");
    driver.close(ForwardId(1), Ending::Drain);
}
