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
//! When an engine is lost, its ports are kept for a moment for those who had them ([`HEIR_PATIENCE`]): who is entered
//! first the next time is chance, and a port would change hands by it.
//!
//! What never happens: two live forwards on one host port (the first keeps it, the second is told the first one's name
//! and follows when the port is free, always at the same number), a number used twice, and a port that failed being
//! asked for again before [`RETRY`] has passed.

mod answers;
mod rows;
mod verdict;

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU16;
use std::time::{Duration, Instant};

use landfall_engine::command::{
    Command, Ending, ForwardId, ForwardState, ForwardStats, Listening, Reach, UpstreamId, UpstreamState,
};

use super::observation::Observation;
use crate::policy::Policy;
use crate::registration::model::ContainerName;
use verdict::Verdict;

pub use rows::Row;
pub use verdict::{CONTAINER_PORT, FORWARDS_MAX};

/// How long a port that could not be opened rests. Short enough that a freed port feels as if it were taken at once,
/// long enough to cost nothing.
pub const RETRY: Duration = Duration::from_secs(2);

/// How long a port stays open on the host after its server ceased to listen. Dev servers try a port before they use it,
/// and close and reopen it when they restart; meanwhile a client is reset, as by any port on which nothing listens.
pub const LINGER: Duration = Duration::from_millis(250);

/// How long a port of a lost engine is kept for the container that had it. Entering one takes milliseconds.
pub const HEIR_PATIENCE: Duration = Duration::from_secs(3);

/// A container that is to be forwarded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wish {
    /// Its name.
    pub name: ContainerName,
    /// Which of its ports.
    pub policy: Policy,
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

/// What becomes of a container that was entered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Admission {
    /// The engine has its namespace already.
    Known(UpstreamId),
    /// The engine is to be given its namespace, under this number.
    Add(UpstreamId),
    /// Its namespace is that of another container.
    Shared(ContainerName),
    /// Nobody wants it any more.
    Unwanted,
}

/// Why a port no longer answers; the texts are those of the wire specification, A.13.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClosedReason {
    /// Nothing listens inside any more, or it may not be exposed any more.
    ContainerReleased,
    /// The container or the engine went away.
    HostError,
    /// The container is no longer registered.
    Deregistered,
    /// The engine is stopped on purpose.
    BrokerStopped,
}

impl ClosedReason {
    /// The wire's word.
    pub fn as_str(self) -> &'static str {
        match self {
            ClosedReason::ContainerReleased => "container-released",
            ClosedReason::HostError => "host-error",
            ClosedReason::Deregistered => "deregistered",
            ClosedReason::BrokerStopped => "broker-stopped",
        }
    }
}

/// What changed, as far as somebody is told of it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields say what they are")]
pub enum Change {
    /// The port answers on the host; `bind` is where its server listens.
    Opened { name: ContainerName, port: NonZeroU16, bind: &'static str },
    /// It no longer does.
    Closed { name: ContainerName, port: NonZeroU16, why: ClosedReason },
    /// It could not be opened. Told once, however often it is tried again.
    Failed { name: ContainerName, port: NonZeroU16, reason: String },
    /// The engine let go of a container that it was not told to let go of.
    Lost { name: ContainerName, reason: String },
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Upstream {
    cookie: u64,
    /// The container behind it; none while nobody has claimed what an earlier driver left.
    owner: Option<ContainerName>,
    /// What listens inside; none before the first reading.
    seen: Option<Observation>,
    /// It is to be removed, and why.
    dismissed: Option<ClosedReason>,
    /// The engine was told to remove it.
    leaving: bool,
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
    control_ports: BTreeSet<NonZeroU16>,
    /// In the order of registration: who is earlier gets a port that two want at once.
    wishes: Vec<Wish>,
    upstreams: BTreeMap<UpstreamId, Upstream>,
    forwards: BTreeMap<ForwardId, Forward>,
    failures: BTreeMap<(ContainerName, NonZeroU16), Failure>,
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
    /// Nothing is known; `control_ports` are never forwarded.
    pub fn new(control_ports: BTreeSet<NonZeroU16>) -> Fleet {
        Fleet {
            control_ports,
            wishes: Vec::new(),
            upstreams: BTreeMap::new(),
            forwards: BTreeMap::new(),
            failures: BTreeMap::new(),
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
            let (owner, dismissed) = (None, None);
            let taken = Upstream { cookie: netns_cookie, owner, seen, dismissed, leaving: false };
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
        for forward in self.forwards.values().filter(|forward| forward.is_live()) {
            let upstream = self.upstreams.get(&forward.upstream);
            if let Some(owner) = upstream.and_then(|upstream| upstream.owner.clone()) {
                self.heirs.insert(forward.host_port, owner);
            }
        }
        self.heirs_since = None;
        let ids: Vec<ForwardId> = self.forwards.keys().copied().collect();
        let changes = ids.into_iter().filter_map(|id| self.forget(id, ClosedReason::HostError)).collect();
        self.upstreams.clear();
        self.failures.clear();
        self.partial.clear();
        self.sweeping = false;
        changes
    }

    /// A container was entered, and its namespace has this cookie.
    pub fn reached(&mut self, name: &ContainerName, cookie: u64) -> Admission {
        if !self.wishes.iter().any(|wish| wish.name == *name) {
            return Admission::Unwanted;
        }
        let staying = |upstream: &Upstream| upstream.dismissed.is_none() && !upstream.leaving;
        let same = |upstream: &Upstream| staying(upstream) && upstream.cookie == cookie;
        let fellow = self.upstreams.values().filter(|upstream| same(upstream));
        if let Some(fellow) =
            fellow.filter_map(|upstream| upstream.owner.as_ref()).find(|owner| *owner != name)
        {
            return Admission::Shared(fellow.clone());
        }
        for upstream in self.upstreams.values_mut() {
            if staying(upstream) && upstream.owner.as_ref() == Some(name) && upstream.cookie != cookie {
                upstream.dismissed = Some(ClosedReason::HostError);
            }
        }
        let own = |upstream: &Upstream| upstream.owner.as_ref() == Some(name);
        let holds = |id: &UpstreamId| self.forwards.values().any(|forward| forward.upstream == *id);
        // Were there two of one namespace, the one with forwards is worth more.
        let known = self.upstreams.iter().filter(|(_, upstream)| same(upstream));
        let known = known.max_by_key(|(id, upstream)| (own(upstream), holds(id))).map(|(id, _)| *id);
        let Some(id) = known else {
            let id = UpstreamId(self.next_upstream);
            self.next_upstream = self.next_upstream.wrapping_add(1);
            let owner = Some(name.clone());
            self.upstreams
                .insert(id, Upstream { cookie, owner, seen: None, dismissed: None, leaving: false });
            return Admission::Add(id);
        };
        if let Some(upstream) = self.upstreams.get_mut(&id) {
            upstream.owner = Some(name.clone());
        }
        Admission::Known(id)
    }

    /// A container is gone; its ports are let go of with the next step.
    pub fn left(&mut self, name: &ContainerName) {
        for upstream in self.upstreams.values_mut() {
            if upstream.owner.as_ref() == Some(name) {
                upstream.dismissed.get_or_insert(ClosedReason::HostError);
            }
        }
    }

    /// The engine was relieved by another one, which holds these upstreams and these forwards under the same numbers and
    /// tells anew what listens.
    pub fn moved(&mut self, upstreams: &BTreeSet<UpstreamId>, forwards: &BTreeSet<ForwardId>) -> Vec<Change> {
        let lost: Vec<ForwardId> =
            self.forwards.keys().filter(|id| !forwards.contains(id)).copied().collect();
        let changes = lost.into_iter().filter_map(|id| self.forget(id, ClosedReason::HostError)).collect();
        self.upstreams.retain(|id, _| upstreams.contains(id));
        for upstream in self.upstreams.values_mut() {
            upstream.seen = None;
        }
        self.partial.clear();
        changes
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
        let verdicts = self.verdicts();
        self.settle_heirs(&verdicts, now);
        self.close(&verdicts, now, &mut commands);
        self.open(&verdicts, now, &mut commands, &mut changes);
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
        retries.chain(lingering).chain(heirs).min()
    }

    /// Strikes off those who have their port again, do not want it any more, or did not come in time.
    fn settle_heirs(&mut self, verdicts: &BTreeMap<UpstreamId, BTreeMap<NonZeroU16, Verdict>>, now: Instant) {
        if self.heirs.is_empty() {
            self.heirs_since = None;
            return;
        }
        let since = *self.heirs_since.get_or_insert(now);
        let mut heirs = std::mem::take(&mut self.heirs);
        heirs.retain(|port, name| {
            let wished = self.wishes.iter().any(|wish| wish.name == *name);
            let seen = self.upstream_of(name).and_then(|upstream| verdicts.get(&upstream));
            let wants = seen.is_none_or(|ports| matches!(ports.get(port), Some(Verdict::Wanted(_))));
            let held = self.forwards.values().any(|forward| forward.host_port == *port);
            wished && wants && !held && now.saturating_duration_since(since) < HEIR_PATIENCE
        });
        self.heirs = heirs;
        if self.heirs.is_empty() {
            self.heirs_since = None;
        }
    }

    /// Lets go of upstreams that have no container any more.
    fn dismiss(&mut self, commands: &mut Vec<Command>) {
        for (id, upstream) in &mut self.upstreams {
            let registered = match &upstream.owner {
                Some(owner) => self.wishes.iter().any(|wish| wish.name == *owner),
                None => !self.sweeping,
            };
            if !registered {
                upstream.dismissed.get_or_insert(ClosedReason::Deregistered);
            }
            let Some(why) = upstream.dismissed.filter(|_| !upstream.leaving) else { continue };
            upstream.leaving = true;
            self.failures.retain(|(name, _), _| upstream.owner.as_ref() != Some(name));
            for forward in self.forwards.values_mut() {
                if forward.upstream == *id && forward.is_live() {
                    forward.status = Status::Closing { why };
                }
            }
            commands.push(Command::RemoveUpstream { upstream: *id, ending: Ending::Drain });
        }
    }

    /// Closes what is not wanted, and tells the reach of what is.
    fn close(
        &mut self,
        verdicts: &BTreeMap<UpstreamId, BTreeMap<NonZeroU16, Verdict>>,
        now: Instant,
        commands: &mut Vec<Command>,
    ) {
        for (id, forward) in &mut self.forwards {
            let Some(ports) = verdicts.get(&forward.upstream).filter(|_| forward.is_live()) else { continue };
            let expired = match ports.get(&forward.target_port) {
                _ if forward.host_port != forward.target_port => true,
                Some(Verdict::Wanted(reach)) => {
                    forward.unseen = None;
                    if forward.reach != *reach {
                        forward.reach = *reach;
                        commands.push(Command::SetReach { forward: *id, reach: *reach });
                    }
                    false
                }
                Some(Verdict::Denied(_)) => true,
                None => {
                    let since = *forward.unseen.get_or_insert(now);
                    now.saturating_duration_since(since) >= LINGER
                }
            };
            if expired {
                forward.status = Status::Closing { why: ClosedReason::ContainerReleased };
                commands.push(Command::CloseListener { forward: *id, ending: Ending::Drain });
            }
        }
    }

    fn open(
        &mut self,
        verdicts: &BTreeMap<UpstreamId, BTreeMap<NonZeroU16, Verdict>>,
        now: Instant,
        commands: &mut Vec<Command>,
        changes: &mut Vec<Change>,
    ) {
        let names: Vec<ContainerName> = self.wishes.iter().map(|wish| wish.name.clone()).collect();
        for name in names {
            let Some(upstream) = self.upstream_of(&name) else { continue };
            let Some(ports) = verdicts.get(&upstream) else { continue };
            // A failure is remembered only while somebody still waits for the port.
            self.failures.retain(|(owner, port), _| {
                *owner != name || matches!(ports.get(port), Some(Verdict::Wanted(_)))
            });
            for (port, verdict) in ports {
                let Verdict::Wanted(reach) = verdict else { continue };
                let holder = self.forwards.values().find(|forward| forward.host_port == *port);
                let owner = match holder.map(|holder| self.upstreams.get(&holder.upstream)) {
                    Some(upstream) => upstream.and_then(|upstream| upstream.owner.as_ref()),
                    None => self.heirs.get(port),
                };
                // One of its own, or one that nobody has claimed, answers or closes soon.
                if let Some(owner) = owner.filter(|owner| **owner != name) {
                    let reason = format!(
                        "EADDRINUSE: port {port} is forwarded to container \"{owner}\", which had it first"
                    );
                    let failure = Failure { at: None, reason: reason.clone() };
                    if self.failures.insert((name.clone(), *port), failure).is_none() {
                        changes.push(Change::Failed { name: name.clone(), port: *port, reason });
                    }
                    continue;
                }
                if holder.is_some() {
                    continue;
                }
                let rests = self.failures.get(&(name.clone(), *port)).and_then(|failure| failure.at);
                if rests.is_some_and(|at| now.saturating_duration_since(at) < RETRY) {
                    continue;
                }
                commands.push(self.open_one(upstream, *port, *reach));
            }
        }
    }

    fn open_one(&mut self, upstream: UpstreamId, port: NonZeroU16, reach: Reach) -> Command {
        let forward = ForwardId(self.next_forward);
        self.next_forward = self.next_forward.wrapping_add(1);
        let opening = Forward {
            upstream,
            host_port: port,
            target_port: port,
            status: Status::Opening,
            reach,
            told: false,
            unseen: None,
            stats: ForwardStats::default(),
        };
        self.forwards.insert(forward, opening);
        Command::OpenListener { forward, upstream, host_port: port, target_port: port, reach }
    }

    /// The upstream of a container that stays.
    fn upstream_of(&self, name: &ContainerName) -> Option<UpstreamId> {
        let own = |upstream: &Upstream| upstream.owner.as_ref() == Some(name) && !upstream.leaving;
        self.upstreams.iter().find(|(_, upstream)| own(upstream)).map(|(id, _)| *id)
    }
}

#[cfg(test)]
#[path = "fleet/tests.rs"]
mod tests;
