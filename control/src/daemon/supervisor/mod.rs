//! Restarts (wire specification, A.9): acknowledged first and executed then, since the caller's own container is the one
//! that is being stopped and could never receive a later answer.
//!
//! A restart goes through three hands. [`Supervisor::preflight`] may refuse it, by local checks that take moments.
//! [`Supervisor::accept`] promises it and does nothing yet: the answer is written while the caller's container still runs.
//! [`Ticket::begin`] puts it into the queue, where a container has one restart that runs and at most one that waits; what
//! is asked for beyond that is folded into the one that waits. What becomes of it stands in the journal.

mod drift;
mod queue;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use thiserror::Error;

use crate::daemon::supervisor::drift::Drift;
pub use crate::daemon::supervisor::queue::Build;
use crate::daemon::supervisor::queue::{Queue, Restart};
use crate::docker::Docker;
use crate::docker::rebuild::UserOfRebuild;
use crate::model::event::Event;
use crate::model::grants::Right;
use crate::model::registration::{ContainerName, Registration};
use crate::registry::folder::{Approvals, Approved, Command, CommandError, Ended, FolderError};
use crate::registry::grants::GrantTable;
use crate::sys::journal::Journal;

/// How long the folder's own check may take.
const PREFLIGHT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the folder's command that stops the container may take, and the one that starts it: it may build.
const STOP_TIMEOUT: Duration = Duration::from_secs(120);
const START_TIMEOUT: Duration = Duration::from_secs(1_800);
/// How long the daemon's stop waits for restarts that were promised.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(60);

/// What a daemon says that restarts nothing (wire specification, A.1.4).
pub const NOT_ENABLED: &str = "restart capability not enabled on this daemon";

/// The reasons to refuse a restart before it is acknowledged.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PreflightError {
    /// The program on disk is another build.
    #[error("{0}")]
    Drifted(String),
    /// The container asked for a rebuild and does not have the right.
    #[error("not granted: rebuild (on the host, `landfall grant {0} rebuild` gives {0} this right)")]
    NotGranted(ContainerName),
    /// The check of the folder's own failed.
    #[error("restart refused for {0}: {1}")]
    Folder(ContainerName, String),
}

/// Restarts containers, one at a time each. Clones are the same one.
#[derive(Clone)]
pub struct Supervisor(Arc<Inner>);

struct Inner {
    docker: Docker,
    grants: GrantTable,
    journal: Journal,
    approvals: Approvals,
    drift: Drift,
    state: Mutex<State>,
    /// Tickets that are out, and restarts that run.
    promised: TaskTracker,
}

#[derive(Default)]
struct State {
    /// Why nothing is promised any more, or at all.
    refusal: Option<&'static str>,
    queue: Queue,
}

/// A restart that was promised. [`Ticket::begin`] starts the work; dropping the ticket does, too: the caller was told
/// that it is scheduled.
#[must_use]
pub struct Ticket {
    supervisor: Supervisor,
    registration: Arc<Registration>,
    build: Build,
    _promised: TaskTrackerToken,
}

impl Supervisor {
    /// Returns a supervisor that restarts through `docker` or by approved commands, checks rights by `grants`, and reports to
    /// the journal.
    pub fn new(docker: Docker, grants: GrantTable, journal: Journal, approvals: Approvals) -> Supervisor {
        Supervisor::with(docker, grants, journal, approvals, Drift::of_this_program())
    }

    fn with(
        docker: Docker,
        grants: GrantTable,
        journal: Journal,
        approvals: Approvals,
        drift: Drift,
    ) -> Supervisor {
        let (state, promised) = (Mutex::default(), TaskTracker::new());
        Supervisor(Arc::new(Inner { docker, grants, journal, approvals, drift, state, promised }))
    }

    /// Checks what can be checked at once: local and deterministic. A configuration that is not valid or not approved lets the
    /// restart pass; the restart itself then gives the reason, or does without.
    ///
    /// # Errors
    /// [`PreflightError`].
    pub async fn preflight(
        &self,
        registration: &Arc<Registration>,
        build: Build,
    ) -> Result<(), PreflightError> {
        self.0.drift.check().await.map_err(PreflightError::Drifted)?;
        self.check_right(registration, build)?;
        let Ok(approved) = self.0.approvals.settings(registration).await else { return Ok(()) };
        let Some(words) = &approved.settings().restart.preflight else { return Ok(()) };
        let command = Command::new(words, &approved, &registration.container_name, PREFLIGHT_TIMEOUT);
        outcome(command.run().await)
            .map_err(|why| PreflightError::Folder(registration.container_name.clone(), why))
    }

    /// Whether the container may have what it asked for. The host's user may have everything.
    fn check_right(&self, registration: &Registration, build: Build) -> Result<(), PreflightError> {
        match build {
            Build::ByContainer if !self.0.grants.has_right(Right::Rebuild, registration) => {
                Err(PreflightError::NotGranted(registration.container_name.clone()))
            }
            Build::No | Build::ByContainer | Build::ByUser => Ok(()),
        }
    }

    /// Has every restart refused from now on, whoever asks for it.
    pub fn disable(&self) {
        self.state().refusal = Some(NOT_ENABLED);
    }

    /// Promises a restart. Nothing has happened when it returns.
    ///
    /// # Errors
    /// `daemon stopping`, or [`NOT_ENABLED`].
    pub fn accept(&self, registration: Arc<Registration>, build: Build) -> Result<Ticket, String> {
        if let Some(refusal) = self.state().refusal {
            return Err(refusal.to_owned());
        }
        Ok(Ticket { supervisor: self.clone(), registration, build, _promised: self.0.promised.token() })
    }

    /// Accepts no more, and lets what was promised finish, for a minute at most.
    pub async fn stop(&self) {
        self.state().refusal = Some("daemon stopping");
        self.0.promised.close();
        if tokio::time::timeout(LEAVE_TIMEOUT, self.0.promised.wait()).await.is_err() {
            let left: Vec<String> = self.state().queue.running().map(ToString::to_string).collect();
            for container_name in left {
                let reason = "the daemon stopped before it was done".to_owned();
                self.0.journal.record(&Event::RestartFailed { container_name, reason });
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self, restart: Restart) {
        let container_name = restart.registration.container_name.to_string();
        self.0.journal.record(&Event::RestartScheduled { container_name, build: restart.build > Build::No });
        let first = self.state().queue.add(restart);
        if let Some(first) = first {
            let supervisor = self.clone();
            self.0.promised.spawn(async move { supervisor.work(first).await });
        }
    }

    /// Works off one container's restarts.
    async fn work(&self, first: Restart) {
        let mut next = Some(first);
        while let Some(restart) = next {
            let done = self.execute(&restart).await;
            let name = &restart.registration.container_name;
            let container_name = name.to_string();
            self.0.journal.record(&match done {
                Ok(()) => Event::RestartCompleted { container_name },
                Err(reason) => Event::RestartFailed { container_name, reason },
            });
            next = self.state().queue.done(name);
        }
    }

    async fn execute(&self, restart: &Restart) -> Result<(), String> {
        let registration = &restart.registration;
        // Time may have passed in the queue: the program may be another, and the right may have been revoked.
        self.0.drift.check().await?;
        self.check_right(registration, restart.build).map_err(|refusal| refusal.to_string())?;
        let approved = match self.0.approvals.settings(registration).await {
            Ok(approved) => approved,
            Err(error @ FolderError::NotTrusted { .. }) => {
                return self.by_docker(restart).await.map_err(|why| format!("{why} (commands off: {error})"));
            }
            Err(error) => {
                return Err(format!("invalid config for {}: {error}", registration.container_name));
            }
        };
        match (&approved.settings().restart.stop, &approved.settings().restart.start) {
            (Some(stop), Some(start)) => self.by_commands(restart, &approved, stop, start).await,
            _ => self.by_docker(restart).await,
        }
    }

    async fn by_commands(
        &self,
        restart: &Restart,
        approved: &Approved,
        stop: &[String],
        start: &[String],
    ) -> Result<(), String> {
        let command = |words, timeout| {
            Command::new(words, approved, &restart.registration.container_name, timeout)
                .of_restart(restart.build > Build::No)
        };
        outcome(command(stop, STOP_TIMEOUT).run().await).map_err(|why| format!("stop failed: {why}"))?;
        outcome(command(start, START_TIMEOUT).run().await).map_err(|why| format!("start failed: {why}"))
    }

    async fn by_docker(&self, restart: &Restart) -> Result<(), String> {
        let (name, folder) = (restart.registration.docker_name(), &restart.registration.cwd);
        let done = match restart.build {
            Build::No => self.0.docker.restart(name).await,
            Build::ByContainer => self.0.docker.rebuild(name, folder, UserOfRebuild::Recorded).await,
            Build::ByUser => self.0.docker.rebuild(name, folder, UserOfRebuild::Images).await,
        };
        done.map_err(|error| error.to_string())
    }
}

impl Ticket {
    /// Starts the work.
    pub fn begin(self) {
        drop(self);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.supervisor.begin(Restart { registration: Arc::clone(&self.registration), build: self.build });
    }
}

/// A command that is there to succeed: why it did not.
fn outcome(ran: Result<Ended, CommandError>) -> Result<(), String> {
    match ran {
        Ok(ended) if ended.succeeded() => Ok(()),
        Ok(ended) => Err(ended.last_line),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests;
