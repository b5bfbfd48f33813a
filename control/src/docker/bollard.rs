//! The only file that knows the Docker client: its types stop here.

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use bollard::errors::Error;
use bollard::query_parameters::{
    EventsOptionsBuilder, InspectContainerOptions, InspectNetworkOptions, ListContainersOptionsBuilder,
    StartContainerOptions, StopContainerOptions,
};
use bollard::{API_DEFAULT_VERSION, Docker as Client};
use futures_util::StreamExt;
use tokio::sync::mpsc;

use super::{DockerError, FirstProcess, LifeEvent};
use crate::registration::model::ContainerName;

/// Where an engine listens when nothing says otherwise.
const SOCKET: &str = "unix:///var/run/docker.sock";
/// The client's own bound for one answer, in seconds: longer than any stop timeout that is in use, since an answer to
/// `stop` comes when the container has stopped. Questions are bounded more tightly by the caller.
const ANSWER_SECONDS: u64 = 600;
/// How long to wait before an engine that went away is asked again: doubling between these two.
const AGAIN_MIN: Duration = Duration::from_millis(250);
const AGAIN_MAX: Duration = Duration::from_secs(10);

/// Where an engine is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Address(String);

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Address {
    /// What `DOCKER_HOST` says; empty counts as not set.
    pub(super) fn from_variable(host: Option<String>) -> Address {
        Address(host.filter(|host| !host.is_empty()).unwrap_or_else(|| SOCKET.to_owned()))
    }

    /// Meets the engine, and agrees on a version of the protocol with it.
    pub(super) async fn connect(&self) -> Result<Engine, DockerError> {
        let client = if self.0.starts_with("unix://") {
            Client::connect_with_unix(&self.0, ANSWER_SECONDS, API_DEFAULT_VERSION)
        } else if self.0.starts_with("tcp://") {
            Client::connect_with_http(&self.0, ANSWER_SECONDS, API_DEFAULT_VERSION)
        } else {
            return Err(self.unreachable("DOCKER_HOST must begin with unix:// or tcp://".to_owned()));
        };
        let client = client.map_err(|error| self.unreachable(reason(&error)))?;
        let client = client.negotiate_version().await.map_err(|error| self.unreachable(reason(&error)))?;
        Ok(Engine { client, address: self.clone() })
    }

    fn unreachable(&self, reason: String) -> DockerError {
        DockerError::Unreachable { at: self.0.clone(), reason }
    }
}

/// An engine that has answered.
pub(super) struct Engine {
    client: Client,
    address: Address,
}

impl Engine {
    pub(super) async fn exists(&self, name: &ContainerName) -> Result<bool, DockerError> {
        // The filter is a pattern in which a dot means anything; the comparison afterwards is exact.
        let filters = HashMap::from([("name", vec![format!("^/{name}$")])]);
        let options = ListContainersOptionsBuilder::default().all(true).filters(&filters).build();
        let listed =
            self.client.list_containers(Some(options)).await.map_err(|error| self.error(name, &error))?;
        let wanted = format!("/{name}");
        Ok(listed.iter().flat_map(|container| container.names.iter().flatten()).any(|name| *name == wanted))
    }

    pub(super) async fn first_process(&self, name: &ContainerName) -> Result<FirstProcess, DockerError> {
        let told = self
            .client
            .inspect_container(name.as_str(), None::<InspectContainerOptions>)
            .await
            .map_err(|error| self.error(name, &error))?;
        // Docker also takes the beginning of an id for a name; that is not what was asked for.
        if told.name.as_deref() != Some(&format!("/{name}")) {
            return Err(DockerError::NoSuchContainer(name.clone()));
        }
        let state = told.state.unwrap_or_default();
        let pid = state.pid.and_then(|pid| u32::try_from(pid).ok()).filter(|pid| *pid != 0);
        let (Some(id), Some(pid), Some(true)) = (told.id, pid, state.running) else {
            return Err(DockerError::NotRunning(name.clone()));
        };
        let network = told.host_config.and_then(|config| config.network_mode);
        Ok(FirstProcess {
            id,
            pid,
            host_network: network.as_deref() == Some("host"),
            started_at: state.started_at.unwrap_or_default(),
        })
    }

    pub(super) async fn stop(&self, name: &ContainerName) -> Result<(), DockerError> {
        let stopped = self.client.stop_container(name.as_str(), None::<StopContainerOptions>).await;
        stopped.map_err(|error| self.error(name, &error))
    }

    pub(super) async fn start(&self, name: &ContainerName) -> Result<(), DockerError> {
        let started = self.client.start_container(name.as_str(), None::<StartContainerOptions>).await;
        started.map_err(|error| self.error(name, &error))
    }

    pub(super) async fn bridge_gateway(&self) -> Result<Option<IpAddr>, DockerError> {
        let network = self
            .client
            .inspect_network("bridge", None::<InspectNetworkOptions>)
            .await
            .map_err(|error| self.refused(&error))?;
        let pools = network.ipam.and_then(|ipam| ipam.config).unwrap_or_default();
        Ok(pools.into_iter().find_map(|pool| pool.gateway?.parse().ok()))
    }

    fn error(&self, name: &ContainerName, error: &Error) -> DockerError {
        match error {
            Error::DockerResponseServerError { status_code: 404, .. } => {
                DockerError::NoSuchContainer(name.clone())
            }
            _ => self.refused(error),
        }
    }

    fn refused(&self, error: &Error) -> DockerError {
        match error {
            Error::DockerResponseServerError { message, .. } => DockerError::Refused(message.clone()),
            Error::DockerStreamError { error } => DockerError::Refused(error.clone()),
            _ => self.address.unreachable(reason(error)),
        }
    }
}

/// Tells of containers' lives until nobody listens.
pub(super) async fn tell_life(address: Address, listener: mpsc::Sender<LifeEvent>) {
    let mut again = AGAIN_MIN;
    while !listener.is_closed() {
        if let Ok(engine) = address.connect().await {
            again = AGAIN_MIN;
            if engine.tell_life(&listener).await.is_err() {
                return;
            }
        }
        tokio::select! {
            () = tokio::time::sleep(again) => again = (again * 2).min(AGAIN_MAX),
            () = listener.closed() => return,
        }
    }
}

/// Nobody listens any more.
struct Unheard;

impl Engine {
    /// Tells what this engine says until it says no more.
    async fn tell_life(&self, listener: &mpsc::Sender<LifeEvent>) -> Result<(), Unheard> {
        let filters = HashMap::from([("type", vec!["container"])]);
        let mut events =
            Box::pin(self.client.events(Some(EventsOptionsBuilder::default().filters(&filters).build())));
        listener.send(LifeEvent::Resync).await.map_err(|_| Unheard)?;
        loop {
            let event = tokio::select! {
                event = events.next() => event,
                () = listener.closed() => return Err(Unheard),
            };
            let Some(Ok(event)) = event else { return Ok(()) };
            let name = event.actor.and_then(|actor| actor.attributes?.remove("name"));
            if let (Some(name), Some(what)) = (name, event.action) {
                listener.send(LifeEvent::Changed { name, what }).await.map_err(|_| Unheard)?;
            }
        }
    }
}

/// What an error says, with what it says of its causes.
fn reason(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(deeper) = cause {
        let more = deeper.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = deeper.source();
    }
    text
}
