//! Helpers of the tests of the real binary.

#![expect(clippy::unwrap_used, reason = "a test that cannot continue reports the line")]

use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

/// The limit of every wait; each awaited event takes less than a tenth of it.
pub(crate) const WAIT_MAX: Duration = Duration::from_secs(20);

/// Returns a command for the binary, without the environment of the tests.
pub(crate) fn landfall() -> Command {
    program(Path::new(env!("CARGO_BIN_EXE_landfall")))
}

/// Runs `landfall` with these arguments until it ends.
pub(crate) fn output(arguments: &[&str]) -> Output {
    landfall().args(arguments).stdin(Stdio::null()).output().unwrap()
}

pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn program(path: &Path) -> Command {
    let mut command = Command::new(path);
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default()).env("LC_ALL", "C");
    command
}

/// Returns the same command with the default action for all signals. The parent of the tests may ignore some (`nohup`, a
/// shell's `&`), every program inherits that, and a shell cannot trap a signal that was ignored when it started.
pub(crate) fn with_default_signals(command: &Command) -> Command {
    let mut with_defaults = program(Path::new("env"));
    with_defaults.arg("--default-signal").arg(command.get_program()).args(command.get_args());
    with_defaults
}

/// A copy of the binary that every user may execute, to be run as `nobody`.
pub(crate) struct Nobody {
    directory: tempfile::TempDir,
}

impl Nobody {
    /// Returns `None` if the tests do not run as root, and so cannot change their user.
    pub(crate) fn new() -> Option<Nobody> {
        if !rustix::process::geteuid().is_root() {
            return None;
        }
        let directory = tempfile::Builder::new().prefix("landfall-nobody").tempdir().unwrap();
        std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let nobody = Nobody { directory };
        // Another process writes the copy. If this one had the file open for writing while another test starts a program,
        // that program would inherit the descriptor, and the copy could not be executed (ETXTBSY).
        let copied =
            Command::new("cp").arg(env!("CARGO_BIN_EXE_landfall")).arg(nobody.path()).status().unwrap();
        assert!(copied.success());
        std::fs::set_permissions(nobody.path(), PermissionsExt::from_mode(0o755)).unwrap();
        Some(nobody)
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("landfall")
    }

    /// Returns a command for `landfall` as user 65534, without groups and capabilities.
    pub(crate) fn landfall(&self) -> Command {
        let mut command = program(Path::new("setpriv"));
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"]);
        command.arg(self.path()).current_dir(self.directory.path());
        command
    }
}

/// A running program, with the lines of both its outputs as they arrive. Killed at the end of the test.
pub(crate) struct Running {
    pub(crate) child: Child,
    out: Receiver<String>,
    err: Receiver<String>,
    received: Vec<String>,
}

impl Running {
    pub(crate) fn start(mut command: Command) -> Running {
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let out = lines(child.stdout.take().unwrap());
        let err = lines(child.stderr.take().unwrap());
        Running { child, out, err, received: Vec::new() }
    }

    /// Waits for a line on standard output that contains `text`.
    pub(crate) fn out(&mut self, text: &str) -> String {
        Self::wait(&self.out, &mut self.received, text)
    }

    /// Waits for a line on standard error that contains `text`.
    pub(crate) fn err(&mut self, text: &str) -> String {
        Self::wait(&self.err, &mut self.received, text)
    }

    /// Waits for the end of standard output: no process has it open any more.
    pub(crate) fn out_ends(&mut self) {
        let deadline = Instant::now() + WAIT_MAX;
        loop {
            match self.out.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => self.received.push(line),
                Err(mpsc::RecvTimeoutError::Disconnected) => return,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    panic!("standard output is open; received {:#?}", self.received)
                }
            }
        }
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), signal).unwrap();
    }

    pub(crate) fn exit_code(&mut self) -> Option<i32> {
        let deadline = Instant::now() + WAIT_MAX;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < deadline, "the program did not end; received {:#?}", self.received);
            std::thread::yield_now();
        }
    }

    fn wait(lines: &Receiver<String>, received: &mut Vec<String>, text: &str) -> String {
        let deadline = Instant::now() + WAIT_MAX;
        loop {
            let Ok(line) = lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) else {
                panic!("no line with {text:?}; received {received:#?}");
            };
            received.push(line.clone());
            if line.contains(text) {
                return line;
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn lines(stream: impl Read + Send + 'static) -> Receiver<String> {
    let (send, receive) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            if send.send(line).is_err() {
                return;
            }
        }
    });
    receive
}
