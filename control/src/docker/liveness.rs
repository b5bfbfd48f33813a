//! Determines whether a registered container still exists (wire specification, A.7.6). A stopped container exists. If it
//! cannot be determined, the result is unknown, which never counts as gone.
//!
//! The check depends on the attach method: a process by its id and start time, so that a later process of the same id does
//! not match; a namespace by the existence of its file; all others by the container's name in Docker. Registrations that the
//! daemon discovered are not checked here: `discovery` maintains them.

use std::num::NonZeroU32;
use std::path::Path;

use futures_util::future::BoxFuture;

use crate::docker::Docker;
use crate::model::registration::{AttachMethod, Registration, Started};
use crate::sys::processes;

/// The result of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Liveness {
    /// The container exists, running or not.
    Alive,
    /// The container does not exist.
    Gone,
    /// The result could not be determined.
    Unknown,
}

/// A source of probe results. Each implementation is bounded in time.
pub trait Probe: Send + Sync {
    /// Probes the container now.
    fn probe<'a>(&'a self, registration: &'a Registration) -> BoxFuture<'a, Liveness>;
}

/// Probes by the attach method of each registration.
#[derive(Clone, Debug)]
pub struct RegistrationProbe {
    /// The engine that knows containers by name.
    pub docker: Docker,
}

impl Probe for RegistrationProbe {
    fn probe<'a>(&'a self, registration: &'a Registration) -> BoxFuture<'a, Liveness> {
        Box::pin(async move {
            // Such a registration depends on Docker's whole list or on a request of the user, and not on a probe of one
            // name.
            if registration.discovered.is_some() {
                return Liveness::Unknown;
            }
            match &registration.attach_method {
                Some(AttachMethod::Process { pid, started }) => process(*pid, started.as_ref()),
                // The container may be on another machine, so the registration remains until it is deregistered.
                Some(AttachMethod::Websocket) => Liveness::Unknown,
                Some(AttachMethod::Netns { path } | AttachMethod::Agent { directory: path }) => {
                    let path = path.clone();
                    // The stat may block: the file may be on a file system that does not answer.
                    let result = tokio::task::spawn_blocking(move || file(&path)).await;
                    result.unwrap_or(Liveness::Unknown)
                }
                Some(AttachMethod::Docker { .. }) | None => {
                    self.docker.probe(registration.docker_name()).await
                }
            }
        })
    }
}

/// `started` is the start time of the process; without it, any process of this id matches.
fn process(pid: NonZeroU32, started: Option<&Started>) -> Liveness {
    match processes::still_runs(pid, started) {
        Ok(true) => Liveness::Alive,
        Ok(false) => Liveness::Gone,
        Err(_) => Liveness::Unknown,
    }
}

fn file(path: &Path) -> Liveness {
    match rustix::fs::stat(path) {
        Ok(_) => Liveness::Alive,
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => Liveness::Gone,
        Err(_) => Liveness::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_alive_only_if_its_start_time_matches() {
        let own = NonZeroU32::new(std::process::id()).unwrap();
        let started = processes::started(own).unwrap().unwrap();
        assert_eq!(process(own, Some(&started)), Liveness::Alive);
        assert_eq!(process(own, None), Liveness::Alive);
        let earlier = Started { ticks: started.ticks - 1, ..started.clone() };
        assert_eq!(process(own, Some(&earlier)), Liveness::Gone);
        let before_the_reboot = Started { boot: "another".to_owned(), ..started.clone() };
        assert_eq!(process(own, Some(&before_the_reboot)), Liveness::Gone);
        assert_eq!(process(NonZeroU32::MAX, Some(&started)), Liveness::Gone);
    }

    #[test]
    fn a_namespace_is_alive_while_its_file_exists() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("netns");
        assert_eq!(file(&path), Liveness::Gone);
        std::fs::write(&path, "").unwrap();
        assert_eq!(file(&path), Liveness::Alive);
        assert_eq!(file(&path.join("below")), Liveness::Gone);
        assert_eq!(file(&folder.path().join("x".repeat(300))), Liveness::Unknown);
    }
}
