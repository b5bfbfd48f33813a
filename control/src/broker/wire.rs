//! WebSockets (RFC 6455). No other file uses the library that implements them.
//!
//! No extension is offered or accepted, compression included: most of the payload is compressed already, and both ends
//! are on the same machine. Pings are answered while the socket is read. A peer's runtime drops a connection after two
//! minutes without traffic, and sends a ping before that.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt as _, StreamExt as _};
use hyper::header::{
    CONNECTION, HeaderMap, HeaderName, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY,
    SEC_WEBSOCKET_VERSION, UPGRADE,
};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use landfall_engine::sys::tune;
use rustix::net::sockopt;
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error, Message, Utf8Bytes};

use super::challenge;
use super::message::MESSAGE_BYTES_MAX;

/// The path of the broker's endpoint.
pub const PATH: &str = "/portbroker";

/// The header of a challenge and of its answer.
const CHALLENGE: HeaderName = HeaderName::from_static(challenge::HEADER);

/// The number of bytes up to which messages are gathered into one write. A system call for each message would be most
/// of the work.
const WRITE_BYTES: usize = 128 * 1024;
/// The limit of buffered output, in bytes. A writer waits after each message that the socket did not accept, so the
/// limit only has to hold one outgoing message; the largest lists 65535 listeners.
const WRITE_BYTES_MAX: usize = 8 * 1024 * 1024;
const READ_BYTES: usize = 128 * 1024;

/// TCP keepalive: the idle time before the first probe, the interval, and the number of probes. A peer machine that
/// disappears is noticed within two minutes. The kernel of a frozen container still answers.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_EVERY: Duration = Duration::from_secs(15);
const KEEPALIVE_MISSES: u32 = 4;

/// The reason why a WebSocket was not opened, or has ended.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The peer answered the handshake with another status.
    #[error("the peer answered {0} to the request for a WebSocket")]
    Refused(u16),
    /// The peer violated the protocol or a limit, or the connection failed.
    #[error("the WebSocket failed")]
    Broken(#[source] Arc<Error>),
}

impl From<Error> for WireError {
    fn from(error: Error) -> WireError {
        match error {
            Error::Http(response) => WireError::Refused(response.status().as_u16()),
            error => WireError::Broken(Arc::new(error)),
        }
    }
}

/// An open WebSocket.
#[derive(Debug)]
pub struct Socket(WebSocketStream<TcpStream>);

/// A received message, or the end.
#[derive(Debug)]
pub enum Incoming {
    /// A text message.
    Text(Text),
    /// A binary message. It may be a slice that keeps a larger buffer alive.
    Binary(Bytes),
    /// The peer closed the WebSocket. No message follows.
    Closed {
        /// The code; 1005 if the frame lacks a code (RFC 6455, 7.1.5), 1006 if the connection ended without a close frame.
        code: u16,
        /// The reason.
        reason: String,
    },
}

/// The text of a message.
#[derive(Clone, Debug)]
pub struct Text(Utf8Bytes);

impl Text {
    /// Returns the text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }
}

/// Sets the options of a socket that will carry a WebSocket. Options that the kernel refuses are skipped.
pub fn prepare(socket: impl AsFd) {
    let socket = socket.as_fd();
    tune(socket);
    let _ = sockopt::set_socket_keepalive(socket, true);
    let _ = sockopt::set_tcp_keepidle(socket, KEEPALIVE_IDLE);
    let _ = sockopt::set_tcp_keepintvl(socket, KEEPALIVE_EVERY);
    let _ = sockopt::set_tcp_keepcnt(socket, KEEPALIVE_MISSES);
}

/// Performs the client's handshake over an established connection. Returns the peer's answer to `challenge`, if it
/// sends one. Has no time limit of its own.
///
/// # Errors
/// [`WireError`]: the peer refuses or violates the protocol.
pub async fn connect(
    stream: TcpStream,
    host: &str,
    challenge: &str,
) -> Result<(Socket, Option<String>), WireError> {
    let mut request = format!("ws://{host}{PATH}").into_client_request()?;
    // A challenge consists of letters, digits and the other characters of names and base64url, so it is a valid header
    // value.
    request.headers_mut().extend(HeaderValue::from_str(challenge).map(|value| (CHALLENGE, value)));
    let (socket, response) =
        tokio_tungstenite::client_async_with_config(request, stream, Some(config())).await?;
    Ok((Socket(socket), challenge_in(response.headers())))
}

/// Returns the challenge in the headers of a request, or the answer to one in the headers of an answer. Invalid UTF-8
/// is replaced, which makes the value an invalid challenge and an invalid answer.
#[must_use]
pub fn challenge_in(headers: &HeaderMap) -> Option<String> {
    headers.get(CHALLENGE).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
}

/// Returns the headers of the answer (101) that upgrades a request to a WebSocket, with the answer to its challenge if
/// there is one. Returns `None` for a request without a valid upgrade (RFC 6455, 4.2.1).
#[must_use]
pub fn upgrade(request: &HeaderMap, challenge: Option<&str>) -> Option<HeaderMap> {
    let names = |header, wanted: &str| {
        let tokens = request.get_all(header).into_iter().filter_map(|value| value.to_str().ok());
        tokens.flat_map(|value| value.split(',')).any(|token| token.trim().eq_ignore_ascii_case(wanted))
    };
    let is_thirteen = request.get(SEC_WEBSOCKET_VERSION).is_some_and(|version| version == "13");
    if !is_thirteen || !names(UPGRADE, "websocket") || !names(CONNECTION, "upgrade") {
        return None;
    }
    let key = derive_accept_key(request.get(SEC_WEBSOCKET_KEY)?.as_bytes());
    let mut answer = HeaderMap::new();
    answer.insert(UPGRADE, HeaderValue::from_static("websocket"));
    answer.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    answer.insert(SEC_WEBSOCKET_ACCEPT, HeaderValue::from_str(&key).ok()?);
    answer
        .extend(challenge.and_then(|text| HeaderValue::from_str(text).ok()).map(|value| (CHALLENGE, value)));
    Some(answer)
}

/// Returns the server's side of a WebSocket over an upgraded connection, which must have been served as
/// `TokioIo<TcpStream>`.
///
/// # Errors
/// The connection was served as another type.
pub async fn accepted(upgraded: Upgraded) -> io::Result<Socket> {
    let parts = upgraded
        .downcast::<TokioIo<TcpStream>>()
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "the connection is not a TCP connection"))?;
    let (stream, read) = (parts.io.into_inner(), parts.read_buf.to_vec());
    Ok(Socket(WebSocketStream::from_partially_read(stream, read, Role::Server, Some(config())).await))
}

fn config() -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(READ_BYTES)
        .write_buffer_size(WRITE_BYTES)
        .max_write_buffer_size(WRITE_BYTES_MAX)
        .max_message_size(Some(MESSAGE_BYTES_MAX))
        .max_frame_size(Some(MESSAGE_BYTES_MAX))
}

impl Socket {
    /// Returns the underlying connection.
    #[must_use]
    pub fn stream(&self) -> &TcpStream {
        self.0.get_ref()
    }

    /// Splits the socket into its two directions. Pings are answered only while the reader is polled.
    #[must_use]
    pub fn split(self) -> (Reader, Writer) {
        let (sink, stream) = self.0.split();
        (Reader { stream, bytes_since_yield: 0 }, Writer(sink))
    }
}

/// The number of bytes to read before yielding to the other tasks of the thread, which include the pumps of this
/// WebSocket's streams. Without a limit, the reader would queue tens of megabytes for sockets that could have accepted
/// them.
const YIELD_BYTES: usize = 128 * 1024;
/// The cost of a message in addition to its bytes, in bytes: a small message can be as much work as a kilobyte of
/// payload.
const MESSAGE_COST_BYTES: usize = 1_024;

/// The receiving direction of a WebSocket.
#[derive(Debug)]
pub struct Reader {
    stream: SplitStream<WebSocketStream<TcpStream>>,
    /// The cost of the messages since the last yield, in bytes.
    bytes_since_yield: usize,
}

impl Reader {
    /// Returns the next message. Cancel-safe.
    ///
    /// # Errors
    /// [`WireError::Broken`], after which only `Closed` follows.
    pub async fn next(&mut self) -> Result<Incoming, WireError> {
        loop {
            if self.bytes_since_yield >= YIELD_BYTES {
                self.bytes_since_yield = 0;
                tokio::task::yield_now().await;
            }
            let message = self.stream.next().await;
            if let Some(Ok(message)) = &message {
                self.bytes_since_yield += MESSAGE_COST_BYTES + message.len();
            }
            let closed = |code, reason: &str| Incoming::Closed { code, reason: reason.to_owned() };
            return Ok(match message {
                Some(Ok(Message::Text(text))) => Incoming::Text(Text(text)),
                Some(Ok(Message::Binary(bytes))) => Incoming::Binary(bytes),
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => continue,
                Some(Ok(Message::Close(None))) => closed(1005, ""),
                Some(Ok(Message::Close(Some(frame)))) => closed(frame.code.into(), frame.reason.as_str()),
                Some(Err(error)) => return Err(error.into()),
                None => closed(1006, ""),
            });
        }
    }
}

/// The sending direction of a WebSocket.
#[derive(Debug)]
pub struct Writer(SplitSink<WebSocketStream<TcpStream>, Message>);

impl Writer {
    /// Writes a text message, or buffers it until more data or [`Writer::flush`] follows. Waits for room.
    ///
    /// # Errors
    /// [`WireError::Broken`].
    pub async fn text(&mut self, text: String) -> Result<(), WireError> {
        Ok(self.0.feed(Message::Text(text.into())).await?)
    }

    /// Writes a binary message, or buffers it until more data or [`Writer::flush`] follows. Waits for room.
    ///
    /// # Errors
    /// [`WireError::Broken`].
    pub async fn binary(&mut self, bytes: Bytes) -> Result<(), WireError> {
        Ok(self.0.feed(Message::Binary(bytes)).await?)
    }

    /// Writes buffered messages.
    ///
    /// # Errors
    /// [`WireError::Broken`].
    pub async fn flush(&mut self) -> Result<(), WireError> {
        Ok(self.0.flush().await?)
    }

    /// Closes the WebSocket with a code and a reason, which is cut to 123 bytes (RFC 6455, 5.5). The peer's answer
    /// arrives at the [`Reader`].
    ///
    /// # Errors
    /// [`WireError::Broken`].
    pub async fn close(&mut self, code: u16, reason: &str) -> Result<(), WireError> {
        let reason = &reason[..reason.floor_char_boundary(123)];
        let frame = CloseFrame { code: CloseCode::from(code), reason: reason.into() };
        Ok(self.0.send(Message::Close(Some(frame))).await?)
    }
}
