//! One end of a WebSocket, driven by a case.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;
use tungstenite::protocol::frame::coding::CloseCode;
use tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tungstenite::{Error, Message, WebSocket};

use super::{payload, stream};
use crate::TIMEOUT;

/// An item that arrived from the other side.
#[derive(Clone, Debug, PartialEq)]
pub enum Received {
    /// A text frame that contains JSON.
    Message(Value),
    /// A binary frame.
    Binary(Vec<u8>),
    /// A close frame with this code and reason.
    Closed(Option<u16>, String),
    /// The connection ended without a close frame.
    Lost,
}

/// The connection under both ends of a [`Peer`]. Each write is sent completely, so frames do not mix.
#[derive(Debug)]
pub(super) struct Transport {
    stream: TcpStream,
    writing: Arc<Mutex<()>>,
}

impl Transport {
    pub(super) fn new(stream: TcpStream) -> Transport {
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        stream.set_write_timeout(Some(TIMEOUT)).unwrap();
        stream.set_nodelay(true).unwrap();
        Transport { stream, writing: Arc::default() }
    }

    fn share(&self) -> Transport {
        Transport { stream: self.stream.try_clone().unwrap(), writing: Arc::clone(&self.writing) }
    }
}

impl Read for Transport {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        crate::read_some(&self.stream, buffer)
    }
}

impl Write for Transport {
    fn write(&mut self, buffer: &[u8]) -> std::io::Result<usize> {
        let _alone = self.writing.lock().unwrap();
        (&self.stream).write_all(buffer)?;
        Ok(buffer.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// An end of a WebSocket that sends and receives.
#[derive(Debug)]
pub struct Peer {
    socket: WebSocket<Transport>,
    role: Role,
    /// Items that arrived while the case waited for another one.
    kept: VecDeque<Received>,
}

/// The sending part of a [`Peer`], for another thread.
#[derive(Debug)]
pub struct MessageSender {
    socket: WebSocket<Transport>,
}

/// Limits far above the needs of any case, so that a peer can send invalid amounts.
pub(super) fn test_limits() -> WebSocketConfig {
    WebSocketConfig::default().max_message_size(None).max_frame_size(None)
}

impl Peer {
    pub(super) fn new(socket: WebSocket<Transport>, role: Role) -> Peer {
        Peer { socket, role, kept: VecDeque::new() }
    }

    /// Sends a message.
    ///
    /// # Panics
    /// If the connection fails.
    #[track_caller]
    pub fn send_message(&mut self, message: &Value) {
        self.try_send_message(message).unwrap_or_else(|error| panic!("{error} at {message}"));
    }

    /// Sends a message if the connection still takes it.
    ///
    /// # Errors
    /// The error of the connection.
    pub fn try_send_message(&mut self, message: &Value) -> Result<(), Error> {
        self.socket.send(Message::text(message.to_string()))
    }

    /// Sends any text in a text frame.
    ///
    /// # Panics
    /// If the connection fails.
    #[track_caller]
    pub fn send_text(&mut self, text: &str) {
        self.socket.send(Message::text(text)).unwrap();
    }

    /// Sends any text in a text frame, if the connection still takes it.
    ///
    /// # Errors
    /// Those of the connection.
    pub fn try_send_text(&mut self, text: &str) -> Result<(), Error> {
        self.socket.send(Message::text(text))
    }

    /// Sends a binary frame.
    ///
    /// # Panics
    /// If the connection fails.
    #[track_caller]
    pub fn send_binary(&mut self, bytes: &[u8]) {
        self.socket.send(Message::binary(bytes.to_vec())).unwrap();
    }

    /// Sends a ping and waits for the pong.
    ///
    /// # Panics
    /// If no pong arrives.
    #[track_caller]
    pub fn ping(&mut self) {
        self.socket.send(Message::Ping("are you there".into())).unwrap();
        loop {
            match self.socket.read() {
                Ok(Message::Pong(_)) => return,
                Ok(message) => self.keep(message),
                Err(error) => panic!("no pong: {error}; kept: {:?}", self.kept),
            }
        }
    }

    fn keep(&mut self, message: Message) {
        let received = received(message);
        self.kept.extend(received);
    }

    /// Returns the next item, in order of arrival.
    ///
    /// # Panics
    /// If nothing arrives.
    #[track_caller]
    pub fn next_item(&mut self) -> Received {
        match self.kept.pop_front() {
            Some(received) => received,
            None => self.listen(),
        }
    }

    /// Receives the next item from the connection, regardless of kept items.
    #[track_caller]
    fn listen(&mut self) -> Received {
        loop {
            match self.socket.read() {
                Ok(message) => {
                    if let Some(received) = received(message) {
                        return received;
                    }
                }
                Err(Error::Io(error)) if is_timeout(error.kind()) => {
                    panic!("no item arrived within {TIMEOUT:?}; kept: {:?}", self.kept)
                }
                Err(_) => return Received::Lost,
            }
        }
    }

    /// Returns the next message, in order of arrival.
    ///
    /// # Panics
    /// If another item arrives, or none.
    #[track_caller]
    pub fn message(&mut self) -> Value {
        match self.next_item() {
            Received::Message(message) => message,
            other => panic!("{other:?} instead of a message"),
        }
    }

    /// Returns the first item that `wanted` accepts; earlier items are kept.
    ///
    /// # Panics
    /// If it does not arrive.
    #[track_caller]
    pub fn find(&mut self, what: &str, wanted: impl Fn(&Received) -> bool) -> Received {
        if let Some(at) = self.kept.iter().position(&wanted) {
            return self.kept.remove(at).unwrap();
        }
        let start = Instant::now();
        loop {
            assert!(start.elapsed() < TIMEOUT, "waited {TIMEOUT:?} for {what}; kept: {:?}", self.kept);
            match self.listen() {
                received if wanted(&received) => return received,
                over @ (Received::Closed(..) | Received::Lost) => {
                    panic!("{over:?} instead of {what}; kept: {:?}", self.kept)
                }
                received => self.kept.push_back(received),
            }
        }
    }

    /// Returns the first message of this type.
    ///
    /// # Panics
    /// If none arrives.
    #[track_caller]
    pub fn receive(&mut self, kind: &str) -> Value {
        let wanted =
            |received: &Received| matches!(received, Received::Message(message) if message["type"] == kind);
        match self.find(kind, wanted) {
            Received::Message(message) => message,
            other => panic!("{other:?}"),
        }
    }

    /// Waits for exactly this message.
    ///
    /// # Panics
    /// If it does not arrive.
    #[track_caller]
    pub fn receive_exactly(&mut self, message: &Value) {
        self.find(
            &message.to_string(),
            |received| matches!(received, Received::Message(came) if came == message),
        );
    }

    /// Receives at least this many bytes of a stream, from text frames.
    ///
    /// # Panics
    /// If they do not arrive.
    #[track_caller]
    pub fn receive_data(&mut self, id: i64, count: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < count {
            let wanted = |received: &Received| matches!(received, Received::Message(message) if message["type"] == "relay-data" && stream(message) == id);
            let Received::Message(message) = self.find("relay-data", wanted) else { unreachable!() };
            all.extend(payload(&message));
        }
        all
    }

    /// The number of kept messages of this type.
    pub fn kept(&self, kind: &str) -> usize {
        let wanted =
            |received: &&Received| matches!(received, Received::Message(message) if message["type"] == kind);
        self.kept.iter().filter(wanted).count()
    }

    /// Receives and discards items until `over` returns true; calls it repeatedly.
    ///
    /// # Panics
    /// If the connection ends.
    #[track_caller]
    pub fn discard_until(&mut self, mut over: impl FnMut() -> bool) {
        let start = Instant::now();
        while !over() {
            assert!(start.elapsed() < 10 * TIMEOUT, "it is not over");
            self.kept.clear();
            // Until the read times out, or until it is time to call `over` again.
            let until = Instant::now() + Duration::from_millis(50);
            while Instant::now() < until && !self.is_silent_for(Duration::from_millis(5)) {
                let lost = matches!(self.kept.pop_front(), Some(Received::Lost | Received::Closed(..)));
                assert!(!lost, "the connection has ended");
            }
        }
    }

    /// Discards the kept items.
    pub fn discard_kept(&mut self) {
        self.kept.clear();
    }

    /// Returns whether no item arrives for this long. Items that arrive are kept.
    ///
    /// # Panics
    /// If the connection fails.
    pub fn is_silent_for(&mut self, time: Duration) -> bool {
        if !self.kept.is_empty() {
            return false;
        }
        self.socket.get_ref().stream.set_read_timeout(Some(time)).unwrap();
        let came = loop {
            match self.socket.read() {
                Ok(message) => {
                    if let Some(received) = received(message) {
                        break Some(received);
                    }
                }
                Err(Error::Io(error)) if is_timeout(error.kind()) => break None,
                Err(_) => break Some(Received::Lost),
            }
        };
        self.socket.get_ref().stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        let silent = came.is_none();
        self.kept.extend(came);
        silent
    }

    /// Returns the item with which the other side ends the connection; earlier items are discarded.
    ///
    /// # Panics
    /// If the other side does not end it.
    #[track_caller]
    pub fn receive_end(&mut self) -> Received {
        let start = Instant::now();
        loop {
            assert!(start.elapsed() < TIMEOUT, "the connection does not end");
            if let over @ (Received::Closed(..) | Received::Lost) = self.next_item() {
                return over;
            }
        }
    }

    /// Returns whether the other side has ended the connection; earlier items are discarded.
    ///
    /// # Panics
    /// If the connection fails.
    pub fn has_ended(&mut self) -> bool {
        // Reads only the data that has already arrived.
        while !self.is_silent_for(Duration::from_millis(1)) {
            if let Some(Received::Closed(..) | Received::Lost) = self.kept.pop_front() {
                return true;
            }
        }
        false
    }

    /// Closes the WebSocket with a close frame.
    ///
    /// # Panics
    /// If the connection fails.
    pub fn close(&mut self, code: u16, reason: &str) {
        let frame = CloseFrame { code: CloseCode::from(code), reason: reason.to_owned().into() };
        self.socket.close(Some(frame)).unwrap();
        let _ = self.socket.flush();
    }

    /// Closes the connection without a close frame.
    pub fn hang_up(self) {
        // The other side may have closed it first.
        let _ = self.socket.get_ref().stream.shutdown(Shutdown::Both);
    }

    /// Returns a second sender, for another thread.
    ///
    /// # Panics
    /// If no descriptor is left.
    pub fn message_sender(&self) -> MessageSender {
        let carrier = self.socket.get_ref().share();
        MessageSender { socket: WebSocket::from_raw_socket(carrier, self.role, Some(test_limits())) }
    }
}

impl MessageSender {
    /// Sends a message if the connection still takes it.
    ///
    /// # Errors
    /// The error of the connection.
    pub fn try_send_message(&mut self, message: &Value) -> Result<(), Error> {
        self.socket.send(Message::text(message.to_string()))
    }

    /// Sends raw bytes below the WebSocket layer.
    ///
    /// # Errors
    /// Those of `write(2)`.
    pub fn try_write_raw(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.socket.get_mut().write_all(bytes)
    }
}

fn received(message: Message) -> Option<Received> {
    match message {
        Message::Text(text) => {
            let value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
            Some(Received::Message(value))
        }
        Message::Binary(bytes) => Some(Received::Binary(bytes.to_vec())),
        Message::Close(frame) => Some(match frame {
            Some(frame) => Received::Closed(Some(frame.code.into()), frame.reason.to_string()),
            None => Received::Closed(None, String::new()),
        }),
        Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => None,
    }
}

fn is_timeout(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::WouldBlock | ErrorKind::TimedOut)
}
