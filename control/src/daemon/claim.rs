//! The claim that allows one daemon for each home.
//!
//! The claim is a kernel lock on a file that is never unlinked. The kernel releases the lock when the process that holds it
//! ends, for any reason. Process ids are never used. The descriptor is closed in each program that the daemon starts, so no
//! other process can hold the lock after the daemon. A daemon that does not use the lock (the reference) is detected by a
//! request to the process that listens at the socket.

use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use thiserror::Error;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, timeout};

use crate::sys::paths::{Home, identity_of_name};
use crate::sys::private_file;

/// How long the process that listens at the socket may take to answer `list` (wire specification, A.1.3).
const ANSWER_TIME_MAX: Duration = Duration::from_millis(500);
/// The time limit for a daemon that holds the lock to end or to answer. It is stopping or starting.
const ANSWER_OR_END_MAX: Duration = Duration::from_secs(3);
/// The interval between attempts to lock.
const RETRY_INTERVAL: Duration = Duration::from_millis(20);
/// The longest answer to `list` that is read, in bytes.
const ANSWER_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// The reasons why this process is not the daemon of the home.
#[derive(Debug, Error)]
pub enum ClaimError {
    /// Another process is the daemon.
    #[error("another typeclaw host daemon is already listening at {}", .0.display())]
    Taken(PathBuf),
    /// The lock file cannot be opened or locked.
    #[error("{} cannot be locked", path.display())]
    Lock {
        /// The lock file.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// The socket file of a daemon that has ended cannot be removed.
    #[error("{} cannot be removed", path.display())]
    Stale {
        /// The socket file.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
}

/// The claim of this process to be the daemon of a home, valid while the value exists.
#[derive(Debug)]
pub(super) struct Claim {
    socket: PathBuf,
    _lock: File,
}

impl Claim {
    /// Takes the claim to a home, and removes the socket file of a daemon that has ended.
    ///
    /// # Errors
    /// [`ClaimError`].
    pub(super) async fn take(home: &Home) -> Result<Claim, ClaimError> {
        let (path, socket) = (home.daemon_lock(), home.socket());
        let failed = |source| ClaimError::Lock { path: path.clone(), source };
        // The standard library opens files with O_CLOEXEC.
        let lock = private_file::options().create(true).append(true).open(&path).map_err(failed)?;
        let deadline = Instant::now() + ANSWER_OR_END_MAX;
        loop {
            match lock.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {}
                Err(TryLockError::WouldBlock) => return Err(ClaimError::Taken(socket)),
                Err(TryLockError::Error(source)) => return Err(failed(source)),
            }
            if answers_list(&socket).await {
                return Err(ClaimError::Taken(socket));
            }
            sleep(RETRY_INTERVAL).await;
        }
        if answers_list(&socket).await {
            return Err(ClaimError::Taken(socket));
        }
        match std::fs::remove_file(&socket) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(ClaimError::Stale { path: socket, source })
            }
            _ => Ok(Claim { socket, _lock: lock }),
        }
    }

    /// Releases the claim: removes the socket file, for which other daemons wait, and then the lock. `identity` is the
    /// device and inode of the socket file when it was created; a file of another identity belongs to another daemon and
    /// remains.
    pub(super) fn release(self, identity: Option<(u64, u64)>) {
        if identity.is_some() && identity == identity_of_name(&self.socket) {
            // If this fails, the next daemon removes the file.
            let _ = std::fs::remove_file(&self.socket);
        }
    }
}

/// Returns whether a daemon listens at a socket: `list` is answered with `"ok": true`.
async fn answers_list(socket: &Path) -> bool {
    let asked = async {
        let mut stream = UnixStream::connect(socket).await?;
        stream.write_all(b"{\"kind\":\"list\"}\n").await?;
        let mut line = String::new();
        BufReader::new(stream.take(ANSWER_BYTES_MAX)).read_line(&mut line).await?;
        Ok::<_, io::Error>(serde_json::from_str::<Value>(&line)?)
    };
    let answer = timeout(ANSWER_TIME_MAX, asked).await;
    answer.is_ok_and(|answer| answer.is_ok_and(|answer| answer["ok"] == true))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    fn home() -> (tempfile::TempDir, Home) {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::at(folder.path().to_owned()).unwrap();
        home.ensure_directories().unwrap();
        (folder, home)
    }

    #[tokio::test(start_paused = true)]
    async fn a_home_is_claimed_by_one_daemon_and_by_the_next_after_release() {
        let (_folder, home) = home();
        let first = Claim::take(&home).await.unwrap();
        let second = Claim::take(&home).await.unwrap_err().to_string();
        let expected =
            format!("another typeclaw host daemon is already listening at {}", home.socket().display());
        assert_eq!(second, expected);
        first.release(None);
        Claim::take(&home).await.unwrap();
    }

    #[tokio::test]
    async fn a_stale_socket_is_removed() {
        let (_folder, home) = home();
        drop(UnixListener::bind(home.socket()).unwrap());
        assert!(home.socket().exists());
        Claim::take(&home).await.unwrap();
        assert!(!home.socket().exists());
    }

    #[tokio::test]
    async fn a_daemon_without_the_lock_is_detected_by_its_answer() {
        let (_folder, home) = home();
        let listener = UnixListener::bind(home.socket()).unwrap();
        let answering = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.read_u8().await.unwrap();
            stream.write_all(b"{\"ok\":true,\"result\":{\"registrations\":[]}}\n").await.unwrap();
        };
        let (claim, ()) = tokio::join!(Claim::take(&home), answering);
        assert!(matches!(claim, Err(ClaimError::Taken(_))));
        assert!(home.socket().exists());
    }

    #[tokio::test]
    async fn release_leaves_the_socket_of_another_daemon() {
        let (_folder, home) = home();
        let claim = Claim::take(&home).await.unwrap();
        let _listener = UnixListener::bind(home.socket()).unwrap();
        claim.release(Some((0, 0)));
        assert!(home.socket().exists());
        let claim = Claim { socket: home.socket(), _lock: File::open(home.daemon_lock()).unwrap() };
        claim.release(identity_of_name(&home.socket()));
        assert!(!home.socket().exists());
    }
}
