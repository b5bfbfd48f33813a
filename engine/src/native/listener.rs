//! The supervisor's record of one native listener.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::sockopt;

use super::NativeListener;
use super::decision::Holder;
use super::tracee;
use crate::command::ForwardId;

/// A native listener.
pub(super) struct Native {
    pub(super) listener: NativeListener,
    /// The server's own socket, which listens in the sandbox.
    pub(super) stub: OwnedFd,
    /// `SO_COOKIE` of the stub.
    pub(super) stub_cookie: u64,
    /// `SO_COOKIE` of the host's socket.
    pub(super) cookie: u64,
    /// The descriptors that were replaced with the host's socket.
    pub(super) holders: Vec<Holder>,
    /// The host's socket, for later children of `ancestors`.
    pub(super) retained: Option<OwnedFd>,
    /// Processes that hold the stub.
    pub(super) ancestors: Vec<Holder>,
    pub(super) clients: Clients,
}

/// The state of a stub's clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Clients {
    /// No client has come.
    Awaited,
    /// The engine accepts them.
    Relayed(ForwardId),
    /// They wait in the queue of the stub: the engine could not be started.
    Stuck,
}

impl Native {
    /// Duplicates the host's socket from any process that holds it.
    pub(super) fn host_socket(&self) -> Option<OwnedFd> {
        if let Some(retained) = &self.retained {
            return retained.try_clone().ok();
        }
        let taken = self.holders.iter().filter_map(|holder| tracee::take(holder).ok());
        taken.into_iter().find(|socket| sockopt::socket_cookie(socket) == Ok(self.cookie))
    }

    /// Removes processes that no longer hold the stub. When none is left, the host's socket is no longer retained.
    pub(super) fn release(&mut self) {
        let stub = self.listener.stub_inode;
        self.ancestors.retain(|holder| tracee::still_holds(holder, stub));
        if self.ancestors.is_empty() {
            self.retained = None;
        }
    }
}

/// Makes a host socket blocking or non-blocking, like the server's own.
pub(super) fn mirror_blocking(from: &OwnedFd, to: &OwnedFd) -> Result<(), Errno> {
    use rustix::fs::OFlags;
    let blocks = !rustix::fs::fcntl_getfl(from)?.contains(OFlags::NONBLOCK);
    rustix::io::ioctl_fionbio(to, !blocks)
}

/// Returns the inode of a socket.
pub(super) fn inode(socket: &OwnedFd) -> Result<u64, Errno> {
    Ok(rustix::fs::fstat(socket)?.st_ino)
}
