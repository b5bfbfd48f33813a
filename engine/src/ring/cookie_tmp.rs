//! The identity of a socket's network namespace.
#![expect(unsafe_code, reason = "no crate wraps SO_NETNS_COOKIE")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// The cookie of the network namespace that `socket` belongs to (`SO_NETNS_COOKIE`, Linux 5.14).
///
/// A cookie is unique for as long as the machine runs: unlike the inode of a namespace it is never given again.
///
/// # Errors
/// `ENOTSOCK` when it is no socket, `ENOPROTOOPT` on an older kernel.
pub fn netns_cookie(socket: impl AsFd) -> io::Result<u64> {
    let socket = socket.as_fd();
    let mut cookie = 0_u64;
    let mut length: libc::socklen_t = 8;
    // SAFETY: `getsockopt` writes at most `length` bytes to its fourth argument and then the number written to its
    // fifth. The fourth points to `cookie`, which is 8 bytes, aligned and writable, and `length` says 8; the fifth
    // points to `length`. Both live beyond the call, and nothing else refers to them. `socket` is borrowed for the
    // whole call, so its number stays that of the same open file.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(cookie)
}
