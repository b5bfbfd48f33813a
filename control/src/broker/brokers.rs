//! The brokers of all containers: one for each registration that has the three fields of one and allows a port.
//!
//! A broker is a task of its own. One of a name begins when the one before it has ended, so an old token is never presented
//! to a new container (wire specification, A.6.8); that holds even where whoever started it has stopped waiting. One whose
//! token was refused has ended before that is reported, since the report ends with its being stopped.

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

/// Where a broker gets its link to forwarding.
pub type Links = Box<dyn Fn(&ContainerName) -> BrokerLink + Send + Sync>;

/// A broker has found something out about its container.
#[derive(Debug)]
pub struct Report {
    /// The container.
    pub name: ContainerName,
    /// Its token; another one may be registered by now.
    pub token: Token,
    /// What.
    pub finding: Finding,
}

/// See [`Report`].
#[derive(Debug, PartialEq, Eq)]
pub enum Finding {
    /// The container has answered a challenge, so it always can.
    Answered,
    /// It has refused its token for good, in these words.
    Rejected(String),
}

/// The brokers.
pub struct Brokers {
    docker: Docker,
    journal: Journal,
    offered: Extensions,
    /// Forwarding starts later than the first registrations are taken in; brokers begin when it is there.
    links: Arc<SetOnce<Links>>,
    reports: mpsc::UnboundedSender<Report>,
    running: Mutex<BTreeMap<ContainerName, Running>>,
}

/// One broker, which may have ended by itself.
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
    /// No brokers yet. They look for ports at `docker`, offer these extensions to containers, and report what they find out,
    /// once each.
    pub fn new(
        docker: Docker,
        journal: Journal,
        offered: Extensions,
    ) -> (Arc<Brokers>, mpsc::UnboundedReceiver<Report>) {
        let (reports, received) = mpsc::unbounded_channel();
        let (links, running) = (Arc::default(), Mutex::default());
        (Arc::new(Brokers { docker, journal, offered, links, reports, running }), received)
    }

    /// Gives the brokers their way to forwarding: those that were started begin. A second one is not taken.
    pub fn connect(&self, links: Links) {
        let _ = self.links.set(links);
    }

    /// Starts the broker of a container when the one before it has ended, and returns then.
    async fn start(&self, registration: Arc<Registration>) {
        let Some(broker) = self.broker(&registration) else {
            return self.stop(&registration.container_name).await;
        };
        let running = Running { stop: CancellationToken::new(), ended: CancellationToken::new() };
        let before = self.lock().insert(broker.name.clone(), running.clone());
        if let Some(before) = &before {
            before.stop.cancel();
        }
        tokio::spawn(run(broker, running, before.clone(), Arc::clone(&self.links)));
        if let Some(before) = before {
            before.ended.cancelled().await;
        }
    }

    async fn stop(&self, name: &ContainerName) {
        let Some(running) = self.lock().get(name).cloned() else { return };
        running.stop.cancel();
        running.ended.cancelled().await;
        let mut brokers = self.lock();
        // It may have a successor by now.
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

    /// What a registration's broker needs, where it has one.
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

/// Is a broker, from the end of the one before it to its own.
async fn run(broker: Broker, running: Running, before: Option<Running>, links: Arc<SetOnce<Links>>) {
    let Running { stop, ended } = running;
    let reporter = broker.clone();
    let reason = {
        // However it ends, it has.
        let _ended = ended.drop_guard();
        if let Some(before) = before {
            before.ended.cancelled().await;
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
