//! The container of the helper: its image, its privileges, and the requests to Docker about it.
//!
//! Its image contains only this program and is created by an import, so no registry is used. The image has the container's
//! name and the build as its tag, so it cannot collide with another image, and is removed when it is no longer used. The
//! privileges of the container are defined here, and are the minimum for entering a network namespace:
//!
//! - `CAP_SYS_ADMIN` is required by `setns(2)` in the user namespace that owns the network.
//! - `CAP_SYS_PTRACE` is required if the process has another user, or more capabilities than the helper (`validate_nsset()`
//!   in kernel/nsproxy.c; a container has fourteen by default).
//! - Its own seccomp profile (`helper/seccomp.rs`) allows the system calls of the helper, including `setns` into networks.
//!   It refuses others that the two capabilities would permit, such as `mount`.
//! - It has no network except its own loopback, can write only in the one directory that it shares with the daemon, and
//!   gains no privileges by executing a program.
//!
//! It is root of the host's user namespace, since only there the two capabilities apply to other containers, but without the
//! capability to override permissions. Its group is the group of the directory, which permits it to write there.

pub(super) mod seccomp;

use std::path::PathBuf;
use std::time::Duration;

use super::{Docker, DockerError};

/// The label of the helper's container. Its value is the home of the daemon that created it.
pub const LABEL: &str = "dev.landfall.helper";
/// The label with the build of its program.
pub(super) const BUILD_LABEL: &str = "dev.landfall.build";
/// The path of the program in the image.
pub(super) const PROGRAM: &str = "/landfall";
/// The capabilities of the container.
pub const CAPABILITIES: [&str; 2] = ["SYS_ADMIN", "SYS_PTRACE"];
/// The maximum number of its processes: one opener for each container that is forwarded, and itself.
pub(super) const PROCESSES_MAX: i64 = 600;

/// The time limit for importing the image and starting the container. An engine under load copies tens of megabytes.
const CREATE_TIMEOUT: Duration = Duration::from_secs(120);

/// The helper to create.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HelperPlan {
    /// The name of the container, and of its image without the tag.
    pub name: String,
    /// The daemon's home.
    pub home: String,
    /// The identifier of the program's build.
    pub build: String,
    /// The program.
    pub program: PathBuf,
    /// The host directory that it shares with the daemon.
    pub directory: PathBuf,
    /// The group of that directory.
    pub group: u32,
    /// The user whose requests it accepts.
    pub user: u32,
}

/// A container with the helper's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HelperSeen {
    /// The home of its daemon; `None` for a foreign container.
    pub home: Option<String>,
    /// The build of its program.
    pub build: Option<String>,
    /// Whether it runs.
    pub running: bool,
}

impl Docker {
    /// Returns the container of this name.
    ///
    /// # Errors
    /// [`DockerError`] if the engine is unreachable.
    pub async fn helper(&self, name: &str) -> Result<Option<HelperSeen>, DockerError> {
        self.bounded(async { self.connect().await?.helper(name).await }).await
    }

    /// Returns whether the engine is rootless, so that its containers are in a user namespace of its user.
    ///
    /// # Errors
    /// [`DockerError`] if the engine is unreachable.
    pub async fn is_rootless(&self) -> Result<bool, DockerError> {
        self.bounded(async { self.connect().await?.is_rootless().await }).await
    }

    /// Creates and starts the helper's container. Creates its image first if the engine does not have it.
    ///
    /// # Errors
    /// [`DockerError`]; a container that was created but does not start remains for diagnosis.
    pub async fn create_helper(&self, plan: &HelperPlan) -> Result<(), DockerError> {
        let engine = self.bounded(self.connect()).await?;
        tokio::time::timeout(CREATE_TIMEOUT, engine.create_helper(plan)).await.unwrap_or_else(|_| {
            Err(DockerError::Refused(format!("it took longer than {} s", CREATE_TIMEOUT.as_secs())))
        })
    }

    /// Returns how the helper ended: its status and its last output.
    pub async fn helper_end(&self, name: &str) -> Option<String> {
        self.bounded(async { self.connect().await?.helper_end(name).await }).await.ok().flatten()
    }

    /// Removes the helper's container, running or not. Succeeds if it does not exist.
    ///
    /// # Errors
    /// [`DockerError`] if it could not be removed.
    pub async fn remove_helper(&self, name: &str) -> Result<(), DockerError> {
        self.bounded(async { self.connect().await?.remove_helper(name).await }).await
    }

    /// Removes the helper's container and its images.
    ///
    /// # Errors
    /// [`DockerError`] if the container could not be removed.
    pub async fn remove_helper_and_images(&self, name: &str) -> Result<(), DockerError> {
        self.bounded(async {
            let engine = self.connect().await?;
            engine.remove_helper(name).await?;
            engine.remove_images(name, None).await;
            Ok(())
        })
        .await
    }
}
