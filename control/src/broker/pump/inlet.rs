//! The queue of data that arrived for a stream and is not yet written to its socket.
//!
//! The reader of the WebSocket never waits for one stream, since all others would wait with it. So each stream has a
//! bounded queue. With credit windows, a peer that respects its credit never reaches the bound. The reference
//! implementation has no credit windows: there, a stream is dropped if it exceeds its own bound, and the stream with
//! the most queued data is dropped if all streams of the connection together exceed theirs (wire specification, A.3.6).

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::BytesMut;
use tokio::sync::Notify;

use crate::broker::message::{Frame, INITIAL_CREDIT_BYTES};

/// The data that one stream may have queued without credit windows, in bytes.
const STREAM_BYTES_MAX: usize = 32 * 1024 * 1024;
/// The data that all streams of a connection may have queued together without credit windows, in bytes.
const CONNECTION_BYTES_MAX: usize = 256 * 1024 * 1024;

/// Payload smaller than this is copied into one buffer: otherwise a few bytes may keep alive the whole buffer in which
/// they arrived.
const SMALL_BYTES: usize = 16 * 1024;
const GATHER_BYTES_MAX: usize = 64 * 1024;
/// The cost of a frame in addition to its payload, in bytes.
const FRAME_COST: usize = 64;

/// The queue of a stream exceeded its bound, and was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Overflow;

/// The queues of one connection.
#[derive(Clone, Debug)]
pub struct Inlets(Arc<Shared>);

/// The sending side of one stream's queue. Dropping it reports the loss of the connection to the pump.
#[derive(Debug)]
pub struct Inlet {
    shared: Arc<Shared>,
    number: u64,
}

/// The receiving side of an [`Inlet`], for the pump.
#[derive(Debug)]
pub struct Outlet {
    shared: Arc<Shared>,
    number: u64,
    filled: Arc<Notify>,
}

#[derive(Debug)]
struct Shared {
    stream_bytes_max: usize,
    connection_bytes_max: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    bytes: usize,
    queues: HashMap<u64, Queue>,
}

#[derive(Debug)]
struct Queue {
    frames: VecDeque<Frame>,
    /// Small payload that arrived after all of `frames`.
    gathered: BytesMut,
    /// The cost of the queued data, and of data that was taken out and is not released.
    bytes: usize,
    overflown: bool,
    closed: bool,
    filled: Arc<Notify>,
}

impl Inlets {
    /// Returns an empty set of queues. `credit` is whether both sides use credit windows.
    #[must_use]
    pub fn new(credit: bool) -> Inlets {
        if credit {
            // The initial credit is also the largest credit at any time. The rest is room for frames without payload.
            let window = usize::try_from(INITIAL_CREDIT_BYTES).unwrap_or(usize::MAX);
            Inlets::bounded(2 * window, usize::MAX)
        } else {
            Inlets::bounded(STREAM_BYTES_MAX, CONNECTION_BYTES_MAX)
        }
    }

    fn bounded(stream_bytes_max: usize, connection_bytes_max: usize) -> Inlets {
        Inlets(Arc::new(Shared { stream_bytes_max, connection_bytes_max, state: Mutex::default() }))
    }

    /// Returns the two sides of the queue of a new stream.
    #[must_use]
    pub fn inlet(&self) -> (Inlet, Outlet) {
        let mut state = self.0.state();
        let number = state.next;
        state.next += 1;
        let filled = Arc::new(Notify::new());
        let queue = Queue {
            frames: VecDeque::new(),
            gathered: BytesMut::new(),
            bytes: 0,
            overflown: false,
            closed: false,
            filled: Arc::clone(&filled),
        };
        state.queues.insert(number, queue);
        drop(state);
        let inlet = Inlet { shared: Arc::clone(&self.0), number };
        (inlet, Outlet { shared: Arc::clone(&self.0), number, filled })
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds the lock; and if one did, each step leaves the state consistent.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inlet {
    /// Queues a frame. Never waits. Frames after the stream's end are dropped.
    pub fn deliver(&self, frame: Frame) {
        let mut state = self.shared.state();
        let State { bytes, queues, .. } = &mut *state;
        let Some(queue) = queues.get_mut(&self.number).filter(|queue| !queue.overflown) else { return };
        let cost = queue.push(frame);
        queue.bytes += cost;
        *bytes += cost;
        let own_excess = queue.bytes > self.shared.stream_bytes_max;
        queue.filled.notify_one();
        if own_excess {
            state.give_up(self.number);
        } else if state.bytes > self.shared.connection_bytes_max {
            let fattest = state.queues.iter().max_by_key(|(_, queue)| queue.bytes).map(|(number, _)| *number);
            fattest.into_iter().for_each(|number| state.give_up(number));
        }
    }
}

impl State {
    fn give_up(&mut self, number: u64) {
        let Some(queue) = self.queues.get_mut(&number) else { return };
        self.bytes -= queue.bytes;
        queue.bytes = 0;
        queue.frames = VecDeque::new();
        queue.gathered = BytesMut::new();
        queue.overflown = true;
        queue.filled.notify_one();
    }
}

impl Queue {
    /// Queues a frame, and returns its cost.
    fn push(&mut self, frame: Frame) -> usize {
        match frame {
            Frame::Data(payload) if payload.is_empty() => 0,
            Frame::Data(payload) if payload.len() < SMALL_BYTES => {
                if self.gathered.len() + payload.len() > GATHER_BYTES_MAX {
                    self.flush();
                }
                self.gathered.extend_from_slice(&payload);
                payload.len()
            }
            Frame::Data(payload) => {
                self.flush();
                let cost = payload.len();
                self.frames.push_back(Frame::Data(payload));
                cost
            }
            frame => {
                self.flush();
                self.frames.push_back(frame);
                FRAME_COST
            }
        }
    }

    fn flush(&mut self) {
        if !self.gathered.is_empty() {
            let gathered = std::mem::take(&mut self.gathered).freeze();
            self.frames.push_back(Frame::Data(gathered));
        }
    }

    fn pop(&mut self) -> Option<Frame> {
        if self.frames.is_empty() {
            self.flush();
        }
        self.frames.pop_front()
    }
}

impl Outlet {
    /// Returns the next frame, or `None` if the connection is lost and all frames were taken. Payload counts until it
    /// is [released](Outlet::release). Cancel-safe.
    ///
    /// # Errors
    /// [`Overflow`], on this and every later call.
    pub(super) async fn next(&self) -> Result<Option<Frame>, Overflow> {
        loop {
            {
                let mut state = self.shared.state();
                let Some(queue) = state.queues.get_mut(&self.number) else { return Ok(None) };
                if queue.overflown {
                    return Err(Overflow);
                }
                if let Some(frame) = queue.pop() {
                    if !matches!(frame, Frame::Data(_)) {
                        queue.bytes -= FRAME_COST;
                        state.bytes -= FRAME_COST;
                    }
                    return Ok(Some(frame));
                }
                if queue.closed {
                    return Ok(None);
                }
            }
            self.filled.notified().await;
        }
    }

    /// Releases payload: this many bytes were written.
    pub(super) fn release(&self, bytes: usize) {
        let mut state = self.shared.state();
        let Some(queue) = state.queues.get_mut(&self.number) else { return };
        let released = bytes.min(queue.bytes);
        queue.bytes -= released;
        state.bytes -= released;
    }
}

impl Drop for Inlet {
    fn drop(&mut self) {
        if let Some(queue) = self.shared.state().queues.get_mut(&self.number) {
            queue.closed = true;
            queue.filled.notify_one();
        }
    }
}

impl Drop for Outlet {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        if let Some(queue) = state.queues.remove(&self.number) {
            state.bytes -= queue.bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use futures_util::FutureExt as _;

    fn data(bytes: usize) -> Frame {
        Frame::Data(Bytes::from(vec![7; bytes]))
    }

    fn now(outlet: &Outlet) -> Option<Result<Option<Frame>, Overflow>> {
        outlet.next().now_or_never()
    }

    #[test]
    fn small_payload_is_merged_without_reordering() {
        let (inlet, outlet) = Inlets::new(true).inlet();
        for frame in [data(0), data(3), data(4), data(SMALL_BYTES), data(5), Frame::Credit(1), data(6)] {
            inlet.deliver(frame);
        }
        for frame in [data(7), data(SMALL_BYTES), data(5), Frame::Credit(1), data(6)] {
            assert_eq!(now(&outlet), Some(Ok(Some(frame))));
        }
        assert_eq!(now(&outlet), None);
        drop(inlet);
        assert_eq!(now(&outlet), Some(Ok(None)));
    }

    #[test]
    fn a_stream_above_its_bound_is_dropped_and_released_payload_does_not_count() {
        let (inlet, outlet) = Inlets::bounded(100, 1000).inlet();
        for _ in 0..10 {
            inlet.deliver(data(60));
            assert_eq!(now(&outlet), Some(Ok(Some(data(60)))));
            outlet.release(60);
        }
        inlet.deliver(data(60));
        assert_eq!(now(&outlet), Some(Ok(Some(data(60)))));
        // Payload that was taken and is not written yet counts.
        inlet.deliver(data(41));
        assert_eq!(now(&outlet), Some(Err(Overflow)));
        inlet.deliver(data(1));
        assert_eq!(now(&outlet), Some(Err(Overflow)));
    }

    #[test]
    fn above_the_shared_bound_the_largest_queue_is_dropped() {
        let inlets = Inlets::bounded(100, 150);
        let (thin, thin_out) = inlets.inlet();
        let (fat, fat_out) = inlets.inlet();
        thin.deliver(data(60));
        fat.deliver(data(90));
        thin.deliver(data(1));
        assert_eq!(now(&fat_out), Some(Err(Overflow)));
        // All of the dropped queue's room is available again.
        thin.deliver(data(39));
        assert_eq!(now(&thin_out), Some(Ok(Some(data(100)))));
        drop((thin, thin_out, fat, fat_out));
        assert_eq!(inlets.0.state().bytes, 0);
    }
}
