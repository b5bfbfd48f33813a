//! All registrations: one watched value, and all operations that change it.
//!
//! Readers get the newest value ([`Registry::list`], [`Registry::watch`]) and never wait. Changes go through the container's
//! own queue, and wait there until the files on disk have been replayed.
//!
//! An acknowledged change is on disk: after any crash, a registration that was answered with success exists, and one that
//! was deregistered does not. A daemon that stops keeps its files.

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
use crate::registry::miss_counter::ProbeReason;
use crate::registry::secrets::SecretsError;
use crate::sys::journal::Journal;
use crate::sys::paths::Home;

/// The error of a request whose work panicked.
const WORK_PANICKED: &str = "internal error; see the daemon's log";

/// All registrations at one time, in the order in which the names were first registered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Registered {
    /// The registrations.
    pub entries: Vec<Arc<Registration>>,
}

impl Registered {
    /// Returns the registration of a name.
    pub fn find(&self, name: &str) -> Option<&Arc<Registration>> {
        self.entries.iter().find(|entry| entry.container_name.as_str() == name)
    }
}

/// The reason why a registration is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DropReason {
    /// A client requested it.
    Requested,
    /// The container no longer exists.
    Gone,
}

impl DropReason {
    /// Returns the value in events (wire specification, A.13).
    pub fn as_str(self) -> &'static str {
        match self {
            DropReason::Requested => "requested",
            DropReason::Gone => "gone",
        }
    }
}

/// The reason why an observer is stopped for a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// The container is no longer registered.
    Deregistered,
    /// The container was registered again. The observer is started again at once.
    Replaced,
    /// The container rejected the token of its registration.
    FatalAuth,
}

/// A module that runs something for each registration.
pub trait RegistrationObserver: Send + Sync {
    /// Returns the name of the module for messages.
    fn name(&self) -> &'static str;
    /// Starts for a container that was registered. An earlier run for its name has been stopped.
    fn start(&self, registration: Arc<Registration>) -> BoxFuture<'_, ()>;
    /// Stops for a container that is no longer registered, or is registered again. Abandoned after the cleanup timeout.
    fn stop<'a>(&'a self, name: &'a ContainerName, reason: StopReason) -> BoxFuture<'a, ()>;
    /// Handles approvals or revocations of files in the folder; all else is unchanged. Abandoned after the cleanup timeout.
    fn folder_changed(&self, registration: Arc<Registration>) -> BoxFuture<'_, ()> {
        let _ = registration;
        Box::pin(std::future::ready(()))
    }
    /// Stops for all containers, since the daemon stops. Abandoned after the cleanup timeout.
    fn drain(&self) -> BoxFuture<'_, ()>;
}

/// The reasons why a registration is refused. The texts are part of the wire specification.
#[derive(Debug, Error)]
pub enum RegisterError {
    /// The daemon is stopping.
    #[error("daemon stopping")]
    Stopping,
    /// A field contradicts the state of the host.
    #[error("invalid register: {0}: {1}")]
    Field(&'static str, String),
    /// The file could not be written.
    #[error("failed to persist registration: {0}")]
    Persist(String),
}

/// The reasons why secrets are not replaced. The texts are part of the wire specification.
#[derive(Debug, Error)]
pub enum PatchError {
    /// The daemon is stopping.
    #[error("daemon stopping")]
    Stopping,
    /// The container is not registered.
    #[error("not registered: {0}")]
    NotRegistered(String),
    /// The request is invalid.
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

/// The options of a registry.
pub struct RegistryOptions {
    /// The home directory.
    pub home: Home,
    /// The files of folders that the user approved.
    pub approvals: Approvals,
    /// The grants, which are filled from the files of the home.
    pub grants: GrantTable,
    /// The journal for events.
    pub journal: Journal,
    /// Probes whether containers exist.
    pub liveness: Arc<dyn Probe>,
    /// The modules that run for each registration.
    pub observers: Vec<Arc<dyn RegistrationObserver>>,
    /// How long one step of a teardown may take.
    pub cleanup_timeout: Duration,
    /// The interval of probes.
    pub gc_interval: Duration,
    /// The number of consecutive misses after which a container is dropped.
    pub gc_misses: u32,
}

/// The registry. Clones share one state.
#[derive(Clone)]
pub struct Registry {
    shared: Arc<Shared>,
    stopped: Arc<OnceCell<()>>,
}

impl Registry {
    /// Opens the registry and starts the replay of the files on disk as a task. Changes wait until it is done; reads do not.
    pub fn open(options: RegistryOptions) -> Registry {
        let shared = Arc::new(Shared::new(options));
        tokio::spawn(garbage_collection::run(Arc::clone(&shared)));
        Registry { shared, stopped: Arc::default() }
    }

    /// Returns when all files on disk have been replayed.
    pub async fn replayed(&self) {
        self.shared.replayed().await;
    }

    /// Registers a container. If it is registered already, it keeps its position in the order, and its observers are stopped
    /// and started again.
    ///
    /// # Errors
    /// [`RegisterError`]; the registration is then unchanged.
    pub async fn register(&self, registration: Registration) -> Result<(), RegisterError> {
        if self.shared.stopping.is_cancelled() {
            return Err(RegisterError::Stopping);
        }
        let (shared, name) = (Arc::clone(&self.shared), registration.container_name.clone());
        let work = async move { shared.register(registration, RegistrationOrigin::User).await };
        let answer = self.shared.queues.enqueue(name.as_str(), work).await;
        answer.unwrap_or_else(|| Err(RegisterError::Persist(WORK_PANICKED.to_owned())))
    }

    /// Registers a container that was discovered, if the present registration of the name is `before`. Returns whether it
    /// was. A concurrent registration by a client therefore takes precedence.
    ///
    /// # Errors
    /// [`RegisterError`]; the registration is then unchanged.
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
        answer.unwrap_or_else(|| Err(RegisterError::Persist(WORK_PANICKED.to_owned())))
    }

    /// Rereads the files of a folder for each container that is registered with it, after the user approved or revoked them.
    /// Commands that run without an approval are killed. `folder` is canonical. Returns the containers.
    ///
    /// # Errors
    /// [`RegisterError::Persist`] if a registration could not be written. Later registrations were not reread.
    pub async fn reread_folder(&self, folder: &Path) -> Result<Vec<ContainerName>, RegisterError> {
        self.shared.options.approvals.notify_changed();
        self.shared.replayed().await;
        let mut containers = Vec::new();
        for entry in &self.list().entries {
            let (shared, name, of) =
                (Arc::clone(&self.shared), entry.container_name.clone(), folder.to_owned());
            let work = async move { shared.reread_folder(&name, &of).await };
            let answer = self.shared.queues.enqueue(entry.container_name.as_str(), work).await;
            if answer.unwrap_or_else(|| Err(RegisterError::Persist(WORK_PANICKED.to_owned())))? {
                containers.push(entry.container_name.clone());
            }
        }
        Ok(containers)
    }

    /// Drops a discovered registration, unless the name has been registered again since. Returns whether it was dropped.
    pub async fn drop_found(&self, registration: Arc<Registration>, reason: DropReason) -> bool {
        let (shared, name) = (Arc::clone(&self.shared), registration.container_name.clone());
        let work = async move { shared.drop_current(&registration, reason).await };
        self.shared.queues.enqueue(name.as_str(), work).await.unwrap_or(false)
    }

    /// Drops a container and keeps the grants of its name. An unknown or invalid name has no effect. With
    /// [`DropReason::Gone`], the registration remains if the container exists when the request is executed: it was created
    /// again meanwhile.
    pub async fn deregister(&self, name: &str, reason: DropReason) {
        let Ok(name) = ContainerName::new(name) else { return };
        let (shared, of) = (Arc::clone(&self.shared), name.clone());
        let work = async move { shared.deregister(&of, reason).await };
        self.shared.queues.enqueue(name.as_str(), work).await;
    }

    /// Drops a container at the request of the host's user, with all grants of its name.
    pub async fn deregister_with_grants(&self, name: &str) {
        let Ok(name) = ContainerName::new(name) else { return };
        let (shared, of) = (Arc::clone(&self.shared), name.clone());
        let work = async move {
            // In this order, a crash in between leaves a container without rights rather than rights without a container.
            shared.remove_grants(&of).await;
            shared.deregister(&of, DropReason::Requested).await;
        };
        self.shared.queues.enqueue(name.as_str(), work).await;
    }

    /// Grants rights to a registered container, bound to the folder of its registration.
    ///
    /// # Errors
    /// [`GrantError`]; no right is granted then.
    pub async fn grant(&self, name: &str, rights: Vec<Right>) -> Result<(), GrantError> {
        let (shared, of) = (Arc::clone(&self.shared), name.to_owned());
        let work = async move { shared.grant(&of, rights).await };
        let answer = self.shared.queues.enqueue(name, work).await;
        answer.unwrap_or_else(|| Err(GrantError::Persist(WORK_PANICKED.to_owned())))
    }

    /// Revokes rights of a name, registered or not, for all folders that they were granted for.
    ///
    /// # Errors
    /// [`GrantError`]; no right is revoked then.
    pub async fn revoke(&self, name: ContainerName, what: Vec<String>) -> Result<(), GrantError> {
        let (shared, of) = (Arc::clone(&self.shared), name.clone());
        let work = async move { shared.revoke(&of, what).await };
        let answer = self.shared.queues.enqueue(name.as_str(), work).await;
        answer.unwrap_or_else(|| Err(GrantError::Persist(WORK_PANICKED.to_owned())))
    }

    /// Returns the grants of all containers.
    pub fn grants(&self) -> &GrantTable {
        &self.shared.options.grants
    }

    /// Returns all registrations. Never waits.
    pub fn list(&self) -> Arc<Registered> {
        self.shared.known.borrow().clone()
    }

    /// Returns a receiver of all registrations and of each change. The last value remains when the registry stops, since the
    /// next daemon starts with it.
    pub fn watch(&self) -> watch::Receiver<Arc<Registered>> {
        self.shared.known.subscribe()
    }

    /// Replaces one named object in the secrets of a container's folder, in the container's queue.
    ///
    /// # Errors
    /// [`PatchError`]; the file is then unchanged.
    pub async fn patch_secrets(&self, name: &str, patch: &Value) -> Result<(), PatchError> {
        let (shared, of, patch) = (Arc::clone(&self.shared), name.to_owned(), patch.clone());
        let work = async move { shared.patch_secrets(&of, &patch).await };
        let answer = self.shared.queues.enqueue(name, work).await;
        answer.unwrap_or_else(|| Err(PatchError::Storage(WORK_PANICKED.to_owned())))
    }

    /// Drops a container that rejected `token` permanently (wire specification, A.6.7), unless it has been registered with
    /// another token since.
    pub async fn fatal_auth(&self, name: &ContainerName, token: &Token, reason: &str) {
        let (shared, of) = (Arc::clone(&self.shared), name.clone());
        let (token, reason) = (token.clone(), reason.to_owned());
        let work = async move { shared.fatal_auth(&of, &token, &reason).await };
        self.shared.queues.enqueue(name.as_str(), work).await;
    }

    /// Records that the container with this broker token has answered a challenge. It must answer one from now on, also
    /// after a restart of the daemon.
    pub async fn require_challenge(&self, name: &ContainerName, token: &Token) {
        let (shared, of, token) = (Arc::clone(&self.shared), name.clone(), token.clone());
        let work = async move { shared.require_challenge(&of, &token).await };
        self.shared.queues.enqueue(name.as_str(), work).await;
    }

    /// Probes a container now instead of at the next interval. If it is missing and was alive before, it is probed again
    /// soon until it has been missed often enough.
    pub fn recheck(&self, name: &str) {
        self.shared.hint(name, ProbeReason::Hint);
    }

    /// Refuses new requests, waits for running work, and drains the observers, each for the cleanup timeout at most. The
    /// files remain for the next daemon. A second call has no further effect.
    pub async fn stop(&self) {
        let shared = &self.shared;
        let stop = async {
            shared.stopping.cancel();
            shared.replayed().await;
            // A queue that hangs has reported a notice.
            let _ =
                tokio::time::timeout(shared.options.cleanup_timeout, shared.queues.wait_until_idle()).await;
            shared.drain_observers().await;
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
