//! From a folder to a container that runs: the decisions of `landfall start` (wire specification, A.9 and A.12).
//!
//! The image comes first, since building it takes time and may fail while nothing has been changed. Then, in this order: a
//! port of the host for the container's own, fresh tokens, the registration with both, and the container that has the
//! tokens in its environment. So the daemon knows the container before it can ask for anything. A port that somebody has
//! taken meanwhile costs one more round with another port and other tokens; any other failure undoes the registration.

mod port;

use std::io;
use std::num::NonZeroU16;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use crate::agent::hostd::SOCKET_VARIABLE;
use crate::devcontainer::{Build, Devcontainer};
use crate::docker::{BuildFrom, FOLDER_LABEL, NewContainer};
use crate::http::container_socket::{DIRECTORY_INSIDE, SOCKET};
use crate::name;
use crate::policy::CONTAINER_PORT;
use crate::registration::model::{ContainerName, Token};
use crate::sys::random::random;

pub use port::free_port;

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
    /// The container, with these tokens, published at this port of the host.
    pub fn container(&self, port: NonZeroU16, tokens: &Tokens) -> NewContainer {
        let base = Path::new(self.folder).file_name().unwrap_or_default().to_string_lossy();
        let mut labels = self.built.map(BuildFrom::labels).unwrap_or_default();
        labels.insert(FOLDER_LABEL.to_owned(), self.folder.to_owned());
        NewContainer {
            name: self.name.clone(),
            image: self.image.to_owned(),
            environment: self.environment(tokens),
            folder: (self.folder.to_owned(), format!("/workspaces/{base}")),
            http_directory: (self.http_directory.to_owned(), DIRECTORY_INSIDE.to_owned()),
            published: (port, CONTAINER_PORT),
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
pub trait Hands {
    /// Why something was not done.
    type Error;

    /// A port of the host that is free: the preferred one, if it is.
    fn port(&mut self, preferred: Option<NonZeroU16>) -> Result<NonZeroU16, Self::Error>;
    /// Tokens that nobody has had.
    fn tokens(&mut self) -> Result<Tokens, Self::Error>;
    /// Has the daemon know the container, in the place of what it knew under the name.
    fn register(&mut self, port: NonZeroU16, tokens: &Tokens) -> Result<(), Self::Error>;
    /// Has the daemon forget it.
    fn deregister(&mut self);
    /// Makes it, starts it, and sees that it stays. Of one that does not, nothing is left.
    fn run(
        &mut self,
        port: NonZeroU16,
        tokens: &Tokens,
    ) -> impl Future<Output = Result<(), NotRunning<Self::Error>>>;
}

/// Why a container does not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotRunning<E> {
    /// Somebody has the port of the host.
    PortTaken(E),
    /// Something else.
    Because(E),
}

/// Starts it, and says at which port of the host the container's own is published.
///
/// # Errors
/// Those of the hands; nothing is registered then.
pub async fn start<H: Hands>(hands: &mut H, preferred: Option<NonZeroU16>) -> Result<NonZeroU16, H::Error> {
    let (error, is_registered) = match attempt(hands, preferred).await {
        Ok(port) => return Ok(port),
        Err(Failed { why: NotRunning::Because(error), is_registered }) => (error, is_registered),
        Err(Failed { why: NotRunning::PortTaken(_), .. }) => match attempt(hands, None).await {
            Ok(port) => return Ok(port),
            // The first attempt's registration is there in any case.
            Err(Failed { why: NotRunning::PortTaken(error) | NotRunning::Because(error), .. }) => {
                (error, true)
            }
        },
    };
    if is_registered {
        hands.deregister();
    }
    Err(error)
}

struct Failed<E> {
    why: NotRunning<E>,
    is_registered: bool,
}

async fn attempt<H: Hands>(
    hands: &mut H,
    preferred: Option<NonZeroU16>,
) -> Result<NonZeroU16, Failed<H::Error>> {
    let before = |error| Failed { why: NotRunning::Because(error), is_registered: false };
    let port = hands.port(preferred).map_err(before)?;
    let tokens = hands.tokens().map_err(before)?;
    hands.register(port, &tokens).map_err(before)?;
    let ran = hands.run(port, &tokens).await;
    ran.map(|()| port).map_err(|why| Failed { why, is_registered: true })
}

#[cfg(test)]
#[path = "start/tests.rs"]
mod tests;
