//! Native ports: servers of a sandbox that listen on sockets of the host. Their supervisor reports them; the engine is
//! not involved. Pure.
//!
//! Each native listener has a stub, which the engine's watch sees as a listener in the sandbox. The planner ignores the
//! stub, also after the listener has ended, until the watch no longer sees it: the observations of the watch and the
//! reports of the supervisor arrive in any order. For the same reason a port of such a sandbox is relayed only if its
//! supervisor has left it to the relay, or has reported nothing for [`REPORT_MAX`], as with a program that the
//! supervisor's filter does not cover.
//!
//! The host port of a native listener that has ended is free for others at once. Its end is reported after [`LINGER`],
//! as that of a relayed port is, and not at all if the server listens again until then.
//!
//! If a registration announces native sockets and its supervisor is not linked, such as after a restart of the daemon,
//! a port waits for [`LINK_MAX`] instead. A link that is lost has the same time before its listeners count as closed:
//! the `run` that holds it connects again, unless it has died, which ends its registration as well.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU16;
use std::time::{Duration, Instant};

use landfall_engine::command::{ForwardStats, UpstreamId};
use landfall_engine::native::NativeListener;

use super::{Change, ClosedReason, LINGER, Plan, Planner, Row};
use crate::forwarding::planner::observation::Listeners;
use crate::model::forward_table::{ForwardPath, RowState};
use crate::model::native_state::NativeState;
use crate::model::registration::ContainerName;

/// The longest wait of a port for the report of a linked supervisor. A report takes less than a millisecond.
pub(super) const REPORT_MAX: Duration = Duration::from_millis(250);
/// The longest wait for a supervisor that is not linked.
pub(super) const LINK_MAX: Duration = Duration::from_secs(3);

/// The state of one sandbox with native sockets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Natives {
    /// The supervisor's last report.
    state: NativeState,
    /// The native ports of that report.
    ports: BTreeSet<NonZeroU16>,
    /// The ports that the supervisor leaves to the relay, and those that have waited long enough.
    relayed: BTreeSet<NonZeroU16>,
    link: Link,
    /// Stubs and their ports, including those of ended listeners that the watch may still see.
    stubs: BTreeMap<u64, NonZeroU16>,
    /// Ports without a report, and when they were first seen.
    waiting: BTreeMap<NonZeroU16, Instant>,
    /// Ports that are no longer native and whose end is not reported yet, and since when.
    closing: BTreeMap<NonZeroU16, Instant>,
}

/// The link of a supervisor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Link {
    /// It has not been linked yet.
    #[default]
    Expected,
    /// It is linked.
    Up,
    /// It was lost at this time.
    Lost(Instant),
}

/// The difference between two reports.
struct Difference {
    closed: Vec<NonZeroU16>,
    opened: Vec<(NonZeroU16, &'static str)>,
}

impl Natives {
    fn report_wait_max(&self) -> Duration {
        if self.link == Link::Up { REPORT_MAX } else { LINK_MAX }
    }

    /// Replaces the state. Returns the difference.
    fn replace(&mut self, state: NativeState) -> Difference {
        let stubs = |state: &NativeState| -> Vec<(u64, NonZeroU16)> {
            let of = |one: &NativeListener| Some((one.stub_inode, NonZeroU16::new(one.port())?));
            state.listeners.iter().filter_map(of).collect()
        };
        let before = std::mem::replace(&mut self.state, state);
        self.stubs.extend(stubs(&before));
        self.stubs.extend(stubs(&self.state));
        // A socket that the supervisor leaves to the relay is no longer a stub.
        for one in &self.state.relayed {
            self.stubs.remove(&one.inode);
        }
        self.relayed = self.state.relayed.iter().map(|one| one.port).collect();
        self.waiting.clear();
        let now = self.state.ports();
        let before = std::mem::replace(&mut self.ports, now.keys().copied().collect());
        let opened = now.iter().filter(|(port, _)| !before.contains(port));
        let bind = |listeners: &[&NativeListener]| {
            let on_every = listeners.iter().any(|one| one.address.is_every_loopback());
            if on_every { "0.0.0.0" } else { "127.0.0.1" }
        };
        Difference {
            closed: before.difference(&self.ports).copied().collect(),
            opened: opened.map(|(port, listeners)| (*port, bind(listeners))).collect(),
        }
    }

    /// Whether the relay ignores the listeners of a port: they are stubs, or the port is native.
    fn has(&self, port: NonZeroU16, listeners: &Listeners) -> bool {
        self.ports.contains(&port) || listeners.inodes().all(|inode| self.stubs.contains_key(&inode))
    }

    fn due(&self) -> Option<Instant> {
        let report = self.waiting.values().min().map(|since| *since + self.report_wait_max());
        let link = if let Link::Lost(since) = self.link { Some(since + LINK_MAX) } else { None };
        let closing = self.closing.values().min().map(|since| *since + LINGER);
        report.into_iter().chain(link).chain(closing).min()
    }
}

impl Planner {
    /// Updates the sandboxes to those for which native sockets are announced.
    pub(super) fn expect_natives(&mut self) {
        let announced = |planner: &Planner, name: &ContainerName| {
            planner.desired_container(name).is_some_and(|desired| desired.native)
        };
        let gone: Vec<ContainerName> =
            self.natives.keys().filter(|name| !announced(self, name)).cloned().collect();
        for name in gone {
            let Some(natives) = self.natives.remove(&name) else { continue };
            for port in natives.ports.iter().chain(natives.closing.keys()) {
                self.retired.push(closed(&name, *port, ClosedReason::Deregistered));
                self.mark_port_waiters(*port);
            }
        }
        for desired in self.desired_containers.iter().filter(|desired| desired.native) {
            self.natives.entry(desired.name.clone()).or_default();
        }
    }

    /// Handles a report of a container's supervisor.
    pub fn native(&mut self, name: &ContainerName, state: NativeState, now: Instant) -> Vec<Change> {
        let Some(natives) = self.natives.get_mut(name) else { return Vec::new() };
        natives.link = Link::Up;
        let difference = natives.replace(state);
        natives.closing.extend(difference.closed.iter().map(|port| (*port, now)));
        let mut changes = Vec::new();
        for (port, bind) in difference.opened {
            let lingers = self.natives.get_mut(name).and_then(|natives| natives.closing.remove(&port));
            if let Some(failures) = self.failures.get_mut(name) {
                failures.remove(&port);
            }
            if lingers.is_none() {
                changes.extend(self.end_lingering(port));
                changes.push(Change::OpenedNative { name: name.clone(), port, bind });
            }
        }
        difference.closed.into_iter().for_each(|port| self.mark_port_waiters(port));
        self.dirty_set.mark(name);
        self.dirty_set.mark_stale(name);
        changes
    }

    /// Notes that the link of a container's supervisor has ended.
    pub fn native_lost(&mut self, name: &ContainerName, now: Instant) {
        if let Some(natives) = self.natives.get_mut(name) {
            natives.link = Link::Lost(now);
            self.dirty_set.mark(name);
        }
    }

    /// Reports the end of native ports of three kinds: the container is no longer registered, the supervisor did not
    /// link again, or the server did not listen again.
    pub(super) fn retire_natives(&mut self, plan: &mut Plan) {
        plan.changes.append(&mut self.retired);
        let mut lost = Vec::new();
        for (name, natives) in &mut self.natives {
            if let Link::Lost(since) = natives.link
                && plan.now.saturating_duration_since(since) >= LINK_MAX
            {
                natives.link = Link::Expected;
                lost.extend(
                    natives.replace(NativeState::default()).closed.iter().map(|port| (name.clone(), *port)),
                );
            }
            let over = |since: &Instant| plan.now.saturating_duration_since(*since) >= LINGER;
            let ended: Vec<NonZeroU16> =
                natives.closing.iter().filter(|(_, since)| over(since)).map(|(port, _)| *port).collect();
            for port in ended {
                natives.closing.remove(&port);
                plan.changes.push(closed(name, port, ClosedReason::ContainerReleased));
            }
        }
        for (name, port) in lost {
            plan.changes.push(closed(&name, port, ClosedReason::HostError));
            self.mark_port_waiters(port);
            self.dirty_set.mark(&name);
            self.dirty_set.mark_stale(&name);
        }
    }

    /// Reports the end of every native port at once. No step may follow.
    pub fn end_natives(&mut self) -> Vec<Change> {
        let mut changes = Vec::new();
        for (name, natives) in &mut self.natives {
            let closing = std::mem::take(&mut natives.closing).into_keys();
            let ports = natives.replace(NativeState::default()).closed;
            let why = ClosedReason::HostError;
            changes.extend(ports.into_iter().chain(closing).map(|port| closed(name, port, why)));
        }
        changes
    }

    /// Reports the end of a native port that lingers, because another server has the port from now on.
    pub(super) fn end_lingering(&mut self, port: NonZeroU16) -> Option<Change> {
        let mut natives = self.natives.iter_mut();
        natives.find_map(|(name, natives)| {
            natives.closing.remove(&port)?;
            Some(closed(name, port, ClosedReason::ContainerReleased))
        })
    }

    /// The container other than `name` that has a native listener on a host port.
    pub(super) fn native_holder(&self, name: &ContainerName, port: NonZeroU16) -> Option<&ContainerName> {
        let holds =
            |(owner, natives): &(&ContainerName, &Natives)| *owner != name && natives.ports.contains(&port);
        self.natives.iter().find(holds).map(|(owner, _)| owner)
    }

    /// Whether the relay ignores the listeners of a port of a container.
    pub(super) fn is_native(&self, name: &ContainerName, port: NonZeroU16, listeners: &Listeners) -> bool {
        self.natives.get(name).is_some_and(|natives| natives.has(port, listeners))
    }

    /// The number of a container's native ports.
    pub(super) fn native_count(&self, name: &ContainerName) -> usize {
        self.natives.get(name).map_or(0, |natives| natives.ports.len())
    }

    /// Whether a port has to wait for its supervisor's report.
    pub(super) fn awaits_report(&mut self, name: &ContainerName, port: NonZeroU16, now: Instant) -> bool {
        let Some(natives) = self.natives.get_mut(name) else { return false };
        if natives.relayed.contains(&port) {
            return false;
        }
        let report_wait_max = natives.report_wait_max();
        let since = *natives.waiting.entry(port).or_insert(now);
        let waits = now.saturating_duration_since(since) < report_wait_max;
        if !waits {
            // From now on it counts as left to the relay.
            natives.waiting.remove(&port);
            natives.relayed.insert(port);
        }
        waits
    }

    /// Removes the waiting times of ports that no longer listen.
    pub(super) fn forget_waiting(&mut self, name: &ContainerName, listens: impl Fn(NonZeroU16) -> bool) {
        let Some(natives) = self.natives.get_mut(name) else { return };
        natives.waiting.retain(|port, _| listens(*port));
        let left: BTreeSet<NonZeroU16> = natives.state.relayed.iter().map(|one| one.port).collect();
        natives.relayed.retain(|port| left.contains(port) || listens(*port));
    }

    /// When native ports of a container need a plan although nothing changes.
    pub(super) fn natives_due(&self, name: &ContainerName) -> Option<Instant> {
        self.natives.get(name).and_then(Natives::due)
    }

    /// Removes stubs that the container's watch no longer sees.
    pub(super) fn forget_stubs(&mut self, upstream: UpstreamId) {
        let Some(known) = self.upstreams.get(&upstream) else { return };
        let (Some(owner), Some(seen)) = (&known.owner, &known.seen) else { return };
        let Some(natives) = self.natives.get_mut(owner) else { return };
        let current: BTreeSet<u64> = natives.state.listeners.iter().map(|one| one.stub_inode).collect();
        let is_seen = |inode: u64, port: NonZeroU16| {
            seen.at(port).is_some_and(|listeners| listeners.inodes().any(|seen| seen == inode))
        };
        natives.stubs.retain(|inode, port| current.contains(inode) || is_seen(*inode, *port));
    }

    /// The rows of a container's native ports.
    pub(super) fn native_rows(&self, name: &ContainerName) -> Vec<Row> {
        let ports = self.natives.get(name).map(|natives| natives.state.ports()).unwrap_or_default();
        let row = |(port, listeners): (NonZeroU16, Vec<&NativeListener>)| Row {
            port,
            host_port: port,
            state: RowState::Open,
            reason: None,
            path: ForwardPath::Native,
            addresses: listeners.iter().map(|one| one.address.address.ip()).collect(),
            inodes: listeners.iter().map(|one| one.inode).collect(),
            process: listeners.first().map(|one| one.process),
            stats: ForwardStats::default(),
        };
        ports.into_iter().map(row).collect()
    }
}

fn closed(name: &ContainerName, port: NonZeroU16, why: ClosedReason) -> Change {
    Change::Closed { name: name.clone(), port, host_port: port, why }
}
