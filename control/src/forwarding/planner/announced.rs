//! Ports that a broker's session announces, and the result for each (wire specification, A.3.9, A.6.3 and A.6.5). Pure.
//!
//! If the container is reached over its session alone, each announcement causes one attempt:
//!
//! ```text
//!               announced             ListenerOpened
//!   unknown ───────────────► due ─────────────────────► forwarded
//!      ▲                      │ denied, or                  │
//!      │ closed, or           ▼ ListenerFailed              │ closed, reserved, or the session is lost
//!      └────────── not_forwarded ◄── announced again: due ──┘   (CloseListener)
//! ```
//!
//! If a port closes while its listener is being opened, the listener is closed as soon as it is open, and no result is
//! sent. If the container is entered, the engine's watch decides which ports are open, and announcements only get
//! results.
//!
//! [`Planner::step`] emits each result once, as soon as it is known.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU16;
use std::time::{Duration, Instant};

use landfall_engine::command::{Command, Ending, ForwardId, Reach, UpstreamId};

use super::reserved::Reservation;
use super::verdict::{Exclusion, Verdict};
use super::watched::Holder;
use super::{Change, ClosedReason, FORWARDS_MAX, Forward, Plan, PlannedContainer, Planner, Status};
use crate::model::announcement::{Announced, EXCLUDED};
use crate::model::registration::ContainerName;

/// The longest time after its announcement until a port gets a result that the engine's watch does not see, or that is
/// not open yet. The watch reads at least twice a second.
pub const RESULT_MAX: Duration = Duration::from_secs(2);

/// The broker of one container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Broker {
    /// Whether it has a session.
    up: bool,
    /// The announced ports; empty without a session.
    pub(super) known: BTreeMap<NonZeroU16, AnnouncedPort>,
    /// By the container's port.
    pub(super) reserved: BTreeMap<NonZeroU16, Reservation>,
}

impl Broker {
    /// Whether a port of the container is reserved, or its request was accepted.
    pub(super) fn reserves(&self, target: NonZeroU16) -> bool {
        self.reserved.get(&target).is_some_and(Reservation::is_accepted)
    }

    /// Whether a host port matters to it: it was announced under the same number, or is reserved or tried next.
    pub(super) fn waits_for(&self, host_port: NonZeroU16) -> bool {
        self.known.contains_key(&host_port) || self.reserved.values().any(|one| one.waits_for(host_port))
    }
}

/// An announced port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct AnnouncedPort {
    /// When it was announced, until its result is sent.
    pub(super) result_due_since: Option<Instant>,
    /// Whether its attempt has not been made yet.
    pub(super) due: bool,
    /// Why its attempt failed.
    pub(super) not_forwarded: Option<NotForwarded>,
}

/// The reason that an announced port is not forwarded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum NotForwarded {
    Denied(Exclusion),
    Failed(String),
}

impl Planner {
    /// Notes that the container has accepted the broker's token. Announcements follow.
    pub fn broker_up(&mut self, name: &ContainerName) {
        self.brokers.entry(name.clone()).or_default().up = true;
        self.dirty_set.mark(name);
    }

    /// Notes that the session is lost: the forwards of its announcements close, and no result is sent for them.
    pub fn broker_down(&mut self, name: &ContainerName) {
        self.dirty_set.mark(name);
        if let Some(broker) = self.brokers.get_mut(name) {
            broker.up = false;
            broker.known.clear();
            broker.reserved.values_mut().for_each(Reservation::drop_requests);
        }
    }

    /// Notes that the broker has stopped: its forwards close.
    pub fn broker_stopped(&mut self, name: &ContainerName) {
        self.dirty_set.mark(name);
        self.brokers.remove(name);
        for upstream in self.upstreams.values_mut() {
            if upstream.dialled && upstream.owner.as_ref() == Some(name) {
                upstream.dismissed.get_or_insert(ClosedReason::BrokerStopped);
            }
        }
    }

    /// Whether the engine still holds a port over the session of `name`.
    pub fn holds_dialled(&self, name: &ContainerName) -> bool {
        let dialled =
            |forward: &Forward| self.upstreams.get(&forward.upstream).is_some_and(|one| one.dialled);
        self.forwards_of(name).any(dialled)
    }

    /// Handles an announcement; if `whole`, `opened` replaces all earlier ones.
    pub fn announce(
        &mut self,
        name: &ContainerName,
        opened: &[Announced],
        closed: &[NonZeroU16],
        whole: bool,
        now: Instant,
    ) -> Vec<Change> {
        let upstreams = self.upstreams_of(name);
        let ports = opened.iter().map(|announced| announced.port);
        let forwarded: BTreeSet<NonZeroU16> =
            ports.filter(|port| self.announced_at(&upstreams, *port).is_some_and(Forward::is_live)).collect();
        let Some(broker) = self.brokers.get_mut(name).filter(|broker| broker.up) else { return Vec::new() };
        self.dirty_set.mark(name);
        let mut changes = Vec::new();
        let mut closed = closed.to_vec();
        if whole {
            let listed: BTreeSet<NonZeroU16> = opened.iter().map(|announced| announced.port).collect();
            closed.extend(broker.known.keys().filter(|port| !listed.contains(port)));
        }
        for port in closed {
            if broker.known.remove(&port).is_some_and(|known| known.result_due_since.is_some()) {
                let why = ClosedReason::ContainerReleased.as_str().to_owned();
                changes.push(Change::result(name, port, Err(why)));
            }
        }
        for Announced { port, .. } in opened {
            let reserved = broker.reserved.contains_key(port);
            match broker.known.get_mut(port) {
                Some(known) => {
                    if !reserved && known.result_due_since.is_none() && !forwarded.contains(port) {
                        (known.result_due_since, known.due, known.not_forwarded) = (Some(now), true, None);
                    }
                }
                None => {
                    let result_due_since = (!reserved).then_some(now);
                    broker
                        .known
                        .insert(*port, AnnouncedPort { result_due_since, due: true, not_forwarded: None });
                }
            }
        }
        changes
    }

    /// Whether a dialled upstream is needed: for a session, or for reserved ports that outlive one.
    pub(super) fn has_broker_to_serve(&self, name: &ContainerName) -> bool {
        self.brokers.get(name).is_some_and(|broker| broker.up || !broker.reserved.is_empty())
    }

    /// Whether the container's broker has a session, so that dialled connections arrive.
    pub fn has_session(&self, name: &ContainerName) -> bool {
        self.brokers.get(name).is_some_and(|broker| broker.up)
    }

    /// Clears the failures of attempts over the session, since the engine's watch decides from now on.
    pub(super) fn on_watched(&mut self, name: &ContainerName) {
        for known in self.brokers.get_mut(name).into_iter().flat_map(|broker| broker.known.values_mut()) {
            known.not_forwarded = None;
        }
    }

    /// Makes attempts due again for a new upstream over the session, except those that have failed.
    pub(super) fn on_dialled(&mut self, name: &ContainerName) {
        for known in self.brokers.get_mut(name).into_iter().flat_map(|broker| broker.known.values_mut()) {
            known.due = known.not_forwarded.is_none();
        }
    }

    /// Whether the session announced this port and its attempt has not failed.
    pub(super) fn waits_for(&self, name: &ContainerName, port: NonZeroU16) -> bool {
        let known = self.brokers.get(name).and_then(|broker| broker.known.get(&port));
        known.is_some_and(|known| known.not_forwarded.is_none())
    }

    /// Closes the forwards that the session no longer announces and those that are no longer reserved.
    pub(super) fn close_announced(&mut self, one: &PlannedContainer, plan: &mut Plan) {
        let own = one.upstreams.iter().flat_map(|id| self.forwards.of_upstream(*id));
        let live = own.filter(|(_, forward)| forward.is_live());
        let ended: Vec<(ForwardId, ClosedReason, Ending)> = live
            .filter_map(|(id, forward)| self.close_reason(forward).map(|(why, ending)| (id, why, ending)))
            .collect();
        for (forward, why, ending) in ended {
            if let Some(known) = self.forwards.get_mut(forward) {
                known.status = Status::Closing { why };
                plan.commands.push(Command::CloseListener { forward, ending });
            }
        }
    }

    /// The reason and the manner in which a broker's forward is to close; `None` if it stays open.
    fn close_reason(&self, forward: &Forward) -> Option<(ClosedReason, Ending)> {
        let upstream = self.upstreams.get(&forward.upstream)?;
        let owner = upstream.owner.as_ref()?;
        let broker = self.brokers.get(owner);
        let target = forward.target_port;
        if forward.reserved {
            let stays = broker.is_some_and(|broker| broker.reserves(target));
            return (!stays).then_some((ClosedReason::BrokerStopped, Ending::Reset));
        }
        if !upstream.dialled {
            return None;
        }
        let broker = broker?;
        if !broker.up {
            return Some((ClosedReason::HostError, Ending::Reset));
        }
        if broker.reserves(target) {
            // The container still listens, so open connections may finish.
            return Some((ClosedReason::ContainerReleased, Ending::Drain));
        }
        let allowed = self.policy_of(owner).is_some_and(|policy| self.judge(policy, target).is_ok());
        let stays = allowed && broker.known.contains_key(&target);
        (!stays).then_some((ClosedReason::ContainerReleased, Ending::Reset))
    }

    /// Makes the due attempts over a session.
    pub(super) fn open_announced(&mut self, one: &PlannedContainer, plan: &mut Plan) {
        let name = &one.name;
        let Some((upstream, _)) = self.dialled(name) else { return };
        let Some(broker) = self.brokers.get(name) else { return };
        let due = broker.known.iter().filter(|(port, known)| known.due && !broker.reserves(**port));
        let due: Vec<NonZeroU16> = due.map(|(port, _)| *port).collect();
        let mut live = self.forwards_of(name).filter(|forward| forward.is_live()).count();
        for port in due {
            let not_forwarded = match self.decide_attempt(one, port, live) {
                Attempt::Wait => continue,
                Attempt::Open => {
                    live += 1;
                    plan.commands.push(self.open_one(upstream, port, port, Reach::UNKNOWN, false));
                    None
                }
                Attempt::AlreadyOpen => None,
                Attempt::NotForwarded(not_forwarded) => Some(not_forwarded),
            };
            if let Some(NotForwarded::Failed(reason)) = &not_forwarded {
                plan.changes.push(Change::Failed { name: name.clone(), port, reason: reason.clone() });
            }
            self.record_attempt(name, port, not_forwarded);
        }
    }

    /// Decides about the attempt for a port of a container that has `live` forwards.
    fn decide_attempt(&self, one: &PlannedContainer, port: NonZeroU16, live: usize) -> Attempt {
        let Some(policy) = self.policy_of(&one.name) else { return Attempt::Wait };
        if let Err(reason) = self.judge(policy, port) {
            return Attempt::NotForwarded(NotForwarded::Denied(reason));
        }
        match self.announced_at(&one.upstreams, port).map(Forward::is_live) {
            Some(true) => return Attempt::AlreadyOpen,
            Some(false) => return Attempt::Wait,
            None => {}
        }
        if live >= FORWARDS_MAX {
            return Attempt::NotForwarded(NotForwarded::Denied(Exclusion::Quota));
        }
        match self.holder(&one.name, port) {
            Holder::Free => Attempt::Open,
            // There is one attempt only, so it waits until the result of the other forward is known.
            Holder::Changing | Holder::Held(_) => Attempt::Wait,
            Holder::Taken(reason) => Attempt::NotForwarded(NotForwarded::Failed(reason)),
        }
    }

    /// The forward to a port of the container, unless it is reserved.
    fn announced_at(&self, upstreams: &[UpstreamId], port: NonZeroU16) -> Option<&Forward> {
        self.forwards_to(upstreams, port).find(|forward| !forward.reserved)
    }

    /// Records that the attempt for a port was made, and why it failed if it did.
    pub(super) fn record_attempt(
        &mut self,
        name: &ContainerName,
        port: NonZeroU16,
        not_forwarded: Option<NotForwarded>,
    ) {
        let broker = self.brokers.get_mut(name);
        if let Some(known) = broker.and_then(|broker| broker.known.get_mut(&port)) {
            (known.due, known.not_forwarded) = (false, not_forwarded);
        }
    }

    /// Makes the attempt for a port due again, after its forward ended without a request.
    pub(super) fn retry_announced(&mut self, name: &ContainerName, port: NonZeroU16) {
        let broker = self.brokers.get_mut(name);
        if let Some(known) = broker.and_then(|broker| broker.known.get_mut(&port)) {
            known.due = known.not_forwarded.is_none();
        }
    }

    /// Emits the results that are known.
    pub(super) fn emit_results(&mut self, one: &PlannedContainer, plan: &mut Plan) {
        let Some(broker) = self.brokers.get(&one.name) else { return };
        let is_watched = self.upstream_of(&one.name).is_some_and(|(_, upstream)| !upstream.dialled);
        let unanswered = broker.known.iter().filter(|(port, _)| !broker.reserved.contains_key(port));
        let results = unanswered.filter_map(|(port, known)| {
            let is_late = plan.now.saturating_duration_since(known.result_due_since?) >= RESULT_MAX;
            let result = match self.result_of(one, *port, known) {
                AnnouncedResult::Known(result) => result,
                AnnouncedResult::Unknown(reason) if is_watched && is_late => Err(reason.to_owned()),
                AnnouncedResult::Unknown(_) => return None,
            };
            Some((*port, result))
        });
        let results: Vec<_> = results.collect();
        for (port, result) in results {
            let broker = self.brokers.get_mut(&one.name);
            if let Some(known) = broker.and_then(|broker| broker.known.get_mut(&port)) {
                known.result_due_since = None;
            }
            plan.changes.push(Change::result(&one.name, port, result));
        }
    }

    /// The result for a port.
    fn result_of(&self, one: &PlannedContainer, port: NonZeroU16, known: &AnnouncedPort) -> AnnouncedResult {
        let excluded = || AnnouncedResult::Known(Err(EXCLUDED.to_owned()));
        if self.policy_of(&one.name).is_some_and(|policy| self.judge(policy, port).is_err()) {
            return excluded();
        }
        let own = self.announced_at(&one.upstreams, port);
        if let Some(open) = own.filter(|forward| forward.status == Status::Open) {
            return AnnouncedResult::Known(Ok(open.host_port));
        }
        match &known.not_forwarded {
            Some(NotForwarded::Denied(_)) => return excluded(),
            Some(NotForwarded::Failed(reason)) => return AnnouncedResult::Known(Err(reason.clone())),
            None => {}
        }
        if let Some(failure) = self.failures.get(&one.name).and_then(|failures| failures.get(&port)) {
            return AnnouncedResult::Known(Err(failure.reason.clone()));
        }
        match one.verdicts.as_ref().and_then(|verdicts| verdicts.get(&port)) {
            Some(Verdict::Denied(_)) => excluded(),
            Some(Verdict::Published(host_port, _)) => AnnouncedResult::Known(Ok(*host_port)),
            Some(Verdict::Wanted(_)) => AnnouncedResult::Unknown("EAGAIN: the port is not open yet"),
            None => AnnouncedResult::Unknown("ECONNREFUSED: nothing was seen to listen on the port"),
        }
    }

    /// When ports that the watch does not see get their results.
    pub(super) fn results_due(&self, name: &ContainerName) -> impl Iterator<Item = Instant> {
        let is_watched = self.upstream_of(name).is_some_and(|(_, upstream)| !upstream.dialled);
        let broker = self.brokers.get(name).filter(|_| is_watched);
        let unanswered = broker
            .into_iter()
            .flat_map(|broker| broker.known.iter().filter(|(port, _)| !broker.reserved.contains_key(port)));
        unanswered.filter_map(|(_, known)| known.result_due_since).map(|since| since + RESULT_MAX)
    }
}

/// The result for an announced port.
enum AnnouncedResult {
    Known(Result<NonZeroU16, String>),
    /// Not known yet. If the container is watched, this is the result after [`RESULT_MAX`].
    Unknown(&'static str),
}

/// The decision about an attempt.
enum Attempt {
    /// It cannot be made yet.
    Wait,
    /// It is made now.
    Open,
    /// The port is forwarded already.
    AlreadyOpen,
    /// It fails.
    NotForwarded(NotForwarded),
}
