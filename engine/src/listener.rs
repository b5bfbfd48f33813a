//! One forward's listeners on the host: 127.0.0.1 and `::1`, the same port.
//!
//! Both addresses are bound or neither is: a browser tries `::1` first for `localhost`, and half a forward would show
//! it another program. Where the host has no IPv6 at all, 127.0.0.1 stands alone.
//!
//! A listening socket may be lent by another engine, which goes on accepting from it for a while. All holders of a socket
//! share one queue of connections, and it listens until the last of them closes it: `shutdown(2)` would end it for all,
//! and reset what waits in the queue (`inet_csk_listen_stop()` in net/ipv4/inet_connection_sock.c), so nobody calls it.

use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::time::Instant;

use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, sockopt};

use crate::command::{
    Family, ForwardId, ForwardState, ForwardStats, ListenFailure, ListenFailureKind, Reach, UpstreamId,
};
use crate::ring::OpKey;
use crate::sys::{netns_cookie, tune};
use crate::table::SlotId;

/// A forward in a shard's table.
#[derive(Debug)]
pub(crate) struct Listener<S> {
    pub(crate) forward: ForwardId,
    pub(crate) upstream: UpstreamId,
    pub(crate) upstream_slot: SlotId,
    pub(crate) host_port: NonZeroU16,
    pub(crate) target_port: NonZeroU16,
    pub(crate) reach: Reach,
    /// The listening sockets, and the accept in flight on each.
    pub(crate) sockets: Vec<Accepting<S>>,
    /// Whether it still listens; otherwise it waits for its accepts to end, and then for its connections.
    pub(crate) open: bool,
    /// The driver was told that the port is free.
    pub(crate) told_closed: bool,
    /// It is in the queue of those that accept when there is room, or when the others have had their turn.
    pub(crate) queued: bool,
    /// Descriptors ran out; it accepts again at that time.
    pub(crate) resting_until: Option<Instant>,
    pub(crate) stats: ForwardStats,
}

impl<S> Listener<S> {
    /// How it is told.
    pub(crate) fn state(&self) -> ForwardState {
        ForwardState {
            forward: self.forward,
            upstream: self.upstream,
            host_port: self.host_port,
            target_port: self.target_port,
            reach: self.reach,
            listening: self.open,
            stats: self.stats,
        }
    }
}

/// A listening socket and the accept in flight on it.
#[derive(Debug)]
pub(crate) struct Accepting<S> {
    /// Its number among the listener's sockets, which its accepts are known by. It stays when others close before it.
    pub(crate) index: usize,
    pub(crate) socket: S,
    pub(crate) key: Option<OpKey>,
}

/// Makes the host side of a forward: of what was lent, and what is missing then is bound.
///
/// # Errors
/// The first address that refused, and why. Nothing stays open.
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
/// The first descriptor that is something else; all are closed then.
pub(crate) fn adopt(port: NonZeroU16, sockets: Vec<OwnedFd>) -> Result<Vec<OwnedFd>, ListenFailure> {
    let listens = |socket: &OwnedFd| {
        let is_ip = matches!(sockopt::socket_domain(socket), Ok(AddressFamily::INET | AddressFamily::INET6));
        let is_stream = sockopt::socket_type(socket) == Ok(SocketType::STREAM);
        let listens = sockopt::socket_acceptconn(socket) == Ok(true);
        is_ip && is_stream && listens && rustix::io::ioctl_fionbio(socket, true).is_ok()
    };
    if sockets.is_empty() || !sockets.iter().all(listens) {
        return Err(strange(port, "a descriptor that is not a listening TCP socket"));
    }
    Ok(sockets)
}

/// Checks the sockets that were lent, and gives each its place.
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

/// The family of a socket that was lent, or what it is instead. It is as well tuned as one of our own from then on.
fn check(socket: &OwnedFd, port: NonZeroU16) -> Result<Family, &'static str> {
    let is = |holds: bool, otherwise| if holds { Ok(()) } else { Err(otherwise) };
    is(sockopt::socket_type(socket) == Ok(SocketType::STREAM), "a descriptor that is no stream socket")?;
    is(sockopt::socket_protocol(socket) == Ok(Some(ipproto::TCP)), "a stream socket that is not TCP")?;
    is(sockopt::socket_acceptconn(socket) == Ok(true), "a socket that does not listen")?;
    let local = rustix::net::getsockname(socket).ok().and_then(|address| SocketAddr::try_from(address).ok());
    let family = Family::ALL.into_iter().find(|family| local == Some(family.loopback(port)));
    let family = family.ok_or("a socket that listens elsewhere than on this port of loopback")?;
    // A socket of a kind that a confined engine may make.
    let ours = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).ok();
    let ours = ours.and_then(|ours| netns_cookie(ours).ok());
    is(ours.is_some() && netns_cookie(socket).ok() == ours, "a socket of another network namespace")?;
    // It belongs to the open file, which all holders share. One of them may have thought otherwise.
    is(rustix::io::ioctl_fionbio(socket, true).is_ok(), "a socket that blocks")?;
    tune(socket);
    Ok(family)
}

fn strange(port: NonZeroU16, what: &str) -> ListenFailure {
    let address = Family::V4.loopback(port);
    let detail = format!("what was lent to listen with is not usable: {what}");
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
    // A port whose last connections are in TIME_WAIT may be listened on again. Never SO_REUSEPORT: another process of
    // this user could then take a share of the connections.
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
    fn half_a_forward_is_none() {
        let other = std::net::TcpListener::bind("[::1]:0").unwrap();
        let port = NonZeroU16::new(other.local_addr().unwrap().port()).unwrap();
        let failure = open(port, 16, Vec::new()).unwrap_err();
        assert_eq!(failure.kind, ListenFailureKind::Taken);
        assert_eq!(failure.address, other.local_addr().unwrap());
        assert!(failure.detail.starts_with("EADDRINUSE"), "{}", failure.detail);
        // The IPv4 half, which was bound first, is let go again.
        std::net::TcpListener::bind(("127.0.0.1", port.get())).unwrap();
    }
}
