//! The sockets and files that openers and agents create on request.

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, netlink, sockopt};

use crate::command::Family;
use crate::limits::DESCRIPTORS_PER_MESSAGE_MAX;
use crate::opener::{Answer, Failure, FailureKind, PortRange, Request};

/// The backlog of a listener inside; the kernel caps it at `net.core.somaxconn`.
const BACKLOG: i32 = 4_096;

pub(super) fn failed(failure: Failure) -> (Answer, Vec<OwnedFd>) {
    (Answer::Failed { failure }, Vec::new())
}

pub(super) fn answer(request: &Request) -> (Answer, Vec<OwnedFd>) {
    match request {
        Request::Sockets { family, count, congestion } => sockets(*family, *count, congestion.as_deref()),
        Request::Listen { family, port } => listen(*family, *port),
        Request::ProcNet => proc_net(),
        Request::SockDiag => sock_diag(),
        Request::Dial { .. } => {
            failed(Failure::new(FailureKind::Other, "an opener creates sockets and does not connect them"))
        }
        Request::Enter { .. } | Request::Introduce | Request::Channel => {
            failed(Failure::new(FailureKind::Other, "this opener has entered a namespace already"))
        }
    }
}

fn sockets(family: Family, count: u16, congestion: Option<&str>) -> (Answer, Vec<OwnedFd>) {
    if count == 0 || usize::from(count) > DESCRIPTORS_PER_MESSAGE_MAX {
        let text = format!("a request is for 1 to {DESCRIPTORS_PER_MESSAGE_MAX} sockets, not {count}");
        return failed(Failure::new(FailureKind::Other, text));
    }
    let mut made = Vec::with_capacity(usize::from(count));
    for done in 0..count {
        match socket(family, congestion) {
            Ok(socket) => made.push(socket),
            Err(errno) => {
                let error = Some(Failure::from_io("no more sockets could be created", &errno.into()));
                return (Answer::Made { count: done, error, ephemeral: ephemeral() }, made);
            }
        }
    }
    (Answer::Made { count, error: None, ephemeral: ephemeral() }, made)
}

/// Returns the ephemeral ports of this thread's network namespace. If unknown, a caller assumes that any port may be one.
fn ephemeral() -> Option<PortRange> {
    PortRange::parse(&std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").ok()?)
}

fn socket(family: Family, congestion: Option<&str>) -> Result<OwnedFd, Errno> {
    let domain = match family {
        Family::V4 => AddressFamily::INET,
        Family::V6 => AddressFamily::INET6,
    };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket =
        rustix::net::socket_with(domain, SocketType::STREAM, flags, Some(rustix::net::ipproto::TCP))?;
    sockopt::set_tcp_nodelay(&socket, true)?;
    // Without this option, an urgent byte is lost from the stream.
    sockopt::set_socket_oobinline(&socket, true)?;
    if let Some(name) = congestion {
        // The namespace may forbid it (`net.ipv4.tcp_allowed_congestion_control`); the socket then uses its default.
        let _ = sockopt::set_tcp_congestion(&socket, name);
    }
    Ok(socket)
}

fn listen(family: Family, port: u16) -> (Answer, Vec<OwnedFd>) {
    let made = socket(family, None).and_then(|socket| {
        let ip = match family {
            Family::V4 => IpAddr::V4(Ipv4Addr::LOCALHOST),
            Family::V6 => IpAddr::V6(Ipv6Addr::LOCALHOST),
        };
        // Permits binding a port whose last connections are in TIME_WAIT.
        sockopt::set_socket_reuseaddr(&socket, true)?;
        rustix::net::bind(&socket, &SocketAddr::new(ip, port))?;
        rustix::net::listen(&socket, BACKLOG)?;
        Ok(socket)
    });
    match made {
        Ok(socket) => (Answer::Listening, vec![socket]),
        Err(errno) => {
            let what = format!("cannot listen on port {port} inside");
            failed(Failure::from_io(&what, &errno.into()))
        }
    }
}

/// Opens the files. Each stays bound to the namespace of the thread that opened it: this one's.
fn proc_net() -> (Answer, Vec<OwnedFd>) {
    let tcp = File::open("/proc/thread-self/net/tcp");
    let tcp6 = File::open("/proc/thread-self/net/tcp6");
    match (tcp, tcp6) {
        (Err(error), Err(_)) => failed(Failure::from_io("/proc/net/tcp cannot be opened", &error)),
        (tcp, tcp6) => {
            let answer = Answer::ProcNet { tcp: tcp.is_ok(), tcp6: tcp6.is_ok() };
            (answer, [tcp, tcp6].into_iter().flatten().map(OwnedFd::from).collect())
        }
    }
}

fn sock_diag() -> (Answer, Vec<OwnedFd>) {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let kind = SocketType::DGRAM;
    match rustix::net::socket_with(AddressFamily::NETLINK, kind, flags, Some(netlink::SOCK_DIAG)) {
        Ok(socket) => (Answer::SockDiag, vec![socket]),
        Err(errno) => failed(Failure::from_io("no sock_diag socket could be made", &errno.into())),
    }
}
