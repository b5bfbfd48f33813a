//! The address by which containers reach the host: the gateway of the network `bridge`.
//!
//! Containers send their Bearer token to `host.docker.internal`, which is this address, at the daemon's HTTP port. The daemon
//! may learn the address late, and another user may listen there before it. So the daemon listens as soon as it knows the
//! address, tries again for ever, and reports who holds the port until then.

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

/// How long to wait before the next attempt: doubling between these two.
const AGAIN_MIN: Duration = Duration::from_millis(250);
const AGAIN_MAX: Duration = Duration::from_secs(5);

/// Whether containers reach the daemon at the gateway.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case", rename_all_fields = "camelCase")]
pub enum Gateway {
    /// The daemon listens there.
    Listening {
        /// The gateway.
        address: IpAddr,
    },
    /// Another process does, and receives what containers send.
    Held {
        /// Which, and where.
        #[serde(flatten)]
        by: HeldPort,
    },
    /// The address belongs to another machine: the engine runs there, or its bridge is down.
    Elsewhere {
        /// The gateway.
        address: IpAddr,
    },
    /// It cannot be listened on.
    Failed {
        /// The gateway.
        address: IpAddr,
        /// Why.
        reason: String,
    },
}

/// What is known of the endpoint beside its port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HttpFacts {
    /// The holder of the preferred port, if the daemon got another port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fallback: Option<HeldPort>,
    /// The gateway, if it is known and the daemon is to listen there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<Gateway>,
}

/// The facts as they are now; clones are the same ones.
#[derive(Clone, Debug, Default)]
pub struct SharedFacts(Arc<Mutex<HttpFacts>>);

impl SharedFacts {
    /// A copy.
    pub fn now(&self) -> HttpFacts {
        self.lock().clone()
    }

    pub(super) fn set_fallback(&self, fallback: Option<HeldPort>) {
        self.lock().fallback = fallback;
    }

    /// Returns whether it is news.
    fn set_gateway(&self, gateway: &Gateway) -> bool {
        let mut facts = self.lock();
        let is_news = facts.gateway.as_ref() != Some(gateway);
        facts.gateway = Some(gateway.clone());
        is_news
    }

    fn lock(&self) -> MutexGuard<'_, HttpFacts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Listens on Docker's gateway, for as long as the endpoint is open. `changed` says that Docker may have another one.
pub async fn keep(http: Http, docker: Docker, changed: Arc<Notify>) {
    let mut pause = AGAIN_MIN;
    loop {
        // Within this time nothing is missed that happens to Docker: a change is kept until it is waited for.
        let is_settled = match docker.bridge_gateway().await {
            Some(address) => listen(&http, address).await,
            None => false,
        };
        if is_settled {
            changed.notified().await;
            pause = AGAIN_MIN;
            continue;
        }
        if timeout(pause, changed.notified()).await.is_ok() {
            // Several changes at once are one, and the pace stays bounded.
            sleep(AGAIN_MIN).await;
        }
        pause = (2 * pause).min(AGAIN_MAX);
    }
}

/// Listens on the preferred port as well, on every address where it is free, until it is free on all of them: containers that
/// were started before send their tokens there. Only where another user holds it, since a port of this user's may belong to
/// the daemon of another home.
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
        sleep(AGAIN_MAX).await;
    }
}

/// One attempt; whether the daemon listens there now.
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
        // An event of its own reports that the endpoint listens.
        Gateway::Listening { .. } => return,
        Gateway::Elsewhere { address } => {
            format!("containers cannot reach the daemon over HTTP: {address} is no address of this machine")
        }
        Gateway::Held { by } => format!("{by}: containers send their tokens there"),
        Gateway::Failed { reason, .. } => format!("containers cannot reach the daemon over HTTP: {reason}"),
    };
    journal.record(&Event::Notice { text });
}
