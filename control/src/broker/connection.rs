//! One WebSocket of a broker on the host's side, from its opening to its end.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use thiserror::Error;
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::challenge::{Challenge, ChallengeError};
use super::driver::Broker;
use super::message::{Frame, StreamId, ToHost, Unreadable, from_binary};
use super::outbox::{Ended, Outbox, outbox};
use super::pump::Inlets;
use super::wire::{self, Incoming, Reader, WireError};
use crate::docker::DockerError;
use crate::error::chain;
use crate::model::port_policy::CONTAINER_PORT;
use crate::model::registration::ContainerName;
use crate::sys::loopback::{Destination, DestinationError};
use crate::sys::random::random;

/// The time for the container to answer our close.
const CLOSE_MAX: Duration = Duration::from_secs(2);
/// The close code for a normal closure (RFC 6455, 7.4.1).
const NORMAL: u16 = 1_000;

/// The reason why a connection attempt failed.
#[derive(Debug, Error)]
pub(super) enum ConnectError {
    /// Docker has the container, but it is not running.
    #[error(transparent)]
    NotRunning(DockerError),
    /// Docker has the container, but publishes its port on no port of the host's loopback.
    #[error("Docker does not publish port {CONTAINER_PORT} of {0} on this host's loopback")]
    NotPublished(ContainerName),
    /// Docker has no such container or does not answer, and the registration has no port.
    #[error("Docker did not report where port {CONTAINER_PORT} is published")]
    NoPort,
    /// The process at the port may not receive the token.
    #[error(transparent)]
    Destination(#[from] DestinationError),
    /// Connecting to the port failed.
    #[error("cannot connect to {address}")]
    Dial {
        /// The port.
        address: SocketAddr,
        /// The error of the kernel.
        source: io::Error,
    },
    /// The peer answers the challenge, but not with the container's proof.
    #[error("port {} is not {name}: {source}", address.port())]
    Challenge {
        /// The port.
        address: SocketAddr,
        /// The container.
        name: ContainerName,
        /// The problem with the answer.
        source: ChallengeError,
    },
    /// The kernel returned no random bytes for a challenge.
    #[error("cannot create a challenge")]
    Random(#[source] io::Error),
    /// The peer answers, but not with a WebSocket.
    #[error("{address} does not open a WebSocket")]
    Upgrade {
        /// The port.
        address: SocketAddr,
        /// The error.
        source: WireError,
    },
}

/// A WebSocket, and our proof for the hello if the peer has proved that it holds the token.
pub(super) type Opened = (Connection, Option<String>);

/// An open WebSocket.
#[derive(Debug)]
pub(super) struct Connection {
    /// The queue of messages to the container.
    pub(super) outbox: Outbox,
    reader: Reader,
    writing: JoinHandle<Result<(), Ended>>,
    inlets: Option<Inlets>,
    /// Whether an unreadable message was reported.
    reported_unreadable: bool,
}

/// An event of the connection.
#[derive(Debug)]
pub(super) enum ConnectionEvent {
    Text(ToHost),
    Binary(StreamId, Frame),
    /// A message could not be parsed. Only the first of a connection is reported.
    Unreadable(Unreadable),
    /// The connection has ended.
    Lost(String),
}

impl Connection {
    /// Connects, performs the handshake, and checks that the peer may receive the token. Has no time limit of its own.
    ///
    /// # Errors
    /// [`ConnectError`]. In each case no secret was sent.
    pub(super) async fn open(address: SocketAddr, broker: &Broker) -> Result<Opened, ConnectError> {
        match Connection::attempt(address, broker).await {
            Err(ConnectError::Destination(error)) => Err(ConnectError::Destination(error.identified().await)),
            done => done,
        }
    }

    async fn attempt(address: SocketAddr, broker: &Broker) -> Result<Opened, ConnectError> {
        let name = &broker.name;
        let challenge = Challenge::new(name.clone(), random().map_err(ConnectError::Random)?);
        let destination = Destination::look_up(address)?;
        let stream = dial(address).await.map_err(|source| ConnectError::Dial { address, source })?;
        let (socket, answer) = wire::connect(stream, &address.to_string(), &challenge.header())
            .await
            .map_err(|source| ConnectError::Upgrade { address, source })?;
        let proof = answer.map(|answer| challenge.check(&broker.token, &answer)).transpose();
        let proof =
            proof.map_err(|source| ConnectError::Challenge { address, name: name.clone(), source })?;
        destination.verify(socket.stream())?;
        let (reader, writer) = socket.split();
        let (outbox, queue) = outbox();
        let writing = tokio::spawn(queue.drain(writer));
        let connection = Connection { outbox, reader, writing, inlets: None, reported_unreadable: false };
        Ok((connection, proof))
    }

    /// Returns the inlets for arriving payload. Credit windows are negotiated before the first stream, so the first
    /// call decides about them.
    pub(super) fn inlets(&mut self, credit: bool) -> &Inlets {
        self.inlets.get_or_insert_with(|| Inlets::new(credit))
    }

    /// Closes the connection in a task of its own. The container gets [`CLOSE_MAX`] to close as well: closing a socket
    /// with unread data sends a reset, which may destroy the last messages.
    pub(super) fn close(mut self) {
        self.outbox.close(NORMAL, "");
        tokio::spawn(async move {
            let closing = async {
                let _ = (&mut self.writing).await;
                while let Ok(Incoming::Text(_) | Incoming::Binary(_)) = self.reader.next().await {}
            };
            // A container that does not close in time is disconnected.
            let _ = timeout(CLOSE_MAX, closing).await;
        });
    }

    async fn hear(&mut self) -> ConnectionEvent {
        loop {
            let incoming = tokio::select! {
                incoming = self.reader.next() => incoming,
                ended = &mut self.writing => return ConnectionEvent::Lost(match ended {
                    Ok(Ok(())) => "it was closed".to_owned(),
                    Ok(Err(error)) => chain(&error),
                    Err(error) => chain(&error),
                }),
            };
            match self.read(incoming) {
                Ok(Some(heard)) => return heard,
                Ok(None) => {}
                Err(why) if !std::mem::replace(&mut self.reported_unreadable, true) => {
                    return ConnectionEvent::Unreadable(why);
                }
                Err(_) => {}
            }
        }
    }

    /// Parses a message. Returns `None` for an unknown message, which is ignored.
    fn read(&self, incoming: Result<Incoming, WireError>) -> Result<Option<ConnectionEvent>, Unreadable> {
        Ok(match incoming {
            Ok(Incoming::Text(text)) => ToHost::from_text(text.as_str())?.map(ConnectionEvent::Text),
            Ok(Incoming::Binary(bytes)) => {
                from_binary(bytes)?.map(|(stream, frame)| ConnectionEvent::Binary(stream, frame))
            }
            Ok(Incoming::Closed { code, reason }) => {
                Some(ConnectionEvent::Lost(format!("closed with {code} {reason}")))
            }
            Err(error) => Some(ConnectionEvent::Lost(chain(&error))),
        })
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // The task holds half of the socket.
        self.writing.abort();
    }
}

/// Returns the next event of the connection, if there is one. Cancel-safe.
pub(super) async fn heard(connection: &mut Option<Connection>) -> ConnectionEvent {
    match connection {
        Some(connection) => connection.hear().await,
        None => std::future::pending().await,
    }
}

async fn dial(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    wire::prepare(&socket);
    socket.connect(address).await
}
