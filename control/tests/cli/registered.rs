//! `run` and `attach` with a scripted daemon: their registrations, their output and their end.

#![expect(clippy::unwrap_used, reason = "a test that cannot continue reports the line")]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use crate::asking::Place;
use crate::support::{Running, WAIT_MAX};

/// A daemon that keeps registrations, and reports the forwards that the test sets.
struct Daemon {
    place: Place,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// For each container: the request that registered it, its reachability, and its rows.
    containers: Vec<(Value, Value, Value)>,
    requests: Vec<Value>,
    listeners: Vec<UnixStream>,
    state: Value,
    refusal: Option<&'static str>,
    pid: u32,
}

impl Daemon {
    fn new() -> Daemon {
        let daemon = Daemon { place: Place::new(), state: Arc::default() };
        daemon.state.lock().unwrap().state = json!({ "state": "reached" });
        daemon.state.lock().unwrap().pid = std::process::id();
        daemon.serve();
        daemon
    }

    fn serve(&self) {
        let listener = UnixListener::bind(self.place.home.socket()).unwrap();
        let state = Arc::clone(&self.state);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut line = String::new();
                BufReader::new(&stream).read_line(&mut line).unwrap();
                let request: Value = serde_json::from_str(&line).unwrap();
                if request["kind"] == "stop-listening" {
                    return;
                }
                let mut state = state.lock().unwrap();
                let _ = writeln!(stream, "{}", state.answer(&request));
                if request["kind"] == "events" {
                    state.listeners.push(stream);
                }
                state.requests.push(request);
            }
        });
    }

    /// Ends like a killed daemon: its socket file stays.
    fn end(&self) {
        let mut stream = UnixStream::connect(self.place.home.socket()).unwrap();
        writeln!(stream, "{}", json!({ "kind": "stop-listening" })).unwrap();
        self.state.lock().unwrap().listeners.clear();
    }

    fn forwards(&self, rows: &Value) {
        let mut state = self.state.lock().unwrap();
        for container in &mut state.containers {
            container.2 = rows.clone();
        }
        for listener in &mut state.listeners {
            let _ = writeln!(listener, "{}", json!({ "kind": "port-forward-event" }));
        }
    }

    /// Waits for a request of this kind for which `fits` holds.
    fn received(&self, kind: &str, fits: impl Fn(&Value) -> bool) -> Value {
        let deadline = std::time::Instant::now() + WAIT_MAX;
        loop {
            let found = {
                let state = self.state.lock().unwrap();
                state.requests.iter().find(|request| request["kind"] == kind && fits(request)).cloned()
            };
            if let Some(found) = found {
                return found;
            }
            assert!(std::time::Instant::now() < deadline, "no {kind} request arrived");
            std::thread::yield_now();
        }
    }

    fn names(&self) -> Vec<String> {
        let state = self.state.lock().unwrap();
        state
            .containers
            .iter()
            .map(|(known, ..)| known["containerName"].as_str().unwrap().to_owned())
            .collect()
    }

    fn run(&self, options: &[&str], script: &str) -> Running {
        let mut command = self.place.landfall(&["run", "--net", "none"]);
        Running::start({
            command.args(options).args(["--", "sh", "-c", script]);
            command
        })
    }
}

impl State {
    fn answer(&mut self, request: &Value) -> Value {
        let name = &request["containerName"];
        let result = match request["kind"].as_str().unwrap() {
            "register" if self.refusal.is_some() => {
                return json!({ "ok": false, "reason": self.refusal });
            }
            "register" => {
                self.containers.retain(|(known, ..)| known["containerName"] != *name);
                self.containers.push((request.clone(), self.state.clone(), json!([])));
                return json!({ "ok": true });
            }
            "deregister" => {
                self.containers.retain(|(known, ..)| known["containerName"] != *name);
                return json!({ "ok": true });
            }
            "describe" => {
                let containers = self.containers.iter().map(|(known, state, rows)| {
                    let attach_method = match &known["way"]["pid"] {
                        Value::Null => known["way"]["path"].clone(),
                        pid => format!("process {pid}").into(),
                    };
                    json!({
                        "containerName": known["containerName"], "cwd": known["cwd"], "way": attach_method, "forwards": rows,
                        "state": state["state"], "reason": state["reason"],
                    })
                });
                json!({ "version": "x", "pid": self.pid, "replayed": true, "containers": containers.collect::<Value>() })
            }
            _ => json!({}),
        };
        json!({ "ok": true, "result": result })
    }
}

fn row(port: u16, state: &str, reason: Option<&str>) -> Value {
    json!({
        "port": port, "hostPort": port, "state": state, "reason": reason, "process": "node", "pid": 77,
        "connections": 0, "accepted": 0, "bytesUp": 0, "bytesDown": 0,
    })
}

const WAIT: &str = "echo ready; read line; exit 7";

#[test]
fn a_command_is_registered_by_its_process_and_deregistered_when_it_ends() {
    let daemon = Daemon::new();
    let mut running = daemon.run(&["--name", "web", "--allow", "80,*", "--deny", "9229"], WAIT);
    running.out("ready");
    let registered = daemon.received("register", |_| true);
    assert_eq!(registered["containerName"], "web");
    assert_eq!(registered["portForward"], json!({ "allow": "*", "deny": [9229], "privileged": [80] }));
    assert_eq!(registered["way"]["kind"], "process");
    assert!(registered["way"]["started"]["ticks"].is_u64());
    assert_eq!(registered["foreground"], true);
    daemon.forwards(&json!([
        row(5173, "open", None),
        row(22, "denied", Some("x")),
        row(8976, "denied", Some("ours"))
    ]));
    assert_eq!(running.err("forward"), "forward  http://localhost:5173  →  web:5173 (node, pid 77)");
    running.err("denied   port 22 is not forwarded: it is below 1024 and no allow list names it");
    running.err("denied   port 8976 is not forwarded: ours");
    daemon.forwards(&json!([row(
        5173,
        "failed",
        Some("EADDRINUSE: port 5173 is forwarded to container \"b\"")
    )]));
    running.err("closed   http://localhost:5173");
    running.err("failed   localhost:5173 cannot be opened for listening: EADDRINUSE: port 5173 is forwarded to container \"b\"");
    drop(running.child.stdin.take());
    assert_eq!(running.exit_code(), Some(7));
    daemon.received("deregister", |request| request["containerName"] == "web");
    assert!(daemon.names().is_empty());
}

#[test]
fn a_default_name_in_use_gets_a_suffix_and_a_given_one_is_refused() {
    let daemon = Daemon::new();
    let folder =
        tempfile::Builder::new().prefix("shop").rand_bytes(0).tempdir_in(daemon.place.home.root()).unwrap();
    let start = || {
        let mut command = daemon.place.landfall(&["run", "--net", "none", "--", "sh", "-c", WAIT]);
        command.current_dir(folder.path());
        let mut running = Running::start(command);
        running.out("ready");
        running
    };
    let (first, second) = (start(), start());
    assert_eq!(daemon.names(), ["shop", "shop-2"]);
    let third = daemon.place.output(&["run", "--net", "none", "--name", "shop", "--", "true"]);
    let printed = crate::support::stderr(&third);
    assert!(printed.starts_with("error: the name shop is in use, by process "), "{printed}");
    assert!(printed.contains("hint: choose another --name"), "{printed}");
    assert_eq!(third.status.code(), Some(6));
    drop((first, second));
}

#[test]
fn a_new_daemon_without_the_registration_gets_it_again() {
    let daemon = Daemon::new();
    let mut running = daemon.run(&["--name", "web"], WAIT);
    running.out("ready");
    daemon.forwards(&json!([row(5173, "open", None)]));
    running.err("forward");
    daemon.end();
    std::fs::remove_file(daemon.place.home.socket()).unwrap();
    daemon.state.lock().unwrap().containers.clear();
    daemon.state.lock().unwrap().requests.clear();
    daemon.state.lock().unwrap().pid = 2;
    daemon.serve();
    daemon.received("register", |request| request["containerName"] == "web");
    drop(running.child.stdin.take());
    assert_eq!(running.exit_code(), Some(7), "the command did not notice");
}

#[test]
fn a_registration_that_another_client_removed_is_not_repeated() {
    let daemon = Daemon::new();
    let mut running = daemon.run(&["--name", "web"], WAIT);
    running.out("ready");
    daemon.forwards(&json!([row(5173, "open", None)]));
    running.err("forward");
    daemon.state.lock().unwrap().containers.clear();
    daemon.forwards(&json!([]));
    running.err("closed   http://localhost:5173");
    running.err("note     web was deregistered; its ports are no longer forwarded");
    drop(running.child.stdin.take());
    assert_eq!(running.exit_code(), Some(7));
    assert!(daemon.names().is_empty());
}

#[test]
fn a_namespace_that_the_daemon_refuses_is_forwarded_by_this_process() {
    let daemon = Daemon::new();
    daemon.state.lock().unwrap().state = json!({ "state": "unreachable", "reason": "not permitted" });
    let mut running = daemon.run(&["--name", "web"], WAIT);
    running.out("ready");
    running.err("note     the daemon does not forward this (not permitted); this process forwards it");
    assert!(daemon.names().is_empty(), "no registration remains");
    drop(running);
    daemon.state.lock().unwrap().refusal = Some("daemon stopping");
    let mut running = daemon.run(&["--name", "web"], WAIT);
    running.out("ready");
    running.err("note     the daemon does not forward this (daemon stopping)");
}

#[test]
fn a_ring_or_no_daemon_selects_an_engine_in_this_process() {
    let daemon = Daemon::new();
    for options in [&["--no-daemon"][..], &["--ring", "epoll"]] {
        let mut running = daemon.run(options, WAIT);
        running.out("ready");
        drop(running.child.stdin.take());
        assert_eq!(running.exit_code(), Some(7));
    }
    assert!(daemon.state.lock().unwrap().requests.is_empty(), "no request was sent");
}

#[test]
fn a_daemon_in_another_network_namespace_is_not_used() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let daemon = Daemon::new();
    let mut command = std::process::Command::new("unshare");
    command.args(["--net", env!("CARGO_BIN_EXE_landfall"), "run", "--net", "none", "--", "sh", "-c", WAIT]);
    let mut running = Running::start({
        command.env("LANDFALL_HOME", daemon.place.home.root());
        command
    });
    running.out("ready");
    assert!(daemon.state.lock().unwrap().requests.iter().all(|request| request["kind"] == "describe"));
}

#[test]
fn attach_registers_a_process_or_a_file_and_deregisters_at_a_signal() {
    let daemon = Daemon::new();
    let mut sandbox = daemon.run(&["--no-daemon"], "echo pid $$; read line");
    let pid = sandbox.out("pid ").replace("pid ", "");
    for (options, kind) in [
        (["--pid".to_owned(), pid.clone()], "process"),
        (["--netns".to_owned(), format!("/proc/{pid}/ns/net")], "netns"),
    ] {
        let mut command = daemon.place.landfall(&["attach", "--name", kind]);
        command.args(&options);
        let mut attached = Running::start(command);
        let registered = daemon.received("register", |request| request["containerName"] == kind);
        assert_eq!(registered["way"]["kind"], kind);
        daemon.forwards(&json!([row(5432, "open", None)]));
        attached.out(&format!("forward  http://localhost:5432  →  {kind}:5432"));
        attached.signal(rustix::process::Signal::TERM);
        attached.out("closed   http://localhost:5432");
        assert_eq!(attached.exit_code(), Some(0));
        assert!(daemon.names().is_empty());
    }
}
