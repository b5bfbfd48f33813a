//! Asking the daemon: one request, one answer, one budget of time for connecting, writing and reading together.
//!
//! Whoever listens at the socket's path is looked at before anything is said: a socket that another user put there
//! would otherwise be handed the tokens of a registration. What it answers is bounded, and what follows the first
//! newline is ignored (wire specification, A.1.1).

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

/// How long an answer may take unless somebody says otherwise (wire specification, A.1.3).
pub const BUDGET: Duration = Duration::from_secs(3);
/// The same for what a probe asks.
pub const PROBE_BUDGET: Duration = Duration::from_secs(1);
/// The same for what waits until the daemon has taken its registrations in again, and for what one registration's
/// end takes.
pub const PATIENT_BUDGET: Duration = Duration::from_secs(15);

/// The longest answer that is read, in bytes: a table of thousands of forwards is a tenth of it.
const ANSWER_BYTES_MAX: usize = 16 * 1024 * 1024;
/// The longest line of the event stream, in bytes.
const EVENT_BYTES_MAX: usize = 256 * 1024;
/// How much is read at once, in bytes.
const CHUNK_BYTES: usize = 16 * 1024;

/// Why there is no answer, or no good one.
#[derive(Debug, Error)]
pub enum CallError {
    /// Nobody listens, or may be asked. As the system tells it.
    #[error(transparent)]
    Connect(io::Error),
    /// The connection broke.
    #[error(transparent)]
    Broken(io::Error),
    /// The daemon ended the connection, and no line is whole.
    #[error("the daemon ended the connection")]
    Ended,
    /// The budget is spent.
    #[error("daemon ack timeout after {}ms", .0.as_millis())]
    Timeout(Duration),
    /// What came is no answer.
    #[error("invalid response from daemon")]
    Invalid,
    /// The daemon says no; its own words.
    #[error("{0}")]
    Refused(String),
    /// Another user listens at the socket.
    #[error("the daemon's socket belongs to uid {0}")]
    Stranger(u32),
}

impl CallError {
    /// Whether nobody listens: no socket at all, or one that was left behind.
    pub fn is_absent(&self) -> bool {
        use io::ErrorKind::{ConnectionRefused, NotADirectory, NotFound};
        match self {
            CallError::Connect(error) => matches!(error.kind(), NotFound | ConnectionRefused | NotADirectory),
            _ => false,
        }
    }
}

/// The way to one daemon.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
    budget: Duration,
}

impl Client {
    /// A client of the daemon at `socket`.
    pub fn new(socket: impl Into<PathBuf>) -> Client {
        Client { socket: socket.into(), budget: BUDGET }
    }

    /// The same with another budget.
    #[must_use]
    pub fn within(&self, budget: Duration) -> Client {
        Client { socket: self.socket.clone(), budget }
    }

    /// Sends one request and answers with its `result`, which is null where there is none.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn call(&self, request: &Value) -> Result<Value, CallError> {
        let spent = Spent::new(self.budget);
        let mut stream = connect(&self.socket, &spent)?;
        send(&mut stream, request, &spent)?;
        let mut lines = Lines { stream, buffer: Vec::new(), bytes_max: ANSWER_BYTES_MAX };
        answer_in(&lines.next(Some(&spent))?)
    }

    /// Sends a request that has nothing but a kind.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn ask(&self, kind: &str) -> Result<Value, CallError> {
        self.call(&json!({ "kind": kind }))
    }

    /// Whether a daemon answers `list` (wire specification, A.8.1).
    pub fn is_reachable(&self) -> bool {
        self.ask("list").is_ok()
    }

    /// Opens the connection that stands for the native listeners of a sandbox. Reports are written to it, a line each.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn native(&self, container: &str) -> Result<UnixStream, CallError> {
        let spent = Spent::new(self.budget);
        let mut stream = connect(&self.socket, &spent)?;
        send(&mut stream, &json!({ "kind": "native", "containerName": container }), &spent)?;
        let mut lines = Lines { stream, buffer: Vec::new(), bytes_max: EVENT_BYTES_MAX };
        answer_in(&lines.next(Some(&spent))?)?;
        lines.stream.set_write_timeout(Some(REPORT_BUDGET)).map_err(CallError::Broken)?;
        Ok(lines.stream)
    }

    /// Begins to listen to what happens, to one container or at all. From the moment this returns, nothing is missed.
    ///
    /// # Errors
    /// [`CallError`]; the reference refuses, since it does not know this kind.
    pub fn events(&self, container: Option<&str>) -> Result<Lines, CallError> {
        let spent = Spent::new(self.budget);
        let mut stream = connect(&self.socket, &spent)?;
        let mut request = json!({ "kind": "events" });
        if let (Some(name), Some(fields)) = (container, request.as_object_mut()) {
            fields.insert("containerName".to_owned(), name.into());
        }
        send(&mut stream, &request, &spent)?;
        let mut lines = Lines { stream, buffer: Vec::new(), bytes_max: EVENT_BYTES_MAX };
        answer_in(&lines.next(Some(&spent))?)?;
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
    /// The next line without its newline; waits at most until `deadline`, for ever without one.
    ///
    /// # Errors
    /// [`CallError::Timeout`] at the deadline, and then the next call goes on where this one ended;
    /// [`CallError::Ended`] when there will be no more.
    pub fn line(&mut self, deadline: Option<Instant>) -> Result<Vec<u8>, CallError> {
        let spent = deadline.map(|end| Spent::new(end.saturating_duration_since(Instant::now())));
        self.next(spent.as_ref())
    }

    fn next(&mut self, spent: Option<&Spent>) -> Result<Vec<u8>, CallError> {
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
            self.read_more(spent)?;
        }
    }

    fn read_more(&mut self, spent: Option<&Spent>) -> Result<(), CallError> {
        let left = spent.map(Spent::left).transpose()?;
        self.stream.set_read_timeout(left).map_err(CallError::Broken)?;
        let mut chunk = [0; CHUNK_BYTES];
        match self.stream.read(&mut chunk) {
            Ok(0) => Err(CallError::Ended),
            Ok(count) => {
                self.buffer.extend_from_slice(chunk.get(..count).unwrap_or_default());
                Ok(())
            }
            Err(error) => again(error, spent, CallError::Broken),
        }
    }
}

/// A budget of time, and when it began to be spent.
struct Spent {
    budget: Duration,
    end: Instant,
}

impl Spent {
    fn new(budget: Duration) -> Spent {
        Spent { budget, end: Instant::now() + budget }
    }

    /// What is left of it; never nothing, which would mean "without end" to a socket.
    fn left(&self) -> Result<Duration, CallError> {
        let left = self.end.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(CallError::Timeout(self.budget)) } else { Ok(left) }
    }
}

/// A socket that waits no longer tells `EAGAIN`: a budget's end, if there is one.
fn again(
    error: io::Error,
    spent: Option<&Spent>,
    otherwise: impl FnOnce(io::Error) -> CallError,
) -> Result<(), CallError> {
    match error.kind() {
        io::ErrorKind::Interrupted => Ok(()),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            spent.map_or(Ok(()), |spent| Err(CallError::Timeout(spent.budget)))
        }
        _ => Err(otherwise(error)),
    }
}

fn connect(path: &Path, spent: &Spent) -> Result<UnixStream, CallError> {
    let failed = |errno: Errno| match errno {
        // The daemon's queue was full for as long as we waited.
        Errno::AGAIN => CallError::Timeout(spent.budget),
        errno => CallError::Connect(errno.into()),
    };
    let address = SocketAddrUnix::new(path).map_err(failed)?;
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .map_err(failed)?;
    sockopt::set_socket_timeout(&socket, Timeout::Send, Some(spent.left()?)).map_err(failed)?;
    rustix::io::retry_on_intr(|| rustix::net::connect(&socket, &address)).map_err(failed)?;
    // Of the one who listened there, at the time of listen(2) (`unix(7)`, SO_PEERCRED).
    let listener =
        getsockopt(&socket, PeerCredentials).map_err(|errno| CallError::Connect(errno.into()))?.uid();
    if listener != 0 && listener != rustix::process::geteuid().as_raw() {
        return Err(CallError::Stranger(listener));
    }
    Ok(UnixStream::from(socket))
}

fn send(stream: &mut UnixStream, request: &Value, spent: &Spent) -> Result<(), CallError> {
    let line = format!("{request}\n");
    let mut rest = line.as_bytes();
    while !rest.is_empty() {
        stream.set_write_timeout(Some(spent.left()?)).map_err(CallError::Broken)?;
        match stream.write(rest) {
            Ok(count) => rest = rest.get(count..).unwrap_or_default(),
            // A daemon that has heard enough answers before it has heard all; its answer says why.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            Err(error) => again(error, Some(spent), CallError::Broken)?,
        }
    }
    Ok(())
}

/// Takes an answer apart: `{"ok":true,"result"?}` or `{"ok":false,"reason"}`.
fn answer_in(line: &[u8]) -> Result<Value, CallError> {
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
