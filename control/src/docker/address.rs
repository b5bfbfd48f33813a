//! Determines the address of an engine from the environment. Pure: the caller reads files.
//!
//! The first setting in this order is used. If it is invalid, that is an error; later ones are not tried:
//!
//! 1. `DOCKER_HOST`, then `CONTAINER_HOST`, which is Podman's name for the same.
//! 2. The context that `DOCKER_CONTEXT` names, or `currentContext` in Docker's own configuration. The context `default`
//!    counts as absent.
//! 3. The default sockets of engines: the machine's Docker, the user's own (rootless) Docker, the user's own Podman, the
//!    machine's Podman. The first one that this user may use is selected.
//!
//! An engine on another machine is not supported: the processes of its containers are not in any namespace here.

use std::ffi::OsString;
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::model::name::hex;

/// The socket of the machine's Docker.
const DOCKER_SOCKET: &str = "/var/run/docker.sock";
/// The socket of the machine's Podman.
const PODMAN_SOCKET: &str = "/run/podman/podman.sock";
/// Docker's default port.
const TCP_PORT: u16 = 2375;
/// The context that counts as absent.
const NO_CONTEXT: &str = "default";
/// The remedy for containers on another machine.
const OTHER_MACHINE: &str = "containers of another machine are forwarded by a landfall there, or here by `landfall register --websocket`";

/// The settings of the environment about engines.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Environment {
    /// `DOCKER_HOST` and `CONTAINER_HOST`, if they are set.
    hosts: Vec<(&'static str, String)>,
    /// `DOCKER_CONTEXT`.
    context: Option<String>,
    /// The directory of the Docker configuration.
    configuration: Option<PathBuf>,
    /// The directory of the user's own sockets.
    runtime: Option<PathBuf>,
    /// Whether TLS is requested.
    tls: bool,
}

impl Environment {
    /// Reads the variables. An empty variable counts as not set. `uid` is the user's.
    pub(super) fn from_variables(read: impl Fn(&str) -> Option<OsString>, uid: u32) -> Environment {
        let set = |name: &str| read(name).filter(|value| !value.is_empty());
        let text = |name: &str| set(name).map(|value| value.to_string_lossy().into_owned());
        let hosts = ["DOCKER_HOST", "CONTAINER_HOST"];
        let home = || set("HOME").map(|home| PathBuf::from(home).join(".docker"));
        Environment {
            hosts: hosts.into_iter().filter_map(|name| Some((name, text(name)?))).collect(),
            context: text("DOCKER_CONTEXT"),
            configuration: set("DOCKER_CONFIG").map(PathBuf::from).or_else(home),
            runtime: Some(
                set("XDG_RUNTIME_DIR").map_or_else(|| format!("/run/user/{uid}").into(), PathBuf::from),
            ),
            tls: set("DOCKER_TLS_VERIFY").is_some(),
        }
    }

    /// Returns an environment in which only `DOCKER_HOST` may be set.
    pub(super) fn of_host(host: Option<String>) -> Environment {
        let host = host.filter(|host| !host.is_empty()).map(|host| ("DOCKER_HOST", host));
        Environment { hosts: host.into_iter().collect(), ..Environment::default() }
    }
}

/// The endpoint of an engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Endpoint {
    /// A Unix socket.
    Unix(PathBuf),
    /// A port of this machine's loopback.
    Tcp(String, u16),
}

/// An engine's address and its source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Address {
    /// The endpoint.
    pub(super) endpoint: Endpoint,
    /// The source, for example `DOCKER_HOST`; `None` for a default socket.
    pub(super) source: Option<String>,
}

impl Address {
    /// Returns the socket, if the endpoint is one.
    pub(super) fn socket(&self) -> Option<&Path> {
        match &self.endpoint {
            Endpoint::Unix(path) => Some(path),
            Endpoint::Tcp(..) => None,
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.endpoint {
            Endpoint::Unix(path) => write!(f, "unix://{}", path.display()),
            Endpoint::Tcp(host, port) if host.contains(':') => write!(f, "tcp://[{host}]:{port}"),
            Endpoint::Tcp(host, port) => write!(f, "tcp://{host}:{port}"),
        }
    }
}

/// An unusable address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct AddressError {
    /// The setting and its source.
    pub(super) at: String,
    /// The reason, with the remedy.
    pub(super) reason: String,
}

/// The result of evaluating the environment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum EngineLocation {
    /// A setting selects this address.
    At(Address),
    /// A setting is unusable.
    Nowhere(AddressError),
    /// Without a setting: one of these sockets.
    Among(Vec<PathBuf>),
}

/// The state of a socket path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SocketState {
    /// It does not exist.
    Absent,
    /// It exists, and this user may not use it.
    Forbidden,
    /// It exists, and this user may use it.
    Usable,
}

/// Evaluates the environment. `read` returns the text of a file, `None` if it does not exist, or a reason.
pub(super) fn locate(
    environment: &Environment,
    read: impl Fn(&Path) -> Result<Option<String>, String>,
) -> EngineLocation {
    let parsed = |by: String, text: &str| match endpoint(text, environment.tls) {
        Ok(endpoint) => EngineLocation::At(Address { endpoint, source: Some(by) }),
        Err(reason) => EngineLocation::Nowhere(AddressError { at: format!("{text} ({by})"), reason }),
    };
    if let Some((by, text)) = environment.hosts.first() {
        return parsed((*by).to_owned(), text);
    }
    match context(environment, read) {
        Ok(Some((name, text))) => parsed(format!("context {name}"), &text),
        Ok(None) => EngineLocation::Among(default_sockets(environment)),
        Err(unusable) => EngineLocation::Nowhere(unusable),
    }
}

/// Selects one of the default sockets: the first that is usable, else the first that exists, else the first.
pub(super) fn select(default_sockets: &[PathBuf], look: impl Fn(&Path) -> SocketState) -> Option<Address> {
    let looks: Vec<(&PathBuf, SocketState)> = default_sockets.iter().map(|path| (path, look(path))).collect();
    let first = |wanted: SocketState| looks.iter().find(|(_, look)| *look == wanted);
    let (path, _) =
        first(SocketState::Usable).or_else(|| first(SocketState::Forbidden)).or_else(|| looks.first())?;
    Some(Address { endpoint: Endpoint::Unix((*path).clone()), source: None })
}

fn default_sockets(environment: &Environment) -> Vec<PathBuf> {
    let own = environment
        .runtime
        .iter()
        .flat_map(|runtime| [runtime.join("docker.sock"), runtime.join("podman/podman.sock")]);
    [PathBuf::from(DOCKER_SOCKET)].into_iter().chain(own).chain([PathBuf::from(PODMAN_SOCKET)]).collect()
}

/// Returns the selected context with its address.
fn context(
    environment: &Environment,
    read: impl Fn(&Path) -> Result<Option<String>, String>,
) -> Result<Option<(String, String)>, AddressError> {
    let Some(configuration) = &environment.configuration else { return Ok(None) };
    let file = |path: &Path| -> Result<Option<Value>, AddressError> {
        let unusable = |reason| AddressError { at: path.display().to_string(), reason };
        let Some(text) = read(path).map_err(unusable)? else { return Ok(None) };
        serde_json::from_str(&text).map(Some).map_err(|error| unusable(format!("invalid JSON: {error}")))
    };
    let name = match &environment.context {
        Some(name) => name.clone(),
        None => {
            let own = file(&configuration.join("config.json"))?.unwrap_or_default();
            own["currentContext"].as_str().unwrap_or_default().to_owned()
        }
    };
    if name.is_empty() || name == NO_CONTEXT {
        return Ok(None);
    }
    let unusable = |reason: &str| AddressError { at: format!("context {name}"), reason: reason.to_owned() };
    let id = hex(&Sha256::digest(name.as_bytes()));
    let about = file(&configuration.join("contexts/meta").join(id).join("meta.json"))?
        .ok_or_else(|| unusable("the context does not exist; `docker context ls` lists the contexts"))?;
    match about["Endpoints"]["docker"]["Host"].as_str().filter(|host| !host.is_empty()) {
        Some(host) => Ok(Some((name, host.to_owned()))),
        None => Err(unusable("it has no address of an engine")),
    }
}

/// Parses an address in the format of `DOCKER_HOST`.
fn endpoint(text: &str, tls: bool) -> Result<Endpoint, String> {
    const FORM: &str = "an engine's address is unix:///PATH or tcp://127.0.0.1:PORT";
    if let Some(path) = text.strip_prefix("unix:") {
        // Podman's own form omits the two slashes before the path.
        let path = path.strip_prefix("//").unwrap_or(path);
        return if path.starts_with('/') { Ok(Endpoint::Unix(path.into())) } else { Err(FORM.to_owned()) };
    }
    if text.starts_with("ssh://") {
        return Err(OTHER_MACHINE.to_owned());
    }
    let Some(place) = text.strip_prefix("tcp://") else { return Err(FORM.to_owned()) };
    let (host, port) = host_and_port(place.trim_end_matches('/')).ok_or(FORM)?;
    let local = host == "localhost" || host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
    match (local, tls) {
        (false, _) => Err(OTHER_MACHINE.to_owned()),
        (true, true) => {
            Err("DOCKER_TLS_VERIFY is set, but TLS is not supported: use the engine's Unix socket".to_owned())
        }
        (true, false) => Ok(Endpoint::Tcp(host, port)),
    }
}

fn host_and_port(place: &str) -> Option<(String, u16)> {
    let (host, rest) = match place.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => place.split_at(place.find(':').unwrap_or(place.len())),
    };
    let port = match rest.strip_prefix(':') {
        Some(port) => port.parse().ok().filter(|port| *port != 0)?,
        None if rest.is_empty() => TCP_PORT,
        None => return None,
    };
    (!host.is_empty()).then(|| (host.to_owned(), port))
}

#[cfg(test)]
#[path = "address_tests.rs"]
mod tests;
