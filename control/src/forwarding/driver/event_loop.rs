//! The loop: what happens comes in, commands go out.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use landfall_engine::command::Event;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::sleep_until;
use tokio_util::task::AbortOnDropHandle;

use super::brokers::{ANNOUNCED_MAX, Brokers, SessionMessage};
use super::containers::{Container, ContainerView, RunningTask, TaskContext, wanted_way};
use super::owners::{Found, SocketOwners};
use super::{Answering, Ask, ForwardingOptions, Published};
use crate::forwarding::departed::Departed;
use crate::forwarding::engine_link::{Attached, Link, LinkError};
use crate::forwarding::entry::{EntryRequest, TaskReport};
use crate::forwarding::planner::{Change, Planner};
use crate::model::forward_table::ForwardTable;
use crate::model::registration::{ContainerName, Registration};
use crate::registry::store::Registered;
use crate::sys::journal::Journal;
use crate::sys::paths::Home;

/// How long an engine rests between attempts to start it: the first time, and at most.
pub(super) const REST: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// How long after the engine let go of a container it is entered again.
pub(super) const ENTER_AGAIN: Duration = Duration::from_secs(2);

/// The task's ends of the handle.
pub(super) struct Parts {
    pub(super) asked: mpsc::UnboundedReceiver<Ask>,
    pub(super) ended: mpsc::UnboundedSender<ContainerName>,
    pub(super) published: Arc<Published>,
    pub(super) answers: watch::Sender<Answering>,
}

/// Where the engine is.
pub(super) enum Engine {
    /// Not there. It is tried to have one at `again`, if somebody needs one.
    Absent { again: Instant },
    /// Being looked for.
    Coming(AbortOnDropHandle<Result<Option<Attached>, LinkError>>),
    /// Here, since then.
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
    /// The one that was lost, until there is another one.
    pub(super) departed: Option<Departed>,
    pub(super) rest: Duration,
    /// The last failure to have an engine, told once.
    pub(super) failure: Option<String>,
    /// In the order of registration.
    pub(super) containers: Vec<Container>,
    pub(super) brokers: Brokers,
    pub(super) told: mpsc::UnboundedReceiver<TaskReport>,
    /// Numbers of visits and of requests to enter.
    pub(super) serial: u64,
    /// Everything that an earlier driver left is claimed or swept.
    pub(super) settled: bool,
    /// Whether the engine's other version was dealt with.
    pub(super) compared: bool,
    /// One token for each engine that finishes its connections; told to stop by the watch.
    pub(super) draining: Arc<()>,
    pub(super) stop_drained: watch::Sender<bool>,
    pub(super) tables: Vec<oneshot::Sender<ForwardTable>>,
    pub(super) owners: SocketOwners,
    /// The number of the link that stands for each sandbox with native sockets.
    pub(super) native_links: BTreeMap<ContainerName, u64>,
    /// Containers that are listed and not there any more.
    pub(super) gone: Vec<(ContainerName, ContainerView)>,
}

/// What woke the loop.
enum Input {
    Ask(Option<Ask>),
    Registrations,
    TaskEvent(TaskReport),
    Broker(SessionMessage),
    Engine(Result<Event, LinkError>),
    Came(Result<Option<Attached>, LinkError>),
    Replayed,
    Owners(Found),
    Time,
}

impl Driver {
    pub(super) fn new(options: ForwardingOptions, parts: Parts) -> Driver {
        let ForwardingOptions { home, journal, docker, helper, replayed, registrations, control_ports } =
            options;
        let (words, told) = mpsc::unbounded_channel();
        Driver {
            home,
            journal,
            task_context: TaskContext { docker, helper, followed: watch::Sender::new(false), words },
            replayed: Some(replayed),
            registrations,
            parts,
            planner: Planner::new(control_ports),
            engine: Engine::Absent { again: Instant::now() },
            departed: None,
            rest: REST.0,
            failure: None,
            containers: Vec::new(),
            brokers: Brokers::new(),
            told,
            serial: 0,
            settled: false,
            compared: false,
            draining: Arc::new(()),
            stop_drained: watch::Sender::new(false),
            tables: Vec::new(),
            owners: SocketOwners::new(),
            native_links: BTreeMap::new(),
            gone: Vec::new(),
        }
    }

    pub(super) async fn run(mut self) {
        self.registrations.mark_unchanged();
        self.sync();
        // One that runs is taken over even where nobody needs it: what it holds for nobody has to end.
        if matches!(self.engine, Engine::Absent { .. }) {
            self.look_for_engine(true);
        }
        loop {
            self.step().await;
            self.see_off_brokers();
            self.publish();
            match self.wait().await {
                Input::Ask(None) => return,
                Input::Ask(Some(Ask::Detach(done))) => {
                    // Whoever waits may go on once the channel is closed.
                    drop(self);
                    let _ = done.send(());
                    return;
                }
                Input::Ask(Some(Ask::StopEngine(done))) => {
                    self.stop().await;
                    self.publish();
                    let _ = done.send(());
                    return;
                }
                Input::Ask(Some(Ask::Table(answer))) => self.describe(answer).await,
                Input::Ask(Some(Ask::LookAgain(name))) => self.look_again(&name),
                Input::Ask(Some(Ask::Followed(followed))) => {
                    self.task_context.followed.send_replace(followed);
                }
                Input::Ask(Some(Ask::Native(report))) => self.hear_native(report),
                Input::Ask(Some(Ask::Broker(name, announcements, words))) => {
                    self.meet_broker(name, announcements, words);
                }
                Input::Registrations => self.sync(),
                Input::Broker(heard) => {
                    // What a container announces is as much as it likes, and planning takes a while: what is there already is
                    // taken in first, and everybody else on this thread has a turn in between.
                    self.hear_broker(heard).await;
                    for _ in 1..ANNOUNCED_MAX {
                        let Some(heard) = self.brokers.heard_already() else { break };
                        self.hear_broker(heard).await;
                    }
                    tokio::task::yield_now().await;
                }
                Input::TaskEvent(word) => self.hear_word(word).await,
                Input::Engine(event) => self.hear_engine_until_silent(event).await,
                Input::Came(came) => self.welcome(came),
                Input::Replayed => {
                    self.replayed = None;
                    // They may not have been heard of yet, and whoever is missing now is taken for gone.
                    self.sync();
                }
                Input::Owners(found) => self.on_owners(found),
                Input::Time => self.on_time(),
            }
        }
    }

    /// Waits for whatever is next.
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
                Engine::Coming(coming) => Input::Came(coming.await.unwrap_or(Err(LinkError::Silent))),
                Engine::Absent { .. } => std::future::pending().await,
            }
        };
        let registrations = async {
            // Once the registry is gone, what was registered last is forwarded on.
            if self.registrations.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            // Questions of people and of the daemon come before events of containers.
            biased;
            ask = self.parts.asked.recv() => Input::Ask(ask),
            () = registrations => Input::Registrations,
            Some(word) = self.told.recv() => Input::TaskEvent(word),
            () = replayed => Input::Replayed,
            owners = self.owners.found() => Input::Owners(owners),
            () = time => Input::Time,
            // The engine reports what it was asked for, and what its watch found at a bounded pace.
            turn = engine => turn,
            heard = self.brokers.hear() => Input::Broker(heard),
        }
    }

    fn due(&self) -> Option<Instant> {
        let engine = match &self.engine {
            Engine::Absent { again } if self.is_needed() => Some(*again),
            _ => None,
        };
        let planner = matches!(self.engine, Engine::Attached(..)).then(|| self.planner.due()).flatten();
        let again = self.containers.iter().filter_map(|container| container.again).min();
        let waits = |container: &&Container| self.planner.wants_dialler(container.name());
        let dial = self.containers.iter().filter(waits).filter_map(|container| container.dial_again).min();
        let dial = matches!(self.engine, Engine::Attached(..)).then_some(dial).flatten();
        [engine, planner, again, dial, self.owners.due()].into_iter().flatten().min()
    }

    pub(super) fn is_needed(&self) -> bool {
        self.containers.iter().any(|container| container.attach_method.is_some())
    }

    fn on_time(&mut self) {
        let now = Instant::now();
        if matches!(&self.engine, Engine::Absent { again } if *again <= now) && self.is_needed() {
            self.look_for_engine(false);
        }
        let due = |container: &Container| container.again.is_some_and(|again| again <= now);
        let again: Vec<usize> =
            (0..self.containers.len()).filter(|at| self.containers.get(*at).is_some_and(due)).collect();
        for at in again {
            if self.is_shared_still(at) {
                // To enter it would show the same.
                self.enter_later(at);
            } else {
                self.enter(at);
            }
        }
    }

    /// Makes the containers those that are registered.
    fn sync(&mut self) {
        let registered = self.registrations.borrow_and_update().clone();
        let mut before = std::mem::take(&mut self.containers);
        let (mut changes, mut gone) = (Vec::new(), Vec::new());
        for registration in &registered.entries {
            let same = |known: &Container| known.name() == &registration.container_name;
            let known = before.iter().position(same).map(|at| before.swap_remove(at));
            let container = match known {
                Some(known) if known.attach_method == wanted_way(registration) => {
                    known.registered_again(registration)
                }
                known => {
                    let new = self.newcomer(registration, known.as_ref(), &before, &mut changes);
                    gone.extend(known);
                    new
                }
            };
            self.containers.push(container);
        }
        self.gone.extend(gone.into_iter().chain(before).map(Container::into_listed));
        self.tell_all(changes);
        let unvisited = |container: &Container| container.task.is_none() && container.has_task();
        let unvisited: Vec<usize> =
            (0..self.containers.len()).filter(|at| self.containers.get(*at).is_some_and(unvisited)).collect();
        for at in unvisited {
            self.set_out(at);
        }
        self.desired();
        if self.is_needed() && matches!(&self.engine, Engine::Absent { again } if *again <= Instant::now()) {
            self.look_for_engine(false);
        }
    }

    /// A container under a name or in a way that is new to it; `known` had the name before. What it has stays open where it is
    /// the container that had that under another name, or in another way.
    fn newcomer(
        &mut self,
        registration: &Arc<Registration>,
        known: Option<&Container>,
        before: &[Container],
        changes: &mut Vec<Change>,
    ) -> Container {
        let mut new = Container::new(Arc::clone(registration));
        if let Some(known) = known {
            if new.is_same(known) {
                new.go_on_from(known);
            } else {
                self.planner.left(known.name());
            }
        } else if let Some(same) = before.iter().chain(&self.containers).find(|other| new.is_same(other)) {
            changes.extend(self.planner.renamed(same.name(), new.name()));
            new.go_on_from(same);
        }
        new
    }

    /// Tells the planner what is to be forwarded.
    pub(super) fn desired(&mut self) {
        self.planner.desired(self.containers.iter().filter_map(Container::desired).collect());
    }

    fn set_out(&mut self, at: usize) {
        let entry_request = self.next_gate();
        let number = self.serial;
        let Some(container) = self.containers.get_mut(at) else { return };
        // A process that has ended does not come again under the same registration.
        if let Some(attach_method) = container.attach_method.clone() {
            let task = RunningTask::begin(
                &container.registration,
                number,
                &attach_method,
                entry_request,
                &self.task_context,
            );
            container.task = Some(task);
        }
    }

    /// A new request to enter, if there is an engine to enter for.
    pub(super) fn next_gate(&mut self) -> Option<EntryRequest> {
        self.serial += 1;
        match &self.engine {
            Engine::Attached(link, _) => Some(EntryRequest { serial: self.serial, shards: link.shards }),
            _ => None,
        }
    }

    /// Has a container entered anew.
    pub(super) fn enter(&mut self, at: usize) {
        let entry_request = self.next_gate();
        if let Some(container) = self.containers.get_mut(at) {
            container.again = None;
            if let Some(task) = &container.task {
                task.entry_request.send_replace(entry_request);
            }
        }
    }

    fn look_again(&self, name: &str) {
        for container in self.containers.iter().filter(|container| container.name().as_str() == name) {
            if let Some(task) = &container.task {
                task.hint.notify_one();
            }
        }
    }
}
