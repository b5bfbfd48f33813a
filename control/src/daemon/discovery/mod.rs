//! Discovery: turns Docker's containers into registrations, by their labels and by the user's `attach` and `detach`.
//!
//! A Docker event only signals that something changed. The whole list is then read, and `machine` compares it with the
//! registrations. The first event triggers a list at once, so that a container is forwarded soon after its start; a burst of
//! events triggers one further list. While Docker is unreachable, nothing changes. A list that could not be read, or that
//! shows a container between two names, is read again after a delay that doubles with each attempt.
//!
//! Each step is executed in the queue of its name, and only if the registration of the name is still the one at the time of
//! the decision. A concurrent registration by a client therefore always wins. Decisions never wait for a step: names with a
//! running step are left out of the decision, and decided again when the step is done.
//!
//! - `labels` and `machine` are pure; `report` has the values that are reported about each container.

pub mod labels;
pub mod machine;
pub mod report;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::docker::{Docker, DockerError};
use crate::model::event::Event;
use crate::model::name::escape;
use crate::model::registration::ContainerName;
use crate::registry::store::{DropReason, RegisterError, Registered, Registry};
use crate::sys::journal::Journal;
use machine::{Candidate, Decision, Detach, Notice, Step, detach, judge};
use report::Found;

/// The minimum time between the starts of two lists. Events in between are covered by the second.
const SPACING: Duration = Duration::from_millis(20);
/// The number of attempts of `detach`, which a concurrent registration of the container can defeat.
const DETACH_TRIES: u32 = 5;
/// The interval of lists without an event, in case Docker loses one.
const RESYNC_INTERVAL: Duration = Duration::from_secs(60);

/// A handle of discovery. Clones share one state.
#[derive(Clone)]
pub struct Discovery(Arc<Shared>);

struct Shared {
    docker: Docker,
    registry: Registry,
    journal: Journal,
    all: bool,
    /// Notified when the list may have changed.
    changed: Notify,
    /// The list that was read last.
    ///
    /// Only [`Discovery::run`] writes it: the answer to another caller's read may be older than the stored list.
    last: Mutex<Option<Arc<[Candidate]>>>,
}

/// The result of `detach`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Detached {
    /// The registration was dropped.
    Forgotten(ContainerName),
    /// The container is registered as off.
    TurnedOff(ContainerName),
}

impl Discovery {
    /// Returns a handle; [`Discovery::run`] does the work. `all` is whether all containers are forwarded.
    pub fn new(docker: Docker, registry: Registry, journal: Journal, all: bool) -> Discovery {
        let (changed, last) = (Notify::new(), Mutex::default());
        Discovery(Arc::new(Shared { docker, registry, journal, all, changed, last }))
    }

    /// Returns whether all containers are forwarded.
    pub fn is_all(&self) -> bool {
        self.0.all
    }

    /// Notes that the list may have changed. Never blocks.
    pub fn refresh(&self) {
        self.0.changed.notify_one();
    }

    /// Returns all containers that Docker lists, with the decision about each.
    ///
    /// # Errors
    /// [`DockerError`] if Docker is unreachable.
    pub async fn containers(&self) -> Result<Vec<Found>, DockerError> {
        let listed = self.read().await?;
        let registered = self.0.registry.list();
        let judged = judge(&listed, &registered, self.0.all);
        Ok(listed.iter().zip(&judged.verdicts).map(|(one, verdict)| Found::new(one, verdict)).collect())
    }

    /// Stops forwarding a container, whatever its labels are.
    ///
    /// # Errors
    /// A text with the reason.
    pub async fn detach(&self, name: &str) -> Result<Detached, String> {
        let name = ContainerName::new(name).map_err(|error| error.to_string())?;
        let registry = &self.0.registry;
        registry.replayed().await;
        let listed = match self.read().await {
            Ok(listed) => listed,
            // Docker is unreachable: use the list that was read last.
            Err(_) => self.last().unwrap_or_default(),
        };
        for _ in 0..DETACH_TRIES {
            let (step, detached) = match detach(&name, &listed, &registry.list(), self.0.all) {
                Detach::IsOff(name) => return Ok(Detached::TurnedOff(name)),
                Detach::Refused(why) => return Err(why),
                Detach::Forget(step) => (step.clone(), Detached::Forgotten(step.name().clone())),
                Detach::TurnOff(step) => (step.clone(), Detached::TurnedOff(step.name().clone())),
            };
            let done = execute(registry, step, DropReason::Requested).await;
            if done.map_err(|error| error.to_string())? {
                return Ok(detached);
            }
            // The container was registered concurrently, for example because it was recreated: detach that registration.
        }
        Err(format!("{name} is registered again by another client at each attempt"))
    }

    async fn read(&self) -> Result<Arc<[Candidate]>, DockerError> {
        let listed = self.0.docker.containers().await?;
        let before = self.last().unwrap_or_default();
        Ok(listed.into_iter().map(|container| Candidate::new(container, &before)).collect())
    }

    fn last(&self) -> Option<Arc<[Candidate]>> {
        self.0.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Keeps the registrations up to date while it is polled.
    pub async fn run(self) {
        self.0.registry.replayed().await;
        let mut registered = self.0.registry.watch();
        let mut work = Work::new(self.clone());
        let mut listing: BoxFuture<'static, Result<Arc<[Candidate]>, DockerError>> =
            Box::pin(std::future::pending());
        let mut is_listing = false;
        let mut not_before = Instant::now();
        let (mut not_after, mut retry_delay) = (not_before + RESYNC_INTERVAL, SPACING);
        loop {
            tokio::select! {
                () = self.change_or_deadline(not_after), if !is_listing => {
                    listing = Box::pin(self.clone().list_after(not_before));
                    is_listing = true;
                }
                read = &mut listing, if is_listing => {
                    is_listing = false;
                    let is_settled = read.is_ok_and(|listed| work.set_list(listed));
                    not_before = Instant::now() + SPACING;
                    let delay = if is_settled { RESYNC_INTERVAL } else { retry_delay };
                    retry_delay = if is_settled { SPACING } else { RESYNC_INTERVAL.min(retry_delay * 2) };
                    not_after = Instant::now() + delay;
                }
                Ok(()) = registered.changed() => work.judge_again(),
                Some(done) = work.running.join_next() => {
                    if work.finish_step(done.ok()) {
                        work.judge_again();
                    }
                }
            }
        }
    }

    /// Returns when the list may have changed, at `not_after` at the latest.
    async fn change_or_deadline(&self, not_after: Instant) {
        let _ = timeout_at(not_after, self.0.changed.notified()).await;
    }

    /// Reads the list at `not_before`.
    async fn list_after(self, not_before: Instant) -> Result<Arc<[Candidate]>, DockerError> {
        sleep_until(not_before).await;
        // The list covers all events until now.
        let _ = self.0.changed.notified().now_or_never();
        self.read().await
    }
}

/// The names of a step, the one that is registered first, and its result.
type Done = (Vec<ContainerName>, Result<bool, RegisterError>);

/// The state of [`Discovery::run`].
struct Work {
    discovery: Discovery,
    running: JoinSet<Done>,
    /// The names with a running step.
    busy: BTreeSet<ContainerName>,
    /// The notices that were reported.
    reported: BTreeSet<Notice>,
    /// The errors that were reported, by name.
    failed: BTreeMap<ContainerName, String>,
}

impl Work {
    fn new(discovery: Discovery) -> Work {
        let (running, busy) = (JoinSet::new(), BTreeSet::new());
        Work { discovery, running, busy, reported: BTreeSet::new(), failed: BTreeMap::new() }
    }

    /// Stores a list and decides about it. Returns whether all containers in it have their final names.
    fn set_list(&mut self, listed: Arc<[Candidate]>) -> bool {
        let is_settled = !listed.iter().any(|one| one.container.is_between_names);
        *self.discovery.0.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(listed);
        self.judge_again();
        is_settled
    }

    fn judge_again(&mut self) {
        let shared = Arc::clone(&self.discovery.0);
        let Some(listed) = self.discovery.last() else { return };
        let registered: Arc<Registered> = shared.registry.list();
        let Decision { steps, notices, .. } = judge(&listed, &registered, shared.all);
        // Docker reuses the id of a removed container only after a restore from a backup.
        let present: BTreeSet<&str> = listed.iter().map(|one| one.container.id.as_str()).collect();
        self.reported.retain(|notice| present.contains(notice.id.as_str()));
        for notice in notices {
            if self.reported.insert(notice.clone()) {
                shared.journal.record(&Event::Notice { text: escape(&notice.text).into_owned() });
            }
        }
        for step in steps {
            let names: Vec<ContainerName> = step.names().cloned().collect();
            if !names.iter().any(|name| self.busy.contains(name)) {
                self.busy.extend(names.iter().cloned());
                let registry = shared.registry.clone();
                self.running.spawn(async move {
                    let done = execute(&registry, step, DropReason::Gone).await;
                    (names, done)
                });
            }
        }
    }

    /// Records the end of a step. Returns whether to decide again.
    fn finish_step(&mut self, done: Option<Done>) -> bool {
        // A panic was logged where it happened. Its names stay busy until the next start of the daemon.
        let Some((names, done)) = done else { return false };
        self.busy.retain(|name| !names.contains(name));
        let Some(name) = names.into_iter().next() else { return false };
        match done {
            Ok(_) => {
                self.failed.remove(&name);
                true
            }
            Err(RegisterError::Stopping) => false,
            // Retried at the next event or interval, and not at once.
            Err(error) => {
                let text = format!("container {name} cannot be registered for forwarding: {error}");
                if self.failed.insert(name, text.clone()).as_ref() != Some(&text) {
                    self.discovery.0.journal.record(&Event::Notice { text });
                }
                false
            }
        }
    }
}

/// Executes a step. Returns whether the registration was still the one at the time of the decision.
async fn execute(registry: &Registry, step: Step, reason: DropReason) -> Result<bool, RegisterError> {
    match step {
        Step::Register { registration, before } => registry.register_found(*registration, before).await,
        Step::Move { from, registration, before } => {
            let is_registered = registry.register_found(*registration, before).await?;
            if is_registered {
                registry.drop_found(from, reason).await;
            }
            Ok(is_registered)
        }
        Step::Drop(registration) => Ok(registry.drop_found(registration, reason).await),
    }
}
