//! All registrations: one watched value, and everything that changes it.
//!
//! Whoever reads takes the newest level ([`Registry::list`], [`Registry::watch`]) and never waits. Whoever changes goes
//! through the container's own queue, and waits there until what was kept on disk has been taken in.
//!
//! What is acknowledged is on disk: a registration that was answered with success is there after any crash, and one that
//! was deregistered is not. A daemon that stops keeps its files.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use serde_json::Value;
use thiserror::Error;
use tokio::sync::{OnceCell, watch};

use super::shared::{RegistrationOrigin, Shared};
use crate::docker::liveness::Probe;
use crate::model::grants::Right;
use crate::model::registration::{ContainerName, Registration, Token};
use crate::registry::folder::Approvals;
use crate::registry::garbage_collection;
use crate::registry::grants::{GrantError, GrantTable};
use crate::registry::miss_counter::LookReason;
use crate::registry::secrets::SecretsError;
use crate::sys::journal::Journal;
use crate::sys::paths::Home;

/// What an asker is told when the work panicked.
const BROKEN: &str = "the daemon failed at it; its log says more";

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
pub trait RegistrationObserver: Send + Sync {
    /// What people call it.
    fn name(&self) -> &'static str;
    /// A container was registered; an earlier run for its name has been stopped.
    fn start(&self, registration: Arc<Registration>) -> BoxFuture<'_, ()>;
    /// It is no longer, or will be anew. Abandoned when it takes longer than the cleanup timeout.
    fn stop<'a>(&'a self, name: &'a ContainerName, reason: StopReason) -> BoxFuture<'a, ()>;
    /// The user approved or revoked files of the folder; everything else is as it was. Abandoned likewise.
    fn folder_changed(&self, registration: Arc<Registration>) -> BoxFuture<'_, ()> {
        let _ = registration;
        Box::pin(std::future::ready(()))
    }
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
    /// The daemon takes no more.
    #[error("daemon stopping")]
    Stopping,
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

impl From<SecretsError> for PatchError {
    fn from(error: SecretsError) -> PatchError {
        match error {
            SecretsError::Invalid(why) => PatchError::Invalid(why),
            SecretsError::Storage(why) => PatchError::Storage(why),
        }
    }
}

/// What a registry works with.
pub struct RegistryOptions {
    /// Where files are.
    pub home: Home,
    /// The files of folders that the user approved.
    pub approvals: Approvals,
    /// The grants, which are filled from the files of the home.
    pub grants: GrantTable,
    /// Where events go.
    pub journal: Journal,
    /// Who looks at containers.
    pub liveness: Arc<dyn Probe>,
    /// What runs beside each registration.
    pub observers: Vec<Arc<dyn RegistrationObserver>>,
    /// How long one step of a teardown may take.
    pub cleanup_timeout: Duration,
    /// How often containers are looked at.
    pub gc_interval: Duration,
    /// How many looks in a row have to miss a container before it is forgotten.
    pub gc_misses: u32,
}

/// The registry; clones are the same one.
#[derive(Clone)]
pub struct Registry {
    shared: Arc<Shared>,
    stopped: Arc<OnceCell<()>>,
}

impl Registry {
    /// Opens the registry. Taking in what is on disk begins at once, as a task; until it is done, whatever changes
    /// something waits, and what only looks does not.
    pub fn open(options: RegistryOptions) -> Registry {
        let shared = Arc::new(Shared::new(options));
        tokio::spawn(garbage_collection::run(Arc::clone(&shared)));
        Registry { shared, stopped: Arc::default() }
    }

    /// Returns when everything on disk has been taken in.
    pub async fn replayed(&self) {
        self.shared.replayed().await;
    }

    /// Registers a container, or registers it anew: then it keeps its place in the order, and what runs beside it is
    /// stopped and started again.
    ///
    /// # Errors
    /// [`RegisterError`]; the container is then registered as it was before.
    pub async fn register(&self, registration: Registration) -> Result<(), RegisterError> {
        if self.shared.stopping.is_cancelled() {
            return Err(RegisterError::Stopping);
        }
        let (shared, name) = (Arc::clone(&self.shared), registration.container_name.clone());
        let work = async move { shared.register(registration, RegistrationOrigin::User).await };
        let answer = self.shared.queues.enqueue(name.as_str(), work).await;
        answer.unwrap_or_else(|| Err(RegisterError::Persist(BROKEN.to_owned())))
    }

    /// Registers what was found in Docker, if the name still stands for `before`; whether it did. Somebody may have
    /// registered the name meanwhile, and then that is what counts.
    ///
    /// # Errors
    /// [`RegisterError`]; the container is then registered as it was before.
    pub async fn register_found(
        &self,
        registration: Registration,
        before: Option<Arc<Registration>>,
    ) -> Result<bool, RegisterError> {
        let (shared, name) = (Arc::clone(&self.shared), registration.container_name.clone());
        let work = async move {
            shared.replayed().await;
            let current = shared.find(registration.container_name.as_str());
            if current.as_ref().map(Arc::as_ptr) != before.as_ref().map(Arc::as_ptr) {
                return Ok(false);
            }
            shared.register(registration, RegistrationOrigin::Discovery).await.map(|()| true)
        };
        let answer = self.shared.queues.enqueue(name.as_str(), work).await;
        answer.unwrap_or_else(|| Err(RegisterError::Persist(BROKEN.to_owned())))
    }

    /// Reads the files of a folder again for each container that is registered with it, after its user approved or revoked
    /// them; commands that run without an approval are killed. `folder` is canonical. Returns the containers.
    ///
    /// # Errors
    /// [`RegisterError::Persist`]: a registration could not be written. Those after it were not read again.
    pub async fn read_folder_again(&self, folder: &Path) -> Result<Vec<ContainerName>, RegisterError> {
        self.shared.options.approvals.notify_changed();
        self.shared.replayed().await;
        let mut containers = Vec::new();
        for entry in &self.list().entries {
            let (shared, name, of) =
                (Arc::clone(&self.shared), entry.container_name.clone(), folder.to_owned());
            let work = async move { shared.read_folder_again(&name, &of).await };
            let answer = self.shared.queues.enqueue(entry.container_name.as_str(), work).await;
            if answer.unwrap_or_else(|| Err(RegisterError::Persist(BROKEN.to_owned())))? {
                containers.push(entry.container_name.clone());
            }
        }
        Ok(containers)
    }

    /// Forgets what was found in Docker and is no more, unless it was registered anew since; whether it did.
    pub async fn drop_found(&self, registration: Arc<Registration>, reason: DropReason) -> bool {
        let (shared, name) = (Arc::clone(&self.shared), registration.container_name.clone());
        let work = async move { shared.drop_current(&registration, reason).await };
        self.shared.queues.enqueue(name.as_str(), work).await.unwrap_or(false)
    }

    /// Forgets a container and keeps the grants of its name. A name that is unknown or invalid is forgotten already. A
    /// container that was reported [`DropReason::Gone`] stays if it exists when the request is executed: it was registered
    /// again meanwhile.
    pub async fn deregister(&self, name: &str, reason: DropReason) {
        let Ok(name) = ContainerName::new(name) else { return };
        let (shared, of) = (Arc::clone(&self.shared), name.clone());
        let work = async move { shared.deregister(&of, reason).await };
        self.shared.queues.enqueue(name.as_str(), work).await;
    }

    /// Forgets a container at the request of the host's user, with everything that was granted to its name.
    pub async fn deregister_with_grants(&self, name: &str) {
        let Ok(name) = ContainerName::new(name) else { return };
        let (shared, of) = (Arc::clone(&self.shared), name.clone());
        let work = async move {
            // In this order: a daemon that is killed in between leaves a container without rights, not rights without one.
            shared.remove_grants(&of).await;
            shared.deregister(&of, DropReason::Requested).await;
        };
        self.shared.queues.enqueue(name.as_str(), work).await;
    }

    /// Grants rights to a registered container, for the folder that it is registered with.
    ///
    /// # Errors
    /// [`GrantError`]; nothing is granted then.
    pub async fn grant(&self, name: &str, rights: Vec<Right>) -> Result<(), GrantError> {
        let (shared, of) = (Arc::clone(&self.shared), name.to_owned());
        let work = async move { shared.grant(&of, rights).await };
        let answer = self.shared.queues.enqueue(name, work).await;
        answer.unwrap_or_else(|| Err(GrantError::Persist(BROKEN.to_owned())))
    }

    /// Takes rights away from a name, registered or not, for every folder that they were granted for.
    ///
    /// # Errors
    /// [`GrantError`]; nothing is revoked then.
    pub async fn revoke(&self, name: ContainerName, what: Vec<String>) -> Result<(), GrantError> {
        let (shared, of) = (Arc::clone(&self.shared), name.clone());
        let work = async move { shared.revoke(&of, what).await };
        let answer = self.shared.queues.enqueue(name.as_str(), work).await;
        answer.unwrap_or_else(|| Err(GrantError::Persist(BROKEN.to_owned())))
    }

    /// The grants of all containers.
    pub fn grants(&self) -> &GrantTable {
        &self.shared.options.grants
    }

    /// Every registration. Never waits.
    pub fn list(&self) -> Arc<Registered> {
        self.shared.known.borrow().clone()
    }

    /// Every registration, and again whenever something has changed. The last level stays when the registry stops: it
    /// is what the next daemon begins with.
    pub fn watch(&self) -> watch::Receiver<Arc<Registered>> {
        self.shared.known.subscribe()
    }

    /// Replaces one named object in the secrets of a container's folder, in the container's queue.
    ///
    /// # Errors
    /// [`PatchError`]; the file is then as it was.
    pub async fn patch_secrets(&self, name: &str, patch: &Value) -> Result<(), PatchError> {
        let (shared, of, patch) = (Arc::clone(&self.shared), name.to_owned(), patch.clone());
        let work = async move { shared.patch_secrets(&of, &patch).await };
        let answer = self.shared.queues.enqueue(name, work).await;
        answer.unwrap_or_else(|| Err(PatchError::Storage(BROKEN.to_owned())))
    }

    /// The container rejected `token` for good (wire specification, A.6.7): it is forgotten, unless it has been
    /// registered with another token since.
    pub async fn fatal_auth(&self, name: &ContainerName, token: &Token, reason: &str) {
        let (shared, of) = (Arc::clone(&self.shared), name.clone());
        let (token, reason) = (token.clone(), reason.to_owned());
        let work = async move { shared.fatal_auth(&of, &token, &reason).await };
        self.shared.queues.enqueue(name.as_str(), work).await;
    }

    /// The container with this broker token has answered a challenge: it has to from now on, also after a restart of the
    /// daemon.
    pub async fn require_challenge(&self, name: &ContainerName, token: &Token) {
        let (shared, of, token) = (Arc::clone(&self.shared), name.clone(), token.clone());
        let work = async move { shared.require_challenge(&of, &token).await };
        self.shared.queues.enqueue(name.as_str(), work).await;
    }

    /// Something may have happened to a container: it is looked at now instead of at the next turn. If it is not there and
    /// was before, it is looked at again soon until it has been missed often enough.
    pub fn look_again(&self, name: &str) {
        self.shared.hint(name, LookReason::Hint);
    }

    /// Takes no more, lets what is under way finish, and drains the attendants; each for the cleanup timeout at most.
    /// The files stay, so that the next daemon goes on from them. Stopping twice is stopping once.
    pub async fn stop(&self) {
        let shared = &self.shared;
        let stop = async {
            shared.stopping.cancel();
            shared.replayed().await;
            // A queue that hangs has told so itself.
            let _ = tokio::time::timeout(shared.options.cleanup_timeout, shared.queues.settled()).await;
            shared.drain_attendants().await;
        };
        self.stopped.get_or_init(|| stop).await;
    }
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "store_grants_tests.rs"]
mod grants_tests;

#[cfg(test)]
#[path = "store_model_tests.rs"]
mod model_tests;
