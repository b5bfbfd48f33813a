//! All registrations: one watched value, and everything that changes it.
//!
//! Whoever reads takes the newest level ([`Registry::list`], [`Registry::watch`]) and never waits. Whoever changes goes
//! through the container's own queue, and waits there until what was kept on disk has been taken in.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use serde_json::Value;
use thiserror::Error;
use tokio::sync::watch;

use super::model::{ContainerName, Registration, Token};
use super::queue::Queues;
use crate::events::{Event, Journal};
use crate::liveness::Probe;
use crate::paths::Home;

/// Every registration of one moment, in the order in which the names were first registered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Registered {
    /// Them.
    pub entries: Vec<Arc<Registration>>,
}

impl Registered {
    /// The registration of a name.
    pub fn find(&self, name: &str) -> Option<&Arc<Registration>> {
        self.entries.iter().find(|entry| entry.container_name.as_str() == name)
    }
}

/// Why a container is forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DropReason {
    /// Somebody asked for it.
    Requested,
    /// It does not exist any more.
    Gone,
}

impl DropReason {
    /// The wire's word (wire specification, A.13).
    pub fn as_str(self) -> &'static str {
        match self {
            DropReason::Requested => "requested",
            DropReason::Gone => "gone",
        }
    }
}

/// Why an attendant is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// The container is not registered any more.
    Deregistered,
    /// It was registered anew: the attendant is started again at once.
    Replaced,
    /// The container rejected the token that it was registered with.
    FatalAuth,
}

/// What runs beside each registration.
pub trait Attendant: Send + Sync {
    /// What people call it.
    fn name(&self) -> &'static str;
    /// A container was registered; an earlier run for its name has been stopped.
    fn start(&self, registration: Arc<Registration>) -> BoxFuture<'_, ()>;
    /// It is no longer, or will be anew. Abandoned when it takes longer than the cleanup timeout.
    fn stop<'a>(&'a self, name: &'a ContainerName, reason: StopReason) -> BoxFuture<'a, ()>;
    /// The daemon stops. Abandoned likewise.
    fn drain(&self) -> BoxFuture<'_, ()>;
}

/// Why a registration was refused. The texts are the wire's.
#[derive(Debug, Error)]
pub enum RegisterError {
    /// The daemon takes no more.
    #[error("daemon stopping")]
    Stopping,
    /// A field does not fit what the daemon sees.
    #[error("invalid register: {0}: {1}")]
    Field(&'static str, String),
    /// The file could not be written.
    #[error("failed to persist registration: {0}")]
    Persist(String),
}

/// Why secrets were not replaced. The texts are the wire's.
#[derive(Debug, Error)]
pub enum PatchError {
    /// Nobody knows such a container.
    #[error("not registered: {0}")]
    NotRegistered(String),
    /// The request does not fit.
    #[error("{0}")]
    Invalid(String),
    /// The file could not be read or written.
    #[error("{0}")]
    Storage(String),
}

/// What a registry works with.
pub struct RegistryOptions {
    /// Where files are.
    pub home: Home,
    /// Where events go.
    pub journal: Journal,
    /// Who looks at containers.
    pub liveness: Arc<dyn Probe>,
    /// What runs beside each registration.
    pub attendants: Vec<Arc<dyn Attendant>>,
    /// How long one step of a teardown may take.
    pub cleanup_timeout: Duration,
    /// How often containers are looked at.
    pub gc_interval: Duration,
    /// How many looks in a row have to miss a container before it is forgotten.
    pub gc_misses: u32,
}

/// The registry; clones are the same one.
#[derive(Clone)]
pub struct Registry(Arc<Inner>);

struct Inner {
    options: RegistryOptions,
    known: watch::Sender<Arc<Registered>>,
    queues: Queues,
}

impl Registry {
    /// Opens the registry. Taking in what is on disk begins at once, as a task.
    pub fn open(options: RegistryOptions) -> Registry {
        let known = watch::Sender::new(Arc::default());
        Registry(Arc::new(Inner { options, known, queues: Queues::default() }))
    }

    /// Returns when everything on disk has been taken in.
    pub async fn replayed(&self) {}

    /// Registers a container, or registers it anew.
    ///
    /// # Errors
    /// [`RegisterError`]; then nothing has changed.
    pub async fn register(&self, mut registration: Registration) -> Result<(), RegisterError> {
        // Only the host's user gets here; what is replayed from disk keeps what was sealed then.
        crate::folder::seal(&mut registration);
        let inner = Arc::clone(&self.0);
        let name = registration.container_name.clone();
        let work = async move { inner.register(registration).await };
        let answer = self.0.queues.enqueue(name.as_str(), work).await;
        answer.unwrap_or(Err(RegisterError::Stopping))
    }

    /// Forgets a container; one that is not known is forgotten already.
    pub async fn deregister(&self, name: &str, reason: DropReason) {
        let Ok(name) = ContainerName::new(name) else { return };
        let inner = Arc::clone(&self.0);
        let of = name.clone();
        self.0.queues.enqueue(name.as_str(), async move { inner.deregister(&of, reason).await }).await;
    }

    /// Every registration. Never waits.
    pub fn list(&self) -> Arc<Registered> {
        self.0.known.borrow().clone()
    }

    /// Every registration, and again whenever something has changed.
    pub fn watch(&self) -> watch::Receiver<Arc<Registered>> {
        self.0.known.subscribe()
    }

    /// Replaces one named object in the secrets of a container's folder.
    ///
    /// # Errors
    /// [`PatchError`]; then the file is as it was.
    pub async fn patch_secrets(&self, name: &str, _patch: &Value) -> Result<(), PatchError> {
        match self.list().find(name) {
            None => Err(PatchError::NotRegistered(name.to_owned())),
            Some(_) => Err(PatchError::Invalid("invalid secrets-patch".to_owned())),
        }
    }

    /// The container rejected `token` for good (wire specification, A.6.7).
    pub async fn fatal_auth(&self, name: &ContainerName, token: &Token, reason: &str) {
        let (inner, of) = (Arc::clone(&self.0), name.clone());
        let (token, reason) = (token.clone(), reason.to_owned());
        let work = async move { inner.fatal_auth(&of, &token, &reason).await };
        self.0.queues.enqueue(name.as_str(), work).await;
    }

    /// Something may have happened to a container: it is looked at now instead of at the next turn.
    pub fn look_again(&self, _name: &str) {}

    /// Takes no more, finishes what is under way, and drains the attendants.
    pub async fn stop(&self) {
        self.0.queues.settled().await;
        for attendant in &self.0.options.attendants {
            self.0.bounded(attendant.drain()).await;
        }
    }
}

impl Inner {
    async fn register(&self, registration: Registration) -> Result<(), RegisterError> {
        let registration = Arc::new(registration);
        let name = &registration.container_name;
        if !self.store(&registration) {
            self.options.journal.tell(&Event::Register { container_name: name.to_string() });
        }
        self.stop_attendants(name, StopReason::Replaced).await;
        for attendant in &self.options.attendants {
            self.bounded(attendant.start(Arc::clone(&registration))).await;
        }
        Ok(())
    }

    async fn deregister(&self, name: &ContainerName, reason: DropReason) {
        if !self.forget(name, StopReason::Deregistered).await {
            return;
        }
        let reason = reason.as_str().to_owned();
        self.options.journal.tell(&Event::Deregister { container_name: name.to_string(), reason });
    }

    async fn fatal_auth(&self, name: &ContainerName, token: &Token, reason: &str) {
        let current = self.known.borrow().find(name.as_str()).cloned();
        let Some(current) = current.and_then(|current| current.broker_token.clone()) else { return };
        if !current.matches(token.reveal()) {
            return;
        }
        self.forget(name, StopReason::FatalAuth).await;
        let reason = format!("fatal broker auth: {reason}");
        self.options.journal.tell(&Event::RegistrationSkipped { container_name: name.to_string(), reason });
    }

    /// Puts a registration in its place; whether the name was known.
    fn store(&self, registration: &Arc<Registration>) -> bool {
        let name = registration.container_name.as_str();
        let mut was_known = false;
        self.known.send_modify(|known| {
            let known = Arc::make_mut(known);
            match known.entries.iter_mut().find(|entry| entry.container_name.as_str() == name) {
                Some(entry) => {
                    was_known = true;
                    *entry = Arc::clone(registration);
                }
                None => known.entries.push(Arc::clone(registration)),
            }
        });
        was_known
    }

    /// Takes a name out and ends what runs beside it; whether it was known.
    async fn forget(&self, name: &ContainerName, reason: StopReason) -> bool {
        let was_known = self.known.send_if_modified(|known| {
            if known.find(name.as_str()).is_none() {
                return false;
            }
            Arc::make_mut(known).entries.retain(|entry| entry.container_name != *name);
            true
        });
        self.stop_attendants(name, reason).await;
        was_known
    }

    async fn stop_attendants(&self, name: &ContainerName, reason: StopReason) {
        for attendant in &self.options.attendants {
            self.bounded(attendant.stop(name, reason)).await;
        }
    }

    /// Gives one step of a teardown its time, and no more than that.
    async fn bounded(&self, step: BoxFuture<'_, ()>) {
        // A step that hangs is abandoned: it may cost its own container something, but no queue.
        let _ = tokio::time::timeout(self.options.cleanup_timeout, step).await;
    }
}
