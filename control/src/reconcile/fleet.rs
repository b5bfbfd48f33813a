//! The planner of all containers: what they have listening, what may be exposed, and what the engine holds go in;
//! commands come out. Pure: time comes in as an argument.
//!
//! Everything is a level. [`Fleet::step`] compares whole states, so a lost or doubled observation heals with the next
//! one, and stepping again yields nothing. One port of one container goes through these states:
//!
//! ```text
//!          OpenListener            ListenerOpened
//!  absent ──────────────► Opening ───────────────► Open
//!    ▲                       │ │ ListenerFailed      │ not seen for LINGER, or no longer allowed: CloseListener
//!    │ no longer wanted      │ ▼                     ▼
//!    ├──────────────────── failed ◄─ still wanted  Closing
//!    │                       └─ OpenListener, RETRY later   │ ListenerClosed
//!    └──────────────────────────────────────────────────────┘
//! ```
//!
//! A container is reached by an upstream of the engine. The shell enters the container and says with which cookie
//! ([`Fleet::reached`]); the fleet answers whether the engine has that namespace already, from the time of an earlier
//! driver, or needs it. What an earlier driver left and nobody claims is let go, but only after everybody had the
//! chance to claim it ([`Fleet::sweep`]).
//!
//! Where a container has a broker, its session tells what listens (`announced`), which is forwarded over the WebSocket
//! where the container cannot be entered, by the wire's rules: one attempt for each announcement. Ports that it reserves
//! (`reserved`) are forwarded whichever way there is.
//!
//! When an engine is lost, its ports are kept for a moment for those who had them ([`HEIR_PATIENCE`]): who is entered
//! first the next time is chance, and a port would change hands by it.
//!
//! What never happens: two live forwards on one host port (the first keeps it, the second is told the first one's name
//! and follows when the port is free, always at the same number), a number used twice, and a port that failed being
//! asked for again before [`RETRY`] has passed.

mod announced;
mod answers;
mod change;
mod heirs;
mod reserved;
mod rows;
mod upstreams;
mod verdict;
mod watched;

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU16;
use std::time::{Duration, Instant};

use landfall_engine::command::{
    Command, ForwardId, ForwardState, ForwardStats, Listening, Reach, UpstreamId, UpstreamState,
};

use super::observation::Observation;
use crate::policy::{ControlPorts, Policy};
use crate::registration::model::ContainerName;
use announced::Broker;

pub use announced::OWED_MAX;
pub use change::{Change, ClosedReason};
pub use heirs::HEIR_PATIENCE;
pub use reserved::RESERVED_MAX;
pub use rows::Row;
pub use upstreams::Admission;
pub use verdict::{Exclusion, FORWARDS_MAX};

/// How long a port that could not be opened rests. Short enough that a freed port feels as if it were taken at once,
/// long enough to cost nothing.
pub const RETRY: Duration = Duration::from_secs(2);

/// How long a port stays open on the host after its server ceased to listen. Dev servers try a port before they use it,
/// and close and reopen it when they restart; meanwhile a client is reset, as by any port on which nothing listens.
pub const LINGER: Duration = Duration::from_millis(250);

/// A container that is to be forwarded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wish {
    /// Its name.
    pub name: ContainerName,
    /// Which of its ports.
    pub policy: Policy,
    /// Ports inside that Docker publishes on the host, and where: they are left to it.
    pub published: BTreeMap<NonZeroU16, NonZeroU16>,
}

/// What an engine holds when a driver arrives.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inventory {
    /// Its upstreams.
    pub upstreams: Vec<UpstreamState>,
    /// Its forwards, those that drain included.
    pub forwards: Vec<ForwardState>,
    /// What listens in those upstreams that have been read.
    pub observed: BTreeMap<UpstreamId, Vec<Listening>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Upstream {
    cookie: u64,
    /// The container behind it; none while nobody has claimed what an earlier driver left.
    owner: Option<ContainerName>,
    /// What listens inside; none before the first reading, and where nothing is watched.
    seen: Option<Observation>,
    /// The driver dials for each connection: what listens is what a broker's session announced.
    dialled: bool,
    /// It is to be removed, and why.
    dismissed: Option<ClosedReason>,
    /// The engine was told to remove it.
    leaving: bool,
}

impl Upstream {
    /// Whether it is there to stay: new connections may be led over it.
    fn stays(&self) -> bool {
        self.dismissed.is_none() && !self.leaving
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    Opening,
    Open,
    Closing { why: ClosedReason },
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Forward {
    upstream: UpstreamId,
    host_port: NonZeroU16,
    target_port: NonZeroU16,
    /// The container asked for it, and for no host port in particular.
    reserved: bool,
    status: Status,
    reach: Reach,
    /// Whether it ever answered, so that its end is worth telling.
    told: bool,
    /// Since when nothing listens behind it.
    unseen: Option<Instant>,
    stats: ForwardStats,
}

impl Forward {
    fn is_live(&self) -> bool {
        matches!(self.status, Status::Opening | Status::Open)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Failure {
    /// When the engine said so; none for a port that another container has.
    at: Option<Instant>,
    reason: String,
}

/// Everything that is known, asked for and answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fleet {
    control_ports: ControlPorts,
    /// In the order of registration: who is earlier gets a port that two want at once.
    wishes: Vec<Wish>,
    upstreams: BTreeMap<UpstreamId, Upstream>,
    forwards: BTreeMap<ForwardId, Forward>,
    /// Of ports that are watched.
    failures: BTreeMap<(ContainerName, NonZeroU16), Failure>,
    /// Containers with a broker; they stay when the engine is lost.
    brokers: BTreeMap<ContainerName, Broker>,
    /// Parts of observations that are still being told.
    partial: BTreeMap<UpstreamId, Vec<Listening>>,
    sweeping: bool,
    /// Who had which port of an engine that was lost, and has not had the chance to take it again.
    heirs: BTreeMap<NonZeroU16, ContainerName>,
    /// When the next engine was first planned for.
    heirs_since: Option<Instant>,
    next_upstream: u32,
    next_forward: u32,
}

impl Fleet {
    /// A fleet without containers and without an engine. No forward binds one of `control_ports`.
    pub fn new(control_ports: ControlPorts) -> Fleet {
        Fleet {
            control_ports,
            wishes: Vec::new(),
            upstreams: BTreeMap::new(),
            forwards: BTreeMap::new(),
            failures: BTreeMap::new(),
            brokers: BTreeMap::new(),
            partial: BTreeMap::new(),
            sweeping: false,
            heirs: BTreeMap::new(),
            heirs_since: None,
            next_upstream: 1,
            next_forward: 1,
        }
    }

    /// Takes in what is to be forwarded, in the order of registration.
    pub fn wish(&mut self, wishes: Vec<Wish>) {
        self.wishes = wishes;
        let wishes = &self.wishes;
        self.failures.retain(|(name, _), _| wishes.iter().any(|wish| wish.name == *name));
    }

    /// Takes over an engine. Nothing of it belongs to anybody until [`Fleet::reached`] says so, and numbers continue
    /// above all that were ever used.
    pub fn attach(&mut self, inventory: Inventory) {
        let Inventory { upstreams, forwards, mut observed } = inventory;
        self.upstreams.clear();
        self.forwards.clear();
        self.failures.clear();
        self.partial.clear();
        self.sweeping = false;
        for UpstreamState { upstream, netns_cookie } in upstreams {
            let seen = observed.remove(&upstream).map(Observation::whole);
            // Whoever dialled for it is gone, so it leads nowhere.
            let dialled = upstreams::is_dialled(netns_cookie);
            let dismissed = dialled.then_some(ClosedReason::HostError);
            let taken =
                Upstream { cookie: netns_cookie, owner: None, seen, dialled, dismissed, leaving: false };
            self.upstreams.insert(upstream, taken);
            self.next_upstream = self.next_upstream.max(upstream.0.wrapping_add(1));
        }
        for state in forwards {
            self.next_forward = self.next_forward.max(state.forward.0.wrapping_add(1));
            // One that drains no longer holds a port.
            if state.listening {
                let taken = Forward {
                    upstream: state.upstream,
                    host_port: state.host_port,
                    target_port: state.target_port,
                    reserved: false,
                    status: Status::Open,
                    reach: state.reach,
                    told: true,
                    unseen: None,
                    stats: state.stats,
                };
                self.forwards.insert(state.forward, taken);
            }
        }
    }

    /// The engine is gone, and everything that it held.
    pub fn detach(&mut self) -> Vec<Change> {
        self.note_heirs();
        let ids: Vec<ForwardId> = self.forwards.keys().copied().collect();
        let changes = ids.into_iter().filter_map(|id| self.forget(id, ClosedReason::HostError)).collect();
        self.upstreams.clear();
        self.failures.clear();
        self.partial.clear();
        self.sweeping = false;
        changes
    }

    /// The ports of the host that the engine has, or is about to have.
    pub fn held_ports(&self) -> BTreeSet<NonZeroU16> {
        self.forwards.values().map(|forward| forward.host_port).collect()
    }

    /// Whether a forward listens, as far as is known, and is to go on.
    pub fn is_open(&self, id: ForwardId) -> bool {
        self.forwards.get(&id).is_some_and(|forward| forward.status == Status::Open)
    }

    /// Everybody had the chance to claim what an earlier driver left: the rest is let go of.
    pub fn sweep(&mut self) {
        self.sweeping = true;
    }

    /// From now on every port that closes does so because the engine is stopped on purpose.
    pub fn stop(&mut self) {
        for forward in self.forwards.values_mut() {
            forward.status = Status::Closing { why: ClosedReason::BrokerStopped };
        }
    }

    /// The commands that close the gap between what is wanted and what was asked for already, and what somebody is to be
    /// told. They count as asked for from now on.
    pub fn step(&mut self, now: Instant) -> (Vec<Command>, Vec<Change>) {
        let mut commands = Vec::new();
        let mut changes = Vec::new();
        self.dismiss(&mut commands);
        let names: Vec<ContainerName> = self.wishes.iter().map(|wish| wish.name.clone()).collect();
        for name in &names {
            self.reserve_all(name, now, &mut commands, &mut changes);
        }
        let verdicts = self.verdicts();
        self.settle_heirs(&verdicts, now);
        self.close_watched(&verdicts, now, &mut commands);
        self.close_announced(&mut commands);
        for name in &names {
            let Some((upstream, _)) = self.upstream_of(name) else { continue };
            match verdicts.get(&upstream) {
                Some(ports) => self.open_watched(name, upstream, ports, now, &mut commands, &mut changes),
                None => self.open_announced(name, upstream, &mut commands, &mut changes),
            }
        }
        self.pay(now, &mut changes);
        (commands, changes)
    }

    /// When stepping will yield something by itself: a failed port is due, or one has lingered.
    pub fn due(&self) -> Option<Instant> {
        // A port that is held by any forward waits for the engine's word, not for the time.
        let held = |port: NonZeroU16| self.forwards.values().any(|forward| forward.host_port == port);
        let retries = self.failures.iter().filter(|((_, port), _)| !held(*port));
        let retries = retries.filter_map(|(_, failure)| failure.at).map(|at| at + RETRY);
        let lingering = self.forwards.values().filter(|forward| forward.is_live());
        let lingering = lingering.filter_map(|forward| forward.unseen).map(|since| since + LINGER);
        let heirs = self.heirs_since.map(|since| since + HEIR_PATIENCE);
        let reserved = self.reserved_retries().filter(|(port, _)| !held(*port)).map(|(_, at)| at);
        retries.chain(lingering).chain(heirs).chain(reserved).chain(self.debts_due()).min()
    }

    fn open_one(
        &mut self,
        upstream: UpstreamId,
        host_port: NonZeroU16,
        target_port: NonZeroU16,
        reach: Reach,
        reserved: bool,
    ) -> Command {
        let forward = ForwardId(self.next_forward);
        self.next_forward = self.next_forward.wrapping_add(1);
        let opening = Forward {
            upstream,
            host_port,
            target_port,
            reserved,
            status: Status::Opening,
            reach,
            told: false,
            unseen: None,
            stats: ForwardStats::default(),
        };
        self.forwards.insert(forward, opening);
        Command::OpenListener { forward, upstream, host_port, target_port, reach }
    }

    /// Those forwards that lead into a container, over whatever upstream.
    fn forwards_of(&self, name: &ContainerName) -> impl Iterator<Item = &Forward> {
        self.forwards.values().filter(move |forward| self.owner_of(forward) == Some(name))
    }

    fn owner_of(&self, forward: &Forward) -> Option<&ContainerName> {
        self.upstreams.get(&forward.upstream)?.owner.as_ref()
    }

    fn policy_of(&self, name: &ContainerName) -> Option<&Policy> {
        self.wishes.iter().find(|wish| wish.name == *name).map(|wish| &wish.policy)
    }
}

#[cfg(test)]
#[path = "fleet/tests.rs"]
mod tests;
