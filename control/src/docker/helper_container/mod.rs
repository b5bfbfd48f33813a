//! The helper: a container that can enter the network namespaces of other containers, for a user who may use Docker and is
//! not root.
//!
//! Such a user cannot enter a container's network namespace, but can create a container that can. With `--docker-helper`,
//! the daemon creates one: this program alone in an image ([`crate::docker::helper`] defines its privileges), which starts
//! openers for processes of the daemon's own user ([`serve`]). The relay then has sockets inside the container, as it has
//! for root, and needs no second hop.
//!
//! This module keeps the helper running. The helper is starting, running or failed. It is created if it is missing,
//! recreated if it is of another build or does not answer, checked after Docker events and periodically, and removed when
//! the daemon and its relay engine end. A daemon that is replaced leaves the helper to its successor, since the engine
//! continues. `verdict` decides on the action. No other part of the daemon waits for the helper, and forwarding works
//! without it.

pub mod program;
pub mod serve;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use landfall_engine::opener::client::helper_listens;
use rustix::fs::Mode;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::docker::Docker;
use crate::docker::helper::{HelperPlan, HelperSeen};
use crate::error::chain;
use crate::model::event::Event;
use crate::model::name::hex;
use crate::sys::journal::Journal;
use crate::sys::paths::Home;
use program::Program;

/// The name of the helper's socket in its directory.
pub const SOCKET: &str = "opener.sock";

/// The privileges of the helper's container, as a sentence for the user.
pub const ACCESS: &str = "it can enter the network namespace of any process (CAP_SYS_ADMIN, CAP_SYS_PTRACE), accepts requests \
     of your user only, and has no network and no file of the host except the directory of its socket";

/// The interval of checks without an event. The helper ends by itself after a longer time ([`serve::Bounds::idle`]).
const CHECK_INTERVAL: Duration = Duration::from_secs(60);
/// The minimum and the maximum delay of a retry after a failure.
const RETRY_DELAY: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));
/// The delay of a retry after a running helper was lost.
const LOST_DELAY: Duration = Duration::from_millis(250);
/// The time limits for an answer of a helper that was just started, and of one that runs.
const ANSWER_MAX: (Duration, Duration) = (Duration::from_secs(10), Duration::from_millis(500));
/// The interval of checks for an answer.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Facts about the helper.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HelperFacts {
    /// The name of its container.
    pub container: String,
    /// Its state.
    pub state: HelperState,
    /// The reason of a failure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// The state of the helper.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HelperState {
    /// It is being created.
    Starting,
    /// It answers.
    Running,
    /// It is unavailable. Another attempt follows.
    Failed,
}

/// The options of the helper.
#[derive(Debug)]
pub struct HelperOptions {
    /// Whether the daemon uses a helper. If not, only the helper of an earlier daemon is removed.
    pub on: bool,
    /// The home, which contains its directory.
    pub home: Home,
    /// The engine on which it runs.
    pub docker: Docker,
    /// The journal for events.
    pub journal: Journal,
}

/// A handle of the helper. Clones share one state. Dropping the last one ends the task that keeps the helper running.
#[derive(Clone, Debug)]
pub struct Helper(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    on: bool,
    name: String,
    facts: watch::Receiver<HelperFacts>,
    hint: Arc<Notify>,
    stop: CancellationToken,
    docker: Docker,
    directory: PathBuf,
    _task: AbortOnDropHandle<()>,
}

impl Helper {
    /// Starts the task on the current runtime.
    pub fn start(options: HelperOptions) -> Helper {
        let HelperOptions { on, home, docker, journal } = options;
        let name = container_name(&home, rustix::process::geteuid().as_raw());
        let starting = HelperFacts { container: name.clone(), state: HelperState::Starting, reason: None };
        let (sender, facts) = watch::channel(starting);
        let (hint, stop) = (Arc::new(Notify::new()), CancellationToken::new());
        let directory = home.helper_directory();
        let helper_task = HelperTask {
            name: name.clone(),
            home: home.root().display().to_string(),
            directory: directory.clone(),
            docker: docker.clone(),
            journal,
            facts: sender,
            hint: Arc::clone(&hint),
        };
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let work =
                async { if on { helper_task.run().await } else { helper_task.remove_leftover().await } };
            let _ = stopped.run_until_cancelled(work).await;
        });
        let _task = AbortOnDropHandle::new(task);
        Helper(Arc::new(Shared { on, name, facts, hint, stop, docker, directory, _task }))
    }

    /// Returns the facts about the helper; `None` if the daemon uses none.
    pub fn facts(&self) -> Option<HelperFacts> {
        self.0.on.then(|| self.0.facts.borrow().clone())
    }

    /// Returns the path of its socket; `None` if the daemon uses no helper.
    pub fn socket(&self) -> Option<PathBuf> {
        self.0.on.then(|| self.0.directory.join(SOCKET))
    }

    /// Rechecks the helper after a Docker event about this container, or about any for `None`.
    pub fn recheck(&self, name: Option<&str>) {
        if name.is_none_or(|name| name == self.0.name) {
            self.0.hint.notify_one();
        }
    }

    /// Stops keeping the helper running. With `remove`, removes it, since no process needs its openers.
    pub async fn stop(&self, remove: bool) {
        self.0.stop.cancel();
        if self.0.on && remove && self.0.docker.remove_helper_and_images(&self.0.name).await.is_ok() {
            remove_directory(&self.0.directory);
        }
    }
}

/// Returns the name of the container. The user id is for readers; the digest distinguishes the homes of one user.
fn container_name(home: &Home, user: u32) -> String {
    let digest = Sha256::digest(home.root().as_os_str().as_encoded_bytes());
    format!("landfall-helper-{user}-{}", hex(&digest[..3]))
}

/// The action for the container with the helper's name.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// The container does not exist: create it.
    Create,
    /// The container is correct, as far as the engine reports.
    Keep,
    /// The container belongs to this daemon and is unusable: replace it.
    Replace,
    /// The container was created by another program: leave it.
    Foreign,
}

fn verdict(seen: Option<&HelperSeen>, home: &str, build: &str) -> Verdict {
    match seen {
        None => Verdict::Create,
        Some(seen) if seen.home.as_deref() != Some(home) => Verdict::Foreign,
        Some(seen) if seen.running && seen.build.as_deref() == Some(build) => Verdict::Keep,
        Some(_) => Verdict::Replace,
    }
}

/// The task that keeps the helper running.
struct HelperTask {
    name: String,
    home: String,
    directory: PathBuf,
    docker: Docker,
    journal: Journal,
    facts: watch::Sender<HelperFacts>,
    hint: Arc<Notify>,
}

impl HelperTask {
    /// Keeps the helper running without end.
    async fn run(&self) {
        let mut pause = RETRY_DELAY.0;
        let mut ran = false;
        loop {
            let done = self.ensure_running().await;
            let rest = match &done {
                Ok(()) => CHECK_INTERVAL,
                // Probably another process is removing the container, and Docker has not finished.
                Err(_) if ran => LOST_DELAY,
                Err(_) => pause,
            };
            pause = if done.is_ok() { RETRY_DELAY.0 } else { (2 * pause).min(RETRY_DELAY.1) };
            if !(ran && done.is_err()) {
                self.report(done.as_ref().err().cloned());
            }
            ran = done.is_ok();
            tokio::select! {
                () = sleep(rest) => {}
                () = self.hint.notified() => {}
            }
        }
    }

    /// Removes the helper of a daemon that used one and did not stop in order.
    async fn remove_leftover(&self) {
        if !self.directory.exists() {
            return;
        }
        let is_own = |seen: &HelperSeen| seen.home.as_deref() == Some(self.home.as_str());
        let removed = match self.docker.helper(&self.name).await {
            Ok(Some(seen)) if is_own(&seen) => self.docker.remove_helper_and_images(&self.name).await.is_ok(),
            Ok(_) => true,
            Err(_) => false,
        };
        if removed {
            remove_directory(&self.directory);
        }
    }

    fn report(&self, reason: Option<String>) {
        let state = if reason.is_none() { HelperState::Running } else { HelperState::Failed };
        let facts = HelperFacts { container: self.name.clone(), state, reason };
        let changed = self.facts.send_if_modified(|known| {
            let changed = *known != facts;
            *known = facts.clone();
            changed
        });
        if changed {
            let text = match facts.reason {
                None => format!("the helper {} runs: {ACCESS}", self.name),
                Some(reason) => format!("the helper {} is unavailable: {reason}", self.name),
            };
            self.journal.record(&Event::Notice { text });
        }
    }

    /// Checks the helper, and creates or replaces it if needed. Returns a reason if it does not answer.
    async fn ensure_running(&self) -> Result<(), String> {
        let plan = self.plan().await?;
        let seen = self.docker.helper(&self.name).await.map_err(|error| error.to_string())?;
        match verdict(seen.as_ref(), &self.home, &plan.build) {
            Verdict::Keep if self.answers(ANSWER_MAX.1).await => return Ok(()),
            Verdict::Keep | Verdict::Replace => self.remove().await?,
            Verdict::Foreign => {
                return Err("a container of this name exists that this daemon has not made".to_owned());
            }
            Verdict::Create => {}
        }
        if self.docker.is_rootless().await.map_err(|error| error.to_string())? {
            let text =
                "the engine is rootless, so its user can enter its containers; the helper is not needed";
            return Err(text.to_owned());
        }
        self.docker.create_helper(&plan).await.map_err(|error| error.to_string())?;
        if self.answers(ANSWER_MAX.0).await {
            return Ok(());
        }
        Err(self.docker.helper_end(&self.name).await.unwrap_or_else(|| {
            format!(
                "it runs, but does not answer at {}; check that the engine is on this machine",
                self.socket().display()
            )
        }))
    }

    async fn plan(&self) -> Result<HelperPlan, String> {
        let directory = self.directory.clone();
        let prepared = tokio::task::spawn_blocking(move || {
            let program = Program::own().map_err(|error| format!("{}; {}", chain(&error), error.hint()))?;
            let group = prepare_directory(&directory)
                .map_err(|error| format!("{} cannot be created: {error}", directory.display()))?;
            Ok::<_, String>((program, group))
        });
        let (program, group) = prepared.await.map_err(|error| error.to_string())??;
        Ok(HelperPlan {
            name: self.name.clone(),
            home: self.home.clone(),
            build: program.build,
            program: program.path,
            directory: self.directory.clone(),
            group,
            user: rustix::process::geteuid().as_raw(),
        })
    }

    async fn remove(&self) -> Result<(), String> {
        self.docker.remove_helper(&self.name).await.map_err(|error| error.to_string())
    }

    fn socket(&self) -> PathBuf {
        self.directory.join(SOCKET)
    }

    /// Returns whether a process listens at its socket within a time limit.
    async fn answers(&self, within: Duration) -> bool {
        let socket = self.socket();
        let checks = async {
            while helper_listens(&socket).is_err() {
                sleep(POLL_INTERVAL).await;
            }
        };
        timeout(within, checks).await.is_ok()
    }
}

/// Creates the directory that is shared with the helper, which may write there as its group. Returns the group.
fn prepare_directory(path: &Path) -> io::Result<u32> {
    let mode = Mode::RWXU | Mode::RWXG;
    match rustix::fs::mkdir(path, mode) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => {}
        Err(errno) => return Err(errno.into()),
    }
    rustix::fs::chmod(path, mode)?;
    Ok(rustix::fs::stat(path)?.st_gid)
}

/// Removes the directory. If this fails, the next daemon removes it.
fn remove_directory(path: &Path) {
    let _ = std::fs::remove_file(path.join(SOCKET));
    let _ = std::fs::remove_dir(path);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_running_container_of_this_home_and_build_is_kept() {
        let seen = |home: Option<&str>, build: &str, running| HelperSeen {
            home: home.map(str::to_owned),
            build: Some(build.to_owned()),
            running,
        };
        let verdict = |seen| verdict(Some(&seen), "/h", "b");
        assert_eq!(super::verdict(None, "/h", "b"), Verdict::Create);
        assert_eq!(verdict(seen(Some("/h"), "b", true)), Verdict::Keep);
        assert_eq!(verdict(seen(Some("/h"), "b", false)), Verdict::Replace);
        assert_eq!(verdict(seen(Some("/h"), "a", true)), Verdict::Replace);
        assert_eq!(verdict(seen(Some("/other"), "b", true)), Verdict::Foreign);
        assert_eq!(verdict(seen(None, "b", true)), Verdict::Foreign);
    }

    #[test]
    fn each_home_and_user_has_its_own_name() {
        let name = |path: &str, user| container_name(&Home::at(path.into()).unwrap(), user);
        assert!(name("/h", 1000).starts_with("landfall-helper-1000-"));
        assert_eq!(name("/h", 1000), name("/h", 1000));
        assert_ne!(name("/h", 1000), name("/g", 1000));
        assert_ne!(name("/h", 1000), name("/h", 1001));
    }

    #[test]
    fn the_directory_is_accessible_to_its_user_and_group_only() {
        use std::os::unix::fs::{MetadataExt, PermissionsExt};
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("helper");
        let group = prepare_directory(&path).unwrap();
        assert_eq!(prepare_directory(&path).unwrap(), group);
        let facts = std::fs::metadata(&path).unwrap();
        assert_eq!((facts.gid(), facts.permissions().mode() & 0o777), (group, 0o770));
        std::fs::write(path.join(SOCKET), "").unwrap();
        remove_directory(&path);
        assert!(!path.exists());
    }
}
