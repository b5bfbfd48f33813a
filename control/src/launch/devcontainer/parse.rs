//! Converts JSON to a [`Devcontainer`]. Pure.

use std::collections::HashSet;
use std::num::NonZeroU16;
use std::path::PathBuf;

use serde_json::{Map, Value};

use super::{
    Attributes, BYTES_MAX, Build, Devcontainer, DevcontainerError, ENTRIES_MAX, OnAutoForward, Ports, jsonc,
    wire::FROM_IMAGE,
};
use crate::model::port_policy::port_of;

/// The maximum length of a port's label, and of a name in the list of unused fields, in characters.
const WORDS_MAX: usize = 100;
/// The maximum of names in the list of unused fields.
const NOT_USED_MAX: usize = 64;
/// Fields about the file itself or for people, which need no effect.
const NOT_MEANT: [&str; 3] = ["$schema", "id", "name"];

pub(super) fn file(text: &str) -> Result<Devcontainer, DevcontainerError> {
    match json(text)? {
        Value::Object(fields) => object(fields),
        _ => Err(DevcontainerError::NotAnObject { list: false }),
    }
}

pub(super) fn label(text: &str, image: Option<&str>) -> Result<Devcontainer, DevcontainerError> {
    // An unreadable label of the image has no entries that the container's label could repeat.
    let of_image = image.and_then(|text| entries(text).ok()).unwrap_or_default();
    let of_image: HashSet<Value> = of_image.into_iter().collect();
    entries(text)?.into_iter().try_fold(Devcontainer::default(), |all, entry| {
        let is_of_image = of_image.contains(&entry);
        let Value::Object(fields) = entry else { return Err(DevcontainerError::NotAnObject { list: true }) };
        let read = object(fields)?;
        let all = all.merge(if is_of_image { read.of_image() } else { read });
        if all.ports.len() > ENTRIES_MAX {
            return Err(too_many());
        }
        Ok(all)
    })
}

fn entries(text: &str) -> Result<Vec<Value>, DevcontainerError> {
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    Ok(match json(text)? {
        Value::Array(entries) => entries,
        one => vec![one],
    })
}

fn json(text: &str) -> Result<Value, DevcontainerError> {
    if text.len() > BYTES_MAX {
        return Err(DevcontainerError::TooLong);
    }
    jsonc::read(text).map_err(DevcontainerError::NotJson)
}

fn object(mut fields: Map<String, Value>) -> Result<Devcontainer, DevcontainerError> {
    fields.retain(|_, value| !value.is_null());
    let mut read = Devcontainer::default();
    let mut rest = Rest::default();
    match fields.remove("forwardPorts") {
        None => {}
        Some(Value::Array(ports)) => forward_ports(ports, &mut read, &mut rest)?,
        Some(_) => return Err(wrong("forwardPorts", "a list of ports")),
    }
    match fields.remove("portsAttributes") {
        None => {}
        Some(Value::Object(entries)) => ports_attributes(entries, &mut read, &mut rest)?,
        Some(_) => return Err(wrong("portsAttributes", "an object")),
    }
    if let Some(others) = fields.remove("otherPortsAttributes") {
        read.others = Some(attributes("otherPortsAttributes", others, &mut rest)?);
    }
    read.image = text_field(&mut fields, "image")?;
    read.build = build(&mut fields, &mut rest)?;
    fields.retain(|name, _| !NOT_MEANT.contains(&name.as_str()));
    fields.keys().for_each(|name| rest.add(name));
    read.not_used = rest.0;
    Ok(read)
}

fn forward_ports(
    ports: Vec<Value>,
    read: &mut Devcontainer,
    rest: &mut Rest,
) -> Result<(), DevcontainerError> {
    for port in ports {
        match &port {
            // `localhost` in the container is the address from which ports are forwarded.
            Value::String(text) => match port_in(text.strip_prefix("localhost:").unwrap_or(text)) {
                Some(port) => drop(read.forward.insert(port)),
                None => rest.add(&format!("forwardPorts: {text}")),
            },
            _ => {
                let port = port_of(&port);
                read.forward
                    .insert(port.ok_or_else(|| wrong("forwardPorts", "a list of ports from 1 to 65535"))?);
            }
        }
    }
    Ok(())
}

fn ports_attributes(
    entries: Map<String, Value>,
    read: &mut Devcontainer,
    rest: &mut Rest,
) -> Result<(), DevcontainerError> {
    for (key, value) in entries {
        let range = match key.split_once('-') {
            Some((first, last)) => port_in(first).zip(port_in(last)),
            None => port_in(&key).map(|port| (port, port)),
        };
        // Any other key is a regular expression for command lines, or a port of another host.
        let Some((first, last)) = range.filter(|(first, last)| first <= last) else {
            rest.add(&format!("portsAttributes: {key}"));
            continue;
        };
        let declared = attributes(&format!("portsAttributes.{key}"), value, rest)?;
        read.ports.insert(Ports { first, last }, declared);
        if read.ports.len() > ENTRIES_MAX {
            return Err(too_many());
        }
    }
    Ok(())
}

fn attributes(field: &str, value: Value, rest: &mut Rest) -> Result<Attributes, DevcontainerError> {
    let Value::Object(fields) = value else { return Err(wrong(field, "an object")) };
    let mut declared = Attributes::default();
    for (name, value) in fields {
        let path = || format!("{field}.{name}");
        match (name.as_str(), value) {
            (_, Value::Null) | ("requireLocalPort", Value::Bool(_)) => {}
            ("requireLocalPort", _) => return Err(wrong(&path(), "true or false")),
            ("label", Value::String(label)) => {
                let label: String = label.trim().chars().take(WORDS_MAX).collect();
                declared.label = (!label.is_empty()).then_some(label);
            }
            ("label" | "onAutoForward", value) if !value.is_string() => {
                return Err(wrong(&path(), "a string"));
            }
            ("onAutoForward", value) => match on_auto_forward(value.as_str().unwrap_or_default()) {
                Some(what) => declared.on_auto_forward = Some(what),
                None => rest.add(&format!("{}: {}", path(), value.as_str().unwrap_or_default())),
            },
            (FROM_IMAGE, Value::Bool(from_image)) => declared.from_image = from_image,
            _ => rest.add(&path()),
        }
    }
    Ok(declared)
}

fn on_auto_forward(word: &str) -> Option<OnAutoForward> {
    match word {
        "notify" | "openBrowser" | "openBrowserOnce" | "openPreview" => Some(OnAutoForward::Notify),
        "silent" => Some(OnAutoForward::Silent),
        "ignore" => Some(OnAutoForward::Ignore),
        _ => None,
    }
}

/// Parses `build`, or the two older fields `dockerFile` and `context`.
fn build(fields: &mut Map<String, Value>, rest: &mut Rest) -> Result<Option<Build>, DevcontainerError> {
    let (dockerfile, context) = match fields.remove("build") {
        Some(Value::Object(mut fields)) => {
            let dockerfile = text_field(&mut fields, "dockerfile")?;
            let context = text_field(&mut fields, "context")?;
            fields.keys().for_each(|name| rest.add(&format!("build.{name}")));
            (dockerfile, context)
        }
        Some(_) => return Err(wrong("build", "an object")),
        None if fields.contains_key("dockerFile") => {
            (text_field(fields, "dockerFile")?, text_field(fields, "context")?)
        }
        None => (None, None),
    };
    Ok(dockerfile.map(|dockerfile| Build {
        dockerfile: PathBuf::from(dockerfile),
        context: PathBuf::from(context.unwrap_or_else(|| ".".to_owned())),
    }))
}

fn text_field(fields: &mut Map<String, Value>, name: &str) -> Result<Option<String>, DevcontainerError> {
    match fields.remove(name) {
        None => Ok(None),
        Some(Value::String(text)) if !text.is_empty() => Ok(Some(text)),
        Some(_) => Err(wrong(name, "a string that is not empty")),
    }
}

/// Parses a port that consists only of digits.
fn port_in(text: &str) -> Option<NonZeroU16> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

fn wrong(field: &str, wanted: &'static str) -> DevcontainerError {
    DevcontainerError::Field { field: field.to_owned(), wanted }
}

fn too_many() -> DevcontainerError {
    wrong("portsAttributes", "an object of at most 512 entries")
}

/// The names of fields without effect.
#[derive(Default)]
struct Rest(Vec<String>);

impl Rest {
    fn add(&mut self, name: &str) {
        let name: String = name.chars().take(WORDS_MAX).collect();
        if self.0.len() < NOT_USED_MAX && !self.0.contains(&name) {
            self.0.push(name);
        }
    }
}
