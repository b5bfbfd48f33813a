//! `landfall agent`: its start and end, and its answers to other programs in the container.

#![expect(clippy::unwrap_used, reason = "a test that cannot continue reports the line")]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Output;

use serde_json::Value;

use crate::seen;
use crate::support::{Running, landfall, output};

const TOKEN: &str = "a-token-that-nobody-may-read";

/// Starts an agent at a free port of 127.0.0.1, and returns the port.
fn agent(directory: Option<&str>, token: Option<&str>) -> (Running, u16) {
    let mut command = landfall();
    command.args(["agent", "--port", "0", "--bind", "127.0.0.1"]);
    command.args(directory.iter().flat_map(|directory| ["--directory", directory]));
    command.envs(token.map(|token| ("LANDFALL_HOSTD_BROKER_TOKEN", token)));
    let mut running = Running::start(command);
    let line: Value = serde_json::from_str(&running.err("agent-listening")).unwrap();
    let port = line["address"].as_str().unwrap().rsplit(':').next().unwrap().parse().unwrap();
    (running, port)
}

fn forward(agent_port: u16, arguments: &[&str]) -> Output {
    let port = agent_port.to_string();
    output(&[&["agent", "forward", "4848", "--agent-port", &port], arguments].concat())
}

#[test]
fn an_agent_without_any_endpoint_does_not_start() {
    // If the default directory exists, the agent starts.
    if !std::path::Path::new("/run/landfall").exists() {
        insta::assert_snapshot!("agent_useless", seen(&output(&["agent"])));
    }
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let mut command = landfall();
    command.args(["agent", "--bind", "127.0.0.1", "--port", &port]);
    let printed = seen(&command.env("TYPECLAW_HOSTD_BROKER_TOKEN", TOKEN).output().unwrap());
    insta::assert_snapshot!("agent_port_taken", printed.replace(&port, "PORT"));
    let missing = output(&["agent", "--port", "0", "--directory", "/no/such/directory"]);
    insta::assert_snapshot!("agent_directory_missing", seen(&missing));
}

#[test]
fn an_agent_reports_its_address_and_removes_its_socket_at_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let (mut running, port) = agent(folder.path().to_str(), Some(TOKEN));
    assert!(folder.path().join("agent.sock").exists());
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.write_all(b"GET /portbroker HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 400 ") && answer.ends_with("upgrade failed"), "{answer}");
    running.signal(rustix::process::Signal::TERM);
    running.err("agent-stopping");
    assert_eq!(running.exit_code(), Some(0));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "the agent removes its socket");
}

#[test]
fn without_a_token_only_the_directory_is_served() {
    let folder = tempfile::tempdir().unwrap();
    let (mut running, port) = agent(folder.path().to_str(), None);
    running.err("only the directory is served");
    insta::assert_snapshot!("agent_forward_no_token", seen(&forward(port, &[])));
}

#[test]
fn a_request_for_a_port_fails_with_the_reason() {
    insta::assert_snapshot!("agent_forward_no_agent", seen(&forward(1, &[])));
    let (_running, port) = agent(None, Some(TOKEN));
    insta::assert_snapshot!("agent_forward_no_host", seen(&forward(port, &["--wait", "0.01"])));
    let json = forward(port, &["--wait", "0", "--json"]);
    let error: Value = serde_json::from_slice(&json.stderr).unwrap();
    assert_eq!((&error["event"], &error["exit"]), (&"error".into(), &5.into()));
}
