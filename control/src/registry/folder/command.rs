//! Runs a command of a folder: in the folder, with a minimal environment, with a time limit.
//!
//! A command gets its own process group. The group is killed when the time limit passes or the caller drops the future.
//! Until its leader has been waited for, the id of the group cannot be reused. Processes that a command leaves behind when
//! it ends in time continue (a `start` command starts a service that way), but their output is no longer read.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;
use std::time::Duration;

use landfall_engine::channel::{Channel, ChannelError, receive};
use rustix::net::RecvFlags;
use thiserror::Error;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::unix::pipe;
use tokio::task::spawn_blocking;

use super::approved::{Approved, Basis};
use super::invocation::command;
use crate::model::name::escape;
use crate::model::registration::ContainerName;
use crate::registry::trust_file::NotTrusted;
use crate::sys::child::Running;
use crate::sys::launcher::{Invocation, LauncherError, Refusal, Reply, launcher};
use crate::sys::readiness::watched;

/// The number of bytes that are kept from the end of a command's output.
const TAIL_BYTES_MAX: usize = 4_096;
/// The longest report of a command's end, in bytes.
const REPLY_BYTES_MAX: usize = 4_096;
/// The maximum length of the output line that becomes a reason, in characters.
const LINE_CHARS_MAX: usize = 300;

/// A command, with its folder and its container.
#[derive(Clone, Debug)]
pub struct Command {
    words: Vec<String>,
    /// The approval; without one the command does not run.
    basis: Option<Basis>,
    container: ContainerName,
    trust_folder: bool,
    timeout: Duration,
    build: Option<bool>,
}

/// The result of a command that ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Its exit status; `None` if a signal ended it.
    pub code: Option<i32>,
    /// The last line of its output that is not empty, escaped and truncated; or its status, without output.
    pub last_line: String,
}

/// The reasons why a command did not end by itself.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CommandError {
    /// The approval of the folder's file is missing or was revoked.
    #[error("{file} {0}", file = super::FILE)]
    NotTrusted(NotTrusted),
    /// The program does not exist.
    #[error("program {0:?} was not found")]
    NotFound(String),
    /// The container may have written the program.
    #[error(
        "program {0:?} is in the folder, which the container may write to; name one outside, or set trust-folder = true"
    )]
    InFolder(String),
    /// The program could not be started.
    #[error("program {0:?} cannot be started: {1}")]
    Start(String, String),
    /// The command was killed after its time limit.
    #[error("it took longer than {} s", .0.as_secs())]
    TooLong(Duration),
}

impl Ended {
    /// Returns whether the status is 0.
    pub fn succeeded(&self) -> bool {
        self.code == Some(0)
    }
}

impl Command {
    /// Returns a command from the settings of `approved`, for a container. It runs in the approved folder.
    pub fn new(
        words: &[String],
        approved: &Approved,
        container: &ContainerName,
        timeout: Duration,
    ) -> Command {
        Command {
            words: words.to_vec(),
            basis: approved.basis().cloned(),
            container: container.clone(),
            trust_folder: approved.settings().trust_folder,
            timeout,
            build: None,
        }
    }

    /// Marks the command as part of a restart. Its environment then has whether the image is built.
    #[must_use]
    pub fn of_restart(mut self, build: bool) -> Command {
        self.build = Some(build);
        self
    }

    /// Checks the approval and runs the command until it ends. Dropping the future kills it, and so does a revocation.
    ///
    /// # Errors
    /// [`CommandError`] if it did not start, or did not end in time.
    pub async fn run(&self) -> Result<Ended, CommandError> {
        let basis = self.basis.as_ref().ok_or(CommandError::NotTrusted(NotTrusted::NotApproved))?;
        // Subscribe before the check, so that no change in between is missed.
        let changes = basis.changes();
        basis.check().await.map_err(CommandError::NotTrusted)?;
        tokio::select! {
            ran = self.run_on(basis) => ran,
            reason = basis.revoked(changes) => Err(CommandError::NotTrusted(reason)),
        }
    }

    async fn run_on(&self, basis: &Basis) -> Result<Ended, CommandError> {
        let failed = |error: io::Error| CommandError::Start(self.name().to_owned(), error.to_string());
        let (output, writer) = io::pipe().map_err(failed)?;
        let mut started = self.start(basis, writer.into()).await?;
        let output = pipe::Receiver::from_owned_fd(output.into()).map_err(failed)?;
        let mut tail = Tail::default();
        let status = tokio::time::timeout(self.timeout, wait(&mut started, &output, &mut tail)).await;
        match status {
            Err(_) => Err(CommandError::TooLong(self.timeout)),
            Ok(Err(error)) => Err(failed(error)),
            Ok(Ok(status)) => {
                // Read the rest of its output from the pipe. Later output of processes that it left behind is not read.
                tail.drain_pipe(output);
                Ok(Ended {
                    code: status.code(),
                    last_line: tail.last_line().unwrap_or_else(|| status_text(status)),
                })
            }
        }
    }

    fn name(&self) -> &str {
        self.words.first().map_or("", String::as_str)
    }

    /// Starts the command in the approved folder, through the launcher if this process has dropped its privileges.
    async fn start(&self, basis: &Basis, output: OwnedFd) -> Result<Started, CommandError> {
        let invocation = Invocation {
            words: self.words.clone(),
            folder: basis.folder().to_owned(),
            container: self.container.clone(),
            build: self.build,
        };
        let Some(launcher) = launcher() else {
            let command = command(&invocation, self.trust_folder, output);
            let command = command.map_err(|refusal| self.refused(refusal))?;
            let child = tokio::process::Command::from(command).spawn();
            return child
                .map(|child| Started::Child(Running(child)))
                .map_err(|error| self.not_started(&error));
        };
        let text = basis.text().to_owned();
        let reply = spawn_blocking(move || launcher.command(invocation, text, output.as_fd()));
        match reply.await.map_err(|error| self.not_started(&error))? {
            Ok(channel) => Started::by_launcher(channel).map_err(|error| self.not_started(&error)),
            Err(LauncherError::Refused(refusal)) => Err(self.refused(refusal)),
            Err(error) => Err(self.not_started(&error)),
        }
    }

    fn not_started(&self, error: &dyn std::error::Error) -> CommandError {
        CommandError::Start(self.name().to_owned(), error.to_string())
    }

    fn refused(&self, refusal: Refusal) -> CommandError {
        match refusal {
            Refusal::NotApproved => CommandError::NotTrusted(NotTrusted::NotApproved),
            Refusal::NotFound => CommandError::NotFound(self.name().to_owned()),
            Refusal::InFolder => CommandError::InFolder(self.name().to_owned()),
            other => self.not_started(&other),
        }
    }
}

/// A running command. Dropping it kills its process group.
enum Started {
    Child(Running),
    /// Started by the launcher, which kills it when this channel is closed.
    Launched(AsyncFd<OwnedFd>),
}

impl Started {
    fn by_launcher(channel: Channel) -> io::Result<Started> {
        let channel = OwnedFd::from(channel);
        rustix::io::ioctl_fionbio(&channel, true)?;
        watched(channel, Interest::READABLE).map(Started::Launched)
    }

    async fn wait(&mut self) -> io::Result<ExitStatus> {
        match self {
            Started::Child(running) => running.0.wait().await,
            Started::Launched(channel) => loop {
                let mut ready = channel.readable().await?;
                match receive::<Reply>(channel.get_ref().as_fd(), REPLY_BYTES_MAX, RecvFlags::DONTWAIT) {
                    Err(ChannelError::WouldBlock) => ready.clear_ready(),
                    Ok(Some((Reply::Exited { status }, _))) => return Ok(ExitStatus::from_raw(status)),
                    _ => return Err(io::Error::other(LauncherError::Gone)),
                }
            },
        }
    }
}

/// Reads the output until the command ends, so that a full pipe does not block it.
async fn wait(started: &mut Started, output: &pipe::Receiver, tail: &mut Tail) -> io::Result<ExitStatus> {
    let mut open = true;
    loop {
        tokio::select! {
            status = started.wait() => return status,
            readable = output.readable(), if open => {
                readable?;
                let mut chunk = [0; TAIL_BYTES_MAX];
                match output.try_read(&mut chunk) {
                    Ok(0) => open = false,
                    Ok(length) => tail.add(&chunk[..length]),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error),
                }
            }
        }
    }
}

/// The last bytes of an output.
#[derive(Default)]
struct Tail(Vec<u8>);

impl Tail {
    fn add(&mut self, chunk: &[u8]) {
        self.0.extend_from_slice(chunk);
        let excess = self.0.len().saturating_sub(TAIL_BYTES_MAX);
        self.0.drain(..excess);
    }

    /// Reads the bytes that are in the pipe now, at most its capacity, since another writer may continue.
    fn drain_pipe(&mut self, output: pipe::Receiver) {
        const PIPE_BYTES: usize = 64 * 1_024;
        let Ok(output) = output.into_nonblocking_fd() else { return };
        let mut chunk = [0; TAIL_BYTES_MAX];
        for _ in 0..=PIPE_BYTES / TAIL_BYTES_MAX {
            match rustix::io::read(&output, &mut chunk) {
                Ok(length) if length > 0 => self.add(&chunk[..length]),
                _ => return,
            }
        }
    }

    fn last_line(&self) -> Option<String> {
        let text = String::from_utf8_lossy(&self.0);
        let line = text.lines().map(str::trim).rfind(|line| !line.is_empty())?;
        let mut cut: String = line.chars().take(LINE_CHARS_MAX).collect();
        if cut.len() < line.len() {
            cut.push('…');
        }
        Some(escape(&cut).into_owned())
    }
}

/// Returns for example `exit status: 3` or `signal: 9 (SIGKILL)`.
fn status_text(status: ExitStatus) -> String {
    status.to_string()
}
