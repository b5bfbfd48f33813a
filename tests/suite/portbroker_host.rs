//! The daemon's side of the port broker against a container that implements only the wire protocol: the acceptance rows of
//! `hostd-client.test.ts` by their titles (wire specification, A.14), in their order.

use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use landfall_tests::broker::{
    Container, Peer, Received, ack, close_downstream, close_upstream, closed, data, forward_events,
    forwarded, nack, not_forwarded, open, opened, request, snapshot, stream,
};
use landfall_tests::case::Case;
use landfall_tests::rpc::{done, names};
use landfall_tests::{
    Daemon, End, FakeDocker, Home, NEGATIVE_WAIT, connect, expect_bytes, finish, reset, wait_until,
};
use serde_json::{Value, json};

use crate::observe::ends_by;

pub(crate) const CASES: &[Case] = &[
    Case::once("a14_hostd_client_start_sends_broker_hello_with_token", start_sends_hello),
    Case::once("a14_hostd_client_on_hello_ack_sends_port_watch_subscribe", subscribes),
    Case::once("a14_hostd_client_auth_nack_is_fatal", auth_nack_is_fatal),
    Case::once("a14_hostd_client_non_auth_ws_close_still_reconnects", close_reconnects),
    Case::once("a14_hostd_client_snapshot_installs_forwarders_for_allowed_ports", snapshot_installs),
    Case::once("a14_hostd_client_deny_list_excludes_ports_from_snapshot", deny_list),
    Case::once("a14_hostd_client_allowlist_excludes_everything_not_listed", allowlist),
    Case::once("a14_hostd_client_off_switch_skips_broker_entirely", off_switch),
    Case::once("a14_hostd_client_port_listen_opened_installs_a_forwarder", opened_installs),
    Case::once("a14_hostd_client_port_listen_closed_tears_down_forwarder", closed_tears_down),
    Case::once("a14_hostd_client_eaddrinuse_emits_failed_and_does_not_retry", address_in_use),
    Case::once(
        "a14_hostd_client_host_connection_allocates_stream_id_and_sends_relay_open",
        allocates_streams,
    ),
    Case::once("a14_hostd_client_relay_data_flows_to_container_after_open_ack", data_after_ack),
    Case::once("a14_hostd_client_container_relay_data_writes_to_host_socket", data_to_host),
    Case::once("a14_hostd_client_relay_open_nack_closes_the_host_socket", nack_closes),
    Case::once("a14_hostd_client_host_socket_close_sends_relay_close", close_sends_close),
    Case::once("a14_hostd_client_ws_disconnect_tears_down_all_forwarders", disconnect_tears_down),
    Case::once("a14_hostd_client_stop_ends_all_forwarders", stop_ends_all),
    Case::once("a14_hostd_client_forwarded_ports_reflects_bound_ports", forwarded_ports),
    Case::once("a14_hostd_client_dedups_a_re_announced_target", dedups),
    Case::once("a14_hostd_client_connect_attempts_have_a_timeout", connect_timeout),
    Case::once("a14_hostd_client_connect_rejection_schedules_reconnect", rejection_reconnects),
    Case::once("a14_hostd_client_no_host_port_defers_connect", no_host_port),
    Case::once("a14_hostd_client_emits_result_after_successful_forward", result_ok),
    Case::once("a14_hostd_client_emits_result_with_failure_when_bind_fails", result_failed),
    Case::once("a14_hostd_client_emits_policy_excluded_for_denied_ports", result_excluded),
];

/// A daemon with one container, whose broker the case plays.
pub(crate) struct Scene<'a> {
    pub(crate) home: &'a Home,
    pub(crate) daemon: Daemon<'a>,
    pub(crate) container: Container,
    pub(crate) peer: Peer,
}

pub(crate) const NAME: &str = "coder";
pub(crate) const TOKEN: &str = "token-of-the-broker-0123456789-abcdefghijkl";

impl Scene<'_> {
    /// With any port policy, up to the subscription of the broker.
    pub(crate) fn open(home: &Home, policy: Value) -> Scene<'_> {
        let daemon = home.daemon();
        let container = Container::listen(TOKEN).allowing(policy);
        container.register(home, NAME);
        let peer = container.welcome();
        Scene { home, daemon, container, peer }
    }

    /// With every port allowed, and these ports forwarded.
    #[track_caller]
    pub(crate) fn forwarding<'a>(home: &'a Home, ports: &[u16]) -> Scene<'a> {
        let mut scene = Scene::open(home, json!({"allow": "*"}));
        scene.peer.send_message(&snapshot(ports));
        for port in ports {
            scene.peer.receive_exactly(&forwarded(*port, *port));
        }
        scene
    }

    /// Returns the events of this container, each as `kind port` with its distinguishing field.
    pub(crate) fn events(&self) -> Vec<String> {
        events(self.home)
    }

    /// Waits until exactly these events exist, in any order.
    #[track_caller]
    pub(crate) fn events_become(&self, wanted: &[&str]) {
        events_become(self.home, wanted);
    }

    /// Returns a client of a port, and the stream that the container is requested to open for it.
    #[track_caller]
    pub(crate) fn client(&mut self, port: u16) -> (TcpStream, i64) {
        let client = connect((Ipv4Addr::LOCALHOST, port));
        let asked = self.peer.receive("relay-open");
        assert_eq!(asked["port"], port, "{asked}");
        (client, stream(&asked))
    }

    /// The same, with the stream acknowledged.
    #[track_caller]
    pub(crate) fn connected(&mut self, port: u16) -> (TcpStream, i64) {
        let (client, id) = self.client(port);
        self.peer.send_message(&ack(id));
        (client, id)
    }
}

pub(crate) fn events(home: &Home) -> Vec<String> {
    let exchange = |event: Value| {
        let kind = event["kind"].as_str().unwrap().trim_start_matches("port-forward-").to_owned();
        let detail = match kind.as_str() {
            "opened" => format!("{} {}", event["hostPort"], event["bindAddr"].as_str().unwrap()),
            "closed" => format!("{} {}", event["hostPort"], event["reason"].as_str().unwrap()),
            _ => String::new(),
        };
        format!("{kind} {} {detail}", event["port"]).trim_end().to_owned()
    };
    forward_events(home, NAME).into_iter().map(exchange).collect()
}

#[track_caller]
pub(crate) fn events_become(home: &Home, wanted: &[&str]) {
    let mut wanted: Vec<String> = wanted.iter().map(|event| (*event).to_owned()).collect();
    wanted.sort();
    wait_until("the events", || {
        let reported = events(home);
        let mut sorted = reported.clone();
        sorted.sort();
        if sorted == wanted { Ok(()) } else { Err((reported, wanted.clone())) }
    });
}

/// Asserts that no listener answers at a port of the host, on either family.
#[track_caller]
pub(crate) fn assert_unbound(port: u16) {
    for address in [
        SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
        SocketAddr::from((std::net::Ipv6Addr::LOCALHOST, port)),
    ] {
        assert!(TcpStream::connect(address).is_err(), "{address} answers");
    }
}

/// Returns the ports in the answer of `status`, which are unordered.
pub(crate) fn status_ports(home: &Home) -> Value {
    let status = done(home, &json!({"kind": "status", "containerName": NAME}));
    let mut ports: Vec<u64> =
        status["forwardedPorts"].as_array().unwrap().iter().map(|port| port.as_u64().unwrap()).collect();
    ports.sort_unstable();
    json!(ports)
}

#[track_caller]
pub(crate) fn status_ports_become(home: &Home, wanted: &[u16]) {
    wait_until("the forwarded ports", || {
        let ports = status_ports(home);
        if ports == json!(wanted) { Ok(()) } else { Err(ports) }
    });
}

fn start_sends_hello() {
    let home = Home::new();
    let _daemon = home.daemon();
    let container = Container::listen(TOKEN);
    container.register(&home, NAME);
    let mut peer = container.accept_hello();
    // No further message before the answer.
    assert!(peer.is_silent_for(NEGATIVE_WAIT));
    peer.ping();
}

fn subscribes() {
    let home = Home::new();
    let mut scene = Scene::open(&home, json!({"allow": "*"}));
    assert!(scene.peer.is_silent_for(NEGATIVE_WAIT), "once");
}

fn auth_nack_is_fatal() {
    for reason in ["invalid token", "expected broker-hello first"] {
        let home = Home::new();
        let _daemon = home.daemon();
        let container = Container::listen(TOKEN);
        container.register(&home, NAME);
        let mut peer = container.accept_hello();
        peer.send_message(&json!({"type": "broker-hello-nack", "reason": reason}));
        // Whether or not the container closes the connection after it.
        peer.receive_end();
        let event = home.wait_for_event("registration-skipped", |event| event["containerName"] == NAME);
        assert_eq!(event["reason"], format!("fatal broker auth: {reason}"));
        wait_until("the registration to go", || {
            let left = (names(&home), home.registration(NAME).exists());
            if left == (vec![], false) { Ok(()) } else { Err(left) }
        });
        // The first retry delay would be over.
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(1500) {
            assert!(!container.has_pending_connection(), "it reconnected after {reason}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn close_reconnects() {
    let home = Home::new();
    let _daemon = home.daemon();
    let container = Container::listen(TOKEN);
    container.register(&home, NAME);
    let mut peer = container.welcome();
    peer.close(1001, "going away");
    drop(peer);
    let mut peer = container.welcome();
    // A nack with another reason is not fatal.
    peer.hang_up();
    peer = container.accept_hello();
    peer.send_message(&json!({"type": "broker-hello-nack", "reason": "too busy"}));
    peer.receive_end();
    container.welcome().ping();
    assert_eq!(names(&home), [NAME]);
    assert_eq!(home.count_events("registration-skipped", NAME), 0);
}

fn snapshot_installs() {
    let home = Home::new();
    let scene = Scene::forwarding(&home, &[5173, 8080]);
    scene.events_become(&["opened 5173 5173 127.0.0.1", "opened 8080 8080 127.0.0.1"]);
    let whole = json!({"kind": "port-forward-opened", "containerName": NAME, "port": 5173, "hostPort": 5173, "bindAddr": "127.0.0.1"});
    assert!(forward_events(&home, NAME).contains(&whole), "{:?}", forward_events(&home, NAME));
    for port in [5173, 8080] {
        connect((Ipv4Addr::LOCALHOST, port));
    }
}

fn deny_list() {
    let home = Home::new();
    let mut scene = Scene::open(&home, json!({"allow": "*", "deny": [9229]}));
    scene.peer.send_message(&snapshot(&[9229, 5173]));
    scene.peer.receive_exactly(&not_forwarded(9229, "policy excluded"));
    scene.peer.receive_exactly(&forwarded(5173, 5173));
    assert_unbound(9229);
    scene.events_become(&["opened 5173 5173 127.0.0.1"]);
}

fn allowlist() {
    let home = Home::new();
    let mut scene = Scene::open(&home, json!({"allow": [5173, 8973]}));
    // The container's own port is never forwarded, even when it is listed.
    scene.peer.send_message(&snapshot(&[8080, 8973, 5173]));
    scene.peer.receive_exactly(&not_forwarded(8080, "policy excluded"));
    scene.peer.receive_exactly(&not_forwarded(8973, "policy excluded"));
    scene.peer.receive_exactly(&forwarded(5173, 5173));
    assert_unbound(8080);
    assert_unbound(8973);
    scene.events_become(&["opened 5173 5173 127.0.0.1"]);
    // The highest and the lowest port that a list may name.
    let other = Container::listen("another-token").allowing(json!({"allow": [1, 65535]}));
    other.register(&home, "other");
    let mut peer = other.welcome();
    peer.send_message(&snapshot(&[1, 65535, 2]));
    peer.receive_exactly(&forwarded(1, 1));
    peer.receive_exactly(&forwarded(65535, 65535));
    peer.receive_exactly(&not_forwarded(2, "policy excluded"));
}

fn off_switch() {
    let home = Home::new();
    let _daemon = home.daemon();
    let (off, on) = (Container::listen(TOKEN).allowing(json!({"allow": []})), Container::listen("on"));
    off.register(&home, NAME);
    on.register(&home, "on");
    // The other container, registered later, is connected and authenticated.
    on.welcome();
    assert!(!off.has_pending_connection());
    std::thread::sleep(NEGATIVE_WAIT);
    assert!(!off.has_pending_connection());
    assert_eq!(forward_events(&home, NAME), Vec::<Value>::new());
    assert_eq!(status_ports(&home), json!([]));
}

fn opened_installs() {
    let home = Home::new();
    let mut scene = Scene::open(&home, json!({"allow": "*"}));
    scene.peer.send_message(&snapshot(&[]));
    scene.peer.send_message(&opened(3000));
    scene.peer.receive_exactly(&forwarded(3000, 3000));
    scene.events_become(&["opened 3000 3000 127.0.0.1"]);
    scene.client(3000);
}

fn closed_tears_down() {
    let home = Home::new();
    let mut scene = Scene::forwarding(&home, &[5173]);
    let (client, id) = scene.connected(5173);
    scene.peer.send_message(&data(id, b"hello"));
    expect_bytes(&client, b"hello");
    scene.peer.send_message(&closed(5173));
    scene.events_become(&["opened 5173 5173 127.0.0.1", "closed 5173 5173 container-released"]);
    assert_unbound(5173);
    // Its clients are disconnected, and the container is notified so that it closes its side.
    scene.peer.receive_exactly(&close_downstream(id));
    let _ = ends_by(&client);
    status_ports_become(&home, &[]);
    // It is announced again, and answers again.
    scene.peer.send_message(&opened(5173));
    scene.peer.receive_exactly(&forwarded(5173, 5173));
    scene.client(5173);
}

fn address_in_use() {
    let home = Home::new();
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 5173)).unwrap();
    let mut scene = Scene::open(&home, json!({"allow": "*"}));
    scene.peer.send_message(&snapshot(&[5173]));
    let result = scene.peer.receive("port-forward-result");
    let reason = result["reason"].as_str().unwrap().to_owned();
    assert_eq!(result, not_forwarded(5173, &reason));
    assert!(reason.contains("EADDRINUSE"), "{reason}");
    scene.events_become(&["failed 5173"]);
    assert_eq!(forward_events(&home, NAME)[0]["reason"], reason.as_str());
    assert_eq!(status_ports(&home), json!([]));
    // When it is free again, the daemon does not retry until it is announced again.
    drop(taken);
    assert!(scene.peer.is_silent_for(2 * NEGATIVE_WAIT), "it tried again by itself");
    assert_unbound(5173);
    scene.peer.send_message(&closed(5173));
    scene.peer.send_message(&opened(5173));
    scene.peer.receive_exactly(&forwarded(5173, 5173));
    scene.events_become(&["failed 5173", "opened 5173 5173 127.0.0.1"]);
}

fn allocates_streams() {
    let home = Home::new();
    let mut scene = Scene::forwarding(&home, &[5173]);
    let _clients: Vec<TcpStream> = (1..=3)
        .map(|id| {
            let client = connect((Ipv4Addr::LOCALHOST, 5173));
            assert_eq!(scene.peer.receive("relay-open"), open(id, 5173));
            client
        })
        .collect();
    // They continue to increase after a reconnect.
    scene.peer.hang_up();
    scene.peer = scene.container.welcome();
    scene.peer.send_message(&snapshot(&[5173]));
    scene.peer.receive_exactly(&forwarded(5173, 5173));
    let (_client, id) = scene.client(5173);
    assert_eq!(id, 4);
}

fn data_after_ack() {
    let home = Home::new();
    let mut scene = Scene::forwarding(&home, &[5173]);
    let (mut client, id) = scene.client(5173);
    client.write_all(b"GET / HTTP/1.1\r\n").unwrap();
    client.write_all(b"\r\n").unwrap();
    assert!(scene.peer.is_silent_for(NEGATIVE_WAIT), "data before the ack is dropped by the container");
    scene.peer.send_message(&ack(id));
    assert_eq!(scene.peer.receive_data(id, 18), b"GET / HTTP/1.1\r\n\r\n");
}

fn data_to_host() {
    let home = Home::new();
    let mut scene = Scene::forwarding(&home, &[5173]);
    let (client, id) = scene.connected(5173);
    for piece in [&b"HTTP/1.1 200 OK\r\n"[..], b"", b"\r\n", &[0, 255, 128]] {
        scene.peer.send_message(&data(id, piece));
    }
    expect_bytes(&client, b"HTTP/1.1 200 OK\r\n\r\n\x00\xff\x80");
    // The bytes arrive before the end.
    scene.peer.send_message(&data(id, b"last words"));
    scene.peer.send_message(&close_upstream(id));
    expect_bytes(&client, b"last words");
    assert_eq!(ends_by(&client), End::Eof);
    drop(client);
    scene.peer.send_message(&opened(5174));
    scene.peer.receive_exactly(&forwarded(5174, 5174));
    assert_eq!(scene.peer.kept("relay-close"), 0, "a close is not answered");
}

fn nack_closes() {
    let home = Home::new();
    let mut scene = Scene::forwarding(&home, &[5173]);
    let (client, id) = scene.client(5173);
    scene.peer.send_message(&nack(id, "connect ECONNREFUSED 127.0.0.1:5173"));
    assert_eq!(ends_by(&client), End::Reset, "a dead port never looks alive");
    // The listener stays, and no close is sent.
    let (_client, next) = scene.connected(5173);
    assert_eq!((next, scene.peer.kept("relay-close")), (id + 1, 0));
}

fn close_sends_close() {
    let home = Home::new();
    let mut scene = Scene::forwarding(&home, &[5173]);
    let (mut client, id) = scene.connected(5173);
    client.write_all(b"bye").unwrap();
    drop(client);
    assert_eq!(scene.peer.receive_data(id, 3), b"bye");
    assert_eq!(scene.peer.receive("relay-close"), close_downstream(id));
    // The same for a client that sent a FIN and waits, and for one that disconnects before the ack.
    let (waiting, id) = scene.connected(5173);
    finish(&waiting);
    assert_eq!(scene.peer.receive("relay-close"), close_downstream(id));
    let (gone, id) = scene.client(5173);
    reset(gone);
    scene.peer.send_message(&ack(id));
    assert_eq!(scene.peer.receive("relay-close"), close_downstream(id));
}

fn disconnect_tears_down() {
    let home = Home::new();
    let mut scene = Scene::forwarding(&home, &[5173, 8080]);
    let (client, _) = scene.connected(5173);
    scene.peer.hang_up();
    events_become(
        &home,
        &[
            "opened 5173 5173 127.0.0.1",
            "opened 8080 8080 127.0.0.1",
            "closed 5173 5173 host-error",
            "closed 8080 8080 host-error",
        ],
    );
    let _ = ends_by(&client);
    assert_unbound(5173);
    assert_unbound(8080);
    assert_eq!(status_ports(&home), json!([]));
}

fn stop_ends_all() {
    for by_shutdown in [false, true] {
        let home = Home::new();
        let mut scene = Scene::forwarding(&home, &[5173, 8080]);
        let (client, _) = scene.connected(5173);
        if by_shutdown {
            scene.daemon.shut_down();
        } else {
            done(&home, &json!({"kind": "deregister", "containerName": NAME}));
        }
        let closed = ["closed 5173 5173 broker-stopped", "closed 8080 8080 broker-stopped"];
        let opened = ["opened 5173 5173 127.0.0.1", "opened 8080 8080 127.0.0.1"];
        events_become(&home, &[opened, closed].concat());
        let over = scene.peer.receive_end();
        assert!(matches!(over, Received::Closed(..)), "it closes the WebSocket in order: {over:?}");
        let _ = ends_by(&client);
        assert_unbound(5173);
        assert_unbound(8080);
        // The first retry delay would be over.
        std::thread::sleep(Duration::from_millis(1200));
        assert!(!scene.container.has_pending_connection(), "it reconnected");
    }
}

fn forwarded_ports() {
    let home = Home::new();
    let mut scene = Scene::forwarding(&home, &[8080, 5173]);
    status_ports_become(&home, &[5173, 8080]);
    scene.peer.send_message(&closed(8080));
    status_ports_become(&home, &[5173]);
    scene.peer.send_message(&request(4848, &[4900]));
    scene.peer.receive_exactly(&forwarded(4848, 4900));
    // A reserved forward is shown by its port on the host.
    status_ports_become(&home, &[4900, 5173]);
}

fn dedups() {
    let home = Home::new();
    let mut scene = Scene::forwarding(&home, &[5173]);
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 4848)).unwrap();
    scene.peer.send_message(&request(4848, &[4848, 4849]));
    scene.peer.receive_exactly(&forwarded(4848, 4849));
    for _ in 0..3 {
        scene.peer.send_message(&opened(5173));
        scene.peer.send_message(&opened(4848));
        scene.peer.send_message(&snapshot(&[5173, 4848]));
    }
    assert!(scene.peer.is_silent_for(NEGATIVE_WAIT), "a duplicate is not answered");
    drop(taken);
    assert_unbound(4848);
    scene.events_become(&["opened 5173 5173 127.0.0.1", "opened 4848 4849 127.0.0.1"]);
}

fn connect_timeout() {
    let home = Home::new();
    let _daemon = home.daemon();
    let container = Container::listen(TOKEN);
    container.register(&home, NAME);
    let silent = container.accept_raw();
    let start = Instant::now();
    silent.set_read_timeout(Some(Duration::from_secs(40))).unwrap();
    let mut buffer = [0; 4096];
    while !matches!(landfall_tests::read_some(&silent, &mut buffer), Ok(0) | Err(_)) {}
    let waited = start.elapsed();
    assert!((14..25).contains(&waited.as_secs()), "it waited {waited:?} instead of 15 s");
    container.welcome().ping();
}

fn rejection_reconnects() {
    let home = Home::new();
    let _daemon = home.daemon();
    let container = Container::listen(TOKEN);
    container.register(&home, NAME);
    // Closed at once, garbage, a refusal, a WebSocket that ends before the answer to the hello: each is a failed attempt.
    let mut at = vec![Instant::now()];
    drop(container.accept_raw());
    let mut garbage = container.accept_raw();
    at.push(Instant::now());
    garbage.write_all(b"SSH-2.0-OpenSSH_9.6\r\n").unwrap();
    garbage.set_read_timeout(Some(landfall_tests::TIMEOUT)).unwrap();
    while !matches!(landfall_tests::read_some(&garbage, &mut [0; 4096]), Ok(0) | Err(_)) {}
    drop(garbage);
    let peer = container.accept_hello();
    at.push(Instant::now());
    let rests = [at[1] - at[0], at[2] - at[1]];
    // Not earlier; on a busy machine it may be later.
    assert!(rests[0] >= Duration::from_millis(900) && rests[1] >= Duration::from_millis(1900), "{rests:?}");
    if landfall_tests::is_long() {
        // Connected, but not authenticated: the delays continue to grow. After an ack they start again.
        let before = Instant::now();
        peer.hang_up();
        let peer = container.welcome();
        assert!(before.elapsed() >= Duration::from_millis(3900), "{:?}", before.elapsed());
        let before = Instant::now();
        peer.hang_up();
        container.welcome();
        assert!(before.elapsed() < Duration::from_millis(1800), "{:?}", before.elapsed());
    }
}

fn no_host_port() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &[NAME]);
    let _daemon = home.daemon();
    let container = Container::listen(TOKEN);
    // The registered port leads nowhere, and no attach method is given: the daemon queries Docker.
    let nowhere = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
    let fields = json!({"wsHostPort": nowhere, "portForward": {"allow": "*"}, "brokerToken": TOKEN});
    landfall_tests::rpc::register_with(&home, NAME, &fields);
    docker.wait_for_calls("GET /containers/coder/json", 3);
    assert!(!container.has_pending_connection());
    docker.publish(NAME, Some(container.port()));
    let peer = container.welcome();
    // The daemon queries it again for every attempt.
    let elsewhere = Container::listen(TOKEN);
    docker.publish(NAME, Some(elsewhere.port()));
    peer.hang_up();
    elsewhere.welcome();
    assert!(!container.has_pending_connection());
}

fn result_ok() {
    let home = Home::new();
    let mut scene = Scene::open(&home, json!({"allow": "*"}));
    scene.peer.send_message(&snapshot(&[5173]));
    assert_eq!(
        scene.peer.message(),
        json!({"type": "port-forward-result", "port": 5173, "ok": true, "hostPort": 5173})
    );
    // No result is sent for duplicates.
    scene.peer.send_message(&opened(5173));
    assert!(scene.peer.is_silent_for(NEGATIVE_WAIT));
}

fn result_failed() {
    let home = Home::new();
    let _taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 5173)).unwrap();
    let mut scene = Scene::open(&home, json!({"allow": "*"}));
    scene.peer.send_message(&snapshot(&[]));
    scene.peer.send_message(&opened(5173));
    let result = scene.peer.message();
    assert_eq!((&result["port"], &result["ok"]), (&json!(5173), &json!(false)), "{result}");
    assert!(result["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{result}");
    assert!(result.get("hostPort").is_none(), "{result}");
}

fn result_excluded() {
    let home = Home::new();
    let mut scene = Scene::open(&home, json!({"allow": "*", "deny": [9229]}));
    scene.peer.send_message(&snapshot(&[8973, 9229]));
    for port in [8973, 9229] {
        scene.peer.receive_exactly(
            &json!({"type": "port-forward-result", "port": port, "ok": false, "reason": "policy excluded"}),
        );
    }
    scene.peer.send_message(&opened(9229));
    assert_eq!(scene.peer.message(), not_forwarded(9229, "policy excluded"));
    // A refused port yields no event.
    assert!(scene.events().is_empty(), "{:?}", scene.events());
}
