//! One reading of a namespace: the sockets that listen on a loopback or unspecified address, in the order of the
//! kernel's table, one row for each port and address.
//!
//! Several sockets may share a port and an address (`SO_REUSEPORT`, one for each worker of a server). The row then
//! has the lowest inode: this choice does not depend on the order in which the kernel lists the sockets, so a server with
//! many workers does not look like a server that keeps restarting.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU16;

use crate::command::Listening;

/// The inode of a row without a valid one. No socket has it: the kernel numbers from 1 (`get_next_ino`, `fs/inode.c`).
pub const INODE_UNKNOWN: u64 = 0;

/// The user id of a row without a valid one: the kernel's own "no user" (`INVALID_UID`, `include/linux/uidgid.h`).
/// Not 0, which would claim that root owns the socket.
pub const UID_UNKNOWN: u32 = u32::MAX;

/// The key that identifies a row between readings: the address to which a client connects.
pub(super) type Place = (NonZeroU16, IpAddr);

/// The listeners of one namespace at one time. It holds at most 65,535 ports on four addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    rows: Vec<Listening>,
    places: HashMap<Place, usize>,
}

impl Reading {
    /// Removes all rows and keeps the memory for the next reading.
    pub fn clear(&mut self) {
        self.rows.clear();
        self.places.clear();
    }

    /// Inserts a row, unless its address is neither loopback nor unspecified. 127.0.0.2 and an IPv4-mapped IPv6 address
    /// are neither: the relay would not reach them.
    pub fn insert(&mut self, row: Listening) {
        if !is_local(row.address) {
            return;
        }
        match self.places.entry((row.port, row.address)) {
            Entry::Vacant(vacant) => {
                vacant.insert(self.rows.len());
                self.rows.push(row);
            }
            Entry::Occupied(known) => {
                if let Some(known) = self.rows.get_mut(*known.get())
                    && inode_rank(row) < inode_rank(*known)
                {
                    *known = row;
                }
            }
        }
    }

    /// Returns the rows, each at the position where its port and address were first seen.
    pub fn rows(&self) -> &[Listening] {
        &self.rows
    }

    /// Returns the row of a port and an address.
    pub fn at(&self, place: (NonZeroU16, IpAddr)) -> Option<&Listening> {
        self.places.get(&place).and_then(|&index| self.rows.get(index))
    }
}

impl FromIterator<Listening> for Reading {
    fn from_iter<I: IntoIterator<Item = Listening>>(rows: I) -> Reading {
        let mut reading = Reading::default();
        rows.into_iter().for_each(|row| reading.insert(row));
        reading
    }
}

/// Sorts the lowest inode first and an unknown one last.
fn inode_rank(row: Listening) -> u64 {
    row.inode.wrapping_sub(1)
}

fn is_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4 == Ipv4Addr::LOCALHOST || v4 == Ipv4Addr::UNSPECIFIED,
        IpAddr::V6(v6) => v6 == Ipv6Addr::LOCALHOST || v6 == Ipv6Addr::UNSPECIFIED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(port: u16, address: &str, inode: u64) -> Listening {
        let port = NonZeroU16::new(port).unwrap();
        Listening { port, address: address.parse().unwrap(), inode, uid: 0 }
    }

    #[test]
    fn workers_that_share_a_port_are_one_row_whatever_their_order() {
        let one: Reading = [row(80, "::", 9), row(80, "::", 7), row(80, "::", 8)].into_iter().collect();
        let other: Reading = [row(80, "::", 8), row(80, "::", 9), row(80, "::", 7)].into_iter().collect();
        assert_eq!(one.rows(), [row(80, "::", 7)]);
        assert_eq!(one, other);
    }

    #[test]
    fn a_known_inode_replaces_an_unknown_one() {
        let reading: Reading = [row(80, "::", INODE_UNKNOWN), row(80, "::", 7)].into_iter().collect();
        assert_eq!(reading.rows(), [row(80, "::", 7)]);
    }

    #[test]
    fn addresses_that_a_relay_cannot_reach_are_left_out() {
        for address in ["127.0.0.2", "127.0.0.53", "192.168.2.2", "::ffff:127.0.0.1", "fe80::1", "::2"] {
            assert_eq!(
                [row(80, address, 1)].into_iter().collect::<Reading>(),
                Reading::default(),
                "{address}"
            );
        }
    }
}
