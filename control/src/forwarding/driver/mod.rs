//! Forwarding for every registered container: the task that drives the engine, and the handle to it.
//!
//! One task owns everything that is known ([`Planner`](crate::forwarding::planner::Planner)) and the engine's channel. It waits for
//! whatever comes first: other registrations, a word of a container's visit, an event of the engine, a question, or the
//! time; takes it in; and gives the engine the commands that the planner then has. Nobody else talks to the engine, so
//! the order in which things are known is the order in which they are said.
//!
//! Questions that may not wait ([`Forwarding::forwarded_ports`]) are answered from what was published after the last
//! turn.

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

/// What answers on the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answering {
    /// Whether every registered container had the chance to be reached. Before, ports may be missing that answer.
    pub settled: bool,
    /// The container behind each host port.
    pub ports: BTreeMap<NonZeroU16, String>,
}

/// How long fresh counters are waited for.
const TABLE_MAX: Duration = Duration::from_millis(500);

/// What forwarding works with.
pub struct ForwardingOptions {
    /// Where the engine's socket is.
    pub home: Home,
    /// Where events go.
    pub journal: Journal,
    /// Where containers are looked for by name.
    pub docker: Docker,
    /// Where a helper listens that may enter Docker's containers, if there is to be one.
    pub helper: Option<PathBuf>,
    /// Ready when every registration that was kept on disk is among `registrations`: what the engine still holds for
    /// nobody is let go of after that, and not before.
    pub replayed: BoxFuture<'static, ()>,
    /// The registrations, as a level.
    pub registrations: watch::Receiver<Arc<Registered>>,
    /// The ports of the host that no forward binds.
    pub control_ports: ControlPorts,
}

/// The handle; clones drive the same task. When the last one is dropped, the task lets go of the engine.
#[derive(Clone)]
pub struct Forwarding(Arc<Shared>);

struct Shared {
    asks: mpsc::UnboundedSender<Ask>,
    native_links: AtomicU64,
    published: Arc<Published>,
    answering: watch::Receiver<Answering>,
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

/// The engine, and every container. A container that did not change is the one of the snapshot before.
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

/// What the handle asks of the task.
#[derive(Debug)]
enum Ask {
    Table(oneshot::Sender<ForwardTable>),
    LookAgain(String),
    Followed(bool),
    Native(NativeReport),
    Broker(ContainerName, mpsc::Receiver<Announcement>, mpsc::UnboundedSender<SessionUpdate>),
    Detach(oneshot::Sender<()>),
    StopEngine(oneshot::Sender<()>),
}

impl Forwarding {
    /// Begins, as a task of the runtime that calls. The engine that runs is attached; one is started when a registration
    /// needs one.
    pub fn start(options: ForwardingOptions) -> Forwarding {
        let (asks, asked) = mpsc::unbounded_channel();
        let (ended, ends) = mpsc::unbounded_channel();
        let published = Arc::new(Published::default());
        let (answers, answering) = watch::channel(Answering::default());
        let parts = Parts { asked, ended, published: Arc::clone(&published), answers };
        tokio::spawn(Driver::new(options, parts).run());
        let (native_links, ended) = (AtomicU64::new(1), Mutex::new(Some(ends)));
        Forwarding(Arc::new(Shared { asks, native_links, published, answering, ended }))
    }

    /// What is forwarded, with fresh counters where the engine answers within 500 ms.
    pub async fn table(&self) -> ForwardTable {
        let (answer, table) = oneshot::channel();
        let asked = self.0.asks.send(Ask::Table(answer)).is_ok();
        match timeout(TABLE_MAX, table).await {
            Ok(Ok(table)) if asked => table,
            _ => self.0.published.read().into(),
        }
    }

    /// The host ports that answer for a container. Never waits.
    pub fn forwarded_ports(&self, name: &str) -> Vec<u16> {
        let containers = self.0.published.read().containers;
        let container = containers.iter().find(|container| container.container_name == name);
        let rows = container.into_iter().flat_map(|container| &container.forwards);
        rows.filter(|row| row.state == RowState::Open).map(|row| row.host_port).collect()
    }

    /// The host ports that answer, as a level.
    pub fn answering(&self) -> watch::Receiver<Answering> {
        self.0.answering.clone()
    }

    /// Tells which registrations have ended, because the process that they stood for has. Can be taken once; later
    /// receivers tell nothing.
    pub fn ended(&self) -> mpsc::UnboundedReceiver<ContainerName> {
        let taken = self.0.ended.lock().unwrap_or_else(PoisonError::into_inner).take();
        taken.unwrap_or_else(|| mpsc::unbounded_channel().1)
    }

    /// The link of a broker that begins. It may come before the registration is known here, and after an earlier one of the
    /// same name, which then counts as stopped. Never waits.
    pub fn broker(&self, name: &ContainerName) -> BrokerLink {
        let (link, announcements, words) = brokers::link();
        // A task that has ended hears nothing: the link is closed from the beginning.
        let _ = self.0.asks.send(Ask::Broker(name.clone(), announcements, words));
        link
    }

    /// A link for the reports of a sandbox's supervisor. Another one of the same name takes its place. Never waits.
    pub fn native(&self, name: &ContainerName) -> NativeLink {
        let number = self.0.native_links.fetch_add(1, Ordering::Relaxed);
        NativeLink { name: name.clone(), number, asks: self.0.asks.clone() }
    }

    /// Docker says that something changed about a container.
    pub fn look_again(&self, name: &str) {
        // A task that has ended looks at nothing.
        let _ = self.0.asks.send(Ask::LookAgain(name.to_owned()));
    }

    /// Whether [`Forwarding::look_again`] is called for all that happens from now on. As long as it is not, containers that do
    /// not run are looked at again and again.
    pub fn followed(&self, followed: bool) {
        // A task that has ended looks at nothing.
        let _ = self.0.asks.send(Ask::Followed(followed));
    }

    /// Lets go of the engine, which goes on: the daemon stops.
    pub async fn detach(&self) {
        self.end(Ask::Detach).await;
    }

    /// Ends the engine, after its connections have had 3 s to finish.
    pub async fn stop_engine(&self) {
        self.end(Ask::StopEngine).await;
    }

    async fn end(&self, ask: impl FnOnce(oneshot::Sender<()>) -> Ask) {
        let (done, waits) = oneshot::channel();
        if self.0.asks.send(ask(done)).is_ok() {
            // It fails when the task has ended, which is what was asked for.
            let _ = waits.await;
        }
    }
}
