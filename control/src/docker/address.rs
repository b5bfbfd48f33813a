//! Where an engine is, from what the environment says. Pure: files are read by whoever calls.
//!
//! The first of these that says something counts, and what it says has to hold; nothing is guessed after it:
//!
//! 1. `DOCKER_HOST`, then `CONTAINER_HOST`, which is Podman's name for the same.
//! 2. The context that `DOCKER_CONTEXT` names, or `currentContext` in Docker's own configuration. The context `default` says
//!    nothing.
//! 3. The sockets at which engines listen: the machine's Docker, the user's own (rootless) Docker, the user's own Podman, the
//!    machine's Podman. The first that this user may use counts.
//!
//! An engine is met on this machine or not at all: the processes of containers elsewhere are not in any namespace here.

use std::ffi::OsString;
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::model::name::hex;

/// Where the machine's Docker listens.
const DOCKER_SOCKET: &str = "/var/run/docker.sock";
/// Where the machine's Podman does.
const PODMAN_SOCKET: &str = "/run/podman/podman.sock";
/// Docker's port where an address names none.
const TCP_PORT: u16 = 2375;
/// The context that stands for none.
const NO_CONTEXT: &str = "default";
/// What to do about containers that are elsewhere.
const ELSEWHERE: &str = "containers of another machine are forwarded by a landfall there, or here by `landfall register --websocket`";

/// What the environment says of engines.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Environment {
    /// `DOCKER_HOST` and `CONTAINER_HOST`, as far as they are set.
    hosts: Vec<(&'static str, String)>,
    /// `DOCKER_CONTEXT`.
    context: Option<String>,
    /// The directory of Docker's own configuration.
    configuration: Option<PathBuf>,
    /// Where the user's own sockets are.
    runtime: Option<PathBuf>,
    /// TLS is asked for.
    tls: bool,
}

impl Environment {
    /// Reads variables; one that is empty counts as not set. `uid` is the user's.
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

    /// An environment in which `DOCKER_HOST` alone may be set.
    pub(super) fn of_host(host: Option<String>) -> Environment {
        let host = host.filter(|host| !host.is_empty()).map(|host| ("DOCKER_HOST", host));
        Environment { hosts: host.into_iter().collect(), ..Environment::default() }
    }
}

/// Where an engine is met.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Endpoint {
    /// At a socket.
    Unix(PathBuf),
    /// At a port of this machine's loopback.
    Tcp(String, u16),
}

/// An engine's address, and who says so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Address {
    /// Where.
    pub(super) endpoint: Endpoint,
    /// `DOCKER_HOST`, say; none where the socket was found at one of the usual places.
    pub(super) said_by: Option<String>,
}

impl Address {
    /// The socket, if it is one.
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

/// An address that is of no use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct AddressError {
    /// What was said, and by whom.
    pub(super) at: String,
    /// Why it is of no use, and what to do.
    pub(super) reason: String,
}

/// Where to look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum EngineLocation {
    /// Somebody says where.
    At(Address),
    /// Somebody says where, and nothing can be met there.
    Nowhere(AddressError),
    /// Nobody does: at one of these sockets.
    Among(Vec<PathBuf>),
}

/// How a socket's place looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    /// Nothing is there.
    Absent,
    /// Something is, and this user may not use it.
    Forbidden,
    /// Something is.
    Usable,
}

/// Where to look for an engine. `read` gives the text of a file, none if there is no such file, or why it cannot be read.
pub(super) fn whereabouts(
    environment: &Environment,
    read: impl Fn(&Path) -> Result<Option<String>, String>,
) -> EngineLocation {
    let said = |by: String, text: &str| match endpoint(text, environment.tls) {
        Ok(endpoint) => EngineLocation::At(Address { endpoint, said_by: Some(by) }),
        Err(reason) => EngineLocation::Nowhere(AddressError { at: format!("{text} ({by})"), reason }),
    };
    if let Some((by, text)) = environment.hosts.first() {
        return said((*by).to_owned(), text);
    }
    match context(environment, read) {
        Ok(Some((name, text))) => said(format!("context {name}"), &text),
        Ok(None) => EngineLocation::Among(usual(environment)),
        Err(misled) => EngineLocation::Nowhere(misled),
    }
}

/// Of the usual sockets, the one to use: the first that is usable, else the first that is there at all, else the first.
pub(super) fn select(usual: &[PathBuf], look: impl Fn(&Path) -> Look) -> Option<Address> {
    let looks: Vec<(&PathBuf, Look)> = usual.iter().map(|path| (path, look(path))).collect();
    let first = |wanted: Look| looks.iter().find(|(_, look)| *look == wanted);
    let (path, _) = first(Look::Usable).or_else(|| first(Look::Forbidden)).or_else(|| looks.first())?;
    Some(Address { endpoint: Endpoint::Unix((*path).clone()), said_by: None })
}

fn usual(environment: &Environment) -> Vec<PathBuf> {
    let own = environment
        .runtime
        .iter()
        .flat_map(|runtime| [runtime.join("docker.sock"), runtime.join("podman/podman.sock")]);
    [PathBuf::from(DOCKER_SOCKET)].into_iter().chain(own).chain([PathBuf::from(PODMAN_SOCKET)]).collect()
}

/// The context that is in use, with its address.
fn context(
    environment: &Environment,
    read: impl Fn(&Path) -> Result<Option<String>, String>,
) -> Result<Option<(String, String)>, AddressError> {
    let Some(configuration) = &environment.configuration else { return Ok(None) };
    let file = |path: &Path| -> Result<Option<Value>, AddressError> {
        let misled = |reason| AddressError { at: path.display().to_string(), reason };
        let Some(text) = read(path).map_err(misled)? else { return Ok(None) };
        serde_json::from_str(&text).map(Some).map_err(|error| misled(format!("it is no JSON: {error}")))
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
    let misled = |reason: &str| AddressError { at: format!("context {name}"), reason: reason.to_owned() };
    let id = hex(&Sha256::digest(name.as_bytes()));
    let about = file(&configuration.join("contexts/meta").join(id).join("meta.json"))?
        .ok_or_else(|| misled("there is no such context; `docker context ls` shows those that there are"))?;
    match about["Endpoints"]["docker"]["Host"].as_str().filter(|host| !host.is_empty()) {
        Some(host) => Ok(Some((name, host.to_owned()))),
        None => Err(misled("it does not say where its engine is")),
    }
}

/// The place that an address of the form of `DOCKER_HOST` means, or why it is of no use.
fn endpoint(text: &str, tls: bool) -> Result<Endpoint, String> {
    const FORM: &str = "an engine's address is unix:///PATH or tcp://127.0.0.1:PORT";
    if let Some(path) = text.strip_prefix("unix:") {
        // Podman's own form has no slashes before those of the path.
        let path = path.strip_prefix("//").unwrap_or(path);
        return if path.starts_with('/') { Ok(Endpoint::Unix(path.into())) } else { Err(FORM.to_owned()) };
    }
    if text.starts_with("ssh://") {
        return Err(ELSEWHERE.to_owned());
    }
    let Some(place) = text.strip_prefix("tcp://") else { return Err(FORM.to_owned()) };
    let (host, port) = host_and_port(place.trim_end_matches('/')).ok_or(FORM)?;
    let local = host == "localhost" || host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
    match (local, tls) {
        (false, _) => Err(ELSEWHERE.to_owned()),
        (true, true) => {
            Err("DOCKER_TLS_VERIFY is set, and TLS is not spoken here: use the engine's Unix socket"
                .to_owned())
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
