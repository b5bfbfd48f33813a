//! Docker, as far as the daemon needs it: does a container exist, which process is its first, start it again, build it
//! anew, and what happens to containers just now.
//!
//! `docker::address` says where an engine is looked for; Podman, which speaks Docker's language, is one as well. Nothing is
//! connected until something is asked, and nothing but the address is kept: an engine that comes back after an outage, or
//! that another release has replaced meanwhile, is met as it is. Every call is bounded in time. `docker::bollard` is the
//! only place that knows how the engine is talked to.

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
use bollard::{Agreed, Engine, ImageCache};
use context::Context;
use labels::ContainerLabels;
use rebuild::UserOfRebuild;
use seek::Seek;

/// Where, inside, an agent puts its socket unless it is told otherwise.
pub const AGENT_DIRECTORY: &str = "/run/landfall";

/// What the name of a container ends with while another one takes its place.
pub(crate) const ASIDE: &str = ".landfall-old";

/// How long a question may take. An engine under load answers in milliseconds; one that hangs never does.
const QUESTION_TIMEOUT: Duration = Duration::from_secs(10);
/// The most bytes of a folder that are sent to a build, unless the user chose another limit.
pub const CONTEXT_BYTES_MAX: u64 = 1 << 30;
/// How many life events may wait to be taken.
const EVENTS_MAX: usize = 256;

/// Why Docker did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DockerError {
    /// There is no container of this name.
    #[error("no container is named {0}")]
    NoSuchContainer(String),
    /// There is, but it has no first process.
    #[error("container {0} is not running")]
    NotRunning(String),
    /// There is, and it is neither one that runs nor one that does not: Docker is starting, stopping or restarting it.
    #[error("container {0} is being started or stopped")]
    Changing(String),
    /// The engine cannot be asked.
    #[error("Docker cannot be reached at {at}: {reason}")]
    Unreachable {
        /// Where it was looked for.
        at: String,
        /// Why.
        reason: String,
    },
    /// The engine answered, and the answer is no.
    #[error("{0}")]
    Refused(String),
    /// A restart failed before the container was stopped.
    #[error("stop failed: {0}")]
    Stop(String),
    /// A restart failed after that, or a new container could not be put in the place of the old one.
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

/// The first process of a running container, which is in its network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FirstProcess {
    /// The container's id; another container with the same name has another one.
    pub id: String,
    /// The process in the engine's process namespace, which is the daemon's where both run on one machine.
    pub pid: u32,
    /// Whose network it is in.
    pub network: Network,
    /// What Docker itself publishes of it where `localhost` answers: TCP ports inside, and those of the host.
    pub published: BTreeMap<NonZeroU16, NonZeroU16>,
    /// The directory of the host that is mounted where an agent puts its socket, [`AGENT_DIRECTORY`].
    pub agent_directory: Option<PathBuf>,
    /// When it was started, as Docker tells it; another start of the same container has another one.
    pub started_at: String,
}

/// Whose network a container is in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Network {
    /// One of its own, or none but loopback.
    Own,
    /// The host's: what listens there answers on the host already.
    Host,
    /// That of another container: its name where that was asked for, else what it was called when this one was made, an id or
    /// a name.
    Shared(String),
}

/// A container, running or not, in Docker's list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its id, which it keeps for life.
    pub id: String,
    /// Its name just now.
    pub name: ContainerName,
    /// Whether Docker is giving it another name: for a moment, which may be after it has told of it, it lists both and does
    /// not say which is the new one. `name` is either.
    pub is_between_names: bool,
    /// The image, as it was named when the container was made.
    pub image: String,
    /// Whether it has processes; one that is paused has.
    pub running: bool,
    /// Its labels.
    pub labels: ContainerLabels,
    /// Whose network it is in.
    pub network: Network,
    /// When it was made, in seconds since 1970.
    pub created: i64,
    /// What Docker publishes of it where `localhost` answers; only of one that runs.
    pub published: BTreeMap<NonZeroU16, NonZeroU16>,
}

/// Which folder of the host a container was made of: the value is its path.
pub const FOLDER_LABEL: &str = "dev.landfall.folder";
/// What its image was built from, relative to that folder, and where the Dockerfile is in there.
const CONTEXT_LABEL: &str = "dev.landfall.context";
const DOCKERFILE_LABEL: &str = "dev.landfall.dockerfile";

/// What an image is built from. Both paths go nowhere but down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuildFrom {
    /// What is sent to Docker, relative to the container's folder.
    pub context: PathBuf,
    /// The Dockerfile in there.
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

    /// The labels that say the same of a container.
    pub fn labels(&self) -> BTreeMap<String, String> {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        [(CONTEXT_LABEL, text(&self.context)), (DOCKERFILE_LABEL, text(&self.dockerfile))]
            .map(|(name, value)| (name.to_owned(), value))
            .into()
    }
}

/// Whether this is a container that is about to be replaced by one of its name.
pub fn is_aside(name: &ContainerName) -> bool {
    name.as_str().ends_with(ASIDE)
}

/// A container that is to be made.
#[derive(Clone, PartialEq, Eq)]
pub struct NewContainer {
    /// Its name.
    pub name: ContainerName,
    /// Its image, which is here.
    pub image: String,
    /// Its environment beside what the image has. There are tokens in it.
    pub environment: Vec<(String, String)>,
    /// Folder of the host, and where it is seen inside.
    pub folder: (String, String),
    /// Directory of the host with the container's socket of the daemon, and where it is mounted, read-only.
    pub http_directory: (String, String),
    /// The TCP port inside that is published on the host's loopback, at a port that Docker chooses at each start.
    pub published: u16,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
}

/// Something happened to a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LifeEvent {
    /// To the one of this name; `what` is Docker's word: `start`, `die`, `destroy`, `rename`, and so on.
    Changed {
        /// Its id.
        id: String,
        /// The container's name, which need not be one that a registration could have. One that is renamed is told of twice,
        /// by both of its names; of one that only its network knows, the name is empty.
        name: String,
        /// Docker's word for it.
        what: String,
    },
    /// Events may have been missed (the engine was away, or this is the beginning): everything has to be looked at again.
    /// What happens from now on is told.
    Resync,
    /// The engine tells no more: what happens before the next resync is not told.
    Lost,
}

/// What an engine says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct About {
    /// Where it is asked.
    pub at: String,
    /// Who named that place: `DOCKER_HOST`, say; nobody where it is one of the usual places.
    pub said_by: Option<String>,
    /// Its socket, if it is asked at one.
    pub socket: Option<PathBuf>,
    /// What it is: `Docker Engine 27.1` or `Podman Engine 5.2`, say.
    pub name: String,
    /// The release of the kernel that its containers run on.
    pub kernel: Option<String>,
}

/// A Docker engine.
#[derive(Clone, Debug)]
pub struct Docker {
    seek: Seek,
    agreed: Arc<Agreed>,
    images: Arc<ImageCache>,
    context_bytes_max: u64,
}

impl Docker {
    /// The engine that the environment names. It is connected to when it is used, so this never fails.
    pub fn from_environment() -> Docker {
        let uid = rustix::process::geteuid().as_raw();
        let environment = Environment::from_variables(|name| std::env::var_os(name), uid);
        Docker::from(&environment)
    }

    /// The engine at this address, in the form of `DOCKER_HOST`; the machine's own, if there is none.
    pub fn at(host: Option<String>) -> Docker {
        Docker::from(&Environment::of_host(host))
    }

    fn from(environment: &Environment) -> Docker {
        Docker {
            seek: Seek::new(environment),
            agreed: Arc::default(),
            images: Arc::default(),
            context_bytes_max: CONTEXT_BYTES_MAX,
        }
    }

    /// The same engine with another limit for the folder that is sent to a build, in bytes.
    #[must_use]
    pub fn with_context_bytes_max(self, context_bytes_max: u64) -> Docker {
        Docker { context_bytes_max, ..self }
    }

    /// Opens and measures the folder of a build, before anything is sent.
    async fn context(&self, folder: &Path, from: BuildFrom) -> Result<Context, DockerError> {
        let (folder, bytes_max) = (folder.to_owned(), self.context_bytes_max);
        let opened = tokio::task::spawn_blocking(move || {
            let context = Context::open(&folder, &from, bytes_max).map_err(DockerError::Refused)?;
            context.measure().map_err(|error| DockerError::Refused(error.to_string()))?;
            Ok(context)
        });
        opened.await.unwrap_or_else(|error| Err(DockerError::Refused(error.to_string())))
    }

    /// Meets the engine where it is now.
    async fn connect(&self) -> Result<Engine, DockerError> {
        let address = self.seek.address()?;
        let engine = Engine::connect(&address, &self.agreed).await?;
        self.seek.answered(&address);
        Ok(engine)
    }

    /// What the engine says of itself.
    ///
    /// # Errors
    /// [`DockerError::Unreachable`] with where it was looked for.
    pub async fn about(&self) -> Result<About, DockerError> {
        self.bounded(async { self.connect().await?.about().await }).await
    }

    /// Whether a container of exactly this name exists, running or not (wire specification, A.7.6).
    pub async fn probe(&self, name: &ContainerName) -> Liveness {
        let asked = async { self.connect().await?.exists(name).await };
        match tokio::time::timeout(QUESTION_TIMEOUT, asked).await {
            Ok(Ok(true)) => Liveness::Alive,
            Ok(Ok(false)) => Liveness::Gone,
            Ok(Err(_)) | Err(_) => Liveness::Unknown,
        }
    }

    /// The first process of the container of this name.
    ///
    /// # Errors
    /// [`DockerError`] says whether the container, its process or the engine is missing.
    pub async fn first_process(&self, name: &ContainerName) -> Result<FirstProcess, DockerError> {
        self.bounded(async { self.connect().await?.first_process(name).await }).await
    }

    /// Every container of the engine, but those that Podman makes for a pod: they hold its network and run nothing. One whose name could not be a registration's is left out; Docker gives no such names.
    ///
    /// # Errors
    /// [`DockerError`] says why the engine cannot be asked.
    pub async fn containers(&self) -> Result<Vec<Listed>, DockerError> {
        self.bounded(async { self.connect().await?.containers(&self.images).await }).await
    }

    /// The port of the host's loopback on which a TCP port of a running container is published; none where it is not
    /// published there, as while the container starts.
    ///
    /// # Errors
    /// [`DockerError`] says whether the container does not run, or the container or the engine is missing.
    pub async fn published_port(
        &self,
        name: &ContainerName,
        port: u16,
    ) -> Result<Option<NonZeroU16>, DockerError> {
        self.bounded(async { self.connect().await?.published_port(name, port).await }).await
    }

    /// Stops the container, with its own stop signal and its own time to obey it, starts it again, and sees that it stays.
    ///
    /// # Errors
    /// [`DockerError::Stop`] and [`DockerError::Start`] say how far it came.
    pub async fn restart(&self, name: &ContainerName) -> Result<(), DockerError> {
        let engine = self.bounded(self.connect()).await.map_err(DockerError::stopping)?;
        engine.restart(name).await
    }

    /// Builds an image from `folder`, and replaces the container by one of the same configuration.
    ///
    /// The image gets the name [`rebuild::own_image`], whatever image the container was created from. The container keeps its
    /// own environment, ports, mounts, volumes without a name, networks with their aliases and addresses, capabilities,
    /// security options and limits; a hardware address of its own is not kept. `user` says which user it gets. A container
    /// that shares the network of this one (`--network container:NAME`) has to be restarted afterwards.
    ///
    /// # Errors
    /// [`DockerError::Start`]; the old container is then as it was, or the error says what became of it. One that Docker
    /// removes when it stops (`--rm`) is lost if the new one does not start.
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
    /// [`DockerError`] says what Docker said at the end.
    pub async fn build(&self, folder: &Path, from: &BuildFrom, image: &str) -> Result<(), DockerError> {
        let context = self.context(folder, from.clone()).await?;
        if context.starts_from(image) {
            let why = format!("the Dockerfile starts from {image}, which is what the image is to be called");
            return Err(DockerError::Refused(why));
        }
        self.bounded(self.connect()).await?.build(context, image).await
    }

    /// The labels of an image, which is pulled if it is not here.
    ///
    /// # Errors
    /// [`DockerError`] says what Docker said of pulling it.
    pub async fn image_labels(&self, image: &str) -> Result<BTreeMap<String, String>, DockerError> {
        let engine = self.bounded(self.connect()).await?;
        Ok(engine.image_labels(image).await?.into_iter().collect())
    }

    /// Makes a container, starts it, and sees that it stays. Of one that does not, nothing is left.
    ///
    /// # Errors
    /// [`DockerError`] with the reason; if the container ended, with its last line of output.
    pub async fn run(&self, new: &NewContainer) -> Result<(), DockerError> {
        self.bounded(self.connect()).await?.run(new).await
    }

    /// Stops a container in its own time and removes it, and says whether there was one. Its volumes are kept.
    ///
    /// # Errors
    /// [`DockerError`].
    pub async fn remove(&self, name: &ContainerName) -> Result<bool, DockerError> {
        self.bounded(self.connect()).await?.take_away(name.as_str()).await
    }

    /// What happens to containers from now on, beginning with a [`LifeEvent::Resync`]. It outlives outages of the engine,
    /// each of which is a [`LifeEvent::Lost`].
    /// It ends when the receiver is dropped.
    pub fn life_events(&self) -> mpsc::Receiver<LifeEvent> {
        let (sender, receiver) = mpsc::channel(EVENTS_MAX);
        tokio::spawn(bollard::tell_life(self.clone(), sender));
        receiver
    }

    /// The host's own address on the network `bridge`, by which containers reach the host.
    pub async fn bridge_gateway(&self) -> Option<IpAddr> {
        self.bounded(async { self.connect().await?.bridge_gateway().await }).await.ok().flatten()
    }

    async fn bounded<T>(&self, work: impl Future<Output = Result<T, DockerError>>) -> Result<T, DockerError> {
        let late = |_| DockerError::Unreachable {
            at: self.seek.address().map_or_else(|_| "its address".to_owned(), |address| address.to_string()),
            reason: format!("no answer within {} s", QUESTION_TIMEOUT.as_secs()),
        };
        tokio::time::timeout(QUESTION_TIMEOUT, work).await.map_err(late)?
    }
}
