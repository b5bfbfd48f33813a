//! Whose the ports of a lost engine were.

use std::collections::BTreeMap;
use std::num::NonZeroU16;
use std::time::{Duration, Instant};

use landfall_engine::command::UpstreamId;

use super::Fleet;
use super::verdict::Verdict;
use crate::registration::model::ContainerName;

/// How long a port of a lost engine is kept for the container that had it. Entering one takes milliseconds.
pub const HEIR_PATIENCE: Duration = Duration::from_secs(3);

impl Fleet {
    /// Notes who has which port just now.
    pub(super) fn note_heirs(&mut self) {
        for forward in self.forwards.values().filter(|forward| forward.is_live()) {
            let upstream = self.upstreams.get(&forward.upstream);
            if let Some(owner) = upstream.and_then(|upstream| upstream.owner.clone()) {
                self.heirs.insert(forward.host_port, owner);
            }
        }
        self.heirs_since = None;
    }

    /// Strikes off those who have their port again, do not want it any more, or did not come in time.
    pub(super) fn settle_heirs(
        &mut self,
        verdicts: &BTreeMap<UpstreamId, BTreeMap<NonZeroU16, Verdict>>,
        now: Instant,
    ) {
        if self.heirs.is_empty() {
            self.heirs_since = None;
            return;
        }
        let since = *self.heirs_since.get_or_insert(now);
        let mut heirs = std::mem::take(&mut self.heirs);
        heirs.retain(|port, name| {
            let wished = self.wishes.iter().any(|wish| wish.name == *name);
            let wants = self.wants(name, *port, verdicts).unwrap_or(true);
            let held = self.forwards.values().any(|forward| forward.host_port == *port);
            wished && wants && !held && now.saturating_duration_since(since) < HEIR_PATIENCE
        });
        self.heirs = heirs;
        if self.heirs.is_empty() {
            self.heirs_since = None;
        }
    }

    /// Whether a container wants a host port; none as long as that is not known.
    fn wants(
        &self,
        name: &ContainerName,
        port: NonZeroU16,
        verdicts: &BTreeMap<UpstreamId, BTreeMap<NonZeroU16, Verdict>>,
    ) -> Option<bool> {
        if self.holds_reserved(name, port) {
            return Some(true);
        }
        let (upstream, _) = self.upstream_of(name)?;
        if self.dialled(name).is_some() {
            return Some(self.waits_for(name, port));
        }
        let ports = verdicts.get(&upstream)?;
        Some(matches!(ports.get(&port), Some(Verdict::Wanted(_))))
    }
}
