use super::*;
use std::os::unix::fs::{PermissionsExt, symlink};

use tempfile::TempDir;

struct Fixture {
    directory: TempDir,
    file: TrustFile,
}

const CONTENT: &[u8] = b"[jobs.a]";

impl Fixture {
    fn new() -> Fixture {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::at(directory.path().join("home")).unwrap();
        home.ensure_directories().unwrap();
        std::fs::create_dir(directory.path().join("folder")).unwrap();
        Fixture { directory, file: TrustFile::of(&home) }
    }

    fn folder(&self) -> PathBuf {
        self.directory.path().join("folder").canonicalize().unwrap()
    }

    fn approve(&self) -> Option<(TrustFileError, PathBuf)> {
        let folder = self.folder().to_str().unwrap().to_owned();
        let digest = ContentDigest::of(CONTENT);
        let change = |trust: &mut Trust| trust.approve(&folder, FolderFile::Settings, digest, "t".to_owned());
        self.file.update(change).unwrap().set_aside
    }

    fn check(&self) -> Result<(), NotTrusted> {
        self.file.check(&self.folder(), FolderFile::Settings, &ContentDigest::of(CONTENT))
    }

    fn mode(&self, mode: u32) {
        std::fs::set_permissions(self.file.path(), PermissionsExt::from_mode(mode)).unwrap();
    }
}

#[test]
fn an_approved_content_is_trusted_until_it_is_revoked() {
    let fixture = Fixture::new();
    assert_eq!(fixture.check(), Err(NotTrusted::NotApproved));
    assert_eq!(fixture.approve(), None);
    assert_eq!(fixture.check(), Ok(()));
    let folder = fixture.folder().to_str().unwrap().to_owned();
    assert!(fixture.file.update(|trust| trust.revoke(&folder)).unwrap().value);
    assert_eq!(fixture.check(), Err(NotTrusted::NotApproved));
}

#[test]
fn the_file_is_private_to_its_owner_and_no_temporary_file_remains() {
    let fixture = Fixture::new();
    // The temporary file of a process that was killed.
    std::fs::write(fixture.file.path().with_extension("json.tmp"), "{").unwrap();
    fixture.approve();
    let mode = std::fs::metadata(fixture.file.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    assert!(!fixture.file.path().with_extension("json.tmp").exists());
}

#[test]
fn a_corrupt_file_approves_nothing_and_is_set_aside_by_the_next_update() {
    let fixture = Fixture::new();
    for (number, content) in (1..).zip(["", "{", "[]", "{}", "\u{0}\u{0}"]) {
        std::fs::write(fixture.file.path(), content).unwrap();
        let error = fixture.check().unwrap_err();
        assert!(matches!(error, NotTrusted::File(TrustFileError::Format { .. })), "{content}: {error}");
        // A reader does not change the file.
        assert_eq!(std::fs::read_to_string(fixture.file.path()).unwrap(), content);
        let (_, aside) = fixture.approve().unwrap();
        assert!(aside.ends_with(format!("trust.json.bad-{number}")), "{}", aside.display());
        assert_eq!(std::fs::read_to_string(aside).unwrap(), content);
        assert_eq!(fixture.check(), Ok(()));
    }
}

#[test]
fn a_file_that_others_can_write_approves_nothing() {
    let fixture = Fixture::new();
    fixture.approve();
    for mode in [0o620, 0o602, 0o666] {
        fixture.mode(mode);
        assert!(matches!(fixture.check(), Err(NotTrusted::File(TrustFileError::Writable(_)))), "{mode:o}");
    }
    fixture.mode(0o644);
    assert_eq!(fixture.check(), Ok(()));
    fixture.mode(0o666);
    assert!(fixture.approve().is_some());
    assert_eq!(fixture.check(), Ok(()));
}

#[test]
fn a_file_of_another_user_approves_nothing() {
    if !geteuid().is_root() {
        return;
    }
    let fixture = Fixture::new();
    fixture.approve();
    std::os::unix::fs::chown(fixture.file.path(), Some(12_345), None).unwrap();
    let error = fixture.check().unwrap_err();
    assert!(matches!(error, NotTrusted::File(TrustFileError::Owner { owner: 12_345, .. })), "{error}");
}

#[test]
fn a_link_a_pipe_and_a_directory_approve_nothing() {
    let fixture = Fixture::new();
    fixture.approve();
    let kept = fixture.directory.path().join("kept");
    std::fs::rename(fixture.file.path(), &kept).unwrap();
    symlink(&kept, fixture.file.path()).unwrap();
    let is_refused = || matches!(fixture.check(), Err(NotTrusted::File(TrustFileError::NotAFile(_))));
    assert!(is_refused());
    std::fs::remove_file(fixture.file.path()).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, fixture.file.path(), rustix::fs::FileType::Fifo, Mode::RUSR, 0)
        .unwrap();
    assert!(is_refused());
    std::fs::remove_file(fixture.file.path()).unwrap();
    std::fs::create_dir(fixture.file.path()).unwrap();
    assert!(is_refused());
}

#[test]
fn a_file_of_a_newer_release_approves_nothing_and_is_kept() {
    let fixture = Fixture::new();
    let content = r#"{"formatVersion":2}"#;
    std::fs::write(fixture.file.path(), content).unwrap();
    assert!(fixture.check().unwrap_err().to_string().contains("newer release"));
    assert!(fixture.file.update(|_| ()).is_err());
    assert_eq!(std::fs::read_to_string(fixture.file.path()).unwrap(), content);
}

#[test]
fn a_folder_that_contains_the_approvals_is_never_trusted() {
    let fixture = Fixture::new();
    let folder = fixture.directory.path().canonicalize().unwrap();
    let text = folder.to_str().unwrap().to_owned();
    let digest = ContentDigest::of(CONTENT);
    fixture.file.update(|trust| trust.approve(&text, FolderFile::Settings, digest, String::new())).unwrap();
    let error = fixture.file.check(&folder, FolderFile::Settings, &digest).unwrap_err();
    assert!(matches!(error, NotTrusted::HomeInside(_)), "{error}");
}

#[test]
fn concurrent_updates_are_all_kept() {
    let fixture = Fixture::new();
    std::thread::scope(|scope| {
        for number in 0..8 {
            let file = fixture.file.clone();
            scope.spawn(move || {
                for again in 0..8 {
                    let folder = format!("/{number}/{again}");
                    let digest = ContentDigest::of(folder.as_bytes());
                    let change = |trust: &mut Trust| {
                        trust.approve(&folder, FolderFile::Settings, digest, String::new());
                    };
                    file.update(change).unwrap();
                }
            });
        }
    });
    assert_eq!(fixture.file.read().unwrap().approvals().count(), 64);
}
