//! Registrations and grants outlive a daemon that is killed at any system call.
//!
//! The registry runs in a process of its own, under strace, which kills it with SIGKILL at the entry of the N-th call
//! of a kind: before each step of each write, one run for every step, until a run ends before the N-th call. The
//! process prints each change that it has acknowledged. After its death the files must hold exactly those changes, or
//! those and the one in progress: old or new, never half of it. A kill does not show the effects of a power loss, so
//! another run is only traced: it must synchronise the file before the rename and the directory after it.
#![expect(clippy::unwrap_used, reason = "tests may stop at the first surprise")]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use landfall::docker::liveness::{Liveness, Probe};
use landfall::model::grants::{Grants, Right};
use landfall::model::registration::{ContainerName, Registration};
use landfall::registry::file;
use landfall::registry::folder::Approvals;
use landfall::registry::grants::GrantTable;
use landfall::registry::store::{Registry, RegistryOptions};
use landfall::sys::journal::Journal;
use landfall::sys::paths::Home;
use serde_json::json;

/// The directory of the killed process's files.
const HOME: &str = "LANDFALL_HOME";
/// Every call that can change or read the state on disk, and whether only calls on the directories of registrations and
/// of grants count: the start of a process opens many files. The entry of `fsync` is the end of a `write`.
const CALLS: [(&str, bool); 9] = [
    ("openat", true),
    ("fchmod", false),
    ("fsync", false),
    ("renameat", true),
    ("renameat2", true),
    ("unlinkat", true),
    ("newfstatat", true),
    ("statx", true),
    ("getdents64", true),
];
/// The most calls of one kind in a run; the test fails beyond it.
const NTH_MAX: u32 = 200;
/// A file under a registration's name that is not a registration.
const TORN: &str = "{\"containerName\":\"torn\",\"cw";

/// A change that is requested from the registry.
#[derive(Clone, Copy)]
enum Change {
    Register(&'static str),
    Grant,
    Revoke,
    /// By the host's user: the grants are removed as well.
    Deregister,
}
use Change::{Deregister, Grant, Register, Revoke};

/// The changes, in this order, each for one name.
const CHANGES: [(&str, Change); 9] = [
    ("a", Register("/one")),
    ("torn", Register("/two")),
    ("a", Grant),
    ("a", Register("/three")),
    ("b", Register("/four")),
    ("b", Grant),
    ("a", Deregister),
    ("b", Register("/five")),
    ("b", Revoke),
];

type Folders = BTreeMap<String, PathBuf>;

/// Returns the registrations after this number of changes, and the grants, which keep the folder of the time of the
/// grant.
fn after(changes: usize) -> [Folders; 2] {
    let (mut folders, mut grants) = (Folders::new(), Folders::new());
    for (name, change) in &CHANGES[..changes] {
        match change {
            Register(folder) => drop(folders.insert((*name).to_owned(), PathBuf::from(folder))),
            Grant => drop(grants.insert((*name).to_owned(), folders[*name].clone())),
            Revoke => drop(grants.remove(*name)),
            Deregister => drop((folders.remove(*name), grants.remove(*name))),
        }
    }
    [folders, grants]
}

struct Everything;

impl Probe for Everything {
    fn probe<'a>(&'a self, _registration: &'a Registration) -> BoxFuture<'a, Liveness> {
        Box::pin(async { Liveness::Alive })
    }
}

fn options(home: Home) -> RegistryOptions {
    RegistryOptions {
        approvals: Approvals::of(&home),
        home,
        grants: GrantTable::default(),
        journal: Journal::unkept(),
        liveness: Arc::new(Everything),
        observers: Vec::new(),
        cleanup_timeout: Duration::from_secs(60),
        gc_interval: Duration::from_secs(3_600),
        gc_misses: 3,
    }
}

/// Not a test: the process that is killed. It prints the changes that were acknowledged.
#[test]
#[ignore = "run by the test below, in a process of its own"]
fn killed_registry() {
    let Some(home) = std::env::var_os(HOME) else { return };
    // One thread for files: strace counts the calls of each thread separately.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(1).build();
    let runtime = runtime.unwrap();
    runtime.block_on(async {
        let registry = Registry::open(options(Home::at(PathBuf::from(home)).unwrap()));
        for (number, (name, change)) in (1..).zip(CHANGES) {
            match change {
                Register(folder) => {
                    let fields = json!({"containerName": name, "cwd": folder, "restartToken": "t"});
                    let fields = fields.as_object().unwrap().clone();
                    registry.register(Registration::from_fields(fields).unwrap()).await.unwrap();
                }
                Grant => registry.grant(name, vec![Right::Rebuild]).await.unwrap(),
                Revoke => {
                    let name = ContainerName::new(name).unwrap();
                    registry.revoke(name, vec![Right::Rebuild.to_string()]).await.unwrap();
                }
                Deregister => registry.deregister_with_grants(name).await,
            }
            println!("\nacknowledged {number}");
        }
    });
}

fn home() -> (tempfile::TempDir, Home) {
    let folder = tempfile::tempdir().unwrap();
    let home = Home::at(folder.path().to_owned()).unwrap();
    home.ensure_directories().unwrap();
    std::fs::write(home.registrations().join("torn.json"), TORN).unwrap();
    (folder, home)
}

/// Runs the process above under strace.
fn traced(home: &Home, how: &[&str]) -> Output {
    let output = Command::new("strace")
        .args(["-f", "-qq"])
        .args(how)
        .arg(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "killed_registry", "--nocapture", "--test-threads=1"])
        .env(HOME, home.root())
        .output();
    output.unwrap_or_else(|error| panic!("strace cannot be run ({error}); tests/run installs it"))
}

fn acknowledged(output: &Output) -> usize {
    let said = String::from_utf8_lossy(&output.stdout);
    said.lines().filter(|line| line.starts_with("acknowledged ")).count()
}

/// Returns the state that the next daemon reads: registrations, and grants.
fn found(home: &Home) -> [Folders; 2] {
    let loaded = file::load_all::<Registration>(home).unwrap().into_iter();
    let whole = loaded.filter_map(|one| match one.found {
        Ok(registration) => Some((one.stem, registration.cwd)),
        Err(unfit) => {
            assert_eq!(one.stem, "torn", "half a registration: {unfit}");
            None
        }
    });
    let granted = file::load_all::<Grants>(home).unwrap().into_iter().map(|one| {
        let grants = one.found.expect("half a file of grants");
        let folders = ["/one", "/two", "/three", "/four", "/five"].map(PathBuf::from);
        let folder = folders.into_iter().find(|folder| grants.holds(Right::Rebuild, folder));
        (one.stem, folder.expect("a file without a grant"))
    });
    [whole.collect(), granted.collect()]
}

fn listing(home: &Home) -> Vec<(String, String)> {
    let directories = [home.registrations(), home.grants()].into_iter();
    let entries = directories.flat_map(|path| std::fs::read_dir(path).unwrap()).map(Result::unwrap);
    let mut names: Vec<_> = entries
        .map(|entry| {
            (entry.file_name().into_string().unwrap(), std::fs::read_to_string(entry.path()).unwrap())
        })
        .collect();
    names.sort();
    names
}

#[test]
fn c21_kill_at_any_step_leaves_the_old_or_the_new_state() {
    let mut killed_in_between = 0;
    for (call, by_directory) in CALLS {
        for nth in 1..=NTH_MAX {
            assert!(nth < NTH_MAX, "no end of {call}");
            let (_folder, home) = home();
            let trace = format!("trace={call}");
            let inject = format!("inject={call}:signal=KILL:when={nth}");
            let mut how = vec!["-o", "/dev/null", "-e", &trace, "-e", &inject];
            let directories = [home.registrations(), home.grants()];
            if by_directory {
                how.extend(directories.iter().flat_map(|path| ["-P", path.to_str().unwrap()]));
            }
            let output = traced(&home, &how);
            let acknowledged = acknowledged(&output);
            let at = format!("killed at {call} number {nth} after {acknowledged} changes");
            let found = found(&home);
            let next = (acknowledged + 1).min(CHANGES.len());
            for ((found, old), new) in found.iter().zip(after(acknowledged)).zip(after(next)) {
                assert!(
                    *found == old || *found == new,
                    "{at}: {found:?}\n{}",
                    String::from_utf8_lossy(&output.stderr)
                );
            }
            let listing = listing(&home);
            assert!(listing.iter().any(|(_, text)| text == TORN), "{at}: what was torn is lost: {listing:?}");
            assert!(listing.iter().all(|(name, _)| !name.ends_with(".tmp")), "{at}: {listing:?}");
            if output.status.success() {
                assert_eq!(acknowledged, CHANGES.len());
                break;
            }
            killed_in_between += u32::from(acknowledged > 0 || !found[0].is_empty());
        }
    }
    // Each change takes several calls; fewer runs would prove nothing.
    assert!(killed_in_between > 30, "only {killed_in_between} kills hit a change");
}

#[test]
fn c21_file_is_synced_before_its_rename_and_the_directory_before_the_acknowledgement() {
    let (folder, home) = home();
    let log = folder.path().join("trace");
    let calls = "trace=openat,fsync,renameat,renameat2,unlinkat,write";
    let output = traced(&home, &["-y", "-s", "200", "-o", log.to_str().unwrap(), "-e", calls]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let steps = steps(&std::fs::read_to_string(&log).unwrap(), &[home.registrations(), home.grants()]);
    let write = ["write temporary", "fsync temporary", "rename", "fsync directory", "acknowledged"];
    let set_aside =
        ["write temporary", "fsync temporary", "rename", "rename", "fsync directory", "acknowledged"];
    let remove = ["unlink", "fsync directory", "acknowledged"];
    // The grants first, then the registration.
    let remove_both = ["unlink", "fsync directory", "unlink", "fsync directory", "acknowledged"];
    let expected =
        [&write[..], &set_aside, &write, &write, &write, &write, &remove_both, &write, &remove].concat();
    assert_eq!(steps, expected);
}

/// The steps in a trace on files in these directories.
fn steps(trace: &str, directories: &[PathBuf; 2]) -> Vec<&'static str> {
    let directories = directories.each_ref().map(|path| format!("<{}>", path.display()));
    let is_in_one = |call: &str| directories.iter().any(|directory| call.contains(directory));
    let step = |line: &str| {
        let temporary = line.contains(".tmp>");
        // A call that another thread interrupts is printed in two parts; the first has the arguments.
        let call = line.split_once(' ').map_or(line, |(_, call)| call.trim_start());
        match call.split_once('(')?.0 {
            "write" if temporary => Some("write temporary"),
            "write" if call.contains("acknowledged ") => Some("acknowledged"),
            "fsync" if temporary => Some("fsync temporary"),
            "fsync" if is_in_one(call) => Some("fsync directory"),
            "renameat" | "renameat2" if is_in_one(call) => Some("rename"),
            "unlinkat" if is_in_one(call) => Some("unlink"),
            _ => None,
        }
    };
    trace.lines().filter_map(step).collect()
}
