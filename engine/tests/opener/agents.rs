//! Agents: programs inside that hand out sockets to their clients.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use landfall_engine::channel::Channel;
use landfall_engine::command::{Family, WatchSources};
use landfall_engine::opener::client::{Opener, StockError, take};
use landfall_engine::opener::{AGENT_SOCKET, Answer, FailureKind, Request, serve};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};

use crate::{Inside, assert_refused, dial, listen, readable, sockets};

/// The socket of an agent in `directory`.
fn agents_listener(directory: &Path) -> OwnedFd {
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    rustix::net::bind(&socket, &SocketAddrUnix::new(directory.join(AGENT_SOCKET)).unwrap()).unwrap();
    rustix::net::listen(&socket, 16).unwrap();
    socket
}

/// `_agent DIRECTORY`: runs an agent and a server; prints the server's port when both are ready.
pub(crate) fn agent(directory: &Path) -> ExitCode {
    let listener = agents_listener(directory);
    std::thread::spawn(move || serve::agent(listener).unwrap());
    listen("127.0.0.1:0")
}

pub(crate) fn inside() {
    let directory = tempfile::tempdir().unwrap();
    let inside = Inside::with_agent(directory.path());
    let mut opener = Opener::connect(directory.path()).unwrap();
    let file = std::fs::metadata(format!("/proc/{}/ns/net", inside.pid())).unwrap();
    assert_eq!(opener.netns_inode(), file.ino());
    let cookie = opener.netns_cookie();
    let (sources, descriptors) = opener.agent_upstream().unwrap();
    assert_eq!(sources, WatchSources { sock_diag: true, ..WatchSources::default() });
    assert_eq!(descriptors.len(), 2);
    drop(opener);
    let channel = &descriptors[0];
    for socket in sockets(channel, Family::V4, 3, cookie).unwrap() {
        assert_eq!(dial(socket, ([127, 0, 0, 1], inside.port).into()), "inside");
    }
    // A second client is served at the same time.
    let second = Opener::connect(directory.path()).unwrap();
    assert_eq!(second.netns_cookie(), cookie);
    drop(inside);
    readable(channel);
    assert!(matches!(take(channel.as_fd(), Family::V4, 3, cookie), Err(StockError::Gone)));
}

pub(crate) fn floods() {
    let directory = tempfile::tempdir().unwrap();
    let inside = Inside::with_agent(directory.path());
    let flooding = Channel::connect(&directory.path().join(AGENT_SOCKET)).unwrap();
    // The number of its channels is limited.
    let mut channels = Vec::new();
    let refused = loop {
        flooding.send(&Request::Channel, &[]).unwrap();
        match flooding.recv_timeout::<Answer>(Duration::from_secs(10)).unwrap().unwrap() {
            (Answer::Channel, ends) => channels.extend(ends),
            (other, _) => break other,
        }
        assert!(channels.len() < 100, "the number of channels is not limited");
    };
    assert!(matches!(refused, Answer::Failed { failure } if failure.kind == FailureKind::Exhausted));
    // It sends requests and reads no answer, until it cannot send any more.
    let request = Request::Sockets { family: Family::V4, count: 253, congestion: None };
    let mut asked = 0;
    let pause = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
    while poll(&mut [PollFd::new(&flooding, PollFlags::OUT)], Some(&pause)).unwrap() == 1 {
        while flooding.try_send(&request, &[]).is_ok() {
            asked += 1;
        }
        assert!(asked < 100_000, "the agent continues although its answers are not read");
    }
    let started = Instant::now();
    let opener = Opener::connect(directory.path()).unwrap();
    assert!(started.elapsed() < Duration::from_secs(4), "{:?}", started.elapsed());
    // Few descriptors are in flight to the flooding client.
    let held = std::fs::read_dir(format!("/proc/{}/fd", inside.pid())).unwrap().count();
    assert!(held < 64, "the agent holds {held} descriptors");
    for _ in 0..3 {
        let (answer, sockets) = flooding.recv_timeout::<Answer>(Duration::from_secs(10)).unwrap().unwrap();
        assert!(matches!(answer, Answer::Made { count: 64, error: None, .. }), "{answer:?}");
        assert_eq!(sockets.len(), 64);
    }
    drop(opener);
}

pub(crate) fn of_ours() {
    let directory = tempfile::tempdir().unwrap();
    let listener = agents_listener(directory.path());
    let ours = listener.try_clone().unwrap();
    let serving = std::thread::spawn(move || serve::agent(ours));
    let text = assert_refused(Opener::connect(directory.path()), FailureKind::OwnNamespace);
    let socket = directory.path().join(AGENT_SOCKET);
    assert!(text.starts_with(&format!("the agent at {}: it shares our own", socket.display())), "{text}");
    rustix::net::shutdown(&listener, rustix::net::Shutdown::Both).unwrap();
    serving.join().unwrap().unwrap();
}
