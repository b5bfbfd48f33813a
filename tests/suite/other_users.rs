//! Claims 24 and 31: other users of the machine, pages in a browser and programs without a token get nothing from an agent,
//! nor from the daemon's own environment.

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use landfall_tests::broker::{Agent, CONTAINER_PORT, Published, dial, hello, try_dial_with, welcome};
use landfall_tests::case::Case;
use landfall_tests::process::running;
use landfall_tests::rpc::{self, register_with, registration};
use landfall_tests::{Home, Namespace, Server, answer, as_other_user, can_change_user, connect, wait_until};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde_json::{Value, json};

pub(crate) const CASES: &[Case] = &[
    Case::once("c24_agent_a_request_of_a_page_is_refused", request_of_a_page),
    Case::once("c24_agent_rejected_hellos_do_not_fill_the_log", wrong_hellos),
    Case::once("c31_agent_a_directory_that_other_users_enter_is_refused", open_directory),
    Case::once("c24_tokens_are_not_in_the_environment_of_the_daemon", environment),
];

const TOKEN: &str = "canary-of-the-broker-0123456789-abcdefghijkl";

fn request_of_a_page() {
    let (home, inside) = (Home::new(), Namespace::new());
    let _agent = Agent::start(&home, &inside, TOKEN);
    for origin in ["http://evil.example", "null", "http://localhost:5173"] {
        let refused = try_dial_with(&inside, &[("origin", origin)]).map(drop).unwrap_err();
        assert!(refused.contains("403"), "{origin}: {refused}");
    }
    welcome(&inside, TOKEN).ping();
}

fn wrong_hellos() {
    let (home, inside) = (Home::new(), Namespace::new());
    let agent = Agent::start(&home, &inside, TOKEN);
    for _ in 0..30 {
        let mut peer = dial(&inside);
        peer.send_message(&hello("wrong"));
        peer.receive_end();
    }
    welcome(&inside, TOKEN).ping();
    let printed = || -> Vec<Value> {
        agent.printed().lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    };
    let authed = wait_until("the right hello in the log", || {
        printed().into_iter().find(|line| line["kind"] == "authed").ok_or_else(&printed)
    });
    assert_eq!(authed["omitted"], 20, "{authed}");
    assert_eq!(printed().iter().filter(|line| line["kind"] == "auth-failed").count(), 10);
    assert!(!agent.printed().contains(TOKEN));
}

/// Connects to the agent's socket as another user of the host.
fn other_user_connects(directory: &Path) -> rustix::io::Result<()> {
    as_other_user(|| {
        let socket: OwnedFd =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(directory.join("agent.sock"))?)
    })
}

fn open_directory() {
    if !can_change_user() {
        return;
    }
    let (home, inside) = (Home::new(), Namespace::new());
    let above = tempfile::tempdir().unwrap();
    let directory = above.path().join("coder");
    std::fs::create_dir(&directory).unwrap();
    let mode = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    mode(above.path(), 0o755);
    mode(&directory, 0o777);
    let mut command = Agent::command(&home, "");
    command.args(["--directory", directory.to_str().unwrap()]);
    let _agent = Agent::spawn(&home, &inside, command);
    // A user who can connect to the socket reaches everything that listens in the container.
    other_user_connects(&directory).unwrap();
    let daemon = home.daemon();
    let fields = json!({"way": {"kind": "agent", "directory": directory}, "portForward": {"allow": "*"}});
    let refused = rpc::refused(&home, &registration(&home, "coder", &fields));
    assert!(refused.contains("other users can enter"), "{refused}");
    assert!(refused.contains("install -d -m 0700"), "{refused}");
    // An existing registration is not used either.
    daemon.kill();
    home.write_registration("coder", registration(&home, "coder", &fields).to_string());
    let _daemon = home.daemon();
    let event = home.wait_for_event("container-unreachable", |event| event["containerName"] == "coder");
    assert!(event["reason"].as_str().unwrap().contains("other users can enter"), "{event}");
    // With a closed directory above it, other users cannot enter it, and the directory is used.
    mode(above.path(), 0o700);
    other_user_connects(&directory).unwrap_err();
    let server = Server::listen(&inside, "127.0.0.1:5173");
    server.serve(answer);
    home.wait_for_event("container-reached", |event| event["containerName"] == "coder");
    wait_until("the port to be forwarded", || {
        let ports = rpc::done(&home, &json!({"kind": "status", "containerName": "coder"}));
        if ports["forwardedPorts"] == json!([5173]) { Ok(()) } else { Err(ports) }
    });
    connect((Ipv4Addr::LOCALHOST, 5173));
}

/// The variables in which `register` and a container receive tokens.
const VARIABLES: [&str; 6] = [
    "LANDFALL_RESTART_TOKEN",
    "LANDFALL_BROKER_TOKEN",
    "LANDFALL_HOSTD_TOKEN",
    "LANDFALL_HOSTD_BROKER_TOKEN",
    "TYPECLAW_HOSTD_TOKEN",
    "TYPECLAW_HOSTD_BROKER_TOKEN",
];

/// Returns the environment that `/proc` shows to root and to the process's own user.
fn environment_of(pid: u32) -> String {
    let bytes = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn environment() {
    let (home, inside) = (Home::new(), Namespace::new());
    // Started directly, as a service manager does.
    let mut start = home.start();
    for variable in VARIABLES {
        start = start.variable(variable, TOKEN);
    }
    let daemon = start.wait_until_ready();
    assert!(environment_of(daemon.pid()).contains("LANDFALL_HOME"), "it is there");
    assert!(!environment_of(daemon.pid()).contains(TOKEN));
    // Its children do not have them either; an engine is one.
    let _agent = Agent::start(&home, &inside, TOKEN);
    let published = Published::start(inside.duplicate(), CONTAINER_PORT);
    let fields = json!({"wsHostPort": published.port(), "portForward": {"allow": "*"}, "brokerToken": TOKEN,
        "way": {"kind": "websocket"}});
    register_with(&home, "inner", &fields);
    home.wait_for_event("engine-attached", |_| true);
    let engines = running("_engine");
    assert!(!engines.is_empty());
    for engine in engines {
        assert!(!environment_of(engine).contains(TOKEN));
    }
    daemon.shut_down();
    // Started by a verb whose environment contains one.
    let mut up = home.command(&["up"]);
    for variable in VARIABLES {
        up.env(variable, TOKEN);
    }
    assert!(up.output().unwrap().status.success());
    let hostd = running("_hostd");
    assert_eq!(hostd.len(), 1);
    assert!(!environment_of(hostd[0]).contains(TOKEN));
}
