//! Agents: a program inside that hands out sockets to whoever connects.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::ExitCode;

use landfall_engine::command::{Family, WatchSources};
use landfall_engine::opener::client::{Opener, StockError, take};
use landfall_engine::opener::{AGENT_SOCKET, FailureKind, serve};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};

use crate::{Inside, assert_refused, dial, listen, readable, sockets};

/// The socket of an agent in `directory`.
fn agents_listener(directory: &Path) -> OwnedFd {
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    rustix::net::bind(&socket, &SocketAddrUnix::new(directory.join(AGENT_SOCKET)).unwrap()).unwrap();
    rustix::net::listen(&socket, 16).unwrap();
    socket
}

/// `_agent DIRECTORY`: an agent, with a server beside it; prints the server's port when both are there.
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
    // A second one is served beside the first.
    let second = Opener::connect(directory.path()).unwrap();
    assert_eq!(second.netns_cookie(), cookie);
    drop(inside);
    readable(channel);
    assert!(matches!(take(channel.as_fd(), Family::V4, cookie), Err(StockError::Gone)));
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
