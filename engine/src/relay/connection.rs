//! The state machine of one relayed connection. Pure.
//!
//! Two [`Half`]s run independently: each moves bytes from its source to its destination. The end of a connection links them:
//!
//! 1. A FIN from one side is sent to the other after all held bytes. The opposite half continues.
//! 2. When both FINs are sent or due, both sockets are closed. The close sends the last FIN.
//! 3. When a side breaks (reset, or a refused write), the half that writes to it ends at once. The half that reads from it
//!    continues until everything is passed on: bytes that preceded a reset still arrive (tcp(7); the kernel keeps received
//!    bytes readable before ECONNRESET).
//! 4. Then the other side is reset, too, but only after it has acknowledged what was sent to it, since an abortive close
//!    discards the send queue. That wait, and the wait for a stalled reader, have a deadline.
//!
//! Reads and writes are calls that never wait, so no operation is in flight between two inputs, and the machine may close at
//! any time. The common case, a read whose bytes are all written, changes no state: [`Connection::moved`] only chooses the
//! mode of the direction from it.
//!
//! A half that holds bytes does not read. A reset of its source is then reported as an error of the socket
//! ([`Input::Broke`]), and later as the end of the bytes to be read.
//!
//! ```text
//! Begin -> Relaying -> (both FINs) -----------------------------------------------> Finish
//!              |                                                          ^
//!              +--- a side broke -> [its outgoing half drains] -> [acknowledged]: reset the other
//! ```

use std::time::{Duration, Instant};

use super::action::{Action, Actions, Direction, Input, ReadEnd, Side};
use super::half::{Activity, Half, ReadSide, WriteSide};
use crate::error::EndReason;
use crate::limits::Limits;
use crate::reactor::TransferMode;

/// The first wait for acknowledgements, doubled each time; loopback acknowledges within microseconds.
const ACKNOWLEDGE_PAUSE_FIRST: Duration = Duration::from_millis(1);
const ACKNOWLEDGE_PAUSE_MAX: Duration = Duration::from_millis(128);

/// One relayed connection, from the time both sides are connected.
#[derive(Clone, Debug)]
pub struct Connection {
    finished: bool,
    halves: [Half; 2],
    /// The side that broke first, if one has. Boxed: it is rare, and thousands of connections are idle.
    broken: Option<Box<Broken>>,
}

#[derive(Clone, Copy, Debug)]
struct Broken {
    side: Side,
    /// When the other side is reset even if it has not read everything.
    give_up_at: Instant,
    /// The next wait for acknowledgements.
    pause: Duration,
    measuring: bool,
}

impl Connection {
    /// Creates a connection that expects [`Input::Start`].
    pub fn new() -> Connection {
        Connection { finished: false, halves: [Half::new(); 2], broken: None }
    }

    /// Handles an event and appends the resulting actions. Total: an input that does not fit the state is ignored.
    pub fn on(&mut self, input: Input, now: Instant, limits: &Limits, actions: &mut Actions) {
        if self.finished {
            return;
        }
        match input {
            Input::Start => Direction::ALL.into_iter().for_each(|direction| self.read(direction, actions)),
            Input::Read(direction, end) => self.on_read(direction, end, now, limits, actions),
            Input::BufferFree(direction) => {
                if self.half(direction).activity == Activity::Starved {
                    self.half_mut(direction).activity = Activity::Idle;
                    self.read(direction, actions);
                }
            }
            Input::Blocked(direction) => {
                if self.half(direction).activity == Activity::Reading {
                    self.half_mut(direction).activity = Activity::Blocked;
                }
            }
            Input::Wrote(direction) => {
                if self.half(direction).activity == Activity::Blocked {
                    self.half_mut(direction).activity = Activity::Idle;
                    self.read(direction, actions);
                }
            }
            Input::WriteFailed(direction) => {
                if self.half(direction).write == WriteSide::Open {
                    self.half_mut(direction).activity = Activity::Idle;
                    self.break_side(direction.to(), now, limits, actions);
                }
            }
            Input::Broke(side) | Input::FinFailed(side) => self.break_side(side, now, limits, actions),
            Input::Unacknowledged(side, bytes) => self.on_unacknowledged(side, bytes, now, actions),
            Input::Deadline => self.on_deadline(now, actions),
            Input::Abort(reason) => self.finish([true; 2], reason, actions),
        }
    }

    /// Records that `bytes` were read and written; `full` if they filled the buffer, which indicates more.
    pub fn moved(&mut self, direction: Direction, bytes: usize, full: bool, limits: &Limits) {
        self.half_mut(direction).account(bytes, full, limits);
    }

    /// Returns the mode in which to move the bytes of a direction; `None` while it does not read.
    pub fn reads(&self, direction: Direction) -> Option<TransferMode> {
        let half = self.half(direction);
        (half.activity == Activity::Reading).then_some(half.mode)
    }

    /// Whether the shard holds bytes that the direction's destination did not accept.
    pub fn is_blocked(&self, direction: Direction) -> bool {
        self.half(direction).activity == Activity::Blocked
    }

    /// Whether [`Action::Finish`] was returned.
    pub fn is_finished(&self) -> bool {
        self.finished
    }

    fn half(&self, direction: Direction) -> &Half {
        &self.halves[direction as usize]
    }

    fn half_mut(&mut self, direction: Direction) -> &mut Half {
        &mut self.halves[direction as usize]
    }

    fn is_broken(&self, side: Side) -> bool {
        self.broken.as_ref().is_some_and(|broken| broken.side == side)
    }

    /// Reads, if the source may have more and the destination may accept it.
    fn read(&mut self, direction: Direction, actions: &mut Actions) {
        let half = self.half_mut(direction);
        if half.activity == Activity::Idle && half.read == ReadSide::Open && half.write == WriteSide::Open {
            half.activity = Activity::Reading;
            actions.push(Action::Read(direction));
        } else {
            self.finish_if_ended(actions);
        }
    }

    fn on_read(
        &mut self,
        direction: Direction,
        end: ReadEnd,
        now: Instant,
        limits: &Limits,
        actions: &mut Actions,
    ) {
        let from = direction.from();
        let source_broken = self.is_broken(from);
        let half = self.half_mut(direction);
        if half.activity != Activity::Reading {
            return;
        }
        half.activity = Activity::Idle;
        match end {
            ReadEnd::Unavailable(TransferMode::Splice) => {
                half.demote();
                self.read(direction, actions);
            }
            ReadEnd::Unavailable(TransferMode::Copy) => half.activity = Activity::Starved,
            // The kernel reports a reset once. If a write to the source returned it, a read returns an end after the last
            // byte (tcp_recvmsg() with SOCK_DONE).
            ReadEnd::Eof if source_broken => {
                half.read = ReadSide::Broken;
                self.finish_if_ended(actions);
            }
            ReadEnd::Eof => {
                half.read = ReadSide::Eof;
                half.write = WriteSide::FinSent;
                // If both directions have ended, the close sends this FIN.
                if self.half(from.incoming()).write != WriteSide::FinSent {
                    actions.push(Action::SendFin(direction.to()));
                }
                self.finish_if_ended(actions);
            }
            ReadEnd::Broken => {
                half.read = ReadSide::Broken;
                self.break_side(from, now, limits, actions);
            }
        }
    }

    fn break_side(&mut self, side: Side, now: Instant, limits: &Limits, actions: &mut Actions) {
        match self.broken.as_ref().map(|broken| broken.side) {
            // The other side broke before, so no side is left to relay for.
            Some(first) if first != side => {
                return self.finish([true; 2], EndReason::ResetBy(first), actions);
            }
            Some(_) => {}
            None => {
                let give_up_at = now + limits.reset_drain_timeout;
                let pause = ACKNOWLEDGE_PAUSE_FIRST;
                self.broken = Some(Box::new(Broken { side, give_up_at, pause, measuring: false }));
                actions.push(Action::SetDeadline(give_up_at));
                let incoming = self.half_mut(side.incoming());
                incoming.write = WriteSide::Broken;
                if incoming.activity == Activity::Blocked {
                    actions.push(Action::Discard(side.incoming()));
                }
                incoming.activity = Activity::Idle;
                // The side's last bytes are still to be read, even if the other half detected the break.
                if self.half(side.outgoing()).activity == Activity::Reading {
                    actions.push(Action::Read(side.outgoing()));
                }
            }
        }
        self.finish_if_ended(actions);
    }

    /// Ends the connection if both directions have ended, or starts to wait for the last acknowledgements.
    fn finish_if_ended(&mut self, actions: &mut Actions) {
        match &mut self.broken {
            None => {
                if self.halves.iter().all(|half| half.write == WriteSide::FinSent) {
                    self.finish([false; 2], EndReason::Completed, actions);
                }
            }
            Some(broken) if !broken.measuring => {
                let side = broken.side;
                if self.halves[side.outgoing() as usize].drained() {
                    broken.measuring = true;
                    actions.push(Action::MeasureUnacknowledged(side.other()));
                }
            }
            Some(_) => {}
        }
    }

    fn on_unacknowledged(&mut self, side: Side, bytes: usize, now: Instant, actions: &mut Actions) {
        let Some(broken) = &mut self.broken else { return };
        if !broken.measuring || broken.side != side.other() {
            return;
        }
        if bytes == 0 || now >= broken.give_up_at {
            self.reset_other(actions);
        } else {
            actions.push(Action::SetDeadline((now + broken.pause).min(broken.give_up_at)));
            broken.pause = (broken.pause * 2).min(ACKNOWLEDGE_PAUSE_MAX);
        }
    }

    fn on_deadline(&mut self, now: Instant, actions: &mut Actions) {
        let Some(broken) = self.broken.as_deref().copied() else { return };
        if now >= broken.give_up_at {
            self.reset_other(actions);
        } else if broken.measuring {
            actions.push(Action::MeasureUnacknowledged(broken.side.other()));
        }
    }

    fn reset_other(&mut self, actions: &mut Actions) {
        let reason =
            self.broken.as_ref().map_or(EndReason::Removed, |broken| EndReason::ResetBy(broken.side));
        self.finish([true; 2], reason, actions);
    }

    fn finish(&mut self, reset: [bool; 2], reason: EndReason, actions: &mut Actions) {
        if !self.finished {
            self.finished = true;
            actions.push(Action::Finish { reset, reason });
        }
    }
}

impl Default for Connection {
    fn default() -> Connection {
        Connection::new()
    }
}
