//! Sees to it that one daemon runs, of this very build (wire specification, A.8).
//!
//! Whoever answers `list` is a daemon. If its version is ours, it is used. If not, it is asked to end, over its socket
//! and never by a signal, and has ended when its socket's file is gone. All that may change something happens under
//! the spawn lock, an flock that the kernel releases however its holder ends: of a hundred who come at once, one
//! starts the daemon and the others find it running. That one looks again once it has the lock, so nobody asks a
//! daemon to end that another one has just started.
//!
//! The pid file is a hint. A live process that it names is given time to become reachable, and no second one is
//! started beside it; but a process that began after the file was written has its number by chance, and counts for
//! nothing. Neither is ever sent a signal.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::num::NonZeroU16;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use serde_json::{Value, json};
use thiserror::Error;

use super::client::Client;
use crate::model::native_sockets::Sockets;
use crate::sys::launcher::LauncherState;
use crate::sys::paths::{Home, HomeError};
use crate::sys::private_file;
use crate::sys::processes;
use crate::sys::token_variables;
use crate::version;

/// The longest pid file, in bytes.
const PID_BYTES_MAX: u64 = 32;

/// How much earlier than its pid file a daemon may seem to have begun the other way round: clocks of files and of
/// processes are read at different moments, and the latter is rounded.
const CLOCK_SLACK: Duration = Duration::from_secs(2);

/// The option that says where the daemon's HTTP endpoint listens.
const HTTP_PORT: &str = "--http-port";

/// The option by which what is forwarded is served on the tailnet.
pub const TAILSCALE: &str = "--tailscale";

/// The option by which containers are entered by a helper container.
pub const DOCKER_HELPER: &str = "--docker-helper";

/// The option that says how servers under `run` listen.
pub const SOCKETS: &str = "--sockets";

/// The option by which every container of Docker's is forwarded.
pub const ALL: &str = "--all";

/// How long things may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Times {
    /// A daemon, from its start until it is reachable.
    pub ready: Duration,
    /// A daemon that was asked to end, until its socket's file is gone.
    pub shutdown: Duration,
    /// Another starter, until it is done: it may do both of the above.
    pub lock: Duration,
    /// Between two looks.
    pub poll: Duration,
    /// An answer to `version`, `http-info` and `shutdown`.
    pub probe: Duration,
    /// An answer to `list`.
    pub reachability: Duration,
}

impl Default for Times {
    fn default() -> Times {
        Times {
            ready: Duration::from_secs(5),
            shutdown: Duration::from_secs(5),
            lock: Duration::from_secs(15),
            poll: Duration::from_millis(50),
            probe: super::client::PROBE_BUDGET,
            reachability: super::client::BUDGET,
        }
    }
}

/// Which daemon is wanted.
#[derive(Clone, Debug)]
pub struct DesiredDaemon {
    /// Where it lives.
    pub home: Home,
    /// The program that becomes it, by the hidden verb `_hostd`.
    pub program: PathBuf,
    /// More arguments for it, if it has to be started.
    pub arguments: Vec<OsString>,
    /// The version it must have.
    pub version: String,
    /// How long all may take.
    pub times: Times,
}

impl DesiredDaemon {
    /// A daemon of this very program, for `home`.
    pub fn own(home: Home, arguments: Vec<OsString>) -> DesiredDaemon {
        DesiredDaemon {
            home,
            program: own_program(),
            arguments,
            version: version::current(),
            times: Times::default(),
        }
    }
}

/// This program's file. One that was replaced while it runs is still the one that this process is, and so the one
/// whose version is expected.
fn own_program() -> PathBuf {
    let path = std::env::current_exe().ok().filter(|path| path.exists());
    path.unwrap_or_else(|| PathBuf::from("/proc/self/exe"))
}

/// A daemon that runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ensured {
    /// Its process id as its pid file has it.
    pub pid: Option<u32>,
    /// Where its HTTP endpoint listens.
    pub http_port: NonZeroU16,
    /// Whether this call started it.
    pub spawned: bool,
    /// Whether it took the place of one with another version.
    pub respawned: bool,
}

/// Why no daemon runs, or not the one that is wanted. The texts are the wire specification's, where it has one.
#[derive(Debug, Error)]
pub enum EnsureError {
    /// The home cannot be used.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// It has another version and did not end.
    #[error("daemon version drifted but shutdown request did not complete")]
    Drifted,
    /// The spawn lock's file cannot be used.
    #[error("failed to lock the start of the daemon: {0}")]
    Lock(io::Error),
    /// Somebody else has been starting a daemon all the time.
    #[error("another process has been starting the daemon for {}s", .0.as_secs())]
    Busy(Duration),
    /// The log cannot be written.
    #[error("failed to open daemon log: {0}")]
    Log(io::Error),
    /// The program cannot be executed.
    #[error("failed to spawn daemon: {0}")]
    Spawn(io::Error),
    /// The pid file cannot be written.
    #[error("failed to write daemon pidfile: {0}")]
    PidFile(io::Error),
    /// The daemon ended while it was waited for.
    #[error("daemon exited before becoming reachable")]
    Exited,
    /// It runs, as far as is known, and does not answer.
    #[error("daemon spawned but did not become reachable yet")]
    NotYet,
    /// It answers, and not to this.
    #[error("daemon did not report an HTTP control port")]
    NoHttpPort,
}

/// Answers when a daemon of the wanted version is reachable; starts it, or replaces another one, if need be.
///
/// # Errors
/// [`EnsureError`].
pub fn ensure(wanted: &DesiredDaemon) -> Result<Ensured, EnsureError> {
    wanted.home.ensure_directories()?;
    let starter = Starter { wanted, client: Client::new(wanted.home.socket()) };
    if let RunningDaemon::DesiredDaemon(port) = starter.look()? {
        return Ok(starter.found(port));
    }
    let lock = match starter.lock()? {
        Locked::Held(lock) => lock,
        Locked::Needless(port) => return Ok(starter.found(port)),
    };
    let ensured = match starter.look()? {
        RunningDaemon::DesiredDaemon(port) => Ok(starter.found(port)),
        RunningDaemon::Other => {
            let kept = starter.kept();
            starter.shut_down()?;
            starter.spawn(&kept).map(|ensured| Ensured { respawned: true, ..ensured })
        }
        RunningDaemon::Nobody => match starter.adopt()? {
            Some(port) => Ok(starter.found(port)),
            None => starter.spawn(&Kept::default()),
        },
    };
    drop(lock);
    ensured
}

/// Who answers at the socket.
enum RunningDaemon {
    Nobody,
    /// A daemon of another version.
    Other,
    /// The one that is wanted, with its HTTP port.
    DesiredDaemon(NonZeroU16),
}

/// What the daemon in the place of another one keeps.
#[derive(Debug, Default)]
struct Kept {
    /// Where it listens: containers that run have the URL that they were started with (wire specification, A.2).
    http_port: Option<NonZeroU16>,
    /// Whether it serves on the tailnet: others may be using it there.
    tailscale: bool,
    /// Whether containers are entered by a helper container: without it they would be reached no more.
    docker_helper: bool,
    /// Whether it forwards every container.
    all: bool,
    /// The default of `run --sockets`, if it is not the usual one.
    sockets: Option<String>,
}

/// What came of asking for the spawn lock.
enum Locked {
    Held(File),
    /// While we waited, the wanted daemon became reachable.
    Needless(NonZeroU16),
}

struct Starter<'a> {
    wanted: &'a DesiredDaemon,
    client: Client,
}

impl Starter<'_> {
    fn found(&self, http_port: NonZeroU16) -> Ensured {
        Ensured { pid: self.pid_in_file(), http_port, spawned: false, respawned: false }
    }

    fn look(&self) -> Result<RunningDaemon, EnsureError> {
        let times = &self.wanted.times;
        if !self.client.within(times.reachability).is_reachable() {
            return Ok(RunningDaemon::Nobody);
        }
        let answer = self.client.within(times.probe).ask("version").unwrap_or_default();
        // A root daemon that has lost its launcher can enter no container, and cannot start another one.
        if answer.get("launcher") == Some(&json!(LauncherState::Ended)) {
            return Ok(RunningDaemon::Other);
        }
        // No answer, or none that is a version, is another version.
        let same = answer
            .get("version")
            .and_then(Value::as_str)
            .is_some_and(|running| version::fits(running, &self.wanted.version));
        if !same {
            return Ok(RunningDaemon::Other);
        }
        self.http_port().map(RunningDaemon::DesiredDaemon).ok_or(EnsureError::NoHttpPort)
    }

    fn http_port(&self) -> Option<NonZeroU16> {
        let answer = self.client.within(self.wanted.times.probe).ask("http-info").ok()?;
        crate::model::port_policy::port_of(answer.get("port")?)
    }

    fn kept(&self) -> Kept {
        // One that does not know the question serves nothing.
        let answer = self.client.within(self.wanted.times.probe).ask("describe").unwrap_or_default();
        let on = |what| answer.get(what).and_then(Value::as_bool).unwrap_or(false);
        let (tailscale, all) = (on("tailscale"), on("all"));
        let docker_helper = answer.get("dockerHelper").is_some_and(Value::is_object);
        let sockets = answer.get("sockets").and_then(Value::as_str).map(str::to_owned);
        let sockets = sockets.filter(|sockets| sockets != Sockets::default().as_str());
        Kept { http_port: self.http_port(), tailscale, docker_helper, all, sockets }
    }

    /// Reachable, and with a port.
    fn ready(&self) -> Option<NonZeroU16> {
        self.client.within(self.wanted.times.probe).is_reachable().then(|| self.http_port()).flatten()
    }

    fn lock(&self) -> Result<Locked, EnsureError> {
        let file = lock_file(self.wanted.home.spawn_lock()).map_err(EnsureError::Lock)?;
        let deadline = Instant::now() + self.wanted.times.lock;
        loop {
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Locked::Held(file)),
                Err(Errno::WOULDBLOCK | Errno::INTR) => {}
                Err(errno) => return Err(EnsureError::Lock(errno.into())),
            }
            if let Ok(RunningDaemon::DesiredDaemon(port)) = self.look() {
                return Ok(Locked::Needless(port));
            }
            if Instant::now() >= deadline {
                return Err(EnsureError::Busy(self.wanted.times.lock));
            }
            thread::sleep(self.wanted.times.poll);
        }
    }

    /// Asks a daemon to end, and waits until its socket's file is gone.
    fn shut_down(&self) -> Result<(), EnsureError> {
        let asked = self.client.within(self.wanted.times.probe).ask("shutdown");
        asked.map_err(|_| EnsureError::Drifted)?;
        let deadline = Instant::now() + self.wanted.times.shutdown;
        while fs::symlink_metadata(self.wanted.home.socket()).is_ok() {
            if Instant::now() >= deadline {
                return Err(EnsureError::Drifted);
            }
            thread::sleep(self.wanted.times.poll);
        }
        Ok(())
    }

    /// Waits for a process that the pid file names, as long as it lives. None if there is none.
    fn adopt(&self) -> Result<Option<NonZeroU16>, EnsureError> {
        let deadline = Instant::now() + self.wanted.times.ready;
        while let Some(pid) = self.pid_in_file()
            && self.may_be_ours(pid)
        {
            if let Some(port) = self.ready() {
                return Ok(Some(port));
            }
            if Instant::now() >= deadline {
                return Err(EnsureError::NotYet);
            }
            thread::sleep(self.wanted.times.poll);
        }
        Ok(None)
    }

    fn may_be_ours(&self, pid: u32) -> bool {
        let written = fs::symlink_metadata(self.wanted.home.pid_file()).and_then(|file| file.modified()).ok();
        let by_chance = || match (processes::began(pid), written) {
            (Some(began), Some(written)) => began > written + CLOCK_SLACK,
            _ => false,
        };
        processes::runs(pid) && !by_chance()
    }

    /// Starts a daemon and waits until it is reachable. A daemon that is about to end, or that somebody else started
    /// without the spawn lock, may hold the daemon's own lock, and ours then ends at once: that one is waited for.
    ///
    /// The new daemon keeps what the arguments do not say otherwise.
    fn spawn(&self, kept: &Kept) -> Result<Ensured, EnsureError> {
        let mut arguments = self.wanted.arguments.clone();
        let said = |arguments: &[OsString], option| arguments.iter().any(|word| word == option);
        if let Some(port) = kept.http_port.filter(|_| !said(&arguments, HTTP_PORT)) {
            arguments.extend([HTTP_PORT.into(), port.to_string().into()]);
        }
        if let Some(sockets) = kept.sockets.as_ref().filter(|_| !said(&arguments, SOCKETS)) {
            arguments.extend([SOCKETS.into(), sockets.into()]);
        }
        let kept_on = [(TAILSCALE, kept.tailscale), (ALL, kept.all), (DOCKER_HELPER, kept.docker_helper)];
        for (option, was_on) in kept_on {
            if was_on && !said(&arguments, option) {
                arguments.push(option.into());
            }
        }
        let deadline = Instant::now() + self.wanted.times.ready;
        loop {
            let mut child = self.start(&arguments)?;
            while matches!(child.try_wait(), Ok(None)) {
                if let Some(http_port) = self.ready() {
                    let pid = Some(child.id());
                    return Ok(Ensured { pid, http_port, spawned: true, respawned: false });
                }
                if Instant::now() >= deadline {
                    return Err(EnsureError::NotYet);
                }
                thread::sleep(self.wanted.times.poll);
            }
            if self.pid_in_file() == Some(child.id()) {
                // Without it, one more process is looked for the next time, and not found.
                let _ = fs::remove_file(self.wanted.home.pid_file());
            }
            if !self.somebody_holds_the_daemon_lock() {
                return Err(EnsureError::Exited);
            }
            while self.somebody_holds_the_daemon_lock() {
                if let Ok(RunningDaemon::DesiredDaemon(port)) = self.look() {
                    return Ok(self.found(port));
                }
                if Instant::now() >= deadline {
                    return Err(EnsureError::Exited);
                }
                thread::sleep(self.wanted.times.poll);
            }
        }
    }

    fn start(&self, arguments: &[OsString]) -> Result<Child, EnsureError> {
        let home = &self.wanted.home;
        let log = || private_file::options().append(true).create(true).open(home.daemon_log());
        let (out, err) = (log().map_err(EnsureError::Log)?, log().map_err(EnsureError::Log)?);
        let mut command = Command::new(&self.wanted.program);
        command.arg0("landfall").arg("_hostd").args(arguments);
        token_variables::remove_from(&mut command);
        // It outlives the terminal, whose session it leaves itself, and holds no directory of the user.
        command.current_dir("/").stdin(Stdio::null()).stdout(out).stderr(err);
        let child = command.spawn().map_err(EnsureError::Spawn)?;
        private_file::write_path(&home.pid_file(), &format!("{}\n", child.id()))
            .map_err(EnsureError::PidFile)?;
        Ok(child)
    }

    fn pid_in_file(&self) -> Option<u32> {
        let text = private_file::read_path(&self.wanted.home.pid_file(), PID_BYTES_MAX).ok()?;
        std::str::from_utf8(&text).ok()?.trim().parse().ok().filter(|pid| *pid > 0)
    }

    fn somebody_holds_the_daemon_lock(&self) -> bool {
        // Shared and for a moment only, by the one process that may start a daemon now.
        let Ok(file) = lock_file(self.wanted.home.daemon_lock()) else { return false };
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared) == Err(Errno::WOULDBLOCK)
    }
}

/// Files of the standard library are closed on exec, so no child holds the lock.
fn lock_file(path: PathBuf) -> io::Result<File> {
    private_file::options().read(true).write(true).create(true).truncate(false).open(path)
}

#[cfg(test)]
#[path = "ensure_tests.rs"]
mod tests;
