//! What a shard is told between turns, and what it reports.

use std::num::NonZeroU16;
use std::os::fd::OwnedFd;

use super::{Peers, Shard, Stopping};
use crate::command::{
    Ending, Family, ForwardId, ForwardState, ForwardStats, Reach, UpstreamId, UpstreamKind,
};
use crate::error::EndReason;
use crate::listener::{Accepting, Listener};
use crate::relay::{Direction, Input};
use crate::ring::{Op, OpKey, Outcome, Ring, Submitted};
use crate::table::{SlotId, TokenParts};
use crate::upstream::Upstream;

/// What a shard is told. Descriptors have been made and checked by then.
#[derive(Debug)]
pub enum ShardCommand<S> {
    /// See [`crate::command::Command::AddUpstream`].
    AddUpstream {
        /// Its number.
        upstream: UpstreamId,
        /// Who is behind the channel.
        kind: UpstreamKind,
        /// An opener channel of this shard's own.
        channel: S,
        /// `SO_NETNS_COOKIE` of the namespace.
        netns_cookie: u64,
    },
    /// See [`crate::command::Command::RemoveUpstream`].
    RemoveUpstream {
        /// Its number.
        upstream: UpstreamId,
        /// What becomes of its connections.
        ending: Ending,
    },
    /// See [`crate::command::Command::OpenListener`].
    OpenListener {
        /// Its number.
        forward: ForwardId,
        /// Where connections go.
        upstream: UpstreamId,
        /// The port on the host.
        host_port: NonZeroU16,
        /// The port inside.
        target_port: NonZeroU16,
        /// Which families listen inside.
        reach: Reach,
        /// The listening sockets; none where another shard accepts for this one.
        sockets: Vec<S>,
    },
    /// Relays a connection that another shard has accepted.
    Adopt {
        /// The forward by which it came.
        forward: ForwardId,
        /// The client's socket.
        socket: S,
        /// The family by which the client came.
        came_by: Family,
    },
    /// See [`crate::command::Command::SetReach`].
    SetReach {
        /// Its number.
        forward: ForwardId,
        /// The new reach.
        reach: Reach,
    },
    /// See [`crate::command::Command::CloseListener`].
    CloseListener {
        /// Its number.
        forward: ForwardId,
        /// What becomes of its connections.
        ending: Ending,
    },
    /// Connections may be given to these from now on.
    MeetPeers(Peers),
    /// Answer: [`Report::State`].
    Describe,
    /// Answer: [`Report::Lent`].
    Lend,
    /// See [`crate::command::Command::Drain`].
    Drain,
    /// See [`crate::command::Command::Stop`].
    Stop,
}

/// A listener whose sockets are lent.
#[derive(Debug)]
pub struct Lent {
    /// Which.
    pub forward: ForwardState,
    /// One for each family; they share the queue of connections with the listener's own.
    pub sockets: Vec<OwnedFd>,
}

/// What a shard reports.
#[derive(Debug)]
pub enum Report {
    /// The port of a forward is free again.
    ListenerClosed {
        /// Its number.
        forward: ForwardId,
        /// Its counters at that moment.
        stats: ForwardStats,
    },
    /// An upstream is let go.
    UpstreamRemoved {
        /// Its number.
        upstream: UpstreamId,
        /// Why, where nobody asked for it.
        reason: Option<String>,
    },
    /// Answer to [`ShardCommand::Describe`].
    State {
        /// The forwards, by number.
        forwards: Vec<ForwardState>,
    },
    /// Answer to [`ShardCommand::Lend`].
    Lent {
        /// The open listeners that this shard accepts for, less those for which no descriptors are left.
        listeners: Vec<Lent>,
    },
    /// Something is used up.
    Degraded {
        /// A sentence for people.
        what: String,
    },
    /// It is there again.
    Recovered {
        /// A sentence for people.
        what: String,
    },
    /// The shard holds nothing any more.
    Stopped,
}

impl<R: Ring> Shard<R> {
    /// Carries out a command.
    pub fn command(&mut self, command: ShardCommand<R::Socket>) {
        match command {
            ShardCommand::AddUpstream { upstream, kind, channel, netns_cookie } => {
                self.add_upstream(upstream, kind, channel, netns_cookie);
            }
            ShardCommand::RemoveUpstream { upstream, ending } => self.remove_upstream(upstream, ending),
            ShardCommand::OpenListener { forward, upstream, host_port, target_port, reach, sockets } => {
                let Some(upstream_slot) = self.upstream_slots.get(&upstream).copied() else {
                    // It went away while the ports were being bound.
                    let stats = ForwardStats::default();
                    self.reports.push(Report::ListenerClosed { forward, stats });
                    return;
                };
                let sockets = sockets.into_iter().enumerate();
                let sockets = sockets.map(|(index, socket)| Accepting { index, socket, key: None }).collect();
                let id = self.listeners.insert(Listener {
                    forward,
                    upstream,
                    upstream_slot,
                    host_port,
                    target_port,
                    reach,
                    sockets,
                    open: true,
                    told_closed: false,
                    queued: false,
                    resting_until: None,
                    stats: ForwardStats::default(),
                });
                self.forwards.insert(forward, id);
                self.accept_all(id);
            }
            ShardCommand::Adopt { forward, socket, came_by } => match self.forwards.get(&forward).copied() {
                Some(id) => self.begin(id, socket, came_by),
                // Its upstream was lost meanwhile. The client is told so as the others were.
                None => self.ring.reset_on_close(&socket),
            },
            ShardCommand::SetReach { forward, reach } => {
                if let Some(id) = self.forwards.get(&forward).copied()
                    && let Some(listener) = self.listeners.entry_mut(id)
                {
                    listener.reach = reach;
                }
            }
            ShardCommand::CloseListener { forward, ending } => match self.forwards.get(&forward).copied() {
                Some(id) => self.close_listener(id, ending),
                None => {
                    let stats = ForwardStats::default();
                    self.reports.push(Report::ListenerClosed { forward, stats });
                }
            },
            ShardCommand::MeetPeers(peers) => self.peers = Some(peers),
            ShardCommand::Describe => {
                let forwards = self.describe();
                self.reports.push(Report::State { forwards });
            }
            ShardCommand::Lend => {
                let listeners = self.lend();
                self.reports.push(Report::Lent { listeners });
            }
            ShardCommand::Drain => self.stop(Stopping::Drain),
            ShardCommand::Stop => self.stop(Stopping::Now),
        }
    }

    fn lend(&self) -> Vec<Lent> {
        let ids = self.listeners.ids();
        let open = ids.into_iter().filter_map(|id| self.listeners.entry(id)).filter(|listener| listener.open);
        open.filter_map(|listener| {
            let sockets = listener.sockets.iter().map(|accepting| self.ring.duplicate(&accepting.socket));
            let sockets = sockets.collect::<Option<Vec<OwnedFd>>>()?;
            (!sockets.is_empty()).then(|| Lent { forward: listener.state(), sockets })
        })
        .collect()
    }

    fn add_upstream(
        &mut self,
        upstream: UpstreamId,
        kind: UpstreamKind,
        channel: R::Socket,
        netns_cookie: u64,
    ) {
        let watched = channel.clone();
        let id = self.upstreams.insert(Upstream::new(upstream, kind, channel, netns_cookie, &self.limits));
        self.upstream_slots.insert(upstream, id);
        if kind == UpstreamKind::Dialler {
            // Answers are waited for all the time, which tells the driver's end as well.
            return self.hear(id);
        }
        let token = TokenParts { kind: super::KIND_UPSTREAM_WATCH, id }.pack();
        match self.ring.submit(token, Op::Watch { socket: watched }) {
            Submitted::Pending(key) => {
                if let Some(upstream) = self.upstreams.entry_mut(id) {
                    upstream.watch = Some(key);
                }
            }
            Submitted::Done(outcome) => self.on_upstream_watch(id, &outcome),
        }
        self.refill(id);
    }

    fn remove_upstream(&mut self, upstream: UpstreamId, ending: Ending) {
        let Some(id) = self.upstream_slots.get(&upstream).copied() else {
            self.reports.push(Report::UpstreamRemoved { upstream, reason: None });
            return;
        };
        self.let_go_of_upstream(id, ending, None);
    }

    /// The opener has ended, or its watch was cancelled.
    pub(super) fn on_upstream_watch(&mut self, id: SlotId, outcome: &Outcome<R>) {
        if let Some(upstream) = self.upstreams.entry_mut(id) {
            upstream.watch = None;
        }
        if !matches!(outcome, Outcome::Cancelled(_)) {
            let reason = "the opener has ended, so the container can no longer be entered".to_owned();
            self.let_go_of_upstream(id, Ending::Drain, Some(reason));
        }
        self.forget_upstream(id);
    }

    pub(super) fn let_go_of_upstream(&mut self, id: SlotId, ending: Ending, reason: Option<String>) {
        let Some(upstream) = self.upstreams.entry_mut(id) else { return };
        if upstream.closing.is_some() {
            return;
        }
        let waiting = upstream.let_go(reason);
        let in_flight: Vec<OpKey> = upstream.in_flight().collect();
        Self::set_timer(&mut self.timers, super::Timer::Upstream(id), &mut upstream.resting_until, None);
        for key in in_flight {
            self.ring.cancel(key);
        }
        for connection in waiting {
            self.fail(connection, EndReason::UpstreamLost);
        }
        for listener in self.listeners.ids() {
            if self.listeners.entry(listener).is_some_and(|listener| listener.upstream_slot == id) {
                self.close_listener(listener, ending);
            }
        }
        self.forget_upstream(id);
    }

    /// Removes an upstream that is closing and has nothing in flight.
    pub(super) fn forget_upstream(&mut self, id: SlotId) {
        let Some(upstream) = self.upstreams.entry(id) else { return };
        let Some(closing) = &upstream.closing else { return };
        // Its ports are told to be free before it is told to be gone.
        let has_ports =
            |listener: &Listener<R::Socket>| listener.upstream_slot == id && !listener.told_closed;
        let ids = self.listeners.ids();
        let mut listeners = ids.into_iter().filter_map(|listener| self.listeners.entry(listener));
        if upstream.in_flight().next().is_some() || listeners.any(has_ports) {
            return;
        }
        let (upstream, reason) = (upstream.id, closing.reason.clone());
        self.upstreams.remove(id);
        self.upstream_slots.remove(&upstream);
        self.reports.push(Report::UpstreamRemoved { upstream, reason });
    }

    pub(super) fn close_listener(&mut self, id: SlotId, ending: Ending) {
        let Some(listener) = self.listeners.entry_mut(id) else { return };
        listener.open = false;
        Self::set_timer(&mut self.timers, super::Timer::Listener(id), &mut listener.resting_until, None);
        // They close together, with the last cancelled accept: an accept knows its socket by its place.
        let keys: Vec<_> = listener.sockets.iter().filter_map(|accepting| accepting.key).collect();
        if keys.is_empty() {
            listener.sockets.clear();
        }
        for key in keys {
            self.ring.cancel(key);
        }
        if ending == Ending::Reset {
            self.abort_connections(Some(id), EndReason::Removed);
        }
        self.forget_listener(id);
    }

    /// Tells that a closed listener's port is free, and removes it once its last connection has ended.
    pub(super) fn forget_listener(&mut self, id: SlotId) {
        let Some(listener) = self.listeners.entry_mut(id) else { return };
        if listener.open || !listener.sockets.is_empty() {
            return;
        }
        let (forward, stats, upstream) = (listener.forward, listener.stats, listener.upstream_slot);
        if !std::mem::replace(&mut listener.told_closed, true) {
            self.forwards.remove(&forward);
            self.reports.push(Report::ListenerClosed { forward, stats });
            self.forget_upstream(upstream);
        }
        if stats.open == 0 {
            self.listeners.remove(id);
        }
    }

    /// Resets the connections of one listener, or all.
    fn abort_connections(&mut self, of: Option<SlotId>, reason: EndReason) {
        for id in self.connections.ids() {
            let Some(connection) = self.connections.entry(id) else { continue };
            if of.is_some_and(|listener| listener != connection.listener) {
                continue;
            }
            if matches!(connection.stage, super::Stage::Relaying(_)) {
                self.drive(id, Input::Abort(reason));
            } else {
                self.fail(id, reason);
            }
        }
    }

    fn stop(&mut self, stopping: Stopping) {
        if self.stopping != Some(Stopping::Now) {
            self.stopping = Some(stopping);
        }
        let ending = if stopping == Stopping::Now { Ending::Reset } else { Ending::Drain };
        for id in self.listeners.ids() {
            self.close_listener(id, ending);
        }
        if stopping == Stopping::Now {
            self.abort_connections(None, EndReason::Removed);
            for id in self.upstreams.ids() {
                self.let_go_of_upstream(id, ending, None);
            }
        }
        self.finish_stopping();
    }

    /// Tells that the shard is empty, once it was asked to become so.
    pub(super) fn finish_stopping(&mut self) {
        if self.stopping.is_none() || self.told_stopped || !self.connections.is_empty() {
            return;
        }
        // While it drained, connections needed their upstreams.
        for id in self.upstreams.ids() {
            self.let_go_of_upstream(id, Ending::Drain, None);
        }
        if self.upstreams.is_empty() && self.listeners.is_empty() {
            self.told_stopped = true;
            // Nothing is told after this.
            Self::set_timer(&mut self.timers, super::Timer::Recovery, &mut self.degraded_until, None);
            self.reports.push(Report::Stopped);
        }
    }

    /// Takes a direction's turn-end back; true if its read was waiting for the next turn.
    pub(super) fn take_deferred(&mut self, id: SlotId, direction: Direction) -> bool {
        self.connections
            .entry_mut(id)
            .is_some_and(|connection| connection.deferred[direction as usize].take().is_some())
    }
}
