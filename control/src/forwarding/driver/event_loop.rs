//! The event loop: receives one input per turn, and sends the commands that result from it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use landfall_engine::command::Event;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::sleep_until;
use tokio_util::task::AbortOnDropHandle;

use super::brokers::{Brokers, SESSION_MESSAGES_MAX, SessionMessage};
use super::containers::{Container, ContainerView, RunningTask, TaskContext, desired_attach_method};
use super::owners::{Found, SocketOwners};
use super::{ForwardingOptions, OpenPorts, Published, Request};
use crate::forwarding::departed::Departed;
use crate::forwarding::engine_link::{Attached, Link, LinkError};
use crate::forwarding::entry::{EntryRequest, TaskReport};
use crate::forwarding::planner::{Change, Planner};
use crate::model::forward_table::ForwardTable;
use crate::model::registration::{ContainerName, Registration};
use crate::registry::store::Registered;
use crate::sys::journal::Journal;
use crate::sys::paths::Home;

/// The pause between two attempts to start an engine: the first and the longest.
pub(super) const START_PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// The delay before a container is entered again, after the engine removed its upstream or an attempt was refused
/// because another container has its namespace.
pub(super) const REENTER_PAUSE: Duration = Duration::from_secs(2);

/// The task's ends of the handle's channels.
pub(super) struct Parts {
    pub(super) request_receiver: mpsc::UnboundedReceiver<Request>,
    pub(super) ended: mpsc::UnboundedSender<ContainerName>,
    pub(super) published: Arc<Published>,
    pub(super) open_ports_sender: watch::Sender<OpenPorts>,
}

/// The state of the engine's connection.
pub(super) enum Engine {
    /// No engine is attached. The next attempt is at `retry_at`, if a container needs an engine.
    Absent { retry_at: Instant },
    /// An attempt to attach or to start one is running.
    Attaching(AbortOnDropHandle<Result<Option<Attached>, LinkError>>),
    /// Attached since that time.
    Attached(Link, Instant),
}

pub(super) struct Driver {
    pub(super) home: Home,
    pub(super) journal: Journal,
    pub(super) task_context: TaskContext,
    pub(super) replayed: Option<BoxFuture<'static, ()>>,
    pub(super) registrations: watch::Receiver<Arc<Registered>>,
    pub(super) parts: Parts,
    pub(super) planner: Planner,
    pub(super) engine: Engine,
    /// The engine that was lost, until another one is attached.
    pub(super) departed: Option<Departed>,
    pub(super) start_pause: Duration,
    /// The last failure to attach an engine; each distinct failure is reported once.
    pub(super) failure: Option<String>,
    /// In the order of registration.
    pub(super) containers: Vec<Container>,
    pub(super) brokers: Brokers,
    pub(super) task_reports: mpsc::UnboundedReceiver<TaskReport>,
    /// The last number of a container task or of an entry request.
    pub(super) serial: u64,
    /// Whether what an earlier driver left was claimed, or removed by [`Planner::sweep`].
    pub(super) swept: bool,
    /// Whether the engine's version was compared with this build's.
    pub(super) version_compared: bool,
    /// One clone for each engine that finishes its connections; `stop_drained` makes those engines stop.
    pub(super) draining: Arc<()>,
    pub(super) stop_drained: watch::Sender<bool>,
    pub(super) tables: Vec<oneshot::Sender<ForwardTable>>,
    pub(super) owners: SocketOwners,
    /// The number of the current supervisor link of each sandbox with native sockets.
    pub(super) native_links: BTreeMap<ContainerName, u64>,
    /// Containers that were removed and whose listed state has not been withdrawn yet.
    pub(super) removed: Vec<(ContainerName, ContainerView)>,
}

/// The inputs of the loop.
enum Input {
    Request(Option<Request>),
    Registrations,
    TaskEvent(TaskReport),
    Broker(SessionMessage),
    Engine(Result<Event, LinkError>),
    AttachResult(Result<Option<Attached>, LinkError>),
    Replayed,
    Owners(Found),
    Time,
}

impl Driver {
    pub(super) fn new(options: ForwardingOptions, parts: Parts) -> Driver {
        let ForwardingOptions { home, journal, docker, helper, replayed, registrations, control_ports } =
            options;
        let (reports, task_reports) = mpsc::unbounded_channel();
        Driver {
            home,
            journal,
            task_context: TaskContext { docker, helper, followed: watch::Sender::new(false), reports },
            replayed: Some(replayed),
            registrations,
            parts,
            planner: Planner::new(control_ports),
            engine: Engine::Absent { retry_at: Instant::now() },
            departed: None,
            start_pause: START_PAUSE.0,
            failure: None,
            containers: Vec::new(),
            brokers: Brokers::new(),
            task_reports,
            serial: 0,
            swept: false,
            version_compared: false,
            draining: Arc::new(()),
            stop_drained: watch::Sender::new(false),
            tables: Vec::new(),
            owners: SocketOwners::new(),
            native_links: BTreeMap::new(),
            removed: Vec::new(),
        }
    }

    pub(super) async fn run(mut self) {
        self.registrations.mark_unchanged();
        self.sync();
        // Attach even if no container needs an engine: the forwards that a running one holds for no container have to
        // close.
        if matches!(self.engine, Engine::Absent { .. }) {
            self.attach_engine(true);
        }
        loop {
            self.step().await;
            self.answer_stopped_brokers();
            self.publish();
            match self.wait().await {
                Input::Request(None) => return,
                Input::Request(Some(Request::Detach(done))) => {
                    // The caller continues after the channel to the engine is closed.
                    drop(self);
                    let _ = done.send(());
                    return;
                }
                Input::Request(Some(Request::StopEngine(done))) => {
                    self.stop().await;
                    self.publish();
                    let _ = done.send(());
                    return;
                }
                Input::Request(Some(Request::Table(answer))) => self.describe(answer).await,
                Input::Request(Some(Request::Recheck(name))) => self.recheck(&name),
                Input::Request(Some(Request::EventsFollowed(followed))) => {
                    self.task_context.followed.send_replace(followed);
                }
                Input::Request(Some(Request::Native(report))) => self.on_native_report(report),
                Input::Request(Some(Request::Broker(name, announcements, updates))) => {
                    self.add_broker(name, announcements, updates);
                }
                Input::Registrations => self.sync(),
                Input::Broker(message) => {
                    // A container can announce without end, and planning takes time. So what has arrived is taken in
                    // first, up to a bound, and the other tasks of this thread run before the next turn.
                    self.on_session_message(message).await;
                    for _ in 1..SESSION_MESSAGES_MAX {
                        let Some(message) = self.brokers.try_recv() else { break };
                        self.on_session_message(message).await;
                    }
                    tokio::task::yield_now().await;
                }
                Input::TaskEvent(event) => self.on_task_report(event).await,
                Input::Engine(event) => self.on_engine_events(event).await,
                Input::AttachResult(result) => self.on_attach_result(result),
                Input::Replayed => {
                    self.replayed = None;
                    // The last registrations may not have been read yet, and a container that is missing now counts as
                    // gone.
                    self.sync();
                }
                Input::Owners(found) => self.on_owners(found),
                Input::Time => self.on_time(),
            }
        }
    }

    /// Waits for the next input.
    async fn wait(&mut self) -> Input {
        let due = self.due();
        let time = async {
            match due {
                Some(due) => sleep_until(due.into()).await,
                None => std::future::pending().await,
            }
        };
        let replayed = async {
            match &mut self.replayed {
                Some(replayed) => replayed.await,
                None => std::future::pending().await,
            }
        };
        let engine = async {
            match &mut self.engine {
                Engine::Attached(link, _) => Input::Engine(link.recv().await.map(|(event, _)| event)),
                Engine::Attaching(attaching) => {
                    Input::AttachResult(attaching.await.unwrap_or(Err(LinkError::Silent)))
                }
                Engine::Absent { .. } => std::future::pending().await,
            }
        };
        let registrations = async {
            // After the registry has ended, the last registrations stay forwarded.
            if self.registrations.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            // Requests of users and of the daemon come before events of containers.
            biased;
            request = self.parts.request_receiver.recv() => Input::Request(request),
            () = registrations => Input::Registrations,
            Some(event) = self.task_reports.recv() => Input::TaskEvent(event),
            () = replayed => Input::Replayed,
            owners = self.owners.found() => Input::Owners(owners),
            () = time => Input::Time,
            // The engine reports the results of commands, and what its watch finds at a bounded rate.
            turn = engine => turn,
            message = self.brokers.recv() => Input::Broker(message),
        }
    }

    fn due(&self) -> Option<Instant> {
        let engine = match &self.engine {
            Engine::Absent { retry_at } if self.is_needed() => Some(*retry_at),
            _ => None,
        };
        let planner = matches!(self.engine, Engine::Attached(..)).then(|| self.planner.due()).flatten();
        let enter = self.containers.iter().filter_map(|container| container.enter_at).min();
        let waits = |container: &&Container| self.planner.wants_dialled_upstream(container.name());
        let dial = self.containers.iter().filter(waits).filter_map(|container| container.dial_at).min();
        let dial = matches!(self.engine, Engine::Attached(..)).then_some(dial).flatten();
        [engine, planner, enter, dial, self.owners.due()].into_iter().flatten().min()
    }

    pub(super) fn is_needed(&self) -> bool {
        self.containers.iter().any(|container| container.attach_method.is_some())
    }

    fn on_time(&mut self) {
        let now = Instant::now();
        if matches!(&self.engine, Engine::Absent { retry_at } if *retry_at <= now) && self.is_needed() {
            self.attach_engine(false);
        }
        let due = |container: &Container| container.enter_at.is_some_and(|time| time <= now);
        let due: Vec<usize> =
            (0..self.containers.len()).filter(|at| self.containers.get(*at).is_some_and(due)).collect();
        for at in due {
            if self.still_shares_network(at) {
                // An entry would have the same result.
                self.enter_later(at);
            } else {
                self.enter(at);
            }
        }
    }

    /// Updates the containers to those that are registered.
    fn sync(&mut self) {
        let registered = self.registrations.borrow_and_update().clone();
        let mut before = std::mem::take(&mut self.containers);
        let (mut changes, mut removed) = (Vec::new(), Vec::new());
        for registration in &registered.entries {
            let same = |known: &Container| known.name() == &registration.container_name;
            let known = before.iter().position(same).map(|at| before.swap_remove(at));
            let container = match known {
                Some(known) if known.attach_method == desired_attach_method(registration) => {
                    known.registered_again(registration)
                }
                known => {
                    let new = self.new_container(registration, known.as_ref(), &before, &mut changes);
                    removed.extend(known);
                    new
                }
            };
            self.containers.push(container);
        }
        self.removed.extend(removed.into_iter().chain(before).map(Container::into_view));
        self.report_changes(changes);
        let without_task = |container: &Container| container.task.is_none() && container.has_task();
        let without_task: Vec<usize> = (0..self.containers.len())
            .filter(|at| self.containers.get(*at).is_some_and(without_task))
            .collect();
        for at in without_task {
            self.start_task(at);
        }
        self.desired();
        if self.is_needed()
            && matches!(&self.engine, Engine::Absent { retry_at } if *retry_at <= Instant::now())
        {
            self.attach_engine(false);
        }
    }

    /// Creates a container whose name or attach method is new; `known` is the container that had the name before. If it
    /// is the same Docker container under another name or attach method, its forwards stay open.
    fn new_container(
        &mut self,
        registration: &Arc<Registration>,
        known: Option<&Container>,
        before: &[Container],
        changes: &mut Vec<Change>,
    ) -> Container {
        let mut new = Container::new(Arc::clone(registration));
        if let Some(known) = known {
            if new.is_same(known) {
                new.copy_state(known);
            } else {
                self.planner.container_lost(known.name());
            }
        } else if let Some(same) = before.iter().chain(&self.containers).find(|other| new.is_same(other)) {
            changes.extend(self.planner.renamed(same.name(), new.name()));
            new.copy_state(same);
        }
        new
    }

    /// Passes the containers to forward to the planner.
    pub(super) fn desired(&mut self) {
        self.planner.desired(self.containers.iter().filter_map(Container::desired).collect());
    }

    fn start_task(&mut self, at: usize) {
        let entry_request = self.next_entry_request();
        let number = self.serial;
        let Some(container) = self.containers.get_mut(at) else { return };
        // The task of a process registration ends with its process and is not started again: the same process does not
        // come back.
        if let Some(attach_method) = container.attach_method.clone() {
            let task = RunningTask::spawn(
                &container.registration,
                number,
                &attach_method,
                entry_request,
                &self.task_context,
            );
            container.task = Some(task);
        }
    }

    /// Returns a new request to enter, if an engine is attached.
    pub(super) fn next_entry_request(&mut self) -> Option<EntryRequest> {
        self.serial += 1;
        match &self.engine {
            Engine::Attached(link, _) => Some(EntryRequest { serial: self.serial, shards: link.shards }),
            _ => None,
        }
    }

    /// Requests that a container is entered again.
    pub(super) fn enter(&mut self, at: usize) {
        let entry_request = self.next_entry_request();
        if let Some(container) = self.containers.get_mut(at) {
            container.enter_at = None;
            if let Some(task) = &container.task {
                task.entry_request.send_replace(entry_request);
            }
        }
    }

    fn recheck(&self, name: &str) {
        for container in self.containers.iter().filter(|container| container.name().as_str() == name) {
            if let Some(task) = &container.task {
                task.hint.notify_one();
            }
        }
    }
}
