//! What a container's labels say about forwarding it. Pure.
//!
//! Labels come from whoever made the container or its image, so they choose what of that container is exposed and under
//! which name, and nothing else: no folder of the host, no command, no token.

use std::collections::BTreeMap;

use crate::devcontainer::{self, Devcontainer, Exposure, exposure};
use crate::policy::{Policy, PortForward, PortList};
use crate::registration::model::{ContainerName, PortNote};

/// Whether it is forwarded: `true`, `false`, and what people write for these.
pub const FORWARD: &str = "dev.landfall.forward";
/// Which ports alone, as `--allow` takes them.
pub const ALLOW: &str = "dev.landfall.allow";
/// Which ports never, as `--deny` takes them.
pub const DENY: &str = "dev.landfall.deny";
/// Under which name, where that is not Docker's.
pub const NAME: &str = "dev.landfall.name";
/// What its `devcontainer.json` said when its image was made; weaker than the labels above.
pub const METADATA: &str = "devcontainer.metadata";
/// On a container of the daemon's own, which is never forwarded.
pub const HELPER: &str = "dev.landfall.helper";

/// How much of a label's value is repeated to people, in characters.
const VALUE_CHARS_MAX: usize = 60;

/// What the labels of one container say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Labels {
    /// Whether it is to be forwarded, where they say so.
    pub forward: Option<bool>,
    /// Under which name.
    pub name: Option<ContainerName>,
    /// Which ports, by our own labels alone; none where they do not say. An error stands for a list that cannot be read:
    /// what it was to keep in is not let out for that.
    pub own_policy: Result<Option<PortForward>, String>,
    /// What the image's `devcontainer.json` said.
    pub metadata: Devcontainer,
    /// Which ports, by all of them.
    pub policy: Option<PortForward>,
    /// What people are told of its ports.
    pub notes: Vec<PortNote>,
    /// Whether it is a container of the daemon's own.
    pub is_ours: bool,
    /// What makes no sense in them, as sentences without the container's name.
    pub nonsense: Vec<String>,
}

/// Reads them.
pub fn read(labels: &BTreeMap<String, String>) -> Labels {
    let mut nonsense = Vec::new();
    let forward = labels.get(FORWARD).and_then(|value| {
        let said = truth(value);
        if said.is_none() {
            nonsense.push(format!("its label {FORWARD} is \"{}\"; it takes true or false", shown(value)));
        }
        said
    });
    let name = labels.get(NAME).and_then(|value| {
        let name = ContainerName::new(value.trim()).ok();
        if name.is_none() {
            nonsense.push(format!("its label {NAME} is \"{}\", which is no name", shown(value)));
        }
        name
    });
    let metadata = metadata(labels).unwrap_or_else(|why| {
        nonsense.push(why);
        Devcontainer::default()
    });
    let own_policy = policy(labels);
    if let Err(why) = &own_policy {
        nonsense.push(why.clone());
    }
    let own = own_policy.clone().ok().flatten();
    let Exposure { policy, notes, .. } = exposure(None, own, metadata.clone(), Devcontainer::default());
    let is_ours = labels.contains_key(HELPER);
    Labels { forward, name, own_policy, metadata, policy, notes, is_ours, nonsense }
}

/// What the image's `devcontainer.json` said. It narrows nothing that somebody relies on, so without it all goes on.
fn metadata(labels: &BTreeMap<String, String>) -> Result<Devcontainer, String> {
    let Some(label) = labels.get(METADATA) else { return Ok(Devcontainer::default()) };
    devcontainer::from_metadata(label)
        .map_err(|error| format!("its label {METADATA} is not used: {}", shown(&error.to_string())))
}

/// Which ports the labels allow, where they say so.
fn policy(labels: &BTreeMap<String, String>) -> Result<Option<PortForward>, String> {
    let list = |label: &str| match labels.get(label) {
        None => Ok(None),
        // As little as an option that is given empty is it left out.
        Some(value) => value.parse::<PortList>().map(Some).map_err(|error| {
            format!("nothing of it is forwarded, since its label {label} is \"{}\": {error}", shown(value))
        }),
    };
    let (allow, deny) = (list(ALLOW)?, list(DENY)?);
    if allow.is_none() && deny.is_none() {
        return Ok(None);
    }
    Ok(Some(PortForward::from(&Policy { allow, deny: deny.unwrap_or_default() })))
}

fn truth(value: &str) -> Option<bool> {
    match value.trim().to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" => Some(true),
        "false" | "0" | "no" => Some(false),
        _ => None,
    }
}

fn shown(value: &str) -> String {
    match value.char_indices().nth(VALUE_CHARS_MAX) {
        None => value.to_owned(),
        Some((end, _)) => format!("{}…", value.get(..end).unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        read(&pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect())
    }

    #[test]
    fn people_write_true_and_false_in_several_ways() {
        for (value, forward) in [
            ("true", true),
            ("1", true),
            ("yes", true),
            (" True ", true),
            ("false", false),
            ("0", false),
            ("no", false),
        ] {
            let read = labels(&[(FORWARD, value)]);
            assert_eq!((read.forward, read.nonsense.len()), (Some(forward), 0), "{value}");
        }
        assert_eq!(labels(&[]).forward, None);
        let read = labels(&[(FORWARD, "maybe")]);
        assert_eq!(read.forward, None);
        assert_eq!(read.nonsense, ["its label dev.landfall.forward is \"maybe\"; it takes true or false"]);
    }

    #[test]
    fn lists_are_those_of_the_command_line() {
        let policy = |pairs: &[(&str, &str)]| {
            labels(pairs).own_policy.map(|policy| policy.map(|policy| serde_json::to_value(policy).unwrap()))
        };
        assert_eq!(policy(&[]), Ok(None));
        assert_eq!(policy(&[(ALLOW, "80, 3000-3001")]), Ok(Some(json!({"allow": [80, 3000, 3001]}))));
        assert_eq!(policy(&[(DENY, "9229")]), Ok(Some(json!({"allow": "*", "deny": [9229]}))));
        assert_eq!(policy(&[(ALLOW, "3000,9229"), (DENY, "9229")]), Ok(Some(json!({"allow": [3000]}))));
        let text = "nothing of it is forwarded, since its label dev.landfall.deny is \"\": a port is missing in \"\"";
        assert_eq!(policy(&[(DENY, "")]), Err(text.to_owned()));
    }

    #[test]
    fn what_an_image_says_counts_where_our_own_labels_say_nothing() {
        let metadata =
            r#"[{"portsAttributes": {"3000": {"label": "shop"}, "9229": {"onAutoForward": "ignore"}}}]"#;
        let read = labels(&[(METADATA, metadata)]);
        assert_eq!(read.notes[0].label.as_deref(), Some("shop"));
        // Its word is not ours: a folder's file goes on top of it, and not on top of ours.
        assert_eq!(
            (&read.own_policy, &read.metadata),
            (&Ok(None), &devcontainer::from_metadata(metadata).unwrap())
        );
        let policy = |read: Labels| serde_json::to_value(read.policy.unwrap()).unwrap();
        assert_eq!(policy(read), json!({"allow": "*", "deny": [9229]}));
        let read = labels(&[(METADATA, metadata), (ALLOW, "9229")]);
        assert_eq!(read.notes[0].label.as_deref(), Some("shop"));
        assert_eq!(read.own_policy.clone().unwrap(), read.policy);
        assert_eq!(policy(read), json!({"allow": [9229]}));
        let read = labels(&[(METADATA, "{")]);
        assert_eq!((read.policy, read.nonsense.len()), (None, 1));
    }

    #[test]
    fn a_name_that_is_none_is_told_and_not_used() {
        assert_eq!(labels(&[(NAME, "shop")]).name.unwrap().as_str(), "shop");
        let read = labels(&[(NAME, "../shop")]);
        assert_eq!(read.name, None);
        assert_eq!(read.nonsense, ["its label dev.landfall.name is \"../shop\", which is no name"]);
    }

    #[test]
    fn a_long_value_is_repeated_in_part() {
        let read = labels(&[(FORWARD, "ä".repeat(1000).as_str())]);
        assert!(read.nonsense[0].chars().count() < 150);
    }
}
