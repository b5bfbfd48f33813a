//! What waits to be written to a broker's WebSocket.
//!
//! ```text
//!  said (requests, answers, credit) ─────────────────────────┐ first
//!  stream 1: [64 KiB][64 KiB][eof] ──┐                        ├──► one writer ──► WebSocket
//!  stream 2: [64 KiB]             ──┼── one message a turn ──┘
//!  stream 9: [reset]              ──┘
//! ```
//!
//! Payload is bounded, for each stream and for the connection, and whoever has more of it waits: that is what stops a pump
//! from reading, and with that the peer of its socket. What is said does not wait, since whoever says it may be the one who
//! has to go on reading; it is small, and its bound is only ever met by a peer that floods us with requests and does not
//! read the answers, which ends the connection.
//!
//! What a stream sends stays in order, its end behind its payload. What is said goes ahead of all payload.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::{AcquireError, Notify, OwnedSemaphorePermit, Semaphore};

use super::message::{BINARY_HEADER_BYTES, Frame, PAYLOAD_BYTES_MAX, StreamId, binary_header, relay_text};
use super::wire::{WireError, Writer};
use crate::broker::outbox::schedule::Schedule;

mod schedule;

/// What one stream may have queued, in bytes of payload (wire specification, A.3.6).
pub const STREAM_BYTES_MAX: usize = 1024 * 1024;
/// What all streams of a connection may have queued together, in bytes of payload.
pub const CONNECTION_BYTES_MAX: usize = 8 * 1024 * 1024;
/// What may be said and not yet written, in bytes. The largest thing said tells of 65535 listeners in less than 3 MiB.
const SAID_BYTES_MAX: usize = 16 * 1024 * 1024;

/// The connection is lost, or closed by us.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the connection is gone")]
pub struct Gone;

/// Why nothing more is written.
#[derive(Debug, thiserror::Error)]
pub enum Ended {
    /// The connection broke.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The peer asks and does not read the answers.
    #[error("the peer does not read what it asks for")]
    Flooded,
}

/// Where to put what is to be sent.
#[derive(Clone, Debug)]
pub struct Outbox(Arc<Shared>);

/// The other end of an [`Outbox`], for the one who writes. Dropping it tells everybody who waits that the connection is
/// gone.
#[derive(Debug)]
pub struct Queue(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    filled: Notify,
    /// Room for payload, in bytes.
    room: Arc<Semaphore>,
}

#[derive(Debug, Default)]
struct State {
    schedule: Schedule<Entry>,
    ending: Option<Ending>,
}

#[derive(Debug)]
enum Ending {
    /// After what was said until then.
    Close {
        code: u16,
        reason: String,
    },
    Flooded,
    Gone,
}

#[derive(Debug)]
enum Entry {
    /// Payload to be written as text.
    Text(Bytes, Room),
    /// A whole binary frame.
    Binary(Bytes, Room),
    End(Frame),
}

/// Room for payload that is taken; it is free again when this is dropped.
#[derive(Debug)]
pub(super) struct Room {
    stream: OwnedSemaphorePermit,
    connection: OwnedSemaphorePermit,
}

impl Room {
    /// Gives back what is beyond so many bytes.
    fn keep(&mut self, bytes: usize) {
        for permit in [&mut self.stream, &mut self.connection] {
            drop(permit.split(permit.num_permits().saturating_sub(bytes)));
        }
    }
}

/// An empty outbox, and its queue.
#[must_use]
pub fn outbox() -> (Outbox, Queue) {
    let shared = Arc::new(Shared {
        state: Mutex::default(),
        filled: Notify::new(),
        room: Arc::new(Semaphore::new(CONNECTION_BYTES_MAX)),
    });
    (Outbox(Arc::clone(&shared)), Queue(shared))
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it is held; and if it did, each step leaves the state whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Outbox {
    /// Says something that is no payload and no end of a stream: it goes ahead of both. Never waits; on a connection that is
    /// gone it is lost.
    pub fn say(&self, text: String) {
        let mut state = self.0.state();
        if state.ending.is_some() {
            return;
        }
        state.schedule.say(text);
        if state.schedule.said_bytes() > SAID_BYTES_MAX {
            state.ending = Some(Ending::Flooded);
        }
        drop(state);
        self.0.filled.notify_one();
    }

    /// Closes the WebSocket after what was said. Payload that waits is dropped.
    pub fn close(&self, code: u16, reason: &str) {
        let ending = &mut self.0.state().ending;
        if ending.is_none() {
            *ending = Some(Ending::Close { code, reason: reason.to_owned() });
            self.0.filled.notify_one();
        }
    }

    /// The place of one stream. `binary`: whether both sides know binary frames.
    pub(super) fn lane(&self, stream: StreamId, binary: bool) -> StreamQueue {
        let header = binary.then(|| binary_header(stream)).flatten();
        StreamQueue { outbox: self.clone(), stream, header, room: Arc::new(Semaphore::new(STREAM_BYTES_MAX)) }
    }
}

/// What one stream sends.
#[derive(Debug)]
pub(super) struct StreamQueue {
    outbox: Outbox,
    stream: StreamId,
    header: Option<[u8; BINARY_HEADER_BYTES]>,
    room: Arc<Semaphore>,
}

impl StreamQueue {
    /// What payload is to be preceded by in its buffer, so that it needs not be copied behind it.
    pub(super) fn header(&self) -> &[u8] {
        self.header.as_ref().map_or(&[], |header| header)
    }

    /// Waits until there is room for so many bytes. Whoever waits longest is served first.
    ///
    /// # Errors
    /// [`Gone`].
    pub(super) async fn room(&self, bytes: usize) -> Result<Room, Gone> {
        let wanted = u32::try_from(bytes.min(PAYLOAD_BYTES_MAX)).unwrap_or(u32::MAX);
        let room = async {
            let stream = Arc::clone(&self.room).acquire_many_owned(wanted).await?;
            let connection = Arc::clone(&self.outbox.0.room).acquire_many_owned(wanted).await?;
            Ok::<Room, AcquireError>(Room { stream, connection })
        };
        room.await.map_err(|_| Gone)
    }

    /// Queues payload behind its [header](StreamQueue::header). There is room for it.
    pub(super) fn payload(&self, frame: Bytes, mut room: Room) {
        room.keep(frame.len() - self.header().len());
        self.push(match self.header {
            Some(_) => Entry::Binary(frame, room),
            None => Entry::Text(frame, room),
        });
    }

    /// Queues what ends one direction or both, behind the payload.
    pub(super) fn end(&self, frame: Frame) {
        self.push(Entry::End(frame));
    }

    /// Says something of this stream ahead of its payload.
    pub(super) fn say(&self, frame: &Frame) {
        self.outbox.say(relay_text(self.stream, frame));
    }

    /// Drops what is queued, for a peer that takes nothing more.
    pub(super) fn discard(&self) {
        let dropped = self.outbox.0.state().schedule.discard(self.stream);
        // Room is given back outside the lock.
        drop(dropped);
    }

    fn push(&self, entry: Entry) {
        let mut state = self.outbox.0.state();
        if state.ending.is_none() {
            state.schedule.push(self.stream, entry);
            drop(state);
            self.outbox.0.filled.notify_one();
        }
    }
}

impl Queue {
    /// Writes what is queued as it comes, until [`Outbox::close`] or until the connection breaks.
    ///
    /// # Errors
    /// [`Ended`].
    pub async fn drain(self, mut writer: Writer) -> Result<(), Ended> {
        loop {
            match self.next() {
                Next::Said(text) => writer.text(text).await?,
                // The room is free when the writer has taken it over.
                Next::Entry(_, Entry::Binary(frame, _room)) => writer.binary(frame).await?,
                Next::Entry(stream, Entry::Text(payload, _room)) => {
                    writer.text(relay_text(stream, &Frame::Data(payload))).await?;
                }
                Next::Entry(stream, Entry::End(frame)) => writer.text(relay_text(stream, &frame)).await?,
                Next::Empty => {
                    writer.flush().await?;
                    self.0.filled.notified().await;
                }
                Next::Ending(Ending::Close { code, reason }) => {
                    return Ok(writer.close(code, &reason).await?);
                }
                Next::Ending(Ending::Flooded) => return Err(Ended::Flooded),
                Next::Ending(Ending::Gone) => return Ok(()),
            }
        }
    }

    fn next(&self) -> Next {
        let mut state = self.0.state();
        if let Some(Ending::Flooded) = state.ending {
            return Next::Ending(Ending::Flooded);
        }
        if let Some(text) = state.schedule.take_said() {
            return Next::Said(text);
        }
        if let Some(ending) = state.ending.replace(Ending::Gone) {
            return Next::Ending(ending);
        }
        state.ending = None;
        state.schedule.take().map_or(Next::Empty, |(stream, entry)| Next::Entry(stream, entry))
    }
}

enum Next {
    Said(String),
    Entry(StreamId, Entry),
    Empty,
    Ending(Ending),
}

impl Drop for Queue {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.ending = Some(Ending::Gone);
        let dropped = std::mem::take(&mut state.schedule);
        drop(state);
        drop(dropped);
        self.0.room.close();
    }
}

#[cfg(test)]
mod tests;
