//! What a broker's session announces: the ports that listen in a container, and what it is told of each
//! (wire specification, A.3.9, A.6.3 and A.6.5). Pure.
//!
//! Where the container is reached over the session alone, an announcement is worth one attempt:
//!
//! ```text
//!              announced             ListenerOpened
//!  unknown ───────────────► due ─────────────────────► forwarded
//!     ▲                      │ denied, or                  │
//!     │ closed, or           ▼ ListenerFailed              │ closed, reserved, or the session is lost
//!     └────────────────── over ◄── announced anew: due ────┘   (CloseListener)
//! ```
//!
//! A bind that is under way when its port closes is undone when it is done; its answer counts for nothing. Where the
//! container is entered, the engine's watch decides what is open, and announcements only have to be answered.
//!
//! A result is a debt: it is paid by [`Planner::step`] as soon as the truth is known, once.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU16;
use std::time::{Duration, Instant};

use landfall_engine::command::{Command, Ending, ForwardId, Reach, UpstreamId};

use super::reserved::Reservation;
use super::verdict::{Exclusion, Verdict};
use super::watched::Holder;
use super::{Change, ClosedReason, FORWARDS_MAX, Forward, Plan, Planned, Planner, Status};
use crate::model::announcement::{Announced, EXCLUDED};
use crate::model::registration::ContainerName;

/// How long after its announcement a port that the engine's watch does not see, or that is not open yet, is answered for.
/// The watch looks at least twice a second.
pub const OWED_MAX: Duration = Duration::from_secs(2);

/// One container's broker.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Broker {
    /// Whether its session tells what listens.
    up: bool,
    /// What it told; nothing while the session is down.
    pub(super) known: BTreeMap<NonZeroU16, AnnouncedPort>,
    /// By the port inside.
    pub(super) reserved: BTreeMap<NonZeroU16, Reservation>,
}

impl Broker {
    /// Whether a port inside is reserved, or about to be.
    pub(super) fn reserves(&self, target: NonZeroU16) -> bool {
        self.reserved.get(&target).is_some_and(Reservation::has_begun)
    }

    /// Whether a host port matters to it: a port of that number was announced, or one is reserved there or tried there.
    pub(super) fn waits_for(&self, host_port: NonZeroU16) -> bool {
        self.known.contains_key(&host_port) || self.reserved.values().any(|one| one.waits_for(host_port))
    }
}

/// A port that was announced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct AnnouncedPort {
    /// Since when a result is owed.
    pub(super) owed: Option<Instant>,
    /// The attempt that the announcement is worth has not been made.
    pub(super) due: bool,
    /// Why it came to nothing.
    pub(super) over: Option<NotForwarded>,
}

/// Why a port is not forwarded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum NotForwarded {
    Denied(Exclusion),
    Failed(String),
}

impl Planner {
    /// The container has taken the broker's token. What listens is told next.
    pub fn broker_up(&mut self, name: &ContainerName) {
        self.brokers.entry(name.clone()).or_default().up = true;
        self.dirty_set.mark(name);
    }

    /// The session is lost: what it announced is forwarded no longer, and nobody waits for a result.
    pub fn broker_down(&mut self, name: &ContainerName) {
        self.dirty_set.mark(name);
        if let Some(broker) = self.brokers.get_mut(name) {
            broker.up = false;
            broker.known.clear();
            broker.reserved.values_mut().for_each(Reservation::forgive);
        }
    }

    /// The broker stops, and everything that is there for its sake.
    pub fn broker_stopped(&mut self, name: &ContainerName) {
        self.dirty_set.mark(name);
        self.brokers.remove(name);
        for upstream in self.upstreams.values_mut() {
            if upstream.dialled && upstream.owner.as_ref() == Some(name) {
                upstream.dismissed.get_or_insert(ClosedReason::BrokerStopped);
            }
        }
    }

    /// Whether the engine still holds a port that leads, or led, over the session of `name`.
    pub fn holds_dialled(&self, name: &ContainerName) -> bool {
        let dialled =
            |forward: &Forward| self.upstreams.get(&forward.upstream).is_some_and(|one| one.dialled);
        self.forwards_of(name).any(dialled)
    }

    /// Takes in what listens, or what changed; `whole` replaces what was known.
    pub fn announce(
        &mut self,
        name: &ContainerName,
        opened: &[Announced],
        closed: &[NonZeroU16],
        whole: bool,
        now: Instant,
    ) -> Vec<Change> {
        let upstreams = self.upstreams_of(name);
        let ports = opened.iter().map(|told| told.port);
        let forwarded: BTreeSet<NonZeroU16> =
            ports.filter(|port| self.announced_at(&upstreams, *port).is_some_and(Forward::is_live)).collect();
        let Some(broker) = self.brokers.get_mut(name).filter(|broker| broker.up) else { return Vec::new() };
        self.dirty_set.mark(name);
        let mut changes = Vec::new();
        let mut closed = closed.to_vec();
        if whole {
            let listed: BTreeSet<NonZeroU16> = opened.iter().map(|told| told.port).collect();
            closed.extend(broker.known.keys().filter(|port| !listed.contains(port)));
        }
        for port in closed {
            if broker.known.remove(&port).is_some_and(|known| known.owed.is_some()) {
                let why = ClosedReason::ContainerReleased.as_str().to_owned();
                changes.push(Change::result(name, port, Err(why)));
            }
        }
        for Announced { port, .. } in opened {
            let reserved = broker.reserved.contains_key(port);
            match broker.known.get_mut(port) {
                Some(known) => {
                    if !reserved && known.owed.is_none() && !forwarded.contains(port) {
                        (known.owed, known.due, known.over) = (Some(now), true, None);
                    }
                }
                None => {
                    let owed = (!reserved).then_some(now);
                    broker.known.insert(*port, AnnouncedPort { owed, due: true, over: None });
                }
            }
        }
        changes
    }

    /// Whether there is anything to dial for: a session, or a port that is kept for the next one.
    pub(super) fn has_broker_to_serve(&self, name: &ContainerName) -> bool {
        self.brokers.get(name).is_some_and(|broker| broker.up || !broker.reserved.is_empty())
    }

    /// Whether the container's broker has a session, so that what is dialled arrives.
    pub fn has_session(&self, name: &ContainerName) -> bool {
        self.brokers.get(name).is_some_and(|broker| broker.up)
    }

    /// The engine's watch takes over: an attempt that came to nothing over the session is none any more.
    pub(super) fn on_watched(&mut self, name: &ContainerName) {
        for known in self.brokers.get_mut(name).into_iter().flat_map(|broker| broker.known.values_mut()) {
            known.over = None;
        }
    }

    /// A new upstream over the session: everything that was not refused is asked for again.
    pub(super) fn on_dialled(&mut self, name: &ContainerName) {
        for known in self.brokers.get_mut(name).into_iter().flat_map(|broker| broker.known.values_mut()) {
            known.due = known.over.is_none();
        }
    }

    /// Whether a host port is one that the session's container would have.
    pub(super) fn waits_for(&self, name: &ContainerName, port: NonZeroU16) -> bool {
        let known = self.brokers.get(name).and_then(|broker| broker.known.get(&port));
        known.is_some_and(|known| known.over.is_none())
    }

    /// Closes what its session does not announce any more, and what nobody reserves any more.
    pub(super) fn close_announced(&mut self, one: &Planned, plan: &mut Plan) {
        let own = one.upstreams.iter().flat_map(|id| self.forwards.of_upstream(*id));
        let live = own.filter(|(_, forward)| forward.is_live());
        let ended: Vec<(ForwardId, ClosedReason, Ending)> = live
            .filter_map(|(id, forward)| self.ends(forward).map(|(why, ending)| (id, why, ending)))
            .collect();
        for (forward, why, ending) in ended {
            if let Some(known) = self.forwards.get_mut(forward) {
                known.status = Status::Closing { why };
                plan.commands.push(Command::CloseListener { forward, ending });
            }
        }
    }

    /// Why a forward that is there for a broker's sake is to end, and how.
    fn ends(&self, forward: &Forward) -> Option<(ClosedReason, Ending)> {
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
            // What is open may finish: the container did not let go of the port.
            return Some((ClosedReason::ContainerReleased, Ending::Drain));
        }
        let allowed = self.policy_of(owner).is_some_and(|policy| self.judge(policy, target).is_ok());
        let stays = allowed && broker.known.contains_key(&target);
        (!stays).then_some((ClosedReason::ContainerReleased, Ending::Reset))
    }

    /// Makes the attempts that are due over a session.
    pub(super) fn open_announced(&mut self, one: &Planned, plan: &mut Plan) {
        let name = &one.name;
        let Some((upstream, _)) = self.dialled(name) else { return };
        let Some(broker) = self.brokers.get(name) else { return };
        let due = broker.known.iter().filter(|(port, known)| known.due && !broker.reserves(**port));
        let due: Vec<NonZeroU16> = due.map(|(port, _)| *port).collect();
        let mut live = self.forwards_of(name).filter(|forward| forward.is_live()).count();
        for port in due {
            let over = match self.attempt(one, port, live) {
                OpenResult::Wait => continue,
                OpenResult::Make => {
                    live += 1;
                    plan.commands.push(self.open_one(upstream, port, port, Reach::UNKNOWN, false));
                    None
                }
                OpenResult::Made => None,
                OpenResult::NotForwarded(over) => Some(over),
            };
            if let Some(NotForwarded::Failed(reason)) = &over {
                plan.changes.push(Change::Failed { name: name.clone(), port, reason: reason.clone() });
            }
            self.note(name, port, over);
        }
    }

    /// Decides about the attempt for a port of a container that has `live` forwards.
    fn attempt(&self, one: &Planned, port: NonZeroU16, live: usize) -> OpenResult {
        let Some(policy) = self.policy_of(&one.name) else { return OpenResult::Wait };
        if let Err(reason) = self.judge(policy, port) {
            return OpenResult::NotForwarded(NotForwarded::Denied(reason));
        }
        match self.announced_at(&one.upstreams, port).map(Forward::is_live) {
            Some(true) => return OpenResult::Made,
            Some(false) => return OpenResult::Wait,
            None => {}
        }
        if live >= FORWARDS_MAX {
            return OpenResult::NotForwarded(NotForwarded::Denied(Exclusion::Quota));
        }
        match self.holder(&one.name, port) {
            Holder::Free => OpenResult::Make,
            // There is one attempt, so it is made when it is known what comes of it.
            Holder::Soon | Holder::Heir(_) => OpenResult::Wait,
            Holder::Taken(reason) => OpenResult::NotForwarded(NotForwarded::Failed(reason)),
        }
    }

    /// The forward to a port inside that is not there by a reservation.
    fn announced_at(&self, upstreams: &[UpstreamId], port: NonZeroU16) -> Option<&Forward> {
        self.forwards_to(upstreams, port).find(|forward| !forward.reserved)
    }

    /// Notes what became of the attempt for a port.
    pub(super) fn note(&mut self, name: &ContainerName, port: NonZeroU16, over: Option<NotForwarded>) {
        let broker = self.brokers.get_mut(name);
        if let Some(known) = broker.and_then(|broker| broker.known.get_mut(&port)) {
            (known.due, known.over) = (false, over);
        }
    }

    /// What was forwarded is not, and nobody asked for that: it is asked for again.
    pub(super) fn renew(&mut self, name: &ContainerName, port: NonZeroU16) {
        let broker = self.brokers.get_mut(name);
        if let Some(known) = broker.and_then(|broker| broker.known.get_mut(&port)) {
            known.due = known.over.is_none();
        }
    }

    /// Pays the results of which the truth is known.
    pub(super) fn pay(&mut self, one: &Planned, plan: &mut Plan) {
        let Some(broker) = self.brokers.get(&one.name) else { return };
        let is_watched = self.upstream_of(&one.name).is_some_and(|(_, upstream)| !upstream.dialled);
        let owed = broker.known.iter().filter(|(port, _)| !broker.reserved.contains_key(port));
        let paid = owed.filter_map(|(port, known)| {
            let is_late = plan.now.saturating_duration_since(known.owed?) >= OWED_MAX;
            let result = match self.truth(one, *port, known) {
                AnnouncedResult::AnnouncedPort(result) => result,
                AnnouncedResult::Unknown(reason) if is_watched && is_late => Err(reason.to_owned()),
                AnnouncedResult::Unknown(_) => return None,
            };
            Some((*port, result))
        });
        let paid: Vec<_> = paid.collect();
        for (port, result) in paid {
            let broker = self.brokers.get_mut(&one.name);
            if let Some(known) = broker.and_then(|broker| broker.known.get_mut(&port)) {
                known.owed = None;
            }
            plan.changes.push(Change::result(&one.name, port, result));
        }
    }

    /// The result for a port.
    fn truth(&self, one: &Planned, port: NonZeroU16, known: &AnnouncedPort) -> AnnouncedResult {
        let excluded = || AnnouncedResult::AnnouncedPort(Err(EXCLUDED.to_owned()));
        if self.policy_of(&one.name).is_some_and(|policy| self.judge(policy, port).is_err()) {
            return excluded();
        }
        let own = self.announced_at(&one.upstreams, port);
        if let Some(open) = own.filter(|forward| forward.status == Status::Open) {
            return AnnouncedResult::AnnouncedPort(Ok(open.host_port));
        }
        match &known.over {
            Some(NotForwarded::Denied(_)) => return excluded(),
            Some(NotForwarded::Failed(reason)) => return AnnouncedResult::AnnouncedPort(Err(reason.clone())),
            None => {}
        }
        if let Some(failure) = self.failures.get(&one.name).and_then(|failures| failures.get(&port)) {
            return AnnouncedResult::AnnouncedPort(Err(failure.reason.clone()));
        }
        match one.verdicts.as_ref().and_then(|verdicts| verdicts.get(&port)) {
            Some(Verdict::Denied(_)) => excluded(),
            Some(Verdict::Published(host_port, _)) => AnnouncedResult::AnnouncedPort(Ok(*host_port)),
            Some(Verdict::Wanted(_)) => AnnouncedResult::Unknown("EAGAIN: the port is not open yet"),
            None => AnnouncedResult::Unknown("ECONNREFUSED: nothing was seen to listen on the port"),
        }
    }

    /// When the debts of ports that the watch does not see are due.
    pub(super) fn debts_due(&self, name: &ContainerName) -> impl Iterator<Item = Instant> {
        let is_watched = self.upstream_of(name).is_some_and(|(_, upstream)| !upstream.dialled);
        let broker = self.brokers.get(name).filter(|_| is_watched);
        let owed = broker
            .into_iter()
            .flat_map(|broker| broker.known.iter().filter(|(port, _)| !broker.reserved.contains_key(port)));
        owed.filter_map(|(_, known)| known.owed).map(|since| since + OWED_MAX)
    }
}

/// The result for a port that was announced.
enum AnnouncedResult {
    AnnouncedPort(Result<NonZeroU16, String>),
    /// It is not known yet. Where the container is watched, this is the result after a while.
    Unknown(&'static str),
}

/// What became of an attempt.
enum OpenResult {
    /// It cannot be made yet.
    Wait,
    /// It is to be made now.
    Make,
    /// The port is forwarded already.
    Made,
    /// It comes to nothing.
    NotForwarded(NotForwarded),
}
