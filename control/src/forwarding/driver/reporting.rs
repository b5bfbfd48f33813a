//! Reports changes: events in the journal, results to broker sessions, and the table of forwards.

use std::collections::BTreeSet;
use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::Instant;

use landfall_engine::command::Command;
use tokio::sync::oneshot;

use super::Snapshot;
use super::containers::ContainerView;
use super::owners::Found;
use crate::forwarding::broker_link::SessionUpdate;
use crate::forwarding::driver::event_loop::{Driver, Engine, REENTER_PAUSE};
use crate::forwarding::planner::Change;
use crate::model::event::{Event as JournalEvent, PortForwardEvent};
use crate::model::forward_table::{ContainerState, ForwardPath, ForwardTable, Reachability, RowState};
use crate::model::registration::ContainerName;

impl Driver {
    pub(super) fn report_changes(&mut self, changes: Vec<Change>) {
        for change in changes {
            let event = match change {
                Change::Opened { name, port, host_port, bind } => {
                    self.opened(&name, port, host_port, bind, ForwardPath::Relay)
                }
                Change::OpenedNative { name, port, bind } => {
                    self.opened(&name, port, port, bind, ForwardPath::Native)
                }
                Change::Closed { name, port, host_port, why } => PortForwardEvent::PortForwardClosed {
                    container_name: name.as_str().to_owned(),
                    port,
                    host_port,
                    reason: why.as_str().to_owned(),
                },
                Change::Failed { name, port, reason } => PortForwardEvent::PortForwardFailed {
                    container_name: name.as_str().to_owned(),
                    port,
                    reason,
                },
                Change::Result { name, result } => {
                    self.brokers.send_update(&name, SessionUpdate::Result(result));
                    continue;
                }
                Change::Lost { name, dialled: true, .. } => {
                    self.dial_later(&name);
                    continue;
                }
                Change::Lost { name, dialled: false, reason } => {
                    let at = self.containers.iter().position(|container| *container.name() == name);
                    if let Some(at) = at {
                        if let Some(container) = self.containers.get_mut(at) {
                            container.enter_at = Some(Instant::now() + REENTER_PAUSE);
                        }
                        self.mark(at, Reachability::Unreachable, Some(reason), true);
                    }
                    continue;
                }
            };
            self.journal.record(&JournalEvent::PortForwardEvent { event });
        }
    }

    fn opened(
        &self,
        name: &ContainerName,
        port: NonZeroU16,
        host_port: NonZeroU16,
        bind: &str,
        path: ForwardPath,
    ) -> PortForwardEvent {
        let container = self.containers.iter().find(|container| container.name() == name);
        let note = container.and_then(|container| container.registration.note_of(port));
        PortForwardEvent::PortForwardOpened {
            container_name: name.as_str().to_owned(),
            port,
            host_port,
            bind_addr: bind.to_owned(),
            label: note.and_then(|note| note.label.clone()),
            path,
            silent: note.is_some_and(|note| note.silent),
        }
    }

    pub(super) async fn describe(&mut self, answer: oneshot::Sender<ForwardTable>) {
        let Engine::Attached(link, _) = &self.engine else {
            // The caller may have gone.
            let _ = answer.send(self.table());
            return;
        };
        // An engine of another release may not support the shorter command.
        let request = if link.is_ours() { Command::Count } else { Command::Describe };
        self.tables.retain(|waiting| !waiting.is_closed());
        self.tables.push(answer);
        // If sending fails, losing the engine answers the waiting callers.
        self.send_command(&request, &[]).await;
    }

    pub(super) fn table(&mut self) -> ForwardTable {
        self.update_views();
        self.snapshot().into()
    }

    fn snapshot(&self) -> Snapshot {
        let engine = match &self.engine {
            Engine::Attached(link, _) => {
                let draining = Arc::strong_count(&self.draining) - 1;
                Some(link.facts(u32::try_from(draining).unwrap_or(u32::MAX)))
            }
            _ => None,
        };
        let containers = self.containers.iter().map(|container| Arc::clone(&container.view.state)).collect();
        Snapshot { engine, containers }
    }

    /// Publishes the state after this turn, and starts looking up the processes behind new sockets.
    pub(super) fn publish(&mut self) {
        self.update_views();
        self.owners.look();
        let complete = self.swept || self.is_idle();
        self.parts
            .open_ports_sender
            .send_if_modified(|open| std::mem::replace(&mut open.complete, complete) != complete);
        self.parts.published.publish(self.snapshot());
    }

    /// Updates the views of the containers that changed.
    fn update_views(&mut self) {
        let stale = self.planner.take_stale();
        for at in 0..self.containers.len() {
            let Some(container) = self.containers.get_mut(at) else { continue };
            if !container.is_stale && !stale.contains(container.name()) {
                continue;
            }
            let before = container.list(&self.planner, &mut self.owners);
            let (name, now) = (container.name().clone(), Arc::clone(&container.view.state));
            self.replace_open_ports(name.as_str(), &before, &now);
            self.report_session(at);
        }
        self.withdraw_removed();
    }

    /// Replaces the open ports of a container, those of `before`, by those of `now`.
    fn replace_open_ports(&self, name: &str, before: &ContainerState, now: &ContainerState) {
        let (before, now) = (open_ports_of(before), open_ports_of(now));
        if before == now {
            return;
        }
        self.parts.open_ports_sender.send_modify(|open| {
            for port in before.difference(&now) {
                // Another container may have the port by now.
                if open.ports.get(port).is_some_and(|owner| owner == name) {
                    open.ports.remove(port);
                }
            }
            for port in now.difference(&before) {
                open.ports.insert(*port, name.to_owned());
            }
        });
    }

    /// Withdraws the views of containers that were removed or replaced.
    fn withdraw_removed(&mut self) {
        for (name, ContainerView { state, inodes }) in std::mem::take(&mut self.removed) {
            let has = |inode: &&u64| self.containers.iter().any(|one| one.view.inodes.contains(inode));
            let kept: BTreeSet<u64> = inodes.iter().filter(has).copied().collect();
            self.owners.replace(&inodes, &kept);
            let successor = self.containers.iter().find(|container| *container.name() == name);
            let now = successor.map(|successor| Arc::clone(&successor.view.state));
            let now = now.unwrap_or_else(|| {
                Arc::new(ContainerState { forwards: Vec::new(), ..ContainerState::clone(&state) })
            });
            self.replace_open_ports(name.as_str(), &state, &now);
        }
    }

    /// Takes in the processes behind some sockets.
    pub(super) fn on_owners(&mut self, found: Found) {
        let known = self.owners.take(found);
        for container in &mut self.containers {
            container.is_stale |= !container.view.inodes.is_disjoint(&known);
        }
    }
}

/// The host ports of a container that answer.
fn open_ports_of(state: &ContainerState) -> BTreeSet<NonZeroU16> {
    let open = state.forwards.iter().filter(|row| row.state == RowState::Open);
    open.filter_map(|row| NonZeroU16::new(row.host_port)).collect()
}
