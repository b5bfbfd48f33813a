//! The one thread that knows of everything: commands in, shards and watch in between, events out.

mod agents;
mod telling;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::Instant;

use super::apart::{ANSWER_PATIENCE, Apart, OBEY_PATIENCE};
use super::gathering::Gatherings;
use super::shard_thread::ShardThread;
use crate::command::{
    Command, Ending, Event, ForwardId, ForwardState, ForwardStats, ListenFailure, ListenFailureKind,
    Listening, Reach, Told, UpstreamId, UpstreamKind, WatchSources,
};
use crate::listener;
use crate::shard::{Lent, Report, ShardCommand};
use crate::watch::{Sources, WatchEvent, Watcher};
use agents::duplicates;

/// What reaches the conductor.
#[derive(Debug)]
pub(super) enum Message {
    Command(Command, Vec<OwnedFd>),
    Report(usize, Report),
    Watch(WatchEvent),
}

pub(super) struct Conductor {
    /// Those that serve everybody.
    shards: Vec<ShardThread>,
    /// Those that serve one agent's upstream each.
    apart: Apart,
    watcher: Watcher,
    backlog: u16,
    events: Sender<Told>,
    upstreams: BTreeMap<UpstreamId, Held>,
    forwards: HashMap<ForwardId, Placed>,
    /// Descriptions that are being gathered.
    descriptions: Gatherings<ForwardState>,
    /// For each of them, whether what listens is part of it.
    with_observed: VecDeque<bool>,
    /// Listeners that are being gathered to be lent.
    lendings: Gatherings<Lent>,
    stopped: HashSet<usize>,
    /// It was told to drain or to stop.
    ending: bool,
}

/// An upstream, and the shards that have not let go of it.
struct Held {
    netns_cookie: u64,
    shards: HashSet<usize>,
    /// What listens inside, as the driver was told it; none before the first reading.
    listening: Option<BTreeSet<Listening>>,
    reason: Option<String>,
    leaving: bool,
    /// The shard of its own, where it has one.
    apart: Option<usize>,
    /// That shard is waited for until then.
    due: Option<Instant>,
}

/// A forward that is asked for.
#[derive(Clone, Copy)]
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
    /// Of a shard that may hang: duplicates of its listening sockets, by which they are closed or lent without it.
    kept: Vec<OwnedFd>,
    /// Of such a shard: what it counted last.
    seen: ForwardStats,
    /// Such a shard was told to close it, and is waited for until then.
    due: Option<Instant>,
    /// Another engine may listen on these sockets as well.
    lent: bool,
    reach: Reach,
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
        apart: Apart,
        watcher: Watcher,
        backlog: u16,
        events: Sender<Told>,
    ) -> Conductor {
        Conductor {
            shards,
            apart,
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
            if !self.apart.is_empty() {
                self.on_time(Instant::now());
            }
            if self.stopped.len() == self.shards.len() && self.apart.is_empty() {
                self.tell(Event::Stopped);
                return;
            }
        }
    }

    /// The shards that serve everybody and have not stopped.
    fn running(&self) -> impl Iterator<Item = usize> {
        (0..self.shards.len()).filter(|shard| !self.stopped.contains(shard))
    }

    fn refuse(&self, reason: String) {
        self.tell(Event::Refused { reason });
    }

    fn to_all(&self, command: impl Fn() -> ShardCommand<OwnedFd>) {
        let apart = self.apart.numbers().filter_map(|number| self.apart.thread(number));
        for shard in self.shards.iter().chain(apart) {
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
            Command::AdoptListener { forward, upstream, target_port } => {
                let reach = Reach::UNKNOWN;
                let wanted = Wanted { forward, upstream, host_port: target_port, target_port, reach };
                self.place_listener(wanted, |_| listener::adopt(target_port, descriptors));
            }
            Command::SetReach { forward, reach } => {
                self.set_reach(forward, reach);
            }
            Command::CloseListener { forward, ending } => match self.forwards.get_mut(&forward) {
                Some(placed) => {
                    placed.ending = ending;
                    let shard = placed.shard;
                    if self.apart.thread(shard).is_some() {
                        placed.due.get_or_insert_with(|| Instant::now() + OBEY_PATIENCE);
                    }
                    self.send(shard, ShardCommand::CloseListener { forward, ending });
                }
                None => self.tell(Event::ListenerClosed { forward, stats: ForwardStats::default() }),
            },
            Command::Describe => self.describe(true),
            Command::Count => self.describe(false),
            Command::LendListeners => {
                let until = Instant::now() + ANSWER_PATIENCE;
                self.lendings.begin(self.running().collect(), self.apart.numbers().collect(), until);
                self.to_all(|| ShardCommand::Lend);
            }
            Command::Rescan => self.watcher.rescan(),
            Command::Drain => {
                self.ending = true;
                self.to_all(|| ShardCommand::Drain);
                self.apart.expect_signs_of_life(Instant::now());
            }
            Command::Stop => {
                self.ending = true;
                self.to_all(|| ShardCommand::Stop);
                self.apart.expect_end(Instant::now());
            }
        }
    }

    /// Asks the shards for what they hold.
    fn describe(&mut self, with_observed: bool) {
        let until = Instant::now() + ANSWER_PATIENCE;
        self.with_observed.push_back(with_observed);
        self.descriptions.begin(self.running().collect(), self.apart.numbers().collect(), until);
        self.to_all(|| ShardCommand::Describe);
    }

    fn send(&self, shard: usize, command: ShardCommand<OwnedFd>) {
        if let Some(shard) = self.shards.get(shard).or_else(|| self.apart.thread(shard)) {
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
        // The host's sockets are made here.
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
        apart: Option<usize>,
    ) {
        let (listening, reason, leaving, due) = (None, None, false, None);
        self.upstreams
            .insert(upstream, Held { netns_cookie, shards, listening, reason, leaving, apart, due });
        self.tell(Event::UpstreamAdded { upstream });
    }

    fn remove_upstream(&mut self, upstream: UpstreamId, ending: Ending, reason: Option<String>) {
        let Some(held) = self.upstreams.get_mut(&upstream) else {
            return self.tell(Event::UpstreamRemoved { upstream, reason: None });
        };
        if std::mem::replace(&mut held.leaving, true) {
            return;
        }
        held.reason = reason;
        held.due = held.apart.map(|_| Instant::now() + OBEY_PATIENCE);
        let shards: Vec<usize> = held.shards.iter().copied().collect();
        self.watcher.remove(upstream);
        for shard in shards {
            self.send(shard, ShardCommand::RemoveUpstream { upstream, ending });
        }
    }

    fn open_listener(&mut self, wanted: Wanted, lent: Vec<OwnedFd>) {
        self.place_listener(wanted, |backlog| listener::open(wanted.host_port, backlog, lent));
    }

    /// Gives a listener, once `make` has its sockets, to a shard.
    fn place_listener(
        &mut self,
        wanted: Wanted,
        make: impl FnOnce(u16) -> Result<Vec<OwnedFd>, ListenFailure>,
    ) {
        let Wanted { forward, upstream, host_port, target_port, reach } = wanted;
        if let Some(placed) = self.forwards.get(&forward) {
            if (placed.upstream, placed.host_port, placed.target_port) != (upstream, host_port, target_port) {
                return self.refuse(format!("{forward} exists already and leads elsewhere; close it first"));
            }
            self.set_reach(forward, reach);
            return self.tell(Event::ListenerOpened { forward, host_port });
        }
        let Some(held) = self.upstreams.get(&upstream).filter(|held| !held.leaving) else {
            let address = SocketAddr::from(([127, 0, 0, 1], host_port.get()));
            let detail = format!("{upstream} is not there");
            let failure = ListenFailure { kind: ListenFailureKind::Other, address, detail };
            return self.tell(Event::ListenerFailed { forward, host_port, failure });
        };
        let apart = held.apart;
        match make(self.backlog) {
            Ok(sockets) => {
                let accepting = apart.unwrap_or_else(|| self.emptiest_shard());
                let shards: HashSet<usize> = match apart {
                    Some(own) => HashSet::from([own]),
                    None => self.running().collect(),
                };
                let kept = match apart.map(|_| duplicates(&sockets)).transpose() {
                    Ok(kept) => kept.unwrap_or_default(),
                    Err(failure) => return self.tell(Event::ListenerFailed { forward, host_port, failure }),
                };
                let placed = Placed {
                    shard: accepting,
                    kept,
                    seen: ForwardStats::default(),
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
                for shard in shards.iter().filter(|shard| **shard != accepting) {
                    self.send(*shard, open(Vec::new()));
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

    /// Tells every shard of a forward which families listen inside.
    fn set_reach(&mut self, forward: ForwardId, reach: Reach) {
        let Some(placed) = self.forwards.get_mut(&forward) else { return };
        placed.reach = reach;
        let shards: Vec<usize> = placed.shards.iter().copied().collect();
        for shard in shards {
            self.send(shard, ShardCommand::SetReach { forward, reach });
        }
    }

    fn on_report(&mut self, shard: usize, report: Report) {
        let is_apart = shard >= self.shards.len();
        if is_apart && self.apart.thread(shard).is_none() {
            // It was left to itself. What it tells now is over.
            return;
        }
        match report {
            Report::ListenerClosed { forward, stats } => self.on_listener_closed(shard, forward, &stats),
            Report::UpstreamRemoved { upstream, reason } => self.on_upstream_removed(shard, upstream, reason),
            Report::State { forwards } => {
                if is_apart {
                    self.note_seen(&forwards);
                }
                if let Some(forwards) = self.descriptions.answer(shard, forwards) {
                    self.tell_state(forwards);
                }
            }
            Report::Lent { listeners } => {
                if let Some(listeners) = self.lendings.answer(shard, listeners) {
                    self.tell_lent(listeners);
                }
            }
            Report::Stopped if is_apart => self.part_with(shard, "the thread that relayed for it has ended"),
            Report::Degraded { what } => self.tell(Event::Degraded { what }),
            Report::Recovered { what } => self.tell(Event::Recovered { what }),
            Report::Stopped => {
                self.stopped.insert(shard);
                self.forgo_answers(shard);
            }
        }
    }

    /// A shard answers no more.
    fn forgo_answers(&mut self, shard: usize) {
        self.descriptions.forgo(shard);
        self.lendings.forgo(shard);
        self.tell_answers();
    }

    /// Tells the answers that are whole.
    fn tell_answers(&mut self) {
        while let Some(forwards) = self.descriptions.next() {
            self.tell_state(forwards);
        }
        while let Some(listeners) = self.lendings.next() {
            self.tell_lent(listeners);
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
        let Some(held) = self.upstreams.get_mut(&upstream) else { return };
        held.shards.remove(&shard);
        let (is_gone, apart) = (held.shards.is_empty(), held.apart);
        // One shard has lost its way in: the others' ways lead through the same opener.
        self.remove_upstream(upstream, Ending::Drain, reason);
        if is_gone && let Some(held) = self.upstreams.remove(&upstream) {
            self.tell(Event::UpstreamRemoved { upstream, reason: held.reason });
        }
        if let Some(own) = apart {
            // It ends with its last connection.
            self.send(own, ShardCommand::Drain);
        }
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
}
