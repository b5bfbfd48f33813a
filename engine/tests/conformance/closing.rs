//! Closing: the registration ends first, so that the kernel closes the socket, and no event of it follows.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};

use landfall_engine::limits::Limits;
use landfall_engine::reactor::{Readiness, SocketIo};

use crate::bench::{Bench, Real, run, tcp_pair};

/// Returns the number of events that `act` causes.
fn events_of<P: Real>(bench: &mut Bench<P>, act: impl FnOnce(&mut Bench<P>)) -> usize {
    bench.drain_events();
    let before = bench.events.len();
    act(bench);
    bench.drain_events();
    bench.events.len() - before
}

pub(crate) fn a_close_sends_the_fin<P: Real>(_: &str) {
    run::<P>(&Limits::default(), |bench| {
        let (ours, mut theirs) = tcp_pair();
        let key = bench.register(ours);
        bench.await_ready(key, Readiness::OUT);
        let events = events_of(bench, |bench| bench.reactor.close(key));
        assert_eq!(events, 0);
        assert_eq!(theirs.read(&mut [0; 1]).unwrap(), 0);
        // The key is invalid.
        assert!(bench.reactor.socket(key).is_none() && bench.reactor.readiness(key).is_empty());
        assert_eq!(bench.reactor.registered(), 0);
        bench.reactor.close(key);
    });
}

pub(crate) fn a_close_after_reset_on_close_is_a_reset<P: Real>(_: &str) {
    run::<P>(&Limits::default(), |bench| {
        let (ours, mut theirs) = tcp_pair();
        let key = bench.register(ours);
        bench.reactor.on_socket(key, |io, socket| io.reset_on_close(socket)).unwrap();
        bench.reactor.close(key);
        bench.drain_events();
        assert_eq!(theirs.read(&mut [0; 1]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    });
}

pub(crate) fn a_socket_that_is_closed_at_once_has_no_event<P: Real>(_: &str) {
    run::<P>(&Limits::default(), |bench| {
        // The second socket reuses the descriptor number before either was registered with the kernel.
        for _ in 0..100 {
            let ((first, mut first_peer), (second, mut second_peer)) = (tcp_pair(), tcp_pair());
            first_peer.write_all(b"early").unwrap();
            let (first, first_token) = bench.register_as(first);
            bench.reactor.close(first);
            let (second, token) = bench.register_as(second);
            let before = bench.events.len();
            bench.await_ready(second, Readiness::OUT);
            second_peer.write_all(b"late").unwrap();
            bench.await_ready(second, Readiness::IN);
            assert!(bench.events[before..].iter().all(|event| event.token == token));
            assert!(bench.events.iter().all(|event| event.token != first_token));
            // It was closed with unread bytes.
            assert_eq!(first_peer.read(&mut [0; 1]).unwrap_err().kind(), ErrorKind::ConnectionReset);
            bench.reactor.close(second);
        }
        bench.drain_events();
        assert_eq!(bench.reactor.registered(), 0);
    });
}

pub(crate) fn a_reported_close_frees_the_port<P: Real>(_: &str) {
    run::<P>(&Limits::default(), |bench| {
        for _ in 0..20 {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            listener.set_nonblocking(true).unwrap();
            let address = listener.local_addr().unwrap();
            let (key, token) = bench.register_as(listener);
            bench.drain_events();
            bench.reactor.close_and_report(key);
            bench.await_closed(token);
            // std sets SO_REUSEADDR, which does not permit binding a port that still has a listener.
            TcpListener::bind(address).unwrap();
        }
    });
}

pub(crate) fn a_closed_socket_is_closed_although_others_were_reported<P: Real>(_: &str) {
    run::<P>(&Limits::default(), |bench| {
        // The socket becomes ready in the same turn in which it is closed.
        for _ in 0..200 {
            let (ours, mut theirs) = tcp_pair();
            let key = bench.register(ours);
            bench.await_ready(key, Readiness::OUT);
            theirs.write_all(b"crossing").unwrap();
            bench.reactor.close(key);
            bench.submit();
            assert!(theirs.read(&mut [0; 1]).is_err(), "unread bytes make it a reset");
        }
        bench.drain_events();
        assert_eq!(bench.reactor.registered(), 0);
    });
}

pub(crate) fn a_duplicate_held_elsewhere_causes_no_event<P: Real>(_: &str) {
    run::<P>(&Limits::default(), |bench| {
        // Like a listener that was lent to another engine.
        let (ours, mut theirs) = tcp_pair();
        let held: TcpStream = ours.try_clone().unwrap();
        let (key, token) = bench.register_as(ours);
        bench.drain_events();
        bench.reactor.close_and_report(key);
        bench.await_closed(token);
        let events = events_of(bench, |_| theirs.write_all(b"for the other holder").unwrap());
        assert_eq!(events, 0);
        bench.assert_quiet();
        drop(held);
    });
}
