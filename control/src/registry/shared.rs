//! The state that the registry's tasks share, and the changes themselves. Each change runs in its container's queue, or
//! during replay, before any queue runs. Two changes to one name therefore never overlap.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::future::BoxFuture;
use serde_json::Value;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use super::file::{self, FileError};
use super::queue::Queues;
use super::store::{DropReason, PatchError, RegisterError, Registered, RegistryOptions, StopReason};
use super::{folder, secrets};
use crate::docker::liveness::Liveness;
use crate::model::event::Event;
use crate::model::grants::{Grants, Right, comes_with};
use crate::model::registration::{AttachMethod, ContainerName, Registration, Token};
use crate::registry::folder::FolderError;
use crate::registry::grants::{self, GrantError};
use crate::registry::miss_counter::{Hints, ProbeReason};
use crate::registry::secrets::SecretsConfig;
use crate::registry::trust_file::TrustFile;
use crate::sys::directory_access::{self, DirectoryAccessError};
use crate::sys::processes;

pub(super) struct Shared {
    pub(super) options: RegistryOptions,
    pub(super) known: watch::Sender<Arc<Registered>>,
    pub(super) queues: Queues,
    /// Cancelled when no new registration is accepted.
    pub(super) stopping: CancellationToken,
    /// Cancelled when all files on disk have been replayed. A `watch` would wake its waiters in any order, but a `register`
    /// that arrived before a `deregister` must run first.
    replay_done: CancellationToken,
    /// Notified when a hint was added.
    pub(super) hinted: Notify,
    hints: Mutex<Hints>,
}

/// Marks the replay as done when it is dropped, whatever its result, so that no request waits longer.
pub(super) struct ReplayGuard<'a>(&'a Shared);

impl Drop for ReplayGuard<'_> {
    fn drop(&mut self) {
        self.0.replay_done.cancel();
    }
}

impl Shared {
    pub(super) fn new(options: RegistryOptions) -> Shared {
        Shared {
            options,
            known: watch::Sender::new(Arc::default()),
            queues: Queues::default(),
            stopping: CancellationToken::new(),
            replay_done: CancellationToken::new(),
            hinted: Notify::new(),
            hints: Mutex::default(),
        }
    }

    pub(super) fn replay_guard(&self) -> ReplayGuard<'_> {
        ReplayGuard(self)
    }

    /// Waits until all files on disk have been replayed. Waiters continue in their order of arrival.
    pub(super) async fn replayed(&self) {
        self.replay_done.cancelled().await;
    }

    pub(super) fn find(&self, name: &str) -> Option<Arc<Registration>> {
        self.known.borrow().find(name).cloned()
    }

    pub(super) fn is_current(&self, registration: &Arc<Registration>) -> bool {
        let current = self.find(registration.container_name.as_str());
        current.is_some_and(|current| Arc::ptr_eq(&current, registration))
    }

    /// Stores a hint for the next probe. Ignores unknown names, so the number of hints is bounded.
    pub(super) fn hint(&self, name: &str, look: ProbeReason) {
        if self.find(name).is_some() {
            let mut hints = self.hints.lock().unwrap_or_else(PoisonError::into_inner);
            let kept = hints.entry(name.to_owned()).or_insert(look);
            *kept = look.max(*kept);
            self.hinted.notify_one();
        }
    }

    /// Takes the hints, with the present registration of each name.
    pub(super) fn take_hints(&self) -> Vec<(Arc<Registration>, ProbeReason)> {
        let hints = std::mem::take(&mut *self.hints.lock().unwrap_or_else(PoisonError::into_inner));
        hints.into_iter().filter_map(|(name, look)| Some((self.find(&name)?, look))).collect()
    }

    /// Executes a `register`, with its effects in the order of the wire specification (A.1.4): file, value, event,
    /// observers.
    pub(super) async fn register(
        &self,
        registration: Registration,
        origin: RegistrationOrigin,
    ) -> Result<(), RegisterError> {
        self.replayed().await;
        if self.stopping.is_cancelled() {
            return Err(RegisterError::Stopping);
        }
        let mut registration = complete(registration)?;
        if let Some(known) = self.find(registration.container_name.as_str()) {
            let is_same =
                registration.broker_token.as_ref().is_some_and(|token| known.has_broker_token(token));
            registration.challenge_required |= is_same && known.challenge_required;
        }
        let (home, trust) = (self.options.home.clone(), self.options.approvals.file().clone());
        let written = self.on_disk(move || {
            match origin {
                RegistrationOrigin::User => folder::seal(&mut registration, &trust),
                // The container exists again, so the approvals that were stored for its user remain.
                RegistrationOrigin::Discovery => drop(folder::seal_if_approved(&mut registration, &trust)),
            }
            check_ports(&mut registration, &trust);
            file::write(&home, &registration).map(|set_aside| (registration, set_aside))
        });
        let (registration, set_aside) = written.await.map_err(RegisterError::Persist)?;
        let registration = Arc::new(registration);
        let name = &registration.container_name;
        self.report_set_aside(name, set_aside);
        let was_known = self.store(&registration);
        if !was_known {
            self.options.journal.record(&Event::Register { container_name: name.to_string() });
        } else {
            self.stop_observers(name, StopReason::Replaced).await;
        }
        self.start_observers(&registration).await;
        self.hint(registration.container_name.as_str(), ProbeReason::First);
        Ok(())
    }

    /// Restores a registration from disk.
    pub(super) async fn restore(&self, registration: Arc<Registration>) {
        self.store(&registration);
        let container_name = registration.container_name.to_string();
        self.options.journal.record(&Event::Register { container_name });
        self.start_observers(&registration).await;
    }

    /// Rereads the files of a container's folder, after its user approved or revoked them. Returns whether the container is
    /// registered with this folder.
    pub(super) async fn reread_folder(&self, name: &ContainerName, of: &Path) -> Result<bool, RegisterError> {
        self.replayed().await;
        let Some(before) = self.find(name.as_str()) else { return Ok(false) };
        let (home, trust) = (self.options.home.clone(), self.options.approvals.file().clone());
        let of = of.to_owned();
        let work = self.on_disk(move || {
            if before.cwd != of && before.cwd.canonicalize().ok().as_ref() != Some(&of) {
                return Ok(None);
            }
            let mut registration = Registration::clone(&before);
            folder::seal(&mut registration, &trust);
            check_ports(&mut registration, &trust);
            let was_off = before.exposes_nothing();
            file::write(&home, &registration).map(|_| Some((registration, was_off)))
        });
        let Some((registration, was_off)) = work.await.map_err(RegisterError::Persist)? else {
            return Ok(false);
        };
        let registration = Arc::new(registration);
        self.store(&registration);
        if registration.exposes_nothing() == was_off {
            for observer in &self.options.observers {
                let started = observer.folder_changed(Arc::clone(&registration));
                self.bounded(observer.name(), "starting", started).await;
            }
        } else {
            self.stop_observers(name, StopReason::Replaced).await;
            self.start_observers(&registration).await;
        }
        self.hint(name.as_str(), ProbeReason::First);
        Ok(true)
    }

    pub(super) async fn deregister(&self, name: &ContainerName, reason: DropReason) {
        self.replayed().await;
        if reason == DropReason::Gone && self.exists_again(name).await {
            return;
        }
        let was_known = self.remove(name, StopReason::Deregistered).await;
        if was_known {
            let reason = reason.as_str().to_owned();
            self.options.journal.record(&Event::Deregister { container_name: name.to_string(), reason });
        }
    }

    /// Grants rights for the folder of the name's registration.
    pub(super) async fn grant(&self, name: &str, rights: Vec<Right>) -> Result<(), GrantError> {
        self.replayed().await;
        let current = self.find(name).ok_or_else(|| GrantError::NotRegistered(name.to_owned()))?;
        let what = rights.iter().map(ToString::to_string).collect();
        let folder = current.cwd.clone();
        self.change_grants(&current.container_name, move |grants| {
            Ok(rights.into_iter().fold(false, |changed, right| grants.grant(right, &folder) | changed))
        })
        .await?;
        self.options.journal.record(&Event::Grant { container_name: name.to_owned(), what });
        Ok(())
    }

    /// Revokes rights, for all folders that they were granted for.
    pub(super) async fn revoke(&self, name: &ContainerName, what: Vec<String>) -> Result<(), GrantError> {
        self.replayed().await;
        let current = self.find(name.as_str());
        let (of, rights) = (name.clone(), what.clone());
        self.change_grants(name, move |grants| {
            let mut changed = false;
            for right in &rights {
                let was_granted = grants.revoke(right)?;
                changed |= was_granted;
                if let (false, Ok(right), Some(current)) = (was_granted, right.parse(), &current)
                    && comes_with(right, current)
                {
                    return Err(GrantError::OfRegistration(right, of));
                }
            }
            Ok(changed)
        })
        .await?;
        self.options.journal.record(&Event::Revoke { container_name: name.to_string(), what });
        Ok(())
    }

    /// Removes all grants of a name. Reports an error as a notice.
    pub(super) async fn remove_grants(&self, name: &ContainerName) {
        self.replayed().await;
        self.options.grants.remove(name);
        let (home, of) = (self.options.home.clone(), name.clone());
        match self.on_disk(move || file::remove::<Grants>(&home, &of)).await {
            Ok(set_aside) => self.report_set_aside(name, set_aside),
            Err(error) => self.notice(format!("the grants of {name} stay on disk: {error}")),
        }
    }

    async fn change_grants(
        &self,
        name: &ContainerName,
        change: impl FnOnce(&mut Grants) -> Result<bool, GrantError> + Send + 'static,
    ) -> Result<(), GrantError> {
        if self.stopping.is_cancelled() {
            return Err(GrantError::Stopping);
        }
        let (home, of) = (self.options.home.clone(), name.clone());
        let changed = tokio::task::spawn_blocking(move || grants::change(&home, &of, change)).await;
        self.options.grants.put(changed.map_err(|error| GrantError::Persist(error.to_string()))??);
        Ok(())
    }

    /// Drops a container that was missed often enough, unless it has been registered again since.
    pub(super) fn drop_gone(self: &Arc<Self>, registration: Arc<Registration>) {
        let (shared, name) = (Arc::clone(self), registration.container_name.clone());
        // The caller does not wait: a slow teardown must not delay the probes of other containers.
        let work = async move { shared.drop_current(&registration, DropReason::Gone).await };
        drop(self.queues.enqueue(name.as_str(), work));
    }

    /// Drops this registration, unless another one has replaced it. Returns whether it was current. Runs in its queue.
    pub(super) async fn drop_current(&self, registration: &Arc<Registration>, reason: DropReason) -> bool {
        let is_current = self.is_current(registration);
        if is_current {
            let name = &registration.container_name;
            self.remove(name, StopReason::Deregistered).await;
            let (container_name, reason) = (name.to_string(), reason.as_str().to_owned());
            self.options.journal.record(&Event::Deregister { container_name, reason });
        }
        is_current
    }

    pub(super) async fn fatal_auth(&self, name: &ContainerName, token: &Token, reason: &str) {
        self.replayed().await;
        let current = self.find(name.as_str());
        // A late report about an old token does not concern the present one.
        if current.is_some_and(|current| current.has_broker_token(token)) {
            self.remove(name, StopReason::FatalAuth).await;
            self.report_skipped(name.as_str(), &format!("fatal broker auth: {reason}"));
        }
    }

    pub(super) async fn require_challenge(&self, name: &ContainerName, token: &Token) {
        self.replayed().await;
        let current = self.find(name.as_str()).filter(|current| current.has_broker_token(token));
        let Some(current) = current.filter(|current| !current.challenge_required) else { return };
        let registration = Registration { challenge_required: true, ..Registration::clone(&current) };
        let home = self.options.home.clone();
        let written = self.on_disk(move || file::write(&home, &registration).map(|_| registration));
        match written.await {
            // The running broker requires the challenge already, so the observers keep running.
            Ok(registration) => drop(self.store(&Arc::new(registration))),
            Err(error) => self.notice(format!("that {name} answers challenges is not remembered: {error}")),
        }
    }

    pub(super) async fn patch_secrets(&self, name: &str, patch: &Value) -> Result<(), PatchError> {
        self.replayed().await;
        if self.stopping.is_cancelled() {
            return Err(PatchError::Stopping);
        }
        let current = self.find(name).ok_or_else(|| PatchError::NotRegistered(name.to_owned()))?;
        let config = match self.options.approvals.settings(&current).await {
            Ok(approved) => approved.settings().secrets.clone().map(SecretsConfig::from),
            // Without a table [secrets], an approval would not change what the container may replace.
            Err(FolderError::NotTrusted { secrets: false, .. }) => None,
            // The full reason may contain paths of the host, and a container reads this text.
            Err(FolderError::NotTrusted { .. }) => {
                return Err(PatchError::Storage(format!("{} is not trusted", folder::FILE)));
            }
            Err(error) => return Err(PatchError::Storage(error.to_string())),
        };
        let config = config.unwrap_or_default();
        let replaced = secrets::replace(&current.cwd, &config, patch);
        // The wait for another program's lock ends when the daemon stops. The file is then unchanged or replaced.
        match self.stopping.run_until_cancelled(replaced).await {
            None => Err(PatchError::Stopping),
            Some(replaced) => Ok(replaced?),
        }
    }

    /// Removes the file of a dropped registration. Reports an error as a notice.
    pub(super) async fn remove_file(&self, name: &ContainerName) {
        let removed = self.on_disk({
            let (home, name) = (self.options.home.clone(), name.clone());
            move || file::remove::<Registration>(&home, &name)
        });
        match removed.await {
            Ok(set_aside) => self.report_set_aside(name, set_aside),
            // The next start loads it again, and probes whether the container exists.
            Err(error) => self.notice(format!("the registration of {name} stays on disk: {error}")),
        }
    }

    pub(super) fn report_skipped(&self, name: &str, reason: &str) {
        let (container_name, reason) = (name.to_owned(), reason.to_owned());
        self.options.journal.record(&Event::RegistrationSkipped { container_name, reason });
    }

    pub(super) fn notice(&self, text: String) {
        self.options.journal.record(&Event::Notice { text });
    }

    /// Drains the observers.
    pub(super) async fn drain_observers(&self) {
        for observer in &self.options.observers {
            self.bounded(observer.name(), "draining", observer.drain()).await;
        }
    }

    /// Returns whether a container that was reported gone exists, since it was created again.
    async fn exists_again(&self, name: &ContainerName) -> bool {
        let Some(current) = self.find(name.as_str()) else { return false };
        let result = self.options.liveness.probe(&current);
        let result = tokio::time::timeout(self.options.cleanup_timeout, result).await;
        result.unwrap_or(Liveness::Unknown) == Liveness::Alive
    }

    /// Stores a registration, at the position of its name if that is known. Returns whether it was.
    fn store(&self, registration: &Arc<Registration>) -> bool {
        let mut was_known = false;
        self.known.send_modify(|known| {
            let entries = &mut Arc::make_mut(known).entries;
            match entries.iter_mut().find(|entry| entry.container_name == registration.container_name) {
                Some(entry) => {
                    was_known = true;
                    *entry = Arc::clone(registration);
                }
                None => entries.push(Arc::clone(registration)),
            }
        });
        was_known
    }

    /// Removes a name with its observers and its file. Returns whether it was known.
    async fn remove(&self, name: &ContainerName, reason: StopReason) -> bool {
        let was_known = self.known.send_if_modified(|known| {
            if known.find(name.as_str()).is_none() {
                return false;
            }
            Arc::make_mut(known).entries.retain(|entry| entry.container_name != *name);
            true
        });
        if was_known {
            self.stop_observers(name, reason).await;
        }
        self.remove_file(name).await;
        was_known
    }

    async fn start_observers(&self, registration: &Arc<Registration>) {
        for observer in &self.options.observers {
            let started = observer.start(Arc::clone(registration));
            self.bounded(observer.name(), "starting", started).await;
        }
    }

    async fn stop_observers(&self, name: &ContainerName, reason: StopReason) {
        for observer in &self.options.observers {
            self.bounded(observer.name(), "stopping", observer.stop(name, reason)).await;
        }
    }

    /// Runs one step within the cleanup timeout (A.7.4). A step that hangs is abandoned, so that it does not block the
    /// queue.
    async fn bounded(&self, name: &str, what: &str, step: BoxFuture<'_, ()>) {
        if tokio::time::timeout(self.options.cleanup_timeout, step).await.is_err() {
            let limit = self.options.cleanup_timeout;
            self.notice(format!("{what} {name} did not finish within {limit:?} and was abandoned"));
        }
    }

    /// Runs disk I/O on a blocking thread.
    async fn on_disk<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, FileError> + Send + 'static,
    ) -> Result<T, String> {
        match tokio::task::spawn_blocking(work).await {
            Ok(done) => done.map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        }
    }

    fn report_set_aside(&self, name: &ContainerName, set_aside: Option<String>) {
        if let Some(aside) = set_aside {
            self.notice(format!("{name}.json could not be read; it is kept as {aside}"));
        }
    }
}

/// The origin of a registration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RegistrationOrigin {
    /// A request of the host's user over the daemon's socket.
    User,
    /// A container that Docker lists.
    Discovery,
}

/// Checks whether the ports that a file of the folder requests are approved. Reads small files.
pub(super) fn check_ports(registration: &mut Registration, trust: &TrustFile) {
    let is_approved = registration.folder_ports.as_ref().is_some_and(|ports| {
        let folder = registration.cwd.canonicalize();
        folder.is_ok_and(|folder| trust.check(&folder, ports.file, &ports.sha256).is_ok())
    });
    registration.folder_ports_approved = is_approved;
}

/// Checks a registration against the host, and adds the start time of its process.
fn complete(mut registration: Registration) -> Result<Registration, RegisterError> {
    file::check_version(&registration).map_err(|why| RegisterError::Field("formatVersion", why))?;
    if let Some(AttachMethod::Agent { directory }) = &registration.attach_method {
        match directory_access::check(directory) {
            // The directory may be created later, and is checked again then.
            Ok(()) | Err(DirectoryAccessError::Unreadable { .. }) => {}
            Err(error) => return Err(RegisterError::Field("way", error.to_string())),
        }
    }
    if let Some(AttachMethod::Process { pid, started }) = &mut registration.attach_method {
        let invalid = |why| RegisterError::Field("way", why);
        let found = processes::started(*pid)
            .map_err(|why| invalid(format!("process {pid} cannot be inspected: {why}")))?
            .ok_or_else(|| invalid(format!("there is no process {pid}")))?;
        if started.as_ref().is_some_and(|registered| *registered != found) {
            return Err(invalid(format!("process {pid} started at another time than registered")));
        }
        *started = Some(found);
    }
    Ok(registration)
}
