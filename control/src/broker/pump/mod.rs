//! One stream: the bytes between a socket and the WebSocket, in both directions, until the stream is over. The same on both
//! sides of the broker. What is to be done when is decided by the machine in `stream`; this is the shell around it.
//!
//! The socket is read only when there is room for what it has: in the [outbox](super::outbox), and in what the peer has
//! granted. That is all the backpressure there is in this direction. In the other one, what arrived waits in the [`Inlet`],
//! and with credit windows it is granted back as the socket takes it.
//!
//! A socket that is not being read is watched for an error, or a client that is gone would be noticed when the peer next
//! grants something, which may be never.

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

/// How long a reader may take for what precedes a reset or the end of a stream before it is cut off, as in the engine.
const DRAIN_TIME_MAX: Duration = Duration::from_secs(300);
/// The first wait for acknowledgements, doubled each time; loopback acknowledges within microseconds.
const ACKNOWLEDGE_PAUSE_FIRST: Duration = Duration::from_millis(1);
const ACKNOWLEDGE_PAUSE_MAX: Duration = Duration::from_millis(128);

/// Payload below this is copied out of the buffer, which could be kept by a few bytes otherwise.
const SMALL_BYTES: usize = 16 * 1024;
/// How many pieces are written with one call.
const PIECES_MAX: usize = 16;

/// Relays a stream that is open until it is over, and closes the socket: `us` is our side of it, `extensions` what is in
/// use, `arriving` what comes from the peer. Dropping the future resets the socket and says nothing to the peer.
pub async fn relay(
    socket: TcpStream,
    stream: StreamId,
    us: Side,
    extensions: Extensions,
    outbox: &Outbox,
    arriving: Outlet,
) -> Ended {
    // Whatever ends without us having ended it was cut short. On a socket that is broken already nothing comes of it.
    let _ = sockopt::set_socket_linger(&socket, Some(Duration::ZERO));
    let lane = outbox.lane(stream, extensions.binary);
    let pump = Pump {
        lane: &lane,
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
    lane: &'a StreamQueue,
    machine: Stream,
    /// Empty between inputs; kept for its room.
    actions: Vec<Action>,
    arriving: Outlet,
    is_lost: bool,
    /// What arrived and is not written yet.
    pending: VecDeque<Bytes>,
    /// Empty, and without memory, while there is nothing to be read.
    buffer: BytesMut,
    /// Since when the socket is known to be broken that cannot be read now.
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
        // Kept across turns, since whoever stops waiting loses its place.
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
                    let lane = self.lane;
                    let bytes = self.machine.may_read();
                    waiting = Some(Box::pin(lane.room(bytes)));
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
            // An error is told by the attempt.
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
                Action::Grant(bytes) => self.lane.say(&Frame::Credit(bytes)),
                Action::Eof => self.lane.end(Frame::Eof),
                Action::Close(side) => self.lane.end(Frame::Close(side)),
                Action::Reset => self.lane.end(Frame::Reset),
                Action::DropOutgoing => self.lane.discard(),
                Action::DropIncoming => {
                    let dropped: usize = self.pending.drain(..).map(|piece| piece.len()).sum();
                    self.arriving.release(dropped);
                }
                // A socket that refuses is broken, which the next attempt tells.
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
                    // Most often there is room for it.
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
            // What it sent before may still be readable, when the peer grants something.
            self.broke_at = Some(Instant::now());
        } else {
            self.on(Input::WriteBroke);
        }
    }

    /// Reads once.
    fn read(&mut self, room: Room) {
        let may_read = self.machine.may_read();
        let header = self.lane.header();
        self.buffer.reserve(header.len() + PAYLOAD_BYTES_MAX);
        self.buffer.extend_from_slice(header);
        let read = self.socket.try_read_buf(&mut (&mut self.buffer).limit(may_read));
        match read {
            Ok(0) => self.on(Input::Eof),
            Ok(bytes) => {
                let frame = self.buffer.split();
                self.lane.payload(
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

    /// Writes what it can.
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
            // Where it is refused, the socket is broken already.
            let _ = sockopt::set_socket_linger(&self.socket, None);
        }
    }
}

impl Drop for Pump<'_> {
    fn drop(&mut self) {
        // It was given up, so what it has sent is of no use without the rest.
        if self.end.is_none() {
            self.lane.discard();
        }
    }
}

/// Waits until the socket has acknowledged everything, or broke, or for so long that it is taken for stalled.
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
