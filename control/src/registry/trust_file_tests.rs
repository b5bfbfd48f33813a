use super::*;
use std::os::unix::fs::{PermissionsExt, symlink};

use tempfile::TempDir;

struct Bench {
    directory: TempDir,
    file: TrustFile,
}

const CONTENT: &[u8] = b"[jobs.a]";

impl Bench {
    fn new() -> Bench {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::at(directory.path().join("home")).unwrap();
        home.ensure_directories().unwrap();
        std::fs::create_dir(directory.path().join("folder")).unwrap();
        Bench { directory, file: TrustFile::of(&home) }
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
fn what_was_approved_is_trusted_until_it_is_revoked() {
    let bench = Bench::new();
    assert_eq!(bench.check(), Err(NotTrusted::NotApproved));
    assert_eq!(bench.approve(), None);
    assert_eq!(bench.check(), Ok(()));
    let folder = bench.folder().to_str().unwrap().to_owned();
    assert!(bench.file.update(|trust| trust.revoke(&folder)).unwrap().value);
    assert_eq!(bench.check(), Err(NotTrusted::NotApproved));
}

#[test]
fn the_file_is_for_its_owner_alone_and_nothing_is_left_beside_it() {
    let bench = Bench::new();
    // Left by a process that was killed.
    std::fs::write(bench.file.path().with_extension("json.tmp"), "{").unwrap();
    bench.approve();
    let mode = std::fs::metadata(bench.file.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    assert!(!bench.file.path().with_extension("json.tmp").exists());
}

#[test]
fn a_corrupt_file_approves_nothing_and_is_set_aside_by_the_next_update() {
    let bench = Bench::new();
    for (number, content) in (1..).zip(["", "{", "[]", "{}", "\u{0}\u{0}"]) {
        std::fs::write(bench.file.path(), content).unwrap();
        let error = bench.check().unwrap_err();
        assert!(matches!(error, NotTrusted::File(TrustFileError::Format { .. })), "{content}: {error}");
        // A reader changes nothing.
        assert_eq!(std::fs::read_to_string(bench.file.path()).unwrap(), content);
        let (_, aside) = bench.approve().unwrap();
        assert!(aside.ends_with(format!("trust.json.bad-{number}")), "{}", aside.display());
        assert_eq!(std::fs::read_to_string(aside).unwrap(), content);
        assert_eq!(bench.check(), Ok(()));
    }
}

#[test]
fn a_file_that_others_could_have_written_approves_nothing() {
    let bench = Bench::new();
    bench.approve();
    for mode in [0o620, 0o602, 0o666] {
        bench.mode(mode);
        assert!(matches!(bench.check(), Err(NotTrusted::File(TrustFileError::Writable(_)))), "{mode:o}");
    }
    bench.mode(0o644);
    assert_eq!(bench.check(), Ok(()));
    bench.mode(0o666);
    assert!(bench.approve().is_some());
    assert_eq!(bench.check(), Ok(()));
}

#[test]
fn a_file_of_another_user_approves_nothing() {
    if !geteuid().is_root() {
        return;
    }
    let bench = Bench::new();
    bench.approve();
    std::os::unix::fs::chown(bench.file.path(), Some(12_345), None).unwrap();
    let error = bench.check().unwrap_err();
    assert!(matches!(error, NotTrusted::File(TrustFileError::Owner { owner: 12_345, .. })), "{error}");
}

#[test]
fn a_link_a_pipe_and_a_directory_approve_nothing() {
    let bench = Bench::new();
    bench.approve();
    let kept = bench.directory.path().join("kept");
    std::fs::rename(bench.file.path(), &kept).unwrap();
    symlink(&kept, bench.file.path()).unwrap();
    let is_refused = || matches!(bench.check(), Err(NotTrusted::File(TrustFileError::NotAFile(_))));
    assert!(is_refused());
    std::fs::remove_file(bench.file.path()).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, bench.file.path(), rustix::fs::FileType::Fifo, Mode::RUSR, 0)
        .unwrap();
    assert!(is_refused());
    std::fs::remove_file(bench.file.path()).unwrap();
    std::fs::create_dir(bench.file.path()).unwrap();
    assert!(is_refused());
}

#[test]
fn a_file_of_a_newer_release_approves_nothing_and_is_left_alone() {
    let bench = Bench::new();
    let content = r#"{"formatVersion":2}"#;
    std::fs::write(bench.file.path(), content).unwrap();
    assert!(bench.check().unwrap_err().to_string().contains("newer release"));
    assert!(bench.file.update(|_| ()).is_err());
    assert_eq!(std::fs::read_to_string(bench.file.path()).unwrap(), content);
}

#[test]
fn a_folder_that_holds_the_approvals_is_never_trusted() {
    let bench = Bench::new();
    let folder = bench.directory.path().canonicalize().unwrap();
    let text = folder.to_str().unwrap().to_owned();
    let digest = ContentDigest::of(CONTENT);
    bench.file.update(|trust| trust.approve(&text, FolderFile::Settings, digest, String::new())).unwrap();
    let error = bench.file.check(&folder, FolderFile::Settings, &digest).unwrap_err();
    assert!(matches!(error, NotTrusted::HomeInside(_)), "{error}");
}

#[test]
fn updates_at_the_same_time_lose_nothing() {
    let bench = Bench::new();
    std::thread::scope(|scope| {
        for number in 0..8 {
            let file = bench.file.clone();
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
    assert_eq!(bench.file.read().unwrap().approvals().count(), 64);
}
