//! Cancelling: exactly one completion each, and everything comes back.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::fd::OwnedFd;

use landfall_engine::channel::Channel;
use landfall_engine::command::Family;
use landfall_engine::limits::Limits;
use landfall_engine::ring::{Borrowed, Op, Outcome, Way};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::bench::{Real, run, tcp_pair};
use crate::bytes::fill;

pub(crate) fn a_cancelled_read_is_told_once<R: Real>(_: &str) {
    run::<R>(&Limits::default(), |bench| {
        for (way, eager) in [(Way::Copy, false), (Way::Copy, true), (Way::Splice, false), (Way::Splice, true)]
        {
            let (ours, mut theirs) = tcp_pair();
            let ours = bench.adopt(ours);
            let read = bench.recv(&ours, way, eager);
            let key = bench.key(read);
            bench.ring.cancel(key);
            bench.ring.cancel(key);
            assert!(matches!(bench.outcome(read), Outcome::Cancelled(None)));
            // The bytes that come afterwards are the next read's.
            theirs.write_all(b"later").unwrap();
            bench.assert_quiet();
            let read = bench.recv(&ours, way, false);
            let loan = bench.bytes(read);
            assert_eq!(bench.content(loan), b"later");
        }
    });
}

pub(crate) fn a_cancelled_accept_is_told_once<R: Real>(_: &str) {
    run::<R>(&Limits::default(), |bench| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let listener = bench.adopt(listener);
        let accept = bench.submit(Op::Accept { listener });
        assert!(bench.cancel(accept).is_none());
    });
}

pub(crate) fn a_cancelled_connect_is_told_once<R: Real>(_: &str) {
    run::<R>(&Limits::default(), |bench| {
        // A listener whose queue is full answers no SYN.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let address = listener.local_addr().unwrap();
        let mut queued = Vec::new();
        let waiting = loop {
            assert!(queued.len() < 16, "the queue is never full");
            let socket = tcp_socket();
            let socket = bench.adopt(socket);
            let connect = bench.submit(Op::Connect { socket: socket.clone(), address });
            if bench.is_pending(connect) {
                break connect;
            }
            assert!(matches!(bench.outcome(connect), Outcome::Connected(Ok(()))));
            queued.push(socket);
        };
        bench.assert_quiet();
        assert!(bench.cancel(waiting).is_none());
    });
}

pub(crate) fn tcp_socket() -> OwnedFd {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).unwrap()
}

pub(crate) fn a_cancelled_send_gives_back_what_is_left<R: Real>(_: &str) {
    for way in [Way::Copy, Way::Splice] {
        run::<R>(&Limits::default(), |bench| {
            let (ours, mut reader) = tcp_pair();
            let ours = bench.adopt(ours);
            let (waiting, read_in) = fill(bench, &ours, way);
            bench.assert_quiet();
            let left = bench.cancel(waiting).map_or(0, |loan| loan.bytes());
            assert!(left > 0);
            // What came back and what arrives make up the whole.
            bench.ring.shutdown_write(&ours).unwrap();
            let mut arrived = Vec::new();
            reader.read_to_end(&mut arrived).unwrap();
            assert_eq!(arrived.len() + left, read_in, "{way:?}");
        });
    }
}

pub(crate) fn a_cancelled_watch_is_told_once<R: Real>(_: &str) {
    run::<R>(&Limits::default(), |bench| {
        let (ours, _theirs) = tcp_pair();
        let ours = bench.adopt(ours);
        let watch = bench.watch(&ours);
        assert!(bench.cancel(watch).is_none());
    });
}

pub(crate) fn a_cancelled_stock_is_told_once<R: Real>(_: &str) {
    run::<R>(&Limits::default(), |bench| {
        let (ours, theirs) = Channel::pair().unwrap();
        let channel = bench.adopt(OwnedFd::from(ours));
        let op = || Op::Stock { channel: channel.clone(), family: Family::V4, count: 4, netns_cookie: 1 };
        let stock = bench.submit(op());
        bench.assert_quiet();
        assert!(bench.cancel(stock).is_none());
        // The next one hears that nobody will answer any more.
        let stock = bench.submit(op());
        drop(theirs);
        assert!(matches!(bench.outcome(stock), Outcome::Stocked(Err(_))));
    });
}

pub(crate) fn a_late_cancel_hits_nobody<R: Real>(_: &str) {
    run::<R>(&Limits::default(), |bench| {
        let (ours, mut theirs) = tcp_pair();
        let ours = bench.adopt(ours);
        let read = bench.recv(&ours, Way::Copy, false);
        let key = bench.key(read);
        theirs.write_all(b"one").unwrap();
        drop(bench.bytes(read));
        let next = bench.recv(&ours, Way::Copy, false);
        bench.ring.cancel(key);
        bench.assert_quiet();
        theirs.write_all(b"two").unwrap();
        let loan = bench.bytes(next);
        assert_eq!(bench.content(loan), b"two");
    });
}
