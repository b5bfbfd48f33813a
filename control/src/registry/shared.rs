//! What the registry's tasks share, and the changes themselves. Each of them runs inside its container's queue, or before
//! any queue moves (replay); so a change to one name never meets another change to it.

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
use crate::registry::miss_counter::{Hints, LookReason};
use crate::registry::secrets::SecretsConfig;
use crate::registry::trust_file::TrustFile;
use crate::sys::directory_access::{self, DirectoryAccessError};
use crate::sys::processes;

pub(super) struct Shared {
    pub(super) options: RegistryOptions,
    pub(super) known: watch::Sender<Arc<Registered>>,
    pub(super) queues: Queues,
    /// No new registration is taken from here on.
    pub(super) stopping: CancellationToken,
    /// Cancelled once everything on disk has been taken in. Not a `watch`, which wakes those who wait in any order: who
    /// registered before somebody else deregistered must go first.
    settled: CancellationToken,
    /// Rings when there is a hint.
    pub(super) hinted: Notify,
    hints: Mutex<Hints>,
}

/// Says that everything on disk has been taken in, when it goes out of scope: whatever became of it, nobody waits longer.
pub(super) struct ReplayGuard<'a>(&'a Shared);

impl Drop for ReplayGuard<'_> {
    fn drop(&mut self) {
        self.0.settled.cancel();
    }
}

impl Shared {
    pub(super) fn new(options: RegistryOptions) -> Shared {
        Shared {
            options,
            known: watch::Sender::new(Arc::default()),
            queues: Queues::default(),
            stopping: CancellationToken::new(),
            settled: CancellationToken::new(),
            hinted: Notify::new(),
            hints: Mutex::default(),
        }
    }

    pub(super) fn settling(&self) -> ReplayGuard<'_> {
        ReplayGuard(self)
    }

    /// Waits until everything on disk has been taken in. Those who wait go on in the order in which they came.
    pub(super) async fn replayed(&self) {
        self.settled.cancelled().await;
    }

    pub(super) fn find(&self, name: &str) -> Option<Arc<Registration>> {
        self.known.borrow().find(name).cloned()
    }

    pub(super) fn is_current(&self, registration: &Arc<Registration>) -> bool {
        let current = self.find(registration.container_name.as_str());
        current.is_some_and(|current| Arc::ptr_eq(&current, registration))
    }

    /// Keeps a hint until somebody looks. Hints about names that nobody knows are none, so they are as few as the names.
    pub(super) fn hint(&self, name: &str, look: LookReason) {
        if self.find(name).is_some() {
            let mut hints = self.hints.lock().unwrap_or_else(PoisonError::into_inner);
            let kept = hints.entry(name.to_owned()).or_insert(look);
            *kept = look.max(*kept);
            self.hinted.notify_one();
        }
    }

    /// The registrations that there are hints about.
    pub(super) fn take_hints(&self) -> Vec<(Arc<Registration>, LookReason)> {
        let hints = std::mem::take(&mut *self.hints.lock().unwrap_or_else(PoisonError::into_inner));
        hints.into_iter().filter_map(|(name, look)| Some((self.find(&name)?, look))).collect()
    }

    /// The effects of a `register`, in the wire's order (A.1.4): the file, the value, the event, the attendants.
    pub(super) async fn register(
        &self,
        registration: Registration,
        asked_by: RegistrationOrigin,
    ) -> Result<(), RegisterError> {
        self.replayed().await;
        if self.stopping.is_cancelled() {
            return Err(RegisterError::Stopping);
        }
        let mut registration = completed(registration)?;
        if let Some(known) = self.find(registration.container_name.as_str()) {
            let is_same =
                registration.broker_token.as_ref().is_some_and(|token| known.has_broker_token(token));
            registration.challenge_required |= is_same && known.challenge_required;
        }
        let (home, trust) = (self.options.home.clone(), self.options.approvals.file().clone());
        let written = self.on_disk(move || {
            match asked_by {
                RegistrationOrigin::User => folder::seal(&mut registration, &trust),
                // The container decides when it is found again; what was read for its user stays.
                RegistrationOrigin::Discovery => drop(folder::seal_if_approved(&mut registration, &trust)),
            }
            check_ports(&mut registration, &trust);
            file::write(&home, &registration).map(|set_aside| (registration, set_aside))
        });
        let (registration, set_aside) = written.await.map_err(RegisterError::Persist)?;
        let registration = Arc::new(registration);
        let name = &registration.container_name;
        self.tell_set_aside(name, set_aside);
        let was_known = self.store(&registration);
        if !was_known {
            self.options.journal.record(&Event::Register { container_name: name.to_string() });
        } else {
            self.stop_attendants(name, StopReason::Replaced).await;
        }
        self.start_attendants(&registration).await;
        self.hint(registration.container_name.as_str(), LookReason::First);
        Ok(())
    }

    /// Takes in a registration that is on disk.
    pub(super) async fn take_in(&self, registration: Arc<Registration>) {
        self.store(&registration);
        let container_name = registration.container_name.to_string();
        self.options.journal.record(&Event::Register { container_name });
        self.start_attendants(&registration).await;
    }

    /// Reads the files of a container's folder again, after its user approved or revoked them. Returns whether the container
    /// is registered with this folder.
    pub(super) async fn read_folder_again(
        &self,
        name: &ContainerName,
        of: &Path,
    ) -> Result<bool, RegisterError> {
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
            for attendant in &self.options.observers {
                let started = attendant.folder_changed(Arc::clone(&registration));
                self.bounded(attendant.name(), "starting", started).await;
            }
        } else {
            self.stop_attendants(name, StopReason::Replaced).await;
            self.start_attendants(&registration).await;
        }
        self.hint(name.as_str(), LookReason::First);
        Ok(true)
    }

    pub(super) async fn deregister(&self, name: &ContainerName, reason: DropReason) {
        self.replayed().await;
        if reason == DropReason::Gone && self.is_back(name).await {
            return;
        }
        let was_known = self.forget(name, StopReason::Deregistered).await;
        if was_known {
            let reason = reason.as_str().to_owned();
            self.options.journal.record(&Event::Deregister { container_name: name.to_string(), reason });
        }
    }

    /// Grants rights for the folder that the name is registered with.
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

    /// Takes rights away, whatever folder they were granted for.
    pub(super) async fn revoke(&self, name: &ContainerName, what: Vec<String>) -> Result<(), GrantError> {
        self.replayed().await;
        let current = self.find(name.as_str());
        let (of, words) = (name.clone(), what.clone());
        self.change_grants(name, move |grants| {
            let mut changed = false;
            for word in &words {
                let was_granted = grants.revoke(word)?;
                changed |= was_granted;
                if let (false, Ok(right), Some(current)) = (was_granted, word.parse(), &current)
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

    /// Removes everything that was granted to a name. An error is reported.
    pub(super) async fn remove_grants(&self, name: &ContainerName) {
        self.replayed().await;
        self.options.grants.remove(name);
        let (home, of) = (self.options.home.clone(), name.clone());
        match self.on_disk(move || file::remove::<Grants>(&home, &of)).await {
            Ok(set_aside) => self.tell_set_aside(name, set_aside),
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

    /// Forgets a container that was looked at often enough, unless it was registered anew since.
    pub(super) fn drop_gone(self: &Arc<Self>, registration: Arc<Registration>) {
        let (shared, name) = (Arc::clone(self), registration.container_name.clone());
        // Nobody waits for it: a container whose teardown takes long does not keep others from being looked at.
        let work = async move { shared.drop_current(&registration, DropReason::Gone).await };
        drop(self.queues.enqueue(name.as_str(), work));
    }

    /// Forgets this very registration, and none that has taken its place since; whether it was there. Inside its queue.
    pub(super) async fn drop_current(&self, registration: &Arc<Registration>, reason: DropReason) -> bool {
        let is_current = self.is_current(registration);
        if is_current {
            let name = &registration.container_name;
            self.forget(name, StopReason::Deregistered).await;
            let (container_name, reason) = (name.to_string(), reason.as_str().to_owned());
            self.options.journal.record(&Event::Deregister { container_name, reason });
        }
        is_current
    }

    pub(super) async fn fatal_auth(&self, name: &ContainerName, token: &Token, reason: &str) {
        self.replayed().await;
        let current = self.find(name.as_str());
        // A late report of an old token says nothing about the one that is registered now.
        if current.is_some_and(|current| current.has_broker_token(token)) {
            self.forget(name, StopReason::FatalAuth).await;
            self.skipped(name.as_str(), &format!("fatal broker auth: {reason}"));
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
            // The running broker requires the challenge already, so the attendants keep running.
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
            // The reason is for the host's user: it may hold paths of the host, and a container reads this.
            Err(FolderError::NotTrusted { .. }) => {
                return Err(PatchError::Storage(format!("{} is not trusted", folder::FILE)));
            }
            Err(error) => return Err(PatchError::Storage(error.to_string())),
        };
        let config = config.unwrap_or_default();
        let replaced = secrets::replace(&current.cwd, &config, patch);
        // Waiting for a lock that somebody else holds ends with the daemon; the file is as it was then, or replaced.
        match self.stopping.run_until_cancelled(replaced).await {
            None => Err(PatchError::Stopping),
            Some(replaced) => Ok(replaced?),
        }
    }

    /// Removes a file whose registration is no more; what goes wrong is told.
    pub(super) async fn remove_file(&self, name: &ContainerName) {
        let removed = self.on_disk({
            let (home, name) = (self.options.home.clone(), name.clone());
            move || file::remove::<Registration>(&home, &name)
        });
        match removed.await {
            Ok(set_aside) => self.tell_set_aside(name, set_aside),
            // The next start finds it again, and looks whether there is still such a container.
            Err(error) => self.notice(format!("the registration of {name} stays on disk: {error}")),
        }
    }

    pub(super) fn skipped(&self, name: &str, reason: &str) {
        let (container_name, reason) = (name.to_owned(), reason.to_owned());
        self.options.journal.record(&Event::RegistrationSkipped { container_name, reason });
    }

    pub(super) fn notice(&self, text: String) {
        self.options.journal.record(&Event::Notice { text });
    }

    /// Drains what runs beside the registrations.
    pub(super) async fn drain_attendants(&self) {
        for attendant in &self.options.observers {
            self.bounded(attendant.name(), "draining", attendant.drain()).await;
        }
    }

    /// Whether a container that was reported gone is there, because it was registered anew since.
    async fn is_back(&self, name: &ContainerName) -> bool {
        let Some(current) = self.find(name.as_str()) else { return false };
        let looked = self.options.liveness.probe(&current);
        let looked = tokio::time::timeout(self.options.cleanup_timeout, looked).await;
        looked.unwrap_or(Liveness::Unknown) == Liveness::Alive
    }

    /// Puts a registration in its place, which is that of its name if that is known; whether it was.
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

    /// Takes a name out, ends what runs beside it and removes its file; whether it was known.
    async fn forget(&self, name: &ContainerName, reason: StopReason) -> bool {
        let was_known = self.known.send_if_modified(|known| {
            if known.find(name.as_str()).is_none() {
                return false;
            }
            Arc::make_mut(known).entries.retain(|entry| entry.container_name != *name);
            true
        });
        if was_known {
            self.stop_attendants(name, reason).await;
        }
        self.remove_file(name).await;
        was_known
    }

    async fn start_attendants(&self, registration: &Arc<Registration>) {
        for attendant in &self.options.observers {
            let started = attendant.start(Arc::clone(registration));
            self.bounded(attendant.name(), "starting", started).await;
        }
    }

    async fn stop_attendants(&self, name: &ContainerName, reason: StopReason) {
        for attendant in &self.options.observers {
            self.bounded(attendant.name(), "stopping", attendant.stop(name, reason)).await;
        }
    }

    /// Gives one step its time and no more (A.7.4): a step that hangs is abandoned, and costs no queue.
    async fn bounded(&self, name: &str, what: &str, step: BoxFuture<'_, ()>) {
        if tokio::time::timeout(self.options.cleanup_timeout, step).await.is_err() {
            let limit = self.options.cleanup_timeout;
            self.notice(format!("{what} {name} took longer than {limit:?} and was abandoned"));
        }
    }

    /// Runs what waits for a disk beside the daemon's one thread.
    async fn on_disk<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, FileError> + Send + 'static,
    ) -> Result<T, String> {
        match tokio::task::spawn_blocking(work).await {
            Ok(done) => done.map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        }
    }

    fn tell_set_aside(&self, name: &ContainerName, set_aside: Option<String>) {
        if let Some(aside) = set_aside {
            self.notice(format!("{name}.json could not be read; it is kept as {aside}"));
        }
    }
}

/// The origin of a registration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RegistrationOrigin {
    /// The host's user, over the daemon's own socket.
    User,
    /// A container that Docker lists.
    Discovery,
}

/// Looks up whether the ports that a file of the folder names are approved. Reads small files.
pub(super) fn check_ports(registration: &mut Registration, trust: &TrustFile) {
    let is_approved = registration.folder_ports.as_ref().is_some_and(|ports| {
        let folder = registration.cwd.canonicalize();
        folder.is_ok_and(|folder| trust.check(&folder, ports.file, &ports.sha256).is_ok())
    });
    registration.folder_ports_approved = is_approved;
}

/// A registration with what only its receiver can know: when its process began.
fn completed(mut registration: Registration) -> Result<Registration, RegisterError> {
    file::check_version(&registration).map_err(|why| RegisterError::Field("formatVersion", why))?;
    if let Some(AttachMethod::Agent { directory }) = &registration.attach_method {
        match directory_access::check(directory) {
            // It may be made later, and is looked at again then.
            Ok(()) | Err(DirectoryAccessError::Unreadable { .. }) => {}
            Err(error) => return Err(RegisterError::Field("way", error.to_string())),
        }
    }
    if let Some(AttachMethod::Process { pid, started }) = &mut registration.attach_method {
        let wrong = |why| RegisterError::Field("way", why);
        let found = processes::started(*pid)
            .map_err(|why| wrong(format!("process {pid} cannot be looked at: {why}")))?
            .ok_or_else(|| wrong(format!("there is no process {pid}")))?;
        if started.as_ref().is_some_and(|meant| *meant != found) {
            return Err(wrong(format!("process {pid} is not the one that began then")));
        }
        *started = Some(found);
    }
    Ok(registration)
}
