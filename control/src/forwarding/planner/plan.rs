//! One step: the marked containers pass through the same phases. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU16;
use std::time::Instant;

use landfall_engine::command::{Command, UpstreamId};

use super::verdict::Verdict;
use super::{Change, LINGER, PORT_HOLD, Planner, RETRY};
use crate::forwarding::planner::dirty_set::PlanWork;
use crate::model::registration::ContainerName;

/// The output of a step.
pub(super) struct Plan {
    pub(super) now: Instant,
    pub(super) commands: Vec<Command>,
    pub(super) changes: Vec<Change>,
}

/// One container in a step.
pub(super) struct PlannedContainer {
    pub(super) name: ContainerName,
    /// Its upstreams, including those that are being removed.
    pub(super) upstreams: Vec<UpstreamId>,
    /// The verdict about each listening port, if the container is watched and has been read.
    pub(super) verdicts: Option<BTreeMap<NonZeroU16, Verdict>>,
    pub(super) work: PlanWork,
}

impl Planner {
    /// Returns the commands that close the gap between the desired state and what was commanded, and the changes to
    /// report. The commands count as sent.
    pub fn step(&mut self, now: Instant) -> (Vec<Command>, Vec<Change>) {
        let mut plan = Plan { now, commands: Vec::new(), changes: Vec::new() };
        self.retire_natives(&mut plan);
        self.remove_upstreams(&mut plan);
        self.release_port_holds(now);
        let marked = self.dirty_set.take(now);
        // In the order of registration. Each phase runs for all containers before the next one: one container may close
        // a port that another one opens.
        let names = self
            .desired_containers
            .iter()
            .map(|desired| &desired.name)
            .filter(|name| marked.contains(name))
            .cloned();
        let planned = names.map(|name| {
            let upstreams = self.upstreams_of(&name);
            PlannedContainer { name, upstreams, verdicts: None, work: PlanWork::default() }
        });
        let mut planned: Vec<PlannedContainer> = planned.collect();
        for one in &mut planned {
            self.charge(one, &mut plan, |planner, one, plan| planner.reserve_all(&one.name, plan));
        }
        for one in &mut planned {
            self.charge(one, &mut plan, |planner, one, plan| {
                one.verdicts = planner.verdicts_of(&one.name);
                one.work.lookups += one.verdicts.as_ref().map_or(0, |verdicts| verdicts.len() as u64);
                planner.close_watched(one, plan);
                planner.close_announced(one, plan);
            });
        }
        for one in &mut planned {
            self.charge(one, &mut plan, |planner, one, plan| {
                planner.open_watched(one, plan);
                planner.open_announced(one, plan);
            });
        }
        for one in &mut planned {
            self.charge(one, &mut plan, |planner, one, plan| planner.emit_results(one, plan));
            let due = self.due_of(&one.name);
            self.dirty_set.planned(&one.name, now, one.work, due);
        }
        (plan.commands, plan.changes)
    }

    /// Runs one phase for a container, and charges its work to the container.
    fn charge(
        &mut self,
        one: &mut PlannedContainer,
        plan: &mut Plan,
        part: impl FnOnce(&mut Planner, &mut PlannedContainer, &mut Plan),
    ) {
        let (lookups, commands) = (self.forwards.lookups(), plan.commands.len());
        part(self, one, plan);
        one.work.lookups += self.forwards.lookups().wrapping_sub(lookups);
        one.work.commands += plan.commands.len() - commands;
    }

    /// When the next step will yield something although nothing changes: a retry or a lingering port is due, or a
    /// container has paid for its last plan.
    pub fn due(&self) -> Option<Instant> {
        let port_holds = self.holds_since.map(|since| since + PORT_HOLD);
        self.dirty_set.next().into_iter().chain(port_holds).min()
    }

    /// When a container is planned although nothing changes.
    fn due_of(&self, name: &ContainerName) -> Option<Instant> {
        // A host port with a forward waits for the engine's answer, not for a time.
        let is_free = |port: NonZeroU16| self.forwards.at_host_port(port).is_none();
        let failures = self.failures.get(name).into_iter().flatten();
        let retries = failures.filter_map(|(port, failure)| Some((*port, failure.at?)));
        let retries = retries.filter(|(port, _)| is_free(*port)).map(|(_, at)| at + RETRY);
        let lingering = self.forwards_of(name).filter(|forward| forward.is_live());
        let lingering = lingering.filter_map(|forward| forward.unseen).map(|since| since + LINGER);
        let reserved = self.reserved_retries(name).filter(|(port, _)| is_free(*port)).map(|(_, at)| at);
        let natives = self.natives_due(name);
        retries.chain(lingering).chain(reserved).chain(natives).chain(self.results_due(name)).min()
    }

    /// Marks the containers that wait for a host port, because it is free or has another owner.
    pub(super) fn mark_port_waiters(&mut self, port: NonZeroU16) {
        for upstream in self.upstreams.values() {
            let listens = upstream.seen.as_ref().is_some_and(|seen| seen.at(port).is_some());
            if let Some(owner) = upstream.owner.as_ref().filter(|_| listens) {
                self.dirty_set.mark(owner);
            }
        }
        for (name, broker) in &self.brokers {
            if broker.waits_for(port) {
                self.dirty_set.mark(name);
            }
        }
    }

    /// The containers whose rows may have changed since they were read.
    pub fn take_stale(&mut self) -> BTreeSet<ContainerName> {
        self.dirty_set.take_stale()
    }
}
