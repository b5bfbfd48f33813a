//! From a folder to a container that runs: the decisions of `landfall start` (wire specification, A.9 and A.12).
//!
//! The image comes first, since building it takes time and may fail while nothing has been changed. Then, in this order: fresh
//! tokens, the registration with them, and the container that has them in its environment. So the daemon knows the container
//! before it can ask for anything. A failure undoes the registration.
//!
//! At each start of the container, Docker chooses a free host port and publishes the container's own port there. Another user
//! could take a fixed port during a restart, and the container would stay down. The daemon asks Docker for the port at each
//! attempt to connect.

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

/// The most bytes of a folder's name that go into the name of its container.
const NAME_BYTES: usize = 128;

/// What a container is made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Image {
    /// An image that is here or can be pulled.
    Named(String),
    /// One that is built of the folder.
    Built(BuildFrom),
}

impl Image {
    /// Chooses: what the command line names, what the folder's `devcontainer.json` says, the folder's own Dockerfile.
    ///
    /// # Errors
    /// What is missing or does not fit, for people.
    pub fn of(folder: &Path, named: Option<&str>, said: &Devcontainer) -> Result<Image, String> {
        if let Some(image) = named.or(said.image()) {
            return Ok(Image::Named(image.to_owned()));
        }
        if let Some(build) = said.build() {
            return built(folder, build).map(Image::Built);
        }
        let usual = BuildFrom::default();
        match folder.join(&usual.dockerfile).exists() {
            true => Ok(Image::Built(usual)),
            false => Err(format!("nothing says what a container of {} is made from", folder.display())),
        }
    }
}

/// A build in the folder's own words. The daemon may have to repeat it, and reads nothing outside the folder.
fn built(folder: &Path, build: &Build) -> Result<BuildFrom, String> {
    let real = |path: &Path| {
        path.canonicalize().map_err(|error| format!("{} cannot be used: {error}", path.display()))
    };
    let (context, dockerfile) = (real(&build.context)?, real(&build.dockerfile)?);
    let below = |path: &Path, above: &Path| {
        path.strip_prefix(above)
            .map(Path::to_owned)
            .map_err(|_| format!("{} does not lie in {}", path.display(), above.display()))
    };
    Ok(BuildFrom { dockerfile: below(&dockerfile, &context)?, context: below(&context, folder)? })
}

/// What a container of the folder is called.
pub fn name_of(folder: &Path) -> Option<ContainerName> {
    let mut name = name::sanitise(&folder.file_name()?.to_string_lossy());
    // It is ASCII.
    name.truncate(NAME_BYTES);
    ContainerName::new(&name).ok()
}

/// What one container instance and the daemon know each other by.
#[derive(Clone, Debug)]
pub struct Tokens {
    /// The container presents it by HTTP.
    pub restart: Token,
    /// The daemon presents it over the container's WebSocket.
    pub broker: Token,
}

impl Tokens {
    /// Two that nobody has had: 32 random bytes each (wire specification, A.0.1).
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

/// A folder as a container.
#[derive(Clone, Debug)]
pub struct Recipe<'a> {
    /// Its name.
    pub name: &'a ContainerName,
    /// The folder, by an absolute path.
    pub folder: &'a str,
    /// The directory of the host with the container's socket of the daemon.
    pub http_directory: &'a str,
    /// The image, which is here.
    pub image: &'a str,
    /// How the image was built, if it was.
    pub built: Option<&'a BuildFrom>,
    /// Where the daemon is reached by HTTP.
    pub http_port: NonZeroU16,
}

impl Recipe<'_> {
    /// The container, with these tokens.
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

    /// The socket, and the rest under both names, so that a program for either finds what it looks for (wire specification, A.12).
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

/// What is done to the world.
pub trait LaunchActions {
    /// Why something was not done.
    type Error;

    /// Makes tokens that were never used.
    fn tokens(&mut self) -> Result<Tokens, Self::Error>;
    /// Has the daemon know the container, in the place of what it knew under the name.
    fn register(&mut self, tokens: &Tokens) -> Result<(), Self::Error>;
    /// Has the daemon forget it.
    fn deregister(&mut self);
    /// Makes it, starts it, and sees that it stays. Of one that does not, nothing is left.
    fn run(&mut self, tokens: &Tokens) -> impl Future<Output = Result<(), Self::Error>>;
}

/// Starts it.
///
/// # Errors
/// Those of the hands; nothing is registered then.
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
