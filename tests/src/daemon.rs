//! The real program with its own home: its daemon, and any verb of its command line.
//!
//! A daemon leaves processes behind intentionally (an engine outlives it). So the process of a case is the subreaper of all
//! its descendants, and dropping a [`Home`] ends them all, by process id.

use std::fs::{File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, getpid, kill_process, set_child_subreaper};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::process::descendants;
use crate::{TIMEOUT, rpc, wait_until};

/// A home of landfall, with space for the folders of containers. Dropping it ends the processes that run in it.
#[derive(Debug)]
pub struct Home {
    directory: TempDir,
}

impl Home {
    /// Makes an empty home. It has no Docker unless a fake one is started.
    ///
    /// # Panics
    /// If no directory can be made.
    pub fn new() -> Home {
        set_child_subreaper(Some(getpid())).unwrap();
        // Closed to other users, as required of a directory above the agents' directories.
        let closed = Permissions::from_mode(0o700);
        let directory =
            tempfile::Builder::new().prefix("landfall-suite-").permissions(closed).tempdir().unwrap();
        Home { directory }
    }

    /// Returns the program under test: `LANDFALL_PROGRAM`, or the one that was built beside the suite.
    ///
    /// # Panics
    /// If the program does not exist.
    pub fn program() -> PathBuf {
        if let Some(program) = std::env::var_os("LANDFALL_PROGRAM") {
            return program.into();
        }
        let suite = std::env::current_exe().unwrap();
        let program = suite.parent().and_then(Path::parent).unwrap().join("landfall");
        assert!(program.exists(), "{} is not built: cargo build -p landfall", program.display());
        program
    }

    /// The value of `LANDFALL_HOME`.
    pub fn path(&self) -> PathBuf {
        self.directory.path().join("home")
    }

    /// The daemon's socket.
    pub fn socket(&self) -> PathBuf {
        self.path().join("run/hostd.sock")
    }

    /// The socket where a Docker engine would listen.
    pub fn docker_socket(&self) -> PathBuf {
        self.directory.path().join("docker.sock")
    }

    /// The file of a registration.
    pub fn registration(&self, name: &str) -> PathBuf {
        self.path().join(format!("run/registrations/{name}.json"))
    }

    /// Returns the content of a registration's file, if it exists.
    pub fn registered(&self, name: &str) -> Option<Value> {
        let bytes = std::fs::read(self.registration(name)).ok()?;
        Some(serde_json::from_slice(&bytes).unwrap())
    }

    /// Writes a registration's file before a daemon runs.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn write_registration(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.registration(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, content).unwrap();
        path
    }

    /// Returns the folder of a container, and makes it if it does not exist.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn folder(&self, name: &str) -> PathBuf {
        let folder = self.directory.path().join("folders").join(name);
        std::fs::create_dir_all(&folder).unwrap();
        folder
    }

    /// Returns a command for the program with `arguments` in this home, without variables of the suite's environment that
    /// select another home.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(Home::program());
        self.set_environment(&mut command);
        command.args(arguments);
        command
    }

    fn set_environment(&self, command: &mut Command) {
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy().into_owned();
            if ["LANDFALL_", "TYPECLAW_", "DOCKER_"].iter().any(|prefix| name.starts_with(prefix)) {
                command.env_remove(name);
            }
        }
        command
            .env("LANDFALL_HOME", self.path())
            .env("DOCKER_HOST", format!("unix://{}", self.docker_socket().display()))
            .env("NO_COLOR", "1")
            .stdin(Stdio::null());
    }

    /// Runs a verb until it exits.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Approves the current files of a folder, with the program itself.
    ///
    /// # Panics
    /// If it refuses.
    #[track_caller]
    pub fn trust(&self, folder: &Path) {
        let output = self.command(&["trust", "--yes"]).arg(folder).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }

    /// Starts the daemon and waits until it answers.
    ///
    /// # Panics
    /// If it does not answer.
    pub fn daemon(&self) -> Daemon<'_> {
        self.start().wait_until_ready()
    }

    /// Prepares the start of a daemon.
    pub fn start(&self) -> Start<'_> {
        // The daemon ends with the case, even if the case panics.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).arg(Home::program()).arg("_hostd");
        self.set_environment(&mut command);
        Start { home: self, command }
    }

    /// Returns the standard error of all daemons of this home.
    pub fn stderr(&self) -> String {
        let bytes = std::fs::read(self.directory.path().join("stderr")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Returns every event of the log, in order.
    pub fn events(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(self.path().join("log/hostd.log")).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Waits for an event of `kind` that `wanted` accepts.
    ///
    /// # Panics
    /// If none arrives.
    #[track_caller]
    pub fn wait_for_event(&self, kind: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        wait_until(&format!("the event {kind}"), || {
            let events = self.events();
            let found = events.iter().find(|event| event["kind"] == kind && wanted(event)).cloned();
            found.ok_or(events)
        })
    }

    /// Counts the events of `kind` about a container.
    pub fn count_events(&self, kind: &str, name: &str) -> usize {
        let events = self.events();
        events.iter().filter(|event| event["kind"] == kind && event["containerName"] == name).count()
    }

    /// Returns every file below the home with its content.
    pub fn files(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let mut found = Vec::new();
        let mut directories = vec![self.path()];
        while let Some(directory) = directories.pop() {
            for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
                let kind = entry.file_type().unwrap();
                if kind.is_dir() {
                    directories.push(entry.path());
                } else if kind.is_file() {
                    found.push((entry.path(), std::fs::read(entry.path()).unwrap_or_default()));
                }
            }
        }
        found
    }

    /// Returns the mode of a file below the home, without its type.
    ///
    /// # Panics
    /// If the file does not exist.
    #[track_caller]
    pub fn mode(&self, name: &str) -> u32 {
        let path = self.path().join(name);
        let metadata =
            std::fs::symlink_metadata(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        metadata.permissions().mode() & 0o7777
    }
}

impl Default for Home {
    fn default() -> Home {
        Home::new()
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("output of its daemons:\n{}", self.stderr());
            for event in self.events() {
                eprintln!("{event}");
            }
        }
        // New processes may appear while these are ended.
        let start = Instant::now();
        loop {
            let left = descendants();
            if left.is_empty() || start.elapsed() > TIMEOUT {
                break;
            }
            for pid in left {
                let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
                // Each is a descendant of this process, and no other thread reaps at this time.
                let _ = pid.map(|pid| kill_process(pid, Signal::KILL));
            }
            while let Ok(Some(_)) = rustix::process::wait(rustix::process::WaitOptions::NOHANG) {}
        }
    }
}

/// A daemon that has not been started yet.
#[derive(Debug)]
pub struct Start<'a> {
    home: &'a Home,
    command: Command,
}

impl<'a> Start<'a> {
    /// Adds an argument of `_hostd`.
    pub fn argument(mut self, argument: &str) -> Start<'a> {
        self.command.arg(argument);
        self
    }

    /// Sets a variable of its environment.
    pub fn variable(mut self, name: &str, value: &str) -> Start<'a> {
        self.command.env(name, value);
        self
    }

    /// Starts it without waiting.
    ///
    /// # Panics
    /// If the program cannot be started.
    pub fn spawn(mut self) -> Daemon<'a> {
        let printed = File::options()
            .append(true)
            .create(true)
            .open(self.home.directory.path().join("stderr"))
            .unwrap();
        let child = self
            .command
            .stdout(printed.try_clone().unwrap())
            .stderr(printed)
            .spawn()
            .expect("setpriv (util-linux)");
        Daemon { home: self.home, child, ended: None }
    }

    /// Starts it, and waits until it answers.
    ///
    /// # Panics
    /// If it does not answer.
    #[track_caller]
    pub fn wait_until_ready(self) -> Daemon<'a> {
        let mut daemon = self.spawn();
        let start = Instant::now();
        while !rpc::answers(daemon.home) {
            let ended = daemon.has_ended();
            assert!(
                ended.is_none() && start.elapsed() < TIMEOUT,
                "the daemon does not answer ({ended:?}); output:\n{}",
                daemon.home.stderr()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        daemon
    }
}

/// A running daemon. Dropping it kills it.
#[derive(Debug)]
pub struct Daemon<'a> {
    home: &'a Home,
    child: Child,
    ended: Option<ExitStatus>,
}

impl Daemon<'_> {
    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Kills the daemon with SIGKILL.
    ///
    /// # Panics
    /// If it had ended before.
    #[track_caller]
    pub fn kill(mut self) {
        assert!(self.has_ended().is_none(), "it had ended already; output:\n{}", self.home.stderr());
        self.child.kill().unwrap();
        self.ended = Some(self.child.wait().unwrap());
    }

    /// Sends a signal to the daemon.
    ///
    /// # Panics
    /// If it has ended.
    #[track_caller]
    pub fn signal(&mut self, signal: Signal) {
        assert!(self.has_ended().is_none(), "it has ended; output:\n{}", self.home.stderr());
        // Our own child, not waited for, so the process id is valid.
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Returns the exit status, if the daemon has ended.
    ///
    /// # Panics
    /// If `waitpid(2)` fails.
    pub fn has_ended(&mut self) -> Option<ExitStatus> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().unwrap();
        }
        self.ended
    }

    /// Waits until the daemon exits by itself.
    ///
    /// # Panics
    /// If it does not exit.
    #[track_caller]
    pub fn end(mut self) -> ExitStatus {
        self.wait_for_end()
    }

    #[track_caller]
    fn wait_for_end(&mut self) -> ExitStatus {
        wait_until("the daemon to end", || self.has_ended().ok_or("it runs"))
    }

    /// Sends `shutdown` over the socket, and waits until the daemon exits.
    ///
    /// # Panics
    /// If it does not exit, or exits with an error.
    #[track_caller]
    pub fn shut_down(mut self) {
        let answer = rpc::ask(self.home, &json!({"kind": "shutdown"}));
        assert_eq!(answer, json!({"ok": true, "result": {"scheduled": true}}));
        let status = self.wait_for_end();
        assert!(status.success(), "{status}; output:\n{}", self.home.stderr());
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
