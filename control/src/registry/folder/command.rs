//! Running a command of a folder: in the folder, with little environment, for a bounded time.
//!
//! A command gets a process group of its own, and that group is killed when the time is up or nobody waits any more; as
//! long as its leader has not been waited for, the group's number cannot be another's. What a command leaves behind when
//! it ends in time is left alone (that is how a `start` starts something), but nobody reads its output any longer.

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

/// How much of the end of a command's output is kept, in bytes.
const TAIL_BYTES_MAX: usize = 4_096;
/// The longest report of a command's end, in bytes.
const REPLY_BYTES_MAX: usize = 4_096;
/// How long a line of it may be that goes into a reason, in characters.
const LINE_CHARS_MAX: usize = 300;
/// A command, and where and for whom it runs.
#[derive(Clone, Debug)]
pub struct Command {
    words: Vec<String>,
    /// What permits it; without, it does not run.
    basis: Option<Basis>,
    container: ContainerName,
    trust_folder: bool,
    timeout: Duration,
    build: Option<bool>,
}

/// How a command ended that did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Its exit status; none if a signal ended it.
    pub code: Option<i32>,
    /// The last line of its output that is not empty, escaped and cut; or how it ended, if it said nothing.
    pub last_line: String,
}

/// Why a command did not end.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CommandError {
    /// The approval of the folder's file does not hold, or no longer.
    #[error("{file} {0}", file = super::FILE)]
    NotTrusted(NotTrusted),
    /// There is no such program.
    #[error("program {0:?} was not found")]
    NotFound(String),
    /// The program could be the container's own work.
    #[error(
        "program {0:?} is in the folder, which the container may write to; name one outside, or set trust-folder = true"
    )]
    InFolder(String),
    /// It could not be started.
    #[error("program {0:?} cannot be started: {1}")]
    Start(String, String),
    /// It was killed.
    #[error("it took longer than {} s", .0.as_secs())]
    TooLong(Duration),
}

impl Ended {
    /// It did what it is there for.
    pub fn succeeded(&self) -> bool {
        self.code == Some(0)
    }
}

impl Command {
    /// The command of `words`, which are among the settings of `approved`, for a container. It runs in the folder that was
    /// approved.
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

    /// As a command of a restart, which is given in its environment whether the image is built again.
    #[must_use]
    pub fn of_restart(mut self, build: bool) -> Command {
        self.build = Some(build);
        self
    }

    /// Checks the approval and runs it to its end. Dropping the future kills it; so does the end of the approval.
    ///
    /// # Errors
    /// [`CommandError`]: it did not start, or did not end in time.
    pub async fn run(&self) -> Result<Ended, CommandError> {
        let basis = self.basis.as_ref().ok_or(CommandError::NotTrusted(NotTrusted::NotApproved))?;
        // Before the check, so that no change in between is missed.
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
                // What it wrote before it ended lies in the pipe; what it left behind may write on, unread.
                tail.take_what_lies(output);
                Ok(Ended { code: status.code(), last_line: tail.last_line().unwrap_or_else(|| how(status)) })
            }
        }
    }

    fn name(&self) -> &str {
        self.words.first().map_or("", String::as_str)
    }

    /// Starts it in the folder that was approved; by the launcher, where this process has given up what a command may need.
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
        let asked = spawn_blocking(move || launcher.command(invocation, text, output.as_fd()));
        match asked.await.map_err(|error| self.not_started(&error))? {
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

/// A command that runs. Dropping it kills its process group.
enum Started {
    Child(Running),
    /// By the launcher, which kills it when this channel is closed.
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

/// Reads until the command has ended, so that a full pipe does not stop it.
async fn wait(started: &mut Started, output: &pipe::Receiver, tail: &mut Tail) -> io::Result<ExitStatus> {
    let mut open = true;
    loop {
        tokio::select! {
            status = started.wait() => return status,
            readable = output.readable(), if open => {
                readable?;
                let mut piece = [0; TAIL_BYTES_MAX];
                match output.try_read(&mut piece) {
                    Ok(0) => open = false,
                    Ok(length) => tail.add(&piece[..length]),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error),
                }
            }
        }
    }
}

/// The end of an output.
#[derive(Default)]
struct Tail(Vec<u8>);

impl Tail {
    fn add(&mut self, piece: &[u8]) {
        self.0.extend_from_slice(piece);
        let excess = self.0.len().saturating_sub(TAIL_BYTES_MAX);
        self.0.drain(..excess);
    }

    /// Takes what can be read at once: at most what a pipe holds, since a writer may be left.
    fn take_what_lies(&mut self, output: pipe::Receiver) {
        const PIPE_BYTES: usize = 64 * 1_024;
        let Ok(output) = output.into_nonblocking_fd() else { return };
        let mut piece = [0; TAIL_BYTES_MAX];
        for _ in 0..=PIPE_BYTES / TAIL_BYTES_MAX {
            match rustix::io::read(&output, &mut piece) {
                Ok(length) if length > 0 => self.add(&piece[..length]),
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

/// `exit status: 3`, `signal: 9 (SIGKILL)`.
fn how(status: ExitStatus) -> String {
    status.to_string()
}
