//! What is known of each registered container beside its ports.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{Notify, mpsc, watch};
use tokio::task::AbortHandle;

use super::owners::SocketOwners;
use crate::docker::Docker;
use crate::forwarding::entry::{self, Circumstances, Gate, Means, Told, Visit};
use crate::forwarding::planner::{Fleet, Row, Rows, Wish};
use crate::model::forward_table::{ContainerState, ForwardRow, Reached, RowState};
use crate::model::native_sockets;
use crate::model::port_policy::Policy;
use crate::model::registration::{ContainerName, Registration, Way};
use crate::sys::processes;

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
    /// It cannot be entered just now, as far as was tried, so its broker's session may dial for it.
    pub(super) missed: bool,
    /// When it is to be entered once more.
    pub(super) again: Option<Instant>,
    /// The cookie of a namespace that it shares with another container, to which its ports are left.
    pub(super) shares: Option<u64>,
    /// When its session may dial again.
    pub(super) dial_again: Option<Instant>,
    /// What it was entered by last.
    pub(super) means: Option<Means>,
    /// What Docker told of it then.
    pub(super) circumstances: Circumstances,
    /// It was told to be reached over its session alone.
    pub(super) over_session: bool,
    /// Something changed about it since it was listed.
    pub(super) is_stale: bool,
    /// As it was listed last.
    pub(super) listed: Listed,
    pub(super) visit: Option<Visiting>,
}

/// A container as clients see it.
#[derive(Debug)]
pub(super) struct Listed {
    pub(super) state: Arc<ContainerState>,
    /// The sockets behind the rows whose process is shown.
    pub(super) inodes: BTreeSet<u64>,
}

/// The task that is on its way into a container.
#[derive(Debug)]
pub(super) struct Visiting {
    pub(super) number: u64,
    pub(super) gate: watch::Sender<Option<Gate>>,
    pub(super) id: watch::Sender<Option<String>>,
    pub(super) hint: Arc<Notify>,
    task: AbortHandle,
}

/// What every visit is given.
#[derive(Debug)]
pub(super) struct Errand {
    pub(super) docker: Docker,
    pub(super) helper: Option<PathBuf>,
    /// Whether Docker's events are followed.
    pub(super) followed: watch::Sender<bool>,
    pub(super) words: mpsc::UnboundedSender<Told>,
}

impl Drop for Visiting {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Visiting {
    /// Sets out.
    pub(super) fn begin(
        registration: &Registration,
        number: u64,
        way: &Way,
        gate: Option<Gate>,
        errand: &Errand,
    ) -> Visiting {
        let (gate, opened) = watch::channel(gate);
        let (id, meant) = watch::channel(registration.found_id().map(str::to_owned));
        let hint = Arc::new(Notify::new());
        let visit = Visit {
            name: registration.container_name.clone(),
            id: meant,
            number,
            way: way.clone(),
            docker: errand.docker.clone(),
            helper: errand.helper.clone(),
            gate: opened,
            hint: Arc::clone(&hint),
            followed: errand.followed.subscribe(),
            words: errand.words.clone(),
        };
        let task = tokio::spawn(visit.run()).abort_handle();
        Visiting { number, gate, id, hint, task }
    }
}

impl Container {
    /// A container that nobody has set out for.
    pub(super) fn new(registration: Arc<Registration>) -> Container {
        let way = wanted_way(&registration);
        let (state, reason) = match &way {
            Some(Way::Websocket) => (Reached::Waiting, Some("its WebSocket is not connected")),
            Some(_) => (Reached::Waiting, None),
            None if is_off(&registration) || entry::way_of(&registration).is_none() => (Reached::Off, None),
            None => (Reached::Unreachable, Some(NO_BROKER)),
        };
        let visited = way.as_ref().is_some_and(is_visited);
        let container_name = registration.container_name.to_string();
        let unlisted = ContainerState {
            container_name,
            way: None,
            state,
            reason: None,
            forwards: Vec::new(),
            omitted: 0,
        };
        let listed = Listed { state: Arc::new(unlisted), inodes: BTreeSet::new() };
        Container {
            registration,
            way,
            state,
            reason: reason.map(str::to_owned),
            tried: !visited,
            missed: !visited,
            again: None,
            shares: None,
            dial_again: None,
            means: None,
            circumstances: Circumstances::default(),
            over_session: false,
            is_stale: true,
            listed,
            visit: None,
        }
    }

    /// It is registered again, in the same way.
    pub(super) fn registered_again(self, registration: &Arc<Registration>) -> Container {
        if let Some(visit) = &self.visit
            && !Arc::ptr_eq(&self.registration, registration)
        {
            visit.id.send_replace(registration.found_id().map(str::to_owned));
            // Whoever registers it again may know that it is there.
            visit.hint.notify_one();
        }
        Container { registration: Arc::clone(registration), is_stale: true, ..self }
    }

    /// Whether another one is the same container of Docker's, under whatever name.
    pub(super) fn is_same(&self, other: &Container) -> bool {
        let id = |container: &Container| {
            let is_dockers = matches!(container.way, Some(Way::Docker { .. }));
            container.registration.found_id().filter(|_| is_dockers).map(str::to_owned)
        };
        id(self).is_some_and(|own| id(other) == Some(own))
    }

    /// What is known of it, where it is the same as this one was.
    pub(super) fn go_on_from(&mut self, before: &Container) {
        (self.state, self.reason) = (before.state, before.reason.clone());
        (self.tried, self.missed, self.shares) = (before.tried, before.missed, before.shares);
        self.means.clone_from(&before.means);
        self.circumstances = before.circumstances.clone();
        self.listed.inodes.clone_from(&before.listed.inodes);
    }

    /// Ends it. Returns its name and the listing, which is to be taken back.
    pub(super) fn into_listed(self) -> (ContainerName, Listed) {
        (self.registration.container_name.clone(), self.listed)
    }

    /// Whether there is a way in that is gone by a visit.
    pub(super) fn is_visited(&self) -> bool {
        self.way.as_ref().is_some_and(is_visited)
    }

    /// Whether its session may dial for it.
    pub(super) fn may_dial(&self, now: Instant) -> bool {
        self.way.is_some() && self.missed && self.dial_again.is_none_or(|again| again <= now)
    }

    /// Whether its session is how it is reached.
    pub(super) fn is_dialled(&self, fleet: &Fleet) -> bool {
        fleet.has_session(self.name()) && fleet.dialled(self.name()).is_some()
    }

    pub(super) fn name(&self) -> &ContainerName {
        &self.registration.container_name
    }

    /// What the planner is told of it.
    pub(super) fn wish(&self) -> Option<Wish> {
        self.way.as_ref()?;
        let policy = Policy::from(self.registration.exposed().unwrap_or_default().as_ref());
        let published = self.circumstances.published.clone();
        let native = native_sockets::is_announced(&self.registration);
        Some(Wish { name: self.name().clone(), policy, published, native })
    }

    /// Lists it again. Returns what was listed before.
    pub(super) fn list(&mut self, fleet: &Fleet, owners: &mut SocketOwners) -> Arc<ContainerState> {
        self.is_stale = false;
        let Rows { listed, omitted } = fleet.rows(self.name());
        // A supervisor may hold a native socket as well, so it reports the process that listens.
        let shown = listed.iter().filter(|row| row.state != RowState::Denied && row.process.is_none());
        let inodes: BTreeSet<u64> = shown.flat_map(|row| row.inodes.iter().copied()).collect();
        owners.replace(&self.listed.inodes, &inodes);
        self.listed.inodes = inodes;
        let state = Arc::new(self.as_listed(fleet, owners, listed, omitted));
        std::mem::replace(&mut self.listed.state, state)
    }

    fn as_listed(
        &self,
        fleet: &Fleet,
        owners: &SocketOwners,
        rows: Vec<Row>,
        omitted: usize,
    ) -> ContainerState {
        let rows = rows.into_iter().map(|row| {
            let reported = row.process.and_then(processes::process_fact);
            let found = row.inodes.iter().find_map(|inode| owners.of(*inode)).cloned();
            let owner = reported.or(found);
            let note = self.registration.note_of(row.port);
            ForwardRow {
                port: row.port.get(),
                host_port: row.host_port.get(),
                state: row.state,
                path: row.path,
                addresses: row.addresses,
                reason: row.reason,
                pid: owner.as_ref().map(|owner| owner.pid),
                process: owner.map(|owner| owner.name),
                label: note.and_then(|note| note.label.clone()),
                silent: note.is_some_and(|note| note.silent),
                connections: row.stats.open,
                accepted: row.stats.accepted,
                bytes_up: row.stats.bytes_up,
                bytes_down: row.stats.bytes_down,
            }
        });
        let (way, state, reason) = self.standing(fleet);
        ContainerState {
            container_name: self.name().as_str().to_owned(),
            way,
            state,
            reason,
            forwards: rows.collect(),
            omitted,
        }
    }

    /// Its way, with what it was entered by.
    pub(super) fn way_in_words(&self) -> Option<String> {
        let way = entry::way_of(&self.registration)?;
        let means = self.means.as_ref().filter(|_| self.state == Reached::Reached);
        Some(means.map_or_else(|| way.to_string(), |means| means.words(&way)))
    }

    /// The way that its bytes go, how far it is reached by that, and why no further, or why by no faster way.
    fn standing(&self, fleet: &Fleet) -> (Option<String>, Reached, Option<String>) {
        if !self.is_dialled(fleet) {
            return (self.way_in_words(), self.state, self.reason.clone());
        }
        let way = entry::way_of(&self.registration);
        let faster = way.filter(is_visited).zip(self.reason.as_ref());
        let reason = faster.map(|(way, reason)| format!("not by {way}: {reason}"));
        (Some(Way::Websocket.to_string()), Reached::Reached, reason)
    }
}

/// Why a container that is to be reached by its WebSocket alone is not.
const NO_BROKER: &str = "it is registered for its WebSocket alone, and without the three that this takes: wsHostPort, portForward and brokerToken";

/// Whether a way leads in by a visit, and not by the container's broker alone.
fn is_visited(way: &Way) -> bool {
    *way != Way::Websocket
}

fn is_off(registration: &Registration) -> bool {
    registration.exposes_nothing()
}

/// The way of a container that is to be forwarded: it has one, with all that it takes, and its policy exposes something.
pub(super) fn wanted_way(registration: &Registration) -> Option<Way> {
    let lacks = |way: &Way| *way == Way::Websocket && registration.broker().is_none();
    entry::way_of(registration).filter(|way| !is_off(registration) && !lacks(way))
}
