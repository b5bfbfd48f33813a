//! `landfall agent` against a daemon that implements only the wire protocol: the acceptance rows of
//! `container-server.test.ts` by their titles (wire specification, A.14), in their order.

use std::io::{Read, Write};
use std::process::{Child, Stdio};

use landfall_tests::broker::{
    Agent, Peer, Received, ack, close_downstream, close_upstream, data, dial, forwarded, hello,
    not_forwarded, open, request, welcome,
};
use landfall_tests::case::Case;
use landfall_tests::{Home, NEGATIVE_WAIT, Namespace, Server, expect_bytes, finish, reset, wait_until};
use serde_json::{Value, json};

use crate::observe::ends_by;

pub(crate) const CASES: &[Case] = &[
    Case::once("a14_container_server_rejects_non_hello_first_message", rejects_non_hello),
    Case::once("a14_container_server_rejects_hello_with_wrong_token", rejects_wrong_token),
    Case::once("a14_container_server_accepts_hello_with_correct_token", accepts_hello),
    Case::once("a14_container_server_subscribe_sends_a_snapshot", subscribe_snapshot),
    Case::once("a14_container_server_emits_opened_and_closed_across_ticks", opened_and_closed),
    Case::once("a14_container_server_unsubscribe_stops_the_polling", unsubscribe_stops),
    Case::once("a14_container_server_relay_open_succeeds_and_acks", open_acks),
    Case::once("a14_container_server_relay_open_failure_sends_nack", open_nacks),
    Case::once("a14_container_server_relay_data_flows_to_upstream", data_to_upstream),
    Case::once("a14_container_server_upstream_data_emits_relay_data", data_from_upstream),
    Case::once("a14_container_server_relay_close_ends_the_upstream", close_ends_upstream),
    Case::once("a14_container_server_upstream_close_emits_relay_close", upstream_close),
    Case::once("a14_container_server_close_ends_all_open_upstreams", close_ends_all),
    Case::once("a14_container_server_forwards_ok_results", ok_results),
    Case::once("a14_container_server_forwards_failure_results", failure_results),
    Case::once("a14_container_server_takes_no_result_before_the_ack", no_result_before_ack),
    Case::once("a14_container_server_survives_those_who_asked", survives_clients),
    Case::once("a14_container_server_published_request_is_sent_after_auth", request_after_auth),
    Case::once("a14_container_server_reconnect_repeats_stored_requests", reconnect_repeats),
    Case::once("a14_container_server_sends_no_request_before_the_ack", no_request_before_ack),
];

pub(crate) const TOKEN: &str = "token-of-the-broker-0123456789-abcdefghijkl";

/// An agent in its own container.
pub(crate) struct Inside {
    pub(crate) agent: Agent,
    pub(crate) namespace: Namespace,
}

impl Inside {
    pub(crate) fn start(home: &Home) -> Inside {
        let namespace = Namespace::new();
        let agent = Agent::start(home, &namespace, TOKEN);
        Inside { agent, namespace }
    }

    /// Returns an authenticated host.
    #[track_caller]
    pub(crate) fn host(&self) -> Peer {
        welcome(&self.namespace, TOKEN)
    }

    /// Returns a server, a host, and a stream between them; the server's end of the stream comes last.
    #[track_caller]
    pub(crate) fn stream(&self, id: i64) -> (Server, Peer, std::net::TcpStream) {
        let server = Server::listen(&self.namespace, "127.0.0.1:5173");
        let mut host = self.host();
        host.send_message(&open(id, 5173));
        assert_eq!(host.message(), ack(id));
        let upstream = server.accept();
        (server, host, upstream)
    }

    /// Starts `landfall agent forward` beside the agent.
    pub(crate) fn ask(&self, home: &Home, target: u16, candidates: &str, reason: Option<&str>) -> Asking {
        let target = target.to_string();
        let mut arguments = vec!["agent", "forward", &target, "--host", candidates];
        if let Some(reason) = reason {
            arguments.extend(["--reason", reason]);
        }
        let mut command = home.command(&arguments);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Asking(self.namespace.run(|| command.spawn().unwrap()))
    }
}

/// A program in the container that waits for a forward.
pub(crate) struct Asking(Child);

impl Asking {
    /// Returns whether it succeeded, and its two outputs.
    #[track_caller]
    pub(crate) fn answer(mut self) -> (bool, String, String) {
        let status = wait_until("the answer to the request", || self.0.try_wait().unwrap().ok_or("it waits"));
        let (mut out, mut error) = (String::new(), String::new());
        self.0.stdout.take().unwrap().read_to_string(&mut out).unwrap();
        self.0.stderr.take().unwrap().read_to_string(&mut error).unwrap();
        (status.success(), out, error)
    }

    pub(crate) fn waits(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn subscribe() -> Value {
    json!({"type": "port-watch-subscribe"})
}

fn rejects_non_hello() {
    let home = Home::new();
    let inside = Inside::start(&home);
    let _server = Server::listen(&inside.namespace, "127.0.0.1:5173");
    for first in [
        subscribe(),
        open(1, 5173),
        forwarded(5173, 5173),
        json!({"type": "future-thing"}),
        json!({"type": "broker-hello-ack"}),
    ] {
        let mut peer = dial(&inside.namespace);
        peer.send_message(&first);
        assert_eq!(
            peer.message(),
            json!({"type": "broker-hello-nack", "reason": "expected broker-hello first"}),
            "{first}"
        );
        assert_eq!(peer.receive_end(), Received::Closed(Some(1008), "auth required".to_owned()), "{first}");
    }
    let printed = inside.agent.printed();
    assert!(
        printed.contains("auth-failed") && printed.contains("first message was not broker-hello"),
        "{printed}"
    );
}

fn rejects_wrong_token() {
    let home = Home::new();
    let inside = Inside::start(&home);
    let longer = format!("{TOKEN}x");
    for token in ["wrong", "", &TOKEN[..TOKEN.len() - 1], &longer, &TOKEN.to_uppercase()] {
        let mut peer = dial(&inside.namespace);
        peer.send_message(&hello(token));
        // Later messages on this connection have no effect.
        let _ = peer.try_send_message(&subscribe());
        assert_eq!(
            peer.message(),
            json!({"type": "broker-hello-nack", "reason": "invalid token"}),
            "{token:?}"
        );
        assert_eq!(peer.receive_end(), Received::Closed(Some(1008), "invalid token".to_owned()), "{token:?}");
    }
    let printed = inside.agent.printed();
    assert!(printed.contains("auth-failed") && printed.contains("token mismatch"), "{printed}");
    assert!(!printed.contains(TOKEN), "{printed}");
}

fn accepts_hello() {
    let home = Home::new();
    let inside = Inside::start(&home);
    let mut peer = inside.host();
    // A second hello is ignored, whatever its token.
    peer.send_message(&hello("another"));
    assert!(peer.is_silent_for(NEGATIVE_WAIT));
    peer.ping();
    wait_until("the log", || {
        let printed = inside.agent.printed();
        if printed.contains("\"authed\"") { Ok(()) } else { Err(printed) }
    });
}

/// Returns the ports of a snapshot, without the agent's own port.
#[track_caller]
pub(crate) fn ports(message: &Value) -> Vec<(u64, String)> {
    assert_eq!(message["type"], "port-listen-snapshot", "{message}");
    let ports = message["ports"].as_array().unwrap().iter();
    let reported = ports.map(|entry| {
        assert_eq!(entry.as_object().unwrap().len(), 2, "{message}");
        (entry["port"].as_u64().unwrap(), entry["bindAddr"].as_str().unwrap().to_owned())
    });
    let (own, others): (Vec<_>, Vec<_>) = reported.partition(|(port, _)| *port == 8973);
    assert_eq!(own.len(), 1, "the container's own port always listens: {message}");
    others
}

fn subscribe_snapshot() {
    let home = Home::new();
    let inside = Inside::start(&home);
    let _any = Server::listen(&inside.namespace, "0.0.0.0:5173");
    let _loopback = Server::listen(&inside.namespace, "127.0.0.1:3000");
    let _elsewhere = Server::listen(&inside.namespace, "127.0.0.2:3001");
    let mut peer = inside.host();
    assert!(peer.is_silent_for(NEGATIVE_WAIT), "nothing before it is subscribed");
    peer.send_message(&subscribe());
    let mut reported = ports(&peer.message());
    reported.sort();
    assert_eq!(reported, [(3000, "127.0.0.1".to_owned()), (5173, "0.0.0.0".to_owned())]);
}

fn opened_and_closed() {
    let home = Home::new();
    let inside = Inside::start(&home);
    let mut peer = inside.host();
    peer.send_message(&subscribe());
    assert!(ports(&peer.message()).is_empty());
    let server = Server::listen(&inside.namespace, "0.0.0.0:5173");
    assert_eq!(peer.message(), json!({"type": "port-listen-opened", "port": 5173, "bindAddr": "0.0.0.0"}));
    drop(server);
    assert_eq!(peer.message(), json!({"type": "port-listen-closed", "port": 5173}));
}

fn unsubscribe_stops() {
    let home = Home::new();
    let inside = Inside::start(&home);
    let mut peer = inside.host();
    peer.send_message(&subscribe());
    peer.message();
    peer.send_message(&json!({"type": "port-watch-unsubscribe"}));
    let _server = Server::listen(&inside.namespace, "0.0.0.0:5173");
    // Two scans would have taken place.
    assert!(peer.is_silent_for(6 * NEGATIVE_WAIT));
    // A later subscribe sends a fresh snapshot.
    peer.send_message(&subscribe());
    assert_eq!(ports(&peer.message()), [(5173, "0.0.0.0".to_owned())]);
}

fn open_acks() {
    let home = Home::new();
    let inside = Inside::start(&home);
    let server = Server::listen(&inside.namespace, "127.0.0.1:5173");
    let mut peer = inside.host();
    let mut kept = Vec::new();
    // Any integer is a valid stream.
    for id in [1, 2, 0, -7, i64::from(i32::MAX), 4_294_967_297, 9_007_199_254_740_991] {
        peer.send_message(&open(id, 5173));
        assert_eq!(peer.message(), ack(id));
        kept.push(server.accept());
    }
}

fn open_nacks() {
    let home = Home::new();
    let inside = Inside::start(&home);
    let mut peer = inside.host();
    peer.send_message(&open(7, 5173));
    let answer = peer.message();
    assert_eq!((&answer["type"], &answer["streamId"]), (&json!("relay-open-nack"), &json!(7)), "{answer}");
    assert!(answer["reason"].as_str().unwrap().contains("ECONNREFUSED"), "{answer}");
    peer.send_message(&data(7, b"nobody"));
    peer.send_message(&close_downstream(7));
    assert!(peer.is_silent_for(NEGATIVE_WAIT));
    wait_until("the log", || {
        let printed = inside.agent.printed();
        if printed.contains("relay-open-failed") { Ok(()) } else { Err(printed) }
    });
}

fn data_to_upstream() {
    let home = Home::new();
    let inside = Inside::start(&home);
    let (_server, mut host, upstream) = inside.stream(1);
    for piece in [&b"GET / "[..], b"", b"HTTP/1.1\r\n\r\n", &[0, 255, 10, 13]] {
        host.send_message(&data(1, piece));
    }
    expect_bytes(&upstream, b"GET / HTTP/1.1\r\n\r\n\x00\xff\n\r");
}

fn data_from_upstream() {
    let home = Home::new();
    let inside = Inside::start(&home);
    let (_server, mut host, mut upstream) = inside.stream(1);
    upstream.write_all(b"\x00\xff hello").unwrap();
    assert_eq!(host.message(), json!({"type": "relay-data", "streamId": 1, "bytes": "AP8gaGVsbG8="}));
}

fn close_ends_upstream() {
    let home = Home::new();
    let inside = Inside::start(&home);
    let (_server, mut host, upstream) = inside.stream(1);
    host.send_message(&data(1, b"last words"));
    host.send_message(&close_downstream(1));
    expect_bytes(&upstream, b"last words");
    let _ = ends_by(&upstream);
    assert!(host.is_silent_for(NEGATIVE_WAIT), "it sends nothing back");
}

fn upstream_close() {
    let home = Home::new();
    let inside = Inside::start(&home);
    let (server, mut host, mut upstream) = inside.stream(1);
    upstream.write_all(b"bye").unwrap();
    drop(upstream);
    assert_eq!(host.receive_data(1, 3), b"bye");
    assert_eq!(host.message(), close_upstream(1));
    // A stream with a FIN from inside, and one with a reset.
    for (id, receive_end) in [(2, finish as fn(&std::net::TcpStream)), (3, |_| {})] {
        host.send_message(&open(id, 5173));
        assert_eq!(host.message(), ack(id));
        let upstream = server.accept();
        receive_end(&upstream);
        if id == 3 {
            reset(upstream);
            assert_eq!(host.message(), close_upstream(id));
        } else {
            assert_eq!(host.message(), close_upstream(id));
            drop(upstream);
        }
    }
    assert!(host.is_silent_for(NEGATIVE_WAIT), "once");
}

fn close_ends_all() {
    let home = Home::new();
    let inside = Inside::start(&home);
    let (server, mut host, first) = inside.stream(1);
    host.send_message(&open(2, 5173));
    assert_eq!(host.message(), ack(2));
    let second = server.accept();
    let mut other = inside.host();
    other.send_message(&open(1, 5173));
    assert_eq!(other.message(), ack(1));
    let kept = server.accept();
    host.close(1000, "");
    for upstream in [first, second] {
        let _ = ends_by(&upstream);
    }
    // Streams of another connection continue.
    other.send_message(&data(1, b"alive"));
    expect_bytes(&kept, b"alive");
    other.hang_up();
    let _ = ends_by(&kept);
}

fn ok_results() {
    let home = Home::new();
    let inside = Inside::start(&home);
    let mut host = inside.host();
    let asking = inside.ask(&home, 4848, "4848-4850", None);
    assert_eq!(host.message(), request(4848, &[4848, 4849, 4850]));
    host.send_message(&forwarded(4848, 4849));
    let (done, out, error) = asking.answer();
    assert!(done && out.contains("4849"), "{out}{error}");
}

fn failure_results() {
    let home = Home::new();
    let inside = Inside::start(&home);
    let mut host = inside.host();
    let asking = inside.ask(&home, 4848, "4848", None);
    assert_eq!(host.message(), request(4848, &[4848]));
    host.send_message(&not_forwarded(4848, "policy excluded"));
    let (done, out, error) = asking.answer();
    assert!(!done && error.contains("policy excluded"), "{out}{error}");
}

fn no_result_before_ack() {
    let home = Home::new();
    let inside = Inside::start(&home);
    let mut asking = inside.ask(&home, 4848, "4848", None);
    let mut stranger = dial(&inside.namespace);
    stranger.send_message(&forwarded(4848, 4848));
    stranger.receive_end();
    let mut host = inside.host();
    assert_eq!(host.receive("port-forward-request"), request(4848, &[4848]));
    assert!(asking.waits(), "a stranger answered it");
    host.send_message(&forwarded(4848, 4850));
    let (done, out, error) = asking.answer();
    assert!(done && out.contains("4850"), "{out}{error}");
}

fn survives_clients() {
    let home = Home::new();
    let inside = Inside::start(&home);
    let mut host = inside.host();
    let asking = inside.ask(&home, 4848, "4848", None);
    host.receive("port-forward-request");
    drop(asking);
    host.send_message(&forwarded(4848, 4848));
    // A result that no client requested.
    host.send_message(&forwarded(9999, 9999));
    host.send_message(&not_forwarded(9998, "x"));
    host.send_message(&subscribe());
    host.receive("port-listen-snapshot");
    let asking = inside.ask(&home, 4849, "4849", None);
    assert_eq!(host.receive("port-forward-request"), request(4849, &[4849]));
    host.send_message(&forwarded(4849, 4849));
    assert!(asking.answer().0);
}

fn request_after_auth() {
    let home = Home::new();
    let inside = Inside::start(&home);
    let mut host = inside.host();
    let _asking = inside.ask(&home, 4848, "4848,4849", Some("dashboard"));
    assert_eq!(
        host.message(),
        json!({"type": "port-forward-request", "targetPort": 4848, "hostCandidates": [4848, 4849], "reason": "dashboard"})
    );
}

fn reconnect_repeats() {
    let home = Home::new();
    let inside = Inside::start(&home);
    let mut host = inside.host();
    let asking = inside.ask(&home, 4848, "4848", None);
    let first = host.message();
    host.send_message(&forwarded(4848, 4848));
    assert!(asking.answer().0);
    let asking = inside.ask(&home, 4000, "4000", None);
    let second = host.message();
    host.send_message(&forwarded(4000, 4000));
    assert!(asking.answer().0);
    host.hang_up();
    // In the order of the first request, with the newest candidates of each target.
    let _asking = inside.ask(&home, 4848, "4860", None);
    let mut host = dial(&inside.namespace);
    host.send_message(&hello(TOKEN));
    assert_eq!(host.message(), json!({"type": "broker-hello-ack"}));
    let mut repeated = [host.message(), host.message()];
    if repeated[0] == first {
        // The client connected after the host.
        assert_eq!(host.message(), request(4848, &[4860]));
        repeated[0] = request(4848, &[4860]);
    }
    assert_eq!(repeated, [request(4848, &[4860]), second]);
    assert!(host.is_silent_for(NEGATIVE_WAIT), "exactly these");
}

fn no_request_before_ack() {
    let home = Home::new();
    let inside = Inside::start(&home);
    let mut host = inside.host();
    let mut early = dial(&inside.namespace);
    let _asking = inside.ask(&home, 4848, "4848", None);
    host.receive("port-forward-request");
    assert!(early.is_silent_for(NEGATIVE_WAIT));
    early.send_message(&hello(TOKEN));
    assert_eq!(early.message(), json!({"type": "broker-hello-ack"}));
    assert_eq!(early.message(), request(4848, &[4848]));
}
