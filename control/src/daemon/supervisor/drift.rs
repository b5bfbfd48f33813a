//! Detects that the program on disk is another build than the running daemon. A daemon of one build that restarted
//! containers made for another build would undo half of an upgrade, so it refuses and names the remedy.
//!
//! The identity of the file is compared first, which takes one `stat(2)`. Only if it differs is the program on disk run with
//! `version --json`: the same build may have been installed again.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::Deserialize;

use crate::version;

/// How long a program may take to report its build.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// The link to this process's program (`proc_pid_exe(5)`), and the suffix that the kernel appends when the file is deleted.
const SELF: &str = "/proc/self/exe";
const DELETED: &str = " (deleted)";

/// The program as it was when the daemon started.
pub(super) struct Drift {
    path: PathBuf,
    running: String,
    /// The identity of a file that is known to be this build.
    same: Mutex<Option<Identity>>,
}

/// Fields that distinguish two files of one name. `changed` is the modification time in seconds and nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    changed: (i64, i64),
    bytes: u64,
}

impl From<Metadata> for Identity {
    fn from(about: Metadata) -> Identity {
        Identity {
            device: about.dev(),
            inode: about.ino(),
            changed: (about.mtime(), about.mtime_nsec()),
            bytes: about.len(),
        }
    }
}

/// The output of `version --json`.
#[derive(Deserialize)]
struct Answer {
    version: String,
}

impl Drift {
    /// Returns the program of this process.
    pub(super) fn of_this_program() -> Drift {
        let link = std::fs::read_link(SELF).unwrap_or_default();
        let text = link.to_string_lossy();
        let path = text.strip_suffix(DELETED).map_or_else(|| link.clone(), PathBuf::from);
        let running = match version::current() {
            unversioned if unversioned == version::UNVERSIONED => unversioned,
            // The environment overrides the version, so the version does not identify the build.
            _ => version::FINGERPRINT.to_owned(),
        };
        let same = Mutex::new(std::fs::metadata(SELF).ok().map(Identity::from));
        Drift { path, running, same }
    }

    /// Checks that the program on disk is this build.
    ///
    /// # Errors
    /// A refusal text for the user.
    pub(super) async fn check(&self) -> Result<(), String> {
        // A missing program is not another build, and no other program could be run.
        let Ok(about) = std::fs::metadata(&self.path) else { return Ok(()) };
        let found = Identity::from(about);
        if self.running == version::UNVERSIONED || *self.same() == Some(found) {
            return Ok(());
        }
        match ask(&self.path).await {
            Some(version) if version == self.running || version == version::UNVERSIONED => {
                *self.same() = Some(found);
                Ok(())
            }
            _ => Err(format!(
                "the host daemon's program has drifted: {} is another build than the daemon that runs; \
                 run `landfall up` on the host, and then the restart from there",
                self.path.display()
            )),
        }
    }

    fn same(&self) -> std::sync::MutexGuard<'_, Option<Identity>> {
        self.same.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the build of a program; `None` if the program does not report one.
async fn ask(program: &Path) -> Option<String> {
    let mut command = tokio::process::Command::new(program);
    command.args(["version", "--json"]).stdin(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    // The environment would override the build.
    command.env_remove(version::VARIABLE);
    let output = tokio::time::timeout(ASK_TIMEOUT, command.output()).await.ok()?.ok()?;
    serde_json::from_slice::<Answer>(&output.stdout).ok().map(|answer| answer.version)
}

#[cfg(test)]
pub(super) mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    pub(in crate::daemon::supervisor) fn program(folder: &Path, version: &str) {
        let path = folder.join("new");
        std::fs::write(
            &path,
            format!("#!/bin/sh\n[ \"$*\" = 'version --json' ] && echo '{{\"version\":\"{version}\"}}'\n"),
        )
        .unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::rename(path, folder.join("landfall")).unwrap();
    }

    /// Installs build `one` in the folder and returns a `Drift` that runs it.
    pub(in crate::daemon::supervisor) fn drift(folder: &Path) -> Drift {
        program(folder, "one");
        let path = folder.join("landfall");
        let same = Mutex::new(std::fs::metadata(&path).ok().map(Identity::from));
        Drift { path, running: "one".to_owned(), same }
    }

    #[tokio::test]
    async fn the_running_test_program_has_not_drifted() {
        let own = Drift::of_this_program();
        assert!(own.path.is_file());
        assert_eq!(own.check().await, Ok(()));
    }

    #[tokio::test]
    async fn another_build_is_refused_with_a_remedy() {
        let folder = tempfile::tempdir().unwrap();
        let drift = drift(folder.path());
        program(folder.path(), "two");
        let refusal = drift.check().await.unwrap_err();
        assert!(refusal.contains("has drifted") && refusal.contains("`landfall up`"), "{refusal}");
    }

    #[tokio::test]
    async fn the_same_build_installed_again_passes_and_is_cached() {
        let folder = tempfile::tempdir().unwrap();
        let drift = drift(folder.path());
        program(folder.path(), "one");
        assert_eq!(drift.check().await, Ok(()));
        assert_eq!(*drift.same(), std::fs::metadata(&drift.path).ok().map(Identity::from));
    }

    #[tokio::test]
    async fn a_build_without_a_version_equals_every_other() {
        let folder = tempfile::tempdir().unwrap();
        let mut drift = drift(folder.path());
        program(folder.path(), version::UNVERSIONED);
        assert_eq!(drift.check().await, Ok(()));
        program(folder.path(), "two");
        drift.running = version::UNVERSIONED.to_owned();
        assert_eq!(drift.check().await, Ok(()));
    }

    #[tokio::test]
    async fn a_program_without_an_answer_has_drifted_and_a_missing_one_has_not() {
        let folder = tempfile::tempdir().unwrap();
        let drift = drift(folder.path());
        std::fs::write(&drift.path, "not a program").unwrap();
        assert!(drift.check().await.is_err());
        std::fs::remove_file(&drift.path).unwrap();
        assert_eq!(drift.check().await, Ok(()));
    }
}
