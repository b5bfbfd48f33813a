//! What people and programs are told: events in the journal, and the table.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::Instant;

use landfall_engine::command::Command;
use tokio::sync::oneshot;

use super::driver::{Driver, ENTER_AGAIN, Engine};
use super::{Answering, Owners};
use crate::events::{Event as JournalEvent, PortForwardEvent};
use crate::processes::ProcessFact;
use crate::reconcile::announced::BrokerWord;
use crate::reconcile::fleet::Change;
use crate::reconcile::table::{ForwardTable, Reached, RowState};
use crate::sys::launcher::owners_of_sockets;

impl Driver {
    pub(super) fn tell_all(&mut self, changes: Vec<Change>) {
        for change in changes {
            let event = match change {
                Change::Opened { name, port, host_port, bind } => {
                    let container = self.containers.iter().find(|container| *container.name() == name);
                    let note = container.and_then(|container| container.registration.note_of(port));
                    PortForwardEvent::PortForwardOpened {
                        container_name: name.as_str().to_owned(),
                        port,
                        host_port,
                        bind_addr: bind.to_owned(),
                        label: note.and_then(|note| note.label.clone()),
                        silent: note.is_some_and(|note| note.silent),
                    }
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
                    self.brokers.tell(&name, BrokerWord::Result(result));
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
                            container.again = Some(Instant::now() + ENTER_AGAIN);
                        }
                        self.mark(at, Reached::Unreachable, Some(reason), true);
                    }
                    continue;
                }
            };
            self.journal.tell(&JournalEvent::PortForwardEvent { event });
        }
    }

    pub(super) async fn describe(&mut self, answer: oneshot::Sender<ForwardTable>) {
        if self.give(&Command::Describe, &[]).await {
            self.tables.push(answer);
        } else {
            // Whoever asked may have gone.
            let _ = answer.send(self.table());
        }
    }

    pub(super) fn table(&self) -> ForwardTable {
        let engine = match &self.engine {
            Engine::Attached(link, _) => {
                let draining = Arc::strong_count(&self.draining) - 1;
                Some(link.facts(u32::try_from(draining).unwrap_or(u32::MAX)))
            }
            _ => None,
        };
        let containers =
            self.containers.iter().map(|container| container.told(&self.fleet, &self.owners)).collect();
        ForwardTable { engine, containers }
    }

    /// Publishes what is known, and looks for the processes behind ports that were not seen before.
    pub(super) fn publish(&mut self) {
        self.tell_sessions();
        let inodes: BTreeSet<u64> = self
            .containers
            .iter()
            .flat_map(|container| self.fleet.rows(container.name()))
            .filter(|row| row.state != RowState::Denied)
            .flat_map(|row| row.inodes)
            .collect();
        self.owners.retain(|inode, _| inodes.contains(inode));
        let unknown: Vec<u64> = inodes.into_iter().filter(|inode| !self.owners.contains_key(inode)).collect();
        if self.looking.is_none() && !unknown.is_empty() {
            self.looking = Some(tokio::task::spawn_blocking(move || owners_of(&unknown)));
        }
        let table = self.table();
        let answering = Answering { settled: self.settled || self.is_idle(), ports: answering(&table) };
        self.parts.answers.send_if_modified(|told| {
            let news = *told != answering;
            *told = answering;
            news
        });
        self.parts.published.publish(table);
    }
}

fn answering(table: &ForwardTable) -> BTreeMap<NonZeroU16, String> {
    let rows = table.containers.iter().flat_map(|container| {
        let open = container.forwards.iter().filter(|row| row.state == RowState::Open);
        open.filter_map(|row| Some((NonZeroU16::new(row.host_port)?, container.container_name.clone())))
    });
    rows.collect()
}

fn owners_of(inodes: &[u64]) -> Owners {
    let mut found: BTreeMap<u64, ProcessFact> = owners_of_sockets(inodes);
    inodes.iter().map(|inode| (*inode, found.remove(inode))).collect()
}
