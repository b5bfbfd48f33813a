//! Outbound network of a sandbox: `pasta` (of passt), a user-mode network for one namespace.
//!
//! It attaches to the namespaces of a process and needs no privilege. Its port forwarding is disabled in both
//! directions, and so is its mapping of the gateway to the host's loopback: only landfall forwards from the host's
//! localhost into the sandbox, and the sandbox reaches no server on the host's loopback.

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

/// The longest wait for pasta's interface. It takes about 20 ms; a loaded machine takes longer.
const SETUP_MAX: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(2);

/// The reason that the sandbox has no outbound network.
#[derive(Debug, Error)]
pub enum PastaError {
    /// It is not on the PATH.
    #[error("pasta is not installed")]
    Missing,
    /// It could not be started.
    #[error("cannot start pasta")]
    Start(#[source] io::Error),
    /// It ended with this message.
    #[error("pasta could not attach: {0}")]
    Refused(String),
    /// It was not ready in time.
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
    /// It has a process group of its own: Ctrl-C is for the command, which may continue after it.
    pub fn attach(pid: u32) -> Result<Pasta, PastaError> {
        let program = find().ok_or(PastaError::Missing)?;
        let directory = tempfile::tempdir().map_err(PastaError::Start)?;
        let ready = directory.path().join("pid");
        let mut command = Command::new("/proc/self/exe");
        command.arg0("landfall").args(["_tied", "--"]).arg(program);
        command.args(["--foreground", "--quiet", "--config-net", "--no-map-gw"]);
        command.args(["-t", "none", "-u", "none", "-T", "none", "-U", "none"]);
        if rustix::process::geteuid().is_root() {
            // As root it would change to `nobody`, which may not join the namespaces of root.
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

    /// Its process id, for a watch: pasta that ends early is reported.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for its pid file, which pasta writes when it is set up.
    fn wait_until_ready(&mut self, ready: &std::path::Path) -> Result<(), PastaError> {
        let deadline = Instant::now() + SETUP_MAX;
        loop {
            if fs::metadata(ready).is_ok_and(|file| file.len() > 0) {
                return Ok(());
            }
            if self.child.try_wait().map_err(PastaError::Start)?.is_some() {
                return Err(PastaError::Refused(self.last_error_line()));
            }
            if Instant::now() >= deadline {
                return Err(PastaError::Slow);
            }
            std::thread::sleep(POLL);
        }
    }

    fn last_error_line(&mut self) -> String {
        let mut text = Vec::new();
        if let Some(stderr) = self.child.stderr.take() {
            let _ = stderr.take(4096).read_to_end(&mut text);
        }
        let text = String::from_utf8_lossy(&text).into_owned();
        // Without a system log, pasta complains about that, too.
        let line = text.lines().rfind(|line| !line.trim().is_empty() && !line.contains("to syslog"));
        line.unwrap_or("it gave no reason").trim().to_owned()
    }
}

impl Drop for Pasta {
    fn drop(&mut self) {
        // It is our child and not waited for, so its process id is still its own.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns the path of pasta, if it is installed.
pub fn find() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_else(|| OsString::from("/usr/bin:/bin"));
    std::env::split_paths(&path)
        .map(|directory| directory.join("pasta"))
        .find(|file| rustix::fs::access(file, rustix::fs::Access::EXEC_OK).is_ok() && file.is_file())
}

/// Whether this user may open the device of pasta's interface. Distributions allow every user (mode 666); some machines
/// and most containers do not.
pub fn tun_is_usable() -> bool {
    let access = rustix::fs::Access::READ_OK | rustix::fs::Access::WRITE_OK;
    rustix::fs::access("/dev/net/tun", access).is_ok()
}

/// `landfall _tied`: becomes `command`, which gets SIGTERM if its parent dies.
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
