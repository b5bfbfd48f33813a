//! The loop of one thread: one ring, one table of connections, nothing shared.
//!
//! A turn reaps what is over, steps the machines it belongs to, carries out what they ask for, and goes round again;
//! commands are taken between turns. Everything the ring can do at once is done at once, so a busy connection would
//! never let go: after [`Limits::turn_bytes`] in one direction its next read waits until the others had their turn.
//!
//! | Table | Its operations | Removed when |
//! | --- | --- | --- |
//! | connections | [`Operation`] | its machine has finished: nothing is in flight, nothing is on loan |
//! | listeners | one accept for each socket | it is closed, no accept is in flight, no connection is left |
//! | upstreams | one request for sockets and one watch, or one request to dial and one wait for answers | it is closing and none is in flight |
//!
//! So no descriptor is closed, and no slot reused, while the ring may still tell something about it.

mod accepting;
mod asking;
mod commands;
mod dialling;
mod peers;
mod relaying;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::time::Instant;

use crate::command::{ForwardId, ForwardState, ForwardStats, UpstreamId};
use crate::limits::Limits;
use crate::listener::Listener;
use crate::relay::{Actions, Connection, Dial, Direction, Operation};
use crate::ring::{Completion, OpKey, Ring, RingError, Way};
use crate::table::{SlotId, Table, TokenParts};
use crate::upstream::Upstream;

pub use commands::{Lent, Report, ShardCommand};
pub use peers::{Peer, Peers};

/// Token kinds below this are an [`Operation`]; from here on, the accept of a listener's socket of that index.
const KIND_ACCEPT: u8 = 16;
const KIND_STOCK: u8 = 32;
const KIND_UPSTREAM_WATCH: u8 = 33;
const KIND_ASK: u8 = 34;
const KIND_HEAR: u8 = 35;

/// One ring and everything that it relays.
pub struct Shard<R: Ring> {
    ring: R,
    limits: Limits,
    connections: Table<Relayed<R>>,
    listeners: Table<Listener<R::Socket>>,
    upstreams: Table<Upstream<R::Socket>>,
    forwards: HashMap<ForwardId, SlotId>,
    upstream_slots: HashMap<UpstreamId, SlotId>,
    timers: BTreeSet<(Instant, Timer)>,
    /// Directions that have used up their turn.
    yielded: VecDeque<(SlotId, Direction)>,
    /// Directions that wait for a loan, the longest waiting first.
    starved: VecDeque<(SlotId, Direction)>,
    /// Listeners that have used up their turn, or wait for a free place.
    accept_later: VecDeque<SlotId>,
    /// The time of this turn. A clock read for each message would be seen in a profile.
    now: Instant,
    completions: Vec<Completion<R>>,
    actions: Actions,
    reports: Vec<Report>,
    /// Descriptors ran out, and it was told; if they do not run out again until then, it is over.
    degraded_until: Option<Instant>,
    stopping: Option<Stopping>,
    told_stopped: bool,
    peers: Option<Peers>,
}

/// What a timer wakes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    Connection(SlotId),
    Listener(SlotId),
    Upstream(SlotId),
    Recovery,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stopping {
    /// Ends when the last connection has.
    Drain,
    /// Ends when everything is cancelled.
    Now,
}

/// A connection in the table.
struct Relayed<R: Ring> {
    listener: SlotId,
    sockets: [Option<R::Socket>; 2],
    /// What was read and is not yet being written.
    loans: [Option<R::Loan>; 2],
    /// Reads that wait for the next turn.
    deferred: [Option<(Way, bool)>; 2],
    /// The operations in flight, by [`Operation::place`].
    keys: [Option<OpKey>; Operation::PLACES],
    stage: Stage,
    deadline: Option<Instant>,
}

#[derive(Debug)]
enum Stage {
    /// On its way to the server.
    Dialling(Dial),
    /// The driver was, or is to be, asked for this dial.
    Asking(u64),
    /// Dialling has failed; it ends when the connect that was cancelled is over.
    Failing(crate::error::EndReason),
    /// Both sides are connected.
    Relaying(Connection),
}

impl<R: Ring> Shard<R> {
    /// An empty shard.
    pub fn new(ring: R, limits: Limits) -> Shard<R> {
        Shard {
            now: ring.now(),
            ring,
            limits,
            connections: Table::new(),
            listeners: Table::new(),
            upstreams: Table::new(),
            forwards: HashMap::new(),
            upstream_slots: HashMap::new(),
            timers: BTreeSet::new(),
            yielded: VecDeque::new(),
            starved: VecDeque::new(),
            accept_later: VecDeque::new(),
            completions: Vec::new(),
            actions: Actions::new(),
            reports: Vec::new(),
            degraded_until: None,
            stopping: None,
            told_stopped: false,
            peers: None,
        }
    }

    /// The ring, for what only its kind can do.
    pub fn ring_mut(&mut self) -> &mut R {
        &mut self.ring
    }

    /// Connections in the table, waiting ones included.
    pub fn connections(&self) -> usize {
        self.connections.len()
    }

    /// Whether the last [`Report::Stopped`] was given: the shard holds nothing any more.
    pub fn is_stopped(&self) -> bool {
        self.told_stopped
    }

    /// What happened since the last call.
    pub fn reports(&mut self) -> std::vec::Drain<'_, Report> {
        self.reports.drain(..)
    }

    /// One round: waits until something is over, and steps what it belongs to.
    ///
    /// # Errors
    /// The ring is broken; the shard cannot go on.
    pub fn turn(&mut self) -> Result<(), RingError> {
        let ready = !self.yielded.is_empty() || self.can_accept_later() || self.can_feed_starved();
        let until = if ready { Some(self.now) } else { self.timers.first().map(|(at, _)| *at) };
        let mut completions = std::mem::take(&mut self.completions);
        let turned = self.ring.turn(until, &mut completions);
        self.now = self.ring.now();
        // A reset is told once, to a send or to a read, and whoever reads after that sees an end. Were the send's failure still
        // to come when a read is begun, that end would be passed on as a FIN.
        if completions.iter().any(|completion| completion.outcome.tells_a_break()) {
            completions.sort_by_key(|completion| !completion.outcome.tells_a_break());
        }
        for completion in completions.drain(..) {
            self.dispatch(completion);
        }
        self.completions = completions;
        turned?;
        self.run_timers();
        self.resume_yielded();
        self.feed_starved();
        self.resume_accepting();
        self.finish_stopping();
        if let Some(peers) = &self.peers {
            peers.tell_load(self.connections.len());
        }
        Ok(())
    }

    fn dispatch(&mut self, completion: Completion<R>) {
        let TokenParts { kind, id } = TokenParts::unpack(completion.token);
        match (kind, completion.outcome) {
            (KIND_STOCK, outcome) => self.on_stocked(id, outcome),
            (KIND_UPSTREAM_WATCH, outcome) => self.on_upstream_watch(id, &outcome),
            (KIND_ASK, outcome) => self.on_asked(id, &outcome),
            (KIND_HEAR, outcome) => self.on_heard(id, outcome),
            (kind, outcome) if kind >= KIND_ACCEPT => {
                self.on_accept_completion(id, usize::from(kind - KIND_ACCEPT), outcome);
            }
            (kind, outcome) => {
                let Some(operation) = Operation::of_index(usize::from(kind)) else { return };
                if let Some(connection) = self.connections.entry_mut(id) {
                    connection.keys[operation.place()] = None;
                }
                match operation {
                    Operation::Connect => self.on_connect_completion(id, outcome),
                    operation => self.on_relay_completion(id, operation, outcome),
                }
            }
        }
    }

    /// Moves a timer. `slot` holds the time for which it is set now.
    fn set_timer(
        timers: &mut BTreeSet<(Instant, Timer)>,
        timer: Timer,
        slot: &mut Option<Instant>,
        at: Option<Instant>,
    ) {
        if let Some(old) = slot.take() {
            timers.remove(&(old, timer));
        }
        if let Some(at) = at {
            timers.insert((at, timer));
            *slot = Some(at);
        }
    }

    fn run_timers(&mut self) {
        if self.timers.is_empty() {
            return;
        }
        while let Some((at, timer)) = self.timers.first().copied() {
            if at > self.now {
                return;
            }
            self.timers.pop_first();
            match timer {
                Timer::Connection(id) => {
                    if let Some(connection) = self.connections.entry_mut(id) {
                        connection.deadline = None;
                    }
                    self.on_connection_deadline(id);
                }
                Timer::Listener(id) => {
                    if let Some(listener) = self.listeners.entry_mut(id) {
                        listener.resting_until = None;
                    }
                    self.accept_all(id);
                }
                Timer::Recovery => {
                    self.degraded_until = None;
                    self.reports
                        .push(Report::Recovered { what: "descriptors are available again".to_owned() });
                }
                Timer::Upstream(id) => {
                    if let Some(upstream) = self.upstreams.entry_mut(id) {
                        upstream.resting_until = None;
                    }
                    self.refill(id);
                }
            }
        }
    }

    /// The forwards of this shard, those that drain included.
    fn describe(&self) -> Vec<ForwardState> {
        let mut forwards: Vec<ForwardState> = self
            .listeners
            .ids()
            .into_iter()
            .filter_map(|id| self.listeners.entry(id))
            .map(Listener::state)
            .collect();
        forwards.sort_by_key(|state| state.forward);
        forwards
    }

    fn stats_mut(&mut self, listener: SlotId) -> Option<&mut ForwardStats> {
        self.listeners.entry_mut(listener).map(|listener| &mut listener.stats)
    }

    /// Tells that descriptors are used up, once for as long as it lasts. Where they are scarce one is free now and then, so
    /// it is over only when whoever rested has tried again and found none missing.
    fn degrade(&mut self, what: &str) {
        if self.degraded_until.is_none() {
            self.reports.push(Report::Degraded { what: what.to_owned() });
        }
        let until = Some(self.now + 3 * self.limits.exhausted_pause);
        Self::set_timer(&mut self.timers, Timer::Recovery, &mut self.degraded_until, until);
    }
}
