//! The helper's container, as far as Docker has to do with it: what it is made of, and whether one is there.
//!
//! Its image is this program and nothing else, brought to the engine by an import: no registry is asked. It is called like the
//! container, with the build as its tag, so that nobody else's is ever in its way, and it goes when it is no longer used. What the container may do
//! is said here once, and is as little as enters a network namespace:
//!
//! - `CAP_SYS_ADMIN` is what `setns(2)` asks for, in the user namespace that the network belongs to.
//! - `CAP_SYS_PTRACE` is what it asks for where the process has another user, or more capabilities than we have
//!   (`validate_nsset()` in kernel/nsproxy.c; a container has fourteen of them unless it is told otherwise).
//! - A seccomp profile of its own (`helper/seccomp.rs`) allows the calls that it makes, among them `setns` into networks. It refuses
//!   others that the two capabilities permit, such as `mount`.
//! - It has no network but a loopback of its own, cannot write anywhere but in the one directory that it shares with the
//!   daemon, and gains nothing by executing anything.
//!
//! It is root of the host's user namespace, since only there the two are worth anything for other containers, but without the
//! capability to ignore permissions; its group is that of the directory, which is how it may write there.

pub(super) mod seccomp;

use std::path::PathBuf;
use std::time::Duration;

use super::{Docker, DockerError};

/// Marks the helper's container; its value is the home of the daemon that made it.
pub const LABEL: &str = "dev.landfall.helper";
/// Which program is in it.
pub(super) const BUILD_LABEL: &str = "dev.landfall.build";
/// The program in the image.
pub(super) const PROGRAM: &str = "/landfall";
/// What it may do.
pub const CAPABILITIES: [&str; 2] = ["SYS_ADMIN", "SYS_PTRACE"];
/// How many processes it may have: an opener for each container that is forwarded, and itself.
pub(super) const PROCESSES_MAX: i64 = 600;

/// How long it may take to bring the image and to start the container. An engine under load copies tens of megabytes.
const MAKE_TIMEOUT: Duration = Duration::from_secs(120);

/// The helper that is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HelperPlan {
    /// The container's name, and its image's without the tag.
    pub name: String,
    /// The daemon's home.
    pub home: String,
    /// Which program it is; another one has another word here.
    pub build: String,
    /// The program.
    pub program: PathBuf,
    /// The directory of the host that it shares with the daemon.
    pub directory: PathBuf,
    /// The group of that directory.
    pub group: u32,
    /// Whom it obeys.
    pub user: u32,
}

/// A container that has the helper's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HelperSeen {
    /// The home that it is for; none where it is somebody else's container.
    pub home: Option<String>,
    /// The program that is in it.
    pub build: Option<String>,
    /// Whether it runs.
    pub running: bool,
}

impl Docker {
    /// The container of this name.
    ///
    /// # Errors
    /// [`DockerError`] says why the engine cannot be asked.
    pub async fn helper(&self, name: &str) -> Result<Option<HelperSeen>, DockerError> {
        self.bounded(async { self.connect().await?.helper(name).await }).await
    }

    /// Whether the engine runs without root, and its containers in a user namespace of its user.
    ///
    /// # Errors
    /// [`DockerError`] says why the engine cannot be asked.
    pub async fn is_rootless(&self) -> Result<bool, DockerError> {
        self.bounded(async { self.connect().await?.is_rootless().await }).await
    }

    /// Makes and starts the helper's container, and before that its image where the engine does not have it.
    ///
    /// # Errors
    /// [`DockerError`]; a container that was made and does not start is left for who looks for the reason.
    pub async fn make_helper(&self, plan: &HelperPlan) -> Result<(), DockerError> {
        let engine = self.bounded(self.connect()).await?;
        tokio::time::timeout(MAKE_TIMEOUT, engine.make_helper(plan)).await.unwrap_or_else(|_| {
            Err(DockerError::Refused(format!("it took longer than {} s", MAKE_TIMEOUT.as_secs())))
        })
    }

    /// How the helper ended that should run: its status, and the last that it said.
    pub async fn helper_end(&self, name: &str) -> Option<String> {
        self.bounded(async { self.connect().await?.helper_end(name).await }).await.ok().flatten()
    }

    /// Ends and removes the helper's container. None is as good.
    ///
    /// # Errors
    /// [`DockerError`] says why it is still there.
    pub async fn remove_helper(&self, name: &str) -> Result<(), DockerError> {
        self.bounded(async { self.connect().await?.remove_helper(name).await }).await
    }

    /// The same, and its images go with it.
    ///
    /// # Errors
    /// [`DockerError`] says why it is still there.
    pub async fn forget_helper(&self, name: &str) -> Result<(), DockerError> {
        self.bounded(async {
            let engine = self.connect().await?;
            engine.remove_helper(name).await?;
            engine.forget_images(name, None).await;
            Ok(())
        })
        .await
    }
}
