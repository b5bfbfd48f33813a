//! One call of a program with a timeout. The result is the exit status and both outputs.

use std::io;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::net::unix::pipe;
use tokio::process::Command;

use super::machine::NOT_FOUND;
use crate::sys::child::Running;

/// The exit status of a call that timed out, as in `timeout(1)`.
const TIMED_OUT: i32 = 124;
/// The exit status of a program that cannot be run, as in shells.
const NOT_RUN: i32 = 126;
/// Added to the number of a signal to form an exit status, as in shells.
const SIGNALLED: i32 = 128;
/// The maximum output that is kept, in bytes. The status of a tailnet takes some kilobytes for each of its machines.
const OUTPUT_BYTES_MAX: usize = 16 * 1024 * 1024;
/// The size of one read, in bytes: the capacity of a pipe.
const CHUNK_BYTES: usize = 64 * 1024;

/// The result of a call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Called {
    /// The exit status.
    pub(super) code: i32,
    /// The standard output.
    pub(super) stdout: Vec<u8>,
    /// The standard error, or an error text if the program did not run.
    pub(super) stderr: Vec<u8>,
}

/// Runs a program until it ends or `limit` passes. On a timeout, the program and its process group are killed. Dropping the
/// future kills them, too.
pub(super) async fn call(program: &Path, words: &[String], limit: Duration) -> Called {
    match attempt(program, words, limit).await {
        Ok(called) => called,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            unsuccessful(NOT_FOUND, format!("{} was not found on PATH", program.display()))
        }
        Err(error) => unsuccessful(NOT_RUN, error.to_string()),
    }
}

fn unsuccessful(code: i32, text: String) -> Called {
    Called { code, stderr: text.into_bytes(), stdout: Vec::new() }
}

async fn attempt(program: &Path, words: &[String], limit: Duration) -> io::Result<Called> {
    let (stdout, out) = io::pipe()?;
    let (stderr, err) = io::pipe()?;
    let mut command = Command::new(program);
    command.args(words).stdin(Stdio::null()).stdout(out).stderr(err).process_group(0).kill_on_drop(true);
    let mut running = Running(command.spawn()?);
    // `command` holds the write ends of the pipes.
    drop(command);
    let mut stdout = Output::new(stdout)?;
    let mut stderr = Output::new(stderr)?;
    match tokio::time::timeout(limit, wait(&mut running, &mut stdout, &mut stderr)).await {
        Err(_) => Ok(unsuccessful(TIMED_OUT, format!("timed out after {}ms", limit.as_millis()))),
        Ok(status) => {
            let code = exit_code(status?);
            Ok(Called { code, stdout: stdout.rest(), stderr: stderr.rest() })
        }
    }
}

/// Reads both outputs until the program ends, so that a full pipe does not block it. Does not wait for end of file:
/// processes that the program left behind may hold the pipes open.
async fn wait(running: &mut Running, stdout: &mut Output, stderr: &mut Output) -> io::Result<ExitStatus> {
    loop {
        tokio::select! {
            status = running.0.wait() => return status,
            read_some = stdout.read_some(), if stdout.open => read_some?,
            read_some = stderr.read_some(), if stderr.open => read_some?,
        }
    }
}

fn exit_code(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status.code().or_else(|| status.signal().map(|signal| SIGNALLED + signal)).unwrap_or(NOT_RUN)
}

/// One output pipe and the bytes that were read from it.
struct Output {
    pipe: pipe::Receiver,
    open: bool,
    bytes: Vec<u8>,
}

impl Output {
    fn new(pipe: io::PipeReader) -> io::Result<Output> {
        Ok(Output { pipe: pipe::Receiver::from_owned_fd(pipe.into())?, open: true, bytes: Vec::new() })
    }

    async fn read_some(&mut self) -> io::Result<()> {
        self.pipe.readable().await?;
        let mut chunk = vec![0; CHUNK_BYTES];
        match self.pipe.try_read(&mut chunk) {
            Ok(0) => self.open = false,
            Ok(count) => self.keep(&chunk[..count]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Returns all bytes, including those in the pipe at the end of the program.
    fn rest(mut self) -> Vec<u8> {
        let mut chunk = vec![0; CHUNK_BYTES];
        // The bound matters: a process that was left behind may write as fast as this loop reads.
        while self.bytes.len() < OUTPUT_BYTES_MAX {
            match rustix::io::read(&self.pipe, &mut chunk) {
                Ok(count) if count > 0 => self.keep(&chunk[..count]),
                _ => break,
            }
        }
        self.bytes
    }

    /// Appends bytes up to the maximum.
    fn keep(&mut self, chunk: &[u8]) {
        let room = OUTPUT_BYTES_MAX - self.bytes.len();
        self.bytes.extend_from_slice(&chunk[..chunk.len().min(room)]);
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
    fn a_call_returns_its_status_and_both_outputs() {
        let called = rt().block_on(shell("echo out; echo err >&2; exit 3", Duration::from_secs(20)));
        assert_eq!(called, Called { code: 3, stdout: b"out\n".to_vec(), stderr: b"err\n".to_vec() });
    }

    #[test]
    fn a_call_that_times_out_is_killed_with_its_process_group() {
        let start = std::time::Instant::now();
        let called = rt().block_on(shell("sleep 600 & sleep 600", Duration::from_millis(50)));
        assert_eq!(called, unsuccessful(124, "timed out after 50ms".to_owned()));
        assert!(start.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn outputs_larger_than_a_pipe_do_not_block_a_call() {
        let script = "head -c 1000000 /dev/zero; head -c 1000000 /dev/zero >&2";
        let called = rt().block_on(shell(script, Duration::from_secs(20)));
        assert_eq!((called.code, called.stdout.len(), called.stderr.len()), (0, 1_000_000, 1_000_000));
    }

    #[test]
    fn processes_left_behind_are_not_waited_for() {
        let called = rt().block_on(shell("sleep 600 & echo $!", Duration::from_secs(20)));
        assert_eq!(called.code, 0);
        let left: i32 = String::from_utf8(called.stdout).unwrap().trim().parse().unwrap();
        let left = rustix::process::Pid::from_raw(left).unwrap();
        // The process was started by this test and sleeps, so its id is not reused.
        let _ = rustix::process::kill_process(left, rustix::process::Signal::KILL);
    }

    #[test]
    fn a_missing_program_is_status_127() {
        let called = rt().block_on(call(Path::new("no-such-program"), &[], Duration::from_secs(20)));
        assert_eq!(called.code, NOT_FOUND);
        assert_eq!(called.stderr, b"no-such-program was not found on PATH");
    }
}
