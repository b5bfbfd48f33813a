//! The engine's process: found or started, talked to over its socket, and relieved by one of this build.
//!
//! An engine outlives its driver, so one that runs is attached first and asked what it holds. One that has to be started
//! takes the socket's name by a rename, which is how its readiness shows. It is a process of its own group that nobody
//! waits for but to reap it.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use futures_util::FutureExt;
use landfall_engine::channel::{self, ChannelError};
use landfall_engine::command::{Command, Event, RingReport};
use landfall_engine::limits::MESSAGE_BYTES_MAX;
use landfall_engine::process::confinement::Lack;
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use thiserror::Error;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};

use super::departed::{Departed, Process};
use crate::forwarding::planner::Inventory;
use crate::model::forward_table::EngineFacts;
use crate::sys::launcher::{PROGRAM, launcher};
use crate::sys::paths::{Home, identity_of_name};
use crate::sys::private_file;
use crate::sys::readiness::watched;
use crate::version;

/// How long an engine may take to begin, or to say what it holds. It takes milliseconds.
const BEGIN_MAX: Duration = Duration::from_secs(10);
/// How long an engine may not read while a command waits for it.
const SEND_MAX: Duration = Duration::from_secs(10);
/// How often the name of a starting engine is looked for.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);

/// Why there is no engine, or no longer.
#[derive(Debug, Error)]
pub(super) enum LinkError {
    #[error("the engine's socket {} cannot be used: {source}", path.display())]
    Connect { path: PathBuf, source: io::Error },
    #[error("the engine could not be started: {0}")]
    Spawn(io::Error),
    #[error("the engine ended as it began ({0}); its log is log/engine.log in the daemon's home")]
    EndedEarly(String),
    #[error("the engine did not answer within {} s", BEGIN_MAX.as_secs())]
    Silent,
    #[error("the engine ended")]
    Ended,
    #[error("the engine's channel failed: {0}")]
    Channel(#[from] ChannelError),
}

/// A channel to an engine that has said what it is.
#[derive(Debug)]
pub(super) struct Link {
    socket: AsyncFd<OwnedFd>,
    ring: RingReport,
    version: String,
    pid: Option<u32>,
    process: Option<Process>,
    /// The file of its socket.
    file: Option<(u64, u64)>,
    /// What its confinement lacks.
    pub(super) lacks: Vec<Lack>,
    /// How many opener channels it takes for one upstream.
    pub(super) shards: u16,
}

impl Link {
    /// Connects to the engine at `path`; its present driver, if any, loses its place.
    async fn connect(path: &Path) -> Result<Link, LinkError> {
        let failed = |source: io::Error| LinkError::Connect { path: path.to_owned(), source };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
            .map_err(|errno| failed(errno.into()))?;
        let address = SocketAddrUnix::new(path).map_err(|errno| failed(errno.into()))?;
        let file = identity_of_name(path);
        rustix::net::connect(&socket, &address).map_err(|errno| failed(errno.into()))?;
        // None of an engine outside of this pid namespace (`unix(7)`).
        let pid = getsockopt(&socket, PeerCredentials).ok().and_then(|peer| u32::try_from(peer.pid()).ok());
        let pid = pid.filter(|pid| *pid != 0);
        let process = pid.and_then(Process::of);
        let socket = watched(socket, Interest::READABLE | Interest::WRITABLE).map_err(failed)?;
        loop {
            match timeout(BEGIN_MAX, receive(&socket)).await.map_err(|_| LinkError::Silent)?? {
                (Event::Ready { ring, shards, version, lacks, .. }, _) => {
                    return Ok(Link { socket, ring, version, pid, process, file, lacks, shards });
                }
                _ => continue,
            }
        }
    }

    async fn send(&self, command: &Command, descriptors: &[BorrowedFd<'_>]) -> Result<(), LinkError> {
        let sending = async {
            loop {
                let mut ready = self.socket.writable().await.map_err(ChannelError::System)?;
                match channel::send(self.socket.get_ref().as_fd(), command, descriptors, SendFlags::DONTWAIT)
                {
                    Err(ChannelError::WouldBlock) => ready.clear_ready(),
                    done => return done,
                }
            }
        };
        Ok(timeout(SEND_MAX, sending).await.map_err(|_| LinkError::Silent)??)
    }

    /// Gives the engine a command, and copies of the descriptors that belong to it.
    pub(super) async fn give(&self, command: &Command, descriptors: &[OwnedFd]) -> Result<(), LinkError> {
        let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        self.send(command, &descriptors).await
    }

    /// Waits for what the engine says next. Nothing is lost when this is abandoned.
    pub(super) async fn recv(&self) -> Result<(Event, Vec<OwnedFd>), LinkError> {
        receive(&self.socket).await
    }

    /// Returns an event that has arrived, if there is one.
    pub(super) fn try_recv(&self) -> Option<Result<Event, LinkError>> {
        self.recv().now_or_never().map(|received| received.map(|(event, _)| event))
    }

    /// Asks what the engine holds.
    async fn inventory(&self) -> Result<Inventory, LinkError> {
        self.send(&Command::Describe, &[]).await?;
        let gather = async {
            let mut inventory = Inventory::default();
            loop {
                match self.recv().await?.0 {
                    Event::Observed { upstream, listening, .. } => {
                        inventory.observed.entry(upstream).or_default().extend(listening);
                    }
                    Event::State { upstreams, forwards, more } => {
                        inventory.upstreams = upstreams;
                        inventory.forwards.extend(forwards);
                        if !more {
                            return Ok(inventory);
                        }
                    }
                    // Whatever came before is contained in the answer.
                    _ => {}
                }
            }
        };
        timeout(BEGIN_MAX, gather).await.map_err(|_| LinkError::Silent)?
    }

    /// Where it is seen to end, if it can be.
    pub(super) fn process(&self) -> Option<Process> {
        self.process.clone()
    }

    /// Removes the name of its socket unless another engine has taken it. An engine of root runs as a user that may not do so
    /// itself. Call it after the command to end.
    pub(super) fn remove_name(&self, home: &Home) {
        let path = home.engine_socket();
        if self.file.is_some() && identity_of_name(&path) == self.file {
            // A name that remains leads to no engine, and the next one takes it over.
            let _ = std::fs::remove_file(path);
        }
    }

    /// Whether it is of this build, for certain.
    pub(super) fn is_ours(&self) -> bool {
        self.version == version::current() && self.version != version::UNVERSIONED
    }

    /// Its build.
    pub(super) fn version(&self) -> &str {
        &self.version
    }

    /// What people are told of it.
    pub(super) fn facts(&self, draining: u32) -> EngineFacts {
        EngineFacts {
            version: self.version.clone(),
            ring: self.ring.kind.to_string(),
            reason: self.ring.reason.clone(),
            pid: self.pid,
            draining,
        }
    }
}

async fn receive(socket: &AsyncFd<OwnedFd>) -> Result<(Event, Vec<OwnedFd>), LinkError> {
    loop {
        let mut ready = socket.readable().await.map_err(ChannelError::System)?;
        match channel::receive(socket.get_ref().as_fd(), MESSAGE_BYTES_MAX, RecvFlags::DONTWAIT) {
            Err(ChannelError::WouldBlock) => ready.clear_ready(),
            // An engine of another release may tell more than this one understands.
            Err(ChannelError::Malformed(_)) => {}
            Ok(None) | Err(ChannelError::Gone) => return Err(LinkError::Ended),
            Ok(Some(received)) => return Ok(received),
            Err(error) => return Err(error.into()),
        }
    }
}

/// An engine, and what it holds.
#[derive(Debug)]
pub(super) struct Attached {
    pub(super) link: Link,
    pub(super) inventory: Inventory,
    /// It did not run before.
    pub(super) started: bool,
}

/// Attaches to the engine that runs; where there is none, starts one if `may_start`, once the one before is gone.
pub(super) async fn obtain(
    home: &Home,
    may_start: bool,
    before: Option<Departed>,
) -> Result<Option<Attached>, LinkError> {
    let path = home.engine_socket();
    end_upgrades(home).await;
    match Link::connect(&path).await {
        Ok(link) => match link.inventory().await {
            Ok(inventory) => return Ok(Some(Attached { link, inventory, started: false })),
            // It ended just now, or another driver has taken our place: which of the two shows when it is tried again.
            Err(LinkError::Ended) => return Err(LinkError::Ended),
            Err(error) => {
                // It speaks another language. It knows how to end, and another one takes its place.
                let _ = link.send(&Command::Drain, &[]).await;
                if !may_start {
                    return Err(error);
                }
            }
        },
        // Nobody is there, or only a name that somebody left.
        Err(LinkError::Connect { source, .. }) if is_absence(&source) => {}
        Err(error) => return Err(error),
    }
    if !may_start {
        return Ok(None);
    }
    if let Some(before) = before {
        before.gone().await;
    }
    let link = start(home, &path).await?;
    Ok(Some(Attached { link, inventory: Inventory::default(), started: true }))
}

fn is_absence(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::NOENT | Errno::CONNREFUSED))
}

/// Starts an engine, which takes the name `path`, and connects to it.
async fn start(home: &Home, path: &Path) -> Result<Link, LinkError> {
    let before = identity_of_name(path);
    let mut started = spawn(home, path).await?;
    let named = async {
        loop {
            if identity_of_name(path).is_some_and(|found| Some(found) != before) {
                return;
            }
            sleep(LOOK_INTERVAL).await;
        }
    };
    tokio::select! {
        how = started.ended() => return Err(LinkError::EndedEarly(how)),
        named = timeout(BEGIN_MAX, named) => named.map_err(|_| LinkError::Silent)?,
    }
    // A child that is never waited for remains as a zombie.
    tokio::spawn(async move { started.ended().await });
    Link::connect(path).await
}

/// An engine's process that was started.
enum Started {
    Child(tokio::process::Child),
    /// By the launcher, which waits for it.
    Launched(Process),
}

impl Started {
    /// Waits for its end; how it ended, as far as that is known.
    async fn ended(&mut self) -> String {
        match self {
            Started::Child(child) => {
                child.wait().await.map_or_else(|error| error.to_string(), |status| status.to_string())
            }
            Started::Launched(process) => {
                process.ended().await;
                "at once".to_owned()
            }
        }
    }
}

async fn spawn(home: &Home, path: &Path) -> Result<Started, LinkError> {
    let log = home.log().join("engine.log");
    let log = private_file::options().append(true).create(true).open(log).map_err(LinkError::Spawn)?;
    let (Some(launcher), Some(name)) = (launcher(), path.file_name().and_then(OsStr::to_str)) else {
        let child = tokio::process::Command::new(PROGRAM)
            .arg0("landfall")
            .arg(landfall_engine::process::VERB)
            .arg("--socket")
            .arg(path)
            .current_dir("/")
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(log.try_clone().map_err(LinkError::Spawn)?)
            .stderr(log)
            .kill_on_drop(false)
            .spawn();
        return child.map(Started::Child).map_err(LinkError::Spawn);
    };
    let name = name.to_owned();
    let launched = spawn_blocking(move || launcher.engine(&name, log.as_fd())).await;
    let pidfd = launched.map_err(io::Error::other).and_then(|pidfd| pidfd.map_err(io::Error::other));
    pidfd.and_then(Process::by).map(Started::Launched).map_err(LinkError::Spawn)
}

/// What the two engines of an upgrade are called. The socket's own name leads to one that has everything, at every moment:
/// the next one starts under a name aside, and takes the socket's with one rename when it lacks nothing. A driver that is
/// killed in between leaves names that are not the socket's, and whoever has one of those is the one to end.
#[derive(Debug)]
pub(super) struct Upgrade {
    home: Home,
    next: PathBuf,
    relieved: PathBuf,
}

impl Upgrade {
    /// One of this process. Nothing has a name yet.
    pub(super) fn new(home: &Home) -> Upgrade {
        // No two processes have the same names aside, as an engine whose driver was killed may take its own one late.
        let aside = |mark: char| home.engine_socket().with_extension(format!("{}{mark}", std::process::id()));
        Upgrade { home: home.clone(), next: aside(NEXT), relieved: aside(RELIEVED) }
    }

    /// Starts the next engine.
    pub(super) async fn start(&self) -> Result<Link, LinkError> {
        start(&self.home, &self.next).await
    }

    /// The next engine is the one from here on; the other one keeps a name aside until it was told to end.
    pub(super) fn hand_over(&self) -> io::Result<()> {
        let path = self.home.engine_socket();
        match std::fs::remove_file(&self.relieved) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        std::fs::hard_link(&path, &self.relieved)?;
        std::fs::rename(&self.next, &path)
    }

    /// The older engine was told to end.
    pub(super) fn finish(self) -> io::Result<()> {
        std::fs::remove_file(&self.relieved)
    }
}

/// The ends of the names aside.
const NEXT: char = '+';
const RELIEVED: char = '-';

/// Ends the engines that upgrades have left which were killed: the one that did not take the socket's name yet, or the
/// one that had it before.
async fn end_upgrades(home: &Home) {
    let path = home.engine_socket();
    let Ok(entries) = std::fs::read_dir(home.run()) else { return };
    let is_aside = |aside: &PathBuf| {
        let extension = aside.extension().and_then(OsStr::to_str);
        aside.file_stem() == path.file_stem()
            && extension.is_some_and(|name| name.ends_with([NEXT, RELIEVED]))
    };
    for aside in entries.flatten().map(|entry| entry.path()).filter(is_aside) {
        // Killed before the names were exchanged, the older one has both.
        if identity_of_name(&aside) != identity_of_name(&path)
            && let Ok(left) = Link::connect(&aside).await
        {
            let _ = left.send(&Command::Drain, &[]).await;
        }
        // A name that cannot be removed leads to nobody.
        let _ = std::fs::remove_file(&aside);
    }
}
