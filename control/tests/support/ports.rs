//! Ports of the host for tests.

use std::net::{Ipv4Addr, Ipv6Addr, TcpListener};
use std::sync::atomic::{AtomicU16, Ordering};

/// Below what the kernel gives to outgoing connections: a client that tries such a port while nobody listens there may be
/// given the very same one, and is then connected to itself.
const FIRST: u16 = 20_000;
const COUNT: u16 = 12_000;

/// A port that nobody has on the host's loopback. Test programs that run at once begin at different places, and one never
/// gets the same twice before all have had their turn.
pub(crate) fn free_port() -> u16 {
    static TAKEN: AtomicU16 = AtomicU16::new(0);
    let process = (std::process::id() % 60).try_into().unwrap_or(0);
    let begin: u16 = process * 200;
    loop {
        let next = TAKEN.fetch_add(1, Ordering::Relaxed) % COUNT;
        let port = FIRST + (begin + next) % COUNT;
        // A host without IPv6 has no use for the second.
        let is_free = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
            && !TcpListener::bind((Ipv6Addr::LOCALHOST, port))
                .is_err_and(|error| error.kind() == std::io::ErrorKind::AddrInUse);
        if is_free {
            return port;
        }
    }
}
