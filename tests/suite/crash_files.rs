//! Claims 21, 22 and 24 for the daemon as a whole: killed at any step that it takes on the disk, it leaves nothing in the
//! way of the next one and has kept what it acknowledged; and what clients send without an end costs bounded memory.

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
    Case::once("c21_a_daemon_killed_at_any_step_leaves_nothing_in_the_way", killed_at_any_step),
    Case::once("c24_many_lines_without_an_end_take_bounded_memory", endless_lines),
];

/// The calls by which the daemon changes what is on the disk, beside `write`: what it writes is complete or not there at
/// one of these.
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
/// How often a daemon may make one of these calls before this case gives up.
const NTH_MAX: u32 = 60;

/// How many connections the daemon serves at a time, and how many may be there with those that wait for a place.
const PLACES: usize = 256;
const CLIENTS: usize = PLACES + 500;
/// How many looks in a row have to see the same before it counts as at rest.
const LOOKS: u32 = 100;

/// Each container, with its folder and whether it has the grant.
type Known = BTreeMap<String, (String, bool)>;

/// A change that the daemon is asked for.
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

/// Returns what is known after so many changes.
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

/// A daemon under strace, which kills it as it enters the `nth` such call.
fn doomed(home: &Home, call: &str, nth: u32) -> Child {
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

/// Makes a request of a daemon that may die meanwhile; none when it has.
fn ask(home: &Home, request: &Value) -> Option<Value> {
    let mut wire = Wire::try_connect(home).ok()?;
    wire.try_send(format!("{request}\n")).ok()?;
    let text = wire.rest();
    text.ends_with('\n').then(|| serde_json::from_str(&text).unwrap())
}

/// Makes every change, until the daemon has died; tells how many were acknowledged.
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

/// What the next daemon knows.
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

/// Whether a daemon came so far.
fn survives_a_kill(call: &str, nth: u32) -> bool {
    let home = Home::new();
    home.plant("old", json!({"containerName": "old", "cwd": "/one"}).to_string());
    let mut daemon = doomed(&home, call, nth);
    let acknowledged = make_changes(&home, &mut daemon);
    // Its orderly end takes steps, too.
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
    // As much as a line may have, and nothing that ends it.
    let almost = vec![b'x'; 65_000];
    let mut held = Vec::new();
    wait_until("every place to be taken, and the backlog to be full", || {
        while let Some(mut stream) = knock(&home) {
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
    // What the allocator adds is bounded, too.
    assert!(full < 2 * PLACES * almost.len(), "{full} bytes more");
    drop(held);
    rpc::done(&home, &json!({"kind": "list"}));
    daemon.shut_down();
}

/// Connects to the daemon's socket, if there is room in its backlog.
fn knock(home: &Home) -> Option<UnixStream> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
    let address = SocketAddrUnix::new(home.socket()).unwrap();
    connect(&socket, &address).is_ok().then(|| socket.into())
}
