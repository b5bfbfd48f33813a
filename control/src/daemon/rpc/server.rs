//! The daemon's end of the Unix socket (wire specification, A.1).
//!
//! A connection is one request and one answer. It costs a bounded amount of everything: the bytes of one line (`codec`),
//! `LINE_TIME_MAX` until that is whole, and one of `CONNECTIONS_MAX` places; who finds none waits in the kernel's
//! backlog. A handler has no limit of its own: a request may have to wait until the daemon knows its containers
//! again. It runs to its end also when the client has gone, as what was asked for was meant.
//!
//! Only the user who runs the daemon, and root, are answered: the socket's mode says so, and SO_PEERCRED once more.

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

/// How many connections are served at a time.
const CONNECTIONS_MAX: usize = 256;
/// How many wait in the kernel for a place.
const BACKLOG: i32 = 512;
/// How long a client has for its line.
const LINE_TIME_MAX: Duration = Duration::from_secs(10);
/// How long it has to take its answer.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(10);
/// How much is read at once, in bytes.
const CHUNK_BYTES: usize = 8 * 1024;
/// How often a client that only listens, and has ended its own direction, is looked at.
const HANGUP_INTERVAL: Duration = Duration::from_secs(5);
/// How long what is being answered may go on when the server closes.
const CLOSING_TIME_MAX: Duration = Duration::from_millis(500);
/// How long accepting rests when the process has no descriptor left.
const ACCEPT_REST: Duration = Duration::from_millis(100);

/// Listens at `path`, for the owner alone from the first moment: the socket is made under another name, in a directory
/// that is the owner's, and takes its place with one rename when its mode is right and it accepts. Whatever was there
/// before is replaced; whoever calls this has made sure that nobody listens there.
///
/// # Errors
/// Those of the system.
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

/// Answers whoever connects.
#[derive(Debug)]
pub struct Server {
    /// What is being answered just now.
    answering: TaskTracker,
    /// Accepts, and holds every connection: they end with it.
    accepting: JoinSet<()>,
}

impl Server {
    /// Begins.
    pub fn start(listener: UnixListener, request_handler: Arc<RequestHandler>) -> Server {
        let answering = TaskTracker::new();
        let mut accepting = JoinSet::new();
        accepting.spawn(accept_all(listener, request_handler, answering.clone()));
        Server { answering, accepting }
    }

    /// Ends every connection, after what is being answered has had a moment to be answered.
    pub async fn close(mut self) {
        self.answering.close();
        // What takes longer is not answered any more.
        let _ = timeout(CLOSING_TIME_MAX, self.answering.wait()).await;
        self.accepting.shutdown().await;
    }
}

async fn accept_all(listener: UnixListener, request_handler: Arc<RequestHandler>, answering: TaskTracker) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let arrivals = Arrivals::default();
    let mut connections = JoinSet::new();
    for number in 0.. {
        // The semaphore is never closed.
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let (request_handler, answering) = (Arc::clone(&request_handler), answering.clone());
                let arrivals = arrivals.clone();
                connections.spawn(async move {
                    converse(stream, &request_handler, &answering, arrivals.turn(number)).await;
                    drop(place);
                });
            }
            // No descriptor is left, or the client has gone already. Either way the next one is another try.
            Err(_) => tokio::time::sleep(ACCEPT_REST).await,
        }
        while connections.try_join_next().is_some() {}
    }
}

/// Serves one connection; its request is taken up at its `turn`.
async fn converse(
    mut stream: UnixStream,
    request_handler: &RequestHandler,
    answering: &TaskTracker,
    turn: impl Future<Output = ()>,
) {
    let line = match is_permitted(&stream) {
        true => match timeout(LINE_TIME_MAX, read_line(&mut stream)).await {
            Ok(Ok(Some(line))) => line.map_err(|error| error.to_string()),
            // Late, broken, or ended before the line was whole: there is nobody to answer, or nothing.
            Ok(Ok(None) | Err(_)) | Err(_) => return,
        },
        false => Err("only the user who runs the daemon, and root, are answered".to_owned()),
    };
    let request = line.and_then(|line| Request::from_line(&line).map_err(|error| error.to_string()));
    let following = async {
        // Before its turn comes: whoever waited while a later one was on its way has an earlier turn.
        if let Ok(request) = &request {
            request_handler.ready_for(request).await;
        }
        turn.await;
        answer(&mut stream, request, request_handler).await
    };
    match answering.track_future(following).await {
        Some(Rest::Events(events, of)) => follow(stream, events, of.as_deref()).await,
        Some(Rest::Native(link)) => native::take_reports(stream, &link).await,
        None => linger(stream).await,
    }
}

/// The use of a connection after its answer.
enum Rest {
    /// Events are written to it, of one container or all.
    Events(Receiver<Arc<str>>, Option<String>),
    /// Reports of a supervisor are read from it.
    Native(NativeLink),
}

/// Answers a request, and makes happen what the answer promised. Returns the further use of the connection, if any.
async fn answer(
    stream: &mut UnixStream,
    request: Result<Request, String>,
    request_handler: &RequestHandler,
) -> Option<Rest> {
    let answer = match request {
        Ok(request) => request_handler.answer(request).await,
        Err(reason) => Response::Refused(reason).into(),
    };
    match answer {
        Answer::Once(response, after) => {
            // A client that is gone, or does not read, changes nothing about what it asked for.
            let _ = tell(stream, &response.to_json()).await;
            after.happen();
            None
        }
        Answer::Follow(events, of) => {
            tell(stream, &Response::Done.to_json()).await.ok().map(|()| Rest::Events(events, of))
        }
        Answer::Native(link) => {
            tell(stream, &Response::Done.to_json()).await.ok().map(|()| Rest::Native(link))
        }
    }
}

/// Whether the peer is the daemon's own user, or root. The kernel noted who it was when it connected.
fn is_permitted(stream: &UnixStream) -> bool {
    let own = rustix::process::geteuid().as_raw();
    stream.peer_cred().is_ok_and(|peer| peer.uid() == 0 || peer.uid() == own)
}

/// The first line. None where the client has ended before it was whole.
async fn read_line(stream: &mut UnixStream) -> io::Result<Option<Result<Vec<u8>, LineError>>> {
    let mut line = RequestLine::new();
    let mut chunk = [0; CHUNK_BYTES];
    loop {
        let count = stream.read(&mut chunk).await?;
        if count == 0 {
            return Ok(None);
        }
        if let Some(done) = line.take(&chunk[..count]) {
            return Ok(Some(done));
        }
    }
}

async fn tell(stream: &mut UnixStream, line: &str) -> io::Result<()> {
    let line = format!("{line}\n");
    timeout(ANSWER_TIME_MAX, stream.write_all(line.as_bytes())).await?
}

/// Passes events on until the client goes. It may be as slow as it likes: what it cannot take in time it loses, and is
/// told how much that was.
async fn follow(mut stream: UnixStream, mut events: Receiver<Arc<str>>, of: Option<&str>) {
    let mut looks = tokio::time::interval(HANGUP_INTERVAL);
    let mut ended = false;
    let mut nothing = [0; 64];
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
            // A client that has ended its direction may still be reading; one that is gone is not.
            read = stream.read(&mut nothing), if !ended => match read {
                Ok(0) => ended = true,
                Ok(_) => continue,
                Err(_) => return,
            },
            _ = looks.tick(), if ended => {}
        }
        if ended && has_hung_up(&stream) {
            return;
        }
    }
}

/// Whether the peer has closed both its directions.
fn has_hung_up(stream: &UnixStream) -> bool {
    let mut poll = [PollFd::from_borrowed_fd(stream.as_fd(), PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut poll, Some(&now)).is_err() || poll[0].revents().contains(PollFlags::HUP)
}

/// Whether an event's line is about this container.
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
    async fn the_socket_is_the_owners_alone_and_takes_the_place_of_a_stale_one() {
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
    fn an_event_is_about_the_container_that_it_names_at_either_level() {
        assert!(is_about(r#"{"kind":"register","containerName":"a"}"#, "a"));
        assert!(is_about(r#"{"kind":"port-forward-event","event":{"containerName":"a"}}"#, "a"));
        assert!(!is_about(r#"{"kind":"register","containerName":"ab"}"#, "a"));
        assert!(!is_about(r#"{"kind":"daemon-stopping"}"#, "a"));
    }
}
