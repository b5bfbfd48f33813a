//! The dial of a client's connection: the loopback families in order, and the meaning of each failure. Pure.

use std::net::SocketAddr;
use std::num::NonZeroU16;

use crate::command::{Family, Reach};
use crate::error::EndReason;
use crate::sys::SocketError;

/// The connect attempts of one connection: first the family of the client's connection, if the server listens there, then
/// the other. Two servers may share a port, one on 127.0.0.1 and one on `::1`; each client gets the one that it requested.
#[derive(Clone, Copy, Debug)]
pub struct Dial {
    family: Family,
    /// The family that has not been tried.
    next: Option<Family>,
    port: NonZeroU16,
}

/// The next step of a dial.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DialStep {
    /// Take a socket of this family and connect it to that address.
    Attempt(Family, SocketAddr),
    /// The server answered.
    Established,
    /// The server cannot be reached; the client is reset.
    Failed(EndReason),
}

impl Dial {
    /// Creates a dial. The first step is [`Dial::attempt`].
    pub fn new(client_family: Family, reach: Reach, port: NonZeroU16) -> Dial {
        // A server that was not seen listening may have started since.
        let reach = if reach.v4 || reach.v6 { reach } else { Reach::UNKNOWN };
        let other = client_family.other();
        let (family, next) = match (reach.has(client_family), reach.has(other)) {
            (true, true) => (client_family, Some(other)),
            (true, false) => (client_family, None),
            (false, _) => (other, None),
        };
        Dial { family, next, port }
    }

    /// Returns the attempt to make now.
    pub fn attempt(&self) -> DialStep {
        DialStep::Attempt(self.family, self.family.loopback(self.port))
    }

    /// Handles the result of the attempt. `own_peer`: the socket connected to itself, because no server listens.
    pub fn on_connected(&mut self, result: Result<(), SocketError>, own_peer: bool) -> DialStep {
        let reason = match result {
            Ok(()) if !own_peer => return DialStep::Established,
            Ok(())
            | Err(
                SocketError::Refused | SocketError::Reset | SocketError::Unreachable | SocketError::Other(_),
            ) => EndReason::Refused,
            Err(SocketError::TimedOut) => EndReason::TimedOut,
            // The kernel returns EADDRNOTAVAIL if every ephemeral port is in use, and also if `::1` is missing, as in a
            // Docker container without IPv6; a server that listens on all addresses then answers on 127.0.0.1 only.
            Err(SocketError::PortsExhausted) if self.family == Family::V6 => EndReason::PortsExhausted,
            // The other family has the same shortage; a client that is reset may try again.
            Err(SocketError::PortsExhausted) => return DialStep::Failed(EndReason::PortsExhausted),
            Err(SocketError::Exhausted) => return DialStep::Failed(EndReason::DescriptorsExhausted),
        };
        match self.next.take() {
            Some(family) => {
                self.family = family;
                self.attempt()
            }
            None => DialStep::Failed(reason),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PORT: NonZeroU16 = NonZeroU16::new(3000).unwrap();

    fn attempt(family: Family) -> DialStep {
        DialStep::Attempt(family, family.loopback(PORT))
    }

    #[test]
    fn the_family_of_the_client_is_dialled_first() {
        for family in Family::ALL {
            let mut dial = Dial::new(family, Reach { v4: true, v6: true }, PORT);
            assert_eq!(dial.attempt(), attempt(family));
            assert_eq!(dial.on_connected(Err(SocketError::Refused), false), attempt(family.other()));
            assert_eq!(
                dial.on_connected(Err(SocketError::Refused), false),
                DialStep::Failed(EndReason::Refused)
            );
        }
    }

    #[test]
    fn a_family_without_a_listener_is_not_dialled() {
        let mut dial = Dial::new(Family::V4, Reach { v4: false, v6: true }, PORT);
        assert_eq!(dial.attempt(), attempt(Family::V6));
        assert_eq!(dial.on_connected(Err(SocketError::Refused), false), DialStep::Failed(EndReason::Refused));
    }

    #[test]
    fn a_connect_to_itself_is_a_refusal() {
        let mut dial = Dial::new(Family::V4, Reach { v4: true, v6: false }, PORT);
        assert_eq!(dial.on_connected(Ok(()), true), DialStep::Failed(EndReason::Refused));
    }

    #[test]
    fn exhausted_ports_are_reported() {
        let mut dial = Dial::new(Family::V4, Reach::UNKNOWN, PORT);
        assert_eq!(
            dial.on_connected(Err(SocketError::PortsExhausted), false),
            DialStep::Failed(EndReason::PortsExhausted)
        );
    }

    #[test]
    fn a_container_without_ipv6_is_reached_over_ipv4() {
        let shortage = Err(SocketError::PortsExhausted);
        let mut dial = Dial::new(Family::V6, Reach { v4: true, v6: true }, PORT);
        assert_eq!(dial.on_connected(shortage, false), attempt(Family::V4));
        assert_eq!(dial.on_connected(Ok(()), false), DialStep::Established);
        let mut dial = Dial::new(Family::V6, Reach { v4: false, v6: true }, PORT);
        assert_eq!(dial.on_connected(shortage, false), DialStep::Failed(EndReason::PortsExhausted));
    }
}
