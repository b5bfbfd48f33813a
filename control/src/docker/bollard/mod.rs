//! The only module that uses the Docker client: its types do not leave this directory.
//!
//! - `create` creates a new container.
//! - `facts` converts the engine's answers. No I/O.
//! - `recipe` converts the inspection of a container to a request that creates it again. No I/O.
//! - `image` builds an image; `rebuild` replaces a container by one of a new image, and `user` determines its user.
//! - `taken` names the holder of a host port that Docker cannot publish.
//! - `helper` creates the helper's image and its container.
//! - `inherited` reads the labels of the images of containers.

mod create;
mod facts;
mod helper;
mod image;
mod inherited;
mod rebuild;
mod recipe;
mod taken;
mod user;

use std::collections::HashMap;
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bollard::errors::Error;
use bollard::models::{self, ContainerInspectResponse, ContainerState, NetworkConnectRequest, PortMap};
use bollard::query_parameters::{
    CreateContainerOptionsBuilder, EventsOptionsBuilder, InspectContainerOptions, InspectNetworkOptions,
    ListContainersOptionsBuilder, LogsOptionsBuilder, RemoveContainerOptionsBuilder,
    RenameContainerOptionsBuilder, RestartContainerOptions, StartContainerOptions, StopContainerOptions,
};
use bollard::{API_DEFAULT_VERSION, ClientVersion, Docker as Client};
use futures_util::StreamExt;
use jiff::Timestamp;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::address::{Address, Endpoint};
use super::context::Context;
use super::replace::{self, ContainerActions};
use super::{About, BuildFrom, Docker, DockerError, FirstProcess, LifeEvent, Listed, Network, NewContainer};
use crate::model::name::escape;
use crate::model::registration::ContainerName;
pub(super) use inherited::ImageCache;
use taken::with_holders;

/// The client's own time limit of an answer, in seconds. It is longer than usual stop timeouts, since the answer to `stop`
/// arrives when the container has stopped. Callers set tighter limits for other requests.
const ANSWER_SECONDS: u64 = 600;
/// How long a negotiated version of the API is reused.
const NEGOTIATED_MAX: Duration = Duration::from_secs(30);
/// The age of the oldest requested events, in seconds: event times are in whole seconds.
const SINCE_SECONDS: i64 = 1;
/// The time for which a started container is observed, and the interval: a container that cannot run usually ends at once.
const OBSERVED: Duration = Duration::from_millis(1_500);
const OBSERVE_INTERVAL: Duration = Duration::from_millis(100);
/// The maximum length of its last output line in a message, in characters.
const LINE_CHARS_MAX: usize = 300;
/// The delay before an unreachable engine is tried again; it doubles from the minimum to the maximum.
const RETRY_MIN: Duration = Duration::from_millis(250);
const RETRY_MAX: Duration = Duration::from_secs(10);
/// The maximum delay for a reachable engine whose event stream ends early, within [`STABLE`]. Each attempt causes a resync.
const RETRY_REACHABLE_MAX: Duration = Duration::from_secs(2);
const STABLE: Duration = Duration::from_secs(1);

/// The API version of the last negotiation, with its time and address. A negotiation is cheap for Docker, but expensive for
/// Podman, which starts programs to answer. It expires, so that an engine that an older release replaced is negotiated soon.
#[derive(Debug, Default)]
pub(super) struct NegotiatedVersion(Mutex<Option<(Instant, Address, ClientVersion)>>);

impl NegotiatedVersion {
    fn at(&self, address: &Address) -> Option<ClientVersion> {
        let negotiated = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |(since, with, _): &&(Instant, Address, ClientVersion)| {
            with == address && since.elapsed() < NEGOTIATED_MAX
        };
        negotiated.as_ref().filter(fits).map(|(.., version)| *version)
    }

    fn note(&self, address: &Address, version: ClientVersion) {
        let mut negotiated = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *negotiated = Some((Instant::now(), address.clone(), version));
    }
}

/// An engine that has answered.
#[derive(Debug)]
pub(super) struct Engine {
    client: Client,
    address: Address,
}

impl Engine {
    /// Connects with the negotiated API version, and negotiates if that has expired.
    pub(super) async fn connect(
        address: &Address,
        negotiated: &NegotiatedVersion,
    ) -> Result<Engine, DockerError> {
        let at = address.to_string();
        let known = negotiated.at(address);
        let version = known.as_ref().unwrap_or(API_DEFAULT_VERSION);
        let client = match &address.endpoint {
            Endpoint::Unix(_) => Client::connect_with_unix(&at, ANSWER_SECONDS, version),
            Endpoint::Tcp(..) => Client::connect_with_http(&at, ANSWER_SECONDS, version),
        };
        let mut client = client.map_err(|error| unreachable(address, &error))?;
        if known.is_none() {
            client = client.negotiate_version().await.map_err(|error| unreachable(address, &error))?;
            negotiated.note(address, client.client_version());
        }
        Ok(Engine { client, address: address.clone() })
    }

    pub(super) async fn about(&self) -> Result<About, DockerError> {
        let inspected = self.client.version().await.map_err(|error| self.refused(&error))?;
        let first = inspected.components.and_then(|components| components.into_iter().next());
        let name = first.map_or_else(|| "Engine".to_owned(), |component| component.name);
        // Docker's component is named only "Engine".
        let name = if name == "Engine" { "Docker Engine".to_owned() } else { name };
        let version = inspected.version.unwrap_or_default();
        Ok(About {
            at: self.address.to_string(),
            source: self.address.source.clone(),
            socket: self.address.socket().map(Path::to_owned),
            name: escape(&format!("{name} {version}")).into_owned(),
            kernel: inspected.kernel_version,
        })
    }

    /// Returns whether a container of exactly this name exists, or one that it replaces.
    pub(super) async fn exists(&self, name: &ContainerName) -> Result<bool, DockerError> {
        let wanted = [name.to_string(), replace::aside_name(name.as_str())].map(|name| format!("/{name}"));
        // The filters are patterns in which a dot matches any character, so the results are compared exactly. In filters,
        // Docker's names start with a slash and Podman's do not.
        let patterns = wanted.iter().map(|name| format!("^/?{}$", &name[1..])).collect();
        let filters: HashMap<&str, Vec<String>> = HashMap::from([("name", patterns)]);
        let options = ListContainersOptionsBuilder::default().all(true).filters(&filters).build();
        let listed =
            self.client.list_containers(Some(options)).await.map_err(|error| self.refused(&error))?;
        Ok(listed
            .iter()
            .flat_map(|container| container.names.iter().flatten())
            .any(|name| wanted.contains(name)))
    }

    pub(super) async fn first_process(&self, name: &ContainerName) -> Result<FirstProcess, DockerError> {
        let inspected = self
            .inspect(name.as_str())
            .await?
            .ok_or_else(|| DockerError::NoSuchContainer(name.to_string()))?;
        let state = inspected.state.unwrap_or_default();
        let pid = state.pid.and_then(|pid| u32::try_from(pid).ok()).filter(|pid| *pid != 0);
        if state.running != Some(true) {
            return Err(DockerError::NotRunning(name.to_string()));
        }
        // Docker reports a container that waits for a restart as running, but without a process.
        let (Some(id), Some(pid)) = (inspected.id, pid) else {
            return Err(DockerError::Changing(name.to_string()));
        };
        let mode = inspected.host_config.and_then(|config| config.network_mode);
        let mut ports = inspected.network_settings.and_then(|settings| settings.ports).unwrap_or_default();
        let mut network = facts::network(mode.as_deref());
        if let Network::Shared(owner) = &mut network
            && let Some((name, owners)) = self.owner_of_network(owner).await?
        {
            *owner = name;
            ports = owners;
        }
        Ok(FirstProcess {
            id,
            pid,
            network,
            published: facts::published(&ports),
            agent_directory: facts::agent_directory(inspected.mounts.unwrap_or_default()),
            started_at: state.started_at.unwrap_or_default(),
        })
    }

    /// Returns the name and the published ports of a container, by id or name, whose network another one uses. Returns
    /// `None` if it was removed; the other container then keeps its network.
    async fn owner_of_network(&self, owner: &str) -> Result<Option<(String, PortMap)>, DockerError> {
        match self.client.inspect_container(owner, None::<InspectContainerOptions>).await {
            Ok(inspected) => {
                let ports =
                    inspected.network_settings.and_then(|settings| settings.ports).unwrap_or_default();
                let name = inspected.name.unwrap_or_default();
                let name = name.strip_prefix('/').unwrap_or(&name);
                Ok((!name.is_empty()).then(|| (name.to_owned(), ports)))
            }
            Err(Error::DockerResponseServerError { status_code: 404, .. }) => Ok(None),
            Err(error) => Err(self.refused(&error)),
        }
    }

    /// Returns all containers.
    pub(super) async fn containers(&self, cache: &ImageCache) -> Result<Vec<Listed>, DockerError> {
        let options = ListContainersOptionsBuilder::default().all(true).build();
        let listed =
            self.client.list_containers(Some(options)).await.map_err(|error| self.refused(&error))?;
        let images = self.image_labels_of(&listed, cache).await?;
        Ok(listed.into_iter().filter_map(|container| facts::listed(container, &images)).collect())
    }

    /// Returns the host port at which Docker publishes a TCP port of a running container.
    pub(super) async fn published_port(
        &self,
        name: &ContainerName,
        port: u16,
    ) -> Result<Option<NonZeroU16>, DockerError> {
        let inspected = self
            .inspect(name.as_str())
            .await?
            .ok_or_else(|| DockerError::NoSuchContainer(name.to_string()))?;
        let state = inspected.state.unwrap_or_default();
        if state.running != Some(true) || state.restarting == Some(true) {
            return Err(DockerError::NotRunning(name.to_string()));
        }
        let ports = inspected.network_settings.and_then(|settings| settings.ports).unwrap_or_default();
        let inside = NonZeroU16::new(port);
        Ok(inside.and_then(|inside| facts::published(&ports).get(&inside).copied()))
    }

    /// Stops and starts a container. Recovers an interrupted replacement first.
    pub(super) async fn restart(&self, name: &ContainerName) -> Result<(), DockerError> {
        replace::recover(self, name.as_str()).await.map_err(DockerError::stopping)?;
        let inspected = self.inspect(name.as_str()).await.map_err(DockerError::stopping)?;
        let auto_removed = inspected
            .as_ref()
            .and_then(|inspected| inspected.host_config.as_ref()?.auto_remove)
            .ok_or_else(|| DockerError::NoSuchContainer(name.to_string()).starting())?;
        if auto_removed {
            // Docker would remove the container on a stop. Only Docker's own restart keeps it.
            let restarted =
                self.client.restart_container(name.as_str(), None::<RestartContainerOptions>).await;
            if let Err(error) = restarted.map_err(|error| self.error(name.as_str(), &error)) {
                // Docker removes the container if it does not start again.
                return Err(with_holders(error, inspected.as_ref()).await.starting());
            }
            return self.check_stays_up(name.as_str()).await.map_err(DockerError::starting);
        }
        self.stop(name.as_str()).await.map_err(DockerError::stopping)?;
        self.start(name.as_str()).await.map_err(DockerError::starting)
    }

    /// Returns the source of a container's image, from its labels.
    pub(super) async fn built_from(&self, name: &ContainerName) -> Result<BuildFrom, DockerError> {
        let labels = self.inspect(name.as_str()).await?.and_then(|inspected| inspected.config?.labels);
        Ok(BuildFrom::of(&labels.unwrap_or_default()))
    }

    /// Inspects the container of exactly this name.
    async fn inspect(&self, name: &str) -> Result<Option<ContainerInspectResponse>, DockerError> {
        match self.client.inspect_container(name, None::<InspectContainerOptions>).await {
            // Docker also accepts the prefix of an id as a name. Such a match is not the requested container.
            Ok(inspected) => {
                Ok(Some(inspected).filter(|inspected| inspected.name.as_deref() == Some(&format!("/{name}"))))
            }
            Err(Error::DockerResponseServerError { status_code: 404, .. }) => Ok(None),
            // Podman has states that Docker does not have, such as "stopped" before cleanup. The container does not run in
            // any of them, and they are temporary.
            Err(Error::JsonDataError { message, .. }) if message.starts_with("unknown variant") => {
                Err(DockerError::Changing(name.to_owned()))
            }
            Err(error) => Err(self.refused(&error)),
        }
    }

    /// Checks for a short time that a started container stays up.
    async fn check_stays_up(&self, name: &str) -> Result<(), DockerError> {
        let until = Instant::now() + OBSERVED;
        loop {
            let inspected = self.inspect(name).await?.ok_or_else(|| {
                DockerError::Refused(format!("container {name} was removed right after its start"))
            })?;
            let state = inspected.state.unwrap_or_default();
            if state.running != Some(true) || state.restarting == Some(true) {
                return Err(DockerError::Refused(self.end_text(name, &state).await));
            }
            if Instant::now() >= until {
                return Ok(());
            }
            tokio::time::sleep(OBSERVE_INTERVAL).await;
        }
    }

    async fn end_text(&self, name: &str, state: &ContainerState) -> String {
        let options = LogsOptionsBuilder::default().stdout(true).stderr(true).tail("1").build();
        let mut lines = Box::pin(self.client.logs(name, Some(options)));
        let line = match lines.next().await {
            Some(Ok(line)) => line.to_string(),
            _ => String::new(),
        };
        let said: String = escape(line.trim()).chars().take(LINE_CHARS_MAX).collect();
        let code = state.exit_code.unwrap_or_default();
        let said = if said.is_empty() { said } else { format!(": {said}") };
        format!("container {name} ended at once with status {code}{said}")
    }

    pub(super) async fn bridge_gateway(&self) -> Result<Option<IpAddr>, DockerError> {
        let network = self
            .client
            .inspect_network("bridge", None::<InspectNetworkOptions>)
            .await
            .map_err(|error| self.refused(&error))?;
        Ok(match facts::gateway(network) {
            Some(facts::Gateway::Address(address)) => Some(address),
            Some(facts::Gateway::Interface(name)) => address_of_interface(&name),
            None => None,
        })
    }

    fn error(&self, name: &str, error: &Error) -> DockerError {
        match error {
            Error::DockerResponseServerError { status_code: 404, .. } => {
                DockerError::NoSuchContainer(name.to_owned())
            }
            _ => self.refused(error),
        }
    }

    fn refused(&self, error: &Error) -> DockerError {
        match error {
            Error::DockerResponseServerError { message, .. } => DockerError::Refused(message.clone()),
            Error::DockerStreamError { error } => DockerError::Refused(error.clone()),
            _ => unreachable(&self.address, error),
        }
    }
}

impl ContainerActions for Engine {
    async fn runs(&self, name: &str) -> Result<Option<bool>, DockerError> {
        let inspected = self.inspect(name).await?;
        Ok(inspected.map(|inspected| inspected.state.and_then(|state| state.running).unwrap_or(false)))
    }

    async fn rename(&self, from: &str, to: &str) -> Result<(), DockerError> {
        let options = RenameContainerOptionsBuilder::default().name(to).build();
        self.client.rename_container(from, options).await.map_err(|error| self.error(from, &error))
    }

    async fn stop(&self, name: &str) -> Result<(), DockerError> {
        let stopped = self.client.stop_container(name, None::<StopContainerOptions>).await;
        match stopped.map_err(|error| self.error(name, &error)) {
            // Some containers are removed when they stop.
            Ok(()) | Err(DockerError::NoSuchContainer(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn start(&self, name: &str) -> Result<(), DockerError> {
        let started = self.client.start_container(name, None::<StartContainerOptions>).await;
        match started.map_err(|error| self.error(name, &error)) {
            Ok(()) => self.check_stays_up(name).await,
            Err(error) => {
                let inspected = self.inspect(name).await.ok().flatten();
                Err(with_holders(error, inspected.as_ref()).await)
            }
        }
    }

    async fn remove(&self, name: &str) -> Result<(), DockerError> {
        let options = RemoveContainerOptionsBuilder::default().force(true).v(false).build();
        match self
            .client
            .remove_container(name, Some(options))
            .await
            .map_err(|error| self.error(name, &error))
        {
            Ok(()) | Err(DockerError::NoSuchContainer(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Sends life events until the receiver is dropped.
pub(super) async fn send_life_events(docker: Docker, listener: mpsc::Sender<LifeEvent>) {
    let mut delay = RETRY_MIN;
    while !listener.is_closed() {
        let mut delay_max = RETRY_MAX;
        if let Ok(engine) = docker.connect().await {
            let began = Instant::now();
            if engine.send_life_events(&listener).await.is_err()
                || listener.send(LifeEvent::Lost).await.is_err()
            {
                return;
            }
            delay_max = RETRY_REACHABLE_MAX;
            delay = if began.elapsed() < STABLE { delay.min(delay_max) } else { RETRY_MIN };
        }
        tokio::select! {
            () = tokio::time::sleep(delay) => delay = (delay * 2).min(delay_max),
            () = listener.closed() => return,
        }
    }
}

/// The receiver was dropped.
struct ReceiverGone;

impl Engine {
    /// Sends the events of this engine until its stream ends.
    async fn send_life_events(&self, listener: &mpsc::Sender<LifeEvent>) -> Result<(), ReceiverGone> {
        let filters = HashMap::from([("type", vec!["container", "network"])]);
        // The request is sent when the stream is first polled, and the engine does not confirm the subscription. Therefore
        // events from before the resync are requested, too. A repeated event causes only a repeated check.
        let since = (Timestamp::now().as_second() - SINCE_SECONDS).to_string();
        let options = EventsOptionsBuilder::default().filters(&filters).since(&since).build();
        let mut events = Box::pin(self.client.events(Some(options)));
        listener.send(LifeEvent::Resync).await.map_err(|_| ReceiverGone)?;
        loop {
            let event = tokio::select! {
                event = events.next() => event,
                () = listener.closed() => return Err(ReceiverGone),
            };
            let Some(Ok(mut event)) = event else { return Ok(()) };
            event.action = event.action.map(facts::docker_action);
            for event in facts::life_events(event) {
                listener.send(event).await.map_err(|_| ReceiverGone)?;
            }
        }
    }
}

/// Returns the IPv4 address of an interface of this machine.
fn address_of_interface(name: &str) -> Option<IpAddr> {
    let mut all = nix::ifaddrs::getifaddrs().ok()?.filter(|one| one.interface_name == name);
    all.find_map(|one| Some(IpAddr::V4(one.address?.as_sockaddr_in()?.ip())))
}

fn unreachable(address: &Address, error: &Error) -> DockerError {
    DockerError::Unreachable { at: address.to_string(), reason: reason(error) }
}

/// Returns the text of an error with its causes.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_has_its_address() {
        assert_eq!(address_of_interface("lo"), Some([127, 0, 0, 1].into()));
        assert_eq!(address_of_interface("no-such-interface"), None);
    }
}
