//! What is told of every container that Docker has: plain values, the same in the daemon and in its client. Pure.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::labels;
use super::machine::{Candidate, NotForwardedReason, Verdict};
use crate::docker::Network;
use crate::docker::labels::LabelOrigin;
use crate::model::grants::GrantFact;
use crate::model::registration::FoundBy;

/// One container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Found {
    /// Docker's name for it.
    pub name: String,
    /// Its id.
    pub id: String,
    /// Its image, as it was named when the container was made.
    pub image: String,
    /// Whether it runs.
    pub running: bool,
    /// Whether it is forwarded, when it runs.
    pub forwarded: Forwarded,
    /// Under which name it is registered, if it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub registered: Option<String>,
    /// What makes it one that is forwarded, where the daemon found it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<FoundBy>,
    /// What its registration may do beyond acting for itself, in force or not.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub grants: Vec<GrantFact>,
    /// Why it is not forwarded, or what there is to know.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// The command that has it forwarded, where a label alone does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Which of its ports its own labels allow, as a registration has it; none where they do not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port_forward: Option<Value>,
    /// Why its own labels let nothing out, where they have a list of ports that cannot be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unreadable: Option<String>,
    /// The ports that its image denies, as its label has them; none where that denies none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_deny: Option<String>,
    /// What its label `devcontainer.metadata` says of its ports, as that label has it; none where it says nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub devcontainer: Option<Value>,
}

/// Whether a container is forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Forwarded {
    /// It is.
    Yes,
    /// It is not.
    No,
    /// It would be, and somebody has turned it off.
    Off,
}

impl Found {
    /// What is told of a container about which this was decided.
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
            Verdict::Not(why) => Some(in_words(why)),
            Verdict::Off(_) => Some("it was detached".to_owned()),
            Verdict::Forwarded(..) | Verdict::Registered(_) => network,
        };
        let is_not_own = matches!(verdict, Verdict::Not(NotForwardedReason::NotOwn(_)));
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

fn in_words(why: &NotForwardedReason) -> String {
    match why {
        NotForwardedReason::Unasked => "nobody asked for it".to_owned(),
        NotForwardedReason::NotOwn(LabelOrigin::Unknown) => {
            "label may come from the image, which cannot be inspected".to_owned()
        }
        NotForwardedReason::NotOwn(_) => "label comes from the image".to_owned(),
        NotForwardedReason::NotRunning => "it will be when it runs".to_owned(),
        NotForwardedReason::Excluded => format!("its label {} says so", labels::FORWARD),
        NotForwardedReason::Ours => "landfall itself uses it".to_owned(),
        NotForwardedReason::Unreadable(why) => why.clone(),
        NotForwardedReason::NameTaken { name, holder } => format!("{holder} the name {name}"),
    }
}
