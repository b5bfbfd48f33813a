//! A port of the host at which a container's own is published.

use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::num::NonZeroU16;
use std::ops::Range;

/// Where the kernel says which ports it gives to outgoing connections (`ip(7)`).
const EPHEMERAL: &str = "/proc/sys/net/ipv4/ip_local_port_range";
/// Where those begin unless somebody changed it.
const EPHEMERAL_FIRST: u16 = 32_768;
/// The lowest port that is taken: below, people have their own.
const FIRST: u16 = 16_384;

/// A port that is free on 127.0.0.1: the preferred one, else one from below those that the kernel gives to outgoing
/// connections. Up there a connection to a port at which nobody listens may be connected to itself, and then holds the port
/// that Docker is to publish.
///
/// # Errors
/// Those of asking the kernel for any free port at all.
pub fn free_port(preferred: Option<NonZeroU16>, seed: u16) -> io::Result<NonZeroU16> {
    let ephemeral = std::fs::read_to_string(EPHEMERAL).unwrap_or_default();
    let candidates = preferred.map(NonZeroU16::get).into_iter().chain(from(range(&ephemeral), seed));
    for port in candidates.chain([0]) {
        if let Ok(listener) = TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
            let port = listener.local_addr()?.port();
            return NonZeroU16::new(port).ok_or_else(|| io::Error::other("the kernel gave port 0"));
        }
    }
    Err(io::Error::from(io::ErrorKind::AddrInUse))
}

/// The ports that are tried.
fn range(ephemeral: &str) -> Range<u16> {
    let first = ephemeral.split_whitespace().next().and_then(|first| first.parse().ok());
    FIRST..first.unwrap_or(EPHEMERAL_FIRST).max(FIRST)
}

/// All of them, beginning anywhere.
fn from(ports: Range<u16>, seed: u16) -> impl Iterator<Item = u16> {
    let begin = ports.start + seed.checked_rem(ports.end - ports.start).unwrap_or(0);
    (begin..ports.end).chain(ports.start..begin)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_taken_from_below_those_of_outgoing_connections() {
        assert_eq!(range("32768\t60999\n"), 16_384..32_768);
        assert_eq!(range("20000 60999"), 16_384..20_000);
        assert_eq!(range(""), 16_384..32_768);
        assert!(range("1024 65535").is_empty());
        assert_eq!(from(10..13, 4).collect::<Vec<_>>(), [11, 12, 10]);
        assert_eq!(from(10..10, 4).count(), 0);
    }

    #[test]
    fn the_preferred_port_is_had_unless_somebody_has_it() {
        let first = free_port(None, 7_000).unwrap();
        assert_eq!(free_port(Some(first), 7_000).unwrap(), first);
        let _held = TcpListener::bind((Ipv4Addr::LOCALHOST, first.get())).unwrap();
        assert_ne!(free_port(Some(first), 7_000).unwrap(), first);
    }
}
