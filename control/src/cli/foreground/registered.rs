//! Forwarding by the daemon: `run` and `attach` register what they have, and tell people what the daemon says of it.
//!
//! The daemon's table is the truth and is read whole; its events are hints that it has changed, so that a line for people
//! comes at once and none is lost when an event is. The daemon may end at any time. What is forwarded then goes on in
//! the engine, and the command does not notice; when a daemon is back and does not know the registration, it is told
//! again. But what somebody deregistered on purpose stays deregistered.

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
use crate::cli::daemon_client::{self, Container, Description};
use crate::cli::foreground::native_driver::Sink;
use crate::cli::foreground::reported_ports::{News, Told};
use crate::cli::ui::output::{Report, Talk};
use crate::daemon::rpc::client::{Client, PATIENT_BUDGET, PROBE_BUDGET};
use crate::model::forward_table::{ForwardRow, Reachability};
use crate::model::native_sockets;
use crate::model::port_policy::{Policy, PortForward};
use crate::model::registration::AttachMethod;
use crate::sys::event_loop::{self, LoopEvent, Signals, Watched};
use crate::sys::processes::{self, ProcessFact};

/// How often the table is read when nothing hints at a change.
const LOOK: Duration = Duration::from_secs(2);
/// How long a hint rests, so that those which come together cause one look.
const HINT_REST: Duration = Duration::from_millis(5);
/// How long the daemon may take to enter the namespace. It takes milliseconds.
const BEGIN_MAX: Duration = Duration::from_secs(5);
/// How often that is looked at.
const BEGIN_POLL: Duration = Duration::from_millis(5);
/// How often a daemon that is gone is looked for.
const RETRY: Duration = Duration::from_secs(1);
/// A daemon that is back sooner, such as one of another build in its place, is not missed.
const ABSENCE_TOLD: Duration = Duration::from_secs(5);
/// How often open connections are looked at when all is over.
const DRAIN_POLL: Duration = Duration::from_millis(20);

/// What is to be forwarded.
#[derive(Clone, Debug)]
pub struct DesiredContainer {
    /// What people call it.
    pub name: String,
    /// Whether that name was given, and no other will do.
    pub name_is_given: bool,
    /// How the daemon gets there.
    pub attach_method: AttachMethod,
    /// Which ports.
    pub policy: Policy,
    /// Where lines go.
    pub talk: Talk,
    /// Whether a supervisor reports native sockets.
    pub native: bool,
}

/// Why the daemon does not forward it.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Unregistered {
    /// None runs that is ours.
    #[error("no daemon runs")]
    NoDaemon,
    /// The name that was given is somebody else's.
    #[error("the name {name} is taken, by {holder}")]
    NameTaken {
        /// The name.
        name: String,
        /// How the other one is reached.
        holder: String,
    },
    /// It does not want to, or cannot.
    #[error("{0}")]
    Refused(String),
}

/// One namespace that the daemon forwards.
pub struct Registered {
    client: Client,
    desired: DesiredContainer,
    happenings: Receiver<LoopEvent>,
    queue: Sender<LoopEvent>,
    told: Told,
    look_at: Instant,
    missing: Missing,
    /// The daemon that knows us; another one may have come unnoticed.
    daemon: Option<u32>,
    /// The name of the registration, for the link of native sockets.
    name: Arc<Mutex<String>>,
}

/// What is wrong between the daemon and us.
enum Missing {
    /// Nothing.
    Nothing,
    /// It does not answer, since then.
    Daemon { since: Instant, told: bool },
    /// Somebody deregistered us; that is told, and no more is done.
    Registration,
}

impl Registered {
    /// Registers with the daemon, and returns when what listens in the namespace now is known to it.
    ///
    /// # Errors
    /// [`Unregistered`]; then nothing is registered.
    pub fn open(client: Client, desired: DesiredContainer) -> Result<Registered, Unregistered> {
        let description = describe(&client).filter(|description| is_beside_us(description.pid));
        let description = description.ok_or(Unregistered::NoDaemon)?;
        let (queue, happenings) = mpsc::channel();
        let (told, missing, look_at) = (Told::default(), Missing::Nothing, Instant::now());
        let daemon = description.pid;
        let name = Arc::new(Mutex::new(desired.name.clone()));
        let mut registered =
            Registered { client, desired, happenings, queue, told, look_at, missing, daemon, name };
        registered.choose_name(&description)?;
        registered.register()?;
        if let Err(why) = registered.wait_until_reached() {
            registered.deregister();
            return Err(why);
        }
        let (client, name, queue) =
            (registered.client.clone(), registered.desired.name.clone(), registered.queue.clone());
        let listen = move || listen(&client, &name, &queue);
        // Without hints, news come a little later.
        let _ = thread::Builder::new().name("hints".to_owned()).spawn(listen);
        Ok(registered)
    }

    /// Links a supervisor of native sockets to the daemon. Its events go to what is returned.
    ///
    /// # Errors
    /// Those of starting a thread.
    pub fn native_events(&self) -> io::Result<Sink> {
        let (events, reported) = mpsc::channel();
        link::start(self.client.clone(), Arc::clone(&self.name), reported)?;
        Ok(Box::new(move |event| {
            // The link ends with the supervisor.
            let _ = events.send(event);
        }))
    }

    /// Begins to tell of signals and of the ends of processes.
    ///
    /// # Errors
    /// Those of starting a thread.
    pub fn watch(&self, signals: Signals, pidfds: BTreeMap<Watched, OwnedFd>) -> io::Result<()> {
        event_loop::watch(signals, pidfds, self.queue.clone())
    }

    /// Tells people what happens until something happens that is the verb's business, or `tick` has passed.
    pub fn next(&mut self, tick: Option<Duration>) -> Wakeup {
        let end = tick.map(|tick| Instant::now() + tick);
        loop {
            let due = end.map_or(self.look_at, |end| end.min(self.look_at));
            match self.happenings.recv_timeout(due.saturating_duration_since(Instant::now())) {
                Ok(LoopEvent::Signal(signal, origin)) => return Wakeup::Signal(signal, origin),
                Ok(LoopEvent::Ended(who)) => return Wakeup::Ended(who),
                Ok(LoopEvent::DaemonHints) => self.look_at = self.look_at.min(Instant::now() + HINT_REST),
                Ok(LoopEvent::Engine(_) | LoopEvent::EngineEnded | LoopEvent::Native(_))
                | Err(RecvTimeoutError::Timeout) => {}
                // The queue cannot close while this value holds one of its ends.
                Err(RecvTimeoutError::Disconnected) => {
                    return Wakeup::Lost("nothing more can happen".to_owned());
                }
            }
            if Instant::now() >= self.look_at {
                self.look();
            }
            if end.is_some_and(|end| Instant::now() >= end) {
                return Wakeup::Tick;
            }
        }
    }

    /// Waits until open connections have finished, for at most `patience`, and deregisters. The engine outlives us, so
    /// what is on its way arrives even after that.
    pub fn close(mut self, patience: Duration) {
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            self.look();
            let Some(container) = describe(&self.client).and_then(|seen| self.own(&seen)) else { break };
            if container.state.forwards.iter().all(|row| row.connections == 0) {
                break;
            }
            thread::sleep(DRAIN_POLL);
        }
        if matches!(self.missing, Missing::Nothing) {
            self.deregister();
            let news = self.told.hear(&[]);
            self.tell(news);
        }
    }

    /// Reads the table and tells what is new in it.
    fn look(&mut self) {
        self.look_at = Instant::now() + LOOK;
        let Some(description) = describe(&self.client) else { return self.miss_daemon() };
        let was_away = matches!(self.missing, Missing::Daemon { .. }) || self.daemon != description.pid;
        if let Missing::Daemon { told: true, .. } = self.missing {
            self.note("the daemon is back".to_owned());
        }
        if was_away {
            self.missing = Missing::Nothing;
        }
        // What another one does not know, it was not told to forget.
        if description.replayed {
            self.daemon = description.pid;
        }
        match self.own(&description) {
            Some(container) => {
                let news = self.told.hear(&container.state.forwards);
                self.tell(news);
            }
            // Those of the last daemon are on their way back.
            None if !description.replayed => {}
            None if was_away || self.is_displaced(&description) => self.register_again(&description),
            None => self.miss_registration(),
        }
    }

    fn register_again(&mut self, description: &Description) {
        if let Err(why) = self.choose_name(description).and_then(|()| self.register()) {
            self.missing = Missing::Registration;
            self.warn(format!("nothing is forwarded any more: {why}"));
        }
    }

    fn miss_daemon(&mut self) {
        self.look_at = Instant::now() + RETRY;
        match self.missing {
            Missing::Nothing => self.missing = Missing::Daemon { since: Instant::now(), told: false },
            Missing::Daemon { since, told: false } if since.elapsed() >= ABSENCE_TOLD => {
                self.missing = Missing::Daemon { since, told: true };
                let text = "the daemon has ended; what is forwarded goes on, and nothing new is".to_owned();
                let hint = Some("landfall up starts another one".to_owned());
                self.desired.talk.report(&Report::Warning { text, hint });
            }
            Missing::Daemon { .. } | Missing::Registration => {}
        }
    }

    fn miss_registration(&mut self) {
        if matches!(self.missing, Missing::Registration) {
            return;
        }
        self.missing = Missing::Registration;
        let news = self.told.hear(&[]);
        self.tell(news);
        // A registration ends with what it stands for, and that is about to be noticed here as well.
        if is_there(&self.desired.attach_method) {
            self.note(format!("{} was deregistered; nothing is forwarded any more", self.desired.name));
        }
    }

    /// Takes the name, or the next one that is free.
    fn choose_name(&mut self, description: &Description) -> Result<(), Unregistered> {
        let wanted = self.desired.name.clone();
        let other = |name: &str| {
            description.containers.iter().find(|other| is_another(other, name, &self.desired.attach_method))
        };
        let Some(holder) = other(&wanted) else { return Ok(()) };
        if self.desired.name_is_given {
            let attach_method = holder.state.attach_method.clone().unwrap_or_else(|| holder.cwd.clone());
            return Err(Unregistered::NameTaken { name: wanted, holder: attach_method });
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

    fn own(&self, description: &Description) -> Option<Container> {
        let own = |other: &&Container| {
            other.state.container_name == self.desired.name
                && !is_another(other, &self.desired.name, &self.desired.attach_method)
        };
        description.containers.iter().find(own).cloned()
    }

    fn register(&self) -> Result<(), Unregistered> {
        let answer = self.client.within(PATIENT_BUDGET).call(&request(&self.desired));
        answer.map(drop).map_err(|error| Unregistered::Refused(error.to_string()))
    }

    /// Deregisters what is ours; another one may have the name by now.
    fn deregister(&self) {
        if describe(&self.client).and_then(|seen| self.own(&seen)).is_none() {
            return;
        }
        // A daemon that does not hear this finds out by itself that the namespace is gone.
        let name = self.desired.name.as_str();
        let _ = self.client.call(&json!({ "kind": "deregister", "containerName": name }));
    }

    fn wait_until_reached(&mut self) -> Result<(), Unregistered> {
        let refused = |why: Option<String>| {
            Unregistered::Refused(why.unwrap_or_else(|| "the daemon cannot enter it".to_owned()))
        };
        let deadline = Instant::now() + BEGIN_MAX;
        loop {
            let Some(description) = describe(&self.client) else {
                return Err(refused(Some("the daemon has ended".to_owned())));
            };
            match self.own(&description).map(|own| (own.state.state, own.state.reason)) {
                Some((Reachability::Reached | Reachability::Off, _)) => return Ok(()),
                Some((Reachability::Unreachable, reason)) => return Err(refused(reason)),
                // Somebody took the name in the same moment.
                None if self.is_displaced(&description) => {
                    self.choose_name(&description)?;
                    self.register()?;
                }
                Some((Reachability::Waiting, _)) | None => {}
            }
            if Instant::now() >= deadline {
                return Err(refused(Some("the daemon has not entered it".to_owned())));
            }
            thread::sleep(BEGIN_POLL);
        }
    }

    fn tell(&self, news: Vec<News>) {
        for report in news.into_iter().filter_map(|news| report(news, &self.desired)) {
            self.desired.talk.report(&report);
        }
    }

    fn note(&self, text: String) {
        self.desired.talk.report(&Report::Note { text, hint: None });
    }

    fn warn(&self, text: String) {
        self.desired.talk.report(&Report::Warning { text, hint: None });
    }
}

/// Hints at every event of ours, and at the daemon's coming and going.
fn listen(client: &Client, name: &str, queue: &Sender<LoopEvent>) {
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

/// Whether the daemon's localhost is ours, and its process ids are. In a sandbox or a container that sees the home of the
/// host, what is forwarded is to answer there.
fn is_beside_us(daemon: Option<u32>) -> bool {
    let namespace = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/net")).ok();
    let theirs = daemon.and_then(|pid| namespace(&pid.to_string()));
    theirs.is_some() && theirs == namespace("self")
}

/// Whether a registration of this name is somebody else's.
fn is_another(other: &Container, name: &str, attach_method: &AttachMethod) -> bool {
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

fn report(news: News, desired: &DesiredContainer) -> Option<Report> {
    Some(match news {
        News::Open(ForwardRow { host_port, process, pid, label, path, .. }) => {
            let process = process.zip(pid).map(|(name, pid)| ProcessFact { name, pid });
            let (port, name) = (NonZeroU16::new(host_port)?, desired.name.clone());
            Report::Forward { port, name, process, label, path }
        }
        News::Closed(port) => Report::Closed { port: NonZeroU16::new(port)? },
        News::Failed(row) => {
            let detail = row.reason.unwrap_or_else(|| "the daemon does not say why".to_owned());
            failed(NonZeroU16::new(row.host_port)?, detail)
        }
        News::Denied(row) => denied(NonZeroU16::new(row.port)?, row.reason, &desired.policy),
    })
}

/// Whether what was registered still is what it was.
fn is_there(attach_method: &AttachMethod) -> bool {
    match attach_method {
        AttachMethod::Docker { .. } | AttachMethod::Websocket => true,
        AttachMethod::Process { pid, started } => {
            processes::started(*pid).is_ok_and(|now| now.is_some() && now == *started)
        }
        AttachMethod::Netns { path } | AttachMethod::Agent { directory: path } => path.exists(),
    }
}
