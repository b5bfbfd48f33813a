use super::*;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};
use tempfile::TempDir;

struct Folder(TempDir);

impl Folder {
    fn new() -> Folder {
        Folder(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn put(&self, text: &str) {
        std::fs::write(self.path("secrets.json"), text).unwrap();
    }

    fn text(&self) -> String {
        std::fs::read_to_string(self.path("secrets.json")).unwrap()
    }

    fn listing(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.0.path()).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn replace(&self, slice: &'static str, key: &str, block: Value) -> Result<Attempt, String> {
        let replacement = Replacement { slice, key: key.to_owned(), block: Tree::from(&block) };
        attempt(self.0.path(), "secrets.json", &replacement, &Holder::default())
    }

    /// Creates the lock as another program that last updated it `age` ago.
    fn lock(&self, age: Duration) {
        std::fs::create_dir(self.path("secrets.json.lock")).unwrap();
        let touched = SystemTime::now() - age;
        let lock = File::open(self.path("secrets.json.lock")).unwrap();
        lock.set_modified(touched).unwrap();
    }
}

#[test]
fn a_missing_file_is_created_private_to_its_owner() {
    let folder = Folder::new();
    assert_eq!(folder.replace("channels", "line", json!({"accounts": {}})), Ok(Attempt::Done));
    assert_eq!(
        folder.text(),
        "{\n  \"version\": 2,\n  \"providers\": {},\n  \"channels\": {\n    \"line\": {\n      \"accounts\": {}\n    }\n  },\n  \"mcp\": {}\n}\n"
    );
    assert_eq!(folder.listing(), ["secrets.json"]);
    let made = std::fs::metadata(folder.path("secrets.json")).unwrap();
    assert_eq!(made.permissions().mode() & 0o7777, 0o600);
    assert_eq!(made.uid(), std::fs::metadata(folder.0.path()).unwrap().uid());
}

#[test]
fn other_members_keep_their_order() {
    let folder = Folder::new();
    let text = |line: &str, mcp: &str| {
        format!(
            "{{\n  \"$schema\": \"./s.json\",\n  \"version\": 2,\n  \"own\": [\n    1,\n    null\n  ],\n  \"channels\": {{\n    \
             \"slack\": {{\n      \"z\": 1,\n      \"a\": 2\n    }},\n    \"line\": {line},\n    \"discord\": {{}}\n  }},\n  \
             \"mcp\": {{\n    \"b\": {{}},\n    \"a\": {mcp}\n  }},\n  \"providers\": {{}}\n}}\n"
        )
    };
    folder.put(&text("{}", "{}"));
    std::fs::set_permissions(folder.path("secrets.json"), std::fs::Permissions::from_mode(0o644)).unwrap();
    folder.replace("channels", "line", json!({"new": true})).unwrap();
    assert_eq!(folder.text(), text("{\n      \"new\": true\n    }", "{}"));
    folder.replace("mcp", "a", json!({"t": "x"})).unwrap();
    assert_eq!(folder.text(), text("{\n      \"new\": true\n    }", "{\n      \"t\": \"x\"\n    }"));
    let mode = std::fs::metadata(folder.path("secrets.json")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    folder.put("{\"version\": 2.0}");
    folder.replace("mcp", "s", json!({})).unwrap();
    let slices: Value = serde_json::from_str(&folder.text()).unwrap();
    assert_eq!(slices, json!({"version": 2.0, "providers": {}, "channels": {}, "mcp": {"s": {}}}));
}

#[test]
fn a_file_of_another_format_is_an_error_and_unchanged() {
    let folder = Folder::new();
    for (text, error) in [
        ("", "secrets.json: not JSON: EOF while parsing a value at line 1 column 0"),
        ("{\"version\": 2", "secrets.json: not JSON: EOF while parsing an object at line 1 column 13"),
        ("[]", "secrets.json: not a secrets file of version 2; it is left as it is"),
        ("{}", "secrets.json: not a secrets file of version 2; it is left as it is"),
        ("{\"version\": 1}", "secrets.json: not a secrets file of version 2; it is left as it is"),
        ("{\"version\": \"2\"}", "secrets.json: not a secrets file of version 2; it is left as it is"),
        ("{\"version\": 3, \"x\": 1}", "secrets.json: not a secrets file of version 2; it is left as it is"),
        (
            "{\"version\": 2, \"channels\": []}",
            "secrets.json: channels is not an object; the file is left as it is",
        ),
        ("{\"version\": 2, \"mcp\": 1}", "secrets.json: mcp is not an object; the file is left as it is"),
    ] {
        folder.put(text);
        assert_eq!(folder.replace("mcp", "s", json!({})), Err(error.to_owned()));
        assert_eq!(folder.text(), text);
        assert_eq!(folder.listing(), ["secrets.json"]);
    }
}

fn make_pipe(path: &Path) {
    let mode = Mode::RUSR | Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, path, FileType::Fifo, mode, 0).unwrap();
}

#[test]
fn an_entry_that_is_not_a_file_of_valid_size_is_refused() {
    let outside = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(outside.path(), "{\"version\": 2}").unwrap();
    for (what, text) in [
        ("link", "not an ordinary file"),
        ("loose link", "not an ordinary file"),
        ("directory", "not an ordinary file"),
        ("pipe", "not an ordinary file"),
        ("sparse", "larger than 4194304 bytes"),
    ] {
        let folder = Folder::new();
        let path = folder.path("secrets.json");
        match what {
            "link" => symlink(outside.path(), &path).unwrap(),
            "loose link" => symlink("nowhere", &path).unwrap(),
            "directory" => std::fs::create_dir(&path).unwrap(),
            "pipe" => make_pipe(&path),
            _ => File::create(&path).unwrap().set_len(1 << 32).unwrap(),
        }
        let before = std::fs::symlink_metadata(&path).unwrap().ino();
        assert_eq!(folder.replace("mcp", "s", json!({})), Err(format!("secrets.json is {text}")), "{what}");
        assert_eq!(std::fs::symlink_metadata(&path).unwrap().ino(), before);
        assert_eq!(folder.listing(), ["secrets.json"]);
    }
    assert_eq!(std::fs::read_to_string(outside.path()).unwrap(), "{\"version\": 2}");
}

#[test]
fn a_lock_that_is_not_a_directory_counts_as_held() {
    let outside = tempfile::tempdir().unwrap();
    for link in [true, false] {
        let folder = Folder::new();
        let lock = folder.path("secrets.json.lock");
        if link {
            symlink(outside.path(), &lock).unwrap()
        } else {
            make_pipe(&lock)
        }
        assert_eq!(folder.replace("mcp", "s", json!({})), Ok(Attempt::Locked));
        assert_eq!(folder.listing(), ["secrets.json.lock"]);
    }
}

#[test]
fn an_existing_temporary_file_is_not_overwritten() {
    let (folder, outside) = (Folder::new(), tempfile::NamedTempFile::new().unwrap());
    let take = |number: u32| {
        let name = format!("secrets.json.{}.{number}.tmp", std::process::id());
        symlink(outside.path(), folder.path(&name)).unwrap();
    };
    (0..TEMPORARY_MAX - 1).for_each(take);
    assert_eq!(folder.replace("mcp", "s", json!({})), Ok(Attempt::Done));
    take(TEMPORARY_MAX - 1);
    let error = folder.replace("mcp", "t", json!({})).unwrap_err();
    assert_eq!(error, "secrets.json cannot be written: File exists (os error 17)");
    assert_eq!(outside.path().metadata().unwrap().len(), 0);
    assert!(!folder.path("secrets.json.lock").exists());
}

#[test]
fn a_name_outside_of_the_folder_is_refused() {
    let folder = Folder::new();
    let block = Replacement { slice: "mcp", key: "s".to_owned(), block: Tree::empty() };
    for name in ["", ".", "..", "../secrets.json", "/etc/passwd", "a/b", "a\0b"] {
        let error = attempt(folder.0.path(), name, &block, &Holder::default()).unwrap_err();
        assert!(error.contains("is not the name of a file"), "{error}");
    }
    let gone = attempt(&folder.path("gone"), "secrets.json", &block, &Holder::default()).unwrap_err();
    assert!(gone.starts_with("the registered folder cannot be opened: No such file"), "{gone}");
    assert!(folder.listing().is_empty());
}

#[test]
fn a_lock_is_respected_until_it_is_stale() {
    let folder = Folder::new();
    folder.lock(Duration::from_secs(25));
    assert_eq!(folder.replace("mcp", "s", json!({})), Ok(Attempt::Locked));
    assert_eq!(folder.listing(), ["secrets.json.lock"]);
    std::fs::remove_dir(folder.path("secrets.json.lock")).unwrap();
    folder.lock(Duration::from_secs(31));
    assert_eq!(folder.replace("mcp", "s", json!({})), Ok(Attempt::Done));
    assert_eq!(folder.listing(), ["secrets.json"]);
    folder.lock(Duration::from_secs(3_600));
    std::fs::write(folder.path("secrets.json.lock/inside"), "").unwrap();
    assert_eq!(folder.replace("mcp", "s", json!({})), Ok(Attempt::Locked));
}

#[test]
fn a_held_lock_is_updated_and_its_loss_is_detected() {
    let folder = Folder::new();
    let open = File::open(folder.0.path()).unwrap();
    let open = OwnedFd::from(open);
    let lock = Lock::take(&open, "secrets.json.lock", Duration::from_secs(30)).unwrap().unwrap();
    let path = folder.path("secrets.json.lock");
    let old = SystemTime::now() - Duration::from_secs(20);
    lock.with_refresh(Duration::from_millis(1), || {
        File::open(&path).unwrap().set_modified(old).unwrap();
        let deadline = SystemTime::now() + Duration::from_secs(20);
        while std::fs::metadata(&path).unwrap().modified().unwrap() == old {
            assert!(SystemTime::now() < deadline, "the lock is not updated");
            std::thread::yield_now();
        }
    });
    assert!(lock.is_ours());
    // The lock of another holder has the same name, and remains.
    std::fs::create_dir(folder.path("other")).unwrap();
    std::fs::remove_dir(&path).unwrap();
    assert!(!lock.is_ours());
    std::fs::rename(folder.path("other"), &path).unwrap();
    assert!(!lock.is_ours());
    let (owner, text) = (rustix::fs::fstat(&open).unwrap(), "{}");
    let error = write(&open, "secrets.json", text, &owner, &lock).unwrap_err();
    assert_eq!(error, "the lock was taken away");
    lock.release();
    assert_eq!(folder.listing(), ["secrets.json.lock"]);
}

#[test]
fn concurrent_writers_lose_no_replacement() {
    let folder = Folder::new();
    let reading = AtomicBool::new(true);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            while reading.load(Ordering::Relaxed) {
                if let Ok(text) = std::fs::read_to_string(folder.path("secrets.json")) {
                    assert!(parse(text.as_bytes()).is_ok(), "half a file: {text}");
                }
            }
        });
        let writers: Vec<_> = (0..4)
            .map(|writer| {
                let folder = &folder;
                scope.spawn(move || {
                    for number in 0..10 {
                        let key = format!("{writer}-{number}");
                        while folder.replace("channels", &key, json!({})) == Ok(Attempt::Locked) {
                            std::thread::yield_now();
                        }
                    }
                })
            })
            .collect();
        for writer in writers {
            writer.join().unwrap();
        }
        reading.store(false, Ordering::Relaxed);
        reader.join().unwrap();
    });
    let Some(Tree::Object(channels)) = parse(folder.text().as_bytes()).unwrap().find("channels").cloned()
    else {
        panic!("no channels")
    };
    assert_eq!(channels.len(), 40);
}
