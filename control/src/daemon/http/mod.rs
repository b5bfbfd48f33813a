//! The daemon's HTTP endpoint, at which containers make requests for themselves (wire specification, A.2).
//!
//! It listens on 127.0.0.1 and on the address at which containers reach the host, on the same port. Containers keep the URL
//! from their start, so the preferred port is used whenever it is free. If Docker starts after the daemon, its address is
//! added then.
//!
//! A connection is in one of four states: reading the head, reading the body, being answered, lingering. Each has a time
//! limit, and so has the whole connection. A connection never carries a second request, and an accepted request is completed
//! after its client has gone.
//!
//! - `auth` checks tokens and the addressed host. No I/O.
//! - `container_socket` provides a Unix socket for each container.
//! - `gateway` keeps the endpoint listening where containers reach the host, and reports the holder of a port that is in
//!   use.
//! - `slots` bounds the number of connections.
//! - `rpc` handles the one route and the order of its checks.

pub mod auth;
pub mod container_socket;
pub mod gateway;
pub mod rpc;
mod slots;

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
use crate::daemon::http::slots::ConnectionSlots;
use crate::daemon::rpc::request_handler::{FollowUp, RequestHandler};
use crate::model::event::Event;
use crate::sys::graceful_close::linger;
use crate::sys::held_port::HeldPort;
use crate::sys::journal::Journal;

/// The maximum number of concurrent connections of one listener, and of one client of it.
const CONNECTIONS_MAX: usize = 256;
const CONNECTIONS_OF_ONE_MAX: usize = 64;
/// The maximum number of concurrent connections of the socket of one container.
const CONNECTIONS_OF_CONTAINER_MAX: usize = 32;
/// How long a client may take to send the head of its request.
const HEAD_TIME_MAX: Duration = Duration::from_secs(5);
/// How long a connection may last. A restart may have to wait until the registrations are restored.
const CONNECTION_TIME_MAX: Duration = Duration::from_secs(90);
/// The longest head, in bytes. hyper's minimum buffer is half of it.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// The number of ephemeral ports to try: a port that is free on 127.0.0.1 may be in use on another address.
const EPHEMERAL_TRIES: usize = 16;
/// How long open answers may continue when the endpoint closes.
const CLOSING_TIME_MAX: Duration = Duration::from_millis(500);
/// The delay after a failed accept, for example when the process has no free descriptor.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);

/// The reasons why the endpoint cannot be opened.
#[derive(Debug, Error)]
pub enum HttpError {
    /// An address cannot be listened on.
    #[error("cannot listen on {address} for HTTP")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The error of the system call.
        source: io::Error,
    },
    /// No port is free on all addresses.
    #[error("no port for HTTP is free on all of the addresses")]
    NoPort,
}

/// The bound sockets of the endpoint. Clients can connect, but are not served yet.
#[derive(Debug)]
pub struct Bound {
    port: NonZeroU16,
    listeners: BTreeMap<IpAddr, TcpListener>,
    /// The holder of the preferred port, if the daemon uses another port.
    fallback: Option<HeldPort>,
}

impl Bound {
    /// Listens on all addresses, at the first of these ports that is free on all of them: the preferred port, the port of
    /// the previous daemon (containers that have that port's URL send requests there), an ephemeral port. 0 means no
    /// preferred port.
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

    /// Returns the port.
    pub fn port(&self) -> NonZeroU16 {
        self.port
    }

    /// Starts to serve connections.
    pub fn serve(self, request_handler: Arc<RequestHandler>) -> Http {
        let journal = request_handler.journal.clone();
        request_handler.http_facts.set_fallback(self.fallback);
        let http = Http(Arc::new(Inner {
            port: self.port,
            request_handler,
            journal,
            addresses: Mutex::default(),
            closing: CancellationToken::new(),
            abort: CancellationToken::new(),
            listeners: TaskTracker::new(),
            connections: TaskTracker::new(),
        }));
        for (address, listener) in self.listeners {
            http.accept_on(address, listener);
        }
        http
    }
}

/// Returns each address once, without those that a wildcard address covers: the kernel reports these as in use.
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

/// The result of trying a port.
enum PortAttempt {
    /// The port is free on all addresses.
    Free(NonZeroU16, BTreeMap<IpAddr, TcpListener>),
    /// The port is in use on this address.
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

/// The endpoint. Clones share one state.
#[derive(Clone)]
pub struct Http(Arc<Inner>);

struct Inner {
    port: NonZeroU16,
    request_handler: Arc<RequestHandler>,
    journal: Journal,
    /// The addresses on which it listens.
    addresses: Mutex<Vec<IpAddr>>,
    closing: CancellationToken,
    abort: CancellationToken,
    listeners: TaskTracker,
    connections: TaskTracker,
}

impl Http {
    /// Listens on another address at the same port. Has no effect for an address that is already covered.
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

    /// Listens on another address and port.
    async fn listen_at(&self, address: SocketAddr) -> Result<(), HttpError> {
        let listener =
            TcpListener::bind(address).await.map_err(|source| HttpError::Listen { address, source })?;
        self.accept_on(address.ip(), listener);
        let (host, port) = (address.ip().to_string(), address.port());
        self.0.journal.record(&Event::DaemonHttpListening { host, port });
        Ok(())
    }

    /// Serves the socket of a container until the endpoint closes.
    async fn serve_container(&self, listener: UnixListener) {
        let inner = Arc::clone(&self.0);
        let slots = ConnectionSlots::new(CONNECTIONS_OF_CONTAINER_MAX, CONNECTIONS_OF_CONTAINER_MAX);
        inner.closing.clone().run_until_cancelled_owned(accept_all(inner, listener, slots)).await;
    }

    /// Returns the port.
    pub fn port(&self) -> NonZeroU16 {
        self.0.port
    }

    /// Returns the addresses on which it listens, each once.
    fn addresses(&self) -> BTreeSet<IpAddr> {
        locked(&self.0.addresses).iter().copied().collect()
    }

    /// Returns the facts about the endpoint.
    pub fn facts(&self) -> &SharedFacts {
        &self.0.request_handler.http_facts
    }

    /// Returns the journal for its events.
    pub fn journal(&self) -> &Journal {
        &self.0.journal
    }

    /// Releases the port, gives open answers 500 ms to finish, and aborts the rest.
    pub async fn close(&self) {
        self.0.closing.cancel();
        self.0.listeners.close();
        self.0.listeners.wait().await;
        self.0.connections.close();
        if timeout(CLOSING_TIME_MAX, self.0.connections.wait()).await.is_err() {
            self.0.abort.cancel();
            self.0.connections.wait().await;
        }
    }

    fn accept_on(&self, address: IpAddr, listener: TcpListener) {
        locked(&self.0.addresses).push(address);
        let inner = Arc::clone(&self.0);
        let slots = ConnectionSlots::new(CONNECTIONS_MAX, CONNECTIONS_OF_ONE_MAX);
        self.0.listeners.spawn(async move {
            let closing = inner.closing.clone();
            // Dropping the future drops the listener, which releases the port.
            closing.run_until_cancelled_owned(accept_all(inner, listener, slots)).await
        });
    }
}

/// A listening socket.
trait Accept: Send + Sync + 'static {
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// Accepts the next connection. Returns the client's address, and the local address to which it connected.
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
        // For a listener on a wildcard address, the actual local address is known only here.
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

async fn accept_all(inner: Arc<Inner>, listener: impl Accept, slots: ConnectionSlots) {
    while let Some(slot) = slots.free().await {
        match listener.accept_one().await {
            Ok(Accepted { stream, client, local }) => {
                let Some(slot) = slots.admit(slot, client) else { continue };
                let work = serve_connection(Arc::clone(&inner), stream, local);
                inner.connections.spawn(inner.abort.clone().run_until_cancelled_owned(async move {
                    work.await;
                    drop(slot);
                }));
            }
            // No descriptor is free, or the client has already gone. In either case, retry.
            Err(_) => tokio::time::sleep(ACCEPT_RETRY_DELAY).await,
        }
    }
}

/// Serves one request, and runs the follow-up of its answer.
async fn serve_connection(
    inner: Arc<Inner>,
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    local: Option<IpAddr>,
) {
    let mut own = locked(&inner.addresses).clone();
    own.extend(local);
    let follow_up = Mutex::new(FollowUp::none());
    let has_request = AtomicBool::new(false);
    let service = service_fn(|request| {
        let (inner, own, follow_up) = (&inner, &own, &follow_up);
        has_request.store(true, Ordering::Relaxed);
        async move {
            let (response, after) = rpc::respond(request, own, &inner.request_handler).await;
            *locked(follow_up) = after;
            rpc::Served::Ok(response)
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME_MAX)
        .max_buf_size(HEAD_BYTES_MAX)
        // One request for each connection, so that an idle client does not hold a slot.
        .keep_alive(false)
        // A client may close its write side after the request. The request is completed even if the client has gone.
        .half_close(true)
        .serve_connection(TokioIo::new(&mut stream), service)
        .without_shutdown();
    // When the endpoint closes, connections without a request are closed at once.
    let closing_idle = async {
        inner.closing.cancelled().await;
        if has_request.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
    };
    // In all cases the follow-up runs, and written bytes are delivered.
    tokio::select! {
        _ = timeout(CONNECTION_TIME_MAX, connection) => {}
        () = closing_idle => {}
    }
    follow_up.into_inner().unwrap_or_else(PoisonError::into_inner).run();
    inner.closing.run_until_cancelled(linger(stream)).await;
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
