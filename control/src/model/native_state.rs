//! The native listeners of one sandbox: the sum of a supervisor's events, sent as a whole at each change. Pure.

use std::collections::BTreeMap;
use std::num::NonZeroU16;

use landfall_engine::native::{LISTENERS_MAX, NativeEvent, NativeListener, RelayReason};
use serde::{Deserialize, Serialize};

/// The most relayed ports that are kept. A port beyond them is relayed 250 ms later than the others.
pub const RELAYED_MAX: usize = 512;

/// A port that the supervisor left to the relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Relayed {
    /// The port.
    pub port: NonZeroU16,
    /// The inode of the socket in the sandbox.
    pub inode: u64,
    /// The reason.
    pub reason: RelayReason,
}

/// The listeners of one sandbox.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NativeState {
    /// The listeners on sockets of the host.
    pub listeners: Vec<NativeListener>,
    /// The last decision about each port that was left to the relay.
    pub relayed: Vec<Relayed>,
}

impl NativeState {
    /// Whether it is within the bounds that a supervisor keeps.
    pub fn is_bounded(&self) -> bool {
        self.listeners.len() <= LISTENERS_MAX && self.relayed.len() <= RELAYED_MAX
    }

    /// The native listeners by port.
    pub fn ports(&self) -> BTreeMap<NonZeroU16, Vec<&NativeListener>> {
        let mut ports: BTreeMap<NonZeroU16, Vec<&NativeListener>> = BTreeMap::new();
        for listener in &self.listeners {
            if let Some(port) = NonZeroU16::new(listener.port()) {
                ports.entry(port).or_default().push(listener);
            }
        }
        ports
    }

    /// Applies an event. Returns whether the state has changed.
    pub fn apply(&mut self, event: &NativeEvent) -> bool {
        match event {
            NativeEvent::Opened(listener) => {
                self.relayed.retain(|relayed| relayed.port.get() != listener.port());
                self.listeners.push(listener.clone());
                true
            }
            NativeEvent::Closed { inode } => {
                let before = self.listeners.len();
                self.listeners.retain(|listener| listener.inode != *inode);
                self.listeners.len() != before
            }
            NativeEvent::Relayed { port, inode, reason } => {
                self.relayed.retain(|relayed| relayed.port != *port);
                self.relayed.push(Relayed { port: *port, inode: *inode, reason: *reason });
                if self.relayed.len() > RELAYED_MAX {
                    self.relayed.remove(0);
                }
                true
            }
            NativeEvent::Degraded { .. } | NativeEvent::Ended => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use landfall_engine::native::HostAddress;

    fn listener(address: &str, inode: u64) -> NativeListener {
        let address = HostAddress { address: address.parse().unwrap(), v6_only: false };
        NativeListener { address, inode, stub_inode: inode + 1000, process: 7 }
    }

    #[test]
    fn last_decision_makes_a_port_native_or_relayed() {
        let port = NonZeroU16::new(3000).unwrap();
        let mut state = NativeState::default();
        let relayed = NativeEvent::Relayed { port, inode: 5, reason: RelayReason::Epoll };
        assert!(state.apply(&relayed));
        assert!(state.apply(&NativeEvent::Opened(listener("127.0.0.1:3000", 1))));
        assert!(state.apply(&NativeEvent::Opened(listener("[::1]:3000", 2))));
        assert!(state.relayed.is_empty());
        assert_eq!(state.ports()[&port].len(), 2);
        assert!(state.apply(&NativeEvent::Closed { inode: 1 }));
        assert!(!state.apply(&NativeEvent::Closed { inode: 1 }));
        assert_eq!(state.listeners, [listener("[::1]:3000", 2)]);
        assert!(!state.apply(&NativeEvent::Ended));
    }

    #[test]
    fn relayed_ports_are_bounded() {
        let mut state = NativeState::default();
        for port in (1..=u16::MAX).filter_map(NonZeroU16::new).take(2 * RELAYED_MAX) {
            state.apply(&NativeEvent::Relayed { port, inode: 5, reason: RelayReason::Denied });
        }
        assert!(state.is_bounded());
        assert_eq!(
            state.relayed.last().map(|relayed| usize::from(relayed.port.get())),
            Some(2 * RELAYED_MAX)
        );
    }

    #[test]
    fn state_round_trips_through_json() {
        let mut state = NativeState::default();
        state.apply(&NativeEvent::Opened(listener("[::]:3000", 1)));
        let port = NonZeroU16::new(80).unwrap();
        state.apply(&NativeEvent::Relayed { port, inode: 5, reason: RelayReason::NotOurs });
        let written = serde_json::to_value(&state).unwrap();
        assert_eq!(
            written,
            serde_json::json!({
                "listeners": [{
                    "address": "[::]:3000", "v6Only": false, "inode": 1, "stubInode": 1001, "process": 7
                }],
                "relayed": [{ "port": 80, "inode": 5, "reason": "not-ours" }]
            })
        );
        assert_eq!(serde_json::from_value::<NativeState>(written).unwrap(), state);
    }
}
