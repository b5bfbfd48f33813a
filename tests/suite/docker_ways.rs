//! Ways into containers of Docker's: whose process it is, whose network, and what is left to Docker. The engine says what a case
//! says; the processes and their networks are real.

use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};

use landfall_tests::case::Case;
use landfall_tests::rpc::{ask, register_with};
use landfall_tests::{FakeDocker, Home, Namespace, Server, wait_until};
use serde_json::{Value, json};

use crate::crash::describe;

pub(crate) const CASES: &[Case] = &[
    Case::once("c17_a_process_that_is_not_of_the_container_is_not_entered", stranger),
    Case::once("c17_a_container_on_the_hosts_network_is_explained", host_network),
    Case::once("what_docker_publishes_is_left_to_docker", published),
    Case::once("who_uses_anothers_network_leaves_its_ports_to_that_one", guest),
];

/// The first process of a container: in a network, and known to be the container's by what is mounted for it.
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

/// How a container stands.
fn container(home: &Home, name: &str) -> Value {
    let containers = describe(home)["containers"].take();
    let found = containers.as_array().unwrap().iter().find(|container| container["containerName"] == name);
    found.cloned().unwrap_or_default()
}

/// Waits until a container is in this state, and gives why.
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

/// Waits until a container has these ports: inside, on the host, and how they stand.
#[track_caller]
fn wait_for_ports(home: &Home, name: &str, wanted: &[(u16, u16, &str)]) -> Value {
    wait_until(&format!("{name} to have {wanted:?}"), || {
        let now = container(home, name);
        let rows = now["forwards"].as_array().cloned().unwrap_or_default();
        let told: Vec<Value> =
            rows.iter().map(|row| json!([row["port"], row["hostPort"], row["state"]])).collect();
        if json!(told) == json!(wanted) { Ok(now["forwards"].clone()) } else { Err(now) }
    })
}

fn register(home: &Home, name: &str) {
    register_with(home, name, &json!({"way": {"kind": "docker"}}));
}

fn answers(port: u16) -> bool {
    TcpStream::connect(SocketAddr::from(([127, 0, 0, 1], port))).is_ok()
}

fn stranger() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &["shop"]);
    let network = Namespace::new();
    let _server = Server::listen(&network, "127.0.0.1:3000");
    let first = First::start(&home, &network, &"f".repeat(64));
    docker.inhabit("shop", first.pid(), json!({}));
    let _daemon = home.daemon();
    register(&home, "shop");
    let reason = wait_for_state(&home, "shop", "unreachable");
    let told = format!("process {} is not of this container", first.pid());
    assert!(reason.starts_with(&told), "{reason}");
    assert!(!answers(3000));
}

fn host_network() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &["shop"]);
    docker.inhabit("shop", std::process::id(), json!({"HostConfig": {"NetworkMode": "host"}}));
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
    docker.inhabit("shop", first.pid(), json!({"NetworkSettings": {"Ports": ports}}));
    let _daemon = home.daemon();
    register(&home, "shop");
    let wanted = [(3000, 13_000, "published"), (3001, 3001, "published"), (3002, 3002, "open")];
    let rows = wait_for_ports(&home, "shop", &wanted);
    assert_eq!(rows[0]["reason"], "Docker publishes it");
    assert!(rows[1]["reason"].as_str().unwrap().contains("loopback"), "{rows}");
    assert!(answers(3002) && !answers(3000) && !answers(3001) && !answers(13_000));
    // By names, as people see it.
    let listed = home.run(&["ls"]);
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    assert!(listed.contains("published") && listed.contains("localhost:13000"), "{listed}");
}

fn guest() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &["shop", "side"]);
    let network = Namespace::new();
    let _server = Server::listen(&network, "127.0.0.1:3000");
    let firsts = ["shop", "side"].map(|name| First::start(&home, &network, &docker.id(name)));
    docker.inhabit("shop", firsts[0].pid(), json!({}));
    let mode = format!("container:{}", docker.id("shop"));
    docker.inhabit("side", firsts[1].pid(), json!({"HostConfig": {"NetworkMode": mode}}));
    let _daemon = home.daemon();
    // Alone it has the ports; the one whose network it is has them from its coming to its going.
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
