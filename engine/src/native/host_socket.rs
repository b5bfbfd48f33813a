//! Listening sockets of the host that replace a sandbox's own.
//!
//! The thread that creates them is in the host's network namespace. Three rules keep them unreachable from other hosts and
//! separate from each other:
//!
//! - A socket is bound to a loopback address, or to `::` on the device `lo`, which takes no packet from elsewhere.
//! - It is bound without SO_REUSEPORT, so that the bind fails if any other socket has the port. With the option, the kernel
//!   would share the port among all sockets of one user, and so between two sandboxes. A server that requested the option
//!   gets it after `listen`, in time for its own further sockets.
//! - Those further sockets are bound with the option, and then every listener on the port must be one of this sandbox. A
//!   listener of another sandbox is detected at this point, because that sandbox binds without the option, too, which fails
//!   from then on.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sys::socket::sockopt::{BindToDevice, Priority};
use nix::sys::socket::{getsockopt, setsockopt};
use rustix::io::Errno;
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto};

use super::decision::{HostAddress, SocketFacts};
use crate::sys::netns_cookie;

/// The loopback device of every network namespace.
const LOOPBACK: &str = "lo";

/// Reads the facts that decide on a socket of the sandbox whose namespace has this cookie.
///
/// # Errors
/// ENOTSOCK for another kind of descriptor; those of the system.
pub(super) fn facts(socket: &OwnedFd, sandbox: u64, is_stub: bool) -> Result<SocketFacts, Errno> {
    let domain = sockopt::socket_domain(socket)?;
    let is_v6 = domain == AddressFamily::INET6;
    let protocol = sockopt::socket_protocol(socket)?;
    let is_tcp = (is_v6 || domain == AddressFamily::INET)
        && sockopt::socket_type(socket)? == SocketType::STREAM
        && [Some(ipproto::TCP), Some(ipproto::MPTCP)].contains(&protocol);
    let cookie = netns_cookie(socket).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    let local = rustix::net::getsockname(socket)?;
    Ok(SocketFacts {
        is_tcp,
        is_inside: cookie == sandbox,
        listens: sockopt::socket_acceptconn(socket)?,
        is_stub,
        local: SocketAddr::try_from(local).ok(),
        v6_only: is_v6 && sockopt::ipv6_v6only(socket)?,
        has_device: device(socket).is_some_and(|device| device != LOOPBACK),
    })
}

/// Creates a listening socket with the options of `original`; `join` shares the port with others of this sandbox.
///
/// # Errors
/// EADDRINUSE if another socket has the port; those of the system.
pub(super) fn listen(
    at: HostAddress,
    original: &OwnedFd,
    backlog: i32,
    join: bool,
) -> Result<OwnedFd, Errno> {
    let family = if at.address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket =
        rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, Some(ipproto::TCP))?;
    copy_options(original.as_fd(), socket.as_fd(), at.address.is_ipv4());
    // Connections of an earlier server in TIME_WAIT do not keep the port. Two listeners cannot share a port by this option.
    sockopt::set_socket_reuseaddr(&socket, true)?;
    if at.address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, at.v6_only)?;
    }
    if at.is_every_loopback() {
        // Unprivileged since Linux 5.7, for a socket that has no device yet.
        setsockopt(&socket, BindToDevice, &OsString::from(LOOPBACK)).map_err(errno)?;
    }
    if join {
        sockopt::set_socket_reuseport(&socket, true)?;
    }
    rustix::net::bind(&socket, &at.address)?;
    rustix::net::listen(&socket, backlog)?;
    if !join && sockopt::socket_reuseport(original).unwrap_or(false) {
        sockopt::set_socket_reuseport(&socket, true)?;
    }
    Ok(socket)
}

/// Copies the options that accepted connections inherit, if they differ from the host's default. An option that cannot be
/// read or set is left unchanged.
///
/// Filters and `TCP_DEFER_ACCEPT` are not copied; without them a server sees the same bytes.
fn copy_options(from: BorrowedFd<'_>, to: BorrowedFd<'_>, is_v4: bool) {
    copy(from, to, sockopt::socket_keepalive, sockopt::set_socket_keepalive);
    copy(from, to, sockopt::socket_linger, sockopt::set_socket_linger);
    copy(from, to, sockopt::socket_oobinline, sockopt::set_socket_oobinline);
    copy(from, to, sockopt::tcp_nodelay, sockopt::set_tcp_nodelay);
    copy(from, to, sockopt::tcp_keepidle, sockopt::set_tcp_keepidle);
    copy(from, to, sockopt::tcp_keepintvl, sockopt::set_tcp_keepintvl);
    copy(from, to, sockopt::tcp_keepcnt, sockopt::set_tcp_keepcnt);
    copy(from, to, sockopt::tcp_user_timeout, sockopt::set_tcp_user_timeout);
    copy(from, to, sockopt::tcp_congestion, |to, name| sockopt::set_tcp_congestion(to, &name));
    for timeout in [Timeout::Recv, Timeout::Send] {
        let read = |socket| sockopt::socket_timeout(socket, timeout);
        copy(from, to, read, |to, value| sockopt::set_socket_timeout(to, timeout, value));
    }
    let priority = |socket| getsockopt(&socket, Priority).map_err(errno);
    copy(from, to, priority, |to, value| setsockopt(&to, Priority, &value).map_err(errno));
    if is_v4 {
        copy(from, to, sockopt::ip_tos, sockopt::set_ip_tos);
        copy(from, to, sockopt::ip_ttl, sockopt::set_ip_ttl);
    } else {
        copy(from, to, sockopt::ipv6_tclass, sockopt::set_ipv6_tclass);
        copy(from, to, sockopt::ipv6_unicast_hops, |to, hops| sockopt::set_ipv6_unicast_hops(to, Some(hops)));
    }
    // The kernel reports twice the size that was set (`socket(7)`).
    let (receive, send) = (sockopt::socket_recv_buffer_size, sockopt::socket_send_buffer_size);
    copy(from, to, receive, |to, size| sockopt::set_socket_recv_buffer_size(to, size / 2));
    copy(from, to, send, |to, size| sockopt::set_socket_send_buffer_size(to, size / 2));
}

/// Copies one option. It is written only if it differs, because writing fixes a value that the kernel otherwise adjusts,
/// such as a buffer's size.
fn copy<'a, T: PartialEq>(
    from: BorrowedFd<'a>,
    to: BorrowedFd<'a>,
    read: impl Fn(BorrowedFd<'a>) -> Result<T, Errno>,
    write: impl FnOnce(BorrowedFd<'a>, T) -> Result<(), Errno>,
) {
    if let Ok(wanted) = read(from)
        && read(to).as_ref() != Ok(&wanted)
    {
        let _ = write(to, wanted);
    }
}

/// Returns the device to which a socket is bound.
fn device(socket: &OwnedFd) -> Option<OsString> {
    getsockopt(socket, BindToDevice).ok().filter(|device| !device.is_empty())
}

/// Returns the port of a bound socket.
pub(super) fn port(socket: &OwnedFd) -> Option<NonZeroU16> {
    let local = rustix::net::getsockname(socket).ok()?;
    NonZeroU16::new(SocketAddr::try_from(local).ok()?.port())
}

fn errno(errno: nix::errno::Errno) -> Errno {
    Errno::from_raw_os_error(errno as i32)
}
