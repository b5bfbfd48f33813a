//! Containers that the daemon discovers, through every event of their lives, against a scripted Docker engine. Other files
//! test which ports are forwarded.

use landfall_tests::case::Case;
use landfall_tests::rpc::{done, names, refused, register};
use landfall_tests::{DockerMode, FakeDocker, Home, NEGATIVE_WAIT, wait_until};
use serde_json::{Value, json};

pub(crate) const CASES: &[Case] = &[
    Case::once("a_labelled_container_is_registered_while_it_exists", labelled),
    Case::once("a_container_without_a_label_is_forwarded_only_with_all", unlabelled),
    Case::once("a_renamed_container_is_registered_under_its_new_name", renamed),
    Case::once("a_list_with_both_names_of_a_renamed_container_is_read_again", both_names),
    Case::once("a_failed_list_request_is_repeated", failed_list),
    Case::once("a_stale_list_does_not_undo_a_rename", stale_list),
    Case::once("a_recreated_container_is_registered_with_its_new_labels", recreated),
    Case::once("a_docker_outage_drops_no_registration", docker_outage),
    Case::once("containers_created_and_removed_between_two_daemons_are_detected", between_daemons),
    Case::once("a_user_registration_is_not_replaced_by_discovery", user_registration),
    Case::once("invalid_labels_are_reported_once", invalid_labels),
    Case::once("c23_labels_of_an_image_grant_nothing", image_labels),
    Case::once("c23_labels_grant_nothing_while_the_image_cannot_be_inspected", image_deleted),
    Case::once("a_name_conflict_is_reported_and_the_first_container_keeps_the_name", name_conflict),
    Case::once("a_hundred_containers_at_once_cause_a_few_list_requests", hundred_containers),
    Case::once("unrelated_docker_events_cause_no_requests", unrelated_events),
    Case::once("attach_persists_until_detach_even_without_a_container", attached),
    Case::once("attach_with_a_folder_overrides_the_image_metadata", folder_overrides_image),
    Case::once("detach_turns_off_a_container_that_would_be_discovered_again", detached),
    Case::once("ls_all_shows_the_reason_for_every_container", every_container),
];

const FORWARD: (&str, &str) = ("dev.landfall.forward", "true");

/// Waits until exactly these are registered.
#[track_caller]
fn wait_for_names(home: &Home, wanted: &[&str]) {
    wait_until(&format!("{wanted:?} to be registered"), || {
        let mut names = names(home);
        names.sort();
        if names == wanted { Ok(()) } else { Err((names, home.events())) }
    });
}

#[track_caller]
fn wait_for_discovered(home: &Home, name: &str, by: &str, id: &str) {
    let wanted = json!({"by": by, "id": id});
    wait_until(&format!("{name} to be found"), || {
        let found = home.registered(name).unwrap_or_default();
        if found["discovered"] == wanted { Ok(()) } else { Err((found, home.events())) }
    });
}

/// Runs a verb that must succeed, and returns the JSON object that it prints.
#[track_caller]
fn verb_output(home: &Home, arguments: &[&str]) -> Value {
    let output = home.run(arguments);
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn notices(home: &Home, part: &str) -> usize {
    let notices = home.events().into_iter().filter(|event| event["kind"] == "notice");
    notices.filter(|event| event["text"].as_str().is_some_and(|text| text.contains(part))).count()
}

fn labelled() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &["other"]);
    let _daemon = home.daemon();
    docker.launch("shop", &[FORWARD, ("dev.landfall.allow", "80,3000")]);
    wait_for_discovered(&home, "shop", "label", &docker.id("shop"));
    let kept = home.registered("shop").unwrap();
    assert_eq!(kept["portForward"], json!({"allow": [80, 3000]}));
    assert_eq!(kept["way"], json!({"kind": "docker"}));
    wait_for_names(&home, &["shop"]);
    docker.remove("shop", false);
    wait_for_names(&home, &[]);
    // This event comes last, after the file was removed.
    let event = home.wait_for_event("deregister", |event| event["containerName"] == "shop");
    assert_eq!(event["reason"], "gone");
    assert!(home.registered("shop").is_none());
}

fn unlabelled() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &["plain"]);
    docker.launch("private", &[("dev.landfall.forward", "false")]);
    docker.launch("landfall-helper-0", &[("dev.landfall.helper", "1")]);
    docker.add("idle", false);
    let daemon = home.start().argument("--all").wait_until_ready();
    wait_for_names(&home, &["plain"]);
    assert_eq!(done(&home, &json!({"kind": "describe"}))["all"], true);
    daemon.shut_down();
    let _daemon = home.daemon();
    // It was registered only because of `--all`.
    wait_for_names(&home, &[]);
}

fn renamed() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &[]);
    let _daemon = home.daemon();
    docker.launch("shop", &[FORWARD]);
    docker.launch("cache", &[]);
    wait_for_names(&home, &["shop"]);
    verb_output(&home, &["attach", "cache", "--allow", "6379", "--json"]);
    docker.rename_to("shop", "store");
    docker.rename_to("cache", "redis");
    wait_for_names(&home, &["redis", "store"]);
    wait_for_discovered(&home, "redis", "name", &docker.id("redis"));
    assert_eq!(home.registered("redis").unwrap()["portForward"], json!({"allow": [6379]}));
}

fn both_names() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &[]);
    let _daemon = home.daemon();
    docker.launch("shop", &[FORWARD]);
    docker.launch("cache", &[]);
    wait_for_names(&home, &["shop"]);
    verb_output(&home, &["attach", "cache", "--json"]);
    docker.rename_slowly("shop", "store", 3);
    wait_for_names(&home, &["cache", "store"]);
    docker.rename_slowly("cache", "redis", 3);
    wait_for_names(&home, &["redis", "store"]);
    // The registration moved, without a message to the user.
    assert_eq!(notices(&home, ""), 0);
}

fn failed_list() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &[]);
    let _daemon = home.daemon();
    docker.launch("first", &[FORWARD]);
    wait_for_names(&home, &["first"]);
    docker.set_mode(DockerMode::Fails);
    let asked = docker.calls("GET /containers/json");
    docker.launch("shop", &[FORWARD]);
    docker.wait_for_calls("GET /containers/json", asked + 1);
    docker.set_mode(DockerMode::Answers);
    // No further event follows.
    wait_for_names(&home, &["first", "shop"]);
}

fn stale_list() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &[]);
    let _daemon = home.daemon();
    docker.launch("shop", &[FORWARD]);
    wait_for_names(&home, &["shop"]);
    // The delayed list may be one that the daemon reads by itself, after an event or a start. Then the verb gets its answer
    // in the meantime, and the next round delays another list.
    let (mut old, mut new) = ("shop", "store");
    let before = loop {
        let before = home.count_events("register", old);
        docker.hold_list();
        let is_held = std::thread::scope(|scope| {
            let asked = scope.spawn(|| verb_output(&home, &["ls", "--all", "--json"]));
            docker.wait_for_held_list();
            docker.rename_to(old, new);
            let is_held = wait_until("the new name, or the answer of the verb", || {
                let (is_answered, names) = (asked.is_finished(), names(&home));
                if is_answered || names == [new] { Ok(!is_answered) } else { Err(names) }
            });
            docker.release_list();
            let verb_output = asked.join().unwrap();
            assert!(!is_held || verb_output["containers"][0]["name"] == old, "{verb_output}");
            is_held
        });
        wait_for_names(&home, &[new]);
        if is_held {
            break before;
        }
        std::mem::swap(&mut old, &mut new);
    };
    // Makes the daemon evaluate all containers.
    register(&home, "other");
    docker.launch("next", &[FORWARD]);
    let mut wanted = ["next", "other", new];
    wanted.sort_unstable();
    wait_for_names(&home, &wanted);
    assert_eq!(home.count_events("register", old), before, "{:?}", home.events());
}

fn recreated() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &[]);
    let _daemon = home.daemon();
    docker.launch("shop", &[FORWARD]);
    wait_for_discovered(&home, "shop", "label", &docker.id("shop"));
    docker.remove("shop", false);
    docker.launch("shop", &[FORWARD, ("dev.landfall.deny", "9229")]);
    wait_for_discovered(&home, "shop", "label", &docker.id("shop"));
    assert_eq!(home.registered("shop").unwrap()["portForward"], json!({"allow": "*", "deny": [9229]}));
    docker.remove("shop", false);
    docker.launch("shop", &[]);
    wait_for_names(&home, &[]);
}

fn docker_outage() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &[]);
    let _daemon = home.start().variable("LANDFALL_GC_INTERVAL", "20ms").wait_until_ready();
    docker.launch("shop", &[FORWARD]);
    docker.launch("cache", &[FORWARD]);
    wait_for_names(&home, &["cache", "shop"]);
    docker.set_mode(DockerMode::Fails);
    docker.hang_up();
    docker.remove("shop", true);
    docker.launch("late", &[FORWARD]);
    let lists = docker.calls("GET /");
    docker.wait_for_calls("GET /", lists + 2);
    wait_for_names(&home, &["cache", "shop"]);
    docker.set_mode(DockerMode::Answers);
    wait_for_names(&home, &["cache", "late"]);
}

fn between_daemons() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &[]);
    let daemon = home.daemon();
    for name in ["goes", "moves", "stays"] {
        docker.launch(name, &[FORWARD]);
    }
    docker.launch("named", &[]);
    wait_for_names(&home, &["goes", "moves", "stays"]);
    verb_output(&home, &["attach", "named", "--json"]);
    daemon.shut_down();
    docker.remove("goes", false);
    docker.rename_to("moves", "moved");
    docker.rename_to("named", "renamed");
    docker.launch("came", &[FORWARD]);
    let _daemon = home.daemon();
    wait_for_names(&home, &["came", "moved", "renamed", "stays"]);
}

fn user_registration() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &[]);
    let _daemon = home.daemon();
    register(&home, "shop");
    let before = home.registered("shop").unwrap();
    docker.launch("shop", &[FORWARD, ("dev.landfall.allow", "80")]);
    docker.launch("next", &[FORWARD]);
    wait_for_names(&home, &["next", "shop"]);
    assert_eq!(home.registered("shop").unwrap(), before);
    // A registration by a user replaces a discovered one of the same name; when the user deregisters it, the container is
    // discovered again.
    register(&home, "next");
    assert_eq!(home.registered("next").unwrap().get("discovered"), None);
    done_deregister(&home, "next");
    wait_for_discovered(&home, "next", "label", &docker.id("next"));
}

fn done_deregister(home: &Home, name: &str) {
    let answer = landfall_tests::rpc::ask(home, &json!({"kind": "deregister", "containerName": name}));
    assert_eq!(answer, json!({"ok": true}));
}

fn invalid_labels() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &[]);
    let _daemon = home.daemon();
    docker.launch("shop", &[("dev.landfall.forward", "perhaps")]);
    docker.launch("db", &[FORWARD, ("dev.landfall.deny", "ssh")]);
    for number in 0..5 {
        let name = format!("next-{number}");
        docker.launch(&name, &[FORWARD]);
        wait_until("the next one", || home.registered(&name).map(drop).ok_or("not there"));
    }
    assert_eq!(notices(&home, "container shop: its label dev.landfall.forward is \"perhaps\""), 1);
    assert_eq!(notices(&home, "container db: no port is forwarded"), 1);
    assert!(home.registered("shop").is_none() && home.registered("db").is_none());
    // Nor is it forwarded when a user attaches it by name without a port list.
    let output = home.run(&["attach", "db"]);
    let verb_output = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(6), "{verb_output}");
    assert!(
        verb_output.contains("its label dev.landfall.deny is \"ssh\"") && verb_output.contains("--allow"),
        "{verb_output}"
    );
    assert!(home.registered("db").is_none());
}

fn name_conflict() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &[]);
    let _daemon = home.daemon();
    let web = [FORWARD, ("dev.landfall.name", "web")];
    docker.launch("one", &web);
    wait_for_discovered(&home, "web", "label", &docker.id("one"));
    docker.launch("two", &web);
    let text = "container two is not forwarded: container one has the name web";
    home.wait_for_event("notice", |event| event["text"] == text);
    assert_eq!(home.registered("web").unwrap()["way"], json!({"kind": "docker", "container": "one"}));
    docker.remove("one", false);
    wait_for_discovered(&home, "web", "label", &docker.id("two"));
}

fn hundred_containers() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &[]);
    let _daemon = home.daemon();
    docker.launch("first", &[FORWARD]);
    wait_for_names(&home, &["first"]);
    let lists = docker.calls("GET /containers/json");
    for number in 0..100 {
        docker.launch(&format!("c{number}"), &[FORWARD]);
    }
    wait_until("all of them", || {
        let count = names(&home).len();
        if count == 101 { Ok(()) } else { Err(count) }
    });
    // Two hundred events, in much less than a second on an idle machine.
    let lists = docker.calls("GET /containers/json") - lists;
    assert!(lists < 70, "{lists} lists");
}

fn unrelated_events() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &[]);
    let _daemon = home.daemon();
    docker.launch("shop", &[FORWARD]);
    wait_for_discovered(&home, "shop", "label", &docker.id("shop"));
    // The list for the last of these events may still be in progress.
    std::thread::sleep(NEGATIVE_WAIT);
    let lists = docker.calls("GET /containers/json");
    for what in
        ["exec_create: true", "exec_start: true", "exec_die", "health_status: healthy", "top", "attach"]
    {
        docker.emit_event(what, "shop");
    }
    std::thread::sleep(NEGATIVE_WAIT);
    assert_eq!(docker.calls("GET /containers/json"), lists);
}

fn attached() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &[]);
    docker.add("shop", false);
    let daemon = home.start().variable("LANDFALL_GC_INTERVAL", "20ms").wait_until_ready();
    let output = home.run(&["attach", "nobody"]);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    let attached = verb_output(&home, &["attach", "shop", "--deny", "9229", "--json"]);
    assert_eq!((&attached["attached"], &attached["running"]), (&json!("shop"), &json!(false)));
    let policy = json!({"allow": "*", "deny": [9229]});
    assert_eq!(home.registered("shop").unwrap()["portForward"], policy);
    docker.remove("shop", false);
    // Longer than it takes to remove other registrations.
    std::thread::sleep(NEGATIVE_WAIT);
    wait_for_names(&home, &["shop"]);
    daemon.shut_down();
    let _daemon = home.daemon();
    wait_for_names(&home, &["shop"]);
    docker.launch("shop", &[]);
    wait_for_discovered(&home, "shop", "name", &docker.id("shop"));
    assert_eq!(home.registered("shop").unwrap()["portForward"], policy);
    assert_eq!(verb_output(&home, &["detach", "shop", "--json"]), json!({"detached": "shop", "off": false}));
    wait_for_names(&home, &[]);
    assert_eq!(refused(&home, &json!({"kind": "detach", "containerName": "shop"})), "shop is not forwarded");
    assert_eq!(home.run(&["detach", "nobody"]).status.code(), Some(3));
}

fn folder_overrides_image() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &[]);
    let _daemon = home.daemon();
    let printed = r#"[{"forwardPorts": [80], "portsAttributes": {"3000": {"label": "image"}}},
        {"portsAttributes": {"9229": {"onAutoForward": "ignore", "label": "debug"}}}]"#;
    docker.launch("shop", &[("devcontainer.metadata", printed)]);
    let folder = home.folder("shop");
    let printed = r#"{"forwardPorts": [81], "portsAttributes": {"3000": {"onAutoForward": "ignore"}}}"#;
    std::fs::write(folder.join(".devcontainer.json"), printed).unwrap();
    // No process runs in it, so it is attached and cannot be entered.
    home.run(&["attach", "shop", "--cwd", folder.to_str().unwrap()]);
    let both = home.registered("shop").unwrap();
    assert_eq!(both["portForward"], json!({"allow": "*", "deny": [3000, 9229], "privileged": [80]}));
    // The folder's own file takes effect when it is approved.
    assert_eq!(both["folderPorts"]["privileged"], json!([81]));
    assert_eq!(both["portNotes"], json!([{"first": 9229, "last": 9229, "label": "debug"}]));
}

/// Labels with which a public image opened ports of the host on a plain `docker run`.
const HOSTILE: [(&str, &str); 4] = [
    FORWARD,
    ("dev.landfall.name", "postgres"),
    ("dev.landfall.allow", "22,80,443,5432"),
    ("devcontainer.metadata", r#"[{"forwardPorts": [22, 80, 443]}]"#),
];

/// Returns the row of `ls --all` for a container: whether it is forwarded, and why.
fn forwarded(home: &Home, name: &str) -> Value {
    let found = verb_output(home, &["ls", "--all", "--json"]);
    let one = found["containers"].as_array().unwrap().iter().find(|one| one["name"] == name).unwrap().clone();
    json!([one["forwarded"], one["why"], one["hint"]])
}

fn image_labels() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &[]);
    docker.add_image("hostile", &[&HOSTILE[..], &[("dev.landfall.deny", "9229")]].concat());
    docker.launch_from("hostile", "shop", &[]);
    // A label with the same value as the image's grants nothing; another value is the container's own.
    docker.launch_from("hostile", "same", &HOSTILE);
    docker.launch_from("hostile", "own", &[("dev.landfall.forward", "yes"), ("dev.landfall.allow", "3000")]);
    let daemon = home.daemon();
    wait_for_discovered(&home, "own", "label", &docker.id("own"));
    assert_eq!(home.registered("own").unwrap()["portForward"], json!({"allow": [3000]}));
    wait_for_names(&home, &["own"]);
    let why = |name: &str| json!(["no", "label comes from the image", format!("landfall attach {name}")]);
    assert_eq!(forwarded(&home, "shop"), why("shop"));
    assert_eq!(forwarded(&home, "same"), why("same"));
    let listed = home.run(&["ls", "--all"]);
    let printed = String::from_utf8_lossy(&listed.stderr);
    assert!(printed.contains("hint: landfall attach shop forwards it"), "{printed}");
    // Each image is inspected once, regardless of container events.
    let inspected = docker.calls("GET /images/");
    docker.remove("same", false);
    wait_until("same to be gone from the list", || {
        let found = verb_output(&home, &["ls", "--all", "--json"]);
        if found["containers"].as_array().unwrap().len() == 2 { Ok(()) } else { Err(found) }
    });
    assert_eq!((inspected, docker.calls("GET /images/")), (1, 1));
    // A user attaches it: that opens no port below 1024, and the ports that the image denies stay denied.
    home.run(&["attach", "shop"]);
    assert_eq!(home.registered("shop").unwrap()["portForward"], json!({"allow": "*", "deny": [9229]}));
    home.run(&["detach", "shop"]);
    daemon.shut_down();
    docker.remove("shop", false);
    docker.launch_from("hostile", "new", &[]);
    let _daemon = home.start().argument("--all").wait_until_ready();
    wait_for_discovered(&home, "new", "all", &docker.id("new"));
    assert_eq!(home.registered("new").unwrap()["portForward"], json!({"allow": "*", "deny": [9229]}));
    // A folder label of an image does not make its container one of `landfall start`.
    docker.add_image("claims", &[("dev.landfall.folder", home.folder("shop").to_str().unwrap())]);
    docker.launch_from("claims", "claims", &[]);
    let output = home.run(&["stop", home.folder("shop").to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert_eq!(home.run(&["stop", "claims"]).status.code(), Some(6));
    assert!(docker.is_running("claims"));
}

fn image_deleted() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &[]);
    docker.add_image("hostile", &HOSTILE);
    docker.launch_from("hostile", "shop", &[]);
    docker.delete_image("hostile");
    docker.launch("own", &[FORWARD]);
    let daemon = home.daemon();
    wait_for_discovered(&home, "own", "label", &docker.id("own"));
    wait_for_names(&home, &["own"]);
    let why = "label may come from the image, which cannot be inspected";
    assert_eq!(forwarded(&home, "shop"), json!(["no", why, "landfall attach shop"]));
    // Labels of an image that were read once stay valid: an id identifies the content.
    docker.delete_image("image-of-own");
    docker.launch("db", &[]);
    assert_eq!(forwarded(&home, "own"), json!(["yes", null, null]));
    daemon.shut_down();
    let _daemon = home.daemon();
    assert_eq!(forwarded(&home, "own"), json!(["no", why, "landfall attach own"]));
    wait_for_names(&home, &[]);
}

fn detached() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &[]);
    let _daemon = home.daemon();
    docker.launch("shop", &[FORWARD, ("dev.landfall.allow", "80")]);
    wait_for_discovered(&home, "shop", "label", &docker.id("shop"));
    assert_eq!(verb_output(&home, &["detach", "shop", "--json"]), json!({"detached": "shop", "off": true}));
    assert_eq!(home.registered("shop").unwrap()["portForward"], json!({"allow": []}));
    docker.remove("shop", false);
    docker.launch("shop", &[FORWARD, ("dev.landfall.allow", "80")]);
    wait_for_discovered(&home, "shop", "name", &docker.id("shop"));
    assert_eq!(home.registered("shop").unwrap()["portForward"], json!({"allow": []}));
    // No process runs in this one, so it is attached and cannot be entered.
    home.run(&["attach", "shop"]);
    assert_eq!(home.registered("shop").unwrap()["portForward"], json!({"allow": [80]}));
    let before = home.count_events("register", "shop");
    let output = home.run(&["deregister", "shop"]);
    assert!(output.status.success(), "{output:?}");
    wait_until("it to come back", || match home.count_events("register", "shop") {
        count if count > before => Ok(()),
        count => Err(count),
    });
    wait_for_discovered(&home, "shop", "label", &docker.id("shop"));
    // The label would turn it on again.
    let output = home.run(&["deregister", "shop"]);
    assert_eq!(output.status.code(), Some(6), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("landfall detach shop"), "{output:?}");
}

fn every_container() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &[]);
    let _daemon = home.daemon();
    docker.launch("shop", &[FORWARD, ("dev.landfall.name", "web")]);
    docker.launch("db", &[]);
    docker.add("idle", false);
    let found = verb_output(&home, &["ls", "--all", "--json"]);
    let of = |name: &str| {
        let found = found["containers"].as_array().unwrap().iter().find(|one| one["name"] == name);
        let one = found.unwrap();
        json!([one["running"], one["forwarded"], one["registered"], one["by"], one["why"]])
    };
    assert_eq!(of("shop"), json!([true, "yes", "web", "label", null]));
    assert_eq!(of("db"), json!([true, "no", null, null, "no label asks for it"]));
    assert_eq!(of("idle"), json!([false, "no", null, null, "no label asks for it"]));
    docker.set_mode(DockerMode::Fails);
    let output = home.run(&["ls", "--all"]);
    assert_eq!(output.status.code(), Some(6), "{output:?}");
}
