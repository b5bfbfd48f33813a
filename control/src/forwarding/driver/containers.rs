//! The driver's record of each registered container, apart from its ports.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{Notify, mpsc, watch};
use tokio::task::AbortHandle;

use super::owners::SocketOwners;
use crate::docker::Docker;
use crate::forwarding::entry::{self, ContainerTask, DockerFacts, EnteredBy, EntryRequest, TaskReport};
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
    /// The attach method, if the container is to be forwarded.
    pub(super) attach_method: Option<AttachMethod>,
    pub(super) state: Reachability,
    pub(super) reason: Option<String>,
    /// Since the engine was attached, the container was entered or found not to run.
    pub(super) tried: bool,
    /// The last attempt to enter failed, so a broker's session may dial for the container.
    pub(super) entry_failed: bool,
    /// When it is to be entered again.
    pub(super) enter_at: Option<Instant>,
    /// The cookie of a namespace that it shares with another container, which has the ports.
    pub(super) shared_cookie: Option<u64>,
    /// The earliest time at which its session may dial again.
    pub(super) dial_at: Option<Instant>,
    /// The method of the last successful entry.
    pub(super) entered_by: Option<EnteredBy>,
    /// The facts from Docker at that time.
    pub(super) docker_facts: DockerFacts,
    /// The last event said that the container is reached over its session alone.
    pub(super) session_reported: bool,
    /// Something changed since `view` was made.
    pub(super) is_stale: bool,
    /// The state that clients see.
    pub(super) view: ContainerView,
    pub(super) task: Option<RunningTask>,
}

/// The state of a container that clients see.
#[derive(Debug)]
pub(super) struct ContainerView {
    pub(super) state: Arc<ContainerState>,
    /// The sockets behind the rows whose process is shown.
    pub(super) inodes: BTreeSet<u64>,
}

/// The task that enters the container.
#[derive(Debug)]
pub(super) struct RunningTask {
    pub(super) number: u64,
    pub(super) entry_request: watch::Sender<Option<EntryRequest>>,
    pub(super) id: watch::Sender<Option<String>>,
    pub(super) hint: Arc<Notify>,
    task: AbortHandle,
}

/// The dependencies of every container task.
#[derive(Debug)]
pub(super) struct TaskContext {
    pub(super) docker: Docker,
    pub(super) helper: Option<PathBuf>,
    /// Whether Docker's events are being followed.
    pub(super) followed: watch::Sender<bool>,
    pub(super) reports: mpsc::UnboundedSender<TaskReport>,
}

impl Drop for RunningTask {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl RunningTask {
    /// Starts the task.
    pub(super) fn spawn(
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
            reports: task_context.reports.clone(),
        };
        let task = tokio::spawn(task.run()).abort_handle();
        RunningTask { number, entry_request, id, hint, task }
    }
}

impl Container {
    /// Creates a container without a task.
    pub(super) fn new(registration: Arc<Registration>) -> Container {
        let attach_method = desired_attach_method(&registration);
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
        let view = ContainerView { state: Arc::new(unlisted), inodes: BTreeSet::new() };
        Container {
            registration,
            attach_method,
            state,
            reason: reason.map(str::to_owned),
            tried: !visited,
            entry_failed: !visited,
            enter_at: None,
            shared_cookie: None,
            dial_at: None,
            entered_by: None,
            docker_facts: DockerFacts::default(),
            session_reported: false,
            is_stale: true,
            view,
            task: None,
        }
    }

    /// Replaces the registration, which has the same attach method.
    pub(super) fn registered_again(self, registration: &Arc<Registration>) -> Container {
        if let Some(task) = &self.task
            && !Arc::ptr_eq(&self.registration, registration)
        {
            task.id.send_replace(registration.found_id().map(str::to_owned));
            // A registration that is repeated may mean that the container runs.
            task.hint.notify_one();
        }
        Container { registration: Arc::clone(registration), is_stale: true, ..self }
    }

    /// Whether both are the same Docker container, under any names.
    pub(super) fn is_same(&self, other: &Container) -> bool {
        let id = |container: &Container| {
            let is_dockers = matches!(container.attach_method, Some(AttachMethod::Docker { .. }));
            container.registration.found_id().filter(|_| is_dockers).map(str::to_owned)
        };
        id(self).is_some_and(|own| id(other) == Some(own))
    }

    /// Copies the state of `before`, which is the same container.
    pub(super) fn copy_state(&mut self, before: &Container) {
        (self.state, self.reason) = (before.state, before.reason.clone());
        (self.tried, self.entry_failed, self.shared_cookie) =
            (before.tried, before.entry_failed, before.shared_cookie);
        self.entered_by.clone_from(&before.entered_by);
        self.docker_facts = before.docker_facts.clone();
        self.view.inodes.clone_from(&before.view.inodes);
    }

    /// Ends the container. Returns its name and its view, which is to be withdrawn.
    pub(super) fn into_view(self) -> (ContainerName, ContainerView) {
        (self.registration.container_name.clone(), self.view)
    }

    /// Whether a container task enters the container.
    pub(super) fn has_task(&self) -> bool {
        self.attach_method.as_ref().is_some_and(has_task)
    }

    /// Whether its session may dial for it.
    pub(super) fn may_dial(&self, now: Instant) -> bool {
        self.attach_method.is_some() && self.entry_failed && self.dial_at.is_none_or(|time| time <= now)
    }

    /// Whether it is reached over its session.
    pub(super) fn is_dialled(&self, planner: &Planner) -> bool {
        planner.has_session(self.name()) && planner.dialled(self.name()).is_some()
    }

    pub(super) fn name(&self) -> &ContainerName {
        &self.registration.container_name
    }

    /// The planner's view of it, if it is to be forwarded.
    pub(super) fn desired(&self) -> Option<DesiredContainer> {
        self.attach_method.as_ref()?;
        let policy = Policy::from(self.registration.exposed().unwrap_or_default().as_ref());
        let published = self.docker_facts.published.clone();
        let native = native_sockets::is_announced(&self.registration);
        Some(DesiredContainer { name: self.name().clone(), policy, published, native })
    }

    /// Updates the view. Returns the one before.
    pub(super) fn list(&mut self, planner: &Planner, owners: &mut SocketOwners) -> Arc<ContainerState> {
        self.is_stale = false;
        let Rows { listed, omitted } = planner.rows(self.name());
        // A supervisor may hold a native socket as well, so it reports the process that listens.
        let shown = listed.iter().filter(|row| row.state != RowState::Denied && row.process.is_none());
        let inodes: BTreeSet<u64> = shown.flat_map(|row| row.inodes.iter().copied()).collect();
        owners.replace(&self.view.inodes, &inodes);
        self.view.inodes = inodes;
        let state = Arc::new(self.state_of(planner, owners, listed, omitted));
        std::mem::replace(&mut self.view.state, state)
    }

    fn state_of(
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
        let (attach_method, state, reason) = self.reachability(planner);
        ContainerState {
            container_name: self.name().as_str().to_owned(),
            attach_method,
            state,
            reason,
            forwards: rows.collect(),
            omitted,
        }
    }

    /// The attach method, with the method of entry where that differs.
    pub(super) fn attach_method_text(&self) -> Option<String> {
        let attach_method = entry::attach_method_of(&self.registration)?;
        let entered_by = self.entered_by.as_ref().filter(|_| self.state == Reachability::Reached);
        Some(
            entered_by
                .map_or_else(|| attach_method.to_string(), |entered_by| entered_by.describe(&attach_method)),
        )
    }

    /// The attach method that carries the bytes, the reachability, and the reason why the container is unreachable or
    /// why no faster method is used.
    fn reachability(&self, planner: &Planner) -> (Option<String>, Reachability, Option<String>) {
        if !self.is_dialled(planner) {
            return (self.attach_method_text(), self.state, self.reason.clone());
        }
        let attach_method = entry::attach_method_of(&self.registration);
        let faster = attach_method.filter(has_task).zip(self.reason.as_ref());
        let reason = faster.map(|(attach_method, reason)| format!("not by {attach_method}: {reason}"));
        (Some(AttachMethod::Websocket.to_string()), Reachability::Reached, reason)
    }
}

/// The reason for a container that is registered for its WebSocket alone and lacks the fields for it.
const NO_BROKER: &str = "it is registered for its WebSocket alone, and the registration lacks wsHostPort, portForward or brokerToken";

/// Whether a container task enters the container, as opposed to its broker's session alone.
fn has_task(attach_method: &AttachMethod) -> bool {
    *attach_method != AttachMethod::Websocket
}

fn is_off(registration: &Registration) -> bool {
    registration.exposes_nothing()
}

/// The attach method of a container that is to be forwarded: the registration has one, with all its fields, and its
/// policy exposes something.
pub(super) fn desired_attach_method(registration: &Registration) -> Option<AttachMethod> {
    let lacks = |attach_method: &AttachMethod| {
        *attach_method == AttachMethod::Websocket && registration.broker().is_none()
    };
    entry::attach_method_of(registration)
        .filter(|attach_method| !is_off(registration) && !lacks(attach_method))
}
