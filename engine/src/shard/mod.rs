//! A shard: one thread with one reactor and one table of connections, which shares no state with other threads.
//!
//! A turn waits for events, moves the bytes of each connection that has an event, and carries out commands between turns.
//! For the common event, "readable", the bytes are read and written at once (`relaying.rs`), and the state machine of the
//! connection is not stepped. It is stepped for a blocked write, the end of a stream, an error, and a change of mode. So
//! that a busy connection does not starve the others, its next read waits for them after [`Limits::turn_bytes`] in one
//! direction.
//!
//! | Table | Registered | Removed when |
//! | --- | --- | --- |
//! | connections | both sockets, until the end | its machine has finished, or the dial has failed |
//! | listeners | each listening socket | its sockets are closed in the kernel and its connections have ended |
//! | upstreams | the channel | its listeners are closed |
//!
//! An id of a table carries a generation, so an event for a connection that ended earlier in the same batch finds no entry.

mod accepting;
mod commands;
mod dialling;
mod listener;
mod peers;
mod relaying;
mod upstream;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::time::Instant;

use crate::command::{ForwardId, ForwardState, ForwardStats, UpstreamId};
use crate::limits::Limits;
use crate::reactor::{BufferOf, Event, EventKind, Key, Poller, Reactor, ReactorError, SocketOf, Token};
use crate::relay::{Actions, Connection, Dial, Direction, Side};
use crate::table::{SlotId, Table, TokenParts};
use listener::Listener;
use upstream::Upstream;

pub use commands::{Lent, Report, ShardCommand};
pub use peers::{Peer, Peers};

/// Token kinds below this are a [`Side`] of a connection; from here on, a listener's socket of that index.
const KIND_LISTENER: u8 = 16;
const KIND_UPSTREAM: u8 = 32;

/// One reactor and everything that it relays.
pub struct Shard<P: Poller> {
    reactor: Reactor<P>,
    limits: Limits,
    connections: Table<Relayed<BufferOf<P>>>,
    listeners: Table<Listener>,
    upstreams: Table<Upstream<SocketOf<P>>>,
    forwards: HashMap<ForwardId, SlotId>,
    upstream_slots: HashMap<UpstreamId, SlotId>,
    timers: BTreeSet<(Instant, Timer)>,
    /// Connects that started since the last turn and have no timer yet: on loopback nearly all finish within one turn.
    fresh_dials: Vec<SlotId>,
    /// Directions that have used up their budget of this turn.
    yielded: VecDeque<(SlotId, Direction)>,
    /// Directions that wait for a buffer, the oldest first.
    starved: VecDeque<(SlotId, Direction)>,
    /// Listeners that have used up their budget, or wait for room in the table.
    accept_later: VecDeque<SlotId>,
    /// The time of this turn. Reading the clock for each message would cost too much.
    now: Instant,
    events: Vec<Event>,
    actions: Actions,
    reports: Vec<Report>,
    /// When the sockets that the kernel refused to register are registered again.
    registering_at: Option<Instant>,
    /// Descriptors ran out, which was reported; the shortage is over if no other one occurs before this time.
    degraded_until: Option<Instant>,
    stopping: Option<Stopping>,
    stopped: bool,
    peers: Option<Peers>,
}

/// The object of a timer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    Connection(SlotId),
    Listener(SlotId),
    Upstream(SlotId),
    Registration,
    Recovery,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stopping {
    /// Ends after the last connection.
    Drain,
    /// Ends after everything is closed.
    Now,
}

/// A connection in the table. It is small, because thousands are idle at the same time.
#[derive(Debug)]
struct Relayed<B> {
    listener: SlotId,
    /// The registered sockets, by [`Side`].
    keys: [Option<Key>; 2],
    /// Bytes that were read and that the destination did not accept, by [`Direction`].
    held: [Option<B>; 2],
    /// Whether the direction is in [`Shard::yielded`].
    yielded: [bool; 2],
    stage: Stage,
    deadline: Option<Instant>,
}

#[derive(Debug)]
enum Stage {
    /// The connect to the server is in progress, or waits for a socket.
    Dialling(Dial),
    /// The dial with this number was sent to the driver, or waits for that.
    Asking(u64),
    /// Both sides are connected.
    Relaying(Connection),
}

impl<P: Poller> Shard<P> {
    /// Creates an empty shard.
    pub fn new(reactor: Reactor<P>, limits: Limits) -> Shard<P> {
        Shard {
            now: reactor.now(),
            reactor,
            limits,
            connections: Table::new(),
            listeners: Table::new(),
            upstreams: Table::new(),
            forwards: HashMap::new(),
            upstream_slots: HashMap::new(),
            timers: BTreeSet::new(),
            fresh_dials: Vec::new(),
            yielded: VecDeque::new(),
            starved: VecDeque::new(),
            accept_later: VecDeque::new(),
            events: Vec::new(),
            actions: Actions::new(),
            reports: Vec::new(),
            registering_at: None,
            degraded_until: None,
            stopping: None,
            stopped: false,
            peers: None,
        }
    }

    /// Returns the reactor, for operations that depend on its poller.
    pub fn reactor_mut(&mut self) -> &mut Reactor<P> {
        &mut self.reactor
    }

    /// Returns the number of connections in the table, including those that wait.
    pub fn connections(&self) -> usize {
        self.connections.len()
    }

    /// Whether [`Report::Stopped`] was reported: the shard is empty.
    pub fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// Returns the reports since the last call.
    pub fn reports(&mut self) -> std::vec::Drain<'_, Report> {
        self.reports.drain(..)
    }

    /// Waits for events or a deadline, and handles them.
    ///
    /// # Errors
    /// The reactor is broken; the shard cannot continue.
    pub fn turn(&mut self) -> Result<(), ReactorError> {
        let dials = self.fresh_dials.len();
        let mut events = std::mem::take(&mut self.events);
        let turned = self.reactor.turn(self.wait_until(), &mut events);
        self.now = self.reactor.now();
        for event in events.drain(..) {
            self.dispatch(event);
        }
        self.events = events;
        turned?;
        self.note_refused();
        self.time_dials(dials);
        self.run_timers();
        self.resume_yielded();
        self.feed_starved();
        self.resume_accepting();
        self.finish_stopping();
        if let Some(peers) = &self.peers {
            peers.publish_load(self.connections.len());
        }
        Ok(())
    }

    fn wait_until(&self) -> Option<Instant> {
        if !self.yielded.is_empty() || self.can_accept_later() || self.can_feed_starved() {
            return Some(self.now);
        }
        let timer = self.timers.first().map(|(at, _)| *at);
        let dial = (!self.fresh_dials.is_empty()).then(|| self.now + self.limits.connect_timeout);
        timer.into_iter().chain(dial).min()
    }

    fn dispatch(&mut self, event: Event) {
        let TokenParts { kind, id } = TokenParts::unpack(event.token);
        match (kind, event.kind) {
            (0 | 1, EventKind::Ready) => self.on_side_ready(id, side_of(kind)),
            (KIND_UPSTREAM, EventKind::Ready) => self.on_upstream_ready(id),
            // Only listening sockets request a report of their close.
            (0 | 1 | KIND_UPSTREAM, EventKind::Closed) => {}
            (kind, happened) => self.on_listener_event(id, usize::from(kind - KIND_LISTENER), happened),
        }
    }

    /// Reports that the kernel refuses to register sockets, and schedules another attempt. Their peers wait.
    fn note_refused(&mut self) {
        if self.reactor.has_refused() && self.registering_at.is_none() {
            self.degrade("the kernel refuses to watch more sockets (memory, or fs.epoll.max_user_watches)");
            let at = Some(self.now + self.limits.exhausted_pause);
            Self::set_timer(&mut self.timers, Timer::Registration, &mut self.registering_at, at);
        }
    }

    /// Sets a timer to another time. `slot` holds the current one.
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
                        listener.paused_until = None;
                    }
                    self.accept_all(id);
                }
                Timer::Recovery => {
                    self.degraded_until = None;
                    self.reports
                        .push(Report::Recovered { what: "descriptors are available again".to_owned() });
                }
                Timer::Registration => {
                    self.registering_at = None;
                    self.reactor.register_again();
                }
                Timer::Upstream(id) => {
                    if let Some(upstream) = self.upstreams.entry_mut(id) {
                        upstream.paused_until = None;
                    }
                    self.on_upstream_ready(id);
                }
            }
        }
    }

    /// Returns the forwards of this shard, including those that drain.
    fn describe(&self) -> Vec<ForwardState> {
        let ids = self.listeners.ids().into_iter();
        let mut forwards: Vec<ForwardState> =
            ids.filter_map(|id| self.listeners.entry(id)).map(Listener::state).collect();
        forwards.sort_by_key(|state| state.forward);
        forwards
    }

    fn stats_mut(&mut self, listener: SlotId) -> Option<&mut ForwardStats> {
        self.listeners.entry_mut(listener).map(|listener| &mut listener.stats)
    }

    /// Reports that descriptors ran out, once for the whole shortage. During a shortage single descriptors become free for
    /// short times, so it is over only when every paused operation has been retried without a failure.
    fn degrade(&mut self, what: &str) {
        if self.degraded_until.is_none() {
            self.reports.push(Report::Degraded { what: what.to_owned() });
        }
        let until = Some(self.now + 3 * self.limits.exhausted_pause);
        Self::set_timer(&mut self.timers, Timer::Recovery, &mut self.degraded_until, until);
    }
}

fn side_of(kind: u8) -> Side {
    if kind == 0 { Side::Downstream } else { Side::Upstream }
}

fn side_token(side: Side, id: SlotId) -> Token {
    let kind = match side {
        Side::Downstream => 0,
        Side::Upstream => 1,
    };
    TokenParts { kind, id }.pack()
}
