//! The daemon's registrations and their files: the wire specification's A.7, and its acceptance rows by their titles.

use landfall_tests::case::Case;
use landfall_tests::rpc::{
    Wire, ask, done, http_port, names, refused, register, register_with, registration,
};
use landfall_tests::{
    DockerMode, FakeDocker, Home, NEGATIVE_WAIT, Namespace, Server, connect, http, wait_until,
};
use serde_json::json;

pub(crate) const CASES: &[Case] = &[
    Case::once("register_tracks_a_container_cwd_and_list_reflects_the_registration", register_and_list),
    Case::once("register_is_idempotent_for_the_same_container", idempotent),
    Case::once("deregister_removes_the_registration_and_list_shows_it_gone", deregister),
    Case::once("deregister_of_an_unknown_container_is_a_no_op", deregister_unknown),
    Case::once("status_returns_the_registered_cwd_and_no_ports_where_there_are_none", status),
    Case::once("status_surfaces_the_ports_that_are_forwarded", status_with_ports),
    Case::once("register_refuses_invalid_fields_without_side_effects", register_refuses),
    Case::once("register_refuses_names_that_escape_the_directory", register_refuses_names),
    Case::once("register_concurrent_with_deregister_leaves_no_registration", serialised),
    Case::once("a_hundred_registers_at_once_are_all_kept", a_hundred_at_once),
    Case::once("register_persists_the_payload_with_mode_0600", persisted),
    Case::once("unknown_fields_are_kept_across_daemons", unknown_fields),
    Case::once("gc_removes_registrations_whose_containers_vanished", gc_removes),
    Case::once("gc_requires_consecutive_absences", gc_consecutive),
    Case::once("gc_tolerates_a_docker_that_fails", gc_tolerates),
    Case::once("gc_counts_a_stopped_container_as_present", gc_stopped),
    Case::once("gc_matches_the_exact_name", gc_exact_name),
    Case::once("a_destroyed_container_is_deregistered_at_once", destroyed),
    Case::once("a_registration_ends_with_its_process", process_ends),
    Case::once("c22_a_second_daemon_refuses_to_start", second_daemon),
];

fn register_and_list() {
    let home = Home::new();
    let _daemon = home.daemon();
    let cwd = home.folder("agent");
    let request = json!({"kind": "register", "containerName": "agent", "cwd": cwd});
    assert_eq!(ask(&home, &request), json!({"ok": true}));
    let listed = json!({"ok": true, "result": {"registrations": [{"containerName": "agent", "cwd": cwd}]}});
    assert_eq!(ask(&home, &json!({"kind": "list"})), listed);
}

fn idempotent() {
    let home = Home::new();
    let _daemon = home.daemon();
    for name in ["b", "a", "b"] {
        register(&home, name);
    }
    assert_eq!(names(&home), ["b", "a"], "the order of the first registration");
    // The folder of the last registration counts.
    let elsewhere = home.folder("elsewhere");
    let request = json!({"kind": "register", "containerName": "b", "cwd": elsewhere});
    assert_eq!(ask(&home, &request), json!({"ok": true}));
    let status = done(&home, &json!({"kind": "status", "containerName": "b"}));
    assert_eq!(status["cwd"], elsewhere.to_str().unwrap());
    assert_eq!(home.registered("b").unwrap()["cwd"], elsewhere.to_str().unwrap());
    assert_eq!(home.count_events("register", "b"), 1);
}

fn deregister() {
    let home = Home::new();
    let _daemon = home.daemon();
    register(&home, "a");
    assert_eq!(ask(&home, &json!({"kind": "deregister", "containerName": "a"})), json!({"ok": true}));
    assert!(names(&home).is_empty());
    assert!(!home.registration("a").exists(), "the file is left");
    let event = home.wait_for_event("deregister", |event| event["containerName"] == "a");
    assert_eq!(event["reason"], "requested");
    let reason = refused(&home, &json!({"kind": "status", "containerName": "a"}));
    assert_eq!(reason, "not registered: a");
}

fn deregister_unknown() {
    let home = Home::new();
    let _daemon = home.daemon();
    for name in ["unknown", "", "../x", ".", "with space"] {
        let answer = ask(&home, &json!({"kind": "deregister", "containerName": name}));
        assert_eq!(answer, json!({"ok": true}), "{name:?}");
    }
    assert!(home.events().iter().all(|event| event["kind"] != "deregister"));
}

fn status() {
    let home = Home::new();
    let _daemon = home.daemon();
    register(&home, "a");
    let wanted =
        json!({"ok": true, "result": {"containerName": "a", "cwd": home.folder("a"), "forwardedPorts": []}});
    assert_eq!(ask(&home, &json!({"kind": "status", "containerName": "a"})), wanted);
    for name in ["b", "A", ""] {
        let reason = refused(&home, &json!({"kind": "status", "containerName": name}));
        assert_eq!(reason, format!("not registered: {name}"));
    }
}

fn status_with_ports() {
    let home = Home::new();
    let _daemon = home.daemon();
    let inside = Namespace::new();
    let way = json!({"way": {"kind": "netns", "path": inside.path()}, "portForward": {"allow": "*", "deny": [3001]}});
    register_with(&home, "a", &way);
    let (server, _denied) =
        (Server::listen(&inside, "127.0.0.1:3000"), Server::listen(&inside, "127.0.0.1:3001"));
    let ports = |wanted: &[u16]| {
        wait_until("the forwarded ports", || {
            let status = done(&home, &json!({"kind": "status", "containerName": "a"}));
            if status["forwardedPorts"] == json!(wanted) { Ok(()) } else { Err((status, home.events())) }
        });
    };
    ports(&[3000]);
    let client = connect(([127, 0, 0, 1], 3000));
    let _accepted = server.accept();
    let opened =
        home.wait_for_event("port-forward-event", |event| event["event"]["kind"] == "port-forward-opened");
    let event = json!({"kind": "port-forward-opened", "containerName": "a", "port": 3000, "hostPort": 3000, "bindAddr": "127.0.0.1"});
    assert_eq!(opened["event"], event);
    drop((client, server));
    ports(&[]);
    let closed =
        home.wait_for_event("port-forward-event", |event| event["event"]["kind"] == "port-forward-closed");
    assert_eq!(closed["event"]["reason"], "container-released");
}

fn register_refuses() {
    let home = Home::new();
    let _daemon = home.daemon();
    let full = json!({"restartToken": "kept"});
    register_with(&home, "a", &full);
    let before = home.registered("a");
    let wrong = [
        ("cwd", json!({"cwd": null})),
        ("cwd", json!({"cwd": 7})),
        ("cwd", json!({"cwd": "relative/path"})),
        ("cwd", json!({"cwd": ""})),
        ("containerName", json!({"containerName": 7})),
        ("containerName", json!({"containerName": null})),
        ("restartToken", json!({"restartToken": 7})),
        ("brokerToken", json!({"brokerToken": ["x"]})),
        ("wsHostPort", json!({"wsHostPort": 0})),
        ("wsHostPort", json!({"wsHostPort": 65_536})),
        ("wsHostPort", json!({"wsHostPort": 1.5})),
        ("wsHostPort", json!({"wsHostPort": "4000"})),
        ("portForward", json!({"portForward": "*"})),
        ("portForward", json!({"portForward": {"allow": "all"}})),
        ("portForward", json!({"portForward": {"allow": [99_999]}})),
        ("portForward", json!({"portForward": {"allow": "*", "deny": [0]}})),
        ("portForward", json!({"portForward": {"allow": ["3000"]}})),
        ("way", json!({"way": {"kind": "magic"}})),
        ("way", json!({"way": {"kind": "netns", "path": "relative"}})),
        ("way", json!({"way": {"kind": "process", "pid": 0}})),
    ];
    for (field, fields) in wrong {
        let reason = refused(&home, &registration(&home, "a", &fields));
        assert!(reason.starts_with(&format!("invalid register: {field}")), "{fields}: {reason}");
    }
    let both = json!({"portForward": {"allow": [3000], "deny": [3001]}});
    let reason = refused(&home, &registration(&home, "a", &both));
    assert!(reason.contains("portForward.deny is only meaningful when allow is \"*\""), "{reason}");
    assert_eq!(home.registered("a"), before, "a refused register changed the file");
    assert_eq!(names(&home), ["a"]);
    // Unknown fields are not an error.
    let fields = json!({"restartToken": "", "wsHostPort": null, "portForward": {"allow": "*", "deny": []}});
    register_with(&home, "b", &fields);
    register_with(&home, "c", &json!({"portForward": {"allow": [3000], "deny": []}, "wsHostPort": 4000.0}));
}

fn register_refuses_names() {
    let home = Home::new();
    let _daemon = home.daemon();
    for name in [
        "../../etc/passwd",
        "a/b",
        "with space",
        "",
        ".hidden",
        "-x",
        "_x",
        "ü",
        "a\u{0}b",
        "a\nb",
        "..",
        ".",
    ] {
        let request = json!({"kind": "register", "containerName": name, "cwd": "/"});
        let wanted = format!(
            "failed to persist registration: invalid container name for registration file: \"{name}\""
        );
        assert_eq!(refused(&home, &request), wanted);
    }
    let long = json!({"kind": "register", "containerName": "x".repeat(300), "cwd": "/"});
    assert!(refused(&home, &long).starts_with("failed to persist registration: "));
    assert!(names(&home).is_empty());
    for name in ["coder", "agent-1", "A_B.c", "0", "a..b"] {
        register(&home, name);
    }
    assert_eq!(names(&home).len(), 5);
}

fn serialised() {
    let home = Home::new();
    let _daemon = home.daemon();
    for _ in 0..20 {
        // Connected and sent in this order; answered in any order.
        let (mut first, mut second) = (Wire::connect(&home), Wire::connect(&home));
        first.send(registration(&home, "a", &json!({})).to_string() + "\n");
        second.send("{\"kind\":\"deregister\",\"containerName\":\"a\"}\n");
        assert_eq!((first.answer(), second.answer()), (json!({"ok": true}), json!({"ok": true})));
        assert_eq!(names(&home), Vec::<String>::new());
        assert!(!home.registration("a").exists());
    }
}

fn a_hundred_at_once() {
    let home = Home::new();
    let daemon = home.daemon();
    let mut asked = Vec::new();
    for index in 0..100 {
        let mut wire = Wire::connect(&home);
        wire.send(
            registration(&home, &format!("c{index}"), &json!({"restartToken": "t"})).to_string() + "\n",
        );
        asked.push(wire);
    }
    for mut wire in asked {
        assert_eq!(wire.answer(), json!({"ok": true}));
    }
    // Concurrent registrations have the order in which the daemon processed them.
    let sorted = || {
        let mut known = names(&home);
        known.sort();
        known
    };
    let all = sorted();
    assert_eq!(all.len(), 100);
    daemon.kill();
    let _daemon = home.daemon();
    wait_until("the next daemon to know them all", || {
        let known = sorted();
        if known == all { Ok(()) } else { Err(known) }
    });
}

fn persisted() {
    let home = Home::new();
    let _daemon = home.daemon();
    let fields = json!({"restartToken": "r", "wsHostPort": 4000, "portForward": {"allow": [3000, 8080]}, "brokerToken": "b"});
    register_with(&home, "a", &fields);
    let wanted = json!({"containerName": "a", "cwd": home.folder("a"), "restartToken": "r", "wsHostPort": 4000,
        "portForward": {"allow": [3000, 8080]}, "brokerToken": "b"});
    assert_eq!(home.registered("a").unwrap(), wanted);
    let text = std::fs::read_to_string(home.registration("a")).unwrap();
    assert_eq!(text.trim_end_matches('\n').lines().count(), 1, "{text:?}");
    assert_eq!(home.mode("run/registrations/a.json"), 0o600);
    // The directory contains no other file, and absent fields are not written.
    register(&home, "b");
    assert_eq!(home.registered("b").unwrap(), json!({"containerName": "b", "cwd": home.folder("b")}));
    let mut files: Vec<_> = std::fs::read_dir(home.path().join("run/registrations"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    files.sort();
    assert_eq!(files, ["a.json", "b.json"]);
    // A later registration replaces all fields.
    register(&home, "a");
    assert_eq!(home.registered("a").unwrap(), json!({"containerName": "a", "cwd": home.folder("a")}));
}

fn unknown_fields() {
    let home = Home::new();
    let daemon = home.daemon();
    let fields = json!({"future": {"deep": [1, 2.5, null]}, "x": "y"});
    register_with(&home, "a", &fields);
    let check = || {
        let kept = home.registered("a").unwrap();
        assert_eq!((&kept["future"], &kept["x"]), (&fields["future"], &fields["x"]), "{kept}");
        assert!(kept.get("kind").is_none(), "{kept}");
    };
    check();
    daemon.shut_down();
    let _daemon = home.daemon();
    wait_until("replay", || if names(&home) == ["a"] { Ok(()) } else { Err(names(&home)) });
    check();
}

/// A daemon that checks containers every 20 ms, and removes a registration after this many absences.
fn eager<'a>(home: &'a Home, misses: &str) -> landfall_tests::Daemon<'a> {
    home.start()
        .variable("LANDFALL_GC_INTERVAL", "20ms")
        .variable("LANDFALL_GC_MISSES", misses)
        .wait_until_ready()
}

#[track_caller]
fn wait_until_gone(home: &Home, name: &str) {
    wait_until(&format!("{name} to be forgotten"), || {
        let known = names(home);
        if known.iter().any(|known| known == name) { Err((known, home.events())) } else { Ok(()) }
    });
}

fn gc_removes() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &["a", "b"]);
    let _daemon = eager(&home, "1");
    register_with(&home, "a", &json!({"restartToken": "token-of-a"}));
    register(&home, "b");
    docker.wait_for_probes(4);
    assert_eq!(names(&home), ["a", "b"]);
    docker.remove("a", true);
    wait_until_gone(&home, "a");
    let event = home.wait_for_event("deregister", |event| event["containerName"] == "a");
    assert_eq!(event["reason"], "gone");
    wait_until("the file to go", || if home.registration("a").exists() { Err("there") } else { Ok(()) });
    assert_eq!(names(&home), ["b"]);
    // The whole registration is removed, including the token.
    let restart = json!({"kind": "restart", "containerName": "a"});
    assert_eq!(http::ask(http_port(&home), Some("token-of-a"), &restart).status, 403);
}

fn gc_consecutive() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &["a"]);
    let _daemon = home
        .start()
        .variable("LANDFALL_GC_INTERVAL", "150ms")
        .variable("LANDFALL_GC_MISSES", "2")
        .wait_until_ready();
    register(&home, "a");
    for _ in 0..5 {
        docker.omit_once("a");
        docker.wait_for_probes(2);
        assert_eq!(names(&home), ["a"]);
    }
    docker.remove("a", true);
    wait_until_gone(&home, "a");
}

fn gc_tolerates() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &[]);
    docker.set_mode(DockerMode::Fails);
    let _daemon = eager(&home, "1");
    register(&home, "a");
    docker.wait_for_calls("", 10);
    assert_eq!(names(&home), ["a"]);
    // An unreachable engine does not count as an absence either.
    std::fs::remove_file(home.docker_socket()).unwrap();
    assert!(Wire::connect(&home).is_silent_for(NEGATIVE_WAIT));
    assert_eq!(names(&home), ["a"]);
    assert!(home.registration("a").exists());
}

fn gc_stopped() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &[]);
    docker.add("a", false);
    let _daemon = eager(&home, "1");
    register(&home, "a");
    docker.wait_for_probes(5);
    assert_eq!(names(&home), ["a"]);
}

fn gc_exact_name() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &["web-2", "my-web", "axb"]);
    let _daemon = eager(&home, "1");
    register(&home, "web");
    wait_until_gone(&home, "web");
    // A dot in the name matches only a dot.
    register(&home, "a.b");
    wait_until_gone(&home, "a.b");
    assert!(docker.probes() > 0);
}

fn destroyed() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &["a"]);
    let _daemon = home.daemon();
    register(&home, "a");
    docker.wait_for_calls("GET /events", 1);
    // Only a container that was seen running can be seen to disappear, because containers are registered before they are
    // started. Checks run one after the other, so when the second starts, the first is complete.
    for _ in 0..2 {
        let before = docker.probes();
        docker.emit_event("start", "a");
        wait_until("a look at the container", || if docker.probes() > before { Ok(()) } else { Err(before) });
    }
    docker.remove("a", false);
    // Three absences at intervals of 30 s would exceed the timeout of this wait.
    wait_until_gone(&home, "a");
    assert_eq!(home.wait_for_event("deregister", |_| true)["reason"], "gone");
}

fn process_ends() {
    let home = Home::new();
    let _daemon = eager(&home, "1");
    let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
    register_with(&home, "a", &json!({"way": {"kind": "process", "pid": child.id()}}));
    let look = |_| assert_eq!(names(&home), ["a"]);
    (0..20).for_each(look);
    child.kill().unwrap();
    child.wait().unwrap();
    wait_until_gone(&home, "a");
    assert_eq!(home.wait_for_event("deregister", |_| true)["reason"], "gone");
}

fn second_daemon() {
    let home = Home::new();
    let first = home.daemon();
    register(&home, "a");
    let second = home.start().spawn();
    let status = second.end();
    assert!(!status.success());
    assert!(home.stderr().contains("already listening"), "{}", home.stderr());
    assert!(home.stderr().contains(home.socket().to_str().unwrap()), "{}", home.stderr());
    // The first daemon and its socket are not affected.
    assert_eq!(names(&home), ["a"]);
    first.shut_down();
    let _third = home.daemon();
}
