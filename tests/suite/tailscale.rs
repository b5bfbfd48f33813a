//! Tailscale (wire specification, A.11 and A.14): which commands the daemon runs and which events it reports, with a fake
//! `tailscale` that records its arguments.

use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use landfall_tests::broker::{Container, forwarded, request};
use landfall_tests::case::Case;
use landfall_tests::{Daemon, Home, Namespace, Server, Start, rpc, wait_until};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::crash::{by_file, wait_for_open};

pub(crate) const CASES: &[Case] = &[
    Case::once("tailscale_serves_an_opened_port_and_removes_only_that_owned_serve_on_close", open_and_close),
    Case::once("tailscale_is_skipped_when_it_is_disconnected", disconnected),
    Case::once("tailscale_with_a_malformed_status_is_skipped_without_an_error", malformed),
    Case::once("tailscale_that_fails_to_serve_claims_no_ownership", serve_fails),
    Case::once("tailscale_that_fails_to_turn_off_still_owns", off_fails),
    Case::once("tailscale_is_searched_on_path_only", path_only),
    Case::once("tailscale_that_hangs_is_killed_and_forwarding_continues", hangs),
    Case::once("tailscale_is_turned_off_when_its_container_is_deregistered", deregistered),
    Case::once("tailscale_is_never_called_for_a_policy_that_exposes_nothing", off_switch),
    Case::once("tailscale_serves_the_bound_host_port_of_a_reserved_forward", reserved),
    Case::once("tailscale_is_never_called_unless_asked_for", not_asked_for),
    Case::once("tailscale_is_turned_off_when_the_daemon_stops", daemon_stops),
    Case::once("tailscale_ports_of_a_killed_daemon_are_taken_over", killed_daemon),
    Case::once(
        "tailscale_ports_of_a_killed_daemon_are_turned_off_by_one_without_the_option",
        killed_and_turned_off,
    ),
    Case::once("tailscale_keeps_serving_when_the_daemon_is_replaced", replaced),
];

const PORT: u16 = 3000;
const OTHER: u16 = 3001;

/// A `tailscale` that records its arguments, and executes the file that is named after its first argument (`off` to turn a
/// port off).
const SCRIPT: &str = r#"#!/bin/sh
here=${0%/*}
echo "$*" >> "$here/calls"
verb=$1
case "$*" in *" off") verb=off;; esac
. "$here/$verb"
"#;

/// A home, and a fake tailscale.
struct World {
    home: Home,
    inside: Namespace,
}

impl World {
    fn new() -> World {
        let world = World { home: Home::new(), inside: Namespace::new() };
        let program = world.bin().join("tailscale");
        std::fs::write(&program, SCRIPT).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        world.answers("status", r#"echo '{"BackendState":"Running"}'"#);
        world.answers("serve", "exit 0");
        world.answers("off", "exit 0");
        world
    }

    fn bin(&self) -> PathBuf {
        self.home.folder("bin")
    }

    /// Sets the script for `verb`.
    fn answers(&self, verb: &str, script: &str) {
        // Renamed, so that a concurrent call finds the old or the new file.
        let aside = self.bin().join("aside");
        std::fs::write(&aside, format!("{script}\n")).unwrap();
        std::fs::rename(aside, self.bin().join(verb)).unwrap();
    }

    fn start(&self) -> Start<'_> {
        let path = format!("{}:{}", self.bin().display(), std::env::var("PATH").unwrap());
        self.home.start().variable("PATH", &path)
    }

    fn daemon(&self) -> Daemon<'_> {
        self.start().argument("--tailscale").wait_until_ready()
    }

    fn calls(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.bin().join("calls")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// Returns the events, as `KIND NAME PORT COMMAND REASON`.
    fn reported(&self) -> Vec<String> {
        let events = self.home.events();
        let of_ours = events.iter().filter(|event| event["kind"] == "tailscale-serve-event");
        let text = |value: &Value| value.as_str().map(|text| format!(" {text}")).unwrap_or_default();
        of_ours
            .map(|event| {
                let event = &event["event"];
                let kind = event["kind"].as_str().unwrap().strip_prefix("tailscale-serve-").unwrap();
                let (name, port) = (text(&event["containerName"]), &event["port"]);
                format!("{kind}{name} {port}{}{}", text(&event["command"]), text(&event["reason"]))
            })
            .collect()
    }

    #[track_caller]
    fn wait_for_events(&self, wanted: &[&str]) {
        wait_until(&format!("the events {wanted:?}"), || {
            let reported = self.reported();
            if reported == wanted { Ok(()) } else { Err((reported, self.calls())) }
        });
    }

    fn listen(&self, port: u16) -> Server {
        Server::listen(&self.inside, &format!("127.0.0.1:{port}"))
    }

    fn register(&self) {
        rpc::register_with(&self.home, "a", &by_file(&self.inside));
    }

    fn list(&self) -> PathBuf {
        self.home.path().join("run/tailscale.json")
    }

    /// Waits until no listener answers on the host at `port`.
    #[track_caller]
    fn wait_for_closed(&self, port: u16) {
        self.home.wait_for_event("port-forward-event", |event| {
            event["event"]["kind"] == "port-forward-closed" && event["event"]["hostPort"] == port
        });
    }
}

/// The calls that serve a port.
fn served(port: u16) -> [String; 2] {
    ["status --json".to_owned(), format!("serve --bg --tcp={port} {port}")]
}

fn off(port: u16) -> String {
    format!("serve --tcp={port} off")
}

fn open_and_close() {
    let world = World::new();
    let _daemon = world.daemon();
    let server = world.listen(PORT);
    let _other = world.listen(OTHER);
    world.register();
    world.wait_for_events(&["opened a 3000", "opened a 3001"]);
    assert_eq!(world.calls(), [served(PORT), served(OTHER)].concat());
    drop(server);
    world.wait_for_events(&["opened a 3000", "opened a 3001", "closed a 3000"]);
    assert_eq!(world.calls()[4..], [off(PORT)]);
}

fn disconnected() {
    let world = World::new();
    world.answers("status", r#"echo '{"BackendState":"Stopped"}'"#);
    let _daemon = world.daemon();
    let server = world.listen(PORT);
    world.register();
    world.wait_for_events(&["skipped a 3000 tailscale backend is Stopped"]);
    wait_for_open(&world.home, &[("a", PORT)]);
    drop(server);
    world.wait_for_closed(PORT);
    // The daemon tries again when the port reopens, and tailscale runs by then.
    world.answers("status", r#"echo '{"BackendState":"Running"}'"#);
    let _server = world.listen(PORT);
    world.wait_for_events(&["skipped a 3000 tailscale backend is Stopped", "opened a 3000"]);
    assert_eq!(world.calls()[0], "status --json");
    assert_eq!(world.calls()[1..], served(PORT));
}

fn malformed() {
    let world = World::new();
    world.answers("status", "echo 'not json'");
    let _daemon = world.daemon();
    let _server = world.listen(PORT);
    world.register();
    wait_until("a skip", || {
        let reported = world.reported();
        let skip = reported.iter().any(|line| line.contains("skipped a 3000 invalid tailscale status JSON"));
        if skip { Ok(()) } else { Err(reported) }
    });
    assert_eq!(world.calls(), ["status --json"]);
}

fn serve_fails() {
    let world = World::new();
    // The daemon reads both outputs while the command runs, although they exceed the capacity of a pipe.
    world.answers("serve", "head -c 200000 /dev/zero; echo 'no such thing' >&2; exit 3");
    let daemon = world.daemon();
    let server = world.listen(PORT);
    world.register();
    world.wait_for_events(&["failed a 3000 serve no such thing"]);
    drop(server);
    world.wait_for_closed(PORT);
    daemon.shut_down();
    assert_eq!(world.calls(), served(PORT), "something that was not served was turned off");
}

fn off_fails() {
    let world = World::new();
    world.answers("off", "echo busy; exit 1");
    let daemon = world.daemon();
    let server = world.listen(PORT);
    world.register();
    world.wait_for_events(&["opened a 3000"]);
    drop(server);
    world.wait_for_events(&["opened a 3000", "failed a 3000 off busy"]);
    world.answers("off", "exit 0");
    daemon.shut_down();
    world.wait_for_events(&["opened a 3000", "failed a 3000 off busy", "closed a 3000"]);
    assert!(!world.list().exists());
}

fn path_only() {
    let world = World::new();
    std::fs::remove_file(world.bin().join("tailscale")).unwrap();
    let _daemon = world.daemon();
    let _server = world.listen(PORT);
    world.register();
    world.wait_for_events(&["skipped a 3000 tailscale was not found on PATH"]);
    wait_for_open(&world.home, &[("a", PORT)]);
}

fn hangs() {
    let world = World::new();
    world.answers("status", "sleep 600 & sleep 600");
    let _daemon = world
        .start()
        .argument("--tailscale")
        .variable("LANDFALL_TAILSCALE_TIMEOUT", "50ms")
        .wait_until_ready();
    let _server = world.listen(PORT);
    world.register();
    world.wait_for_events(&["skipped a 3000 timed out after 50ms"]);
    wait_for_open(&world.home, &[("a", PORT)]);
}

fn deregistered() {
    let world = World::new();
    let _daemon = world.daemon();
    let _server = world.listen(PORT);
    world.register();
    world.wait_for_events(&["opened a 3000"]);
    rpc::done(&world.home, &json!({"kind": "deregister", "containerName": "a"}));
    world.wait_for_events(&["opened a 3000", "closed a 3000"]);
    let mut calls = served(PORT).to_vec();
    calls.push(off(PORT));
    assert_eq!(world.calls(), calls);
}

fn off_switch() {
    let world = World::new();
    let _daemon = world.daemon();
    let _server = world.listen(PORT);
    let mut fields = by_file(&world.inside);
    fields["portForward"] = json!({"allow": []});
    rpc::register_with(&world.home, "shut", &fields);
    // Another container shows that enough time has passed.
    let elsewhere = Namespace::new();
    let _other = Server::listen(&elsewhere, &format!("127.0.0.1:{OTHER}"));
    rpc::register_with(&world.home, "open", &by_file(&elsewhere));
    world.wait_for_events(&["opened open 3001"]);
    assert_eq!(world.calls(), served(OTHER));
}

fn reserved() {
    let world = World::new();
    let _daemon = world.daemon();
    let _taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 4848)).unwrap();
    let container = Container::listen("a-broker-token").allowing(json!({"allow": "*"}));
    container.register(&world.home, "a");
    let mut peer = container.welcome();
    peer.send_message(&request(4848, &[4848, 4849]));
    peer.receive_exactly(&forwarded(4848, 4849));
    world.wait_for_events(&["opened a 4849"]);
    rpc::done(&world.home, &json!({"kind": "deregister", "containerName": "a"}));
    world.wait_for_events(&["opened a 4849", "closed a 4849"]);
    let mut calls = served(4849).to_vec();
    calls.push(off(4849));
    assert_eq!(world.calls(), calls);
}

fn not_asked_for() {
    let world = World::new();
    let daemon = world.start().wait_until_ready();
    let _server = world.listen(PORT);
    world.register();
    wait_for_open(&world.home, &[("a", PORT)]);
    daemon.shut_down();
    assert_eq!(world.calls(), [""; 0]);
}

fn daemon_stops() {
    let world = World::new();
    let mut daemon = world.daemon();
    let _server = world.listen(PORT);
    world.register();
    world.wait_for_events(&["opened a 3000"]);
    assert!(world.list().exists());
    daemon.signal(Signal::TERM);
    assert!(daemon.end().success());
    world.wait_for_events(&["opened a 3000", "closed a 3000"]);
    assert_eq!(world.calls().last(), Some(&off(PORT)));
    assert!(!world.list().exists());
    // Forwards outlive a daemon, and the next daemon serves them again.
    let _daemon = world.daemon();
    world.wait_for_events(&["opened a 3000", "closed a 3000", "opened a 3000"]);
}

fn killed_daemon() {
    let world = World::new();
    let daemon = world.daemon();
    let _server = world.listen(PORT);
    let other = world.listen(OTHER);
    world.register();
    world.wait_for_events(&["opened a 3000", "opened a 3001"]);
    daemon.kill();
    drop(other);
    let before = world.calls().len();
    let _daemon = world.daemon();
    wait_until("the port that closed meanwhile to be turned off", || {
        let reported = world.reported();
        if reported.last().is_some_and(|last| last == "closed a 3001") { Ok(()) } else { Err(reported) }
    });
    // It may have been served again while the engine still listened.
    assert!(!world.reported().contains(&"closed a 3000".to_owned()), "{:?}", world.reported());
    assert_eq!(world.calls()[before..before + 2], served(PORT));
}

fn killed_and_turned_off() {
    let world = World::new();
    let daemon = world.daemon();
    let _server = world.listen(PORT);
    world.register();
    world.wait_for_events(&["opened a 3000"]);
    daemon.kill();
    let before = world.calls().len();
    let _daemon = world.start().wait_until_ready();
    world.wait_for_events(&["opened a 3000", "closed a 3000"]);
    assert_eq!(world.calls()[before..], [off(PORT)]);
    wait_until("the list to go", || if world.list().exists() { Err("it is there") } else { Ok(()) });
}

fn replaced() {
    let world = World::new();
    // A daemon with another version is replaced.
    let daemon =
        world.start().argument("--tailscale").variable("LANDFALL_VERSION", "another").wait_until_ready();
    let _server = world.listen(PORT);
    world.register();
    world.wait_for_events(&["opened a 3000"]);
    let path = format!("{}:{}", world.bin().display(), std::env::var("PATH").unwrap());
    let output = world.home.command(&["up"]).env("PATH", path).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(daemon.end().success());
    world.wait_for_events(&["opened a 3000", "closed a 3000", "opened a 3000"]);
    assert_eq!(rpc::done(&world.home, &json!({"kind": "describe"}))["tailscale"], true);
}
