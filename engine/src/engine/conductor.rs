//! The conductor: the one thread that has the state of the whole engine. It receives the driver's commands, the shards'
//! reports and the watch's events, and sends commands to the shards and events to the driver. An upstream or a forward
//! exists from its command until every shard has reported its end. The conductor never waits for a shard or a container.

mod agents;
mod events;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::Instant;

use super::gathering::Gatherings;
use super::isolated::{ANSWER_TIMEOUT, COMMAND_TIMEOUT, IsolatedShards};
use super::shard_thread::ShardThread;
use crate::command::{
    Command, Ending, Event, EventMessage, ForwardId, ForwardState, ForwardStats, ListenFailure,
    ListenFailureKind, Listening, Reach, UpstreamId, UpstreamKind, WatchSources,
};
use crate::listener;
use crate::shard::{Lent, Report, ShardCommand};
use crate::watch::{Sources, WatchEvent, Watcher};
use agents::duplicates;

/// A message to the conductor.
#[derive(Debug)]
pub(super) enum Message {
    Command(Command, Vec<OwnedFd>),
    Report(usize, Report),
    Watch(WatchEvent),
}

pub(super) struct Conductor {
    /// The common shards.
    shards: Vec<ShardThread>,
    /// The isolated shards, each for the upstream of one agent.
    isolated: IsolatedShards,
    watcher: Watcher,
    backlog: u16,
    events: Sender<EventMessage>,
    upstreams: BTreeMap<UpstreamId, UpstreamRecord>,
    forwards: HashMap<ForwardId, Placed>,
    /// The open requests for descriptions.
    descriptions: Gatherings<ForwardState>,
    /// For each description, whether it includes the listeners inside.
    with_observed: VecDeque<bool>,
    /// The open requests to lend listeners.
    lendings: Gatherings<Lent>,
    stopped: HashSet<usize>,
    /// The engine was ordered to drain or to stop.
    ending: bool,
}

/// An upstream, and the shards that still use it.
struct UpstreamRecord {
    netns_cookie: u64,
    shards: HashSet<usize>,
    /// The listeners inside, as reported to the driver; `None` before the first reading.
    listening: Option<BTreeSet<Listening>>,
    reason: Option<String>,
    removing: bool,
    /// Its isolated shard, if it has one.
    isolated: Option<usize>,
    /// The deadline for that shard to remove it.
    due: Option<Instant>,
}

/// A forward to be opened.
#[derive(Clone, Copy)]
struct ForwardSpec {
    forward: ForwardId,
    upstream: UpstreamId,
    host_port: NonZeroU16,
    target_port: NonZeroU16,
    reach: Reach,
}

/// A forward whose listener is open, or is being closed.
struct Placed {
    /// The shard that accepts.
    shard: usize,
    /// Duplicates of an isolated shard's listening sockets, to close or lend them without the shard.
    kept: Vec<OwnedFd>,
    /// The last counters of an isolated shard.
    last_stats: ForwardStats,
    /// The deadline for an isolated shard to close it.
    due: Option<Instant>,
    /// Another engine may listen on these sockets, too.
    lent: bool,
    reach: Reach,
    upstream: UpstreamId,
    host_port: NonZeroU16,
    target_port: NonZeroU16,
    ending: Ending,
    /// The shards that have not closed it.
    shards: HashSet<usize>,
    /// The sum of the counters of the shards that have closed it.
    stats: ForwardStats,
}

impl Conductor {
    pub(super) fn new(
        shards: Vec<ShardThread>,
        isolated: IsolatedShards,
        watcher: Watcher,
        backlog: u16,
        events: Sender<EventMessage>,
    ) -> Conductor {
        Conductor {
            shards,
            isolated,
            watcher,
            backlog,
            events,
            upstreams: BTreeMap::new(),
            forwards: HashMap::new(),
            descriptions: Gatherings::default(),
            with_observed: VecDeque::new(),
            lendings: Gatherings::default(),
            stopped: HashSet::new(),
            ending: false,
        }
    }

    pub(super) fn run(mut self, inbox: &Receiver<Message>) {
        loop {
            let message = match self.due() {
                None => inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(at) => inbox.recv_timeout(at.saturating_duration_since(Instant::now())),
            };
            match message {
                Ok(Message::Command(command, descriptors)) => self.on_command(command, descriptors),
                Ok(Message::Report(shard, report)) => self.on_report(shard, report),
                Ok(Message::Watch(event)) => self.on_watch(event),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if !self.isolated.is_empty() {
                self.on_deadline(Instant::now());
            }
            if self.stopped.len() == self.shards.len() && self.isolated.is_empty() {
                self.emit(Event::Stopped);
                return;
            }
        }
    }

    /// Returns the common shards that still run.
    fn running(&self) -> impl Iterator<Item = usize> {
        (0..self.shards.len()).filter(|shard| !self.stopped.contains(shard))
    }

    fn refuse(&self, reason: String) {
        self.emit(Event::Refused { reason });
    }

    fn to_all(&self, command: impl Fn() -> ShardCommand<OwnedFd>) {
        let isolated = self.isolated.numbers().filter_map(|number| self.isolated.thread(number));
        for shard in self.shards.iter().chain(isolated) {
            shard.send(command());
        }
    }

    fn on_command(&mut self, command: Command, descriptors: Vec<OwnedFd>) {
        match command {
            Command::AddUpstream { upstream, netns_cookie, sources, kind } => {
                self.add_upstream(upstream, kind, netns_cookie, sources, descriptors);
            }
            Command::RemoveUpstream { upstream, ending } => self.remove_upstream(upstream, ending, None),
            Command::OpenListener { forward, upstream, host_port, target_port, reach } => {
                let spec = ForwardSpec { forward, upstream, host_port, target_port, reach };
                self.open_listener(spec, descriptors);
            }
            Command::AdoptListener { forward, upstream, target_port } => {
                let reach = Reach::UNKNOWN;
                let spec = ForwardSpec { forward, upstream, host_port: target_port, target_port, reach };
                self.place_listener(spec, |_| listener::adopt(target_port, descriptors));
            }
            Command::SetReach { forward, reach } => {
                self.set_reach(forward, reach);
            }
            Command::CloseListener { forward, ending } => match self.forwards.get_mut(&forward) {
                Some(placed) => {
                    placed.ending = ending;
                    let shard = placed.shard;
                    if self.isolated.thread(shard).is_some() {
                        placed.due.get_or_insert_with(|| Instant::now() + COMMAND_TIMEOUT);
                    }
                    self.send(shard, ShardCommand::CloseListener { forward, ending });
                }
                None => self.emit(Event::ListenerClosed { forward, stats: ForwardStats::default() }),
            },
            Command::Describe => self.describe(true),
            Command::Count => self.describe(false),
            Command::LendListeners => {
                let until = Instant::now() + ANSWER_TIMEOUT;
                self.lendings.start(self.running().collect(), self.isolated.numbers().collect(), until);
                self.to_all(|| ShardCommand::Lend);
            }
            Command::Rescan => self.watcher.rescan(),
            Command::Drain => {
                self.ending = true;
                self.to_all(|| ShardCommand::Drain);
                self.isolated.start_heartbeat_checks(Instant::now());
            }
            Command::Stop => {
                self.ending = true;
                self.to_all(|| ShardCommand::Stop);
                self.isolated.set_end_deadline(Instant::now());
            }
        }
    }

    /// Asks the shards for their states.
    fn describe(&mut self, with_observed: bool) {
        let until = Instant::now() + ANSWER_TIMEOUT;
        self.with_observed.push_back(with_observed);
        self.descriptions.start(self.running().collect(), self.isolated.numbers().collect(), until);
        self.to_all(|| ShardCommand::Describe);
    }

    fn send(&self, shard: usize, command: ShardCommand<OwnedFd>) {
        if let Some(shard) = self.shards.get(shard).or_else(|| self.isolated.thread(shard)) {
            shard.send(command);
        }
    }

    fn add_upstream(
        &mut self,
        upstream: UpstreamId,
        kind: UpstreamKind,
        netns_cookie: u64,
        sources: WatchSources,
        descriptors: Vec<OwnedFd>,
    ) {
        if self.upstreams.contains_key(&upstream) {
            return self.refuse(format!("{upstream} exists already; remove it first"));
        }
        if kind == UpstreamKind::Agent {
            return self.add_agent(upstream, netns_cookie, sources, descriptors);
        }
        // The engine creates the host's sockets itself.
        let has_channels = kind != UpstreamKind::Host;
        let channels = if has_channels { self.shards.len() } else { 0 };
        let expected = channels + sources.count();
        if descriptors.len() != expected {
            let got = descriptors.len();
            return self.refuse(format!(
                "{upstream} came with {got} descriptors; expected {expected}, a channel for each of {channels} \
                 shards and the sources named"
            ));
        }
        let mut descriptors = descriptors.into_iter();
        for shard in &self.shards {
            let channel = if has_channels { descriptors.next() } else { None };
            shard.send(ShardCommand::AddUpstream { upstream, kind, channel, netns_cookie });
        }
        let mut source = |present: bool| if present { descriptors.next() } else { None };
        let files = Sources {
            tcp: source(sources.proc_tcp),
            tcp6: source(sources.proc_tcp6),
            sock_diag: source(sources.sock_diag),
        };
        let shards = (0..self.shards.len()).collect();
        self.hold(upstream, netns_cookie, shards, None);
        if sources.count() > 0 {
            self.watcher.add(upstream, files);
        }
    }

    fn hold(
        &mut self,
        upstream: UpstreamId,
        netns_cookie: u64,
        shards: HashSet<usize>,
        isolated: Option<usize>,
    ) {
        let (listening, reason, removing, due) = (None, None, false, None);
        self.upstreams.insert(
            upstream,
            UpstreamRecord { netns_cookie, shards, listening, reason, removing, isolated, due },
        );
        self.emit(Event::UpstreamAdded { upstream });
    }

    fn remove_upstream(&mut self, upstream: UpstreamId, ending: Ending, reason: Option<String>) {
        let Some(held) = self.upstreams.get_mut(&upstream) else {
            return self.emit(Event::UpstreamRemoved { upstream, reason: None });
        };
        if std::mem::replace(&mut held.removing, true) {
            return;
        }
        held.reason = reason;
        held.due = held.isolated.map(|_| Instant::now() + COMMAND_TIMEOUT);
        let shards: Vec<usize> = held.shards.iter().copied().collect();
        self.watcher.remove(upstream);
        for shard in shards {
            self.send(shard, ShardCommand::RemoveUpstream { upstream, ending });
        }
    }

    fn open_listener(&mut self, spec: ForwardSpec, lent: Vec<OwnedFd>) {
        self.place_listener(spec, |backlog| listener::open(spec.host_port, backlog, lent));
    }

    /// Creates the sockets of a listener with `make` and assigns it to a shard.
    fn place_listener(
        &mut self,
        spec: ForwardSpec,
        make: impl FnOnce(u16) -> Result<Vec<OwnedFd>, ListenFailure>,
    ) {
        let ForwardSpec { forward, upstream, host_port, target_port, reach } = spec;
        if let Some(placed) = self.forwards.get(&forward) {
            if (placed.upstream, placed.host_port, placed.target_port) != (upstream, host_port, target_port) {
                return self.refuse(format!("{forward} exists already and leads elsewhere; close it first"));
            }
            self.set_reach(forward, reach);
            return self.emit(Event::ListenerOpened { forward, host_port });
        }
        let Some(held) = self.upstreams.get(&upstream).filter(|held| !held.removing) else {
            let address = SocketAddr::from(([127, 0, 0, 1], host_port.get()));
            let detail = format!("{upstream} does not exist");
            let failure = ListenFailure { kind: ListenFailureKind::Other, address, detail };
            return self.emit(Event::ListenerFailed { forward, host_port, failure });
        };
        let isolated = held.isolated;
        match make(self.backlog) {
            Ok(sockets) => {
                let accepting = isolated.unwrap_or_else(|| self.emptiest_shard());
                let shards: HashSet<usize> = match isolated {
                    Some(own) => HashSet::from([own]),
                    None => self.running().collect(),
                };
                let kept = match isolated.map(|_| duplicates(&sockets)).transpose() {
                    Ok(kept) => kept.unwrap_or_default(),
                    Err(failure) => return self.emit(Event::ListenerFailed { forward, host_port, failure }),
                };
                let placed = Placed {
                    shard: accepting,
                    kept,
                    last_stats: ForwardStats::default(),
                    due: None,
                    lent: false,
                    reach,
                    upstream,
                    host_port,
                    target_port,
                    ending: Ending::Drain,
                    shards: shards.clone(),
                    stats: ForwardStats::default(),
                };
                self.forwards.insert(forward, placed);
                // Sent first: a shard may report the end of the listener at any time from then on.
                self.emit(Event::ListenerOpened { forward, host_port });
                let open = |sockets| ShardCommand::OpenListener {
                    forward,
                    upstream,
                    host_port,
                    target_port,
                    reach,
                    sockets,
                };
                // The other shards get the forward before they get its connections.
                for shard in shards.iter().filter(|shard| **shard != accepting) {
                    self.send(*shard, open(Vec::new()));
                }
                self.send(accepting, open(sockets));
            }
            Err(failure) => self.emit(Event::ListenerFailed { forward, host_port, failure }),
        }
    }

    /// Returns the running shard with the fewest forwards.
    fn emptiest_shard(&self) -> usize {
        let load = |shard: usize| self.forwards.values().filter(|placed| placed.shard == shard).count();
        self.running().min_by_key(|shard| load(*shard)).unwrap_or(0)
    }

    /// Sets the families on which a server listens inside, in every shard of a forward.
    fn set_reach(&mut self, forward: ForwardId, reach: Reach) {
        let Some(placed) = self.forwards.get_mut(&forward) else { return };
        placed.reach = reach;
        let shards: Vec<usize> = placed.shards.iter().copied().collect();
        for shard in shards {
            self.send(shard, ShardCommand::SetReach { forward, reach });
        }
    }

    fn on_report(&mut self, shard: usize, report: Report) {
        let is_isolated = shard >= self.shards.len();
        if is_isolated && self.isolated.thread(shard).is_none() {
            // The shard was abandoned; its late reports are ignored.
            return;
        }
        match report {
            Report::ListenerClosed { forward, stats } => self.on_listener_closed(shard, forward, &stats),
            Report::UpstreamRemoved { upstream, reason } => self.on_upstream_removed(shard, upstream, reason),
            Report::State { forwards } => {
                if is_isolated {
                    self.record_stats(&forwards);
                }
                if let Some(forwards) = self.descriptions.answer(shard, forwards) {
                    self.emit_state(forwards);
                }
            }
            Report::Lent { listeners } => {
                if let Some(listeners) = self.lendings.answer(shard, listeners) {
                    self.emit_lent(listeners);
                }
            }
            Report::Stopped if is_isolated => {
                self.abandon_shard(shard, "the thread that relayed for it has ended")
            }
            Report::Degraded { what } => self.emit(Event::Degraded { what }),
            Report::Recovered { what } => self.emit(Event::Recovered { what }),
            Report::Stopped => {
                self.stopped.insert(shard);
                self.remove_from_answers(shard);
            }
        }
    }

    /// Continues without the answers of a shard.
    fn remove_from_answers(&mut self, shard: usize) {
        self.descriptions.remove_shard(shard);
        self.lendings.remove_shard(shard);
        self.emit_answers();
    }

    /// Sends the answers that are complete.
    fn emit_answers(&mut self) {
        while let Some(forwards) = self.descriptions.next() {
            self.emit_state(forwards);
        }
        while let Some(listeners) = self.lendings.next() {
            self.emit_lent(listeners);
        }
    }

    /// Handles that one shard has closed a forward. Once the accepting shard has, it passes on no more connections, so the
    /// other shards may close the forward, too.
    fn on_listener_closed(&mut self, shard: usize, forward: ForwardId, stats: &ForwardStats) {
        let Some(placed) = self.forwards.get_mut(&forward) else { return };
        placed.shards.remove(&shard);
        placed.stats.add(stats);
        if placed.shards.is_empty() {
            let stats = placed.stats;
            self.forwards.remove(&forward);
            self.emit(Event::ListenerClosed { forward, stats });
        } else if shard == placed.shard {
            let ending = placed.ending;
            let others: Vec<usize> = placed.shards.iter().copied().collect();
            for other in others {
                self.send(other, ShardCommand::CloseListener { forward, ending });
            }
        }
    }

    fn on_upstream_removed(&mut self, shard: usize, upstream: UpstreamId, reason: Option<String>) {
        let Some(held) = self.upstreams.get_mut(&upstream) else { return };
        held.shards.remove(&shard);
        let (is_gone, isolated) = (held.shards.is_empty(), held.isolated);
        // One shard has lost its channel. The channels of the other shards lead to the same opener.
        self.remove_upstream(upstream, Ending::Drain, reason);
        if is_gone && let Some(held) = self.upstreams.remove(&upstream) {
            self.emit(Event::UpstreamRemoved { upstream, reason: held.reason });
        }
        if let Some(own) = isolated {
            // The shard ends with its last connection.
            self.send(own, ShardCommand::Drain);
        }
    }

    fn on_watch(&mut self, event: WatchEvent) {
        match event {
            WatchEvent::Listeners { upstream, opened, closed } => {
                let Some(held) = self.upstreams.get_mut(&upstream).filter(|held| !held.removing) else {
                    return;
                };
                let listening = held.listening.get_or_insert_default();
                for row in &closed {
                    listening.remove(row);
                }
                listening.extend(&opened);
                self.emit_listeners(upstream, &opened, &closed);
            }
            WatchEvent::Lost { upstream, reason } => {
                if self.upstreams.get(&upstream).is_some_and(|held| !held.removing) {
                    self.remove_upstream(upstream, Ending::Drain, Some(reason));
                }
            }
        }
    }
}
