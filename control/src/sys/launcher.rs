//! The launcher of a root daemon, as the daemon sees it: the only process that keeps capabilities, and the requests to
//! it.
//!
//! # Processes
//!
//! The daemon parses what containers, Docker and local programs send. If root runs it, it first starts `landfall
//! _launcher` ([`crate::daemon::launcher`]), a child with one socket to it, and then drops every capability for good.
//! The launcher performs what needs a capability, on requests that this file defines and that the launcher checks:
//!
//! | Request | Result |
//! | --- | --- |
//! | [`Request::Opener`] | an opener, which drops its capabilities once it is inside a namespace |
//! | [`Request::Engine`] | an engine, which drops its capabilities before it serves ([`landfall_engine::process::confinement`]) |
//! | [`Request::Command`] | a command of a folder, whose approval the launcher verifies itself against `trust.json` |
//! | [`Request::Owners`] | the processes that hold sockets |
//! | [`Request::Namespace`] | the file of a process's network namespace |
//!
//! A daemon of an ordinary user has no launcher and does all of this itself; so does a daemon of a uid 0 that has no
//! capability anyway.
//!
//! # Protocol
//!
//! A request is one datagram (`SOCK_SEQPACKET`, JSON) with the end of a new channel for the answer, so that requests do not
//! wait for each other and a caller that gives up closes its channel. The launcher ends when the daemon's end of the main
//! channel is closed, that is with the daemon.
//!
//! # Limits
//!
//! An attacker who controls the daemon still is uid 0 and owns root's files, but cannot trace or change processes of
//! other users, load a module, mount, open raw sockets or change the network.
//!
//! A process that has dropped its capabilities cannot start another launcher. If the launcher ends before the daemon,
//! the daemon reports that, keeps its present forwards, and is replaced by the next `landfall up`.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use landfall_engine::channel::{Channel, ChannelError};
use landfall_engine::opener::client::{OpenError, Opener, Target};
use landfall_engine::process::privileges::drop_capabilities;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::thread::CapabilitySet;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::io::Interest;

use crate::model::registration::ContainerName;
use crate::sys::paths::{Home, identity_of_file};
use crate::sys::processes::{self, ProcessFact};
use crate::sys::readiness::watched;
use crate::version;

/// The hidden verb of the launcher.
pub(crate) const VERB: &str = "_launcher";
/// The program of the launcher, and of the processes that it starts: this one.
pub(crate) const PROGRAM: &str = "/proc/self/exe";
/// The environment of the launcher, which the commands of folders and the engine inherit.
const ENVIRONMENT: [&str; 4] = ["PATH", "HOME", "RUST_BACKTRACE", version::VARIABLE];
/// The longest wait for an answer. A walk over all processes takes tens of milliseconds.
pub(crate) const ANSWER_MAX: Duration = Duration::from_secs(10);
/// The most sockets in one request.
pub(crate) const OWNERS_MAX: usize = 1_024;

/// A request. Its first descriptor is the end of the channel for the answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "launch", rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Request {
    /// Starts an opener whose channel the descriptor is. The opener itself answers.
    Opener {},
    /// Starts an engine; the second descriptor is its log. Answer: [`Reply::Started`] with a pidfd.
    Engine {
        /// The name of its socket in the home's `run` directory.
        socket: String,
    },
    /// Runs a command of a folder. The second descriptor is its output, standard output and standard error. It is killed with its
    /// process group when the channel for the answer is closed. Answer: [`Reply::Started`], then [`Reply::Exited`].
    Command {
        /// The command.
        invocation: Invocation,
        /// The content of the folder's `landfall.toml`, which has to be approved and to have the command.
        settings: String,
    },
    /// Finds the processes that hold sockets. Answer: [`Reply::Owner`] for each that was found, then [`Reply::Done`].
    Owners {
        /// Inodes of sockets, at most [`OWNERS_MAX`].
        inodes: Vec<u64>,
    },
    /// Opens the file of a process's network namespace. Answer: [`Reply::Done`] with the descriptor.
    Namespace {
        /// Such as `/proc/PID/ns/net`.
        path: PathBuf,
    },
}

/// One run of a command of a folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Invocation {
    /// The program and its arguments.
    pub(crate) words: Vec<String>,
    /// The working directory: the canonical folder.
    pub(crate) folder: PathBuf,
    /// The container that the command is for.
    pub(crate) container: ContainerName,
    /// For a command of a restart: whether the image is built again.
    pub(crate) build: Option<bool>,
}

/// An answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub(crate) enum Reply {
    /// The process runs. For an engine, its pidfd is attached.
    Started,
    /// The process has ended.
    Exited {
        /// The status of `wait(2)`.
        status: i32,
    },
    /// A process that holds a socket.
    Owner {
        /// The socket.
        inode: u64,
        /// Its process.
        process: ProcessFact,
    },
    /// The request is complete.
    Done,
    /// The request was refused.
    Refused {
        /// The reason.
        refusal: Refusal,
    },
}

/// The reason that the launcher refused a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Error)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Refusal {
    /// The limit of concurrent requests of this kind is reached.
    #[error("{0} requests of this kind run already")]
    Busy(usize),
    /// The request has other descriptors or values than its kind takes.
    #[error("the request is not valid")]
    Invalid,
    /// The settings are not approved, or do not have the command.
    #[error("the command is not approved")]
    NotApproved,
    /// The program does not exist.
    #[error("the program was not found")]
    NotFound,
    /// The program is in the folder, whose files are not trusted.
    #[error("the program is in the folder")]
    InFolder,
    /// A system call failed.
    #[error("{what}: {detail}")]
    System {
        /// The step.
        what: String,
        /// The kernel's answer.
        detail: String,
    },
}

impl Refusal {
    /// Creates the refusal for a failed system call; `what` is the step.
    pub(crate) fn system(what: &str, error: &io::Error) -> Refusal {
        Refusal::System { what: what.to_owned(), detail: error.to_string() }
    }
}

/// The reason that a request to the launcher failed.
#[derive(Debug, Error)]
pub(crate) enum LauncherError {
    /// It has ended. The text has the remedy, since every later request fails as well.
    #[error("the launcher of this daemon has ended; run `landfall up` to replace the daemon")]
    Gone,
    /// It refused.
    #[error("the launcher: {0}")]
    Refused(#[from] Refusal),
    /// The channel failed, or no answer arrived in time.
    #[error("the launcher: {0}")]
    Channel(ChannelError),
    /// The answer does not fit the request.
    #[error("the launcher sent an unexpected answer")]
    Unexpected,
}

impl From<ChannelError> for LauncherError {
    fn from(error: ChannelError) -> LauncherError {
        match error {
            ChannelError::Gone => LauncherError::Gone,
            error => LauncherError::Channel(error),
        }
    }
}

/// The launcher of this process. There is at most one. It is started before the first thread: capabilities belong to
/// threads, so only then does dropping them affect the whole process.
static LAUNCHER: OnceLock<Launcher> = OnceLock::new();

/// Returns the launcher of this process, if it has one.
pub(crate) fn launcher() -> Option<&'static Launcher> {
    LAUNCHER.get()
}

/// Starts a launcher and drops every capability of this process, if the process runs as root and has any. Call it
/// first, while the process has one thread.
///
/// # Errors
/// The launcher could not be started, or capabilities could not be dropped.
pub(crate) fn split(home: &Home) -> io::Result<()> {
    let has_privilege = !rustix::thread::capabilities(None)?.permitted.is_empty();
    if !rustix::process::geteuid().is_root() || !has_privilege {
        return Ok(());
    }
    let launcher = Launcher::start(home)?;
    drop_capabilities(CapabilitySet::empty())?;
    // It is unset: this is the only place that sets it, and it runs once.
    let _ = LAUNCHER.set(launcher);
    Ok(())
}

/// The daemon's end of a launcher.
#[derive(Debug)]
pub(crate) struct Launcher {
    channel: Channel,
    /// Taken by the task that waits for its end.
    child: Mutex<Option<Child>>,
    has_ended: AtomicBool,
}

/// Whether the launcher of a daemon runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LauncherState {
    /// It runs.
    Running,
    /// It has ended. The daemon keeps its present forwards; operations that need a capability fail.
    Ended,
}

/// Returns the state of this process's launcher, if it has one.
pub(crate) fn state() -> Option<LauncherState> {
    let has_ended = launcher()?.has_ended.load(Ordering::Acquire);
    Some(if has_ended { LauncherState::Ended } else { LauncherState::Running })
}

impl Launcher {
    fn start(home: &Home) -> io::Result<Launcher> {
        let (ours, theirs) = Channel::pair()?;
        let kept = ENVIRONMENT.iter().filter_map(|name| Some((*name, std::env::var_os(name)?)));
        let child = Command::new(PROGRAM)
            .arg0("landfall")
            .arg(VERB)
            .arg("--home")
            .arg(home.root())
            .env_clear()
            .envs(kept)
            .current_dir("/")
            // A Ctrl-C for the daemon must not end the launcher, which the daemon may need for an orderly stop.
            .process_group(0)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .spawn()?;
        Ok(Launcher { channel: ours, child: Mutex::new(Some(child)), has_ended: AtomicBool::new(false) })
    }

    /// Waits until the launcher has ended. Call it once, from the runtime.
    pub(crate) async fn ended(&self) {
        let child = self.child.lock().unwrap_or_else(PoisonError::into_inner).take();
        // The launcher sends nothing on this channel, so it becomes readable when its end closes.
        let socket = self.channel.as_fd().try_clone_to_owned().and_then(|channel| {
            rustix::io::ioctl_fionbio(&channel, true)?;
            watched(channel, Interest::READABLE)
        });
        let Ok(watched) = socket else { return std::future::pending().await };
        let _ = watched.readable().await;
        self.has_ended.store(true, Ordering::Release);
        if let Some(mut child) = child {
            // It has closed its end, so it has ended or is about to end.
            let _ = tokio::task::spawn_blocking(move || child.wait()).await;
        }
    }

    /// Starts an opener and waits until it is inside `target`. Waits for some seconds at most.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub(crate) fn opener(&self, target: &Target) -> Result<Opener, OpenError> {
        let failed = |error: LauncherError| OpenError::Spawn {
            program: PathBuf::from(PROGRAM),
            source: io::Error::other(error.to_string()),
        };
        let channel = self.ask(&Request::Opener {}, &[]).map_err(failed)?;
        Opener::over(channel, target)
    }

    /// Starts an engine that listens at `socket` in the home's `run` directory. Returns its pidfd.
    pub(crate) fn engine(&self, socket: &str, log: BorrowedFd<'_>) -> Result<OwnedFd, LauncherError> {
        let channel = self.ask(&Request::Engine { socket: socket.to_owned() }, &[log])?;
        match answer(&channel)? {
            (Reply::Started, Some(pidfd)) => Ok(pidfd),
            _ => Err(LauncherError::Unexpected),
        }
    }

    /// Starts a command of a folder, which writes to `output`. Returns the channel that reports its end.
    pub(crate) fn command(
        &self,
        invocation: Invocation,
        settings: String,
        output: BorrowedFd<'_>,
    ) -> Result<Channel, LauncherError> {
        let channel = self.ask(&Request::Command { invocation, settings }, &[output])?;
        match answer(&channel)?.0 {
            Reply::Started => Ok(channel),
            _ => Err(LauncherError::Unexpected),
        }
    }

    /// Finds the processes that hold sockets: for each inode the one with the lowest id.
    pub(crate) fn owners(&self, inodes: &[u64]) -> Result<BTreeMap<u64, ProcessFact>, LauncherError> {
        let mut owners = BTreeMap::new();
        for inodes in inodes.chunks(OWNERS_MAX) {
            let channel = self.ask(&Request::Owners { inodes: inodes.to_vec() }, &[])?;
            loop {
                match answer(&channel)?.0 {
                    Reply::Owner { inode, process } => drop(owners.insert(inode, process)),
                    Reply::Done => break,
                    _ => return Err(LauncherError::Unexpected),
                }
            }
        }
        Ok(owners)
    }

    /// Opens the file of a process's network namespace.
    fn namespace(&self, path: &Path) -> Result<OwnedFd, LauncherError> {
        let channel = self.ask(&Request::Namespace { path: path.to_owned() }, &[])?;
        match answer(&channel)? {
            (Reply::Done, Some(file)) => Ok(file),
            _ => Err(LauncherError::Unexpected),
        }
    }

    /// Sends a request. Returns the channel for its answer.
    fn ask(&self, request: &Request, more: &[BorrowedFd<'_>]) -> Result<Channel, LauncherError> {
        let (ours, theirs) = Channel::pair().map_err(ChannelError::System)?;
        let descriptors: Vec<BorrowedFd<'_>> =
            std::iter::once(theirs.as_fd()).chain(more.iter().copied()).collect();
        self.channel.send_timeout(request, &descriptors, ANSWER_MAX)?;
        Ok(ours)
    }
}

/// Waits for the next part of an answer, with at most one descriptor.
fn answer(channel: &Channel) -> Result<(Reply, Option<OwnedFd>), LauncherError> {
    match channel.recv_timeout(ANSWER_MAX)?.ok_or(LauncherError::Gone)? {
        (Reply::Refused { refusal }, _) => Err(refusal.into()),
        (reply, mut descriptors) => Ok((reply, descriptors.pop())),
    }
}

/// Starts an opener that enters `target`, through the launcher if this process has one. Waits for some seconds at most.
///
/// # Errors
/// See [`OpenError`].
pub(crate) fn opener(target: Target) -> Result<Opener, OpenError> {
    match launcher() {
        Some(launcher) => launcher.opener(&target),
        None => Opener::spawn(Path::new(PROGRAM), target),
    }
}

/// Finds the processes that hold sockets, through the launcher if this process has one: the kernel shows descriptors
/// only to a process that may trace their holder. For each inode the process with the lowest id.
pub(crate) fn owners_of_sockets(inodes: &[u64]) -> BTreeMap<u64, ProcessFact> {
    let by_launcher =
        launcher().filter(|_| !inodes.is_empty()).and_then(|launcher| launcher.owners(inodes).ok());
    by_launcher.unwrap_or_else(|| processes::owners_of_sockets(inodes))
}

/// Opens the network namespace at `path`, through the launcher if this process may not open it itself: the kernel shows
/// `/proc/PID/ns` only to a process that may trace that one (`ptrace(2)`).
///
/// # Errors
/// Those of [`Target::path`].
pub(crate) fn open_namespace(path: &Path) -> Result<OwnedFd, OpenError> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let by_launcher = match (launcher(), rustix::fs::open(path, flags, Mode::empty())) {
        (Some(launcher), Err(Errno::ACCESS | Errno::PERM)) => launcher.namespace(path).ok(),
        _ => None,
    };
    match by_launcher.map_or_else(|| Target::path(path), |file| Ok(Target::Path(file)))? {
        Target::Path(file) | Target::Process(file) => Ok(file),
    }
}

/// Returns device and inode of the network namespace at a path, as [`open_namespace`] opens it; `None` if it cannot be
/// opened.
pub(crate) async fn identity_of_namespace(path: &Path) -> Option<(u64, u64)> {
    let found = identity_of_file(path);
    if found.is_some() || launcher().is_none() {
        return found;
    }
    let path = path.to_owned();
    let opened = tokio::task::spawn_blocking(move || open_namespace(&path)).await.ok()?;
    let about = rustix::fs::fstat(opened.ok()?).ok()?;
    Some((about.st_dev, about.st_ino))
}
