//! Requests and responses (wire specification, A.1.4). Pure.
//!
//! A line becomes an [`Envelope`] (an object with a kind) and then a [`Request`]; later code never handles JSON. The steps
//! are separate because HTTP authorises the caller in between, by kind and name alone (A.2). The wire orders the errors of
//! `restart` after other checks, so those are kept inside the request until then.

use std::path::{Path, PathBuf};
use std::str;

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};
use serde_json::{Map, Value};
use thiserror::Error;

use crate::model::grants::{Right, RightError};
use crate::model::registration::{ContainerName, Registration, RegistrationError};

/// The reasons why a request is invalid. The texts are part of the wire specification.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RequestError {
    /// Not UTF-8, or not JSON.
    #[error("invalid request json")]
    Json,
    /// JSON, but not an object.
    #[error("invalid request")]
    NotAnObject,
    /// An object with an unknown `kind`.
    #[error("unknown request kind")]
    UnknownKind,
    /// A `register` with an invalid registration.
    #[error(transparent)]
    Registration(#[from] RegistrationError),
    /// A field of another kind is missing, or has an invalid type or value.
    #[error("invalid {kind}: {field}")]
    Field {
        /// The kind of the request.
        kind: &'static str,
        /// The field.
        field: &'static str,
    },
    /// A right in `grant` is unknown.
    #[error(transparent)]
    Right(#[from] RightError),
    /// A `restart` with a `build` that is not a boolean.
    #[error("restart.build must be a boolean if provided")]
    Build,
}

/// A JSON object that is to be a request.
#[derive(Clone, Debug, PartialEq)]
pub struct Envelope(Map<String, Value>);

impl Envelope {
    /// Parses a line without its newline, or the body of an HTTP request.
    ///
    /// # Errors
    /// [`RequestError::Json`] and [`RequestError::NotAnObject`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Envelope, RequestError> {
        let text = str::from_utf8(bytes).map_err(|_| RequestError::Json)?;
        match serde_json::from_str(text) {
            Ok(Value::Object(fields)) => Ok(Envelope(fields)),
            Ok(_) => Err(RequestError::NotAnObject),
            Err(_) => Err(RequestError::Json),
        }
    }

    /// Returns the kind, if present.
    pub fn kind(&self) -> Option<&str> {
        self.0.get("kind").and_then(Value::as_str)
    }

    /// Returns the name of the container, if present.
    pub fn container_name(&self) -> Option<&str> {
        self.0.get("containerName").and_then(Value::as_str)
    }

    /// Converts the object to a request. Unknown fields are ignored, but `register` keeps them.
    ///
    /// # Errors
    /// The variants of [`RequestError`] for this kind.
    pub fn into_request(mut self) -> Result<Request, RequestError> {
        let kind = self.kind().unwrap_or_default().to_owned();
        Ok(match kind.as_str() {
            "register" => Request::Register(Box::new(Registration::from_fields(self.0)?)),
            "deregister" => {
                Request::Deregister { keep_grants: self.keep_grants()?, container_name: self.name() }
            }
            "list" => Request::List,
            "status" => {
                Request::Status { container_name: self.name().ok_or(field("status", "containerName"))? }
            }
            "restart" => {
                Request::Restart(Restart { container_name: self.name(), build: self.0.remove("build") })
            }
            "secrets-patch" => Request::SecretsPatch(SecretsPatch {
                container_name: self.name().ok_or(field("secrets-patch", "containerName"))?,
                patch: self.0.remove("patch").unwrap_or_default(),
            }),
            "grant" => {
                let (container_name, what) = self.grants("grant")?;
                let rights = what.iter().map(|word| word.parse()).collect::<Result<_, _>>()?;
                Request::Grant { container_name, rights }
            }
            "revoke" => {
                let (container_name, what) = self.grants("revoke")?;
                let name = ContainerName::new(&container_name);
                let container_name = name.map_err(|_| field("revoke", "containerName"))?;
                Request::Revoke { container_name, what }
            }
            "http-info" => Request::HttpInfo,
            "version" => Request::Version,
            "shutdown" => Request::Shutdown { drain_engine: self.drain_engine()? },
            "describe" => Request::Describe,
            "containers" => Request::Containers,
            "detach" => {
                Request::Detach { container_name: self.name().ok_or(field("detach", "containerName"))? }
            }
            "read-folder" => Request::ReadFolder { folder: self.folder()? },
            "native" => {
                Request::Native { container_name: self.name().ok_or(field("native", "containerName"))? }
            }
            "events" => Request::Events { container_name: self.filter()? },
            _ => return Err(RequestError::UnknownKind),
        })
    }

    fn name(&mut self) -> Option<String> {
        match self.0.remove("containerName") {
            Some(Value::String(name)) => Some(name),
            _ => None,
        }
    }

    fn folder(&mut self) -> Result<PathBuf, RequestError> {
        match self.0.remove("folder") {
            Some(Value::String(folder)) if Path::new(&folder).is_absolute() => Ok(PathBuf::from(folder)),
            _ => Err(field("read-folder", "folder")),
        }
    }

    fn keep_grants(&self) -> Result<bool, RequestError> {
        match self.0.get("grants") {
            None | Some(Value::Null) => Ok(false),
            Some(Value::String(what)) if what == "keep" => Ok(true),
            Some(_) => Err(field("deregister", "grants")),
        }
    }

    /// Returns a name and at least one right.
    fn grants(&mut self, kind: &'static str) -> Result<(String, Vec<String>), RequestError> {
        let name = self.name().ok_or(field(kind, "containerName"))?;
        let Some(Value::Array(words)) = self.0.remove("what") else { return Err(field(kind, "what")) };
        let words = words.into_iter().map(|word| match word {
            Value::String(word) => Ok(word),
            _ => Err(field(kind, "what")),
        });
        let words: Vec<String> = words.collect::<Result<_, _>>()?;
        if words.is_empty() { Err(field(kind, "what")) } else { Ok((name, words)) }
    }

    fn drain_engine(&self) -> Result<bool, RequestError> {
        match self.0.get("engine") {
            None | Some(Value::Null) => Ok(false),
            Some(Value::String(what)) if what == "drain" => Ok(true),
            Some(_) => Err(field("shutdown", "engine")),
        }
    }

    fn filter(&mut self) -> Result<Option<String>, RequestError> {
        match self.0.remove("containerName") {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(name)) => Ok(Some(name)),
            Some(_) => Err(field("events", "containerName")),
        }
    }
}

fn field(kind: &'static str, field: &'static str) -> RequestError {
    RequestError::Field { kind, field }
}

/// A request.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    /// Register a container.
    Register(Box<Registration>),
    /// Deregister a container. An absent or invalid name matches no registration; this is not an error.
    Deregister {
        /// The container.
        container_name: Option<String>,
        /// Whether the grants of the name are kept.
        keep_grants: bool,
    },
    /// Grant rights to a registered container.
    Grant {
        /// The container.
        container_name: String,
        /// The rights, at least one.
        rights: Vec<Right>,
    },
    /// Revoke rights of a container, registered or not.
    Revoke {
        /// The container.
        container_name: ContainerName,
        /// The rights, at least one, as text: a newer build may have granted rights that this build does not define.
        what: Vec<String>,
    },
    /// List the registrations. Never waits for replay, since it is the readiness probe.
    List,
    /// Return the forwarded ports of a container.
    Status {
        /// The container.
        container_name: String,
    },
    /// Restart a container.
    Restart(Restart),
    /// Replace one object in a file of the container's folder.
    SecretsPatch(SecretsPatch),
    /// Return the HTTP port. Never waits for replay.
    HttpInfo,
    /// Return the daemon's version. Never waits for replay.
    Version,
    /// Stop the daemon. Never waits for replay.
    Shutdown {
        /// Whether the engine stops, too; otherwise it continues for the next daemon.
        drain_engine: bool,
    },
    /// Return the whole state without secrets. Never waits for replay.
    Describe,
    /// Return all containers that Docker lists, and whether they are forwarded. Never waits for replay.
    Containers,
    /// Stop forwarding a container, whatever its labels are.
    Detach {
        /// The container.
        container_name: String,
    },
    /// Reread the files of a folder for each container that is registered with it, since the user approved or revoked them.
    ReadFolder {
        /// The folder, with all links resolved.
        folder: PathBuf,
    },
    /// Keep the connection open for reports of a sandbox's native listeners ([`NativeState`](crate::model::native_state),
    /// one per line).
    Native {
        /// The sandbox.
        container_name: String,
    },
    /// Stream all later events. Never waits for replay.
    Events {
        /// Stream only events of this container.
        container_name: Option<String>,
    },
}

impl Request {
    /// Parses a line without its newline.
    ///
    /// # Errors
    /// [`RequestError`].
    pub fn from_line(line: &[u8]) -> Result<Request, RequestError> {
        Envelope::from_bytes(line)?.into_request()
    }

    /// Returns whether the answer waits until the registrations of the previous daemon are restored (wire specification,
    /// A.7.5).
    pub fn waits_for_replay(&self) -> bool {
        match self {
            Request::Register(_)
            | Request::Deregister { .. }
            | Request::Grant { .. }
            | Request::Revoke { .. }
            | Request::Status { .. }
            | Request::Restart(_)
            | Request::Detach { .. }
            | Request::ReadFolder { .. }
            | Request::Native { .. }
            | Request::SecretsPatch(_) => true,
            Request::List
            | Request::HttpInfo
            | Request::Version
            | Request::Shutdown { .. }
            | Request::Describe
            | Request::Containers
            | Request::Events { .. } => false,
        }
    }
}

/// A restart. The wire specification orders the check whether restarts are enabled before the checks of the fields, so the
/// fields are parsed on demand.
#[derive(Clone, Debug, PartialEq)]
pub struct Restart {
    container_name: Option<String>,
    build: Option<Value>,
}

impl Restart {
    /// Returns whether the image is to be built; false if absent.
    ///
    /// # Errors
    /// [`RequestError::Build`].
    pub fn build(&self) -> Result<bool, RequestError> {
        match self.build {
            None => Ok(false),
            Some(Value::Bool(build)) => Ok(build),
            Some(_) => Err(RequestError::Build),
        }
    }

    /// Returns the name of the container.
    ///
    /// # Errors
    /// [`RequestError::Field`].
    pub fn container_name(&self) -> Result<&str, RequestError> {
        self.container_name.as_deref().ok_or(field("restart", "containerName"))
    }
}

/// A patch of secrets. Its `Debug` output omits the patch.
#[derive(Clone, PartialEq)]
pub struct SecretsPatch {
    /// The container.
    pub container_name: String,
    /// The replacement; null if absent.
    pub patch: Value,
}

impl std::fmt::Debug for SecretsPatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SecretsPatch").field("container_name", &self.container_name).finish_non_exhaustive()
    }
}

/// A response: `{"ok":true,"result"?:…}` or `{"ok":false,"reason":str}`.
#[derive(Clone, Debug, PartialEq)]
pub enum Response {
    /// Success without a result.
    Done,
    /// Success with a result.
    Result(Value),
    /// A refusal with its reason.
    Refused(String),
}

impl Response {
    /// Returns a response with `result`.
    pub fn result(result: impl Serialize) -> Response {
        match serde_json::to_value(result) {
            Ok(value) => Response::Result(value),
            // Only a path that is not UTF-8 causes this, and no request can contain one.
            Err(error) => Response::Refused(format!("the answer cannot be serialised: {error}")),
        }
    }

    /// Returns a refusal with `reason`.
    pub fn refused(reason: impl ToString) -> Response {
        Response::Refused(reason.to_string())
    }

    /// Serialises the response to one line: JSON escapes newlines in strings.
    pub fn to_json(&self) -> String {
        // A map with string keys can always be serialised.
        serde_json::to_string(self).unwrap_or_else(|_| r#"{"ok":false,"reason":"internal error"}"#.to_owned())
    }
}

impl Serialize for Response {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        match self {
            Response::Done => map.serialize_entry("ok", &true)?,
            Response::Result(result) => {
                map.serialize_entry("ok", &true)?;
                map.serialize_entry("result", result)?;
            }
            Response::Refused(reason) => {
                map.serialize_entry("ok", &false)?;
                map.serialize_entry("reason", reason)?;
            }
        }
        map.end()
    }
}

#[cfg(test)]
#[path = "protocol_tests.rs"]
mod tests;
