//! Reserved forwards (wire specification, A.3.8) and the registrations of brokers, against a scripted container: the
//! remaining acceptance rows of `hostd-client.test.ts`, those of `daemon.test.ts` and of `portbroker-manager.test.ts`.

use std::io::Write;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use landfall_tests::broker::{
    Container, ack, closed, data, forward_events, forwarded, nack, not_forwarded, opened, request, snapshot,
};
use landfall_tests::case::Case;
use landfall_tests::rpc::{Wire, ask, done, names, register_with};
use landfall_tests::{DockerMode, End, FakeDocker, Home, NEGATIVE_WAIT, connect, expect_bytes, wait_until};
use serde_json::json;

use crate::observe::ends_by;
use crate::portbroker_host::{NAME, Scene, TOKEN, assert_unbound, events_become, status_ports_become};

pub(crate) const CASES: &[Case] = &[
    Case::once("a14_hostd_client_reserved_request_binds_the_first_free_candidate", first_free_candidate),
    Case::once("a14_hostd_client_reserved_request_reports_failure_when_all_are_busy", all_busy),
    Case::once("a14_hostd_client_reserved_forward_suppresses_double_bind", no_double_bind),
    Case::once("a14_hostd_client_port_listen_closed_keeps_the_reserved_listener", closed_keeps_reserved),
    Case::once("a14_hostd_client_nack_closes_only_that_socket_of_a_reserved_listener", nack_keeps_reserved),
    Case::once("a14_hostd_client_opened_that_races_the_reserved_bind_adds_nothing", racing_opened),
    Case::once("a14_hostd_client_closed_event_carries_the_reserved_host_port", closed_carries_host_port),
    Case::once("portbroker_reserved_requests_of_every_kind_are_answered", every_kind_of_request),
    Case::once("c23_a_reserved_forward_obeys_the_policy_of_its_host_port", host_port_obeys_policy),
    Case::once("c23_no_forward_binds_a_port_of_landfall", no_control_port),
    Case::once("c23_a_container_reserves_no_more_than_16_ports", no_more_than_16),
    Case::once("portbroker_a_failed_reservation_frees_the_port", failed_gives_back),
    Case::once(
        "portbroker_reserved_listeners_outlive_the_websocket_and_their_streams_do_not",
        reserved_outlive,
    ),
    Case::once("a14_daemon_05_status_surfaces_the_ports_of_the_broker", status_surfaces),
    Case::once("a14_daemon_07_a_hung_broker_wedges_nothing", hung_broker),
    Case::once("a14_daemon_36_fatal_auth_forgets_the_registration", fatal_auth),
    Case::once("a14_daemon_37_a_stale_fatal_auth_changes_nothing", stale_fatal_auth),
    Case::once("a14_daemon_40_replay_revives_the_broker_of_a_living_container", replay_revives),
    Case::once("a14_daemon_41_replay_skips_a_container_that_is_gone", replay_skips),
    Case::once("a14_daemon_42_replay_tolerates_a_docker_that_fails", replay_tolerates),
    Case::once("a14_manager_start_awaits_the_stop_of_the_existing_broker", replacement_waits),
];

fn first_free_candidate() {
    let home = Home::new();
    let _taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 4848)).unwrap();
    let mut scene = Scene::open(&home, json!({"allow": "*"}));
    scene.peer.send_message(&json!({"type": "port-forward-request", "targetPort": 4848, "hostCandidates": [4848, 4849, 4850], "reason": "dashboard"}));
    assert_eq!(scene.peer.message(), forwarded(4848, 4849));
    scene.events_become(&["opened 4848 4849 127.0.0.1"]);
    let (mut client, id) = {
        let client = connect((Ipv4Addr::LOCALHOST, 4849));
        let asked = scene.peer.receive("relay-open");
        assert_eq!(asked["port"], 4848, "it is opened at the target");
        (client, asked["streamId"].as_i64().unwrap())
    };
    scene.peer.send_message(&ack(id));
    client.write_all(b"there").unwrap();
    assert_eq!(scene.peer.receive_data(id, 5), b"there");
    scene.peer.send_message(&data(id, b"back"));
    expect_bytes(&client, b"back");
    assert_unbound(4850);
}

fn all_busy() {
    let home = Home::new();
    let _taken = [4848, 4849].map(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap());
    let mut scene = Scene::open(&home, json!({"allow": "*"}));
    scene.peer.send_message(&request(4848, &[4848, 4849]));
    let result = scene.peer.message();
    let reason = result["reason"].as_str().unwrap_or_default();
    assert_eq!(result, not_forwarded(4848, reason));
    assert!(reason.contains("EADDRINUSE"), "{reason}");
    scene.events_become(&["failed 4848"]);
    assert_eq!(forward_events(&home, NAME)[0]["reason"], reason);
}

fn no_double_bind() {
    let home = Home::new();
    let mut scene = Scene::open(&home, json!({"allow": "*"}));
    scene.peer.send_message(&request(4848, &[4900]));
    scene.peer.receive_exactly(&forwarded(4848, 4900));
    scene.peer.send_message(&snapshot(&[4848, 5173]));
    scene.peer.receive_exactly(&forwarded(5173, 5173));
    scene.peer.send_message(&opened(4848));
    assert!(scene.peer.is_silent_for(NEGATIVE_WAIT));
    assert_unbound(4848);
    scene.events_become(&["opened 4848 4900 127.0.0.1", "opened 5173 5173 127.0.0.1"]);
    // In the other order, the automatic forward is closed.
    scene.peer.send_message(&request(5173, &[5173]));
    scene.peer.receive_exactly(&forwarded(5173, 5173));
    scene.events_become(&[
        "opened 4848 4900 127.0.0.1",
        "opened 5173 5173 127.0.0.1",
        "closed 5173 5173 container-released",
        "opened 5173 5173 127.0.0.1",
    ]);
    scene.client(5173);
}

fn closed_keeps_reserved() {
    let home = Home::new();
    let mut scene = Scene::open(&home, json!({"allow": "*"}));
    scene.peer.send_message(&request(4848, &[4848]));
    scene.peer.receive_exactly(&forwarded(4848, 4848));
    let (client, id) = scene.connected(4848);
    scene.peer.send_message(&snapshot(&[4848]));
    scene.peer.send_message(&closed(4848));
    scene.peer.send_message(&snapshot(&[]));
    scene.peer.send_message(&opened(3000));
    scene.peer.receive_exactly(&forwarded(3000, 3000));
    scene.peer.send_message(&data(id, b"still here"));
    expect_bytes(&client, b"still here");
    scene.client(4848);
    status_ports_become(&home, &[3000, 4848]);
    scene.events_become(&["opened 4848 4848 127.0.0.1", "opened 3000 3000 127.0.0.1"]);
}

fn nack_keeps_reserved() {
    let home = Home::new();
    let mut scene = Scene::open(&home, json!({"allow": "*"}));
    scene.peer.send_message(&request(4848, &[4848]));
    scene.peer.receive_exactly(&forwarded(4848, 4848));
    let (alive, kept) = scene.connected(4848);
    let (refused, id) = scene.client(4848);
    scene.peer.send_message(&nack(id, "ECONNREFUSED"));
    assert_eq!(ends_by(&refused), End::Reset);
    scene.peer.send_message(&data(kept, b"alive"));
    expect_bytes(&alive, b"alive");
    scene.connected(4848);
    status_ports_become(&home, &[4848]);
}

fn racing_opened() {
    let home = Home::new();
    let mut scene = Scene::open(&home, json!({"allow": "*"}));
    // As many as a container can reserve.
    for port in 4800..4816 {
        scene.peer.send_message(&request(port, &[port + 100]));
        scene.peer.send_message(&opened(port));
    }
    for port in 4800..4816 {
        scene.peer.receive_exactly(&forwarded(port, port + 100));
        assert_unbound(port);
    }
    assert!(scene.peer.is_silent_for(NEGATIVE_WAIT), "one result each");
    assert_eq!(scene.events().len(), 16, "{:?}", scene.events());
}

fn closed_carries_host_port() {
    let home = Home::new();
    let mut scene = Scene::open(&home, json!({"allow": "*"}));
    scene.peer.send_message(&request(4848, &[4849]));
    scene.peer.receive_exactly(&forwarded(4848, 4849));
    done(&home, &json!({"kind": "deregister", "containerName": NAME}));
    events_become(&home, &["opened 4848 4849 127.0.0.1", "closed 4848 4849 broker-stopped"]);
    assert_unbound(4849);
}

/// The numbered steps of A.3.8, and invalid values in place of ports.
fn every_kind_of_request() {
    let home = Home::new();
    let mut scene = Scene::open(&home, json!({"allow": "*", "deny": [9229]}));
    scene.peer.send_message(&request(4848, &[4900]));
    scene.peer.receive_exactly(&forwarded(4848, 4900));
    // A repeated request with other candidates returns the existing forward.
    scene.peer.send_message(&request(4848, &[4901]));
    assert_eq!(scene.peer.message(), forwarded(4848, 4900));
    for port in [9229, 8973] {
        scene.peer.send_message(&request(port, &[4902]));
        assert_eq!(scene.peer.message(), not_forwarded(port, "policy excluded"));
    }
    scene.peer.send_message(&request(4850, &[]));
    assert_eq!(scene.peer.message(), not_forwarded(4850, "no host candidates"));
    // Invalid ports are ignored; the valid ones count.
    scene.peer.send_message(&json!({"type": "port-forward-request", "targetPort": 4851, "hostCandidates": [0, -1, 70_000, "x", null, 4903]}));
    assert_eq!(scene.peer.message(), forwarded(4851, 4903));
    for target in [json!(0), json!(65_536), json!(-1), json!("4852"), json!(null), json!(1.5)] {
        scene.peer.send_message(
            &json!({"type": "port-forward-request", "targetPort": target, "hostCandidates": [4904]}),
        );
    }
    assert!(scene.peer.is_silent_for(NEGATIVE_WAIT));
    for port in [4901, 4902, 4904] {
        assert_unbound(port);
    }
    scene.events_become(&["opened 4848 4900 127.0.0.1", "opened 4851 4903 127.0.0.1", "failed 4850"]);
}

fn host_port_obeys_policy() {
    let home = Home::new();
    let mut scene = Scene::open(&home, json!({"allow": "*", "deny": [5432]}));
    scene.peer.send_message(&request(4848, &[5432]));
    assert_eq!(scene.peer.message(), not_forwarded(4848, "policy excluded"));
    scene.peer.send_message(&request(4848, &[5432, 4900]));
    assert_eq!(scene.peer.message(), forwarded(4848, 4900));
    let next = Container::listen(TOKEN).allowing(json!({"allow": [4848, 4901]}));
    next.register(&home, NAME);
    let mut peer = next.welcome();
    peer.send_message(&request(4848, &[5432, 80]));
    assert_eq!(peer.message(), not_forwarded(4848, "policy excluded"));
    peer.send_message(&request(4848, &[5432, 4901]));
    assert_eq!(peer.message(), forwarded(4848, 4901));
    assert_unbound(5432);
}

fn no_control_port() {
    let home = Home::new();
    let own = [8975, 8788, 8789, 7900, 47823];
    let listed: Vec<u16> = own.into_iter().chain([5173]).collect();
    let mut scene = Scene::open(&home, json!({"allow": listed}));
    scene.peer.send_message(&snapshot(&listed));
    let mut results = listed.iter().map(|_| scene.peer.message()).collect::<Vec<_>>();
    results.sort_by_key(|result| result["ok"] == json!(true));
    assert_eq!(results.pop(), Some(forwarded(5173, 5173)));
    for result in results {
        assert_eq!(result["reason"], "policy excluded", "{result}");
    }
    for port in own {
        scene.peer.send_message(&request(4848, &[port]));
        assert_eq!(scene.peer.message(), not_forwarded(4848, "policy excluded"));
        assert_unbound(port);
    }
}

fn no_more_than_16() {
    let home = Home::new();
    let mut scene = Scene::open(&home, json!({"allow": "*"}));
    for port in 4800..4816 {
        scene.peer.send_message(&request(port, &[port]));
        assert_eq!(scene.peer.message(), forwarded(port, port));
    }
    scene.peer.send_message(&request(4816, &[4816]));
    assert_eq!(scene.peer.message(), not_forwarded(4816, "policy excluded"));
    assert_unbound(4816);
}

/// Two defects of the reference: two requests in progress bind once, and a failed one re-evaluates the port.
fn failed_gives_back() {
    let home = Home::new();
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 4900)).unwrap();
    let mut scene = Scene::forwarding(&home, &[5173]);
    scene.peer.send_message(&request(5173, &[4900]));
    let result = scene.peer.receive("port-forward-result");
    assert_eq!((&result["port"], &result["ok"]), (&json!(5173), &json!(false)), "{result}");
    status_ports_become(&home, &[5173]);
    scene.client(5173);
    drop(taken);
    for _ in 0..2 {
        scene.peer.send_message(&request(4848, &[4901, 4902]));
    }
    for _ in 0..2 {
        scene.peer.receive_exactly(&forwarded(4848, 4901));
    }
    assert_unbound(4902);
}

fn reserved_outlive() {
    let home = Home::new();
    let mut scene = Scene::forwarding(&home, &[5173]);
    scene.peer.send_message(&request(4848, &[4900]));
    scene.peer.receive_exactly(&forwarded(4848, 4900));
    let (client, _) = {
        let client = connect((Ipv4Addr::LOCALHOST, 4900));
        let id = scene.peer.receive("relay-open")["streamId"].as_i64().unwrap();
        scene.peer.send_message(&ack(id));
        (client, id)
    };
    scene.peer.hang_up();
    // The stream ends, the listener stays, and a new connection is closed at once.
    let _ = ends_by(&client);
    events_become(
        &home,
        &["opened 5173 5173 127.0.0.1", "opened 4848 4900 127.0.0.1", "closed 5173 5173 host-error"],
    );
    let early = connect((Ipv4Addr::LOCALHOST, 4900));
    let _ = ends_by(&early);
    assert_unbound(5173);
    scene.peer = scene.container.accept_hello();
    scene.peer.send_message(&json!({"type": "broker-hello-ack"}));
    scene.peer.send_message(&request(4848, &[4901]));
    scene.peer.receive("port-watch-subscribe");
    scene.peer.receive_exactly(&forwarded(4848, 4900));
    scene.peer.send_message(&snapshot(&[4848, 5173]));
    scene.peer.receive_exactly(&forwarded(5173, 5173));
    let _client = connect((Ipv4Addr::LOCALHOST, 4900));
    assert_eq!(scene.peer.receive("relay-open")["port"], 4848);
    assert_eq!(
        scene.events().iter().filter(|event| event.contains("4848")).count(),
        1,
        "{:?}",
        scene.events()
    );
}

fn status_surfaces() {
    let home = Home::new();
    let _scene = Scene::forwarding(&home, &[3000]);
    assert_eq!(
        done(&home, &json!({"kind": "status", "containerName": NAME})),
        json!({"containerName": NAME, "cwd": home.folder(NAME), "forwardedPorts": [3000]})
    );
}

/// The container stops reading while a client floods it, so that not even a close can be sent.
fn hung_broker() {
    let home = Home::new();
    let mut scene = Scene::forwarding(&home, &[5173]);
    let (client, _) = scene.connected(5173);
    fill(&client);
    let begun = Instant::now();
    done(&home, &json!({"kind": "deregister", "containerName": NAME}));
    assert!(begun.elapsed() < Duration::from_secs(10), "deregister took {:?}", begun.elapsed());
    let next = Container::listen("next-token");
    let begun = Instant::now();
    next.register(&home, NAME);
    assert!(begun.elapsed() < Duration::from_secs(10), "register took {:?}", begun.elapsed());
    next.welcome();
    assert_eq!(names(&home), [NAME]);
}

/// Writes until the socket accepts no more bytes for a while. Returns how many it accepted.
pub(crate) fn fill(mut client: &TcpStream) -> u64 {
    client.set_nonblocking(true).unwrap();
    let (block, mut sent, mut quiet) = (vec![7; 256 * 1024], 0, Instant::now());
    wait_until("the way to be full", || {
        if let Ok(count) = client.write(&block) {
            sent += count as u64;
            quiet = Instant::now();
        }
        if quiet.elapsed() > NEGATIVE_WAIT { Ok(()) } else { Err(sent) }
    });
    client.set_nonblocking(false).unwrap();
    sent
}

fn fatal_auth() {
    let home = Home::new();
    let mut scene = Scene::forwarding(&home, &[5173]);
    scene.peer.hang_up();
    scene.peer = scene.container.accept_hello();
    // A container that was created again has another token.
    scene.peer.send_message(&json!({"type": "broker-hello-nack", "reason": "invalid token"}));
    let skipped = home.wait_for_event("registration-skipped", |event| event["containerName"] == NAME);
    assert_eq!(skipped["reason"], "fatal broker auth: invalid token");
    wait_until("the registration to go", || {
        let left = (names(&home), home.registration(NAME).exists());
        if left == (vec![], false) { Ok(()) } else { Err(left) }
    });
    assert_unbound(5173);
}

fn stale_fatal_auth() {
    let home = Home::new();
    let _daemon = home.daemon();
    let (old, new) = (Container::listen("token-old"), Container::listen("token-new"));
    old.register(&home, NAME);
    let mut stale = old.accept_hello();
    let mut asked = Wire::connect(&home);
    // The rejection of the old token and the new registration cross.
    asked.send(landfall_tests::rpc::registration(&home, NAME, &new.fields()).to_string() + "\n");
    let _ = stale.try_send_message(&json!({"type": "broker-hello-nack", "reason": "invalid token"}));
    assert_eq!(asked.answer(), json!({"ok": true}));
    let mut peer = new.welcome();
    peer.send_message(&snapshot(&[5173]));
    peer.receive_exactly(&forwarded(5173, 5173));
    assert_eq!(home.registered(NAME).unwrap()["brokerToken"], "token-new");
    assert_eq!(names(&home), [NAME]);
    peer.ping();
}

fn replay_revives() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &[NAME]);
    let container = Container::listen(TOKEN);
    docker.publish(NAME, Some(container.port()));
    let daemon = home.daemon();
    let fields = json!({"wsHostPort": container.port(), "portForward": {"allow": "*"}, "brokerToken": TOKEN});
    register_with(&home, NAME, &fields);
    container.welcome();
    daemon.kill();
    let _daemon = home.daemon();
    let mut peer = container.welcome();
    peer.send_message(&snapshot(&[5173]));
    peer.receive_exactly(&forwarded(5173, 5173));
}

/// Writes the registration of a container as an earlier daemon would have.
fn write_registration(home: &Home, container: &Container) -> PathBuf {
    let remembered = json!({"containerName": NAME, "cwd": home.folder(NAME), "wsHostPort": container.port(),
        "portForward": {"allow": "*"}, "brokerToken": TOKEN});
    home.write_registration(NAME, remembered.to_string())
}

fn replay_skips() {
    let home = Home::new();
    let _docker = FakeDocker::start(&home, &["another"]);
    let container = Container::listen(TOKEN);
    let path = write_registration(&home, &container);
    let _daemon = home.daemon();
    wait_until("the file to go", || if path.exists() { Err("there") } else { Ok(()) });
    assert_eq!(names(&home), Vec::<String>::new());
    std::thread::sleep(NEGATIVE_WAIT);
    assert!(!container.has_pending_connection(), "a broker for a container that is gone");
}

fn replay_tolerates() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &[NAME]);
    docker.set_mode(DockerMode::Fails);
    let container = Container::listen(TOKEN);
    let path = write_registration(&home, &container);
    let _daemon = home.daemon();
    // Docker does not answer, so the registration counts.
    container.welcome().ping();
    assert!(path.exists());
    assert_eq!(names(&home), [NAME]);
}

fn replacement_waits() {
    let home = Home::new();
    let mut scene = Scene::forwarding(&home, &[5173]);
    let (_client, _) = scene.connected(5173);
    let next = Container::listen("next-token");
    next.register(&home, NAME);
    let mut peer = next.accept_hello();
    // The old broker has received everything by now, because its connection has ended.
    assert!(scene.peer.has_ended(), "the old broker's connection outlived the new one's hello");
    assert_eq!(scene.events(), ["opened 5173 5173 127.0.0.1", "closed 5173 5173 broker-stopped"]);
    assert_unbound(5173);
    peer.send_message(&json!({"type": "broker-hello-ack"}));
    peer.receive("port-watch-subscribe");
    peer.send_message(&snapshot(&[5173]));
    peer.receive_exactly(&forwarded(5173, 5173));
    assert!(!scene.container.has_pending_connection(), "the old container is dialled again");
    assert_eq!(ask(&home, &json!({"kind": "list"}))["ok"], true);
}
