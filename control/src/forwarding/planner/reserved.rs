//! Reserved ports: a container requests a host port for one of its ports, and keeps it until its broker stops (wire
//! specification, A.3.8). Pure.
//!
//! ```text
//!   requested ──► trying one candidate after the other ──► held, and opened again at the same host port
//!     │                    │                               when the engine or the upstream changes
//!     └─ refused           └─ none binds: the request fails, and the port is forwarded like any other
//! ```
//!
//! One request for a port is in flight at a time. The latest request that arrives meanwhile starts if that one fails,
//! and gets the same result if it succeeds.

use std::collections::{BTreeSet, VecDeque};
use std::num::NonZeroU16;
use std::time::Instant;

use landfall_engine::command::{Reach, UpstreamId};

use super::watched::Holder;
use super::{Change, FORWARDS_MAX, Failure, Plan, Planner, RETRY};
use crate::model::announcement::EXCLUDED;
use crate::model::port_policy::Decision;
use crate::model::registration::ContainerName;

/// The most candidates of one request that are tried. The reference's client sends ten.
const CANDIDATES_MAX: usize = 256;

/// The most requests for one port that wait for the one in flight. Each gets a result.
const WAITING_MAX: usize = 64;

/// The most ports that a container can reserve at the same time. A reservation holds its host port even without a
/// listener behind it, and the container chooses the port. The reference's client reserves one.
pub const RESERVED_MAX: usize = 16;

/// One reservation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Reservation {
    pub(super) stage: Stage,
    /// The number of requests that get its result.
    unanswered: usize,
    /// The candidates of the latest later request, and the number of requests that wait for its result.
    next: Option<(Vec<NonZeroU16>, usize)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Not checked against the policy yet.
    Requested(Vec<NonZeroU16>),
    /// The first candidate is being tried or is next; `error` is the failure of the one before.
    Trying { left: VecDeque<NonZeroU16>, error: Option<String> },
    /// The request succeeded with this host port. `failure` is why it could not be opened again.
    Held { host_port: NonZeroU16, failure: Option<Failure> },
}

impl Reservation {
    fn requested(candidates: Vec<NonZeroU16>, unanswered: usize) -> Reservation {
        Reservation { stage: Stage::Requested(candidates), unanswered, next: None }
    }

    /// Whether the request was accepted, so that the container's port belongs to it.
    pub(super) fn is_accepted(&self) -> bool {
        !matches!(self.stage, Stage::Requested(_))
    }

    /// Whether a host port is the one that it has or tries next.
    pub(super) fn waits_for(&self, port: NonZeroU16) -> bool {
        match &self.stage {
            Stage::Requested(_) => false,
            Stage::Trying { left, .. } => left.front() == Some(&port),
            Stage::Held { host_port, .. } => *host_port == port,
        }
    }

    /// Drops the requests, because no result can be sent.
    pub(super) fn drop_requests(&mut self) {
        self.unanswered = 0;
        self.next = None;
    }
}

impl Planner {
    /// Handles a request for a host port; `candidates` are in order of preference.
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
            Some(in_flight) => {
                let waiting = in_flight.next.as_ref().map_or(0, |(_, waiting)| *waiting);
                if waiting >= WAITING_MAX {
                    let reason = format!("EAGAIN: {WAITING_MAX} requests for port {target} wait already");
                    return vec![Change::result(name, target, Err(reason))];
                }
                in_flight.next = Some((candidates, waiting + 1));
            }
            None if full => {
                return vec![Change::result(name, target, Err(EXCLUDED.to_owned()))];
            }
            None => drop(broker.reserved.insert(target, Reservation::requested(candidates, 1))),
        }
        Vec::new()
    }

    /// Advances every reservation of a container as far as possible.
    pub(super) fn reserve_all(&mut self, name: &ContainerName, plan: &mut Plan) {
        let Some(broker) = self.brokers.get(name) else { return };
        let targets: Vec<NonZeroU16> = broker.reserved.keys().copied().collect();
        for target in targets {
            while let Some(stage) = self.stage(name, target) {
                let is_unfinished = match stage.clone() {
                    Stage::Requested(candidates) => self.check_request(name, target, candidates, plan),
                    Stage::Trying { left, error } => self.try_next(name, target, left, error, plan),
                    Stage::Held { host_port, failure } => {
                        self.reopen(name, target, host_port, failure.as_ref(), plan);
                        false
                    }
                };
                if !is_unfinished {
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
    /// This is stricter than the reference, which checks the container's port alone: a candidate that the policy
    /// refuses as a host port is skipped, and a request whose candidates are all refused has the result `policy
    /// excluded`. As for a refused target, no event is recorded.
    fn check_request(
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
            return self.fail_request(name, target, EXCLUDED.to_owned(), plan);
        }
        if candidates.is_empty() {
            let reason = "no host candidates".to_owned();
            plan.changes.push(Change::Failed { name: name.clone(), port: target, reason: reason.clone() });
            return self.fail_request(name, target, reason, plan);
        }
        candidates.retain(|candidate| self.judge(policy, *candidate).is_ok());
        if candidates.is_empty() {
            return self.fail_request(name, target, EXCLUDED.to_owned(), plan);
        }
        self.set_stage(name, target, Stage::Trying { left: candidates.into(), error: None });
        true
    }

    /// Opens the first candidate that is free. Returns whether the port needs more work in this step.
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
                Holder::Changing | Holder::Held(_) => {
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
        self.fail_request(name, target, reason, plan)
    }

    /// Opens a held port again that is not open.
    fn reopen(
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
            Holder::Changing | Holder::Held(_) => {}
            Holder::Taken(reason) => {
                if failure.is_none() {
                    let change = Change::Failed { name: name.clone(), port: target, reason: reason.clone() };
                    plan.changes.push(change);
                }
                let failure = Some(Failure { at: None, reason });
                self.set_stage(name, target, Stage::Held { host_port, failure });
            }
        }
    }

    /// The upstream over which a port can be opened now: the container has one, and no forward leads to the port.
    fn free_upstream(&self, name: &ContainerName, target: NonZeroU16) -> Option<UpstreamId> {
        let (id, upstream) = self.upstream_of(name)?;
        let taken = self.forwards_to(&self.upstreams_of(name), target).next().is_some();
        // A watched upstream may not have been added to the engine before its first reading.
        ((upstream.dialled || upstream.seen.is_some()) && !taken).then_some(id)
    }

    /// Ends a request that failed. Returns whether a later one is to be checked in this step.
    fn fail_request(
        &mut self,
        name: &ContainerName,
        target: NonZeroU16,
        reason: String,
        plan: &mut Plan,
    ) -> bool {
        let Some(broker) = self.brokers.get_mut(name) else { return false };
        let Some(ended) = broker.reserved.remove(&target) else { return false };
        plan.changes.extend((0..ended.unanswered).map(|_| Change::result(name, target, Err(reason.clone()))));
        if let Some((candidates, unanswered)) = ended.next {
            broker.reserved.insert(target, Reservation::requested(candidates, unanswered));
            return true;
        }
        // A listener on the port is forwarded as if the port had not been requested.
        self.retry_announced(name, target);
        false
    }

    /// Handles the opening of a reserved port.
    pub(super) fn on_reserved(
        &mut self,
        name: &ContainerName,
        target: NonZeroU16,
        host_port: NonZeroU16,
    ) -> Vec<Change> {
        let Some(broker) = self.brokers.get_mut(name) else { return Vec::new() };
        let Some(reservation) = broker.reserved.get_mut(&target) else { return Vec::new() };
        reservation.stage = Stage::Held { host_port, failure: None };
        let unanswered = reservation.unanswered + reservation.next.take().map_or(0, |(_, waiting)| waiting);
        reservation.unanswered = 0;
        if let Some(known) = broker.known.get_mut(&target) {
            known.result_due_since = None;
        }
        let opened = Change::Opened { name: name.clone(), port: target, host_port, bind: "127.0.0.1" };
        let results = (0..unanswered).map(|_| Change::result(name, target, Ok(host_port)));
        std::iter::once(opened).chain(results).collect()
    }

    /// Handles the failure to open a reserved port.
    pub(super) fn on_reserve_failed(
        &mut self,
        name: &ContainerName,
        target: NonZeroU16,
        reason: String,
        now: Instant,
    ) -> Option<Change> {
        match self.stage(name, target)? {
            Stage::Requested(_) => None,
            Stage::Trying { left, error } => {
                left.pop_front();
                *error = Some(reason);
                None
            }
            Stage::Held { failure, .. } => {
                let was_reported = failure.is_some();
                *failure = Some(Failure { at: Some(now), reason: reason.clone() });
                (!was_reported).then(|| Change::Failed { name: name.clone(), port: target, reason })
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

    /// The number of ports of a container that are reserved or whose request was accepted.
    pub(super) fn reserved_count(&self, name: &ContainerName) -> usize {
        let reserved = self.brokers.get(name).into_iter().flat_map(|broker| broker.reserved.values());
        reserved.filter(|reservation| reservation.is_accepted()).count()
    }

    /// The host ports of reservations that could not be opened again, and the times of the next attempts.
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
