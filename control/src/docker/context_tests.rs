use std::collections::BTreeMap;
use std::os::unix::fs::{PermissionsExt as _, symlink};

use super::*;

const BYTES_MAX: u64 = 1 << 30;

fn open(path: &Path, from: &BuildFrom) -> Result<Context, String> {
    Context::open(path, from, BYTES_MAX)
}

/// Returns the content of a tar of the folder: the content or link target of each path.
fn packed(folder: &Path) -> BTreeMap<String, String> {
    let mut bytes = Vec::new();
    open(folder, &BuildFrom::default()).unwrap().write(&mut bytes).unwrap();
    let mut found = BTreeMap::new();
    for entry in tar::Archive::new(&bytes[..]).entries().unwrap() {
        let mut entry = entry.unwrap();
        let path = entry.path().unwrap().to_str().unwrap().to_owned();
        let mut content = String::new();
        entry.read_to_string(&mut content).unwrap();
        if let Some(target) = entry.link_name().unwrap() {
            content = format!("-> {}", target.display());
        }
        found.insert(path, content);
    }
    found
}

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join(DOCKERFILE), "FROM scratch\n").unwrap();
    folder
}

fn paths(folder: &Path) -> Vec<String> {
    packed(folder).into_keys().collect()
}

#[test]
fn links_are_sent_as_links_and_not_followed() {
    let folder = folder();
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("secret"), "secret").unwrap();
    symlink(outside.path(), folder.path().join("directory")).unwrap();
    symlink(outside.path().join("secret"), folder.path().join("file")).unwrap();
    let packed = packed(folder.path());
    assert_eq!(packed.len(), 3);
    assert_eq!(packed["file"], format!("-> {}", outside.path().join("secret").display()));
    assert!(!packed.values().any(|content| content == "secret"));
}

#[test]
fn ignored_files_are_not_sent_except_dockers_own_two() {
    let folder = folder();
    let path = folder.path();
    std::fs::create_dir_all(path.join("node_modules/keep")).unwrap();
    for name in ["a", "node_modules/b", "node_modules/keep/c", ".env"] {
        std::fs::write(path.join(name), "x").unwrap();
    }
    std::fs::write(path.join(DOCKERIGNORE), "Dockerfile\n.*\nnode_modules\n").unwrap();
    assert_eq!(paths(path), [".dockerignore", "Dockerfile", "a"]);
    std::fs::write(path.join(DOCKERIGNORE), "node_modules\n!node_modules/keep\n").unwrap();
    assert_eq!(
        paths(path),
        [".dockerignore", ".env", "Dockerfile", "a", "node_modules/keep", "node_modules/keep/c"]
    );
}

#[test]
fn pipes_and_sockets_are_skipped_and_long_names_and_modes_are_kept() {
    let folder = folder();
    let path = folder.path();
    rustix::fs::mknodat(rustix::fs::CWD, path.join("pipe"), FileType::Fifo, Mode::RUSR, 0).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(path.join("socket")).unwrap();
    let long = format!("{0}/{0}", "n".repeat(120));
    std::fs::create_dir(path.join("n".repeat(120))).unwrap();
    std::fs::write(path.join(&long), "x").unwrap();
    std::fs::set_permissions(path.join(&long), std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut bytes = Vec::new();
    open(path, &BuildFrom::default()).unwrap().write(&mut bytes).unwrap();
    let mut archive = tar::Archive::new(&bytes[..]);
    let entries: Vec<_> = archive.entries().unwrap().map(Result::unwrap).collect();
    assert_eq!(entries.len(), 3);
    let last = entries.last().unwrap();
    assert_eq!(last.path().unwrap().to_str().unwrap(), long);
    assert_eq!(last.header().mode().unwrap(), 0o755);
}

#[test]
fn a_folder_that_cannot_be_built_is_an_error_with_a_reason() {
    let folder = tempfile::tempdir().unwrap();
    let error = || open(folder.path(), &BuildFrom::default()).unwrap_err();
    assert!(error().starts_with("there is no Dockerfile in /"));
    symlink("/etc/hostname", folder.path().join(DOCKERFILE)).unwrap();
    assert_eq!(error(), "Dockerfile cannot be read: it is a symbolic link");
    assert!(
        open(Path::new("/nowhere/at/all"), &BuildFrom::default()).unwrap_err().contains("cannot be opened")
    );
}

#[test]
fn an_image_that_is_its_own_base_is_detected() {
    let folder = folder();
    let dockerfile = "ARG X\nfrom --platform=linux/amd64 node:20 AS build\nFROM app:latest\nCOPY FROM /\n";
    std::fs::write(folder.path().join(DOCKERFILE), dockerfile).unwrap();
    let context = open(folder.path(), &BuildFrom::default()).unwrap();
    assert!(context.starts_from("node:20") && context.starts_from("app"));
    assert!(!context.starts_from("node") && !context.starts_from("/"));
}

#[test]
fn a_dockerfile_must_be_below_the_folder() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    std::fs::create_dir_all(path.join("app/.devcontainer")).unwrap();
    std::fs::write(path.join("app/.devcontainer/Dockerfile"), "FROM scratch\n").unwrap();
    std::fs::write(path.join("app/.devcontainer/other"), "x").unwrap();
    std::fs::write(path.join("app/.dockerignore"), ".devcontainer\n").unwrap();
    let from = |context: &str, dockerfile: &str| BuildFrom {
        context: PathBuf::from(context),
        dockerfile: PathBuf::from(dockerfile),
    };
    let context = open(path, &from("app", ".devcontainer/Dockerfile")).unwrap();
    let mut bytes = Vec::new();
    context.write(&mut bytes).unwrap();
    let mut tar = tar::Archive::new(&bytes[..]);
    let names = tar.entries().unwrap().map(|entry| entry.unwrap().path().unwrap().display().to_string());
    assert_eq!(names.collect::<Vec<_>>(), [".devcontainer/Dockerfile", ".dockerignore"]);
    symlink("app", path.join("link")).unwrap();
    symlink(".devcontainer/Dockerfile", path.join("app/Dockerfile")).unwrap();
    for (context, dockerfile, why) in [
        ("..", "Dockerfile", "a path leads out of it"),
        ("/", "Dockerfile", "a path leads out of it"),
        ("app", "../Dockerfile", "a path leads out of it"),
        ("link", ".devcontainer/Dockerfile", "cannot be opened"),
        ("app", "Dockerfile", "it is a symbolic link"),
        ("app", "none", "there is no none in"),
    ] {
        let error = open(path, &from(context, dockerfile)).unwrap_err();
        assert!(error.contains(why), "{error}");
    }
}

/// Returns the result of measuring and packing a folder within this limit. Both must agree.
#[track_caller]
fn bounded(path: &Path, bytes_max: u64) -> Result<usize, String> {
    let context = Context::open(path, &BuildFrom::default(), bytes_max).unwrap();
    let measured = context.measure().map_err(|error| error.to_string());
    let mut bytes = Vec::new();
    let written = context.write(&mut bytes).map_err(|error| error.to_string());
    assert_eq!(measured, written);
    assert!(bytes.len() as u64 <= bytes_max + 4 * BLOCK_BYTES, "{} bytes were written", bytes.len());
    written.map(|()| bytes.len())
}

#[test]
fn c23_a_sparse_file_counts_by_its_size_and_is_not_sent() {
    let folder = folder();
    let sparse = File::create(folder.path().join("sparse")).unwrap();
    for bytes in [BYTES_MAX, 1 << 40, i64::MAX as u64 / 2] {
        // The file system may have a smaller maximum size.
        if sparse.set_len(bytes).is_ok() {
            let expected = format!("{TOO_LARGE} 1.0 GiB: sparse has {}", ByteSize(bytes));
            assert_eq!(bounded(folder.path(), BYTES_MAX), Err(expected));
        }
    }
    std::fs::write(folder.path().join(DOCKERIGNORE), "sparse\n").unwrap();
    assert!(bounded(folder.path(), BYTES_MAX).is_ok(), "an ignored file does not count");
}

#[test]
fn headers_and_padding_count_and_the_exact_limit_is_accepted() {
    let folder = folder();
    for name in ["a", "b"] {
        std::fs::write(folder.path().join(name), "x").unwrap();
    }
    // Three files, each with a header of one block and a content of one block.
    let fits = 6 * BLOCK_BYTES;
    assert!(bounded(folder.path(), fits).is_ok());
    let expected = format!("{TOO_LARGE} {}: b has 1 B", ByteSize(fits - 1));
    assert_eq!(bounded(folder.path(), fits - 1), Err(expected));
}

#[test]
fn c23_a_folder_that_is_too_deep_is_refused_without_a_stack_overflow() {
    let folder = folder();
    let mut directory: OwnedFd = File::open(folder.path()).unwrap().into();
    for _ in 0..3_000 {
        rustix::fs::mkdirat(&directory, "d", Mode::RWXU).unwrap();
        directory = rustix::fs::openat(&directory, "d", OFlags::RDONLY, Mode::empty()).unwrap();
    }
    let error = bounded(folder.path(), BYTES_MAX).unwrap_err();
    assert!(error.contains("more than 256 nested directories: d/d/"), "{error}");
    remove_deep(folder.path());
}

/// Removes a chain of directories whose path exceeds the kernel's limit.
fn remove_deep(path: &Path) {
    let status = std::process::Command::new("rm").arg("-rf").arg(path.join("d")).status().unwrap();
    assert!(status.success());
}
