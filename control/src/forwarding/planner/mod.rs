//! The planner of all containers: what they have listening, what may be exposed, and what the engine holds go in;
//! commands come out. Pure: time comes in as an argument.
//!
//! Everything is a level. [`Planner::step`] compares whole states, so a lost or doubled observation heals with the next
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
//! ([`Planner::reached`]); the fleet answers whether the engine has that namespace already, from the time of an earlier
//! driver, or needs it. What an earlier driver left and nobody claims is let go, but only after everybody had the
//! chance to claim it ([`Planner::sweep`]).
//!
//! Where a container has a broker, its session tells what listens (`announced`), which is forwarded over the WebSocket
//! where the container cannot be entered, by the wire's rules: one attempt for each announcement. Ports that it reserves
//! (`reserved`) are forwarded whichever way there is.
//!
//! When an engine is lost, its ports are kept for a moment for those who had them ([`PORT_HOLD`]): who is entered
//! first the next time is chance, and a port would change hands by it.
//!
//! A step plans the containers about which something changed, and no other ones (`dirty_set`). What one of them does can
//! matter to another one in one way alone: by a host port. So whatever frees a host port marks those that wait for it
//! (`Planner::wake`), and a full plan would find nothing more.
//!
//! What never happens: two live forwards on one host port (the first keeps it, the second is told the first one's name
//! and follows when the port is free, always at the same number), a number used twice, and a port that failed being
//! asked for again before [`RETRY`] has passed.

mod announced;
mod change;
mod dirty_set;
mod engine_events;
mod forwards;
mod natives;
pub mod observation;
mod plan;
mod port_holds;
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

use crate::forwarding::planner::observation::Observation;
use crate::model::port_policy::{ControlPorts, Policy};
use crate::model::registration::ContainerName;
use announced::Broker;
use dirty_set::DirtySet;
use forwards::Forwards;
use plan::{Plan, Planned};

pub use announced::OWED_MAX;
pub use change::{Change, ClosedReason};
pub use port_holds::PORT_HOLD;
pub use reserved::RESERVED_MAX;
pub use rows::{Row, Rows};
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
pub struct DesiredContainer {
    /// Its name.
    pub name: ContainerName,
    /// Which of its ports.
    pub policy: Policy,
    /// Ports inside that Docker publishes on the host, and where: they are left to it.
    pub published: BTreeMap<NonZeroU16, NonZeroU16>,
    /// Its servers may listen on sockets of the host, which a supervisor reports.
    pub native: bool,
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
pub struct Planner {
    control_ports: ControlPorts,
    /// In the order of registration: who is earlier gets a port that two want at once.
    wishes: Vec<DesiredContainer>,
    /// Where each of them is.
    places: BTreeMap<ContainerName, usize>,
    upstreams: BTreeMap<UpstreamId, Upstream>,
    forwards: Forwards,
    /// Of ports that are watched, by the container.
    failures: BTreeMap<ContainerName, BTreeMap<NonZeroU16, Failure>>,
    /// Containers with a broker; they stay when the engine is lost.
    brokers: BTreeMap<ContainerName, Broker>,
    /// Parts of observations that are still being told.
    partial: BTreeMap<UpstreamId, Vec<Listening>>,
    sweeping: bool,
    /// Sandboxes with native sockets; they stay when the engine is lost.
    natives: BTreeMap<ContainerName, natives::Natives>,
    /// Ends of native ports of containers that are not registered any more, not reported yet.
    retired: Vec<Change>,
    /// Who had which port of an engine that was lost, and has not had the chance to take it again.
    port_holds: BTreeMap<NonZeroU16, ContainerName>,
    /// When the next engine was first planned for.
    holds_since: Option<Instant>,
    /// Which containers are to be planned.
    dirty_set: DirtySet,
    next_upstream: u32,
    next_forward: u32,
}

impl Planner {
    /// A fleet without containers and without an engine. No forward binds one of `control_ports`.
    pub fn new(control_ports: ControlPorts) -> Planner {
        Planner {
            control_ports,
            wishes: Vec::new(),
            places: BTreeMap::new(),
            upstreams: BTreeMap::new(),
            forwards: Forwards::default(),
            failures: BTreeMap::new(),
            brokers: BTreeMap::new(),
            partial: BTreeMap::new(),
            sweeping: false,
            natives: BTreeMap::new(),
            retired: Vec::new(),
            port_holds: BTreeMap::new(),
            holds_since: None,
            dirty_set: DirtySet::default(),
            next_upstream: 1,
            next_forward: 1,
        }
    }

    /// Takes in what is to be forwarded, in the order of registration.
    pub fn desired(&mut self, wishes: Vec<DesiredContainer>) {
        for desired in &wishes {
            if self.wish_of(&desired.name) != Some(desired) {
                self.dirty_set.mark_paid(&desired.name);
            }
        }
        self.wishes = wishes;
        self.places =
            self.wishes.iter().enumerate().map(|(at, desired)| (desired.name.clone(), at)).collect();
        self.failures.retain(|name, _| self.places.contains_key(name));
        self.dirty_set.retain(|name| self.places.contains_key(name));
        self.expect_natives();
    }

    /// Takes over an engine. Nothing of it belongs to anybody until [`Planner::reached`] says so, and numbers continue
    /// above all that were ever used.
    pub fn attach(&mut self, inventory: Inventory) {
        let Inventory { upstreams, forwards, mut observed } = inventory;
        self.upstreams.clear();
        self.forwards.clear();
        self.failures.clear();
        self.partial.clear();
        self.sweeping = false;
        for UpstreamState { upstream, netns_cookie } in upstreams {
            let seen = observed.remove(&upstream).map(|rows| Observation::whole(&rows));
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
        self.mark_all();
    }

    /// Every container is to be planned, and its rows are to be read again.
    fn mark_all(&mut self) {
        for desired in &self.wishes {
            self.dirty_set.mark(&desired.name);
            self.dirty_set.mark_stale(&desired.name);
        }
    }

    /// The engine is gone, and everything that it held.
    pub fn detach(&mut self) -> Vec<Change> {
        self.keep_port_holds();
        let ids: Vec<ForwardId> = self.forwards.all().map(|(id, _)| id).collect();
        let changes = ids.into_iter().filter_map(|id| self.forget(id, ClosedReason::HostError)).collect();
        self.upstreams.clear();
        self.failures.clear();
        self.partial.clear();
        self.sweeping = false;
        self.mark_all();
        changes
    }

    /// The ports of the host that the engine has, or is about to have.
    pub fn held_ports(&self) -> BTreeSet<NonZeroU16> {
        self.forwards.all().map(|(_, forward)| forward.host_port).collect()
    }

    /// Whether a forward listens, as far as is known, and is to go on.
    pub fn is_open(&self, id: ForwardId) -> bool {
        self.forwards.get(id).is_some_and(|forward| forward.status == Status::Open)
    }

    /// Everybody had the chance to claim what an earlier driver left: the rest is let go of.
    pub fn sweep(&mut self) {
        self.sweeping = true;
    }

    /// From now on every port that closes does so because the engine is stopped on purpose.
    pub fn stop(&mut self) {
        let ids: Vec<ForwardId> = self.forwards.all().map(|(id, _)| id).collect();
        for id in ids {
            if let Some(forward) = self.forwards.get_mut(id) {
                forward.status = Status::Closing { why: ClosedReason::BrokerStopped };
            }
        }
        self.mark_all();
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
        self.upstreams_of(name)
            .into_iter()
            .flat_map(|id| self.forwards.of_upstream(id))
            .map(|(_, forward)| forward)
    }

    /// The upstreams of a container, those that it is leaving included.
    fn upstreams_of(&self, name: &ContainerName) -> Vec<UpstreamId> {
        let own = self.upstreams.iter().filter(|(_, upstream)| upstream.owner.as_ref() == Some(name));
        own.map(|(id, _)| *id).collect()
    }

    /// The forwards to one port inside, over any of these upstreams.
    fn forwards_to(&self, upstreams: &[UpstreamId], target: NonZeroU16) -> impl Iterator<Item = &Forward> {
        upstreams.iter().flat_map(move |id| self.forwards.of_target(*id, target)).map(|(_, forward)| forward)
    }

    fn owner_of(&self, forward: &Forward) -> Option<&ContainerName> {
        self.upstreams.get(&forward.upstream)?.owner.as_ref()
    }

    fn wish_of(&self, name: &ContainerName) -> Option<&DesiredContainer> {
        self.wishes.get(*self.places.get(name)?)
    }

    fn policy_of(&self, name: &ContainerName) -> Option<&Policy> {
        self.wish_of(name).map(|desired| &desired.policy)
    }
}

#[cfg(test)]
mod tests;
