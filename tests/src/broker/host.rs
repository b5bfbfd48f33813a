//! A daemon that says what a case says: the one who dials an agent.

use std::net::{Ipv4Addr, SocketAddr};

use serde_json::{Value, json};
use tungstenite::client::IntoClientRequest;
use tungstenite::http::{HeaderMap, HeaderValue};
use tungstenite::protocol::Role;

use super::peer::{Carrier, Peer, generous};
use super::{CONTAINER_PORT, PATH, hello};
use crate::{Namespace, connect_from};

/// What a daemon that dials a published port says in its request: the port is the host's, not the container's.
pub const HOST_HEADER: &str = "127.0.0.1:41234";

/// Makes a WebSocket to the agent inside.
///
/// # Panics
/// When there is none to be had.
#[track_caller]
pub fn dial(inside: &Namespace) -> Peer {
    try_dial(inside).unwrap_or_else(|error| panic!("no WebSocket: {error}"))
}

/// Makes a WebSocket to the agent inside, if it agrees.
///
/// # Errors
/// What it answered.
///
/// # Panics
/// When nobody listens.
#[track_caller]
pub fn try_dial(inside: &Namespace) -> Result<Peer, String> {
    try_dial_with(inside, &[]).map(|(peer, _)| peer)
}

/// Makes a WebSocket to the agent inside with these headers beside the usual ones, if it agrees, and gives the headers of its
/// answer.
///
/// # Errors
/// What it answered.
///
/// # Panics
/// When nobody listens.
#[track_caller]
pub fn try_dial_with(
    inside: &Namespace,
    headers: &[(&'static str, &str)],
) -> Result<(Peer, HeaderMap), String> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, CONTAINER_PORT));
    let carrier = Carrier::new(connect_from(inside, address));
    let mut request = format!("ws://{HOST_HEADER}{PATH}").into_client_request().unwrap();
    for (name, value) in headers {
        request.headers_mut().insert(*name, HeaderValue::from_str(value).unwrap());
    }
    let (socket, response) = tungstenite::client::client_with_config(request, carrier, Some(generous()))
        .map_err(|error| error.to_string())?;
    Ok((Peer::new(socket, Role::Client), response.headers().clone()))
}

/// Makes a WebSocket to the agent inside and has the token taken, as a daemon of the reference does.
///
/// # Panics
/// When it is not.
#[track_caller]
pub fn welcome(inside: &Namespace, token: &str) -> Peer {
    let (peer, ack) = welcome_with(inside, &hello(token));
    assert_eq!(ack, json!({"type": "broker-hello-ack"}), "a peer that offers nothing is told of nothing");
    peer
}

/// The same with any hello; gives the ack.
///
/// # Panics
/// When there is none.
#[track_caller]
pub fn welcome_with(inside: &Namespace, hello: &Value) -> (Peer, Value) {
    let mut peer = dial(inside);
    peer.say(hello);
    let ack = peer.message();
    assert_eq!(ack["type"], "broker-hello-ack", "{ack}");
    (peer, ack)
}
