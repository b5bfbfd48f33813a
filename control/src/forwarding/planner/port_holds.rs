//! Whose the ports of a lost engine were. Pure.

use std::num::NonZeroU16;
use std::time::{Duration, Instant};

use super::Fleet;
use crate::model::registration::ContainerName;

/// How long a port of a lost engine is kept for the container that had it. Entering one takes milliseconds.
pub const HEIR_PATIENCE: Duration = Duration::from_secs(3);

impl Fleet {
    /// Notes who has which port just now.
    pub(super) fn note_heirs(&mut self) {
        for (_, forward) in self.forwards.all().filter(|(_, forward)| forward.is_live()) {
            let upstream = self.upstreams.get(&forward.upstream);
            if let Some(owner) = upstream.and_then(|upstream| upstream.owner.clone()) {
                self.heirs.insert(forward.host_port, owner);
            }
        }
        self.heirs_since = None;
    }

    /// Strikes off those who have their port again, do not want it any more, or did not come in time.
    pub(super) fn settle_heirs(&mut self, now: Instant) {
        if self.heirs.is_empty() {
            self.heirs_since = None;
            return;
        }
        let since = *self.heirs_since.get_or_insert(now);
        let is_late = now.saturating_duration_since(since) >= HEIR_PATIENCE;
        let mut heirs = std::mem::take(&mut self.heirs);
        let gone = heirs.extract_if(.., |port, name| {
            let wished = self.wish_of(name).is_some();
            let held = self.forwards.at_host_port(*port).is_some();
            is_late || !wished || held || self.wants(name, *port) == Some(false)
        });
        let gone: Vec<NonZeroU16> = gone.map(|(port, _)| port).collect();
        self.heirs = heirs;
        gone.into_iter().for_each(|port| self.wake(port));
        if self.heirs.is_empty() {
            self.heirs_since = None;
        }
    }

    /// Whether a container wants a host port; none as long as that is not known. A port beyond the quota counts as wanted: that
    /// is for a moment.
    fn wants(&self, name: &ContainerName, port: NonZeroU16) -> Option<bool> {
        if self.holds_reserved(name, port) {
            return Some(true);
        }
        let (_, upstream) = self.upstream_of(name)?;
        if upstream.dialled {
            return Some(self.waits_for(name, port));
        }
        let seen = upstream.seen.as_ref()?;
        let wish = self.wish_of(name)?;
        let is_forwarded = !wish.published.contains_key(&port) && self.judge(&wish.policy, port).is_ok();
        Some(is_forwarded && seen.at(port).is_some())
    }
}
