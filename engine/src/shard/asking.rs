//! From an accepted client to a server that the driver connects to: a request over the channel, a socket back.

use super::{KIND_ASK, KIND_HEAR, Shard, Stage};
use crate::command::Ending;
use crate::error::EndReason;
use crate::opener::DialFailure;
use crate::opener::client::StockError;
use crate::relay::Side;
use crate::ring::{Dialled, Op, Outcome, Ring, Submitted};
use crate::table::{SlotId, TokenParts};

impl<R: Ring> Shard<R> {
    /// Has the driver dial for a connection, which waits for the answer no longer than for any connect.
    pub(super) fn ask_to_dial(&mut self, id: SlotId, upstream_slot: SlotId) {
        let Some(connection) = self.connections.entry_mut(id) else { return };
        let Some(listener) = self.listeners.entry(connection.listener) else { return };
        let Some(upstream) = self.upstreams.entry_mut(upstream_slot) else { return };
        let Some(dials) = &mut upstream.dials else { return };
        connection.stage = Stage::Asking(dials.begin(id, listener.target_port));
        self.await_with_deadline(id);
        self.send_dials(upstream_slot);
    }

    /// Sends what is to be asked for, as far as the channel has room.
    fn send_dials(&mut self, id: SlotId) {
        loop {
            let Some(upstream) = self.upstreams.entry_mut(id) else { return };
            if upstream.closing.is_some() {
                return;
            }
            let channel = upstream.channel.clone();
            let Some(dials) = &mut upstream.dials else { return };
            let Some((dial, port)) = dials.next_to_ask() else { return };
            let op = Op::Ask { channel, dial, port };
            match self.ring.submit(TokenParts { kind: KIND_ASK, id }.pack(), op) {
                Submitted::Pending(key) => {
                    dials.asking = Some(key);
                    return;
                }
                Submitted::Done(outcome) => self.on_ask(id, &outcome),
            }
        }
    }

    pub(super) fn on_asked(&mut self, id: SlotId, outcome: &Outcome<R>) {
        if let Some(dials) = self.dials_of(id) {
            dials.asking = None;
        }
        self.on_ask(id, outcome);
        self.forget_upstream(id);
        self.send_dials(id);
    }

    fn on_ask(&mut self, id: SlotId, outcome: &Outcome<R>) {
        if let Outcome::Asked(Err(error)) = outcome {
            self.let_go_of_upstream(id, Ending::Drain, Some(reason(error)));
        }
    }

    fn dials_of(&mut self, id: SlotId) -> Option<&mut crate::upstream::Dials> {
        self.upstreams.entry_mut(id)?.dials.as_mut()
    }

    /// Waits for the next answer.
    pub(super) fn hear(&mut self, id: SlotId) {
        loop {
            let Some(upstream) = self.upstreams.entry_mut(id) else { return };
            let (channel, closing) = (upstream.channel.clone(), upstream.closing.is_some());
            let Some(dials) = upstream.dials.as_mut().filter(|dials| !closing && dials.hearing.is_none())
            else {
                return;
            };
            match self.ring.submit(TokenParts { kind: KIND_HEAR, id }.pack(), Op::Hear { channel }) {
                Submitted::Pending(key) => {
                    dials.hearing = Some(key);
                    return;
                }
                Submitted::Done(outcome) => self.on_hear(id, outcome),
            }
        }
    }

    pub(super) fn on_heard(&mut self, id: SlotId, outcome: Outcome<R>) {
        if let Some(dials) = self.dials_of(id) {
            dials.hearing = None;
        }
        self.on_hear(id, outcome);
        self.forget_upstream(id);
        self.hear(id);
    }

    fn on_hear(&mut self, id: SlotId, outcome: Outcome<R>) {
        match outcome {
            Outcome::Heard(Ok(Dialled { dial, result })) => {
                let waiting = self.dials_of(id).and_then(|dials| dials.end(dial));
                match (waiting, result) {
                    (Some(connection), Ok(socket)) => self.on_dialled(connection, socket),
                    (Some(connection), Err(why)) => self.fail(connection, end_reason(why)),
                    // Nobody is there for it any more, which the server inside is told by a reset as it would be by its client.
                    (None, Ok(socket)) => self.ring.reset_on_close(&socket),
                    (None, Err(_)) => {}
                }
            }
            // One socket got lost on the way; whoever waits for it does so in vain, until its time is up.
            Outcome::Heard(Err(StockError::Exhausted(_))) => {
                self.degrade("no descriptors are left for connections, so some are reset (ulimit -n)");
            }
            Outcome::Heard(Err(error)) => {
                self.let_go_of_upstream(id, Ending::Drain, Some(reason(&error)));
            }
            other => drop(other),
        }
    }

    fn on_dialled(&mut self, id: SlotId, socket: R::Socket) {
        let Some(connection) = self.connections.entry_mut(id) else {
            return self.ring.reset_on_close(&socket);
        };
        connection.sockets[Side::Upstream as usize] = Some(socket);
        self.establish(id);
    }
}

fn reason(error: &StockError) -> String {
    match error {
        StockError::Gone => {
            "whoever dialled for it has gone, so the container can no longer be reached".to_owned()
        }
        StockError::Hostile(what) => format!("the answer to a dial was not one: {what}"),
        other => other.to_string(),
    }
}

fn end_reason(why: DialFailure) -> EndReason {
    match why {
        DialFailure::Refused => EndReason::Refused,
        DialFailure::TimedOut => EndReason::TimedOut,
        DialFailure::Exhausted => EndReason::DescriptorsExhausted,
    }
}
