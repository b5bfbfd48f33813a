use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;

use rustix::net::SocketFlags;

use super::*;

fn fresh(family: AddressFamily) -> OwnedFd {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    rustix::net::socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP)).unwrap()
}

fn descriptors_of(inode: u64) -> usize {
    std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| std::fs::metadata(entry.unwrap().path()).ok())
        .filter(|file| file.ino() == inode)
        .count()
}

/// What `take` makes of `answer` and `descriptors` when it expects IPv4 sockets of this namespace.
fn taken(answer: &Answer, descriptors: &[&OwnedFd]) -> Result<Option<Vec<OwnedFd>>, StockError> {
    let cookie = netns_cookie(fresh(AddressFamily::INET)).unwrap();
    let (engine, opener) = Channel::pair().unwrap();
    let descriptors: Vec<_> = descriptors.iter().map(|one| one.as_fd()).collect();
    opener.send(answer, &descriptors).unwrap();
    take(engine.as_fd(), Family::V4, 2, cookie)
}

#[track_caller]
fn assert_hostile(what: &str, bad: impl Into<OwnedFd>) {
    let (good, bad) = (fresh(AddressFamily::INET), bad.into());
    let inodes = [&good, &bad].map(|one| rustix::fs::fstat(one).unwrap().st_ino);
    let before = inodes.map(descriptors_of);
    match taken(&Answer::Made { count: 2, error: None }, &[&good, &bad]) {
        Err(StockError::Hostile(said)) => assert_eq!(said, what),
        other => panic!("{what} was taken as {other:?}"),
    }
    assert_eq!(inodes.map(descriptors_of), before, "{what} was left open");
}

#[test]
fn unused_sockets_of_the_namespace_are_taken() {
    let sockets = [fresh(AddressFamily::INET), fresh(AddressFamily::INET)];
    let answer = Answer::Made { count: 2, error: None };
    assert_eq!(taken(&answer, &[&sockets[0], &sockets[1]]).unwrap().unwrap().len(), 2);
}

#[test]
fn whatever_is_no_unused_tcp_socket_is_hostile() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let connected = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let bound = fresh(AddressFamily::INET);
    rustix::net::bind(&bound, &"127.0.0.1:0".parse::<SocketAddr>().unwrap()).unwrap();
    let blocking = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    assert_hostile("a descriptor that is no socket", std::fs::File::open("/proc/self/status").unwrap());
    assert_hostile("a descriptor that is no socket", tempfile::tempfile().unwrap());
    assert_hostile("a socket of another address family", UnixStream::pair().unwrap().0);
    assert_hostile("a socket of another address family", fresh(AddressFamily::INET6));
    assert_hostile("a socket that is no stream", UdpSocket::bind("127.0.0.1:0").unwrap());
    assert_hostile("a socket that is connected", connected);
    assert_hostile("a socket that listens", listener);
    assert_hostile("a socket that is bound", bound);
    assert_hostile("a socket that blocks", blocking);
    let mptcp = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, Some(ipproto::MPTCP));
    if let Ok(mptcp) = mptcp {
        assert_hostile("a stream socket that is not TCP", mptcp);
    }
}

#[test]
fn a_socket_of_another_namespace_is_hostile() {
    let (engine, opener) = Channel::pair().unwrap();
    let socket = fresh(AddressFamily::INET);
    opener.send(&Answer::Made { count: 1, error: None }, &[socket.as_fd()]).unwrap();
    let other = netns_cookie(&socket).unwrap() + 1;
    assert!(matches!(take(engine.as_fd(), Family::V4, 1, other), Err(StockError::Hostile(_))));
    let inode = rustix::fs::fstat(&socket).unwrap().st_ino;
    assert_eq!(descriptors_of(inode), 1);
}

#[test]
fn an_answer_that_does_not_fit_the_question_is_hostile() {
    let socket = fresh(AddressFamily::INET);
    let hostile = |answer, descriptors: &[&OwnedFd]| match taken(&answer, descriptors) {
        Err(StockError::Hostile(_)) => {}
        other => panic!("{answer:?} was taken as {other:?}"),
    };
    hostile(Answer::Made { count: 2, error: None }, &[&socket]);
    hostile(Answer::Made { count: 0, error: None }, &[]);
    let three = [fresh(AddressFamily::INET), fresh(AddressFamily::INET), fresh(AddressFamily::INET)];
    hostile(Answer::Made { count: 3, error: None }, &three.iter().collect::<Vec<_>>());
    hostile(Answer::SockDiag, &[&socket]);
    hostile(Answer::Failed { failure: Failure::new(FailureKind::Other, "and yet") }, &[&socket]);
    assert_eq!(descriptors_of(rustix::fs::fstat(&socket).unwrap().st_ino), 1);
}

#[test]
fn running_out_is_told_apart_from_the_end() {
    let failure = Failure::new(FailureKind::Exhausted, "no more");
    let error = Some(failure.clone());
    assert!(matches!(taken(&Answer::Made { count: 0, error }, &[]), Err(StockError::Exhausted(_))));
    assert!(matches!(taken(&Answer::Failed { failure }, &[]), Err(StockError::Exhausted(_))));
    let failure = Failure::new(FailureKind::Unsupported, "no IPv6");
    assert!(matches!(taken(&Answer::Failed { failure }, &[]), Err(StockError::Refused(_))));
    let (engine, opener) = Channel::pair().unwrap();
    assert!(take(engine.as_fd(), Family::V4, 1, 1).unwrap().is_none());
    drop(opener);
    assert!(matches!(take(engine.as_fd(), Family::V4, 1, 1), Err(StockError::Gone)));
    assert!(matches!(ask(engine.as_fd(), Family::V4, 1, None), Err(OpenError::Ended)));
}

#[test]
fn a_program_that_is_no_opener_is_told_as_such() {
    let target = || Target::process(std::process::id()).unwrap();
    assert!(matches!(Opener::spawn(Path::new("/bin/true"), target()), Err(OpenError::Ended)));
    assert!(matches!(Opener::spawn(Path::new("/nowhere"), target()), Err(OpenError::Spawn { .. })));
}
