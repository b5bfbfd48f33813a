//! The engine as a process of its own: commands come in and events go out over a Unix socket, to one driver at a time.
//!
//! # Who may come and go
//!
//! The engine outlives its driver. A driver that is killed takes nothing with it: listeners listen on and bytes flow.
//! The next driver connects, is told [`Event::Ready`], asks [`Command::Describe`], and says again what it wants.
//! So an event that finds no driver is dropped and not kept: [`Event::State`] tells what came of it.
//!
//! There is one driver. A newer one takes the place of the older, which reads the end of its channel: whoever started
//! it last is whom the person means, and a driver that hangs must not lock out its successor. Commands of the older
//! one that were not read by then are dropped.
//!
//! # What ends the process
//!
//! [`Event::Stopped`], and nothing a driver can send by mistake: a datagram that is not understood is answered
//! [`Event::Refused`]. [`Command::Stop`] and [`Command::Drain`] lead there, and so does a time without any driver, by
//! a drain. As soon as that begins, the process leaves its address, for a next engine to take while the
//! connections of this one finish; the driver that is there stays until the end.
//!
//! # Threads
//!
//! The calling thread accepts drivers and reads commands. A second one forwards events, because it waits for the
//! engine, and for a driver that reads slowly; one that has read nothing for [`SEND_TIMEOUT`] loses its place.

pub mod confinement;
pub mod privileges;
mod seat;

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
use seat::{Question, Seat};

/// The hidden verb of the program by which it becomes an engine.
pub const VERB: &str = "_engine";

/// How long an engine waits for a driver before it drains and ends: long enough to upgrade or repair one.
pub const IDLE_EXIT: Duration = Duration::from_secs(600);

/// How long a driver may read nothing while an event waits for it.
pub const SEND_TIMEOUT: Duration = Duration::from_secs(10);

/// How long no driver is accepted after descriptors ran out.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

/// What is driven: the engine, or a script in its place.
pub trait Drive: Sync {
    /// Takes a command, without waiting for what comes of it. Whether its descriptors are as many as it needs is
    /// for the engine to check; those that it does not keep it closes. Anything wrong is told by [`Event::Refused`].
    fn apply(&self, command: Command, descriptors: Vec<OwnedFd>);
}

/// Why the engine's process could not serve.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// The socket could not be made.
    #[error("no socket can be made at {}: {source}", path.display())]
    Bind {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Something else has the name; it is left alone.
    #[error("{} exists and is not a socket; it is left as it is", path.display())]
    NotASocket {
        /// Where.
        path: PathBuf,
    },
    /// The engine ended without [`Event::Stopped`].
    #[error("the engine ended by itself")]
    EngineGone,
    /// The kernel failed a call that does not fail.
    #[error("the engine's process cannot wait for its driver: {0}")]
    System(#[from] io::Error),
}

impl From<Errno> for ProcessError {
    fn from(errno: Errno) -> ProcessError {
        ProcessError::System(errno.into())
    }
}

/// Lets this process have as many descriptors as it may (the hard limit of `RLIMIT_NOFILE`), and so an engine that is
/// started in it. The usual soft limit of 1,024 is for programs that use `select(2)`, and is enough for 400 connections.
pub fn raise_descriptor_limit() {
    let maximum = getrlimit(Resource::Nofile).maximum;
    // Where it is refused, the engine goes by what there is.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}

/// The listening socket and its name. The name is removed with it if this process may still do so: an engine of root has
/// changed its user by then, and its driver removes the name.
#[derive(Debug)]
pub struct CommandSocket {
    path: PathBuf,
    /// The user that made it, whose drivers are accepted. The process may have changed to another user since.
    owner: Uid,
    /// Device and inode of the name, to tell whether it is still this socket's.
    file: (u64, u64),
    /// Gone once the address has been left.
    listener: Option<OwnedFd>,
}

impl CommandSocket {
    /// Listens at `path`, in a directory that exists, for processes of this user alone (mode 0600).
    ///
    /// The socket is made under a name aside and then moved, so nobody meets it before its mode is set, and the name
    /// of an engine that crashed is taken over at once. That of one that runs is, too: whether there may be two
    /// is for the driver to know, which has a lock for it.
    ///
    /// # Errors
    /// [`ProcessError::NotASocket`] when another kind of file has the name; else [`ProcessError::Bind`].
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
        let aside = path.with_extension(format!("{}~", std::process::id()));
        // The longer one of the two names must fit, but it is the asked one that a person can shorten.
        let address = SocketAddrUnix::new(&aside).map_err(failed)?;
        // Only a process with our own number can have left it.
        let _ = rustix::fs::unlink(&aside);
        rustix::net::bind(&listener, &address).map_err(failed)?;
        let named = rustix::fs::chmod(&aside, Mode::RUSR | Mode::WUSR)
            .and_then(|()| rustix::net::listen(&listener, 16))
            .and_then(|()| rustix::fs::lstat(&aside))
            .and_then(|file| rustix::fs::rename(&aside, path).map(|()| (file.st_dev, file.st_ino)));
        match named {
            Ok(file) => {
                Ok(CommandSocket { path: path.to_owned(), owner: geteuid(), file, listener: Some(listener) })
            }
            Err(errno) => {
                let _ = rustix::fs::unlink(&aside);
                Err(failed(errno))
            }
        }
    }

    /// Accepts nobody any more, and removes the name unless another engine has taken it.
    fn leave(&mut self) {
        self.listener = None;
        let is_ours = |path: &Path| {
            rustix::fs::lstat(path).is_ok_and(|found| (found.st_dev, found.st_ino) == self.file)
        };
        if !is_ours(&self.path) {
            return;
        }
        // A next engine may take the name between a look and a removal, so it is removed under a name of our own, or given
        // back. What fails here cannot be helped and does no harm: the next engine takes the name over.
        let aside = self.path.with_extension(format!("{}~", std::process::id()));
        if rustix::fs::rename(&self.path, &aside).is_err() {
            return;
        }
        let given_back = !is_ours(&aside)
            && rustix::fs::renameat_with(CWD, &aside, CWD, &self.path, RenameFlags::NOREPLACE).is_ok();
        if !given_back {
            let _ = rustix::fs::unlink(&aside);
        }
    }
}

impl Drop for CommandSocket {
    fn drop(&mut self) {
        if self.listener.is_some() {
            self.leave();
        }
    }
}

/// Serves drivers until the engine has stopped. `ready` is what each of them is told first.
///
/// # Errors
/// [`ProcessError::EngineGone`] when `events` ends without [`Event::Stopped`].
pub fn serve(
    socket: CommandSocket,
    ready: &Event,
    engine: &dyn Drive,
    events: Receiver<EventMessage>,
    idle_exit: Duration,
) -> Result<(), ProcessError> {
    let ended = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let seat = Seat::default();
    let (ended, seat) = (&ended, &seat);
    std::thread::scope(|scope| {
        let forwarder = scope.spawn(move || {
            let outcome = seat.forward(&events);
            // An eventfd at zero has room for a one.
            let _ = rustix::io::write(ended, &1_u64.to_ne_bytes());
            outcome
        });
        let mut reader = Reader { socket, ready, engine, seat, ended, vacant: None, rest: None };
        let read = reader.run(idle_exit);
        if read.is_err() {
            // Nobody could stop the engine any more, and the forwarder waits for its end.
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
    seat: &'a Seat,
    /// Readable once the engine has ended.
    ended: &'a OwnedFd,
    /// Since when there is no driver.
    vacant: Option<Instant>,
    /// Until when nobody is accepted, because descriptors ran out.
    rest: Option<Instant>,
}

impl Reader<'_> {
    fn run(&mut self, idle_exit: Duration) -> Result<(), ProcessError> {
        loop {
            let driver = self.seat.driver();
            let now = Instant::now();
            self.vacant = if driver.is_some() { None } else { self.vacant.or(Some(now)) };
            self.rest = self.rest.filter(|rest| *rest > now);
            // Once the address is left, the end is under way already.
            let idle = self.vacant.and_then(|since| since.checked_add(idle_exit));
            let idle = idle.filter(|_| self.socket.listener.is_some());
            if idle.is_some_and(|idle| idle <= now) {
                self.apply(Command::Drain, Vec::new());
                continue;
            }
            let until = [idle, self.rest].into_iter().flatten().min();
            let (ended, arrived, told) = self.wait(driver.as_deref(), until)?;
            if ended {
                return Ok(());
            }
            if arrived {
                self.admit();
            }
            if let Some(driver) = driver.filter(|_| told) {
                self.read(&driver);
            }
        }
    }

    /// Waits; tells whether the engine has ended, whether a driver knocks, and whether the driver said something.
    fn wait(
        &self,
        driver: Option<&Channel>,
        until: Option<Instant>,
    ) -> Result<(bool, bool, bool), ProcessError> {
        // What is not to be waited for is replaced by something that stays silent.
        let wait = |socket: Option<_>| match socket {
            Some(socket) => PollFd::from_borrowed_fd(socket, PollFlags::IN),
            None => PollFd::new(self.ended, PollFlags::empty()),
        };
        let listener = self.socket.listener.as_ref().filter(|_| self.rest.is_none());
        let mut waits =
            [wait(Some(self.ended.as_fd())), wait(listener.map(AsFd::as_fd)), wait(driver.map(AsFd::as_fd))];
        let timeout = until.map(|until| until.saturating_duration_since(Instant::now()));
        match poll(&mut waits, timeout.and_then(timespec).as_ref()) {
            Err(Errno::INTR) => return Ok((false, false, false)),
            done => done?,
        };
        let [ended, arrived, told] = waits.map(|wait| !wait.revents().is_empty());
        Ok((ended, arrived, told))
    }

    /// Seats a driver that connects, if it is of the user that made the socket, or root.
    fn admit(&mut self) {
        let Some(listener) = &self.socket.listener else { return };
        let knocking = match rustix::net::accept_with(listener, SocketFlags::CLOEXEC) {
            Ok(knocking) => knocking,
            Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                self.rest = Instant::now().checked_add(EXHAUSTED_PAUSE);
                return;
            }
            // It went away again.
            Err(_) => return,
        };
        // Not by rustix, whose process id is never 0: the kernel has that for a peer outside of our pid namespace.
        let known = getsockopt(&knocking, PeerCredentials)
            .is_ok_and(|peer| peer.uid() == 0 || peer.uid() == self.socket.owner.as_raw());
        let Ok(driver) = Channel::try_from(knocking) else { return };
        if known {
            self.seat.take(driver, self.ready);
        }
    }

    /// Reads one command and carries it out.
    fn read(&mut self, driver: &Arc<Channel>) {
        match driver.try_recv::<Command>() {
            Ok(Some((command, descriptors))) => self.apply(command, descriptors),
            Err(ChannelError::WouldBlock) => {}
            Ok(None) | Err(ChannelError::Gone | ChannelError::System(_)) => self.seat.vacate(driver),
            Err(error) => {
                let refused = Event::Refused { reason: error.to_string() };
                // Whoever sends nonsense and does not read the answers has no claim to be waited for.
                if driver.try_send(&refused, &[]).is_err() {
                    self.seat.vacate(driver);
                }
            }
        }
    }

    fn apply(&mut self, command: Command, descriptors: Vec<OwnedFd>) {
        if matches!(command, Command::Drain | Command::Stop) {
            self.socket.leave();
        }
        if let Some(question) = Question::of(&command) {
            self.seat.asks(question);
        }
        self.engine.apply(command, descriptors);
    }
}

#[cfg(test)]
mod tests;
