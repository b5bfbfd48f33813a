//! Handles the reports of container tasks.

use std::time::Instant;

use super::containers::Container;
use crate::forwarding::driver::event_loop::{Driver, REENTER_PAUSE};
use crate::forwarding::entry::{Certainty, EntryResult, TaskEvent, TaskReport};
use crate::forwarding::planner::Admission;
use crate::model::event::Event as JournalEvent;
use crate::model::forward_table::Reachability;
use crate::model::registration::{AttachMethod, ContainerName};

impl Driver {
    /// The index of the container whose current task sent this report.
    pub(super) fn index_of_task(&self, report: &TaskReport) -> Option<usize> {
        self.containers.iter().position(|container| {
            *container.name() == report.name
                && container.task.as_ref().is_some_and(|task| task.number == report.task)
        })
    }

    pub(super) async fn on_task_report(&mut self, report: TaskReport) {
        let Some(at) = self.index_of_task(&report) else { return };
        let Some(container) = self.containers.get_mut(at) else { return };
        match report.event {
            TaskEvent::Entered { serial, entry, docker_facts } => {
                let task = container.task.as_ref();
                if task.is_some_and(|task| {
                    task.entry_request.borrow().is_some_and(|entry_request| entry_request.serial == serial)
                }) {
                    container.docker_facts = docker_facts;
                    self.desired();
                    self.admit(at, entry).await;
                }
            }
            TaskEvent::EntryFailed { certainty, reason } => {
                container.tried |= certainty != Certainty::Unknown;
                container.entry_failed = true;
                let (state, is_reported) = match certainty {
                    Certainty::Gone => (Reachability::Waiting, false),
                    Certainty::Refused | Certainty::Unknown => (Reachability::Unreachable, true),
                };
                if certainty == Certainty::Gone {
                    self.planner.container_lost(&name_of(container));
                }
                self.mark(at, state, Some(reason), is_reported);
            }
            TaskEvent::ContainerGone { reason } => {
                container.tried = true;
                (container.enter_at, container.shared_cookie) = (None, None);
                self.planner.container_lost(&name_of(container));
                self.mark(at, Reachability::Waiting, Some(reason), true);
            }
            TaskEvent::ProcessEnded => {
                container.tried = true;
                (container.enter_at, container.shared_cookie) = (None, None);
                let name = name_of(container);
                self.planner.container_lost(&name);
                self.mark(at, Reachability::Waiting, Some("its process has ended".to_owned()), false);
                // If the receiver is gone, the daemon's regular check of all registrations removes this one.
                let _ = self.parts.ended.send(name);
            }
        }
    }

    async fn admit(&mut self, at: usize, entry: EntryResult) {
        if let Some(owner) = self.network_owner(at) {
            return self.yield_ports_to(at, &owner, entry.cookie);
        }
        let Some(container) = self.containers.get_mut(at) else { return };
        container.tried = true;
        let name = name_of(container);
        let docker_name = container.registration.docker_name().clone();
        let mut admission = self.planner.container_entered(&name, entry.cookie);
        // A container that only uses this one's network yields the namespace when this one is forwarded itself.
        while let Admission::Shared(guest) = &admission
            && let Some(guest) = self.network_guest(&docker_name, guest)
        {
            self.yield_ports_to(guest, &name, entry.cookie);
            admission = self.planner.container_entered(&name, entry.cookie);
        }
        let Some(container) = self.containers.get_mut(at) else { return };
        container.entry_failed = matches!(admission, Admission::Shared(_));
        container.shared_cookie = container.entry_failed.then_some(entry.cookie);
        container.entered_by = Some(entry.entered_by.clone());
        let fallback_reason =
            entry.fallback_reason.as_ref().map(|reason| format!("not by its namespace: {reason}"));
        match admission {
            Admission::Known(_) => self.mark(at, Reachability::Reached, fallback_reason, true),
            Admission::Add(upstream) => {
                // The previous upstream of the container is removed first.
                self.step_once().await;
                if self.send_command(&entry.command(upstream), &entry.descriptors).await {
                    self.mark(at, Reachability::Reached, fallback_reason, true);
                }
            }
            Admission::Shared(other) => {
                self.enter_later(at);
                let reason =
                    format!("it shares the network of container \"{other}\", which is forwarded already");
                self.mark(at, Reachability::Unreachable, Some(reason), true);
            }
            Admission::Unwanted => {}
        }
    }

    /// The container whose network this one uses, if that one is forwarded itself.
    fn network_owner(&self, at: usize) -> Option<ContainerName> {
        let owner = self.containers.get(at)?.docker_facts.network_of.as_ref()?;
        let is_owner = |container: &&Container| {
            matches!(container.attach_method, Some(AttachMethod::Docker { .. }))
                && container.registration.docker_name().as_str() == owner
        };
        self.containers.iter().find(is_owner).map(name_of)
    }

    /// The index of the container `guest`, if it uses the network of the container that Docker calls `owner`.
    fn network_guest(&self, owner: &ContainerName, guest: &ContainerName) -> Option<usize> {
        let is_guest = |container: &Container| {
            container.name() == guest && container.docker_facts.network_of.as_deref() == Some(owner.as_str())
        };
        self.containers.iter().position(is_guest)
    }

    /// Leaves the ports of a container to the one whose network it uses.
    fn yield_ports_to(&mut self, at: usize, owner: &ContainerName, cookie: u64) {
        let Some(container) = self.containers.get_mut(at) else { return };
        container.tried = true;
        container.entry_failed = true;
        container.shared_cookie = Some(cookie);
        let name = name_of(container);
        self.enter_later(at);
        self.planner.container_lost(&name);
        let reason =
            format!("it uses the network of container \"{owner}\", under which its ports are forwarded");
        self.mark(at, Reachability::Unreachable, Some(reason), true);
    }

    pub(super) fn enter_later(&mut self, at: usize) {
        if let Some(container) = self.containers.get_mut(at) {
            container.enter_at = Some(Instant::now() + REENTER_PAUSE);
        }
    }

    /// Whether an entry would again find the namespace taken by another container.
    pub(super) fn still_shares_network(&self, at: usize) -> bool {
        let Some(container) = self.containers.get(at) else { return false };
        let Some(cookie) = container.shared_cookie else { return false };
        self.network_owner(at).is_some() || self.planner.other_owner(container.name(), cookie).is_some()
    }

    /// Updates the reachability, and records an event if it changed and `report` is set.
    pub(super) fn mark(&mut self, at: usize, state: Reachability, reason: Option<String>, report: bool) {
        let Some(container) = self.containers.get_mut(at) else { return };
        let is_changed = container.state != state || container.reason != reason;
        container.is_stale = true;
        container.state = state;
        container.reason = reason.clone();
        if !is_changed || !report {
            return;
        }
        let container_name = container.name().as_str().to_owned();
        let attach_method = container.attach_method_text().unwrap_or_default();
        self.journal.record(&match state {
            Reachability::Reached => JournalEvent::ContainerReached { container_name, attach_method },
            _ => JournalEvent::ContainerUnreachable { container_name, reason: reason.unwrap_or_default() },
        });
    }
}

fn name_of(container: &Container) -> ContainerName {
    container.registration.container_name.clone()
}
