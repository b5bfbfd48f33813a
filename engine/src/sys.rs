//! System calls without a safe wrapper, socket options of the relay's own sockets, and the classification of errno.
//!
//! The engine's other unsafe code is in `reactor/uring.rs` and `native/notify.rs`.

#![expect(unsafe_code, reason = "getsockopt(SO_NETNS_COOKIE) and ioctl(SIOCOUTQ) have no safe wrapper")]

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::OnceLock;

use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType, ipproto, sockopt};

use crate::command::Family;

/// The error of an operation on a socket, classified for relayed connections and listeners.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketError {
    /// The peer reset the connection (ECONNRESET, EPIPE, ECONNABORTED), or the kernel ended it.
    Reset,
    /// No socket listens on the address (ECONNREFUSED).
    Refused,
    /// The address is unreachable from this namespace (ENETUNREACH, EHOSTUNREACH, ENETDOWN, EAFNOSUPPORT).
    Unreachable,
    /// No answer in time (ETIMEDOUT).
    TimedOut,
    /// Every ephemeral port to that target is in use (EADDRNOTAVAIL or EAGAIN of a connect).
    PortsExhausted,
    /// Descriptors, buffers or memory ran out (EMFILE, ENFILE, ENOBUFS, ENOMEM).
    Exhausted,
    /// Any other error; the socket is unusable.
    Other(Errno),
}

impl SocketError {
    /// Decodes the error of an operation on an established connection or a listener.
    pub fn of(errno: Errno) -> SocketError {
        match errno {
            Errno::CONNRESET | Errno::PIPE | Errno::CONNABORTED | Errno::NOTCONN | Errno::SHUTDOWN => {
                SocketError::Reset
            }
            Errno::CONNREFUSED => SocketError::Refused,
            Errno::NETUNREACH | Errno::HOSTUNREACH | Errno::NETDOWN | Errno::AFNOSUPPORT => {
                SocketError::Unreachable
            }
            Errno::TIMEDOUT => SocketError::TimedOut,
            Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM => SocketError::Exhausted,
            other => SocketError::Other(other),
        }
    }

    /// Decodes the error of a connect, for which a few numbers have another meaning.
    pub fn of_connect(errno: Errno) -> SocketError {
        match errno {
            // Linux, __inet_hash_connect(): no free source port for this target.
            Errno::ADDRNOTAVAIL | Errno::AGAIN => SocketError::PortsExhausted,
            // A reset in answer to the final ACK: the server's queue was full, or it closed at once.
            Errno::CONNRESET => SocketError::Refused,
            other => SocketError::of(other),
        }
    }
}

impl fmt::Display for SocketError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SocketError::Reset => f.write_str("the connection was reset"),
            SocketError::Refused => f.write_str("no socket listens on the address"),
            SocketError::Unreachable => f.write_str("the address cannot be reached"),
            SocketError::TimedOut => f.write_str("no answer in time"),
            SocketError::PortsExhausted => f.write_str("every ephemeral port is in use"),
            SocketError::Exhausted => f.write_str("descriptors or memory ran out"),
            SocketError::Other(errno) => write!(f, "{errno}"),
        }
    }
}

impl std::error::Error for SocketError {}

/// Returns the congestion control for the relay's own sockets, or `None` if the default is suitable.
///
/// On a host whose default paces (BBR), loopback reaches only a third of its speed, although it is never congested.
pub(crate) fn congestion() -> Option<&'static str> {
    static CHOICE: OnceLock<Option<&'static str>> = OnceLock::new();
    *CHOICE.get_or_init(|| {
        let sysctl =
            |name: &str| std::fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).unwrap_or_default();
        let is_plain = |name: &str| matches!(name, "cubic" | "reno");
        if is_plain(sysctl("tcp_congestion_control").trim()) {
            return None;
        }
        // An unprivileged process may choose only an allowed one, and reno is always allowed.
        let allowed = sysctl("tcp_allowed_congestion_control");
        Some(if allowed.split_whitespace().any(|name| name == "cubic") { "cubic" } else { "reno" })
    })
}

/// Sets the TCP options of a relayed connection, or of a listener, whose accepted sockets inherit them: small messages are
/// sent at once, an urgent byte stays in the stream, and sending is not paced. An option that the kernel refuses is left
/// unset.
pub fn tune(socket: impl AsFd) {
    let socket = socket.as_fd();
    // Each option only improves a connection, so a failure to set one is not a reason to refuse the connection.
    let _ = sockopt::set_tcp_nodelay(socket, true);
    let _ = sockopt::set_socket_oobinline(socket, true);
    if let Some(congestion) = congestion() {
        let _ = sockopt::set_tcp_congestion(socket, congestion);
    }
}

/// Returns `SO_NETNS_COOKIE` (Linux 5.14): a number that identifies a network namespace and is never reused.
///
/// # Errors
/// ENOPROTOOPT on an older kernel, ENOTSOCK on a descriptor that is not a socket.
pub fn netns_cookie(socket: impl AsFd) -> io::Result<u64> {
    let mut cookie: u64 = 0;
    let mut length: libc::socklen_t = 8;
    // SAFETY: getsockopt(2) writes at most `length` bytes to the option's address, and the new length to `length`. Both
    // point to live, writable locals of exactly those sizes, and the descriptor is open for as long as it is borrowed.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// Returns `SIOCOUTQ` (tcp(7)): the bytes sent and not yet acknowledged; 0 if the kernel does not report it.
pub fn unacknowledged_bytes(socket: impl AsFd) -> usize {
    let mut bytes: libc::c_int = 0;
    // SAFETY: SIOCOUTQ, which has the number of TIOCOUTQ, writes one int to its argument (tcp_ioctl() in net/ipv4/tcp.c).
    // The argument points to a live, writable int, and the descriptor is open for as long as it is borrowed.
    let result = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if result == 0 { usize::try_from(bytes).unwrap_or(0) } else { 0 }
}

/// The kernel's data on a descriptor that should be a TCP socket. Eight system calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketFacts {
    /// Whether it is a socket.
    pub is_socket: bool,
    /// Its family, if it is an IP socket.
    pub family: Option<Family>,
    /// Whether it is a stream socket.
    pub is_stream: bool,
    /// Whether its protocol is TCP.
    pub is_tcp: bool,
    /// Whether it listens.
    pub listens: bool,
    /// Its local address.
    pub local: Option<SocketAddr>,
    /// Whether it is connected; true if the kernel does not report that it is not.
    pub is_connected: bool,
    /// Whether calls on it never block.
    pub nonblocking: bool,
    /// The cookie of its network namespace.
    pub netns_cookie: Option<u64>,
}

impl SocketFacts {
    /// Queries the kernel.
    pub fn of(socket: impl AsFd) -> SocketFacts {
        let socket = socket.as_fd();
        let domain = sockopt::socket_domain(socket);
        SocketFacts {
            is_socket: domain.is_ok(),
            family: match domain {
                Ok(AddressFamily::INET) => Some(Family::V4),
                Ok(AddressFamily::INET6) => Some(Family::V6),
                _ => None,
            },
            is_stream: sockopt::socket_type(socket) == Ok(SocketType::STREAM),
            is_tcp: sockopt::socket_protocol(socket) == Ok(Some(ipproto::TCP)),
            listens: sockopt::socket_acceptconn(socket) == Ok(true),
            local: rustix::net::getsockname(socket)
                .ok()
                .and_then(|address| SocketAddr::try_from(address).ok()),
            is_connected: !matches!(rustix::net::getpeername(socket), Err(Errno::NOTCONN)),
            nonblocking: rustix::fs::fcntl_getfl(socket).is_ok_and(|flags| flags.contains(OFlags::NONBLOCK)),
            netns_cookie: netns_cookie(socket).ok(),
        }
    }
}
