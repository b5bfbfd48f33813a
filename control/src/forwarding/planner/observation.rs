//! The listeners inside one namespace, by port. Pure.
//!
//! A container can listen on 65,535 ports, so an observation takes 64 bytes for a port, however many sockets listen on
//! it, and each change costs the time of a look-up.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU16;

use landfall_engine::command::{Listening, Reach};

/// The addresses that an engine reports: 127.0.0.1, 0.0.0.0, `::1` and `::`.
const ADDRESSES: [IpAddr; 4] = [
    IpAddr::V4(Ipv4Addr::LOCALHOST),
    IpAddr::V4(Ipv4Addr::UNSPECIFIED),
    IpAddr::V6(Ipv6Addr::LOCALHOST),
    IpAddr::V6(Ipv6Addr::UNSPECIFIED),
];

/// The ports of one namespace that have a listener.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observation {
    ports: BTreeMap<NonZeroU16, Listeners>,
}

/// The listeners of one port: the inode of the socket for each of `ADDRESSES`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Listeners([Option<u64>; ADDRESSES.len()]);

impl Observation {
    /// An observation of these listeners.
    pub fn whole(rows: &[Listening]) -> Observation {
        let mut whole = Observation::default();
        whole.update(rows, &[]);
        whole
    }

    /// Applies [`Event::Listeners`](landfall_engine::command::Event::Listeners). A listener on another address than the
    /// four cannot be reached and is ignored.
    pub fn update(&mut self, opened: &[Listening], closed: &[Listening]) {
        for row in closed {
            let Some(listeners) = self.ports.get_mut(&row.port) else { continue };
            if let Some(inode) = listeners.at(row.address)
                && *inode == Some(row.inode)
            {
                *inode = None;
            }
            if listeners.0.iter().all(Option::is_none) {
                self.ports.remove(&row.port);
            }
        }
        for row in opened {
            if ADDRESSES.contains(&row.address)
                && let Some(inode) = self.ports.entry(row.port).or_default().at(row.address)
            {
                *inode = Some(row.inode);
            }
        }
    }

    /// Every port with a listener, in ascending order.
    pub fn ports(&self) -> impl Iterator<Item = (NonZeroU16, &Listeners)> {
        self.ports.iter().map(|(port, listeners)| (*port, listeners))
    }

    /// The listeners of a port, if it has any.
    pub fn at(&self, port: NonZeroU16) -> Option<&Listeners> {
        self.ports.get(&port)
    }
}

impl Listeners {
    fn at(&mut self, address: IpAddr) -> Option<&mut Option<u64>> {
        ADDRESSES.iter().position(|known| *known == address).and_then(|at| self.0.get_mut(at))
    }

    fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        ADDRESSES.into_iter().zip(self.0).filter_map(|(address, inode)| inode.map(|_| address))
    }

    /// The address families that listen.
    pub fn reach(&self) -> Reach {
        Reach {
            v4: self.addresses().any(|address| address.is_ipv4()),
            v6: self.addresses().any(|address| address.is_ipv6()),
        }
    }

    /// The inodes of the sockets.
    pub fn inodes(&self) -> impl Iterator<Item = u64> {
        self.0.into_iter().flatten()
    }

    /// Whether all of them are bound to a loopback address.
    pub fn are_on_loopback_alone(&self) -> bool {
        self.addresses().all(|address| address.is_loopback())
    }

    /// The address that a port is said to listen on (wire specification, A.4): `127.0.0.1` if any of its sockets is
    /// bound to a loopback address, else `0.0.0.0`.
    pub fn bind_address(&self) -> &'static str {
        let loopback = self.addresses().any(|address| address.is_loopback());
        if loopback { "127.0.0.1" } else { "0.0.0.0" }
    }
}
