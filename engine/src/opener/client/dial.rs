//! Dials that a driver carries out for the engine: asked without waiting, answered in any order.

use std::num::NonZeroU16;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::net::{AddressFamily, SendFlags, SocketType, ipproto, sockopt};

use super::{StockError, answered};
use crate::channel::{self, ChannelError};
use crate::opener::{Answer, DialFailure, Request};
use crate::sys::tune;

/// Asks for a connection to a port inside. Never waits; [`hear`] brings the answer.
///
/// # Errors
/// [`ChannelError::WouldBlock`] when the channel is full of requests; [`ChannelError::Gone`] when the driver is.
pub fn ask_to_dial(channel: BorrowedFd<'_>, dial: u64, port: NonZeroU16) -> Result<(), ChannelError> {
    channel::send(channel, &Request::Dial { dial, port }, &[], SendFlags::DONTWAIT)
}

/// An answer: to which dial, and the socket or why there is none.
pub type Heard = (u64, Result<OwnedFd, DialFailure>);

/// Takes the next answer without waiting, or `None` when none is there.
///
/// The socket is a non-blocking TCP socket that was connected, and tuned as those of an opener are. It may be broken by now:
/// the server inside may have reset the connection at once, which a client is to be told as such and after every byte.
///
/// # Errors
/// See [`StockError`]; [`StockError::Exhausted`] where the socket got lost, so that its dial is never answered.
pub fn hear(channel: BorrowedFd<'_>) -> Result<Option<Heard>, StockError> {
    let Some((answer, mut sockets)) = answered(channel)? else { return Ok(None) };
    match (answer, sockets.pop()) {
        (Answer::Dialled { dial }, Some(socket)) if sockets.is_empty() => {
            check(&socket).map_err(|what| StockError::Hostile(what.to_owned()))?;
            tune(&socket);
            Ok(Some((dial, Ok(socket))))
        }
        (Answer::NotDialled { dial, why }, None) => Ok(Some((dial, Err(why)))),
        (answer, socket) => {
            let count = sockets.len() + usize::from(socket.is_some());
            Err(StockError::Hostile(format!("{answer:?} with {count} descriptors")))
        }
    }
}

/// Whether a descriptor is what [`hear`] promises; else what it is.
fn check(socket: &OwnedFd) -> Result<(), &'static str> {
    let is = |holds: bool, otherwise| if holds { Ok(()) } else { Err(otherwise) };
    let domain = sockopt::socket_domain(socket).map_err(|_| "a descriptor that is no socket")?;
    let is_ip = matches!(domain, AddressFamily::INET | AddressFamily::INET6);
    is(is_ip, "a socket of another address family")?;
    is(sockopt::socket_type(socket) == Ok(SocketType::STREAM), "a socket that is no stream")?;
    is(sockopt::socket_protocol(socket) == Ok(Some(ipproto::TCP)), "a stream socket that is not TCP")?;
    is(sockopt::socket_acceptconn(socket) == Ok(false), "a socket that listens")?;
    // One that was reset has no peer any more, and keeps its own port.
    let port = rustix::net::getsockname(socket)
        .ok()
        .and_then(|address| std::net::SocketAddr::try_from(address).ok());
    let was_connected = rustix::net::getpeername(socket).is_ok() || port.is_some_and(|own| own.port() != 0);
    is(was_connected, "a socket that was never connected")?;
    is(rustix::io::ioctl_fionbio(socket, true).is_ok(), "a socket that blocks")
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use rustix::net::{SocketFlags, socket_with};

    use super::*;
    use crate::channel::Channel;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (ours, listener.accept().unwrap().0)
    }

    fn heard(answer: &Answer, descriptors: &[BorrowedFd<'_>]) -> Result<Option<Heard>, StockError> {
        let (engine, driver) = Channel::pair().unwrap();
        driver.send(answer, descriptors).unwrap();
        hear(engine.as_fd())
    }

    #[test]
    fn a_connected_socket_is_taken_and_tuned() {
        let (one, _other) = pair();
        let (dial, socket) = heard(&Answer::Dialled { dial: 7 }, &[one.as_fd()]).unwrap().unwrap();
        assert_eq!(dial, 7);
        let socket = socket.unwrap();
        assert!(sockopt::tcp_nodelay(&socket).unwrap() && sockopt::socket_oobinline(&socket).unwrap());
        let flags = rustix::fs::fcntl_getfl(&socket).unwrap();
        assert!(flags.contains(rustix::fs::OFlags::NONBLOCK));
    }

    /// A server that breaks off at once is no lie of the driver's.
    #[test]
    fn a_socket_that_was_reset_meanwhile_is_taken() {
        let (one, other) = pair();
        sockopt::set_socket_linger(&other, Some(std::time::Duration::ZERO)).unwrap();
        drop(other);
        assert!(rustix::net::getpeername(&one).is_err());
        assert!(heard(&Answer::Dialled { dial: 7 }, &[one.as_fd()]).unwrap().unwrap().1.is_ok());
    }

    #[test]
    fn anything_else_is_hostile() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let unix = UnixStream::pair().unwrap().0;
        let fresh = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
        let file = tempfile::tempfile().unwrap();
        let dialled = Answer::Dialled { dial: 7 };
        for (what, bad) in [
            ("a socket that listens", listener.as_fd()),
            ("a socket that is no stream", udp.as_fd()),
            ("a socket of another address family", unix.as_fd()),
            ("a socket that was never connected", fresh.as_fd()),
            ("a descriptor that is no socket", file.as_fd()),
        ] {
            match heard(&dialled, &[bad]) {
                Err(StockError::Hostile(said)) => assert_eq!(said, what),
                other => panic!("{what} was taken as {other:?}"),
            }
        }
        let (one, other) = pair();
        assert!(matches!(heard(&dialled, &[]), Err(StockError::Hostile(_))));
        assert!(matches!(heard(&dialled, &[one.as_fd(), other.as_fd()]), Err(StockError::Hostile(_))));
        assert!(matches!(heard(&Answer::SockDiag, &[]), Err(StockError::Hostile(_))));
        let refused = Answer::NotDialled { dial: 7, why: DialFailure::Refused };
        assert!(matches!(heard(&refused, &[one.as_fd()]), Err(StockError::Hostile(_))));
        assert!(matches!(heard(&refused, &[]), Ok(Some((7, Err(DialFailure::Refused))))));
    }
}
