use super::*;
use serde_json::json;

fn reference(patch: Value) -> Result<(String, Value), String> {
    read(&Keys::Reference, &patch).map(shown)
}

fn shown(replacement: Replacement) -> (String, Value) {
    let at = format!("{}.{}", replacement.slice, replacement.key);
    (at, serde_json::to_value(replacement.block).unwrap())
}

fn channel(key: &str, block: Value) -> Value {
    json!({"channels": {key: block}})
}

/// Returns a record of a block with all its fields.
fn whole_record(key: &str) -> Value {
    let password = json!({
        "v": 1, "alg": "AES-256-GCM", "kid": "k", "iv": "i", "ciphertext": "c", "authTag": "a", "createdAt": "n",
    });
    let mut record = match key {
        "kakaotalk" => json!({
            "oauth_token": "t", "user_id": "u", "refresh_token": "r", "device_uuid": "d", "device_type": "tablet",
            "auth_method": "extract", "email": "e", "encryptedPassword": password,
        }),
        "line" => json!({"auth_token": "t", "device": "IOSIPAD", "certificate": "c", "display_name": "n"}),
        "instagram" => json!({"username": "u", "full_name": "f", "profile_pic_url": "p", "pk": "k"}),
        "discord" => json!({"token": "t", "username": "u"}),
        "webex" => json!({
            "access_token": "t", "refresh_token": "r", "expires_at": 1.5e12, "device_url": "d", "user_id": "u",
            "client_id": "c", "client_secret": "s", "email": "e", "encryptedPassword": password,
        }),
        "teams" => json!({
            "access_token": "t", "account_type": "work", "token_expires_at": "x", "region": "apac", "user_name": "u",
            "aad_refresh_token": "r", "aad_client_id": "c", "aad_tenant_id": "t",
        }),
        "slack" => json!({"token": "t", "cookie": "c", "workspace_id": "w", "workspace_name": "n"}),
        _ => panic!("no such block: {key}"),
    };
    for field in ["account_id", "created_at", "updated_at"] {
        record[field] = json!("x");
    }
    record
}

const KEYS: [&str; 7] = ["line", "instagram", "discord", "webex", "teams", "slack", "kakaotalk"];

/// Returns the optional fields of a record.
fn optional_fields(key: &str) -> &'static [&'static str] {
    match key {
        "kakaotalk" => &["refresh_token", "auth_method", "email", "encryptedPassword"],
        "line" => &["certificate", "display_name"],
        "instagram" => &["full_name", "profile_pic_url", "pk"],
        "discord" => &["username"],
        "webex" => &["device_url", "user_id", "client_id", "client_secret", "email", "encryptedPassword"],
        "teams" => &[
            "token_expires_at",
            "region",
            "user_name",
            "aad_refresh_token",
            "aad_client_id",
            "aad_tenant_id",
        ],
        "slack" => &["workspace_name"],
        _ => panic!("no such block: {key}"),
    }
}

#[test]
fn a_complete_block_of_each_channel_is_unchanged() {
    for key in KEYS {
        let block =
            json!({"currentAccount": "x", "accounts": {"x": whole_record(key), "y": whole_record(key)}});
        let read = reference(channel(key, block.clone()));
        assert_eq!(read, Ok((format!("channels.{key}"), block)));
        let empty = json!({"currentAccount": null, "accounts": {}});
        assert_eq!(reference(channel(key, empty.clone())), Ok((format!("channels.{key}"), empty)));
    }
}

#[test]
fn each_required_field_is_required_and_each_field_has_its_type() {
    for key in KEYS {
        for field in whole_record(key).as_object().unwrap().keys() {
            let at = format!("channels.{key}.accounts.me.{field}");
            let with = |change: &dyn Fn(&mut Map<String, Value>)| {
                let mut record = whole_record(key);
                change(record.as_object_mut().unwrap());
                reference(channel(key, json!({"currentAccount": null, "accounts": {"me": record}})))
            };
            let missing = with(&|record| drop(record.remove(field)));
            if optional_fields(key).contains(&field.as_str()) {
                assert!(missing.is_ok(), "{at}");
            } else {
                assert_eq!(missing, Err(format!("{at}: required")));
            }
            for wrong in [json!(null), json!({}), json!(true), json!([])] {
                let error = with(&|record| drop(record.insert(field.clone(), wrong.clone()))).unwrap_err();
                assert!(error.starts_with(&format!("{at}: ")), "{error}");
            }
        }
    }
}

#[test]
fn unknown_fields_of_a_block_are_dropped() {
    let mut record = whole_record("discord");
    record["extra"] = json!("dropped");
    let block = json!({"currentAccount": null, "accounts": {"x": record}, "pendingLogin": {}, "more": 1});
    let (_, read) = reference(channel("discord", block)).unwrap();
    assert_eq!(read, json!({"currentAccount": null, "accounts": {"x": whole_record("discord")}}));
}

#[test]
fn one_block_may_have_a_pending_login() {
    let login = json!({"device_uuid": "d", "device_type": "pc", "email": "e", "created_at": "n"});
    let block = |login: Value| {
        channel("kakaotalk", json!({"currentAccount": null, "accounts": {}, "pendingLogin": login}))
    };
    let (_, read) = reference(block(login.clone())).unwrap();
    assert_eq!(read["pendingLogin"], login);
    let error = reference(block(json!({"device_uuid": "d", "device_type": "car"}))).unwrap_err();
    assert_eq!(
        error,
        "channels.kakaotalk.pendingLogin.device_type: expected one of pc, tablet; \
         channels.kakaotalk.pendingLogin.email: required; channels.kakaotalk.pendingLogin.created_at: required"
    );
}

#[test]
fn an_encrypted_password_has_exactly_its_fields() {
    for (change, complaint) in [
        (json!({"v": 2}), "v: expected 1"),
        (json!({"alg": "AES-128-GCM"}), "alg: expected AES-256-GCM"),
        (json!({"iv": 1}), "iv: expected a string"),
        (json!({"kid": null}), "kid: expected a string"),
        (json!({"more": "x"}), "it has fields that are not known"),
    ] {
        let mut record = whole_record("webex");
        let password = record["encryptedPassword"].as_object_mut().unwrap();
        password.extend(change.as_object().unwrap().clone());
        let block = json!({"currentAccount": null, "accounts": {"x": record}});
        let error = reference(channel("webex", block)).unwrap_err();
        assert_eq!(error, format!("channels.webex.accounts.x.encryptedPassword: {complaint}"));
    }
}

#[test]
fn all_errors_are_reported_without_values() {
    let block = json!({
        "currentAccount": 1,
        "accounts": {"a": "canary", "b": {"account_id": ["canary"], "token": "canary", "created_at": 1}},
    });
    let error = reference(channel("discord", block)).unwrap_err();
    assert_eq!(
        error,
        "channels.discord.currentAccount: expected a string or null; channels.discord.accounts.a: expected an object; \
         channels.discord.accounts.b.account_id: expected a string; \
         channels.discord.accounts.b.created_at: expected a string; \
         channels.discord.accounts.b.updated_at: required"
    );
    assert_eq!(
        reference(channel("line", json!("canary"))),
        Err("channels.line: expected an object".to_owned())
    );
    assert_eq!(reference(channel("line", json!(null))), Err("channels.line: expected an object".to_owned()));
}

#[test]
fn the_first_channel_in_order_is_used_and_mcp_takes_precedence() {
    let empty = json!({"currentAccount": null, "accounts": {}});
    let mut channels = Map::new();
    for key in KEYS.iter().rev() {
        channels.insert((*key).to_owned(), empty.clone());
        // The other channels are not validated.
        let mut others = channels.clone();
        others.insert("unheard-of".to_owned(), json!(1));
        let (at, _) = reference(json!({"channels": others})).unwrap();
        assert_eq!(at, format!("channels.{key}"));
    }
    let mcp = json!({"server": "s", "credential": {"tokens": [1], "client": null, "own": {"kept": true}}});
    let read = reference(json!({"channels": channels, "mcp": mcp.clone()}));
    assert_eq!(read, Ok(("mcp.s".to_owned(), mcp["credential"].clone())));
}

#[test]
fn a_patch_of_unknown_form_is_invalid() {
    for wrong in [
        json!(null),
        json!([]),
        json!("x"),
        json!({}),
        json!({"channels": null}),
        json!({"channels": []}),
        json!({"channels": {}}),
        json!({"channels": {"unheard-of": {}}}),
    ] {
        assert_eq!(reference(wrong.clone()), Err("invalid secrets-patch".to_owned()), "{wrong}");
    }
    for wrong in [json!(null), json!({}), json!({"server": ""}), json!({"server": 1, "credential": {}})] {
        assert_eq!(reference(json!({"mcp": wrong})), Err("mcp.server is required".to_owned()));
    }
    for wrong in [json!("text"), json!(null), json!([])] {
        let patch = json!({"mcp": {"server": "s", "credential": wrong}});
        assert_eq!(reference(patch), Err("mcp.credential: expected an object".to_owned()));
    }
}

#[test]
fn configured_names_accept_any_object() {
    let keys = Keys::Free(vec!["registry".to_owned(), "cloud".to_owned()]);
    let block = json!({"z": [1, {"deep": null}], "a": "b"});
    let patch = json!({"channels": {"cloud": block, "line": {}}});
    assert_eq!(read(&keys, &patch).map(shown), Ok(("channels.cloud".to_owned(), block)));
    for (patch, error) in [
        (channel("line", json!({"currentAccount": null, "accounts": {}})), "invalid secrets-patch"),
        (channel("cloud", json!("canary")), "channels.cloud: expected an object"),
    ] {
        assert_eq!(read(&keys, &patch).unwrap_err(), error);
    }
    assert_eq!(read(&Keys::Free(Vec::new()), &channel("x", json!({}))).unwrap_err(), "invalid secrets-patch");
}
