//! Connecting and accepting.

use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::process::Command;

use landfall_engine::limits::Limits;
use landfall_engine::reactor::{Connected, Key, Readiness, Received, SocketIo, TransferMode};
use landfall_engine::sys::SocketError;
use nix::sched::{CloneFlags, unshare};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::{Resource, Rlimit, setrlimit};

use crate::bench::{Bench, Real, is_alone, reset, run};

/// Returns an address on which no socket listens: its port was free a short time ago.
fn vacant() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

fn tcp_socket() -> OwnedFd {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).unwrap()
}

/// Starts a connect and registers the socket.
fn start<P: Real>(bench: &mut Bench<P>, address: SocketAddr) -> Key {
    let socket = tcp_socket();
    assert_eq!(bench.reactor.io().connect(&socket, address), None);
    bench.register(socket)
}

/// Returns the result of a connect after it is reported.
fn result<P: Real>(bench: &mut Bench<P>, key: Key) -> Connected {
    bench.until("connected", |bench| !bench.reactor.readiness(key).is_empty());
    bench.reactor.on_socket(key, |io, socket| io.connect_result(socket)).unwrap()
}

pub(crate) fn a_connect_reaches_a_listener<P: Real>(_: &str) {
    run::<P>(&Limits::default(), |bench| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let key = start(bench, address);
        assert_eq!(result(bench, key), Connected::Established);
        assert!(bench.reactor.readiness(key).contains(Readiness::OUT));
        assert!(!bench.reactor.readiness(key).intersects(Readiness::HUP | Readiness::ERR));
        assert_eq!(bench.reactor.on_socket(key, |io, socket| io.is_own_peer(socket, address)), Some(false));
        let (mut theirs, _) = listener.accept().unwrap();
        theirs.write_all(b"welcome").unwrap();
        assert_eq!(bench.receive(key, TransferMode::Copy).0, Received::Bytes(7));
    });
}

pub(crate) fn a_connect_to_a_closed_port_is_refused<P: Real>(_: &str) {
    run::<P>(&Limits::default(), |bench| {
        let key = start(bench, vacant());
        assert_eq!(result(bench, key), Connected::Failed(SocketError::Refused));
        assert!(bench.reactor.readiness(key).contains(Readiness::HUP));
    });
}

pub(crate) fn a_connect_that_was_reset_since_is_distinguished<P: Real>(_: &str) {
    run::<P>(&Limits::default(), |bench| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        for speaks in [false, true] {
            let socket = tcp_socket();
            assert_eq!(bench.reactor.io().connect(&socket, address), None);
            let (mut theirs, _) = listener.accept().unwrap();
            if speaks {
                theirs.write_all(b"the last").unwrap();
            }
            reset(theirs);
            let key = bench.register(socket);
            bench.await_ready(key, Readiness::ERR);
            assert_eq!(result(bench, key), Connected::Reset);
            if speaks {
                assert_eq!(bench.receive(key, TransferMode::Copy).0, Received::Bytes(8));
            }
            // The error was returned already, so the stream ends as if by a FIN.
            assert_eq!(bench.receive(key, TransferMode::Copy).0, Received::Eof);
        }
    });
}

pub(crate) fn a_connect_to_itself_is_detected<P: Real>(test: &str) {
    if !is_alone(test) {
        return;
    }
    // A namespace with two ephemeral ports: every other connect to one of them is a connect to itself.
    if let Err(errno) = unshare(CloneFlags::CLONE_NEWNET) {
        println!("skipped: no network namespace can be made: {errno}");
        return;
    }
    assert!(Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap().success());
    std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", "40000 40001\n").unwrap();
    run::<P>(&Limits::default(), |bench| {
        let address = SocketAddr::from(([127, 0, 0, 1], 40_000));
        let found = (0..1_000).any(|_| {
            let socket = tcp_socket();
            if let Some(failed) = bench.reactor.io().connect(&socket, address) {
                assert_eq!(failed, Connected::Failed(SocketError::PortsExhausted));
                return false;
            }
            let key = bench.register(socket);
            let own = match result(bench, key) {
                Connected::Established => {
                    let own = bench.reactor.on_socket(key, |io, socket| io.is_own_peer(socket, address));
                    bench.reactor.on_socket(key, |io, socket| io.reset_on_close(socket));
                    own == Some(true)
                }
                Connected::Failed(SocketError::Refused) => false,
                other => panic!("{other:?}"),
            };
            bench.reactor.close(key);
            own
        });
        assert!(found, "it never met itself");
    });
}

pub(crate) fn a_connect_in_progress_is_not_reported<P: Real>(_: &str) {
    run::<P>(&Limits::default(), |bench| {
        // A listener whose queue is full does not answer a SYN.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let address = listener.local_addr().unwrap();
        let mut queued = Vec::new();
        let waiting = loop {
            assert!(queued.len() < 16, "the queue is never full");
            let key = start(bench, address);
            bench.drain_events();
            if bench.reactor.readiness(key).is_empty() {
                break key;
            }
            assert_eq!(result(bench, key), Connected::Established);
            queued.push(key);
        };
        bench.assert_quiet();
        bench.reactor.close(waiting);
        bench.drain_events();
        assert_eq!(bench.reactor.registered(), queued.len());
    });
}

pub(crate) fn accepts_take_the_queue_one_by_one<P: Real>(_: &str) {
    run::<P>(&Limits::default(), |bench| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let key = bench.register(listener);
        assert!(bench.reactor.accept(key).is_none(), "no client was reported");
        for _ in 0..3 {
            bench.assert_quiet();
            let clients: Vec<TcpStream> = (0..5).map(|_| TcpStream::connect(address).unwrap()).collect();
            let mut accepted = 0;
            bench.until("accepted", |bench| {
                while let Some(socket) = bench.reactor.accept(key) {
                    socket.unwrap();
                    accepted += 1;
                }
                accepted == clients.len()
            });
            bench.drain_events();
        }
    });
}

pub(crate) fn an_accept_without_descriptors_is_exhausted<P: Real>(test: &str) {
    if !is_alone(test) {
        return;
    }
    run::<P>(&Limits::default(), |bench| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let key = bench.register(listener);
        bench.drain_events();
        let client = tcp_socket();
        setrlimit(Resource::Nofile, Rlimit { current: Some(128), maximum: Some(128) }).unwrap();
        let hoard: Vec<_> = std::iter::from_fn(|| std::fs::File::open("/dev/null").ok()).collect();
        let _ = rustix::net::connect(&client, &address);
        bench.await_ready(key, Readiness::IN);
        for _ in 0..2 {
            assert!(matches!(bench.reactor.accept(key), Some(Err(SocketError::Exhausted))));
        }
        // The client still waits in the queue.
        drop(hoard);
        assert!(matches!(bench.reactor.accept(key), Some(Ok(_))));
        assert!(bench.reactor.accept(key).is_none());
    });
}
