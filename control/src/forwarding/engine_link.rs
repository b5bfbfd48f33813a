//! The engine's process: finds or starts it, exchanges messages over its socket, and replaces it by one of this build.
//!
//! An engine outlives its driver, so a running one is attached first and asked for its inventory. An engine that is
//! started takes the socket's name by a rename, which shows that it is ready. It runs in a process group of its own;
//! its parent waits for it only to reap it.

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

/// The longest wait for an engine to start or to describe itself. Both take milliseconds.
const START_MAX: Duration = Duration::from_secs(10);
/// The longest time that a command waits because the engine does not read.
const SEND_MAX: Duration = Duration::from_secs(10);
/// The interval at which the name of a starting engine is checked.
const CHECK_INTERVAL: Duration = Duration::from_millis(5);

/// The reason that no engine is attached.
#[derive(Debug, Error)]
pub(super) enum LinkError {
    #[error("the engine's socket {} cannot be used: {source}", path.display())]
    Connect { path: PathBuf, source: io::Error },
    #[error("the engine could not be started: {0}")]
    Spawn(io::Error),
    #[error("the engine ended during its start ({0}); its log is log/engine.log in the daemon's home")]
    EndedEarly(String),
    #[error("the engine did not answer within {} s", START_MAX.as_secs())]
    Silent,
    #[error("the engine ended")]
    Ended,
    #[error("the engine's channel failed: {0}")]
    Channel(#[from] ChannelError),
}

/// A channel to an engine that has sent [`Event::Ready`].
#[derive(Debug)]
pub(super) struct Link {
    socket: AsyncFd<OwnedFd>,
    ring: RingReport,
    version: String,
    pid: Option<u32>,
    process: Option<Process>,
    /// The device and inode of its socket's file.
    file: Option<(u64, u64)>,
    /// The layers that its confinement lacks.
    pub(super) lacks: Vec<Lack>,
    /// The number of opener channels that it takes for one upstream.
    pub(super) shards: u16,
}

impl Link {
    /// Connects to the engine at `path`. Its present driver, if there is one, is disconnected.
    async fn connect(path: &Path) -> Result<Link, LinkError> {
        let failed = |source: io::Error| LinkError::Connect { path: path.to_owned(), source };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
            .map_err(|errno| failed(errno.into()))?;
        let address = SocketAddrUnix::new(path).map_err(|errno| failed(errno.into()))?;
        let file = identity_of_name(path);
        rustix::net::connect(&socket, &address).map_err(|errno| failed(errno.into()))?;
        // The id is 0 if the engine is outside of this pid namespace (`unix(7)`).
        let pid = getsockopt(&socket, PeerCredentials).ok().and_then(|peer| u32::try_from(peer.pid()).ok());
        let pid = pid.filter(|pid| *pid != 0);
        let process = pid.and_then(Process::of);
        let socket = watched(socket, Interest::READABLE | Interest::WRITABLE).map_err(failed)?;
        loop {
            match timeout(START_MAX, receive(&socket)).await.map_err(|_| LinkError::Silent)?? {
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

    /// Sends the engine a command with copies of its descriptors.
    pub(super) async fn send_command(
        &self,
        command: &Command,
        descriptors: &[OwnedFd],
    ) -> Result<(), LinkError> {
        let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        self.send(command, &descriptors).await
    }

    /// Waits for the next event of the engine. Cancel-safe: dropping the future loses no event.
    pub(super) async fn recv(&self) -> Result<(Event, Vec<OwnedFd>), LinkError> {
        receive(&self.socket).await
    }

    /// Returns an event that has arrived, if there is one.
    pub(super) fn try_recv(&self) -> Option<Result<Event, LinkError>> {
        self.recv().now_or_never().map(|received| received.map(|(event, _)| event))
    }

    /// Asks the engine for its inventory.
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
                    // The answer includes the effect of earlier events.
                    _ => {}
                }
            }
        };
        timeout(START_MAX, gather).await.map_err(|_| LinkError::Silent)?
    }

    /// The process, if its end can be awaited.
    pub(super) fn process(&self) -> Option<Process> {
        self.process.clone()
    }

    /// Removes the name of its socket unless another engine has taken it: an engine of root runs as a user that may not
    /// do so itself. Call it after sending the command to end.
    pub(super) fn remove_name(&self, home: &Home) {
        let path = home.engine_socket();
        if self.file.is_some() && identity_of_name(&path) == self.file {
            // A name that remains leads to no engine, and the next engine replaces it.
            let _ = std::fs::remove_file(path);
        }
    }

    /// Whether the engine is certainly of this build.
    pub(super) fn is_ours(&self) -> bool {
        self.version == version::current() && self.version != version::UNVERSIONED
    }

    /// The version of its build.
    pub(super) fn version(&self) -> &str {
        &self.version
    }

    /// Its description for the table of forwards.
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
            // An engine of another release may send events that this one does not know.
            Err(ChannelError::Malformed(_)) => {}
            Ok(None) | Err(ChannelError::Gone) => return Err(LinkError::Ended),
            Ok(Some(received)) => return Ok(received),
            Err(error) => return Err(error.into()),
        }
    }
}

/// An engine and its inventory.
#[derive(Debug)]
pub(super) struct Attached {
    pub(super) link: Link,
    pub(super) inventory: Inventory,
    /// Whether this call has started it.
    pub(super) started: bool,
}

/// Attaches to the running engine. If no engine runs and `may_start`, waits until the one `before` has released its
/// ports, and starts one.
pub(super) async fn attach(
    home: &Home,
    may_start: bool,
    before: Option<Departed>,
) -> Result<Option<Attached>, LinkError> {
    let path = home.engine_socket();
    end_upgrades(home).await;
    match Link::connect(&path).await {
        Ok(link) => match link.inventory().await {
            Ok(inventory) => return Ok(Some(Attached { link, inventory, started: false })),
            // Either it has just ended, or another driver has replaced this one: the next attempt finds out.
            Err(LinkError::Ended) => return Err(LinkError::Ended),
            Err(error) => {
                // The engine does not speak this protocol. It understands the command to end, and another one replaces
                // it.
                let _ = link.send(&Command::Drain, &[]).await;
                if !may_start {
                    return Err(error);
                }
            }
        },
        // No engine runs; the name may be that of one that has ended.
        Err(LinkError::Connect { source, .. }) if is_absence(&source) => {}
        Err(error) => return Err(error),
    }
    if !may_start {
        return Ok(None);
    }
    if let Some(before) = before {
        before.ports_released().await;
    }
    let link = start(home, &path).await?;
    Ok(Some(Attached { link, inventory: Inventory::default(), started: true }))
}

fn is_absence(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::NOENT | Errno::CONNREFUSED))
}

/// Starts an engine that takes the name `path`, and connects to it.
async fn start(home: &Home, path: &Path) -> Result<Link, LinkError> {
    let before = identity_of_name(path);
    let mut started = spawn(home, path).await?;
    let named = async {
        loop {
            if identity_of_name(path).is_some_and(|found| Some(found) != before) {
                return;
            }
            sleep(CHECK_INTERVAL).await;
        }
    };
    tokio::select! {
        how = started.ended() => return Err(LinkError::EndedEarly(how)),
        named = timeout(START_MAX, named) => named.map_err(|_| LinkError::Silent)?,
    }
    // A child that is never waited for remains as a zombie.
    tokio::spawn(async move { started.ended().await });
    Link::connect(path).await
}

/// The process of an engine that was started.
enum Started {
    Child(tokio::process::Child),
    /// Started by the launcher, which waits for it.
    Launched(Process),
}

impl Started {
    /// Waits for its end. Returns its exit status, if that is known.
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

/// The names of the two engines of an upgrade. At every time, the socket's own name leads to an engine that has
/// everything: the new engine starts under a temporary name, and takes the socket's by one rename when it has
/// everything. If the driver is killed in between, it leaves temporary names; the engines under those are the ones to
/// end.
#[derive(Debug)]
pub(super) struct Upgrade {
    home: Home,
    next: PathBuf,
    old: PathBuf,
}

impl Upgrade {
    /// Chooses the temporary names, which contain the id of this process. No file is created yet.
    pub(super) fn new(home: &Home) -> Upgrade {
        // The names differ between processes, as an engine whose driver was killed may still take its name later.
        let temporary =
            |mark: char| home.engine_socket().with_extension(format!("{}{mark}", std::process::id()));
        Upgrade { home: home.clone(), next: temporary(NEXT), old: temporary(OLD) }
    }

    /// Starts the new engine.
    pub(super) async fn start(&self) -> Result<Link, LinkError> {
        start(&self.home, &self.next).await
    }

    /// Gives the socket's name to the new engine. The old one keeps a temporary name until it has received the command
    /// to end.
    pub(super) fn hand_over(&self) -> io::Result<()> {
        let path = self.home.engine_socket();
        match std::fs::remove_file(&self.old) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        std::fs::hard_link(&path, &self.old)?;
        std::fs::rename(&self.next, &path)
    }

    /// Removes the temporary name of the old engine, after it has received the command to end.
    pub(super) fn finish(self) -> io::Result<()> {
        std::fs::remove_file(&self.old)
    }
}

/// The last characters of the temporary names.
const NEXT: char = '+';
const OLD: char = '-';

/// Ends the engines of upgrades that were killed: a new one that had not taken the socket's name, or an old one that
/// had lost it.
async fn end_upgrades(home: &Home) {
    let path = home.engine_socket();
    let Ok(entries) = std::fs::read_dir(home.run()) else { return };
    let is_temporary = |temporary: &PathBuf| {
        let extension = temporary.extension().and_then(OsStr::to_str);
        temporary.file_stem() == path.file_stem() && extension.is_some_and(|name| name.ends_with([NEXT, OLD]))
    };
    for temporary in entries.flatten().map(|entry| entry.path()).filter(is_temporary) {
        // If the driver was killed before the rename, both names lead to the old engine.
        if identity_of_name(&temporary) != identity_of_name(&path)
            && let Ok(left) = Link::connect(&temporary).await
        {
            let _ = left.send(&Command::Drain, &[]).await;
        }
        // A name that cannot be removed leads to no engine.
        let _ = std::fs::remove_file(&temporary);
    }
}
