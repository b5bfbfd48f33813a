//! One call of a program: its exit status, both outputs, and a time after which it is ended.

use std::io;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::net::unix::pipe;
use tokio::process::Command;

use super::machine::NOT_FOUND;
use crate::sys::child::Running;

/// The exit status of a call that was ended, as `timeout(1)` tells it.
const TIMED_OUT: i32 = 124;
/// The exit status of a program that cannot be run, as shells tell it.
const NOT_RUN: i32 = 126;
/// What a signal's number is added to, as shells tell it.
const SIGNALLED: i32 = 128;
/// How much of an output is kept, in bytes. The status of a tailnet has some kilobytes for each of its machines.
const OUTPUT_BYTES_MAX: usize = 16 * 1024 * 1024;
/// How much is read at once, in bytes: what a pipe holds.
const PIECE_BYTES: usize = 64 * 1024;

/// How a call ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Called {
    /// Its exit status.
    pub(super) code: i32,
    /// Its standard output.
    pub(super) stdout: Vec<u8>,
    /// Its standard error; why there was no call, if there was none.
    pub(super) stderr: Vec<u8>,
}

/// Runs a program to its end, or for `limit` at most: then it is killed, and whatever it started with it. Dropping the
/// future kills it, too.
pub(super) async fn call(program: &Path, words: &[String], limit: Duration) -> Called {
    match attempt(program, words, limit).await {
        Ok(called) => called,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            said(NOT_FOUND, format!("{} was not found on PATH", program.display()))
        }
        Err(error) => said(NOT_RUN, error.to_string()),
    }
}

fn said(code: i32, text: String) -> Called {
    Called { code, stderr: text.into_bytes(), stdout: Vec::new() }
}

async fn attempt(program: &Path, words: &[String], limit: Duration) -> io::Result<Called> {
    let (stdout, out) = io::pipe()?;
    let (stderr, err) = io::pipe()?;
    let mut command = Command::new(program);
    command.args(words).stdin(Stdio::null()).stdout(out).stderr(err).process_group(0).kill_on_drop(true);
    let mut running = Running(command.spawn()?);
    // The command holds the writing ends.
    drop(command);
    let mut stdout = Output::new(stdout)?;
    let mut stderr = Output::new(stderr)?;
    match tokio::time::timeout(limit, wait(&mut running, &mut stdout, &mut stderr)).await {
        Err(_) => Ok(said(TIMED_OUT, format!("timed out after {}ms", limit.as_millis()))),
        Ok(status) => {
            let code = exit_code(status?);
            Ok(Called { code, stdout: stdout.rest(), stderr: stderr.rest() })
        }
    }
}

/// Reads until the program has ended, so that a full pipe does not stop it. What it left behind may hold the pipes for as
/// long as it likes.
async fn wait(running: &mut Running, stdout: &mut Output, stderr: &mut Output) -> io::Result<ExitStatus> {
    loop {
        tokio::select! {
            status = running.0.wait() => return status,
            more = stdout.more(), if stdout.open => more?,
            more = stderr.more(), if stderr.open => more?,
        }
    }
}

fn exit_code(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status.code().or_else(|| status.signal().map(|signal| SIGNALLED + signal)).unwrap_or(NOT_RUN)
}

/// What came of one pipe.
struct Output {
    pipe: pipe::Receiver,
    open: bool,
    bytes: Vec<u8>,
}

impl Output {
    fn new(pipe: io::PipeReader) -> io::Result<Output> {
        Ok(Output { pipe: pipe::Receiver::from_owned_fd(pipe.into())?, open: true, bytes: Vec::new() })
    }

    async fn more(&mut self) -> io::Result<()> {
        self.pipe.readable().await?;
        let mut piece = vec![0; PIECE_BYTES];
        match self.pipe.try_read(&mut piece) {
            Ok(0) => self.open = false,
            Ok(count) => self.keep(&piece[..count]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Everything, with what lies in the pipe when the program has ended.
    fn rest(mut self) -> Vec<u8> {
        let mut piece = vec![0; PIECE_BYTES];
        // Somebody who was left behind may write as fast as we read, so there is an end to it.
        while self.bytes.len() < OUTPUT_BYTES_MAX {
            match rustix::io::read(&self.pipe, &mut piece) {
                Ok(count) if count > 0 => self.keep(&piece[..count]),
                _ => break,
            }
        }
        self.bytes
    }

    /// Keeps as much as there is room for.
    fn keep(&mut self, piece: &[u8]) {
        let room = OUTPUT_BYTES_MAX - self.bytes.len();
        self.bytes.extend_from_slice(&piece[..piece.len().min(room)]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn shell(script: &str, limit: Duration) -> Called {
        call(Path::new("sh"), &["-c".to_owned(), script.to_owned()], limit).await
    }

    fn rt() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
    }

    #[test]
    fn a_call_tells_its_status_and_both_outputs() {
        let called = rt().block_on(shell("echo out; echo err >&2; exit 3", Duration::from_secs(20)));
        assert_eq!(called, Called { code: 3, stdout: b"out\n".to_vec(), stderr: b"err\n".to_vec() });
    }

    #[test]
    fn a_call_that_hangs_is_killed_with_all_that_it_started() {
        let begin = std::time::Instant::now();
        let called = rt().block_on(shell("sleep 600 & sleep 600", Duration::from_millis(50)));
        assert_eq!(called, said(124, "timed out after 50ms".to_owned()));
        assert!(begin.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn outputs_larger_than_a_pipe_do_not_stop_a_call() {
        let script = "head -c 1000000 /dev/zero; head -c 1000000 /dev/zero >&2";
        let called = rt().block_on(shell(script, Duration::from_secs(20)));
        assert_eq!((called.code, called.stdout.len(), called.stderr.len()), (0, 1_000_000, 1_000_000));
    }

    #[test]
    fn what_a_call_leaves_behind_is_not_waited_for() {
        let called = rt().block_on(shell("sleep 600 & echo $!", Duration::from_secs(20)));
        assert_eq!(called.code, 0);
        let left: i32 = String::from_utf8(called.stdout).unwrap().trim().parse().unwrap();
        let left = rustix::process::Pid::from_raw(left).unwrap();
        // Our own call's child: nobody else has its number while it sleeps.
        let _ = rustix::process::kill_process(left, rustix::process::Signal::KILL);
    }

    #[test]
    fn a_program_that_is_not_there_is_status_127() {
        let called = rt().block_on(call(Path::new("no-such-program"), &[], Duration::from_secs(20)));
        assert_eq!(called.code, NOT_FOUND);
        assert_eq!(called.stderr, b"no-such-program was not found on PATH");
    }
}
