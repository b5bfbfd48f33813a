//! Restarts of containers (wire specification, A.9). A restart is acknowledged first and executed later, since the
//! container that requested it is stopped and could not receive a later answer.
//!
//! A restart has three steps. [`Supervisor::preflight`] may refuse it, by fast local checks. [`Supervisor::accept`] promises
//! it without starting it, so that the answer is written while the caller's container still runs. [`Ticket::start`] queues
//! it. A container has at most one running and one waiting restart; further requests are merged into the waiting one. The
//! result is reported in the journal. A promised restart is never dropped.

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

/// How long the preflight command of a folder may take.
const PREFLIGHT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the folder's stop command may take, and its start command, which may build an image.
const STOP_TIMEOUT: Duration = Duration::from_secs(120);
const START_TIMEOUT: Duration = Duration::from_secs(1_800);
/// How long the stop of the daemon waits for promised restarts.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(60);

/// The refusal of a daemon that runs without restarts (wire specification, A.1.4).
pub const NOT_ENABLED: &str = "restart capability not enabled on this daemon";

/// The reasons to refuse a restart before it is acknowledged.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PreflightError {
    /// The program on disk is another build.
    #[error("{0}")]
    Drifted(String),
    /// The container requested a rebuild and does not have the right.
    #[error("not granted: rebuild (on the host, `landfall grant {0} rebuild` gives {0} this right)")]
    NotGranted(ContainerName),
    /// The preflight command of the folder failed.
    #[error("restart refused for {0}: {1}")]
    Folder(ContainerName, String),
}

/// Restarts containers, one restart at a time for each. Clones share one state.
#[derive(Clone)]
pub struct Supervisor(Arc<Inner>);

struct Inner {
    docker: Docker,
    grants: GrantTable,
    journal: Journal,
    approvals: Approvals,
    drift: Drift,
    state: Mutex<State>,
    /// Tracks open tickets and running restarts.
    tracker: TaskTracker,
}

#[derive(Default)]
struct State {
    /// The reason for which restarts are refused, if they are.
    refusal: Option<&'static str>,
    queue: Queue,
}

/// A promised restart. [`Ticket::start`] starts the work. Dropping the ticket starts it, too: the caller has received the
/// answer that it is scheduled.
#[must_use]
pub struct Ticket {
    supervisor: Supervisor,
    registration: Arc<Registration>,
    build: Build,
    _tracked: TaskTrackerToken,
}

impl Supervisor {
    /// Returns a supervisor that restarts through `docker` or by approved commands, checks rights by `grants`, and reports
    /// to the journal.
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
        let (state, tracker) = (Mutex::default(), TaskTracker::new());
        Supervisor(Arc::new(Inner { docker, grants, journal, approvals, drift, state, tracker }))
    }

    /// Runs the local checks of a restart. If the folder's configuration is invalid or not approved, the restart passes
    /// here; its execution then reports the error, or uses Docker instead.
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

    /// Checks the container's right to what it requested. The host's user has all rights.
    fn check_right(&self, registration: &Registration, build: Build) -> Result<(), PreflightError> {
        match build {
            Build::ByContainer if !self.0.grants.has_right(Right::Rebuild, registration) => {
                Err(PreflightError::NotGranted(registration.container_name.clone()))
            }
            Build::No | Build::ByContainer | Build::ByUser => Ok(()),
        }
    }

    /// Refuses all later restarts.
    pub fn disable(&self) {
        self.state().refusal = Some(NOT_ENABLED);
    }

    /// Promises a restart without starting it.
    ///
    /// # Errors
    /// `daemon stopping`, or [`NOT_ENABLED`].
    pub fn accept(&self, registration: Arc<Registration>, build: Build) -> Result<Ticket, String> {
        if let Some(refusal) = self.state().refusal {
            return Err(refusal.to_owned());
        }
        Ok(Ticket { supervisor: self.clone(), registration, build, _tracked: self.0.tracker.token() })
    }

    /// Refuses new restarts, and waits up to 60 s for those that were promised.
    pub async fn stop(&self) {
        self.state().refusal = Some("daemon stopping");
        self.0.tracker.close();
        if tokio::time::timeout(DRAIN_TIMEOUT, self.0.tracker.wait()).await.is_err() {
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

    fn enqueue(&self, restart: Restart) {
        let container_name = restart.registration.container_name.to_string();
        self.0.journal.record(&Event::RestartScheduled { container_name, build: restart.build > Build::No });
        let first = self.state().queue.add(restart);
        if let Some(first) = first {
            let supervisor = self.clone();
            self.0.tracker.spawn(async move { supervisor.work(first).await });
        }
    }

    /// Executes the restarts of one container until none waits.
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
    pub fn start(self) {
        drop(self);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.supervisor.enqueue(Restart { registration: Arc::clone(&self.registration), build: self.build });
    }
}

/// Converts the result of a command to an error text if the command did not succeed.
fn outcome(ran: Result<Ended, CommandError>) -> Result<(), String> {
    match ran {
        Ok(ended) if ended.succeeded() => Ok(()),
        Ok(ended) => Err(ended.last_line),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests;
