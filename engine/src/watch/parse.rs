//! The parser of `/proc/net/tcp` and `/proc/net/tcp6`. Pure.
//!
//! A row of the kernel (`get_tcp4_sock` in `net/ipv4/tcp_ipv4.c`, `get_tcp6_sock` in `net/ipv6/tcp_ipv6.c`):
//!
//! ```text
//!   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
//!    0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 24713 1 …
//! ```
//!
//! An address is printed as 32-bit words of the machine's own byte order, a port as a plain number. State `0A` is
//! LISTEN. Columns 8 and 10 are the user id and the inode.
//!
//! A valid row is defined by the wire specification (A.4): four columns, of which the second and the fourth are well formed.
//! A row without a valid user id or inode is accepted with [`UID_UNKNOWN`] or [`INODE_UNKNOWN`]. The parser skips everything
//! else without an error, so the input may hold anything: headers, NUL bytes, text that is not UTF-8. White space is that of
//! ASCII, a line ends at `\n`.
//!
//! The time is linear in the length of the text, and no row allocates.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::IpAddr;
use std::num::NonZeroU16;

use super::reading::{INODE_UNKNOWN, Reading, UID_UNKNOWN};
use crate::command::Listening;

/// Returns every listening row of `text`, with any address, in order.
///
/// ```
/// let text = b"  0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000 0 24713 1\n";
/// let row = landfall_engine::watch::parse::rows(text).next().expect("one row");
/// assert_eq!((row.port.get(), row.address.to_string().as_str()), (8080, "127.0.0.1"));
/// assert_eq!((row.uid, row.inode), (1000, 24713));
/// ```
pub fn rows(text: &[u8]) -> impl Iterator<Item = Listening> {
    text.split(|&byte| byte == b'\n').filter_map(row)
}

/// Returns the listeners on a loopback or unspecified address of both texts, one for each port and address.
pub fn listeners(tcp: &[u8], tcp6: &[u8]) -> Reading {
    rows(tcp).chain(rows(tcp6)).collect()
}

/// Returns the wire's listeners for both texts (specification A.4).
pub fn wire_listeners(tcp: &[u8], tcp6: &[u8]) -> Vec<WireListener> {
    to_wire(listeners(tcp, tcp6).rows())
}

/// A listener as it appears on the wire: one entry for each port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WireListener {
    /// The port.
    pub port: NonZeroU16,
    /// The bind address: loopback, if any row of the port has a loopback address.
    pub bind_addr: BindAddr,
}

/// The two bind addresses of the wire, which does not distinguish families.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BindAddr {
    /// 0.0.0.0 or `::`, sent as `0.0.0.0`.
    Any,
    /// 127.0.0.1 or `::1`, sent as `127.0.0.1`.
    Loopback,
}

impl BindAddr {
    /// The spelling on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            BindAddr::Any => "0.0.0.0",
            BindAddr::Loopback => "127.0.0.1",
        }
    }
}

/// Returns one entry for each port, in the order in which the ports first appear, preferring loopback. `rows` must be the
/// rows of a [`Reading`].
pub fn to_wire(rows: &[Listening]) -> Vec<WireListener> {
    let mut wire: Vec<WireListener> = Vec::with_capacity(rows.len());
    let mut places = HashMap::with_capacity(rows.len());
    for row in rows {
        let bind_addr = if row.address.is_loopback() { BindAddr::Loopback } else { BindAddr::Any };
        match places.entry(row.port) {
            Entry::Vacant(vacant) => {
                vacant.insert(wire.len());
                wire.push(WireListener { port: row.port, bind_addr });
            }
            Entry::Occupied(known) => {
                if let Some(known) = wire.get_mut(*known.get())
                    && bind_addr == BindAddr::Loopback
                {
                    known.bind_addr = BindAddr::Loopback;
                }
            }
        }
    }
    wire
}

/// Whether `line` is the row of a socket that the kernel lists after all listeners.
///
/// The kernel lists the listening hash first and the hash of connections after it (`tcp_get_idx` in `net/ipv4/tcp_ipv4.c`),
/// so no listener follows such a row. SYN_RECV (`03`) does not count: kernels before 4.4 list half-open connections next to
/// their listener.
pub(super) fn is_past_listeners(line: &[u8]) -> bool {
    let state = columns(line).nth(3);
    state
        .is_some_and(|state| state.len() == 2 && hex(state).is_some() && state != LISTEN && state != SYN_RECV)
}

const LISTEN: &[u8] = b"0A";
const SYN_RECV: &[u8] = b"03";

fn row(line: &[u8]) -> Option<Listening> {
    let mut columns = columns(line);
    let local = columns.nth(1)?;
    if columns.nth(1)? != LISTEN {
        return None;
    }
    let colon = local.iter().rposition(|&byte| byte == b':')?;
    let port = port(&local[colon + 1..])?;
    let address = address(&local[..colon], u32::to_ne_bytes)?;
    let uid = columns.nth(3).and_then(decimal).and_then(|uid| u32::try_from(uid).ok());
    let inode = columns.nth(1).and_then(decimal);
    Some(Listening { port, address, inode: inode.unwrap_or(INODE_UNKNOWN), uid: uid.unwrap_or(UID_UNKNOWN) })
}

fn columns(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    let is_space = |byte: &u8| matches!(byte, b' ' | b'\t' | b'\r' | 0x0b | 0x0c);
    line.split(is_space).filter(|column| !column.is_empty())
}

/// Parses an address: one word for IPv4, four for IPv6. `octets` reverses the kernel's `%08X` of an address in network
/// order.
fn address(text: &[u8], octets: fn(u32) -> [u8; 4]) -> Option<IpAddr> {
    let word = |text: &[u8]| hex(text).map(octets);
    match text.len() {
        8 => word(text).map(IpAddr::from),
        32 => {
            let mut all = [0u8; 16];
            for (octets, text) in all.chunks_exact_mut(4).zip(text.chunks_exact(8)) {
                octets.copy_from_slice(&word(text)?);
            }
            Some(IpAddr::from(all))
        }
        _ => None,
    }
}

/// Parses one to four hexadecimal digits that are not 0: no client can connect to port 0.
fn port(text: &[u8]) -> Option<NonZeroU16> {
    if text.len() > 4 {
        return None;
    }
    hex(text).and_then(|port| u16::try_from(port).ok()).and_then(NonZeroU16::new)
}

/// Parses one to eight hexadecimal digits of either case, a 32-bit word.
fn hex(text: &[u8]) -> Option<u32> {
    if text.is_empty() || text.len() > 8 {
        return None;
    }
    text.iter().try_fold(0u32, |value, &byte| Some(value << 4 | char::from(byte).to_digit(16)?))
}

fn decimal(text: &[u8]) -> Option<u64> {
    let digit = |byte: u8| byte.is_ascii_digit().then(|| u64::from(byte - b'0'));
    text.iter().try_fold(0u64, |value, &byte| value.checked_mul(10)?.checked_add(digit(byte)?))
}

#[cfg(test)]
#[path = "parse_tests.rs"]
mod tests;
