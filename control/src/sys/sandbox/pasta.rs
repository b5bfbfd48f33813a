//! The way out of a sandbox: `pasta` (of passt), which is a user-mode network for one namespace.
//!
//! It attaches to the namespaces of a process and needs no privilege. Its own port forwarding is turned off in both
//! directions, and so is its mapping of the gateway to the host's loopback: what crosses from the host's localhost
//! to the inside is landfall's alone, and the inside reaches no server that the host keeps to itself.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use thiserror::Error;

use crate::sys::event_loop;

/// How long pasta may take to set up its interface. It takes about 20 ms; a machine under load takes longer.
const SETUP_MAX: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(2);

/// Why there is no way out.
#[derive(Debug, Error)]
pub enum PastaError {
    /// It is not on the PATH.
    #[error("pasta is not installed")]
    Missing,
    /// It could not be started.
    #[error("cannot start pasta")]
    Start(#[source] io::Error),
    /// It ended, and said this.
    #[error("pasta could not attach: {0}")]
    Refused(String),
    /// It did not get ready in time.
    #[error("pasta was not ready within {} s", SETUP_MAX.as_secs())]
    Slow,
}

/// A pasta that serves one namespace, until this value is dropped.
#[derive(Debug)]
pub struct Pasta {
    child: Child,
}

impl Pasta {
    /// Starts pasta for the namespaces of `pid`, and waits until its interface is up.
    ///
    /// In a process group of its own: Ctrl-C is for the command, which may well go on after it.
    pub fn attach(pid: u32) -> Result<Pasta, PastaError> {
        let program = find().ok_or(PastaError::Missing)?;
        let directory = tempfile::tempdir().map_err(PastaError::Start)?;
        let ready = directory.path().join("pid");
        let mut command = Command::new("/proc/self/exe");
        command.arg0("landfall").args(["_tied", "--"]).arg(program);
        command.args(["--foreground", "--quiet", "--config-net", "--no-map-gw"]);
        command.args(["-t", "none", "-u", "none", "-T", "none", "-U", "none"]);
        if rustix::process::geteuid().is_root() {
            // Started by root it would become nobody, who may not join the namespaces of root.
            command.args(["--runas", "0:0"]);
        }
        command.arg("--pid").arg(&ready).arg(pid.to_string());
        let child = command
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(PastaError::Start)?;
        let mut pasta = Pasta { child };
        pasta.wait_until_ready(&ready)?;
        Ok(pasta)
    }

    /// Its process id; pasta ending early is worth a word.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// It writes its pid file when everything is set up.
    fn wait_until_ready(&mut self, ready: &std::path::Path) -> Result<(), PastaError> {
        let deadline = Instant::now() + SETUP_MAX;
        loop {
            if fs::metadata(ready).is_ok_and(|file| file.len() > 0) {
                return Ok(());
            }
            if self.child.try_wait().map_err(PastaError::Start)?.is_some() {
                return Err(PastaError::Refused(self.last_words()));
            }
            if Instant::now() >= deadline {
                return Err(PastaError::Slow);
            }
            std::thread::sleep(POLL);
        }
    }

    fn last_words(&mut self) -> String {
        let mut text = Vec::new();
        if let Some(stderr) = self.child.stderr.take() {
            let _ = stderr.take(4096).read_to_end(&mut text);
        }
        let text = String::from_utf8_lossy(&text).into_owned();
        // Where there is no system log it complains about that, too.
        let words = text.lines().rfind(|line| !line.trim().is_empty() && !line.contains("to syslog"));
        words.unwrap_or("it gave no reason").trim().to_owned()
    }
}

impl Drop for Pasta {
    fn drop(&mut self) {
        // Our own child, not yet waited for: its process id is still its own.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Where pasta is installed, if it is.
pub fn find() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_else(|| OsString::from("/usr/bin:/bin"));
    std::env::split_paths(&path)
        .map(|directory| directory.join("pasta"))
        .find(|file| rustix::fs::access(file, rustix::fs::Access::EXEC_OK).is_ok() && file.is_file())
}

/// Whether the device behind pasta's interface may be opened. Distributions let everybody (mode 666); some machines
/// and most containers do not.
pub fn tun_is_usable() -> bool {
    let access = rustix::fs::Access::READ_OK | rustix::fs::Access::WRITE_OK;
    rustix::fs::access("/dev/net/tun", access).is_ok()
}

/// `landfall _tied`: becomes `command`, and gets SIGTERM should the process that started it die.
pub fn tied(command: &[OsString]) -> io::Error {
    let Some((program, arguments)) = command.split_first() else {
        return io::Error::from(io::ErrorKind::InvalidInput);
    };
    if let Err(errno) = rustix::process::set_parent_process_death_signal(Some(Signal::TERM)) {
        return errno.into();
    }
    if let Err(error) = event_loop::unblock() {
        return error;
    }
    Command::new(program).args(arguments).exec()
}
