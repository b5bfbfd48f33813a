//! The address at which containers reach the host: the gateway of the network `bridge`.
//!
//! Containers send their bearer token to `host.docker.internal`, which is this address, at the daemon's HTTP port. The
//! daemon may learn the address late, and another user may listen there first. The daemon therefore listens as soon as it
//! knows the address, retries without end, and reports the holder of the port until then.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

use super::{Http, HttpError};
use crate::docker::Docker;
use crate::error::chain;
use crate::model::event::Event;
use crate::sys::held_port::HeldPort;
use crate::sys::journal::Journal;
use crate::sys::users::is_ours;

/// The delay before the next attempt; it doubles from the minimum to the maximum.
const RETRY_MIN: Duration = Duration::from_millis(250);
const RETRY_MAX: Duration = Duration::from_secs(5);

/// Whether containers reach the daemon at the gateway.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case", rename_all_fields = "camelCase")]
pub enum Gateway {
    /// The daemon listens there.
    Listening {
        /// The gateway's address.
        address: IpAddr,
    },
    /// Another process listens there, and receives the requests of containers.
    Held {
        /// The port and its holder.
        #[serde(flatten)]
        by: HeldPort,
    },
    /// The address is not an address of this host: the Docker engine is remote, or its bridge is down.
    Elsewhere {
        /// The gateway's address.
        address: IpAddr,
    },
    /// Listening failed for another reason.
    Failed {
        /// The gateway's address.
        address: IpAddr,
        /// The error.
        reason: String,
    },
}

/// Facts about the endpoint in addition to its port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HttpFacts {
    /// The holder of the preferred port, if the daemon uses another port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fallback: Option<HeldPort>,
    /// The gateway, if it is known and the daemon is to listen there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<Gateway>,
}

/// The current facts. Clones share one state.
#[derive(Clone, Debug, Default)]
pub struct SharedFacts(Arc<Mutex<HttpFacts>>);

impl SharedFacts {
    /// Returns a copy.
    pub fn now(&self) -> HttpFacts {
        self.lock().clone()
    }

    pub(super) fn set_fallback(&self, fallback: Option<HeldPort>) {
        self.lock().fallback = fallback;
    }

    /// Sets the gateway. Returns whether it changed.
    fn set_gateway(&self, gateway: &Gateway) -> bool {
        let mut facts = self.lock();
        let is_changed = facts.gateway.as_ref() != Some(gateway);
        facts.gateway = Some(gateway.clone());
        is_changed
    }

    fn lock(&self) -> MutexGuard<'_, HttpFacts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps the endpoint listening on Docker's gateway. `changed` signals that the gateway may have changed.
pub async fn keep_listening(http: Http, docker: Docker, changed: Arc<Notify>) {
    let mut pause = RETRY_MIN;
    loop {
        // A signal during this call is not lost: `Notify` stores it for the next wait.
        let is_listening = match docker.bridge_gateway().await {
            Some(address) => listen(&http, address).await,
            None => false,
        };
        if is_listening {
            changed.notified().await;
            pause = RETRY_MIN;
            continue;
        }
        if timeout(pause, changed.notified()).await.is_ok() {
            // Merges several signals, and bounds the rate of attempts.
            sleep(RETRY_MIN).await;
        }
        pause = (2 * pause).min(RETRY_MAX);
    }
}

/// Listens on the preferred port in addition, on each address where it becomes free, until it has all addresses: containers
/// from before this daemon's start send their tokens there. Acts only if another user holds the port, since a port of this
/// user may belong to the daemon of another home.
pub async fn reclaim(http: Http) {
    let mut taken = BTreeSet::new();
    while let Some(held) =
        http.facts().now().fallback.filter(|held| held.uid.is_some_and(|uid| !is_ours(uid)))
    {
        let mut still_held = None;
        for address in http.addresses() {
            if taken.contains(&address) {
                continue;
            }
            match http.listen_at(SocketAddr::new(address, held.port)).await {
                Ok(()) => drop(taken.insert(address)),
                Err(_) => still_held = Some(HeldPort::of_taken(address, held.port).await),
            }
        }
        http.facts().set_fallback(still_held);
        sleep(RETRY_MAX).await;
    }
}

/// Makes one attempt. Returns whether the daemon listens there.
async fn listen(http: &Http, address: IpAddr) -> bool {
    let gateway = match http.listen_also(address).await {
        Ok(()) => Gateway::Listening { address },
        Err(HttpError::Listen { source, .. }) if source.kind() == io::ErrorKind::AddrInUse => {
            Gateway::Held { by: HeldPort::of_taken(address, http.port().get()).await }
        }
        Err(HttpError::Listen { source, .. }) if source.kind() == io::ErrorKind::AddrNotAvailable => {
            Gateway::Elsewhere { address }
        }
        Err(error) => Gateway::Failed { address, reason: chain(&error) },
    };
    if http.facts().set_gateway(&gateway) {
        report(&gateway, http.journal());
    }
    matches!(gateway, Gateway::Listening { .. })
}

fn report(gateway: &Gateway, journal: &Journal) {
    let text = match gateway {
        // `DaemonHttpListening` reports this already.
        Gateway::Listening { .. } => return,
        Gateway::Elsewhere { address } => {
            format!(
                "containers cannot reach the daemon over HTTP: {address} is not an address of this machine"
            )
        }
        Gateway::Held { by } => format!("{by}: containers send their tokens there"),
        Gateway::Failed { reason, .. } => format!("containers cannot reach the daemon over HTTP: {reason}"),
    };
    journal.record(&Event::Notice { text });
}
