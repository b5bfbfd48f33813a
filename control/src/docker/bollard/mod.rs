//! The only place that knows the Docker client: its types stop here, and in the files below.
//!
//! - `create` makes a container that was not there.
//! - `facts` reads what Docker tells of a container. No I/O.
//! - `recipe` turns what Docker tells of a container into what it takes to make it again. No I/O.
//! - `image` builds an image; `rebuild` replaces a container by one of a new image, and `user` decides which user it has.
//! - `taken` names the holder of a host port that Docker cannot publish.
//! - `helper` makes the helper's image and its container.
//! - `inherited` reads the labels of the images that containers are made of.

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

/// The client's own bound for one answer, in seconds: longer than any stop timeout that is in use, since an answer to
/// `stop` comes when the container has stopped. Questions are bounded more tightly by the caller.
const ANSWER_SECONDS: u64 = 600;
/// How long a version of the protocol is used that was agreed on.
const AGREED_MAX: Duration = Duration::from_secs(30);
/// How far back events are asked for, in seconds: clocks are read in whole ones.
const SINCE_SECONDS: i64 = 1;
/// How long a container that was started is watched, and how often: one that cannot run mostly ends at once.
const WATCHED: Duration = Duration::from_millis(1_500);
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How much of its last line is told when it does, in characters.
const LINE_CHARS_MAX: usize = 300;
/// How long to wait before an engine that went away is asked again: doubling between these two.
const AGAIN_MIN: Duration = Duration::from_millis(250);
const AGAIN_MAX: Duration = Duration::from_secs(10);
/// The most of that for an engine that is there, and tells nothing for longer than [`STOOD`]: each attempt has everything
/// looked at again.
const AGAIN_THERE_MAX: Duration = Duration::from_secs(2);
const STOOD: Duration = Duration::from_secs(1);

/// The version of the protocol that was agreed on last, with whom and when. To ask costs an engine little, and Podman, which starts
/// programs to answer, very much. One that is replaced by an older release is asked again soon.
#[derive(Debug, Default)]
pub(super) struct Agreed(Mutex<Option<(Instant, Address, ClientVersion)>>);

impl Agreed {
    fn at(&self, address: &Address) -> Option<ClientVersion> {
        let agreed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |(since, with, _): &&(Instant, Address, ClientVersion)| {
            with == address && since.elapsed() < AGREED_MAX
        };
        agreed.as_ref().filter(fits).map(|(.., version)| *version)
    }

    fn note(&self, address: &Address, version: ClientVersion) {
        let mut agreed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *agreed = Some((Instant::now(), address.clone(), version));
    }
}

/// An engine that has answered.
#[derive(Debug)]
pub(super) struct Engine {
    client: Client,
    address: Address,
}

impl Engine {
    /// Meets the engine in the version of the protocol that was agreed on, and agrees on one where that is long ago.
    pub(super) async fn connect(address: &Address, agreed: &Agreed) -> Result<Engine, DockerError> {
        let at = address.to_string();
        let known = agreed.at(address);
        let version = known.as_ref().unwrap_or(API_DEFAULT_VERSION);
        let client = match &address.endpoint {
            Endpoint::Unix(_) => Client::connect_with_unix(&at, ANSWER_SECONDS, version),
            Endpoint::Tcp(..) => Client::connect_with_http(&at, ANSWER_SECONDS, version),
        };
        let mut client = client.map_err(|error| unreachable(address, &error))?;
        if known.is_none() {
            client = client.negotiate_version().await.map_err(|error| unreachable(address, &error))?;
            agreed.note(address, client.client_version());
        }
        Ok(Engine { client, address: address.clone() })
    }

    pub(super) async fn about(&self) -> Result<About, DockerError> {
        let told = self.client.version().await.map_err(|error| self.refused(&error))?;
        let first = told.components.and_then(|components| components.into_iter().next());
        let name = first.map_or_else(|| "Engine".to_owned(), |component| component.name);
        // Docker's own calls itself nothing but an engine.
        let name = if name == "Engine" { "Docker Engine".to_owned() } else { name };
        let version = told.version.unwrap_or_default();
        Ok(About {
            at: self.address.to_string(),
            said_by: self.address.said_by.clone(),
            socket: self.address.socket().map(Path::to_owned),
            name: escape(&format!("{name} {version}")).into_owned(),
            kernel: told.kernel_version,
        })
    }

    /// Whether a container of exactly this name exists, or one that is being replaced by it.
    pub(super) async fn exists(&self, name: &ContainerName) -> Result<bool, DockerError> {
        let wanted = [name.to_string(), replace::aside(name.as_str())].map(|name| format!("/{name}"));
        // The filters are patterns in which a dot means anything; the comparison afterwards is exact. Docker's names begin with
        // a slash, Podman's do so in its answers alone.
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
        let told = self
            .inspect(name.as_str())
            .await?
            .ok_or_else(|| DockerError::NoSuchContainer(name.to_string()))?;
        let state = told.state.unwrap_or_default();
        let pid = state.pid.and_then(|pid| u32::try_from(pid).ok()).filter(|pid| *pid != 0);
        if state.running != Some(true) {
            return Err(DockerError::NotRunning(name.to_string()));
        }
        // One that waits to be restarted runs, as Docker has it, and has no process.
        let (Some(id), Some(pid)) = (told.id, pid) else {
            return Err(DockerError::Changing(name.to_string()));
        };
        let mode = told.host_config.and_then(|config| config.network_mode);
        let mut ports = told.network_settings.and_then(|settings| settings.ports).unwrap_or_default();
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
            agent_directory: facts::agent_directory(told.mounts.unwrap_or_default()),
            started_at: state.started_at.unwrap_or_default(),
        })
    }

    /// The name and the published ports of a container whose network another one uses, by its id or its name; none where it
    /// has been removed, which leaves its network to the other one.
    async fn owner_of_network(&self, owner: &str) -> Result<Option<(String, PortMap)>, DockerError> {
        match self.client.inspect_container(owner, None::<InspectContainerOptions>).await {
            Ok(told) => {
                let ports = told.network_settings.and_then(|settings| settings.ports).unwrap_or_default();
                let name = told.name.unwrap_or_default();
                let name = name.strip_prefix('/').unwrap_or(&name);
                Ok((!name.is_empty()).then(|| (name.to_owned(), ports)))
            }
            Err(Error::DockerResponseServerError { status_code: 404, .. }) => Ok(None),
            Err(error) => Err(self.refused(&error)),
        }
    }

    /// All containers.
    pub(super) async fn containers(&self, cache: &ImageCache) -> Result<Vec<Listed>, DockerError> {
        let options = ListContainersOptionsBuilder::default().all(true).build();
        let listed =
            self.client.list_containers(Some(options)).await.map_err(|error| self.refused(&error))?;
        let images = self.image_labels_of(&listed, cache).await?;
        Ok(listed.into_iter().filter_map(|container| facts::listed(container, &images)).collect())
    }

    /// Where Docker publishes a TCP port of the container, which runs.
    pub(super) async fn published_port(
        &self,
        name: &ContainerName,
        port: u16,
    ) -> Result<Option<NonZeroU16>, DockerError> {
        let told = self
            .inspect(name.as_str())
            .await?
            .ok_or_else(|| DockerError::NoSuchContainer(name.to_string()))?;
        let state = told.state.unwrap_or_default();
        if state.running != Some(true) || state.restarting == Some(true) {
            return Err(DockerError::NotRunning(name.to_string()));
        }
        let ports = told.network_settings.and_then(|settings| settings.ports).unwrap_or_default();
        let inside = NonZeroU16::new(port);
        Ok(inside.and_then(|inside| facts::published(&ports).get(&inside).copied()))
    }

    /// Stops and starts. What an earlier attempt to replace the container left is put in order first.
    pub(super) async fn restart(&self, name: &ContainerName) -> Result<(), DockerError> {
        replace::mend(self, name.as_str()).await.map_err(DockerError::stopping)?;
        let told = self.inspect(name.as_str()).await.map_err(DockerError::stopping)?;
        let vanishes = told
            .as_ref()
            .and_then(|told| told.host_config.as_ref()?.auto_remove)
            .ok_or_else(|| DockerError::NoSuchContainer(name.to_string()).starting())?;
        if vanishes {
            // Stopped, it would be removed; only Docker's own restart keeps it.
            let restarted =
                self.client.restart_container(name.as_str(), None::<RestartContainerOptions>).await;
            if let Err(error) = restarted.map_err(|error| self.error(name.as_str(), &error)) {
                // Docker removes the container if it does not start again.
                return Err(with_holders(error, told.as_ref()).await.starting());
            }
            return self.stays(name.as_str()).await.map_err(DockerError::starting);
        }
        self.stop(name.as_str()).await.map_err(DockerError::stopping)?;
        self.start(name.as_str()).await.map_err(DockerError::starting)
    }

    /// What its image is built from, as its labels say.
    pub(super) async fn built_from(&self, name: &ContainerName) -> Result<BuildFrom, DockerError> {
        let labels = self.inspect(name.as_str()).await?.and_then(|told| told.config?.labels);
        Ok(BuildFrom::of(&labels.unwrap_or_default()))
    }

    /// What Docker tells of the container of exactly this name.
    async fn inspect(&self, name: &str) -> Result<Option<ContainerInspectResponse>, DockerError> {
        match self.client.inspect_container(name, None::<InspectContainerOptions>).await {
            // Docker also takes the beginning of an id for a name; that is not what was asked for.
            Ok(told) => Ok(Some(told).filter(|told| told.name.as_deref() == Some(&format!("/{name}")))),
            Err(Error::DockerResponseServerError { status_code: 404, .. }) => Ok(None),
            // Podman has states that Docker has not, such as "stopped" before it has cleaned up; nothing runs in any of them,
            // and none of them stays.
            Err(Error::JsonDataError { message, .. }) if message.starts_with("unknown variant") => {
                Err(DockerError::Changing(name.to_owned()))
            }
            Err(error) => Err(self.refused(&error)),
        }
    }

    /// Watches a container that was started for a moment.
    async fn stays(&self, name: &str) -> Result<(), DockerError> {
        let until = Instant::now() + WATCHED;
        loop {
            let told = self.inspect(name).await?.ok_or_else(|| {
                DockerError::Refused(format!("container {name} was removed as soon as it was started"))
            })?;
            let state = told.state.unwrap_or_default();
            if state.running != Some(true) || state.restarting == Some(true) {
                return Err(DockerError::Refused(self.how_it_ended(name, &state).await));
            }
            if Instant::now() >= until {
                return Ok(());
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    async fn how_it_ended(&self, name: &str, state: &ContainerState) -> String {
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
        let told = self.inspect(name).await?;
        Ok(told.map(|told| told.state.and_then(|state| state.running).unwrap_or(false)))
    }

    async fn rename(&self, from: &str, to: &str) -> Result<(), DockerError> {
        let options = RenameContainerOptionsBuilder::default().name(to).build();
        self.client.rename_container(from, options).await.map_err(|error| self.error(from, &error))
    }

    async fn stop(&self, name: &str) -> Result<(), DockerError> {
        let stopped = self.client.stop_container(name, None::<StopContainerOptions>).await;
        match stopped.map_err(|error| self.error(name, &error)) {
            // Some are removed when they stop.
            Ok(()) | Err(DockerError::NoSuchContainer(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn start(&self, name: &str) -> Result<(), DockerError> {
        let started = self.client.start_container(name, None::<StartContainerOptions>).await;
        match started.map_err(|error| self.error(name, &error)) {
            Ok(()) => self.stays(name).await,
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

/// Tells of containers' lives until nobody listens.
pub(super) async fn tell_life(docker: Docker, listener: mpsc::Sender<LifeEvent>) {
    let mut again = AGAIN_MIN;
    while !listener.is_closed() {
        let mut most = AGAIN_MAX;
        if let Ok(engine) = docker.connect().await {
            let began = Instant::now();
            if engine.tell_life(&listener).await.is_err() || listener.send(LifeEvent::Lost).await.is_err() {
                return;
            }
            most = AGAIN_THERE_MAX;
            again = if began.elapsed() < STOOD { again.min(most) } else { AGAIN_MIN };
        }
        tokio::select! {
            () = tokio::time::sleep(again) => again = (again * 2).min(most),
            () = listener.closed() => return,
        }
    }
}

/// Nobody listens any more.
struct ReceiverGone;

impl Engine {
    /// Tells what this engine says until it says no more.
    async fn tell_life(&self, listener: &mpsc::Sender<LifeEvent>) -> Result<(), ReceiverGone> {
        let filters = HashMap::from([("type", vec!["container", "network"])]);
        // The engine is only asked when the stream is first polled, and says nothing when it has begun to listen: so it is
        // asked for what happened since before the resync, too. An event told twice is two looks.
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
            event.action = event.action.map(facts::in_dockers_words);
            for event in facts::life_events(event) {
                listener.send(event).await.map_err(|_| ReceiverGone)?;
            }
        }
    }
}

/// The IPv4 address of an interface of this machine.
fn address_of_interface(name: &str) -> Option<IpAddr> {
    let mut all = nix::ifaddrs::getifaddrs().ok()?.filter(|one| one.interface_name == name);
    all.find_map(|one| Some(IpAddr::V4(one.address?.as_sockaddr_in()?.ip())))
}

fn unreachable(address: &Address, error: &Error) -> DockerError {
    DockerError::Unreachable { at: address.to_string(), reason: reason(error) }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_has_the_address_that_this_machine_gave_it() {
        assert_eq!(address_of_interface("lo"), Some([127, 0, 0, 1].into()));
        assert_eq!(address_of_interface("no-such-interface"), None);
    }
}
