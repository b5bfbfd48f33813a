//! What is to be done about each port that listens: left to Docker where that publishes it, then the guard that no policy can
//! lift, then the policy, then the quota.

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroU16;

use landfall_engine::command::{Reach, UpstreamId};

use super::{Fleet, Upstream};
use crate::policy::{CONTAINER_PORT, Decision, DenyReason, Policy};

/// How many ports of one container are forwarded. A dev server has a handful; a program that listens on thousands is a
/// mistake or an attack, and may not have all of the host's ports.
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
    /// Docker has it answer at this port of the host; what people are told of that.
    Published(NonZeroU16, &'static str),
}

/// What people are told of a port that Docker publishes.
const PUBLISHED: &str = "Docker publishes it";
/// The same where that leads nowhere: a published port ends at the container's address in its network.
const PUBLISHED_IN_VAIN: &str = "Docker publishes it, but inside it listens on loopback alone, which Docker does not reach: have it listen on 0.0.0.0, or do not publish it";

impl Fleet {
    /// What is to become of every port that listens, for each upstream that stays, is watched and has been read.
    pub(super) fn verdicts(&self) -> BTreeMap<UpstreamId, BTreeMap<NonZeroU16, Verdict>> {
        let staying = self.upstreams.iter().filter(|(_, upstream)| !upstream.leaving);
        staying.filter_map(|(id, upstream)| Some((*id, self.verdicts_of(*id, upstream)?))).collect()
    }

    pub(super) fn verdicts_of(
        &self,
        id: UpstreamId,
        upstream: &Upstream,
    ) -> Option<BTreeMap<NonZeroU16, Verdict>> {
        let owner = upstream.owner.as_ref().filter(|_| !upstream.dialled)?;
        let wish = self.wishes.iter().find(|wish| wish.name == *owner)?;
        let seen = upstream.seen.as_ref()?;
        let verdict = |port, reach| {
            let published = wish.published.get(&port).filter(|_| port.get() != CONTAINER_PORT);
            match published {
                Some(host_port) if seen.is_on_loopback_alone(port) => {
                    Verdict::Published(*host_port, PUBLISHED_IN_VAIN)
                }
                Some(host_port) => Verdict::Published(*host_port, PUBLISHED),
                None => self.verdict(&wish.policy, port, reach),
            }
        };
        let mut verdicts: BTreeMap<NonZeroU16, Verdict> =
            seen.reach().into_iter().map(|(port, reach)| (port, verdict(port, reach))).collect();
        // Those that are open already come before those that would be new.
        let open = |port: &NonZeroU16| {
            let own = |forward: &super::Forward| forward.upstream == id && forward.target_port == *port;
            self.forwards.values().any(|forward| own(forward) && forward.is_live())
        };
        let wanted = verdicts.iter().filter(|(_, verdict)| matches!(verdict, Verdict::Wanted(_)));
        let mut wanted: Vec<NonZeroU16> = wanted.map(|(port, _)| *port).collect();
        let most = FORWARDS_MAX.saturating_sub(self.reserved_count(owner));
        if wanted.len() > most {
            wanted.sort_by_key(|port| (!open(port), *port));
            for port in wanted.split_off(most) {
                verdicts.insert(port, Verdict::Denied(Exclusion::Quota));
            }
        }
        Some(verdicts)
    }

    fn verdict(&self, policy: &Policy, port: NonZeroU16, reach: Reach) -> Verdict {
        self.judge(policy, port).map_or_else(Verdict::Denied, |()| Verdict::Wanted(reach))
    }

    /// Whether a port may be forwarded to the same port of the host.
    pub(super) fn judge(&self, policy: &Policy, port: NonZeroU16) -> Result<(), Exclusion> {
        match policy.decide(port, &self.control_ports) {
            Decision::Allow => Ok(()),
            Decision::Deny(reason) => Err(Exclusion::Policy(reason)),
        }
    }
}
