//! One forward's listeners on the host: 127.0.0.1 and `::1`, the same port.
//!
//! Both addresses are bound or neither is: a browser tries `::1` first for `localhost`, and half a forward would show
//! it another program. Where the host has no IPv6 at all, 127.0.0.1 stands alone.

use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::time::Instant;

use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, sockopt};

use crate::command::{Family, ForwardId, ForwardStats, ListenFailure, ListenFailureKind, Reach, UpstreamId};
use crate::ring::{OpKey, attempt};
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

/// A listening socket and the accept in flight on it.
#[derive(Debug)]
pub(crate) struct Accepting<S> {
    /// Its number among the listener's sockets, which its accepts are known by. It stays when others close before it.
    pub(crate) index: usize,
    pub(crate) socket: S,
    pub(crate) key: Option<OpKey>,
}

/// Binds the host side of a forward.
///
/// # Errors
/// The first address that refused, and why. Nothing stays bound.
pub(crate) fn bind(port: NonZeroU16, backlog: u16) -> Result<Vec<OwnedFd>, ListenFailure> {
    let mut sockets = Vec::with_capacity(Family::ALL.len());
    for family in Family::ALL {
        let address = family.loopback(port);
        match listen(address, backlog) {
            Ok(socket) => sockets.push(socket),
            Err(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL) if family == Family::V6 => {}
            Err(errno) => return Err(failure(address, errno)),
        }
    }
    Ok(sockets)
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
    attempt::tune_listener(&socket);
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
        let failure = bind(port, 16).unwrap_err();
        assert_eq!(failure.kind, ListenFailureKind::Taken);
        assert_eq!(failure.address, other.local_addr().unwrap());
        assert!(failure.detail.starts_with("EADDRINUSE"), "{}", failure.detail);
        // The IPv4 half, which was bound first, is let go again.
        std::net::TcpListener::bind(("127.0.0.1", port.get())).unwrap();
    }
}
