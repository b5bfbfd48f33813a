//! Claim 25: root's engine is not root, and code that takes it over does not become root again.
//!
//! A stand-in replaces the engine: a process that drops the same privileges with the same calls, and then makes each escape
//! attempt that a process of uid 0 without capabilities could make. It runs with an increasing number of layers
//! ([`landfall_engine::process::confinement`]), so that each layer is shown to block the attempts that it exists for. With
//! the earlier layer alone (capabilities) the attempts succeed: they are real.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use landfall_engine::limits::Limits;
use landfall_engine::process::confinement::Confinement;
use landfall_engine::process::privileges::{EngineUser, become_engine, drop_capabilities};
use landfall_engine::reactor::{self, RingChoice};
use landfall_engine::sys::unacknowledged_bytes;
use landfall_tests::case::Case;
use landfall_tests::process::running;
use landfall_tests::{Home, Namespace, Server, connect, note, rpc, wait_until};
use nix::sched::CloneFlags;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, Uid};
use rustix::thread::{CapabilitySet, LinkNameSpaceType};
use serde_json::{Value, json};

use crate::crash::{by_file, describe, engine_pid, wait_for_open};

pub(crate) const CASES: &[Case] = &[
    Case::once("c25_code_in_roots_engine_does_not_become_root_again", escapes),
    Case::once("c25_roots_engine_serves_as_another_user", serves_as_another_user),
];

/// The confinement layers of a stand-in.
const LAYERS: [&str; 4] = ["capabilities", "user", "files", "calls"];

/// The attempts of a stand-in, and the first layer with which each fails.
const ATTEMPTS: [(&str, &str); 19] = [
    ("write core_pattern", "user"),
    ("create a file in /etc", "user"),
    ("write /etc/passwd", "user"),
    ("read /etc/shadow", "user"),
    ("write the daemon's pid file", "user"),
    ("connect to hostd.sock", "user"),
    ("connect to a socket of root's", "user"),
    ("signal the daemon", "user"),
    ("become uid 0", "user"),
    // The daemon has no capability that the engine does not have.
    ("take a descriptor of the daemon", "user"),
    ("trace the daemon", "user"),
    // These need a capability in any case.
    ("enter a namespace", "capabilities"),
    ("mount", "capabilities"),
    ("open a packet socket", "capabilities"),
    // Every user can do these.
    ("read /etc/passwd", "files"),
    ("execute a program", "files"),
    ("connect to a socket that is open to all", "calls"),
    ("make an io_uring", "calls"),
    // The last one, because it changes the result of the others.
    ("make a user namespace", "calls"),
];

/// Returns whether this runs as root of the whole machine. A user namespace has no other user to change to.
pub(crate) fn is_root() -> bool {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap();
    let is_root = map.split_whitespace().eq(["0", "0", "4294967295"]);
    if !is_root {
        note!("an engine changes its user only as root");
    }
    is_root
}

fn escapes() {
    if !is_root() {
        return;
    }
    let home = Home::new();
    let daemon = home.daemon();
    let has_io_uring = reactor::choose(RingChoice::IoUring, &Limits::default()).is_ok();
    let place = Place::new();
    for (at, layer) in LAYERS.iter().enumerate() {
        let stand_in = StandIn::start(layer, daemon.pid(), &home, &place);
        for (attempt, stopped_by) in ATTEMPTS {
            let stopped = LAYERS.iter().position(|layer| *layer == stopped_by).unwrap() <= at;
            let outcome = stand_in.outcome(attempt);
            if attempt == "make an io_uring" && !has_io_uring {
                continue;
            }
            assert_eq!(outcome != "done", stopped, "with {layer}: {attempt}: {outcome}");
        }
        // An engine needs these.
        for need in ["listen at port 80", "count unacknowledged bytes"] {
            assert_eq!(stand_in.outcome(need), "done", "with {layer}: {need}");
        }
    }
}

fn serves_as_another_user() {
    if !is_root() {
        return;
    }
    let home = Home::new();
    let daemon = home.daemon();
    let inside = Namespace::new();
    let mut by_file = by_file(&inside);
    by_file["portForward"] = json!({"allow": [80, 3000]});
    rpc::register_with(&home, "a", &by_file);
    // A port below 1024 uses the only remaining capability.
    let low = Server::listen(&inside, "127.0.0.1:80");
    let high = Server::listen(&inside, "127.0.0.1:3000");
    let description = wait_for_open(&home, &[("a", 80), ("a", 3000)]);
    for (port, server) in [(80, &low), (3000, &high)] {
        let mut client = connect((Ipv4Addr::LOCALHOST, port));
        let mut inner = server.accept();
        client.write_all(b"ping").unwrap();
        let mut read = [0; 4];
        inner.read_exact(&mut read).unwrap();
        assert_eq!(&read, b"ping");
    }
    let place = Place::new();
    let stand_in = StandIn::start("calls", daemon.pid(), &home, &place);
    let engine = engine_pid(&description);
    assert_eq!(credentials(engine), credentials(stand_in.pid()), "the stand-in is not the engine's like");
    assert_eq!(
        credentials(engine)["Uid"].split_whitespace().next(),
        Some(EngineUser::of_this_machine().uid.to_string().as_str())
    );
    assert_eq!(describe(&home)["engine"]["reason"], Value::Null, "its ring is the one that others have");
    drop(stand_in);
    // The name of its socket is in a directory that it cannot enter; it is removed nevertheless.
    rpc::done(&home, &json!({"kind": "shutdown", "engine": "drain"}));
    assert!(daemon.end().success());
    assert!(!home.path().join("run/engine.sock").exists());
    wait_until("the engine to end", || match running("_engine") {
        left if left.is_empty() => Ok(()),
        left => Err(left),
    });
}

/// Returns the lines of `/proc/PID/status` about privileges.
pub(crate) fn credentials(pid: u32) -> BTreeMap<String, String> {
    const LINES: [&str; 11] = [
        "Uid",
        "Gid",
        "Groups",
        "CapInh",
        "CapPrm",
        "CapEff",
        "CapBnd",
        "CapAmb",
        "NoNewPrivs",
        "Seccomp",
        "Seccomp_filters",
    ];
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let lines = status.lines().filter_map(|line| line.split_once(':'));
    lines
        .filter(|(name, _)| LINES.contains(name))
        .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
        .collect()
}

/// Sockets to which a stand-in tries to connect.
pub(crate) struct Place {
    directory: tempfile::TempDir,
    _listeners: Vec<UnixListener>,
}

impl Place {
    pub(crate) fn new() -> Place {
        let directory = tempfile::tempdir().unwrap();
        fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
        let listen = |name: &str, mode| {
            let path = directory.path().join(name);
            let listener = UnixListener::bind(&path).unwrap();
            fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
            listener
        };
        // With the mode of docker.sock.
        let listeners = vec![listen("root.sock", 0o660), listen("all.sock", 0o666)];
        fs::create_dir(directory.path().join("mount")).unwrap();
        Place { directory, _listeners: listeners }
    }
}

pub(crate) struct StandIn {
    child: Child,
    outcomes: BTreeMap<String, String>,
}

impl StandIn {
    /// Starts a stand-in, and waits until it has made every attempt. `daemon` is the process that it tries to signal and to
    /// trace.
    pub(crate) fn start(layer: &str, daemon: u32, home: &Home, place: &Place) -> StandIn {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["_stand_in", layer, &daemon.to_string()])
            .arg(home.path())
            .arg(place.directory.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let printed = child.stdout.as_mut().unwrap();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(printed), &mut line).unwrap();
        let outcomes = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line:?}: {error}"));
        StandIn { child, outcomes }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Returns `done`, or the error.
    pub(crate) fn outcome(&self, attempt: &str) -> &str {
        &self.outcomes[attempt]
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        // It exits when its input ends.
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// `_stand_in LAYER DAEMON HOME PLACE`: drops the engine's privileges, makes the attempts, and prints the result of each.
pub(crate) fn stand_in(arguments: &[String]) {
    let [layer, daemon, home, place] = arguments else { panic!("{arguments:?}") };
    // The daemon has fewer privileges than the engine had, and no others.
    let at = LAYERS.iter().position(|known| known == layer);
    let escape = EscapeAttempt::new(daemon.parse().unwrap(), Path::new(home), Path::new(place));
    let user = EngineUser::of_this_machine();
    match at {
        None => drop_capabilities(CapabilitySet::empty()).unwrap(),
        Some(0) => drop_capabilities(CapabilitySet::NET_BIND_SERVICE).unwrap(),
        Some(1) => assert!(become_engine(user).unwrap()),
        Some(_) => {
            let confinement = Confinement::start(user).unwrap();
            let lacks = if at == Some(3) { confinement.seal() } else { Vec::new() };
            assert!(lacks.is_empty(), "{lacks:?}");
        }
    }
    let mut outcomes = BTreeMap::new();
    let mut note = |attempt: &'static str, outcome: Result<(), Errno>| {
        outcomes.insert(attempt, outcome.map_or_else(|errno| errno.to_string(), |()| "done".to_owned()));
    };
    note("listen at port 80", TcpListener::bind((Ipv4Addr::LOCALHOST, 80)).map(drop).map_err(errno));
    note("count unacknowledged bytes", count_unacknowledged());
    for (attempt, _) in ATTEMPTS {
        // On success it prints the capabilities that it has there.
        if at.is_some() || attempt != "make a user namespace" {
            note(attempt, escape.attempt(attempt));
        }
    }
    let line = serde_json::to_string(&outcomes).unwrap() + "\n";
    std::io::stdout().write_all(line.as_bytes()).unwrap();
    // The case reads its credentials in the meantime.
    let _ = std::io::stdin().read_line(&mut String::new());
}

/// Sends to a peer that does not read, and asks how much is on its way. A relay that does not know it resets too early, and
/// loses the bytes before a reset.
fn count_unacknowledged() -> Result<(), Errno> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(errno)?;
    let mut sender = TcpStream::connect(listener.local_addr().map_err(errno)?).map_err(errno)?;
    sender.set_nonblocking(true).map_err(errno)?;
    while sender.write(&[0; 64 * 1024]).is_ok() {}
    if unacknowledged_bytes(&sender) > 0 { Ok(()) } else { Err(Errno::PERM) }
}

fn errno(error: std::io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

/// The descriptors and paths of a stand-in when it drops its privileges.
struct EscapeAttempt<'a> {
    daemon: Pid,
    pidfd: OwnedFd,
    namespace: OwnedFd,
    home: &'a Path,
    place: &'a Path,
}

impl EscapeAttempt<'_> {
    fn new<'a>(daemon: i32, home: &'a Path, place: &'a Path) -> EscapeAttempt<'a> {
        let daemon = Pid::from_raw(daemon).unwrap();
        let pidfd = rustix::process::pidfd_open(daemon, PidfdFlags::empty()).unwrap();
        let namespace = fs::File::open("/proc/self/ns/net").unwrap().into();
        EscapeAttempt { daemon, pidfd, namespace, home, place }
    }

    /// Makes one attempt. A successful attempt changes no state of the machine.
    fn attempt(&self, what: &str) -> Result<(), Errno> {
        let open = |path: &Path, flags| {
            rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR).map(drop)
        };
        let connect = |path: &Path| UnixStream::connect(path).map(drop).map_err(errno);
        match what {
            "write core_pattern" => open(Path::new("/proc/sys/kernel/core_pattern"), OFlags::WRONLY),
            "create a file in /etc" => {
                // Without a name: an O_TMPFILE file disappears with its descriptor.
                rustix::fs::openat(CWD, "/etc", OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR)
                    .map(drop)
            }
            "write /etc/passwd" => open(Path::new("/etc/passwd"), OFlags::WRONLY),
            "read /etc/shadow" => open(Path::new("/etc/shadow"), OFlags::RDONLY),
            "read /etc/passwd" => open(Path::new("/etc/passwd"), OFlags::RDONLY),
            "write the daemon's pid file" => open(&self.home.join("run/hostd.pid"), OFlags::WRONLY),
            "connect to hostd.sock" => connect(&self.home.join("run/hostd.sock")),
            "connect to a socket of root's" => connect(&self.place.join("root.sock")),
            "connect to a socket that is open to all" => connect(&self.place.join("all.sock")),
            "signal the daemon" => rustix::process::test_kill_process(self.daemon),
            "become uid 0" => rustix::thread::set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT),
            "take a descriptor of the daemon" => {
                rustix::process::pidfd_getfd(&self.pidfd, 0, PidfdGetfdFlags::empty()).map(drop)
            }
            "trace the daemon" => {
                let daemon = nix::unistd::Pid::from_raw(self.daemon.as_raw_nonzero().get());
                let traced = nix::sys::ptrace::seize(daemon, nix::sys::ptrace::Options::empty());
                traced.map_err(|errno| Errno::from_raw_os_error(errno as i32))
            }
            "enter a namespace" => rustix::thread::move_into_link_name_space(
                self.namespace.as_fd(),
                Some(LinkNameSpaceType::Network),
            ),
            "mount" => {
                let place = self.place.join("mount");
                rustix::mount::mount("none", &place, "tmpfs", MountFlags::empty(), None)?;
                rustix::mount::unmount(&place, UnmountFlags::empty())
            }
            "open a packet socket" => {
                let raw = rustix::net::SocketType::RAW;
                rustix::net::socket(rustix::net::AddressFamily::PACKET, raw, None).map(drop)
            }
            "execute a program" => Command::new("/bin/true").status().map(drop).map_err(errno),
            "make an io_uring" => {
                let made = reactor::choose(RingChoice::IoUring, &Limits::default());
                made.map(drop).map_err(|_| Errno::PERM)
            }
            "make a user namespace" => nix::sched::unshare(CloneFlags::CLONE_NEWUSER)
                .map_err(|errno| Errno::from_raw_os_error(errno as i32)),
            other => panic!("{other}"),
        }
    }
}
