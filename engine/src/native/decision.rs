//! The decisions on one trapped `listen`. Pure: facts are the arguments, a decision is the result.
//!
//! A decision has three steps, the cheap ones first, because the options of a socket alone show for most sockets that they
//! are not replaced:
//!
//! ```text
//!  options of the socket ──► about_socket ──► Continue | Rejoin | Replace(address)
//!  references to it      ──► about_holders ─► Continue | Inject(references)
//!  the host's answer     ──► about_conflict ► Continue | Join | InUse
//! ```
//!
//! With `Continue` the kernel carries the call out in the sandbox, where the relay finds the listener. It is the decision
//! whenever a fact is missing, so an error here costs performance and not correctness.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroU16;
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use super::procfs::Flags;

/// The address of a host socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HostAddress {
    /// Address and port.
    pub address: SocketAddr,
    /// Whether an IPv6 socket accepts no IPv4 clients.
    pub v6_only: bool,
}

impl HostAddress {
    /// Returns the host's address for one inside the sandbox; `None` if it is neither loopback nor a wildcard.
    ///
    /// A wildcard of one family becomes that family's loopback address. A wildcard of both remains a wildcard, and the
    /// socket is bound to the device `lo` ([`HostAddress::is_every_loopback`]).
    pub fn of(inside: SocketAddr, v6_only: bool) -> Option<HostAddress> {
        let v4 = |ip: Ipv4Addr| match ip {
            Ipv4Addr::UNSPECIFIED => Some(Ipv4Addr::LOCALHOST),
            ip => ip.is_loopback().then_some(ip),
        };
        let (ip, v6_only) = match inside.ip() {
            IpAddr::V4(ip) => (IpAddr::V4(v4(ip)?), false),
            IpAddr::V6(Ipv6Addr::UNSPECIFIED) if v6_only => (IpAddr::V6(Ipv6Addr::LOCALHOST), true),
            IpAddr::V6(Ipv6Addr::UNSPECIFIED) => (IpAddr::V6(Ipv6Addr::UNSPECIFIED), false),
            IpAddr::V6(Ipv6Addr::LOCALHOST) => (IpAddr::V6(Ipv6Addr::LOCALHOST), v6_only),
            // Java binds IPv4 addresses in this form.
            IpAddr::V6(ip) if !v6_only => (IpAddr::V6(v4(ip.to_ipv4_mapped()?)?.to_ipv6_mapped()), false),
            IpAddr::V6(_) => return None,
        };
        Some(HostAddress { address: SocketAddr::new(ip, inside.port()), v6_only })
    }

    /// Whether the socket answers on every loopback address of the host, IPv4 and IPv6.
    pub fn is_every_loopback(self) -> bool {
        self.address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED)
    }

    /// Returns the address at which the host reaches it.
    pub fn to_dial(self) -> SocketAddr {
        let ip = if self.is_every_loopback() { IpAddr::V4(Ipv4Addr::LOCALHOST) } else { self.address.ip() };
        SocketAddr::new(ip.to_canonical(), self.address.port())
    }
}

/// The reason why a server in the sandbox is relayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RelayReason {
    /// It is not a TCP socket of the sandbox, or not bound to a port.
    NotOurs,
    /// It is bound to an address that is neither loopback nor a wildcard, or to a device.
    Address,
    /// The port may not be exposed.
    Denied,
    /// An epoll instance watches it already, and would continue to watch the replaced socket.
    Epoll,
    /// It signals its readiness to a process (`O_ASYNC`).
    Async,
    /// A child process holds it, too.
    Child,
    /// It has several descriptors in a process with several threads, which may change them at the same time.
    Threads,
    /// The process may not be inspected, or has too many descriptors.
    Unreadable,
    /// Too many native listeners in this sandbox.
    Quota,
    /// Another container has the port, or `--on-conflict relay` is in force.
    Taken,
    /// The host refused the socket for another reason than a port in use.
    Refused,
}

/// The properties of a socket that the first step uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SocketFacts {
    /// A stream socket of TCP or MPTCP, over IPv4 or IPv6.
    pub(super) is_tcp: bool,
    /// It belongs to the sandbox's network namespace.
    pub(super) is_inside: bool,
    /// It listens already.
    pub(super) listens: bool,
    /// A host socket has replaced it: it is a stub.
    pub(super) is_stub: bool,
    /// Its own address, if that is an IP address.
    pub(super) local: Option<SocketAddr>,
    /// `IPV6_V6ONLY`.
    pub(super) v6_only: bool,
    /// It is bound to a network device other than `lo`.
    pub(super) has_device: bool,
}

/// The first step's result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AboutSocket {
    /// The kernel carries out the call.
    Continue(RelayReason),
    /// It is a stub: this process gets the host socket that replaced the stub elsewhere.
    Rejoin,
    /// It is to be replaced by a host socket with this address.
    Replace(HostAddress, NonZeroU16),
}

/// Decides by the socket's options and the port policy.
pub(super) fn about_socket(
    facts: &SocketFacts,
    may_expose: impl FnOnce(NonZeroU16) -> bool,
    has_room: bool,
) -> AboutSocket {
    let relay = AboutSocket::Continue;
    if !facts.is_tcp || !facts.is_inside {
        return relay(RelayReason::NotOurs);
    }
    if facts.is_stub {
        return AboutSocket::Rejoin;
    }
    // A socket that listens is relayed already; a second call only changes its backlog.
    let bound = facts
        .local
        .filter(|_| !facts.listens)
        .and_then(|local| Some((local, NonZeroU16::new(local.port())?)));
    let Some((local, port)) = bound else { return relay(RelayReason::NotOurs) };
    let Some(address) = HostAddress::of(local, facts.v6_only).filter(|_| !facts.has_device) else {
        return relay(RelayReason::Address);
    };
    if !may_expose(port) {
        return relay(RelayReason::Denied);
    }
    if !has_room {
        return relay(RelayReason::Quota);
    }
    AboutSocket::Replace(address, port)
}

/// A descriptor of the calling process that refers to the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reference {
    /// Its number.
    pub(super) descriptor: i32,
    /// Its flags.
    pub(super) flags: Flags,
}

/// A process that holds a socket, and the number of its descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Holder {
    /// The process.
    pub(super) process: u32,
    /// Its descriptor.
    pub(super) descriptor: i32,
}

/// References to a socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Holders {
    /// Those of the calling process; `None` if they could not all be read.
    pub(super) own: Option<Vec<Reference>>,
    /// An epoll instance of the process watches the socket, or could not be read.
    pub(super) is_watched: bool,
    /// A child holds it, too, or the children could not be read.
    pub(super) child_holds: bool,
    /// Processes above the caller that hold it.
    pub(super) ancestors: Vec<Holder>,
}

/// The descriptors that are replaced, and the processes that keep the stub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Injection {
    /// The descriptor of the call first, then its duplicates.
    pub(super) references: Vec<Reference>,
    /// Processes above that hold the stub, and whose later children may listen on it.
    pub(super) ancestors: Vec<Holder>,
}

/// Decides by the references to the socket. `descriptor` is the call's own.
pub(super) fn about_holders(
    holders: Holders,
    descriptor: i32,
    threads: u32,
) -> Result<Injection, RelayReason> {
    let mut references = holders.own.ok_or(RelayReason::Unreadable)?;
    // If it is missing, another thread of the program has changed the descriptor.
    let at = references.iter().position(|reference| reference.descriptor == descriptor);
    references.swap(0, at.ok_or(RelayReason::Unreadable)?);
    if references.iter().any(|reference| reference.flags.is_async) {
        return Err(RelayReason::Async);
    }
    if holders.is_watched {
        return Err(RelayReason::Epoll);
    }
    if holders.child_holds {
        return Err(RelayReason::Child);
    }
    if references.len() > 1 && threads > 1 {
        return Err(RelayReason::Threads);
    }
    Ok(Injection { references, ancestors: holders.ancestors })
}

/// The default range of ports that a namespace assigns to sockets without one. A server with such a port most likely did not
/// choose it, and does not expect that it is in use.
pub const EPHEMERAL_PORTS: RangeInclusive<u16> = 32_768..=60_999;

/// The driver's choice when another socket of the host has the port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conflict {
    /// `listen` fails with EADDRINUSE, so that a dev server takes the next port.
    Fail,
    /// The server listens inside; the relay's driver decides about the host's port.
    Relay,
}

/// The host's listeners on a port that could not be bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PortFacts {
    /// Whether native listeners of this sandbox are among them.
    pub(super) has_own: bool,
    /// Whether other listeners are among them.
    pub(super) has_others: bool,
    /// The socket that was trapped has `SO_REUSEPORT`.
    pub(super) reuse_port: bool,
}

/// The third step's result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AboutConflict {
    /// The kernel carries out the call.
    Continue(RelayReason),
    /// The socket shares the port with this sandbox's native listeners on it, as `SO_REUSEPORT` requests.
    Join,
    /// `listen` fails with EADDRINUSE.
    InUse,
}

/// Decides on a port that could not be bound because it is in use. `ask` returns the driver's choice.
pub(super) fn about_conflict(facts: PortFacts, ask: impl FnOnce() -> Conflict) -> AboutConflict {
    if facts.has_own && !facts.has_others && facts.reuse_port {
        return AboutConflict::Join;
    }
    match ask() {
        Conflict::Fail => AboutConflict::InUse,
        Conflict::Relay => AboutConflict::Continue(RelayReason::Taken),
    }
}

#[cfg(test)]
#[path = "decision_tests.rs"]
mod tests;
