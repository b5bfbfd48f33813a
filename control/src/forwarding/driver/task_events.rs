//! What the visits of containers tell, taken in.

use std::time::Instant;

use super::containers::Container;
use crate::forwarding::driver::event_loop::{Driver, ENTER_AGAIN};
use crate::forwarding::entry::{Certainty, EntryResult, TaskEvent, TaskReport};
use crate::forwarding::planner::Admission;
use crate::model::event::Event as JournalEvent;
use crate::model::forward_table::Reachability;
use crate::model::registration::{AttachMethod, ContainerName};

impl Driver {
    /// Where a visit is that told this, unless it was replaced meanwhile.
    pub(super) fn place_of(&self, told: &TaskReport) -> Option<usize> {
        self.containers.iter().position(|container| {
            *container.name() == told.name
                && container.task.as_ref().is_some_and(|task| task.number == told.task)
        })
    }

    pub(super) async fn hear_word(&mut self, told: TaskReport) {
        let Some(at) = self.place_of(&told) else { return };
        let Some(container) = self.containers.get_mut(at) else { return };
        match told.word {
            TaskEvent::Entered { serial, entry, circumstances } => {
                let task = container.task.as_ref();
                if task.is_some_and(|task| {
                    task.entry_request.borrow().is_some_and(|entry_request| entry_request.serial == serial)
                }) {
                    container.circumstances = circumstances;
                    self.desired();
                    self.admit(at, entry).await;
                }
            }
            TaskEvent::Missed { certainty, reason } => {
                container.tried |= certainty != Certainty::Unknown;
                container.missed = true;
                let (state, told) = match certainty {
                    Certainty::Gone => (Reachability::Waiting, false),
                    Certainty::Refused | Certainty::Unknown => (Reachability::Unreachable, true),
                };
                if certainty == Certainty::Gone {
                    self.planner.left(&told_name(container));
                }
                self.mark(at, state, Some(reason), told);
            }
            TaskEvent::Left { reason } => {
                container.tried = true;
                (container.again, container.shares) = (None, None);
                self.planner.left(&told_name(container));
                self.mark(at, Reachability::Waiting, Some(reason), true);
            }
            TaskEvent::Ended => {
                container.tried = true;
                (container.again, container.shares) = (None, None);
                let name = told_name(container);
                self.planner.left(&name);
                self.mark(at, Reachability::Waiting, Some("its process has ended".to_owned()), false);
                // Nobody may listen; the container is then looked at by whoever looks at all of them.
                let _ = self.parts.ended.send(name);
            }
        }
    }

    async fn admit(&mut self, at: usize, entry: EntryResult) {
        if let Some(owner) = self.forwarded_owner_of_network(at) {
            return self.leave_to(at, &owner, entry.cookie);
        }
        let Some(container) = self.containers.get_mut(at) else { return };
        container.tried = true;
        let name = told_name(container);
        let docker_name = container.registration.docker_name().clone();
        let mut admission = self.planner.reached(&name, entry.cookie);
        // Who only uses this container's network has it as long as the container itself is not forwarded, and no longer.
        while let Admission::Shared(guest) = &admission
            && let Some(guest) = self.guest_of(&docker_name, guest)
        {
            self.leave_to(guest, &name, entry.cookie);
            admission = self.planner.reached(&name, entry.cookie);
        }
        let Some(container) = self.containers.get_mut(at) else { return };
        container.missed = matches!(admission, Admission::Shared(_));
        container.shares = container.missed.then_some(entry.cookie);
        container.means = Some(entry.means.clone());
        let faster = entry.faster.as_ref().map(|reason| format!("not by its namespace: {reason}"));
        match admission {
            Admission::Known(_) => self.mark(at, Reachability::Reached, faster, true),
            Admission::Add(upstream) => {
                // What the one before held has to be let go of first.
                self.step_once().await;
                if self.give(&entry.command(upstream), &entry.descriptors).await {
                    self.mark(at, Reachability::Reached, faster, true);
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

    /// The container whose network this one uses, where that one is forwarded itself.
    fn forwarded_owner_of_network(&self, at: usize) -> Option<ContainerName> {
        let owner = self.containers.get(at)?.circumstances.network_of.as_ref()?;
        let is_owner = |container: &&Container| {
            matches!(container.attach_method, Some(AttachMethod::Docker { .. }))
                && container.registration.docker_name().as_str() == owner
        };
        self.containers.iter().find(is_owner).map(told_name)
    }

    /// Where the container of this name is, if it only uses the network of the one that Docker calls `owner`.
    fn guest_of(&self, owner: &ContainerName, guest: &ContainerName) -> Option<usize> {
        let is_guest = |container: &Container| {
            container.name() == guest && container.circumstances.network_of.as_deref() == Some(owner.as_str())
        };
        self.containers.iter().position(is_guest)
    }

    /// Leaves the ports of a container to the one whose network it uses.
    fn leave_to(&mut self, at: usize, owner: &ContainerName, cookie: u64) {
        let Some(container) = self.containers.get_mut(at) else { return };
        container.tried = true;
        container.missed = true;
        container.shares = Some(cookie);
        let name = told_name(container);
        self.enter_later(at);
        self.planner.left(&name);
        let reason =
            format!("it uses the network of container \"{owner}\", under which its ports are forwarded");
        self.mark(at, Reachability::Unreachable, Some(reason), true);
    }

    pub(super) fn enter_later(&mut self, at: usize) {
        if let Some(container) = self.containers.get_mut(at) {
            container.again = Some(Instant::now() + ENTER_AGAIN);
        }
    }

    /// Whether a container would be left to another one again, as it was, if it were entered now.
    pub(super) fn is_shared_still(&self, at: usize) -> bool {
        let Some(container) = self.containers.get(at) else { return false };
        let Some(cookie) = container.shares else { return false };
        self.forwarded_owner_of_network(at).is_some()
            || self.planner.fellow(container.name(), cookie).is_some()
    }

    /// Notes how far a container is reached, and tells when that is news.
    pub(super) fn mark(&mut self, at: usize, state: Reachability, reason: Option<String>, tell: bool) {
        let Some(container) = self.containers.get_mut(at) else { return };
        let news = container.state != state || container.reason != reason;
        container.is_stale = true;
        container.state = state;
        container.reason = reason.clone();
        if !news || !tell {
            return;
        }
        let container_name = container.name().as_str().to_owned();
        let attach_method = container.way_in_words().unwrap_or_default();
        self.journal.record(&match state {
            Reachability::Reached => JournalEvent::ContainerReached { container_name, attach_method },
            _ => JournalEvent::ContainerUnreachable { container_name, reason: reason.unwrap_or_default() },
        });
    }
}

fn told_name(container: &Container) -> ContainerName {
    container.registration.container_name.clone()
}
