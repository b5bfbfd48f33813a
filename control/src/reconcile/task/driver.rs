//! The loop: what happens comes in, commands go out.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use landfall_engine::command::{Command, Event};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{sleep_until, timeout_at};
use tokio_util::task::AbortOnDropHandle;

use super::containers::{Container, Visiting, wanted_way};
use super::{Ask, ForwardingOptions, Owners, Published};
use crate::docker::Docker;
use crate::events::{Event as JournalEvent, Journal, PortForwardEvent};
use crate::paths::Home;
use crate::processes::{self, ProcessFact};
use crate::reconcile::engine_link::{self, Attached, Link, LinkError};
use crate::reconcile::fleet::{Admission, Change, Fleet};
use crate::reconcile::reach::{self, Certainty, Gate, Told, Word};
use crate::reconcile::table::{ForwardTable, Reached, RowState};
use crate::registration::model::ContainerName;
use crate::registration::store::Registered;
use crate::version;

/// How long an engine rests between attempts to start it: the first time, and at most.
const REST: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// An engine that has lived this long is started again at once when it is gone.
const LIVED: Duration = Duration::from_secs(10);
/// How long after the engine let go of a container it is entered again.
const ENTER_AGAIN: Duration = Duration::from_secs(2);
/// How long connections may take to finish when the engine is stopped.
const DRAIN_MAX: Duration = Duration::from_secs(3);
/// How long the engine may then take to end.
const STOP_MAX: Duration = Duration::from_secs(1);

/// The task's ends of the handle.
pub(super) struct Parts {
    pub(super) asked: mpsc::UnboundedReceiver<Ask>,
    pub(super) ended: mpsc::UnboundedSender<ContainerName>,
    pub(super) published: Arc<Published>,
}

/// Where the engine is.
pub(super) enum Engine {
    /// Not there. It is tried to have one at `again`, if somebody needs one.
    Absent { again: Instant },
    /// Being looked for.
    Coming(AbortOnDropHandle<Result<Option<Attached>, LinkError>>),
    /// Here, since then.
    Attached(Link, Instant),
}

pub(super) struct Driver {
    pub(super) home: Home,
    pub(super) journal: Journal,
    docker: Docker,
    replayed: Option<BoxFuture<'static, ()>>,
    registrations: watch::Receiver<Arc<Registered>>,
    parts: Parts,
    pub(super) fleet: Fleet,
    pub(super) engine: Engine,
    rest: Duration,
    /// The last failure to have an engine, told once.
    failure: Option<String>,
    /// In the order of registration.
    pub(super) containers: Vec<Container>,
    words: mpsc::UnboundedSender<Told>,
    pub(super) told: mpsc::UnboundedReceiver<Told>,
    /// Numbers of visits and of requests to enter.
    serial: u64,
    /// Everything that an earlier driver left is claimed or swept.
    settled: bool,
    /// Whether the engine's other version was dealt with.
    pub(super) compared: bool,
    /// One token for each engine that finishes its connections; told to stop by the watch.
    pub(super) draining: Arc<()>,
    pub(super) stop_drained: watch::Sender<bool>,
    tables: Vec<oneshot::Sender<ForwardTable>>,
    owners: Owners,
    looking: Option<JoinHandle<Owners>>,
}

/// What woke the loop.
enum Turn {
    Ask(Option<Ask>),
    Registrations,
    Word(Told),
    Engine(Result<Event, LinkError>),
    Came(Result<Option<Attached>, LinkError>),
    Replayed,
    Owners(Owners),
    Time,
}

impl Driver {
    pub(super) fn new(options: ForwardingOptions, parts: Parts) -> Driver {
        let ForwardingOptions { home, journal, docker, replayed, registrations, control_ports } = options;
        let (words, told) = mpsc::unbounded_channel();
        Driver {
            home,
            journal,
            docker,
            replayed: Some(replayed),
            registrations,
            parts,
            fleet: Fleet::new(control_ports),
            engine: Engine::Absent { again: Instant::now() },
            rest: REST.0,
            failure: None,
            containers: Vec::new(),
            words,
            told,
            serial: 0,
            settled: false,
            compared: false,
            draining: Arc::new(()),
            stop_drained: watch::Sender::new(false),
            tables: Vec::new(),
            owners: Owners::new(),
            looking: None,
        }
    }

    pub(super) async fn run(mut self) {
        self.registrations.mark_unchanged();
        self.sync();
        // One that runs is taken over even where nobody needs it: what it holds for nobody has to end.
        if matches!(self.engine, Engine::Absent { .. }) {
            self.look_for_engine(true);
        }
        loop {
            self.step().await;
            self.publish();
            match self.wait().await {
                Turn::Ask(None) => return,
                Turn::Ask(Some(Ask::Detach(done))) => {
                    // Whoever waits may go on once the channel is closed.
                    drop(self);
                    let _ = done.send(());
                    return;
                }
                Turn::Ask(Some(Ask::StopEngine(done))) => {
                    self.stop().await;
                    self.publish();
                    let _ = done.send(());
                    return;
                }
                Turn::Ask(Some(Ask::Table(answer))) => self.describe(answer).await,
                Turn::Ask(Some(Ask::LookAgain(name))) => self.look_again(&name),
                Turn::Registrations => self.sync(),
                Turn::Word(word) => self.hear_word(word).await,
                Turn::Engine(Ok(event)) => self.hear_engine(&event),
                Turn::Engine(Err(error)) => self.lose_engine(&error.to_string()),
                Turn::Came(came) => self.welcome(came),
                Turn::Replayed => self.replayed = None,
                Turn::Owners(found) => {
                    self.looking = None;
                    self.owners.extend(found);
                }
                Turn::Time => self.on_time(),
            }
        }
    }

    /// Waits for whatever is next.
    async fn wait(&mut self) -> Turn {
        let due = self.due();
        let time = async {
            match due {
                Some(due) => sleep_until(due.into()).await,
                None => std::future::pending().await,
            }
        };
        let replayed = async {
            match &mut self.replayed {
                Some(replayed) => replayed.await,
                None => std::future::pending().await,
            }
        };
        let looking = async {
            match &mut self.looking {
                Some(looking) => looking.await.unwrap_or_default(),
                None => std::future::pending().await,
            }
        };
        let engine = async {
            match &mut self.engine {
                Engine::Attached(link, _) => Turn::Engine(link.recv().await.map(|(event, _)| event)),
                Engine::Coming(coming) => Turn::Came(coming.await.unwrap_or(Err(LinkError::Silent))),
                Engine::Absent { .. } => std::future::pending().await,
            }
        };
        let registrations = async {
            // Once the registry is gone, what was registered last is forwarded on.
            if self.registrations.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            ask = self.parts.asked.recv() => Turn::Ask(ask),
            () = registrations => Turn::Registrations,
            Some(word) = self.told.recv() => Turn::Word(word),
            turn = engine => turn,
            () = replayed => Turn::Replayed,
            owners = looking => Turn::Owners(owners),
            () = time => Turn::Time,
        }
    }

    fn due(&self) -> Option<Instant> {
        let engine = match &self.engine {
            Engine::Absent { again } if self.is_needed() => Some(*again),
            _ => None,
        };
        let planner = matches!(self.engine, Engine::Attached(..)).then(|| self.fleet.due()).flatten();
        let again = self.containers.iter().filter_map(|container| container.again).min();
        [engine, planner, again].into_iter().flatten().min()
    }

    fn is_needed(&self) -> bool {
        self.containers.iter().any(|container| container.way.is_some())
    }

    fn on_time(&mut self) {
        let now = Instant::now();
        if matches!(&self.engine, Engine::Absent { again } if *again <= now) && self.is_needed() {
            self.look_for_engine(false);
        }
        let due = |container: &Container| container.again.is_some_and(|again| again <= now);
        let again: Vec<usize> =
            (0..self.containers.len()).filter(|at| self.containers.get(*at).is_some_and(due)).collect();
        for at in again {
            self.enter(at);
        }
    }

    /// Makes the containers those that are registered.
    fn sync(&mut self) {
        let registered = self.registrations.borrow_and_update().clone();
        let mut before = std::mem::take(&mut self.containers);
        for registration in &registered.entries {
            let same = |known: &Container| known.name() == &registration.container_name;
            let known = before.iter().position(same).map(|at| before.swap_remove(at));
            let container = match known {
                Some(known) if known.way == wanted_way(registration) => {
                    Container { registration: Arc::clone(registration), ..known }
                }
                other => {
                    if let Some(other) = other {
                        self.fleet.left(other.name());
                    }
                    Container::new(Arc::clone(registration))
                }
            };
            self.containers.push(container);
        }
        drop(before);
        let unvisited = |container: &Container| container.visit.is_none() && container.way.is_some();
        let unvisited: Vec<usize> =
            (0..self.containers.len()).filter(|at| self.containers.get(*at).is_some_and(unvisited)).collect();
        for at in unvisited {
            self.set_out(at);
        }
        self.fleet.wish(self.containers.iter().filter_map(Container::wish).collect());
        if self.is_needed() && matches!(&self.engine, Engine::Absent { again } if *again <= Instant::now()) {
            self.look_for_engine(false);
        }
    }

    fn set_out(&mut self, at: usize) {
        let gate = self.next_gate();
        let number = self.serial;
        let Some(container) = self.containers.get_mut(at) else { return };
        // A process that has ended does not come again under the same registration.
        if let Some(way) = container.way.clone() {
            let visit = Visiting::begin(
                &container.registration.container_name,
                number,
                &way,
                &self.docker,
                gate,
                &self.words,
            );
            container.visit = Some(visit);
        }
    }

    /// A new request to enter, if there is an engine to enter for.
    pub(super) fn next_gate(&mut self) -> Option<Gate> {
        self.serial += 1;
        match &self.engine {
            Engine::Attached(link, _) => Some(Gate { serial: self.serial, shards: link.shards }),
            _ => None,
        }
    }

    /// Has a container entered anew.
    fn enter(&mut self, at: usize) {
        let gate = self.next_gate();
        if let Some(container) = self.containers.get_mut(at) {
            container.again = None;
            if let Some(visit) = &container.visit {
                visit.gate.send_replace(gate);
            }
        }
    }

    fn look_again(&self, name: &str) {
        for container in self.containers.iter().filter(|container| container.name().as_str() == name) {
            if let Some(visit) = &container.visit {
                visit.hint.notify_one();
            }
        }
    }

    fn look_for_engine(&mut self, first: bool) {
        let home = self.home.clone();
        let may_start = self.is_needed() || !first;
        let coming = tokio::spawn(async move { engine_link::obtain(&home, may_start).await });
        self.engine = Engine::Coming(AbortOnDropHandle::new(coming));
    }

    /// An engine is here, or there is none.
    fn welcome(&mut self, came: Result<Option<Attached>, LinkError>) {
        let now = Instant::now();
        match came {
            Ok(Some(Attached { link, inventory, started })) => {
                self.failure = None;
                let facts = link.facts(0);
                self.journal.tell(&JournalEvent::EngineAttached {
                    version: facts.version,
                    ring: facts.ring,
                    reason: facts.reason,
                    started,
                });
                self.fleet.attach(inventory);
                self.settled = false;
                self.compared = false;
                self.engine = Engine::Attached(link, now);
                for at in 0..self.containers.len() {
                    if let Some(container) = self.containers.get_mut(at) {
                        container.tried = false;
                    }
                    self.enter(at);
                }
            }
            Ok(None) => self.engine = Engine::Absent { again: now },
            Err(error) => {
                self.engine = Engine::Absent { again: now + self.rest };
                self.rest = (2 * self.rest).min(REST.1);
                let text = error.to_string();
                if self.failure.as_ref() != Some(&text) {
                    self.journal.tell(&JournalEvent::Notice { text: text.clone() });
                    self.failure = Some(text);
                }
            }
        }
    }

    pub(super) fn lose_engine(&mut self, reason: &str) {
        let now = Instant::now();
        if let Engine::Attached(_, since) = &self.engine {
            let lived = now.saturating_duration_since(*since) >= LIVED;
            self.rest = if lived { REST.0 } else { self.rest };
            self.journal.tell(&JournalEvent::EngineLost { reason: reason.to_owned() });
            // The first attempt is at once; one that dies young is given time.
            let pause = if lived || self.rest == REST.0 { Duration::ZERO } else { self.rest };
            self.rest = (2 * self.rest).min(REST.1);
            self.engine = Engine::Absent { again: now + pause };
        }
        let changes = self.fleet.detach();
        self.tell_all(changes);
        for container in &mut self.containers {
            if let Some(visit) = &container.visit {
                visit.gate.send_replace(None);
            }
            if container.state == Reached::Reached {
                container.state = Reached::Waiting;
                container.reason = Some("the engine is being started again".to_owned());
            }
        }
        let table = self.table();
        for answer in self.tables.drain(..) {
            let _ = answer.send(table.clone());
        }
    }

    pub(super) fn hear_engine(&mut self, event: &Event) {
        match event {
            Event::Degraded { what } => self.notice(what.clone()),
            Event::Recovered { what } => self.notice(format!("recovered: {what}")),
            Event::Refused { reason } => self.notice(format!("the engine refused: {reason}")),
            Event::Stopped => return self.lose_engine("it was stopped"),
            _ => {}
        }
        let changes = self.fleet.hear(event, Instant::now());
        self.tell_all(changes);
        if matches!(event, Event::State { more: false, .. }) {
            let table = self.table();
            for answer in self.tables.drain(..) {
                // Whoever asked may have gone.
                let _ = answer.send(table.clone());
            }
        }
    }

    fn notice(&self, text: String) {
        self.journal.tell(&JournalEvent::Notice { text });
    }

    /// Where a visit is that told this, unless it was replaced meanwhile.
    pub(super) fn place_of(&self, told: &Told) -> Option<usize> {
        self.containers.iter().position(|container| {
            *container.name() == told.name
                && container.visit.as_ref().is_some_and(|visit| visit.number == told.visit)
        })
    }

    pub(super) async fn hear_word(&mut self, told: Told) {
        let Some(at) = self.place_of(&told) else { return };
        let Some(container) = self.containers.get_mut(at) else { return };
        match told.word {
            Word::Entered { serial, cookie, sources, descriptors } => {
                let visit = container.visit.as_ref();
                if visit.is_some_and(|visit| visit.gate.borrow().is_some_and(|gate| gate.serial == serial)) {
                    self.admit(at, cookie, sources, descriptors).await;
                }
            }
            Word::Missed { certainty, reason } => {
                container.tried |= certainty != Certainty::Unknown;
                let (state, told) = match certainty {
                    Certainty::Gone => (Reached::Waiting, false),
                    Certainty::Refused | Certainty::Unknown => (Reached::Unreachable, true),
                };
                if certainty == Certainty::Gone {
                    self.fleet.left(&told_name(container));
                }
                self.mark(at, state, Some(reason), told);
            }
            Word::Left { reason } => {
                container.tried = true;
                container.again = None;
                self.fleet.left(&told_name(container));
                self.mark(at, Reached::Waiting, Some(reason), true);
            }
            Word::Ended => {
                container.tried = true;
                container.again = None;
                let name = told_name(container);
                self.fleet.left(&name);
                self.mark(at, Reached::Waiting, Some("its process has ended".to_owned()), false);
                // Nobody may listen; the container is then looked at by whoever looks at all of them.
                let _ = self.parts.ended.send(name);
            }
        }
    }

    async fn admit(
        &mut self,
        at: usize,
        netns_cookie: u64,
        sources: landfall_engine::command::WatchSources,
        descriptors: Vec<std::os::fd::OwnedFd>,
    ) {
        let Some(container) = self.containers.get_mut(at) else { return };
        container.tried = true;
        let name = told_name(container);
        match self.fleet.reached(&name, netns_cookie) {
            Admission::Known(_) => self.mark(at, Reached::Reached, None, true),
            Admission::Add(upstream) => {
                // What the one before held has to be let go of first.
                self.step_once().await;
                let command = Command::AddUpstream { upstream, netns_cookie, sources };
                if self.give(&command, &descriptors).await {
                    self.mark(at, Reached::Reached, None, true);
                }
            }
            Admission::Shared(other) => {
                container.again = Some(Instant::now() + ENTER_AGAIN);
                let reason =
                    format!("it shares the network of container \"{other}\", which is forwarded already");
                self.mark(at, Reached::Unreachable, Some(reason), true);
            }
            Admission::Unwanted => {}
        }
    }

    /// Notes how far a container is reached, and tells when that is news.
    fn mark(&mut self, at: usize, state: Reached, reason: Option<String>, tell: bool) {
        let Some(container) = self.containers.get_mut(at) else { return };
        let news = container.state != state || container.reason != reason;
        container.state = state;
        container.reason = reason.clone();
        if !news || !tell {
            return;
        }
        let container_name = container.name().as_str().to_owned();
        let way = container.way.as_ref().map(reach::describe).unwrap_or_default();
        self.journal.tell(&match state {
            Reached::Reached => JournalEvent::ContainerReached { container_name, way },
            _ => JournalEvent::ContainerUnreachable { container_name, reason: reason.unwrap_or_default() },
        });
    }

    /// Gives the engine what the planner has, and deals with what is due once for each engine.
    async fn step(&mut self) {
        self.step_once().await;
        if !self.settled && self.is_settled() {
            self.settled = true;
            self.fleet.sweep();
            self.step_once().await;
        }
        if self.settled && !self.compared {
            self.compared = true;
            self.compare_versions().await;
            self.step_once().await;
        }
    }

    /// Whether everybody had the chance to claim what an earlier driver left.
    fn is_settled(&self) -> bool {
        let attached = matches!(self.engine, Engine::Attached(..));
        let tried = |container: &Container| container.tried || container.way.is_none();
        attached && self.replayed.is_none() && self.containers.iter().all(tried)
    }

    async fn compare_versions(&mut self) {
        let Engine::Attached(link, _) = &self.engine else { return };
        let (theirs, ours) = (link.version().to_owned(), version::current());
        if theirs == ours || theirs == version::UNVERSIONED || ours == version::UNVERSIONED {
            return;
        }
        if !self.is_needed() {
            self.dismiss_engine().await;
            return;
        }
        match self.upgrade().await {
            Ok(()) => self.journal.tell(&JournalEvent::EngineUpgraded { from: theirs, to: ours }),
            Err(reason) => self.notice(format!("the engine of version {theirs} was not relieved: {reason}")),
        }
    }

    pub(super) async fn step_once(&mut self) {
        if !matches!(self.engine, Engine::Attached(..)) {
            return;
        }
        let (commands, changes) = self.fleet.step(Instant::now());
        self.tell_all(changes);
        for command in &commands {
            if !self.give(command, &[]).await {
                return;
            }
        }
    }

    /// Gives the engine a command; one that cannot be given to is lost.
    async fn give(&mut self, command: &Command, descriptors: &[std::os::fd::OwnedFd]) -> bool {
        use std::os::fd::AsFd;
        let Engine::Attached(link, _) = &self.engine else { return false };
        let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        match link.send(command, &descriptors).await {
            Ok(()) => true,
            Err(error) => {
                self.lose_engine(&error.to_string());
                false
            }
        }
    }

    pub(super) fn tell_all(&mut self, changes: Vec<Change>) {
        for change in changes {
            let event = match change {
                Change::Opened { name, port, bind } => PortForwardEvent::PortForwardOpened {
                    container_name: name.as_str().to_owned(),
                    port,
                    host_port: port,
                    bind_addr: bind.to_owned(),
                },
                Change::Closed { name, port, why } => PortForwardEvent::PortForwardClosed {
                    container_name: name.as_str().to_owned(),
                    port,
                    host_port: port,
                    reason: why.as_str().to_owned(),
                },
                Change::Failed { name, port, reason } => PortForwardEvent::PortForwardFailed {
                    container_name: name.as_str().to_owned(),
                    port,
                    reason,
                },
                Change::Lost { name, reason } => {
                    let at = self.containers.iter().position(|container| *container.name() == name);
                    if let Some(at) = at {
                        if let Some(container) = self.containers.get_mut(at) {
                            container.again = Some(Instant::now() + ENTER_AGAIN);
                        }
                        self.mark(at, Reached::Unreachable, Some(reason), true);
                    }
                    continue;
                }
            };
            self.journal.tell(&JournalEvent::PortForwardEvent { event });
        }
    }

    async fn describe(&mut self, answer: oneshot::Sender<ForwardTable>) {
        if self.give(&Command::Describe, &[]).await {
            self.tables.push(answer);
        } else {
            // Whoever asked may have gone.
            let _ = answer.send(self.table());
        }
    }

    fn table(&self) -> ForwardTable {
        let engine = match &self.engine {
            Engine::Attached(link, _) => {
                let draining = Arc::strong_count(&self.draining) - 1;
                Some(link.facts(u32::try_from(draining).unwrap_or(u32::MAX)))
            }
            _ => None,
        };
        let containers =
            self.containers.iter().map(|container| container.told(&self.fleet, &self.owners)).collect();
        ForwardTable { engine, containers }
    }

    /// Publishes what is known, and looks for the processes behind ports that were not seen before.
    fn publish(&mut self) {
        let inodes: BTreeSet<u64> = self
            .containers
            .iter()
            .flat_map(|container| self.fleet.rows(container.name()))
            .filter(|row| row.state != RowState::Denied)
            .flat_map(|row| row.inodes)
            .collect();
        self.owners.retain(|inode, _| inodes.contains(inode));
        let unknown: Vec<u64> = inodes.into_iter().filter(|inode| !self.owners.contains_key(inode)).collect();
        if self.looking.is_none() && !unknown.is_empty() {
            self.looking = Some(tokio::task::spawn_blocking(move || owners_of(&unknown)));
        }
        self.parts.published.publish(self.table());
    }

    /// Ends the engine: connections may finish for a while, and then they end.
    async fn stop(&mut self) {
        self.containers.clear();
        self.fleet.stop();
        let begin = tokio::time::Instant::now();
        for (command, until) in
            [(Command::Drain, begin + DRAIN_MAX), (Command::Stop, begin + DRAIN_MAX + STOP_MAX)]
        {
            if command == Command::Stop {
                self.stop_drained.send_replace(true);
            }
            if !self.give(&command, &[]).await {
                break;
            }
            while let Engine::Attached(link, _) = &self.engine {
                match timeout_at(until, link.recv()).await {
                    Ok(Ok((Event::Stopped, _)) | Err(_)) => {
                        self.engine = Engine::Absent { again: Instant::now() };
                    }
                    Ok(Ok((event, _))) => {
                        let changes = self.fleet.hear(&event, Instant::now());
                        self.tell_all(changes);
                    }
                    Err(_) => break,
                }
            }
            if !matches!(self.engine, Engine::Attached(..)) {
                break;
            }
        }
        self.stop_drained.send_replace(true);
    }
}

fn told_name(container: &Container) -> ContainerName {
    container.registration.container_name.clone()
}

fn owners_of(inodes: &[u64]) -> Owners {
    let mut found: std::collections::BTreeMap<u64, ProcessFact> = processes::owners_of_sockets(inodes);
    inodes.iter().map(|inode| (*inode, found.remove(inode))).collect()
}
