//! Listening SOCK_SEQPACKET sockets that replace a file of the same name atomically.

use std::fs::Permissions;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// The most connections that wait to be accepted.
const BACKLOG: i32 = 16;

/// Binds a listening socket of this mode and renames it to `name` in `directory`, replacing a file of that name. Returns the
/// socket, and the device and inode of its file.
pub(crate) fn appear(directory: &Path, name: &str, mode: u32) -> io::Result<(OwnedFd, (u64, u64))> {
    // Bound under a random name first. The process id would not be unique: processes of several containers have equal
    // ids.
    let temporary =
        tempfile::Builder::new().prefix(".socket-").make_in(directory, |path| bind(path, mode))?;
    let file = temporary.path().symlink_metadata()?;
    let socket = temporary.persist(directory.join(name)).map_err(|refused| refused.error)?;
    Ok((socket, (file.dev(), file.ino())))
}

fn bind(path: &Path, mode: u32) -> io::Result<OwnedFd> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    rustix::net::bind(&socket, &address)?;
    std::fs::set_permissions(path, Permissions::from_mode(mode))?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}
