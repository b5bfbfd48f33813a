//! One registration, valid by construction: what does not fit never gets here. Pure.
//!
//! The same six fields travel in `register` and lie in a file (wire specification, A.1.4 and A.7.1). Ours may carry more:
//! [`AttachMethod`], and fields of a newer release that this one does not understand and keeps as they are.

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

/// A container's name: `^[A-Za-z0-9][A-Za-z0-9_.-]*$`, so it is a file's name, too, and never leads out of a directory.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct ContainerName(String);

/// The longest name: with `.json` and the marks of a temporary file it is a file's name (255 bytes).
const NAME_BYTES_MAX: usize = 200;

/// A name that is none.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("invalid container name for registration file: \"{0}\"")]
pub struct NameError(pub String);

impl ContainerName {
    /// Takes a name.
    ///
    /// # Errors
    /// [`NameError`], with the wire's own text.
    pub fn new(name: &str) -> Result<ContainerName, NameError> {
        let first = name.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric);
        let rest = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
        if first && rest && name.len() <= NAME_BYTES_MAX {
            Ok(ContainerName(name.to_owned()))
        } else {
            Err(NameError(name.to_owned()))
        }
    }

    /// The name of the only one, where nobody registers any: that of `run` and `attach` without a daemon.
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

/// A secret that one container instance holds. It never prints, and is compared in constant time.
#[derive(Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Token(String);

impl Token {
    /// Takes a token; an empty one is none.
    pub fn new(text: &str) -> Option<Token> {
        (!text.is_empty()).then(|| Token(text.to_owned()))
    }

    /// Whether `presented` is this token. Both are hashed first, so neither length nor content shows in the time.
    pub fn matches(&self, presented: &str) -> bool {
        let (own, other) = (Sha256::digest(self.0.as_bytes()), Sha256::digest(presented.as_bytes()));
        own.as_slice().ct_eq(other.as_slice()).into()
    }

    /// The secret itself, for the one who has to present it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// How the container's network namespace is reached, where its registration says so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", rename_all_fields = "camelCase")]
pub enum AttachMethod {
    /// Docker knows a container; its first process is in the namespace.
    Docker {
        /// What Docker calls it, where that is not the registration's own name.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        container: Option<ContainerName>,
    },
    /// A process is in the namespace, and the registration ends with it.
    Process {
        /// Its id in the daemon's process namespace.
        pid: NonZeroU32,
        /// When it began, in clock ticks since the machine started (`proc_pid_stat(5)`, field 22), with the id of that
        /// start: a process that later has the same number is another one.
        started: Option<Started>,
    },
    /// A file stands for the namespace, such as `/run/netns/NAME`; the registration ends with the file.
    Netns {
        /// Its absolute path.
        path: PathBuf,
    },
    /// An agent inside the container serves a socket in a directory that both sides see. Docker is not asked.
    Agent {
        /// The directory's absolute path on this side.
        directory: PathBuf,
    },
    /// The container's WebSocket alone, for which the registration carries host port, policy and token. The container may be
    /// on another machine.
    Websocket,
}

impl fmt::Display for AttachMethod {
    /// The way, as people are told of it.
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
    /// By Docker, which calls the container as the registration does.
    pub const DOCKER: AttachMethod = AttachMethod::Docker { container: None };

    /// What Docker calls the container of a registration of the name `own`.
    pub fn docker_name<'a>(&'a self, own: &'a ContainerName) -> &'a ContainerName {
        match self {
            AttachMethod::Docker { container: Some(name) } => name,
            _ => own,
        }
    }
}

/// When a process began; see [`AttachMethod::Process`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Started {
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot: String,
    /// Clock ticks since then.
    pub ticks: u64,
}

/// That the daemon keeps a registration by itself, from what Docker tells, and why. What somebody registers of the same name
/// takes its place and is left alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Discovered {
    /// What makes the container one that is forwarded.
    pub by: FoundBy,
    /// Docker's id of the container that was seen last; one that is renamed is known by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
}

/// See [`Discovered`]; the first that holds counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FoundBy {
    /// Somebody named it (`landfall attach NAME`). It is remembered when the container is gone, for the next one of its name.
    Name,
    /// Its label says so.
    Label,
    /// Everything is forwarded (`landfall up --all`).
    All,
}

/// What people are told of some ports of a container, and whether they are told at all. What may be exposed is the policy's
/// business alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortNote {
    /// The first port.
    pub first: NonZeroU16,
    /// The last one.
    pub last: NonZeroU16,
    /// What it is for, in the words of whoever made the container: escape it before it reaches a terminal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// It is forwarded without a word.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub silent: bool,
}

/// Ports below 1024 that a file of the container's folder names. They are exposed where the user approved exactly the content
/// that named them (`landfall trust`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FolderPorts {
    /// The file.
    pub file: FolderFile,
    /// Its content.
    pub sha256: ContentDigest,
    /// The ports.
    pub privileged: BTreeSet<NonZeroU16>,
    /// Fields that this release does not know, kept as they came.
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
    /// What it presents over HTTP. Without it, HTTP is closed to it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restart_token: Option<Token>,
    /// Where its port 8973 was published when it was registered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ws_host_port: Option<NonZeroU16>,
    /// Which of its ports may be exposed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port_forward: Option<PortForward>,
    /// Which more, where a file of its folder is approved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub folder_ports: Option<FolderPorts>,
    /// Whether that file is approved, as of the last look at the approvals. Never kept.
    #[serde(skip)]
    pub folder_ports_approved: bool,
    /// What the daemon presents to it over its WebSocket.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub broker_token: Option<Token>,
    /// Its WebSocket has to answer a challenge: the broker token itself is never sent there.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub challenge_required: bool,
    /// It has a socket of the HTTP endpoint of its own, in a directory that is mounted into it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub http_socket: bool,
    /// How it is reached without its help.
    #[serde(rename = "way", skip_serializing_if = "Option::is_none")]
    pub attach_method: Option<AttachMethod>,
    /// The daemon made it itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub discovered: Option<Discovered>,
    /// What is told of its ports; for a port that several are about, the last one counts.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub port_notes: Vec<PortNote>,
    /// Fields that this release does not know, kept as they came.
    #[serde(flatten)]
    pub unknown: Map<String, Value>,
}

/// What is wrong with a registration. The texts are the wire's.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RegistrationError {
    /// A field is missing or of a wrong type or value.
    #[error("invalid register: {0}")]
    Field(&'static str),
    /// A field is wrong in a way that takes a sentence.
    #[error("invalid register: {0}: {1}")]
    Because(&'static str, String),
    /// The name would not be a file's.
    #[error("failed to persist registration: {0}")]
    Name(#[from] NameError),
}

impl Registration {
    /// Takes the fields of a request or of a file. A field that is null counts as absent.
    ///
    /// # Errors
    /// [`RegistrationError`] names the first field that does not fit.
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
        // A field that only a newer release can read opens no port, and is kept with the other unknown fields.
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

    /// Host port, policy and token of the container's WebSocket, which is used when all three are present. Where the
    /// registration says that Docker has the container, the host port may be absent: Docker is asked for it.
    pub fn broker(&self) -> Option<(Option<NonZeroU16>, &PortForward, &Token)> {
        let is_known =
            self.ws_host_port.is_some() || matches!(self.attach_method, Some(AttachMethod::Docker { .. }));
        let (policy, token) = (self.port_forward.as_ref()?, self.broker_token.as_ref()?);
        is_known.then_some((self.ws_host_port, policy, token))
    }

    /// Which of its ports may be exposed now: those of the registration, and those of the folder's file where it is approved.
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

    /// Whether this is the container instance that had this broker token.
    pub fn has_broker_token(&self, token: &Token) -> bool {
        self.broker_token.as_ref().is_some_and(|own| own.matches(token.reveal()))
    }

    /// What Docker calls the container.
    pub fn docker_name(&self) -> &ContainerName {
        let own = &self.container_name;
        self.attach_method.as_ref().map_or(own, |attach_method| attach_method.docker_name(own))
    }

    /// Docker's id of the container that it follows, where it was made for a container that was found.
    pub fn found_id(&self) -> Option<&str> {
        self.discovered.as_ref()?.id.as_deref()
    }

    /// What is told of a port.
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

/// A field of our own, whose type says what fits.
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
