//! Carrying out what a connection's machine asks for.

use super::{Relayed, Shard, Stage, Timer};
use crate::error::EndReason;
use crate::relay::{Action, Direction, Input, Operation, ReadEnd, Side};
use crate::ring::{Borrowed, Op, Outcome, Received, Ring, Submitted, Token, Way};
use crate::table::{SlotId, TokenParts};

fn token(id: SlotId, operation: Operation) -> Token {
    TokenParts { kind: u8::try_from(operation.index()).unwrap_or(u8::MAX), id }.pack()
}

impl<R: Ring> Shard<R> {
    /// An operation of a relayed connection is over.
    pub(super) fn on_relay_completion(&mut self, id: SlotId, operation: Operation, outcome: Outcome<R>) {
        if let Some(input) = self.input_of(id, operation, outcome) {
            self.drive(id, input);
        }
    }

    /// Steps a machine and carries out its actions, and what follows from those that are done at once.
    pub(super) fn drive(&mut self, id: SlotId, input: Input) {
        let mut actions = std::mem::take(&mut self.actions);
        let mut moved = [0; 2];
        let mut input = Some(input);
        let mut next = 0;
        loop {
            if let Some(input) = input.take() {
                let Some(connection) = self.connections.entry_mut(id) else { break };
                let Stage::Relaying(machine) = &mut connection.stage else { break };
                machine.on(input, self.now, &self.limits, &mut actions);
            }
            let Some(action) = actions.get(next).copied() else { break };
            next += 1;
            input = self.perform(id, action, &mut moved);
        }
        actions.clear();
        self.actions = actions;
    }

    /// Carries out one action; gives the input that followed at once, if one did.
    fn perform(&mut self, id: SlotId, action: Action, moved: &mut [usize; 2]) -> Option<Input> {
        let connection = self.connections.entry_mut(id)?;
        match action {
            Action::Read { direction, way, eager } => {
                if moved[direction as usize] >= self.limits.turn_bytes {
                    connection.deferred[direction as usize] = Some((way, eager));
                    self.yielded.push_back((id, direction));
                    return None;
                }
                self.read(id, direction, way, eager)
            }
            Action::Write(direction) => {
                let loan = connection.loans[direction as usize].take()?;
                moved[direction as usize] += loan.bytes();
                let socket = connection.sockets[direction.to() as usize].clone()?;
                let input = self.submit(id, Operation::Half(direction), Op::Send { socket, loan });
                // The machine is told when a write has to wait, for then its source is not read.
                input.or(Some(Input::Blocked(direction)))
            }
            Action::SendFin(side) => {
                let socket = connection.sockets[side as usize].as_ref()?;
                self.ring.shutdown_write(socket).is_err().then_some(Input::FinFailed(side))
            }
            Action::Watch(side) => {
                let socket = connection.sockets[side as usize].clone()?;
                self.submit(id, Operation::Watch(side), Op::Watch { socket })
            }
            Action::Cancel(operation) => self.cancel(id, operation),
            Action::MeasureUnacknowledged(side) => {
                let socket = connection.sockets[side as usize].as_ref()?;
                let bytes = self.ring.unacknowledged_bytes(socket);
                Some(Input::Unacknowledged(side, bytes))
            }
            Action::SetDeadline(at) => {
                let timer = Timer::Connection(id);
                Self::set_timer(&mut self.timers, timer, &mut connection.deadline, Some(at));
                None
            }
            Action::Finish { reset, reason } => {
                self.end(id, reset, reason);
                None
            }
        }
    }

    fn read(&mut self, id: SlotId, direction: Direction, way: Way, eager: bool) -> Option<Input> {
        let socket = self.connections.entry(id)?.sockets[direction.from() as usize].clone()?;
        self.submit(id, Operation::Half(direction), Op::Recv { socket, way, eager })
    }

    fn submit(&mut self, id: SlotId, operation: Operation, op: Op<R>) -> Option<Input> {
        match self.ring.submit(token(id, operation), op) {
            Submitted::Done(outcome) => self.input_of(id, operation, outcome),
            Submitted::Pending(key) => {
                let connection = self.connections.entry_mut(id)?;
                debug_assert!(
                    connection.keys[operation.place()].is_none(),
                    "one operation of a kind at a time"
                );
                connection.keys[operation.place()] = Some(key);
                None
            }
        }
    }

    fn cancel(&mut self, id: SlotId, operation: Operation) -> Option<Input> {
        if let Operation::Half(direction) = operation
            && self.take_deferred(id, direction)
        {
            return Some(Input::Cancelled(operation));
        }
        let key = self.connections.entry(id)?.keys[operation.place()]?;
        self.ring.cancel(key);
        None
    }

    /// What an outcome means to the machine. What was read is kept until the machine asks to write it.
    fn input_of(&mut self, id: SlotId, operation: Operation, outcome: Outcome<R>) -> Option<Input> {
        let direction = match operation {
            Operation::Half(direction) => direction,
            Operation::Watch(side) => {
                return Some(match outcome {
                    Outcome::Cancelled(_) => Input::Cancelled(operation),
                    _ => Input::Broke(side),
                });
            }
            Operation::Connect => return None,
        };
        let connection = self.connections.entry_mut(id)?;
        Some(match outcome {
            Outcome::Received(Received::Bytes(loan)) => {
                let bytes = loan.bytes();
                count_bytes(&mut self.listeners, connection, direction, bytes);
                connection.loans[direction as usize] = Some(loan);
                Input::Read(direction, ReadEnd::Bytes { bytes, full: bytes >= self.limits.lease_bytes })
            }
            Outcome::Received(Received::Eof) => Input::Read(direction, ReadEnd::Eof),
            Outcome::Received(Received::NoLoan(way)) => {
                // A direction that could have no pipe copies, so only a lack of buffers makes it wait.
                if way == Way::Copy {
                    self.starved.push_back((id, direction));
                }
                Input::Read(direction, ReadEnd::NoLoan)
            }
            Outcome::Received(Received::Failed(_)) => Input::Read(direction, ReadEnd::Broken),
            Outcome::Sent(_, Ok(())) => Input::Wrote(direction),
            Outcome::Sent(_, Err(_)) => Input::WriteFailed(direction),
            other => {
                drop(other);
                Input::Cancelled(operation)
            }
        })
    }

    /// Closes both sockets and forgets the connection.
    pub(super) fn end(&mut self, id: SlotId, reset: [bool; 2], reason: EndReason) {
        let Some(mut connection) = self.connections.remove(id) else { return };
        debug_assert!(connection.keys.iter().all(Option::is_none), "nothing is closed while it is in flight");
        if let Some(at) = connection.deadline.take() {
            self.timers.remove(&(at, Timer::Connection(id)));
        }
        for side in Side::ALL {
            if let Some(socket) = &connection.sockets[side as usize]
                && reset[side as usize]
            {
                self.ring.reset_on_close(socket);
            }
        }
        let listener = connection.listener;
        drop(connection);
        if let Some(stats) = self.stats_mut(listener) {
            stats.open -= 1;
            match reason {
                EndReason::Completed => stats.completed += 1,
                EndReason::ResetBy(Side::Downstream) => stats.reset_by_downstream += 1,
                EndReason::ResetBy(Side::Upstream) => stats.reset_by_upstream += 1,
                EndReason::Refused | EndReason::TimedOut | EndReason::UpstreamLost => stats.refused += 1,
                EndReason::PortsExhausted | EndReason::DescriptorsExhausted => stats.exhausted += 1,
                EndReason::Removed => {}
            }
        }
        self.forget_listener(listener);
    }

    /// Lets those read on that had used up their turn.
    pub(super) fn resume_yielded(&mut self) {
        for _ in 0..self.yielded.len() {
            let Some((id, direction)) = self.yielded.pop_front() else { return };
            let Some(connection) = self.connections.entry_mut(id) else { continue };
            let Some((way, eager)) = connection.deferred[direction as usize].take() else { continue };
            if let Some(input) = self.read(id, direction, way, eager) {
                self.drive(id, input);
            }
        }
    }

    pub(super) fn can_feed_starved(&self) -> bool {
        !self.starved.is_empty() && self.ring.can_lend(Way::Copy)
    }

    /// Lets those read on that waited for a loan, as long as there are loans. Whoever finds none again waits at the end.
    pub(super) fn feed_starved(&mut self) {
        for _ in 0..self.starved.len() {
            if !self.ring.can_lend(Way::Copy) {
                return;
            }
            let Some((id, direction)) = self.starved.pop_front() else { return };
            self.drive(id, Input::LoanFree(direction));
        }
    }
}

fn count_bytes<R: Ring>(
    listeners: &mut crate::table::Table<crate::listener::Listener<R::Socket>>,
    connection: &Relayed<R>,
    direction: Direction,
    bytes: usize,
) {
    if let Some(listener) = listeners.entry_mut(connection.listener) {
        let counter = match direction {
            Direction::Up => &mut listener.stats.bytes_up,
            Direction::Down => &mut listener.stats.bytes_down,
        };
        *counter += u64::try_from(bytes).unwrap_or(u64::MAX);
    }
}
