//! An agent reached by its socket in a directory that it shares with us: whoever is there may be anybody.
//!
//! What a container can do to the directory is to put there what it likes at any time. So the socket is opened once, as
//! itself and not by a way that leads elsewhere (`openat2(2)`, `RESOLVE_NO_SYMLINKS`, `RESOLVE_BENEATH`), looked at, and
//! connected to by that open file (`/proc/self/fd`, `unix_find_bsd()` in net/unix/af_unix.c): nothing that is put in its
//! place afterwards is ever looked at. A hard link to a socket of ours is none that a container can make, whose mount
//! ends at the directory (`EXDEV`).
//!
//! An agent's word on where it is counts for nothing without a socket made there. Files of `/proc` are not asked for at
//! all: one that is served by the container (FUSE) could hold up the watch for as long as it likes, while nothing does that
//! to a netlink socket that is asked with `MSG_DONTWAIT`.
//!
//! What an agent hands over has to be closed where it is not wanted, and the close of a file may wait for its maker. So
//! whoever calls here lets one call for the same directory end before the next begins, on a thread that may wait.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::{OpenError, Opener, StockError, exchange, refused, take, unasked};
use crate::channel::{Channel, ChannelError};
use crate::command::{Family, WatchSources};
use crate::opener::{AGENT_SOCKET, Answer, Failure, FailureKind, Request};
use crate::sys::netns_cookie;

/// What is said of a container that is where we are.
pub(super) const OWN_NAMESPACE: &str =
    "it shares our own network namespace (host networking), where its ports answer already";

impl Opener {
    /// Connects to the agent whose socket is [`AGENT_SOCKET`] in `directory`, asks it where it is, and checks that by a socket
    /// from there. Waits for some seconds at most, but for what the module says of closing.
    ///
    /// # Errors
    /// [`OpenError::Agent`] with what was wrong: [`FailureKind::Gone`] where no agent has made its socket or none listens,
    /// [`FailureKind::OwnNamespace`] where it is in our own network namespace.
    pub fn connect(directory: &Path) -> Result<Opener, OpenError> {
        meet(directory).map_err(|source| OpenError::Agent {
            socket: directory.join(AGENT_SOCKET),
            source: Box::new(source),
        })
    }

    /// The descriptors of [`Command::AddUpstream`](crate::command::Command::AddUpstream) for an
    /// [`UpstreamKind::Agent`](crate::command::UpstreamKind::Agent): this connection, which we made and of which the agent has no
    /// copy, and a `sock_diag` socket where it has one.
    ///
    /// # Errors
    /// See [`OpenError`]. A source that is missing is no error.
    pub fn agent_upstream(&mut self) -> Result<(WatchSources, Vec<OwnedFd>), OpenError> {
        let channel = self.channel.as_fd().try_clone_to_owned().map_err(ChannelError::System)?;
        let mut descriptors = vec![channel];
        let sock_diag = self.sock_diag(&mut descriptors)?;
        Ok((WatchSources { sock_diag, ..WatchSources::default() }, descriptors))
    }
}

fn meet(directory: &Path) -> Result<Opener, OpenError> {
    let channel = knock(directory, AGENT_SOCKET, "agent")?;
    let (netns_inode, netns_cookie) = match exchange(&channel, &Request::Introduce, &[], 0)?.0 {
        Answer::Entered { netns_inode, netns_cookie } => (netns_inode, netns_cookie),
        other => return Err(unasked(other)),
    };
    if own_cookie()? == netns_cookie {
        return Err(refused(FailureKind::OwnNamespace, OWN_NAMESPACE.to_owned()));
    }
    let mut opener = Opener { channel, netns_inode, netns_cookie };
    opener.prove()?;
    Ok(opener)
}

/// Connects to the socket `name` in `directory`, on which `whose` is to listen, and to nothing that only leads to one.
pub(super) fn knock(directory: &Path, name: &str, whose: &str) -> Result<Channel, OpenError> {
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
        Errno::NOENT => refused(FailureKind::Gone, format!("no {whose} has made its socket there")),
        errno => failed("it cannot be opened", errno),
    })?;
    let status = rustix::fs::fstat(&socket).map_err(|errno| failed("it cannot be looked at", errno))?;
    match FileType::from_raw_mode(status.st_mode) {
        FileType::Socket => {}
        FileType::Symlink => {
            return Err(refused(
                FailureKind::Other,
                "it is a symbolic link, and none is followed".to_owned(),
            ));
        }
        _ => return Err(refused(FailureKind::Other, "it is not a socket".to_owned())),
    }
    connect(&socket).map_err(|errno| match errno {
        Errno::CONNREFUSED => refused(FailureKind::Gone, format!("no {whose} listens on it")),
        Errno::PROTOTYPE => {
            refused(FailureKind::Other, "it is a socket of another type than SOCK_SEQPACKET".to_owned())
        }
        Errno::AGAIN => refused(FailureKind::Exhausted, format!("the {whose} takes no connection")),
        Errno::NOENT => refused(FailureKind::Other, "/proc is needed to connect to it".to_owned()),
        errno => failed("it cannot be connected to", errno),
    })
}

/// Connects to an open socket file. Never waits: an agent that accepts nobody would make it wait for ever.
fn connect(file: &OwnedFd) -> Result<Channel, Errno> {
    use std::os::fd::AsRawFd;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    rustix::net::connect(&socket, &SocketAddrUnix::new(&path)?)?;
    Channel::try_from(socket).map_err(|_| Errno::PROTOTYPE)
}

pub(super) fn own_cookie() -> Result<u64, OpenError> {
    // The family of the socket to ask does not matter.
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None);
    socket.map_err(std::io::Error::from).and_then(netns_cookie).map_err(|error| {
        OpenError::Refused(Failure::from_io("our own namespace has no cookie (Linux 5.14 is needed)", &error))
    })
}

impl Opener {
    /// Has it hand over a socket, which must be of the namespace that it named.
    pub(super) fn prove(&mut self) -> Result<(), OpenError> {
        let request = Request::Sockets { family: Family::V4, count: 1, congestion: None };
        self.channel.send_timeout(&request, &[], super::ANSWER_TIMEOUT)?;
        self.channel.wait_readable(super::ANSWER_TIMEOUT)?;
        match take(self.channel.as_fd(), Family::V4, 1, self.netns_cookie) {
            Ok(Some(_)) => Ok(()),
            Ok(None) => Err(OpenError::Silent),
            Err(StockError::Gone) => Err(OpenError::Ended),
            Err(StockError::Exhausted(detail)) => Err(refused(FailureKind::Exhausted, detail)),
            Err(StockError::Refused(failure)) => Err(OpenError::Refused(failure)),
            Err(StockError::Hostile(what)) => Err(OpenError::Nonsense(what)),
        }
    }
}
