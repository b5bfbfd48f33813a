//! Forwarding by the daemon: `run` and `attach` register their namespace, and report changes of the daemon's table.
//!
//! The table is the source of truth and is read as a whole; events of the daemon only trigger a read, so a lost event
//! delays a report but loses none. The daemon may end at any time. The engine then continues to forward, and the
//! command does not notice. A new daemon that lacks the registration gets it again. A registration that another client
//! removed on purpose is not repeated.

use std::collections::BTreeMap;
use std::io;
use std::num::NonZeroU16;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use thiserror::Error;

use super::native_link as link;
use super::{Wakeup, denied, failed};
use crate::cli::daemon_client::{self, Description};
use crate::cli::foreground::native_driver::Sink;
use crate::cli::foreground::reported_ports::{PortChange, ReportedPorts};
use crate::cli::ui::output::{Printer, Report};
use crate::daemon::rpc::client::{Client, PATIENT_BUDGET, PROBE_BUDGET};
use crate::daemon::rpc::request_handler::DescribedContainer;
use crate::model::forward_table::{ForwardRow, Reachability};
use crate::model::native_sockets;
use crate::model::port_policy::{Policy, PortForward};
use crate::model::registration::AttachMethod;
use crate::sys::event_loop::{self, LoopEvent, Signals, Watched};
use crate::sys::processes::{self, ProcessFact};

/// The interval between reads of the table without an event.
const READ_INTERVAL: Duration = Duration::from_secs(2);
/// The delay between an event and the read of the table, so that a burst of events causes one read.
const HINT_DELAY: Duration = Duration::from_millis(5);
/// The maximum time for the daemon to enter the namespace. It takes milliseconds.
const START_MAX: Duration = Duration::from_secs(5);
/// The interval between checks whether it has.
const START_POLL: Duration = Duration::from_millis(5);
/// The interval between attempts to reach a daemon that is gone.
const RETRY: Duration = Duration::from_secs(1);
/// The delay before the absence of a daemon is reported. An upgrade of the daemon takes less.
const ABSENCE_REPORT_DELAY: Duration = Duration::from_secs(5);
/// The interval between checks for open connections at the end.
const DRAIN_POLL: Duration = Duration::from_millis(20);

/// The namespace to register.
#[derive(Clone, Debug)]
pub struct DesiredContainer {
    /// Its name.
    pub name: String,
    /// Whether the user gave that name, so that no other may be chosen.
    pub name_is_given: bool,
    /// How the daemon enters the namespace.
    pub attach_method: AttachMethod,
    /// The port policy.
    pub policy: Policy,
    /// The printer of reports.
    pub printer: Printer,
    /// Whether a supervisor reports native sockets.
    pub native: bool,
}

/// A reason why the daemon does not forward the namespace.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RegisterError {
    /// No daemon of landfall runs.
    #[error("no daemon runs")]
    NoDaemon,
    /// The given name belongs to another registration.
    #[error("the name {name} is in use, by {holder}")]
    NameTaken {
        /// The name.
        name: String,
        /// The attach method of the other registration, or else its folder.
        holder: String,
    },
    /// The daemon refused.
    #[error("{0}")]
    Refused(String),
}

/// One namespace that the daemon forwards.
pub struct Registered {
    client: Client,
    desired: DesiredContainer,
    loop_events: Receiver<LoopEvent>,
    queue: Sender<LoopEvent>,
    reported: ReportedPorts,
    read_at: Instant,
    missing: Missing,
    /// The process id of the daemon that has the registration; it may have been replaced since.
    daemon: Option<u32>,
    /// The name of the registration, for the link of native sockets.
    name: Arc<Mutex<String>>,
}

/// The problem between the daemon and this client.
enum Missing {
    /// No problem.
    Nothing,
    /// The daemon has not answered since then.
    Daemon { since: Instant, reported: bool },
    /// The registration was removed. This is reported once.
    Registration,
}

impl Registered {
    /// Registers with the daemon. Returns after the daemon knows the current listeners of the namespace.
    ///
    /// # Errors
    /// [`RegisterError`]; in this case no registration remains.
    pub fn open(client: Client, desired: DesiredContainer) -> Result<Registered, RegisterError> {
        let description = describe(&client).filter(|description| shares_network_namespace(description.pid));
        let description = description.ok_or(RegisterError::NoDaemon)?;
        let (queue, loop_events) = mpsc::channel();
        let (reported, missing, read_at) = (ReportedPorts::default(), Missing::Nothing, Instant::now());
        let daemon = description.pid;
        let name = Arc::new(Mutex::new(desired.name.clone()));
        let mut registered =
            Registered { client, desired, loop_events, queue, reported, read_at, missing, daemon, name };
        registered.choose_name(&description)?;
        registered.register()?;
        if let Err(why) = registered.wait_until_reached() {
            registered.deregister();
            return Err(why);
        }
        let (client, name, queue) =
            (registered.client.clone(), registered.desired.name.clone(), registered.queue.clone());
        let watch = move || watch_events(&client, &name, &queue);
        // Without hints, changes are reported up to [`READ_INTERVAL`] later.
        let _ = thread::Builder::new().name("hints".to_owned()).spawn(watch);
        Ok(registered)
    }

    /// Links a native-socket supervisor to the daemon. Returns the sink for its events.
    ///
    /// # Errors
    /// A thread cannot be started.
    pub fn native_events(&self) -> io::Result<Sink> {
        let (events, reported) = mpsc::channel();
        link::start(self.client.clone(), Arc::clone(&self.name), reported)?;
        Ok(Box::new(move |event| {
            // The link ends together with the supervisor.
            let _ = events.send(event);
        }))
    }

    /// Starts to report signals and the ends of processes.
    ///
    /// # Errors
    /// A thread cannot be started.
    pub fn watch(&self, signals: Signals, pidfds: BTreeMap<Watched, OwnedFd>) -> io::Result<()> {
        event_loop::watch(signals, pidfds, self.queue.clone())
    }

    /// Reports changes until an event occurs that the verb handles, or `tick` has passed.
    pub fn next(&mut self, tick: Option<Duration>) -> Wakeup {
        let end = tick.map(|tick| Instant::now() + tick);
        loop {
            let due = end.map_or(self.read_at, |end| end.min(self.read_at));
            match self.loop_events.recv_timeout(due.saturating_duration_since(Instant::now())) {
                Ok(LoopEvent::Signal(signal, origin)) => return Wakeup::Signal(signal, origin),
                Ok(LoopEvent::Ended(who)) => return Wakeup::Ended(who),
                Ok(LoopEvent::DaemonHints) => self.read_at = self.read_at.min(Instant::now() + HINT_DELAY),
                Ok(LoopEvent::Engine(_) | LoopEvent::EngineEnded | LoopEvent::Native(_))
                | Err(RecvTimeoutError::Timeout) => {}
                // The queue cannot close: this value holds a sender.
                Err(RecvTimeoutError::Disconnected) => {
                    return Wakeup::Lost("the event queue is closed".to_owned());
                }
            }
            if Instant::now() >= self.read_at {
                self.read_table();
            }
            if end.is_some_and(|end| Instant::now() >= end) {
                return Wakeup::Tick;
            }
        }
    }

    /// Waits until open connections have finished, for at most `patience`, then deregisters. The engine outlives this
    /// process, so data in transit still arrives after that.
    pub fn close(mut self, patience: Duration) {
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            self.read_table();
            let Some(container) = describe(&self.client).and_then(|seen| self.own(&seen)) else { break };
            if container.state.forwards.iter().all(|row| row.connections == 0) {
                break;
            }
            thread::sleep(DRAIN_POLL);
        }
        if matches!(self.missing, Missing::Nothing) {
            self.deregister();
            let changes = self.reported.update(&[]);
            self.report_changes(changes);
        }
    }

    /// Reads the table, and reports its changes.
    fn read_table(&mut self) {
        self.read_at = Instant::now() + READ_INTERVAL;
        let Some(description) = describe(&self.client) else { return self.handle_missing_daemon() };
        let was_away = matches!(self.missing, Missing::Daemon { .. }) || self.daemon != description.pid;
        if let Missing::Daemon { reported: true, .. } = self.missing {
            self.print_note("a daemon runs again".to_owned());
        }
        if was_away {
            self.missing = Missing::Nothing;
        }
        // Only a daemon that has loaded the registrations shows reliably whether this one was removed.
        if description.replayed {
            self.daemon = description.pid;
        }
        match self.own(&description) {
            Some(container) => {
                let changes = self.reported.update(&container.state.forwards);
                self.report_changes(changes);
            }
            // The daemon is still loading the registrations of its predecessor.
            None if !description.replayed => {}
            None if was_away || self.is_displaced(&description) => self.register_again(&description),
            None => self.handle_missing_registration(),
        }
    }

    fn register_again(&mut self, description: &Description) {
        if let Err(why) = self.choose_name(description).and_then(|()| self.register()) {
            self.missing = Missing::Registration;
            self.print_warning(format!("ports are no longer forwarded: {why}"));
        }
    }

    fn handle_missing_daemon(&mut self) {
        self.read_at = Instant::now() + RETRY;
        match self.missing {
            Missing::Nothing => self.missing = Missing::Daemon { since: Instant::now(), reported: false },
            Missing::Daemon { since, reported: false } if since.elapsed() >= ABSENCE_REPORT_DELAY => {
                self.missing = Missing::Daemon { since, reported: true };
                let text =
                    "the daemon has ended; forwarded ports continue to work, and new ports are not forwarded"
                        .to_owned();
                let hint = Some("landfall up starts the daemon".to_owned());
                self.desired.printer.report(&Report::Warning { text, hint });
            }
            Missing::Daemon { .. } | Missing::Registration => {}
        }
    }

    fn handle_missing_registration(&mut self) {
        if matches!(self.missing, Missing::Registration) {
            return;
        }
        self.missing = Missing::Registration;
        let changes = self.reported.update(&[]);
        self.report_changes(changes);
        // The daemon removes a registration whose namespace has ended, and the verb is about to notice that end itself.
        if target_exists(&self.desired.attach_method) {
            self.print_note(format!(
                "{} was deregistered; its ports are no longer forwarded",
                self.desired.name
            ));
        }
    }

    /// Chooses the wanted name, or else the next one that is free.
    fn choose_name(&mut self, description: &Description) -> Result<(), RegisterError> {
        let wanted = self.desired.name.clone();
        let other = |name: &str| {
            description.containers.iter().find(|other| is_another(other, name, &self.desired.attach_method))
        };
        let Some(holder) = other(&wanted) else { return Ok(()) };
        if self.desired.name_is_given {
            let attach_method = holder.state.attach_method.clone().unwrap_or_else(|| holder.cwd.clone());
            return Err(RegisterError::NameTaken { name: wanted, holder: attach_method });
        }
        let free = (2_u32..).map(|number| format!("{wanted}-{number}")).find(|name| other(name).is_none());
        self.desired.name = free.unwrap_or(wanted);
        self.name.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&self.desired.name);
        Ok(())
    }

    fn is_displaced(&self, description: &Description) -> bool {
        description
            .containers
            .iter()
            .any(|other| is_another(other, &self.desired.name, &self.desired.attach_method))
    }

    fn own(&self, description: &Description) -> Option<DescribedContainer> {
        let own = |other: &&DescribedContainer| {
            other.state.container_name == self.desired.name
                && !is_another(other, &self.desired.name, &self.desired.attach_method)
        };
        description.containers.iter().find(own).cloned()
    }

    fn register(&self) -> Result<(), RegisterError> {
        let answer = self.client.within(PATIENT_BUDGET).call(&request(&self.desired));
        answer.map(drop).map_err(|error| RegisterError::Refused(error.to_string()))
    }

    /// Removes the registration, unless the name now belongs to another one.
    fn deregister(&self) {
        if describe(&self.client).and_then(|seen| self.own(&seen)).is_none() {
            return;
        }
        // An error is ignored: the daemon removes the registration after it finds that the namespace is gone.
        let name = self.desired.name.as_str();
        let _ = self.client.call(&json!({ "kind": "deregister", "containerName": name }));
    }

    fn wait_until_reached(&mut self) -> Result<(), RegisterError> {
        let refused = |why: Option<String>| {
            RegisterError::Refused(why.unwrap_or_else(|| "the daemon cannot enter it".to_owned()))
        };
        let deadline = Instant::now() + START_MAX;
        loop {
            let Some(description) = describe(&self.client) else {
                return Err(refused(Some("the daemon has ended".to_owned())));
            };
            match self.own(&description).map(|own| (own.state.state, own.state.reason)) {
                Some((Reachability::Reached | Reachability::Off, _)) => return Ok(()),
                Some((Reachability::Unreachable, reason)) => return Err(refused(reason)),
                // Another client has registered the same name at the same time.
                None if self.is_displaced(&description) => {
                    self.choose_name(&description)?;
                    self.register()?;
                }
                Some((Reachability::Waiting, _)) | None => {}
            }
            if Instant::now() >= deadline {
                return Err(refused(Some("the daemon has not entered it".to_owned())));
            }
            thread::sleep(START_POLL);
        }
    }

    fn report_changes(&self, changes: Vec<PortChange>) {
        for report in changes.into_iter().filter_map(|changes| report(changes, &self.desired)) {
            self.desired.printer.report(&report);
        }
    }

    fn print_note(&self, text: String) {
        self.desired.printer.report(&Report::Note { text, hint: None });
    }

    fn print_warning(&self, text: String) {
        self.desired.printer.report(&Report::Warning { text, hint: None });
    }
}

/// Queues a hint at each event of the container, and whenever the daemon accepts the subscription.
fn watch_events(client: &Client, name: &str, queue: &Sender<LoopEvent>) {
    loop {
        if let Ok(mut events) = client.events(Some(name)) {
            loop {
                if queue.send(LoopEvent::DaemonHints).is_err() {
                    return;
                }
                if events.line(None).is_err() {
                    break;
                }
            }
        }
        thread::sleep(RETRY);
    }
}

fn describe(client: &Client) -> Option<Description> {
    daemon_client::describe(&client.within(PROBE_BUDGET)).ok().flatten()
}

/// Returns whether the daemon shares this network namespace, and thus the localhost on which ports should answer. It
/// does not if this process runs in a sandbox or a container that can see the home of the host.
fn shares_network_namespace(daemon: Option<u32>) -> bool {
    let namespace = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/net")).ok();
    let theirs = daemon.and_then(|pid| namespace(&pid.to_string()));
    theirs.is_some() && theirs == namespace("self")
}

/// Returns whether a registration of this name has another attach method, and so belongs to another client.
fn is_another(other: &DescribedContainer, name: &str, attach_method: &AttachMethod) -> bool {
    other.state.container_name == name
        && other.state.attach_method.as_deref() != Some(attach_method.to_string().as_str())
}

fn request(desired: &DesiredContainer) -> Value {
    let folder = std::env::current_dir().ok().filter(|folder| folder.to_str().is_some());
    json!({
        "kind": "register",
        "containerName": desired.name,
        "cwd": folder.unwrap_or_else(|| PathBuf::from("/")),
        "portForward": PortForward::from(&desired.policy),
        "way": desired.attach_method,
        crate::registry::folder::FOREGROUND: true,
        native_sockets::FIELD: desired.native,
    })
}

fn report(changes: PortChange, desired: &DesiredContainer) -> Option<Report> {
    Some(match changes {
        PortChange::Open(ForwardRow { host_port, process, pid, label, path, .. }) => {
            let process = process.zip(pid).map(|(name, pid)| ProcessFact { name, pid });
            let (port, name) = (NonZeroU16::new(host_port)?, desired.name.clone());
            Report::Forward { port, name, process, label, path }
        }
        PortChange::Closed(port) => Report::Closed { port: NonZeroU16::new(port)? },
        PortChange::Failed(row) => {
            let detail = row.reason.unwrap_or_else(|| "the daemon reported no reason".to_owned());
            failed(NonZeroU16::new(row.host_port)?, detail)
        }
        PortChange::Denied(row) => denied(NonZeroU16::new(row.port)?, row.reason, &desired.policy),
    })
}

/// Returns whether the registered process, file or directory still exists.
fn target_exists(attach_method: &AttachMethod) -> bool {
    match attach_method {
        AttachMethod::Docker { .. } | AttachMethod::Websocket => true,
        AttachMethod::Process { pid, started } => {
            processes::started(*pid).is_ok_and(|now| now.is_some() && now == *started)
        }
        AttachMethod::Netns { path } | AttachMethod::Agent { directory: path } => path.exists(),
    }
}
