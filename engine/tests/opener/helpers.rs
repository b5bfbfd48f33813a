//! Openers that a helper starts.

use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use landfall_engine::channel::Channel;
use landfall_engine::command::Family;
use landfall_engine::opener::client::{OpenError, Opener, Target};
use landfall_engine::opener::{Answer, FailureKind, Request, VERB};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::{Inside, assert_refused, channel_of, dial, sockets, this};

/// Listens in a new directory, and calls `serve` with the one connection that comes.
fn helper(serve: impl FnOnce(OwnedFd) + Send + 'static) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("opener.sock");
    let flags = SocketFlags::CLOEXEC;
    let listener = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    rustix::net::bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    rustix::net::listen(&listener, 4).unwrap();
    thread::spawn(move || serve(rustix::net::accept_with(&listener, flags).unwrap()));
    (folder, path)
}

/// Passes the connection to an opener.
fn with_opener(connection: OwnedFd) {
    let status = Command::new(this()).arg(VERB).stdin(Stdio::from(connection)).status();
    drop(status);
}

pub(crate) fn enters() {
    let inside = Inside::new();
    let (_folder, path) = helper(with_opener);
    let mut opener = Opener::spawn_by_helper(&path, Target::process(inside.pid()).unwrap()).unwrap();
    let channel = channel_of(&mut opener);
    let address: SocketAddr = ([127, 0, 0, 1], inside.port).into();
    for socket in sockets(&channel, Family::V4, 3, opener.netns_cookie()).unwrap() {
        assert_eq!(dial(socket, address), "inside");
    }
    // A refusal of the opener is not an error of the helper.
    let (_folder, path) = helper(with_opener);
    let own = Opener::spawn_by_helper(&path, Target::process(std::process::id()).unwrap());
    assert_refused(own, FailureKind::OwnNamespace);
}

/// A fault of the helper is not reported as a fault of the container.
pub(crate) fn useless() {
    let ours = || Target::process(std::process::id()).unwrap();
    let error_of = |path: &Path| match Opener::spawn_by_helper(path, ours()) {
        Err(error @ OpenError::Helper { .. }) => {
            assert_eq!(error.kind(), None);
            error.to_string()
        }
        other => panic!("{}: {other:?}", path.display()),
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("opener.sock");
    let expected = |what: &str| format!("the helper at {}: {what}", path.display());
    assert_eq!(error_of(&path), expected("no helper has created its socket there"));
    std::fs::write(&path, "").unwrap();
    assert_eq!(error_of(&path), expected("it is not a socket"));
    std::fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("/dev/null", &path).unwrap();
    assert_eq!(error_of(&path), expected("it is a symbolic link, which is not followed"));

    let (_folder, path) = helper(drop);
    assert!(error_of(&path).contains("ended without an answer"));
    // This opener leads to our own namespace.
    let (_folder, path) = helper(|connection| {
        let channel = Channel::try_from(connection).unwrap();
        let _ = channel.recv::<Request>().unwrap().unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let netns_cookie = landfall_engine::sys::netns_cookie(&listener).unwrap();
        channel.send(&Answer::Entered { netns_inode: 1, netns_cookie }, &[]).unwrap();
        let _ = channel.recv::<Request>();
    });
    assert_refused(Opener::spawn_by_helper(&path, ours()), FailureKind::OwnNamespace);
    // This opener names the wrong namespace.
    let (_folder, path) = helper(|connection| {
        let channel = Channel::try_from(connection).unwrap();
        let _ = channel.recv::<Request>().unwrap().unwrap();
        channel.send(&Answer::Entered { netns_inode: 1, netns_cookie: u64::MAX }, &[]).unwrap();
        let _ = channel.recv::<Request>().unwrap().unwrap();
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        channel.send(&Answer::Made { count: 1, error: None, ephemeral: None }, &[socket.as_fd()]).unwrap();
        let _ = channel.recv::<Request>();
    });
    assert!(error_of(&path).contains("invalid answer"));
}
