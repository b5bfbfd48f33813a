//! The start of a daemon with registrations of the previous one, valid and corrupted (wire specification, A.7.5).

use std::os::unix::fs::{PermissionsExt, symlink};
use std::time::Duration;

use landfall_tests::case::Case;
use landfall_tests::rpc::{Wire, done, http_port, names, register, register_with, registration};
use landfall_tests::{DockerMode, FakeDocker, Home, NEGATIVE_WAIT, http, wait_until};
use serde_json::{Value, json};

pub(crate) const CASES: &[Case] = &[
    Case::once("replay_restores_names_folders_tokens_and_order", replay_keeps_order),
    Case::once("c21_replay_tolerates_corrupted_registration_files", corrupted_files),
    Case::once("replay_skips_registrations_whose_container_is_gone", replay_gone),
    Case::once("replay_applies_a_registration_when_the_probe_fails", replay_unknown),
    Case::once("the_daemon_is_reachable_before_a_slow_replay_completes", slow_replay),
    Case::once("register_waits_for_replay_to_complete", register_waits),
    Case::once("replay_completes_although_docker_never_answers", endless_replay),
    Case::once("a_daemon_can_be_stopped_during_replay", stop_while_replaying),
    Case::once("replay_removes_temporary_files_of_an_interrupted_write", stale_temporary_files),
    Case::once("c21_acknowledged_registrations_survive_sigkill_at_any_time", kill_at_any_moment),
];

fn replay_keeps_order() {
    let home = Home::new();
    let order = ["zeta", "alpha", "mid", "Beta", "0"];
    let daemon = home.daemon();
    for name in order {
        register_with(&home, name, &json!({"restartToken": format!("token-{name}")}));
    }
    // Registered again, it keeps its position.
    register_with(&home, "alpha", &json!({"restartToken": "token-alpha", "wsHostPort": 4000}));
    daemon.kill();
    for round in 0..2 {
        let daemon = home.daemon();
        // This request waits for the replay.
        let status = done(&home, &json!({"kind": "status", "containerName": "mid"}));
        assert_eq!(status["cwd"], home.folder("mid").to_str().unwrap());
        assert_eq!(names(&home), order, "round {round}");
        for name in order {
            let request = json!({"kind": "restart", "containerName": name, "build": 7});
            let answer = http::ask(http_port(&home), Some(&format!("token-{name}")), &request);
            assert_eq!(answer.status, 200, "{name}: {answer:?}");
        }
        daemon.shut_down();
    }
}

fn corrupted_files() {
    let home = Home::new();
    let cwd = home.folder("x");
    let whole = |name: &str| json!({"containerName": name, "cwd": cwd}).to_string();
    home.write_registration("good", whole("good"));
    // Invalid files: each is reported, and none is removed.
    let mut bad = vec![
        home.write_registration("torn", &whole("torn")[..20]),
        home.write_registration("empty", ""),
        home.write_registration("nul", [0_u8; 4096]),
        home.write_registration("noise", b"\xff\xfe\x00{"),
        home.write_registration("list", "[]"),
        home.write_registration("null", "null"),
        home.write_registration("renamed", whole("another")),
        home.write_registration("no-cwd", json!({"containerName": "no-cwd"}).to_string()),
        home.write_registration("odd-cwd", json!({"containerName": "odd-cwd", "cwd": 7}).to_string()),
        home.write_registration(
            "odd-token",
            json!({"containerName": "odd-token", "cwd": cwd, "restartToken": 7}).to_string(),
        ),
        home.write_registration(
            "odd-port",
            json!({"containerName": "odd-port", "cwd": cwd, "wsHostPort": "x"}).to_string(),
        ),
        home.write_registration(
            "odd-policy",
            json!({"containerName": "odd-policy", "cwd": cwd, "portForward": 7}).to_string(),
        ),
        home.write_registration("huge", vec![b' '; 8 << 20]),
        home.write_registration(" spaced", whole(" spaced")),
    ];
    let unreadable = home.write_registration("unreadable", whole("unreadable"));
    std::fs::set_permissions(&unreadable, std::fs::Permissions::from_mode(0o000)).unwrap();
    let outside = home.folder("x").join("outside.json");
    std::fs::write(&outside, whole("linked")).unwrap();
    symlink(&outside, home.registration("linked")).unwrap();
    symlink("nowhere", home.registration("dangling")).unwrap();
    std::fs::create_dir(home.registration("directory")).unwrap();
    let fifo = home.registration("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    home.write_registration("good-2", whole("good-2"));
    bad.push(fifo);
    let _daemon = home.daemon();
    done(&home, &json!({"kind": "status", "containerName": "good"}));
    let mut known = names(&home);
    known.retain(|name| !["unreadable", "linked"].contains(&name.as_str()));
    known.sort();
    assert_eq!(known, ["good", "good-2"]);
    for path in &bad {
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let reported = home
            .events()
            .iter()
            .any(|event| event["kind"] == "registration-skipped" && event["containerName"] == name.as_str());
        assert!(reported, "no event about {name:?}: {:?}", home.events());
        // The file may be renamed, and its content is kept.
        let directory = path.parent().unwrap();
        let kept = std::fs::read_dir(directory)
            .unwrap()
            .any(|entry| entry.unwrap().file_name().to_string_lossy().contains(&name));
        assert!(kept, "{name:?} is lost");
    }
    let mismatch = home.wait_for_event("registration-skipped", |event| event["containerName"] == "renamed");
    assert_eq!(mismatch["reason"], "schema mismatch");
    // The names are free for valid registrations.
    register(&home, "torn");
    assert_eq!(home.registered("torn").unwrap()["cwd"], home.folder("torn").to_str().unwrap());
}

fn replay_gone() {
    let home = Home::new();
    let _docker = FakeDocker::start(&home, &["alive"]);
    for name in ["alive", "gone"] {
        home.write_registration(name, json!({"containerName": name, "cwd": home.folder(name)}).to_string());
    }
    let _daemon = home.daemon();
    let event = home.wait_for_event("registration-skipped", |event| event["containerName"] == "gone");
    assert_eq!(event["reason"], "container not running");
    done(&home, &json!({"kind": "status", "containerName": "alive"}));
    assert_eq!(names(&home), ["alive"]);
    assert!(!home.registration("gone").exists());
}

fn replay_unknown() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &[]);
    docker.set_mode(DockerMode::Fails);
    home.write_registration("a", json!({"containerName": "a", "cwd": home.folder("a")}).to_string());
    let _daemon = home.daemon();
    done(&home, &json!({"kind": "status", "containerName": "a"}));
    assert_eq!(names(&home), ["a"]);
    assert!(home.registration("a").exists());
}

/// A daemon whose replay waits for a Docker engine that does not answer.
fn replaying(home: &Home) -> FakeDocker {
    let docker = FakeDocker::start(home, &["a"]);
    docker.set_mode(DockerMode::Hangs);
    home.write_registration(
        "a",
        json!({"containerName": "a", "cwd": home.folder("a"), "restartToken": "token"}).to_string(),
    );
    docker
}

#[track_caller]
fn wait_for_replay(home: &Home) {
    wait_until("the replay", || {
        let described = done(home, &json!({"kind": "describe"}));
        if described["replayed"] == true { Ok(()) } else { Err(described) }
    });
}

fn slow_replay() {
    let home = Home::new();
    let docker = replaying(&home);
    let _daemon = home.daemon();
    docker.wait_for_probes(0);
    // Docker does not answer until the case lets it, so a request that waited for the replay would time out.
    for kind in ["http-info", "list", "version"] {
        done(&home, &json!({"kind": kind}));
    }
    let described = done(&home, &json!({"kind": "describe"}));
    assert_eq!(described["replayed"], false, "{described}");
    docker.set_mode(DockerMode::Answers);
    wait_for_replay(&home);
    assert_eq!(names(&home), ["a"]);
}

fn register_waits() {
    let home = Home::new();
    let docker = replaying(&home);
    let _daemon = home.daemon();
    let waiting = [
        registration(&home, "b", &json!({})),
        json!({"kind": "deregister", "containerName": "c"}),
        json!({"kind": "status", "containerName": "a"}),
        json!({"kind": "restart", "containerName": "a", "build": 7}),
        json!({"kind": "secrets-patch", "containerName": "c", "patch": {}}),
    ];
    let mut asked: Vec<Wire> = waiting
        .iter()
        .map(|request| {
            let mut wire = Wire::connect(&home);
            wire.send(format!("{request}\n"));
            wire
        })
        .collect();
    let mut web = http::Web::connect(http_port(&home));
    web.send(http::post(8974, Some("token"), &waiting[3].to_string()));
    assert!(asked[0].is_silent_for(NEGATIVE_WAIT), "register did not wait");
    for (wire, request) in asked.iter_mut().zip(&waiting) {
        assert!(wire.is_silent_for(Duration::from_millis(1)), "{request} did not wait");
    }
    assert!(!names(&home).contains(&"b".to_owned()));
    docker.set_mode(DockerMode::Answers);
    let answers: Vec<Value> = asked.iter_mut().map(Wire::answer).collect();
    assert_eq!(answers[..2], [json!({"ok": true}), json!({"ok": true})]);
    assert_eq!(answers[2]["ok"], true, "{}", answers[2]);
    assert_eq!(answers[3]["reason"], "restart.build must be a boolean if provided");
    assert_eq!(answers[4]["reason"], "not registered: c");
    assert_eq!(web.answer().reason(), "restart.build must be a boolean if provided");
    assert_eq!(names(&home), ["a", "b"]);
}

fn endless_replay() {
    let home = Home::new();
    let _docker = replaying(&home);
    let _daemon = home.daemon();
    register(&home, "b");
    assert_eq!(names(&home), ["a", "b"]);
}

fn stop_while_replaying() {
    let home = Home::new();
    let _docker = replaying(&home);
    home.daemon().shut_down();
    assert!(home.registration("a").exists());
    let mut daemon = home.daemon();
    daemon.signal(rustix::process::Signal::TERM);
    assert!(daemon.end().success());
    assert!(home.registration("a").exists());
}

fn stale_temporary_files() {
    let home = Home::new();
    let directory = home.registration("x").parent().unwrap().to_owned();
    home.write_registration("a", json!({"containerName": "a", "cwd": home.folder("a")}).to_string());
    std::fs::write(directory.join("a.json.4242.tmp"), "{\"containerName\":\"a\"").unwrap();
    std::fs::write(directory.join("b.json.1.tmp"), json!({"containerName": "b", "cwd": "/"}).to_string())
        .unwrap();
    let _daemon = home.daemon();
    done(&home, &json!({"kind": "status", "containerName": "a"}));
    assert_eq!(names(&home), ["a"]);
    let left: Vec<_> =
        std::fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["a.json"]);
}

/// Registers without a pause, kills the daemon at a random time, and checks the registrations of the next one.
fn kill_at_any_moment() {
    let home = Home::new();
    let rounds = if landfall_tests::is_long() { 200 } else { 8 };
    let mut random = landfall_tests::Rng::new(landfall_tests::seed());
    for round in 0..rounds {
        let daemon = home.daemon();
        wait_for_replay(&home);
        let count = 1 + random.below(40);
        let mut answered = Vec::new();
        let kept = names(&home);
        for index in 0..count {
            let name = format!("c{round}-{index}");
            register_with(&home, &name, &json!({"restartToken": format!("token-of-{name}")}));
            answered.push(name);
        }
        // One further request that is not awaited.
        let mut last = Wire::connect(&home);
        last.send(registration(&home, &format!("last{round}"), &json!({})).to_string() + "\n");
        daemon.kill();
        let daemon = home.daemon();
        wait_for_replay(&home);
        let known = names(&home);
        let expected: Vec<&String> = kept.iter().chain(&answered).collect();
        let found: Vec<&String> = known.iter().filter(|name| !name.starts_with("last")).collect();
        let expected: Vec<&String> = expected.into_iter().filter(|name| !name.starts_with("last")).collect();
        assert_eq!(found, expected, "round {round}");
        assert!(
            home.events().iter().all(|event| event["kind"] != "registration-skipped"),
            "{:?}",
            home.events()
        );
        for name in &answered {
            assert_eq!(home.registered(name).unwrap()["restartToken"], format!("token-of-{name}"));
        }
        daemon.shut_down();
    }
}
