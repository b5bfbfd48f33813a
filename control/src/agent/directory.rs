//! The socket in the directory that the container shares with its host (the way by an agent): the engine connects there, and
//! is handed sockets that belong to the container's network.
//!
//! Whoever may connect may reach everything that listens on the container's loopback. The container's user and the host's are
//! strangers to each other as a rule, so the socket is open to everybody (mode 0666), and the directory decides: who can get
//! into it on the host, through its parents, is let in. So it lies in a directory that only its user can enter.
//!
//! The socket appears under its name with one `rename(2)`, in the place of one that nobody serves any more: a container that
//! starts again never finds its own past in its way, and nobody ever finds a socket that does not answer yet. A directory that
//! another agent serves is left to it.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use landfall_engine::opener::AGENT_SOCKET;
use rustix::fs::Access;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use thiserror::Error;

use crate::sys::paths::identity_of_name;
use crate::sys::socket_file::appear;

/// Where the directory is mounted, unless another one is named.
pub(super) const DIRECTORY: &str = "/run/landfall";

/// Why the directory cannot be served.
#[derive(Debug, Error)]
pub enum DirectoryError {
    /// Somebody else serves it.
    #[error("another agent serves {}", .0.display())]
    Taken(PathBuf),
    /// Something else has the socket's name.
    #[error("{} exists and is no socket", .0.display())]
    Stranger(PathBuf),
    /// The system said no.
    #[error("{} cannot be made", path.display())]
    System {
        /// What.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A socket that hosts can connect to. Its file goes when this is dropped.
#[derive(Debug)]
pub(super) struct AgentSocket {
    path: PathBuf,
    identity: (u64, u64),
}

/// Whether the usual directory is there and can be written to.
pub(super) fn is_mounted() -> bool {
    let access = Access::WRITE_OK | Access::EXEC_OK;
    Path::new(DIRECTORY).is_dir() && rustix::fs::access(DIRECTORY, access).is_ok()
}

/// Listens in `directory`.
///
/// # Errors
/// [`DirectoryError`]; then nothing is left behind.
pub(super) fn listen(directory: &Path) -> Result<(OwnedFd, AgentSocket), DirectoryError> {
    let path = directory.join(AGENT_SOCKET);
    let failed = |source: io::Error| DirectoryError::System { path: path.clone(), source };
    match path.symlink_metadata() {
        Ok(file) if !file.file_type().is_socket() => return Err(DirectoryError::Stranger(path)),
        Ok(_) if is_served(&path) => return Err(DirectoryError::Taken(path)),
        _ => {}
    }
    // The socket is open to everybody, and the directory decides.
    let (socket, identity) = appear(directory, AGENT_SOCKET, 0o666).map_err(failed)?;
    Ok((socket, AgentSocket { path, identity }))
}

/// Whether somebody listens there. What cannot be asked counts as nobody, since the name can be taken away from it.
fn is_served(path: &Path) -> bool {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let Ok(socket) = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None) else {
        return false;
    };
    let connected = SocketAddrUnix::new(path).and_then(|address| rustix::net::connect(&socket, &address));
    // EAGAIN: its queue is full.
    matches!(connected, Ok(()) | Err(Errno::AGAIN))
}

impl Drop for AgentSocket {
    fn drop(&mut self) {
        if identity_of_name(&self.path) == Some(self.identity) {
            // What stays is taken for what it is by the next agent.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn a_stale_socket_is_replaced_a_served_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(AGENT_SOCKET);
        let (socket, door) = listen(folder.path()).unwrap();
        assert_eq!(path.symlink_metadata().unwrap().permissions().mode() & 0o777, 0o666);
        assert!(matches!(listen(folder.path()), Err(DirectoryError::Taken(_))));
        // Its process has died without a word.
        drop(socket);
        std::mem::forget(door);
        let (_socket, door) = listen(folder.path()).unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside it");
        drop(door);
        assert!(!path.exists());
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(AGENT_SOCKET);
        std::fs::write(&path, "mine").unwrap();
        assert!(matches!(listen(folder.path()), Err(DirectoryError::Stranger(_))));
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
        assert!(matches!(listen(folder.path()), Err(DirectoryError::Stranger(_))));
        assert!(matches!(listen(Path::new("/no/such/place")), Err(DirectoryError::System { .. })));
    }

    #[test]
    fn a_socket_that_came_after_ours_stays() {
        let folder = tempfile::tempdir().unwrap();
        let (socket, door) = listen(folder.path()).unwrap();
        drop(socket);
        let (_socket, _next) = listen(folder.path()).unwrap();
        drop(door);
        assert!(folder.path().join(AGENT_SOCKET).exists());
    }
}
