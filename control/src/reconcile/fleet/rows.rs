//! What is told of a container's ports: those that lead somewhere, then those that do not and why.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU16;

use landfall_engine::command::ForwardStats;

use super::announced::Over;
use super::reserved::Stage;
use super::verdict::Verdict;
use super::{Fleet, Forward, Status};
use crate::reconcile::table::RowState;
use crate::registration::model::ContainerName;

/// One port that listens inside, or whose forward has not ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// The port inside.
    pub port: NonZeroU16,
    /// The port on the host; that of a port that is reserved is another one.
    pub host_port: NonZeroU16,
    /// What became of it.
    pub state: RowState,
    /// Why it is not open.
    pub reason: Option<String>,
    /// The sockets that listen behind it.
    pub inodes: Vec<u64>,
    /// Its counters, as last told.
    pub stats: ForwardStats,
}

impl Fleet {
    /// The ports of a container, the lowest first.
    pub fn rows(&self, name: &ContainerName) -> Vec<Row> {
        let mut rows: Vec<Row> = self.forwards_of(name).map(|forward| self.row_of(name, forward)).collect();
        let told: BTreeSet<NonZeroU16> = rows.iter().map(|row| row.port).collect();
        let mut rest: BTreeMap<NonZeroU16, (NonZeroU16, RowState, Option<String>)> = BTreeMap::new();
        let mut add = |port, host_port, state, reason| {
            if !told.contains(&port) {
                rest.entry(port).or_insert((host_port, state, reason));
            }
        };
        if let Some(broker) = self.brokers.get(name) {
            for (target, reservation) in broker.reserved.iter().filter(|(_, one)| one.has_begun()) {
                match &reservation.stage {
                    Stage::Held { host_port, failure: Some(failure) } => {
                        add(*target, *host_port, RowState::Failed, Some(failure.reason.clone()));
                    }
                    Stage::Held { host_port, failure: None } => {
                        add(*target, *host_port, RowState::Opening, None)
                    }
                    Stage::Asked(_) | Stage::Trying { .. } => add(*target, *target, RowState::Opening, None),
                }
            }
            for (port, known) in broker.known.iter().filter(|_| self.dialled(name).is_some()) {
                match &known.over {
                    Some(Over::Denied(why)) => {
                        add(*port, *port, RowState::Denied, Some(why.to_string()));
                    }
                    Some(Over::Failed(why)) => add(*port, *port, RowState::Failed, Some(why.clone())),
                    None => add(*port, *port, RowState::Opening, None),
                }
            }
        }
        let verdicts = self.upstream_of(name).and_then(|(id, upstream)| self.verdicts_of(id, upstream));
        for (port, verdict) in verdicts.unwrap_or_default() {
            let failure = self.failures.get(&(name.clone(), port));
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
        rows.extend(rest.into_iter().map(|(port, (host_port, state, reason))| Row {
            port,
            host_port,
            state,
            reason,
            inodes: self.inodes(name, port),
            stats: ForwardStats::default(),
        }));
        rows.sort_by_key(|row| row.port);
        rows
    }

    /// The host ports that answer for a container.
    pub fn open_ports(&self, name: &ContainerName) -> Vec<NonZeroU16> {
        let rows = self.rows(name).into_iter();
        rows.filter(|row| row.state == RowState::Open).map(|row| row.host_port).collect()
    }

    fn row_of(&self, name: &ContainerName, forward: &Forward) -> Row {
        let (port, host_port) = (forward.target_port, forward.host_port);
        let failure = self.failures.get(&(name.clone(), port)).map(|failure| failure.reason.clone());
        let (state, reason) = match (forward.status, failure) {
            // Asked for once more; until that is answered, what is known is that it failed.
            (Status::Opening, Some(reason)) => (RowState::Failed, Some(reason)),
            (Status::Opening, None) => (RowState::Opening, None),
            (Status::Open, _) => (RowState::Open, None),
            (Status::Closing { .. }, _) => (RowState::Closing, None),
        };
        Row { port, host_port, state, reason, inodes: self.inodes(name, port), stats: forward.stats }
    }

    fn inodes(&self, name: &ContainerName, port: NonZeroU16) -> Vec<u64> {
        let seen = self.upstream_of(name).and_then(|(_, upstream)| upstream.seen.as_ref());
        seen.map(|seen| seen.inodes(port).collect()).unwrap_or_default()
    }
}
