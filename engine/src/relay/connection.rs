//! THE state machine of one relayed connection. Pure.
//!
//! Two [`Half`]s run independently: each reads, writes, reads again. What ties them together is how a connection ends:
//!
//! 1. A FIN from one side is owed to the other after every byte held, and only there. The opposite half runs on.
//! 2. When both FINs are sent, both sockets are closed.
//! 3. A side that breaks (reset, or a write that it refuses) ends the half that writes to it at once. The half that
//!    reads from it runs on until nothing is left to pass on: what came before a reset still arrives (tcp(7); the
//!    kernel keeps received bytes readable before ECONNRESET).
//! 4. Then the other side is reset in turn, but not before it has acknowledged what was sent to it, since an abortive
//!    close throws the send queue away. That wait, and the one for a reader that has stalled, have a deadline.
//! 5. Nothing is closed while an operation is in flight. Closing cancels, waits for the cancelled, then closes.
//!
//! A half that writes reads nothing, so a side whose bytes are not taken is neither read nor, if the opposite half
//! waits on the other side, written to. A [`Action::Watch`] stands in, or its reset would go unseen.
//!
//! ```text
//! Begin -> Relaying -> (both FINs sent) ------------------------------> Closing -> Finish
//!              |                                                           ^
//!              +--- a side broke -> [its outgoing half drains] -> [acknowledged] -> reset the other
//! ```

use std::time::{Duration, Instant};

use super::action::{Action, Actions, Direction, Input, Operation, ReadEnd, Side};
use super::half::{Activity, Half, ReadSide, WriteSide};
use crate::error::EndReason;
use crate::limits::Limits;

/// The first wait for acknowledgements, doubled each time; loopback acknowledges within microseconds.
const ACKNOWLEDGE_PAUSE_FIRST: Duration = Duration::from_millis(1);
const ACKNOWLEDGE_PAUSE_MAX: Duration = Duration::from_millis(128);

/// One relayed connection, from the moment both sides are connected.
#[derive(Clone, Debug)]
pub struct Connection {
    phase: Phase,
    halves: [Half; 2],
    watches: [Watching; 2],
    /// The side that broke first, if one has.
    /// Boxed, for hardly any connection comes to this, and thousands wait idly.
    broken: Option<Box<Broken>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Relaying,
    /// Everything is cancelled; it finishes when nothing is in flight.
    Closing {
        reset: [bool; 2],
        reason: EndReason,
    },
    Finished,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Watching {
    No,
    Armed,
    Cancelled,
}

#[derive(Clone, Copy, Debug)]
struct Broken {
    side: Side,
    /// When the other side is reset whether or not it has read everything.
    give_up_at: Instant,
    /// The next wait for acknowledgements.
    pause: Duration,
    measuring: bool,
}

impl Connection {
    /// A connection that awaits [`Input::Begin`].
    pub fn new() -> Connection {
        Connection {
            phase: Phase::Relaying,
            halves: [Half::new(); 2],
            watches: [Watching::No; 2],
            broken: None,
        }
    }

    /// Takes in what happened and appends what is to be done. Total: an input that does not fit the state is ignored.
    pub fn on(&mut self, input: Input, now: Instant, limits: &Limits, actions: &mut Actions) {
        match input {
            Input::Begin => {
                for direction in Direction::ALL {
                    self.read(direction, actions);
                }
            }
            Input::Read(direction, end) => self.on_read(direction, end, now, limits, actions),
            Input::LoanFree(direction) => {
                if self.half(direction).activity == Activity::Starved {
                    self.half_mut(direction).activity = Activity::Idle;
                    self.read(direction, actions);
                }
            }
            Input::Blocked(direction) => {
                if self.half(direction).activity == Activity::Writing {
                    self.half_mut(direction).activity = Activity::Blocked;
                    self.watch(direction.from(), actions);
                }
            }
            Input::Wrote(direction) => self.on_wrote(direction, actions),
            Input::WriteFailed(direction) => {
                self.half_mut(direction).activity = Activity::Idle;
                self.break_side(direction.to(), now, limits, actions);
            }
            Input::Broke(side) => self.on_broke(side, now, limits, actions),
            Input::FinFailed(side) => self.break_side(side, now, limits, actions),
            Input::Cancelled(operation) => {
                match operation {
                    Operation::Half(direction) => self.half_mut(direction).activity = Activity::Idle,
                    Operation::Watch(side) => {
                        self.watches[side as usize] = Watching::No;
                        if self.half(side.outgoing()).activity == Activity::Blocked {
                            self.watch(side, actions);
                        }
                    }
                    Operation::Connect => {}
                }
                self.settle(actions);
            }
            Input::Unacknowledged(side, bytes) => self.on_unacknowledged(side, bytes, now, actions),
            Input::Deadline => self.on_deadline(now, actions),
            Input::Abort(reason) => self.close([true; 2], reason, actions),
        }
    }

    /// Whether [`Action::Finish`] was given.
    pub fn is_finished(&self) -> bool {
        self.phase == Phase::Finished
    }

    /// Whether an operation of this connection is in flight, as far as the machine knows.
    pub fn is_in_flight(&self) -> bool {
        self.halves.iter().any(Half::in_flight) || self.watches.iter().any(|watch| *watch != Watching::No)
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

    /// Reads on, if there is anything to expect and somewhere to put it.
    fn read(&mut self, direction: Direction, actions: &mut Actions) {
        if self.phase != Phase::Relaying {
            return;
        }
        let half = self.half_mut(direction);
        if half.activity == Activity::Idle && half.read == ReadSide::Open && half.write == WriteSide::Open {
            let (way, eager) = half.begin_read();
            actions.push(Action::Read { direction, way, eager });
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
        let closing = self.phase != Phase::Relaying;
        let half = self.half_mut(direction);
        half.activity = Activity::Idle;
        match end {
            ReadEnd::Bytes { .. } if closing || half.write != WriteSide::Open => {
                // The read and its cancel crossed. There is nobody to give the bytes to.
                self.settle(actions);
            }
            ReadEnd::Bytes { bytes, full } => {
                half.activity = Activity::Writing;
                half.account(bytes, full, limits);
                actions.push(Action::Write(direction));
            }
            ReadEnd::NoLoan if closing || half.write != WriteSide::Open => self.settle(actions),
            ReadEnd::NoLoan => {
                let (way, _) = half.begin_read();
                if way == crate::ring::Way::Splice {
                    half.demote();
                    let (way, eager) = half.begin_read();
                    actions.push(Action::Read { direction, way, eager });
                } else {
                    half.activity = Activity::Starved;
                }
            }
            // A reset is told once; a read after the write that was told it sees an end (tcp_recvmsg() with SOCK_DONE).
            ReadEnd::Eof if source_broken => {
                half.read = ReadSide::Broken;
                self.settle(actions);
            }
            ReadEnd::Eof => {
                half.read = ReadSide::Eof;
                if half.write == WriteSide::Open && !closing {
                    half.write = WriteSide::FinSent;
                    self.unwatch(direction.to(), actions);
                    actions.push(Action::SendFin(direction.to()));
                }
                self.settle(actions);
            }
            ReadEnd::Broken => {
                half.read = ReadSide::Broken;
                self.break_side(from, now, limits, actions);
            }
        }
    }

    fn on_wrote(&mut self, direction: Direction, actions: &mut Actions) {
        self.half_mut(direction).activity = Activity::Idle;
        self.unwatch(direction.from(), actions);
        if self.phase == Phase::Relaying && self.half(direction).write == WriteSide::Open {
            self.read(direction, actions);
        } else {
            self.settle(actions);
        }
    }

    /// Watches a side that is not read at the moment, unless a write to it would tell of a break anyway.
    fn watch(&mut self, side: Side, actions: &mut Actions) {
        let incoming = self.half(side.incoming());
        let told_anyway = matches!(incoming.activity, Activity::Writing | Activity::Blocked);
        // Once our FIN is sent to a side, its own FIN alone makes a poll tell of a hang-up; that is no break.
        let confusable = incoming.write != WriteSide::Open;
        let watch = &mut self.watches[side as usize];
        if *watch == Watching::No
            && !told_anyway
            && !confusable
            && self.broken.is_none()
            && self.phase == Phase::Relaying
        {
            *watch = Watching::Armed;
            actions.push(Action::Watch(side));
        }
    }

    fn unwatch(&mut self, side: Side, actions: &mut Actions) {
        let watch = &mut self.watches[side as usize];
        if *watch == Watching::Armed {
            *watch = Watching::Cancelled;
            actions.push(Action::Cancel(Operation::Watch(side)));
        }
    }

    fn on_broke(&mut self, side: Side, now: Instant, limits: &Limits, actions: &mut Actions) {
        let watch = std::mem::replace(&mut self.watches[side as usize], Watching::No);
        if watch == Watching::Cancelled && self.half(side.incoming()).write != WriteSide::Open {
            // The watch and its cancel crossed, and what it saw may be no more than a FIN in each direction.
            self.settle(actions);
        } else {
            self.break_side(side, now, limits, actions);
        }
    }

    fn break_side(&mut self, side: Side, now: Instant, limits: &Limits, actions: &mut Actions) {
        if self.phase == Phase::Relaying && self.broken.as_ref().is_some_and(|broken| broken.side != side) {
            // The other one broke before. There is nobody left to relay for.
            let reason =
                self.broken.as_ref().map_or(EndReason::Removed, |broken| EndReason::ResetBy(broken.side));
            self.close([true; 2], reason, actions);
            return;
        }
        if self.broken.is_none() && self.phase == Phase::Relaying {
            let give_up_at = now + limits.reset_drain_timeout;
            self.broken =
                Some(Box::new(Broken { side, give_up_at, pause: ACKNOWLEDGE_PAUSE_FIRST, measuring: false }));
            actions.push(Action::SetDeadline(give_up_at));
            let incoming = side.incoming();
            let half = self.half_mut(incoming);
            half.write = WriteSide::Broken;
            match half.activity {
                Activity::Starved => half.activity = Activity::Idle,
                Activity::Idle => {}
                _ => actions.push(Action::Cancel(Operation::Half(incoming))),
            }
            // Its last bytes are still to be read, even if it was the other half that noticed.
            self.read(side.outgoing(), actions);
        }
        self.settle(actions);
    }

    /// Ends the connection if nothing is left to do.
    fn settle(&mut self, actions: &mut Actions) {
        if let Phase::Closing { reset, reason } = self.phase {
            if !self.is_in_flight() {
                self.phase = Phase::Finished;
                actions.push(Action::Finish { reset, reason });
            }
            return;
        }
        if self.phase == Phase::Finished {
            return;
        }
        match &mut self.broken {
            None => {
                if self.halves.iter().all(|half| half.write == WriteSide::FinSent) {
                    self.close([false; 2], EndReason::Completed, actions);
                }
            }
            Some(broken) if !broken.measuring => {
                let side = broken.side;
                if self.halves[side.outgoing() as usize].drained()
                    && !self.halves[side.incoming() as usize].in_flight()
                {
                    broken.measuring = true;
                    actions.push(Action::MeasureUnacknowledged(side.other()));
                }
            }
            Some(_) => {}
        }
    }

    fn on_unacknowledged(&mut self, side: Side, bytes: usize, now: Instant, actions: &mut Actions) {
        let Some(broken) = &mut self.broken else { return };
        if !broken.measuring || broken.side != side.other() || self.phase != Phase::Relaying {
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
        match self.broken.as_deref().copied() {
            Some(broken) if self.phase == Phase::Relaying => {
                if now >= broken.give_up_at {
                    self.reset_other(actions);
                } else if broken.measuring {
                    actions.push(Action::MeasureUnacknowledged(broken.side.other()));
                }
            }
            _ => {}
        }
    }

    fn reset_other(&mut self, actions: &mut Actions) {
        let reason =
            self.broken.as_ref().map_or(EndReason::Removed, |broken| EndReason::ResetBy(broken.side));
        self.close([true; 2], reason, actions);
    }

    /// Cancels what is in flight, and finishes as soon as nothing is.
    fn close(&mut self, reset: [bool; 2], reason: EndReason, actions: &mut Actions) {
        if self.phase != Phase::Relaying {
            return;
        }
        self.phase = Phase::Closing { reset, reason };
        for direction in Direction::ALL {
            let half = self.half_mut(direction);
            if half.activity == Activity::Starved {
                half.activity = Activity::Idle;
            }
            if half.in_flight() {
                actions.push(Action::Cancel(Operation::Half(direction)));
            }
        }
        for side in Side::ALL {
            self.unwatch(side, actions);
        }
        if !self.is_in_flight() {
            self.phase = Phase::Finished;
            actions.push(Action::Finish { reset, reason });
        }
    }
}

impl Default for Connection {
    fn default() -> Connection {
        Connection::new()
    }
}
