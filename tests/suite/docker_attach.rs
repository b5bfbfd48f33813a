//! Attaching to Docker containers: which process belongs to the container, which network it has, and which ports Docker
//! publishes itself. The engine is scripted; the processes and their networks are real.

use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use landfall_tests::case::Case;
use landfall_tests::rpc::{ask, register_with};

use landfall_tests::{Conversation, FakeDocker, Flood, Home, Namespace, Server, answer, wait_until};
use serde_json::{Value, json};

use crate::crash::describe;

pub(crate) const CASES: &[Case] = &[
    Case::once("c17_a_process_outside_the_container_is_not_entered", foreign_process),
    Case::once("c17_a_container_on_the_hosts_network_is_refused_with_a_reason", host_network),
    Case::once("ports_published_by_docker_are_not_forwarded", published),
    Case::once("ports_of_a_shared_network_belong_to_its_owner", shared_network),
    Case::once("stopped_containers_are_not_inspected_until_an_event", stopped),
    Case::once("a_container_that_starts_without_a_docker_event_is_discovered", missed_event),
    Case::once("a_labelled_container_keeps_its_ports_when_it_is_renamed", renamed),
];

/// The first process of a container: in a network namespace, and identified as the container's by its mounts.
struct First(Child);

impl First {
    /// # Panics
    /// When it cannot be started.
    #[track_caller]
    fn start(home: &Home, network: &Namespace, id: &str) -> First {
        let mounted = home.folder(id);
        let script = r#"mount --bind "$0" "$0" && exec sleep 10000"#;
        let child = Command::new("nsenter")
            .arg(format!("--net={}", network.path()))
            .args(["unshare", "--mount", "sh", "-c", script])
            .arg(&mounted)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let first = First(child);
        wait_until("the container's mount", || {
            let mounts = std::fs::read_to_string(format!("/proc/{}/mountinfo", first.pid())).unwrap();
            if mounts.contains(id) { Ok(()) } else { Err(mounts) }
        });
        first
    }

    fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for First {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Returns the description of a container.
fn container(home: &Home, name: &str) -> Value {
    let containers = describe(home)["containers"].take();
    let found = containers.as_array().unwrap().iter().find(|container| container["containerName"] == name);
    found.cloned().unwrap_or_default()
}

/// Waits until a container is in this state. Returns the reason.
#[track_caller]
fn wait_for_state(home: &Home, name: &str, state: &str) -> String {
    wait_until(&format!("{name} to be {state}"), || {
        let now = container(home, name);
        if now["state"] == state && (state == "reached" || !now["reason"].is_null()) {
            Ok(now["reason"].as_str().unwrap_or_default().to_owned())
        } else {
            Err(now)
        }
    })
}

/// Waits until a container has these ports: inside, on the host, and their states.
#[track_caller]
fn wait_for_ports(home: &Home, name: &str, wanted: &[(u16, u16, &str)]) -> Value {
    wait_until(&format!("{name} to have {wanted:?}"), || {
        let now = container(home, name);
        let rows = now["forwards"].as_array().cloned().unwrap_or_default();
        let reported: Vec<Value> =
            rows.iter().map(|row| json!([row["port"], row["hostPort"], row["state"]])).collect();
        if json!(reported) == json!(wanted) { Ok(now["forwards"].clone()) } else { Err(now) }
    })
}

fn register(home: &Home, name: &str) {
    register_with(home, name, &json!({"way": {"kind": "docker"}}));
}

fn answers(port: u16) -> bool {
    TcpStream::connect(SocketAddr::from(([127, 0, 0, 1], port))).is_ok()
}

fn foreign_process() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &["shop"]);
    let network = Namespace::new();
    let _server = Server::listen(&network, "127.0.0.1:3000");
    let first = First::start(&home, &network, &"f".repeat(64));
    docker.set_process("shop", first.pid(), json!({}));
    let _daemon = home.daemon();
    register(&home, "shop");
    let reason = wait_for_state(&home, "shop", "unreachable");
    let reported = format!("process {} does not belong to this container", first.pid());
    assert!(reason.starts_with(&reported), "{reason}");
    assert!(!answers(3000));
}

fn host_network() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &["shop"]);
    docker.set_process("shop", std::process::id(), json!({"HostConfig": {"NetworkMode": "host"}}));
    let _daemon = home.daemon();
    register(&home, "shop");
    let reason = wait_for_state(&home, "shop", "unreachable");
    assert!(reason.contains("the host's network"), "{reason}");
}

fn published() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &["shop"]);
    let network = Namespace::new();
    let _servers =
        ["0.0.0.0:3000", "127.0.0.1:3001", "127.0.0.1:3002"].map(|address| Server::listen(&network, address));
    let first = First::start(&home, &network, &docker.id("shop"));
    let ports = json!({"3000/tcp": [{"HostIp": "0.0.0.0", "HostPort": "13000"}],
        "3001/tcp": [{"HostIp": "127.0.0.1", "HostPort": "3001"}]});
    docker.set_process("shop", first.pid(), json!({"NetworkSettings": {"Ports": ports}}));
    let _daemon = home.daemon();
    register(&home, "shop");
    let wanted = [(3000, 13_000, "published"), (3001, 3001, "published"), (3002, 3002, "open")];
    let rows = wait_for_ports(&home, "shop", &wanted);
    assert_eq!(rows[0]["reason"], "Docker publishes it");
    assert!(rows[1]["reason"].as_str().unwrap().contains("loopback"), "{rows}");
    assert!(answers(3002) && !answers(3000) && !answers(3001) && !answers(13_000));
    // By names, as users address containers.
    let listed = home.run(&["ls"]);
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    assert!(listed.contains("published") && listed.contains("localhost:13000"), "{listed}");
}

fn shared_network() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &["shop", "side"]);
    let network = Namespace::new();
    let _server = Server::listen(&network, "127.0.0.1:3000");
    let firsts = ["shop", "side"].map(|name| First::start(&home, &network, &docker.id(name)));
    docker.set_process("shop", firsts[0].pid(), json!({}));
    let mode = format!("container:{}", docker.id("shop"));
    docker.set_process("side", firsts[1].pid(), json!({"HostConfig": {"NetworkMode": mode}}));
    let _daemon = home.daemon();
    // Alone it has the ports. The container that owns the network has them while it runs.
    register(&home, "side");
    wait_for_ports(&home, "side", &[(3000, 3000, "open")]);
    register(&home, "shop");
    let open = [(3000, 3000, "open")];
    wait_for_ports(&home, "shop", &open);
    let reason = wait_for_state(&home, "side", "unreachable");
    assert!(reason.contains("the network of container \"shop\""), "{reason}");
    assert!(answers(3000));
    ask(&home, &json!({"kind": "deregister", "containerName": "shop"}));
    wait_for_ports(&home, "side", &open);
}

/// Counts the requests about containers whose path starts like this.
fn inspections(docker: &FakeDocker, beginning: &str) -> usize {
    docker.calls(&format!("GET /containers/{beginning}"))
}

/// Registers stopped containers, and waits until each was inspected.
fn idle(home: &Home, docker: &FakeDocker, names: &[String]) {
    for name in names {
        docker.add(name, false);
        register(home, name);
    }
    for name in names {
        let reason = wait_for_state(home, name, "waiting");
        assert_eq!(reason, format!("container {name} is not running"));
    }
}

fn stopped() {
    // The second delay of a container that cannot be entered, minus a margin.
    const WINDOW: Duration = Duration::from_millis(3_500);
    let home = Home::new();
    let docker = FakeDocker::start(&home, &["odd"]);
    docker.set_process("odd", std::process::id(), json!({"HostConfig": {"NetworkMode": "host"}}));
    let network = Namespace::new();
    let _server = Server::listen(&network, "127.0.0.1:3000");
    let _daemon = home.daemon();
    docker.wait_for_calls("GET /events", 1);
    let names: Vec<String> = (0..20).map(|number| format!("idle-{number}")).collect();
    idle(&home, &docker, &names);
    // The attempts to enter an inaccessible container measure the time: at once, then after 2 s, then after 4 s.
    register(&home, "odd");
    wait_for_state(&home, "odd", "unreachable");
    let odd = "GET /containers/odd/json";
    docker.wait_for_calls(odd, docker.calls(odd) + 1);
    let (start, before) = (Instant::now(), inspections(&docker, "idle-"));
    docker.wait_for_calls(odd, docker.calls(odd) + 1);
    let pause = start.elapsed();
    assert_eq!(inspections(&docker, "idle-"), before, "in {pause:?}");
    assert!(pause > WINDOW, "the pauses do not grow: {pause:?}");
    // An event causes an inspection at once, of this container only.
    let first = First::start(&home, &network, &docker.id("idle-7"));
    docker.set_process("idle-7", first.pid(), json!({}));
    let own = inspections(&docker, "idle-7/");
    docker.run("idle-7");
    wait_for_ports(&home, "idle-7", &[(3000, 3000, "open")]);
    assert!(answers(3000));
    let others = inspections(&docker, "idle-") - inspections(&docker, "idle-7/");
    assert_eq!(others, before - own);
    // So does any event about an inaccessible container, and a new registration of it.
    let looks = docker.calls(odd);
    docker.emit_event("unpause", "odd");
    docker.wait_for_calls(odd, looks + 1);
    register(&home, "idle-3");
    docker.wait_for_calls("GET /containers/idle-3/json", 2);
    // When events may have been missed, every container is inspected.
    docker.hang_up();
    for name in names.iter().filter(|name| *name != "idle-7") {
        docker.wait_for_calls(&format!("GET /containers/{name}/json"), 2);
    }
}

fn missed_event() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &[]);
    let network = Namespace::new();
    let _server = Server::listen(&network, "127.0.0.1:3000");
    let _daemon = home.daemon();
    idle(&home, &docker, &["shop".to_owned()]);
    docker.set_events_disabled(true);
    let first = First::start(&home, &network, &docker.id("shop"));
    docker.set_process("shop", first.pid(), json!({}));
    docker.run("shop");
    wait_for_ports(&home, "shop", &[(3000, 3000, "open")]);
    assert!(answers(3000));
}

fn renamed() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &[]);
    let network = Namespace::new();
    Server::listen(&network, "[::]:3000").serve(answer);
    let talked = Server::listen(&network, "127.0.0.1:3001");
    let _daemon = home.daemon();
    docker.launch("shop", &[("dev.landfall.forward", "true")]);
    let first = First::start(&home, &network, &docker.id("shop"));
    docker.set_process("shop", first.pid(), json!({}));
    docker.emit_event("start", "shop");
    let open = [(3000, 3000, "open"), (3001, 3001, "open")];
    wait_for_ports(&home, "shop", &open);
    let mut conversation = Conversation::start(3001, &talked, 1);
    let flood = Flood::start(3000, 3);
    flood.wait_for_progress(20);
    for (old, new) in [("shop", "store"), ("store", "stall"), ("stall", "shop")] {
        docker.rename_to(old, new);
        wait_until(&format!("{old} to be {new}"), || {
            let reported = describe(&home)["containers"].take();
            let names: Vec<&str> =
                reported.as_array().unwrap().iter().filter_map(|one| one["containerName"].as_str()).collect();
            if names == [new] { Ok(()) } else { Err(reported.clone()) }
        });
        wait_for_ports(&home, new, &open);
        assert_eq!(container(&home, new)["state"], "reached");
        flood.wait_for_progress(50);
        conversation.wait_for_progress();
    }
    flood.end();
    conversation.end();
    // The listeners stay the same, and event subscribers are notified of the new name.
    let reported = |kind: &str, name: &str| {
        let events = home.events();
        let events = events.iter().filter(|event| event["event"]["kind"] == kind);
        events
            .filter(|event| event["event"]["containerName"] == name && event["event"]["port"] == 3000)
            .count()
    };
    assert_eq!((reported("port-forward-opened", "stall"), reported("port-forward-closed", "stall")), (1, 1));
    // The registration ends with the container, regardless of its name.
    docker.remove("shop", false);
    wait_until("the port to close", || if answers(3000) { Err("open") } else { Ok(()) });
}
