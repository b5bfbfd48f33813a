//! Parses the labels of a container that control how it is forwarded. Pure.
//!
//! A label never names a folder of the host, a command or a token. It selects which ports of its own container are exposed,
//! and under which name. Docker copies the labels of an image to each container that is created from it. The host's user may
//! not know the author of the image, so a label that grants is used only if it was set on the container itself
//! ([`ContainerLabels::own`]). A label that restricts is used from either origin:
//!
//! | Label | From the container | From its image |
//! | --- | --- | --- |
//! | `forward` | used | `false` is used, `true` is not |
//! | `name`, `allow` | used | not used |
//! | `deny` | used | used |
//! | `devcontainer.metadata` | used | used, but opens no port below 1024 |

use crate::docker::labels::{ContainerLabels, LabelOrigin, METADATA};
use crate::launch::devcontainer::{self, Devcontainer, Exposure, exposure};
use crate::model::port_policy::{Policy, PortForward, PortList};
use crate::model::registration::{ContainerName, PortNote};

/// Whether the container is forwarded: `true`, `false`, or a common spelling of these.
pub const FORWARD: &str = "dev.landfall.forward";
/// The only ports to expose, in the syntax of `--allow`.
pub const ALLOW: &str = "dev.landfall.allow";
/// Ports never to expose, in the syntax of `--deny`.
pub const DENY: &str = "dev.landfall.deny";
/// The name under which the container is registered, if not its Docker name.
pub const NAME: &str = "dev.landfall.name";
/// Marks a container of the daemon itself, which is never forwarded.
pub const HELPER: &str = "dev.landfall.helper";

/// The maximum length of a label's value in a message, in characters.
const VALUE_CHARS_MAX: usize = 60;

/// The parsed labels of one container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Labels {
    /// Whether the container is to be forwarded; `None` without a usable label.
    pub forward: Option<bool>,
    /// The origin of an unused label `forward=true`, which the container may have from its image.
    pub not_own: Option<LabelOrigin>,
    /// The name under which the container is registered.
    pub name: Option<ContainerName>,
    /// The ports by the container's own labels `allow` and `deny`; `None` without either. An error stands for an invalid
    /// list. No port is forwarded then, since the list may have denied one.
    pub own_policy: Result<Option<PortForward>, String>,
    /// The ports that the image denies. No label of the container and no file of its folder can allow them.
    pub image_deny: PortList,
    /// The label `devcontainer.metadata`.
    pub metadata: Devcontainer,
    /// The ports by all labels.
    pub policy: Option<PortForward>,
    /// Notes about ports for the user.
    pub notes: Vec<PortNote>,
    /// Whether this is a container of the daemon itself.
    pub is_helper: bool,
    /// The reasons why labels are not used, as sentences without the container's name.
    pub warnings: Vec<String>,
}

/// Parses the labels of a container.
pub fn read(labels: &ContainerLabels) -> Labels {
    let mut warnings = Vec::new();
    let (forward, not_own) = forward(labels, &mut warnings);
    let name = own(labels, NAME, &mut warnings).and_then(|value| {
        let name = ContainerName::new(value.trim()).ok();
        if name.is_none() {
            warnings.push(format!("its label {NAME} is \"{}\", which is not a valid name", truncated(value)));
        }
        name
    });
    let metadata = metadata(labels).unwrap_or_else(|why| {
        warnings.push(why);
        Devcontainer::default()
    });
    let (own_policy, image_deny) = match policy(labels, &mut warnings) {
        Ok((own, image_deny)) => (Ok(own), image_deny),
        Err(why) => {
            warnings.push(why.clone());
            (Err(why), PortList::default())
        }
    };
    let own = own_policy.clone().ok().flatten();
    let Exposure { policy, notes, .. } =
        exposure(None, own, metadata.clone(), Devcontainer::default()).denying(&image_deny);
    let is_helper = labels.get(HELPER).is_some();
    Labels { forward, not_own, name, own_policy, image_deny, metadata, policy, notes, is_helper, warnings }
}

fn forward(labels: &ContainerLabels, warnings: &mut Vec<String>) -> (Option<bool>, Option<LabelOrigin>) {
    let Some((value, origin)) = labels.get(FORWARD) else { return (None, None) };
    match (parse_bool(value), origin) {
        (Some(true), LabelOrigin::Image | LabelOrigin::Unknown) => (None, Some(origin)),
        (Some(forward), _) => (Some(forward), None),
        (None, _) => {
            warnings.push(format!("its label {FORWARD} is \"{}\"; it takes true or false", truncated(value)));
            (None, None)
        }
    }
}

/// Returns the value of a label that is used only if it was set on the container itself.
fn own<'a>(labels: &'a ContainerLabels, label: &str, warnings: &mut Vec<String>) -> Option<&'a str> {
    let (value, origin) = labels.get(label)?;
    let why = match origin {
        LabelOrigin::Container => return Some(value),
        LabelOrigin::Image => "comes from the image",
        LabelOrigin::Unknown => "may come from the image, which cannot be inspected",
    };
    warnings.push(format!("its label {label} {why}, and is not used"));
    None
}

/// Parses the label `devcontainer.metadata`. An invalid label is not used, which is safe: no restriction relies on it.
fn metadata(labels: &ContainerLabels) -> Result<Devcontainer, String> {
    let Some((label, origin)) = labels.get(METADATA) else { return Ok(Devcontainer::default()) };
    let read = match origin {
        LabelOrigin::Container => devcontainer::from_metadata(label, labels.of_its_image(METADATA)),
        LabelOrigin::Image | LabelOrigin::Unknown => devcontainer::from_metadata(label, Some(label)),
    };
    read.map_err(|error| format!("its label {METADATA} is not used: {}", truncated(&error.to_string())))
}

/// Returns the ports by the container's own lists, if it has any, and the ports that its image denies.
fn policy(
    labels: &ContainerLabels,
    warnings: &mut Vec<String>,
) -> Result<(Option<PortForward>, PortList), String> {
    let list = |label: &str, value: &str| {
        // An empty list is an error, as it is for the options.
        value.parse::<PortList>().map_err(|error| {
            format!("no port is forwarded, since its label {label} is \"{}\": {error}", truncated(value))
        })
    };
    let allow = own(labels, ALLOW, warnings).map(|value| list(ALLOW, value)).transpose()?;
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

fn parse_bool(value: &str) -> Option<bool> {
    match value.trim().to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" => Some(true),
        "false" | "0" | "no" => Some(false),
        _ => None,
    }
}

fn truncated(value: &str) -> String {
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

    /// Returns the labels of a container whose image has no labels.
    fn labels(pairs: &[(&str, &str)]) -> Labels {
        read(&ContainerLabels::new(map(pairs), ImageLabels::Known(BTreeMap::new())))
    }

    /// Returns the labels of a container that has the labels of its image and its own labels, which override them.
    fn inherited(image: &[(&str, &str)], own: &[(&str, &str)]) -> Labels {
        let mut all = map(image);
        all.extend(map(own));
        read(&ContainerLabels::new(all, ImageLabels::of(map(image))))
    }

    fn policy(read: &Labels) -> Value {
        serde_json::to_value(&read.policy).unwrap()
    }

    #[test]
    fn several_spellings_of_true_and_false_are_accepted() {
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
            assert_eq!((read.forward, read.warnings.len()), (Some(forward), 0), "{value}");
        }
        assert_eq!(labels(&[]).forward, None);
        let read = labels(&[(FORWARD, "maybe")]);
        assert_eq!(read.forward, None);
        assert_eq!(read.warnings, ["its label dev.landfall.forward is \"maybe\"; it takes true or false"]);
    }

    #[test]
    fn lists_have_the_syntax_of_the_options() {
        let policy = |pairs: &[(&str, &str)]| {
            labels(pairs).own_policy.map(|policy| policy.map(|policy| serde_json::to_value(policy).unwrap()))
        };
        assert_eq!(policy(&[]), Ok(None));
        assert_eq!(policy(&[(ALLOW, "80, 3000-3001")]), Ok(Some(json!({"allow": [80, 3000, 3001]}))));
        assert_eq!(policy(&[(DENY, "9229")]), Ok(Some(json!({"allow": "*", "deny": [9229]}))));
        assert_eq!(policy(&[(ALLOW, "3000,9229"), (DENY, "9229")]), Ok(Some(json!({"allow": [3000]}))));
        let text =
            "no port is forwarded, since its label dev.landfall.deny is \"\": a port is missing in \"\"";
        assert_eq!(policy(&[(DENY, "")]), Err(text.to_owned()));
    }

    #[test]
    fn metadata_is_used_where_own_labels_are_absent() {
        let metadata =
            r#"[{"portsAttributes": {"3000": {"label": "shop"}, "9229": {"onAutoForward": "ignore"}}}]"#;
        let read = labels(&[(METADATA, metadata)]);
        assert_eq!(read.notes[0].label.as_deref(), Some("shop"));
        // Metadata is not an own policy: a folder's file can override metadata, but not own labels.
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
        assert_eq!((read.policy, read.warnings.len()), (None, 1));
    }

    #[test]
    fn an_invalid_name_is_reported_and_not_used() {
        assert_eq!(labels(&[(NAME, "shop")]).name.unwrap().as_str(), "shop");
        let read = labels(&[(NAME, "../shop")]);
        assert_eq!(read.name, None);
        assert_eq!(read.warnings, ["its label dev.landfall.name is \"../shop\", which is not a valid name"]);
    }

    #[test]
    fn c23_labels_of_the_image_grant_nothing() {
        let grants = [(FORWARD, "true"), (NAME, "postgres"), (ALLOW, "22,80,443,5432")];
        let read = inherited(&grants, &[]);
        assert_eq!((read.forward, read.not_own), (None, Some(LabelOrigin::Image)));
        assert_eq!((&read.name, &read.own_policy, &read.policy), (&None, &Ok(None), &None));
        assert_eq!(
            read.warnings,
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
            read.warnings,
            [
                "its label dev.landfall.allow may come from the image, which cannot be inspected, and is not used"
            ]
        );
    }

    #[test]
    fn c23_restrictions_of_the_image_cannot_be_lifted() {
        assert_eq!(inherited(&[(FORWARD, "false")], &[]).forward, Some(false));
        let denied = inherited(&[(DENY, "9229")], &[(ALLOW, "3000,9229")]);
        assert_eq!(policy(&denied), json!({"allow": [3000]}));
        // Ports that other labels deny stay denied.
        let others = r#"{"otherPortsAttributes": {"onAutoForward": "ignore"}, "forwardPorts": [3000, 9229]}"#;
        let denied = inherited(&[(DENY, "9229")], &[(METADATA, others)]);
        assert_eq!(policy(&denied), json!({"allow": [3000]}));
        assert_eq!(policy(&inherited(&[(DENY, "*")], &[(ALLOW, "3000")])), json!({"allow": []}));
        assert!(inherited(&[(DENY, "ssh")], &[]).own_policy.is_err());
        // The container's own list replaces the list of the image: Docker keeps one value for each label.
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
    fn a_long_value_is_truncated_in_messages() {
        let read = labels(&[(FORWARD, "ä".repeat(1000).as_str())]);
        assert!(read.warnings[0].chars().count() < 150);
    }
}
