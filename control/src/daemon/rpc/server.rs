//! The server of the daemon's Unix socket (wire specification, A.1).
//!
//! A connection carries one request and one answer, and its cost is bounded: the bytes of one line (`codec`),
//! `LINE_TIME_MAX` until the line is complete, and one of `CONNECTIONS_MAX` slots. Further connections wait in the kernel's
//! backlog. A handler has no time limit, since a request may have to wait until the registrations are restored. A handler
//! always runs to its end, also if the client has gone: the request remains valid.
//!
//! Only the user who runs the daemon, and root, are answered. The mode of the socket enforces this, and a check of
//! SO_PEERCRED enforces it again.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::sync::broadcast::{Receiver, error::RecvError};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

use super::arrivals::Arrivals;
use super::codec::{LineError, RequestLine};
use super::native;
use super::protocol::{Request, Response};
use crate::daemon::rpc::request_handler::{Answer, RequestHandler};
use crate::forwarding::driver::NativeLink;
use crate::model::event::Event;
use crate::sys::graceful_close::linger;
use crate::sys::journal::Journal;

/// The maximum number of concurrent connections.
const CONNECTIONS_MAX: usize = 256;
/// The length of the kernel's accept queue.
const BACKLOG: i32 = 512;
/// How long a client may take to send its line.
const LINE_TIME_MAX: Duration = Duration::from_secs(10);
/// How long a client may take to read its answer.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(10);
/// The size of one read, in bytes.
const CHUNK_BYTES: usize = 8 * 1024;
/// The interval at which a subscriber that has closed its write side is checked for a hangup.
const HANGUP_INTERVAL: Duration = Duration::from_secs(5);
/// How long open answers may continue when the server closes.
const CLOSING_TIME_MAX: Duration = Duration::from_millis(500);
/// The delay after a failed accept, for example when the process has no free descriptor.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);

/// Listens at `path`, for the owner alone at all times: the socket is created under another name in the owner's private
/// directory, and renamed to `path` once its mode is set and it listens. An existing file is replaced; the caller must have
/// checked that no process listens there.
///
/// # Errors
/// The errors of the system calls.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    let aside = path.with_extension("new");
    match std::fs::remove_file(&aside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let socket: OwnedFd = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(&aside)?)?;
    rustix::fs::chmod(&aside, Mode::RUSR | Mode::WUSR)?;
    rustix::net::listen(&socket, BACKLOG)?;
    std::fs::rename(&aside, path)?;
    UnixListener::from_std(socket.into())
}

/// The server of one socket.
#[derive(Debug)]
pub struct Server {
    /// Tracks the requests that are being answered.
    answering: TaskTracker,
    /// The accept task, which owns all connections: they end with it.
    accepting: JoinSet<()>,
}

impl Server {
    /// Starts to accept connections.
    pub fn start(listener: UnixListener, request_handler: Arc<RequestHandler>) -> Server {
        let answering = TaskTracker::new();
        let mut accepting = JoinSet::new();
        accepting.spawn(accept_all(listener, request_handler, answering.clone()));
        Server { answering, accepting }
    }

    /// Closes all connections, after open answers have had 500 ms to finish.
    pub async fn close(mut self) {
        self.answering.close();
        // Answers that take longer are dropped.
        let _ = timeout(CLOSING_TIME_MAX, self.answering.wait()).await;
        self.accepting.shutdown().await;
    }
}

async fn accept_all(listener: UnixListener, request_handler: Arc<RequestHandler>, answering: TaskTracker) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let arrivals = Arrivals::default();
    let mut connections = JoinSet::new();
    for number in 0.. {
        // The semaphore is never closed.
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let (request_handler, answering) = (Arc::clone(&request_handler), answering.clone());
                let arrivals = arrivals.clone();
                connections.spawn(async move {
                    serve_connection(stream, &request_handler, &answering, arrivals.wait_in_order(number))
                        .await;
                    drop(permit);
                });
            }
            // No descriptor is free, or the client has already gone. In either case, retry.
            Err(_) => tokio::time::sleep(ACCEPT_RETRY_DELAY).await,
        }
        while connections.try_join_next().is_some() {}
    }
}

/// Serves one connection. Its request is processed after `wait_in_order`.
async fn serve_connection(
    mut stream: UnixStream,
    request_handler: &RequestHandler,
    answering: &TaskTracker,
    wait_in_order: impl Future<Output = ()>,
) {
    let line = match is_permitted(&stream) {
        true => match timeout(LINE_TIME_MAX, read_line(&mut stream)).await {
            Ok(Ok(Some(line))) => line.map_err(|error| error.to_string()),
            // Timeout, I/O error, or end of stream before a complete line: no request to answer.
            Ok(Ok(None) | Err(_)) | Err(_) => return,
        },
        false => Err("only the user who runs the daemon, and root, are answered".to_owned()),
    };
    let request = line.and_then(|line| Request::from_line(&line).map_err(|error| error.to_string()));
    let following = async {
        // Wait for replay first, and for the order of arrival afterwards: all requests that waited then keep their order.
        if let Ok(request) = &request {
            request_handler.wait_until_ready(request).await;
        }
        wait_in_order.await;
        answer(&mut stream, request, request_handler).await
    };
    match answering.track_future(following).await {
        Some(Continuation::Events(events, of)) => follow(stream, events, of.as_deref()).await,
        Some(Continuation::Native(link)) => native::receive_reports(stream, &link).await,
        None => linger(stream).await,
    }
}

/// The use of a connection after its answer.
enum Continuation {
    /// Write events of one container or of all.
    Events(Receiver<Arc<str>>, Option<String>),
    /// Read the reports of a supervisor.
    Native(NativeLink),
}

/// Answers a request, and runs the answer's follow-up. Returns the further use of the connection, if any.
async fn answer(
    stream: &mut UnixStream,
    request: Result<Request, String>,
    request_handler: &RequestHandler,
) -> Option<Continuation> {
    let answer = match request {
        Ok(request) => request_handler.answer(request).await,
        Err(reason) => Response::Refused(reason).into(),
    };
    match answer {
        Answer::Once(response, after) => {
            // If the client has gone or does not read, the request still takes effect.
            let _ = write_line(stream, &response.to_json()).await;
            after.run();
            None
        }
        Answer::Follow(events, of) => write_line(stream, &Response::Done.to_json())
            .await
            .ok()
            .map(|()| Continuation::Events(events, of)),
        Answer::Native(link) => {
            write_line(stream, &Response::Done.to_json()).await.ok().map(|()| Continuation::Native(link))
        }
    }
}

/// Returns whether the peer is the daemon's own user or root, by the credentials at the time of connect.
fn is_permitted(stream: &UnixStream) -> bool {
    let own = rustix::process::geteuid().as_raw();
    stream.peer_cred().is_ok_and(|peer| peer.uid() == 0 || peer.uid() == own)
}

/// Reads the first line. Returns `None` if the stream ends before that.
async fn read_line(stream: &mut UnixStream) -> io::Result<Option<Result<Vec<u8>, LineError>>> {
    let mut line = RequestLine::new();
    let mut chunk = [0; CHUNK_BYTES];
    loop {
        let count = stream.read(&mut chunk).await?;
        if count == 0 {
            return Ok(None);
        }
        if let Some(done) = line.append(&chunk[..count]) {
            return Ok(Some(done));
        }
    }
}

async fn write_line(stream: &mut UnixStream, line: &str) -> io::Result<()> {
    let line = format!("{line}\n");
    timeout(ANSWER_TIME_MAX, stream.write_all(line.as_bytes())).await?
}

/// Writes events until the client disconnects. A slow client does not block the journal: it loses events, and receives the
/// number of lost events.
async fn follow(mut stream: UnixStream, mut events: Receiver<Arc<str>>, of: Option<&str>) {
    let mut hangup_checks = tokio::time::interval(HANGUP_INTERVAL);
    let mut ended = false;
    let mut discarded = [0; 64];
    loop {
        tokio::select! {
            event = events.recv() => {
                let line: Arc<str> = match event {
                    Ok(line) if of.is_none_or(|name| is_about(&line, name)) => line,
                    Ok(_) => continue,
                    Err(RecvError::Lagged(count)) => Journal::line(&Event::EventsLost { count }).into(),
                    Err(RecvError::Closed) => return,
                };
                if stream.write_all(format!("{line}\n").as_bytes()).await.is_err() {
                    return;
                }
            }
            // A client that has closed its write side may still read.
            read = stream.read(&mut discarded), if !ended => match read {
                Ok(0) => ended = true,
                Ok(_) => continue,
                Err(_) => return,
            },
            _ = hangup_checks.tick(), if ended => {}
        }
        if ended && has_hung_up(&stream) {
            return;
        }
    }
}

/// Returns whether the peer has closed both directions.
fn has_hung_up(stream: &UnixStream) -> bool {
    let mut poll = [PollFd::from_borrowed_fd(stream.as_fd(), PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut poll, Some(&now)).is_err() || poll[0].revents().contains(PollFlags::HUP)
}

/// Returns whether the line of an event names this container.
fn is_about(line: &str, name: &str) -> bool {
    let Ok(line) = serde_json::from_str::<Value>(line) else { return false };
    let named = |value: &Value| value.get("containerName").and_then(Value::as_str) == Some(name);
    named(&line) || line.get("event").is_some_and(named)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[tokio::test]
    async fn the_socket_is_private_to_the_owner_and_replaces_a_stale_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hostd.sock");
        std::fs::write(&path, "stale").unwrap();
        std::fs::write(path.with_extension("new"), "left behind").unwrap();
        let _listener = listen(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        assert!(!path.with_extension("new").exists());
        UnixStream::connect(&path).await.unwrap();
    }

    #[test]
    fn an_event_matches_the_container_that_it_names_at_either_level() {
        assert!(is_about(r#"{"kind":"register","containerName":"a"}"#, "a"));
        assert!(is_about(r#"{"kind":"port-forward-event","event":{"containerName":"a"}}"#, "a"));
        assert!(!is_about(r#"{"kind":"register","containerName":"ab"}"#, "a"));
        assert!(!is_about(r#"{"kind":"daemon-stopping"}"#, "a"));
    }
}
