//! Forwarding of one namespace by `run` and `attach`.
//!
//! [`Session`] runs the engine in this process, and owns the engine, the event queue and the clock. The engine reports
//! listeners and the outcome of commands as events. The forwarder passes events to the pure planner, which returns
//! commands for the engine and reports for people.
//!
//! If a daemon runs, it forwards instead, and [`registered`] reports the changes of its table. A session never mixes
//! both.

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
use crate::cli::ui::output::{Printer, Report};
use crate::forwarding::planner::{Admission, Change, DesiredContainer, Planner, Row};
use crate::model::forward_table::{ForwardPath, RowState};
use crate::model::native_state::NativeState;
use crate::model::port_policy::{ControlPorts, Decision, Policy};
use crate::model::registration::ContainerName;
use crate::sys::event_loop::{self, LoopEvent, Origin, Signals, Watched};
use crate::sys::processes;
use engine::Driver;

/// The maximum time for the engine to start and to add a namespace. It takes milliseconds.
const START_MAX: Duration = Duration::from_secs(10);

/// The maximum time for the engine to stop.
const STOP_MAX: Duration = Duration::from_secs(1);

/// A reason why the namespace is not forwarded.
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

/// The options of a session.
#[derive(Debug)]
pub struct Options {
    /// The name of the namespace, for people.
    pub name: String,
    /// The port policy.
    pub policy: Policy,
    /// The kernel interface that moves the bytes.
    pub ring: Ring,
    /// The printer of reports.
    pub printer: Printer,
    /// Whether a supervisor reports native sockets.
    pub native: bool,
}

/// An event that the verb has to handle.
#[derive(Debug, PartialEq, Eq)]
pub enum Wakeup {
    /// A signal arrived.
    Signal(Signal, Origin),
    /// A process ended.
    Ended(Watched),
    /// The engine has dropped the namespace, or ended.
    Lost(String),
    /// The requested tick.
    Tick,
}

/// One namespace that the engine of this process forwards.
pub struct Session {
    engine: Driver,
    loop_events: Receiver<LoopEvent>,
    queue: Sender<LoopEvent>,
    forwarder: Forwarder,
    printer: Printer,
}

impl Session {
    /// Starts the engine and enters the namespace. Returns after the current listeners are known, so that the first
    /// listener is not missed.
    pub fn open(target: Target, options: Options) -> Result<Session, ForwardError> {
        let (queue, loop_events) = mpsc::channel();
        let (engine, events) = engine::start(options.ring)?;
        event_loop::relay_events(events, queue.clone())?;
        let forwarder = Forwarder::new(options.name, options.policy, options.native);
        let mut session = Session { engine, loop_events, queue, forwarder, printer: options.printer };

        let shards = session.wait_for(|event| match event {
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
        session.wait_for(|event| matches!(event, Event::Listeners { .. }).then_some(()))?;
        Ok(session)
    }

    /// Returns the sink for the events of a native-socket supervisor.
    pub fn native_events(&self) -> Sink {
        let queue = self.queue.clone();
        Box::new(move |event| {
            // Events after the end of the session are dropped.
            let _ = queue.send(LoopEvent::Native(event));
        })
    }

    /// Starts to report signals and the ends of processes.
    pub fn watch(&self, signals: Signals, pidfds: BTreeMap<Watched, OwnedFd>) -> io::Result<()> {
        event_loop::watch(signals, pidfds, self.queue.clone())
    }

    /// Forwards until an event occurs that the verb handles, or `tick` has passed.
    pub fn next(&mut self, tick: Option<Duration>) -> Wakeup {
        let end = tick.map(|tick| Instant::now() + tick);
        loop {
            let due = [end, self.forwarder.planner.due()].into_iter().flatten().min();
            let happening = match due {
                None => self.loop_events.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(due) => self.loop_events.recv_timeout(due.saturating_duration_since(Instant::now())),
            };
            let lost = match happening {
                Ok(LoopEvent::Engine(event)) => {
                    self.handle_event(&event).err().map(|error| error.to_string())
                }
                Ok(LoopEvent::Signal(signal, origin)) => return Wakeup::Signal(signal, origin),
                Ok(LoopEvent::Ended(who)) => return Wakeup::Ended(who),
                Ok(LoopEvent::EngineEnded) => Some("the relay engine ended".to_owned()),
                Ok(LoopEvent::DaemonHints) => None,
                Ok(LoopEvent::Native(event)) => {
                    self.handle_native(&event);
                    None
                }
                Err(RecvTimeoutError::Disconnected) => Some("the event queue is closed".to_owned()),
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

    /// Waits for events that the verb handles, after the engine is lost.
    pub fn next_without_engine(&mut self) -> Wakeup {
        loop {
            match self.loop_events.recv() {
                Ok(LoopEvent::Signal(signal, origin)) => return Wakeup::Signal(signal, origin),
                Ok(LoopEvent::Ended(who)) => return Wakeup::Ended(who),
                Ok(LoopEvent::Native(event)) => self.handle_native(&event),
                Ok(LoopEvent::Engine(_) | LoopEvent::EngineEnded | LoopEvent::DaemonHints) => {}
                // The queue cannot close: this value holds a sender.
                Err(_) => return Wakeup::Lost("the event queue is closed".to_owned()),
            }
        }
    }

    /// Lets open connections finish for at most `patience`, then ends the engine. Data that a server sent just before
    /// it exited may still be in transit.
    pub fn close(mut self, patience: Duration) {
        self.end_engine(patience);
        let reports = self.forwarder.end_natives();
        reports.iter().for_each(|report| self.printer.report(report));
    }

    fn end_engine(&mut self, patience: Duration) {
        let deadline = Instant::now() + patience;
        for (command, until) in [(Command::Drain, deadline), (Command::Stop, deadline + STOP_MAX)] {
            self.engine.apply(command, Vec::new());
            loop {
                match self.loop_events.recv_timeout(until.saturating_duration_since(Instant::now())) {
                    Ok(LoopEvent::Engine(Event::Stopped) | LoopEvent::EngineEnded) => return,
                    Ok(LoopEvent::Engine(event)) => {
                        let (reports, _) = self.forwarder.handle_event(&event, Instant::now());
                        reports.iter().for_each(|report| self.printer.report(report));
                    }
                    Ok(LoopEvent::Native(event)) => {
                        let reports = self.forwarder.handle_native(&event);
                        reports.iter().for_each(|report| self.printer.report(report));
                    }
                    Ok(_) => {}
                    Err(RecvTimeoutError::Timeout) => break,
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
        }
    }

    /// Handles events until `wanted` accepts one. Returns its result.
    fn wait_for<T>(&mut self, wanted: impl Fn(&Event) -> Option<T>) -> Result<T, ForwardError> {
        let deadline = Instant::now() + START_MAX;
        loop {
            match self.loop_events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(LoopEvent::Engine(event)) => {
                    let found = wanted(&event);
                    self.handle_event(&event)?;
                    if let Some(found) = found {
                        return Ok(found);
                    }
                }
                Ok(LoopEvent::EngineEnded) | Err(RecvTimeoutError::Disconnected) => {
                    return Err(ForwardError::Lost("ended during its start".to_owned()));
                }
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => {
                    return Err(ForwardError::Lost("did not answer".to_owned()));
                }
            }
        }
    }

    fn handle_event(&mut self, event: &Event) -> Result<(), ForwardError> {
        let (reports, lost) = self.forwarder.handle_event(event, Instant::now());
        reports.iter().for_each(|report| self.printer.report(report));
        if let Some(reason) = lost {
            return Err(ForwardError::Lost(reason));
        }
        self.step();
        Ok(())
    }

    fn handle_native(&mut self, event: &NativeEvent) {
        let reports = self.forwarder.handle_native(event);
        reports.iter().for_each(|report| self.printer.report(report));
        self.step();
    }

    fn step(&mut self) {
        let (commands, reports) = self.forwarder.step(Instant::now());
        reports.iter().for_each(|report| self.printer.report(report));
        for command in commands {
            self.engine.apply(command, Vec::new());
        }
    }
}

/// Returns the ring that the engine chooses here, and the reason if it is not io_uring.
pub fn ring() -> Result<RingReport, StartError> {
    match engine::engine(Ring::Auto)?.ready() {
        Event::Ready { ring, .. } => Ok(ring.clone()),
        _ => {
            Ok(RingReport { kind: RingKind::Epoll, reason: Some("the engine did not report it".to_owned()) })
        }
    }
}

/// Runs `landfall _engine`: an engine that is driven over a socket at `path`, until it is asked to end.
///
/// An engine of root first opens its socket and the kernel's hints, which need root, and is then confined
/// ([`process::confinement`]).
pub fn engine_process(path: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let socket = CommandSocket::bind(path)?;
    // `run` and `attach` do not raise the limit, since the command that they start would inherit it.
    process::raise_descriptor_limit();
    let confined = rustix::process::geteuid().is_root();
    let hints =
        if confined { Hints::open().map_or(HintSource::Off, HintSource::Opened) } else { HintSource::Open };
    // This happens while the process has one thread: threads inherit the capabilities of the thread that starts them.
    let confinement = if confined {
        Some(Confinement::start(EngineUser::of_this_machine())?)
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

/// The state of one namespace: takes events, returns commands and reports.
struct Forwarder {
    /// The name for people.
    name: String,
    /// The name in the planner.
    only: ContainerName,
    policy: Policy,
    planner: Planner,
    native: NativeState,
    reported_denied: BTreeSet<NonZeroU16>,
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
        // The supervisor is in this process, so it exists before the first listener.
        planner.native(&only, native_state.clone(), Instant::now());
        Forwarder { name, only, policy, planner, native: native_state, reported_denied: BTreeSet::new() }
    }

    /// Records that the namespace was entered. Returns the id with which to add it to the engine, unless the engine has
    /// it already.
    fn container_entered(&mut self, cookie: u64) -> Option<UpstreamId> {
        match self.planner.container_entered(&self.only, cookie) {
            Admission::Add(upstream) => Some(upstream),
            Admission::Known(_) | Admission::Shared(_) | Admission::Unwanted => None,
        }
    }

    /// Handles an event. Returns the reports for people, and the reason if the engine is lost.
    fn handle_event(&mut self, event: &Event, now: Instant) -> (Vec<Report>, Option<String>) {
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
            return (reports, Some(format!("dropped the namespace: {reason}")));
        }
        reports.extend(self.reports_for(changes));
        (reports, None)
    }

    /// Handles an event of the supervisor of native sockets. Returns the reports for people.
    fn handle_native(&mut self, event: &NativeEvent) -> Vec<Report> {
        if !self.native.apply(event) {
            return Vec::new();
        }
        let changes = self.planner.native(&self.only, self.native.clone(), Instant::now());
        self.reports_for(changes)
    }

    /// Reports the end of every native port.
    fn end_natives(&mut self) -> Vec<Report> {
        let changes = self.planner.end_natives();
        self.reports_for(changes)
    }

    /// Returns the commands for the engine and the reports for people that are due, and records them as sent.
    fn step(&mut self, now: Instant) -> (Vec<Command>, Vec<Report>) {
        let (commands, changes) = self.planner.step(now);
        let mut reports = self.reports_for(changes);
        // Each denied port is reported once, however often its server restarts.
        for Row { port, state, reason, .. } in self.planner.rows(&self.only).listed {
            if state == RowState::Denied && self.reported_denied.insert(port) {
                reports.push(denied(port, reason, &self.policy));
            }
        }
        (commands, reports)
    }

    fn reports_for(&self, changes: Vec<Change>) -> Vec<Report> {
        let report_for = |change| match change {
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
            // A session has no broker, and its owner reports the loss of the engine.
            Change::Lost { .. } | Change::Result { .. } => None,
        };
        changes.into_iter().filter_map(report_for).collect()
    }
}

fn reason_of_loss(change: &Change) -> Option<&str> {
    match change {
        Change::Lost { reason, .. } => Some(reason),
        _ => None,
    }
}

/// Returns the report for a host port that could not be opened.
fn failed(port: NonZeroU16, detail: String) -> Report {
    // If another container of the planner has the port, the holding process is this engine.
    let by_a_process = detail.contains("EADDRINUSE") && !detail.contains("is forwarded");
    match processes::holder_of_port(port) {
        holder if by_a_process => Report::Taken { port, holder },
        _ => Report::Failed { port, detail },
    }
}

/// Returns the report for a port inside that the policy denies.
fn denied(port: NonZeroU16, reason: Option<String>, policy: &Policy) -> Report {
    match policy.decide(port, &ControlPorts::default()) {
        Decision::Deny(reason) => Report::Denied { port, reason },
        // The policy of the options allows the port, so the reason is a rule of the daemon.
        Decision::Allow => {
            Report::Withheld { port, reason: reason.unwrap_or_else(|| "it may not be".to_owned()) }
        }
    }
}

fn warning(text: String) -> Report {
    Report::Warning { text, hint: None }
}
