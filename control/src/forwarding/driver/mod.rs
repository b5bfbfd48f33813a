//! The task that drives the engine for every registered container, and the handle to it.
//!
//! One task owns the whole state ([`Planner`](crate::forwarding::planner::Planner)) and the engine's channel. Each turn
//! of its loop waits for one input (changed registrations, a report of a container task, an announcement of a broker's
//! session, an event of the engine, a request of the handle, or a timer), updates the planner with it, and sends the
//! engine the commands that [`Planner::step`](crate::forwarding::planner::Planner::step) returns. No other task sends
//! commands to the engine.
//!
//! The engine is absent, being connected, or attached (`event_loop::Engine`). [`Forwarding::forwarded_ports`] never
//! waits: it reads the snapshot that the task published after its last turn.

mod brokers;
mod containers;
mod engine;
mod event_loop;
mod natives;
mod owners;
mod reporting;
mod task_events;
mod upgrade;

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroU16;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

use crate::docker::Docker;
use crate::forwarding::broker_link::{Announcement, BrokerLink, SessionUpdate};
use crate::model::forward_table::{ContainerState, EngineFacts, ForwardTable, RowState};
use crate::model::port_policy::ControlPorts;
use crate::model::registration::ContainerName;
use crate::registry::store::Registered;
use crate::sys::journal::Journal;
use crate::sys::paths::Home;
use event_loop::{Driver, Parts};
pub use natives::NativeLink;
use natives::NativeReport;

/// The host ports that accept connections.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpenPorts {
    /// Whether every registered container was tried. Before that, open ports may be missing.
    pub complete: bool,
    /// The container behind each host port.
    pub ports: BTreeMap<NonZeroU16, String>,
}

/// The longest wait for fresh counters.
const TABLE_MAX: Duration = Duration::from_millis(500);

/// The dependencies of forwarding.
pub struct ForwardingOptions {
    /// The directory of the engine's socket.
    pub home: Home,
    /// Receives the events.
    pub journal: Journal,
    /// Resolves containers by name.
    pub docker: Docker,
    /// The socket of the helper that can enter Docker's containers, if a helper is configured.
    pub helper: Option<PathBuf>,
    /// Ready when `registrations` contains every registration that was kept on disk. Only after that are ports closed
    /// that the engine holds for no registration.
    pub replayed: BoxFuture<'static, ()>,
    /// The current registrations; a level, not a stream of changes.
    pub registrations: watch::Receiver<Arc<Registered>>,
    /// The host ports that no forward binds.
    pub control_ports: ControlPorts,
}

/// The handle; clones drive the same task. When the last one is dropped, the task ends and the engine keeps running.
#[derive(Clone)]
pub struct Forwarding(Arc<Shared>);

struct Shared {
    requests: mpsc::UnboundedSender<Request>,
    native_links: AtomicU64,
    published: Arc<Published>,
    open_ports: watch::Receiver<OpenPorts>,
    ended: Mutex<Option<mpsc::UnboundedReceiver<ContainerName>>>,
}

impl fmt::Debug for Forwarding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Forwarding")
    }
}

/// The state after the task's last turn.
#[derive(Debug, Default)]
struct Published(Mutex<Snapshot>);

/// The engine and every container. The state of an unchanged container is shared with the previous snapshot.
#[derive(Clone, Debug, Default)]
struct Snapshot {
    engine: Option<EngineFacts>,
    containers: Vec<Arc<ContainerState>>,
}

impl Published {
    fn read(&self) -> Snapshot {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn publish(&self, snapshot: Snapshot) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = snapshot;
    }
}

impl From<Snapshot> for ForwardTable {
    fn from(snapshot: Snapshot) -> ForwardTable {
        let containers = snapshot.containers.into_iter().map(Arc::unwrap_or_clone).collect();
        ForwardTable { engine: snapshot.engine, containers }
    }
}

/// A request of the handle to the task.
#[derive(Debug)]
enum Request {
    Table(oneshot::Sender<ForwardTable>),
    Recheck(String),
    EventsFollowed(bool),
    Native(NativeReport),
    Broker(ContainerName, mpsc::Receiver<Announcement>, mpsc::UnboundedSender<SessionUpdate>),
    Detach(oneshot::Sender<()>),
    StopEngine(oneshot::Sender<()>),
}

impl Forwarding {
    /// Starts the task on the current runtime. The task attaches to a running engine, and starts one when a
    /// registration needs it.
    pub fn start(options: ForwardingOptions) -> Forwarding {
        let (requests, request_receiver) = mpsc::unbounded_channel();
        let (ended, ends) = mpsc::unbounded_channel();
        let published = Arc::new(Published::default());
        let (open_ports_sender, open_ports) = watch::channel(OpenPorts::default());
        let parts = Parts { request_receiver, ended, published: Arc::clone(&published), open_ports_sender };
        tokio::spawn(Driver::new(options, parts).run());
        let (native_links, ended) = (AtomicU64::new(1), Mutex::new(Some(ends)));
        Forwarding(Arc::new(Shared { requests, native_links, published, open_ports, ended }))
    }

    /// Returns the table of forwards, with fresh counters if the engine answers within 500 ms.
    pub async fn table(&self) -> ForwardTable {
        let (answer, table) = oneshot::channel();
        let is_sent = self.0.requests.send(Request::Table(answer)).is_ok();
        match timeout(TABLE_MAX, table).await {
            Ok(Ok(table)) if is_sent => table,
            _ => self.0.published.read().into(),
        }
    }

    /// Returns the host ports that are open for a container. Never waits.
    pub fn forwarded_ports(&self, name: &str) -> Vec<u16> {
        let containers = self.0.published.read().containers;
        let container = containers.iter().find(|container| container.container_name == name);
        let rows = container.into_iter().flat_map(|container| &container.forwards);
        rows.filter(|row| row.state == RowState::Open).map(|row| row.host_port).collect()
    }

    /// Returns the host ports that accept connections; a level, not a stream of changes.
    pub fn open_ports(&self) -> watch::Receiver<OpenPorts> {
        self.0.open_ports.clone()
    }

    /// Returns the names of registrations whose process has ended, as a stream. Only the first call returns the stream;
    /// later ones return a closed one.
    pub fn ended(&self) -> mpsc::UnboundedReceiver<ContainerName> {
        let taken = self.0.ended.lock().unwrap_or_else(PoisonError::into_inner).take();
        taken.unwrap_or_else(|| mpsc::unbounded_channel().1)
    }

    /// Adds a broker and returns its link. The call may precede the registration. A broker of the same name that is
    /// linked already counts as stopped. Never waits.
    pub fn broker(&self, name: &ContainerName) -> BrokerLink {
        let (link, announcements, updates) = brokers::link();
        // A task that has ended drops the request, and with it its end of the link.
        let _ = self.0.requests.send(Request::Broker(name.clone(), announcements, updates));
        link
    }

    /// Returns a link for the reports of a sandbox's supervisor. It replaces a link of the same name. Never waits.
    pub fn native(&self, name: &ContainerName) -> NativeLink {
        let number = self.0.native_links.fetch_add(1, Ordering::Relaxed);
        NativeLink { name: name.clone(), number, requests: self.0.requests.clone() }
    }

    /// Rechecks a container because Docker has reported a change of it.
    pub fn recheck(&self, name: &str) {
        // A task that has ended rechecks nothing.
        let _ = self.0.requests.send(Request::Recheck(name.to_owned()));
    }

    /// Sets whether [`Forwarding::recheck`] is called for every change that Docker reports from now on. While it is
    /// not, containers that do not run are polled.
    pub fn set_events_followed(&self, followed: bool) {
        // A task that has ended polls nothing.
        let _ = self.0.requests.send(Request::EventsFollowed(followed));
    }

    /// Ends the task and leaves the engine running: the daemon stops.
    pub async fn detach(&self) {
        self.end(Request::Detach).await;
    }

    /// Stops the engine after its connections have had 3 s to finish.
    pub async fn stop_engine(&self) {
        self.end(Request::StopEngine).await;
    }

    async fn end(&self, request: impl FnOnce(oneshot::Sender<()>) -> Request) {
        let (done, waits) = oneshot::channel();
        if self.0.requests.send(request(done)).is_ok() {
            // The send fails if the task has ended, which is the requested state.
            let _ = waits.await;
        }
    }
}
