//! The ports below 1024 that only the file in the folder opens. They need the user's approval, since a container may be
//! able to write the file. All other entries about ports restrict the policy, or describe how a port is shown. Pure.

use std::num::NonZeroU16;

use serde_json::Map;

use super::{Devcontainer, Exposure, OnAutoForward, Ports};
use crate::model::port_policy::FIRST_UNPRIVILEGED;
use crate::model::registration::FolderPorts;
use crate::model::trust::{ContentDigest, FolderFile};

/// The file in a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DevcontainerFile {
    /// Its parsed content.
    pub devcontainer: Devcontainer,
    /// Its place in the folder.
    pub file: FolderFile,
    /// The digest of its content.
    pub sha256: ContentDigest,
}

/// Applies `expose` to the content of the file. The policy of the result omits the ports below 1024 that only the file
/// opens; they are returned separately, if there are any.
pub fn exposure_of_file(
    file: Option<DevcontainerFile>,
    expose: impl Fn(Devcontainer) -> Exposure,
) -> (Exposure, Option<FolderPorts>) {
    let Some(DevcontainerFile { devcontainer, file, sha256 }) = file else {
        return (expose(Devcontainer::default()), None);
    };
    let without = expose(devcontainer.without_privileged());
    let full = expose(devcontainer);
    let ports = |exposure: &Exposure| exposure.policy.as_ref().map(|policy| policy.privileged_ports());
    let mut privileged = ports(&full).unwrap_or_default();
    let granted = ports(&without).unwrap_or_default();
    privileged.retain(|port| !granted.contains(port));
    let folder_ports =
        (!privileged.is_empty()).then_some(FolderPorts { file, sha256, privileged, unknown: Map::new() });
    (Exposure { policy: without.policy, ..full }, folder_ports)
}

impl Devcontainer {
    /// Returns a copy without the entries that name a port below 1024.
    fn without_privileged(&self) -> Devcontainer {
        let is_privileged = |port: NonZeroU16| port.get() < FIRST_UNPRIVILEGED;
        let mut without = self.clone();
        without.forward.retain(|port| !is_privileged(*port));
        without.ports.retain(|ports: &Ports, attributes| {
            let ignores = attributes.on_auto_forward == Some(OnAutoForward::Ignore);
            ignores || !ports.is_one() || !is_privileged(ports.first)
        });
        without
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::devcontainer::{exposure, from_metadata};
    use crate::model::port_policy::{ControlPorts, Decision, Policy, PortForward};
    use serde_json::json;

    fn file(text: &serde_json::Value) -> Option<DevcontainerFile> {
        let text = text.to_string();
        let sha256 = ContentDigest::of(text.as_bytes());
        let devcontainer = Devcontainer::parse(&text).unwrap();
        Some(DevcontainerFile { devcontainer, file: FolderFile::Devcontainer, sha256 })
    }

    fn split(text: &serde_json::Value) -> (Exposure, Vec<u16>) {
        let (exposure, ports) =
            exposure_of_file(file(text), |declared| exposure(None, None, Devcontainer::default(), declared));
        (exposure, ports.into_iter().flat_map(|ports| ports.privileged).map(NonZeroU16::get).collect())
    }

    fn allows(policy: Option<&PortForward>, port: u16) -> bool {
        let policy = Policy::from(policy.unwrap_or(&PortForward::default()));
        policy.decide(NonZeroU16::new(port).unwrap(), &ControlPorts::default()) == Decision::Allow
    }

    #[test]
    fn ports_below_1024_are_separated_and_the_rest_is_unchanged() {
        let (exposure, ports) = split(&json!({
            "forwardPorts": [80, 3000], "portsAttributes": {"443": {"label": "TLS"}, "22": {"onAutoForward": "ignore"}}
        }));
        assert_eq!(ports, [80, 443]);
        assert!(!allows(exposure.policy.as_ref(), 80) && !allows(exposure.policy.as_ref(), 443));
        assert!(allows(exposure.policy.as_ref(), 3000));
        assert_eq!(exposure.notes[0].label.as_deref(), Some("TLS"));
        let with =
            exposure.policy.unwrap_or_default().with_privileged(&[NonZeroU16::new(80).unwrap()].into());
        assert!(allows(Some(&with), 80) && !allows(Some(&with), 443));
    }

    #[test]
    fn restrictions_need_no_approval() {
        let (exposure, ports) = split(&json!({
            "otherPortsAttributes": {"onAutoForward": "ignore"}, "forwardPorts": [3000], "portsAttributes": {"80": {"onAutoForward": "ignore"}}
        }));
        assert_eq!(ports, [0; 0]);
        assert!(allows(exposure.policy.as_ref(), 3000) && !allows(exposure.policy.as_ref(), 3001));
        let (exposure, ports) = split(&json!({
            "otherPortsAttributes": {"onAutoForward": "ignore"}, "forwardPorts": [80]
        }));
        assert_eq!(ports, [80]);
        assert!(exposure.policy.is_some_and(|policy| policy.is_off()));
    }

    #[test]
    fn a_port_that_another_source_opens_or_closes_needs_no_approval() {
        let text = json!({"forwardPorts": [80]});
        let metadata = from_metadata(&json!({"forwardPorts": [80]}).to_string(), None).unwrap();
        let (_, ports) =
            exposure_of_file(file(&text), |declared| exposure(None, None, metadata.clone(), declared));
        assert_eq!(ports, None);
        let options = PortForward::from_value(&json!({"allow": [3000]})).unwrap();
        let (exposed, ports) = exposure_of_file(file(&text), |declared| {
            exposure(Some(options.clone()), None, Devcontainer::default(), declared)
        });
        assert_eq!((exposed.policy, ports), (Some(options), None));
    }
}
