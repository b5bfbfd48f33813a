//! Containers that the daemon finds by itself: what Docker has, and what people or labels say of it, becomes registrations.
//!
//! Docker's events say that something has changed, and nothing else is taken from them: its list is read whole, and
//! `machine` compares it with what is registered. A burst of events is one list. The first of them is not waited upon, so that
//! a container's way to the host begins when Docker has told of its start. While Docker cannot be asked, nothing changes.
//! A list that could not be had, or that shows a container between two names, is read again soon, then ever later.
//!
//! Each step is carried out in its name's queue and only if the name still stands for what it was decided upon, so somebody
//! who registers at the same moment always wins. Nothing here waits for a step: what is under way is left out of the next
//! decision, and decided again when it is done.
//!
//! - `labels` and `machine` are pure; `report` is what is told of all containers.

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

/// How long after one list began the next one does, at least: what comes in between is one more.
const SPACING: Duration = Duration::from_millis(20);
/// How often it is tried to detach what somebody registers anew at the same moment.
const DETACH_TRIES: u32 = 5;
/// How often the list is read when nothing is told. Docker tells everything; this is for the time when it does not.
const TURN: Duration = Duration::from_secs(60);

/// The handle; clones are about the same containers.
#[derive(Clone)]
pub struct Discovery(Arc<Shared>);

struct Shared {
    docker: Docker,
    registry: Registry,
    journal: Journal,
    all: bool,
    /// Rings when the list may have changed.
    changed: Notify,
    /// The list as it was read last.
    ///
    /// Written for [`Discovery::run`] alone: an answer that somebody else waits for may be older than the one that is here.
    last: Mutex<Option<Arc<[Candidate]>>>,
}

/// What became of a container that was detached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Detached {
    /// Nothing is known of it any more.
    Forgotten(ContainerName),
    /// It is known that it is off.
    TurnedOff(ContainerName),
}

impl Discovery {
    /// A handle; [`Discovery::run`] does the work. `all` is whether every container is forwarded.
    pub fn new(docker: Docker, registry: Registry, journal: Journal, all: bool) -> Discovery {
        let (changed, last) = (Notify::new(), Mutex::default());
        Discovery(Arc::new(Shared { docker, registry, journal, all, changed, last }))
    }

    /// Whether every container is forwarded.
    pub fn is_all(&self) -> bool {
        self.0.all
    }

    /// The list may have changed. Never waits.
    pub fn look_again(&self) {
        self.0.changed.notify_one();
    }

    /// Every container of Docker's, and what is decided about it.
    ///
    /// # Errors
    /// [`DockerError`] says why Docker cannot be asked.
    pub async fn containers(&self) -> Result<Vec<Found>, DockerError> {
        let listed = self.read().await?;
        let registered = self.0.registry.list();
        let judged = judge(&listed, &registered, self.0.all);
        Ok(listed.iter().zip(&judged.verdicts).map(|(one, verdict)| Found::new(one, verdict)).collect())
    }

    /// Has a container forwarded no longer, whatever its labels say.
    ///
    /// # Errors
    /// A text that says why it is not done.
    pub async fn detach(&self, name: &str) -> Result<Detached, String> {
        let name = ContainerName::new(name).map_err(|error| error.to_string())?;
        let registry = &self.0.registry;
        registry.replayed().await;
        let listed = match self.read().await {
            Ok(listed) => listed,
            // What is known of an engine that is away is what it said last.
            Err(_) => self.last().unwrap_or_default(),
        };
        for _ in 0..DETACH_TRIES {
            let (step, detached) = match detach(&name, &listed, &registry.list(), self.0.all) {
                Detach::IsOff(name) => return Ok(Detached::TurnedOff(name)),
                Detach::Refused(why) => return Err(why),
                Detach::Forget(step) => (step.clone(), Detached::Forgotten(step.name().clone())),
                Detach::TurnOff(step) => (step.clone(), Detached::TurnedOff(step.name().clone())),
            };
            let done = carry_out(registry, step, DropReason::Requested).await;
            if done.map_err(|error| error.to_string())? {
                return Ok(detached);
            }
            // It was registered anew at the same moment, as when its container was: then that is what is detached.
        }
        Err(format!("{name} is being registered again and again"))
    }

    async fn read(&self) -> Result<Arc<[Candidate]>, DockerError> {
        let listed = self.0.docker.containers().await?;
        let before = self.last().unwrap_or_default();
        Ok(listed.into_iter().map(|container| Candidate::new(container, &before)).collect())
    }

    fn last(&self) -> Option<Arc<[Candidate]>> {
        self.0.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Keeps the registrations those that there are to be, for as long as it is polled.
    pub async fn run(self) {
        self.0.registry.replayed().await;
        let mut registered = self.0.registry.watch();
        let mut work = Work::new(self.clone());
        let mut listing: BoxFuture<'static, Result<Arc<[Candidate]>, DockerError>> =
            Box::pin(std::future::pending());
        let mut is_listing = false;
        let mut not_before = Instant::now();
        let (mut not_after, mut again) = (not_before + TURN, SPACING);
        loop {
            tokio::select! {
                () = self.wanted(not_after), if !is_listing => {
                    listing = Box::pin(self.clone().list_after(not_before));
                    is_listing = true;
                }
                read = &mut listing, if is_listing => {
                    is_listing = false;
                    let is_settled = read.is_ok_and(|listed| work.take(listed));
                    not_before = Instant::now() + SPACING;
                    let turn = if is_settled { TURN } else { again };
                    again = if is_settled { SPACING } else { TURN.min(again * 2) };
                    not_after = Instant::now() + turn;
                }
                Ok(()) = registered.changed() => work.judge_again(),
                Some(done) = work.under_way.join_next() => {
                    if work.is_done(done.ok()) {
                        work.judge_again();
                    }
                }
            }
        }
    }

    /// Ready when the list may have changed, and at this moment in any case.
    async fn wanted(&self, not_after: Instant) {
        let _ = timeout_at(not_after, self.0.changed.notified()).await;
    }

    /// Reads the list when it is time.
    async fn list_after(self, not_before: Instant) -> Result<Arc<[Candidate]>, DockerError> {
        sleep_until(not_before).await;
        // What was told until now is in the list that is read now.
        let _ = self.0.changed.notified().now_or_never();
        self.read().await
    }
}

/// What a step came to, and about which names it was, the one that was registered first.
type Done = (Vec<ContainerName>, Result<bool, RegisterError>);

/// What is being done about the containers.
struct Work {
    discovery: Discovery,
    under_way: JoinSet<Done>,
    /// The names about which something is under way.
    busy: BTreeSet<ContainerName>,
    /// What was told, by the container's id.
    told: BTreeSet<Notice>,
    /// What failed, by name, as it was told.
    failed: BTreeMap<ContainerName, String>,
}

impl Work {
    fn new(discovery: Discovery) -> Work {
        let (under_way, busy) = (JoinSet::new(), BTreeSet::new());
        Work { discovery, under_way, busy, told: BTreeSet::new(), failed: BTreeMap::new() }
    }

    /// Judges a list, from now on the one that was read last; whether all in it have their names.
    fn take(&mut self, listed: Arc<[Candidate]>) -> bool {
        let is_settled = !listed.iter().any(|one| one.container.is_between_names);
        *self.discovery.0.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(listed);
        self.judge_again();
        is_settled
    }

    fn judge_again(&mut self) {
        let shared = Arc::clone(&self.discovery.0);
        let Some(listed) = self.discovery.last() else { return };
        let registered: Arc<Registered> = shared.registry.list();
        let Decision { steps, remarks, .. } = judge(&listed, &registered, shared.all);
        // A container that is gone may come again under the same id only from a backup.
        let there: BTreeSet<&str> = listed.iter().map(|one| one.container.id.as_str()).collect();
        self.told.retain(|remark| there.contains(remark.id.as_str()));
        for remark in remarks {
            if self.told.insert(remark.clone()) {
                shared.journal.record(&Event::Notice { text: escape(&remark.text).into_owned() });
            }
        }
        for step in steps {
            let names: Vec<ContainerName> = step.names().cloned().collect();
            if !names.iter().any(|name| self.busy.contains(name)) {
                self.busy.extend(names.iter().cloned());
                let registry = shared.registry.clone();
                self.under_way.spawn(async move {
                    let done = carry_out(&registry, step, DropReason::Gone).await;
                    (names, done)
                });
            }
        }
    }

    /// Whether it is to be judged again.
    fn is_done(&mut self, done: Option<Done>) -> bool {
        // A step that panicked was told of where that happened; its name rests until the next start.
        let Some((names, done)) = done else { return false };
        self.busy.retain(|name| !names.contains(name));
        let Some(name) = names.into_iter().next() else { return false };
        match done {
            Ok(_) => {
                self.failed.remove(&name);
                true
            }
            Err(RegisterError::Stopping) => false,
            // It is tried again when Docker tells of something, and not at once.
            Err(error) => {
                let text = format!("{name} is found in Docker and not forwarded: {error}");
                if self.failed.insert(name, text.clone()).as_ref() != Some(&text) {
                    self.discovery.0.journal.record(&Event::Notice { text });
                }
                false
            }
        }
    }
}

/// Whether the name still stood for what the step was decided upon.
async fn carry_out(registry: &Registry, step: Step, reason: DropReason) -> Result<bool, RegisterError> {
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
