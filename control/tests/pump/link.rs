//! Two sides of a broker with streams between them and nothing else: each a thread with a runtime of its own, as in two
//! processes, and a WebSocket between the two.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Empty;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use landfall::broker::message::{Extensions, Frame, Side, StreamId, ToContainer, ToHost, from_binary};
use landfall::broker::outbox::{Outbox, outbox};
use landfall::broker::pair::Pairs;
use landfall::broker::pump::{Ended, Inlet, Inlets, relay};
use landfall::broker::wire::{self, Incoming, Socket};
use landfall_pattern::Pattern;
use rustix::net::sockopt;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

/// Longer than any step of a test takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Link {
    host: Peer,
    container: Peer,
    next: i64,
}

/// One stream: the applications' ends, and the outcome at each side of the broker.
pub(crate) struct Stream {
    pub(crate) client: TcpStream,
    pub(crate) server: TcpStream,
    pub(crate) host: Ending,
    pub(crate) container: Ending,
}

/// The outcome of a stream at one side, once it has ended.
pub(crate) struct Ending(oneshot::Receiver<Ended>);

impl Ending {
    pub(crate) fn wait(self) -> Ended {
        self.0.blocking_recv().expect("the side has gone before the stream's end")
    }
}

struct Peer {
    orders: UnboundedSender<Order>,
    thread: Option<JoinHandle<()>>,
}

enum Order {
    Open { stream: StreamId, socket: TcpStream, ended: oneshot::Sender<Ended>, opened: mpsc::Sender<()> },
    Vanish,
}

impl Link {
    pub(crate) fn new(extensions: Extensions) -> Link {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let container = Peer::start(Side::Upstream, extensions, async move {
            listener.set_nonblocking(true).unwrap();
            accept(tokio::net::TcpListener::from_std(listener).unwrap()).await
        });
        let host = Peer::start(Side::Downstream, extensions, async move {
            let stream = tokio::net::TcpStream::connect(address).await.unwrap();
            wire::connect(stream, &address.to_string(), "").await.unwrap().0
        });
        Link { host, container, next: 1 }
    }

    pub(crate) fn open(&mut self) -> Stream {
        let stream = StreamId(self.next);
        self.next += 1;
        let (server, inside) = tcp();
        let container = self.container.open(stream, inside);
        let (client, outside) = pair();
        let host = self.host.open(stream, outside);
        Stream { client, server, host, container }
    }

    /// Ends the host's side without a message.
    pub(crate) fn lose_host(&mut self) {
        self.host.vanish();
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.host.vanish();
        self.container.vanish();
    }
}

impl Peer {
    fn start(
        us: Side,
        extensions: Extensions,
        socket: impl Future<Output = Socket> + Send + 'static,
    ) -> Peer {
        let (orders, ordered) = unbounded_channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move { side(us, extensions, socket.await, ordered).await });
        });
        Peer { orders, thread: Some(thread) }
    }

    fn open(&self, stream: StreamId, socket: TcpStream) -> Ending {
        let (ended, ending) = oneshot::channel();
        let (opened, is_open) = mpsc::channel();
        assert!(self.orders.send(Order::Open { stream, socket, ended, opened }).is_ok(), "the side is gone");
        is_open.recv_timeout(PATIENCE).unwrap();
        Ending(ending)
    }

    fn vanish(&mut self) {
        // It may have ended with the other side.
        let _ = self.orders.send(Order::Vanish);
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "a side panicked");
        }
    }
}

async fn side(us: Side, extensions: Extensions, socket: Socket, mut orders: UnboundedReceiver<Order>) {
    let (mut reader, writer) = socket.split();
    let (outbox, queue) = outbox();
    let inlets = Inlets::new(extensions.credit);
    let mut streams: HashMap<StreamId, Inlet> = HashMap::new();
    let mut pumps = JoinSet::new();
    let mut writing = tokio::spawn(queue.drain(writer));
    let mut is_lost = false;
    loop {
        tokio::select! {
            order = orders.recv() => match order {
                Some(Order::Open { stream, socket, ended, opened }) => {
                    let (inlet, arriving) = inlets.inlet();
                    streams.insert(stream, inlet);
                    let outbox = Outbox::clone(&outbox);
                    socket.set_nonblocking(true).unwrap();
                    let socket = tokio::net::TcpStream::from_std(socket).unwrap();
                    pumps.spawn(async move {
                        let end = relay(socket, stream, us, extensions, &outbox, arriving).await;
                        // The receiver may be gone.
                        let _ = ended.send(end);
                        stream
                    });
                    opened.send(()).unwrap();
                }
                Some(Order::Vanish) | None => return,
            },
            incoming = reader.next(), if !is_lost => match incoming {
                Ok(Incoming::Closed { .. }) | Err(_) => {
                    is_lost = true;
                    streams.clear();
                }
                Ok(incoming) => {
                    if let Some((stream, frame)) = frame(us, incoming)
                        && let Some(inlet) = streams.get(&stream)
                    {
                        inlet.deliver(frame);
                    }
                }
            },
            Some(ended) = pumps.join_next() => drop(streams.remove(&ended.unwrap())),
            _ = &mut writing, if !is_lost => {
                is_lost = true;
                streams.clear();
            }
        }
    }
}

fn frame(us: Side, incoming: Incoming) -> Option<(StreamId, Frame)> {
    match incoming {
        Incoming::Binary(bytes) => from_binary(bytes).unwrap(),
        Incoming::Text(text) if us == Side::Upstream => {
            match ToContainer::from_text(text.as_str()).unwrap() {
                Some(ToContainer::Relay(stream, frame)) => Some((stream, frame)),
                _ => None,
            }
        }
        Incoming::Text(text) => match ToHost::from_text(text.as_str()).unwrap() {
            Some(ToHost::Relay(stream, frame)) => Some((stream, frame)),
            _ => None,
        },
        Incoming::Closed { .. } => None,
    }
}

/// Accepts one connection and upgrades it to a WebSocket.
pub(crate) async fn accept(listener: tokio::net::TcpListener) -> Socket {
    let (stream, _) = listener.accept().await.unwrap();
    let (upgraded, mut upgrades) = unbounded_channel();
    let service = service_fn(move |mut request: Request<hyper::body::Incoming>| {
        let upgraded = upgraded.clone();
        async move {
            let mut response = Response::new(Empty::<Bytes>::new());
            *response.headers_mut() = wire::upgrade(request.headers(), None).unwrap();
            *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            let upgrade = hyper::upgrade::on(&mut request);
            tokio::spawn(async move { upgraded.send(upgrade.await.unwrap()).unwrap() });
            Ok::<_, Infallible>(response)
        }
    });
    let connection =
        hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    connection.with_upgrades().await.unwrap();
    wire::accepted(upgrades.recv().await.unwrap()).await.unwrap()
}

/// The application's end and the broker's: the sockets that the engine gets and that the daemon keeps.
fn pair() -> (TcpStream, TcpStream) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (theirs, ours) = Pairs::new().pair().await.unwrap();
        let theirs = TcpStream::from(theirs);
        theirs.set_nonblocking(false).unwrap();
        (theirs, ours.into_std().unwrap())
    })
}

/// The server's end and the agent's.
fn tcp() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let dialled = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let accepted = listener.accept().unwrap().0;
    for socket in [&dialled, &accepted] {
        // Small buffers, since hundreds of them are filled.
        sockopt::set_socket_send_buffer_size(socket, 512 * 1024).unwrap();
        sockopt::set_socket_recv_buffer_size(socket, 512 * 1024).unwrap();
    }
    (accepted, dialled)
}

pub(crate) fn send(mut socket: &TcpStream, seed: u64, bytes: usize) -> io::Result<()> {
    let pattern = Pattern::new(seed);
    let mut buffer = vec![0; 100_000];
    let mut sent = 0;
    while sent < bytes {
        let piece = buffer.len().min(bytes - sent);
        pattern.fill(sent as u64, &mut buffer[..piece]);
        socket.write_all(&buffer[..piece])?;
        sent += piece;
    }
    Ok(())
}

/// Reads this number of bytes, and checks each.
#[track_caller]
pub(crate) fn expect(socket: &TcpStream, seed: u64, bytes: usize) {
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut reader = io::BufReader::with_capacity(256 * 1024, socket);
    let mut checker = Pattern::new(seed).checker();
    let mut found = vec![0; 64 * 1024];
    let mut left = bytes;
    while left > 0 {
        let piece = left.min(found.len());
        if let Err(error) = reader.read_exact(&mut found[..piece]) {
            panic!("{error} with up to {left} of {bytes} bytes missing");
        }
        checker.check(&found[..piece]);
        left -= piece;
    }
    assert!(reader.buffer().is_empty(), "more than {bytes} bytes");
}

#[track_caller]
pub(crate) fn expect_end(mut socket: &TcpStream) {
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(socket.read(&mut [0; 1]).unwrap(), 0, "more bytes");
}

#[track_caller]
pub(crate) fn expect_reset(mut socket: &TcpStream) {
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(socket.read(&mut [0; 1]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

pub(crate) fn finish(socket: &TcpStream) {
    socket.shutdown(Shutdown::Write).unwrap();
}

pub(crate) fn reset(socket: TcpStream) {
    sockopt::set_socket_linger(&socket, Some(Duration::ZERO)).unwrap();
}
