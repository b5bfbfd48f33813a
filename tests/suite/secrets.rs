//! `secrets-patch` (wire specification, A.1.4) over both channels: one named object is replaced, all other content stays.

use landfall_tests::case::Case;
use landfall_tests::http::{self, Web};
use landfall_tests::rpc::{ask, http_port, refused, register, register_with};
use landfall_tests::{Home, NEGATIVE_WAIT};
use serde_json::{Value, json};

pub(crate) const CASES: &[Case] = &[
    Case::once("http_secrets_patch_writes_secrets_for_the_registered_container", writes),
    Case::once("http_secrets_patch_rejects_unregistered_containers_and_wrong_tokens", rejects_unregistered),
    Case::once("http_secrets_patch_preserves_other_channels_and_serializes_concurrent_patches", preserves),
    Case::once("http_secrets_patch_writes_mcp_credentials_beside_channels_and_sibling_servers", mcp),
    Case::once("http_secrets_patch_rejects_malformed_payloads", malformed),
    Case::once("secrets_patch_never_overwrites_an_unreadable_file", unreadable),
    Case::once("secrets_patch_waits_for_a_held_lock_and_breaks_a_stale_one", locks),
];

fn patch(name: &str, patch: &Value) -> Value {
    json!({"kind": "secrets-patch", "containerName": name, "patch": patch})
}

fn secrets(home: &Home, name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(home.folder(name).join("secrets.json")).unwrap()).unwrap()
}

fn kakaotalk(token: &str) -> Value {
    json!({"currentAccount": "1", "accounts": {"1": {
        "account_id": "1", "oauth_token": token, "user_id": "u", "device_uuid": "d", "device_type": "pc",
        "created_at": "2026-01-01T00:00:00Z", "updated_at": "2026-01-02T00:00:00Z"}}})
}

#[track_caller]
fn assert_patched(answer: &Value, name: &str) {
    assert_eq!(*answer, json!({"ok": true, "result": {"containerName": name, "patched": true}}));
}

fn writes() {
    let home = Home::new();
    let _daemon = home.daemon();
    register_with(&home, "a", &json!({"restartToken": "t"}));
    let block = kakaotalk("secret");
    let request = patch("a", &json!({"channels": {"kakaotalk": block}}));
    let answer = http::ask(http_port(&home), Some("t"), &request);
    assert_eq!(answer.status, 200);
    assert_patched(&answer.body, "a");
    let written = secrets(&home, "a");
    assert_eq!((&written["channels"]["kakaotalk"], &written["version"]), (&block, &json!(2)));
    let path = home.folder("a").join("secrets.json");
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.starts_with("{\n  \"") && text.ends_with("}\n"), "{text:?}");
    // The folder contains no further file, neither a lock nor a temporary file.
    let left: Vec<_> =
        std::fs::read_dir(home.folder("a")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["secrets.json"]);
    // The socket has the same effect.
    assert_patched(&ask(&home, &patch("a", &json!({"channels": {"kakaotalk": kakaotalk("newer")}}))), "a");
    assert_eq!(secrets(&home, "a")["channels"]["kakaotalk"], kakaotalk("newer"));
}

fn rejects_unregistered() {
    let home = Home::new();
    let _daemon = home.daemon();
    register_with(&home, "a", &json!({"restartToken": "t"}));
    let change = json!({"channels": {"kakaotalk": kakaotalk("x")}});
    for (name, token) in [("unknown", "t"), ("a", "wrong")] {
        let answer = http::ask(http_port(&home), Some(token), &patch(name, &change));
        assert_eq!((answer.status, answer.reason()), (403, "invalid restart token"));
    }
    assert_eq!(refused(&home, &patch("unknown", &change)), "not registered: unknown");
    assert!(!home.folder("a").join("secrets.json").exists());
}

fn preserves() {
    let home = Home::new();
    let _daemon = home.daemon();
    register_with(&home, "a", &json!({"restartToken": "t"}));
    let slack = json!({"currentAccount": null, "accounts": {}, "kept": true});
    let before = json!({"$schema": "s", "version": 2, "providers": {"p": {"key": "k"}}, "channels": {"slack": slack}, "mcp": {}, "own": [1]});
    std::fs::write(home.folder("a").join("secrets.json"), before.to_string()).unwrap();
    let blocks: Vec<Value> = (0..16).map(|index| kakaotalk(&format!("token-{index}"))).collect();
    let port = http_port(&home);
    let mut asked: Vec<Web> = blocks
        .iter()
        .map(|block| {
            let mut web = Web::connect(port);
            let request = patch("a", &json!({"channels": {"kakaotalk": block}}));
            web.send(http::post(port, Some("t"), &request.to_string()));
            web
        })
        .collect();
    for web in &mut asked {
        assert_patched(&web.answer().body, "a");
    }
    let after = secrets(&home, "a");
    for key in ["$schema", "version", "providers", "mcp", "own"] {
        assert_eq!(after[key], before[key], "{key}");
    }
    assert_eq!(after["channels"]["slack"], slack);
    assert!(blocks.contains(&after["channels"]["kakaotalk"]), "{after}");
}

fn mcp() {
    let home = Home::new();
    let _daemon = home.daemon();
    register_with(&home, "a", &json!({"restartToken": "t"}));
    let before = json!({"version": 2, "providers": {}, "channels": {"slack": {"accounts": {}}}, "mcp": {"old": {"tokens": {"x": 1}}}});
    std::fs::write(home.folder("a").join("secrets.json"), before.to_string()).unwrap();
    let credential =
        json!({"client": {"id": "c"}, "tokens": {"access": "t"}, "discovery": {"url": "u"}, "more": 1});
    // If both exist, this one is used.
    let both = json!({"mcp": {"server": "new", "credential": credential}, "channels": {"slack": {"accounts": {"x": {}}}}});
    assert_patched(&http::ask(http_port(&home), Some("t"), &patch("a", &both)).body, "a");
    let after = secrets(&home, "a");
    assert_eq!(after["mcp"], json!({"old": {"tokens": {"x": 1}}, "new": credential}));
    assert_eq!(after["channels"], before["channels"]);
    assert_patched(&ask(&home, &patch("a", &json!({"mcp": {"server": "new", "credential": {}}}))), "a");
    assert_eq!(secrets(&home, "a")["mcp"]["new"], json!({}));
}

fn malformed() {
    let home = Home::new();
    let _daemon = home.daemon();
    register_with(&home, "a", &json!({"restartToken": "t"}));
    let port = http_port(&home);
    for credential in [json!("text"), json!(null), json!([]), json!(7)] {
        let answer = http::ask(
            port,
            Some("t"),
            &patch("a", &json!({"mcp": {"server": "s", "credential": credential}})),
        );
        assert_eq!((answer.status, &answer.body["ok"]), (200, &json!(false)), "{credential}: {answer:?}");
    }
    for server in [json!(""), json!(7), json!(null)] {
        let reason = refused(&home, &patch("a", &json!({"mcp": {"server": server, "credential": {}}})));
        assert_eq!(reason, "mcp.server is required", "{server}");
    }
    for nothing in
        [json!(null), json!({}), json!("x"), json!([]), json!({"channels": null}), json!({"other": {}})]
    {
        assert_eq!(refused(&home, &patch("a", &nothing)), "invalid secrets-patch", "{nothing}");
    }
    assert_eq!(
        refused(&home, &json!({"kind": "secrets-patch", "containerName": "a"})),
        "invalid secrets-patch"
    );
    for channels in [json!({"kakaotalk": "text"}), json!({"kakaotalk": []}), json!({"unknown-channel": {}})] {
        assert_eq!(ask(&home, &patch("a", &json!({"channels": channels})))["ok"], false, "{channels}");
    }
    assert!(!home.folder("a").join("secrets.json").exists());
}

fn unreadable() {
    let home = Home::new();
    let _daemon = home.daemon();
    register(&home, "a");
    let path = home.folder("a").join("secrets.json");
    let change = patch("a", &json!({"mcp": {"server": "s", "credential": {}}}));
    for content in [
        "",
        "{",
        "[]",
        "{\"version\":1,\"channels\":{}}",
        "{\"version\":3}",
        "{\"version\":2,\"mcp\":[]}",
        "\u{feff}{}",
    ] {
        std::fs::write(&path, content).unwrap();
        let answer = ask(&home, &change);
        assert_eq!(answer["ok"], false, "{content:?}: {answer}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), content);
    }
    // A missing folder is not created.
    std::fs::remove_dir_all(home.folder("a")).unwrap();
    assert_eq!(ask(&home, &change)["ok"], false);
}

fn locks() {
    let home = Home::new();
    let _daemon = home.daemon();
    register(&home, "a");
    let folder = home.folder("a");
    let lock = folder.join("secrets.json.lock");
    let change = patch("a", &json!({"mcp": {"server": "s", "credential": {}}}));
    std::fs::create_dir(&lock).unwrap();
    let mut wire = landfall_tests::rpc::Wire::connect(&home);
    wire.send(format!("{change}\n"));
    assert!(wire.is_silent_for(NEGATIVE_WAIT), "the lock was not waited for");
    assert!(!folder.join("secrets.json").exists());
    // Another container has its own lock.
    register(&home, "b");
    assert_patched(&ask(&home, &patch("b", &json!({"mcp": {"server": "s", "credential": {}}}))), "b");
    std::fs::remove_dir(&lock).unwrap();
    assert_patched(&wire.answer(), "a");
    // Half a minute without an update of the lock file: its holder has ended.
    std::fs::create_dir(&lock).unwrap();
    let long_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(60);
    std::fs::File::open(&lock).unwrap().set_modified(long_ago).unwrap();
    assert_patched(&ask(&home, &change), "a");
    assert!(!lock.exists());
}
