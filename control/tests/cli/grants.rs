//! `grant`, `revoke` and the lists that show grants, against a scripted daemon.

#![expect(clippy::unwrap_used, reason = "a test that cannot continue reports the line")]

use serde_json::{Value, json};

use crate::asking::{Scripted, ours};

/// Returns a daemon of this build that answers each change of grants with `grants`.
fn daemon(grants: Value) -> Scripted {
    let shop = json!({ "containerName": "shop", "cwd": "/w/shop", "state": "off", "forwards": [], "grants": grants });
    let found = json!([
        { "name": "shop", "id": "1", "image": "shop", "running": true, "forwarded": "yes", "registered": "shop",
          "grants": grants },
        { "name": "db", "id": "2", "image": "pg", "running": true, "forwarded": "no", "why": "no label asks for it" },
    ]);
    Scripted::new(move |request, _| match request["kind"].as_str().unwrap() {
        "grant" if request["containerName"] != "shop" => {
            json!({ "ok": false, "reason": "not registered: nobody" })
        }
        "grant" | "revoke" => {
            json!({ "ok": true, "result": { "containerName": "shop", "grants": grants } })
        }
        "containers" => json!({ "ok": true, "result": { "containers": found } }),
        _ => ours(request, &json!([shop])),
    })
}

fn granted() -> Value {
    json!([{ "what": "rebuild", "state": "granted", "folder": "/w/shop" }])
}

/// Returns rights in each state other than granted.
fn unusual() -> Value {
    json!([
        { "what": "rebuild", "state": "registered" },
        { "what": "rebuild", "state": "dormant", "folder": "/w/\u{1b}[2Jother" },
        { "what": "tool:x", "state": "unknown", "folder": "/w/shop" },
    ])
}

#[test]
fn a_grant_is_sent_and_the_rights_are_shown_with_their_meaning() {
    let daemon = daemon(granted());
    insta::assert_snapshot!("granted", daemon.place.seen(&["grant", "shop", "rebuild"]));
    let request = json!({ "kind": "grant", "containerName": "shop", "what": ["rebuild"] });
    assert_eq!(daemon.asked("grant"), request);
    let json = daemon.place.seen(&["grant", "shop", "rebuild", "--json"]);
    let expected = json!({ "containerName": "shop", "grants": granted() });
    assert_eq!(json, format!("{expected}\nexit 0"));
    insta::assert_snapshot!("granted_to_nobody", daemon.place.seen(&["grant", "nobody", "rebuild"]));
}

#[test]
fn a_revocation_is_sent_unchanged_and_the_remaining_rights_are_shown() {
    let daemon = daemon(json!([]));
    insta::assert_snapshot!("revoked", daemon.place.seen(&["revoke", "shop", "rebuild", "tool:x"]));
    let request = json!({ "kind": "revoke", "containerName": "shop", "what": ["rebuild", "tool:x"] });
    assert_eq!(daemon.asked("revoke"), request);
}

#[test]
fn an_unknown_or_missing_right_is_a_usage_error() {
    let daemon = daemon(granted());
    let all = [&["grant", "shop", "root"][..], &["grant", "shop"], &["revoke"]];
    let seen: Vec<String> = all
        .iter()
        .map(|verb| format!("$ landfall {}\n{}\n", verb.join(" "), daemon.place.seen(verb)))
        .collect();
    insta::assert_snapshot!("grant_usage", seen.join("\n"));
}

#[test]
fn a_right_of_the_registration_cannot_be_revoked_and_the_hint_gives_an_alternative() {
    let daemon = Scripted::new(|request, _| match request["kind"].as_str().unwrap() {
        "revoke" => {
            let reason = "rebuild comes with the registration of shop, which has no attach method";
            json!({ "ok": false, "reason": reason })
        }
        _ => ours(request, &json!([])),
    });
    insta::assert_snapshot!("revoked_in_vain", daemon.place.seen(&["revoke", "shop", "rebuild"]));
}

#[test]
fn status_and_ls_show_rights() {
    let (usual, unusual) = (daemon(granted()), daemon(unusual()));
    let all = [&["status", "shop"][..], &["status", "shop", "--json"], &["ls", "--all"]];
    let seen: Vec<String> = [&usual, &unusual]
        .into_iter()
        .flat_map(|daemon| all.iter().map(move |verb| (daemon, verb)))
        .map(|(daemon, verb)| format!("$ landfall {}\n{}\n", verb.join(" "), daemon.place.seen(verb)))
        .collect();
    insta::assert_snapshot!("grants_shown", seen.join("\n"));
    let listed = usual.place.seen(&["ls", "--all", "--json"]);
    let listed: Value = serde_json::from_str(listed.lines().next().unwrap()).unwrap();
    assert_eq!(listed["containers"][0]["grants"], granted());
}
