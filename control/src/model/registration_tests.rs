use super::*;
use serde_json::json;

fn read(value: Value) -> Result<Registration, RegistrationError> {
    let Value::Object(fields) = value else { panic!("an object is needed") };
    Registration::from_fields(fields)
}

#[test]
fn six_fields_round_trip() {
    let whole = json!({
        "containerName": "coder", "cwd": "/agents/coder", "restartToken": "r", "wsHostPort": 49152,
        "portForward": {"allow": "*", "deny": [9229]}, "brokerToken": "b",
    });
    assert_eq!(serde_json::to_value(read(whole.clone()).unwrap()).unwrap(), whole);
    let bare = json!({"containerName": "coder", "cwd": "/agents/coder"});
    assert_eq!(serde_json::to_value(read(bare.clone()).unwrap()).unwrap(), bare);
}

#[test]
fn unknown_fields_are_kept() {
    let newer = json!({"containerName": "a", "cwd": "/a", "colour": {"deep": [1, null]}});
    assert_eq!(serde_json::to_value(read(newer.clone()).unwrap()).unwrap(), newer);
}

/// Without `float_roundtrip`, the parser changes 4.5e300 each time it reads it.
#[test]
fn unknown_number_is_kept_unchanged() {
    let newer = r#"{"containerName":"a","cwd":"/a","colour":[4.5e+300,0.1]}"#;
    let kept = read(serde_json::from_str(newer).unwrap()).unwrap();
    assert_eq!(serde_json::to_string(&kept).unwrap(), newer);
}

#[test]
fn error_names_the_first_invalid_field() {
    for (fields, error) in [
        (json!({"cwd": "/a"}), "invalid register: containerName"),
        (json!({"containerName": 1, "cwd": "/a"}), "invalid register: containerName"),
        (json!({"containerName": "a"}), "invalid register: cwd"),
        (json!({"containerName": "a", "cwd": "a"}), "invalid register: cwd"),
        (json!({"containerName": "a", "cwd": "/a", "restartToken": 1}), "invalid register: restartToken"),
        (json!({"containerName": "a", "cwd": "/a", "wsHostPort": 0}), "invalid register: wsHostPort"),
        (json!({"containerName": "a", "cwd": "/a", "wsHostPort": 65536}), "invalid register: wsHostPort"),
        (json!({"containerName": "a", "cwd": "/a", "wsHostPort": "1"}), "invalid register: wsHostPort"),
        (
            json!({"containerName": "../x", "cwd": "/a"}),
            "failed to persist registration: invalid container name for registration file: \"../x\"",
        ),
    ] {
        assert_eq!(read(fields).unwrap_err().to_string(), error);
    }
    let policy = json!({"containerName": "a", "cwd": "/a", "portForward": {"allow": [1], "deny": [2]}});
    assert!(
        read(policy).unwrap_err().to_string().contains("portForward.deny is only meaningful when allow is")
    );
}

#[test]
fn names_that_lead_out_of_the_directory_are_invalid() {
    for good in ["coder", "agent-1", "A_B.c", "0"] {
        assert!(ContainerName::new(good).is_ok(), "{good}");
    }
    for bad in ["../etc/passwd", "a/b", "with space", "", ".hidden", "-x", "é", "a\n"] {
        assert!(ContainerName::new(bad).unwrap_err().to_string().contains("invalid container name"), "{bad}");
    }
}

#[test]
fn token_matches_itself_alone_and_is_not_printed() {
    let token = Token::new("secret").unwrap();
    assert!(token.matches("secret"));
    assert!(!token.matches("secre") && !token.matches("secret2") && !token.matches(""));
    assert_eq!(format!("{token:?}"), "***");
    assert_eq!(Token::new(""), None);
}

#[test]
fn attach_method_round_trips() {
    let attach_method = json!({"kind": "process", "pid": 42, "started": {"boot": "b", "ticks": 7}});
    let fields = json!({"containerName": "a", "cwd": "/a", "way": attach_method});
    let registration = read(fields.clone()).unwrap();
    assert!(matches!(registration.attach_method, Some(AttachMethod::Process { .. })));
    assert_eq!(serde_json::to_value(registration).unwrap(), fields);
    let relative = json!({"containerName": "a", "cwd": "/a", "way": {"kind": "netns", "path": "x"}});
    assert!(read(relative).unwrap_err().to_string().contains("path must be absolute"));
}
