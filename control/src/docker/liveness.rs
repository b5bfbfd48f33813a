//! Whether a registered container still exists (wire specification, A.7.6). A container that is stopped exists; one that
//! cannot be asked about is unknown, and unknown never counts as gone.
//!
//! How it is looked for follows from its way: a process by its id and the moment it began, so that a later process of the
//! same id is not taken for it; a namespace's file by its being there; everything else by its name at Docker. What the
//! daemon registered by itself is not looked for here: `discovery` looks after that.

use std::num::NonZeroU32;
use std::path::Path;

use futures_util::future::BoxFuture;

use crate::docker::Docker;
use crate::model::registration::{AttachMethod, Registration, Started};
use crate::sys::processes;

/// The answer of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Liveness {
    /// It exists, running or not.
    Alive,
    /// It does not.
    Gone,
    /// Nobody could be asked.
    Unknown,
}

/// Who answers it for a registration. Bounded in time by whoever implements it.
pub trait Probe: Send + Sync {
    /// Looks now.
    fn probe<'a>(&'a self, registration: &'a Registration) -> BoxFuture<'a, Liveness>;
}

/// Looks along each registration's own way.
#[derive(Clone, Debug)]
pub struct RegistrationProbe {
    /// Who knows containers by name.
    pub docker: Docker,
}

impl Probe for RegistrationProbe {
    fn probe<'a>(&'a self, registration: &'a Registration) -> BoxFuture<'a, Liveness> {
        Box::pin(async move {
            // It follows Docker's list as a whole, or a person's word, and neither is up to a look at one name.
            if registration.discovered.is_some() {
                return Liveness::Unknown;
            }
            match &registration.attach_method {
                Some(AttachMethod::Process { pid, started }) => process(*pid, started.as_ref()),
                // It may be on another machine: it lives until somebody says otherwise.
                Some(AttachMethod::Websocket) => Liveness::Unknown,
                Some(AttachMethod::Netns { path } | AttachMethod::Agent { directory: path }) => {
                    let path = path.clone();
                    // The file may be on a file system that does not answer.
                    let looked = tokio::task::spawn_blocking(move || file(&path)).await;
                    looked.unwrap_or(Liveness::Unknown)
                }
                Some(AttachMethod::Docker { .. }) | None => {
                    self.docker.probe(registration.docker_name()).await
                }
            }
        })
    }
}

/// `started` is when the process that is meant began; without it, any process of this id is the one.
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
    fn a_process_is_alive_only_if_it_is_the_same_one() {
        let own = NonZeroU32::new(std::process::id()).unwrap();
        let began = processes::started(own).unwrap().unwrap();
        assert_eq!(process(own, Some(&began)), Liveness::Alive);
        assert_eq!(process(own, None), Liveness::Alive);
        let earlier = Started { ticks: began.ticks - 1, ..began.clone() };
        assert_eq!(process(own, Some(&earlier)), Liveness::Gone);
        let before_the_reboot = Started { boot: "another".to_owned(), ..began.clone() };
        assert_eq!(process(own, Some(&before_the_reboot)), Liveness::Gone);
        assert_eq!(process(NonZeroU32::MAX, Some(&began)), Liveness::Gone);
    }

    #[test]
    fn a_namespace_is_alive_as_long_as_its_file_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("netns");
        assert_eq!(file(&path), Liveness::Gone);
        std::fs::write(&path, "").unwrap();
        assert_eq!(file(&path), Liveness::Alive);
        assert_eq!(file(&path.join("below")), Liveness::Gone);
        assert_eq!(file(&folder.path().join("x".repeat(300))), Liveness::Unknown);
    }
}
