//! Decides which ports of a container may be exposed, and at which host ports. Pure: the input is a port, the output a
//! decision with its reason. All kinds of forwards use it: watched, announced and reserved ports, and forwards without
//! a daemon.
//!
//! A deny list wins over an allow list. Without an allow list every port from 1024 is allowed. A port below 1024
//! usually belongs to a service of the machine (ssh, a mail server), so it is exposed only if the allow list names it,
//! alone or in a range. `*` means "every port from 1024" and names none.
//!
//! A forward has two ports, which can differ, so there are two decisions. [`Policy::decide`] is about a host port, and
//! about the container's port if both have the same number. [`Policy::decide_target`] is about the container's port
//! alone. A reserved forward needs both: its host port is one that an automatic forward could bind, too. The reference
//! checks the container's port only (wire specification, A.3.8), so a container that is allowed one port could take any
//! host port.
//!
//! No policy allows a port on which landfall itself listens ([`ControlPorts`]).

use std::collections::BTreeSet;
use std::fmt;
use std::num::NonZeroU16;
use std::ops::RangeInclusive;
use std::str::FromStr;

use thiserror::Error;

pub use wire::{Allow, PortForward, PortForwardError, port_of};

mod wire;

/// The port on which a container answers its daemon. It is never forwarded, even if a list names it (wire
/// specification, A.0.1 and A.5).
pub const CONTAINER_PORT: u16 = 8973;

/// The preferred port of the daemon's HTTP endpoint (wire specification, A.2).
pub const HTTP_PORT: u16 = 8974;

/// The default ports of the verbs that listen: `agent`, the daemon, `ui`, `bridge serve` (front and relay), `mesh
/// serve`, and `up --claudemesh`.
const OWN_PORTS: [u16; 7] = [CONTAINER_PORT, HTTP_PORT, 8975, 8788, 8789, 7900, 47823];

/// The host ports that no forward binds, because landfall itself listens there, now or as soon as a verb is used.
/// Programs would take a container that had bound one of them for landfall.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ControlPorts(BTreeSet<NonZeroU16>);

impl ControlPorts {
    /// The default ports, and `bound`: those on which this process listens.
    pub fn new(bound: impl IntoIterator<Item = NonZeroU16>) -> ControlPorts {
        ControlPorts(bound.into_iter().collect())
    }

    /// Whether `port` is one of them.
    pub fn contains(&self, port: NonZeroU16) -> bool {
        OWN_PORTS.contains(&port.get()) || self.0.contains(&port)
    }
}

/// The first port that a list need not name.
pub const FIRST_UNPRIVILEGED: u16 = 1024;

/// A list such as `3000,5173,8000-8100` or `80,*`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortList {
    /// In ascending order and not touching each other: a label can hold thousands, and each port of a container is
    /// looked up.
    ranges: Vec<RangeInclusive<u16>>,
    any: bool,
}

impl PortList {
    fn new(mut ranges: Vec<RangeInclusive<u16>>, any: bool) -> PortList {
        ranges.sort_unstable_by_key(|range| *range.start());
        ranges.dedup_by(|next, before| {
            let touches = u32::from(*next.start()) <= u32::from(*before.end()) + 1;
            if touches {
                *before = *before.start()..=*before.end().max(next.end());
            }
            touches
        });
        PortList { ranges, any }
    }

    /// Whether the list names `port` itself or a range that contains it.
    pub fn names(&self, port: NonZeroU16) -> bool {
        let after = self.ranges.partition_point(|range| *range.start() <= port.get());
        let range = after.checked_sub(1).and_then(|at| self.ranges.get(at));
        range.is_some_and(|range| range.contains(&port.get()))
    }

    /// Whether the list holds `*`.
    pub fn has_any(&self) -> bool {
        self.any
    }

    /// Whether no port is on the list.
    pub fn is_empty(&self) -> bool {
        !self.any && self.ranges.is_empty()
    }

    /// Returns the union of both lists.
    #[must_use]
    pub fn and(&self, other: &PortList) -> PortList {
        PortList::new([&self.ranges[..], &other.ranges].concat(), self.any || other.any)
    }
}

/// Writes the form that [`PortList::from_str`] reads.
impl fmt::Display for PortList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut comma = "";
        for range in &self.ranges {
            match range.start() == range.end() {
                true => write!(f, "{comma}{}", range.start())?,
                false => write!(f, "{comma}{}-{}", range.start(), range.end())?,
            }
            comma = ",";
        }
        if self.any { write!(f, "{comma}*") } else { Ok(()) }
    }
}

/// The reason that a port list is invalid.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum PortListError {
    /// An item is empty.
    #[error("a port is missing in \"{0}\"")]
    Missing(String),
    /// Neither a number from 1 to 65535, nor a range, nor `*`.
    #[error("\"{0}\" is not a port from 1 to 65535")]
    NotAPort(String),
    /// A range such as `8100-8000`.
    #[error("the range {0}-{1} ends before it begins")]
    Backwards(u16, u16),
}

impl FromStr for PortList {
    type Err = PortListError;

    fn from_str(text: &str) -> Result<PortList, PortListError> {
        let (mut ranges, mut any) = (Vec::new(), false);
        for item in text.split(',').map(str::trim) {
            if item.is_empty() {
                return Err(PortListError::Missing(text.to_owned()));
            }
            if item == "*" {
                any = true;
                continue;
            }
            let (first, last) = match item.split_once('-') {
                Some((first, last)) => (port(first, item)?, port(last, item)?),
                None => (port(item, item)?, port(item, item)?),
            };
            if last < first {
                return Err(PortListError::Backwards(first, last));
            }
            ranges.push(first..=last);
        }
        Ok(PortList::new(ranges, any))
    }
}

fn port(text: &str, item: &str) -> Result<u16, PortListError> {
    let digits = text.trim();
    // `u16::from_str` accepts a plus sign.
    if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(PortListError::NotAPort(item.to_owned()));
    }
    digits.parse::<NonZeroU16>().map(NonZeroU16::get).map_err(|_| PortListError::NotAPort(item.to_owned()))
}

/// The policy of one namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// If set, only these ports may be exposed.
    pub allow: Option<PortList>,
    /// These ports are never exposed.
    pub deny: PortList,
}

/// Whether a port may be exposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It may be exposed.
    Allow,
    /// It may not.
    Deny(DenyReason),
}

/// The reason that a port is not exposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DenyReason {
    /// A deny list contains it.
    Denied,
    /// The allow list does not contain it.
    NotAllowed,
    /// Below 1024, and no allow list names it.
    Privileged,
    /// It is [`CONTAINER_PORT`].
    ContainerPort,
    /// It is one of the [`ControlPorts`].
    ControlPort,
}

impl fmt::Display for DenyReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DenyReason::Denied => "the deny list contains it",
            DenyReason::NotAllowed => "the allow list does not contain it",
            DenyReason::Privileged => "it is below 1024 and no allow list names it",
            DenyReason::ContainerPort => "containers answer the daemon on it",
            DenyReason::ControlPort => "landfall itself listens on it",
        })
    }
}

impl Policy {
    /// Decides whether a forward may bind `port` on the host, and lead to the same container port.
    pub fn decide(&self, port: NonZeroU16, control: &ControlPorts) -> Decision {
        match self.decide_target(port) {
            Decision::Allow if control.contains(port) => Decision::Deny(DenyReason::ControlPort),
            Decision::Allow if port.get() < FIRST_UNPRIVILEGED && !self.names(port) => {
                Decision::Deny(DenyReason::Privileged)
            }
            decision => decision,
        }
    }

    /// Decides whether a forward may lead to the container's `port`, whatever its host port is.
    pub fn decide_target(&self, port: NonZeroU16) -> Decision {
        if port.get() == CONTAINER_PORT {
            return Decision::Deny(DenyReason::ContainerPort);
        }
        if self.deny.has_any() || self.deny.names(port) {
            return Decision::Deny(DenyReason::Denied);
        }
        match &self.allow {
            Some(allow) if !allow.has_any() && !allow.names(port) => Decision::Deny(DenyReason::NotAllowed),
            _ => Decision::Allow,
        }
    }

    fn names(&self, port: NonZeroU16) -> bool {
        self.allow.as_ref().is_some_and(|allow| allow.names(port))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn policy(allow: Option<&str>, deny: Option<&str>) -> Policy {
        Policy {
            allow: allow.map(|text| text.parse().unwrap()),
            deny: deny.map(|text| text.parse().unwrap()).unwrap_or_default(),
        }
    }

    fn port(number: u16) -> NonZeroU16 {
        NonZeroU16::new(number).unwrap()
    }

    fn decide(policy: &Policy, number: u16) -> Decision {
        policy.decide(port(number), &ControlPorts::new([port(40000)]))
    }

    #[test]
    fn without_lists_every_port_from_1024_is_allowed() {
        let policy = policy(None, None);
        assert_eq!(decide(&policy, 1024), Decision::Allow);
        assert_eq!(decide(&policy, 65535), Decision::Allow);
        assert_eq!(decide(&policy, 1023), Decision::Deny(DenyReason::Privileged));
    }

    #[test]
    fn allow_list_excludes_all_other_ports() {
        let policy = policy(Some("3000, 8000-8100"), None);
        assert_eq!(decide(&policy, 3000), Decision::Allow);
        assert_eq!(decide(&policy, 8100), Decision::Allow);
        assert_eq!(decide(&policy, 8101), Decision::Deny(DenyReason::NotAllowed));
    }

    #[test]
    fn port_below_1024_must_be_named() {
        assert_eq!(decide(&policy(Some("80"), None), 80), Decision::Allow);
        assert_eq!(decide(&policy(Some("3000"), None), 80), Decision::Deny(DenyReason::NotAllowed));
        assert_eq!(decide(&policy(Some("1-1023"), None), 80), Decision::Allow);
        assert_eq!(decide(&policy(Some("*"), None), 80), Decision::Deny(DenyReason::Privileged));
        assert_eq!(decide(&policy(Some("80,*"), None), 5173), Decision::Allow);
    }

    #[test]
    fn deny_wins_over_allow() {
        let policy = policy(Some("3000,*"), Some("3000"));
        assert_eq!(decide(&policy, 3000), Decision::Deny(DenyReason::Denied));
        assert_eq!(decide(&policy, 3001), Decision::Allow);
    }

    #[test]
    fn own_ports_are_denied_by_every_policy() {
        for number in [8974, 8975, 8788, 8789, 7900, 47823, 40000] {
            let listed = number.to_string();
            for allow in [None, Some("*"), Some(listed.as_str())] {
                let policy = policy(allow, None);
                assert_eq!(decide(&policy, number), Decision::Deny(DenyReason::ControlPort), "{number}");
                assert_eq!(
                    policy.decide_target(port(number)),
                    Decision::Allow,
                    "inside it is the container's"
                );
            }
        }
        let policy = policy(Some("8973"), None);
        assert_eq!(decide(&policy, 8973), Decision::Deny(DenyReason::ContainerPort));
        assert_eq!(policy.decide_target(port(8973)), Decision::Deny(DenyReason::ContainerPort));
    }

    #[test]
    fn container_port_may_be_below_1024() {
        assert_eq!(policy(None, None).decide_target(port(80)), Decision::Allow);
        assert_eq!(
            policy(Some("3000"), None).decide_target(port(80)),
            Decision::Deny(DenyReason::NotAllowed)
        );
        assert_eq!(policy(None, Some("80")).decide_target(port(80)), Decision::Deny(DenyReason::Denied));
    }

    #[test]
    fn error_names_the_invalid_item() {
        let bad = |text: &str| text.parse::<PortList>().unwrap_err().to_string();
        assert_eq!(bad(""), "a port is missing in \"\"");
        assert_eq!(bad("3000,,4"), "a port is missing in \"3000,,4\"");
        assert_eq!(bad("0"), "\"0\" is not a port from 1 to 65535");
        assert_eq!(bad("70000"), "\"70000\" is not a port from 1 to 65535");
        assert_eq!(bad("+80"), "\"+80\" is not a port from 1 to 65535");
        assert_eq!(bad("http"), "\"http\" is not a port from 1 to 65535");
        assert_eq!(bad("80-"), "\"80-\" is not a port from 1 to 65535");
        assert_eq!(bad("9-8"), "the range 9-8 ends before it begins");
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_rejected(text in ".{0,64}") {
            let _ = text.parse::<PortList>();
        }

        #[test]
        fn list_names_exactly_its_ranges(
            ranges in prop::collection::vec((1u16..300, 0u16..20), 1..20),
            probe in 1u16..400,
        ) {
            let ranges: Vec<_> = ranges.iter().map(|(first, length)| (*first, first + length)).collect();
            let text: Vec<String> = ranges.iter().map(|(first, last)| format!("{first}-{last}")).collect();
            let list: PortList = text.join(",").parse().unwrap();
            let named = ranges.iter().any(|(first, last)| (first..=last).contains(&&probe));
            prop_assert_eq!(list.names(port(probe)), named);
            prop_assert!(list.ranges.windows(2).all(|pair| *pair[0].end() + 1 < *pair[1].start()));
            prop_assert_eq!(list.to_string().parse::<PortList>(), Ok(list));
        }
    }
}
