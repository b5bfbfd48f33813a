//! Bounds the concurrent connections of each listener, and of each client of a listener.
//!
//! Each listener has its own slots, so the clients of one listener never block the clients of another: programs on the
//! host's loopback cannot block containers, and a container cannot block another container that has its own socket. All
//! addresses of this machine count as one client, since any local program may use any of them.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex, PoisonError};

use nix::ifaddrs::getifaddrs;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Represents all clients on this machine.
const THIS_MACHINE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// The slots of one listener.
#[derive(Clone, Debug)]
pub(super) struct ConnectionSlots {
    free: Arc<Semaphore>,
    clients: Arc<Mutex<HashMap<IpAddr, usize>>>,
    of_one_max: usize,
}

/// The slot of one connection. Dropping it frees the slot.
#[derive(Debug)]
pub(super) struct ClientSlot {
    slots: ConnectionSlots,
    client: IpAddr,
    _permit: OwnedSemaphorePermit,
}

impl ConnectionSlots {
    /// Returns `all_max` slots, of which one client can use `of_one_max`.
    pub(super) fn new(all_max: usize, of_one_max: usize) -> ConnectionSlots {
        ConnectionSlots { free: Arc::new(Semaphore::new(all_max)), clients: Arc::default(), of_one_max }
    }

    /// Waits for a free slot.
    pub(super) async fn free(&self) -> Option<OwnedSemaphorePermit> {
        // The semaphore is never closed.
        Arc::clone(&self.free).acquire_owned().await.ok()
    }

    /// Assigns a slot to a client, unless it has used its share. A client without an address is on this machine.
    pub(super) fn admit(&self, slot: OwnedSemaphorePermit, client: Option<IpAddr>) -> Option<ClientSlot> {
        let client = client_of(client.unwrap_or(THIS_MACHINE), is_local_address);
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        let count = clients.entry(client).or_default();
        if *count >= self.of_one_max {
            return None;
        }
        *count += 1;
        Some(ClientSlot { slots: self.clone(), client, _permit: slot })
    }
}

impl Drop for ClientSlot {
    fn drop(&mut self) {
        let mut clients = self.slots.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = clients.get_mut(&self.client) {
            *count -= 1;
            if *count == 0 {
                clients.remove(&self.client);
            }
        }
    }
}

/// Returns the client to which an address belongs.
fn client_of(address: IpAddr, is_ours: impl Fn(IpAddr) -> bool) -> IpAddr {
    let address = address.to_canonical();
    if address.is_loopback() || is_ours(address) { THIS_MACHINE } else { address }
}

/// Returns whether an interface of this machine has this address.
fn is_local_address(address: IpAddr) -> bool {
    getifaddrs().into_iter().flatten().filter_map(|interface| interface.address).any(|own| {
        let v4 = own.as_sockaddr_in().map(|own| IpAddr::V4(own.ip()));
        v4.or_else(|| own.as_sockaddr_in6().map(|own| IpAddr::V6(own.ip()))) == Some(address)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn all_addresses_of_this_machine_are_one_client() {
        let ours = |own: IpAddr| own == address("192.0.2.1");
        for own in ["127.0.0.1", "127.9.8.7", "::1", "::ffff:127.0.0.2", "192.0.2.1", "::ffff:192.0.2.1"] {
            assert_eq!(client_of(address(own), ours), THIS_MACHINE, "{own}");
        }
        for other in ["192.0.2.2", "2001:db8::1"] {
            assert_eq!(client_of(address(other), ours), address(other));
        }
        assert!(is_local_address(THIS_MACHINE));
        assert!(!is_local_address(address("192.0.2.1")));
    }

    #[tokio::test]
    async fn a_client_is_limited_to_its_share_and_frees_it() {
        let slots = ConnectionSlots::new(3, 2);
        let enter = async |client: &str| slots.admit(slots.free().await.unwrap(), Some(address(client)));
        let (first, second) = (enter("192.0.2.2").await, enter("192.0.2.2").await);
        assert!(first.is_some() && second.is_some());
        assert!(enter("192.0.2.2").await.is_none());
        let other = enter("192.0.2.3").await;
        assert!(other.is_some());
        assert_eq!(slots.free.available_permits(), 0);
        drop((first, second, other));
        assert_eq!(slots.free.available_permits(), 3);
        assert!(slots.clients.lock().unwrap().is_empty());
    }
}
