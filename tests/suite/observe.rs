//! One script, several attach methods between its two ends, and the observations of the ends.

use std::io::Write;
use std::net::TcpStream;
use std::time::Instant;

use landfall_engine::RingChoice;
use landfall_tests::{
    Checker, End, Forward, Haproxy, Namespace, Relay, Server, TIMEOUT, connect, connect_from,
};

use crate::swapped::{Inside, lead_out};

/// How a client reaches the server.
pub(crate) enum Route {
    /// From inside the namespace, directly.
    Direct(Namespace),
    /// From the host, through landfall.
    Landfall(Box<Relay>, Forward),
    /// From inside the namespace to a server on the host, through landfall.
    Swapped(Box<Inside>),
    /// From inside the namespace, through HAProxy.
    Haproxy { inside: Namespace, front: std::net::SocketAddr, _running: Haproxy },
}

/// A connection method, and the server at its end.
pub(crate) struct Path {
    pub(crate) route: Route,
    server: Server,
}

/// A connection, by its two ends.
pub(crate) struct Pair<'a> {
    pub(crate) client: TcpStream,
    pub(crate) server: TcpStream,
    path: &'a Path,
}

/// One of the two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Client,
    Server,
}

impl Path {
    pub(crate) fn direct() -> Path {
        let inside = Namespace::new();
        let server = Server::listen(&inside, "127.0.0.1:0");
        Path { route: Route::Direct(inside), server }
    }

    pub(crate) fn landfall(ring: RingChoice) -> Path {
        let mut relay = Relay::start(ring);
        let server = Server::listen(&relay.inside, "127.0.0.1:0");
        let forward = relay.forward(server.port());
        Path { route: Route::Landfall(Box::new(relay), forward), server }
    }

    pub(crate) fn swapped(ring: RingChoice) -> Path {
        let server = Server::listen(&Namespace::current(), "127.0.0.1:0");
        let inside = lead_out(ring, server.port());
        Path { route: Route::Swapped(Box::new(inside)), server }
    }

    pub(crate) fn haproxy() -> Path {
        let inside = Namespace::new();
        let server = Server::listen(&inside, "127.0.0.1:0");
        let front = ([127, 0, 0, 1], if server.port() == 9000 { 9001 } else { 9000 }).into();
        let running = Haproxy::start(&inside, front, server.address());
        // The connections of the readiness check.
        while server.has_pending_connection() {
            drop(server.accept());
        }
        Path { route: Route::Haproxy { inside, front, _running: running }, server }
    }

    /// Connects; then the server accepts.
    #[track_caller]
    pub(crate) fn pair(&self) -> Pair<'_> {
        let (client, server) = (self.client(), self.server.accept());
        if matches!(self.route, Route::Haproxy { .. }) {
            // No assertion depends on HAProxy, so a missing event is not awaited for long.
            for stream in [&client, &server] {
                stream.set_read_timeout(Some(std::time::Duration::from_secs(1))).unwrap();
            }
        }
        Pair { client, server, path: self }
    }

    /// Accepts the next connection at the server.
    #[track_caller]
    pub(crate) fn accept(&self) -> TcpStream {
        self.server.accept()
    }

    /// Connects without an accept.
    #[track_caller]
    pub(crate) fn client(&self) -> TcpStream {
        match &self.route {
            Route::Direct(inside) => connect_from(inside, self.server.address()),
            Route::Landfall(_, forward) => connect(forward.v4()),
            Route::Swapped(inside) => connect_from(&inside.relay.inside, inside.address),
            Route::Haproxy { inside, front, .. } => connect_from(inside, *front),
        }
    }
}

impl Pair<'_> {
    pub(crate) fn end(&self, side: Side) -> &TcpStream {
        match side {
            Side::Client => &self.client,
            Side::Server => &self.server,
        }
    }

    /// Returns the two ends: first that of `side`, then the other.
    pub(crate) fn split(self, side: Side) -> (TcpStream, TcpStream) {
        match side {
            Side::Client => (self.client, self.server),
            Side::Server => (self.server, self.client),
        }
    }

    /// Waits until every byte that `side` sent was acknowledged, so that the receiver's kernel (or a relay) has it.
    #[track_caller]
    pub(crate) fn delivered(&self, side: Side) {
        let stream = self.end(side);
        let (local, peer) = (stream.local_addr().unwrap(), stream.peer_addr().unwrap());
        let host = Namespace::current();
        let namespace = match (&self.path.route, side) {
            (Route::Direct(inside) | Route::Haproxy { inside, .. }, _) => inside,
            (Route::Landfall(relay, _), Side::Server) => &relay.inside,
            (Route::Swapped(inside), Side::Client) => &inside.relay.inside,
            (Route::Landfall(..), Side::Client) | (Route::Swapped(_), Side::Server) => &host,
        };
        landfall_tests::wait_until("all that was sent to be acknowledged", || {
            match namespace.unacknowledged(local, peer) {
                0 => Ok(()),
                bytes => Err(bytes),
            }
        });
    }
}

/// Writes until the kernel reports that the peer is gone; false if it never does.
pub(crate) fn write_reports_that_the_peer_is_gone(mut stream: &TcpStream) -> bool {
    let deadline = Instant::now() + TIMEOUT / 4;
    while Instant::now() < deadline {
        if stream.write(b"?").is_err() {
            return true;
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    false
}

/// Returns what one end read: the number of bytes, all of them right, and how it ended.
pub(crate) fn read_rest(stream: &TcpStream, checker: &mut Checker) -> (u64, End) {
    let end = landfall_tests::read_to_end(stream, checker);
    (checker.position(), end)
}

/// Returns how a connection ends on which no bytes are expected.
#[track_caller]
pub(crate) fn ends_by(stream: &TcpStream) -> End {
    let mut buffer = [0; 64];
    match landfall_tests::read_some(stream, &mut buffer) {
        Ok(0) => End::Eof,
        Ok(bytes) => panic!("{:?} arrived unexpectedly", &buffer[..bytes]),
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => End::Reset,
        Err(error) => panic!("neither an end nor a reset: {error}"),
    }
}
