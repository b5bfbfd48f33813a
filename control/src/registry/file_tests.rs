use super::*;
use std::fs::File;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;

use rustix::fs::FileType;
use serde_json::json;
use tempfile::TempDir;

fn home() -> (TempDir, Home) {
    let folder = tempfile::tempdir().unwrap();
    let home = Home::at(folder.path().to_owned()).unwrap();
    home.ensure_directories().unwrap();
    (folder, home)
}

fn load_all(home: &Home) -> Result<Vec<Loaded<Registration>>, FileError> {
    super::load_all(home)
}

fn remove(home: &Home, name: &ContainerName) -> Result<Option<String>, FileError> {
    super::remove::<Registration>(home, name)
}

fn registration(fields: Value) -> Registration {
    let Value::Object(fields) = fields else { panic!("an object is needed") };
    Registration::from_fields(fields).unwrap()
}

fn bare(name: &str) -> Registration {
    registration(json!({"containerName": name, "cwd": format!("/agents/{name}")}))
}

fn path(home: &Home, name: &str) -> PathBuf {
    home.registrations().join(name)
}

fn listing(home: &Home) -> Vec<String> {
    let entries = std::fs::read_dir(home.registrations()).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Returns the name of each loaded file, with the reason if it is invalid.
fn loaded(home: &Home) -> Vec<(String, Result<(), String>)> {
    let all = load_all(home).unwrap().into_iter();
    all.map(|one| (one.stem, one.found.map(drop).map_err(|invalid| invalid.to_string()))).collect()
}

#[test]
fn a_registration_is_one_line_of_its_fields_and_private_to_its_owner() {
    let (_folder, home) = home();
    let whole = json!({
        "containerName": "coder", "cwd": "/agents/coder", "restartToken": "r", "wsHostPort": 49152,
        "portForward": {"allow": "*", "deny": [9229]}, "brokerToken": "b",
    });
    write(&home, &registration(whole.clone())).unwrap();
    let text = std::fs::read_to_string(path(&home, "coder.json")).unwrap();
    assert_eq!(text.lines().count(), 1);
    assert!(text.ends_with('\n'));
    assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), whole);
    let mode = std::fs::metadata(path(&home, "coder.json")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(listing(&home), ["coder.json"]);
}

#[test]
fn files_are_loaded_in_order_of_first_registration_and_removed_ones_are_not() {
    let (_folder, home) = home();
    for name in ["z", "a", "c"] {
        write(&home, &bare(name)).unwrap();
    }
    let newer = registration(json!({"containerName": "z", "cwd": "/new", "colour": {"deep": [1, null]}}));
    write(&home, &newer).unwrap();
    assert_eq!(remove(&home, &ContainerName::new("a").unwrap()).unwrap(), None);
    assert_eq!(remove(&home, &ContainerName::new("never").unwrap()).unwrap(), None);
    let found: Vec<_> = load_all(&home).unwrap().into_iter().map(|one| one.found.unwrap()).collect();
    assert_eq!(found, [newer, bare("c")]);
}

#[test]
fn only_temporary_files_of_an_earlier_daemon_are_removed() {
    let (_folder, home) = home();
    write(&home, &bare("a")).unwrap();
    for name in ["a.json.17.tmp", "a.json.bad-1", "b.json.x.tmp", ".json.tmp", "notes.txt", "a.json~"] {
        std::fs::write(path(&home, name), "half").unwrap();
    }
    assert_eq!(loaded(&home), [("a".to_owned(), Ok(()))]);
    assert_eq!(
        listing(&home),
        [".json.tmp", "a.json", "a.json.bad-1", "a.json~", "b.json.x.tmp", "notes.txt"]
    );
}

#[test]
fn an_existing_temporary_file_does_not_prevent_a_write() {
    let (_folder, home) = home();
    let victim = path(&home, "victim");
    symlink(&victim, path(&home, &format!("a.json.{}.tmp", std::process::id()))).unwrap();
    write(&home, &bare("a")).unwrap();
    assert!(!victim.exists(), "a link was followed");
    assert_eq!(listing(&home), ["a.json"]);
}

/// Creates each kind of invalid entry with a registration's name. Returns the names and their reasons.
fn create_invalid_entries(home: &Home) -> Vec<(&'static str, &'static str)> {
    let secret = home.root().join("elsewhere.json");
    std::fs::write(&secret, serde_json::to_vec(&bare("link")).unwrap()).unwrap();
    symlink(&secret, path(home, "link.json")).unwrap();
    symlink("nowhere", path(home, "loose.json")).unwrap();
    std::fs::create_dir(path(home, "folder.json")).unwrap();
    let fifo = path(home, "pipe.json");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    File::create(path(home, "huge.json")).unwrap().set_len(1 << 32).unwrap();
    for (name, text) in [
        ("torn.json", r#"{"containerName":"torn","cw"#),
        ("void.json", ""),
        ("list.json", "[]"),
        ("other.json", r#"{"containerName":"another","cwd":"/a"}"#),
        ("token.json", r#"{"containerName":"token","cwd":"/a","restartToken":1}"#),
        ("port.json", r#"{"containerName":"port","cwd":"/a","wsHostPort":"1"}"#),
        ("policy.json", r#"{"containerName":"policy","cwd":"/a","portForward":{"allow":[0]}}"#),
        ("newer.json", r#"{"containerName":"newer","cwd":"/a","formatVersion":2}"#),
    ] {
        std::fs::write(path(home, name), text).unwrap();
    }
    vec![
        ("folder", "not an ordinary file"),
        ("huge", "larger than 1048576 bytes"),
        ("link", "not an ordinary file"),
        ("list", "schema mismatch"),
        ("loose", "not an ordinary file"),
        ("newer", "schema mismatch"),
        ("other", "schema mismatch"),
        ("pipe", "not an ordinary file"),
        ("policy", "schema mismatch"),
        ("port", "schema mismatch"),
        ("token", "schema mismatch"),
        ("torn", "not JSON: EOF while parsing a string at line 1 column 27"),
        ("void", "not JSON: EOF while parsing a value at line 1 column 0"),
    ]
}

#[test]
fn invalid_entries_are_reported_and_kept_and_do_not_affect_others() {
    let (_folder, home) = home();
    let invalid = create_invalid_entries(&home);
    write(&home, &bare("good")).unwrap();
    let before = listing(&home);
    let mut found = loaded(&home);
    found.retain(|(stem, result)| stem != "good" || result.is_err());
    // They are sorted by modification time, which is the same for most.
    found.sort_by(|(one, _), (other, _)| one.cmp(other));
    let expected: Vec<_> =
        invalid.iter().map(|(stem, reason)| ((*stem).to_owned(), Err((*reason).to_owned()))).collect();
    assert_eq!(found, expected);
    assert_eq!(listing(&home), before);
}

#[test]
fn an_invalid_entry_is_set_aside_when_its_name_is_registered() {
    let (_folder, home) = home();
    for round in 1..=2 {
        let invalid = create_invalid_entries(&home);
        for (stem, _) in &invalid {
            let set_aside = write(&home, &bare(stem)).unwrap();
            assert_eq!(set_aside, Some(format!("{stem}.json.bad-{round}")));
            assert_eq!(write(&home, &bare(stem)).unwrap(), None);
        }
        assert!(loaded(&home).iter().all(|(_, found)| found.is_ok()));
        assert_eq!(loaded(&home).len(), invalid.len());
        for (stem, _) in &invalid {
            assert_eq!(remove(&home, &ContainerName::new(stem).unwrap()).unwrap(), None);
        }
    }
    assert_eq!(std::fs::read_to_string(path(&home, "list.json.bad-2")).unwrap(), "[]");
    let still = std::fs::symlink_metadata(path(&home, "pipe.json.bad-1")).unwrap();
    assert_eq!(FileType::from_raw_mode(std::os::unix::fs::MetadataExt::mode(&still)), FileType::Fifo);
}

#[test]
fn an_invalid_entry_is_set_aside_when_its_name_is_deregistered() {
    let (_folder, home) = home();
    std::fs::write(path(&home, "torn.json"), "{").unwrap();
    let set_aside = remove(&home, &ContainerName::new("torn").unwrap()).unwrap();
    assert_eq!(set_aside.as_deref(), Some("torn.json.bad-1"));
    assert_eq!(listing(&home), ["torn.json.bad-1"]);
}

#[test]
fn a_missing_directory_is_empty_and_cannot_be_written_to() {
    let folder = tempfile::tempdir().unwrap();
    let home = Home::at(folder.path().to_owned()).unwrap();
    assert!(load_all(&home).unwrap().is_empty());
    assert_eq!(remove(&home, &ContainerName::new("a").unwrap()).unwrap(), None);
    let error = write(&home, &bare("a")).unwrap_err().to_string();
    assert!(error.contains("No such file or directory") && error.contains("registrations"), "{error}");
}

#[test]
fn a_record_over_the_size_limit_is_not_written() {
    let (_folder, home) = home();
    write(&home, &bare("a")).unwrap();
    let large = json!({"containerName": "a", "cwd": "/a", "more": "x".repeat(1 << 20)});
    assert!(write(&home, &registration(large)).unwrap_err().to_string().contains("File too large"));
    assert_eq!(listing(&home), ["a.json"]);
    assert_eq!(load_all(&home).unwrap().remove(0).found.unwrap(), bare("a"));
}
