//! That there is one daemon for a home.
//!
//! The kernel's lock on a file that is never unlinked decides, and lets go when the process that holds it ends, however
//! it ends. No process id decides anything. The descriptor is closed in every program that the daemon starts, so nobody
//! holds the lock after it. A daemon that does not know of the lock (the reference) is found by asking whoever listens
//! at the socket.

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

/// How long whoever listens at the socket has to say that it is a daemon (wire specification, A.1.3).
const ANSWER_TIME_MAX: Duration = Duration::from_millis(500);
/// How long a daemon that holds the lock and does not answer may take to go. It is stopping, or it has just begun.
const PATIENCE: Duration = Duration::from_secs(3);
/// How often the lock is tried meanwhile.
const RETRY_INTERVAL: Duration = Duration::from_millis(20);
/// The longest answer to `list` that is waited for, in bytes.
const ANSWER_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// Why this process is not the daemon of the home.
#[derive(Debug, Error)]
pub enum ClaimError {
    /// Another one is.
    #[error("another typeclaw host daemon is already listening at {}", .0.display())]
    Taken(PathBuf),
    /// The lock cannot be had for another reason.
    #[error("{} cannot be locked", path.display())]
    Lock {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// What a daemon that is gone left behind cannot be taken away.
    #[error("{} cannot be removed", path.display())]
    Stale {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// That this process is the daemon of a home, for as long as it lives.
#[derive(Debug)]
pub(super) struct Claim {
    socket: PathBuf,
    _lock: File,
}

impl Claim {
    /// Becomes the daemon of a home, and takes away the socket of one that is gone.
    ///
    /// # Errors
    /// [`ClaimError`].
    pub(super) async fn take(home: &Home) -> Result<Claim, ClaimError> {
        let (path, socket) = (home.daemon_lock(), home.socket());
        let failed = |source| ClaimError::Lock { path: path.clone(), source };
        // Opened with O_CLOEXEC, as the standard library does.
        let lock = private_file::options().create(true).append(true).open(&path).map_err(failed)?;
        let deadline = Instant::now() + PATIENCE;
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

    /// Gives the home up: the socket's file goes, which is what others wait for, and the lock after it. `identity` is
    /// what the socket's file was when it was made; another file there is somebody else's.
    pub(super) fn release(self, identity: Option<(u64, u64)>) {
        if identity.is_some() && identity == identity_of_name(&self.socket) {
            // What cannot be removed now is removed by the next daemon.
            let _ = std::fs::remove_file(&self.socket);
        }
    }
}

/// Whether a daemon listens at a socket: whether something there answers `list` and says that it worked.
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
    async fn a_home_is_claimed_once_and_again_when_it_was_given_up() {
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
    async fn a_stale_socket_is_taken_away() {
        let (_folder, home) = home();
        drop(UnixListener::bind(home.socket()).unwrap());
        assert!(home.socket().exists());
        Claim::take(&home).await.unwrap();
        assert!(!home.socket().exists());
    }

    #[tokio::test]
    async fn a_daemon_that_does_not_know_the_lock_is_found_by_its_answer() {
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
    async fn giving_up_leaves_a_socket_that_is_somebody_elses() {
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
