//! One stream of a broker, seen from one of its ends. Pure: what the socket and the peer did goes in, what is to be done
//! comes out; the [pump](super::pump) does it.
//!
//! Two directions run independently. `reading` is from the socket to the peer, `writing` from the peer to the socket.
//!
//! ```text
//!  reading:  Open ──► Over          the socket's FIN, or the end of the stream
//!  writing:  Open ──► FinDue ──► FinSent
//!              └────► Broken        the socket takes nothing more
//! ```
//!
//! 1. With half-close a FIN is passed on as `relay-eof`, after the payload that came before it, and the other direction runs
//!    on. Both directions over is the end of the stream.
//! 2. Without it a FIN is the end: `relay-close`, once. The peer says nothing more. What it said before is still written.
//! 3. `relay-close` of the peer is the end as well: what it said before is written, then a FIN, and nothing is said back.
//! 4. A socket that breaks is the end at once: `relay-reset` (`relay-close` where the peer knows no reset) after the payload
//!    that was read. A socket that takes nothing more is read until it has nothing left, for a reset leaves what came before
//!    it readable; only then the peer is told.
//! 5. `relay-reset` of the peer resets the socket once it has acknowledged everything before.
//! 6. With credit no more is read than the peer has granted; what was written to the socket is granted back in halves of the
//!    window, so that neither end ever waits for a grant the other one is holding back.
//! 7. A connection that is lost resets the socket, unless everything the peer had to say had come, and everything the socket
//!    had to say was said.

use super::message::{Extensions, INITIAL_CREDIT_BYTES, PAYLOAD_BYTES_MAX, Side};

/// A grant is held back until it is worth a message.
const GRANT_BYTES: u64 = INITIAL_CREDIT_BYTES as u64 / 2;

/// How a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Both directions ended, each by itself.
    Complete,
    /// Our socket closed, or broke, and the peer was told.
    ByUs,
    /// The peer ended it.
    ByPeer,
    /// The WebSocket is gone.
    Lost,
    /// More arrived than is kept for a socket that does not read, or than was granted; the peer was told.
    Overflown,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Input {
    /// So many bytes were read from the socket and queued for the peer.
    Read(usize),
    /// The socket's FIN was read.
    Eof,
    /// Nothing can be read any more: a reset, or an error.
    ReadBroke,
    /// The socket takes nothing more.
    WriteBroke,
    /// Payload came.
    Payload(usize),
    /// `relay-close` came.
    Close,
    /// `relay-credit` came.
    Credit(u32),
    /// `relay-eof` came.
    PeerEof,
    /// `relay-reset` came.
    Reset,
    /// So many bytes were written to the socket.
    Wrote(usize),
    /// The WebSocket is gone.
    Lost,
    /// More arrived than is kept.
    Overflow,
}

/// What is to be done, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Tell the peer that it may send so many bytes more.
    Grant(u32),
    /// Queue what ends the stream or a direction of it, behind the payload.
    Eof,
    /// The same: `relay-close` of our side.
    Close(Side),
    /// The same: `relay-reset`.
    Reset,
    /// Drop payload that waits for the peer.
    DropOutgoing,
    /// Drop payload that waits for the socket.
    DropIncoming,
    /// Send the socket a FIN. Everything was written.
    Fin,
    /// Close the socket. Nothing follows.
    Finish(Ended, Closing),
}

/// How the socket is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Closing {
    /// At once: both FINs were exchanged, so the kernel delivers what it holds.
    Orderly,
    /// When it has acknowledged everything, since the kernel resets a socket that is closed with input unread, and drops what
    /// it holds.
    Acknowledged,
    /// By a reset, when it has acknowledged everything.
    ResetAcknowledged,
    /// By a reset, now.
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

/// The machine.
#[derive(Clone, Debug)]
pub(super) struct Stream {
    us: Side,
    extensions: Extensions,
    reading: Reading,
    writing: Writing,
    /// Payload that came and is not written, in bytes.
    queued: u64,
    /// What we may send, in bytes.
    may_send: u64,
    /// What the peer may send, in bytes.
    granted: u64,
    /// What was written and is not granted back yet, in bytes.
    owed: u64,
    /// How it ends, once a `relay-close` or `relay-reset` went or came. Nothing the peer says counts from then on.
    closed: Option<Ended>,
    /// The peer has reset it.
    reset: bool,
    finished: bool,
}

impl Stream {
    /// A stream that is open on both ends.
    pub(super) fn new(us: Side, extensions: Extensions) -> Stream {
        Stream {
            us,
            extensions,
            reading: Reading::Open,
            writing: Writing::Open,
            queued: 0,
            may_send: INITIAL_CREDIT_BYTES.into(),
            granted: INITIAL_CREDIT_BYTES.into(),
            owed: 0,
            closed: None,
            reset: false,
            finished: false,
        }
    }

    /// How many bytes may be read from the socket now.
    pub(super) fn may_read(&self) -> usize {
        match self.reading {
            Reading::Over => 0,
            Reading::Open if self.extensions.credit => {
                usize::try_from(self.may_send).unwrap_or(usize::MAX).min(PAYLOAD_BYTES_MAX)
            }
            Reading::Open => PAYLOAD_BYTES_MAX,
        }
    }

    /// Whether the socket is still to be read, if not now.
    pub(super) fn is_reading(&self) -> bool {
        self.reading == Reading::Open
    }

    /// Whether payload that comes now is to be written.
    pub(super) fn takes_payload(&self) -> bool {
        self.closed.is_none() && self.writing == Writing::Open
    }

    /// Takes in what happened and appends what is to be done. Total: what does not fit the state is ignored.
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
        self.settle(actions);
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

    /// The socket is of no use any more.
    fn on_broken(&mut self, actions: &mut Vec<Action>) {
        if self.closed.is_none() {
            actions.push(self.breaking());
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
        // Otherwise it has ended this direction, or nobody takes it.
        if self.takes_payload() {
            self.queued += bytes;
        }
    }

    fn on_wrote(&mut self, bytes: u64, actions: &mut Vec<Action>) {
        let bytes = bytes.min(self.queued);
        self.queued -= bytes;
        self.owed += bytes;
        if self.extensions.credit && self.writing == Writing::Open && self.owed >= GRANT_BYTES {
            let granted = u32::try_from(self.owed).unwrap_or(u32::MAX);
            self.owed -= u64::from(granted);
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
            actions.push(self.breaking());
        }
        self.finish(Ended::Overflown, Closing::Reset, actions);
    }

    fn on_lost(&mut self, actions: &mut Vec<Action>) {
        let is_complete = self.reading == Reading::Over && self.writing == Writing::FinDue;
        if !is_complete {
            self.finish(self.closed.unwrap_or(Ended::Lost), Closing::Reset, actions);
        }
    }

    /// What tells the peer that our socket broke.
    fn breaking(&self) -> Action {
        if self.extensions.reset { Action::Reset } else { Action::Close(self.us) }
    }

    fn settle(&mut self, actions: &mut Vec<Action>) {
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
            // It was closed by the peer, and there is nobody to write to.
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
