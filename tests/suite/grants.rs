//! Grants: rights that only the host's user can give, and the request that requires one.

use landfall_tests::case::Case;
use landfall_tests::http;
use landfall_tests::rpc::{ask, done, http_port, refused, register_with};
use landfall_tests::{FakeDocker, Home, wait_until};
use serde_json::{Value, json};

pub(crate) const CASES: &[Case] = &[
    Case::once("c23_a_rebuild_over_http_needs_the_right", rebuild_needs_the_right),
    Case::once("c23_no_registration_label_or_file_of_the_folder_gives_a_right", nothing_else_gives_it),
    Case::once("c21_grants_outlive_registrations_and_daemons_and_are_bound_to_their_folder", bound_and_kept),
];

const TOKEN: &str = "token-of-a";

/// Requests a rebuild as the container `a`.
fn rebuild(home: &Home) -> Value {
    let request = json!({"kind": "restart", "containerName": "a", "build": true});
    let answer = http::ask(http_port(home), Some(TOKEN), &request);
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.body
}

fn change(home: &Home, kind: &str) -> Value {
    done(home, &json!({"kind": kind, "containerName": "a", "what": ["rebuild"]}))
}

/// Registers `a` as landfall's own verbs do, with an attach method.
fn register_ours(home: &Home) {
    register_with(home, "a", &json!({"restartToken": TOKEN, "way": {"kind": "docker"}}));
}

/// The rights of `a` as `status` shows them.
fn shown(home: &Home) -> Value {
    let described = done(home, &json!({"kind": "describe"}));
    let containers = described["containers"].as_array().unwrap();
    let own = containers.iter().find(|container| container["containerName"] == "a").unwrap();
    own.get("grants").cloned().unwrap_or_else(|| json!([]))
}

fn rebuild_needs_the_right() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &["a"]);
    let _daemon = home.daemon();
    std::fs::write(home.folder("a").join("Dockerfile"), "FROM scratch\n").unwrap();
    register_ours(&home);
    let scheduled = json!({"ok": true, "result": {"containerName": "a", "scheduled": true}});
    let is_refused = || {
        let answer = rebuild(&home);
        let reason = answer["reason"].as_str().unwrap_or_default();
        assert!(answer["ok"] == false && reason.starts_with("not granted: rebuild"), "{answer}");
    };
    is_refused();
    assert_eq!(docker.changes(), Vec::<String>::new());
    assert_eq!(home.count_events("restart-scheduled", "a"), 0);
    // The answer to a wrong token does not reveal the right.
    let request = json!({"kind": "restart", "containerName": "a", "build": true});
    let answer = http::ask(http_port(&home), Some("wrong"), &request);
    assert_eq!((answer.status, answer.reason()), (403, "invalid restart token"));

    let granted = change(&home, "grant");
    let folder = home.folder("a");
    let fact = json!({"what": "rebuild", "state": "granted", "folder": folder});
    assert_eq!(granted, json!({"containerName": "a", "grants": [fact]}));
    assert_eq!(rebuild(&home), scheduled);
    home.wait_for_event("restart-completed", |event| event["containerName"] == "a");
    assert_eq!(docker.calls("POST /build"), 1, "{:?}", docker.changes());

    assert_eq!(change(&home, "revoke")["grants"], json!([]));
    is_refused();
    assert_eq!(docker.calls("POST /build"), 1);

    // A client of the reference registers without an attach method, and its containers can rebuild themselves.
    register_with(&home, "a", &json!({"restartToken": TOKEN}));
    assert_eq!(shown(&home), json!([{"what": "rebuild", "state": "registered"}]));
    assert_eq!(rebuild(&home), scheduled);
    wait_until("the second build", || match docker.calls("POST /build") {
        2 => Ok(()),
        _ => Err(docker.changes()),
    });
}

fn nothing_else_gives_it() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &[]);
    let _daemon = home.daemon();
    let granting = "[grants]\nrebuild = true\n[restart]\nrebuild = true\n";
    std::fs::write(home.folder("a").join("landfall.toml"), granting).unwrap();
    let labels = ["grants", "grant", "rebuild"].map(|name| (format!("dev.landfall.{name}"), "rebuild"));
    let mut labels: Vec<(&str, &str)> = labels.iter().map(|(name, value)| (name.as_str(), *value)).collect();
    labels.push(("dev.landfall.forward", "true"));
    docker.launch("a", &labels);
    wait_until("a to be found", || {
        let described = done(&home, &json!({"kind": "describe"}));
        if described["containers"][0]["containerName"] == "a" { Ok(()) } else { Err(described) }
    });
    assert_eq!(shown(&home), json!([]));
    let claims = json!({
        "restartToken": TOKEN, "way": {"kind": "docker"}, "grants": ["rebuild"], "allowRebuild": true,
        "what": ["rebuild"],
    });
    register_with(&home, "a", &claims);
    assert_eq!(shown(&home), json!([]));
    assert_eq!(rebuild(&home)["ok"], false);
    let not_registered = json!({"kind": "grant", "containerName": "b", "what": ["rebuild"]});
    assert_eq!(refused(&home, &not_registered), "not registered: b");
}

fn bound_and_kept() {
    let home = Home::new();
    let _docker = FakeDocker::start(&home, &["a"]);
    let daemon = home.daemon();
    register_ours(&home);
    change(&home, "grant");
    assert_eq!(home.mode("run/grants/a.json"), 0o600);
    register_ours(&home);
    assert_eq!(shown(&home)[0]["state"], "granted", "registering again takes no grant");
    daemon.kill();
    let _daemon = home.daemon();
    let status = json!({"kind": "status", "containerName": "a"});
    done(&home, &status);
    assert_eq!(shown(&home)[0]["state"], "granted");

    let other = home.folder("other");
    let moved = json!({"restartToken": TOKEN, "way": {"kind": "docker"}, "cwd": other});
    register_with(&home, "a", &moved);
    let dormant = json!([{"what": "rebuild", "state": "dormant", "folder": home.folder("a")}]);
    assert_eq!(shown(&home), dormant);
    assert_eq!(rebuild(&home)["ok"], false, "a grant for another folder is not in force");
    register_ours(&home);
    assert_eq!(shown(&home)[0]["state"], "granted");

    let keep = json!({"kind": "deregister", "containerName": "a", "grants": "keep"});
    assert_eq!(ask(&home, &keep), json!({"ok": true}));
    register_ours(&home);
    assert_eq!(shown(&home)[0]["state"], "granted");
    assert_eq!(ask(&home, &json!({"kind": "deregister", "containerName": "a"})), json!({"ok": true}));
    register_ours(&home);
    assert_eq!(shown(&home), json!([]), "the user's deregister removes a grant");
    assert!(!home.path().join("run/grants/a.json").exists());
}
