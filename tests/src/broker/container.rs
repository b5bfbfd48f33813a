//! A container that says what a case says: the server at which a daemon's broker dials.

use std::net::{Ipv4Addr, TcpListener, TcpStream};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt;
use serde_json::{Value, json};
use tungstenite::handshake::server::{Callback, ErrorResponse, Request, Response};
use tungstenite::protocol::Role;

use super::peer::{Carrier, Peer, generous};
use super::{PATH, hello};
use crate::{Home, PATIENCE, rpc};

/// What a connection holds that a case has not read, in bytes; the kernel doubles it for its own account (socket(7)). Left to
/// itself it grows to whatever the machine allows (tcp_rmem), and a case would measure that.
const RECEIVE_BYTES: usize = 256 * 1024;

/// A listener where a container's port 8973 would be published, and the token that it expects.
#[derive(Debug)]
pub struct Container {
    listener: TcpListener,
    /// The broker token.
    pub token: String,
    /// What ports it may forward.
    pub policy: Value,
}

impl Container {
    /// One on some port of the host.
    ///
    /// # Panics
    /// When there is none to be had.
    pub fn listen(token: &str) -> Container {
        Container::at(0, token)
    }

    /// One on this port of the host (0: any).
    ///
    /// # Panics
    /// When it is taken.
    pub fn at(port: u16, token: &str) -> Container {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
        // Its connections take it over.
        sockopt::set_socket_recv_buffer_size(&listener, RECEIVE_BYTES).unwrap();
        Container { listener, token: token.to_owned(), policy: json!({"allow": "*"}) }
    }

    /// The same with another policy.
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

    /// What its registration carries beside its name.
    pub fn fields(&self) -> Value {
        json!({"wsHostPort": self.port(), "portForward": self.policy, "brokerToken": self.token,
            "way": {"kind": "websocket"}})
    }

    /// Registers it by this name.
    ///
    /// # Panics
    /// When that is refused.
    #[track_caller]
    pub fn register(&self, home: &Home, name: &str) {
        rpc::register_with(home, name, &self.fields());
    }

    /// Whether a caller waits.
    ///
    /// # Panics
    /// When it cannot be looked.
    pub fn has_caller(&self) -> bool {
        poll(&mut [PollFd::new(&self.listener, PollFlags::IN)], Some(&Timespec::default())).unwrap() == 1
    }

    /// Takes the next connection, and does nothing with it.
    ///
    /// # Panics
    /// When none comes.
    #[track_caller]
    pub fn accept_raw(&self) -> TcpStream {
        let patient = Timespec::try_from(PATIENCE).unwrap();
        let ready = poll(&mut [PollFd::new(&self.listener, PollFlags::IN)], Some(&patient)).unwrap();
        assert_eq!(ready, 1, "no broker connected within {PATIENCE:?}");
        self.listener.accept().unwrap().0
    }

    /// Takes the next connection and makes it a WebSocket.
    ///
    /// # Panics
    /// When none comes, or it asks for anything but the broker's path.
    #[track_caller]
    pub fn accept(&self) -> Peer {
        Container::upgrade(self.accept_raw(), self.port())
    }

    /// Makes a connection to this port of the host a WebSocket.
    ///
    /// # Panics
    /// When it asks for anything but the broker's path.
    #[track_caller]
    pub fn upgrade(stream: TcpStream, port: u16) -> Peer {
        let carrier = Carrier::new(stream);
        let socket = tungstenite::accept_hdr_with_config(carrier, Expected(port), Some(generous()))
            .unwrap_or_else(|error| panic!("no WebSocket: {error}"));
        Peer::new(socket, Role::Server)
    }

    /// Takes the next connection up to its hello.
    ///
    /// # Panics
    /// When none comes, or its first message is not the hello with our token.
    #[track_caller]
    pub fn greeted(&self) -> Peer {
        let mut peer = self.accept();
        let mut first = peer.message();
        // What it offers beside is nobody's business who does not know it.
        first.as_object_mut().unwrap().remove("extensions");
        assert_eq!(first, hello(&self.token), "the first message");
        peer
    }

    /// Takes the next connection up to where it watches, as a container of the reference does.
    ///
    /// # Panics
    /// When it does not come so far.
    #[track_caller]
    pub fn welcome(&self) -> Peer {
        let mut peer = self.greeted();
        peer.say(&json!({"type": "broker-hello-ack"}));
        assert_eq!(peer.message(), json!({"type": "port-watch-subscribe"}), "what follows the ack");
        peer
    }
}

/// What the request of a daemon looks like that dials `ws://127.0.0.1:PORT/portbroker`.
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

/// Every port event about a container so far.
pub fn forward_events(home: &Home, name: &str) -> Vec<Value> {
    let events = home.events().into_iter().filter(|event| event["kind"] == "port-forward-event");
    events.map(|event| event["event"].clone()).filter(|event| event["containerName"] == name).collect()
}
