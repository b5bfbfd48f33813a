//! What is told of a container's ports.

use std::num::NonZeroU16;

use landfall_engine::command::{ForwardStats, UpstreamId};

use super::{Fleet, Forward, Status, Verdict};
use crate::reconcile::table::RowState;
use crate::registration::model::ContainerName;

/// One port that listens inside, or whose forward has not ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// The port, inside and on the host.
    pub port: NonZeroU16,
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
        let own = |upstream: &UpstreamId| {
            self.upstreams.get(upstream).is_some_and(|upstream| upstream.owner.as_ref() == Some(name))
        };
        let mut rows: Vec<Row> = self
            .forwards
            .values()
            .filter(|forward| own(&forward.upstream))
            .map(|forward| self.row_of(name, forward))
            .collect();
        let verdicts = self.upstream_of(name).and_then(|id| self.verdicts_of(id, self.upstreams.get(&id)?));
        let verdicts = verdicts.unwrap_or_default();
        for (port, verdict) in verdicts {
            if rows.iter().any(|row| row.port == port) {
                continue;
            }
            let failure = self.failures.get(&(name.clone(), port));
            let (state, reason) = match (verdict, failure) {
                (Verdict::Denied(reason), _) => (RowState::Denied, Some(reason.to_owned())),
                (Verdict::Wanted(_), Some(failure)) => (RowState::Failed, Some(failure.reason.clone())),
                (Verdict::Wanted(_), None) => (RowState::Opening, None),
            };
            rows.push(Row {
                port,
                state,
                reason,
                inodes: self.inodes(name, port),
                stats: ForwardStats::default(),
            });
        }
        rows.sort_by_key(|row| row.port);
        rows
    }

    /// The host ports that answer for a container.
    pub fn open_ports(&self, name: &ContainerName) -> Vec<NonZeroU16> {
        let rows = self.rows(name).into_iter();
        rows.filter(|row| row.state == RowState::Open).map(|row| row.port).collect()
    }

    fn row_of(&self, name: &ContainerName, forward: &Forward) -> Row {
        let port = forward.host_port;
        let failure = self.failures.get(&(name.clone(), port)).map(|failure| failure.reason.clone());
        let (state, reason) = match (forward.status, failure) {
            // Asked for once more; until that is answered, what is known is that it failed.
            (Status::Opening, Some(reason)) => (RowState::Failed, Some(reason)),
            (Status::Opening, None) => (RowState::Opening, None),
            (Status::Open, _) => (RowState::Open, None),
            (Status::Closing { .. }, _) => (RowState::Closing, None),
        };
        Row { port, state, reason, inodes: self.inodes(name, port), stats: forward.stats }
    }

    fn inodes(&self, name: &ContainerName, port: NonZeroU16) -> Vec<u64> {
        let seen = self.upstream_of(name).and_then(|id| self.upstreams.get(&id)?.seen.as_ref());
        seen.map(|seen| seen.inodes(port).collect()).unwrap_or_default()
    }
}
