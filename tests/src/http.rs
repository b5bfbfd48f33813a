//! A client of the daemon's HTTP endpoint that sends exact bytes over TCP.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::net::{AddressFamily, SocketType};
use serde_json::Value;

use crate::peer::{Peer, Stream};
use crate::rpc;

/// An HTTP answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The head as it arrived.
    pub head: String,
    /// The body.
    pub body: Value,
}

impl Answer {
    /// Returns the reason of a refusal.
    ///
    /// # Panics
    /// If the answer is not a refusal.
    #[track_caller]
    pub fn reason(&self) -> &str {
        self.body["reason"].as_str().unwrap_or_else(|| panic!("no reason: {self:?}"))
    }

    /// Returns a header by its lower-case name.
    pub fn header(&self, name: &str) -> Option<String> {
        let value = |line: &str| {
            let (key, value) = line.split_once(':')?;
            (key.trim().to_ascii_lowercase() == name).then(|| value.trim().to_owned())
        };
        self.head.lines().find_map(value)
    }
}

/// A connection to the endpoint.
pub type Web = Peer<TcpStream>;

impl Web {
    /// Connects to this address, from another address of this machine.
    ///
    /// # Panics
    /// If no listener accepts the connection.
    #[track_caller]
    pub fn connect_from(from: IpAddr, to: SocketAddr) -> Web {
        let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        rustix::net::bind(&socket, &SocketAddr::new(from, 0)).unwrap();
        rustix::net::connect(&socket, &to).unwrap_or_else(|error| panic!("connect to {to}: {error}"));
        Peer::new(TcpStream::from(socket)).unwrap()
    }

    /// Connects to 127.0.0.1.
    ///
    /// # Panics
    /// If no listener accepts the connection.
    #[track_caller]
    pub fn connect(port: u16) -> Web {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))
            .unwrap_or_else(|error| panic!("connect to port {port}: {error}"));
        stream.set_nodelay(true).unwrap();
        Peer::new(stream).unwrap()
    }

    /// Returns the next answer on this connection; `content-length` gives the length of its body.
    ///
    /// # Panics
    /// If none arrives, or it violates the wire specification.
    #[track_caller]
    pub fn answer(&mut self) -> Answer {
        checked(self.any_answer())
    }

    /// Returns whether the peer closes the connection without another byte.
    ///
    /// # Panics
    /// If the peer neither closes nor sends.
    #[track_caller]
    pub fn is_closed(&mut self) -> bool {
        self.unread.is_empty() && !self.read_more()
    }
}

#[track_caller]
fn checked(answer: Option<Answer>) -> Answer {
    let answer = answer.expect("an answer");
    assert_eq!(answer.header("content-type").as_deref(), Some("application/json"), "{answer:?}");
    rpc::check_shape(&answer.body);
    answer
}

impl<S: Stream> Peer<S> {
    /// Returns the next answer of any form, or `None` if the connection ends before it.
    ///
    /// # Panics
    /// If neither an answer nor the end arrives.
    #[track_caller]
    pub fn any_answer(&mut self) -> Option<Answer> {
        let end = loop {
            if let Some(at) = self.unread.windows(4).position(|four| four == b"\r\n\r\n") {
                break at;
            }
            if !self.read_more() {
                return None;
            }
        };
        let head = String::from_utf8(self.unread[..end].to_vec()).unwrap();
        self.unread.drain(..end + 4);
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
        let mut answer = Answer { status: status.expect("a status"), head, body: Value::Null };
        let length = answer.header("content-length").map_or(0, |length| length.parse().unwrap());
        while self.unread.len() < length {
            assert!(self.read_more(), "the end in the middle of {answer:?}");
        }
        let body: Vec<u8> = self.unread.drain(..length).collect();
        if !body.is_empty() {
            answer.body = serde_json::from_slice(&body)
                .unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&body).into_owned()));
        }
        Some(answer)
    }
}

/// Sends one request over a Unix socket on a new connection.
///
/// # Errors
/// Those of `connect(2)`.
///
/// # Panics
/// If no answer arrives.
#[track_caller]
pub fn ask_at(socket: &Path, token: Option<&str>, request: &Value) -> std::io::Result<Answer> {
    let mut web = Peer::new(UnixStream::connect(socket)?)?;
    web.send(post(80, token, &request.to_string()));
    Ok(checked(web.any_answer()))
}

/// Returns the head and body of a `POST /rpc`.
pub fn post(port: u16, token: Option<&str>, body: &str) -> String {
    let authorization = token.map(|token| format!("authorization: Bearer {token}\r\n")).unwrap_or_default();
    format!(
        "POST /rpc HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\n{authorization}content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// Sends one request on a new connection.
///
/// # Panics
/// If no answer arrives.
#[track_caller]
pub fn ask(port: u16, token: Option<&str>, request: &Value) -> Answer {
    ask_text(port, post(port, token, &request.to_string()))
}

/// Sends exact bytes on a new connection.
///
/// # Panics
/// If no answer arrives.
#[track_caller]
pub fn ask_text(port: u16, request: impl AsRef<[u8]>) -> Answer {
    let mut web = Web::connect(port);
    web.send(request);
    web.answer()
}
