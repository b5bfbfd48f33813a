//! What is said of ports, as the daemon tells its client. It is what a label `devcontainer.metadata` would say, and is
//! read as one. Pure.

use serde_json::{Map, Value, json};

use super::{Attributes, Devcontainer, OnAutoForward, Ports};

/// The field of an entry that is from an image, which the daemon adds for its client. In a file it does no harm: such an entry
/// names no port below 1024.
pub(super) const FROM_IMAGE: &str = "landfall.fromImage";

impl Devcontainer {
    /// What it says of ports, for [`super::from_metadata`]; none where it says nothing of them.
    pub fn ports_as_metadata(&self) -> Option<Value> {
        let mut fields = Map::new();
        if !self.forward.is_empty() {
            fields.insert("forwardPorts".to_owned(), json!(self.forward));
        }
        if !self.ports.is_empty() {
            let entries = self.ports.iter().map(|(ports, said)| (key(*ports), attributes(said)));
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

fn attributes(said: &Attributes) -> Value {
    let word = said.on_auto_forward.map(|what| match what {
        OnAutoForward::Told => "notify",
        OnAutoForward::Silent => "silent",
        OnAutoForward::Ignore => "ignore",
    });
    let mut fields = Map::new();
    fields.extend(said.label.as_ref().map(|label| ("label".to_owned(), label.as_str().into())));
    fields.extend(word.map(|word| ("onAutoForward".to_owned(), word.into())));
    fields.extend(said.from_image.then(|| (FROM_IMAGE.to_owned(), true.into())));
    Value::Object(fields)
}
