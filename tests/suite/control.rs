//! Claim 19, in short: the control process stops and starts, and the engine in its own process continues.

use std::os::fd::AsFd;
use std::path::Path as FilePath;
use std::process::{Child, Command, Stdio};

use landfall_engine::RingChoice;
use landfall_engine::channel::Channel;
use landfall_engine::command::{self, Event, ForwardState, Reach, UpstreamId, UpstreamKind};
use landfall_engine::engine::{Engine, EngineOptions};
use landfall_engine::opener::client::Opener;
use landfall_engine::process::{self, CommandSocket, privileges};
use landfall_tests::case::Case;
use landfall_tests::{
    End, Namespace, Pattern, Server, TIMEOUT, connect, finish, read_to_end, send_all, wait_until,
};
use rustix::thread::CapabilitySet;

pub(crate) const CASES: &[Case] =
    &[Case::each_ring("c19_connections_survive_a_change_of_the_control_process", driver_reconnects)];

/// `_engine RING SOCKET`: an engine in a process of its own.
pub(crate) fn engine(arguments: &[String]) {
    let ring = if arguments[0] == "epoll" { RingChoice::Epoll } else { RingChoice::IoUring };
    let socket = CommandSocket::bind(FilePath::new(&arguments[1])).unwrap();
    privileges::drop_capabilities(CapabilitySet::NET_BIND_SERVICE).unwrap();
    let engine =
        Engine::start(EngineOptions { ring, version: "suite".to_owned(), ..EngineOptions::default() })
            .unwrap();
    let ready = engine.ready().clone();
    let (handle, events) = engine.into_parts();
    process::serve(socket, &ready, &handle, events, process::IDLE_EXIT).unwrap();
}

/// Connects a driver to the engine at `path`, and waits for its ready event.
pub(crate) fn connect_driver(path: &FilePath) -> Channel {
    let channel = wait_until("the engine's socket", || Channel::connect(path));
    assert!(matches!(next_event(&channel), Event::Ready { shards: 1.., .. }));
    channel
}

#[track_caller]
fn next_event(channel: &Channel) -> Event {
    channel.recv_timeout::<Event>(TIMEOUT).unwrap().expect("the engine continues").0
}

/// Waits for the first event that `choose` accepts.
#[track_caller]
pub(crate) fn expect_event<T>(channel: &Channel, choose: impl Fn(Event) -> Option<T>) -> T {
    loop {
        if let Some(found) = choose(next_event(channel)) {
            return found;
        }
    }
}

fn describe(channel: &Channel) -> Vec<ForwardState> {
    channel.send(&command::Command::Describe, &[]).unwrap();
    expect_event(channel, |event| match event {
        Event::State { forwards, more: false, .. } => Some(forwards),
        _ => None,
    })
}

fn driver_reconnects(ring: RingChoice) {
    const BYTES: u64 = 256 << 20;
    let directory = std::env::temp_dir().join(format!("landfall-control-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let path = directory.join("engine.sock");
    let name = if ring == RingChoice::Epoll { "epoll" } else { "io_uring" };
    let mut engine = Command::new(std::env::current_exe().unwrap())
        .args(["_engine", name])
        .arg(&path)
        .stdin(Stdio::null())
        .spawn()
        .map(Running)
        .unwrap();
    let inside = Namespace::new();
    let server = Server::listen(&inside, "127.0.0.1:3000");
    let first = connect_driver(&path);
    let mut opener = Opener::spawn(&std::env::current_exe().unwrap(), inside.target()).unwrap();
    let (sources, descriptors) = opener.upstream(1).unwrap();
    let (upstream, netns_cookie) = (UpstreamId(1), opener.netns_cookie());
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    first
        .send(
            &command::Command::AddUpstream { upstream, netns_cookie, sources, kind: UpstreamKind::Opener },
            &borrowed,
        )
        .unwrap();
    drop((opener, descriptors));
    let port = 3000.try_into().unwrap();
    let forward = command::ForwardId(1);
    let open = command::Command::OpenListener {
        forward,
        upstream,
        host_port: port,
        target_port: port,
        reach: Reach::UNKNOWN,
    };
    let is_open = |event| {
        matches!(event, Event::ListenerOpened { forward: opened, .. } if opened == forward).then_some(())
    };
    first.send(&open, &[]).unwrap();
    expect_event(&first, is_open);

    let client = connect(([127, 0, 0, 1], 3000));
    let accepted = server.accept();
    // The driver disconnects without a message, in the middle of the traffic.
    drop(first);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            send_all(&accepted, Pattern::new(1), BYTES);
            finish(&accepted);
        });
        let reading = scope.spawn(|| {
            let mut checker = Pattern::new(1).checker();
            (read_to_end(&client, &mut checker), checker.position())
        });
        for round in 0..50 {
            let control = connect_driver(&path);
            let held = describe(&control);
            assert_eq!(held.len(), 1, "round {round}: {held:?}");
            assert!(held[0].listening && held[0].host_port == port, "round {round}: {held:?}");
            if round % 2 == 0 {
                // A driver without any state sends its commands again.
                control.send(&open, &[]).unwrap();
                expect_event(&control, is_open);
            }
        }
        assert_eq!(reading.join().unwrap(), (End::Eof, BYTES));
    });
    finish(&client);
    let last = connect_driver(&path);
    last.send(&command::Command::Stop, &[]).unwrap();
    expect_event(&last, |event| matches!(event, Event::Stopped).then_some(()));
    assert!(engine.0.wait().unwrap().success());
    std::fs::remove_dir_all(&directory).unwrap();
}

/// An engine that ends with the case.
pub(crate) struct Running(pub(crate) Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
