//! Claims 21, 22 and 24 for the whole daemon: when it is killed at any step that changes the disk, the next daemon starts
//! and has all acknowledged changes; endless input of clients uses bounded memory.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};

use landfall_tests::case::Case;
use landfall_tests::process::resident_bytes_of;
use landfall_tests::rpc::Wire;
use landfall_tests::{Home, note, rpc, wait_until};
use serde_json::{Value, json};

pub(crate) const CASES: &[Case] = &[
    Case::once("c21_a_daemon_killed_at_any_step_does_not_block_the_next_one", killed_at_any_step),
    Case::once("c24_endless_lines_use_bounded_memory", endless_lines),
];

/// The system calls with which the daemon changes the disk, besides `write`: data that it writes becomes visible as a whole
/// with one of these.
const CALLS: [&str; 12] = [
    "mkdir",
    "flock",
    "fsync",
    "rename",
    "renameat",
    "renameat2",
    "unlink",
    "unlinkat",
    "bind",
    "listen",
    "chmod",
    "fchmod",
];
/// The most calls of one kind before this case fails.
const NTH_MAX: u32 = 60;

/// The number of connections that the daemon serves at a time, and the number including those that wait for a place.
const PLACES: usize = 256;
const CLIENTS: usize = PLACES + 500;
/// The number of equal readings in a row that count as at rest.
const LOOKS: u32 = 100;

/// Each container, with its folder and whether it has the grant.
type Known = BTreeMap<String, (String, bool)>;

/// A change that is requested from the daemon.
#[derive(Clone, Copy)]
enum Change {
    Register(&'static str),
    Grant,
    Deregister,
}
use Change::{Deregister, Grant, Register};

/// The changes, in this order, each of one container.
const CHANGES: [(&str, Change); 5] = [
    ("old", Register("/two")),
    ("new", Register("/three")),
    ("new", Grant),
    ("old", Deregister),
    ("old", Register("/four")),
];

/// Returns the registrations and grants after this many changes.
fn after(changes: usize) -> Known {
    let mut known = Known::from([("old".to_owned(), ("/one".to_owned(), false))]);
    for (name, change) in &CHANGES[..changes] {
        match change {
            Register(folder) => drop(known.insert((*name).to_owned(), ((*folder).to_owned(), false))),
            Grant => known.get_mut(*name).unwrap().1 = true,
            Deregister => drop(known.remove(*name)),
        }
    }
    known
}

/// Starts a daemon under strace, which kills it when it enters the `nth` call of this kind.
fn start_under_strace(home: &Home, call: &str, nth: u32) -> Child {
    let daemon = home.command(&["_hostd"]);
    let mut command = Command::new("strace");
    command
        .args(["-f", "-qq", "-o", "/dev/null", "-e", &format!("trace={call}")])
        .args(["-e", &format!("inject={call}:signal=KILL:when={nth}")])
        .arg(daemon.get_program())
        .args(daemon.get_args());
    for (name, value) in daemon.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command.spawn().unwrap_or_else(|error| panic!("strace cannot be run ({error}); tests/run installs it"))
}

/// Sends a request to a daemon that may be killed; `None` if it was.
fn ask(home: &Home, request: &Value) -> Option<Value> {
    let mut wire = Wire::try_connect(home).ok()?;
    wire.try_send(format!("{request}\n")).ok()?;
    let text = wire.rest();
    text.ends_with('\n').then(|| serde_json::from_str(&text).unwrap())
}

/// Requests every change until the daemon is killed. Returns how many were acknowledged.
fn make_changes(home: &Home, daemon: &mut Child) -> usize {
    let mut has_ended = || daemon.try_wait().unwrap().is_some();
    wait_until("the daemon to answer, or to die", || {
        if has_ended() || rpc::answers(home) { Ok(()) } else { Err("neither") }
    });
    for (number, (name, change)) in CHANGES.iter().enumerate() {
        let request = match change {
            Register(folder) => json!({"kind": "register", "containerName": name, "cwd": folder}),
            Grant => json!({"kind": "grant", "containerName": name, "what": ["rebuild"]}),
            Deregister => json!({"kind": "deregister", "containerName": name}),
        };
        match ask(home, &request) {
            Some(answer) => assert_eq!(answer["ok"], true, "{request}: {answer}"),
            None => return number,
        }
    }
    CHANGES.len()
}

/// Returns the registrations and grants of the next daemon.
fn known(home: &Home) -> Known {
    let described = rpc::done(home, &json!({"kind": "describe"}));
    let entries = described["containers"].as_array().unwrap().iter();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let is_granted =
        |entry: &Value| entry["grants"].as_array().unwrap().iter().any(|one| one["state"] == "granted");
    entries.map(|entry| (text(&entry["containerName"]), (text(&entry["cwd"]), is_granted(entry)))).collect()
}

fn killed_at_any_step() {
    let mut kills = 0;
    for call in CALLS {
        for nth in 1.. {
            assert!(nth < NTH_MAX, "no end of {call}");
            if !survives_a_kill(call, nth) {
                break;
            }
            kills += 1;
        }
    }
    note!("{kills} steps");
    assert!(kills > 20, "only {kills} steps were found");
}

/// Returns whether the daemon reached this call.
fn survives_a_kill(call: &str, nth: u32) -> bool {
    let home = Home::new();
    home.write_registration("old", json!({"containerName": "old", "cwd": "/one"}).to_string());
    let mut daemon = start_under_strace(&home, call, nth);
    let acknowledged = make_changes(&home, &mut daemon);
    // An orderly shutdown changes the disk, too.
    ask(&home, &json!({"kind": "shutdown"}));
    let ended = wait_until("the daemon to end", || daemon.try_wait().unwrap().ok_or("it runs"));
    if ended.success() {
        assert_eq!(acknowledged, CHANGES.len());
        return false;
    }
    let at = format!("killed at {call} number {nth}, after {acknowledged} changes");
    let next = home.daemon();
    wait_until("replay", || match rpc::done(&home, &json!({"kind": "describe"})) {
        description if description["replayed"] == true => Ok(()),
        description => Err(description),
    });
    let known = known(&home);
    let either = [after(acknowledged), after((acknowledged + 1).min(CHANGES.len()))];
    assert!(either.contains(&known), "{at}: {known:?}");
    let strange =
        home.files().into_iter().map(|(path, _)| path).filter(|path| {
            path.extension().is_some_and(|extension| extension == "tmp" || extension == "new")
        });
    assert_eq!(strange.collect::<Vec<_>>(), Vec::<std::path::PathBuf>::new(), "{at}");
    assert_eq!(home.mode("run"), 0o700, "{at}");
    assert_eq!(home.mode("run/hostd.sock"), 0o600, "{at}");
    next.shut_down();
    assert!(!home.socket().exists(), "{at}");
    true
}

fn endless_lines() {
    let home = Home::new();
    let daemon = home.daemon();
    let pid = daemon.pid();
    let before = resident_bytes_of(pid);
    // As many bytes as a line can have, without a newline.
    let almost = vec![b'x'; 65_000];
    let mut held = Vec::new();
    wait_until("every place to be taken, and the backlog to be full", || {
        while let Some(mut stream) = try_connect(&home) {
            stream.write_all(&almost).unwrap();
            held.push(stream);
        }
        if held.len() >= CLIENTS { Ok(()) } else { Err(held.len()) }
    });
    let (mut last, mut looks) = (0, 0);
    let full = wait_until("the daemon to have read what it reads", || {
        let grown = resident_bytes_of(pid).saturating_sub(before);
        looks = if grown == last { looks + 1 } else { 0 };
        last = grown;
        if grown > PLACES * almost.len() / 2 && looks == LOOKS { Ok(grown) } else { Err(grown) }
    });
    note!("{} connections with {} bytes each: {} KiB more", held.len(), almost.len(), full / 1024);
    // The overhead of the allocator is bounded, too.
    assert!(full < 2 * PLACES * almost.len(), "{full} bytes more");
    drop(held);
    rpc::done(&home, &json!({"kind": "list"}));
    daemon.shut_down();
}

/// Connects to the daemon's socket, if there is room in its backlog.
fn try_connect(home: &Home) -> Option<UnixStream> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
    let address = SocketAddrUnix::new(home.socket()).unwrap();
    connect(&socket, &address).is_ok().then(|| socket.into())
}
