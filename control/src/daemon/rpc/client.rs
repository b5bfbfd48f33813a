//! The client of the daemon: one request, one answer, and one time budget for connecting, writing and reading together.
//!
//! Before it sends a request, the client checks the uid of the listener. Otherwise a socket that another user created at the
//! path would receive the tokens of a registration. The size of the answer is bounded, and bytes after the first newline
//! are ignored (wire specification, A.1.1).

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use rustix::io::Errno;
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde_json::{Value, json};
use thiserror::Error;

/// The default budget of a call (wire specification, A.1.3).
pub const BUDGET: Duration = Duration::from_secs(3);
/// The budget of a probe.
pub const PROBE_BUDGET: Duration = Duration::from_secs(1);
/// The budget of a call that waits until the daemon has replayed its registrations, or until a registration has been
/// removed.
pub const PATIENT_BUDGET: Duration = Duration::from_secs(15);

/// The longest answer that is read, in bytes. A table of thousands of forwards is a tenth of it.
const ANSWER_BYTES_MAX: usize = 16 * 1024 * 1024;
/// The longest line of the event stream, in bytes.
const EVENT_BYTES_MAX: usize = 256 * 1024;
/// The size of one read, in bytes.
const CHUNK_BYTES: usize = 16 * 1024;

/// The reasons why a call has no result.
#[derive(Debug, Error)]
pub enum CallError {
    /// The connection failed, with the error of the system call.
    #[error(transparent)]
    Connect(io::Error),
    /// The connection broke.
    #[error(transparent)]
    Broken(io::Error),
    /// The daemon closed the connection before a complete line.
    #[error("the daemon ended the connection")]
    Ended,
    /// The budget has passed.
    #[error("daemon ack timeout after {}ms", .0.as_millis())]
    Timeout(Duration),
    /// The answer is invalid.
    #[error("invalid response from daemon")]
    Invalid,
    /// The daemon refused the request; its reason.
    #[error("{0}")]
    Refused(String),
    /// The listener at the socket is another user.
    #[error("the daemon's socket belongs to uid {0}")]
    ForeignSocket(u32),
}

impl CallError {
    /// Returns whether no daemon listens: the socket does not exist, or it is stale.
    pub fn is_absent(&self) -> bool {
        use io::ErrorKind::{ConnectionRefused, NotADirectory, NotFound};
        match self {
            CallError::Connect(error) => matches!(error.kind(), NotFound | ConnectionRefused | NotADirectory),
            _ => false,
        }
    }
}

/// A client of one daemon.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
    budget: Duration,
}

impl Client {
    /// Returns a client of the daemon at `socket`.
    pub fn new(socket: impl Into<PathBuf>) -> Client {
        Client { socket: socket.into(), budget: BUDGET }
    }

    /// Returns the same client with another budget.
    #[must_use]
    pub fn within(&self, budget: Duration) -> Client {
        Client { socket: self.socket.clone(), budget }
    }

    /// Sends one request and returns its `result`; null if absent.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn call(&self, request: &Value) -> Result<Value, CallError> {
        let budget = Budget::new(self.budget);
        let mut stream = connect(&self.socket, &budget)?;
        send(&mut stream, request, &budget)?;
        let mut lines = Lines { stream, buffer: Vec::new(), bytes_max: ANSWER_BYTES_MAX };
        parse_answer(&lines.next(Some(&budget))?)
    }

    /// Sends a request that consists of a kind alone.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn ask(&self, kind: &str) -> Result<Value, CallError> {
        self.call(&json!({ "kind": kind }))
    }

    /// Returns whether a daemon answers `list` (wire specification, A.8.1).
    pub fn is_reachable(&self) -> bool {
        self.ask("list").is_ok()
    }

    /// Opens a connection for the native listeners of a sandbox. The caller writes reports to it, one per line.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn native(&self, container: &str) -> Result<UnixStream, CallError> {
        let budget = Budget::new(self.budget);
        let mut stream = connect(&self.socket, &budget)?;
        send(&mut stream, &json!({ "kind": "native", "containerName": container }), &budget)?;
        let mut lines = Lines { stream, buffer: Vec::new(), bytes_max: EVENT_BYTES_MAX };
        parse_answer(&lines.next(Some(&budget))?)?;
        lines.stream.set_write_timeout(Some(REPORT_BUDGET)).map_err(CallError::Broken)?;
        Ok(lines.stream)
    }

    /// Subscribes to events of one container or of all. No event after the return is lost.
    ///
    /// # Errors
    /// [`CallError`]. The reference refuses, since it does not implement this kind.
    pub fn events(&self, container: Option<&str>) -> Result<Lines, CallError> {
        let budget = Budget::new(self.budget);
        let mut stream = connect(&self.socket, &budget)?;
        let mut request = json!({ "kind": "events" });
        if let (Some(name), Some(fields)) = (container, request.as_object_mut()) {
            fields.insert("containerName".to_owned(), name.into());
        }
        send(&mut stream, &request, &budget)?;
        let mut lines = Lines { stream, buffer: Vec::new(), bytes_max: EVENT_BYTES_MAX };
        parse_answer(&lines.next(Some(&budget))?)?;
        Ok(lines)
    }
}

/// How long the daemon may take to read a report.
const REPORT_BUDGET: Duration = Duration::from_secs(5);

/// The lines that a daemon sends.
#[derive(Debug)]
pub struct Lines {
    stream: UnixStream,
    buffer: Vec<u8>,
    bytes_max: usize,
}

impl Lines {
    /// Returns the next line without its newline. Waits until `deadline`, or without a bound.
    ///
    /// # Errors
    /// [`CallError::Timeout`] at the deadline; a partial line is kept for the next call. [`CallError::Ended`] at the end of
    /// the stream.
    pub fn line(&mut self, deadline: Option<Instant>) -> Result<Vec<u8>, CallError> {
        let budget = deadline.map(|end| Budget::new(end.saturating_duration_since(Instant::now())));
        self.next(budget.as_ref())
    }

    fn next(&mut self, budget: Option<&Budget>) -> Result<Vec<u8>, CallError> {
        let mut searched = 0;
        loop {
            let rest = self.buffer.get(searched..).unwrap_or_default();
            if let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                let mut line: Vec<u8> = self.buffer.drain(..=searched + end).collect();
                line.pop();
                return Ok(line);
            }
            searched = self.buffer.len();
            if searched > self.bytes_max {
                return Err(CallError::Invalid);
            }
            self.read_more(budget)?;
        }
    }

    fn read_more(&mut self, budget: Option<&Budget>) -> Result<(), CallError> {
        let remaining = budget.map(Budget::remaining).transpose()?;
        self.stream.set_read_timeout(remaining).map_err(CallError::Broken)?;
        let mut chunk = [0; CHUNK_BYTES];
        match self.stream.read(&mut chunk) {
            Ok(0) => Err(CallError::Ended),
            Ok(count) => {
                self.buffer.extend_from_slice(chunk.get(..count).unwrap_or_default());
                Ok(())
            }
            Err(error) => retry_or_timeout(error, budget, CallError::Broken),
        }
    }
}

/// A time budget and its end.
struct Budget {
    budget: Duration,
    end: Instant,
}

impl Budget {
    fn new(budget: Duration) -> Budget {
        Budget { budget, end: Instant::now() + budget }
    }

    /// Returns the remaining time. Never zero, which would disable a socket timeout.
    fn remaining(&self) -> Result<Duration, CallError> {
        let remaining = self.end.saturating_duration_since(Instant::now());
        if remaining.is_zero() { Err(CallError::Timeout(self.budget)) } else { Ok(remaining) }
    }
}

/// Handles the error of an I/O call: a timeout of the socket (`EAGAIN`) is the end of the budget, if there is one.
fn retry_or_timeout(
    error: io::Error,
    budget: Option<&Budget>,
    otherwise: impl FnOnce(io::Error) -> CallError,
) -> Result<(), CallError> {
    match error.kind() {
        io::ErrorKind::Interrupted => Ok(()),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            budget.map_or(Ok(()), |budget| Err(CallError::Timeout(budget.budget)))
        }
        _ => Err(otherwise(error)),
    }
}

fn connect(path: &Path, budget: &Budget) -> Result<UnixStream, CallError> {
    let failed = |errno: Errno| match errno {
        // The daemon's accept queue was full until the timeout.
        Errno::AGAIN => CallError::Timeout(budget.budget),
        errno => CallError::Connect(errno.into()),
    };
    let address = SocketAddrUnix::new(path).map_err(failed)?;
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .map_err(failed)?;
    sockopt::set_socket_timeout(&socket, Timeout::Send, Some(budget.remaining()?)).map_err(failed)?;
    rustix::io::retry_on_intr(|| rustix::net::connect(&socket, &address)).map_err(failed)?;
    // The credentials are those of the listener at the time of listen(2) (`unix(7)`, SO_PEERCRED).
    let listener =
        getsockopt(&socket, PeerCredentials).map_err(|errno| CallError::Connect(errno.into()))?.uid();
    if listener != 0 && listener != rustix::process::geteuid().as_raw() {
        return Err(CallError::ForeignSocket(listener));
    }
    Ok(UnixStream::from(socket))
}

fn send(stream: &mut UnixStream, request: &Value, budget: &Budget) -> Result<(), CallError> {
    let line = format!("{request}\n");
    let mut rest = line.as_bytes();
    while !rest.is_empty() {
        stream.set_write_timeout(Some(budget.remaining()?)).map_err(CallError::Broken)?;
        match stream.write(rest) {
            Ok(count) => rest = rest.get(count..).unwrap_or_default(),
            // A daemon may answer before it has read the whole request; its answer has the reason.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            Err(error) => retry_or_timeout(error, Some(budget), CallError::Broken)?,
        }
    }
    Ok(())
}

/// Parses an answer: `{"ok":true,"result"?}` or `{"ok":false,"reason"}`.
fn parse_answer(line: &[u8]) -> Result<Value, CallError> {
    let mut answer: Value = serde_json::from_slice(line).map_err(|_| CallError::Invalid)?;
    match (answer.get("ok").and_then(Value::as_bool), answer.get("reason").and_then(Value::as_str)) {
        (Some(true), _) => Ok(answer.get_mut("result").map(Value::take).unwrap_or_default()),
        (Some(false), Some(reason)) => Err(CallError::Refused(reason.to_owned())),
        _ => Err(CallError::Invalid),
    }
}

#[cfg(test)]
#[path = "client_tests.rs"]
mod tests;
