//! The decisions of `landfall start`: from a folder to a running container (wire specification, A.9 and A.12).
//!
//! The image is prepared first, since a build takes time and may fail before any state is changed. Then follow, in this
//! order: new tokens, the registration with them, and the container with the tokens in its environment. So the daemon
//! knows the container before the container can send a request. After a failure, the registration is removed: a
//! registration without its container never remains.
//!
//! At each start of the container, Docker chooses a free host port and publishes the container's port there. With a
//! fixed port, another user could take it during a restart, and the container could not start. The daemon asks Docker
//! for the port at each connection attempt.

use std::io;
use std::num::NonZeroU16;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use crate::agent::hostd::SOCKET_VARIABLE;
use crate::docker::{BuildFrom, FOLDER_LABEL, NewContainer};
use crate::launch::devcontainer::{Build, Devcontainer};
use crate::model::name;
use crate::model::port_policy::CONTAINER_PORT;
use crate::model::registration::{ContainerName, Token};
use crate::sys::random::random;

/// The socket's name in its directory.
pub const SOCKET: &str = "http.sock";
/// The path of the directory in the container.
pub const DIRECTORY_INSIDE: &str = "/run/landfall-http";

/// The maximum of a folder's name in the name of its container, in bytes.
const NAME_BYTES: usize = 128;

/// The image of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Image {
    /// An image that exists locally or can be pulled.
    Named(String),
    /// An image that is built from the folder.
    Built(BuildFrom),
}

impl Image {
    /// Chooses the image: that of the command line, that of the folder's `devcontainer.json`, or the folder's own
    /// Dockerfile.
    ///
    /// # Errors
    /// A text for people that names what is missing or invalid.
    pub fn of(folder: &Path, named: Option<&str>, declared: &Devcontainer) -> Result<Image, String> {
        if let Some(image) = named.or(declared.image()) {
            return Ok(Image::Named(image.to_owned()));
        }
        if let Some(build) = declared.build() {
            return built(folder, build).map(Image::Built);
        }
        let usual = BuildFrom::default();
        match folder.join(&usual.dockerfile).exists() {
            true => Ok(Image::Built(usual)),
            false => Err(format!("no image and no Dockerfile is known for {}", folder.display())),
        }
    }
}

/// Converts a build to paths relative to the folder. The daemon may have to repeat the build, and reads no file outside
/// the folder.
fn built(folder: &Path, build: &Build) -> Result<BuildFrom, String> {
    let real = |path: &Path| {
        path.canonicalize().map_err(|error| format!("{} cannot be used: {error}", path.display()))
    };
    let (context, dockerfile) = (real(&build.context)?, real(&build.dockerfile)?);
    let below = |path: &Path, above: &Path| {
        path.strip_prefix(above)
            .map(Path::to_owned)
            .map_err(|_| format!("{} is not inside {}", path.display(), above.display()))
    };
    Ok(BuildFrom { dockerfile: below(&dockerfile, &context)?, context: below(&context, folder)? })
}

/// Returns the name of the folder's container.
pub fn name_of(folder: &Path) -> Option<ContainerName> {
    let mut name = name::sanitise(&folder.file_name()?.to_string_lossy());
    // The name is ASCII, so any byte is a character boundary.
    name.truncate(NAME_BYTES);
    ContainerName::new(&name).ok()
}

/// The tokens that a container and the daemon share.
#[derive(Clone, Debug)]
pub struct Tokens {
    /// The container sends it over HTTP.
    pub restart: Token,
    /// The daemon sends it over the container's WebSocket, or proves that it holds it.
    pub broker: Token,
}

impl Tokens {
    /// Creates new tokens from 32 random bytes each (wire specification, A.0.1).
    ///
    /// # Errors
    /// Those of `getrandom(2)`.
    pub fn fresh() -> io::Result<Tokens> {
        Ok(Tokens { restart: token()?, broker: token()? })
    }
}

fn token() -> io::Result<Token> {
    let bytes: [u8; 32] = random()?;
    Token::new(&URL_SAFE_NO_PAD.encode(bytes)).ok_or_else(|| io::Error::other("an empty token"))
}

/// The parameters of a folder's container.
#[derive(Clone, Debug)]
pub struct Recipe<'a> {
    /// Its name.
    pub name: &'a ContainerName,
    /// The folder, by an absolute path.
    pub folder: &'a str,
    /// The directory of the host with the container's socket of the daemon.
    pub http_directory: &'a str,
    /// The image, which exists locally.
    pub image: &'a str,
    /// The build of the image, if it was built.
    pub built: Option<&'a BuildFrom>,
    /// The port of the daemon's HTTP endpoint.
    pub http_port: NonZeroU16,
}

impl Recipe<'_> {
    /// Returns the container, with these tokens.
    pub fn container(&self, tokens: &Tokens) -> NewContainer {
        let base = Path::new(self.folder).file_name().unwrap_or_default().to_string_lossy();
        let mut labels = self.built.map(BuildFrom::labels).unwrap_or_default();
        labels.insert(FOLDER_LABEL.to_owned(), self.folder.to_owned());
        NewContainer {
            name: self.name.clone(),
            image: self.image.to_owned(),
            environment: self.environment(tokens),
            folder: (self.folder.to_owned(), format!("/workspaces/{base}")),
            http_directory: (self.http_directory.to_owned(), DIRECTORY_INSIDE.to_owned()),
            published: CONTAINER_PORT,
            labels,
        }
    }

    /// Returns the socket's variable, and the other variables under both prefixes, so that programs for either find
    /// them (wire specification, A.12).
    fn environment(&self, tokens: &Tokens) -> Vec<(String, String)> {
        let values = [
            ("CONTAINER_NAME", self.name.to_string()),
            ("HOSTD_URL", format!("http://host.docker.internal:{}", self.http_port)),
            ("HOSTD_TOKEN", tokens.restart.reveal().to_owned()),
            ("HOSTD_BROKER_TOKEN", tokens.broker.reveal().to_owned()),
        ];
        let under = |prefix: &'static str| {
            values.clone().into_iter().map(move |(name, value)| (format!("{prefix}_{name}"), value))
        };
        let socket = (SOCKET_VARIABLE.to_owned(), format!("{DIRECTORY_INSIDE}/{SOCKET}"));
        under("LANDFALL").chain(under("TYPECLAW")).chain([socket]).collect()
    }
}

/// The effects of a launch on Docker and on the daemon.
pub trait LaunchActions {
    /// The error of an action.
    type Error;

    /// Creates new tokens.
    fn tokens(&mut self) -> Result<Tokens, Self::Error>;
    /// Registers the container with the daemon. Replaces an earlier registration of the name.
    fn register(&mut self, tokens: &Tokens) -> Result<(), Self::Error>;
    /// Removes the registration.
    fn deregister(&mut self);
    /// Creates and starts the container, and checks that it keeps running. A container that does not is removed.
    fn run(&mut self, tokens: &Tokens) -> impl Future<Output = Result<(), Self::Error>>;
}

/// Launches the container.
///
/// # Errors
/// The error of an action; in this case no registration remains.
pub async fn start<H: LaunchActions>(actions: &mut H) -> Result<(), H::Error> {
    let tokens = actions.tokens()?;
    actions.register(&tokens)?;
    let ran = actions.run(&tokens).await;
    if ran.is_err() {
        actions.deregister();
    }
    ran
}

pub mod devcontainer;
#[cfg(test)]
mod tests;
