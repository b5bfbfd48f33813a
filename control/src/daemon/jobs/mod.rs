//! Jobs: commands that run for a container at intervals, for example to renew a credential (wire specification, A.10).
//!
//! `machine` decides when a job runs; this module runs the commands and reports the results as events. A job is idle,
//! running, or running with a second run due. At most four commands run at a time over all containers. Only approved
//! commands run.
//!
//! A job is a table `[jobs.NAME]` in the folder's configuration (see [`crate::registry::folder`]). If it has a `gate`, that
//! command runs first, and only its status 0 lets the job's command run. The exit status of the command is its result:
//!
//! | Status | Meaning | Event |
//! | --- | --- | --- |
//! | 0 | success; with `restart = true`, the container is restarted | `job-tick-ok` |
//! | 75 (`EX_TEMPFAIL` of `sysexits.h`) | temporary failure; retried after the interval | `job-tick-transient-failure` |
//! | 77 (`EX_NOPERM`) | the user has to sign in | `job-tick-reauth-required` |
//! | any other, a signal, or a timeout | an error | `job-tick-error` |
//!
//! The last line of the output is the reported reason.

mod machine;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::{Notify, Semaphore};
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use crate::daemon::jobs::machine::{Input, Key, Machine, Run};
use crate::daemon::supervisor::{Build, Supervisor};
use crate::model::event::Event;
use crate::model::registration::{ContainerName, Registration};
use crate::registry::folder::{self, Approvals, Command};
use crate::registry::store::{RegistrationObserver, StopReason};
use crate::sys::journal::Journal;

/// The maximum number of concurrent commands over all containers. All jobs are due at once when the daemon starts.
const COMMANDS_MAX: usize = 4;
/// The sleep of the timer task when no job is due.
const IDLE: Duration = Duration::from_secs(3_600);
/// `EX_TEMPFAIL` and `EX_NOPERM` of `sysexits.h`.
const TRANSIENT: i32 = 75;
const REAUTH: i32 = 77;

/// The jobs of all containers.
pub struct Jobs {
    own: Weak<Jobs>,
    journal: Journal,
    supervisor: Supervisor,
    approvals: Approvals,
    machine: Mutex<Machine>,
    /// Wakes the timer task after a change of the schedule. The task holds a reference, so that `drop` can wake it to end.
    changed: Arc<Notify>,
    timer: std::sync::Once,
    running: TaskTracker,
    permits: Semaphore,
}

impl Jobs {
    /// Returns jobs that run approved commands, report to the journal, and restart containers through `supervisor`.
    pub fn new(journal: Journal, supervisor: Supervisor, approvals: Approvals) -> Arc<Jobs> {
        Arc::new_cyclic(|own| Jobs {
            own: own.clone(),
            journal,
            supervisor,
            approvals,
            machine: Mutex::default(),
            changed: Arc::default(),
            timer: std::sync::Once::new(),
            running: TaskTracker::new(),
            permits: Semaphore::new(COMMANDS_MAX),
        })
    }

    /// Starts the jobs of a container. They replace its earlier jobs.
    pub async fn start(&self, registration: Arc<Registration>) {
        self.report_difference(&registration).await;
        let name = &registration.container_name;
        let jobs = match self.approvals.settings(&registration).await {
            Ok(approved) => approved.settings().jobs.clone(),
            Err(error) => {
                let consequence = match error.is_not_trusted() {
                    true => format!("its commands are off; landfall trust {}", registration.cwd.display()),
                    false => "its jobs do not run".to_owned(),
                };
                self.journal.record(&Event::Notice { text: format!("{name}: {error}; {consequence}") });
                BTreeMap::new()
            }
        };
        let jobs = jobs
            .into_iter()
            .map(|(job_name, job)| (job_name, Input { registration: Arc::clone(&registration), job }));
        let runs = self.machine().start(name, jobs.collect(), Instant::now().into_std());
        self.timer.call_once(|| drop(tokio::spawn(run_timer(self.own.clone(), Arc::clone(&self.changed)))));
        self.changed.notify_one();
        self.spawn(runs);
    }

    /// Cancels the timers of a container. Does not wait for its runs.
    pub fn stop(&self, name: &ContainerName) {
        self.machine().stop(name);
    }

    /// Cancels all timers, and waits for the runs.
    pub async fn drain(&self) {
        self.machine().drain();
        self.running.close();
        self.running.wait().await;
    }

    /// Reports a notice if the folder's configuration differs from the registered one.
    async fn report_difference(&self, registration: &Arc<Registration>) {
        let of = Arc::clone(registration);
        if tokio::task::spawn_blocking(move || folder::differs(&of)).await.unwrap_or(false) {
            let (name, file) = (&registration.container_name, folder::FILE);
            let folder = registration.cwd.display();
            let text = format!(
                "{name}: {file} is not the one that was registered; landfall trust {folder} to use it"
            );
            self.journal.record(&Event::Notice { text });
        }
    }

    fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn spawn(&self, runs: Vec<Run>) {
        for run in runs {
            if let Some(jobs) = self.own.upgrade() {
                self.running.spawn(async move { jobs.run(run).await });
            }
        }
    }

    async fn run(&self, Run { key, input }: Run) {
        let succeeded = {
            // The semaphore is never closed, so `acquire` succeeds.
            let _permit = self.permits.acquire().await.ok();
            self.attempt(&key, &input).await
        };
        let refusal = match succeeded && input.job.restart {
            true => self
                .supervisor
                .preflight(&input.registration, Build::No)
                .await
                .err()
                .map(|refusal| refusal.to_string()),
            false => None,
        };
        let next = self.machine().ended(&key, succeeded);
        if let Some(registration) = next.restart {
            self.restart(&key, registration, refusal);
        }
        self.spawn(next.run.into_iter().collect());
    }

    /// Runs gate and command. Returns whether the command succeeded.
    async fn attempt(&self, key: &Key, input: &Input) -> bool {
        let (container_name, job) = (key.container.to_string(), key.job.clone());
        self.journal
            .record(&Event::JobTickStart { container_name: container_name.clone(), job: job.clone() });
        let event = self.tick(container_name, job, input).await;
        self.journal.record(&event);
        matches!(event, Event::JobTickOk { .. })
    }

    async fn tick(&self, container_name: String, job: String, input: &Input) -> Event {
        let approved = match self.approvals.settings(&input.registration).await {
            Ok(approved) => approved,
            Err(error) => return Event::JobTickError { container_name, job, error: error.to_string() },
        };
        let command = |words: &[String]| {
            Command::new(words, &approved, &input.registration.container_name, input.job.timeout)
        };
        if let Some(gate) = &input.job.gate {
            match command(gate).run().await {
                Err(error) => {
                    return Event::JobTickError { container_name, job, error: format!("gate: {error}") };
                }
                Ok(refused) if !refused.succeeded() => {
                    return Event::JobTickSkipped { container_name, job, reason: refused.last_line };
                }
                Ok(_) => {}
            }
        }
        match command(&input.job.command).run().await {
            Err(error) => Event::JobTickError { container_name, job, error: error.to_string() },
            Ok(ended) => {
                let reason = ended.last_line;
                match ended.code {
                    Some(0) => Event::JobTickOk { container_name, job },
                    Some(TRANSIENT) => Event::JobTickTransientFailure { container_name, job, reason },
                    Some(REAUTH) => Event::JobTickReauthRequired { container_name, job, reason },
                    _ => Event::JobTickError { container_name, job, error: reason },
                }
            }
        }
    }

    fn restart(&self, key: &Key, registration: Arc<Registration>, refusal: Option<String>) {
        let (container_name, job) = (key.container.to_string(), key.job.clone());
        let accepted = refusal.map_or_else(|| self.supervisor.accept(registration, Build::No), Err);
        match accepted {
            Err(reason) => self.journal.record(&Event::JobRestartFailed { container_name, job, reason }),
            Ok(ticket) => {
                self.journal.record(&Event::JobRestartScheduled { container_name, job });
                ticket.start();
            }
        }
    }
}

impl Drop for Jobs {
    fn drop(&mut self) {
        self.changed.notify_one();
    }
}

impl RegistrationObserver for Jobs {
    fn name(&self) -> &'static str {
        "jobs"
    }

    fn start(&self, registration: Arc<Registration>) -> BoxFuture<'_, ()> {
        Box::pin(Jobs::start(self, registration))
    }

    fn folder_changed(&self, registration: Arc<Registration>) -> BoxFuture<'_, ()> {
        Box::pin(Jobs::start(self, registration))
    }

    fn stop<'a>(&'a self, name: &'a ContainerName, _reason: StopReason) -> BoxFuture<'a, ()> {
        Jobs::stop(self, name);
        Box::pin(std::future::ready(()))
    }

    fn drain(&self) -> BoxFuture<'_, ()> {
        Box::pin(Jobs::drain(self))
    }
}

/// Starts runs when they are due, until the jobs are dropped.
async fn run_timer(jobs: Weak<Jobs>, changed: Arc<Notify>) {
    loop {
        let due = {
            let Some(jobs) = jobs.upgrade() else { return };
            let runs = jobs.machine().advance(Instant::now().into_std());
            jobs.spawn(runs);
            let due = jobs.machine().next_due();
            due.map_or_else(|| Instant::now() + IDLE, Instant::from_std)
        };
        tokio::select! {
            () = tokio::time::sleep_until(due) => {}
            () = changed.notified() => {}
        }
    }
}

#[cfg(test)]
mod tests;
