//! The rows of a container's ports: those with a forward, and those without one, with the reason. Pure.
//!
//! A container can listen on 65,535 ports, and an answer about all containers serialises, sends and prints each row. So
//! every forward has a row, of which there are at most [`FORWARDS_MAX`](super::FORWARDS_MAX) and those that close. The
//! rows of ports without a forward take at most [`ROWS_BYTES_MAX`]; the rest are counted.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::num::NonZeroU16;

use landfall_engine::command::ForwardStats;

use super::announced::NotForwarded;
use super::reserved::Stage;
use super::verdict::Verdict;
use super::{Forward, Planner, Status};
use crate::model::forward_table::{ForwardPath, RowState};
use crate::model::registration::ContainerName;

/// The most bytes that the rows of one container's ports without a forward take, as JSON.
const ROWS_BYTES_MAX: usize = 64 * 1024;

/// The bytes of a row without its reason: field names, numbers, a label.
const ROW_BYTES: usize = 256;

/// The rows of one container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rows {
    /// In the order of the container's ports.
    pub listed: Vec<Row>,
    /// The number of further ports without a forward.
    pub omitted: usize,
}

/// One port that has a listener or a forward.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// The container's port.
    pub port: NonZeroU16,
    /// The host port; for a reserved port it may differ.
    pub host_port: NonZeroU16,
    /// The state of the port.
    pub state: RowState,
    /// The reason that it is not open.
    pub reason: Option<String>,
    /// The sockets that listen behind it.
    pub inodes: Vec<u64>,
    /// Its counters, as last reported.
    pub stats: ForwardStats,
    /// How its connections reach the server.
    pub path: ForwardPath,
    /// The addresses of native sockets on the host.
    pub addresses: Vec<IpAddr>,
    /// The process that listens, if a supervisor reported it.
    pub process: Option<u32>,
}

impl Planner {
    /// The rows of a container, in ascending order of its ports.
    pub fn rows(&self, name: &ContainerName) -> Rows {
        let seen = self.upstream_of(name).and_then(|(_, upstream)| upstream.seen.as_ref());
        let inodes =
            |port| seen.and_then(|seen| seen.at(port)).map(|at| at.inodes().collect()).unwrap_or_default();
        let mut rows = self.native_rows(name);
        let native: BTreeSet<NonZeroU16> = rows.iter().map(|row| row.port).collect();
        let relayed = self.forwards_of(name).filter(|forward| !native.contains(&forward.target_port));
        rows.extend(relayed.map(|forward| self.row_of(name, forward, inodes(forward.target_port))));
        let with_row: BTreeSet<NonZeroU16> = rows.iter().map(|row| row.port).collect();
        let mut rest: BTreeMap<NonZeroU16, (NonZeroU16, RowState, Option<String>)> = BTreeMap::new();
        let mut add = |port, host_port, state, reason| {
            if !with_row.contains(&port) {
                rest.entry(port).or_insert((host_port, state, reason));
            }
        };
        if let Some(broker) = self.brokers.get(name) {
            for (target, reservation) in broker.reserved.iter().filter(|(_, one)| one.is_accepted()) {
                match &reservation.stage {
                    Stage::Held { host_port, failure: Some(failure) } => {
                        add(*target, *host_port, RowState::Failed, Some(failure.reason.clone()));
                    }
                    Stage::Held { host_port, failure: None } => {
                        add(*target, *host_port, RowState::Opening, None)
                    }
                    Stage::Requested(_) | Stage::Trying { .. } => {
                        add(*target, *target, RowState::Opening, None)
                    }
                }
            }
            let is_dialled = self.dialled(name).is_some();
            for (port, known) in broker.known.iter().filter(|_| is_dialled) {
                match &known.not_forwarded {
                    Some(NotForwarded::Denied(why)) => {
                        add(*port, *port, RowState::Denied, Some(why.to_string()));
                    }
                    Some(NotForwarded::Failed(why)) => add(*port, *port, RowState::Failed, Some(why.clone())),
                    None => add(*port, *port, RowState::Opening, None),
                }
            }
        }
        let failures = self.failures.get(name);
        for (port, verdict) in self.verdicts_of(name).unwrap_or_default() {
            let failure = failures.and_then(|failures| failures.get(&port));
            match (verdict, failure) {
                (Verdict::Published(host_port, reason), _) => {
                    add(port, host_port, RowState::Published, Some(reason.to_owned()));
                }
                (Verdict::Denied(why), _) => add(port, port, RowState::Denied, Some(why.to_string())),
                (Verdict::Wanted(_), Some(failure)) => {
                    add(port, port, RowState::Failed, Some(failure.reason.clone()));
                }
                (Verdict::Wanted(_), None) => add(port, port, RowState::Opening, None),
            }
        }
        // The rows of denied and published ports are cut first: a failed attempt is more useful than a rule.
        let mut rest: Vec<Row> = rest
            .into_iter()
            .map(|(port, (host_port, state, reason))| Row {
                port,
                host_port,
                state,
                reason,
                inodes: inodes(port),
                stats: ForwardStats::default(),
                path: ForwardPath::Relay,
                addresses: Vec::new(),
                process: None,
            })
            .collect();
        rest.sort_by_key(|row| (row.state == RowState::Denied, row.state == RowState::Published));
        let mut bytes = 0;
        let is_listed = |row: &Row| {
            bytes += ROW_BYTES + row.reason.as_ref().map_or(0, String::len);
            bytes <= ROWS_BYTES_MAX
        };
        let omitted = rest.len();
        let listed: Vec<Row> = rest.into_iter().take_while(is_listed).collect();
        let omitted = omitted - listed.len();
        rows.extend(listed);
        rows.sort_by_key(|row| row.port);
        Rows { listed: rows, omitted }
    }

    /// The host ports that are open for a container.
    pub fn open_ports(&self, name: &ContainerName) -> Vec<NonZeroU16> {
        let rows = self.rows(name).listed.into_iter();
        rows.filter(|row| row.state == RowState::Open).map(|row| row.host_port).collect()
    }

    fn row_of(&self, name: &ContainerName, forward: &Forward, inodes: Vec<u64>) -> Row {
        let (port, host_port) = (forward.target_port, forward.host_port);
        let failure = self.failures.get(name).and_then(|failures| failures.get(&port));
        let (state, reason) = match (forward.status, failure) {
            // During another attempt, the last result is shown.
            (Status::Opening, Some(failure)) => (RowState::Failed, Some(failure.reason.clone())),
            (Status::Opening, None) => (RowState::Opening, None),
            (Status::Open, _) => (RowState::Open, None),
            (Status::Closing { .. }, _) => (RowState::Closing, None),
        };
        let (stats, path) = (forward.stats, ForwardPath::Relay);
        Row { port, host_port, state, reason, inodes, stats, path, addresses: Vec::new(), process: None }
    }

    /// The sockets that listen behind a port of a watched container.
    pub fn inodes(&self, name: &ContainerName, port: NonZeroU16) -> Vec<u64> {
        let seen = self.upstream_of(name).and_then(|(_, upstream)| upstream.seen.as_ref());
        seen.and_then(|seen| seen.at(port)).map(|at| at.inodes().collect()).unwrap_or_default()
    }
}
