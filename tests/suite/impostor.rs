//! Claim 31: an impostor receives no token. Another user of the machine listens where a container's port would be published.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};

use landfall_tests::broker::Container;
use landfall_tests::case::Case;
use landfall_tests::rpc::register_with;
use landfall_tests::{
    FakeDocker, Home, Impostor, ImpostorReply, NEGATIVE_WAIT, OTHER_UID, as_other_user, can_change_user,
};
use serde_json::{Value, json};

pub(crate) const CASES: &[Case] = &[
    Case::once("c31_websocket_another_user_on_the_published_port_gets_no_token", another_user),
    Case::once("c31_websocket_a_container_that_does_not_run_is_not_connected_to", stopped),
    Case::once("c31_websocket_an_impostor_during_a_restart_gets_no_token", during_restart),
    Case::once("c31_websocket_a_connection_that_another_user_accepts_gets_no_token", accepted_by_another),
    Case::once("c31_websocket_a_listener_that_changes_before_the_hello_gets_no_token", replaced),
    Case::once("c31_websocket_a_started_container_has_no_port_that_can_be_taken", started),
    Case::once("c31_a_restart_that_fails_since_its_port_is_taken_names_the_user", port_taken_at_restart),
];

const NAME: &str = "coder";
const TOKEN: &str = "canary-of-the-broker-0123456789-abcdefghijkl";

fn local(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

/// Returns a port that is currently free.
fn free_port() -> u16 {
    TcpListener::bind(local(0)).unwrap().local_addr().unwrap().port()
}

/// Registers as a reference client does: the daemon queries Docker by name.
fn register(home: &Home, port: u16) {
    let fields = json!({"wsHostPort": port, "portForward": {"allow": "*"}, "brokerToken": TOKEN});
    register_with(home, NAME, &fields);
}

/// Waits for the line of the log that names the impostor.
#[track_caller]
fn wait_for_its_name(home: &Home, port: u16) -> Value {
    let holds = format!("port {port} is held by");
    let user = format!("uid {OTHER_UID}");
    home.wait_for_event("notice", |event| {
        let text = event["text"].as_str().unwrap_or_default();
        text.contains(NAME) && text.contains(&holds) && text.contains(&user)
    })
}

fn another_user() {
    if !can_change_user() {
        return;
    }
    let home = Home::new();
    let _daemon = home.daemon();
    // On every address that receives connections to 127.0.0.1, by a listener that claims to be a container of the reference.
    for address in [local(0), "0.0.0.0:0".parse().unwrap(), "[::]:0".parse().unwrap()] {
        let impostor = Impostor::listen(address, ImpostorReply::Reference);
        let port = impostor.address().port();
        register(&home, port);
        wait_for_its_name(&home, port);
        impostor.assert_without(TOKEN);
        assert_eq!(impostor.connections(), 0, "{address}: it was connected to");
        drop(impostor);
        // The daemon connects to the container itself as soon as it has its port.
        Container::at(port, TOKEN).welcome().ping();
    }
}

fn stopped() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &[]);
    docker.add(NAME, false);
    let container = Container::listen(TOKEN);
    docker.publish(NAME, Some(container.port()));
    let _daemon = home.daemon();
    register(&home, container.port());
    // Docker reports that it does not run, so the listener is another process.
    docker.wait_for_calls("GET /containers/coder/json", 2);
    home.wait_for_event("notice", |event| {
        event["text"].as_str().unwrap_or_default().contains("container coder is not running")
    });
    assert!(!container.has_pending_connection(), "it was connected to");
    // It runs, and no longer publishes the port.
    docker.publish(NAME, None);
    docker.run(NAME);
    home.wait_for_event("notice", |event| {
        event["text"].as_str().unwrap_or_default().contains("does not publish port 8973 of coder")
    });
    assert!(!container.has_pending_connection(), "it was connected to");
    docker.publish(NAME, Some(container.port()));
    container.welcome().ping();
}

fn during_restart() {
    if !can_change_user() {
        return;
    }
    let home = Home::new();
    let docker = FakeDocker::start(&home, &[NAME]);
    let container = Container::listen(TOKEN);
    let port = container.port();
    docker.publish(NAME, Some(port));
    let _daemon = home.daemon();
    register(&home, port);
    let peer = container.welcome();
    // The container stops: its port is free, and is taken before the broker reconnects. Docker reports that it runs again.
    drop(container);
    let impostor = Impostor::listen(local(port), ImpostorReply::Reference);
    peer.hang_up();
    wait_for_its_name(&home, port);
    impostor.assert_without(TOKEN);
    assert_eq!(impostor.connections(), 0);
}

fn accepted_by_another() {
    if !can_change_user() {
        return;
    }
    let home = Home::new();
    let _daemon = home.daemon();
    // Our own listener, from which another user accepts.
    let listener = TcpListener::bind(local(0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let impostor = Impostor::serve(listener, ImpostorReply::Reference);
    register(&home, port);
    wait_for_its_name(&home, port);
    impostor.wait_for("GET /portbroker");
    impostor.assert_without(TOKEN);
}

fn replaced() {
    if !can_change_user() {
        return;
    }
    let home = Home::new();
    let _daemon = home.daemon();
    let port = free_port();
    let container = Container::at(port, TOKEN);
    register(&home, port);
    let stream = container.accept_raw();
    // The request has arrived, without an answer yet. Now the port gets another owner.
    drop(container);
    let listener = as_other_user(|| {
        let socket =
            rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::STREAM, None)
                .unwrap();
        rustix::net::sockopt::set_socket_reuseaddr(&socket, true).unwrap();
        rustix::net::bind(&socket, &local(port)).unwrap();
        rustix::net::listen(&socket, 1).unwrap();
        TcpListener::from(socket)
    });
    let impostor = Impostor::serve(listener, ImpostorReply::Reference);
    let mut peer = Container::upgrade(stream, port);
    wait_for_its_name(&home, port);
    // The connection from before is closed.
    peer.receive_end();
    assert!(peer.is_silent_for(NEGATIVE_WAIT) || peer.has_ended());
    impostor.assert_without(TOKEN);
}

fn port_taken_at_restart() {
    if !can_change_user() {
        return;
    }
    let home = Home::new();
    let docker = FakeDocker::start(&home, &[NAME]);
    let _daemon = home.daemon();
    let impostor = Impostor::listen(local(0), ImpostorReply::Reference);
    let port = impostor.address().port();
    // A container whose user chose the port.
    let binding = json!([{"HostIp": "127.0.0.1", "HostPort": port.to_string()}]);
    docker.set_process(NAME, 0, json!({"HostConfig": {"PortBindings": {"8973/tcp": binding}}}));
    register(&home, port);
    docker.fail_starts(Some("Error starting userland proxy: listen tcp4: bind: address already in use"));
    let restarted = home.run(&["restart", NAME]);
    assert_eq!(restarted.status.code(), Some(6), "{restarted:?}");
    let held = format!("port {port} of 127.0.0.1 is held by");
    let user = format!("uid {OTHER_UID}");
    let text = String::from_utf8_lossy(&restarted.stderr).into_owned();
    assert!(text.contains(&held) && text.contains(&user), "{text}");
    home.wait_for_event("restart-failed", |event| {
        let reason = event["reason"].as_str().unwrap_or_default();
        reason.contains(&held) && reason.contains(&user)
    });
    impostor.assert_without(TOKEN);
    // The restart succeeds as soon as the port is free.
    drop(impostor);
    docker.fail_starts(None);
    let restarted = home.run(&["restart", NAME]);
    assert!(restarted.status.success(), "{restarted:?}");
}

fn started() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &[]);
    let folder = home.folder("shop");
    let started = home.run(&["start", "--image", "busybox", folder.to_str().unwrap()]);
    assert!(started.status.success(), "{started:?}");
    // No fixed port exists that another user could take while the container is stopped.
    let create_request = docker.create_request("shop").unwrap();
    let bindings = &create_request["HostConfig"]["PortBindings"]["8973/tcp"];
    assert_eq!(bindings, &json!([{"HostIp": "127.0.0.1", "HostPort": ""}]), "{create_request}");
    let registered = home.registered("shop").unwrap();
    assert_eq!(registered.get("wsHostPort"), None, "{registered}");
    // The daemon connects to the port that Docker reports. Even there it sends no token to a peer that does not answer the
    // challenge, such as a process of our own user.
    let listener = TcpListener::bind(local(0)).unwrap();
    let impostor = Impostor::of_our_user(listener, ImpostorReply::Reference);
    docker.publish("shop", Some(impostor.address().port()));
    impostor.wait_for("GET /portbroker");
    home.wait_for_event("notice", |event| {
        let text = event["text"].as_str().unwrap_or_default();
        text.contains("[portbroker:shop]") && text.contains("does not prove that it is this container")
    });
    impostor.assert_without(registered["brokerToken"].as_str().unwrap());
}
