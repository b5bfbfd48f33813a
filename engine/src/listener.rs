//! The listening sockets of a forward on the host: 127.0.0.1 and `::1`, the same port.
//!
//! Either both addresses are bound or none: a browser tries `::1` first for `localhost`, and with only one of them it could
//! reach another program. On a host without IPv6, 127.0.0.1 is enough.
//!
//! Another engine may lend a listening socket, and continue to accept from it for some time. All holders of a socket share
//! one queue of connections, and it listens until the last of them closes it. `shutdown(2)` would end it for all and reset
//! the queued connections (`inet_csk_listen_stop()` in net/ipv4/inet_connection_sock.c), so no holder calls it.

use std::net::SocketAddr;
use std::num::NonZeroU16;

use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, sockopt};

use crate::command::{Family, ListenFailure, ListenFailureKind};
use crate::sys::{SocketFacts, netns_cookie, tune};

/// Returns the listening sockets of a host port: the lent ones, and new ones for the missing families.
///
/// # Errors
/// The first address that failed, with the reason. All sockets are closed.
pub(crate) fn open(
    port: NonZeroU16,
    backlog: u16,
    lent: Vec<OwnedFd>,
) -> Result<Vec<OwnedFd>, ListenFailure> {
    let mut lent = by_family(port, lent)?;
    let mut sockets = Vec::with_capacity(Family::ALL.len());
    for family in Family::ALL {
        if let Some(socket) = lent[family as usize].take() {
            sockets.push(socket);
            continue;
        }
        let address = family.loopback(port);
        match listen(address, backlog) {
            Ok(socket) => sockets.push(socket),
            Err(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL) if family == Family::V6 => {}
            Err(errno) => return Err(failure(address, errno)),
        }
    }
    Ok(sockets)
}

/// Takes over sockets that listen in another network namespace.
///
/// # Errors
/// The first descriptor that is not a listening TCP socket. All are closed.
pub(crate) fn adopt(port: NonZeroU16, sockets: Vec<OwnedFd>) -> Result<Vec<OwnedFd>, ListenFailure> {
    let listens = |socket: &OwnedFd| {
        let nonblocking = rustix::io::ioctl_fionbio(socket, true).is_ok();
        let facts = SocketFacts::of(socket);
        facts.family.is_some() && facts.is_stream && facts.listens && nonblocking
    };
    if sockets.is_empty() || !sockets.iter().all(listens) {
        return Err(strange(port, "a descriptor that is not a listening TCP socket"));
    }
    Ok(sockets)
}

/// Checks the lent sockets, and sorts them by family.
fn by_family(port: NonZeroU16, lent: Vec<OwnedFd>) -> Result<[Option<OwnedFd>; 2], ListenFailure> {
    let mut places = [None, None];
    for socket in lent {
        let family = check(&socket, port).map_err(|what| strange(port, what))?;
        if places[family as usize].replace(socket).is_some() {
            return Err(strange(port, "a second socket of the same family"));
        }
    }
    Ok(places)
}

/// Returns the family of a lent socket, or its fault. Sets the options of the relay's own sockets.
fn check(socket: &OwnedFd, port: NonZeroU16) -> Result<Family, &'static str> {
    let is = |holds: bool, otherwise| if holds { Ok(()) } else { Err(otherwise) };
    // O_NONBLOCK belongs to the open file, which all holders share. Another holder may have cleared it.
    let nonblocking = rustix::io::ioctl_fionbio(socket, true).is_ok();
    let facts = SocketFacts::of(socket);
    is(facts.is_stream, "a descriptor that is no stream socket")?;
    is(facts.is_tcp, "a stream socket that is not TCP")?;
    is(facts.listens, "a socket that does not listen")?;
    let family = Family::ALL.into_iter().find(|family| facts.local == Some(family.loopback(port)));
    let family = family.ok_or("a socket that listens elsewhere than on this port of loopback")?;
    // A confined engine may create such a socket.
    let ours = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).ok();
    let ours = ours.and_then(|ours| netns_cookie(ours).ok());
    is(ours.is_some() && facts.netns_cookie == ours, "a socket of another network namespace")?;
    is(nonblocking, "a socket that blocks")?;
    tune(socket);
    Ok(family)
}

fn strange(port: NonZeroU16, what: &str) -> ListenFailure {
    let address = Family::V4.loopback(port);
    let detail = format!("a lent listening socket is not usable: {what}");
    ListenFailure { kind: ListenFailureKind::Other, address, detail }
}

/// Whether the host has `::1`.
pub(crate) fn host_has_ipv6() -> bool {
    let address = SocketAddr::from(([0, 0, 0, 0, 0, 0, 0, 1], 0));
    stream_socket(address).and_then(|socket| rustix::net::bind(&socket, &address)).is_ok()
}

fn stream_socket(address: SocketAddr) -> Result<OwnedFd, Errno> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP))
}

fn listen(address: SocketAddr, backlog: u16) -> Result<OwnedFd, Errno> {
    let socket = stream_socket(address)?;
    // Permits binding a port whose last connections are in TIME_WAIT. SO_REUSEPORT is never set: with it, another process of
    // this user could take a share of the connections.
    sockopt::set_socket_reuseaddr(&socket, true)?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    tune(&socket);
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, i32::from(backlog))?;
    Ok(socket)
}

fn failure(address: SocketAddr, errno: Errno) -> ListenFailure {
    let (kind, name) = match errno {
        Errno::ADDRINUSE => (ListenFailureKind::Taken, "EADDRINUSE"),
        Errno::ACCESS => (ListenFailureKind::Forbidden, "EACCES"),
        Errno::PERM => (ListenFailureKind::Forbidden, "EPERM"),
        Errno::MFILE => (ListenFailureKind::Exhausted, "EMFILE"),
        Errno::NFILE => (ListenFailureKind::Exhausted, "ENFILE"),
        Errno::NOBUFS => (ListenFailureKind::Exhausted, "ENOBUFS"),
        Errno::NOMEM => (ListenFailureKind::Exhausted, "ENOMEM"),
        _ => (ListenFailureKind::Other, "error"),
    };
    ListenFailure { kind, address, detail: format!("{name}: {errno}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_addresses_are_bound_or_none() {
        let other = std::net::TcpListener::bind("[::1]:0").unwrap();
        let port = NonZeroU16::new(other.local_addr().unwrap().port()).unwrap();
        let failure = open(port, 16, Vec::new()).unwrap_err();
        assert_eq!(failure.kind, ListenFailureKind::Taken);
        assert_eq!(failure.address, other.local_addr().unwrap());
        assert!(failure.detail.starts_with("EADDRINUSE"), "{}", failure.detail);
        // The IPv4 socket, which was bound first, is closed again.
        std::net::TcpListener::bind(("127.0.0.1", port.get())).unwrap();
    }
}
