//! The report about each container that Docker lists: plain values, shared by the daemon and its client. Pure.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::labels;
use super::machine::{Candidate, NotForwardedReason, Verdict};
use crate::docker::Network;
use crate::docker::labels::LabelOrigin;
use crate::model::grants::GrantFact;
use crate::model::registration::FoundBy;

/// The report about one container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Found {
    /// Docker's name.
    pub name: String,
    /// Docker's id.
    pub id: String,
    /// The image, by the name with which the container was created.
    pub image: String,
    /// Whether the container runs.
    pub running: bool,
    /// Whether the container is forwarded when it runs.
    pub forwarded: Forwarded,
    /// The name of its registration, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub registered: Option<String>,
    /// Why the daemon forwards it, if the daemon discovered it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<FoundBy>,
    /// The rights that were granted to its registration, in force or not.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub grants: Vec<GrantFact>,
    /// The reason why it is not forwarded, or another fact about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// A command that forwards it, if only a label of the image requests that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// The ports that its own labels allow, in the form of a registration; `None` without such labels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port_forward: Option<Value>,
    /// The reason why its labels block all ports: its list of ports is invalid.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unreadable: Option<String>,
    /// The ports that its image denies, in the form of the label; `None` if it denies none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_deny: Option<String>,
    /// The ports of its label `devcontainer.metadata`, in the form of that label; `None` without the label.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub devcontainer: Option<Value>,
}

/// Whether a container is forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Forwarded {
    /// Yes.
    Yes,
    /// No.
    No,
    /// It would be forwarded, but the user turned it off.
    Off,
}

impl Found {
    /// Returns the report about a container with this verdict.
    pub fn new(candidate: &Candidate, verdict: &Verdict) -> Found {
        let Candidate { container, labels } = candidate;
        let (forwarded, registered, by) = match verdict {
            Verdict::Forwarded(name, by) => (Forwarded::Yes, Some(name), Some(*by)),
            Verdict::Off(name) => (Forwarded::Off, Some(name), None),
            Verdict::Registered(name) => (Forwarded::Yes, Some(name), None),
            Verdict::Not(_) => (Forwarded::No, None, None),
        };
        let network = match &container.network {
            Network::Own => None,
            Network::Host => {
                Some("it uses the host's network, so its ports answer on the host already".to_owned())
            }
            Network::Shared(_) => Some("it is in the network of another container".to_owned()),
        };
        let why = match verdict {
            Verdict::Not(why) => Some(sentence(why)),
            Verdict::Off(_) => Some("it was detached".to_owned()),
            Verdict::Forwarded(..) | Verdict::Registered(_) => network,
        };
        let is_not_own = matches!(verdict, Verdict::Not(NotForwardedReason::ImageLabel(_)));
        let policy = labels.own_policy.as_ref().ok().and_then(Option::as_ref);
        Found {
            name: container.name.to_string(),
            id: container.id.clone(),
            image: container.image.clone(),
            running: container.running,
            forwarded,
            registered: registered.map(ToString::to_string),
            by,
            grants: Vec::new(),
            why,
            hint: is_not_own.then(|| format!("landfall attach {}", container.name)),
            port_forward: policy.and_then(|policy| serde_json::to_value(policy).ok()),
            unreadable: labels.own_policy.as_ref().err().cloned(),
            image_deny: (!labels.image_deny.is_empty()).then(|| labels.image_deny.to_string()),
            devcontainer: labels.metadata.ports_as_metadata(),
        }
    }
}

fn sentence(why: &NotForwardedReason) -> String {
    match why {
        NotForwardedReason::NotRequested => "no label asks for it".to_owned(),
        NotForwardedReason::ImageLabel(LabelOrigin::Unknown) => {
            "label may come from the image, which cannot be inspected".to_owned()
        }
        NotForwardedReason::ImageLabel(_) => "label comes from the image".to_owned(),
        NotForwardedReason::NotRunning => "starts when the container runs".to_owned(),
        NotForwardedReason::Excluded => format!("its label {} excludes it", labels::FORWARD),
        NotForwardedReason::Helper => "landfall uses it itself".to_owned(),
        NotForwardedReason::InvalidPorts(why) => why.clone(),
        NotForwardedReason::NameTaken { name, holder } => format!("{holder} the name {name}"),
    }
}
