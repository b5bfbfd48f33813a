//! The queue of messages that wait to be written to a broker's WebSocket.
//!
//! ```text
//! !
//! //!  control messages (requests, answers, credit) ─────────────┐ first
//!  stream 1: [64 KiB][64 KiB][eof] ──┐                        ├──► one writer ──► WebSocket
//! !
//! //!  stream 2: [64 KiB]             ──┼── round robin ─────────┘
//!  stream 9: [reset]              ──┘
//! ```
//!
//! Payload is bounded, for each stream and for the connection, and a sender with more of it waits. This stops a pump
//! from reading, and thus the peer of its socket from sending. Control messages do not wait, since the task that sends
//! them may be the one that has to continue reading. They are small; only a peer that floods us with requests without
//! reading the answers can exceed their limit, which ends the connection.
//!
//! The messages of a stream stay in order, its end after its payload. Control messages precede all payload.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::{AcquireError, Notify, OwnedSemaphorePermit, Semaphore};

use super::message::{BINARY_HEADER_BYTES, Frame, PAYLOAD_BYTES_MAX, StreamId, binary_header, relay_text};
use super::wire::{WireError, Writer};
use crate::broker::outbox::schedule::Schedule;

mod schedule;

/// The payload that one stream may have queued, in bytes (wire specification, A.3.6).
pub const STREAM_BYTES_MAX: usize = 1024 * 1024;
/// The payload that all streams of a connection may have queued together, in bytes.
pub const CONNECTION_BYTES_MAX: usize = 8 * 1024 * 1024;
/// The control messages that may be queued, in bytes. The largest one lists 65535 listeners in less than 3 MiB.
const CONTROL_BYTES_MAX: usize = 16 * 1024 * 1024;

/// The connection is lost, or was closed by us.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the connection is gone")]
pub struct Gone;

/// The reason why writing has ended.
#[derive(Debug, thiserror::Error)]
pub enum Ended {
    /// The connection failed.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The peer sends requests and does not read the answers.
    #[error("the peer does not read the answers to its requests")]
    Flooded,
}

/// The sending side of the queue.
#[derive(Clone, Debug)]
pub struct Outbox(Arc<Shared>);

/// The receiving side of an [`Outbox`], for the writer. Dropping it reports the end of the connection to all senders
/// that wait.
#[derive(Debug)]
pub struct Queue(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    filled: Notify,
    /// The permits for payload, in bytes.
    room: Arc<Semaphore>,
}

#[derive(Debug, Default)]
struct State {
    schedule: Schedule<Entry>,
    ending: Option<Ending>,
}

#[derive(Debug)]
enum Ending {
    /// Close after all control messages so far.
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
    /// A complete binary message.
    Binary(Bytes, Room),
    End(Frame),
}

/// Permits for payload; dropping them returns them.
#[derive(Debug)]
pub(super) struct Room {
    stream: OwnedSemaphorePermit,
    connection: OwnedSemaphorePermit,
}

impl Room {
    /// Returns the permits beyond this many bytes.
    fn keep(&mut self, bytes: usize) {
        for permit in [&mut self.stream, &mut self.connection] {
            drop(permit.split(permit.num_permits().saturating_sub(bytes)));
        }
    }
}

/// Returns an empty outbox, and its queue.
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
        // No code panics while it holds the lock; and if one did, each step leaves the state consistent.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Outbox {
    /// Queues a control message, which precedes all frames of streams. Never waits. If the connection has ended, the
    /// message is dropped.
    pub fn send_control(&self, text: String) {
        let mut state = self.0.state();
        if state.ending.is_some() {
            return;
        }
        state.schedule.send_control(text);
        if state.schedule.control_bytes() > CONTROL_BYTES_MAX {
            state.ending = Some(Ending::Flooded);
        }
        drop(state);
        self.0.filled.notify_one();
    }

    /// Closes the WebSocket after all control messages so far. Queued payload is dropped.
    pub fn close(&self, code: u16, reason: &str) {
        let ending = &mut self.0.state().ending;
        if ending.is_none() {
            *ending = Some(Ending::Close { code, reason: reason.to_owned() });
            self.0.filled.notify_one();
        }
    }

    /// Returns the queue of one stream. `binary` is whether both sides use binary messages.
    pub(super) fn stream_queue(&self, stream: StreamId, binary: bool) -> StreamQueue {
        let header = binary.then(|| binary_header(stream)).flatten();
        StreamQueue { outbox: self.clone(), stream, header, room: Arc::new(Semaphore::new(STREAM_BYTES_MAX)) }
    }
}

/// The sending side of one stream.
#[derive(Debug)]
pub(super) struct StreamQueue {
    outbox: Outbox,
    stream: StreamId,
    header: Option<[u8; BINARY_HEADER_BYTES]>,
    room: Arc<Semaphore>,
}

impl StreamQueue {
    /// Returns the header to place before payload in its buffer, so that no copy is needed to prepend it.
    pub(super) fn header(&self) -> &[u8] {
        self.header.as_ref().map_or(&[], |header| header)
    }

    /// Waits until there is room for this many bytes. Waiters are served in order of arrival.
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

    /// Queues payload that follows its [header](StreamQueue::header). The caller has room for it.
    pub(super) fn payload(&self, frame: Bytes, mut room: Room) {
        room.keep(frame.len() - self.header().len());
        self.push(match self.header {
            Some(_) => Entry::Binary(frame, room),
            None => Entry::Text(frame, room),
        });
    }

    /// Queues the end of one direction or of both, after the payload.
    pub(super) fn end(&self, frame: Frame) {
        self.push(Entry::End(frame));
    }

    /// Queues a control message of this stream, before its payload.
    pub(super) fn send_control(&self, frame: &Frame) {
        self.outbox.send_control(relay_text(self.stream, frame));
    }

    /// Drops the queued payload, if the peer accepts no more.
    pub(super) fn discard(&self) {
        let dropped = self.outbox.0.state().schedule.discard(self.stream);
        // The permits are returned after the lock is released.
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
    /// Writes queued messages as they arrive, until [`Outbox::close`] or until the connection fails.
    ///
    /// # Errors
    /// [`Ended`].
    pub async fn drain(self, mut writer: Writer) -> Result<(), Ended> {
        loop {
            match self.next() {
                Next::Control(text) => writer.text(text).await?,
                // The permits are returned after the writer has taken the message.
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
        if let Some(text) = state.schedule.take_control() {
            return Next::Control(text);
        }
        if let Some(ending) = state.ending.replace(Ending::Gone) {
            return Next::Ending(ending);
        }
        state.ending = None;
        state.schedule.take().map_or(Next::Empty, |(stream, entry)| Next::Entry(stream, entry))
    }
}

enum Next {
    Control(String),
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
