//! The holds on the ports of a lost engine. Pure.

use std::num::NonZeroU16;
use std::time::{Duration, Instant};

use super::Planner;
use crate::model::registration::ContainerName;

/// The duration of a hold on a port of a lost engine. Entering a container takes milliseconds.
pub const PORT_HOLD: Duration = Duration::from_secs(3);

impl Planner {
    /// Records the current owner of each port.
    pub(super) fn keep_port_holds(&mut self) {
        for (_, forward) in self.forwards.all().filter(|(_, forward)| forward.is_live()) {
            let upstream = self.upstreams.get(&forward.upstream);
            if let Some(owner) = upstream.and_then(|upstream| upstream.owner.clone()) {
                self.port_holds.insert(forward.host_port, owner);
            }
        }
        self.holds_since = None;
    }

    /// Removes the holds of containers that have their port again, do not want it, or did not come in time.
    pub(super) fn release_port_holds(&mut self, now: Instant) {
        if self.port_holds.is_empty() {
            self.holds_since = None;
            return;
        }
        let since = *self.holds_since.get_or_insert(now);
        let is_late = now.saturating_duration_since(since) >= PORT_HOLD;
        let mut port_holds = std::mem::take(&mut self.port_holds);
        let gone = port_holds.extract_if(.., |port, name| {
            let is_desired = self.desired_container(name).is_some();
            let held = self.forwards.at_host_port(*port).is_some();
            is_late || !is_desired || held || self.wants(name, *port) == Some(false)
        });
        let gone: Vec<NonZeroU16> = gone.map(|(port, _)| port).collect();
        self.port_holds = port_holds;
        gone.into_iter().for_each(|port| self.mark_port_waiters(port));
        if self.port_holds.is_empty() {
            self.holds_since = None;
        }
    }

    /// Whether a container wants a host port; `None` while that is not known. A port beyond the quota counts as wanted,
    /// since a hold is short.
    fn wants(&self, name: &ContainerName, port: NonZeroU16) -> Option<bool> {
        if self.holds_reserved(name, port) {
            return Some(true);
        }
        let (_, upstream) = self.upstream_of(name)?;
        if upstream.dialled {
            return Some(self.waits_for(name, port));
        }
        let seen = upstream.seen.as_ref()?;
        let desired = self.desired_container(name)?;
        let is_forwarded =
            !desired.published.contains_key(&port) && self.judge(&desired.policy, port).is_ok();
        Some(is_forwarded && seen.at(port).is_some())
    }
}
