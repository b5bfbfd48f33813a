//! The brokers of all containers: one for each registration that has a broker token and a WebSocket port, and allows a
//! port.
//!
//! A broker is a task. The broker of a name starts after its predecessor of the same name has ended, so an old token is
//! never presented to a new container (wire specification, A.6.8). This also holds if the caller that started it no
//! longer waits. A refused token is reported after its broker has ended, since the handler of the report stops that
//! broker.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::future::BoxFuture;
use tokio::sync::{SetOnce, mpsc};
use tokio_util::sync::CancellationToken;

use super::driver::{Broker, Driver};
use super::message::Extensions;
use crate::docker::Docker;
use crate::forwarding::broker_link::BrokerLink;
use crate::model::event::Event;
use crate::model::registration::{AttachMethod, ContainerName, Registration, Token};
use crate::registry::store::{RegistrationObserver, StopReason};
use crate::sys::journal::Journal;

/// Returns the link between a broker and forwarding.
pub type Links = Box<dyn Fn(&ContainerName) -> BrokerLink + Send + Sync>;

/// A finding of a broker about its container.
#[derive(Debug)]
pub struct Report {
    /// The container.
    pub name: ContainerName,
    /// The token that the broker used; the registration may have another one by now.
    pub token: Token,
    /// The finding.
    pub finding: Finding,
}

/// The content of a [`Report`].
#[derive(Debug, PartialEq, Eq)]
pub enum Finding {
    /// The container has answered a challenge, so it supports challenges.
    Answered,
    /// The container has refused the token permanently; its reason.
    Rejected(String),
}

/// The brokers of one daemon.
pub struct Brokers {
    docker: Docker,
    journal: Journal,
    offered: Extensions,
    /// Set when forwarding starts, which is after the first registrations are loaded. Brokers wait for it.
    links: Arc<SetOnce<Links>>,
    reports: mpsc::UnboundedSender<Report>,
    running: Mutex<BTreeMap<ContainerName, Running>>,
}

/// A broker that was started; it may have ended since.
#[derive(Clone, Debug)]
struct Running {
    stop: CancellationToken,
    ended: CancellationToken,
}

impl fmt::Debug for Brokers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Brokers")
    }
}

impl Brokers {
    /// Returns an empty set of brokers. They look up published ports with `docker`, offer these extensions to
    /// containers, and send each finding once.
    pub fn new(
        docker: Docker,
        journal: Journal,
        offered: Extensions,
    ) -> (Arc<Brokers>, mpsc::UnboundedReceiver<Report>) {
        let (reports, received) = mpsc::unbounded_channel();
        let (links, running) = (Arc::default(), Mutex::default());
        (Arc::new(Brokers { docker, journal, offered, links, reports, running }), received)
    }

    /// Sets the link to forwarding, for which started brokers wait. A second call has no effect.
    pub fn connect(&self, links: Links) {
        let _ = self.links.set(links);
    }

    /// Starts the broker of a container. Returns after its predecessor has ended.
    async fn start(&self, registration: Arc<Registration>) {
        let Some(broker) = self.broker(&registration) else {
            return self.stop(&registration.container_name).await;
        };
        let running = Running { stop: CancellationToken::new(), ended: CancellationToken::new() };
        let predecessor = self.lock().insert(broker.name.clone(), running.clone());
        if let Some(predecessor) = &predecessor {
            predecessor.stop.cancel();
        }
        tokio::spawn(run(broker, running, predecessor.clone(), Arc::clone(&self.links)));
        if let Some(predecessor) = predecessor {
            predecessor.ended.cancelled().await;
        }
    }

    async fn stop(&self, name: &ContainerName) {
        let Some(running) = self.lock().get(name).cloned() else { return };
        running.stop.cancel();
        running.ended.cancelled().await;
        let mut brokers = self.lock();
        // A successor may have taken the entry.
        if brokers.get(name).is_some_and(|now| now.stop.is_cancelled() && now.ended.is_cancelled()) {
            brokers.remove(name);
        }
    }

    async fn drain(&self) {
        let running: Vec<Running> = self.lock().values().cloned().collect();
        for broker in &running {
            broker.stop.cancel();
        }
        for broker in &running {
            broker.ended.cancelled().await;
        }
    }

    /// Returns the configuration of a registration's broker, if it has one.
    fn broker(&self, registration: &Registration) -> Option<Broker> {
        let (registered_port, _, token) = registration.broker()?;
        let name = &registration.container_name;
        if registration.exposes_nothing() {
            let text = format!("[portbroker:{name}] not started: its list of allowed ports is empty");
            self.journal.record(&Event::Notice { text });
            return None;
        }
        let by_docker = matches!(registration.attach_method, None | Some(AttachMethod::Docker { .. }));
        Some(Broker {
            name: name.clone(),
            token: token.clone(),
            must_answer: registration.challenge_required,
            registered_port,
            docker_name: by_docker.then(|| registration.docker_name().clone()),
            docker: self.docker.clone(),
            journal: self.journal.clone(),
            offered: self.offered,
            reports: self.reports.clone(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ContainerName, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs a broker after its predecessor has ended.
async fn run(broker: Broker, running: Running, predecessor: Option<Running>, links: Arc<SetOnce<Links>>) {
    let Running { stop, ended } = running;
    let reporter = broker.clone();
    let reason = {
        // Signals the end on every return, and on a panic.
        let _ended = ended.drop_guard();
        if let Some(predecessor) = predecessor {
            predecessor.ended.cancelled().await;
        }
        let Some(links) = stop.run_until_cancelled(links.wait()).await else { return };
        let link = links(&broker.name);
        Driver::new(broker, link).run(&stop).await
    };
    if let Some(reason) = reason {
        reporter.report(Finding::Rejected(reason));
    }
}

impl RegistrationObserver for Brokers {
    fn name(&self) -> &'static str {
        "broker"
    }

    fn start(&self, registration: Arc<Registration>) -> BoxFuture<'_, ()> {
        Box::pin(Brokers::start(self, registration))
    }

    fn stop<'a>(&'a self, name: &'a ContainerName, _reason: StopReason) -> BoxFuture<'a, ()> {
        Box::pin(Brokers::stop(self, name))
    }

    fn drain(&self) -> BoxFuture<'_, ()> {
        Box::pin(Brokers::drain(self))
    }
}

#[cfg(test)]
#[path = "brokers_tests.rs"]
mod tests;
