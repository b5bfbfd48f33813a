//! WebSockets (RFC 6455). Nothing else of this crate knows the library that speaks it.
//!
//! No extension is offered or accepted, compression least of all: most of what is relayed is compressed already, and the
//! rest is on the same machine. Pings are answered by reading; a peer's runtime drops a connection that says nothing for
//! two minutes, and asks with a ping before it does.

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

/// Where the broker answers.
pub const PATH: &str = "/portbroker";

/// The header of a challenge and of its answer.
const CHALLENGE: HeaderName = HeaderName::from_static(challenge::HEADER);

/// Messages gather until there are so many bytes, or no more messages: a system call a message would be most of the work.
const WRITE_BYTES: usize = 128 * 1024;
/// What may wait to be written, in bytes. A writer waits after each message that the socket did not take, so this only has
/// room for one message of ours, the largest of which tells of 65535 listeners.
const WRITE_BYTES_MAX: usize = 8 * 1024 * 1024;
const READ_BYTES: usize = 128 * 1024;

/// After how long without a byte the kernel asks whether the other end is still there, how often, and how many times: a
/// machine that went away without a word is noticed within two minutes. A container that was frozen answers.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_EVERY: Duration = Duration::from_secs(15);
const KEEPALIVE_MISSES: u32 = 4;

/// Why a WebSocket did not come to be, or is no more.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The peer answered the handshake with another status.
    #[error("the peer answered {0} to the request for a WebSocket")]
    Refused(u16),
    /// What the peer sent breaks the protocol or a limit, or the connection broke.
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

/// A WebSocket that is open.
#[derive(Debug)]
pub struct Socket(WebSocketStream<TcpStream>);

/// What arrives.
#[derive(Debug)]
pub enum Incoming {
    /// A text message.
    Text(Text),
    /// A binary message. It may be a part of a larger buffer, which it keeps.
    Binary(Bytes),
    /// The peer closes. Nothing follows.
    Closed {
        /// The code; 1005 where there was none (RFC 6455, 7.1.5), 1006 where the connection ended without a word.
        code: u16,
        /// The reason.
        reason: String,
    },
}

/// Text as it arrived.
#[derive(Clone, Debug)]
pub struct Text(Utf8Bytes);

impl Text {
    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }
}

/// Sets the options of a socket that is to carry a WebSocket. What cannot be set is done without.
pub fn prepare(socket: impl AsFd) {
    let socket = socket.as_fd();
    tune(socket);
    let _ = sockopt::set_socket_keepalive(socket, true);
    let _ = sockopt::set_tcp_keepidle(socket, KEEPALIVE_IDLE);
    let _ = sockopt::set_tcp_keepintvl(socket, KEEPALIVE_EVERY);
    let _ = sockopt::set_tcp_keepcnt(socket, KEEPALIVE_MISSES);
}

/// Dials the WebSocket of a broker over a connection that stands, and returns the peer's answer to `challenge` where it gives
/// one. Waits as long as the peer does.
///
/// # Errors
/// [`WireError`]: the peer refuses or does not speak the protocol.
pub async fn connect(
    stream: TcpStream,
    host: &str,
    challenge: &str,
) -> Result<(Socket, Option<String>), WireError> {
    let mut request = format!("ws://{host}{PATH}").into_client_request()?;
    // A challenge is letters, digits and signs of a name or of base64.
    request.headers_mut().extend(HeaderValue::from_str(challenge).map(|value| (CHALLENGE, value)));
    let (socket, response) =
        tokio_tungstenite::client_async_with_config(request, stream, Some(config())).await?;
    Ok((Socket(socket), challenge_in(response.headers())))
}

/// The challenge in the headers of a request, or the answer to one in the headers of an answer. Bytes that are not text are
/// replaced, and make no challenge and no answer.
#[must_use]
pub fn challenge_in(headers: &HeaderMap) -> Option<String> {
    headers.get(CHALLENGE).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
}

/// The headers of the answer (101) that turns a request into a WebSocket, with the answer to its challenge if there is one;
/// `None` for a request that does not ask for a WebSocket (RFC 6455, 4.2.1).
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

/// The server's side of a WebSocket over a connection that was upgraded. It was served as `TokioIo<TcpStream>`.
///
/// # Errors
/// It was served as something else.
pub async fn accepted(upgraded: Upgraded) -> io::Result<Socket> {
    let parts = upgraded
        .downcast::<TokioIo<TcpStream>>()
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "the connection is no TCP connection"))?;
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
    /// The connection under it.
    #[must_use]
    pub fn stream(&self) -> &TcpStream {
        self.0.get_ref()
    }

    /// Its two directions. Pings are answered only while it is read.
    #[must_use]
    pub fn split(self) -> (Reader, Writer) {
        let (sink, stream) = self.0.split();
        (Reader { stream, taken_bytes: 0 }, Writer(sink))
    }
}

/// How much is read before everybody else on the thread has a turn, the pumps of the WebSocket's own streams among them:
/// whoever reads on as long as there is something has read tens of megabytes for a socket that would have taken them.
const TURN_BYTES: usize = 128 * 1024;
/// What a message costs beside its bytes, in bytes: a small one can be as much work as a kilobyte of payload.
const MESSAGE_COST_BYTES: usize = 1_024;

/// What is read from a WebSocket.
#[derive(Debug)]
pub struct Reader {
    stream: SplitStream<WebSocketStream<TcpStream>>,
    /// Since the others last had a turn.
    taken_bytes: usize,
}

impl Reader {
    /// The next message. Dropping the future loses nothing.
    ///
    /// # Errors
    /// [`WireError::Broken`], after which only `Closed` comes.
    pub async fn next(&mut self) -> Result<Incoming, WireError> {
        loop {
            if self.taken_bytes >= TURN_BYTES {
                self.taken_bytes = 0;
                tokio::task::yield_now().await;
            }
            let message = self.stream.next().await;
            if let Some(Ok(message)) = &message {
                self.taken_bytes += MESSAGE_COST_BYTES + message.len();
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

/// What is written to a WebSocket.
#[derive(Debug)]
pub struct Writer(SplitSink<WebSocketStream<TcpStream>, Message>);

impl Writer {
    /// Writes text, or keeps it until there is more or [`Writer::flush`]. Waits for room.
    ///
    /// # Errors
    /// [`WireError::Broken`].
    pub async fn text(&mut self, text: String) -> Result<(), WireError> {
        Ok(self.0.feed(Message::Text(text.into())).await?)
    }

    /// Writes a binary message, or keeps it until there is more or [`Writer::flush`]. Waits for room.
    ///
    /// # Errors
    /// [`WireError::Broken`].
    pub async fn binary(&mut self, bytes: Bytes) -> Result<(), WireError> {
        Ok(self.0.feed(Message::Binary(bytes)).await?)
    }

    /// Writes what was kept.
    ///
    /// # Errors
    /// [`WireError::Broken`].
    pub async fn flush(&mut self) -> Result<(), WireError> {
        Ok(self.0.flush().await?)
    }

    /// Closes with a code and a reason (at most 123 bytes of it are sent: RFC 6455, 5.5). The peer's answer comes to the
    /// [`Reader`].
    ///
    /// # Errors
    /// [`WireError::Broken`].
    pub async fn close(&mut self, code: u16, reason: &str) -> Result<(), WireError> {
        let reason = &reason[..reason.floor_char_boundary(123)];
        let frame = CloseFrame { code: CloseCode::from(code), reason: reason.into() };
        Ok(self.0.send(Message::Close(Some(frame))).await?)
    }
}
