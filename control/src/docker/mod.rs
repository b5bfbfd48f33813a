//! The Docker engine: whether a container exists, its first process, restarts, rebuilds, and events of containers.
//!
//! `docker::address` determines the address of the engine; Podman implements the same API and is supported, too. The engine
//! is connected for each request, and only its address is kept, so an engine that returns after an outage or was replaced by
//! another release is used as it is. An engine is reachable or not; no other state is assumed between requests. Each request
//! is bounded in time. Only `docker::bollard` depends on the Docker client.

mod address;
mod bollard;
pub(crate) mod context;
pub mod helper;
pub mod helper_container;
mod ignore;
pub mod labels;
pub mod liveness;
pub mod rebuild;
mod replace;
mod seek;

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::sync::mpsc;

use crate::docker::liveness::Liveness;
use crate::model::registration::ContainerName;
use address::Environment;
use bollard::{Engine, ImageCache, NegotiatedVersion};
use context::Context;
use labels::ContainerLabels;
use rebuild::UserOfRebuild;
use seek::EngineSearch;

/// The directory in a container in which an agent creates its socket by default.
pub const AGENT_DIRECTORY: &str = "/run/landfall";

/// The suffix of a container's name while another container replaces it.
pub(crate) const ASIDE_SUFFIX: &str = ".landfall-old";

/// The time limit of a request. An engine under load answers in milliseconds, and one that hangs never answers.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// The default limit of a build context, in bytes.
pub const CONTEXT_BYTES_MAX: u64 = 1 << 30;
/// The capacity of the channel of life events.
const EVENTS_MAX: usize = 256;

/// The reasons why Docker did not execute a request.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DockerError {
    /// The container does not exist.
    #[error("no container is named {0}")]
    NoSuchContainer(String),
    /// The container exists, but does not run.
    #[error("container {0} is not running")]
    NotRunning(String),
    /// The container is neither running nor stopped: Docker is starting, stopping or restarting it.
    #[error("container {0} is being started or stopped")]
    Changing(String),
    /// The engine is unreachable.
    #[error("Docker cannot be reached at {at}: {reason}")]
    Unreachable {
        /// The address.
        at: String,
        /// The reason.
        reason: String,
    },
    /// The engine refused the request.
    #[error("{0}")]
    Refused(String),
    /// A restart failed before the container was stopped.
    #[error("stop failed: {0}")]
    Stop(String),
    /// A restart failed after the stop, or a new container could not replace the old one.
    #[error("start failed: {0}")]
    Start(String),
}

impl DockerError {
    fn stopping(self) -> DockerError {
        DockerError::Stop(self.to_string())
    }

    fn starting(self) -> DockerError {
        DockerError::Start(self.to_string())
    }
}

/// The first process of a running container. It is in the container's network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FirstProcess {
    /// The container's id, which distinguishes containers of the same name.
    pub id: String,
    /// The process id in the engine's process namespace, which is the daemon's if both run on one machine.
    pub pid: u32,
    /// The network of the container.
    pub network: Network,
    /// The TCP ports that Docker publishes at `localhost`: ports inside, and their host ports.
    pub published: BTreeMap<NonZeroU16, NonZeroU16>,
    /// The host directory that is mounted at [`AGENT_DIRECTORY`], where an agent creates its socket.
    pub agent_directory: Option<PathBuf>,
    /// The time of the start in Docker's format, which distinguishes starts of the same container.
    pub started_at: String,
}

/// The network that a container uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Network {
    /// Its own, or only loopback.
    Own,
    /// The host's: its listeners already answer on the host.
    Host,
    /// Another container's: its name if the engine was asked for it, else the reference from the container's configuration,
    /// an id or a name.
    Shared(String),
}

/// A container in Docker's list, running or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its id, which never changes.
    pub id: String,
    /// Its present name.
    pub name: ContainerName,
    /// Whether Docker is renaming the container. For a short time, which may be after the event, Docker lists both names
    /// in no defined order. `name` is one of them.
    pub is_between_names: bool,
    /// The image, by the name with which the container was created.
    pub image: String,
    /// Whether it has processes. True for a paused container.
    pub running: bool,
    /// Its labels.
    pub labels: ContainerLabels,
    /// The network of the container.
    pub network: Network,
    /// The time of its creation, in seconds since 1970.
    pub created: i64,
    /// The TCP ports that Docker publishes at `localhost`; only for a running container.
    pub published: BTreeMap<NonZeroU16, NonZeroU16>,
}

/// The label with the path of the host folder from which a container was created.
pub const FOLDER_LABEL: &str = "dev.landfall.folder";
/// The labels with the build context of its image, relative to that folder, and with the Dockerfile, relative to the
/// context.
const CONTEXT_LABEL: &str = "dev.landfall.context";
const DOCKERFILE_LABEL: &str = "dev.landfall.dockerfile";

/// The source of an image. Both paths are relative and contain no `..`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuildFrom {
    /// The directory that is sent to Docker, relative to the container's folder.
    pub context: PathBuf,
    /// The Dockerfile, relative to the context.
    pub dockerfile: PathBuf,
}

impl Default for BuildFrom {
    fn default() -> BuildFrom {
        BuildFrom { context: PathBuf::new(), dockerfile: PathBuf::from(context::DOCKERFILE) }
    }
}

impl BuildFrom {
    fn of(labels: &HashMap<String, String>) -> BuildFrom {
        let path = |label: &str| labels.get(label).map(PathBuf::from);
        let usual = BuildFrom::default();
        BuildFrom {
            context: path(CONTEXT_LABEL).unwrap_or(usual.context),
            dockerfile: path(DOCKERFILE_LABEL).unwrap_or(usual.dockerfile),
        }
    }

    /// Returns the labels of a container that record this source.
    pub fn labels(&self) -> BTreeMap<String, String> {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        [(CONTEXT_LABEL, text(&self.context)), (DOCKERFILE_LABEL, text(&self.dockerfile))]
            .map(|(name, value)| (name.to_owned(), value))
            .into()
    }
}

/// Returns whether a name is that of a container that is being replaced.
pub fn is_aside(name: &ContainerName) -> bool {
    name.as_str().ends_with(ASIDE_SUFFIX)
}

/// A container to create.
#[derive(Clone, PartialEq, Eq)]
pub struct NewContainer {
    /// Its name.
    pub name: ContainerName,
    /// Its image, which the engine has.
    pub image: String,
    /// Its environment in addition to the image's. Contains tokens.
    pub environment: Vec<(String, String)>,
    /// The folder of the host, and its mount point.
    pub folder: (String, String),
    /// The host directory with the container's socket of the daemon, and its mount point. Mounted read-only.
    pub http_directory: (String, String),
    /// The TCP port inside that is published on the host's loopback. Docker chooses the host port at each start.
    pub published: u16,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
}

/// An event of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LifeEvent {
    /// An event of one container. `what` is Docker's action: `start`, `die`, `destroy`, `rename`, and so on.
    Changed {
        /// Its id.
        id: String,
        /// The container's name, which may not be valid for a registration. A rename causes two events, one for each name.
        /// For an event of a network, the name is empty.
        name: String,
        /// Docker's action.
        what: String,
    },
    /// Events may have been lost (the engine was away, or this is the first event), so all containers have to be reread.
    /// Later events follow.
    Resync,
    /// The connection was lost. No events follow until the next resync.
    Lost,
}

/// Facts about an engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct About {
    /// Its address.
    pub at: String,
    /// The source of the address, for example `DOCKER_HOST`; `None` for a default socket.
    pub source: Option<String>,
    /// Its socket, if the address is one.
    pub socket: Option<PathBuf>,
    /// Its name, for example `Docker Engine 27.1` or `Podman Engine 5.2`.
    pub name: String,
    /// The kernel release on which its containers run.
    pub kernel: Option<String>,
}

/// A Docker engine.
#[derive(Clone, Debug)]
pub struct Docker {
    seek: EngineSearch,
    negotiated: Arc<NegotiatedVersion>,
    images: Arc<ImageCache>,
    context_bytes_max: u64,
}

impl Docker {
    /// Returns the engine that the environment selects. Never fails, since it is connected on use.
    pub fn from_environment() -> Docker {
        let uid = rustix::process::geteuid().as_raw();
        let environment = Environment::from_variables(|name| std::env::var_os(name), uid);
        Docker::from(&environment)
    }

    /// Returns the engine at an address in the format of `DOCKER_HOST`, or at the default sockets.
    pub fn at(host: Option<String>) -> Docker {
        Docker::from(&Environment::of_host(host))
    }

    fn from(environment: &Environment) -> Docker {
        Docker {
            seek: EngineSearch::new(environment),
            negotiated: Arc::default(),
            images: Arc::default(),
            context_bytes_max: CONTEXT_BYTES_MAX,
        }
    }

    /// Returns the same engine with another limit for build contexts, in bytes.
    #[must_use]
    pub fn with_context_bytes_max(self, context_bytes_max: u64) -> Docker {
        Docker { context_bytes_max, ..self }
    }

    /// Opens and measures the folder of a build, before any of it is sent.
    async fn context(&self, folder: &Path, from: BuildFrom) -> Result<Context, DockerError> {
        let (folder, bytes_max) = (folder.to_owned(), self.context_bytes_max);
        let opened = tokio::task::spawn_blocking(move || {
            let context = Context::open(&folder, &from, bytes_max).map_err(DockerError::Refused)?;
            context.measure().map_err(|error| DockerError::Refused(error.to_string()))?;
            Ok(context)
        });
        opened.await.unwrap_or_else(|error| Err(DockerError::Refused(error.to_string())))
    }

    /// Connects to the engine at its present address.
    async fn connect(&self) -> Result<Engine, DockerError> {
        let address = self.seek.address()?;
        let engine = Engine::connect(&address, &self.negotiated).await?;
        self.seek.answered(&address);
        Ok(engine)
    }

    /// Returns facts about the engine.
    ///
    /// # Errors
    /// [`DockerError::Unreachable`] with the address.
    pub async fn about(&self) -> Result<About, DockerError> {
        self.bounded(async { self.connect().await?.about().await }).await
    }

    /// Returns whether a container of exactly this name exists, running or not (wire specification, A.7.6).
    pub async fn probe(&self, name: &ContainerName) -> Liveness {
        let reply = async { self.connect().await?.exists(name).await };
        match tokio::time::timeout(REQUEST_TIMEOUT, reply).await {
            Ok(Ok(true)) => Liveness::Alive,
            Ok(Ok(false)) => Liveness::Gone,
            Ok(Err(_)) | Err(_) => Liveness::Unknown,
        }
    }

    /// Returns the first process of the container of this name.
    ///
    /// # Errors
    /// [`DockerError`] if the container, its process or the engine is missing.
    pub async fn first_process(&self, name: &ContainerName) -> Result<FirstProcess, DockerError> {
        self.bounded(async { self.connect().await?.first_process(name).await }).await
    }

    /// Returns all containers of the engine, except those that Podman creates for a pod, which hold its network and run no
    /// program. Skips names that are invalid for a registration, which Docker never assigns.
    ///
    /// # Errors
    /// [`DockerError`] if the engine is unreachable.
    pub async fn containers(&self) -> Result<Vec<Listed>, DockerError> {
        self.bounded(async { self.connect().await?.containers(&self.images).await }).await
    }

    /// Returns the host's loopback port on which a TCP port of a running container is published; `None` if it is not
    /// published there, for example during the start of the container.
    ///
    /// # Errors
    /// [`DockerError`] if the container does not run, or the container or the engine is missing.
    pub async fn published_port(
        &self,
        name: &ContainerName,
        port: u16,
    ) -> Result<Option<NonZeroU16>, DockerError> {
        self.bounded(async { self.connect().await?.published_port(name, port).await }).await
    }

    /// Stops the container with its own stop signal and timeout, starts it, and checks that it stays up.
    ///
    /// # Errors
    /// [`DockerError::Stop`] or [`DockerError::Start`], by the step that failed.
    pub async fn restart(&self, name: &ContainerName) -> Result<(), DockerError> {
        let engine = self.bounded(self.connect()).await.map_err(DockerError::stopping)?;
        engine.restart(name).await
    }

    /// Builds an image from `folder`, and replaces the container by one of the same configuration.
    ///
    /// The image gets the name [`rebuild::own_image`], whatever image the container was created from. The container keeps
    /// its own environment, ports, mounts, volumes without a name, networks with their aliases and addresses, capabilities,
    /// security options and limits; a hardware address of its own is not kept. `user` says which user it gets. A container
    /// that shares the network of this one (`--network container:NAME`) has to be restarted afterwards.
    ///
    /// # Errors
    /// [`DockerError::Start`]; the old container is then unchanged, or the error describes its state. A container that
    /// Docker removes when it stops (`--rm`) is lost if the new one does not start.
    pub async fn rebuild(
        &self,
        name: &ContainerName,
        folder: &Path,
        user: UserOfRebuild,
    ) -> Result<(), DockerError> {
        let engine = self.bounded(self.connect()).await.map_err(DockerError::starting)?;
        let from = self.bounded(engine.built_from(name)).await.map_err(DockerError::starting)?;
        let context = self.context(folder, from).await.map_err(DockerError::starting)?;
        engine.rebuild(name, context, user).await.map_err(DockerError::starting)
    }

    /// Builds an image of a folder.
    ///
    /// # Errors
    /// [`DockerError`] with the last output of the build.
    pub async fn build(&self, folder: &Path, from: &BuildFrom, image: &str) -> Result<(), DockerError> {
        let context = self.context(folder, from.clone()).await?;
        if context.starts_from(image) {
            let why =
                format!("the Dockerfile starts from {image}, which is also the name of the image to build");
            return Err(DockerError::Refused(why));
        }
        self.bounded(self.connect()).await?.build(context, image).await
    }

    /// Returns the labels of an image, which is pulled if the engine does not have it.
    ///
    /// # Errors
    /// [`DockerError`] with Docker's error of the pull.
    pub async fn image_labels(&self, image: &str) -> Result<BTreeMap<String, String>, DockerError> {
        let engine = self.bounded(self.connect()).await?;
        Ok(engine.image_labels(image).await?.into_iter().collect())
    }

    /// Creates a container, starts it, and checks that it stays up. Removes it on failure.
    ///
    /// # Errors
    /// [`DockerError`] with the reason; if the container ended, with its last line of output.
    pub async fn run(&self, new: &NewContainer) -> Result<(), DockerError> {
        self.bounded(self.connect()).await?.run(new).await
    }

    /// Stops a container within its own timeout and removes it. Returns whether it existed. Its volumes are kept.
    ///
    /// # Errors
    /// [`DockerError`].
    pub async fn remove(&self, name: &ContainerName) -> Result<bool, DockerError> {
        self.bounded(self.connect()).await?.stop_and_remove(name.as_str()).await
    }

    /// Returns the later events of containers, starting with a [`LifeEvent::Resync`]. The stream survives outages of the
    /// engine, each of which is a [`LifeEvent::Lost`], and ends when the receiver is dropped.
    pub fn life_events(&self) -> mpsc::Receiver<LifeEvent> {
        let (sender, receiver) = mpsc::channel(EVENTS_MAX);
        tokio::spawn(bollard::send_life_events(self.clone(), sender));
        receiver
    }

    /// Returns the host's address on the network `bridge`, at which containers reach the host.
    pub async fn bridge_gateway(&self) -> Option<IpAddr> {
        self.bounded(async { self.connect().await?.bridge_gateway().await }).await.ok().flatten()
    }

    async fn bounded<T>(&self, work: impl Future<Output = Result<T, DockerError>>) -> Result<T, DockerError> {
        let timeout_error = |_| DockerError::Unreachable {
            at: self.seek.address().map_or_else(|_| "its address".to_owned(), |address| address.to_string()),
            reason: format!("no answer within {} s", REQUEST_TIMEOUT.as_secs()),
        };
        tokio::time::timeout(REQUEST_TIMEOUT, work).await.map_err(timeout_error)?
    }
}
