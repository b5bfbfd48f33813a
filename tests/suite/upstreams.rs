//! Claim 17: the engine never relays to its own namespace or to the wrong container.

use landfall_engine::RingChoice;
use landfall_engine::command::{Ending, Event, UpstreamId};
use landfall_engine::limits::Limits;
use landfall_engine::opener::FailureKind;
use landfall_engine::opener::client::{Opener, Target};
use landfall_tests::case::Case;
use landfall_tests::{Driver, End, Namespace, Relay, Server, connect, finish, wait_until};

use crate::observe::ends_by;

pub(crate) const CASES: &[Case] = &[
    Case::once("c17_our_own_namespace_is_refused", own_namespace),
    Case::each_ring("c17_sockets_of_another_namespace_are_refused", another_namespace),
    Case::each_ring("c17_two_upstreams_are_not_mixed_up", two_upstreams),
    Case::each_ring("c18_a_removed_upstream_releases_its_namespace", removed_upstream),
];

fn own_namespace() {
    let program = std::env::current_exe().unwrap();
    let own = [Namespace::current().target(), Target::process(std::process::id()).unwrap()];
    for target in own {
        let error = Opener::spawn(&program, target).expect_err("this is our own namespace");
        assert_eq!(error.kind(), Some(FailureKind::OwnNamespace), "{error}");
    }
}

/// An opener that passes sockets of another namespace than it claims is refused.
fn another_namespace(ring: RingChoice) {
    let mut driver = Driver::start(Limits::default(), ring);
    let (reported, real) = (Namespace::new(), Namespace::new());
    let program = std::env::current_exe().unwrap();
    let cookie = Opener::spawn(&program, reported.target()).unwrap().netns_cookie();
    let victim = Server::listen(&real, "127.0.0.1:3000");
    driver.add_upstream(UpstreamId(1), &real, Some(cookie));
    let reason = driver.expect("the upstream to be dropped", |event| match event {
        Event::UpstreamRemoved { upstream: UpstreamId(1), reason } => Some(reason.clone()),
        _ => None,
    });
    let reason = reason.expect("a reason");
    assert!(reason.contains("namespace"), "{reason}");
    assert!(!victim.has_pending_connection());
}

fn two_upstreams(ring: RingChoice) {
    use landfall_engine::command::{ForwardId, Reach};
    use std::io::{Read, Write};
    let mut driver = Driver::start(Limits::default(), ring);
    let insides = [Namespace::new(), Namespace::new()];
    for (number, inside) in (1..).zip(&insides) {
        Server::listen(inside, "127.0.0.1:3000").serve(move |mut stream| {
            let _ = stream.write_all(&[number]);
        });
        driver.add_upstream(UpstreamId(number.into()), inside, None);
        let ports = (3000 + u16::from(number), 3000);
        driver.open(ForwardId(number.into()), UpstreamId(number.into()), ports, Reach::UNKNOWN).unwrap();
    }
    for _ in 0..50 {
        for number in [1, 2] {
            let mut answer = Vec::new();
            connect(([127, 0, 0, 1], 3000 + u16::from(number))).read_to_end(&mut answer).unwrap();
            assert_eq!(answer, [number]);
        }
    }
}

/// No pooled socket keeps the namespace of a removed upstream alive.
fn removed_upstream(ring: RingChoice) {
    for ending in [Ending::Drain, Ending::Reset] {
        let mut relay = Relay::start(ring);
        let server = Server::listen(&relay.inside, "127.0.0.1:3000");
        let forward = relay.forward(3000);
        let client = connect(forward.v4());
        let accepted = server.accept();
        relay.driver.remove_upstream(Relay::UPSTREAM, ending);
        let after = std::net::TcpStream::connect(forward.v4()).expect_err("the listener is closed");
        assert_eq!(after.kind(), std::io::ErrorKind::ConnectionRefused);
        match ending {
            Ending::Drain => {
                finish(&accepted);
                assert_eq!(ends_by(&client), End::Eof);
            }
            Ending::Reset => {
                assert_eq!(ends_by(&client), End::Reset);
                assert_eq!(ends_by(&accepted), End::Reset);
            }
        }
        drop((client, accepted, server));
        // The namespace and its inode disappear when no reference is left.
        let gone = relay.inside.into_end_watch();
        let driver = relay.driver;
        wait_until("the namespace to be gone", || {
            if gone.is_gone() { Ok(()) } else { Err("it is still there") }
        });
        drop(driver);
    }
}
