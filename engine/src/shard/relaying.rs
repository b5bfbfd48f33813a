//! Moving bytes: handles the events of relayed connections, and carries out the actions of their state machines.
//!
//! [`Shard::pump`] moves nearly every byte: it reads, writes, and repeats while the source may have more. It steps the
//! machine only if it ends for another reason than an empty source.

use super::{Relayed, Shard, Stage, Timer};
use crate::error::EndReason;
use crate::reactor::{Poller, Readiness, Sent, SocketIo, Transfer, TransferMode};
use crate::relay::{Action, Connection, Direction, Input, ReadEnd, Side};
use crate::table::SlotId;

/// The events after which a write of held bytes is tried. On a broken connection the write fails.
const WRITABLE: Readiness = Readiness::OUT.union(Readiness::ERR).union(Readiness::HUP);

impl<P: Poller> Shard<P> {
    /// Handles a change of readiness of one side of a connection.
    pub(super) fn on_side_ready(&mut self, id: SlotId, side: Side) {
        // The connection may have ended earlier in the same batch of events.
        let Some(connection) = self.connections.entry(id) else { return };
        match &connection.stage {
            Stage::Relaying(machine) => {
                let Some(key) = connection.keys[side as usize] else { return };
                let ready = self.reactor.readiness(key);
                if machine.is_blocked(side.incoming())
                    && ready.intersects(WRITABLE)
                    && let Some(input) = self.write_held(id, side.incoming())
                {
                    self.drive(id, input);
                }
                if let Some(input) = self.pump(id, side.outgoing()) {
                    self.drive(id, input);
                }
                // The error is handled after the read, since bytes and a FIN that preceded a reset count. A blocked
                // direction does not read, and gets the reset only here.
                if ready.contains(Readiness::ERR) {
                    self.drive(id, Input::Broke(side));
                }
            }
            Stage::Dialling(_) if side == Side::Upstream => self.on_connecting(id),
            // The readiness of the client stays in the table until its server is connected.
            Stage::Dialling(_) | Stage::Asking(_) => {}
        }
    }

    /// Moves bytes of one direction while it reads, its source has bytes, and its budget lasts. Returns the event that ended
    /// this, if the machine needs it.
    fn pump(&mut self, id: SlotId, direction: Direction) -> Option<Input> {
        let Relayed { listener, keys, held, yielded, stage, .. } = self.connections.entry_mut(id)?;
        let Stage::Relaying(machine) = stage else { return None };
        if yielded[direction as usize] {
            return None;
        }
        let (from, to) = (keys[direction.from() as usize]?, keys[direction.to() as usize]?);
        let mut moved = 0;
        let mut input = None;
        while let Some(mode) = machine.reads(direction)
            && self.reactor.is_readable(from)
        {
            if moved >= self.limits.turn_bytes {
                yielded[direction as usize] = true;
                self.yielded.push_back((id, direction));
                break;
            }
            let ended = match self.reactor.transfer(from, to, mode) {
                Transfer::Moved { bytes, full } => {
                    moved += bytes;
                    machine.moved(direction, bytes, full, &self.limits);
                    continue;
                }
                Transfer::Blocked { bytes, held: rest } => {
                    moved += bytes;
                    machine.moved(direction, bytes, bytes >= self.limits.buffer_bytes, &self.limits);
                    held[direction as usize] = Some(rest);
                    Some(Input::Blocked(direction))
                }
                Transfer::WriteFailed { bytes } => {
                    moved += bytes;
                    Some(Input::WriteFailed(direction))
                }
                Transfer::Empty => None,
                Transfer::Eof => Some(Input::Read(direction, ReadEnd::Eof)),
                Transfer::ReadFailed => Some(Input::Read(direction, ReadEnd::Broken)),
                Transfer::Unavailable(mode) => {
                    // A direction that finds no pipe copies, so only a lack of buffers makes it wait.
                    if mode == TransferMode::Copy {
                        self.starved.push_back((id, direction));
                    }
                    Some(Input::Read(direction, ReadEnd::Unavailable(mode)))
                }
            };
            input = ended;
            break;
        }
        let listener = *listener;
        if moved > 0
            && let Some(stats) = self.stats_mut(listener)
        {
            let counter = match direction {
                Direction::Up => &mut stats.bytes_up,
                Direction::Down => &mut stats.bytes_down,
            };
            *counter += u64::try_from(moved).unwrap_or(u64::MAX);
        }
        input
    }

    /// Writes the held bytes of a direction. Returns the result, unless the destination is still full.
    fn write_held(&mut self, id: SlotId, direction: Direction) -> Option<Input> {
        let connection = self.connections.entry_mut(id)?;
        let to = connection.keys[direction.to() as usize]?;
        let held = &mut connection.held[direction as usize];
        let sent = self.reactor.write(to, held.as_mut()?);
        if sent == Sent::Blocked {
            return None;
        }
        *held = None;
        Some(if sent == Sent::All { Input::Wrote(direction) } else { Input::WriteFailed(direction) })
    }

    /// Steps a machine and carries out its actions, and the resulting inputs.
    pub(super) fn drive(&mut self, id: SlotId, input: Input) {
        let mut actions = std::mem::take(&mut self.actions);
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
            input = self.perform(id, action);
        }
        actions.clear();
        self.actions = actions;
    }

    /// Carries out one action. Returns the input that results from it, if any.
    fn perform(&mut self, id: SlotId, action: Action) -> Option<Input> {
        match action {
            Action::Read(direction) => self.pump(id, direction),
            Action::Discard(direction) => {
                self.connections.entry_mut(id)?.held[direction as usize] = None;
                None
            }
            Action::SendFin(side) => {
                let key = self.connections.entry(id)?.keys[side as usize]?;
                let sent = self.reactor.on_socket(key, |io, socket| io.shutdown_write(socket))?;
                sent.is_err().then_some(Input::FinFailed(side))
            }
            Action::MeasureUnacknowledged(side) => {
                let key = self.connections.entry(id)?.keys[side as usize]?;
                let bytes = self.reactor.on_socket(key, |io, socket| io.unacknowledged_bytes(socket))?;
                Some(Input::Unacknowledged(side, bytes))
            }
            Action::SetDeadline(at) => {
                let connection = self.connections.entry_mut(id)?;
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

    /// Closes both sockets and removes the connection.
    pub(super) fn end(&mut self, id: SlotId, reset: [bool; 2], reason: EndReason) {
        let Some(mut connection) = self.connections.remove(id) else { return };
        if let Some(at) = connection.deadline.take() {
            self.timers.remove(&(at, Timer::Connection(id)));
        }
        for side in Side::ALL {
            let Some(key) = connection.keys[side as usize] else { continue };
            if reset[side as usize] {
                self.reactor.on_socket(key, |io, socket| io.reset_on_close(socket));
            }
            self.reactor.close(key);
        }
        let listener = connection.listener;
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
        self.remove_listener_if_done(listener);
    }

    /// Continues with the directions that had used up their budget.
    pub(super) fn resume_yielded(&mut self) {
        for _ in 0..self.yielded.len() {
            let Some((id, direction)) = self.yielded.pop_front() else { return };
            let Some(connection) = self.connections.entry_mut(id) else { continue };
            connection.yielded[direction as usize] = false;
            if let Some(input) = self.pump(id, direction) {
                self.drive(id, input);
            }
        }
    }

    pub(super) fn can_feed_starved(&self) -> bool {
        !self.starved.is_empty() && self.reactor.can_lend(TransferMode::Copy)
    }

    /// Continues with the directions that waited for a buffer, while buffers are free. One that finds no buffer goes back to
    /// the end of the queue.
    pub(super) fn feed_starved(&mut self) {
        for _ in 0..self.starved.len() {
            if !self.can_feed_starved() {
                return;
            }
            let Some((id, direction)) = self.starved.pop_front() else { return };
            self.drive(id, Input::BufferFree(direction));
        }
    }

    /// Starts to relay after the server is connected. `broken`: the server has reset the connection since, as the kernel
    /// reported.
    pub(super) fn establish(&mut self, id: SlotId, broken: bool) {
        let Some(connection) = self.connections.entry_mut(id) else { return };
        connection.stage = Stage::Relaying(Connection::new());
        if let [Some(downstream), Some(upstream)] = connection.keys {
            self.reactor.pair(downstream, upstream);
        }
        Self::set_timer(&mut self.timers, Timer::Connection(id), &mut connection.deadline, None);
        if broken {
            // The break is handled first, because from then on a read ends as if by a FIN.
            self.drive(id, Input::Broke(Side::Upstream));
        }
        self.drive(id, Input::Start);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reactor::PooledBuffer;

    #[test]
    fn an_idle_connection_is_small() {
        // Two entries of the readiness table, one of the connections.
        assert!(2 * 24 + size_of::<Relayed<PooledBuffer>>() + 8 <= 200);
    }
}
