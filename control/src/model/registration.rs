//! One registration, valid by construction. Pure.
//!
//! The same six fields are in a `register` request and in a file (wire specification, A.1.4 and A.7.1). Landfall adds
//! fields such as [`AttachMethod`], and keeps fields of a newer release that this one does not know.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fmt;
use std::num::{NonZeroU16, NonZeroU32};
use std::path::{Path, PathBuf};

use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use thiserror::Error;

use crate::model::port_policy::{PortForward, port_of};
use crate::model::trust::{ContentDigest, FolderFile};

/// A container's name: `^[A-Za-z0-9][A-Za-z0-9_.-]*$`. So it is also a valid file name and cannot lead out of a
/// directory.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct ContainerName(String);

/// The longest name: with `.json` and the affixes of a temporary file it fits a file name (255 bytes).
const NAME_BYTES_MAX: usize = 200;

/// A text that is not a container's name.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("invalid container name for registration file: \"{0}\"")]
pub struct NameError(pub String);

impl ContainerName {
    /// Checks a name.
    ///
    /// # Errors
    /// [`NameError`], with the text of the wire specification.
    pub fn new(name: &str) -> Result<ContainerName, NameError> {
        let first = name.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric);
        let rest = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
        if first && rest && name.len() <= NAME_BYTES_MAX {
            Ok(ContainerName(name.to_owned()))
        } else {
            Err(NameError(name.to_owned()))
        }
    }

    /// The name of the only container of `run` and `attach` without a daemon.
    pub(crate) fn only() -> ContainerName {
        ContainerName("only".to_owned())
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl<'de> Deserialize<'de> for ContainerName {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<ContainerName, D::Error> {
        ContainerName::new(&String::deserialize(from)?).map_err(D::Error::custom)
    }
}

impl fmt::Display for ContainerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A secret of one container instance. It is never printed, and is compared in constant time.
#[derive(Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Token(String);

impl Token {
    /// Creates a token; `None` for an empty text.
    pub fn new(text: &str) -> Option<Token> {
        (!text.is_empty()).then(|| Token(text.to_owned()))
    }

    /// Whether `presented` is this token. Both are hashed first, so the time depends on neither length nor content.
    pub fn matches(&self, presented: &str) -> bool {
        let (own, other) = (Sha256::digest(self.0.as_bytes()), Sha256::digest(presented.as_bytes()));
        own.as_slice().ct_eq(other.as_slice()).into()
    }

    /// Returns the secret, for presenting it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// The method to reach a container's network namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", rename_all_fields = "camelCase")]
pub enum AttachMethod {
    /// Docker manages the container; its first process is in the namespace.
    Docker {
        /// The container's Docker name, if it differs from the registration's name.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        container: Option<ContainerName>,
    },
    /// A process is in the namespace, and the registration ends with it.
    Process {
        /// Its id in the daemon's process namespace.
        pid: NonZeroU32,
        /// Its start time in clock ticks since boot (`proc_pid_stat(5)`, field 22), with the id of that boot: a later
        /// process with the same id has another start time.
        started: Option<Started>,
    },
    /// A file of the namespace, such as `/run/netns/NAME`; the registration ends with the file.
    Netns {
        /// Its absolute path.
        path: PathBuf,
    },
    /// An agent inside the container serves a socket in a directory that both sides see. Docker is not used.
    Agent {
        /// The directory's absolute path on the host.
        directory: PathBuf,
    },
    /// The container's WebSocket alone, for which the registration has host port, policy and token. The container may
    /// be on another machine.
    Websocket,
}

impl fmt::Display for AttachMethod {
    /// The text for users.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AttachMethod::Docker { container: None } => f.write_str("docker"),
            AttachMethod::Docker { container: Some(name) } => write!(f, "docker ({name})"),
            AttachMethod::Process { pid, .. } => write!(f, "process {pid}"),
            AttachMethod::Netns { path } => write!(f, "{}", path.display()),
            AttachMethod::Agent { directory } => write!(f, "agent in {}", directory.display()),
            AttachMethod::Websocket => f.write_str("websocket"),
        }
    }
}

impl AttachMethod {
    /// Docker, with the registration's name.
    pub const DOCKER: AttachMethod = AttachMethod::Docker { container: None };

    /// The Docker name of the container of a registration with the name `own`.
    pub fn docker_name<'a>(&'a self, own: &'a ContainerName) -> &'a ContainerName {
        match self {
            AttachMethod::Docker { container: Some(name) } => name,
            _ => own,
        }
    }
}

/// The start time of a process; see [`AttachMethod::Process`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Started {
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot: String,
    /// Clock ticks since that boot.
    pub ticks: u64,
}

/// Marks a registration that the daemon made from Docker's data, with the reason. A client's registration of the same
/// name replaces it and is not changed by discovery.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Discovered {
    /// The reason that the container is forwarded.
    pub by: FoundBy,
    /// The Docker id of the container that was seen last; a renamed container is recognised by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
}

/// See [`Discovered`]; the first reason that applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FoundBy {
    /// A user named it (`landfall attach NAME`). The registration outlives the container, for the next one of that
    /// name.
    Name,
    /// A label of the container.
    Label,
    /// Every container is forwarded (`landfall up --all`).
    All,
}

/// The label of some ports of a container, and whether messages about them are shown. It has no effect on which ports
/// are exposed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortNote {
    /// The first port of the range.
    pub first: NonZeroU16,
    /// The last port of the range.
    pub last: NonZeroU16,
    /// The purpose, as text from the container's configuration: escape it before printing it to a terminal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// Whether messages about the ports are suppressed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub silent: bool,
}

/// Ports below 1024 that a file of the container's folder names. They are exposed if the user approved exactly the
/// content that names them (`landfall trust`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FolderPorts {
    /// The file.
    pub file: FolderFile,
    /// The hash of its content.
    pub sha256: ContentDigest,
    /// The ports.
    pub privileged: BTreeSet<NonZeroU16>,
    /// Fields that this release does not know, kept unchanged.
    #[serde(flatten)]
    pub unknown: Map<String, Value>,
}

/// One container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Registration {
    /// Its name.
    pub container_name: ContainerName,
    /// Its folder on the host.
    pub cwd: PathBuf,
    /// The token that the container presents over HTTP. Without it, the container has no access over HTTP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restart_token: Option<Token>,
    /// The host port of its port 8973 when it was registered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ws_host_port: Option<NonZeroU16>,
    /// The ports that may be exposed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port_forward: Option<PortForward>,
    /// Further ports that may be exposed if a file of its folder is approved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub folder_ports: Option<FolderPorts>,
    /// Whether that file was approved when the approvals were last read. Never stored.
    #[serde(skip)]
    pub folder_ports_approved: bool,
    /// The token that the daemon presents to the container over its WebSocket.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub broker_token: Option<Token>,
    /// Whether the other end of the WebSocket must answer a challenge: then the broker token itself is never sent.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub challenge_required: bool,
    /// Whether it has a socket of the HTTP endpoint of its own, in a directory that is mounted into it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub http_socket: bool,
    /// The attach method.
    #[serde(rename = "way", skip_serializing_if = "Option::is_none")]
    pub attach_method: Option<AttachMethod>,
    /// Set if the daemon made the registration itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub discovered: Option<Discovered>,
    /// Notes about its ports; if several ranges contain a port, the last one applies.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub port_notes: Vec<PortNote>,
    /// Fields that this release does not know, kept unchanged.
    #[serde(flatten)]
    pub unknown: Map<String, Value>,
}

/// The reason that a registration is invalid. The texts are those of the wire specification.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RegistrationError {
    /// A field is missing or of a wrong type or value.
    #[error("invalid register: {0}")]
    Field(&'static str),
    /// A field is wrong in a way that needs an explanation.
    #[error("invalid register: {0}: {1}")]
    Because(&'static str, String),
    /// The name is invalid.
    #[error("failed to persist registration: {0}")]
    Name(#[from] NameError),
}

impl Registration {
    /// Parses the fields of a request or of a file. A field that is null counts as absent.
    ///
    /// # Errors
    /// [`RegistrationError`] names the first invalid field.
    pub fn from_fields(mut fields: Map<String, Value>) -> Result<Registration, RegistrationError> {
        fields.retain(|_, value| !value.is_null());
        let Some(Value::String(name)) = fields.remove("containerName") else {
            return Err(RegistrationError::Field("containerName"));
        };
        let container_name = ContainerName::new(&name)?;
        let Some(Value::String(cwd)) = fields.remove("cwd") else {
            return Err(RegistrationError::Field("cwd"));
        };
        let cwd = PathBuf::from(cwd);
        if !Path::is_absolute(&cwd) {
            return Err(RegistrationError::Field("cwd"));
        }
        let restart_token = token(&mut fields, "restartToken")?;
        let broker_token = token(&mut fields, "brokerToken")?;
        let ws_host_port = match fields.remove("wsHostPort") {
            None => None,
            Some(port) => Some(port_of(&port).ok_or(RegistrationError::Field("wsHostPort"))?),
        };
        let port_forward = match fields.remove("portForward") {
            None => None,
            Some(policy) => Some(
                PortForward::from_value(&policy)
                    .map_err(|error| RegistrationError::Because("portForward", error.to_string()))?,
            ),
        };
        // A field that only a newer release can parse opens no port, and is kept with the other unknown fields.
        let folder_ports =
            fields.get("folderPorts").and_then(|value| serde_json::from_value(value.clone()).ok());
        if folder_ports.is_some() {
            fields.remove("folderPorts");
        }
        let attach_method = match fields.remove("way") {
            None => None,
            Some(attach_method) => Some(read_attach_method(attach_method)?),
        };
        let discovered = ours(&mut fields, "discovered")?;
        let port_notes = ours(&mut fields, "portNotes")?.unwrap_or_default();
        let http_socket = ours(&mut fields, "httpSocket")?.unwrap_or_default();
        let challenge_required = ours(&mut fields, "challengeRequired")?.unwrap_or_default();
        fields.remove("kind");
        let unknown = fields;
        Ok(Registration {
            container_name,
            cwd,
            restart_token,
            ws_host_port,
            port_forward,
            folder_ports,
            folder_ports_approved: false,
            broker_token,
            challenge_required,
            http_socket,
            attach_method,
            discovered,
            port_notes,
            unknown,
        })
    }

    /// Host port, policy and token of the container's WebSocket, which is used if all three are present. If the
    /// registration has Docker as its attach method, the host port may be absent: the daemon looks it up.
    pub fn broker(&self) -> Option<(Option<NonZeroU16>, &PortForward, &Token)> {
        let is_known =
            self.ws_host_port.is_some() || matches!(self.attach_method, Some(AttachMethod::Docker { .. }));
        let (policy, token) = (self.port_forward.as_ref()?, self.broker_token.as_ref()?);
        is_known.then_some((self.ws_host_port, policy, token))
    }

    /// The ports that may be exposed now: those of the registration, and those of the folder's file if it is approved.
    pub fn exposed(&self) -> Option<Cow<'_, PortForward>> {
        let own = self.port_forward.as_ref();
        let Some(ports) = self.folder_ports.as_ref().filter(|_| self.folder_ports_approved) else {
            return own.map(Cow::Borrowed);
        };
        Some(Cow::Owned(own.cloned().unwrap_or_default().with_privileged(&ports.privileged)))
    }

    /// Whether none of its ports may be exposed.
    pub fn exposes_nothing(&self) -> bool {
        self.exposed().is_some_and(|exposed| exposed.is_off())
    }

    /// Whether the broker token is that of this container instance.
    pub fn has_broker_token(&self, token: &Token) -> bool {
        self.broker_token.as_ref().is_some_and(|own| own.matches(token.reveal()))
    }

    /// The container's Docker name.
    pub fn docker_name(&self) -> &ContainerName {
        let own = &self.container_name;
        self.attach_method.as_ref().map_or(own, |attach_method| attach_method.docker_name(own))
    }

    /// The Docker id of the container, if the registration was discovered.
    pub fn found_id(&self) -> Option<&str> {
        self.discovered.as_ref()?.id.as_deref()
    }

    /// The note about a port.
    pub fn note_of(&self, port: NonZeroU16) -> Option<&PortNote> {
        self.port_notes.iter().rev().find(|note| (note.first..=note.last).contains(&port))
    }
}

fn token(fields: &mut Map<String, Value>, name: &'static str) -> Result<Option<Token>, RegistrationError> {
    match fields.remove(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Token::new(&text)),
        Some(_) => Err(RegistrationError::Field(name)),
    }
}

/// Removes and parses a field of landfall's own.
fn ours<T: DeserializeOwned>(
    fields: &mut Map<String, Value>,
    name: &'static str,
) -> Result<Option<T>, RegistrationError> {
    let read = |value| {
        serde_json::from_value(value).map_err(|error| RegistrationError::Because(name, error.to_string()))
    };
    fields.remove(name).map(read).transpose()
}

fn read_attach_method(attach_method: Value) -> Result<AttachMethod, RegistrationError> {
    let attach_method: AttachMethod = serde_json::from_value(attach_method)
        .map_err(|error| RegistrationError::Because("way", error.to_string()))?;
    match &attach_method {
        AttachMethod::Netns { path } if !path.is_absolute() => {
            Err(RegistrationError::Because("way", "path must be absolute".to_owned()))
        }
        AttachMethod::Agent { directory } if !directory.is_absolute() => {
            Err(RegistrationError::Because("way", "directory must be absolute".to_owned()))
        }
        _ => Ok(attach_method),
    }
}

#[cfg(test)]
#[path = "registration_tests.rs"]
mod tests;
