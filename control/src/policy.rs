//! Which ports that listen inside may be exposed on the host. Pure: a port goes in, a decision with its reason
//! comes out.
//!
//! A deny list wins over an allow list. Without an allow list every port is allowed but those below 1024: a port
//! down there stands for a service of the machine (ssh, a mail server), so it is exposed only when `--allow`
//! names it, by itself or in a range. `*` means "every port from 1024" and so names nothing.

use std::fmt;
use std::num::NonZeroU16;
use std::ops::RangeInclusive;
use std::str::FromStr;

use thiserror::Error;

pub use wire::{Allow, PortForward, PortForwardError, port_of};

mod wire;

/// The port on which a container answers its daemon; never forwarded, even where it is listed (wire specification, A.0.1
/// and A.5).
pub const CONTAINER_PORT: u16 = 8973;

/// The first port that needs no naming.
pub const FIRST_UNPRIVILEGED: u16 = 1024;

/// A list such as `3000,5173,8000-8100` or `80,*`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortList {
    ranges: Vec<RangeInclusive<u16>>,
    any: bool,
}

impl PortList {
    /// Whether the list names `port` itself or a range around it.
    pub fn names(&self, port: NonZeroU16) -> bool {
        self.ranges.iter().any(|range| range.contains(&port.get()))
    }

    /// Whether the list holds `*`.
    pub fn has_any(&self) -> bool {
        self.any
    }
}

/// What is wrong with a port list.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum PortListError {
    /// Nothing between two commas, or nothing at all.
    #[error("a port is missing in \"{0}\"")]
    Missing(String),
    /// Neither a number from 1 to 65535, nor a range, nor `*`.
    #[error("\"{0}\" is not a port from 1 to 65535")]
    NotAPort(String),
    /// `8100-8000`.
    #[error("the range {0}-{1} ends before it begins")]
    Backwards(u16, u16),
}

impl FromStr for PortList {
    type Err = PortListError;

    fn from_str(text: &str) -> Result<PortList, PortListError> {
        let mut list = PortList::default();
        for item in text.split(',').map(str::trim) {
            if item.is_empty() {
                return Err(PortListError::Missing(text.to_owned()));
            }
            if item == "*" {
                list.any = true;
                continue;
            }
            let (first, last) = match item.split_once('-') {
                Some((first, last)) => (port(first, item)?, port(last, item)?),
                None => (port(item, item)?, port(item, item)?),
            };
            if last < first {
                return Err(PortListError::Backwards(first, last));
            }
            list.ranges.push(first..=last);
        }
        Ok(list)
    }
}

fn port(text: &str, item: &str) -> Result<u16, PortListError> {
    let digits = text.trim();
    // `u16::from_str` takes a plus sign; people do not write one.
    if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(PortListError::NotAPort(item.to_owned()));
    }
    digits.parse::<NonZeroU16>().map(NonZeroU16::get).map_err(|_| PortListError::NotAPort(item.to_owned()))
}

/// The policy of one namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// If there is one, only what it holds may be exposed.
    pub allow: Option<PortList>,
    /// Never exposed.
    pub deny: PortList,
}

/// Whether a port may be exposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It may.
    Allow,
    /// It may not.
    Deny(DenyReason),
}

/// Why a port is not exposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DenyReason {
    /// `--deny` holds it.
    Denied,
    /// There is an `--allow`, and it does not hold it.
    NotAllowed,
    /// Below 1024, and `--allow` does not name it.
    Privileged,
}

impl fmt::Display for DenyReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DenyReason::Denied => "--deny holds it",
            DenyReason::NotAllowed => "--allow does not hold it",
            DenyReason::Privileged => "it is below 1024 and --allow does not name it",
        })
    }
}

impl Policy {
    /// Decides about one port.
    pub fn decide(&self, port: NonZeroU16) -> Decision {
        if self.deny.has_any() || self.deny.names(port) {
            return Decision::Deny(DenyReason::Denied);
        }
        let named = self.allow.as_ref().is_some_and(|allow| allow.names(port));
        if named {
            return Decision::Allow;
        }
        if port.get() < FIRST_UNPRIVILEGED {
            return Decision::Deny(DenyReason::Privileged);
        }
        match &self.allow {
            Some(allow) if !allow.has_any() => Decision::Deny(DenyReason::NotAllowed),
            _ => Decision::Allow,
        }
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

    fn decide(policy: &Policy, port: u16) -> Decision {
        policy.decide(NonZeroU16::new(port).unwrap())
    }

    #[test]
    fn without_lists_everything_from_1024_is_allowed() {
        let policy = policy(None, None);
        assert_eq!(decide(&policy, 1024), Decision::Allow);
        assert_eq!(decide(&policy, 8973), Decision::Allow);
        assert_eq!(decide(&policy, 65535), Decision::Allow);
        assert_eq!(decide(&policy, 1023), Decision::Deny(DenyReason::Privileged));
    }

    #[test]
    fn an_allow_list_excludes_what_it_does_not_hold() {
        let policy = policy(Some("3000, 8000-8100"), None);
        assert_eq!(decide(&policy, 3000), Decision::Allow);
        assert_eq!(decide(&policy, 8100), Decision::Allow);
        assert_eq!(decide(&policy, 8101), Decision::Deny(DenyReason::NotAllowed));
    }

    #[test]
    fn a_port_below_1024_must_be_named() {
        assert_eq!(decide(&policy(Some("80"), None), 80), Decision::Allow);
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
    fn a_bad_list_says_which_part_is_bad() {
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
        fn any_text_is_parsed_or_refused_without_a_panic(text in ".{0,64}") {
            let _ = text.parse::<PortList>();
        }

        #[test]
        fn a_list_names_exactly_its_range(first in 1u16.., length in 0u16..100, probe in 1u16..) {
            let last = first.saturating_add(length);
            let list: PortList = format!("{first}-{last}").parse().unwrap();
            prop_assert_eq!(list.names(NonZeroU16::new(probe).unwrap()), (first..=last).contains(&probe));
        }
    }
}
