//! The verbs that start, find, replace and stop the daemon, with the real binary.

#![expect(clippy::unwrap_used, reason = "a test that cannot continue reports the line")]

use std::process::{Command, Stdio};

use serde_json::Value;

use crate::asking::Place;
use crate::support::{Running, stderr, stdout};

/// A home whose daemon is stopped at the end of the test.
struct Home(Place);

impl Home {
    fn new() -> Home {
        Home(Place::new())
    }

    /// Runs `landfall up` on a free HTTP port, with a daemon of this version.
    fn up(&self, version: &str) -> Value {
        let mut command = self.0.landfall(&["up", "--json", "--http-port", "0"]);
        let output = command.env("LANDFALL_VERSION", version).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        serde_json::from_str(stdout(&output).trim()).unwrap()
    }

    fn json(&self, verb: &[&str]) -> Value {
        let output =
            self.0.landfall(verb).arg("--json").env("LANDFALL_VERSION", "unversioned").output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        serde_json::from_str(stdout(&output).trim()).unwrap()
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let _ = self.0.landfall(&["down"]).output();
    }
}

#[test]
fn up_starts_one_daemon_and_finds_it_again_and_down_stops_it() {
    let home = Home::new();
    let first = home.up("one");
    assert_eq!(first["outcome"], "started");
    let second = home.up("one");
    assert_eq!(second["outcome"], "reused");
    assert_eq!((&first["pid"], &first["httpPort"]), (&second["pid"], &second["httpPort"]));
    assert_eq!(home.json(&["status"])["pid"], first["pid"]);
    assert_eq!(home.json(&["down"])["outcome"], "stopped");
    assert_eq!(home.json(&["down"])["outcome"], "absent");
    assert!(!home.0.home.socket().exists());
}

#[test]
fn a_daemon_of_another_build_is_replaced_and_registrations_are_kept() {
    let home = Home::new();
    let first = home.up("one");
    home.json(&["register", "me", "--pid", &std::process::id().to_string(), "--allow", "1"]);
    let output = home.0.landfall(&["up", "--json"]).env("LANDFALL_VERSION", "two").output().unwrap();
    let second: Value = serde_json::from_str(stdout(&output).trim()).unwrap();
    assert_eq!(second["outcome"], "upgraded");
    assert_ne!(first["pid"], second["pid"]);
    assert_eq!(
        first["httpPort"], second["httpPort"],
        "containers that run keep the URL that they were given"
    );
    assert_eq!(home.json(&["status", "me"])["containerName"], "me");
    assert_eq!(home.json(&["deregister", "me"])["deregistered"], "me");
    assert_eq!(home.json(&["ls"])["containers"], serde_json::json!([]));
}

#[test]
fn concurrent_starts_result_in_one_daemon() {
    let home = Home::new();
    let start = |_| {
        let mut command = home.0.landfall(&["up", "--json", "--http-port", "0"]);
        command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap()
    };
    let children: Vec<_> = (0..20).map(start).collect();
    let outcomes: Vec<Value> = children
        .into_iter()
        .map(|child| serde_json::from_slice(&child.wait_with_output().unwrap().stdout).unwrap())
        .collect();
    assert_eq!(outcomes.iter().filter(|one| one["outcome"] == "started").count(), 1, "{outcomes:?}");
    assert!(outcomes.iter().all(|other| other["pid"] == outcomes[0]["pid"]), "{outcomes:?}");
}

#[test]
fn a_foreground_daemon_is_this_process_and_a_second_one_is_refused() {
    let home = Home::new();
    let mut command = home.0.landfall(&["up", "--foreground", "--http-port", "0"]);
    command.env("LANDFALL_VERSION", "unversioned");
    let daemon = Running::start(command);
    crate::forward::wait_until("a daemon that answers", || home.0.output(&["status"]).status.success());
    assert_eq!(home.json(&["status"])["pid"], daemon.child.id());
    assert_eq!(home.0.output(&["up", "--foreground"]).status.code(), Some(6));
}

#[test]
fn a_registration_is_logged_without_its_tokens() {
    let home = Home::new();
    home.up("unversioned");
    let mut command = home.0.landfall(&["register", "shop", "--ws-host-port", "40001"]);
    command.env("LANDFALL_RESTART_TOKEN", "canary-restart").env("LANDFALL_BROKER_TOKEN", "canary-broker");
    assert!(command.env("LANDFALL_VERSION", "unversioned").output().unwrap().status.success());
    let log = stdout(&home.0.output(&["logs"]));
    assert!(log.contains(" register shop\n"), "{log}");
    let everything =
        [log, stdout(&home.0.output(&["ls", "--json"])), stdout(&home.0.output(&["status", "shop"]))];
    assert!(everything.iter().all(|text| !text.contains("canary")), "{everything:?}");
    let lines = Command::new("ps").args(["-eo", "args"]).output().unwrap();
    assert!(!stdout(&lines).contains("canary"));
}
