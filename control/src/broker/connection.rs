//! One WebSocket of a broker on the host's side, from its opening to its loss.

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

/// How long the container may take to answer that we close.
const CLOSE_MAX: Duration = Duration::from_secs(2);
/// The code of a close without a complaint (RFC 6455, 7.4.1).
const NORMAL: u16 = 1_000;

/// The reason why a connection attempt failed.
#[derive(Debug, Error)]
pub(super) enum ConnectError {
    /// Docker has the container, and it does not run.
    #[error(transparent)]
    NotRunning(DockerError),
    /// Docker has the container, and no port of the host's loopback leads to its port.
    #[error("Docker does not publish port {CONTAINER_PORT} of {0} on this host's loopback")]
    NotPublished(ContainerName),
    /// Docker has no such container or does not answer, and the registration names no port.
    #[error("Docker did not report where port {CONTAINER_PORT} is published")]
    NoPort,
    /// The other end is not to have the token.
    #[error(transparent)]
    Destination(#[from] DestinationError),
    /// The port does not answer.
    #[error("{address} cannot be connected to")]
    Dial {
        /// The port.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// It answers our challenge, and not as the container does.
    #[error("port {} is not {name}: {source}", address.port())]
    Challenge {
        /// The port.
        address: SocketAddr,
        /// The container.
        name: ContainerName,
        /// What is wrong with the answer.
        source: ChallengeError,
    },
    /// There are no random bytes for a challenge.
    #[error("no challenge can be made")]
    Random(#[source] io::Error),
    /// It answers, and not as a container does.
    #[error("{address} opens no WebSocket")]
    Upgrade {
        /// The port.
        address: SocketAddr,
        /// Why.
        source: WireError,
    },
}

/// A WebSocket, and our proof for its hello where the other end has proved that it holds the token.
pub(super) type Opened = (Connection, Option<String>);

/// A WebSocket that is open.
#[derive(Debug)]
pub(super) struct Connection {
    /// Where messages to the container go.
    pub(super) outbox: Outbox,
    reader: Reader,
    writing: JoinHandle<Result<(), Ended>>,
    inlets: Option<Inlets>,
    /// That a message could not be read was told.
    told_unreadable: bool,
}

/// What came from the container.
#[derive(Debug)]
pub(super) enum Heard {
    Text(ToHost),
    Binary(StreamId, Frame),
    /// A message could not be read; told for the first of a connection.
    Unreadable(Unreadable),
    /// Nothing more comes.
    Lost(String),
}

impl Connection {
    /// Connects, shakes hands, and checks that the other end may have the token. Waits as long as the peer does.
    ///
    /// # Errors
    /// [`ConnectError`]. Nothing secret was sent.
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
        let connection = Connection { outbox, reader, writing, inlets: None, told_unreadable: false };
        Ok((connection, proof))
    }

    /// Where arriving payload of streams goes. Whether there are credit windows is known when the first stream is.
    pub(super) fn inlets(&mut self, credit: bool) -> &Inlets {
        self.inlets.get_or_insert_with(|| Inlets::new(credit))
    }

    /// Closes in order, beside whatever goes on here. The container is given time to close as well: a socket that is closed
    /// with something unread is reset, and with it what was said last may be lost.
    pub(super) fn close(mut self) {
        self.outbox.close(NORMAL, "");
        tokio::spawn(async move {
            let closing = async {
                let _ = (&mut self.writing).await;
                while let Ok(Incoming::Text(_) | Incoming::Binary(_)) = self.reader.next().await {}
            };
            // One that does not close is left.
            let _ = timeout(CLOSE_MAX, closing).await;
        });
    }

    async fn hear(&mut self) -> Heard {
        loop {
            let incoming = tokio::select! {
                incoming = self.reader.next() => incoming,
                ended = &mut self.writing => return Heard::Lost(match ended {
                    Ok(Ok(())) => "it was closed".to_owned(),
                    Ok(Err(error)) => chain(&error),
                    Err(error) => chain(&error),
                }),
            };
            match self.read(incoming) {
                Ok(Some(heard)) => return heard,
                Ok(None) => {}
                Err(why) if !std::mem::replace(&mut self.told_unreadable, true) => {
                    return Heard::Unreadable(why);
                }
                Err(_) => {}
            }
        }
    }

    /// Understands what came. Nothing is a message that is unknown, which is ignored.
    fn read(&self, incoming: Result<Incoming, WireError>) -> Result<Option<Heard>, Unreadable> {
        Ok(match incoming {
            Ok(Incoming::Text(text)) => ToHost::from_text(text.as_str())?.map(Heard::Text),
            Ok(Incoming::Binary(bytes)) => {
                from_binary(bytes)?.map(|(stream, frame)| Heard::Binary(stream, frame))
            }
            Ok(Incoming::Closed { code, reason }) => {
                Some(Heard::Lost(format!("closed with {code} {reason}")))
            }
            Err(error) => Some(Heard::Lost(chain(&error))),
        })
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // It holds half of the socket.
        self.writing.abort();
    }
}

/// What comes next over the connection, if there is one. Dropping the future loses nothing.
pub(super) async fn heard(connection: &mut Option<Connection>) -> Heard {
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
