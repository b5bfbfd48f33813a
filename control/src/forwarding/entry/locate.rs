//! Locates a container by its attach method, and refers to it by something that cannot come to mean another one.

use std::io;
use std::num::NonZeroU32;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use landfall_engine::opener::FailureKind;
use landfall_engine::opener::client::{OpenError, Target};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::{Certainty, DockerFacts, ENTRY_PAUSE, ownership};
use crate::docker::{Docker, DockerError, FirstProcess, Network};
use crate::forwarding::entry::methods::EntryMethod;
use crate::forwarding::entry::ownership::Evidence;
use crate::forwarding::entry::retry_delay::RETRY;
use crate::model::registration::{AttachMethod, ContainerName, Started};
use crate::sys::launcher::open_namespace;
use crate::sys::paths::identity_of_file;
use crate::sys::processes;
use crate::sys::readiness::watched;

/// The hint when Docker answers this user but its containers may not be entered.
const HELPER_ADVICE: &str = "landfall up --docker-helper runs a container that has the permission";

/// The hint when only the mounts identify the container's process.
const HELPER_NOT_ASKED: &str =
    "its control group does not name the container, so the helper is not asked to enter it";

/// The location of a container.
pub(super) enum Location {
    Process {
        pidfd: AsyncFd<OwnedFd>,
        container: Option<(FirstProcess, Evidence)>,
    },
    File {
        path: PathBuf,
        identity: (u64, u64),
    },
    /// The directory of an agent's socket, which need not exist yet.
    Directory {
        path: PathBuf,
    },
}

/// The reason that a container was not located.
pub(super) enum LocateError {
    /// Docker says that it does not run or does not exist.
    Stopped(String),
    Missing(Certainty, String),
    /// The process of the registration has ended.
    ProcessEnded,
}

impl Location {
    /// The methods to enter it, fastest first. The file of a namespace is opened again for each call, since an open
    /// descriptor keeps the namespace alive. `helper` is the socket of the helper.
    pub(super) fn entry_methods(&self, helper: Option<&Path>) -> io::Result<Vec<EntryMethod>> {
        match self {
            Location::Process { pidfd, container } => {
                let process = || pidfd.get_ref().try_clone().map(Target::Process);
                let mut entry_methods = vec![EntryMethod::Target(process()?)];
                if let Some((container, evidence)) = container {
                    entry_methods.extend(container.agent_directory.clone().map(EntryMethod::Agent));
                    if let (Some(helper), Evidence::ControlGroup) = (helper, evidence) {
                        entry_methods.push(EntryMethod::Helper(helper.to_owned(), process()?));
                    }
                }
                Ok(entry_methods)
            }
            Location::File { path, .. } => {
                let file = open_namespace(path).map_err(io::Error::other)?;
                Ok(vec![EntryMethod::Target(Target::Path(file))])
            }
            Location::Directory { path } => Ok(vec![EntryMethod::Agent(path.clone())]),
        }
    }

    /// The hint for a failure to enter for lack of permission.
    pub(super) fn advice(&self, helper: Option<&Path>) -> Option<&'static str> {
        let Location::Process { container: Some((_, evidence)), .. } = self else { return None };
        match (helper, evidence) {
            (None, _) => Some(HELPER_ADVICE),
            (Some(_), Evidence::Mounts) => Some(HELPER_NOT_ASKED),
            (Some(_), Evidence::ControlGroup) => None,
        }
    }

    /// The facts from Docker, if Docker manages it.
    pub(super) fn docker_facts(&self) -> DockerFacts {
        let Location::Process { container: Some((container, _)), .. } = self else {
            return DockerFacts::default();
        };
        let network_of = match &container.network {
            Network::Shared(name) => Some(name.clone()),
            Network::Own | Network::Host => None,
        };
        DockerFacts { published: container.published.clone(), network_of }
    }

    /// The longest pause before another attempt to enter it.
    pub(super) fn pause_max(&self, helper: Option<&Path>) -> Duration {
        match self {
            // Checking for the socket of an agent or of the helper costs little, and it can appear at any time.
            Location::Directory { .. } => RETRY,
            Location::Process { container: Some((container, _)), .. }
                if container.agent_directory.is_some() || helper.is_some() =>
            {
                RETRY
            }
            Location::Process { .. } | Location::File { .. } => ENTRY_PAUSE.1,
        }
    }
}

/// Locates a container.
pub(super) async fn locate(
    attach_method: &AttachMethod,
    name: &ContainerName,
    docker: &Docker,
) -> Result<Location, LocateError> {
    match attach_method {
        AttachMethod::Process { pid, started } => locate_process(*pid, started.as_ref()),
        AttachMethod::Netns { path } => {
            let path = path.clone();
            // The file system may not answer.
            let looked = tokio::task::spawn_blocking(move || locate_file(path)).await;
            looked.unwrap_or_else(|error| Err(LocateError::Missing(Certainty::Unknown, error.to_string())))
        }
        AttachMethod::Docker { container } => {
            locate_container(container.as_ref().unwrap_or(name), docker).await
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
        // Such a container has no task.
        AttachMethod::Websocket => {
            let reason = "it is reached over its WebSocket alone".to_owned();
            Err(LocateError::Missing(Certainty::Refused, reason))
        }
    }
}

async fn locate_container(name: &ContainerName, docker: &Docker) -> Result<Location, LocateError> {
    let found = docker.first_process(name).await.map_err(docker_absent)?;
    // The "host network" of a rootless engine may be another namespace, which this user's `/proc` shows.
    if found.network == Network::Host && ownership::is_in_our_network(found.pid) != Some(false) {
        let reason = "it uses the host's network, so its ports answer on the host already".to_owned();
        return Err(LocateError::Missing(Certainty::Refused, reason));
    }
    let pidfd = open_process(found.pid)?;
    // Read after the pidfd was opened, so both refer to the same process.
    let evidence = match ownership::evidence(found.pid, &found.id) {
        Ok(Some(evidence)) => evidence,
        Ok(None) => {
            let reason = format!(
                "process {} does not belong to this container: does the engine run on another machine, or in a virtual machine?",
                found.pid
            );
            return Err(LocateError::Missing(Certainty::Refused, reason));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(LocateError::Missing(Certainty::Gone, "its process has ended".to_owned()));
        }
        Err(error) => {
            let reason = format!(
                "whether process {} belongs to this container cannot be determined: {error}",
                found.pid
            );
            return Err(LocateError::Missing(Certainty::Refused, reason));
        }
    };
    // Between Docker's answer and the opening of the pidfd, the process may have ended and its id been reused. If
    // Docker gives the same answer again, it had not.
    let again = docker.first_process(name).await.map_err(docker_absent)?;
    if again != found {
        return Err(LocateError::Missing(Certainty::Gone, "it is being restarted".to_owned()));
    }
    Ok(Location::Process { pidfd, container: Some((found, evidence)) })
}

fn locate_process(pid: NonZeroU32, meant: Option<&Started>) -> Result<Location, LocateError> {
    let pidfd = match open_process(pid.get()) {
        Err(LocateError::Missing(Certainty::Gone, _)) => return Err(LocateError::ProcessEnded),
        done => done?,
    };
    // Checked after the pidfd was opened, so both refer to the same process.
    match processes::still_runs(pid, meant) {
        Ok(true) => Ok(Location::Process { pidfd, container: None }),
        Ok(false) => Err(LocateError::ProcessEnded),
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
        return Err(LocateError::Missing(Certainty::Refused, format!("{pid} is not the id of a process")));
    };
    watched(pidfd, Interest::READABLE)
        .map_err(|error| LocateError::Missing(Certainty::Unknown, format!("process {pid}: {error}")))
}

fn locate_file(path: PathBuf) -> Result<Location, LocateError> {
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
