//! Where a container is: looked for along its way, and referred to by something that cannot mean another one.

use std::io;
use std::num::NonZeroU32;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use landfall_engine::opener::FailureKind;
use landfall_engine::opener::client::{OpenError, Target};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::{Certainty, DockerFacts, ENTER_AGAIN, ownership};
use crate::docker::{Docker, DockerError, FirstProcess, Network};
use crate::forwarding::entry::methods::EntryMethod;
use crate::forwarding::entry::ownership::Evidence;
use crate::forwarding::entry::retry_delay::RETRY;
use crate::model::registration::{AttachMethod, ContainerName, Started};
use crate::sys::launcher::open_namespace;
use crate::sys::paths::identity_of_file;
use crate::sys::processes;
use crate::sys::readiness::watched;

/// To whom Docker is open, and its containers are not.
const HELPER_ADVICE: &str = "landfall up --docker-helper keeps a container that may";

/// The hint for a container that only its mounts identify.
const HELPER_NOT_ASKED: &str =
    "its control group does not name the container, so the helper is not asked to enter it";

/// Where a container was found.
pub(super) enum Location {
    Process {
        pidfd: AsyncFd<OwnedFd>,
        container: Option<(FirstProcess, Evidence)>,
    },
    File {
        path: PathBuf,
        identity: (u64, u64),
    },
    /// Where an agent's socket is, or will be.
    Directory {
        path: PathBuf,
    },
}

/// Why it was not.
pub(super) enum LocateError {
    /// Docker says that it does not run, or that there is none.
    Stopped(String),
    Missing(Certainty, String),
    /// The process that the registration stands for has ended.
    Ended,
}

impl Location {
    /// The ways in, fastest first. The descriptor of a namespace is opened anew, since one that is held keeps the namespace
    /// alive. `helper` is where one listens.
    pub(super) fn doors(&self, helper: Option<&Path>) -> io::Result<Vec<EntryMethod>> {
        match self {
            Location::Process { pidfd, container } => {
                let process = || pidfd.get_ref().try_clone().map(Target::Process);
                let mut doors = vec![EntryMethod::Target(process()?)];
                if let Some((container, evidence)) = container {
                    doors.extend(container.agent_directory.clone().map(EntryMethod::Agent));
                    if let (Some(helper), Evidence::ControlGroup) = (helper, evidence) {
                        doors.push(EntryMethod::Helper(helper.to_owned(), process()?));
                    }
                }
                Ok(doors)
            }
            Location::File { path, .. } => {
                let file = open_namespace(path).map_err(io::Error::other)?;
                Ok(vec![EntryMethod::Target(Target::Path(file))])
            }
            Location::Directory { path } => Ok(vec![EntryMethod::Agent(path.clone())]),
        }
    }

    /// What would help somebody who may not enter it.
    pub(super) fn advice(&self, helper: Option<&Path>) -> Option<&'static str> {
        let Location::Process { container: Some((_, evidence)), .. } = self else { return None };
        match (helper, evidence) {
            (None, _) => Some(HELPER_ADVICE),
            (Some(_), Evidence::Mounts) => Some(HELPER_NOT_ASKED),
            (Some(_), Evidence::ControlGroup) => None,
        }
    }

    /// What Docker tells of it, where it is Docker's.
    pub(super) fn circumstances(&self) -> DockerFacts {
        let Location::Process { container: Some((container, _)), .. } = self else {
            return DockerFacts::default();
        };
        let network_of = match &container.network {
            Network::Shared(name) => Some(name.clone()),
            Network::Own | Network::Host => None,
        };
        DockerFacts { published: container.published.clone(), network_of }
    }

    /// How long after a failure to enter it is tried again, at most.
    pub(super) fn pause_max(&self, helper: Option<&Path>) -> Duration {
        match self {
            // To look for an agent's socket, or a helper's, costs little, and it comes at any time.
            Location::Directory { .. } => RETRY,
            Location::Process { container: Some((container, _)), .. }
                if container.agent_directory.is_some() || helper.is_some() =>
            {
                RETRY
            }
            Location::Process { .. } | Location::File { .. } => ENTER_AGAIN.1,
        }
    }
}

/// Looks for a container along its way.
pub(super) async fn find(
    attach_method: &AttachMethod,
    name: &ContainerName,
    docker: &Docker,
) -> Result<Location, LocateError> {
    match attach_method {
        AttachMethod::Process { pid, started } => find_process(*pid, started.as_ref()),
        AttachMethod::Netns { path } => {
            let path = path.clone();
            // The file may be on a file system that does not answer.
            let looked = tokio::task::spawn_blocking(move || find_file(path)).await;
            looked.unwrap_or_else(|error| Err(LocateError::Missing(Certainty::Unknown, error.to_string())))
        }
        AttachMethod::Docker { container } => {
            find_container(container.as_ref().unwrap_or(name), docker).await
        }
        AttachMethod::Agent { directory } => {
            let path = directory.clone();
            let there = tokio::task::spawn_blocking(move || identity_of_file(&path).is_some()).await;
            if there.unwrap_or(false) {
                return Ok(Location::Directory { path: directory.clone() });
            }
            let reason = format!("there is no directory {}", directory.display());
            Err(LocateError::Missing(Certainty::Gone, reason))
        }
        // Nobody sets out for it.
        AttachMethod::Websocket => {
            let reason = "its WebSocket alone leads to it".to_owned();
            Err(LocateError::Missing(Certainty::Refused, reason))
        }
    }
}

async fn find_container(name: &ContainerName, docker: &Docker) -> Result<Location, LocateError> {
    let found = docker.first_process(name).await.map_err(docker_absent)?;
    // "The host" of a rootless engine may be a network of its own, which shows where this user may look.
    if found.network == Network::Host && ownership::is_in_our_network(found.pid) != Some(false) {
        let reason = "it uses the host's network, so its ports answer on the host already".to_owned();
        return Err(LocateError::Missing(Certainty::Refused, reason));
    }
    let pidfd = open_process(found.pid)?;
    // Looked at after the pidfd was opened: it then means the process that was looked at.
    let evidence = match ownership::evidence(found.pid, &found.id) {
        Ok(Some(evidence)) => evidence,
        Ok(None) => {
            let reason = format!(
                "process {} is not of this container: is the engine on another machine, or in a virtual one?",
                found.pid
            );
            return Err(LocateError::Missing(Certainty::Refused, reason));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(LocateError::Missing(Certainty::Gone, "its process has ended".to_owned()));
        }
        Err(error) => {
            let reason =
                format!("it cannot be seen whether process {} is of this container: {error}", found.pid);
            return Err(LocateError::Missing(Certainty::Refused, reason));
        }
    };
    // Between Docker's word and the pidfd the process may have ended and its number been given to another one; if
    // Docker says the same once more, it had not.
    let again = docker.first_process(name).await.map_err(docker_absent)?;
    if again != found {
        return Err(LocateError::Missing(Certainty::Gone, "it is being restarted".to_owned()));
    }
    Ok(Location::Process { pidfd, container: Some((found, evidence)) })
}

fn find_process(pid: NonZeroU32, meant: Option<&Started>) -> Result<Location, LocateError> {
    let pidfd = match open_process(pid.get()) {
        Err(LocateError::Missing(Certainty::Gone, _)) => return Err(LocateError::Ended),
        done => done?,
    };
    // Asked after the pidfd was opened: it then means the process that was asked about.
    match processes::still_runs(pid, meant) {
        Ok(true) => Ok(Location::Process { pidfd, container: None }),
        Ok(false) => Err(LocateError::Ended),
        Err(reason) => Err(LocateError::Missing(Certainty::Unknown, reason)),
    }
}

fn open_process(pid: u32) -> Result<AsyncFd<OwnedFd>, LocateError> {
    let missing = |error: OpenError| {
        let certainty = match error.kind() {
            Some(FailureKind::Gone) => Certainty::Gone,
            _ => Certainty::Refused,
        };
        LocateError::Missing(certainty, error.to_string())
    };
    let Target::Process(pidfd) = Target::process(pid).map_err(missing)? else {
        return Err(LocateError::Missing(Certainty::Refused, format!("{pid} is no process")));
    };
    watched(pidfd, Interest::READABLE)
        .map_err(|error| LocateError::Missing(Certainty::Unknown, format!("process {pid}: {error}")))
}

fn find_file(path: PathBuf) -> Result<Location, LocateError> {
    let file = open_namespace(&path).map_err(|error| {
        let is_absent = path.try_exists().is_ok_and(|there| !there);
        let certainty = if is_absent { Certainty::Gone } else { Certainty::Refused };
        LocateError::Missing(certainty, error.to_string())
    })?;
    let found = rustix::fs::fstat(&file).map_err(|errno| {
        LocateError::Missing(Certainty::Unknown, format!("{}: {}", path.display(), io::Error::from(errno)))
    })?;
    Ok(Location::File { path, identity: (found.st_dev, found.st_ino) })
}

fn docker_absent(error: DockerError) -> LocateError {
    let certainty = match &error {
        DockerError::NoSuchContainer(_) | DockerError::NotRunning(_) => {
            return LocateError::Stopped(error.to_string());
        }
        DockerError::Changing(_) => Certainty::Gone,
        DockerError::Refused(_) | DockerError::Stop(_) | DockerError::Start(_) => Certainty::Refused,
        DockerError::Unreachable { .. } => Certainty::Unknown,
    };
    LocateError::Missing(certainty, error.to_string())
}
