//! Restarts (wire specification, A.9): acknowledged first, executed then, one at a time for a container.

use std::path::PathBuf;

use landfall_tests::case::Case;
use landfall_tests::http::{self, Web};
use landfall_tests::rpc::{Wire, ask, done, http_port, names, refused, register, register_with};
use landfall_tests::{DockerMode, FakeDocker, Home, wait_until};
use rustix::process::Signal;
use serde_json::{Value, json};

pub(crate) const CASES: &[Case] = &[
    Case::once("restart_acks_and_restarts_the_registered_container", acks_and_restarts),
    Case::once("restart_is_acknowledged_before_it_has_effects", ack_before_effects),
    Case::once("restart_with_build_builds_the_registered_folder", builds),
    Case::once("restart_checks_are_made_in_their_order", checks_in_order),
    Case::once("restart_is_rejected_when_the_daemon_was_started_without_restart_capability", no_capability),
    Case::once("restart_rejects_an_unknown_container_name", unknown),
    Case::once("http_restart_works_against_a_fresh_daemon_with_the_persisted_token", fresh_daemon),
    Case::once("concurrent_restarts_of_one_container_are_serialised_and_coalesced", single_flight),
    Case::once("a_failed_restart_reports_the_reason", failures),
    Case::once("a_restart_by_commands_stops_and_starts_in_order", command_pair),
    Case::once("a_preflight_refuses_before_the_acknowledgement", preflight),
    Case::once("c23_a_container_cannot_change_the_commands_that_restart_it", sealed_commands),
    Case::once("a_daemon_that_stops_lets_a_running_restart_finish", stop_in_the_middle),
];

fn restart(name: &str) -> Value {
    json!({"kind": "restart", "containerName": name})
}

fn scheduled(name: &str) -> Value {
    json!({"ok": true, "result": {"containerName": name, "scheduled": true}})
}

/// The file to which commands of a folder write, outside of the folder.
fn diary(home: &Home) -> PathBuf {
    home.folder("outside").join("diary")
}

fn lines(home: &Home) -> Vec<String> {
    std::fs::read_to_string(diary(home)).unwrap_or_default().lines().map(str::to_owned).collect()
}

/// A command that runs `script` with the diary as its first argument.
fn shell(home: &Home, script: &str) -> String {
    json!(["sh", "-c", script, "sh", diary(home)]).to_string()
}

/// Writes a folder's file and approves it.
fn configure(home: &Home, name: &str, text: &str) {
    write(home, name, text);
    home.trust(&home.folder(name));
}

fn write(home: &Home, name: &str, text: &str) {
    std::fs::write(home.folder(name).join("landfall.toml"), text).unwrap();
}

fn acks_and_restarts() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &["a", "b"]);
    let _daemon = home.daemon();
    register(&home, "a");
    register(&home, "b");
    assert_eq!(ask(&home, &restart("a")), scheduled("a"));
    home.wait_for_event("restart-completed", |event| event["containerName"] == "a");
    assert_eq!(docker.changes(), ["POST /containers/a/stop", "POST /containers/a/start"]);
    assert!(docker.is_running("a"));
    let event = home.wait_for_event("restart-scheduled", |_| true);
    assert_eq!((&event["containerName"], &event["build"]), (&json!("a"), &json!(false)));
    // A restart is not a removal: the container stays registered.
    assert_eq!(names(&home), ["a", "b"]);
    // A stopped container is started.
    docker.add("b", false);
    assert_eq!(ask(&home, &json!({"kind": "restart", "containerName": "b", "build": false})), scheduled("b"));
    wait_until("b to run", || if docker.is_running("b") { Ok(()) } else { Err(docker.changes()) });
}

fn ack_before_effects() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &["a"]);
    docker.hold_stops(true);
    let _daemon = home.daemon();
    register_with(&home, "a", &json!({"restartToken": "t"}));
    // The caller is inside the container that is being stopped: it receives its whole answer before the container changes.
    let port = http_port(&home);
    let mut web = Web::connect(port);
    web.send(http::post(port, Some("t"), &restart("a").to_string()));
    assert_eq!(web.answer().body, scheduled("a"));
    assert!(docker.is_running("a"));
    docker.wait_for_calls("POST /containers/a/stop", 1);
    // The daemon does not wait for the restart in any other place either.
    assert_eq!(ask(&home, &json!({"kind": "status", "containerName": "a"}))["ok"], true);
    assert_eq!(home.count_events("restart-completed", "a"), 0);
    docker.hold_stops(false);
    home.wait_for_event("restart-completed", |_| true);
    let kinds: Vec<String> =
        home.events().iter().map(|event| event["kind"].as_str().unwrap().to_owned()).collect();
    let at = |kind: &str| kinds.iter().position(|known| known == kind).unwrap();
    assert!(at("restart-scheduled") < at("restart-completed"));
}

fn builds() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &["a"]);
    let _daemon = home.daemon();
    std::fs::write(home.folder("a").join("Dockerfile"), "FROM scratch\n").unwrap();
    register(&home, "a");
    assert_eq!(ask(&home, &json!({"kind": "restart", "containerName": "a", "build": true})), scheduled("a"));
    let event = home.wait_for_event("restart-scheduled", |_| true);
    assert_eq!(event["build"], true);
    wait_until("the restart to end", || {
        let ended = home
            .events()
            .into_iter()
            .find(|event| ["restart-completed", "restart-failed"].iter().any(|kind| event["kind"] == *kind));
        ended.ok_or_else(|| docker.changes())
    });
    assert_eq!(docker.calls("POST /build"), 1, "{:?}", docker.changes());
    assert_eq!(home.count_events("restart-completed", "a"), 1, "{:?} {:?}", home.events(), docker.changes());
    assert!(docker.is_running("a"), "{:?}", docker.changes());
    // The image exists before the old container is removed.
    let changes = docker.changes();
    let build = changes.iter().position(|change| change.starts_with("POST /build"));
    let stop = changes.iter().position(|change| change.ends_with("/stop"));
    assert!(build < stop, "{changes:?}");
    assert_eq!(names(&home), ["a"], "the one that was recreated is the one that is registered");
}

fn checks_in_order() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &["a"]);
    let _daemon = home.daemon();
    let with = |name: &str, build: Value| json!({"kind": "restart", "containerName": name, "build": build});
    let boolean = "restart.build must be a boolean if provided";
    // The name is unknown as well.
    for build in [json!("true"), json!(1), json!(null), json!([]), json!({})] {
        assert_eq!(refused(&home, &with("a", build.clone())), boolean, "{build}");
    }
    assert_eq!(refused(&home, &with("a", json!(true))), "not registered: a");
    configure(&home, "a", "[restart]\npreflight = [\"sh\", \"-c\", \"echo no; exit 1\"]\n");
    register(&home, "a");
    assert_eq!(refused(&home, &with("a", json!("x"))), boolean);
    assert!(refused(&home, &with("a", json!(true))).contains("no"));
    assert_eq!(docker.changes(), Vec::<String>::new());
    assert_eq!(home.count_events("restart-scheduled", "a"), 0);
}

fn no_capability() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &["a"]);
    let _daemon = home.start().argument("--no-restart").wait_until_ready();
    register_with(&home, "a", &json!({"restartToken": "t"}));
    let wanted = "restart capability not enabled on this daemon";
    // Before every other check.
    for request in [
        restart("a"),
        restart("unknown"),
        json!({"kind": "restart", "containerName": "a", "build": 7}),
        json!({"kind": "restart"}),
    ] {
        assert_eq!(refused(&home, &request), wanted, "{request}");
    }
    let answer = http::ask(http_port(&home), Some("t"), &restart("a"));
    assert_eq!((answer.status, answer.reason()), (200, wanted));
    assert_eq!(docker.changes(), Vec::<String>::new());
}

fn unknown() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &["a"]);
    let _daemon = home.daemon();
    assert_eq!(refused(&home, &restart("a")), "not registered: a");
    register(&home, "a");
    assert_eq!(ask(&home, &json!({"kind": "deregister", "containerName": "a"})), json!({"ok": true}));
    assert_eq!(refused(&home, &restart("a")), "not registered: a");
    assert_eq!(docker.changes(), Vec::<String>::new());
}

fn fresh_daemon() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &["a"]);
    let daemon = home.daemon();
    register_with(&home, "a", &json!({"restartToken": "t"}));
    daemon.kill();
    let _daemon = home.daemon();
    // Sent at once: the answer waits until the daemon has replayed its registrations.
    let answer = http::ask(8974, Some("t"), &restart("a"));
    assert_eq!((answer.status, answer.body), (200, scheduled("a")));
    docker.wait_for_calls("POST /containers/a/start", 1);
}

fn single_flight() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &["a"]);
    docker.hold_stops(true);
    let _daemon = home.daemon();
    register(&home, "a");
    assert_eq!(ask(&home, &restart("a")), scheduled("a"));
    docker.wait_for_calls("POST /containers/a/stop", 1);
    for _ in 0..10 {
        assert_eq!(ask(&home, &restart("a")), scheduled("a"));
    }
    assert_eq!(docker.calls("POST /containers/a/stop"), 1, "two restarts at the same time");
    docker.hold_stops(false);
    docker.wait_for_calls("POST /containers/a/start", 2);
    // The next restart is a new one, and shows that none of the earlier ones is pending.
    wait_until("the second restart to end", || {
        let ended = home.count_events("restart-completed", "a");
        if ended >= 2 { Ok(()) } else { Err(home.events()) }
    });
    assert_eq!(ask(&home, &restart("a")), scheduled("a"));
    docker.wait_for_calls("POST /containers/a/start", 3);
    wait_until("the third restart to end", || {
        let ended = home.count_events("restart-completed", "a");
        if ended >= 3 { Ok(()) } else { Err(home.events()) }
    });
    let one = ["POST /containers/a/stop", "POST /containers/a/start"];
    assert_eq!(docker.changes(), [one, one, one].concat());
}

fn failures() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &["a"]);
    let _daemon = home.daemon();
    register(&home, "a");
    register(&home, "not-in-docker");
    assert_eq!(ask(&home, &restart("not-in-docker")), scheduled("not-in-docker"));
    let event = home.wait_for_event("restart-failed", |event| event["containerName"] == "not-in-docker");
    assert!(!event["reason"].as_str().unwrap().is_empty(), "{event}");
    docker.set_mode(DockerMode::Fails);
    assert_eq!(ask(&home, &restart("a")), scheduled("a"));
    let event = home.wait_for_event("restart-failed", |event| event["containerName"] == "a");
    assert!(event["reason"].as_str().unwrap().contains("unwell"), "{event}");
    // The next restart works.
    docker.set_mode(DockerMode::Answers);
    assert_eq!(ask(&home, &restart("a")), scheduled("a"));
    home.wait_for_event("restart-completed", |event| event["containerName"] == "a");
}

fn command_pair() {
    let home = Home::new();
    let _daemon = home.daemon();
    let note = |what: &str| {
        shell(&home, &format!("echo {what} $LANDFALL_CONTAINER_NAME $LANDFALL_BUILD $PWD >> $1"))
    };
    configure(&home, "a", &format!("[restart]\nstop = {}\nstart = {}\n", note("stop"), note("start")));
    register(&home, "a");
    for build in [false, true] {
        assert_eq!(
            ask(&home, &json!({"kind": "restart", "containerName": "a", "build": build})),
            scheduled("a")
        );
        let count = 1 + usize::from(build);
        wait_until("the restart to end", || {
            let ended = home.count_events("restart-completed", "a");
            if ended == count { Ok(()) } else { Err(home.events()) }
        });
    }
    let written = lines(&home);
    let begins: Vec<&str> = written.iter().map(|line| line.split(' ').next().unwrap()).collect();
    assert_eq!(begins, ["stop", "start", "stop", "start"]);
    let folder = home.folder("a");
    assert_eq!(written[1], format!("start a 0 {}", folder.display()));
    assert_eq!(written[3], format!("start a 1 {}", folder.display()));
    // A command that fails is reported with its last line, and no further command is started.
    configure(
        &home,
        "a",
        &format!(
            "[restart]\nstop = {}\nstart = {}\n",
            shell(&home, "echo it is stuck; exit 3"),
            note("start")
        ),
    );
    register(&home, "a");
    assert_eq!(ask(&home, &restart("a")), scheduled("a"));
    let event = home.wait_for_event("restart-failed", |_| true);
    let reason = event["reason"].as_str().unwrap();
    assert!(reason.starts_with("stop failed: ") && reason.contains("it is stuck"), "{reason}");
    assert_eq!(lines(&home).len(), 4);
}

fn preflight() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &["a"]);
    let _daemon = home.daemon();
    let gate = home.folder("outside").join("open");
    let check =
        json!(["sh", "-c", "test -e $1 || { echo the harbour is closed; exit 1; }", "sh", gate]).to_string();
    configure(&home, "a", &format!("[restart]\npreflight = {check}\n"));
    register_with(&home, "a", &json!({"restartToken": "t"}));
    let reason = refused(&home, &restart("a"));
    assert!(
        reason.starts_with("restart refused for a: ") && reason.contains("the harbour is closed"),
        "{reason}"
    );
    let answer = http::ask(http_port(&home), Some("t"), &restart("a"));
    assert_eq!((answer.status, answer.reason()), (200, reason.as_str()));
    assert_eq!(home.count_events("restart-scheduled", "a"), 0);
    assert_eq!(docker.changes(), Vec::<String>::new());
    std::fs::write(gate, "").unwrap();
    assert_eq!(ask(&home, &restart("a")), scheduled("a"));
    home.wait_for_event("restart-completed", |_| true);
}

fn sealed_commands() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &["a"]);
    let daemon = home.daemon();
    register_with(&home, "a", &json!({"restartToken": "t"}));
    // A file that a process in the container writes later is not the file that the user registered.
    let evil = shell(&home, "echo evil >> $1");
    write(
        &home,
        "a",
        &format!(
            "[restart]\nstop = {evil}\nstart = {evil}\npreflight = {evil}\n[jobs.x]\ncommand = {evil}\nevery = \"1s\"\n"
        ),
    );
    assert_eq!(http::ask(http_port(&home), Some("t"), &restart("a")).body, scheduled("a"));
    home.wait_for_event("restart-completed", |_| true);
    // The next daemon does not use it either.
    daemon.kill();
    let _daemon = home.daemon();
    assert_eq!(ask(&home, &restart("a")), scheduled("a"));
    docker.wait_for_calls("POST /containers/a/start", 2);
    assert_eq!(lines(&home), Vec::<String>::new());
}

fn stop_in_the_middle() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &["a"]);
    docker.hold_stops(true);
    let mut daemon = home.daemon();
    register(&home, "a");
    assert_eq!(ask(&home, &restart("a")), scheduled("a"));
    docker.wait_for_calls("POST /containers/a/stop", 1);
    let mut late = Wire::connect(&home);
    daemon.signal(Signal::TERM);
    home.wait_for_event("daemon-stopping", |_| true);
    // A new request is refused, in one of several ways.
    if late.try_send(format!("{}\n", restart("a"))).is_ok() {
        let answer = late.rest();
        assert!(!answer.contains("\"ok\":true"), "{answer}");
    }
    docker.hold_stops(false);
    assert!(daemon.end().success());
    assert!(docker.is_running("a"), "the container was left stopped");
    assert_eq!(home.count_events("restart-completed", "a"), 1);
    let _next = home.daemon();
    assert_eq!(done(&home, &json!({"kind": "status", "containerName": "a"}))["containerName"], "a");
}
