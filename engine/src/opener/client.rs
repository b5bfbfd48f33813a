//! The client side: starts an opener, or requests one from a helper, or connects to an agent; gets the descriptors of an
//! upstream from it, and checks them.
//!
//! The caller that adds an upstream holds an [`Opener`] while it requests the descriptors of
//! [`Command::AddUpstream`](crate::command::Command::AddUpstream), and passes those to the engine. From then on only the
//! engine's channels keep the process alive. The shards of the engine use [`ask`] and [`take`], which never wait.

mod agent;
pub(crate) mod answers;
mod helper;

use std::io;
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::fs::{Mode, OFlags, PROC_SUPER_MAGIC};
use rustix::io::Errno;
use rustix::net::{AddressFamily, netlink, sockopt};
use rustix::process::{Pid, PidfdFlags};

use super::{Answer, Failure, FailureKind, Request, TargetKind, VERB};
use crate::channel::{self, Channel, ChannelError};
use crate::command::{Family, WatchSources};
use crate::sys::{SocketFacts, netns_cookie};
pub use answers::{StockError, ask, take};
pub use helper::helper_listens;

/// Time limit for an answer. An opener needs a millisecond; a machine that swaps needs longer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// The namespace that an opener enters.
#[derive(Debug)]
pub enum Target {
    /// A pidfd.
    Process(OwnedFd),
    /// An open file of a network namespace.
    Path(OwnedFd),
}

impl Target {
    /// Returns the network namespace of a running process.
    ///
    /// # Errors
    /// [`OpenError::Refused`] with [`FailureKind::Gone`] when no such process runs.
    pub fn process(pid: u32) -> Result<Target, OpenError> {
        let known = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(Errno::SRCH);
        match known.and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty())) {
            Ok(pidfd) => Ok(Target::Process(pidfd)),
            Err(Errno::SRCH) => Err(refused(FailureKind::Gone, format!("there is no process {pid}"))),
            // The number belongs to a thread that is not the first thread of its process.
            Err(Errno::INVAL | Errno::NOENT) => {
                Err(refused(FailureKind::Other, format!("{pid} is the id of a thread, not of a process")))
            }
            Err(errno) => {
                let what = format!("process {pid} cannot be opened");
                Err(OpenError::Refused(Failure::from_io(&what, &errno.into())))
            }
        }
    }

    /// Returns the network namespace of the file `path`, such as `/run/netns/NAME`.
    ///
    /// # Errors
    /// [`OpenError::Refused`] if it cannot be opened. Entering it shows whether it is a namespace.
    pub fn path(path: &Path) -> Result<Target, OpenError> {
        // Without O_NONBLOCK, opening a FIFO would wait for its writer.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        rustix::fs::open(path, flags, Mode::empty()).map(Target::Path).map_err(|errno| {
            let what = format!("{} cannot be opened", path.display());
            OpenError::Refused(Failure::from_io(&what, &errno.into()))
        })
    }
}

/// The reason why an opener could not be started or did not carry out a request.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The program could not be started.
    #[error("{} could not be started to enter the namespace: {source}", program.display())]
    Spawn {
        /// The program.
        program: PathBuf,
        /// The error.
        source: io::Error,
    },
    /// The opener refused the request.
    #[error("{0}")]
    Refused(Failure),
    /// The agent could not be reached or did not carry out a request.
    #[error("the agent at {}: {source}", socket.display())]
    Agent {
        /// The expected place of its socket.
        socket: PathBuf,
        /// The error.
        source: Box<OpenError>,
    },
    /// The helper, which starts openers for this user, is unavailable. Refusals of an opener that it started are
    /// [`OpenError::Refused`].
    #[error("the helper at {}: {source}", socket.display())]
    Helper {
        /// The expected place of its socket.
        socket: PathBuf,
        /// The error.
        source: Box<OpenError>,
    },
    /// The opener did not answer in time.
    #[error("the program inside did not answer within {} s", ANSWER_TIMEOUT.as_secs())]
    TimedOut,
    /// The opener ended without an answer.
    #[error("the program inside ended without an answer")]
    Ended,
    /// The answer does not fit the request.
    #[error("the program inside gave an invalid answer: {0}")]
    InvalidAnswer(String),
    /// The channel failed.
    #[error("the channel to the program inside failed: {0}")]
    Channel(ChannelError),
}

impl OpenError {
    /// Returns the kind of the refusal, if the error is one.
    pub fn kind(&self) -> Option<FailureKind> {
        match self {
            OpenError::Refused(failure) => Some(failure.kind),
            OpenError::Agent { source, .. } => source.kind(),
            _ => None,
        }
    }
}

impl From<ChannelError> for OpenError {
    fn from(error: ChannelError) -> OpenError {
        match error {
            ChannelError::TimedOut => OpenError::TimedOut,
            ChannelError::Gone => OpenError::Ended,
            ChannelError::Cut { .. } | ChannelError::Malformed(_) => {
                OpenError::InvalidAnswer(error.to_string())
            }
            other => OpenError::Channel(other),
        }
    }
}

fn refused(kind: FailureKind, detail: String) -> OpenError {
    OpenError::Refused(Failure { kind, detail })
}

/// An opener or an agent that is inside the namespace, with the first channel to it.
///
/// Dropping it closes only that channel: an opener lives while another channel is open.
#[derive(Debug)]
pub struct Opener {
    channel: Channel,
    netns_inode: u64,
    netns_cookie: u64,
}

impl Opener {
    /// Starts `program`, a landfall binary (such as `/proc/self/exe`), as an opener, and waits until it is inside.
    ///
    /// The process gets an empty environment and no standard error, since it may outlive the reader of the caller's. It gets a
    /// process group of its own, so that a Ctrl-C in our terminal does not end it. A small thread waits for its end, so that
    /// it does not stay a zombie.
    ///
    /// # Errors
    /// See [`OpenError`]; the process has then ended.
    pub fn spawn(program: &Path, target: Target) -> Result<Opener, OpenError> {
        let no_start = |source| OpenError::Spawn { program: program.to_owned(), source };
        let (ours, theirs) = Channel::pair().map_err(no_start)?;
        let mut child = Command::new(program)
            .arg0("landfall")
            .arg(VERB)
            .env_clear()
            .current_dir("/")
            .process_group(0)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(no_start)?;
        match Opener::over(ours, &target) {
            Ok(opener) => {
                reap(child).map_err(no_start)?;
                Ok(opener)
            }
            Err(error) => {
                // The process is our unreaped child, so its id cannot have been reused. It may have ended already.
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    /// Sends `target` to the opener at the other end of `channel`, which another process started, and waits until the opener
    /// is inside.
    ///
    /// # Errors
    /// See [`OpenError`]; the channel is then closed, which ends the opener.
    pub fn over(channel: Channel, target: &Target) -> Result<Opener, OpenError> {
        let (netns_inode, netns_cookie) = enter(&channel, target)?;
        Ok(Opener { channel, netns_inode, netns_cookie })
    }

    /// Returns the inode of the namespace.
    pub fn netns_inode(&self) -> u64 {
        self.netns_inode
    }

    /// Returns the cookie of the namespace (`SO_NETNS_COOKIE`).
    pub fn netns_cookie(&self) -> u64 {
        self.netns_cookie
    }

    /// Returns the descriptors of [`Command::AddUpstream`](crate::command::Command::AddUpstream) in its order: a channel for
    /// each of `shards` shards, then the sources that this kernel has.
    ///
    /// # Errors
    /// See [`OpenError`]. A missing source is not an error.
    pub fn upstream(&mut self, shards: u16) -> Result<(WatchSources, Vec<OwnedFd>), OpenError> {
        let mut descriptors = Vec::new();
        for _ in 0..shards {
            let (answer, mut received) = self.request(&Request::Channel)?;
            match (answer, received.pop()) {
                (Answer::Channel, Some(end)) if received.is_empty() && channel::is_channel(end.as_fd()) => {
                    descriptors.push(end);
                }
                (answer, _) => return Err(unexpected(answer)),
            }
        }
        let mut sources = self.proc_net(&mut descriptors)?;
        sources.sock_diag = self.sock_diag(&mut descriptors)?;
        Ok((sources, descriptors))
    }

    /// Returns a socket that listens inside on the loopback address of a family, and its port. `port` 0 means any free port.
    ///
    /// # Errors
    /// See [`OpenError`]; [`FailureKind::InUse`] if another socket has the port.
    pub fn listen(&mut self, family: Family, port: u16) -> Result<(OwnedFd, NonZeroU16), OpenError> {
        let (answer, mut received) = self.request(&Request::Listen { family, port })?;
        let (Answer::Listening, Some(socket)) = (&answer, received.pop()) else {
            return Err(unexpected(answer));
        };
        let facts = SocketFacts::of(&socket);
        let local = facts.local.and_then(|local| Some((local, NonZeroU16::new(local.port())?)));
        let is_requested = |(local, found): (SocketAddr, NonZeroU16)| {
            (port == 0 || found.get() == port) && local == family.loopback(found)
        };
        let ours = facts.listens && facts.is_tcp && facts.nonblocking;
        match local.filter(|local| received.is_empty() && ours && is_requested(*local)) {
            Some((_, found)) if facts.netns_cookie == Some(self.netns_cookie) => Ok((socket, found)),
            _ => Err(OpenError::InvalidAnswer(
                "this is not the listening socket that was asked for".to_owned(),
            )),
        }
    }

    fn proc_net(&mut self, descriptors: &mut Vec<OwnedFd>) -> Result<WatchSources, OpenError> {
        let (answer, received) = self.request(&Request::ProcNet)?;
        let sources = match answer {
            Answer::ProcNet { tcp, tcp6 } => {
                WatchSources { proc_tcp: tcp, proc_tcp6: tcp6, sock_diag: false }
            }
            Answer::Failed { failure } if failure.kind != FailureKind::Exhausted => WatchSources::default(),
            other => return Err(unexpected(other)),
        };
        let in_proc =
            |file: &OwnedFd| rustix::fs::fstatfs(file).is_ok_and(|fs| fs.f_type == PROC_SUPER_MAGIC);
        if received.len() != sources.count() || !received.iter().all(in_proc) {
            return Err(OpenError::InvalidAnswer("these are not the files of /proc/net".to_owned()));
        }
        descriptors.extend(received);
        Ok(sources)
    }

    fn sock_diag(&mut self, descriptors: &mut Vec<OwnedFd>) -> Result<bool, OpenError> {
        let (answer, received) = self.request(&Request::SockDiag)?;
        match answer {
            Answer::SockDiag => {}
            Answer::Failed { failure } if failure.kind != FailureKind::Exhausted => return Ok(false),
            other => return Err(unexpected(other)),
        }
        let is_diag = |socket: &OwnedFd| {
            sockopt::socket_domain(socket) == Ok(AddressFamily::NETLINK)
                && sockopt::socket_protocol(socket) == Ok(Some(netlink::SOCK_DIAG))
                && netns_cookie(socket).is_ok_and(|cookie| cookie == self.netns_cookie)
        };
        if received.len() != 1 || !received.iter().all(is_diag) {
            return Err(OpenError::InvalidAnswer(
                "this is not a sock_diag socket of the namespace".to_owned(),
            ));
        }
        descriptors.extend(received);
        Ok(true)
    }

    fn request(&mut self, request: &Request) -> Result<(Answer, Vec<OwnedFd>), OpenError> {
        // `/proc/net` is two files; all other answers have at most one descriptor.
        exchange(&self.channel, request, &[], 2)
    }
}

/// Sends one request and waits for its answer, which may carry at most `received_max` descriptors.
fn exchange(
    channel: &Channel,
    request: &Request,
    descriptors: &[BorrowedFd<'_>],
    received_max: usize,
) -> Result<(Answer, Vec<OwnedFd>), OpenError> {
    channel.send_timeout(request, descriptors, ANSWER_TIMEOUT)?;
    let (answer, received) = channel.recv_timeout(ANSWER_TIMEOUT)?.ok_or(OpenError::Ended)?;
    let allowed = if matches!(answer, Answer::Failed { .. }) { 0 } else { received_max };
    match received.len() {
        count if count > allowed => Err(OpenError::InvalidAnswer(format!(
            "it carries {count} descriptors instead of at most {allowed}"
        ))),
        _ => Ok((answer, received)),
    }
}

/// Sends the target. Returns the inode and the cookie of the namespace that the opener entered.
fn enter(channel: &Channel, target: &Target) -> Result<(u64, u64), OpenError> {
    let (kind, descriptor) = match target {
        Target::Process(pidfd) => (TargetKind::Process, pidfd),
        Target::Path(file) => (TargetKind::Path, file),
    };
    match exchange(channel, &Request::Enter { target: kind }, &[descriptor.as_fd()], 0)?.0 {
        Answer::Entered { netns_inode, netns_cookie } => Ok((netns_inode, netns_cookie)),
        other => Err(unexpected(other)),
    }
}

fn unexpected(answer: Answer) -> OpenError {
    match answer {
        Answer::Failed { failure } => OpenError::Refused(failure),
        other => OpenError::InvalidAnswer(format!("{other:?}")),
    }
}

/// Waits for the end of `child` on a thread of its own.
fn reap(mut child: Child) -> io::Result<()> {
    let thread = std::thread::Builder::new().name("opener-reaper".to_owned()).stack_size(64 * 1024);
    // If the thread cannot be started, the caller drops the channel, which ends the process.
    thread.spawn(move || child.wait()).map(drop)
}

#[cfg(test)]
mod tests;
