//! A scripted daemon, which connects to an agent.

use std::net::{Ipv4Addr, SocketAddr};

use serde_json::{Value, json};
use tungstenite::client::IntoClientRequest;
use tungstenite::http::{HeaderMap, HeaderValue};
use tungstenite::protocol::Role;

use super::peer::{Peer, Transport, test_limits};
use super::{CONTAINER_PORT, PATH, hello};
use crate::{Namespace, connect_from};

/// The `Host` header of a daemon that connects to a published port: it has the port of the host, not the port of the
/// container.
pub const HOST_HEADER: &str = "127.0.0.1:41234";

/// Opens a WebSocket to the agent inside.
///
/// # Panics
/// If the agent refuses it.
#[track_caller]
pub fn dial(inside: &Namespace) -> Peer {
    try_dial(inside).unwrap_or_else(|error| panic!("no WebSocket: {error}"))
}

/// Opens a WebSocket to the agent inside, if the agent accepts it.
///
/// # Errors
/// The agent's answer.
///
/// # Panics
/// If no listener accepts the connection.
#[track_caller]
pub fn try_dial(inside: &Namespace) -> Result<Peer, String> {
    try_dial_with(inside, &[]).map(|(peer, _)| peer)
}

/// Opens a WebSocket to the agent inside with these additional headers, if the agent accepts it. Returns the headers of its
/// answer.
///
/// # Errors
/// The agent's answer.
///
/// # Panics
/// If no listener accepts the connection.
#[track_caller]
pub fn try_dial_with(
    inside: &Namespace,
    headers: &[(&'static str, &str)],
) -> Result<(Peer, HeaderMap), String> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, CONTAINER_PORT));
    let carrier = Transport::new(connect_from(inside, address));
    let mut request = format!("ws://{HOST_HEADER}{PATH}").into_client_request().unwrap();
    for (name, value) in headers {
        request.headers_mut().insert(*name, HeaderValue::from_str(value).unwrap());
    }
    let (socket, response) = tungstenite::client::client_with_config(request, carrier, Some(test_limits()))
        .map_err(|error| error.to_string())?;
    Ok((Peer::new(socket, Role::Client), response.headers().clone()))
}

/// Opens a WebSocket to the agent inside and authenticates with the token, as a daemon of the reference does.
///
/// # Panics
/// If the agent refuses the token.
#[track_caller]
pub fn welcome(inside: &Namespace, token: &str) -> Peer {
    let (peer, ack) = welcome_with(inside, &hello(token));
    assert_eq!(ack, json!({"type": "broker-hello-ack"}), "a peer without extensions gets none");
    peer
}

/// The same with any hello. Returns the ack.
///
/// # Panics
/// If no ack arrives.
#[track_caller]
pub fn welcome_with(inside: &Namespace, hello: &Value) -> (Peer, Value) {
    let mut peer = dial(inside);
    peer.send_message(hello);
    let ack = peer.message();
    assert_eq!(ack["type"], "broker-hello-ack", "{ack}");
    (peer, ack)
}
