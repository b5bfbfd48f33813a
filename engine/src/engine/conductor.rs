//! The one thread that knows of everything: commands in, shards and watch in between, events out.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, Sender};

use super::gathering::Gatherings;
use super::shard_thread::ShardThread;
use crate::command::{
    Command, Ending, Event, ForwardId, ForwardState, ForwardStats, ListenFailure, ListenFailureKind,
    Listening, Reach, Told, UpstreamId, UpstreamKind, UpstreamState, WatchSources,
};
use crate::listener;
use crate::shard::{Lent, Report, ShardCommand};
use crate::watch::{Sources, WatchEvent, Watcher};

/// What reaches the conductor.
#[derive(Debug)]
pub(super) enum Message {
    Command(Command, Vec<OwnedFd>),
    Report(usize, Report),
    Watch(WatchEvent),
}

/// How many forwards of a state fit one event, and so one message (about 330 bytes of JSON each).
const FORWARDS_PER_STATE: usize = 256;
/// How many listeners fit one event (about 100 bytes of JSON each).
const LISTENERS_PER_EVENT: usize = 1_024;

pub(super) struct Conductor {
    shards: Vec<ShardThread>,
    watcher: Watcher,
    backlog: u16,
    events: Sender<Told>,
    upstreams: BTreeMap<UpstreamId, Held>,
    forwards: HashMap<ForwardId, Placed>,
    /// Descriptions that are being gathered.
    descriptions: Gatherings<ForwardState>,
    /// Listeners that are being gathered to be lent.
    lendings: Gatherings<Lent>,
    stopped: HashSet<usize>,
}

/// An upstream, and the shards that have not let go of it.
struct Held {
    netns_cookie: u64,
    shards: HashSet<usize>,
    /// What listens inside, as the driver was told it; none before the first reading.
    listening: Option<BTreeSet<Listening>>,
    reason: Option<String>,
    leaving: bool,
}

/// A forward that is asked for.
struct Wanted {
    forward: ForwardId,
    upstream: UpstreamId,
    host_port: NonZeroU16,
    target_port: NonZeroU16,
    reach: Reach,
}

/// A forward whose listener is open, or is being closed.
struct Placed {
    /// The shard that accepts for all.
    shard: usize,
    upstream: UpstreamId,
    host_port: NonZeroU16,
    target_port: NonZeroU16,
    ending: Ending,
    /// The shards that have not closed it.
    shards: HashSet<usize>,
    /// The sum of what those that have closed it counted.
    stats: ForwardStats,
}

impl Conductor {
    pub(super) fn new(
        shards: Vec<ShardThread>,
        watcher: Watcher,
        backlog: u16,
        events: Sender<Told>,
    ) -> Conductor {
        Conductor {
            shards,
            watcher,
            backlog,
            events,
            upstreams: BTreeMap::new(),
            forwards: HashMap::new(),
            descriptions: Gatherings::default(),
            lendings: Gatherings::default(),
            stopped: HashSet::new(),
        }
    }

    pub(super) fn run(mut self, inbox: &Receiver<Message>) {
        while let Ok(message) = inbox.recv() {
            match message {
                Message::Command(command, descriptors) => self.on_command(command, descriptors),
                Message::Report(shard, report) => self.on_report(shard, report),
                Message::Watch(event) => self.on_watch(event),
            }
            if self.stopped.len() == self.shards.len() {
                self.tell(Event::Stopped);
                return;
            }
        }
    }

    fn tell(&self, event: Event) {
        // Nobody listens any more only while the engine is being dropped.
        let _ = self.events.send(event.into());
    }

    /// The shards that have not stopped.
    fn running(&self) -> impl Iterator<Item = usize> {
        (0..self.shards.len()).filter(|shard| !self.stopped.contains(shard))
    }

    fn refuse(&self, reason: String) {
        self.tell(Event::Refused { reason });
    }

    fn to_all(&self, command: impl Fn() -> ShardCommand<OwnedFd>) {
        for shard in &self.shards {
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
                let wanted = Wanted { forward, upstream, host_port, target_port, reach };
                self.open_listener(wanted, descriptors);
            }
            Command::SetReach { forward, reach } => {
                self.to_all(|| ShardCommand::SetReach { forward, reach });
            }
            Command::CloseListener { forward, ending } => match self.forwards.get_mut(&forward) {
                Some(placed) => {
                    placed.ending = ending;
                    let shard = placed.shard;
                    self.send(shard, ShardCommand::CloseListener { forward, ending });
                }
                None => self.tell(Event::ListenerClosed { forward, stats: ForwardStats::default() }),
            },
            Command::Describe => {
                self.descriptions.begin(self.running().collect());
                self.to_all(|| ShardCommand::Describe);
            }
            Command::LendListeners => {
                self.lendings.begin(self.running().collect());
                self.to_all(|| ShardCommand::Lend);
            }
            Command::Rescan => self.watcher.rescan(),
            Command::Drain => self.to_all(|| ShardCommand::Drain),
            Command::Stop => self.to_all(|| ShardCommand::Stop),
        }
    }

    fn send(&self, shard: usize, command: ShardCommand<OwnedFd>) {
        if let Some(shard) = self.shards.get(shard) {
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
        let expected = self.shards.len() + sources.count();
        if descriptors.len() != expected {
            let (got, shards) = (descriptors.len(), self.shards.len());
            return self.refuse(format!(
                "{upstream} came with {got} descriptors; expected {expected}, a channel for each of {shards} \
                 shards and the sources named"
            ));
        }
        let mut descriptors = descriptors.into_iter();
        for shard in &self.shards {
            let Some(channel) = descriptors.next() else { break };
            shard.send(ShardCommand::AddUpstream { upstream, kind, channel, netns_cookie });
        }
        let mut source = |present: bool| if present { descriptors.next() } else { None };
        let files = Sources {
            tcp: source(sources.proc_tcp),
            tcp6: source(sources.proc_tcp6),
            sock_diag: source(sources.sock_diag),
        };
        let shards = (0..self.shards.len()).collect();
        let held = Held { netns_cookie, shards, listening: None, reason: None, leaving: false };
        self.upstreams.insert(upstream, held);
        self.tell(Event::UpstreamAdded { upstream });
        if sources.count() > 0 {
            self.watcher.add(upstream, files);
        }
    }

    fn remove_upstream(&mut self, upstream: UpstreamId, ending: Ending, reason: Option<String>) {
        let Some(held) = self.upstreams.get_mut(&upstream) else {
            return self.tell(Event::UpstreamRemoved { upstream, reason: None });
        };
        if std::mem::replace(&mut held.leaving, true) {
            return;
        }
        held.reason = reason;
        let shards: Vec<usize> = held.shards.iter().copied().collect();
        self.watcher.remove(upstream);
        for shard in shards {
            self.send(shard, ShardCommand::RemoveUpstream { upstream, ending });
        }
    }

    fn open_listener(&mut self, wanted: Wanted, lent: Vec<OwnedFd>) {
        let Wanted { forward, upstream, host_port, target_port, reach } = wanted;
        if let Some(placed) = self.forwards.get(&forward) {
            if (placed.upstream, placed.host_port, placed.target_port) != (upstream, host_port, target_port) {
                return self.refuse(format!("{forward} exists already and leads elsewhere; close it first"));
            }
            self.to_all(|| ShardCommand::SetReach { forward, reach });
            return self.tell(Event::ListenerOpened { forward, host_port });
        }
        if self.upstreams.get(&upstream).is_none_or(|held| held.leaving) {
            let address = SocketAddr::from(([127, 0, 0, 1], host_port.get()));
            let detail = format!("{upstream} is not there");
            let failure = ListenFailure { kind: ListenFailureKind::Other, address, detail };
            return self.tell(Event::ListenerFailed { forward, host_port, failure });
        }
        match listener::open(host_port, self.backlog, lent) {
            Ok(sockets) => {
                let accepting = self.emptiest_shard();
                let shards = self.running().collect();
                let (ending, stats) = (Ending::Drain, ForwardStats::default());
                let placed =
                    Placed { shard: accepting, upstream, host_port, target_port, ending, shards, stats };
                self.forwards.insert(forward, placed);
                // Told first: its closing, which a shard may report at any time, comes after its opening.
                self.tell(Event::ListenerOpened { forward, host_port });
                let open = |sockets| ShardCommand::OpenListener {
                    forward,
                    upstream,
                    host_port,
                    target_port,
                    reach,
                    sockets,
                };
                // The others know of it before they are handed its connections.
                for shard in (0..self.shards.len()).filter(|shard| *shard != accepting) {
                    self.send(shard, open(Vec::new()));
                }
                self.send(accepting, open(sockets));
            }
            Err(failure) => self.tell(Event::ListenerFailed { forward, host_port, failure }),
        }
    }

    /// The shard with the fewest forwards that still runs.
    fn emptiest_shard(&self) -> usize {
        let load = |shard: usize| self.forwards.values().filter(|placed| placed.shard == shard).count();
        self.running().min_by_key(|shard| load(*shard)).unwrap_or(0)
    }

    fn on_report(&mut self, shard: usize, report: Report) {
        match report {
            Report::ListenerClosed { forward, stats } => self.on_listener_closed(shard, forward, &stats),
            Report::UpstreamRemoved { upstream, reason } => self.on_upstream_removed(shard, upstream, reason),
            Report::State { forwards } => {
                if let Some(forwards) = self.descriptions.answer(shard, forwards) {
                    self.tell_state(forwards);
                }
            }
            Report::Lent { listeners } => {
                if let Some(listeners) = self.lendings.answer(shard, listeners) {
                    self.tell_lent(listeners);
                }
            }
            Report::Degraded { what } => self.tell(Event::Degraded { what }),
            Report::Recovered { what } => self.tell(Event::Recovered { what }),
            Report::Stopped => {
                self.stopped.insert(shard);
                self.descriptions.forgo(shard);
                self.lendings.forgo(shard);
                while let Some(forwards) = self.descriptions.next() {
                    self.tell_state(forwards);
                }
                while let Some(listeners) = self.lendings.next() {
                    self.tell_lent(listeners);
                }
            }
        }
    }

    /// One shard has closed a forward. Once the one that accepts has, it hands over no more, and the others may forget it.
    fn on_listener_closed(&mut self, shard: usize, forward: ForwardId, stats: &ForwardStats) {
        let Some(placed) = self.forwards.get_mut(&forward) else { return };
        placed.shards.remove(&shard);
        placed.stats.add(stats);
        if placed.shards.is_empty() {
            let stats = placed.stats;
            self.forwards.remove(&forward);
            self.tell(Event::ListenerClosed { forward, stats });
        } else if shard == placed.shard {
            let ending = placed.ending;
            let others: Vec<usize> = placed.shards.iter().copied().collect();
            for other in others {
                self.send(other, ShardCommand::CloseListener { forward, ending });
            }
        }
    }

    fn on_upstream_removed(&mut self, shard: usize, upstream: UpstreamId, reason: Option<String>) {
        // One shard has lost its way in: the others' ways lead through the same opener.
        self.remove_upstream(upstream, Ending::Drain, reason);
        if let Some(held) = self.upstreams.get_mut(&upstream) {
            held.shards.remove(&shard);
            if held.shards.is_empty()
                && let Some(held) = self.upstreams.remove(&upstream)
            {
                self.tell(Event::UpstreamRemoved { upstream, reason: held.reason });
            }
        }
    }

    /// Tells what the shards hold, joined by forward, and before it what listens inside.
    fn tell_state(&self, parts: Vec<ForwardState>) {
        let mut forwards: BTreeMap<ForwardId, ForwardState> = BTreeMap::new();
        for part in parts {
            match forwards.entry(part.forward) {
                Entry::Vacant(vacant) => {
                    vacant.insert(part);
                }
                Entry::Occupied(mut known) => {
                    known.get_mut().listening |= part.listening;
                    known.get_mut().stats.add(&part.stats);
                }
            }
        }
        let forwards: Vec<ForwardState> = forwards.into_values().collect();
        self.tell_observed();
        let upstreams: Vec<UpstreamState> = self
            .upstreams
            .iter()
            .map(|(&upstream, held)| UpstreamState { upstream, netns_cookie: held.netns_cookie })
            .collect();
        in_parts(&forwards, FORWARDS_PER_STATE, |forwards, more| {
            self.tell(Event::State { upstreams: upstreams.clone(), forwards, more });
        });
    }

    /// Tells all that listens in the namespaces that have been read. Nothing can come between this and the listeners that
    /// were told before, since both are told here.
    fn tell_observed(&self) {
        for (&upstream, held) in &self.upstreams {
            let Some(listening) = &held.listening else { continue };
            let listening: Vec<Listening> = listening.iter().copied().collect();
            in_parts(&listening, LISTENERS_PER_EVENT, |listening, more| {
                self.tell(Event::Observed { upstream, listening, more });
            });
        }
    }

    fn tell_lent(&self, listeners: Vec<Lent>) {
        let count = u32::try_from(listeners.len()).unwrap_or(u32::MAX);
        for Lent {
            forward: ForwardState { forward, upstream, host_port, target_port, reach, .. },
            sockets,
        } in listeners
        {
            let event = Event::ListenerLent { forward, upstream, host_port, target_port, reach };
            let _ = self.events.send(Told { event, descriptors: sockets });
        }
        self.tell(Event::ListenersLent { count });
    }

    fn on_watch(&mut self, event: WatchEvent) {
        match event {
            WatchEvent::Listeners { upstream, opened, closed } => {
                let Some(held) = self.upstreams.get_mut(&upstream).filter(|held| !held.leaving) else {
                    return;
                };
                let listening = held.listening.get_or_insert_default();
                for row in &closed {
                    listening.remove(row);
                }
                listening.extend(&opened);
                self.tell_listeners(upstream, &opened, &closed);
            }
            WatchEvent::Lost { upstream, reason } => {
                if self.upstreams.get(&upstream).is_some_and(|held| !held.leaving) {
                    self.remove_upstream(upstream, Ending::Drain, Some(reason));
                }
            }
        }
    }

    /// Tells of listeners in as many events as fit messages. What closed comes first, since a server that was replaced is in both.
    fn tell_listeners(&self, upstream: UpstreamId, opened: &[Listening], closed: &[Listening]) {
        if opened.len() + closed.len() <= LISTENERS_PER_EVENT {
            let (opened, closed) = (opened.to_vec(), closed.to_vec());
            return self.tell(Event::Listeners { upstream, opened, closed });
        }
        for closed in closed.chunks(LISTENERS_PER_EVENT) {
            self.tell(Event::Listeners { upstream, opened: Vec::new(), closed: closed.to_vec() });
        }
        for opened in opened.chunks(LISTENERS_PER_EVENT) {
            self.tell(Event::Listeners { upstream, opened: opened.to_vec(), closed: Vec::new() });
        }
    }
}

/// Gives out `all` in parts of `most` with whether another one follows; the only part of nothing is empty.
fn in_parts<T: Clone>(all: &[T], most: usize, mut give: impl FnMut(Vec<T>, bool)) {
    let parts = all.len().div_ceil(most).max(1);
    let mut chunks = all.chunks(most);
    for part in 1..=parts {
        give(chunks.next().unwrap_or_default().to_vec(), part < parts);
    }
}
