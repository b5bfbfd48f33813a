//! The policy in registrations (wire specification, A.5): `{"allow": "*" | int[], "deny"?: int[]}`. Pure.
//!
//! Landfall adds fields. `privileged` holds ports below 1024 that a user named in addition to `*`. A long run of ports,
//! such as 40000 to 55000, would fill a request by itself, so it is in `allowRanges` or `denyRanges` as a pair of its
//! ends, and the list holds the other ports.

use std::collections::BTreeSet;
use std::num::NonZeroU16;

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};
use serde_json::{Map, Value};
use thiserror::Error;

use super::{FIRST_UNPRIVILEGED, Policy, PortList};

/// The ports of a container that may be exposed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortForward {
    /// The allowed ports.
    pub allow: Allow,
    /// Exceptions from "all ports".
    pub deny: Option<BTreeSet<NonZeroU16>>,
    /// Ports below 1024 that are allowed in addition to all others.
    pub privileged: Option<BTreeSet<NonZeroU16>>,
}

/// The allowed ports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Allow {
    /// `"*"`.
    #[default]
    All,
    /// These and no others.
    Ports(BTreeSet<NonZeroU16>),
}

/// The shortest run of ports that is written as a range.
const RUN: usize = 16;

impl Serialize for PortForward {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut fields = serializer.serialize_map(None)?;
        match &self.allow {
            Allow::All => fields.serialize_entry("allow", "*")?,
            Allow::Ports(ports) => entries(&mut fields, ["allow", "allowRanges"], ports)?,
        }
        if let Some(deny) = &self.deny {
            entries(&mut fields, ["deny", "denyRanges"], deny)?;
        }
        if let Some(privileged) = &self.privileged {
            fields.serialize_entry("privileged", privileged)?;
        }
        fields.end()
    }
}

/// Writes a list of ports, and its long runs as ranges.
fn entries<M: SerializeMap>(
    fields: &mut M,
    [list, ranges]: [&str; 2],
    ports: &BTreeSet<NonZeroU16>,
) -> Result<(), M::Error> {
    let ports: Vec<NonZeroU16> = ports.iter().copied().collect();
    let runs = ports.chunk_by(|one, next| one.checked_add(1) == Some(*next));
    let (long, short): (Vec<_>, Vec<_>) = runs.partition(|run| run.len() >= RUN);
    fields.serialize_entry(list, &short.concat())?;
    let ends: Vec<_> = long.iter().filter_map(|run| Some([run.first()?, run.last()?])).collect();
    if ends.is_empty() { Ok(()) } else { fields.serialize_entry(ranges, &ends) }
}

/// The reason that a policy is invalid.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PortForwardError {
    /// Not an object.
    #[error("portForward must be an object")]
    NotAnObject,
    /// A list is not a list of ports.
    #[error("portForward.{0} must be {expected}", expected = if *.0 == "allow" { "\"*\" or a list of ports from 1 to 65535" } else { "a list of ports from 1 to 65535" })]
    List(&'static str),
    /// The ranges are invalid.
    #[error("portForward.{0} must be a list of pairs of ports, the lower one first")]
    Ranges(&'static str),
    /// `deny` together with a list of allowed ports.
    #[error("portForward.deny is only meaningful when allow is \"*\"")]
    Both,
}

impl PortForward {
    /// Parses the JSON form. An absent `allow` is `"*"`.
    ///
    /// # Errors
    /// [`PortForwardError`].
    pub fn from_value(value: &Value) -> Result<PortForward, PortForwardError> {
        let fields = value.as_object().ok_or(PortForwardError::NotAnObject)?;
        let allow = match fields.get("allow") {
            None | Some(Value::Null) => Allow::All,
            Some(Value::String(all)) if all == "*" => Allow::All,
            Some(list) => Allow::Ports(with_ranges(ports(list, "allow")?, fields, "allowRanges")?),
        };
        let list = |name| match fields.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(list) => ports(list, name).map(Some),
        };
        let deny = list("deny")?.map(|deny| with_ranges(deny, fields, "denyRanges")).transpose()?;
        let privileged = list("privileged")?;
        if matches!(allow, Allow::Ports(_)) && deny.as_ref().is_some_and(|deny| !deny.is_empty()) {
            return Err(PortForwardError::Both);
        }
        Ok(PortForward { allow, deny, privileged })
    }

    /// The ports below 1024 that may be exposed.
    pub fn privileged_ports(&self) -> BTreeSet<NonZeroU16> {
        let listed = match &self.allow {
            Allow::All => self.privileged.as_ref(),
            Allow::Ports(ports) => Some(ports),
        };
        let below = listed.into_iter().flatten().filter(|port| port.get() < FIRST_UNPRIVILEGED);
        let is_denied = |port: &&NonZeroU16| self.deny.as_ref().is_some_and(|deny| deny.contains(port));
        below.filter(|port| !is_denied(port)).copied().collect()
    }

    /// Adds ports below 1024 to the exposed ones; higher ports in `ports` are ignored.
    #[must_use]
    pub fn with_privileged(mut self, ports: &BTreeSet<NonZeroU16>) -> PortForward {
        let privileged = ports.iter().copied().filter(|port| port.get() < FIRST_UNPRIVILEGED);
        match &mut self.allow {
            Allow::All => self.privileged.get_or_insert_default().extend(privileged),
            Allow::Ports(allowed) => allowed.extend(privileged),
        }
        self
    }

    /// Whether no port can be exposed.
    pub fn is_off(&self) -> bool {
        matches!(&self.allow, Allow::Ports(ports) if ports.is_empty())
    }
}

impl From<&PortForward> for Policy {
    fn from(wire: &PortForward) -> Policy {
        let list = |ports: Option<&BTreeSet<NonZeroU16>>, any| {
            let ranges = ports.into_iter().flatten().map(|port| port.get()..=port.get());
            PortList::new(ranges.collect(), any)
        };
        let allow = match &wire.allow {
            Allow::All => list(wire.privileged.as_ref(), true),
            Allow::Ports(ports) => list(Some(ports), false),
        };
        Policy { allow: Some(allow), deny: list(wire.deny.as_ref(), false) }
    }
}

impl From<&Policy> for PortForward {
    fn from(policy: &Policy) -> PortForward {
        let all = |list: &PortList| -> BTreeSet<NonZeroU16> {
            list.ranges.iter().cloned().flatten().filter_map(NonZeroU16::new).collect()
        };
        let some = |ports: BTreeSet<NonZeroU16>| (!ports.is_empty()).then_some(ports);
        if policy.deny.any {
            return PortForward { allow: Allow::Ports(BTreeSet::new()), deny: None, privileged: None };
        }
        let deny = all(&policy.deny);
        match &policy.allow {
            // The wire has no policy with both lists, so denied ports are removed from the allowed ones.
            Some(allow) if !allow.any => {
                let ports = all(allow).difference(&deny).copied().collect();
                PortForward { allow: Allow::Ports(ports), deny: None, privileged: None }
            }
            allow => {
                let named = allow.as_ref().map(all).unwrap_or_default();
                PortForward { allow: Allow::All, deny: some(deny), privileged: some(named) }
            }
        }
    }
}

/// Parses a JSON number as a port. JavaScript has one kind of number, so 5173.0 is a port, too.
pub fn port_of(value: &Value) -> Option<NonZeroU16> {
    if let Some(whole) = value.as_u64() {
        return u16::try_from(whole).ok().and_then(NonZeroU16::new);
    }
    let number = value.as_f64().filter(|number| number.fract() == 0.0 && (1.0..=65535.0).contains(number))?;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is whole and has room")]
    NonZeroU16::new(number as u16)
}

fn ports(list: &Value, name: &'static str) -> Result<BTreeSet<NonZeroU16>, PortForwardError> {
    let list = list.as_array().ok_or(PortForwardError::List(name))?;
    list.iter().map(|port| port_of(port).ok_or(PortForwardError::List(name))).collect()
}

fn with_ranges(
    mut ports: BTreeSet<NonZeroU16>,
    fields: &Map<String, Value>,
    name: &'static str,
) -> Result<BTreeSet<NonZeroU16>, PortForwardError> {
    let Some(ranges) = fields.get(name).filter(|ranges| !ranges.is_null()) else { return Ok(ports) };
    let wrong = PortForwardError::Ranges(name);
    for range in ranges.as_array().ok_or_else(|| wrong.clone())? {
        let ends = match range.as_array().map(Vec::as_slice) {
            Some([first, last]) => port_of(first).zip(port_of(last)),
            _ => None,
        };
        let (first, last) = ends.filter(|(first, last)| first <= last).ok_or_else(|| wrong.clone())?;
        ports.extend((first.get()..=last.get()).filter_map(NonZeroU16::new));
    }
    Ok(ports)
}

#[cfg(test)]
mod tests {
    use super::super::{ControlPorts, Decision, DenyReason};
    use super::*;
    use serde_json::json;

    fn decide(policy: Value, port: u16) -> Decision {
        let wire = PortForward::from_value(&policy).unwrap();
        Policy::from(&wire).decide(NonZeroU16::new(port).unwrap(), &ControlPorts::default())
    }

    #[test]
    fn wire_forms_are_parsed() {
        assert_eq!(PortForward::from_value(&json!({})), Ok(PortForward::default()));
        for whole in [
            json!({"allow": "*"}),
            json!({"allow": "*", "deny": [9229]}),
            json!({"allow": [3000, 5173]}),
            json!({"allow": []}),
            json!({"allow": "*", "privileged": [80]}),
        ] {
            let read = PortForward::from_value(&whole).unwrap();
            assert_eq!(serde_json::to_value(read).unwrap(), whole);
        }
        assert_eq!(
            PortForward::from_value(&json!({"allow": [5173.0]})),
            PortForward::from_value(&json!({"allow": [5173]}))
        );
        for (wrong, error) in [
            (json!("*"), "portForward must be an object"),
            (json!({"allow": "all"}), "portForward.allow must be \"*\" or a list of ports from 1 to 65535"),
            (json!({"allow": [99999]}), "portForward.allow must be \"*\" or a list of ports from 1 to 65535"),
            (json!({"deny": [0]}), "portForward.deny must be a list of ports from 1 to 65535"),
            (json!({"allow": [1], "deny": [2]}), "portForward.deny is only meaningful when allow is \"*\""),
        ] {
            assert_eq!(PortForward::from_value(&wrong).unwrap_err().to_string(), error);
        }
        assert!(PortForward::from_value(&json!({"allow": [1], "deny": []})).is_ok());
    }

    #[test]
    fn long_run_of_ports_is_written_as_a_range() {
        let policy = json!({"allow": "*", "deny": [80, 9229], "denyRanges": [[3000, 3015], [40000, 65535]]});
        let read = PortForward::from_value(&policy).unwrap();
        assert_eq!(read.deny.as_ref().unwrap().len(), 2 + 16 + 25_536);
        assert_eq!(serde_json::to_value(&read).unwrap(), policy);
        let policy = json!({"allow": [80], "allowRanges": [[1024, 65535]]});
        let read = PortForward::from_value(&policy).unwrap();
        assert!(!read.is_off());
        assert_eq!(serde_json::to_value(&read).unwrap(), policy);
        for wrong in [json!(5), json!([5]), json!([[2, 1]]), json!([[1, 2, 3]]), json!([[0, 1]])] {
            let error = PortForward::from_value(&json!({"allow": [], "allowRanges": wrong})).unwrap_err();
            assert_eq!(
                error.to_string(),
                "portForward.allowRanges must be a list of pairs of ports, the lower one first"
            );
        }
    }

    #[test]
    fn wire_policy_decides_like_the_command_line() {
        assert_eq!(decide(json!({"allow": "*"}), 5173), Decision::Allow);
        assert_eq!(decide(json!({"allow": "*"}), 65535), Decision::Allow);
        assert_eq!(decide(json!({"allow": "*"}), 80), Decision::Deny(DenyReason::Privileged));
        assert_eq!(decide(json!({"allow": [80]}), 80), Decision::Allow);
        assert_eq!(decide(json!({"allow": "*", "privileged": [80]}), 80), Decision::Allow);
        assert_eq!(decide(json!({"allow": "*", "deny": [9229]}), 9229), Decision::Deny(DenyReason::Denied));
        assert_eq!(decide(json!({"allow": [3000]}), 8080), Decision::Deny(DenyReason::NotAllowed));
        assert_eq!(decide(json!({"allow": []}), 8080), Decision::Deny(DenyReason::NotAllowed));
    }

    #[test]
    fn command_line_policy_survives_the_wire() {
        let policy = |allow: Option<&str>, deny: &str| Policy {
            allow: allow.map(|list| list.parse().unwrap()),
            deny: if deny.is_empty() { PortList::default() } else { deny.parse().unwrap() },
        };
        for original in [
            policy(None, ""),
            policy(Some("80,*"), "9229"),
            policy(Some("8000-8010"), "8005"),
            policy(Some("*"), "*"),
        ] {
            let sent = serde_json::to_value(PortForward::from(&original)).unwrap();
            let arrived = Policy::from(&PortForward::from_value(&sent).unwrap());
            for port in [1, 79, 80, 81, 1023, 1024, 8000, 8005, 8010, 8011, 9229, 65535] {
                let port = NonZeroU16::new(port).unwrap();
                let allows =
                    |policy: &Policy| policy.decide(port, &ControlPorts::default()) == Decision::Allow;
                assert_eq!(allows(&original), allows(&arrived), "port {port} of {original:?}");
            }
        }
    }
}
