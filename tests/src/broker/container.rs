//! A scripted container: the server to which a daemon's broker connects.

use std::net::{Ipv4Addr, TcpListener, TcpStream};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt;
use serde_json::{Value, json};
use tungstenite::handshake::server::{Callback, ErrorResponse, Request, Response};
use tungstenite::protocol::Role;

use super::peer::{Peer, Transport, test_limits};
use super::{PATH, hello};
use crate::{Home, TIMEOUT, rpc};

/// The receive buffer of a connection, in bytes; the kernel doubles it for its own bookkeeping (socket(7)). Without a limit
/// it grows to the maximum of the machine (tcp_rmem), and a case would measure that.
const RECEIVE_BYTES: usize = 256 * 1024;

/// A listener where the port 8973 of a container would be published, and the token that it expects.
#[derive(Debug)]
pub struct Container {
    listener: TcpListener,
    /// The broker token.
    pub token: String,
    /// The ports that it may forward.
    pub policy: Value,
}

impl Container {
    /// Listens on any free port of the host.
    ///
    /// # Panics
    /// If no port is free.
    pub fn listen(token: &str) -> Container {
        Container::at(0, token)
    }

    /// Listens on this port of the host (0: any).
    ///
    /// # Panics
    /// If the port is in use.
    pub fn at(port: u16, token: &str) -> Container {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
        // Accepted connections inherit it.
        sockopt::set_socket_recv_buffer_size(&listener, RECEIVE_BYTES).unwrap();
        Container { listener, token: token.to_owned(), policy: json!({"allow": "*"}) }
    }

    /// The same with another port policy.
    pub fn allowing(mut self, policy: Value) -> Container {
        self.policy = policy;
        self
    }

    /// The port on the host.
    ///
    /// # Panics
    /// Never, once it listens.
    pub fn port(&self) -> u16 {
        self.listener.local_addr().unwrap().port()
    }

    /// The fields of its registration, without its name.
    pub fn fields(&self) -> Value {
        json!({"wsHostPort": self.port(), "portForward": self.policy, "brokerToken": self.token,
            "way": {"kind": "websocket"}})
    }

    /// Registers it under this name.
    ///
    /// # Panics
    /// If the daemon refuses.
    #[track_caller]
    pub fn register(&self, home: &Home, name: &str) {
        rpc::register_with(home, name, &self.fields());
    }

    /// Returns whether a connection waits in the backlog.
    ///
    /// # Panics
    /// If `poll(2)` fails.
    pub fn has_pending_connection(&self) -> bool {
        poll(&mut [PollFd::new(&self.listener, PollFlags::IN)], Some(&Timespec::default())).unwrap() == 1
    }

    /// Accepts the next connection without a handshake.
    ///
    /// # Panics
    /// If no connection arrives.
    #[track_caller]
    pub fn accept_raw(&self) -> TcpStream {
        let patient = Timespec::try_from(TIMEOUT).unwrap();
        let ready = poll(&mut [PollFd::new(&self.listener, PollFlags::IN)], Some(&patient)).unwrap();
        assert_eq!(ready, 1, "no broker connected within {TIMEOUT:?}");
        self.listener.accept().unwrap().0
    }

    /// Accepts the next connection and upgrades it to a WebSocket.
    ///
    /// # Panics
    /// If no connection arrives, or it requests a path other than the broker's.
    #[track_caller]
    pub fn accept(&self) -> Peer {
        Container::upgrade(self.accept_raw(), self.port())
    }

    /// Upgrades a connection to this port of the host to a WebSocket.
    ///
    /// # Panics
    /// If it requests a path other than the broker's.
    #[track_caller]
    pub fn upgrade(stream: TcpStream, port: u16) -> Peer {
        let carrier = Transport::new(stream);
        let socket = tungstenite::accept_hdr_with_config(carrier, Expected(port), Some(test_limits()))
            .unwrap_or_else(|error| panic!("no WebSocket: {error}"));
        Peer::new(socket, Role::Server)
    }

    /// Accepts the next connection up to its hello.
    ///
    /// # Panics
    /// If no connection arrives, or its first message is not the hello with our token.
    #[track_caller]
    pub fn accept_hello(&self) -> Peer {
        let mut peer = self.accept();
        let mut first = peer.message();
        // A peer of the reference ignores the extensions that the hello offers.
        first.as_object_mut().unwrap().remove("extensions");
        assert_eq!(first, hello(&self.token), "the first message");
        peer
    }

    /// Accepts the next connection up to its subscription, as a container of the reference does.
    ///
    /// # Panics
    /// If the handshake fails.
    #[track_caller]
    pub fn welcome(&self) -> Peer {
        let mut peer = self.accept_hello();
        peer.send_message(&json!({"type": "broker-hello-ack"}));
        assert_eq!(peer.message(), json!({"type": "port-watch-subscribe"}), "what follows the ack");
        peer
    }
}

/// The request of a daemon that connects to `ws://127.0.0.1:PORT/portbroker`.
struct Expected(u16);

impl Callback for Expected {
    fn on_request(self, request: &Request, response: Response) -> Result<Response, ErrorResponse> {
        assert_eq!(request.uri().to_string(), PATH, "the path, with no query");
        assert_eq!(request.headers()["host"].to_str().unwrap(), format!("127.0.0.1:{}", self.0));
        assert!(!request.headers().contains_key("sec-websocket-protocol"), "no subprotocol is asked for");
        assert!(!request.headers().contains_key("authorization"), "tokens travel in the hello alone");
        Ok(response)
    }
}

/// Returns every port event of a container so far.
pub fn forward_events(home: &Home, name: &str) -> Vec<Value> {
    let events = home.events().into_iter().filter(|event| event["kind"] == "port-forward-event");
    events.map(|event| event["event"].clone()).filter(|event| event["containerName"] == name).collect()
}
