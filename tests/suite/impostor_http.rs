//! Claim 31, for HTTP: a process of another user that holds the port to which containers send their tokens is named, no
//! container is made that would send its token there, and the socket of a container leads only to the daemon.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Output;
use std::time::Duration;

use landfall_tests::case::Case;
use landfall_tests::http::{Web, ask_at};
use landfall_tests::process::descriptors_of;
use landfall_tests::rpc::register_with;
use landfall_tests::{
    FakeDocker, Home, Impostor, ImpostorReply, OTHER_UID, as_other_user, can_change_user, wait_until,
};
use serde_json::{Value, json};

pub(crate) const CASES: &[Case] = &[
    Case::once("c31_http_an_impostor_at_the_gateway_before_the_start_is_named", before_the_start),
    Case::once("c31_http_an_impostor_before_a_late_docker_is_named_and_the_port_bound_later", late_docker),
    Case::once("c31_http_a_container_has_a_socket_that_no_other_user_reaches", socket_of_its_own),
    Case::once("c31_http_a_container_asks_over_its_socket_and_never_at_the_url", socket_before_url),
    Case::once("c24_http_loopback_clients_cannot_exhaust_the_connections_of_containers", places),
];

const NAME: &str = "coder";
const TOKEN: &str = "canary-of-a-restart-0123456789-abcdefghijkl";
/// The address that Docker reports as its bridge's gateway.
const GATEWAY: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 77));
const PORT: u16 = 8974;

fn text(output: &Output) -> String {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    format!("{out}{err}")
}

/// Asserts that a text names the holder as every verb does.
fn assert_named(reported: &str, port: u16) {
    assert!(reported.contains(&format!("port {port} of {GATEWAY} is held by")), "{reported}");
    assert!(reported.contains(&format!("uid {OTHER_UID}")), "{reported}");
}

fn listens_at(home: &Home, host: IpAddr, port: u16) {
    home.wait_for_event("daemon-http-listening", |event| {
        event["host"] == host.to_string() && event["port"] == port
    });
    TcpStream::connect((host, port)).unwrap();
}

/// Runs `landfall start` of a folder, from an existing image.
fn start(home: &Home) -> Output {
    let folder = home.folder(NAME);
    home.run(&["start", "--image", "busybox", folder.to_str().unwrap()])
}

fn before_the_start() {
    if !can_change_user() {
        return;
    }
    let home = Home::new();
    let docker = FakeDocker::start(&home, &[]);
    docker.set_gateway(GATEWAY);
    let impostor = Impostor::listen((GATEWAY, PORT), ImpostorReply::Http);
    assert_named(&text(&home.run(&["doctor"])), PORT);
    let up = home.run(&["up"]);
    assert!(up.status.success(), "{up:?}");
    assert_named(&text(&up), PORT);
    assert_named(&text(&home.run(&["status"])), PORT);
    assert_named(&text(&home.run(&["doctor"])), PORT);
    let status: Value = serde_json::from_slice(&home.run(&["status", "--json"]).stdout).unwrap();
    assert_eq!(status["http"]["fallback"]["uid"], OTHER_UID, "{status}");
    home.wait_for_event("notice", |event| {
        let text = event["text"].as_str().unwrap_or_default();
        text.contains("is held by") && text.contains(&format!("uid {OTHER_UID}"))
    });
    // A container that is made now gets a port on which the daemon listens.
    let started = start(&home);
    assert!(started.status.success(), "{started:?}");
    let create_request = docker.create_request(NAME).unwrap();
    let port = status["httpPort"].as_u64().unwrap();
    assert_ne!(port, u64::from(PORT));
    let url = json!(format!("LANDFALL_HOSTD_URL=http://host.docker.internal:{port}"));
    assert!(create_request["Env"].as_array().unwrap().contains(&url), "{create_request}");
    listens_at(&home, GATEWAY, port.try_into().unwrap());
    // Containers that were made before reach the daemon as soon as the port is free.
    drop(impostor);
    listens_at(&home, GATEWAY, PORT);
    wait_until("the holder to be forgotten", || match text(&home.run(&["status"])) {
        reported if reported.contains("is held by") => Err(reported),
        _ => Ok(()),
    });
}

fn late_docker() {
    if !can_change_user() {
        return;
    }
    let home = Home::new();
    let _daemon = home.daemon();
    let impostor = Impostor::listen((GATEWAY, PORT), ImpostorReply::Http);
    let docker = FakeDocker::start(&home, &[]);
    docker.set_gateway(GATEWAY);
    let named = |event: &Value| {
        let text = event["text"].as_str().unwrap_or_default();
        text.contains("is held by") && text.contains(&format!("uid {OTHER_UID}"))
    };
    home.wait_for_event("notice", named);
    assert_named(&text(&home.run(&["up"])), PORT);
    assert_named(&text(&home.run(&["status"])), PORT);
    assert_named(&text(&home.run(&["doctor"])), PORT);
    // No container is made that would send its token there.
    let refused = start(&home);
    assert_eq!(refused.status.code(), Some(6), "{refused:?}");
    assert_named(&text(&refused), PORT);
    assert!(text(&refused).contains("hint: "), "{refused:?}");
    assert_eq!(docker.calls("POST /containers/create"), 0);
    assert_eq!(home.registered(NAME), None);
    // The daemon reports it once, although it retries, and binds the port when it is free.
    let count = || home.events().iter().filter(|event| event["kind"] == "notice" && named(event)).count();
    assert_eq!(count(), 1);
    drop(impostor);
    listens_at(&home, GATEWAY, PORT);
    let started = start(&home);
    assert!(started.status.success(), "{started:?}");
    assert_eq!(count(), 1);
}

/// The directory of the container's socket on the host.
fn directory(home: &Home) -> PathBuf {
    home.path().join("run/http").join(NAME)
}

fn restart() -> Value {
    json!({"kind": "restart", "containerName": NAME})
}

fn socket_of_its_own() {
    if !can_change_user() {
        return;
    }
    let home = Home::new();
    let docker = FakeDocker::start(&home, &[NAME]);
    let daemon = home.daemon();
    register_with(&home, NAME, &json!({"restartToken": TOKEN, "httpSocket": true}));
    // Every directory above it is open, as a home directory may be.
    for path in [home.path().parent().unwrap().to_owned(), home.path()] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    assert_eq!((home.mode("run/http"), home.mode("run/http/coder")), (0o700, 0o755));
    assert_eq!(home.mode("run/http/coder/http.sock"), 0o666);
    let path = directory(&home).join("http.sock");
    let error = as_other_user(|| UnixStream::connect(&path)).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
    // Any user of the container can use the mounted directory.
    let mounted = std::fs::File::open(directory(&home)).unwrap();
    let inside = PathBuf::from(format!("/proc/self/fd/{}/http.sock", mounted.as_raw_fd()));
    let ask = |token| as_other_user(|| ask_at(&inside, token, &restart()).unwrap());
    assert_eq!((ask(None).status, ask(Some("wrong")).status), (401, 403));
    let listed = as_other_user(|| ask_at(&inside, Some(TOKEN), &json!({"kind": "list"})).unwrap());
    assert_eq!(listed.status, 403, "the privileged kinds are not there");
    assert_eq!(ask(Some(TOKEN)).status, 200);
    home.wait_for_event("restart-completed", |event| event["containerName"] == NAME);
    // The next daemon, after a kill, listens in the same directory.
    daemon.kill();
    assert!(as_other_user(|| UnixStream::connect(&inside)).is_err());
    let daemon = home.daemon();
    wait_until("the socket of the next daemon", || as_other_user(|| UnixStream::connect(&inside)));
    assert_eq!(ask(Some(TOKEN)).status, 200);
    // An orderly stop removes the socket and keeps the directory; removing the container removes the directory, too.
    daemon.shut_down();
    assert!(directory(&home).exists() && !path.exists());
    docker.remove(NAME, true);
    let _daemon = home.daemon();
    wait_until("the directory to go", || if directory(&home).exists() { Err("it is there") } else { Ok(()) });
}

fn socket_before_url() {
    if !can_change_user() {
        return;
    }
    let home = Home::new();
    let _docker = FakeDocker::start(&home, &[NAME]);
    let daemon = home.daemon();
    register_with(&home, NAME, &json!({"restartToken": TOKEN, "httpSocket": true}));
    let impostor = Impostor::listen((GATEWAY, PORT), ImpostorReply::Http);
    let agent = || {
        let mut command = home.command(&["agent", "restart"]);
        command.env("LANDFALL_HOSTD_SOCKET", directory(&home).join("http.sock"));
        command.env("LANDFALL_HOSTD_URL", format!("http://{GATEWAY}:{PORT}"));
        command.env("LANDFALL_HOSTD_TOKEN", TOKEN).env("LANDFALL_CONTAINER_NAME", NAME);
        command
    };
    let asked = agent().output().unwrap();
    assert!(asked.status.success(), "{asked:?}");
    home.wait_for_event("restart-completed", |event| event["containerName"] == NAME);
    let denied = agent().env("LANDFALL_HOSTD_TOKEN", "wrong").output().unwrap();
    assert_eq!(denied.status.code(), Some(4), "{denied:?}");
    // While the daemon does not run, the socket refuses connections, and the URL is not used.
    daemon.kill();
    let asked = agent().output().unwrap();
    assert_eq!(asked.status.code(), Some(5), "{asked:?}");
    assert_eq!(impostor.connections(), 0);
    // A container without a socket depends on its URL, as one of the reference does.
    let asked = agent().env_remove("LANDFALL_HOSTD_SOCKET").output().unwrap();
    assert!(asked.status.success(), "{asked:?}");
    impostor.wait_for(TOKEN);
}

fn places() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &[NAME]);
    docker.set_gateway(GATEWAY);
    let daemon = home.daemon();
    register_with(&home, NAME, &json!({"restartToken": TOKEN, "httpSocket": true}));
    listens_at(&home, GATEWAY, PORT);
    // One client per loopback address, each with a request whose body never arrives.
    let held: Vec<Web> = (0..300)
        .map(|number: u32| {
            let from = Ipv4Addr::new(127, 0, 1, u8::try_from(number % 250 + 1).unwrap());
            let mut web = Web::connect_from(from.into(), SocketAddr::from((Ipv4Addr::LOCALHOST, PORT)));
            // A rejected connection is closed.
            let _ = web.try_send(
                "POST /rpc HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer x\r\ncontent-length: 9\r\n\r\n",
            );
            web
        })
        .collect();
    let refused = |answer: &landfall_tests::http::Answer| assert_eq!(answer.status, 403, "{answer:?}");
    let mut looks = Vec::new();
    wait_until("every client to be accepted or rejected", || {
        looks.push(descriptors_of(daemon.pid()));
        std::thread::sleep(Duration::from_millis(20));
        let last = &looks[looks.len().saturating_sub(10)..];
        if last.len() == 10 && last.iter().all(|look| *look == last[0]) { Ok(()) } else { Err(last.to_vec()) }
    });
    let waiting = || held.iter().filter(|web| web.is_silent()).count();
    let before = waiting();
    for _ in 0..3 {
        let mut container = Web::connect_from(GATEWAY, SocketAddr::new(GATEWAY, PORT));
        container.send(landfall_tests::http::post(PORT, Some("x"), "{}"));
        refused(&container.answer());
    }
    // The container's requests took no place from the waiting clients, which hold as many places as loopback clients may.
    assert_eq!(waiting(), before, "loopback clients lost their places first");
    refused(&ask_at(&directory(&home).join("http.sock"), Some("x"), &json!({})).unwrap());
    assert_eq!(before, 64);
}
