//! The finding about the HTTP endpoint: whether a process of another user receives the requests of containers.

use std::net::{IpAddr, Ipv4Addr};
use std::num::NonZeroU16;

use super::Finding;
use crate::cli::daemon_client;
use crate::daemon::http::gateway::{Gateway, HttpFacts};
use crate::docker::Docker;
use crate::model::port_policy;
use crate::sys::held_port::HeldPort;

const WHAT: &str = "HTTP for containers";

/// Uses the report of the daemon, or looks up the holder of the port if no daemon runs.
pub(super) fn http() -> Finding {
    let described =
        daemon_client::client().and_then(|client| daemon_client::describe(&client)).ok().flatten();
    match described {
        Some(described) => of_daemon(&described.http, described.http_port),
        None => without_daemon(),
    }
}

fn of_daemon(http: &HttpFacts, port: Option<u16>) -> Finding {
    let at = port.map_or_else(|| "no port".to_owned(), |port| format!("port {port}"));
    match (&http.gateway, &http.fallback) {
        (Some(Gateway::Held { by }), _) | (_, Some(by)) => held_by_other_user(by),
        (Some(Gateway::Failed { address, reason }), _) => Finding::lack(
            WHAT,
            format!("the daemon does not listen on {address}: {reason}"),
            "landfall up --http-bind needs an address of this machine",
        ),
        (Some(Gateway::Listening { address }), None) => {
            Finding::ok(WHAT, format!("the daemon listens on {address}, {at}"))
        }
        (Some(Gateway::Elsewhere { address }), None) => {
            Finding::ok(WHAT, format!("{at}; {address} is not an address of this machine"))
        }
        (None, None) => Finding::ok(WHAT, at),
    }
}

fn without_daemon() -> Finding {
    let Some(port) = NonZeroU16::new(port_policy::HTTP_PORT) else {
        return Finding::ok(WHAT, "no daemon runs");
    };
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
        return Finding::ok(WHAT, "no daemon runs");
    };
    let held = runtime.block_on(async {
        let gateway = Docker::from_environment().bridge_gateway().await;
        for address in gateway.into_iter().chain([IpAddr::V4(Ipv4Addr::LOCALHOST)]) {
            if let Some(held) = HeldPort::of_stranger(address, port).await {
                return Some(held);
            }
        }
        None
    });
    held.map_or_else(|| Finding::ok(WHAT, "no daemon runs"), |held| held_by_other_user(&held))
}

fn held_by_other_user(held: &HeldPort) -> Finding {
    Finding::lack(
        WHAT,
        format!("{held}; containers send their tokens there"),
        "end that process; the daemon listens there as soon as the port is free",
    )
}
