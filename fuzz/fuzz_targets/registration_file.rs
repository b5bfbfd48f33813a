//! The content of a registration's file: any content is parsed or rejected; a parsed registration survives a round trip,
//! including its tokens and unknown fields.

#![no_main]

use landfall::model::registration::Registration;
use landfall::registry::file;
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

fn parse(stem: &str, content: &[u8]) -> Result<Registration, file::InvalidFile> {
    file::parse(stem, content)
}

fuzz_target!(|content: &[u8]| {
    // The name in the content is the file's name, so that most valid JSON passes that check.
    let named: Option<Value> = serde_json::from_slice(content).ok();
    let stem = named.as_ref().and_then(|value| value["containerName"].as_str()).unwrap_or("a");
    let Ok(registration) = parse(stem, content) else { return };
    assert_eq!(registration.container_name.as_str(), stem);
    assert!(registration.cwd.is_absolute());
    assert!(
        stem.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte))
            && !stem.starts_with('.')
    );
    let written = serde_json::to_vec(&registration).expect("a parsed registration serialises");
    assert!(!written.contains(&b'\n'), "a registration is one line");
    let again = parse(stem, &written).expect("a written registration parses");
    assert_eq!(again, registration);
    assert_eq!(serde_json::to_vec(&again).expect("as before"), written);
    assert!(parse("another", content).is_err() || stem == "another");
    // A truncated file is invalid, and never parsed as another registration.
    for end in [written.len() / 2, written.len() - 1] {
        assert!(parse(stem, &written[..end]).is_err());
    }
    // Its `Debug` output contains no token.
    let shown = format!("{registration:?}");
    for token in [&registration.restart_token, &registration.broker_token].into_iter().flatten() {
        let secret = token.reveal();
        let elsewhere = named.as_ref().is_some_and(|value| count(value, secret) > 1);
        assert!(secret.len() < 8 || elsewhere || !shown.contains(secret), "{shown}");
    }
});

/// Counts the strings of a value, including keys, that contain `text`.
fn count(value: &Value, text: &str) -> usize {
    match value {
        Value::String(string) => usize::from(string.contains(text)),
        Value::Array(values) => values.iter().map(|value| count(value, text)).sum(),
        Value::Object(fields) => {
            fields.iter().map(|(key, value)| usize::from(key.contains(text)) + count(value, text)).sum()
        }
        _ => 0,
    }
}
