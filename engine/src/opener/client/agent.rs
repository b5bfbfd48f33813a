//! Connections to an untrusted agent, by its socket in a directory that the host and the container share.
//!
//! The container can replace any file of the directory at any time. So the socket is opened once, without following links
//! (`openat2(2)`, `RESOLVE_NO_SYMLINKS`, `RESOLVE_BENEATH`), its type is checked, and the connection is made to the open
//! file (`/proc/self/fd`, `unix_find_bsd()` in net/unix/af_unix.c). A file that replaces it afterwards is never used. A
//! container cannot create a hard link to a socket of the host, since its mount ends at the directory (`EXDEV`).
//!
//! The agent's claim about its namespace is verified with a socket created there. Files of `/proc` are not requested: one
//! that the container serves (FUSE) could block the watch for any time, which is impossible with a netlink socket and
//! `MSG_DONTWAIT`.
//!
//! Unwanted descriptors from an agent have to be closed, and the close of a file may wait for the process that serves it. So
//! a caller makes one call at a time for each directory, on a thread that may wait.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::{OpenError, Opener, StockError, exchange, refused, take, unexpected};
use crate::channel::{Channel, ChannelError};
use crate::command::{Family, WatchSources};
use crate::opener::{AGENT_SOCKET, Answer, Failure, FailureKind, Request};
use crate::sys::netns_cookie;

/// The error text for a container in our own namespace.
pub(super) const OWN_NAMESPACE: &str =
    "it shares our own network namespace (host networking), so its ports are already reachable";

impl Opener {
    /// Connects to the agent whose socket is [`AGENT_SOCKET`] in `directory`, requests its namespace, and verifies the
    /// answer with a socket from there. Waits for some seconds at most, except for the closing of descriptors (see the
    /// module).
    ///
    /// # Errors
    /// [`OpenError::Agent`] with the reason: [`FailureKind::Gone`] if the socket or its listener is missing,
    /// [`FailureKind::OwnNamespace`] if the agent is in our own network namespace.
    pub fn connect(directory: &Path) -> Result<Opener, OpenError> {
        introduce(directory).map_err(|source| OpenError::Agent {
            socket: directory.join(AGENT_SOCKET),
            source: Box::new(source),
        })
    }

    /// Returns the descriptors of [`Command::AddUpstream`](crate::command::Command::AddUpstream) for an
    /// [`UpstreamKind::Agent`](crate::command::UpstreamKind::Agent): this connection, whose end the agent cannot duplicate,
    /// and a `sock_diag` socket if the agent has one.
    ///
    /// # Errors
    /// See [`OpenError`]. A missing source is not an error.
    pub fn agent_upstream(&mut self) -> Result<(WatchSources, Vec<OwnedFd>), OpenError> {
        let channel = self.channel.as_fd().try_clone_to_owned().map_err(ChannelError::System)?;
        let mut descriptors = vec![channel];
        let sock_diag = self.sock_diag(&mut descriptors)?;
        Ok((WatchSources { sock_diag, ..WatchSources::default() }, descriptors))
    }
}

fn introduce(directory: &Path) -> Result<Opener, OpenError> {
    let channel = connect_socket(directory, AGENT_SOCKET, "agent")?;
    let (netns_inode, netns_cookie) = match exchange(&channel, &Request::Introduce, &[], 0)?.0 {
        Answer::Entered { netns_inode, netns_cookie } => (netns_inode, netns_cookie),
        other => return Err(unexpected(other)),
    };
    if own_cookie()? == netns_cookie {
        return Err(refused(FailureKind::OwnNamespace, OWN_NAMESPACE.to_owned()));
    }
    let mut opener = Opener { channel, netns_inode, netns_cookie };
    opener.verify_namespace()?;
    Ok(opener)
}

/// Connects to the socket `name` in `directory` without following links. `whose` names the expected listener in errors.
pub(super) fn connect_socket(directory: &Path, name: &str, whose: &str) -> Result<Channel, OpenError> {
    let failed = |what: &str, errno: Errno| OpenError::Refused(Failure::from_io(what, &errno.into()));
    let place =
        rustix::fs::open(directory, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|errno| match errno {
                Errno::NOENT => refused(FailureKind::Gone, "there is no such directory".to_owned()),
                Errno::NOTDIR => refused(FailureKind::Other, "this is a file and not a directory".to_owned()),
                errno => failed("the directory cannot be opened", errno),
            })?;
    let socket = rustix::fs::openat2(
        &place,
        name,
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS | ResolveFlags::BENEATH,
    )
    .map_err(|errno| match errno {
        Errno::NOENT => refused(FailureKind::Gone, format!("no {whose} has created its socket there")),
        errno => failed("it cannot be opened", errno),
    })?;
    let status = rustix::fs::fstat(&socket).map_err(|errno| failed("it cannot be inspected", errno))?;
    match FileType::from_raw_mode(status.st_mode) {
        FileType::Socket => {}
        FileType::Symlink => {
            return Err(refused(
                FailureKind::Other,
                "it is a symbolic link, which is not followed".to_owned(),
            ));
        }
        _ => return Err(refused(FailureKind::Other, "it is not a socket".to_owned())),
    }
    connect(&socket).map_err(|errno| match errno {
        Errno::CONNREFUSED => refused(FailureKind::Gone, format!("no {whose} listens on it")),
        Errno::PROTOTYPE => {
            refused(FailureKind::Other, "it is a socket of another type than SOCK_SEQPACKET".to_owned())
        }
        Errno::AGAIN => refused(FailureKind::Exhausted, format!("the {whose} accepts no connection")),
        Errno::NOENT => refused(FailureKind::Other, "/proc is needed to connect to it".to_owned()),
        errno => failed("it cannot be connected to", errno),
    })
}

/// Connects to an open socket file. Never waits, since an agent that does not accept would block the caller for ever.
fn connect(file: &OwnedFd) -> Result<Channel, Errno> {
    use std::os::fd::AsRawFd;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    rustix::net::connect(&socket, &SocketAddrUnix::new(&path)?)?;
    Channel::try_from(socket).map_err(|_| Errno::PROTOTYPE)
}

pub(super) fn own_cookie() -> Result<u64, OpenError> {
    // Sockets of all families have the same cookie.
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None);
    socket.map_err(std::io::Error::from).and_then(netns_cookie).map_err(|error| {
        OpenError::Refused(Failure::from_io("our own namespace has no cookie (Linux 5.14 is needed)", &error))
    })
}

impl Opener {
    /// Requests a socket and checks that it is of the namespace that the opener named.
    pub(super) fn verify_namespace(&mut self) -> Result<(), OpenError> {
        let request = Request::Sockets { family: Family::V4, count: 1, congestion: None };
        self.channel.send_timeout(&request, &[], super::ANSWER_TIMEOUT)?;
        self.channel.wait_readable(super::ANSWER_TIMEOUT)?;
        match take(self.channel.as_fd(), Family::V4, 1, self.netns_cookie) {
            Ok(Some(_)) => Ok(()),
            Ok(None) => Err(OpenError::TimedOut),
            Err(StockError::Gone) => Err(OpenError::Ended),
            Err(StockError::Exhausted(detail)) => Err(refused(FailureKind::Exhausted, detail)),
            Err(StockError::Refused(failure)) => Err(OpenError::Refused(failure)),
            Err(StockError::Hostile(what)) => Err(OpenError::InvalidAnswer(what)),
        }
    }
}
