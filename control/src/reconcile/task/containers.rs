//! What is known of each registered container beside its ports.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{Notify, mpsc, watch};
use tokio::task::AbortHandle;

use super::Owners;
use crate::docker::Docker;
use crate::policy::{Policy, PortForward};
use crate::reconcile::fleet::{Fleet, Wish};
use crate::reconcile::reach::{self, Gate, Told, Visit};
use crate::reconcile::table::{ContainerState, ForwardRow, Reached};
use crate::registration::model::{ContainerName, Registration, Way};

/// One registered container.
#[derive(Debug)]
pub(super) struct Container {
    pub(super) registration: Arc<Registration>,
    /// How it is reached, if it is to be forwarded.
    pub(super) way: Option<Way>,
    pub(super) state: Reached,
    pub(super) reason: Option<String>,
    /// Since the engine was attached it was entered, or known not to run.
    pub(super) tried: bool,
    /// When it is to be entered once more.
    pub(super) again: Option<Instant>,
    pub(super) visit: Option<Visiting>,
}

/// The task that is on its way into a container.
#[derive(Debug)]
pub(super) struct Visiting {
    pub(super) number: u64,
    pub(super) gate: watch::Sender<Option<Gate>>,
    pub(super) hint: Arc<Notify>,
    task: AbortHandle,
}

impl Drop for Visiting {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Visiting {
    /// Sets out.
    pub(super) fn begin(
        name: &ContainerName,
        number: u64,
        way: &Way,
        docker: &Docker,
        gate: Option<Gate>,
        words: &mpsc::UnboundedSender<Told>,
    ) -> Visiting {
        let (gate, opened) = watch::channel(gate);
        let hint = Arc::new(Notify::new());
        let visit = Visit {
            name: name.clone(),
            number,
            way: way.clone(),
            docker: docker.clone(),
            gate: opened,
            hint: Arc::clone(&hint),
            words: words.clone(),
        };
        let task = tokio::spawn(visit.run()).abort_handle();
        Visiting { number, gate, hint, task }
    }
}

impl Container {
    /// A container that nobody has set out for.
    pub(super) fn new(registration: Arc<Registration>) -> Container {
        let way = wanted_way(&registration);
        let state = if way.is_some() { Reached::Waiting } else { Reached::Off };
        Container { registration, way, state, reason: None, tried: false, again: None, visit: None }
    }

    pub(super) fn name(&self) -> &ContainerName {
        &self.registration.container_name
    }

    /// What the planner is told of it.
    pub(super) fn wish(&self) -> Option<Wish> {
        self.way.as_ref()?;
        let everything = PortForward::default();
        let policy = Policy::from(self.registration.port_forward.as_ref().unwrap_or(&everything));
        Some(Wish { name: self.name().clone(), policy })
    }

    /// What people are told of it.
    pub(super) fn told(&self, fleet: &Fleet, owners: &Owners) -> ContainerState {
        let rows = fleet.rows(self.name()).into_iter().map(|row| {
            let owner = row.inodes.iter().find_map(|inode| owners.get(inode)?.as_ref());
            ForwardRow {
                port: row.port.get(),
                host_port: row.port.get(),
                state: row.state,
                reason: row.reason,
                process: owner.map(|owner| owner.name.clone()),
                pid: owner.map(|owner| owner.pid),
                connections: row.stats.open,
                accepted: row.stats.accepted,
                bytes_up: row.stats.bytes_up,
                bytes_down: row.stats.bytes_down,
            }
        });
        ContainerState {
            container_name: self.name().as_str().to_owned(),
            way: reach::way_of(&self.registration).as_ref().map(ToString::to_string),
            state: self.state,
            reason: self.reason.clone(),
            forwards: rows.collect(),
        }
    }
}

/// The way of a container that is to be forwarded: it has one, and its policy exposes something.
pub(super) fn wanted_way(registration: &Registration) -> Option<Way> {
    let off = registration.port_forward.as_ref().is_some_and(PortForward::is_off);
    reach::way_of(registration).filter(|_| !off)
}
