//! The pump of one stream: relays bytes between a socket and the WebSocket, in both directions, until the stream ends.
//! It is the same on both sides of the broker. The machine in `stream` decides; this is the I/O shell around it.
//!
//! The socket is read only if there is room for its data: in the [outbox](super::outbox), and in the credit that the
//! peer has granted. This is the only backpressure in this direction. In the other direction, arrived data waits in the
//! [`Inlet`], and with credit windows it is granted back as the socket accepts it.
//!
//! A socket that is not being read is watched for errors. Otherwise a client that has gone would be noticed only at the
//! next grant of the peer, which may never arrive.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::time::Duration;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use landfall_engine::sys::unacknowledged_bytes;
use rustix::net::{Shutdown, sockopt};
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::message::{Extensions, Frame, PAYLOAD_BYTES_MAX, Side, StreamId};
use super::outbox::{Gone, Outbox, Room, StreamQueue};
pub use super::stream::Ended;
use super::stream::{Action, Closing, Input, Stream};
pub use crate::broker::pump::inlet::{Inlet, Inlets, Outlet};

mod inlet;

/// The time limit for a reader to take the data before a reset or before the end of a stream; the same as in the
/// engine.
const DRAIN_TIME_MAX: Duration = Duration::from_secs(300);
/// The first pause between checks for acknowledgements; it doubles each time. Loopback acknowledges within
/// microseconds.
const ACKNOWLEDGE_PAUSE_FIRST: Duration = Duration::from_millis(1);
const ACKNOWLEDGE_PAUSE_MAX: Duration = Duration::from_millis(128);

/// Payload smaller than this is copied out of the buffer: otherwise a few bytes may keep it alive.
const SMALL_BYTES: usize = 16 * 1024;
/// The maximum of pieces that are written with one call.
const PIECES_MAX: usize = 16;

/// Relays an open stream until it ends, and closes the socket. `us` is our side of it, `extensions` are those in use,
/// and `arriving` holds the frames of the peer. Dropping the future resets the socket and sends no message to the peer.
pub async fn relay(
    socket: TcpStream,
    stream: StreamId,
    us: Side,
    extensions: Extensions,
    outbox: &Outbox,
    arriving: Outlet,
) -> Ended {
    // A socket that is dropped before the end must be reset. An error means that the socket has already failed.
    let _ = sockopt::set_socket_linger(&socket, Some(Duration::ZERO));
    let stream_queue = outbox.stream_queue(stream, extensions.binary);
    let pump = Pump {
        stream_queue: &stream_queue,
        machine: Stream::new(us, extensions),
        actions: Vec::new(),
        arriving,
        is_lost: false,
        pending: VecDeque::new(),
        buffer: BytesMut::new(),
        broke_at: None,
        end: None,
        socket,
    };
    pump.run().await
}

struct Pump<'a> {
    stream_queue: &'a StreamQueue,
    machine: Stream,
    /// Empty between inputs; its capacity is reused.
    actions: Vec<Action>,
    arriving: Outlet,
    is_lost: bool,
    /// Payload that arrived and is not written yet.
    pending: VecDeque<Bytes>,
    /// Empty, and without memory, while the socket has no data.
    buffer: BytesMut,
    /// The time at which an error was seen on a socket that cannot be read now.
    broke_at: Option<Instant>,
    end: Option<(Ended, Closing)>,
    socket: TcpStream,
}

type Waiting<'a> = Pin<Box<dyn Future<Output = Result<Room, Gone>> + Send + 'a>>;

enum Event {
    Arrived(Option<Frame>),
    Overflow,
    Readable,
    Room(Result<Room, Gone>),
    Writable,
    Broke,
    GaveUp,
}

impl<'a> Pump<'a> {
    async fn run(mut self) -> Ended {
        // Kept across iterations, since a new future would lose its place in the queue.
        let mut waiting: Option<Waiting<'a>> = None;
        loop {
            if let Some((ended, closing)) = self.end {
                self.close(closing).await;
                return ended;
            }
            if self.machine.may_read() == 0 {
                waiting = None;
            }
            match self.event(&mut waiting).await {
                Event::Arrived(frame) => self.on_arrived(frame),
                Event::Overflow => self.on(Input::Overflow),
                Event::Readable => {
                    let stream_queue = self.stream_queue;
                    let bytes = self.machine.may_read();
                    waiting = Some(Box::pin(stream_queue.room(bytes)));
                }
                Event::Room(Err(Gone)) => {
                    waiting = None;
                    self.on_lost();
                }
                Event::Room(Ok(room)) => {
                    waiting = None;
                    self.read(room);
                }
                Event::Writable => self.write(),
                Event::Broke => self.on_broke(),
                Event::GaveUp => self.on(Input::ReadBroke),
            }
        }
    }

    async fn event(&self, waiting: &mut Option<Waiting<'a>>) -> Event {
        let may_read = self.machine.may_read() > 0;
        let is_waiting = waiting.is_some();
        let room = async {
            match waiting {
                Some(waiting) => waiting.await,
                None => std::future::pending().await,
            }
        };
        let give_up = self.broke_at.map(|since| since + DRAIN_TIME_MAX);
        tokio::select! {
            arrived = self.arriving.next(), if !self.is_lost => arrived.map_or(Event::Overflow, Event::Arrived),
            room = room, if is_waiting => Event::Room(room),
            // An error is reported by the next read.
            _ = self.socket.readable(), if may_read && !is_waiting => Event::Readable,
            _ = self.socket.writable(), if !self.pending.is_empty() => Event::Writable,
            _ = self.socket.ready(Interest::ERROR), if !may_read && self.broke_at.is_none() => Event::Broke,
            () = until(give_up), if !may_read => Event::GaveUp,
        }
    }

    fn on(&mut self, input: Input) {
        let mut actions = std::mem::take(&mut self.actions);
        self.machine.on(input, &mut actions);
        for action in actions.drain(..) {
            match action {
                Action::Grant(bytes) => self.stream_queue.send_control(&Frame::Credit(bytes)),
                Action::Eof => self.stream_queue.end(Frame::Eof),
                Action::Close(side) => self.stream_queue.end(Frame::Close(side)),
                Action::Reset => self.stream_queue.end(Frame::Reset),
                Action::DropOutgoing => self.stream_queue.discard(),
                Action::DropIncoming => {
                    let dropped: usize = self.pending.drain(..).map(|piece| piece.len()).sum();
                    self.arriving.release(dropped);
                }
                // An error means that the socket has failed, which the next read or write reports.
                Action::Fin => drop(rustix::net::shutdown(&self.socket, Shutdown::Write)),
                Action::Finish(ended, closing) => self.end = Some((ended, closing)),
            }
        }
        self.actions = actions;
    }

    fn on_arrived(&mut self, frame: Option<Frame>) {
        match frame {
            None => self.on_lost(),
            Some(Frame::Data(payload)) => {
                let bytes = payload.len();
                let is_first = self.pending.is_empty();
                if self.machine.takes_payload() {
                    self.pending.push_back(payload);
                } else {
                    self.arriving.release(bytes);
                }
                self.on(Input::Payload(bytes));
                if is_first {
                    // Usually the socket has room for it.
                    self.write();
                }
            }
            Some(Frame::Close(_)) => self.on(Input::Close),
            Some(Frame::Credit(bytes)) => self.on(Input::Credit(bytes)),
            Some(Frame::Eof) => self.on(Input::PeerEof),
            Some(Frame::Reset) => self.on(Input::Reset),
        }
    }

    fn on_lost(&mut self) {
        self.is_lost = true;
        self.on(Input::Lost);
    }

    fn on_broke(&mut self) {
        if self.machine.is_reading() {
            // Earlier data may still be readable, after the peer grants credit.
            self.broke_at = Some(Instant::now());
        } else {
            self.on(Input::WriteBroke);
        }
    }

    /// Reads once from the socket.
    fn read(&mut self, room: Room) {
        let may_read = self.machine.may_read();
        let header = self.stream_queue.header();
        self.buffer.reserve(header.len() + PAYLOAD_BYTES_MAX);
        self.buffer.extend_from_slice(header);
        let read = self.socket.try_read_buf(&mut (&mut self.buffer).limit(may_read));
        match read {
            Ok(0) => self.on(Input::Eof),
            Ok(bytes) => {
                let frame = self.buffer.split();
                self.stream_queue.payload(
                    if bytes < SMALL_BYTES { Bytes::copy_from_slice(&frame) } else { frame.freeze() },
                    room,
                );
                return self.on(Input::Read(bytes));
            }
            Err(error) if is_temporary(&error) => {}
            Err(_) => self.on(Input::ReadBroke),
        }
        self.buffer = BytesMut::new();
    }

    /// Writes until no payload is pending or the socket has no room.
    fn write(&mut self) {
        while !self.pending.is_empty() && self.end.is_none() {
            let mut pieces = [IoSlice::new(&[]); PIECES_MAX];
            let count = pieces.len().min(self.pending.len());
            for (slice, piece) in pieces.iter_mut().zip(&self.pending) {
                *slice = IoSlice::new(piece);
            }
            match self.socket.try_write_vectored(&pieces[..count]) {
                Ok(bytes) => {
                    self.advance(bytes);
                    self.arriving.release(bytes);
                    self.on(Input::Wrote(bytes));
                }
                Err(error) if is_temporary(&error) => return,
                Err(_) => return self.on(Input::WriteBroke),
            }
        }
    }

    fn advance(&mut self, mut bytes: usize) {
        while let Some(piece) = self.pending.front_mut() {
            if piece.len() > bytes {
                return piece.advance(bytes);
            }
            bytes -= piece.len();
            self.pending.pop_front();
        }
    }

    async fn close(&self, closing: Closing) {
        if matches!(closing, Closing::Acknowledged | Closing::ResetAcknowledged) {
            acknowledged(&self.socket).await;
        }
        if matches!(closing, Closing::Orderly | Closing::Acknowledged) {
            // An error means that the socket has already failed.
            let _ = sockopt::set_socket_linger(&self.socket, None);
        }
    }
}

impl Drop for Pump<'_> {
    fn drop(&mut self) {
        // The pump was aborted, so its queued payload is useless without the rest.
        if self.end.is_none() {
            self.stream_queue.discard();
        }
    }
}

/// Waits until the socket has acknowledged all data, or failed, or for at most [`DRAIN_TIME_MAX`].
async fn acknowledged(socket: &TcpStream) {
    let give_up = Instant::now() + DRAIN_TIME_MAX;
    let mut pause = ACKNOWLEDGE_PAUSE_FIRST;
    while unacknowledged_bytes(socket) > 0 && Instant::now() < give_up {
        tokio::select! {
            _ = socket.ready(Interest::ERROR) => return,
            () = tokio::time::sleep(pause) => {}
        }
        pause = (2 * pause).min(ACKNOWLEDGE_PAUSE_MAX);
    }
}

async fn until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

fn is_temporary(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
