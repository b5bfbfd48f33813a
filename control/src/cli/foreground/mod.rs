//! Forwarding what listens in one namespace: the loop that `run` and `attach` share.
//!
//! The engine, in this process, tells what it sees and what became of what it was asked for. The forwarder turns
//! that into commands, by way of the pure planner, and into lines for people. [`Session`] is the shell around it
//! that has the engine, the queue and the clock.
//!
//! Where a daemon runs, it forwards, and [`registered`] tells what comes of it.

mod engine;
pub mod native_driver;
pub mod native_link;
pub mod registered;
mod reported_ports;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::num::NonZeroU16;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use landfall_engine::command::{Command, Event, RingKind, RingReport, UpstreamId, UpstreamKind};
use landfall_engine::engine::StartError;
use landfall_engine::native::NativeEvent;
use landfall_engine::opener::client::{OpenError, Opener, Target};
use landfall_engine::process::confinement::Confinement;
use landfall_engine::process::privileges::{EngineUser, drop_capabilities};
use landfall_engine::process::{self, CommandSocket};
use landfall_engine::watch::hint::{HintSource, Hints};
use nix::sys::signal::Signal;
use rustix::thread::CapabilitySet;
use thiserror::Error;

use crate::cli::args::Ring;
use crate::cli::foreground::native_driver::Sink;
use crate::cli::ui::output::{Report, Talk};
use crate::forwarding::planner::{Admission, Change, DesiredContainer, Planner, Row};
use crate::model::forward_table::{ForwardPath, RowState};
use crate::model::native_state::NativeState;
use crate::model::port_policy::{ControlPorts, Decision, Policy};
use crate::model::registration::ContainerName;
use crate::sys::event_loop::{self, LoopEvent, Origin, Signals, Watched};
use crate::sys::processes;
use engine::Driver;

/// How long the engine may take to begin, and to take a namespace in. It takes milliseconds.
const BEGIN_MAX: Duration = Duration::from_secs(10);

/// How long the engine may take to end once it is told to.
const STOP_MAX: Duration = Duration::from_secs(1);

/// Why nothing is forwarded.
#[derive(Debug, Error)]
pub enum ForwardError {
    /// The engine did not start.
    #[error("the relay engine did not start")]
    Engine(#[from] StartError),
    /// A thread could not be started.
    #[error("cannot start a thread")]
    Thread(#[from] io::Error),
    /// The namespace could not be entered.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The engine ended, or did not answer.
    #[error("the relay engine {0}")]
    Lost(String),
}

/// What is to be forwarded, and how.
#[derive(Debug)]
pub struct Options {
    /// What people call the namespace.
    pub name: String,
    /// Which ports.
    pub policy: Policy,
    /// Which ring.
    pub ring: Ring,
    /// Where lines go.
    pub talk: Talk,
    /// Whether a supervisor reports native sockets.
    pub native: bool,
}

/// Something that the verb has to act on.
#[derive(Debug, PartialEq, Eq)]
pub enum Wakeup {
    /// A signal came.
    Signal(Signal, Origin),
    /// A process ended.
    Ended(Watched),
    /// The engine let the namespace go, or ended.
    Lost(String),
    /// The tick that was asked for.
    Tick,
}

/// One namespace that is being forwarded.
pub struct Session {
    engine: Driver,
    happenings: Receiver<LoopEvent>,
    queue: Sender<LoopEvent>,
    forwarder: Forwarder,
    talk: Talk,
}

impl Session {
    /// Starts the engine, enters the namespace, and returns when what listens there now has been taken in: from
    /// then on not even the first listener is missed.
    pub fn open(target: Target, options: Options) -> Result<Session, ForwardError> {
        let (queue, happenings) = mpsc::channel();
        let (engine, events) = engine::start(options.ring)?;
        event_loop::relay_events(events, queue.clone())?;
        let forwarder = Forwarder::new(options.name, options.policy, options.native);
        let mut session = Session { engine, happenings, queue, forwarder, talk: options.talk };

        let shards = session.expect(|event| match event {
            Event::Ready { shards, .. } => Some(*shards),
            _ => None,
        })?;
        let mut opener = Opener::spawn(Path::new("/proc/self/exe"), target)?;
        let (sources, descriptors) = opener.upstream(shards)?;
        let netns_cookie = opener.netns_cookie();
        if let Some(upstream) = session.forwarder.container_entered(netns_cookie) {
            let kind = UpstreamKind::Opener;
            session.engine.apply(Command::AddUpstream { upstream, netns_cookie, sources, kind }, descriptors);
        }
        session.expect(|event| matches!(event, Event::Listeners { .. }).then_some(()))?;
        Ok(session)
    }

    /// Takes the events of a supervisor of native sockets.
    pub fn native_events(&self) -> Sink {
        let queue = self.queue.clone();
        Box::new(move |event| {
            // Nothing is reported after the session has ended.
            let _ = queue.send(LoopEvent::Native(event));
        })
    }

    /// Begins to tell of signals and of the ends of processes.
    pub fn watch(&self, signals: Signals, pidfds: BTreeMap<Watched, OwnedFd>) -> io::Result<()> {
        event_loop::watch(signals, pidfds, self.queue.clone())
    }

    /// Forwards until something happens that is the verb's business, or `tick` has passed.
    pub fn next(&mut self, tick: Option<Duration>) -> Wakeup {
        let end = tick.map(|tick| Instant::now() + tick);
        loop {
            let due = [end, self.forwarder.planner.due()].into_iter().flatten().min();
            let happening = match due {
                None => self.happenings.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(due) => self.happenings.recv_timeout(due.saturating_duration_since(Instant::now())),
            };
            let lost = match happening {
                Ok(LoopEvent::Engine(event)) => self.take(&event).err().map(|error| error.to_string()),
                Ok(LoopEvent::Signal(signal, origin)) => return Wakeup::Signal(signal, origin),
                Ok(LoopEvent::Ended(who)) => return Wakeup::Ended(who),
                Ok(LoopEvent::EngineEnded) => Some("the relay engine ended".to_owned()),
                Ok(LoopEvent::DaemonHints) => None,
                Ok(LoopEvent::Native(event)) => {
                    self.take_native(&event);
                    None
                }
                Err(RecvTimeoutError::Disconnected) => Some("nothing more can happen".to_owned()),
                Err(RecvTimeoutError::Timeout) if end.is_some_and(|end| Instant::now() >= end) => {
                    return Wakeup::Tick;
                }
                Err(RecvTimeoutError::Timeout) => {
                    self.step();
                    None
                }
            };
            if let Some(lost) = lost {
                return Wakeup::Lost(lost);
            }
        }
    }

    /// Waits as [`Session::next`] does when the engine is lost, for all that is left to happen.
    pub fn next_without_engine(&mut self) -> Wakeup {
        loop {
            match self.happenings.recv() {
                Ok(LoopEvent::Signal(signal, origin)) => return Wakeup::Signal(signal, origin),
                Ok(LoopEvent::Ended(who)) => return Wakeup::Ended(who),
                Ok(LoopEvent::Native(event)) => self.take_native(&event),
                Ok(LoopEvent::Engine(_) | LoopEvent::EngineEnded | LoopEvent::DaemonHints) => {}
                // The queue cannot close while this value holds one of its ends.
                Err(_) => return Wakeup::Lost("nothing more can happen".to_owned()),
            }
        }
    }

    /// Lets open connections finish for at most `patience`, then ends the engine: what a server sent just before
    /// it exited may still be on its way.
    pub fn close(mut self, patience: Duration) {
        self.end_engine(patience);
        let reports = self.forwarder.end_natives();
        reports.iter().for_each(|report| self.talk.report(report));
    }

    fn end_engine(&mut self, patience: Duration) {
        let deadline = Instant::now() + patience;
        for (command, until) in [(Command::Drain, deadline), (Command::Stop, deadline + STOP_MAX)] {
            self.engine.apply(command, Vec::new());
            loop {
                match self.happenings.recv_timeout(until.saturating_duration_since(Instant::now())) {
                    Ok(LoopEvent::Engine(Event::Stopped) | LoopEvent::EngineEnded) => return,
                    Ok(LoopEvent::Engine(event)) => {
                        let (reports, _) = self.forwarder.hear(&event, Instant::now());
                        reports.iter().for_each(|report| self.talk.report(report));
                    }
                    Ok(LoopEvent::Native(event)) => {
                        let reports = self.forwarder.take_native(&event);
                        reports.iter().for_each(|report| self.talk.report(report));
                    }
                    Ok(_) => {}
                    Err(RecvTimeoutError::Timeout) => break,
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
        }
    }

    /// Takes events in until one is what is waited for.
    fn expect<T>(&mut self, wanted: impl Fn(&Event) -> Option<T>) -> Result<T, ForwardError> {
        let deadline = Instant::now() + BEGIN_MAX;
        loop {
            match self.happenings.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(LoopEvent::Engine(event)) => {
                    let found = wanted(&event);
                    self.take(&event)?;
                    if let Some(found) = found {
                        return Ok(found);
                    }
                }
                Ok(LoopEvent::EngineEnded) | Err(RecvTimeoutError::Disconnected) => {
                    return Err(ForwardError::Lost("ended as it began".to_owned()));
                }
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => {
                    return Err(ForwardError::Lost("did not answer".to_owned()));
                }
            }
        }
    }

    fn take(&mut self, event: &Event) -> Result<(), ForwardError> {
        let (reports, lost) = self.forwarder.hear(event, Instant::now());
        reports.iter().for_each(|report| self.talk.report(report));
        if let Some(reason) = lost {
            return Err(ForwardError::Lost(reason));
        }
        self.step();
        Ok(())
    }

    fn take_native(&mut self, event: &NativeEvent) {
        let reports = self.forwarder.take_native(event);
        reports.iter().for_each(|report| self.talk.report(report));
        self.step();
    }

    fn step(&mut self) {
        let (commands, reports) = self.forwarder.step(Instant::now());
        reports.iter().for_each(|report| self.talk.report(report));
        for command in commands {
            self.engine.apply(command, Vec::new());
        }
    }
}

/// Which ring the engine chooses here, and why it is not io_uring where it is not.
pub fn ring() -> Result<RingReport, StartError> {
    match engine::engine(Ring::Auto)?.ready() {
        Event::Ready { ring, .. } => Ok(ring.clone()),
        _ => Ok(RingReport { kind: RingKind::Epoll, reason: Some("the engine did not say".to_owned()) }),
    }
}

/// `landfall _engine`: an engine that is driven over a socket at `path`, until it is told to end.
///
/// An engine of root opens what takes root first, its socket and the kernel's hints, and is then confined
/// ([`process::confinement`]).
pub fn engine_process(path: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let socket = CommandSocket::bind(path)?;
    // Not in `run` and `attach`: the command that they start inherits the limit.
    process::raise_descriptor_limit();
    let confined = rustix::process::geteuid().is_root();
    let hints =
        if confined { Hints::open().map_or(HintSource::Off, HintSource::Opened) } else { HintSource::Open };
    // While there is one thread: those that the engine starts have no more than this one.
    let confinement = if confined {
        Some(Confinement::begin(EngineUser::of_this_machine())?)
    } else {
        drop_capabilities(CapabilitySet::NET_BIND_SERVICE)?;
        None
    };
    let engine = engine::start_process(hints)?;
    let mut ready = engine.ready().clone();
    if let (Some(confinement), Event::Ready { lacks, .. }) = (confinement, &mut ready) {
        *lacks = confinement.seal();
    }
    let (handle, events) = engine.into_parts();
    Ok(process::serve(socket, &ready, &handle, events, process::IDLE_EXIT)?)
}

/// What is known of one namespace: events in, commands and reports out.
struct Forwarder {
    /// What people call it.
    name: String,
    /// What the planner calls it.
    only: ContainerName,
    policy: Policy,
    planner: Planner,
    native: NativeState,
    told_denied: BTreeSet<NonZeroU16>,
}

impl Forwarder {
    fn new(name: String, policy: Policy, native: bool) -> Forwarder {
        let only = ContainerName::only();
        let mut planner = Planner::new(ControlPorts::default());
        let published = BTreeMap::new();
        planner.desired(vec![DesiredContainer {
            name: only.clone(),
            policy: policy.clone(),
            published,
            native,
        }]);
        let native_state = NativeState::default();
        // The supervisor is in this process, so it is there before the first listener.
        planner.native(&only, native_state.clone(), Instant::now());
        Forwarder { name, only, policy, planner, native: native_state, told_denied: BTreeSet::new() }
    }

    /// The namespace was entered. Answers with the number under which the engine is to have it, if it has not.
    fn container_entered(&mut self, cookie: u64) -> Option<UpstreamId> {
        match self.planner.container_entered(&self.only, cookie) {
            Admission::Add(upstream) => Some(upstream),
            Admission::Known(_) | Admission::Shared(_) | Admission::Unwanted => None,
        }
    }

    /// Takes an event in. Answers with what people are told, and why there will be no more, if so.
    fn hear(&mut self, event: &Event, now: Instant) -> (Vec<Report>, Option<String>) {
        let mut reports = Vec::new();
        match event {
            Event::Refused { reason } => reports.push(warning(format!("the relay engine refused: {reason}"))),
            Event::Degraded { what } => reports.push(warning(what.clone())),
            Event::Recovered { what } => {
                reports.push(Report::Note { text: format!("recovered: {what}"), hint: None });
            }
            Event::Stopped => return (reports, Some("has ended".to_owned())),
            _ => {}
        }
        let changes = self.planner.on_engine_event(event, now);
        if let Some(reason) = changes.iter().find_map(reason_of_loss) {
            return (reports, Some(format!("let the namespace go: {reason}")));
        }
        reports.extend(self.tell(changes));
        (reports, None)
    }

    /// Takes in an event of the supervisor of native sockets. Returns the reports for people.
    fn take_native(&mut self, event: &NativeEvent) -> Vec<Report> {
        if !self.native.apply(event) {
            return Vec::new();
        }
        let changes = self.planner.native(&self.only, self.native.clone(), Instant::now());
        self.tell(changes)
    }

    /// Reports the end of every native port.
    fn end_natives(&mut self) -> Vec<Report> {
        let changes = self.planner.end_natives();
        self.tell(changes)
    }

    /// What the engine is to do now, and what people are told; noted as asked and as told.
    fn step(&mut self, now: Instant) -> (Vec<Command>, Vec<Report>) {
        let (commands, changes) = self.planner.step(now);
        let mut reports = self.tell(changes);
        // Each denied port is told once, however often its server restarts.
        for Row { port, state, reason, .. } in self.planner.rows(&self.only).listed {
            if state == RowState::Denied && self.told_denied.insert(port) {
                reports.push(denied(port, reason, &self.policy));
            }
        }
        (commands, reports)
    }

    fn tell(&self, changes: Vec<Change>) -> Vec<Report> {
        let told = |change| match change {
            Change::Opened { port, host_port, .. } => {
                let process = processes::owner_of_sockets(&self.planner.inodes(&self.only, port));
                let (name, path) = (self.name.clone(), ForwardPath::Relay);
                Some(Report::Forward { port: host_port, name, process, label: None, path })
            }
            Change::OpenedNative { port, .. } => {
                let mut rows = self.planner.rows(&self.only).listed.into_iter();
                let process = rows.find(|row| row.port == port).and_then(|row| row.process);
                let process = process.and_then(processes::process_fact);
                let (name, path) = (self.name.clone(), ForwardPath::Native);
                Some(Report::Forward { port, name, process, label: None, path })
            }
            Change::Closed { host_port, .. } => Some(Report::Closed { port: host_port }),
            Change::Failed { port, reason, .. } => Some(failed(port, reason)),
            // There is no broker, and the end of everything is told by whoever runs this.
            Change::Lost { .. } | Change::Result { .. } => None,
        };
        changes.into_iter().filter_map(told).collect()
    }
}

fn reason_of_loss(change: &Change) -> Option<&str> {
    match change {
        Change::Lost { reason, .. } => Some(reason),
        _ => None,
    }
}

/// What people are told of a port of the host that could not be opened.
fn failed(port: NonZeroU16, detail: String) -> Report {
    // Of another container the planner knows the name; the process is its own engine.
    let by_a_process = detail.contains("EADDRINUSE") && !detail.contains("is forwarded");
    match processes::holder_of_port(port) {
        holder if by_a_process => Report::Taken { port, holder },
        _ => Report::Failed { port, detail },
    }
}

/// What people are told of a port inside that may not be exposed.
fn denied(port: NonZeroU16, reason: Option<String>, policy: &Policy) -> Report {
    match policy.decide(port, &ControlPorts::default()) {
        Decision::Deny(reason) => Report::Denied { port, reason },
        // It is no rule of theirs, and whoever made it says which.
        Decision::Allow => {
            Report::Withheld { port, reason: reason.unwrap_or_else(|| "it may not be".to_owned()) }
        }
    }
}

fn warning(text: String) -> Report {
    Report::Warning { text, hint: None }
}
