//! The agent's HTTP server: one path, which becomes a WebSocket (wire specification, A.3).
//!
//! Every process in the container, and every process that reaches the published port on the host, can connect. A
//! connection that is not authenticated yet is a guest: the number of guests and their time are limited, and a guest
//! above the limit evicts the oldest one. So clients that send nothing cannot exclude a host that sends its hello at
//! once.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{CONNECTION, CONTENT_TYPE, HeaderMap, HeaderValue, ORIGIN};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::net::sockopt;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::StartError;
use super::connection;
use super::hub::Hub;
use super::log::{AgentEvent, Log};
use super::refusals::Refusals;
use crate::broker::challenge::{Answer, Challenge};
use crate::broker::container::HELLO_TIME_MAX;
use crate::broker::wire;
use crate::model::registration::{ContainerName, Token};
use crate::sys::random::random;

/// The maximum of connections that are not authenticated yet.
const GUESTS_MAX: usize = 64;
/// The maximum of authenticated hosts.
const HOSTS_MAX: usize = 32;
/// The time limit for the head of a request, and then for its upgrade.
const HEAD_TIME_MAX: Duration = Duration::from_secs(5);
/// The longest head, in bytes; hyper's smallest buffer is half of it.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// The length of the accept queue.
const BACKLOG: u32 = 128;
/// The pause of accepting after an error, such as a lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// The time limit for closing host connections when the agent ends.
const STOP_TIME_MAX: Duration = Duration::from_secs(1);

/// The settings that all connections share.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    /// The broker token, which a host sends or proves that it holds.
    pub(super) token: Option<Token>,
    /// The container's own name, if known.
    pub(super) name: Option<ContainerName>,
    /// The interval between readings of the listeners.
    pub(super) interval: Duration,
    /// The shared state.
    pub(super) hub: Hub,
    /// The log.
    pub(super) log: Log,
    /// Limits the lines about wrong hellos.
    pub(super) refusals: Arc<Mutex<Refusals>>,
}

/// Bound sockets.
#[derive(Debug)]
pub(super) struct Bound {
    listeners: Vec<TcpListener>,
    port: u16,
}

impl Bound {
    /// Listens on an address. Without an address, it listens on all of IPv4, and on all of IPv6 if available.
    ///
    /// # Errors
    /// [`StartError::Listen`].
    pub(super) fn listen(address: Option<IpAddr>, port: u16) -> Result<Bound, StartError> {
        let first = SocketAddr::new(address.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)), port);
        let failed = |source| StartError::Listen { address: first, source };
        let listener = listen(first).map_err(failed)?;
        let port = listener.local_addr().map_err(failed)?.port();
        let mut listeners = vec![listener];
        if address.is_none() {
            // An error means that the container has no IPv6.
            listeners.extend(listen(SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port)));
        }
        Ok(Bound { listeners, port })
    }

    /// Logs the addresses.
    pub(super) fn record(&self, log: &Log) {
        for address in self.listeners.iter().filter_map(|listener| listener.local_addr().ok()) {
            log.record(&AgentEvent::AgentListening { address });
        }
    }

    /// Returns the port.
    pub(super) fn port(&self) -> u16 {
        self.port
    }

    /// Starts to answer requests.
    pub(super) fn serve(self, settings: Settings) -> Server {
        let server = Server(Arc::new(Inner {
            settings,
            accept_queue: AcceptQueue::default(),
            stopping: CancellationToken::new(),
            tasks: TaskTracker::new(),
        }));
        for listener in self.listeners {
            let inner = Arc::clone(&server.0);
            let stopping = inner.stopping.clone();
            inner.clone().tasks.spawn(stopping.run_until_cancelled_owned(accept_all(inner, listener)));
        }
        server
    }
}

fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // Connections of an earlier agent in TIME_WAIT must not prevent the bind.
    socket.set_reuseaddr(true)?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// The running server.
pub(super) struct Server(Arc<Inner>);

struct Inner {
    settings: Settings,
    accept_queue: AcceptQueue,
    stopping: CancellationToken,
    tasks: TaskTracker,
}

impl Server {
    /// Closes the listeners and all host connections. Waits for the connections to close, for at most
    /// [`STOP_TIME_MAX`].
    pub(super) async fn stop(&self) {
        self.0.stopping.cancel();
        self.0.tasks.close();
        // Hosts that do not close in time are disconnected.
        let _ = timeout(STOP_TIME_MAX, self.0.tasks.wait()).await;
    }
}

async fn accept_all(inner: Arc<Inner>, listener: TcpListener) {
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                let guest = AcceptQueue::enter(&inner, peer.ip());
                inner.tasks.spawn(converse(Arc::clone(&inner), stream, guest));
            }
            // No descriptor is left, or the client has already gone. Both allow another attempt.
            Err(_) => sleep(ACCEPT_PAUSE).await,
        }
    }
}

/// Serves one connection until it ends or becomes a WebSocket, which is served by a task of its own.
async fn converse(inner: Arc<Inner>, stream: TcpStream, guest: QueuePlace) {
    wire::prepare(&stream);
    let guest = Arc::new(Mutex::new(Some(guest)));
    let asked_to_leave = locked(&guest).as_ref().map(|guest| guest.leave.clone()).unwrap_or_default();
    let service = service_fn(|request| {
        let response = respond(&inner, request, &guest);
        async move { Ok::<_, Infallible>(response) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME_MAX)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    tokio::select! {
        // Errors are answered by the server itself.
        _ = timeout(HEAD_TIME_MAX + HELLO_TIME_MAX, connection) => {}
        () = asked_to_leave.cancelled() => {}
        () = inner.stopping.cancelled() => {}
    }
}

type Text = Response<Full<Bytes>>;

/// Answers one request. An upgrade takes the guest's place along.
fn respond(inner: &Arc<Inner>, mut request: Request<Incoming>, guest: &Mutex<Option<QueuePlace>>) -> Text {
    let settings = &inner.settings;
    // A browser adds this header to requests of pages, which must not connect. Hosts never send it.
    if request.headers().contains_key(ORIGIN) {
        return text(StatusCode::FORBIDDEN, "origin not allowed");
    }
    if request.uri().path() != wire::PATH {
        return text(StatusCode::NOT_FOUND, "not found");
    }
    let Some(token) = settings.token.clone() else {
        return text(StatusCode::NOT_FOUND, "portbroker disabled");
    };
    let answer = answer(settings, &token, request.headers());
    let header = answer.as_ref().map(Answer::header);
    let upgraded_headers = (request.method() == Method::GET)
        .then(|| wire::upgrade(request.headers(), header.as_deref()))
        .flatten();
    let Some(headers) = upgraded_headers else {
        return text(StatusCode::BAD_REQUEST, "upgrade failed");
    };
    if *settings.hub.hosts().borrow() >= HOSTS_MAX {
        return text(StatusCode::SERVICE_UNAVAILABLE, "too many hosts are connected");
    }
    let Some(guest) = locked(guest).take() else {
        return text(StatusCode::BAD_REQUEST, "upgrade failed");
    };
    let upgrade = hyper::upgrade::on(&mut request);
    inner.tasks.spawn(upgraded(Arc::clone(inner), upgrade, (token, answer), guest));
    let mut response = Response::new(Full::default());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    *response.headers_mut() = headers;
    response
}

/// Answers the challenge of a host, if it sent one to this container.
fn answer(settings: &Settings, token: &Token, headers: &HeaderMap) -> Option<Answer> {
    let challenge = Challenge::from_header(&wire::challenge_in(headers)?)?;
    if settings.name.as_ref().is_some_and(|own| own != challenge.name()) {
        return None;
    }
    // If the kernel returns no random bytes, the challenge is ignored.
    Some(challenge.answer(token.clone(), random().ok()?))
}

async fn upgraded(
    inner: Arc<Inner>,
    upgrade: OnUpgrade,
    (token, answer): (Token, Option<Answer>),
    guest: QueuePlace,
) {
    // The upgrade fails if the client has gone or the request was invalid.
    let Ok(Ok(stream)) = timeout(HELLO_TIME_MAX, upgrade).await else { return };
    let Ok(socket) = wire::accepted(stream).await else { return };
    connection::serve(socket, (token, answer), &inner.settings, guest, inner.stopping.clone()).await;
}

fn text(status: StatusCode, text: &'static str) -> Text {
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain;charset=utf-8"));
    // Each connection serves one request, so that no client keeps its place without a request. An upgrade does not have
    // this header: clients expect its `connection` to be `Upgrade` and nothing else.
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    response
}

/// The guests, in order of arrival.
#[derive(Default)]
struct AcceptQueue(Mutex<Waiting>);

#[derive(Default)]
struct Waiting {
    last: u64,
    guests: BTreeMap<u64, CancellationToken>,
}

/// The place of one guest. Dropping it frees the place.
pub(super) struct QueuePlace {
    inner: Arc<Inner>,
    number: u64,
    /// The address of the client.
    pub(super) address: IpAddr,
    /// Cancelled when a newer guest needs the place.
    pub(super) leave: CancellationToken,
}

impl AcceptQueue {
    fn enter(inner: &Arc<Inner>, address: IpAddr) -> QueuePlace {
        let leave = CancellationToken::new();
        let mut waiting = locked(&inner.accept_queue.0);
        waiting.last += 1;
        let number = waiting.last;
        waiting.guests.insert(number, leave.clone());
        if waiting.guests.len() > GUESTS_MAX
            && let Some((_, oldest)) = waiting.guests.pop_first()
        {
            oldest.cancel();
        }
        drop(waiting);
        QueuePlace { inner: Arc::clone(inner), number, address, leave }
    }
}

impl Drop for QueuePlace {
    fn drop(&mut self) {
        locked(&self.inner.accept_queue.0).guests.remove(&self.number);
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
