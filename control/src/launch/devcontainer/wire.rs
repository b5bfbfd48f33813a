//! The part of a `devcontainer.json` about ports, as the daemon sends it to its client: in the format of a label
//! `devcontainer.metadata`, and parsed as one. Pure.

use serde_json::{Map, Value, json};

use super::{Attributes, Devcontainer, OnAutoForward, Ports};

/// The field that marks an entry of an image, which the daemon adds for its client. In a file it is harmless: such an
/// entry names no port below 1024.
pub(super) const FROM_IMAGE: &str = "landfall.fromImage";

impl Devcontainer {
    /// Returns the fields about ports, for [`super::from_metadata`]; `None` if there are none.
    pub fn ports_as_metadata(&self) -> Option<Value> {
        let mut fields = Map::new();
        if !self.forward.is_empty() {
            fields.insert("forwardPorts".to_owned(), json!(self.forward));
        }
        if !self.ports.is_empty() {
            let entries = self.ports.iter().map(|(ports, declared)| (key(*ports), attributes(declared)));
            fields.insert("portsAttributes".to_owned(), entries.collect());
        }
        if let Some(others) = &self.others {
            fields.insert("otherPortsAttributes".to_owned(), attributes(others));
        }
        (!fields.is_empty()).then_some(Value::Object(fields))
    }
}

fn key(ports: Ports) -> String {
    match ports.is_one() {
        true => ports.first.to_string(),
        false => format!("{}-{}", ports.first, ports.last),
    }
}

fn attributes(declared: &Attributes) -> Value {
    let word = declared.on_auto_forward.map(|what| match what {
        OnAutoForward::Notify => "notify",
        OnAutoForward::Silent => "silent",
        OnAutoForward::Ignore => "ignore",
    });
    let mut fields = Map::new();
    fields.extend(declared.label.as_ref().map(|label| ("label".to_owned(), label.as_str().into())));
    fields.extend(word.map(|word| ("onAutoForward".to_owned(), word.into())));
    fields.extend(declared.from_image.then(|| (FROM_IMAGE.to_owned(), true.into())));
    Value::Object(fields)
}
