//! The planner of all containers: from the desired containers, their listeners, the policy and the state of the engine
//! it computes the commands for the engine. Pure: the current time is an argument.
//!
//! A port becomes a forward in three calls. [`Planner::container_entered`] gives a container its upstream.
//! [`Planner::on_engine_event`] records the listeners that the engine's watch sees in it. [`Planner::step`] judges each
//! listener by the policy (`verdict`), and opens an engine listener on the same host port (`watched`).
//!
//! All state is levels, not changes: [`Planner::step`] compares whole states, so the next observation repairs the
//! effect of a lost or doubled one, and a second step yields no commands. One port of one container has these states:
//!
//! ```text
//!           OpenListener            ListenerOpened
//!   absent ──────────────► Opening ───────────────► Open
//!     ▲                       │ │ ListenerFailed      │ not seen for LINGER, or no longer allowed: CloseListener
//!     │ no longer wanted      │ ▼                     ▼
//!     ├──────────────────── failed ◄─ still wanted  Closing
//!     │                       └─ OpenListener, RETRY later   │ ListenerClosed
//!     └──────────────────────────────────────────────────────┘
//! ```
//!
//! The engine reaches a container by an upstream. The driver has the container entered and reports the cookie of its
//! namespace ([`Planner::container_entered`]). The planner answers whether the engine has that namespace already, from
//! the time of an earlier driver, or needs it. Upstreams of an earlier driver that no container claims are removed, but
//! only after every container was tried ([`Planner::sweep`]).
//!
//! If a container has a broker, its session announces the listening ports (`announced`). They are forwarded over the
//! WebSocket if the container cannot be entered, by the rules of the wire specification: one attempt for each
//! announcement. Ports that the container reserves (`reserved`) are forwarded over either kind of upstream. Servers of
//! a sandbox with native sockets listen on the host themselves (`natives`).
//!
//! When an engine is lost, its ports are held for the containers that had them ([`PORT_HOLD`]): otherwise the order in
//! which the containers are entered again would decide which one gets a port.
//!
//! A step plans only the containers that changed (`dirty_set`). One container affects another one only through a host
//! port. So each event that frees a host port marks the containers that wait for it (`Planner::mark_port_waiters`), and
//! planning all containers would yield no further commands.
//!
//! Never: two live forwards on one host port (the first container keeps it; the second one fails with the name of the
//! first, and gets the port when it is free, always at the same number); an id used twice; a second attempt for a
//! failed port before [`RETRY`] has passed.

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
use plan::{Plan, PlannedContainer};

pub use announced::RESULT_MAX;
pub use change::{Change, ClosedReason};
pub use port_holds::PORT_HOLD;
pub use reserved::RESERVED_MAX;
pub use rows::{Row, Rows};
pub use upstreams::Admission;
pub use verdict::{Exclusion, FORWARDS_MAX};

/// The pause after a port could not be opened. Short enough for a user who has freed the port, long enough to cost
/// little.
pub const RETRY: Duration = Duration::from_secs(2);

/// How long a port stays open on the host after its server stopped listening. Dev servers try a port before they use
/// it, and close and reopen it when they restart. Meanwhile connections are reset, as on any port without a listener.
pub const LINGER: Duration = Duration::from_millis(250);

/// A container that is to be forwarded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DesiredContainer {
    /// Its name.
    pub name: ContainerName,
    /// The ports to forward.
    pub policy: Policy,
    /// Container ports that Docker publishes, and their host ports: these are not forwarded.
    pub published: BTreeMap<NonZeroU16, NonZeroU16>,
    /// Whether its servers may listen on sockets of the host, which a supervisor reports.
    pub native: bool,
}

/// The state of a running engine when a driver attaches.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inventory {
    /// Its upstreams.
    pub upstreams: Vec<UpstreamState>,
    /// Its forwards, including draining ones.
    pub forwards: Vec<ForwardState>,
    /// The listeners in those upstreams that have been read.
    pub observed: BTreeMap<UpstreamId, Vec<Listening>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Upstream {
    cookie: u64,
    /// The container behind it; `None` until a container claims what an earlier driver left.
    owner: Option<ContainerName>,
    /// The listeners inside; `None` before the first reading, and if the upstream is dialled.
    seen: Option<Observation>,
    /// Whether a broker's session dials for each connection: then the session's announcements replace the watch.
    dialled: bool,
    /// Set if it is to be removed: the reason.
    dismissed: Option<ClosedReason>,
    /// Whether the engine was given the command to remove it.
    removing: bool,
}

impl Upstream {
    /// Whether it is not to be removed, so new forwards may use it.
    fn stays(&self) -> bool {
        self.dismissed.is_none() && !self.removing
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
    /// Whether the container reserved it, at a host port that may differ from the container's.
    reserved: bool,
    status: Status,
    reach: Reach,
    /// Whether it was reported as open, so its end is reported as well.
    reported_open: bool,
    /// Since when its container port has had no listener.
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
    /// When the engine reported the failure; `None` if another container has the port.
    at: Option<Instant>,
    reason: String,
}

/// The whole state: what is desired, what was commanded, and what the engine has reported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planner {
    control_ports: ControlPorts,
    /// In the order of registration: the earlier one gets a port that two want at once.
    desired_containers: Vec<DesiredContainer>,
    /// The index of each in `desired_containers`.
    positions: BTreeMap<ContainerName, usize>,
    upstreams: BTreeMap<UpstreamId, Upstream>,
    forwards: Forwards,
    /// Failures of watched ports, by container.
    failures: BTreeMap<ContainerName, BTreeMap<NonZeroU16, Failure>>,
    /// Containers with a broker; kept when the engine is lost.
    brokers: BTreeMap<ContainerName, Broker>,
    /// Observations that the engine has sent in part.
    partial: BTreeMap<UpstreamId, Vec<Listening>>,
    sweeping: bool,
    /// Sandboxes with native sockets; kept when the engine is lost.
    natives: BTreeMap<ContainerName, natives::Natives>,
    /// Ends of native ports of containers that are no longer registered, until the next step reports them.
    retired: Vec<Change>,
    /// The containers that had a port of the lost engine and have not been planned with the next one.
    port_holds: BTreeMap<NonZeroU16, ContainerName>,
    /// When the next engine was first planned for.
    holds_since: Option<Instant>,
    /// The containers to plan.
    dirty_set: DirtySet,
    next_upstream: u32,
    next_forward: u32,
}

impl Planner {
    /// Creates a planner without containers and without an engine. No forward binds one of `control_ports`.
    pub fn new(control_ports: ControlPorts) -> Planner {
        Planner {
            control_ports,
            desired_containers: Vec::new(),
            positions: BTreeMap::new(),
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

    /// Sets the containers to forward, in the order of registration.
    pub fn desired(&mut self, desired_containers: Vec<DesiredContainer>) {
        for desired in &desired_containers {
            if self.desired_container(&desired.name) != Some(desired) {
                self.dirty_set.mark_paid(&desired.name);
            }
        }
        self.desired_containers = desired_containers;
        self.positions = self
            .desired_containers
            .iter()
            .enumerate()
            .map(|(at, desired)| (desired.name.clone(), at))
            .collect();
        self.failures.retain(|name, _| self.positions.contains_key(name));
        self.dirty_set.retain(|name| self.positions.contains_key(name));
        self.expect_natives();
    }

    /// Attaches an engine. Its upstreams have no owner until [`Planner::container_entered`] claims them, and new ids
    /// are above all that were ever used.
    pub fn attach(&mut self, inventory: Inventory) {
        let Inventory { upstreams, forwards, mut observed } = inventory;
        self.upstreams.clear();
        self.forwards.clear();
        self.failures.clear();
        self.partial.clear();
        self.sweeping = false;
        for UpstreamState { upstream, netns_cookie } in upstreams {
            let seen = observed.remove(&upstream).map(|rows| Observation::whole(&rows));
            // The session that dialled for it was another driver's, so it is useless.
            let dialled = upstreams::is_dialled(netns_cookie);
            let dismissed = dialled.then_some(ClosedReason::HostError);
            let taken =
                Upstream { cookie: netns_cookie, owner: None, seen, dialled, dismissed, removing: false };
            self.upstreams.insert(upstream, taken);
            self.next_upstream = self.next_upstream.max(upstream.0.wrapping_add(1));
        }
        for state in forwards {
            self.next_forward = self.next_forward.max(state.forward.0.wrapping_add(1));
            // A draining forward no longer holds a port.
            if state.listening {
                let taken = Forward {
                    upstream: state.upstream,
                    host_port: state.host_port,
                    target_port: state.target_port,
                    reserved: false,
                    status: Status::Open,
                    reach: state.reach,
                    reported_open: true,
                    unseen: None,
                    stats: state.stats,
                };
                self.forwards.insert(state.forward, taken);
            }
        }
        self.mark_all();
    }

    /// Marks every container, and its rows.
    fn mark_all(&mut self) {
        for desired in &self.desired_containers {
            self.dirty_set.mark(&desired.name);
            self.dirty_set.mark_stale(&desired.name);
        }
    }

    /// Detaches the engine, which has ended with all of its forwards.
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

    /// The host ports of the engine's forwards, including those that are opening or closing.
    pub fn held_ports(&self) -> BTreeSet<NonZeroU16> {
        self.forwards.all().map(|(_, forward)| forward.host_port).collect()
    }

    /// Whether a forward is open and not closing.
    pub fn is_open(&self, id: ForwardId) -> bool {
        self.forwards.get(id).is_some_and(|forward| forward.status == Status::Open)
    }

    /// Makes the next step remove what an earlier driver left and no container has claimed.
    pub fn sweep(&mut self) {
        self.sweeping = true;
    }

    /// Marks every forward as closing because the engine is stopped on purpose.
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
            reported_open: false,
            unseen: None,
            stats: ForwardStats::default(),
        };
        self.forwards.insert(forward, opening);
        Command::OpenListener { forward, upstream, host_port, target_port, reach }
    }

    /// The forwards of a container, over any upstream.
    fn forwards_of(&self, name: &ContainerName) -> impl Iterator<Item = &Forward> {
        self.upstreams_of(name)
            .into_iter()
            .flat_map(|id| self.forwards.of_upstream(id))
            .map(|(_, forward)| forward)
    }

    /// The upstreams of a container, including those that are being removed.
    fn upstreams_of(&self, name: &ContainerName) -> Vec<UpstreamId> {
        let own = self.upstreams.iter().filter(|(_, upstream)| upstream.owner.as_ref() == Some(name));
        own.map(|(id, _)| *id).collect()
    }

    /// The forwards to one container port over these upstreams.
    fn forwards_to(&self, upstreams: &[UpstreamId], target: NonZeroU16) -> impl Iterator<Item = &Forward> {
        upstreams.iter().flat_map(move |id| self.forwards.of_target(*id, target)).map(|(_, forward)| forward)
    }

    fn owner_of(&self, forward: &Forward) -> Option<&ContainerName> {
        self.upstreams.get(&forward.upstream)?.owner.as_ref()
    }

    fn desired_container(&self, name: &ContainerName) -> Option<&DesiredContainer> {
        self.desired_containers.get(*self.positions.get(name)?)
    }

    fn policy_of(&self, name: &ContainerName) -> Option<&Policy> {
        self.desired_container(name).map(|desired| &desired.policy)
    }
}

#[cfg(test)]
mod tests;
