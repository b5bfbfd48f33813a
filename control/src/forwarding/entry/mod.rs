//! The task of one container: locates it, enters it, waits for its end, and locates it again.
//!
//! Each container has a task ([`ContainerTask::run`]), which sends [`TaskReport`]s to the driver. The driver requests
//! each entry through the watch channel `entry_request`; each value is one request, since an engine that is started
//! again needs the container entered again. A located container is referred to by a pidfd, which cannot come to mean
//! another process, or by the file of a namespace or the directory of an agent, whose identity is checked every
//! [`CHECK_INTERVAL`]. If the engine loses the agent in a directory, the driver requests another entry. No descriptor
//! here keeps a namespace alive: the opener ends when its descriptors are closed.
//!
//! A container that is not found is located again after a hint that something has changed, and after the pauses of
//! `retry_delay`. A hint that arrives during an attempt causes another attempt, so no hint is lost.

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
pub(super) use methods::EnteredBy;
use methods::enter;
use retry_delay::{LocateFailure, RetryDelay};

/// The interval at which the file of a namespace, or an agent's directory, is checked.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// The pause after a failure to enter: the first and the longest.
const ENTRY_PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(10));

/// A request to enter a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct EntryRequest {
    /// The number of the request; no two are equal.
    pub(super) serial: u64,
    /// The number of shards of the engine: it needs one channel for each.
    pub(super) shards: u16,
}

/// What a failure to enter says about the container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Certainty {
    /// It does not run.
    Gone,
    /// It runs, and cannot be entered.
    Refused,
    /// Whether it runs is not known.
    Unknown,
}

/// The descriptors and facts that the engine needs for an entered container.
#[derive(Debug)]
pub(super) struct EntryResult {
    /// The cookie of its network namespace.
    pub(super) cookie: u64,
    sources: WatchSources,
    kind: UpstreamKind,
    pub(super) descriptors: Vec<OwnedFd>,
    /// The method of entry.
    pub(super) entered_by: EnteredBy,
    /// The failures of faster methods, if there are any.
    pub(super) fallback_reason: Option<String>,
}

/// Facts from Docker about a container that was entered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct DockerFacts {
    /// The ports that Docker publishes: those of the container, and those of the host.
    pub(super) published: BTreeMap<NonZeroU16, NonZeroU16>,
    /// The container whose network it uses, by its Docker name.
    pub(super) network_of: Option<String>,
}

impl EntryResult {
    /// The command that the descriptors are sent with.
    pub(super) fn command(&self, upstream: UpstreamId) -> Command {
        let (sources, kind) = (self.sources, self.kind);
        Command::AddUpstream { upstream, netns_cookie: self.cookie, sources, kind }
    }
}

/// An event of a container task.
#[derive(Debug)]
pub(super) enum TaskEvent {
    /// It was entered; `entry` is what the engine needs.
    Entered { serial: u64, entry: EntryResult, docker_facts: DockerFacts },
    /// It was not located or not entered.
    EntryFailed { certainty: Certainty, reason: String },
    /// The container has ended, or another one has replaced it.
    ContainerGone { reason: String },
    /// The process of the registration has ended; no events follow.
    ProcessEnded,
}

/// An event, and its task.
#[derive(Debug)]
pub(super) struct TaskReport {
    pub(super) name: ContainerName,
    /// The number of the task: reports of one that was replaced may still arrive.
    pub(super) task: u64,
    pub(super) event: TaskEvent,
}

/// The attach method of a registration; `None` if it has neither an attach method nor a broker.
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
    /// The socket of the helper.
    pub(super) helper: Option<PathBuf>,
    pub(super) entry_request: watch::Receiver<Option<EntryRequest>>,
    /// The Docker id of the container, if the registration follows an id and not a name.
    pub(super) id: watch::Receiver<Option<String>>,
    /// Notified when something may have changed.
    pub(super) hint: Arc<Notify>,
    /// Whether every change that Docker reports causes such a hint.
    pub(super) followed: watch::Receiver<bool>,
    pub(super) reports: mpsc::UnboundedSender<TaskReport>,
}

impl ContainerTask {
    /// Runs until the process of the registration has ended; with other attach methods, until it is aborted.
    pub(super) async fn run(mut self) {
        let mut reported = None;
        let mut retry_delay = RetryDelay::new();
        loop {
            let (failure, certainty, reason) =
                match locate::locate(&self.attach_method, &self.name, &self.docker).await {
                    Ok(location) => {
                        (reported, retry_delay) = (None, RetryDelay::new());
                        let reason = self.enter_until_end(location).await;
                        self.report(TaskEvent::ContainerGone { reason });
                        // A restarted container is located again soon; an ended process is reported by the next turn.
                        tokio::task::yield_now().await;
                        continue;
                    }
                    Err(LocateError::ProcessEnded) => return self.report(TaskEvent::ProcessEnded),
                    Err(LocateError::Stopped(reason)) => (LocateFailure::Stopped, Certainty::Gone, reason),
                    Err(LocateError::Missing(certainty, reason)) => {
                        let is_dockers = matches!(self.attach_method, AttachMethod::Docker { .. });
                        let failure =
                            if is_dockers { LocateFailure::Unavailable } else { LocateFailure::NotDocker };
                        (failure, certainty, reason)
                    }
                };
            let missed = Some((certainty, reason.clone()));
            if reported != missed {
                reported = missed;
                self.report(TaskEvent::EntryFailed { certainty, reason });
            }
            retry_delay = self.retry_delay(failure, retry_delay).await;
        }
    }

    /// Waits until the next attempt is due. Returns the delay to use after it.
    async fn retry_delay(&mut self, failure: LocateFailure, retry_delay: RetryDelay) -> RetryDelay {
        loop {
            // `followed` is set before the first hint of a Docker event, so none of those hints is missed.
            let pause = retry_delay.pause(failure, *self.followed.borrow_and_update());
            let over = async {
                match pause {
                    Some(pause) => sleep(pause).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = over => return retry_delay.increased(),
                () = self.hint.notified() => return RetryDelay::new(),
                // The pause depends on `followed`.
                Ok(()) = self.followed.changed() => {}
            }
        }
    }

    fn report(&self, event: TaskEvent) {
        // The receiver ends only after this task was aborted.
        let _ = self.reports.send(TaskReport { name: self.name.clone(), task: self.number, event });
    }

    /// Enters for each request until the container ends. Returns the reason of its end.
    async fn enter_until_end(&mut self, location: Location) -> String {
        let mut done = None;
        let mut pause = ENTRY_PAUSE.0;
        loop {
            let mut entry_request = self.entry_request.clone();
            let wanted =
                entry_request.wait_for(|entry_request| entry_request.is_some() && *entry_request != done);
            let asked = tokio::select! {
                biased;
                reason = self.until_gone(&location) => return reason,
                asked = wanted => match asked {
                    Ok(asked) => *asked,
                    Err(_) => return "forwarding has ended".to_owned(),
                },
            };
            let Some(EntryRequest { serial, shards }) = asked else { continue };
            let entered = match location.entry_methods(self.helper.as_deref()) {
                Ok(entry_methods) => {
                    let advice = location.advice(self.helper.as_deref());
                    let work = tokio::task::spawn_blocking(move || enter(entry_methods, advice, shards));
                    work.await.unwrap_or_else(|error| Err((Certainty::Unknown, error.to_string())))
                }
                Err(error) => Err((Certainty::Unknown, error.to_string())),
            };
            match entered {
                Ok(entry) => {
                    done = asked;
                    pause = ENTRY_PAUSE.0;
                    let docker_facts = location.docker_facts();
                    self.report(TaskEvent::Entered { serial, entry, docker_facts });
                }
                Err((certainty, reason)) => {
                    self.report(TaskEvent::EntryFailed { certainty, reason });
                    let until_changed = tokio::select! {
                        until_changed = self.until_changed(&location) => until_changed,
                        () = sleep(pause) => None,
                    };
                    if let Some(reason) = until_changed {
                        return reason;
                    }
                    pause = (2 * pause).min(location.pause_max(self.helper.as_deref()));
                }
            }
        }
    }

    /// Waits until the container is no longer where it was located. Returns the reason.
    async fn until_gone(&self, location: &Location) -> String {
        loop {
            if let Some(reason) = self.until_changed(location).await {
                return reason;
            }
        }
    }

    /// Waits until the container is no longer where it was located, and returns the reason; or returns `None` after a
    /// hint, if it is still there.
    async fn until_changed(&self, location: &Location) -> Option<String> {
        match location {
            Location::Process { pidfd, container: None } => Some(process_end(pidfd).await),
            Location::Process { pidfd, container: Some((known, _)) } => tokio::select! {
                reason = process_end(pidfd) => Some(reason),
                another = self.replaced_by_another(known) => another,
            },
            Location::File { path, identity } => loop {
                let is_hint = self.until_check().await;
                if identity_of_namespace(path).await != Some(*identity) {
                    return Some(format!("{} is no longer the same namespace", path.display()));
                }
                if is_hint {
                    return None;
                }
            },
            Location::Directory { path } => loop {
                let is_hint = self.until_check().await;
                if identity_of_file(path).is_none() {
                    return Some(format!("the directory {} is gone", path.display()));
                }
                if is_hint {
                    return None;
                }
            },
        }
    }

    /// Waits for a hint or for the next check. Returns whether it was a hint.
    async fn until_check(&self) -> bool {
        tokio::select! {
            () = sleep(CHECK_INTERVAL) => false,
            () = self.hint.notified() => true,
        }
    }

    /// Waits for a hint, and checks whether Docker now has another process for the name, or no container. A renamed
    /// container stays the same one if its registration follows its id: the registration moves to the new name.
    async fn replaced_by_another(&self, known: &FirstProcess) -> Option<String> {
        self.hint.notified().await;
        let owed = PendingHint(&self.hint);
        let name = self.attach_method.docker_name(&self.name);
        let found = self.docker.first_process(name).await;
        std::mem::forget(owed);
        let is_meant = self.id.borrow().as_ref() == Some(&known.id);
        let another = match found {
            Ok(now) if is_meant && now.id != known.id => false,
            Ok(now) => now != *known,
            Err(DockerError::NoSuchContainer(_)) => !is_meant,
            // If the engine does not answer, the pidfd decides.
            Err(_) => false,
        };
        another.then(|| "another container has its name now".to_owned())
    }
}

/// A hint that was taken and not processed yet. If the check is cancelled, dropping this restores the hint.
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
