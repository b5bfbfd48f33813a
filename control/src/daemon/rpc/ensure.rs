//! Ensures that one daemon of this build runs (wire specification, A.8).
//!
//! A process that answers `list` at the socket is a daemon. If its version is this program's version, it is used. Otherwise
//! it is asked to shut down over its socket, never by a signal, and has ended when its socket file is gone. All changes
//! happen under the spawn lock, an flock that the kernel releases when its holder ends. Of a hundred concurrent callers, one
//! starts the daemon and the others find it running. The lock's holder probes again after it has the lock, so it never shuts
//! down a daemon that another caller has just started.
//!
//! The pid file is a hint. If it names a live process, that process is given time to become reachable, and no second daemon
//! is started meanwhile. A process that started after the file was written reuses the process id, and is ignored. Neither
//! process is ever sent a signal.

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

/// The maximum size of the pid file, in bytes.
const PID_BYTES_MAX: u64 = 32;

/// The tolerance when the start of a process is compared with the time of its pid file: the clocks of files and of processes
/// are read at different times, and the latter is rounded.
const CLOCK_SLACK: Duration = Duration::from_secs(2);

/// The option for the port of the daemon's HTTP endpoint.
const HTTP_PORT: &str = "--http-port";

/// The option that serves forwarded ports on the tailnet.
pub const TAILSCALE: &str = "--tailscale";

/// The option that enters containers through a helper container.
pub const DOCKER_HELPER: &str = "--docker-helper";

/// The option for how servers under `run` listen.
pub const SOCKETS: &str = "--sockets";

/// The option that forwards all containers.
pub const ALL: &str = "--all";

/// Timeouts and intervals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Times {
    /// From the start of a daemon until it is reachable.
    pub ready: Duration,
    /// From the request to shut down until the socket file is gone.
    pub shutdown: Duration,
    /// The wait for another starter, which may need both of the above.
    pub lock: Duration,
    /// The interval between two probes.
    pub poll: Duration,
    /// The answer to `version`, `http-info` and `shutdown`.
    pub probe: Duration,
    /// The answer to `list`.
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

/// The daemon that is to run.
#[derive(Clone, Debug)]
pub struct DesiredDaemon {
    /// Its home.
    pub home: Home,
    /// The program to start, with the hidden verb `_hostd`.
    pub program: PathBuf,
    /// Further arguments, if it has to be started.
    pub arguments: Vec<OsString>,
    /// The required version.
    pub version: String,
    /// The timeouts.
    pub times: Times,
}

impl DesiredDaemon {
    /// Returns a daemon of this program for `home`.
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

/// Returns the path of this program. If the file was replaced, this is the link to the running program, whose version is
/// the required one.
fn own_program() -> PathBuf {
    let path = std::env::current_exe().ok().filter(|path| path.exists());
    path.unwrap_or_else(|| PathBuf::from("/proc/self/exe"))
}

/// A running daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ensured {
    /// The process id from its pid file.
    pub pid: Option<u32>,
    /// The port of its HTTP endpoint.
    pub http_port: NonZeroU16,
    /// Whether this call started it.
    pub spawned: bool,
    /// Whether it replaced a daemon of another version.
    pub respawned: bool,
}

/// The reasons why the required daemon does not run. The texts follow the wire specification where it has one.
#[derive(Debug, Error)]
pub enum EnsureError {
    /// The home cannot be used.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// The daemon has another version and did not shut down.
    #[error("daemon version drifted but shutdown request did not complete")]
    Drifted,
    /// The file of the spawn lock cannot be used.
    #[error("failed to lock the start of the daemon: {0}")]
    Lock(io::Error),
    /// Another process held the spawn lock until the timeout.
    #[error("another process has been starting the daemon for {}s", .0.as_secs())]
    Busy(Duration),
    /// The log file cannot be opened.
    #[error("failed to open daemon log: {0}")]
    Log(io::Error),
    /// The program cannot be executed.
    #[error("failed to spawn daemon: {0}")]
    Spawn(io::Error),
    /// The pid file cannot be written.
    #[error("failed to write daemon pidfile: {0}")]
    PidFile(io::Error),
    /// The daemon ended before it became reachable.
    #[error("daemon exited before becoming reachable")]
    Exited,
    /// The daemon runs and did not answer in time.
    #[error("daemon spawned but did not become reachable yet")]
    NotYet,
    /// The daemon does not answer `http-info`.
    #[error("daemon did not report an HTTP control port")]
    NoHttpPort,
}

/// Returns when a daemon of the required version is reachable. Starts it, or replaces one of another version, if needed.
///
/// # Errors
/// [`EnsureError`].
pub fn ensure(wanted: &DesiredDaemon) -> Result<Ensured, EnsureError> {
    wanted.home.ensure_directories()?;
    let starter = Starter { wanted, client: Client::new(wanted.home.socket()) };
    if let RunningDaemon::DesiredDaemon(port) = starter.probe()? {
        return Ok(starter.running(port));
    }
    let lock = match starter.lock()? {
        Locked::Held(lock) => lock,
        Locked::DaemonReady(port) => return Ok(starter.running(port)),
    };
    let ensured = match starter.probe()? {
        RunningDaemon::DesiredDaemon(port) => Ok(starter.running(port)),
        RunningDaemon::Other => {
            let options_to_keep = starter.options_to_keep();
            starter.shut_down()?;
            starter.spawn(&options_to_keep).map(|ensured| Ensured { respawned: true, ..ensured })
        }
        RunningDaemon::Absent => match starter.adopt()? {
            Some(port) => Ok(starter.running(port)),
            None => starter.spawn(&KeptOptions::default()),
        },
    };
    drop(lock);
    ensured
}

/// The daemon at the socket.
enum RunningDaemon {
    Absent,
    /// A daemon of another version.
    Other,
    /// The required daemon, with its HTTP port.
    DesiredDaemon(NonZeroU16),
}

/// The options of a replaced daemon that the new one keeps.
#[derive(Debug, Default)]
struct KeptOptions {
    /// The HTTP port: running containers have its URL from their start (wire specification, A.2).
    http_port: Option<NonZeroU16>,
    /// Whether it serves on the tailnet, where other machines may be using it.
    tailscale: bool,
    /// Whether containers are entered through a helper container. Without it they could not be reached.
    docker_helper: bool,
    /// Whether it forwards all containers.
    all: bool,
    /// The default of `run --sockets`, if it differs from the built-in default.
    sockets: Option<String>,
}

/// The result of waiting for the spawn lock.
enum Locked {
    Held(File),
    /// The required daemon became reachable during the wait.
    DaemonReady(NonZeroU16),
}

struct Starter<'a> {
    wanted: &'a DesiredDaemon,
    client: Client,
}

impl Starter<'_> {
    fn running(&self, http_port: NonZeroU16) -> Ensured {
        Ensured { pid: self.pid_in_file(), http_port, spawned: false, respawned: false }
    }

    fn probe(&self) -> Result<RunningDaemon, EnsureError> {
        let times = &self.wanted.times;
        if !self.client.within(times.reachability).is_reachable() {
            return Ok(RunningDaemon::Absent);
        }
        let answer = self.client.within(times.probe).ask("version").unwrap_or_default();
        // A root daemon without its launcher can enter no container, and cannot start another launcher.
        if answer.get("launcher") == Some(&json!(LauncherState::Ended)) {
            return Ok(RunningDaemon::Other);
        }
        // A missing or invalid answer counts as another version.
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

    fn options_to_keep(&self) -> KeptOptions {
        // A daemon that does not implement `describe` does not have these options.
        let answer = self.client.within(self.wanted.times.probe).ask("describe").unwrap_or_default();
        let on = |what| answer.get(what).and_then(Value::as_bool).unwrap_or(false);
        let (tailscale, all) = (on("tailscale"), on("all"));
        let docker_helper = answer.get("dockerHelper").is_some_and(Value::is_object);
        let sockets = answer.get("sockets").and_then(Value::as_str).map(str::to_owned);
        let sockets = sockets.filter(|sockets| sockets != Sockets::default().as_str());
        KeptOptions { http_port: self.http_port(), tailscale, docker_helper, all, sockets }
    }

    /// Returns the HTTP port if the daemon is reachable and reports one.
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
            if let Ok(RunningDaemon::DesiredDaemon(port)) = self.probe() {
                return Ok(Locked::DaemonReady(port));
            }
            if Instant::now() >= deadline {
                return Err(EnsureError::Busy(self.wanted.times.lock));
            }
            thread::sleep(self.wanted.times.poll);
        }
    }

    /// Asks a daemon to shut down, and waits until its socket file is gone.
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

    /// Waits for the process that the pid file names, while it lives. Returns `None` if it does not exist.
    fn adopt(&self) -> Result<Option<NonZeroU16>, EnsureError> {
        let deadline = Instant::now() + self.wanted.times.ready;
        while let Some(pid) = self.pid_in_file()
            && self.may_be_daemon(pid)
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

    fn may_be_daemon(&self, pid: u32) -> bool {
        let written = fs::symlink_metadata(self.wanted.home.pid_file()).and_then(|file| file.modified()).ok();
        let id_reused = || match (processes::began(pid), written) {
            (Some(started), Some(written)) => started > written + CLOCK_SLACK,
            _ => false,
        };
        processes::runs(pid) && !id_reused()
    }

    /// Starts a daemon and waits until it is reachable. A daemon that is ending, or that was started without the spawn lock,
    /// may hold the daemon's lock. The new daemon then ends at once, and this function waits for the other one.
    ///
    /// The new daemon keeps options that the arguments do not set.
    fn spawn(&self, options_to_keep: &KeptOptions) -> Result<Ensured, EnsureError> {
        let mut arguments = self.wanted.arguments.clone();
        let has_option = |arguments: &[OsString], option| arguments.iter().any(|word| word == option);
        if let Some(port) = options_to_keep.http_port.filter(|_| !has_option(&arguments, HTTP_PORT)) {
            arguments.extend([HTTP_PORT.into(), port.to_string().into()]);
        }
        if let Some(sockets) = options_to_keep.sockets.as_ref().filter(|_| !has_option(&arguments, SOCKETS)) {
            arguments.extend([SOCKETS.into(), sockets.into()]);
        }
        let kept_on = [
            (TAILSCALE, options_to_keep.tailscale),
            (ALL, options_to_keep.all),
            (DOCKER_HELPER, options_to_keep.docker_helper),
        ];
        for (option, was_on) in kept_on {
            if was_on && !has_option(&arguments, option) {
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
                // A stale file would only cost the next caller a futile check of that process.
                let _ = fs::remove_file(self.wanted.home.pid_file());
            }
            if !self.daemon_lock_is_held() {
                return Err(EnsureError::Exited);
            }
            while self.daemon_lock_is_held() {
                if let Ok(RunningDaemon::DesiredDaemon(port)) = self.probe() {
                    return Ok(self.running(port));
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
        // The daemon outlives the terminal, leaves its session itself, and uses no directory of the user.
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

    fn daemon_lock_is_held(&self) -> bool {
        // A shared lock, held briefly. No other process starts a daemon now, since the caller has the spawn lock.
        let Ok(file) = lock_file(self.wanted.home.daemon_lock()) else { return false };
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared) == Err(Errno::WOULDBLOCK)
    }
}

/// Opens a lock file. The standard library sets close-on-exec, so no child holds the lock.
fn lock_file(path: PathBuf) -> io::Result<File> {
    private_file::options().read(true).write(true).create(true).truncate(false).open(path)
}

#[cfg(test)]
#[path = "ensure_tests.rs"]
mod tests;
