//! What is known of each registered container beside its ports.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{Notify, mpsc, watch};
use tokio::task::AbortHandle;

use super::owners::SocketOwners;
use crate::docker::Docker;
use crate::forwarding::entry::{self, ContainerTask, DockerFacts, EntryRequest, Means, TaskReport};
use crate::forwarding::planner::{DesiredContainer, Planner, Row, Rows};
use crate::model::forward_table::{ContainerState, ForwardRow, Reachability, RowState};
use crate::model::native_sockets;
use crate::model::port_policy::Policy;
use crate::model::registration::{AttachMethod, ContainerName, Registration};
use crate::sys::processes;

/// One registered container.
#[derive(Debug)]
pub(super) struct Container {
    pub(super) registration: Arc<Registration>,
    /// How it is reached, if it is to be forwarded.
    pub(super) attach_method: Option<AttachMethod>,
    pub(super) state: Reachability,
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
    pub(super) circumstances: DockerFacts,
    /// It was told to be reached over its session alone.
    pub(super) over_session: bool,
    /// Something changed about it since it was listed.
    pub(super) is_stale: bool,
    /// As it was listed last.
    pub(super) listed: ContainerView,
    pub(super) task: Option<RunningTask>,
}

/// A container as clients see it.
#[derive(Debug)]
pub(super) struct ContainerView {
    pub(super) state: Arc<ContainerState>,
    /// The sockets behind the rows whose process is shown.
    pub(super) inodes: BTreeSet<u64>,
}

/// The task that is on its way into a container.
#[derive(Debug)]
pub(super) struct RunningTask {
    pub(super) number: u64,
    pub(super) entry_request: watch::Sender<Option<EntryRequest>>,
    pub(super) id: watch::Sender<Option<String>>,
    pub(super) hint: Arc<Notify>,
    task: AbortHandle,
}

/// What every visit is given.
#[derive(Debug)]
pub(super) struct TaskContext {
    pub(super) docker: Docker,
    pub(super) helper: Option<PathBuf>,
    /// Whether Docker's events are followed.
    pub(super) followed: watch::Sender<bool>,
    pub(super) words: mpsc::UnboundedSender<TaskReport>,
}

impl Drop for RunningTask {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl RunningTask {
    /// Sets out.
    pub(super) fn begin(
        registration: &Registration,
        number: u64,
        attach_method: &AttachMethod,
        entry_request: Option<EntryRequest>,
        task_context: &TaskContext,
    ) -> RunningTask {
        let (entry_request, opened) = watch::channel(entry_request);
        let (id, meant) = watch::channel(registration.found_id().map(str::to_owned));
        let hint = Arc::new(Notify::new());
        let task = ContainerTask {
            name: registration.container_name.clone(),
            id: meant,
            number,
            attach_method: attach_method.clone(),
            docker: task_context.docker.clone(),
            helper: task_context.helper.clone(),
            entry_request: opened,
            hint: Arc::clone(&hint),
            followed: task_context.followed.subscribe(),
            words: task_context.words.clone(),
        };
        let task = tokio::spawn(task.run()).abort_handle();
        RunningTask { number, entry_request, id, hint, task }
    }
}

impl Container {
    /// A container that nobody has set out for.
    pub(super) fn new(registration: Arc<Registration>) -> Container {
        let attach_method = wanted_way(&registration);
        let (state, reason) = match &attach_method {
            Some(AttachMethod::Websocket) => (Reachability::Waiting, Some("its WebSocket is not connected")),
            Some(_) => (Reachability::Waiting, None),
            None if is_off(&registration) || entry::attach_method_of(&registration).is_none() => {
                (Reachability::Off, None)
            }
            None => (Reachability::Unreachable, Some(NO_BROKER)),
        };
        let visited = attach_method.as_ref().is_some_and(has_task);
        let container_name = registration.container_name.to_string();
        let unlisted = ContainerState {
            container_name,
            attach_method: None,
            state,
            reason: None,
            forwards: Vec::new(),
            omitted: 0,
        };
        let listed = ContainerView { state: Arc::new(unlisted), inodes: BTreeSet::new() };
        Container {
            registration,
            attach_method,
            state,
            reason: reason.map(str::to_owned),
            tried: !visited,
            missed: !visited,
            again: None,
            shares: None,
            dial_again: None,
            means: None,
            circumstances: DockerFacts::default(),
            over_session: false,
            is_stale: true,
            listed,
            task: None,
        }
    }

    /// It is registered again, in the same way.
    pub(super) fn registered_again(self, registration: &Arc<Registration>) -> Container {
        if let Some(task) = &self.task
            && !Arc::ptr_eq(&self.registration, registration)
        {
            task.id.send_replace(registration.found_id().map(str::to_owned));
            // Whoever registers it again may know that it is there.
            task.hint.notify_one();
        }
        Container { registration: Arc::clone(registration), is_stale: true, ..self }
    }

    /// Whether another one is the same container of Docker's, under whatever name.
    pub(super) fn is_same(&self, other: &Container) -> bool {
        let id = |container: &Container| {
            let is_dockers = matches!(container.attach_method, Some(AttachMethod::Docker { .. }));
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
    pub(super) fn into_listed(self) -> (ContainerName, ContainerView) {
        (self.registration.container_name.clone(), self.listed)
    }

    /// Whether there is a way in that is gone by a visit.
    pub(super) fn has_task(&self) -> bool {
        self.attach_method.as_ref().is_some_and(has_task)
    }

    /// Whether its session may dial for it.
    pub(super) fn may_dial(&self, now: Instant) -> bool {
        self.attach_method.is_some() && self.missed && self.dial_again.is_none_or(|again| again <= now)
    }

    /// Whether its session is how it is reached.
    pub(super) fn is_dialled(&self, planner: &Planner) -> bool {
        planner.has_session(self.name()) && planner.dialled(self.name()).is_some()
    }

    pub(super) fn name(&self) -> &ContainerName {
        &self.registration.container_name
    }

    /// What the planner is told of it.
    pub(super) fn desired(&self) -> Option<DesiredContainer> {
        self.attach_method.as_ref()?;
        let policy = Policy::from(self.registration.exposed().unwrap_or_default().as_ref());
        let published = self.circumstances.published.clone();
        let native = native_sockets::is_announced(&self.registration);
        Some(DesiredContainer { name: self.name().clone(), policy, published, native })
    }

    /// Lists it again. Returns what was listed before.
    pub(super) fn list(&mut self, planner: &Planner, owners: &mut SocketOwners) -> Arc<ContainerState> {
        self.is_stale = false;
        let Rows { listed, omitted } = planner.rows(self.name());
        // A supervisor may hold a native socket as well, so it reports the process that listens.
        let shown = listed.iter().filter(|row| row.state != RowState::Denied && row.process.is_none());
        let inodes: BTreeSet<u64> = shown.flat_map(|row| row.inodes.iter().copied()).collect();
        owners.replace(&self.listed.inodes, &inodes);
        self.listed.inodes = inodes;
        let state = Arc::new(self.as_listed(planner, owners, listed, omitted));
        std::mem::replace(&mut self.listed.state, state)
    }

    fn as_listed(
        &self,
        planner: &Planner,
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
        let (attach_method, state, reason) = self.standing(planner);
        ContainerState {
            container_name: self.name().as_str().to_owned(),
            attach_method,
            state,
            reason,
            forwards: rows.collect(),
            omitted,
        }
    }

    /// Its way, with what it was entered by.
    pub(super) fn way_in_words(&self) -> Option<String> {
        let attach_method = entry::attach_method_of(&self.registration)?;
        let means = self.means.as_ref().filter(|_| self.state == Reachability::Reached);
        Some(means.map_or_else(|| attach_method.to_string(), |means| means.words(&attach_method)))
    }

    /// The way that its bytes go, how far it is reached by that, and why no further, or why by no faster way.
    fn standing(&self, planner: &Planner) -> (Option<String>, Reachability, Option<String>) {
        if !self.is_dialled(planner) {
            return (self.way_in_words(), self.state, self.reason.clone());
        }
        let attach_method = entry::attach_method_of(&self.registration);
        let faster = attach_method.filter(has_task).zip(self.reason.as_ref());
        let reason = faster.map(|(attach_method, reason)| format!("not by {attach_method}: {reason}"));
        (Some(AttachMethod::Websocket.to_string()), Reachability::Reached, reason)
    }
}

/// Why a container that is to be reached by its WebSocket alone is not.
const NO_BROKER: &str = "it is registered for its WebSocket alone, and without the three that this takes: wsHostPort, portForward and brokerToken";

/// Whether a way leads in by a visit, and not by the container's broker alone.
fn has_task(attach_method: &AttachMethod) -> bool {
    *attach_method != AttachMethod::Websocket
}

fn is_off(registration: &Registration) -> bool {
    registration.exposes_nothing()
}

/// The way of a container that is to be forwarded: it has one, with all that it takes, and its policy exposes something.
pub(super) fn wanted_way(registration: &Registration) -> Option<AttachMethod> {
    let lacks = |attach_method: &AttachMethod| {
        *attach_method == AttachMethod::Websocket && registration.broker().is_none()
    };
    entry::attach_method_of(registration)
        .filter(|attach_method| !is_off(registration) && !lacks(attach_method))
}
