//! What listens inside one namespace, as rows of the kernel's table and merged for each port. Pure.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::num::NonZeroU16;

use landfall_engine::command::{Listening, Reach};

/// The rows of one namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observation {
    rows: Vec<Listening>,
}

impl Observation {
    /// All that listens.
    pub fn whole(rows: Vec<Listening>) -> Observation {
        Observation { rows }
    }

    /// Takes in [`Event::Listeners`](landfall_engine::command::Event::Listeners).
    pub fn update(&mut self, opened: &[Listening], closed: &[Listening]) {
        self.rows.retain(|row| !closed.contains(row));
        for row in opened {
            if !self.rows.contains(row) {
                self.rows.push(*row);
            }
        }
    }

    /// Which families listen, for each port.
    pub fn reach(&self) -> BTreeMap<NonZeroU16, Reach> {
        let mut ports: BTreeMap<NonZeroU16, Reach> = BTreeMap::new();
        for row in &self.rows {
            let reach = ports.entry(row.port).or_default();
            match row.address {
                IpAddr::V4(_) => reach.v4 = true,
                IpAddr::V6(_) => reach.v6 = true,
            }
        }
        ports
    }

    /// The sockets behind one port, first seen first.
    pub fn inodes(&self, port: NonZeroU16) -> impl Iterator<Item = u64> + '_ {
        self.rows.iter().filter(move |row| row.port == port).map(|row| row.inode)
    }

    /// Whether a port is listened on at loopback addresses and nowhere else.
    pub fn is_on_loopback_alone(&self, port: NonZeroU16) -> bool {
        let mut rows = self.rows.iter().filter(|row| row.port == port).peekable();
        rows.peek().is_some() && rows.all(|row| row.address.is_loopback())
    }

    /// The address that a port is said to listen on (wire specification, A.4): `127.0.0.1` if any of its sockets is
    /// bound to a loopback address, else `0.0.0.0`.
    pub fn bind_address(&self, port: NonZeroU16) -> &'static str {
        let loopback = self.rows.iter().any(|row| row.port == port && row.address.is_loopback());
        if loopback { "127.0.0.1" } else { "0.0.0.0" }
    }
}
