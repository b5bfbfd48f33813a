//! The engine as a process of its own: commands come in and events go out over a Unix socket, to one driver at a time.
//!
//! # Drivers
//!
//! The engine outlives its driver. If a driver is killed, listeners keep listening and connections keep relaying. The next
//! driver connects, receives [`Event::Ready`], sends [`Command::Describe`], and repeats its commands. Events are not queued
//! for an absent driver but dropped: [`Event::State`] contains their result.
//!
//! There is one driver. A newer one replaces the older, which reads the end of its channel: the newest driver is the one
//! that the user wants, and a driver that hangs must not lock out its successor. Unread commands of the older one are
//! dropped.
//!
//! # The end of the process
//!
//! Only [`Event::Stopped`] ends the process; an invalid datagram is answered with [`Event::Refused`]. [`Command::Stop`] and
//! [`Command::Drain`] lead to it, and so does a long time without a driver, which causes a drain. When that starts, the
//! process releases the name of its socket, so that the next engine can take it while the connections of this one finish.
//! The connected driver stays connected until the end.
//!
//! # Threads
//!
//! The calling thread accepts drivers and reads commands. A second one forwards events, because it waits for the engine and
//! for a driver that reads slowly. A driver that does not read for [`SEND_TIMEOUT`] is disconnected.

pub mod confinement;
mod driver_slot;
pub mod privileges;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fs::{CWD, FileType, Mode, RenameFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::{Resource, Rlimit, Uid, geteuid, getrlimit, setrlimit};

use crate::channel::{Channel, ChannelError, timespec};
use crate::command::{Command, Event, EventMessage};
use driver_slot::{DriverSlot, Question};

/// The hidden verb with which the program becomes an engine.
pub const VERB: &str = "_engine";

/// Time without a driver after which the engine drains and ends: long enough to upgrade or repair a driver.
pub const IDLE_EXIT: Duration = Duration::from_secs(600);

/// Time after which a driver that does not read its events is disconnected.
pub const SEND_TIMEOUT: Duration = Duration::from_secs(10);

/// Time without accepting after descriptors ran out.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

/// A receiver of commands: the engine, or a script in tests.
pub trait Drive: Sync {
    /// Takes a command without waiting for its result. The engine checks the number of descriptors and closes those that it
    /// does not use. It reports errors by [`Event::Refused`].
    fn apply(&self, command: Command, descriptors: Vec<OwnedFd>);
}

/// The reason why the engine's process could not serve.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// The socket could not be created.
    #[error("cannot create a socket at {}: {source}", path.display())]
    Bind {
        /// The path of the socket.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
    /// A file of another kind has the name; it is not changed.
    #[error("{} exists and is not a socket; it was not changed", path.display())]
    NotASocket {
        /// The path of the socket.
        path: PathBuf,
    },
    /// The engine ended without [`Event::Stopped`].
    #[error("the engine ended by itself")]
    EngineGone,
    /// A system call failed that does not fail in practice.
    #[error("the engine's process cannot wait for its driver: {0}")]
    System(#[from] io::Error),
}

impl From<Errno> for ProcessError {
    fn from(errno: Errno) -> ProcessError {
        ProcessError::System(errno.into())
    }
}

/// Raises this process's soft limit of descriptors to its hard limit (`RLIMIT_NOFILE`); an engine in this process inherits
/// it. The usual soft limit of 1,024 exists for programs that use `select(2)`, and permits only 400 connections.
pub fn raise_descriptor_limit() {
    let maximum = getrlimit(Resource::Nofile).maximum;
    // If the kernel refuses, the engine limits its connections to the available descriptors.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}

/// The listening socket and its name. The name is removed when this is dropped, if the process may still remove it: an
/// engine that root started has changed its user by then, and its driver removes the name.
#[derive(Debug)]
pub struct CommandSocket {
    path: PathBuf,
    /// The user who created it; drivers of this user are accepted. The process may have changed to another user since.
    owner: Uid,
    /// Device and inode of the name, to detect that another socket has it.
    file: (u64, u64),
    /// `None` after the name was released.
    listener: Option<OwnedFd>,
}

impl CommandSocket {
    /// Listens at `path`, in an existing directory, for processes of this user only (mode 0600).
    ///
    /// The socket is created under a temporary name and then moved, so no process can connect before its mode is set, and
    /// the name of an engine that crashed is replaced at once. The name of a running engine is replaced, too: the driver,
    /// which has a lock for it, decides whether there may be two.
    ///
    /// # Errors
    /// [`ProcessError::NotASocket`] if a file of another kind has the name; otherwise [`ProcessError::Bind`].
    pub fn bind(path: &Path) -> Result<CommandSocket, ProcessError> {
        let failed = |errno: Errno| ProcessError::Bind { path: path.to_owned(), source: errno.into() };
        match rustix::fs::lstat(path) {
            Ok(found) if FileType::from_raw_mode(found.st_mode) != FileType::Socket => {
                return Err(ProcessError::NotASocket { path: path.to_owned() });
            }
            Ok(_) | Err(Errno::NOENT) => {}
            Err(errno) => return Err(failed(errno)),
        }
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let listener = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
            .map_err(failed)?;
        let temporary = path.with_extension(format!("{}~", std::process::id()));
        // The longer of the two names must fit, but the error names the requested one, which the user can shorten.
        let address = SocketAddrUnix::new(&temporary).map_err(failed)?;
        // Only a process with the same id can have left it.
        let _ = rustix::fs::unlink(&temporary);
        rustix::net::bind(&listener, &address).map_err(failed)?;
        let named = rustix::fs::chmod(&temporary, Mode::RUSR | Mode::WUSR)
            .and_then(|()| rustix::net::listen(&listener, 16))
            .and_then(|()| rustix::fs::lstat(&temporary))
            .and_then(|file| rustix::fs::rename(&temporary, path).map(|()| (file.st_dev, file.st_ino)));
        match named {
            Ok(file) => {
                Ok(CommandSocket { path: path.to_owned(), owner: geteuid(), file, listener: Some(listener) })
            }
            Err(errno) => {
                let _ = rustix::fs::unlink(&temporary);
                Err(failed(errno))
            }
        }
    }

    /// Stops accepting, and removes the name unless another engine has taken it.
    fn release_name(&mut self) {
        self.listener = None;
        let is_ours = |path: &Path| {
            rustix::fs::lstat(path).is_ok_and(|found| (found.st_dev, found.st_ino) == self.file)
        };
        if !is_ours(&self.path) {
            return;
        }
        // The next engine may take the name between the check and the removal. So the name is first moved to a temporary
        // one, and moved back if it belongs to the next engine. A failure here does no harm: the next engine replaces the
        // name.
        let temporary = self.path.with_extension(format!("{}~", std::process::id()));
        if rustix::fs::rename(&self.path, &temporary).is_err() {
            return;
        }
        let moved_back = !is_ours(&temporary)
            && rustix::fs::renameat_with(CWD, &temporary, CWD, &self.path, RenameFlags::NOREPLACE).is_ok();
        if !moved_back {
            let _ = rustix::fs::unlink(&temporary);
        }
    }
}

impl Drop for CommandSocket {
    fn drop(&mut self) {
        if self.listener.is_some() {
            self.release_name();
        }
    }
}

/// Serves drivers until the engine has stopped. Each driver receives `ready` first.
///
/// # Errors
/// [`ProcessError::EngineGone`] if `events` ends without [`Event::Stopped`].
pub fn serve(
    socket: CommandSocket,
    ready: &Event,
    engine: &dyn Drive,
    events: Receiver<EventMessage>,
    idle_exit: Duration,
) -> Result<(), ProcessError> {
    let ended = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let slot = DriverSlot::default();
    let (ended, slot) = (&ended, &slot);
    std::thread::scope(|scope| {
        let forwarder = scope.spawn(move || {
            let outcome = slot.forward(&events);
            // The write succeeds: the counter is zero.
            let _ = rustix::io::write(ended, &1_u64.to_ne_bytes());
            outcome
        });
        let mut reader = Reader { socket, ready, engine, slot, ended, idle_since: None, paused_until: None };
        let read = reader.run(idle_exit);
        if read.is_err() {
            // The forwarder waits for the end of the engine, and no driver can stop it any more.
            engine.apply(Command::Stop, Vec::new());
        }
        let forwarded = forwarder.join().unwrap_or(Err(ProcessError::EngineGone));
        read.and(forwarded)
    })
}

/// The thread that accepts drivers and reads their commands.
struct Reader<'a> {
    socket: CommandSocket,
    ready: &'a Event,
    engine: &'a dyn Drive,
    slot: &'a DriverSlot,
    /// Readable when the engine has ended.
    ended: &'a OwnedFd,
    /// When the last driver left; `None` while a driver is connected.
    idle_since: Option<Instant>,
    /// No driver is accepted before this time, because descriptors ran out.
    paused_until: Option<Instant>,
}

impl Reader<'_> {
    fn run(&mut self, idle_exit: Duration) -> Result<(), ProcessError> {
        loop {
            let driver = self.slot.driver();
            let now = Instant::now();
            self.idle_since = if driver.is_some() { None } else { self.idle_since.or(Some(now)) };
            self.paused_until = self.paused_until.filter(|paused_until| *paused_until > now);
            // After the name was released, the engine is already ending.
            let idle = self.idle_since.and_then(|since| since.checked_add(idle_exit));
            let idle = idle.filter(|_| self.socket.listener.is_some());
            if idle.is_some_and(|idle| idle <= now) {
                self.apply(Command::Drain, Vec::new());
                continue;
            }
            let until = [idle, self.paused_until].into_iter().flatten().min();
            let (ended, arrived, sent) = self.wait(driver.as_deref(), until)?;
            if ended {
                return Ok(());
            }
            if arrived {
                self.accept();
            }
            if let Some(driver) = driver.filter(|_| sent) {
                self.read(&driver);
            }
        }
    }

    /// Waits. Returns whether the engine has ended, whether a driver connects, and whether the driver sent something.
    fn wait(
        &self,
        driver: Option<&Channel>,
        until: Option<Instant>,
    ) -> Result<(bool, bool, bool), ProcessError> {
        // A descriptor that is not to be waited for is replaced by a poll without events.
        let wait = |socket: Option<_>| match socket {
            Some(socket) => PollFd::from_borrowed_fd(socket, PollFlags::IN),
            None => PollFd::new(self.ended, PollFlags::empty()),
        };
        let listener = self.socket.listener.as_ref().filter(|_| self.paused_until.is_none());
        let mut waits =
            [wait(Some(self.ended.as_fd())), wait(listener.map(AsFd::as_fd)), wait(driver.map(AsFd::as_fd))];
        let timeout = until.map(|until| until.saturating_duration_since(Instant::now()));
        match poll(&mut waits, timeout.and_then(timespec).as_ref()) {
            Err(Errno::INTR) => return Ok((false, false, false)),
            done => done?,
        };
        let [ended, arrived, sent] = waits.map(|wait| !wait.revents().is_empty());
        Ok((ended, arrived, sent))
    }

    /// Accepts a driver, if it runs as the user who created the socket, or as root.
    fn accept(&mut self) {
        let Some(listener) = &self.socket.listener else { return };
        let socket = match rustix::net::accept_with(listener, SocketFlags::CLOEXEC) {
            Ok(socket) => socket,
            Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                self.paused_until = Instant::now().checked_add(EXHAUSTED_PAUSE);
                return;
            }
            // The driver has closed the connection again.
            Err(_) => return,
        };
        // nix and not rustix: for a peer outside of our pid namespace the kernel returns process id 0, which rustix's type
        // excludes.
        let is_permitted = getsockopt(&socket, PeerCredentials)
            .is_ok_and(|peer| peer.uid() == 0 || peer.uid() == self.socket.owner.as_raw());
        let Ok(driver) = Channel::try_from(socket) else { return };
        if is_permitted {
            self.slot.install(driver, self.ready);
        }
    }

    /// Reads one command and carries it out.
    fn read(&mut self, driver: &Arc<Channel>) {
        match driver.try_recv::<Command>() {
            Ok(Some((command, descriptors))) => self.apply(command, descriptors),
            Err(ChannelError::WouldBlock) => {}
            Ok(None) | Err(ChannelError::Gone | ChannelError::System(_)) => self.slot.remove(driver),
            Err(error) => {
                let refused = Event::Refused { reason: error.to_string() };
                // A driver that sends invalid data and does not read the answers is disconnected.
                if driver.try_send(&refused, &[]).is_err() {
                    self.slot.remove(driver);
                }
            }
        }
    }

    fn apply(&mut self, command: Command, descriptors: Vec<OwnedFd>) {
        if matches!(command, Command::Drain | Command::Stop) {
            self.socket.release_name();
        }
        if let Some(question) = Question::of(&command) {
            self.slot.record_question(question);
        }
        self.engine.apply(command, descriptors);
    }
}

#[cfg(test)]
mod tests;
