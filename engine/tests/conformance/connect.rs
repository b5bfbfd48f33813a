//! Connecting and accepting.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;

use landfall_engine::command::Family;
use landfall_engine::limits::Limits;
use landfall_engine::ring::{Op, Outcome, Way};
use landfall_engine::sys::SocketError;
use nix::sched::{CloneFlags, unshare};
use rustix::process::{Resource, Rlimit, setrlimit};

use crate::bench::{Bench, Real, is_alone, run};
use crate::cancel::tcp_socket;

/// A port on which nobody listens: it was free a moment ago.
fn vacant() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

pub(crate) fn a_connect_reaches_a_listener<R: Real>(_: &str) {
    run::<R>(&Limits::default(), |bench| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let socket = bench.adopt(tcp_socket());
        let connect = bench.submit(Op::Connect { socket: socket.clone(), address });
        assert!(matches!(bench.outcome(connect), Outcome::Connected(Ok(()))));
        assert!(!bench.ring.is_own_peer(&socket));
        let (mut theirs, _) = listener.accept().unwrap();
        let read = bench.recv(&socket, Way::Copy, false);
        std::io::Write::write_all(&mut theirs, b"welcome").unwrap();
        let loan = bench.bytes(read);
        assert_eq!(bench.content(loan), b"welcome");
    });
}

pub(crate) fn a_connect_to_nobody_is_refused<R: Real>(_: &str) {
    run::<R>(&Limits::default(), |bench| {
        let socket = bench.adopt(tcp_socket());
        let connect = bench.submit(Op::Connect { socket, address: vacant() });
        match bench.outcome(connect) {
            Outcome::Connected(Err(SocketError::Refused)) => {}
            other => panic!("{other:?}"),
        }
    });
}

pub(crate) fn a_connect_to_itself_is_found_out<R: Real>(test: &str) {
    if !is_alone(test) {
        return;
    }
    // A namespace with two ephemeral ports: a connect to one of them is a connect to itself every other time.
    if let Err(errno) = unshare(CloneFlags::CLONE_NEWNET) {
        println!("skipped: no network namespace can be made: {errno}");
        return;
    }
    assert!(Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap().success());
    std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", "40000 40001\n").unwrap();
    run::<R>(&Limits::default(), |bench| {
        let address = SocketAddr::from(([127, 0, 0, 1], 40_000));
        let found = (0..1_000).any(|_| {
            let socket = bench.adopt(tcp_socket());
            let connect = bench.submit(Op::Connect { socket: socket.clone(), address });
            match bench.outcome(connect) {
                Outcome::Connected(Ok(())) => {
                    let own = bench.ring.is_own_peer(&socket);
                    bench.ring.reset_on_close(&socket);
                    own
                }
                Outcome::Connected(Err(SocketError::Refused | SocketError::PortsExhausted)) => false,
                other => panic!("{other:?}"),
            }
        });
        assert!(found, "it never met itself");
    });
}

pub(crate) fn a_second_wait_is_not_fooled_by_the_first<R: Real>(_: &str) {
    run::<R>(&Limits::default(), |bench| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let address = listener.local_addr().unwrap();
        let mut queued = Vec::new();
        let waiting = loop {
            assert!(queued.len() < 16, "the queue is never full");
            // An unconnected socket is writable and hung up (tcp_poll()), and a watch finds that.
            let socket = bench.adopt(tcp_socket());
            let watch = bench.watch(&socket);
            assert!(matches!(bench.outcome(watch), Outcome::Broken));
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

pub(crate) fn accepts_take_the_queue_one_by_one<R: Real>(_: &str) {
    run::<R>(&Limits::default(), |bench| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let listener = bench.adopt(listener);
        for _ in 0..3 {
            let waiting = bench.submit(Op::Accept { listener: listener.clone() });
            bench.assert_quiet();
            assert!(bench.is_pending(waiting));
            let clients: Vec<TcpStream> = (0..5).map(|_| TcpStream::connect(address).unwrap()).collect();
            accepted(bench, waiting);
            for _ in 1..clients.len() {
                let accept = bench.submit(Op::Accept { listener: listener.clone() });
                accepted(bench, accept);
            }
        }
    });
}

fn accepted<R: Real>(bench: &mut Bench<R>, accept: landfall_engine::ring::Token) -> Family {
    match bench.outcome(accept) {
        Outcome::Accepted(Ok((_, family))) => family,
        other => panic!("{other:?}"),
    }
}

pub(crate) fn an_accept_tells_the_family<R: Real>(_: &str) {
    run::<R>(&Limits::default(), |bench| {
        for (host, family) in [("127.0.0.1:0", Family::V4), ("[::1]:0", Family::V6)] {
            let Ok(listener) = TcpListener::bind(host) else {
                println!("skipped: {host} cannot be bound here");
                continue;
            };
            listener.set_nonblocking(true).unwrap();
            let address = listener.local_addr().unwrap();
            let listener = bench.adopt(listener);
            let _client = TcpStream::connect(address).unwrap();
            let accept = bench.submit(Op::Accept { listener });
            assert_eq!(accepted(bench, accept), family);
        }
    });
}

pub(crate) fn an_accept_without_descriptors_is_exhausted<R: Real>(test: &str) {
    if !is_alone(test) {
        return;
    }
    run::<R>(&Limits::default(), |bench| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let listener = bench.adopt(listener);
        let waiting = bench.submit(Op::Accept { listener: listener.clone() });
        let client = tcp_socket();
        setrlimit(Resource::Nofile, Rlimit { current: Some(128), maximum: Some(128) }).unwrap();
        let hoard: Vec<_> = std::iter::from_fn(|| std::fs::File::open("/dev/null").ok()).collect();
        let _ = rustix::net::connect(&client, &address);
        for accept in [waiting, bench.submit(Op::Accept { listener: listener.clone() })] {
            match bench.outcome(accept) {
                Outcome::Accepted(Err(SocketError::Exhausted)) => {}
                other => panic!("{other:?}"),
            }
        }
        // The client still waits in the queue.
        drop(hoard);
        let accept = bench.submit(Op::Accept { listener });
        accepted(bench, accept);
    });
}
