//! Claim 20: one engine replaces another, and no connection is refused, reset or truncated in the meantime.

use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command as Process, Stdio};

use landfall_engine::RingChoice;
use landfall_engine::channel::Channel;
use landfall_engine::command::{Command, Event, Family, ForwardId, Reach, UpstreamId, UpstreamKind};
use landfall_engine::opener::client::Opener;
use landfall_tests::case::Case;
use landfall_tests::{
    End, Flood, Namespace, Pattern, Server, TIMEOUT, answer, connect, is_long, note, read_exactly,
    read_to_end, send_all, wait_until,
};

use crate::control::{Running, connect_driver, expect_event};

pub(crate) const CASES: &[Case] = &[
    Case::each_ring("c20_an_engine_upgrade_under_load_refuses_no_connection", upgrade_refuses_no_connection),
    Case::each_ring("c20_lent_listeners_are_checked", lent_listeners_are_checked),
];

const UPSTREAM: UpstreamId = UpstreamId(1);
/// The port of the server for short connections, and the port of the server for long ones.
const BUSY: u16 = 3000;
const QUIET: u16 = 3001;

/// A process with an engine, and its driver.
struct Generation {
    process: Running,
    driver: Channel,
    /// A connection that this engine accepted, and that outlives its listener.
    held: Option<(TcpStream, TcpStream)>,
}

impl Generation {
    /// Starts an engine at `path`, which another engine may have, and waits until it has the path.
    fn start(path: &Path, ring: RingChoice) -> Generation {
        let inode = || std::fs::metadata(path).map(|found| found.ino()).ok();
        let before = inode();
        let name = if ring == RingChoice::Epoll { "epoll" } else { "io_uring" };
        let mut process = Process::new(std::env::current_exe().unwrap());
        process.args(["_engine", name]).arg(path).stdin(Stdio::null());
        let process = Running(process.spawn().unwrap());
        wait_until("the next engine to take the address", || match inode() {
            found if found.is_some() && found != before => Ok(()),
            found => Err(found),
        });
        Generation { process, driver: connect_driver(path), held: None }
    }

    /// Adds an upstream for the namespace.
    fn enter(&self, opener: &mut Opener) {
        let (sources, descriptors) = opener.upstream(1).unwrap();
        let add = Command::AddUpstream {
            upstream: UPSTREAM,
            netns_cookie: opener.netns_cookie(),
            sources,
            kind: UpstreamKind::Opener,
        };
        self.driver.send(&add, &borrow(&descriptors)).unwrap();
        expect_event(&self.driver, |event| matches!(event, Event::UpstreamAdded { .. }).then_some(()));
    }

    /// Requests a forward. Returns the resulting event.
    fn open(&self, port: u16, lent: &[OwnedFd]) -> Event {
        self.driver.send(&open(port), &borrow(lent)).unwrap();
        expect_event(&self.driver, |event| {
            matches!(event, Event::ListenerOpened { .. } | Event::ListenerFailed { .. }).then_some(event)
        })
    }

    /// Requests its listening sockets, by port.
    fn lend(&self) -> Vec<(u16, Vec<OwnedFd>)> {
        self.driver.send(&Command::LendListeners, &[]).unwrap();
        let mut lent = Vec::new();
        loop {
            match self.driver.recv_timeout::<Event>(TIMEOUT).unwrap().unwrap() {
                (Event::ListenerLent { host_port, upstream, .. }, sockets) => {
                    assert_eq!((upstream, sockets.len()), (UPSTREAM, 2));
                    lent.push((host_port.get(), sockets));
                }
                (Event::ListenersLent { count }, none) => {
                    assert!(none.is_empty());
                    assert_eq!(lent.len(), count as usize);
                    return lent;
                }
                _ => {}
            }
        }
    }

    /// Waits until it exits by itself.
    fn end(mut self) {
        expect_event(&self.driver, |event| (event == Event::Stopped).then_some(()));
        assert!(self.process.0.wait().unwrap().success());
    }
}

fn borrow(descriptors: &[OwnedFd]) -> Vec<std::os::fd::BorrowedFd<'_>> {
    descriptors.iter().map(AsFd::as_fd).collect()
}

fn open(port: u16) -> Command {
    let number = port.try_into().unwrap();
    Command::OpenListener {
        forward: ForwardId(u32::from(port)),
        upstream: UPSTREAM,
        host_port: number,
        target_port: number,
        reach: Reach { v4: true, v6: false },
    }
}

fn upgrade_refuses_no_connection(ring: RingChoice) {
    let rounds = if is_long() { 100 } else { 12 };
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("engine.sock");
    let inside = Namespace::new();
    Server::listen(&inside, &format!("127.0.0.1:{BUSY}")).serve_in_turn(8, answer);
    let quiet = Server::listen(&inside, &format!("127.0.0.1:{QUIET}"));
    let mut opener = Opener::spawn(&std::env::current_exe().unwrap(), inside.target()).unwrap();

    let mut current = Generation::start(&path, ring);
    current.enter(&mut opener);
    for port in [BUSY, QUIET] {
        assert!(matches!(current.open(port, &[]), Event::ListenerOpened { .. }));
    }
    let mut before = Vec::new();
    let flood = Flood::start(BUSY, 4);
    for _ in 0..rounds {
        flood.wait_for_progress(20);
        current.held = Some((connect(([127, 0, 0, 1], QUIET)), quiet.accept()));
        let next = Generation::start(&path, ring);
        next.enter(&mut opener);
        for (port, sockets) in current.lend() {
            let opened = next.open(port, &sockets);
            assert!(matches!(opened, Event::ListenerOpened { .. }), "{opened:?}");
        }
        // Both engines accept.
        flood.wait_for_progress(20);
        current.driver.send(&Command::Drain, &[]).unwrap();
        expect_event(&current.driver, |event| matches!(event, Event::ListenerClosed { .. }).then_some(()));
        assert!(path.exists(), "the older engine removed the address of the newer");
        before.push(std::mem::replace(&mut current, next));
    }
    flood.wait_for_progress(20);
    note!("{} visits during {rounds} upgrades", flood.end());

    // Each replaced engine still has the connection that it accepted, and exits when that ends.
    for mut generation in before {
        let (client, accepted) = generation.held.take().unwrap();
        for (from, to) in [(&client, &accepted), (&accepted, &client)] {
            send_all(from, Pattern::new(1), 50_000);
            read_exactly(to, &mut Pattern::new(1).checker(), 50_000);
        }
        drop((client, accepted));
        generation.end();
    }
    current.driver.send(&Command::Stop, &[]).unwrap();
    current.end();
    assert!(!path.exists());
}

fn lent_listeners_are_checked(ring: RingChoice) {
    let directory = tempfile::tempdir().unwrap();
    let inside = Namespace::new();
    let mut opener = Opener::spawn(&std::env::current_exe().unwrap(), inside.target()).unwrap();
    let engine = Generation::start(&directory.path().join("engine.sock"), ring);
    engine.enter(&mut opener);
    let listening = |address: &str| OwnedFd::from(std::net::TcpListener::bind(address).unwrap());
    let busy = format!("127.0.0.1:{BUSY}");
    let stream = || OwnedFd::from(std::os::unix::net::UnixStream::pair().unwrap().0);
    let refused = |what: &str, sockets: Vec<OwnedFd>| {
        match engine.open(BUSY, &sockets) {
            Event::ListenerFailed { failure, .. } => {
                assert!(failure.detail.contains(what), "{what}: {}", failure.detail);
            }
            other => panic!("{what}: {other:?}"),
        }
        drop(sockets);
        // The engine has closed its copies; otherwise the port would be in use.
        drop(listening(&busy));
    };
    refused("no stream socket", vec![std::fs::File::open("/dev/null").unwrap().into()]);
    refused("no stream socket", vec![std::net::UdpSocket::bind(&busy).unwrap().into()]);
    refused("not TCP", vec![stream()]);
    refused("does not listen", vec![connected()]);
    refused("listens elsewhere", vec![listening("127.0.0.1:3999")]);
    refused("listens elsewhere", vec![listening(&format!("0.0.0.0:{BUSY}"))]);
    refused("listens elsewhere", vec![listening(&format!("127.0.0.2:{BUSY}"))]);
    refused("another network namespace", vec![inside.run(|| listening(&busy))]);
    refused("a second socket of the same family", {
        let socket = listening(&busy);
        vec![socket.try_clone().unwrap(), socket]
    });
    // A blocking socket of one family: it is made non-blocking, and the other family is bound.
    let server = Server::listen(&inside, &busy);
    let lent = std::net::TcpListener::bind(&busy).unwrap();
    assert!(matches!(engine.open(BUSY, &[lent.into()]), Event::ListenerOpened { .. }));
    for family in Family::ALL {
        let client = connect(family.loopback(BUSY.try_into().unwrap()));
        drop(server.accept());
        assert_eq!(read_to_end(&client, &mut Pattern::new(1).checker()), End::Eof);
    }
    engine.driver.send(&Command::Stop, &[]).unwrap();
    engine.end();
}

/// A TCP socket that does not listen.
fn connected() -> OwnedFd {
    let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    TcpStream::connect(server.local_addr().unwrap()).unwrap().into()
}
