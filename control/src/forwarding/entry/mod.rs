//! The way into one container: found, entered, watched until it ends, and found again.
//!
//! A task for each container ([`ContainerTask::run`]) tells the forwarding task in words what became of it. Being entered is
//! asked for by the gate: each of its values is one request, since an engine that is started anew needs a new way in.
//! What a container is reached by is held by a pidfd, which cannot mean a stranger, or by the file of a namespace, whose
//! identity is looked at again. Where an agent inside is met in a directory, the engine's word that it has lost the agent is
//! what has it met again. Nothing here keeps a namespace alive: the opener is gone when its descriptors are.
//!
//! A container that is not there is looked for again when a hint says that something has changed about it, and after the
//! pauses of `retry_delay`. Every hint that comes while a look is under way is one more look, so that none is lost.

mod locate;
mod methods;
mod ownership;
mod retry_delay;

use std::collections::BTreeMap;
use std::num::NonZeroU16;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use landfall_engine::command::{Command, UpstreamId, UpstreamKind, WatchSources};
use tokio::io::unix::AsyncFd;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::sleep;

use crate::docker::{Docker, DockerError, FirstProcess};
use crate::model::registration::{AttachMethod, ContainerName, Registration};
use crate::sys::launcher::identity_of_namespace;
use crate::sys::paths::identity_of_file;
use locate::{LocateError, Location};
pub(super) use methods::Means;
use methods::enter;
use retry_delay::{LookResult, RetryDelay};

/// How often the file of a namespace is looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// How long after a failure to enter it is tried again: the first time, and at most.
const ENTER_AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(10));

/// A request to enter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct EntryRequest {
    /// Which request; each has another number.
    pub(super) serial: u64,
    /// How many channels the engine needs.
    pub(super) shards: u16,
}

/// How much is known of a container that is not entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Certainty {
    /// It does not run.
    Gone,
    /// It runs, and is not to be had.
    Refused,
    /// Nobody can say whether it runs.
    Unknown,
}

/// What the engine needs for a container that was entered.
#[derive(Debug)]
pub(super) struct EntryResult {
    /// That of its namespace.
    pub(super) cookie: u64,
    sources: WatchSources,
    kind: UpstreamKind,
    pub(super) descriptors: Vec<OwnedFd>,
    /// What it was entered by.
    pub(super) means: Means,
    /// Why by nothing faster.
    pub(super) faster: Option<String>,
}

/// What Docker tells of a container that was entered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct DockerFacts {
    /// What Docker publishes of it: ports inside, and those of the host.
    pub(super) published: BTreeMap<NonZeroU16, NonZeroU16>,
    /// The container whose network it uses, by its name at Docker.
    pub(super) network_of: Option<String>,
}

impl EntryResult {
    /// The command that its descriptors belong to.
    pub(super) fn command(&self, upstream: UpstreamId) -> Command {
        let (sources, kind) = (self.sources, self.kind);
        Command::AddUpstream { upstream, netns_cookie: self.cookie, sources, kind }
    }
}

/// What a visit tells.
#[derive(Debug)]
pub(super) enum TaskEvent {
    /// It is inside: what the engine needs for it.
    Entered { serial: u64, entry: EntryResult, circumstances: DockerFacts },
    /// It is not, for this reason.
    Missed { certainty: Certainty, reason: String },
    /// The container has ended, or became another one.
    Left { reason: String },
    /// The registration has ended with its process; nothing follows.
    Ended,
}

/// A word, and whose it is.
#[derive(Debug)]
pub(super) struct TaskReport {
    pub(super) name: ContainerName,
    /// Which visit: one that was replaced may have left a word behind.
    pub(super) task: u64,
    pub(super) word: TaskEvent,
}

/// The way of a registration, where it is to be forwarded at all.
pub(super) fn attach_method_of(registration: &Registration) -> Option<AttachMethod> {
    registration.attach_method.clone().or_else(|| registration.broker().map(|_| AttachMethod::DOCKER))
}

/// The task of one container.
#[derive(Debug)]
pub(super) struct ContainerTask {
    pub(super) name: ContainerName,
    pub(super) number: u64,
    pub(super) attach_method: AttachMethod,
    pub(super) docker: Docker,
    /// Where a helper listens that may enter containers.
    pub(super) helper: Option<PathBuf>,
    pub(super) entry_request: watch::Receiver<Option<EntryRequest>>,
    /// Docker's id of the container that is meant, where its registration follows that and not a name.
    pub(super) id: watch::Receiver<Option<String>>,
    /// Something may have changed.
    pub(super) hint: Arc<Notify>,
    /// Whether everything that Docker tells is such a hint.
    pub(super) followed: watch::Receiver<bool>,
    pub(super) words: mpsc::UnboundedSender<TaskReport>,
}

impl ContainerTask {
    /// Runs until the registration's process has ended; for other ways until it is aborted.
    pub(super) async fn run(mut self) {
        let mut told = None;
        let mut retry_delay = RetryDelay::new();
        loop {
            let (finding, certainty, reason) =
                match locate::find(&self.attach_method, &self.name, &self.docker).await {
                    Ok(location) => {
                        (told, retry_delay) = (None, RetryDelay::new());
                        let reason = self.stay(location).await;
                        self.tell(TaskEvent::Left { reason });
                        // A container that is restarted is there again soon, and a process has ended for good.
                        tokio::task::yield_now().await;
                        continue;
                    }
                    Err(LocateError::Ended) => return self.tell(TaskEvent::Ended),
                    Err(LocateError::Stopped(reason)) => (LookResult::Stopped, Certainty::Gone, reason),
                    Err(LocateError::Missing(certainty, reason)) => {
                        let is_dockers = matches!(self.attach_method, AttachMethod::Docker { .. });
                        let finding = if is_dockers { LookResult::Withheld } else { LookResult::Untold };
                        (finding, certainty, reason)
                    }
                };
            let missed = Some((certainty, reason.clone()));
            if told != missed {
                told = missed;
                self.tell(TaskEvent::Missed { certainty, reason });
            }
            retry_delay = self.retry_delay(finding, retry_delay).await;
        }
    }

    /// Returns when it is time to look again, with the rest after that.
    async fn retry_delay(&mut self, finding: LookResult, retry_delay: RetryDelay) -> RetryDelay {
        loop {
            // Whoever follows Docker says so before the hints that come with it, so none of them is waited for in vain.
            let pause = retry_delay.pause(finding, *self.followed.borrow_and_update());
            let over = async {
                match pause {
                    Some(pause) => sleep(pause).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = over => return retry_delay.passed(),
                () = self.hint.notified() => return RetryDelay::new(),
                // How long it rests is another matter from here on.
                Ok(()) = self.followed.changed() => {}
            }
        }
    }

    fn tell(&self, word: TaskEvent) {
        // The forwarding task goes only together with this one.
        let _ = self.words.send(TaskReport { name: self.name.clone(), task: self.number, word });
    }

    /// Enters as often as the gate asks for it, until the container ends. Tells why it did.
    async fn stay(&mut self, location: Location) -> String {
        let mut done = None;
        let mut pause = ENTER_AGAIN.0;
        loop {
            let mut entry_request = self.entry_request.clone();
            let wanted =
                entry_request.wait_for(|entry_request| entry_request.is_some() && *entry_request != done);
            let asked = tokio::select! {
                biased;
                reason = self.end_of(&location) => return reason,
                asked = wanted => match asked {
                    Ok(asked) => *asked,
                    Err(_) => return "forwarding has ended".to_owned(),
                },
            };
            let Some(EntryRequest { serial, shards }) = asked else { continue };
            let entered = match location.doors(self.helper.as_deref()) {
                Ok(doors) => {
                    let advice = location.advice(self.helper.as_deref());
                    let work = tokio::task::spawn_blocking(move || enter(doors, advice, shards));
                    work.await.unwrap_or_else(|error| Err((Certainty::Unknown, error.to_string())))
                }
                Err(error) => Err((Certainty::Unknown, error.to_string())),
            };
            match entered {
                Ok(entry) => {
                    done = asked;
                    pause = ENTER_AGAIN.0;
                    let circumstances = location.circumstances();
                    self.tell(TaskEvent::Entered { serial, entry, circumstances });
                }
                Err((certainty, reason)) => {
                    self.tell(TaskEvent::Missed { certainty, reason });
                    let disturbed = tokio::select! {
                        disturbed = self.disturbed(&location) => disturbed,
                        () = sleep(pause) => None,
                    };
                    if let Some(reason) = disturbed {
                        return reason;
                    }
                    pause = (2 * pause).min(location.pause_max(self.helper.as_deref()));
                }
            }
        }
    }

    /// Returns when the container is no longer where it was found.
    async fn end_of(&self, location: &Location) -> String {
        loop {
            if let Some(reason) = self.disturbed(location).await {
                return reason;
            }
        }
    }

    /// Returns when the container is no longer where it was found, and why; or with nothing, when a hint has shown that it
    /// is.
    async fn disturbed(&self, location: &Location) -> Option<String> {
        match location {
            Location::Process { pidfd, container: None } => Some(process_end(pidfd).await),
            Location::Process { pidfd, container: Some((known, _)) } => tokio::select! {
                reason = process_end(pidfd) => Some(reason),
                another = self.has_become_another(known) => another,
            },
            Location::File { path, identity } => loop {
                let is_hint = self.until_a_look().await;
                if identity_of_namespace(path).await != Some(*identity) {
                    return Some(format!("{} is no longer the same namespace", path.display()));
                }
                if is_hint {
                    return None;
                }
            },
            Location::Directory { path } => loop {
                let is_hint = self.until_a_look().await;
                if identity_of_file(path).is_none() {
                    return Some(format!("the directory {} is gone", path.display()));
                }
                if is_hint {
                    return None;
                }
            },
        }
    }

    /// Waits for a hint, or until it is time to look without one; whether it was a hint.
    async fn until_a_look(&self) -> bool {
        tokio::select! {
            () = sleep(LOOK_INTERVAL) => false,
            () = self.hint.notified() => true,
        }
    }

    /// Waits for a hint; whether Docker then has another process for the name, or none. One that is renamed stays what it is
    /// where its registration follows it: that is moved to the new name.
    async fn has_become_another(&self, known: &FirstProcess) -> Option<String> {
        self.hint.notified().await;
        let owed = PendingHint(&self.hint);
        let name = self.attach_method.docker_name(&self.name);
        let told = self.docker.first_process(name).await;
        std::mem::forget(owed);
        let is_meant = self.id.borrow().as_ref() == Some(&known.id);
        let another = match told {
            Ok(now) if is_meant && now.id != known.id => false,
            Ok(now) => now != *known,
            Err(DockerError::NoSuchContainer(_)) => !is_meant,
            // The pidfd knows better than an engine that does not answer.
            Err(_) => false,
        };
        another.then(|| "another container has its name now".to_owned())
    }
}

/// A hint that was taken and not followed yet. A look that is given up for something else gives it back.
struct PendingHint<'a>(&'a Notify);

impl Drop for PendingHint<'_> {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

/// A pidfd is readable when its process has ended (`pidfd_open(2)`).
async fn process_end(pidfd: &AsyncFd<OwnedFd>) -> String {
    match pidfd.readable().await {
        Ok(_) => "its process has ended".to_owned(),
        Err(error) => format!("its process cannot be watched: {error}"),
    }
}
