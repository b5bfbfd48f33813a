//! The commands of a shard, which it carries out between turns, and its reports.

use std::num::NonZeroU16;
use std::os::fd::OwnedFd;
use std::time::Duration;

use super::listener::{Accepting, Listener};
use super::upstream::Upstream;
use super::{KIND_LISTENER, KIND_UPSTREAM, Peers, Shard, Stage, Stopping, Timer};
use crate::command::{
    Ending, Family, ForwardId, ForwardState, ForwardStats, Reach, UpstreamId, UpstreamKind,
};
use crate::error::EndReason;
use crate::reactor::{Poller, SocketIo, SocketOf};
use crate::relay::Input;
use crate::table::{SlotId, TokenParts};

/// A command to a shard. Its descriptors have been created and checked.
#[derive(Debug)]
pub enum ShardCommand<S> {
    /// See [`crate::command::Command::AddUpstream`].
    AddUpstream {
        /// Its number.
        upstream: UpstreamId,
        /// The kind of program at the other end of the channel.
        kind: UpstreamKind,
        /// The channel of this shard; absent for the host.
        channel: Option<S>,
        /// `SO_NETNS_COOKIE` of the namespace.
        netns_cookie: u64,
    },
    /// See [`crate::command::Command::RemoveUpstream`].
    RemoveUpstream {
        /// Its number.
        upstream: UpstreamId,
        /// How its connections end.
        ending: Ending,
    },
    /// See [`crate::command::Command::OpenListener`].
    OpenListener {
        /// Its number.
        forward: ForwardId,
        /// The upstream to which connections go.
        upstream: UpstreamId,
        /// The port on the host.
        host_port: NonZeroU16,
        /// The port inside the container.
        target_port: NonZeroU16,
        /// The families on which a server listens inside.
        reach: Reach,
        /// The listening sockets; empty where another shard accepts for this one.
        sockets: Vec<S>,
    },
    /// Relays a connection that another shard accepted.
    Adopt {
        /// The forward by which it came.
        forward: ForwardId,
        /// The client's socket.
        socket: S,
        /// The family by which the client came.
        client_family: Family,
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
        /// How its connections end.
        ending: Ending,
    },
    /// The shards to which connections may be passed from now on.
    SetPeers(Peers),
    /// Requests the state. Answer: [`Report::State`].
    Describe,
    /// Requests the listening sockets for another engine. Answer: [`Report::Lent`].
    Lend,
    /// See [`crate::command::Command::Drain`].
    Drain,
    /// See [`crate::command::Command::Stop`].
    Stop,
}

/// A listener whose sockets are lent to another engine.
#[derive(Debug)]
pub struct Lent {
    /// The forward.
    pub forward: ForwardState,
    /// One for each family; they share the queue of connections with the listener's own.
    pub sockets: Vec<OwnedFd>,
}

/// A report of a shard.
#[derive(Debug)]
pub enum Report {
    /// The port of a forward is free again.
    ListenerClosed {
        /// Its number.
        forward: ForwardId,
        /// Its counters at this time.
        stats: ForwardStats,
    },
    /// An upstream is closed.
    UpstreamRemoved {
        /// Its number.
        upstream: UpstreamId,
        /// The reason, if the removal was not requested.
        reason: Option<String>,
    },
    /// Answer to [`ShardCommand::Describe`].
    State {
        /// The forwards, by number.
        forwards: Vec<ForwardState>,
    },
    /// Answer to [`ShardCommand::Lend`].
    Lent {
        /// The open listeners for which this shard accepts, except those that could not be duplicated for lack of
        /// descriptors.
        listeners: Vec<Lent>,
    },
    /// A resource ran out.
    Degraded {
        /// A sentence for people.
        what: String,
    },
    /// The resource is available again.
    Recovered {
        /// A sentence for people.
        what: String,
    },
    /// The shard is empty; this is the last report.
    Stopped,
}

impl<P: Poller> Shard<P> {
    /// Carries out a command.
    pub fn command(&mut self, command: ShardCommand<SocketOf<P>>) {
        match command {
            ShardCommand::AddUpstream { upstream, kind, channel, netns_cookie } => {
                self.add_upstream(upstream, kind, channel, netns_cookie);
            }
            ShardCommand::RemoveUpstream { upstream, ending } => self.remove_upstream(upstream, ending),
            ShardCommand::OpenListener { forward, upstream, host_port, target_port, reach, sockets } => {
                let Some(upstream_slot) = self.upstream_slots.get(&upstream).copied() else {
                    // The upstream was closed while the conductor bound the ports.
                    let stats = ForwardStats::default();
                    self.reports.push(Report::ListenerClosed { forward, stats });
                    return;
                };
                let listener = Listener {
                    forward,
                    upstream,
                    upstream_slot,
                    host_port,
                    target_port,
                    reach,
                    sockets: Vec::new(),
                    open: true,
                    reported_closed: false,
                    queued: false,
                    paused_until: None,
                    failures: 0,
                    pause: Duration::ZERO,
                    stats: ForwardStats::default(),
                };
                self.open_listener(listener, sockets);
            }
            ShardCommand::Adopt { forward, socket, client_family } => {
                match self.forwards.get(&forward).copied() {
                    Some(id) => self.start_connection(id, socket, client_family),
                    // The upstream was lost meanwhile. The client is reset, like the other clients.
                    None => self.reactor.io().reset_on_close(&socket),
                }
            }
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
            ShardCommand::SetPeers(peers) => self.peers = Some(peers),
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

    /// Registers the sockets of a listener. The kernel then reports the clients that are waiting.
    fn open_listener(&mut self, listener: Listener, sockets: Vec<SocketOf<P>>) {
        let forward = listener.forward;
        let id = self.listeners.insert(listener);
        self.forwards.insert(forward, id);
        let sockets = (0u8..).zip(sockets).map(|(index, socket)| {
            let family = self.reactor.io().facts(&socket).family.unwrap_or(Family::V4);
            let token = TokenParts { kind: KIND_LISTENER + index, id }.pack();
            Accepting { index: usize::from(index), key: self.reactor.register(socket, token), family }
        });
        let sockets: Vec<Accepting> = sockets.collect();
        if let Some(listener) = self.listeners.entry_mut(id) {
            listener.sockets = sockets;
        }
    }

    fn lend(&mut self) -> Vec<Lent> {
        let ids = self.listeners.ids();
        let open = ids.into_iter().filter_map(|id| self.listeners.entry(id)).filter(|listener| listener.open);
        open.filter_map(|listener| {
            let sockets = listener.sockets.iter().map(|accepting| {
                self.reactor.on_socket(accepting.key, |io, socket| io.duplicate(socket)).flatten()
            });
            let sockets = sockets.collect::<Option<Vec<OwnedFd>>>()?;
            (!sockets.is_empty()).then(|| Lent { forward: listener.state(), sockets })
        })
        .collect()
    }

    fn add_upstream(
        &mut self,
        upstream: UpstreamId,
        kind: UpstreamKind,
        channel: Option<SocketOf<P>>,
        netns_cookie: u64,
    ) {
        let limits = &self.limits;
        let reactor = &mut self.reactor;
        let id = self.upstreams.insert_with(|id| {
            let token = TokenParts { kind: KIND_UPSTREAM, id }.pack();
            let channel = channel.map(|channel| reactor.register(channel, token));
            Upstream::new(upstream, kind, channel, netns_cookie, limits)
        });
        self.upstream_slots.insert(upstream, id);
        self.refill(id);
    }

    fn remove_upstream(&mut self, upstream: UpstreamId, ending: Ending) {
        let Some(id) = self.upstream_slots.get(&upstream).copied() else {
            self.reports.push(Report::UpstreamRemoved { upstream, reason: None });
            return;
        };
        self.close_upstream(id, ending, None);
    }

    pub(super) fn close_upstream(&mut self, id: SlotId, ending: Ending, reason: Option<String>) {
        let Some(upstream) = self.upstreams.entry_mut(id) else { return };
        if upstream.closing.is_some() {
            return;
        }
        let waiting = upstream.close(reason);
        Self::set_timer(&mut self.timers, Timer::Upstream(id), &mut upstream.paused_until, None);
        if let Some(channel) = upstream.channel.take() {
            self.reactor.close(channel);
        }
        for connection in waiting {
            self.fail(connection, EndReason::UpstreamLost);
        }
        for listener in self.listeners.ids() {
            if self.listeners.entry(listener).is_some_and(|listener| listener.upstream_slot == id) {
                self.close_listener(listener, ending);
            }
        }
        self.remove_upstream_if_done(id);
    }

    /// Removes an upstream that is closing and whose ports are free.
    fn remove_upstream_if_done(&mut self, id: SlotId) {
        let Some(upstream) = self.upstreams.entry(id) else { return };
        let Some(closing) = &upstream.closing else { return };
        // The ports are reported as free before the upstream is reported as removed.
        let has_ports = |listener: &Listener| listener.upstream_slot == id && !listener.reported_closed;
        let ids = self.listeners.ids();
        let mut listeners = ids.into_iter().filter_map(|listener| self.listeners.entry(listener));
        if listeners.any(has_ports) {
            return;
        }
        let (upstream, reason) = (upstream.id, closing.reason.clone());
        self.upstreams.remove(id);
        self.upstream_slots.remove(&upstream);
        self.reports.push(Report::UpstreamRemoved { upstream, reason });
    }

    pub(super) fn close_listener(&mut self, id: SlotId, ending: Ending) {
        let Some(listener) = self.listeners.entry_mut(id) else { return };
        if std::mem::replace(&mut listener.open, false) {
            Self::set_timer(&mut self.timers, Timer::Listener(id), &mut listener.paused_until, None);
            // Another engine may listen on the sockets, too, and continues.
            for accepting in &listener.sockets {
                self.reactor.close_and_report(accepting.key);
            }
        }
        if ending == Ending::Reset {
            self.abort_connections(Some(id), EndReason::Removed);
        }
        self.remove_listener_if_done(id);
    }

    /// Reports that the port of a closed listener is free, and removes it once its last connection has ended.
    pub(super) fn remove_listener_if_done(&mut self, id: SlotId) {
        let Some(listener) = self.listeners.entry_mut(id) else { return };
        if listener.open || !listener.sockets.is_empty() {
            return;
        }
        let (forward, stats, upstream) = (listener.forward, listener.stats, listener.upstream_slot);
        if !std::mem::replace(&mut listener.reported_closed, true) {
            self.forwards.remove(&forward);
            self.reports.push(Report::ListenerClosed { forward, stats });
            self.remove_upstream_if_done(upstream);
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
            if matches!(connection.stage, Stage::Relaying(_)) {
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
                self.close_upstream(id, ending, None);
            }
        }
        self.finish_stopping();
    }

    /// Reports that the shard is empty, if it was drained or stopped.
    pub(super) fn finish_stopping(&mut self) {
        if self.stopping.is_none() || self.stopped || !self.connections.is_empty() {
            return;
        }
        // While the shard drained, connections needed their upstreams.
        for id in self.upstreams.ids() {
            self.close_upstream(id, Ending::Drain, None);
        }
        // The reactor's last registrations end before the shard does, so that no port or namespace outlives the report.
        if self.upstreams.is_empty() && self.listeners.is_empty() && self.reactor.registered() == 0 {
            self.stopped = true;
            // The stop is the last report, so the recovery is not reported.
            Self::set_timer(&mut self.timers, Timer::Recovery, &mut self.degraded_until, None);
            self.reports.push(Report::Stopped);
        }
    }
}
