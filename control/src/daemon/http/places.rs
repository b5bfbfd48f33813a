//! Bounds the connections that are served at a time: for each listener, and for each client of it.
//!
//! Each listener has places of its own, so clients of one listener cannot keep clients of another out: programs on the host's
//! loopback none of the containers, and no container another one that has a socket of its own. All addresses of this machine
//! count as one client, since any program on it may use any of them.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex, PoisonError};

use nix::ifaddrs::getifaddrs;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Stands for every client on this machine.
const THIS_MACHINE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// The places of one listener.
#[derive(Clone, Debug)]
pub(super) struct Places {
    free: Arc<Semaphore>,
    clients: Arc<Mutex<HashMap<IpAddr, usize>>>,
    of_one_max: usize,
}

/// A connection that has its place. Dropping it gives the place back.
#[derive(Debug)]
pub(super) struct ClientPlace {
    places: Places,
    client: IpAddr,
    _place: OwnedSemaphorePermit,
}

impl Places {
    /// So many places, and of them so many for one client at most.
    pub(super) fn new(all_max: usize, of_one_max: usize) -> Places {
        Places { free: Arc::new(Semaphore::new(all_max)), clients: Arc::default(), of_one_max }
    }

    /// Waits for a free place.
    pub(super) async fn free(&self) -> Option<OwnedSemaphorePermit> {
        // The semaphore is never closed.
        Arc::clone(&self.free).acquire_owned().await.ok()
    }

    /// Gives the place to a client, unless it has as many as it may have. A client without an address is this machine.
    pub(super) fn admit(&self, place: OwnedSemaphorePermit, client: Option<IpAddr>) -> Option<ClientPlace> {
        let client = client_of(client.unwrap_or(THIS_MACHINE), is_of_an_interface);
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        let count = clients.entry(client).or_default();
        if *count >= self.of_one_max {
            return None;
        }
        *count += 1;
        Some(ClientPlace { places: self.clone(), client, _place: place })
    }
}

impl Drop for ClientPlace {
    fn drop(&mut self) {
        let mut clients = self.places.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = clients.get_mut(&self.client) {
            *count -= 1;
            if *count == 0 {
                clients.remove(&self.client);
            }
        }
    }
}

/// The client that an address belongs to.
fn client_of(address: IpAddr, is_ours: impl Fn(IpAddr) -> bool) -> IpAddr {
    let address = address.to_canonical();
    if address.is_loopback() || is_ours(address) { THIS_MACHINE } else { address }
}

/// Whether an interface of this machine has this address.
fn is_of_an_interface(address: IpAddr) -> bool {
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
        assert!(is_of_an_interface(THIS_MACHINE));
        assert!(!is_of_an_interface(address("192.0.2.1")));
    }

    #[tokio::test]
    async fn a_client_has_its_share_and_gives_it_back() {
        let places = Places::new(3, 2);
        let enter = async |client: &str| places.admit(places.free().await.unwrap(), Some(address(client)));
        let (first, second) = (enter("192.0.2.2").await, enter("192.0.2.2").await);
        assert!(first.is_some() && second.is_some());
        assert!(enter("192.0.2.2").await.is_none());
        let other = enter("192.0.2.3").await;
        assert!(other.is_some());
        assert_eq!(places.free.available_permits(), 0);
        drop((first, second, other));
        assert_eq!(places.free.available_permits(), 3);
        assert!(places.clients.lock().unwrap().is_empty());
    }
}
