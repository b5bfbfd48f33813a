//! The verdict about each listening port. In this order: a port that Docker publishes is left to Docker; then the
//! guard, which no policy overrides; then the policy; then the quota. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::num::NonZeroU16;

use landfall_engine::command::Reach;

use super::Planner;
use crate::forwarding::planner::observation::Listeners;
use crate::model::port_policy::{CONTAINER_PORT, Decision, DenyReason, Policy};
use crate::model::registration::ContainerName;

/// The most ports of one container that are forwarded. A dev server has a handful; a program that listens on thousands
/// is a mistake or an attack, and must not take all of the host's ports.
pub const FORWARDS_MAX: usize = 256;

/// The reason that a port of a container is not forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exclusion {
    /// The policy denies it.
    Policy(DenyReason),
    /// The container has [`FORWARDS_MAX`] forwards.
    Quota,
}

impl fmt::Display for Exclusion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Exclusion::Policy(reason) => reason.fmt(f),
            Exclusion::Quota => write!(f, "{FORWARDS_MAX} ports of this container are forwarded already"),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Wanted(Reach),
    Denied(Exclusion),
    /// Docker publishes it at this host port; with the reason to show.
    Published(NonZeroU16, &'static str),
}

/// The reason shown for a port that Docker publishes.
const PUBLISHED: &str = "Docker publishes it";
/// The reason if the published port cannot be reached: it leads to the container's address in its Docker network.
const PUBLISHED_IN_VAIN: &str = "Docker publishes it, but the server listens on loopback alone, which Docker does not reach: let it listen on 0.0.0.0, or do not publish the port";

impl Planner {
    /// Judges every listening port of a container that is watched and has been read, in time `n log n` for `n` ports.
    pub(super) fn verdicts_of(&self, name: &ContainerName) -> Option<BTreeMap<NonZeroU16, Verdict>> {
        let (id, upstream) = self.upstream_of(name).filter(|(_, upstream)| !upstream.dialled)?;
        let desired = self.desired_container(name)?;
        let seen = upstream.seen.as_ref()?;
        let verdict = |port: NonZeroU16, listeners: &Listeners| {
            let published = desired.published.get(&port).filter(|_| port.get() != CONTAINER_PORT);
            match published {
                Some(host_port) if listeners.are_on_loopback_alone() => {
                    Verdict::Published(*host_port, PUBLISHED_IN_VAIN)
                }
                Some(host_port) => Verdict::Published(*host_port, PUBLISHED),
                None => match self.judge(&desired.policy, port) {
                    Ok(()) => Verdict::Wanted(listeners.reach()),
                    Err(why) => Verdict::Denied(why),
                },
            }
        };
        let relayed = seen.ports().filter(|(port, listeners)| !self.is_native(name, *port, listeners));
        let mut verdicts: BTreeMap<NonZeroU16, Verdict> =
            relayed.map(|(port, listeners)| (port, verdict(port, listeners))).collect();
        let wanted = verdicts.iter().filter(|(_, verdict)| matches!(verdict, Verdict::Wanted(_)));
        let mut wanted: Vec<NonZeroU16> = wanted.map(|(port, _)| *port).collect();
        let most = FORWARDS_MAX.saturating_sub(self.reserved_count(name) + self.native_count(name));
        if wanted.len() > most {
            // Open ports precede new ones.
            let live = self.forwards.of_upstream(id).filter(|(_, forward)| forward.is_live());
            let open: BTreeSet<NonZeroU16> = live.map(|(_, forward)| forward.target_port).collect();
            wanted.sort_by_cached_key(|port| (!open.contains(port), *port));
            for port in wanted.split_off(most) {
                verdicts.insert(port, Verdict::Denied(Exclusion::Quota));
            }
        }
        Some(verdicts)
    }

    /// Whether a port may be forwarded to the same host port.
    pub(super) fn judge(&self, policy: &Policy, port: NonZeroU16) -> Result<(), Exclusion> {
        match policy.decide(port, &self.control_ports) {
            Decision::Allow => Ok(()),
            Decision::Deny(reason) => Err(Exclusion::Policy(reason)),
        }
    }
}
