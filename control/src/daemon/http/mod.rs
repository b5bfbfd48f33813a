//! The daemon's HTTP endpoint, where containers ask for themselves (wire specification, A.2).
//!
//! It listens on 127.0.0.1 and on the address by which containers reach the host, at one port on all of them: containers
//! keep the URL that they were started with, so the preferred port is taken wherever it can be had. Docker may appear
//! later than the daemon; its address joins then.
//!
//! A connection is one request and one answer, with a time for each part of it and one for all.
//!
//! - `auth` says who asks, and for whom a request is meant. No I/O.
//! - `container_socket` gives a container a socket of its own.
//! - `gateway` keeps it listening where containers reach the host, and names the process that holds the port there.
//! - `places` bounds the connections.
//! - `rpc` is the one route and the order of its checks.

pub mod auth;
pub mod container_socket;
pub mod gateway;
mod places;
pub mod rpc;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::daemon::http::gateway::SharedFacts;
use crate::daemon::http::places::Places;
use crate::daemon::rpc::request_handler::{FollowUp, RequestHandler};
use crate::model::event::Event;
use crate::sys::graceful_close::linger;
use crate::sys::held_port::HeldPort;
use crate::sys::journal::Journal;

/// Connections of one listener that are served at a time, and how many of them one client may have.
const CONNECTIONS_MAX: usize = 256;
const CONNECTIONS_OF_ONE_MAX: usize = 64;
/// The same for the socket of one container.
const CONNECTIONS_OF_CONTAINER_MAX: usize = 32;
/// How long a client has for the head of its request.
const HEAD_TIME_MAX: Duration = Duration::from_secs(5);
/// How long a connection may last. A restart may have to wait until the daemon knows its containers again.
const CONNECTION_TIME_MAX: Duration = Duration::from_secs(90);
/// The longest head, in bytes; hyper's smallest buffer is half of it.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// How often another port is tried where one that is free on 127.0.0.1 is in use elsewhere.
const EPHEMERAL_TRIES: usize = 16;
/// How long what is being answered may go on when the endpoint closes.
const CLOSING_TIME_MAX: Duration = Duration::from_millis(500);
/// How long accepting rests when the process has no descriptor left.
const ACCEPT_REST: Duration = Duration::from_millis(100);

/// Why the endpoint cannot be had.
#[derive(Debug, Error)]
pub enum HttpError {
    /// An address cannot be listened on.
    #[error("cannot listen on {address} for HTTP")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// No port is free on all addresses.
    #[error("no port for HTTP is free on all of the addresses")]
    NoPort,
}

/// The sockets of the endpoint. Clients can connect; nobody answers yet.
#[derive(Debug)]
pub struct Bound {
    port: NonZeroU16,
    listeners: BTreeMap<IpAddr, TcpListener>,
    /// The holder of the preferred port, if the daemon got another port.
    fallback: Option<HeldPort>,
}

impl Bound {
    /// Listens on every address, at the first of these ports that is free on all of them: the preferred one, the one
    /// that the last daemon had (containers that it could not give the preferred one still ask there), any other one.
    /// 0 prefers none.
    ///
    /// # Errors
    /// [`HttpError`].
    pub async fn listen(
        preferred: u16,
        last: Option<NonZeroU16>,
        addresses: &[IpAddr],
        journal: &Journal,
    ) -> Result<Bound, HttpError> {
        let addresses = without_covered(addresses);
        let named = NonZeroU16::new(preferred).into_iter().chain(last).map(NonZeroU16::get);
        let mut fallback = None;
        for port in named.chain([0; EPHEMERAL_TRIES]) {
            let (port, listeners) = match try_port(port, &addresses).await? {
                PortAttempt::Free(port, listeners) => (port, listeners),
                PortAttempt::InUse(address) => {
                    if port != 0 && port == preferred {
                        fallback = Some(HeldPort::of_taken(address, port).await);
                    }
                    continue;
                }
            };
            let actual = port.get();
            if let Some(held) = &fallback {
                journal.record(&Event::DaemonHttpPortFallback { preferred, actual });
                let text = format!("{held}: containers that were started before send their tokens there");
                journal.record(&Event::Notice { text });
            }
            let bound = Bound { port, listeners, fallback };
            for address in bound.listeners.keys() {
                journal.record(&Event::DaemonHttpListening { host: address.to_string(), port: actual });
            }
            return Ok(bound);
        }
        Err(HttpError::NoPort)
    }

    /// The port.
    pub fn port(&self) -> NonZeroU16 {
        self.port
    }

    /// Begins to answer.
    pub fn serve(self, request_handler: Arc<RequestHandler>) -> Http {
        let journal = request_handler.journal.clone();
        request_handler.http_facts.set_fallback(self.fallback);
        let http = Http(Arc::new(Inner {
            port: self.port,
            request_handler,
            journal,
            addresses: Mutex::default(),
            closing: CancellationToken::new(),
            cut_off: CancellationToken::new(),
            listeners: TaskTracker::new(),
            connections: TaskTracker::new(),
        }));
        for (address, listener) in self.listeners {
            http.accept_on(address, listener);
        }
        http
    }
}

/// Every address once, and none that a wildcard among them covers: the kernel counts those as in use.
fn without_covered(addresses: &[IpAddr]) -> Vec<IpAddr> {
    let any_v6 = addresses.iter().any(|address| address.is_ipv6() && address.is_unspecified());
    let any = any_v6 || addresses.iter().any(|address| address.is_ipv4() && address.is_unspecified());
    let mut kept: Vec<IpAddr> = Vec::new();
    for address in addresses {
        let covered = if address.is_ipv4() { any } else { any_v6 };
        let is_the_cover = address.is_unspecified() && (address.is_ipv6() || !any_v6);
        if (!covered || is_the_cover) && !kept.contains(address) {
            kept.push(*address);
        }
    }
    kept
}

/// What came of trying a port.
enum PortAttempt {
    /// It is free on all addresses.
    Free(NonZeroU16, BTreeMap<IpAddr, TcpListener>),
    /// It is in use on this one.
    InUse(IpAddr),
}

/// Listens on all addresses at one port.
async fn try_port(port: u16, addresses: &[IpAddr]) -> Result<PortAttempt, HttpError> {
    let mut port = port;
    let mut listeners = BTreeMap::new();
    for ip in addresses {
        let address = SocketAddr::new(*ip, port);
        let failed = |source| HttpError::Listen { address, source };
        match TcpListener::bind(address).await {
            Ok(listener) => {
                port = listener.local_addr().map_err(failed)?.port();
                listeners.insert(*ip, listener);
            }
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => return Ok(PortAttempt::InUse(*ip)),
            Err(error) => return Err(failed(error)),
        }
    }
    let port = NonZeroU16::new(port).ok_or(HttpError::NoPort)?;
    Ok(PortAttempt::Free(port, listeners))
}

/// The endpoint; clones are the same one.
#[derive(Clone)]
pub struct Http(Arc<Inner>);

struct Inner {
    port: NonZeroU16,
    request_handler: Arc<RequestHandler>,
    journal: Journal,
    /// Where it listens.
    addresses: Mutex<Vec<IpAddr>>,
    closing: CancellationToken,
    cut_off: CancellationToken,
    listeners: TaskTracker,
    connections: TaskTracker,
}

impl Http {
    /// Listens on one more address, at the same port. One that it listens on already is no error.
    ///
    /// # Errors
    /// [`HttpError::Listen`].
    pub async fn listen_also(&self, ip: IpAddr) -> Result<(), HttpError> {
        let mut all = locked(&self.0.addresses).clone();
        all.push(ip);
        if locked(&self.0.addresses).contains(&ip) || !without_covered(&all).contains(&ip) {
            return Ok(());
        }
        self.listen_at(SocketAddr::new(ip, self.0.port.get())).await
    }

    /// Listens on one more address and port.
    async fn listen_at(&self, address: SocketAddr) -> Result<(), HttpError> {
        let listener =
            TcpListener::bind(address).await.map_err(|source| HttpError::Listen { address, source })?;
        self.accept_on(address.ip(), listener);
        let (host, port) = (address.ip().to_string(), address.port());
        self.0.journal.record(&Event::DaemonHttpListening { host, port });
        Ok(())
    }

    /// Answers on the socket of a container, until the endpoint closes.
    async fn serve_container(&self, listener: UnixListener) {
        let inner = Arc::clone(&self.0);
        let places = Places::new(CONNECTIONS_OF_CONTAINER_MAX, CONNECTIONS_OF_CONTAINER_MAX);
        inner.closing.clone().run_until_cancelled_owned(accept_all(inner, listener, places)).await;
    }

    /// Its port.
    pub fn port(&self) -> NonZeroU16 {
        self.0.port
    }

    /// Where it listens, each address once.
    fn addresses(&self) -> BTreeSet<IpAddr> {
        locked(&self.0.addresses).iter().copied().collect()
    }

    /// What is known of it.
    pub fn facts(&self) -> &SharedFacts {
        &self.0.request_handler.http_facts
    }

    /// Where its events go.
    pub fn journal(&self) -> &Journal {
        &self.0.journal
    }

    /// Releases the port, lets what is being answered finish for a moment, and cuts off the rest.
    pub async fn close(&self) {
        self.0.closing.cancel();
        self.0.listeners.close();
        self.0.listeners.wait().await;
        self.0.connections.close();
        if timeout(CLOSING_TIME_MAX, self.0.connections.wait()).await.is_err() {
            self.0.cut_off.cancel();
            self.0.connections.wait().await;
        }
    }

    fn accept_on(&self, address: IpAddr, listener: TcpListener) {
        locked(&self.0.addresses).push(address);
        let inner = Arc::clone(&self.0);
        let places = Places::new(CONNECTIONS_MAX, CONNECTIONS_OF_ONE_MAX);
        self.0.listeners.spawn(async move {
            let closing = inner.closing.clone();
            // The listener goes with the future that holds it, and the port with that.
            closing.run_until_cancelled_owned(accept_all(inner, listener, places)).await
        });
    }
}

/// A socket that connections come from.
trait Accept: Send + Sync + 'static {
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// The next connection: the client's address, and that of this machine to which it connected.
    fn accept_one(&self) -> impl Future<Output = io::Result<Accepted<Self::Stream>>> + Send;
}

struct Accepted<S> {
    stream: S,
    client: Option<IpAddr>,
    local: Option<IpAddr>,
}

impl Accept for TcpListener {
    type Stream = TcpStream;

    async fn accept_one(&self) -> io::Result<Accepted<TcpStream>> {
        let (stream, client) = self.accept().await?;
        // A wildcard stands for every address; the one that was connected to is known here.
        let local = stream.local_addr().ok().map(|address| address.ip());
        Ok(Accepted { stream, client: Some(client.ip()), local })
    }
}

impl Accept for UnixListener {
    type Stream = UnixStream;

    async fn accept_one(&self) -> io::Result<Accepted<UnixStream>> {
        let (stream, _) = self.accept().await?;
        Ok(Accepted { stream, client: None, local: None })
    }
}

async fn accept_all(inner: Arc<Inner>, listener: impl Accept, places: Places) {
    while let Some(place) = places.free().await {
        match listener.accept_one().await {
            Ok(Accepted { stream, client, local }) => {
                let Some(guest) = places.admit(place, client) else { continue };
                let work = converse(Arc::clone(&inner), stream, local);
                inner.connections.spawn(inner.cut_off.clone().run_until_cancelled_owned(async move {
                    work.await;
                    drop(guest);
                }));
            }
            // No descriptor is left, or the client has gone already. Either way the next one is another try.
            Err(_) => tokio::time::sleep(ACCEPT_REST).await,
        }
    }
}

/// Serves one request, and makes happen what its answer promised.
async fn converse(inner: Arc<Inner>, mut stream: impl AsyncRead + AsyncWrite + Unpin, local: Option<IpAddr>) {
    let mut own = locked(&inner.addresses).clone();
    own.extend(local);
    let promised = Mutex::new(FollowUp::nothing());
    let asked = AtomicBool::new(false);
    let service = service_fn(|request| {
        let (inner, own, promised) = (&inner, &own, &promised);
        asked.store(true, Ordering::Relaxed);
        async move {
            let (response, after) = rpc::respond(request, own, &inner.request_handler).await;
            *locked(promised) = after;
            rpc::Served::Ok(response)
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME_MAX)
        .max_buf_size(HEAD_BYTES_MAX)
        // One request each: nobody holds a place without asking for something.
        .keep_alive(false)
        // A client may end its own direction when it has asked, and what it asked for is done also when it has gone.
        .half_close(true)
        .serve_connection(TokioIo::new(&mut stream), service)
        .without_shutdown();
    // When the endpoint closes, who has asked for nothing yet is not waited for.
    let left_alone = async {
        inner.closing.cancelled().await;
        if asked.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
    };
    // However it ended: what was promised happens, and what was written is to arrive.
    tokio::select! {
        _ = timeout(CONNECTION_TIME_MAX, connection) => {}
        () = left_alone => {}
    }
    promised.into_inner().unwrap_or_else(PoisonError::into_inner).happen();
    inner.closing.run_until_cancelled(linger(stream)).await;
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
