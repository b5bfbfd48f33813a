//! The socket in the directory that the container shares with its host (the attach method `agent`): the engine connects
//! to it, and receives sockets that belong to the container's network namespace.
//!
//! Every process that can connect can reach all listeners on the container's loopback. The users of the container and
//! of the host usually differ, so the socket has mode 0666, and the directory controls access: every user who can enter
//! it on the host, through its parents, can connect. Therefore it has to be in a directory that only its user can
//! enter.
//!
//! The socket appears under its name with one `rename(2)`, and replaces a socket that no process serves any more. So a
//! restarted container is not blocked by its old socket, and no client finds a socket that does not answer yet. A
//! directory that another agent serves is left unchanged.

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

/// The default directory.
pub(super) const DIRECTORY: &str = "/run/landfall";

/// The reason why the directory cannot be served.
#[derive(Debug, Error)]
pub enum DirectoryError {
    /// Another agent serves it.
    #[error("another agent serves {}", .0.display())]
    Taken(PathBuf),
    /// Another file has the socket's name.
    #[error("{} exists and is not a socket", .0.display())]
    NotASocket(PathBuf),
    /// A system call failed.
    #[error("{} cannot be created", path.display())]
    System {
        /// The path of the socket.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
}

/// A socket to which hosts can connect. Dropping it removes its file.
#[derive(Debug)]
pub(super) struct AgentSocket {
    path: PathBuf,
    identity: (u64, u64),
}

/// Returns whether the default directory exists and is writable.
pub(super) fn is_mounted() -> bool {
    let access = Access::WRITE_OK | Access::EXEC_OK;
    Path::new(DIRECTORY).is_dir() && rustix::fs::access(DIRECTORY, access).is_ok()
}

/// Creates the socket in `directory`, and listens.
///
/// # Errors
/// [`DirectoryError`]; in this case no file remains.
pub(super) fn listen(directory: &Path) -> Result<(OwnedFd, AgentSocket), DirectoryError> {
    let path = directory.join(AGENT_SOCKET);
    let failed = |source: io::Error| DirectoryError::System { path: path.clone(), source };
    match path.symlink_metadata() {
        Ok(file) if !file.file_type().is_socket() => return Err(DirectoryError::NotASocket(path)),
        Ok(_) if is_served(&path) => return Err(DirectoryError::Taken(path)),
        _ => {}
    }
    // All users may connect; the directory controls access.
    let (socket, identity) = appear(directory, AGENT_SOCKET, 0o666).map_err(failed)?;
    Ok((socket, AgentSocket { path, identity }))
}

/// Returns whether a process listens at the path. Returns false if the socket cannot be created for the check, since
/// the name can be replaced safely.
fn is_served(path: &Path) -> bool {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let Ok(socket) = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None) else {
        return false;
    };
    let connected = SocketAddrUnix::new(path).and_then(|address| rustix::net::connect(&socket, &address));
    // EAGAIN: the listener's queue is full.
    matches!(connected, Ok(()) | Err(Errno::AGAIN))
}

impl Drop for AgentSocket {
    fn drop(&mut self) {
        if identity_of_name(&self.path) == Some(self.identity) {
            // A file that remains is replaced by the next agent.
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
        let (socket, file) = listen(folder.path()).unwrap();
        assert_eq!(path.symlink_metadata().unwrap().permissions().mode() & 0o777, 0o666);
        assert!(matches!(listen(folder.path()), Err(DirectoryError::Taken(_))));
        // Its process was killed.
        drop(socket);
        std::mem::forget(file);
        let (_socket, file) = listen(folder.path()).unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "no other file remains");
        drop(file);
        assert!(!path.exists());
    }

    #[test]
    fn a_file_that_is_not_a_socket_is_left_unchanged() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(AGENT_SOCKET);
        std::fs::write(&path, "mine").unwrap();
        assert!(matches!(listen(folder.path()), Err(DirectoryError::NotASocket(_))));
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
        assert!(matches!(listen(folder.path()), Err(DirectoryError::NotASocket(_))));
        assert!(matches!(listen(Path::new("/no/such/place")), Err(DirectoryError::System { .. })));
    }

    #[test]
    fn a_newer_socket_is_not_removed() {
        let folder = tempfile::tempdir().unwrap();
        let (socket, file) = listen(folder.path()).unwrap();
        drop(socket);
        let (_socket, _next) = listen(folder.path()).unwrap();
        drop(file);
        assert!(folder.path().join(AGENT_SOCKET).exists());
    }
}
