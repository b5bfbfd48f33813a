//! Running a command of a folder: in the folder, with little environment, for a bounded time.
//!
//! A command gets a process group of its own, and that group is killed when the time is up or nobody waits any more; as
//! long as its leader has not been waited for, the group's number cannot be another's. What a command leaves behind when
//! it ends in time is left alone (that is how a `start` starts something), but nobody reads its output any longer.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use thiserror::Error;
use tokio::net::unix::pipe;

use super::approved::{Approved, Basis};
use crate::name::escape;
use crate::registration::model::ContainerName;
use crate::registry::trust_file::NotTrusted;
use crate::running::Running;

/// How much of the end of a command's output is kept, in bytes.
const TAIL_BYTES_MAX: usize = 4_096;
/// How long a line of it may be that goes into a reason, in characters.
const LINE_CHARS_MAX: usize = 300;
/// Where programs are looked for when the daemon's own environment does not say.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A command, and where and for whom it runs.
#[derive(Clone, Debug)]
pub struct Command {
    words: Vec<String>,
    /// What permits it; without, it does not run.
    basis: Option<Basis>,
    container: String,
    trust_folder: bool,
    timeout: Duration,
    more: Vec<(&'static str, &'static str)>,
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
            container: container.to_string(),
            trust_folder: approved.settings().trust_folder,
            timeout,
            more: Vec::new(),
        }
    }

    /// With one more variable in its environment.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: &'static str) -> Command {
        self.more.push((name, value));
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
            ran = self.run_in(basis.folder()) => ran,
            reason = basis.revoked(changes) => Err(CommandError::NotTrusted(reason)),
        }
    }

    async fn run_in(&self, folder: &Path) -> Result<Ended, CommandError> {
        let path = std::env::var_os("PATH").unwrap_or_else(|| PATH.into());
        let program = self.program(&path, folder)?;
        let failed = |error: io::Error| CommandError::Start(self.name().to_owned(), error.to_string());
        let (output, mut running) = self.spawn(&program, &path, folder).map_err(failed)?;
        let mut tail = Tail::default();
        let status = tokio::time::timeout(self.timeout, wait(&mut running, &output, &mut tail)).await;
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

    fn spawn(&self, program: &Path, path: &OsString, folder: &Path) -> io::Result<(pipe::Receiver, Running)> {
        let (reader, writer) = io::pipe()?;
        let mut command = tokio::process::Command::new(program);
        command
            .arg0(self.name())
            .args(self.words.iter().skip(1))
            .current_dir(folder)
            .env_clear()
            .env("PATH", path)
            .env("LANDFALL_CONTAINER_NAME", &self.container)
            .envs(std::env::var_os("HOME").map(|home| ("HOME", home)))
            .envs(self.more.iter().copied())
            .stdin(Stdio::null())
            .stdout(writer.try_clone()?)
            .stderr(writer)
            .process_group(0);
        let running = Running(command.spawn()?);
        Ok((pipe::Receiver::from_owned_fd(reader.into())?, running))
    }

    /// The program's own file, found as a shell would, and outside of the folder.
    fn program(&self, path: &OsString, folder: &Path) -> Result<PathBuf, CommandError> {
        let name = Path::new(self.name());
        let candidates: Vec<PathBuf> = if self.name().contains('/') {
            vec![folder.join(name)]
        } else {
            // A relative directory in PATH would be one of the folder's.
            std::env::split_paths(path)
                .filter(|place| place.is_absolute())
                .map(|place| place.join(name))
                .collect()
        };
        let found = candidates
            .into_iter()
            .find(|file| rustix::fs::access(file, rustix::fs::Access::EXEC_OK).is_ok() && file.is_file())
            .ok_or_else(|| CommandError::NotFound(self.name().to_owned()))?;
        if !self.trust_folder {
            // Both with every link followed: a link from outside may lead into the folder, too.
            let real = |path: &Path| {
                std::fs::canonicalize(path).map_err(|error| {
                    CommandError::Start(self.name().to_owned(), format!("{}: {error}", path.display()))
                })
            };
            // The folder's own path has no links.
            if real(&found)?.starts_with(folder) || found.starts_with(folder) {
                return Err(CommandError::InFolder(self.name().to_owned()));
            }
        }
        Ok(found)
    }
}

/// Reads until the command has ended, so that a full pipe does not stop it.
async fn wait(running: &mut Running, output: &pipe::Receiver, tail: &mut Tail) -> io::Result<ExitStatus> {
    let mut open = true;
    loop {
        tokio::select! {
            status = running.0.wait() => return status,
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
