//! The helper: for a user who may talk to Docker and is not root, a container that may enter the network of the others.
//!
//! Such a user cannot enter a container's network namespace, though whoever may talk to Docker may have a container that can. The
//! daemon has one made, if it was started with `--docker-helper`: this program alone in an image ([`crate::docker::helper`] has what
//! it is given), which starts openers for whoever is the daemon's own user ([`serve`]). The relay then has sockets of the container's
//! own, as root's has: one hop.
//!
//! Here it is kept: made where it is not there, made anew where it is of another build or does not answer, looked at when Docker tells
//! of it and once in a while, and removed when the daemon and its relay engine end. A daemon that is replaced leaves it to its
//! successor, since the engine goes on. What is done about what is seen is decided in `verdict`; nothing waits for it, and where it
//! cannot be had, forwarding goes on without.

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

/// What the helper's container is given, in a sentence for people.
pub const ACCESS: &str = "it may enter any process's network namespace (CAP_SYS_ADMIN, CAP_SYS_PTRACE), obeys you alone, and \
     has no network of its own and no file of the host but its socket's directory";

/// How often it is looked at when nothing happens. It ends when nobody has looked for longer ([`serve::Bounds::idle`]).
const LOOK_INTERVAL: Duration = Duration::from_secs(60);
/// How long after a failure it is tried again: the first time, and at most.
const AGAIN: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));
/// How long after it was lost.
const SOON: Duration = Duration::from_millis(250);
/// How long one that was started may take to answer, and one that runs.
const ANSWERS_WITHIN: (Duration, Duration) = (Duration::from_secs(10), Duration::from_millis(500));
/// How often that is looked at.
const POLL: Duration = Duration::from_millis(20);

/// How the helper is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HelperFacts {
    /// Its container.
    pub container: String,
    /// How far it is.
    pub state: HelperState,
    /// Why it is not there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// How far the helper is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HelperState {
    /// It is being made.
    Starting,
    /// It answers.
    Running,
    /// It cannot be had just now; it is tried again.
    Failed,
}

/// What it works with.
#[derive(Debug)]
pub struct HelperOptions {
    /// Whether there is to be one. If not, one that an earlier daemon left is removed, and that is all.
    pub on: bool,
    /// Where its directory is.
    pub home: Home,
    /// Who makes it.
    pub docker: Docker,
    /// Where events go.
    pub journal: Journal,
}

/// The handle; clones are the same helper. When the last one is dropped, it is no longer kept.
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
    /// Begins, as a task of the runtime that calls.
    pub fn start(options: HelperOptions) -> Helper {
        let HelperOptions { on, home, docker, journal } = options;
        let name = container_name(&home, rustix::process::geteuid().as_raw());
        let starting = HelperFacts { container: name.clone(), state: HelperState::Starting, reason: None };
        let (sender, facts) = watch::channel(starting);
        let (hint, stop) = (Arc::new(Notify::new()), CancellationToken::new());
        let directory = home.helper_directory();
        let keeper = Keeper {
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
            let work = async { if on { keeper.keep().await } else { keeper.clear().await } };
            let _ = stopped.run_until_cancelled(work).await;
        });
        let _task = AbortOnDropHandle::new(task);
        Helper(Arc::new(Shared { on, name, facts, hint, stop, docker, directory, _task }))
    }

    /// How it is; none where there is to be none.
    pub fn facts(&self) -> Option<HelperFacts> {
        self.0.on.then(|| self.0.facts.borrow().clone())
    }

    /// Where it listens; none where there is to be none.
    pub fn socket(&self) -> Option<PathBuf> {
        self.0.on.then(|| self.0.directory.join(SOCKET))
    }

    /// Docker says that something changed about this container; none means that anything may have.
    pub fn look_again(&self, name: Option<&str>) {
        if name.is_none_or(|name| name == self.0.name) {
            self.0.hint.notify_one();
        }
    }

    /// Keeps it no longer, and removes it, where nobody is left who needs what it started.
    pub async fn stop(&self, remove: bool) {
        self.0.stop.cancel();
        if self.0.on && remove && self.0.docker.forget_helper(&self.0.name).await.is_ok() {
            remove_directory(&self.0.directory);
        }
    }
}

/// What its container is called: its user is for people, the rest tells the homes of one user apart.
fn container_name(home: &Home, user: u32) -> String {
    let digest = Sha256::digest(home.root().as_os_str().as_encoded_bytes());
    format!("landfall-helper-{user}-{}", hex(&digest[..3]))
}

/// What is to be done about the container that has the helper's name.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// There is none.
    Make,
    /// It is as it should be, as far as Docker can tell.
    Keep,
    /// It is ours, and of no use.
    Replace,
    /// It is not ours to touch.
    Stranger,
}

fn verdict(seen: Option<&HelperSeen>, home: &str, build: &str) -> Verdict {
    match seen {
        None => Verdict::Make,
        Some(seen) if seen.home.as_deref() != Some(home) => Verdict::Stranger,
        Some(seen) if seen.running && seen.build.as_deref() == Some(build) => Verdict::Keep,
        Some(_) => Verdict::Replace,
    }
}

/// Who keeps it.
struct Keeper {
    name: String,
    home: String,
    directory: PathBuf,
    docker: Docker,
    journal: Journal,
    facts: watch::Sender<HelperFacts>,
    hint: Arc<Notify>,
}

impl Keeper {
    /// Sees to it that it is there, for ever.
    async fn keep(&self) {
        let mut pause = AGAIN.0;
        let mut ran = false;
        loop {
            let done = self.see_to_it().await;
            let rest = match &done {
                Ok(()) => LOOK_INTERVAL,
                // Somebody is about to remove it, most likely, and Docker not done with that.
                Err(_) if ran => SOON,
                Err(_) => pause,
            };
            pause = if done.is_ok() { AGAIN.0 } else { (2 * pause).min(AGAIN.1) };
            if !(ran && done.is_err()) {
                self.tell(done.as_ref().err().cloned());
            }
            ran = done.is_ok();
            tokio::select! {
                () = sleep(rest) => {}
                () = self.hint.notified() => {}
            }
        }
    }

    /// Removes what a daemon left that was started with a helper and did not end in order.
    async fn clear(&self) {
        if !self.directory.exists() {
            return;
        }
        let ours = |seen: &HelperSeen| seen.home.as_deref() == Some(self.home.as_str());
        let removed = match self.docker.helper(&self.name).await {
            Ok(Some(seen)) if ours(&seen) => self.docker.forget_helper(&self.name).await.is_ok(),
            Ok(_) => true,
            Err(_) => false,
        };
        if removed {
            remove_directory(&self.directory);
        }
    }

    fn tell(&self, reason: Option<String>) {
        let state = if reason.is_none() { HelperState::Running } else { HelperState::Failed };
        let told = HelperFacts { container: self.name.clone(), state, reason };
        let changed = self.facts.send_if_modified(|known| {
            let changed = *known != told;
            *known = told.clone();
            changed
        });
        if changed {
            let text = match told.reason {
                None => format!("the helper {} runs: {ACCESS}", self.name),
                Some(reason) => format!("the helper {} cannot be had: {reason}", self.name),
            };
            self.journal.record(&Event::Notice { text });
        }
    }

    /// One look, and what it takes to have a helper that answers. Else why there is none.
    async fn see_to_it(&self) -> Result<(), String> {
        let plan = self.plan().await?;
        let seen = self.docker.helper(&self.name).await.map_err(|error| error.to_string())?;
        match verdict(seen.as_ref(), &self.home, &plan.build) {
            Verdict::Keep if self.answers(ANSWERS_WITHIN.1).await => return Ok(()),
            Verdict::Keep | Verdict::Replace => self.remove().await?,
            Verdict::Stranger => {
                return Err("a container of this name exists that this daemon has not made".to_owned());
            }
            Verdict::Make => {}
        }
        if self.docker.is_rootless().await.map_err(|error| error.to_string())? {
            let text = "the engine runs without root, and its containers are entered by their own user; none is needed";
            return Err(text.to_owned());
        }
        self.docker.make_helper(&plan).await.map_err(|error| error.to_string())?;
        if self.answers(ANSWERS_WITHIN.0).await {
            return Ok(());
        }
        Err(self.docker.helper_end(&self.name).await.unwrap_or_else(|| {
            format!(
                "it runs and does not answer at {}: is the engine on another machine?",
                self.socket().display()
            )
        }))
    }

    async fn plan(&self) -> Result<HelperPlan, String> {
        let directory = self.directory.clone();
        let prepared = tokio::task::spawn_blocking(move || {
            let program = Program::own().map_err(|error| format!("{}; {}", chain(&error), error.hint()))?;
            let group = prepare_directory(&directory)
                .map_err(|error| format!("{} cannot be made: {error}", directory.display()))?;
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

    /// Whether somebody listens at its socket before the time is up.
    async fn answers(&self, within: Duration) -> bool {
        let socket = self.socket();
        let looks = async {
            while helper_listens(&socket).is_err() {
                sleep(POLL).await;
            }
        };
        timeout(within, looks).await.is_ok()
    }
}

/// Makes the directory that is shared with the helper, which may write there as its group; the group.
fn prepare_directory(path: &Path) -> io::Result<u32> {
    let mode = Mode::RWXU | Mode::RWXG;
    match rustix::fs::mkdir(path, mode) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => {}
        Err(errno) => return Err(errno.into()),
    }
    rustix::fs::chmod(path, mode)?;
    Ok(rustix::fs::stat(path)?.st_gid)
}

/// What cannot be removed is found by the next daemon.
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
        assert_eq!(super::verdict(None, "/h", "b"), Verdict::Make);
        assert_eq!(verdict(seen(Some("/h"), "b", true)), Verdict::Keep);
        assert_eq!(verdict(seen(Some("/h"), "b", false)), Verdict::Replace);
        assert_eq!(verdict(seen(Some("/h"), "a", true)), Verdict::Replace);
        assert_eq!(verdict(seen(Some("/other"), "b", true)), Verdict::Stranger);
        assert_eq!(verdict(seen(None, "b", true)), Verdict::Stranger);
    }

    #[test]
    fn every_home_and_user_has_a_name_of_its_own() {
        let name = |path: &str, user| container_name(&Home::at(path.into()).unwrap(), user);
        assert!(name("/h", 1000).starts_with("landfall-helper-1000-"));
        assert_eq!(name("/h", 1000), name("/h", 1000));
        assert_ne!(name("/h", 1000), name("/g", 1000));
        assert_ne!(name("/h", 1000), name("/h", 1001));
    }

    #[test]
    fn the_directory_is_for_its_user_and_group() {
        use std::os::unix::fs::{MetadataExt, PermissionsExt};
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("helper");
        let group = prepare_directory(&path).unwrap();
        assert_eq!(prepare_directory(&path).unwrap(), group);
        let told = std::fs::metadata(&path).unwrap();
        assert_eq!((told.gid(), told.permissions().mode() & 0o777), (group, 0o770));
        std::fs::write(path.join(SOCKET), "").unwrap();
        remove_directory(&path);
        assert!(!path.exists());
    }
}
