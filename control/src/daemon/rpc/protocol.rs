//! What a request may say and what is answered (wire specification, A.1.4). Pure.
//!
//! A line becomes an [`Envelope`] (an object with a kind) and then a [`Request`], so that past the door nobody looks at
//! JSON again. The two steps are apart because HTTP decides who is asking in between, by kind and name alone (A.2).
//! A mistake that the wire wants to be told only after others (in `restart`) stays inside the request until it is asked.

use std::path::{Path, PathBuf};
use std::str;

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};
use serde_json::{Map, Value};
use thiserror::Error;

use crate::model::grants::{Right, RightError};
use crate::model::registration::{ContainerName, Registration, RegistrationError};

/// Why a request is none. The texts are the wire's.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RequestError {
    /// Not UTF-8, or not JSON.
    #[error("invalid request json")]
    Json,
    /// JSON, and not an object.
    #[error("invalid request")]
    NotAnObject,
    /// An object whose `kind` is none of ours.
    #[error("unknown request kind")]
    UnknownKind,
    /// A `register` that registers nothing.
    #[error(transparent)]
    Registration(#[from] RegistrationError),
    /// A field of another kind is missing or of a wrong type or value.
    #[error("invalid {kind}: {field}")]
    Field {
        /// The request's kind.
        kind: &'static str,
        /// The field.
        field: &'static str,
    },
    /// A word of `grant` names no right.
    #[error(transparent)]
    Right(#[from] RightError),
    /// `restart` with a `build` that is neither true nor false.
    #[error("restart.build must be a boolean if provided")]
    Build,
}

/// A JSON object that is a request of some kind.
#[derive(Clone, Debug, PartialEq)]
pub struct Envelope(Map<String, Value>);

impl Envelope {
    /// Takes a line without its newline, or the body of an HTTP request.
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

    /// Its kind, if it has one.
    pub fn kind(&self) -> Option<&str> {
        self.0.get("kind").and_then(Value::as_str)
    }

    /// The container it is about, if it names one.
    pub fn container_name(&self) -> Option<&str> {
        self.0.get("containerName").and_then(Value::as_str)
    }

    /// What it asks for. Fields that the kind does not know are ignored; `register` keeps them.
    ///
    /// # Errors
    /// Those of [`RequestError`] that the kind has.
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

    /// A name, and at least one word.
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

/// What is asked for.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    /// Know this container from now on.
    Register(Box<Registration>),
    /// Know it no more. Without a name, or with one that is none, nothing is known, and that is no error.
    Deregister {
        /// Which.
        container_name: Option<String>,
        /// Whether the grants of the name stay.
        keep_grants: bool,
    },
    /// Grant rights to a registered container.
    Grant {
        /// The container.
        container_name: String,
        /// The rights, at least one.
        rights: Vec<Right>,
    },
    /// Take rights away from a container, registered or not.
    Revoke {
        /// The container.
        container_name: ContainerName,
        /// The rights, at least one, as text: a grant of a newer build has a name that this build does not know.
        what: Vec<String>,
    },
    /// Which containers are known. Never waits for replay; it is the readiness probe.
    List,
    /// Which ports of one are forwarded.
    Status {
        /// Which.
        container_name: String,
    },
    /// Stop it and start it.
    Restart(Restart),
    /// Replace one object in a file of its folder.
    SecretsPatch(SecretsPatch),
    /// The HTTP port. Never waits for replay.
    HttpInfo,
    /// The daemon's version. Never waits for replay.
    Version,
    /// End. Never waits for replay.
    Shutdown {
        /// Whether the engine ends, too; else it is left running for the next daemon.
        drain_engine: bool,
    },
    /// Everything there is to show, except what is secret. Never waits for replay.
    Describe,
    /// Every container that Docker has, and whether it is forwarded. Never waits for replay.
    Containers,
    /// Forward a container no longer, whatever its labels say.
    Detach {
        /// Which.
        container_name: String,
    },
    /// Read the files of a folder again for each container that is registered with it: the user approved or revoked them.
    ReadFolder {
        /// The folder, every link resolved.
        folder: PathBuf,
    },
    /// Keep the connection open for reports of a sandbox's native listeners ([`NativeState`](crate::model::native_state), a line
    /// each).
    Native {
        /// Which sandbox.
        container_name: String,
    },
    /// Every event from now on. Never waits for replay.
    Events {
        /// Of this container alone.
        container_name: Option<String>,
    },
}

impl Request {
    /// Takes a line without its newline.
    ///
    /// # Errors
    /// [`RequestError`].
    pub fn from_line(line: &[u8]) -> Result<Request, RequestError> {
        Envelope::from_bytes(line)?.into_request()
    }

    /// Whether the answer is held until the registrations of the last daemon are back (wire specification, A.7.5).
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

/// A restart that was asked for. The wire wants to hear of a restart that cannot be had at all before it hears of a
/// field that is wrong, so the fields are looked at when the time has come.
#[derive(Clone, Debug, PartialEq)]
pub struct Restart {
    container_name: Option<String>,
    build: Option<Value>,
}

impl Restart {
    /// Whether the image is to be built anew; not unless it is asked for.
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

    /// Which container.
    ///
    /// # Errors
    /// [`RequestError::Field`].
    pub fn container_name(&self) -> Result<&str, RequestError> {
        self.container_name.as_deref().ok_or(field("restart", "containerName"))
    }
}

/// A patch of secrets; it never prints.
#[derive(Clone, PartialEq)]
pub struct SecretsPatch {
    /// Which container.
    pub container_name: String,
    /// What to replace; null where the request has none.
    pub patch: Value,
}

impl std::fmt::Debug for SecretsPatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SecretsPatch").field("container_name", &self.container_name).finish_non_exhaustive()
    }
}

/// An answer: `{"ok":true,"result"?:…}` or `{"ok":false,"reason":str}`.
#[derive(Clone, Debug, PartialEq)]
pub enum Response {
    /// It was done, and there is nothing to tell.
    Done,
    /// It was done, and this came of it.
    Result(Value),
    /// It was not done, and this is why.
    Refused(String),
}

impl Response {
    /// The answer that tells `result`.
    pub fn result(result: impl Serialize) -> Response {
        match serde_json::to_value(result) {
            Ok(value) => Response::Result(value),
            // Reached only by a path that is not UTF-8, which no request can carry.
            Err(error) => Response::Refused(format!("the answer cannot be told: {error}")),
        }
    }

    /// The answer that tells `reason`.
    pub fn refused(reason: impl ToString) -> Response {
        Response::Refused(reason.to_string())
    }

    /// As text without a newline anywhere in it: JSON escapes those in strings.
    pub fn to_json(&self) -> String {
        // A map with string keys serialises.
        serde_json::to_string(self).unwrap_or_else(|_| r#"{"ok":false,"reason":"unspeakable"}"#.to_owned())
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
