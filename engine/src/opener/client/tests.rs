use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;

use rustix::net::{RecvFlags, SocketFlags, SocketType, ipproto};

use super::answers::{Dialled, check_connected, dialled};
use super::*;
use crate::command::Family;
use crate::opener::{ANSWER_BYTES_MAX, DialFailure, PortRange};
use crate::sys::{SocketFacts, tune};

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

/// Returns the result of `take` for `answer` and `descriptors` where IPv4 sockets of this namespace are expected.
fn take_answer(answer: &Answer, descriptors: &[&OwnedFd]) -> Result<Option<Vec<OwnedFd>>, StockError> {
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
    match take_answer(&Answer::Made { count: 2, error: None, ephemeral: None }, &[&good, &bad]) {
        Err(StockError::Hostile(reason)) => assert_eq!(reason, what),
        other => panic!("{what} was taken as {other:?}"),
    }
    assert_eq!(inodes.map(descriptors_of), before, "{what} was left open");
}

#[test]
fn unused_sockets_of_the_namespace_are_accepted() {
    let sockets = [fresh(AddressFamily::INET), fresh(AddressFamily::INET)];
    let answer = Answer::Made { count: 2, error: None, ephemeral: None };
    assert_eq!(take_answer(&answer, &[&sockets[0], &sockets[1]]).unwrap().unwrap().len(), 2);
}

#[test]
fn anything_but_an_unused_tcp_socket_is_hostile() {
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
    opener.send(&Answer::Made { count: 1, error: None, ephemeral: None }, &[socket.as_fd()]).unwrap();
    let other = netns_cookie(&socket).unwrap() + 1;
    assert!(matches!(take(engine.as_fd(), Family::V4, 1, other), Err(StockError::Hostile(_))));
    let inode = rustix::fs::fstat(&socket).unwrap().st_ino;
    assert_eq!(descriptors_of(inode), 1);
}

#[test]
fn an_answer_that_does_not_fit_the_request_is_hostile() {
    let socket = fresh(AddressFamily::INET);
    let hostile = |answer, descriptors: &[&OwnedFd]| match take_answer(&answer, descriptors) {
        Err(StockError::Hostile(_)) => {}
        other => panic!("{answer:?} was taken as {other:?}"),
    };
    hostile(Answer::Made { count: 2, error: None, ephemeral: None }, &[&socket]);
    hostile(Answer::Made { count: 0, error: None, ephemeral: None }, &[]);
    let three = [fresh(AddressFamily::INET), fresh(AddressFamily::INET), fresh(AddressFamily::INET)];
    hostile(Answer::Made { count: 3, error: None, ephemeral: None }, &three.iter().collect::<Vec<_>>());
    hostile(Answer::SockDiag, &[&socket]);
    hostile(Answer::Failed { failure: Failure::new(FailureKind::Other, "and yet") }, &[&socket]);
    assert_eq!(descriptors_of(rustix::fs::fstat(&socket).unwrap().st_ino), 1);
}

#[test]
fn exhaustion_differs_from_the_end() {
    let failure = Failure::new(FailureKind::Exhausted, "no more");
    let error = Some(failure.clone());
    assert!(matches!(
        take_answer(&Answer::Made { count: 0, error, ephemeral: None }, &[]),
        Err(StockError::Exhausted(_))
    ));
    assert!(matches!(take_answer(&Answer::Failed { failure }, &[]), Err(StockError::Exhausted(_))));
    let failure = Failure::new(FailureKind::Unsupported, "no IPv6");
    assert!(matches!(take_answer(&Answer::Failed { failure }, &[]), Err(StockError::Refused(_))));
    let (engine, opener) = Channel::pair().unwrap();
    assert!(take(engine.as_fd(), Family::V4, 1, 1).unwrap().is_none());
    drop(opener);
    assert!(matches!(take(engine.as_fd(), Family::V4, 1, 1), Err(StockError::Gone)));
    assert!(matches!(ask(engine.as_fd(), Family::V4, 1, None), Err(OpenError::Ended)));
}

#[test]
fn a_program_that_is_not_an_opener_is_an_error() {
    let target = || Target::process(std::process::id()).unwrap();
    assert!(matches!(Opener::spawn(Path::new("/bin/true"), target()), Err(OpenError::Ended)));
    assert!(matches!(Opener::spawn(Path::new("/nowhere"), target()), Err(OpenError::Spawn { .. })));
}

fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (ours, listener.accept().unwrap().0)
}

/// Returns the result of a dial that a driver answers with `answer` and `descriptors`.
fn answered(answer: &Answer, descriptors: &[BorrowedFd<'_>]) -> Result<Dialled<OwnedFd>, StockError> {
    let (engine, driver) = Channel::pair().unwrap();
    driver.send(answer, descriptors).unwrap();
    let received = channel::receive_bytes(engine.as_fd(), ANSWER_BYTES_MAX, RecvFlags::DONTWAIT);
    let (text, sockets) = received.unwrap().unwrap();
    dialled(&text, sockets, |socket| {
        let _ = rustix::io::ioctl_fionbio(socket, true);
        tune(socket);
        check_connected(&SocketFacts::of(socket))
    })
}

#[test]
fn a_connected_socket_is_accepted() {
    let (one, _other) = pair();
    let Dialled { dial, result } = answered(&Answer::Dialled { dial: 7 }, &[one.as_fd()]).unwrap();
    assert_eq!(dial, 7);
    let socket = result.unwrap();
    assert!(sockopt::tcp_nodelay(&socket).unwrap() && sockopt::socket_oobinline(&socket).unwrap());
    assert!(SocketFacts::of(&socket).nonblocking);
}

/// A server that resets at once does not count as a fault of the driver.
#[test]
fn a_socket_that_was_reset_meanwhile_is_accepted() {
    let (one, other) = pair();
    sockopt::set_socket_linger(&other, Some(Duration::ZERO)).unwrap();
    drop(other);
    assert!(rustix::net::getpeername(&one).is_err());
    assert!(answered(&Answer::Dialled { dial: 7 }, &[one.as_fd()]).unwrap().result.is_ok());
}

#[test]
fn any_other_answer_to_a_dial_is_hostile() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    let unix = UnixStream::pair().unwrap().0;
    let unused = fresh(AddressFamily::INET);
    let file = tempfile::tempfile().unwrap();
    let dialled = Answer::Dialled { dial: 7 };
    for (what, bad) in [
        ("a socket that listens", listener.as_fd()),
        ("a socket that is no stream", udp.as_fd()),
        ("a socket of another address family", unix.as_fd()),
        ("a socket that was never connected", unused.as_fd()),
        ("a descriptor that is no socket", file.as_fd()),
    ] {
        match answered(&dialled, &[bad]) {
            Err(StockError::Hostile(reason)) => assert_eq!(reason, what),
            other => panic!("{what} was taken as {other:?}"),
        }
    }
    let (one, other) = pair();
    assert!(matches!(answered(&dialled, &[]), Err(StockError::Hostile(_))));
    assert!(matches!(answered(&dialled, &[one.as_fd(), other.as_fd()]), Err(StockError::Hostile(_))));
    assert!(matches!(answered(&Answer::SockDiag, &[]), Err(StockError::Hostile(_))));
    let refused = Answer::NotDialled { dial: 7, why: DialFailure::Refused };
    assert!(matches!(answered(&refused, &[one.as_fd()]), Err(StockError::Hostile(_))));
    let refusal = answered(&refused, &[]);
    assert!(matches!(refusal, Ok(Dialled { dial: 7, result: Err(DialFailure::Refused) })));
}

#[test]
fn a_range_of_ports_is_parsed() {
    let range = PortRange::parse("32768\t60999\n").unwrap();
    assert_eq!(range, PortRange { first: 32768, last: 60999 });
    assert!(range.contains(32768) && range.contains(60999) && !range.contains(3000));
    for bad in ["", "1", "1 2 3", "a b", "1 70000"] {
        assert_eq!(PortRange::parse(bad), None, "{bad:?}");
    }
}
