//! Ports of the host for tests.

use std::net::{Ipv4Addr, Ipv6Addr, TcpListener};
use std::sync::atomic::{AtomicU16, Ordering};

/// Below the kernel's range for outgoing connections: a client that connects to a port of that range without a listener
/// may be given the same local port, and is then connected to itself.
const FIRST: u16 = 20_000;
const COUNT: u16 = 12_000;

/// A port that is free on the host's loopback. Concurrent test programs start at different ports, and a program returns
/// a port again only after all others.
pub(crate) fn free_port() -> u16 {
    static TAKEN: AtomicU16 = AtomicU16::new(0);
    let process = (std::process::id() % 60).try_into().unwrap_or(0);
    let begin: u16 = process * 200;
    loop {
        let next = TAKEN.fetch_add(1, Ordering::Relaxed) % COUNT;
        let port = FIRST + (begin + next) % COUNT;
        // A host without IPv6 needs no second bind.
        let is_free = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
            && !TcpListener::bind((Ipv6Addr::LOCALHOST, port))
                .is_err_and(|error| error.kind() == std::io::ErrorKind::AddrInUse);
        if is_free {
            return port;
        }
    }
}
