//! Ports that a container asks for: a host port of its choice for one of its ports, kept until its broker stops
//! (wire specification, A.3.8). Pure.
//!
//! ```text
//!  asked ──► trying one candidate after the other ──► held, and opened again at the same host port
//!    │                    │                           whenever the engine or the way changes
//!    └─ refused           └─ none binds: given up, and the port is forwarded as if it had not been asked for
//! ```
//!
//! One request for a port is in flight at a time; the latest that comes meanwhile is begun when that one fails, and answered
//! with it when it succeeds.

use std::collections::{BTreeSet, VecDeque};
use std::num::NonZeroU16;
use std::time::Instant;

use landfall_engine::command::{Reach, UpstreamId};

use super::watched::Holder;
use super::{Change, FORWARDS_MAX, Failure, Plan, Planner, RETRY};
use crate::model::announcement::EXCLUDED;
use crate::model::port_policy::Decision;
use crate::model::registration::ContainerName;

/// How many candidates of one request are tried; the program that this is for names ten.
const CANDIDATES_MAX: usize = 256;

/// How many requests for one port can wait for the one in flight. Each is owed a result.
const WAITING_MAX: usize = 64;

/// How many ports a container can reserve at the same time. A reservation holds its host port while nothing listens behind
/// it, and the container chooses which one. The program that this is for reserves one.
pub const RESERVED_MAX: usize = 16;

/// One port that is reserved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Reservation {
    pub(super) stage: Stage,
    /// How many requests wait for what comes of it.
    owed: usize,
    /// Candidates of a later request, and how many wait for that one.
    next: Option<(Vec<NonZeroU16>, usize)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Nobody has looked at it yet.
    Asked(Vec<NonZeroU16>),
    /// The first candidate is being tried, or about to be; `error` is why the one before it could not be had.
    Trying { left: VecDeque<NonZeroU16>, error: Option<String> },
    /// It is this host port. `failure` is why it could not be opened again.
    Held { host_port: NonZeroU16, failure: Option<Failure> },
}

impl Reservation {
    fn asked(candidates: Vec<NonZeroU16>, owed: usize) -> Reservation {
        Reservation { stage: Stage::Asked(candidates), owed, next: None }
    }

    /// Whether the port inside belongs to it.
    pub(super) fn has_begun(&self) -> bool {
        !matches!(self.stage, Stage::Asked(_))
    }

    /// Whether a host port is the one that it has, or tries next.
    pub(super) fn waits_for(&self, port: NonZeroU16) -> bool {
        match &self.stage {
            Stage::Asked(_) => false,
            Stage::Trying { left, .. } => left.front() == Some(&port),
            Stage::Held { host_port, .. } => *host_port == port,
        }
    }

    /// Nobody waits for an answer any more.
    pub(super) fn forgive(&mut self) {
        self.owed = 0;
        self.next = None;
    }
}

impl Planner {
    /// A container asks for a host port, the best candidate first.
    pub fn reserve(
        &mut self,
        name: &ContainerName,
        target: NonZeroU16,
        mut candidates: Vec<NonZeroU16>,
    ) -> Vec<Change> {
        let Some(broker) = self.brokers.get_mut(name) else { return Vec::new() };
        let mut seen = BTreeSet::new();
        candidates.retain(|port| seen.insert(*port));
        candidates.truncate(CANDIDATES_MAX);
        self.dirty_set.mark(name);
        let full = broker.reserved.len() >= RESERVED_MAX;
        match broker.reserved.get_mut(&target) {
            Some(Reservation { stage: Stage::Held { host_port, .. }, .. }) => {
                return vec![Change::result(name, target, Ok(*host_port))];
            }
            Some(under_way) => {
                let waiting = under_way.next.as_ref().map_or(0, |(_, waiting)| *waiting);
                if waiting >= WAITING_MAX {
                    let reason = format!("EAGAIN: {WAITING_MAX} requests for port {target} wait already");
                    return vec![Change::result(name, target, Err(reason))];
                }
                under_way.next = Some((candidates, waiting + 1));
            }
            None if full => {
                return vec![Change::result(name, target, Err(EXCLUDED.to_owned()))];
            }
            None => drop(broker.reserved.insert(target, Reservation::asked(candidates, 1))),
        }
        Vec::new()
    }

    /// Takes every reservation of a container as far as it goes.
    pub(super) fn reserve_all(&mut self, name: &ContainerName, plan: &mut Plan) {
        let Some(broker) = self.brokers.get(name) else { return };
        let targets: Vec<NonZeroU16> = broker.reserved.keys().copied().collect();
        for target in targets {
            while let Some(stage) = self.stage(name, target) {
                let goes_on = match stage.clone() {
                    Stage::Asked(candidates) => self.consider(name, target, candidates, plan),
                    Stage::Trying { left, error } => self.try_next(name, target, left, error, plan),
                    Stage::Held { host_port, failure } => {
                        self.keep(name, target, host_port, failure.as_ref(), plan);
                        false
                    }
                };
                if !goes_on {
                    break;
                }
            }
        }
    }

    fn stage(&mut self, name: &ContainerName, target: NonZeroU16) -> Option<&mut Stage> {
        let broker = self.brokers.get_mut(name)?;
        broker.reserved.get_mut(&target).map(|reservation| &mut reservation.stage)
    }

    fn set_stage(&mut self, name: &ContainerName, target: NonZeroU16, next: Stage) {
        if let Some(stage) = self.stage(name, target) {
            *stage = next;
        }
    }

    /// Checks a new request against the policy, and keeps the candidates that it allows. Returns whether the port needs
    /// more work in this step.
    ///
    /// This narrows the reference, which checks the port inside alone: a candidate that the policy refuses as a host port is
    /// skipped, and a request without another one has the result `policy excluded`. As for a refused target, there is no
    /// event.
    fn consider(
        &mut self,
        name: &ContainerName,
        target: NonZeroU16,
        mut candidates: Vec<NonZeroU16>,
        plan: &mut Plan,
    ) -> bool {
        let Some(policy) = self.policy_of(name) else { return false };
        let others = self.forwards_of(name).filter(|forward| forward.is_live());
        let full = others.filter(|forward| forward.target_port != target).count() >= FORWARDS_MAX;
        if full || policy.decide_target(target) != Decision::Allow {
            return self.give_up(name, target, EXCLUDED.to_owned(), plan);
        }
        if candidates.is_empty() {
            let reason = "no host candidates".to_owned();
            plan.changes.push(Change::Failed { name: name.clone(), port: target, reason: reason.clone() });
            return self.give_up(name, target, reason, plan);
        }
        candidates.retain(|candidate| self.judge(policy, *candidate).is_ok());
        if candidates.is_empty() {
            return self.give_up(name, target, EXCLUDED.to_owned(), plan);
        }
        self.set_stage(name, target, Stage::Trying { left: candidates.into(), error: None });
        true
    }

    /// Asks for the first candidate that may be had; answers whether there is more to do for the port now.
    fn try_next(
        &mut self,
        name: &ContainerName,
        target: NonZeroU16,
        mut left: VecDeque<NonZeroU16>,
        mut error: Option<String>,
        plan: &mut Plan,
    ) -> bool {
        let Some(upstream) = self.free_upstream(name, target) else { return false };
        while let Some(candidate) = left.front().copied() {
            match self.holder(name, candidate) {
                Holder::Taken(reason) => {
                    error = Some(reason);
                    left.pop_front();
                }
                Holder::Soon | Holder::Heir(_) => {
                    self.set_stage(name, target, Stage::Trying { left, error });
                    return false;
                }
                Holder::Free => {
                    plan.commands.push(self.open_one(upstream, candidate, target, Reach::UNKNOWN, true));
                    self.set_stage(name, target, Stage::Trying { left, error });
                    return false;
                }
            }
        }
        let reason = error.unwrap_or_else(|| "no host candidates".to_owned());
        plan.changes.push(Change::Failed { name: name.clone(), port: target, reason: reason.clone() });
        self.give_up(name, target, reason, plan)
    }

    /// Opens a reserved port again that is not.
    fn keep(
        &mut self,
        name: &ContainerName,
        target: NonZeroU16,
        host_port: NonZeroU16,
        failure: Option<&Failure>,
        plan: &mut Plan,
    ) {
        let Some(upstream) = self.free_upstream(name, target) else { return };
        let rests = failure.and_then(|failure| failure.at);
        if rests.is_some_and(|at| plan.now.saturating_duration_since(at) < RETRY) {
            return;
        }
        match self.holder(name, host_port) {
            Holder::Free => {
                plan.commands.push(self.open_one(upstream, host_port, target, Reach::UNKNOWN, true));
            }
            Holder::Soon | Holder::Heir(_) => {}
            Holder::Taken(reason) => {
                if failure.is_none() {
                    let told = Change::Failed { name: name.clone(), port: target, reason: reason.clone() };
                    plan.changes.push(told);
                }
                let failure = Some(Failure { at: None, reason });
                self.set_stage(name, target, Stage::Held { host_port, failure });
            }
        }
    }

    /// The upstream over which a port can be opened now: the engine has one, and nothing leads to the port any more.
    fn free_upstream(&self, name: &ContainerName, target: NonZeroU16) -> Option<UpstreamId> {
        let (id, upstream) = self.upstream_of(name)?;
        let taken = self.forwards_to(&self.upstreams_of(name), target).next().is_some();
        // One that is watched may not have been given to the engine before it was read.
        ((upstream.dialled || upstream.seen.is_some()) && !taken).then_some(id)
    }

    /// A request came to nothing. Answers whether a later one is to be looked at now.
    fn give_up(&mut self, name: &ContainerName, target: NonZeroU16, reason: String, plan: &mut Plan) -> bool {
        let Some(broker) = self.brokers.get_mut(name) else { return false };
        let Some(ended) = broker.reserved.remove(&target) else { return false };
        plan.changes.extend((0..ended.owed).map(|_| Change::result(name, target, Err(reason.clone()))));
        if let Some((candidates, owed)) = ended.next {
            broker.reserved.insert(target, Reservation::asked(candidates, owed));
            return true;
        }
        // As if it had not been asked for: whatever listens there is forwarded on its own.
        self.renew(name, target);
        false
    }

    /// The engine has opened a reserved port.
    pub(super) fn on_reserved(
        &mut self,
        name: &ContainerName,
        target: NonZeroU16,
        host_port: NonZeroU16,
    ) -> Vec<Change> {
        let Some(broker) = self.brokers.get_mut(name) else { return Vec::new() };
        let Some(reservation) = broker.reserved.get_mut(&target) else { return Vec::new() };
        reservation.stage = Stage::Held { host_port, failure: None };
        let owed = reservation.owed + reservation.next.take().map_or(0, |(_, waiting)| waiting);
        reservation.owed = 0;
        if let Some(known) = broker.known.get_mut(&target) {
            known.owed = None;
        }
        let opened = Change::Opened { name: name.clone(), port: target, host_port, bind: "127.0.0.1" };
        let results = (0..owed).map(|_| Change::result(name, target, Ok(host_port)));
        std::iter::once(opened).chain(results).collect()
    }

    /// The engine could not open a reserved port.
    pub(super) fn on_not_reserved(
        &mut self,
        name: &ContainerName,
        target: NonZeroU16,
        reason: String,
        now: Instant,
    ) -> Option<Change> {
        match self.stage(name, target)? {
            Stage::Asked(_) => None,
            Stage::Trying { left, error } => {
                left.pop_front();
                *error = Some(reason);
                None
            }
            Stage::Held { failure, .. } => {
                let told = failure.is_some();
                *failure = Some(Failure { at: Some(now), reason: reason.clone() });
                (!told).then(|| Change::Failed { name: name.clone(), port: target, reason })
            }
        }
    }

    /// Whether a container holds a host port by a reservation.
    pub(super) fn holds_reserved(&self, name: &ContainerName, port: NonZeroU16) -> bool {
        let broker = self.brokers.get(name);
        broker.into_iter().flat_map(|broker| broker.reserved.values()).any(
            |reservation| matches!(reservation.stage, Stage::Held { host_port, .. } if host_port == port),
        )
    }

    /// How many ports of a container are reserved, or about to be.
    pub(super) fn reserved_count(&self, name: &ContainerName) -> usize {
        let reserved = self.brokers.get(name).into_iter().flat_map(|broker| broker.reserved.values());
        reserved.filter(|reservation| reservation.has_begun()).count()
    }

    /// The host ports of reservations that could not be opened again, and when that is tried next.
    pub(super) fn reserved_retries(
        &self,
        name: &ContainerName,
    ) -> impl Iterator<Item = (NonZeroU16, Instant)> {
        let broker = self.brokers.get(name).filter(|_| self.upstream_of(name).is_some());
        let reserved = broker.into_iter().flat_map(|broker| broker.reserved.values());
        reserved.filter_map(|reservation| match &reservation.stage {
            Stage::Held { host_port, failure: Some(Failure { at: Some(at), .. }) } => {
                Some((*host_port, *at + RETRY))
            }
            _ => None,
        })
    }
}
