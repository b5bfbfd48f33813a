//! One stream of a broker, as seen from one of its ends. Pure: events of the socket and of the peer go in, actions come
//! out; the [pump](super::pump) performs them.
//!
//! The two directions are independent: `reading` is from the socket to the peer, `writing` from the peer to the socket.
//!
//! ```text
//!  reading:  Open ──► Over          the socket's FIN, or the end of the stream
//!  writing:  Open ──► FinDue ──► FinSent
//! !
//! //!              └────► Broken        the socket accepts no more data
//! ```
//!
//! 1. With half-close, a FIN is passed on as `relay-eof`, after the payload that preceded it, and the other direction
//!    continues. The stream ends when both directions are over.
//! 2. Without half-close, a FIN ends the stream: `relay-close` is sent, once. The peer sends nothing after that.
//!    Payload that it sent before is still written.
//! 3. A `relay-close` of the peer also ends the stream: earlier payload is written, then a FIN, and no message is sent
//!    back.
//! 4. A socket error ends the stream: `relay-reset` (`relay-close` if the peer does not support resets) is sent after
//!    the payload that was read. A socket that accepts no more data is first read until it is empty, since a reset
//!    leaves earlier data readable; only then the message is sent.
//! 5. A `relay-reset` of the peer resets the socket after the socket has acknowledged all earlier data.
//! 6. With credit, no more is read than the peer has granted. Data that was written to the socket is granted back in
//!    halves of the window, so that neither end waits for a grant that the other end holds back.
//! 7. A lost connection resets the socket, unless both directions are complete: all data and the end of the peer have
//!    arrived, and all data and the end of the socket were sent.
//!    had to say was said.

use super::message::{Extensions, INITIAL_CREDIT_BYTES, PAYLOAD_BYTES_MAX, Side};

/// The smallest grant that is worth a message, in bytes.
const GRANT_BYTES: u64 = INITIAL_CREDIT_BYTES as u64 / 2;

/// The way in which a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Both directions ended by a FIN.
    Complete,
    /// Our socket was closed or failed, and the peer was notified.
    ByUs,
    /// The peer ended it.
    ByPeer,
    /// The WebSocket was lost.
    Lost,
    /// The peer sent more than is queued for a socket that does not read, or more than was granted. The peer was
    /// notified.
    Overflown,
}

/// An event of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Input {
    /// This many bytes were read from the socket and queued for the peer.
    Read(usize),
    /// The socket's FIN was read.
    Eof,
    /// Reading failed: a reset, or another error.
    ReadBroke,
    /// The socket accepts no more data.
    WriteBroke,
    /// Payload arrived.
    Payload(usize),
    /// `relay-close` arrived.
    Close,
    /// `relay-credit` arrived.
    Credit(u32),
    /// `relay-eof` arrived.
    PeerEof,
    /// `relay-reset` arrived.
    Reset,
    /// This many bytes were written to the socket.
    Wrote(usize),
    /// The WebSocket was lost.
    Lost,
    /// The queue of arrived data exceeded its limit.
    Overflow,
}

/// An action, to perform in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Grant the peer this many additional bytes.
    Grant(u32),
    /// Queue `relay-eof` after the payload.
    Eof,
    /// Queue `relay-close` of our side after the payload.
    Close(Side),
    /// Queue `relay-reset` after the payload.
    Reset,
    /// Drop the payload that waits for the peer.
    DropOutgoing,
    /// Drop the payload that waits for the socket.
    DropIncoming,
    /// Send a FIN to the socket. All payload was written.
    Fin,
    /// Close the socket. No action follows.
    Finish(Ended, Closing),
}

/// The way in which the socket is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Closing {
    /// Immediately: both FINs were exchanged, so the kernel delivers the data in its buffers.
    Orderly,
    /// After all data is acknowledged, since the kernel resets a socket that is closed with unread input, and drops the
    /// data in its buffers.
    Acknowledged,
    /// By a reset, after all data is acknowledged.
    ResetAcknowledged,
    /// By a reset, immediately.
    Reset,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reading {
    Open,
    Over,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Writing {
    Open,
    FinDue,
    FinSent,
    Broken,
}

/// The state machine of one stream.
#[derive(Clone, Debug)]
pub(super) struct Stream {
    us: Side,
    extensions: Extensions,
    reading: Reading,
    writing: Writing,
    /// Payload that arrived and is not written, in bytes.
    queued: u64,
    /// The credit that the peer granted and that is not used, in bytes.
    may_send: u64,
    /// The credit that was granted to the peer and that it has not used, in bytes.
    granted: u64,
    /// Payload that was written and is not granted back yet, in bytes.
    ungranted: u64,
    /// The way in which the stream ends, after a `relay-close` or `relay-reset` was sent or received. Later messages of
    /// the peer are ignored.
    closed: Option<Ended>,
    /// Whether the peer has reset the stream.
    reset: bool,
    finished: bool,
}

impl Stream {
    /// Creates the machine of a stream that is open on both ends.
    pub(super) fn new(us: Side, extensions: Extensions) -> Stream {
        Stream {
            us,
            extensions,
            reading: Reading::Open,
            writing: Writing::Open,
            queued: 0,
            may_send: INITIAL_CREDIT_BYTES.into(),
            granted: INITIAL_CREDIT_BYTES.into(),
            ungranted: 0,
            closed: None,
            reset: false,
            finished: false,
        }
    }

    /// Returns how many bytes may be read from the socket now.
    pub(super) fn may_read(&self) -> usize {
        match self.reading {
            Reading::Over => 0,
            Reading::Open if self.extensions.credit => {
                usize::try_from(self.may_send).unwrap_or(usize::MAX).min(PAYLOAD_BYTES_MAX)
            }
            Reading::Open => PAYLOAD_BYTES_MAX,
        }
    }

    /// Returns whether the socket is still to be read, now or later.
    pub(super) fn is_reading(&self) -> bool {
        self.reading == Reading::Open
    }

    /// Returns whether payload that arrives now is to be written.
    pub(super) fn takes_payload(&self) -> bool {
        self.closed.is_none() && self.writing == Writing::Open
    }

    /// Handles an event and appends the actions. An event that does not fit the state is ignored.
    pub(super) fn on(&mut self, input: Input, actions: &mut Vec<Action>) {
        if self.finished {
            return;
        }
        match input {
            Input::Read(bytes) => self.may_send = self.may_send.saturating_sub(bytes as u64),
            Input::Eof => self.on_eof(actions),
            Input::ReadBroke => self.on_broken(actions),
            Input::WriteBroke => self.on_write_broke(actions),
            Input::Wrote(bytes) => self.on_wrote(bytes as u64, actions),
            Input::Overflow => self.on_overflow(actions),
            Input::Lost => self.on_lost(actions),
            _ if self.closed.is_some() => {}
            Input::Payload(bytes) => self.on_payload(bytes as u64, actions),
            Input::Credit(bytes) => self.may_send = self.may_send.saturating_add(bytes.into()),
            Input::PeerEof => {
                if self.writing == Writing::Open {
                    self.writing = Writing::FinDue;
                }
            }
            Input::Close => self.on_close(actions),
            Input::Reset => {
                self.on_close(actions);
                self.reset = true;
            }
        }
        self.finish_if_done(actions);
    }

    fn on_eof(&mut self, actions: &mut Vec<Action>) {
        if self.reading == Reading::Over {
            return;
        }
        self.reading = Reading::Over;
        if self.writing == Writing::Broken {
            self.on_broken(actions);
        } else if self.extensions.half_close {
            actions.push(Action::Eof);
        } else {
            actions.push(Action::Close(self.us));
            self.closed = Some(Ended::ByUs);
            if self.writing == Writing::Open {
                self.writing = Writing::FinDue;
            }
        }
    }

    /// Handles a socket that failed in both directions.
    fn on_broken(&mut self, actions: &mut Vec<Action>) {
        if self.closed.is_none() {
            actions.push(self.failure_message());
        }
        self.finish(self.closed.unwrap_or(Ended::ByUs), Closing::Reset, actions);
    }

    fn on_write_broke(&mut self, actions: &mut Vec<Action>) {
        if self.reading == Reading::Over {
            self.on_broken(actions);
        } else if self.writing != Writing::Broken {
            self.writing = Writing::Broken;
            self.queued = 0;
            actions.push(Action::DropIncoming);
        }
    }

    fn on_payload(&mut self, bytes: u64, actions: &mut Vec<Action>) {
        if self.extensions.credit {
            if bytes > self.granted {
                return self.on_overflow(actions);
            }
            self.granted -= bytes;
        }
        // Otherwise the peer has ended this direction, or the socket accepts no data.
        if self.takes_payload() {
            self.queued += bytes;
        }
    }

    fn on_wrote(&mut self, bytes: u64, actions: &mut Vec<Action>) {
        let bytes = bytes.min(self.queued);
        self.queued -= bytes;
        self.ungranted += bytes;
        if self.extensions.credit && self.writing == Writing::Open && self.ungranted >= GRANT_BYTES {
            let granted = u32::try_from(self.ungranted).unwrap_or(u32::MAX);
            self.ungranted -= u64::from(granted);
            self.granted += u64::from(granted);
            actions.push(Action::Grant(granted));
        }
    }

    fn on_close(&mut self, actions: &mut Vec<Action>) {
        self.closed = Some(Ended::ByPeer);
        self.reading = Reading::Over;
        actions.push(Action::DropOutgoing);
        if self.writing == Writing::Open {
            self.writing = Writing::FinDue;
        }
    }

    fn on_overflow(&mut self, actions: &mut Vec<Action>) {
        if self.closed.is_none() {
            actions.push(Action::DropOutgoing);
            actions.push(self.failure_message());
        }
        self.finish(Ended::Overflown, Closing::Reset, actions);
    }

    fn on_lost(&mut self, actions: &mut Vec<Action>) {
        let is_complete = self.reading == Reading::Over && self.writing == Writing::FinDue;
        if !is_complete {
            self.finish(self.closed.unwrap_or(Ended::Lost), Closing::Reset, actions);
        }
    }

    /// Returns the message that reports a failure of our socket to the peer.
    fn failure_message(&self) -> Action {
        if self.extensions.reset { Action::Reset } else { Action::Close(self.us) }
    }

    fn finish_if_done(&mut self, actions: &mut Vec<Action>) {
        if self.finished || self.queued > 0 {
            return;
        }
        if self.reset {
            return self.finish(Ended::ByPeer, Closing::ResetAcknowledged, actions);
        }
        if self.writing == Writing::FinDue {
            self.writing = Writing::FinSent;
            actions.push(Action::Fin);
        }
        match (self.reading, self.writing) {
            (Reading::Over, Writing::FinSent) => {
                let (ended, closing) = match self.closed {
                    None => (Ended::Complete, Closing::Orderly),
                    Some(Ended::ByUs) => (Ended::ByUs, Closing::Orderly),
                    Some(ended) => (ended, Closing::Acknowledged),
                };
                self.finish(ended, closing, actions);
            }
            // The peer has closed the stream, and the socket accepts no data.
            (Reading::Over, Writing::Broken) => {
                self.finish(self.closed.unwrap_or(Ended::ByUs), Closing::Reset, actions);
            }
            _ => {}
        }
    }

    fn finish(&mut self, ended: Ended, closing: Closing, actions: &mut Vec<Action>) {
        if !self.finished {
            self.finished = true;
            actions.push(Action::Finish(ended, closing));
        }
    }
}

#[cfg(test)]
#[path = "stream_tests.rs"]
mod tests;
