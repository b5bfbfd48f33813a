//! Reads the labels of a container that are about forwarding it. Pure.
//!
//! A label never names a folder of the host, a command or a token: it chooses which ports of its own container are exposed,
//! and under which name. Labels of an image are copied to every container that is made of it, so an image, whose author the
//! host's user may not know, could choose that for each of them. What grants therefore counts only where the container was
//! given it itself ([`ContainerLabels::own`]), and what restricts counts wherever it comes from:
//!
//! | Label | From the container | From its image |
//! | --- | --- | --- |
//! | `forward` | counts | `false` counts, `true` does not |
//! | `name`, `allow` | counts | does not count |
//! | `deny` | counts | counts |
//! | `devcontainer.metadata` | counts | counts, but opens no port below 1024 |

use crate::docker::labels::{ContainerLabels, LabelOrigin, METADATA};
use crate::launch::devcontainer::{self, Devcontainer, Exposure, exposure};
use crate::model::port_policy::{Policy, PortForward, PortList};
use crate::model::registration::{ContainerName, PortNote};

/// Whether it is forwarded: `true`, `false`, and what people write for these.
pub const FORWARD: &str = "dev.landfall.forward";
/// Which ports alone, as `--allow` takes them.
pub const ALLOW: &str = "dev.landfall.allow";
/// Which ports never, as `--deny` takes them.
pub const DENY: &str = "dev.landfall.deny";
/// Under which name, where that is not Docker's.
pub const NAME: &str = "dev.landfall.name";
/// On a container of the daemon's own, which is never forwarded.
pub const HELPER: &str = "dev.landfall.helper";

/// How much of a label's value is repeated to people, in characters.
const VALUE_CHARS_MAX: usize = 60;

/// The labels of one container, read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Labels {
    /// Whether it is to be forwarded, where a label that counts says so.
    pub forward: Option<bool>,
    /// The origin of a label `forward=true` that does not count, because the container may have it from its image.
    pub not_own: Option<LabelOrigin>,
    /// Under which name.
    pub name: Option<ContainerName>,
    /// Which ports, by the container's own labels `allow` and `deny`; none where it has neither. An error stands for a list
    /// that cannot be read: nothing is forwarded then, since the list may have been there to keep a port in.
    pub own_policy: Result<Option<PortForward>, String>,
    /// The ports that its image denies. They stay denied whatever a container's own label or a file of its folder says.
    pub image_deny: PortList,
    /// Its label `devcontainer.metadata`.
    pub metadata: Devcontainer,
    /// Which ports, by all of them.
    pub policy: Option<PortForward>,
    /// What people are told of its ports.
    pub notes: Vec<PortNote>,
    /// Whether it is a container of the daemon's own.
    pub is_ours: bool,
    /// The labels that are not used and why, as sentences without the container's name.
    pub nonsense: Vec<String>,
}

/// Reads them.
pub fn read(labels: &ContainerLabels) -> Labels {
    let mut nonsense = Vec::new();
    let (forward, not_own) = forward(labels, &mut nonsense);
    let name = own(labels, NAME, &mut nonsense).and_then(|value| {
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
    let (own_policy, image_deny) = match policy(labels, &mut nonsense) {
        Ok((own, image_deny)) => (Ok(own), image_deny),
        Err(why) => {
            nonsense.push(why.clone());
            (Err(why), PortList::default())
        }
    };
    let own = own_policy.clone().ok().flatten();
    let Exposure { policy, notes, .. } =
        exposure(None, own, metadata.clone(), Devcontainer::default()).denying(&image_deny);
    let is_ours = labels.get(HELPER).is_some();
    Labels { forward, not_own, name, own_policy, image_deny, metadata, policy, notes, is_ours, nonsense }
}

fn forward(labels: &ContainerLabels, nonsense: &mut Vec<String>) -> (Option<bool>, Option<LabelOrigin>) {
    let Some((value, origin)) = labels.get(FORWARD) else { return (None, None) };
    match (truth(value), origin) {
        (Some(true), LabelOrigin::Image | LabelOrigin::Unknown) => (None, Some(origin)),
        (Some(forward), _) => (Some(forward), None),
        (None, _) => {
            nonsense.push(format!("its label {FORWARD} is \"{}\"; it takes true or false", shown(value)));
            (None, None)
        }
    }
}

/// The value of a label that counts only where the container was given it.
fn own<'a>(labels: &'a ContainerLabels, label: &str, nonsense: &mut Vec<String>) -> Option<&'a str> {
    let (value, origin) = labels.get(label)?;
    let why = match origin {
        LabelOrigin::Container => return Some(value),
        LabelOrigin::Image => "comes from the image",
        LabelOrigin::Unknown => "may come from the image, which cannot be inspected",
    };
    nonsense.push(format!("its label {label} {why}, and is not used"));
    None
}

/// Its label `devcontainer.metadata`. It restricts nothing that anything relies on, so one that cannot be read is left out.
fn metadata(labels: &ContainerLabels) -> Result<Devcontainer, String> {
    let Some((label, origin)) = labels.get(METADATA) else { return Ok(Devcontainer::default()) };
    let read = match origin {
        LabelOrigin::Container => devcontainer::from_metadata(label, labels.of_its_image(METADATA)),
        LabelOrigin::Image | LabelOrigin::Unknown => devcontainer::from_metadata(label, Some(label)),
    };
    read.map_err(|error| format!("its label {METADATA} is not used: {}", shown(&error.to_string())))
}

/// The ports by the container's own lists, if it has any, and those that its image denies.
fn policy(
    labels: &ContainerLabels,
    nonsense: &mut Vec<String>,
) -> Result<(Option<PortForward>, PortList), String> {
    let list = |label: &str, value: &str| {
        // As little as an option that is given empty is it left out.
        value.parse::<PortList>().map_err(|error| {
            format!("nothing of it is forwarded, since its label {label} is \"{}\": {error}", shown(value))
        })
    };
    let allow = own(labels, ALLOW, nonsense).map(|value| list(ALLOW, value)).transpose()?;
    let (deny, image_deny) = match labels.get(DENY) {
        Some((value, LabelOrigin::Container)) => (Some(list(DENY, value)?), PortList::default()),
        Some((value, LabelOrigin::Image | LabelOrigin::Unknown)) => (None, list(DENY, value)?),
        None => (None, PortList::default()),
    };
    if allow.is_none() && deny.is_none() {
        return Ok((None, image_deny));
    }
    let own = PortForward::from(&Policy { allow, deny: deny.unwrap_or_default() });
    Ok((Some(own), image_deny))
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
    use crate::docker::labels::ImageLabels;
    use serde_json::{Value, json};
    use std::collections::BTreeMap;

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    /// The labels of a container whose image has no labels.
    fn labels(pairs: &[(&str, &str)]) -> Labels {
        read(&ContainerLabels::new(map(pairs), ImageLabels::Known(BTreeMap::new())))
    }

    /// Those of an image, and those that the container was given beside or instead of them.
    fn inherited(image: &[(&str, &str)], own: &[(&str, &str)]) -> Labels {
        let mut all = map(image);
        all.extend(map(own));
        read(&ContainerLabels::new(all, ImageLabels::of(map(image))))
    }

    fn policy(read: &Labels) -> Value {
        serde_json::to_value(&read.policy).unwrap()
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
            (&Ok(None), &devcontainer::from_metadata(metadata, None).unwrap())
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
    fn c23_labels_of_the_image_grant_nothing() {
        let grants = [(FORWARD, "true"), (NAME, "postgres"), (ALLOW, "22,80,443,5432")];
        let read = inherited(&grants, &[]);
        assert_eq!((read.forward, read.not_own), (None, Some(LabelOrigin::Image)));
        assert_eq!((&read.name, &read.own_policy, &read.policy), (&None, &Ok(None), &None));
        assert_eq!(
            read.nonsense,
            [
                "its label dev.landfall.name comes from the image, and is not used",
                "its label dev.landfall.allow comes from the image, and is not used"
            ]
        );
        // The container was given the same values: they cannot be distinguished from those of the image.
        assert_eq!(inherited(&grants, &grants), read);
        let own = inherited(&grants, &[(ALLOW, "3000"), (NAME, "shop")]);
        assert_eq!((own.forward, own.name.as_ref().map(ContainerName::as_str)), (None, Some("shop")));
        assert_eq!(policy(&own), json!({"allow": [3000]}));
    }

    #[test]
    fn c23_an_image_that_cannot_be_inspected_grants_nothing() {
        let all = map(&[(FORWARD, "true"), (ALLOW, "22"), (DENY, "9229")]);
        let read = read(&ContainerLabels::new(all, ImageLabels::Unknown));
        assert_eq!((read.forward, read.not_own), (None, Some(LabelOrigin::Unknown)));
        assert_eq!(policy(&read), json!({"allow": "*", "deny": [9229]}));
        assert_eq!(
            read.nonsense,
            [
                "its label dev.landfall.allow may come from the image, which cannot be inspected, and is not used"
            ]
        );
    }

    #[test]
    fn c23_restrictions_of_the_image_hold_whatever_else_is_said() {
        assert_eq!(inherited(&[(FORWARD, "false")], &[]).forward, Some(false));
        let denied = inherited(&[(DENY, "9229")], &[(ALLOW, "3000,9229")]);
        assert_eq!(policy(&denied), json!({"allow": [3000]}));
        // Ports that are denied elsewhere stay denied.
        let others = r#"{"otherPortsAttributes": {"onAutoForward": "ignore"}, "forwardPorts": [3000, 9229]}"#;
        let denied = inherited(&[(DENY, "9229")], &[(METADATA, others)]);
        assert_eq!(policy(&denied), json!({"allow": [3000]}));
        assert_eq!(policy(&inherited(&[(DENY, "*")], &[(ALLOW, "3000")])), json!({"allow": []}));
        assert!(inherited(&[(DENY, "ssh")], &[]).own_policy.is_err());
        // The user's own list replaces that of the image, as Docker has it.
        assert_eq!(policy(&inherited(&[(DENY, "9229")], &[(DENY, "1")])), json!({"allow": "*", "deny": [1]}));
    }

    #[test]
    fn c23_metadata_of_the_image_names_ports_and_opens_none_below_1024() {
        let image = r#"[{"forwardPorts": [22, 5173], "portsAttributes": {"80": {"label": "web"},
            "9229": {"onAutoForward": "ignore"}}}]"#;
        let read = inherited(&[(METADATA, image)], &[]);
        assert_eq!(policy(&read), json!({"allow": "*", "deny": [9229]}));
        assert_eq!(read.notes[0].label.as_deref(), Some("web"));
        // A dev container tool puts the entries of the image before those of the user.
        let both = image.replace("}}}]", r#"}}}, {"forwardPorts": [443]}]"#);
        let read = inherited(&[(METADATA, image)], &[(METADATA, &both)]);
        assert_eq!(policy(&read), json!({"allow": "*", "deny": [9229], "privileged": [443]}));
        let read = inherited(&[], &[(METADATA, &both)]);
        assert_eq!(policy(&read), json!({"allow": "*", "deny": [9229], "privileged": [22, 80, 443]}));
    }

    #[test]
    fn a_long_value_is_repeated_in_part() {
        let read = labels(&[(FORWARD, "ä".repeat(1000).as_str())]);
        assert!(read.nonsense[0].chars().count() < 150);
    }
}
