//! Openers in real namespaces, as root and as an unprivileged user.
//!
//! This program also plays the other roles of the tests: with `_opener` it is an opener, with `_engine` an engine, with
//! `_listen` a server inside a namespace, with `_client` a process that starts an opener and is killed. As root it runs all
//! cases, and then those that need no privileges again as the user `nobody`. An argument selects the cases whose names
//! contain it.
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a test, in a program with its own main")]

#[path = "opener/agents.rs"]
mod agents;
#[path = "opener/helpers.rs"]
mod helpers;

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::num::NonZeroU16;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use landfall_engine::channel::Channel;
use landfall_engine::command::{
    Command as EngineCommand, Event, Family, ForwardId, Reach, UpstreamId, UpstreamKind, UpstreamState,
    WatchSources,
};
use landfall_engine::opener::client::{OpenError, Opener, StockError, Target, ask, take};
use landfall_engine::opener::{Answer, FailureKind, Request, VERB, serve};
use landfall_engine::process::{self, CommandSocket, privileges};
use landfall_engine::sys::netns_cookie;
use landfall_engine::{Engine, EngineOptions};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::thread::CapabilitySet;

const NOBODY: [&str; 3] = ["--reuid=65534", "--regid=65534", "--clear-groups"];
const TIMEOUT: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };
/// The version that the engine of these cases reports.
const VERSION: &str = "of these cases";

/// The requirements of a case.
#[derive(PartialEq)]
enum Needs {
    Nothing,
    Root,
}

type Case = (&'static str, Needs, fn());

const CASES: [Case; 22] = [
    ("a_socket_made_inside_connects_from_outside", Needs::Nothing, connects_from_outside),
    ("both_families_and_an_ipv6_listener", Needs::Nothing, both_families),
    ("an_upstream_is_what_the_engine_wants", Needs::Nothing, upstream),
    ("our_own_namespace_is_refused", Needs::Nothing, own_namespace),
    ("a_process_that_has_ended_is_gone", Needs::Nothing, process_gone),
    ("a_file_that_is_no_namespace_is_refused", Needs::Nothing, no_namespace),
    ("sockets_of_one_namespace_are_refused_for_another", Needs::Nothing, crossed_namespaces),
    ("the_opener_ends_with_its_last_channel", Needs::Nothing, ends_with_channels),
    ("a_killed_client_leaves_the_opener_to_the_engine", Needs::Nothing, killed_client),
    ("an_engine_relays_on_while_drivers_come_and_go", Needs::Nothing, engine_process),
    ("a_shard_that_does_not_read_stops_no_other", Needs::Nothing, unread_answers),
    ("nonsense_is_answered_and_ends_nothing", Needs::Nothing, nonsense),
    ("an_opener_that_a_person_starts_says_no", Needs::Nothing, started_by_hand),
    ("the_opener_has_no_privilege_left", Needs::Nothing, no_privilege),
    ("running_out_of_descriptors_leaks_none", Needs::Nothing, exhausted),
    ("an_agent_hands_out_sockets_of_its_namespace", Needs::Nothing, agents::inside),
    ("an_agent_serves_on_beside_one_that_does_not_read", Needs::Nothing, agents::floods),
    ("an_agent_of_our_own_namespace_is_refused", Needs::Nothing, agents::of_ours),
    ("a_helpers_opener_is_like_our_own", Needs::Nothing, helpers::enters),
    ("a_helper_that_is_none_is_not_taken_for_the_container", Needs::Nothing, helpers::useless),
    ("a_namespace_is_entered_by_its_file", Needs::Root, by_file),
    ("another_users_namespace_is_refused", Needs::Root, anothers_namespace),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some(VERB) => {
            return serve::main(std::io::stdin().as_fd()).map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS);
        }
        Some("_listen") => listen(arguments.get(1).unwrap()),
        Some("_engine") => return engine(Path::new(arguments.get(1).unwrap())),
        Some("_agent") => return agents::agent(Path::new(arguments.get(1).unwrap())),
        Some("_client") => client(arguments.get(1).unwrap()),
        _ => {}
    }
    let wanted = arguments.iter().find(|argument| !argument.starts_with('-'));
    let root = rustix::process::geteuid().is_root();
    for (name, needs, case) in &CASES {
        if wanted.is_none_or(|wanted| name.contains(wanted.as_str())) && (root || *needs == Needs::Nothing) {
            print!("test {name} (uid {}) ... ", rustix::process::geteuid().as_raw());
            std::io::stdout().flush().unwrap();
            // A case that fails panics, which ends the program with its message.
            case();
            println!("ok");
        }
    }
    if root {
        let status = Command::new("setpriv").args(NOBODY).arg(this()).args(&arguments).status().unwrap();
        return if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    ExitCode::SUCCESS
}

fn this() -> std::path::PathBuf {
    std::env::current_exe().unwrap()
}

/// `_listen ADDRESS`: listens, prints the port, answers every client.
fn listen(address: &str) -> ! {
    let listener = TcpListener::bind(address).unwrap();
    println!("{}", listener.local_addr().unwrap().port());
    loop {
        listener.accept().unwrap().0.write_all(b"inside").unwrap();
    }
}

/// `_client PID`: enters, sends the engine's descriptors to the process at its standard input, then waits.
fn client(pid: &str) -> ! {
    let channel = Channel::try_from(std::io::stdin().as_fd().try_clone_to_owned().unwrap()).unwrap();
    let mut opener = enter(pid.parse().unwrap()).unwrap();
    let (_, descriptors) = opener.upstream(1).unwrap();
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    channel.send(&opener.netns_cookie(), &borrowed).unwrap();
    drop(descriptors);
    loop {
        std::thread::park();
    }
}

/// `_engine PATH`: runs an engine process.
fn engine(path: &Path) -> ExitCode {
    let socket = CommandSocket::bind(path).unwrap();
    privileges::drop_capabilities(CapabilitySet::NET_BIND_SERVICE).unwrap();
    let engine =
        Engine::start(EngineOptions { version: VERSION.to_owned(), ..EngineOptions::default() }).unwrap();
    let ready = engine.ready().clone();
    let (handle, events) = engine.into_parts();
    process::serve(socket, &ready, &handle, events, process::IDLE_EXIT).unwrap();
    ExitCode::SUCCESS
}

/// A process in a network namespace of its own, with a server on its loopback address.
struct Inside {
    child: Child,
    port: u16,
}

impl Inside {
    /// Creates one with a user namespace of the same user around it.
    fn new() -> Inside {
        Inside::run(Command::new("unshare").arg("-Urn"), "127.0.0.1:0")
    }

    fn run(command: &mut Command, address: &str) -> Inside {
        Inside::run_verb(command, "_listen", address.as_ref())
    }

    /// Creates one with an agent whose socket is in `directory`.
    fn with_agent(directory: &Path) -> Inside {
        Inside::run_verb(Command::new("unshare").arg("-Urn"), "_agent", directory.as_os_str())
    }

    fn run_verb(command: &mut Command, verb: &str, argument: &OsStr) -> Inside {
        let script = "ip link set lo up && exec \"$0\" \"$1\" \"$2\"";
        let mut child = command
            .args(["sh", "-c", script])
            .arg(this())
            .arg(verb)
            .arg(argument)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        Inside { child, port: line.trim().parse().unwrap() }
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn enter(pid: u32) -> Result<Opener, OpenError> {
    Opener::spawn(&this(), Target::process(pid)?)
}

fn channel_of(opener: &mut Opener) -> OwnedFd {
    opener.upstream(1).unwrap().1.remove(0)
}

fn sockets(channel: &OwnedFd, family: Family, count: u16, cookie: u64) -> Result<Vec<OwnedFd>, StockError> {
    ask(channel.as_fd(), family, count, Some("reno")).unwrap();
    loop {
        readable(channel);
        if let Some(sockets) = take(channel.as_fd(), family, count, cookie)? {
            return Ok(sockets);
        }
    }
}

#[track_caller]
fn readable(descriptor: &OwnedFd) {
    let ready = poll(&mut [PollFd::new(descriptor, PollFlags::IN)], Some(&TIMEOUT)).unwrap();
    assert_eq!(ready, 1, "nothing happened in {} s", TIMEOUT.tv_sec);
}

/// Connects a socket from the opener, and reads what the server inside sends.
fn dial(socket: OwnedFd, address: SocketAddr) -> String {
    rustix::io::ioctl_fionbio(&socket, false).unwrap();
    rustix::net::connect(&socket, &address).unwrap();
    let mut said = String::new();
    TcpStream::from(socket).read_to_string(&mut said).unwrap();
    said
}

/// Returns the opener's process, from the credentials of a channel that it created.
fn process_of(channel: &OwnedFd) -> Pid {
    rustix::net::sockopt::socket_peercred(channel).unwrap().pid
}

fn connects_from_outside() {
    let inside = Inside::new();
    let mut opener = enter(inside.pid()).unwrap();
    let file = std::fs::metadata(format!("/proc/{}/ns/net", inside.pid())).unwrap();
    assert_eq!(opener.netns_inode(), file.ino());
    let channel = channel_of(&mut opener);
    let address: SocketAddr = ([127, 0, 0, 1], inside.port).into();
    for socket in sockets(&channel, Family::V4, 3, opener.netns_cookie()).unwrap() {
        assert!(rustix::net::sockopt::tcp_nodelay(&socket).unwrap());
        assert!(rustix::net::sockopt::socket_oobinline(&socket).unwrap());
        assert_eq!(rustix::net::sockopt::tcp_congestion(&socket).unwrap(), "reno");
        assert_eq!(dial(socket, address), "inside");
    }
    let mut times: Vec<Duration> = (0..51)
        .map(|_| {
            let start = Instant::now();
            let made = sockets(&channel, Family::V4, 64, opener.netns_cookie()).unwrap();
            let time = start.elapsed();
            assert_eq!(made.len(), 64);
            time
        })
        .collect();
    times.sort();
    print!("(64 sockets in {:?}, median) ", times[25]);
}

fn both_families() {
    let inside = Inside::run(Command::new("unshare").arg("-Urn"), "[::1]:0");
    let mut opener = enter(inside.pid()).unwrap();
    let channel = channel_of(&mut opener);
    let socket = sockets(&channel, Family::V6, 1, opener.netns_cookie()).unwrap().remove(0);
    assert_eq!(dial(socket, ([0, 0, 0, 0, 0, 0, 0, 1], inside.port).into()), "inside");
    ask(channel.as_fd(), Family::V6, 1, None).unwrap();
    readable(&channel);
    assert!(matches!(
        take(channel.as_fd(), Family::V4, 1, opener.netns_cookie()),
        Err(StockError::Hostile(_))
    ));
    assert_eq!(sockets(&channel, Family::V4, 253, opener.netns_cookie()).unwrap().len(), 253);
    let refused = sockets(&channel, Family::V4, 254, opener.netns_cookie());
    assert!(matches!(refused, Err(StockError::Refused(_))), "{refused:?}");
}

fn upstream() {
    let inside = Inside::new();
    let mut opener = enter(inside.pid()).unwrap();
    let (sources, descriptors) = opener.upstream(3).unwrap();
    assert_eq!(sources, WatchSources { proc_tcp: true, proc_tcp6: true, sock_diag: true });
    assert_eq!(descriptors.len(), 6);
    let mut table = String::new();
    std::fs::File::from(descriptors[3].try_clone().unwrap()).read_to_string(&mut table).unwrap();
    let row = format!("0100007F:{:04X} 00000000:0000 0A", inside.port);
    assert!(table.contains(&row), "{row} is not in\n{table}");
    assert_eq!(netns_cookie(&descriptors[5]).unwrap(), opener.netns_cookie());
    for channel in &descriptors[..3] {
        assert_eq!(sockets(channel, Family::V4, 2, opener.netns_cookie()).unwrap().len(), 2);
    }
}

#[track_caller]
fn assert_refused(result: Result<Opener, OpenError>, kind: FailureKind) -> String {
    let error = result.unwrap_err();
    assert_eq!(error.kind(), Some(kind), "{error}");
    error.to_string()
}

fn own_namespace() {
    assert_refused(enter(std::process::id()), FailureKind::OwnNamespace);
    if rustix::process::geteuid().is_root() {
        let file = Target::path(Path::new("/proc/self/ns/net")).unwrap();
        assert_refused(Opener::spawn(&this(), file), FailureKind::OwnNamespace);
    }
}

fn process_gone() {
    let inside = Inside::new();
    let (pid, target) = (inside.pid(), Target::process(inside.pid()).unwrap());
    drop(inside);
    let text = assert_refused(Opener::spawn(&this(), target), FailureKind::Gone);
    assert_eq!(text, "the process has ended");
    let text = assert_refused(enter(pid), FailureKind::Gone);
    assert_eq!(text, format!("there is no process {pid}"));
    assert_refused(enter(0), FailureKind::Gone);
    assert_refused(enter(u32::MAX), FailureKind::Gone);
}

fn no_namespace() {
    let target = Target::path(Path::new("/dev/null")).unwrap();
    assert_refused(Opener::spawn(&this(), target), FailureKind::Other);
    let missing = Target::path(Path::new("/run/netns/there-is-none")).unwrap_err();
    assert!(missing.to_string().contains("/run/netns/there-is-none"), "{missing}");
    let user = Target::path(Path::new("/proc/self/ns/user")).unwrap();
    assert_refused(Opener::spawn(&this(), user), FailureKind::Other);
}

fn crossed_namespaces() {
    let (one, other) = (Inside::new(), Inside::new());
    let mut here = enter(one.pid()).unwrap();
    let there = enter(other.pid()).unwrap();
    assert_ne!(here.netns_cookie(), there.netns_cookie());
    let channel = channel_of(&mut here);
    let before = std::fs::read_dir("/proc/self/fd").unwrap().count();
    let crossed = sockets(&channel, Family::V4, 100, there.netns_cookie());
    assert!(matches!(crossed, Err(StockError::Hostile(_))));
    assert_eq!(std::fs::read_dir("/proc/self/fd").unwrap().count(), before);
}

fn ends_with_channels() {
    let inside = Inside::new();
    let mut opener = enter(inside.pid()).unwrap();
    let (_, mut descriptors) = opener.upstream(2).unwrap();
    descriptors.truncate(2);
    let pid = process_of(&descriptors[0]);
    let process = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    let cookie = opener.netns_cookie();
    drop(opener);
    drop(descriptors.remove(0));
    assert_eq!(sockets(&descriptors[0], Family::V4, 1, cookie).unwrap().len(), 1);
    drop(descriptors);
    readable(&process);
    // The process is a zombie until the reaper thread has waited for it.
    let deadline = Instant::now() + Duration::from_secs(10);
    while Path::new(&format!("/proc/{}", pid.as_raw_nonzero())).exists() {
        assert!(Instant::now() < deadline, "the opener was left as a zombie");
        std::thread::yield_now();
    }
}

fn killed_client() {
    let inside = Inside::new();
    let (ours, theirs) = Channel::pair().unwrap();
    let mut client = Command::new(this())
        .args(["_client", &inside.pid().to_string()])
        .stdin(OwnedFd::from(theirs))
        .spawn()
        .unwrap();
    let (cookie, mut descriptors) = ours.recv::<u64>().unwrap().unwrap();
    client.kill().unwrap();
    client.wait().unwrap();
    let channel = descriptors.remove(0);
    let process = pidfd_open(process_of(&channel), PidfdFlags::empty()).unwrap();
    let socket = sockets(&channel, Family::V4, 1, cookie).unwrap().remove(0);
    assert_eq!(dial(socket, ([127, 0, 0, 1], inside.port).into()), "inside");
    drop(channel);
    readable(&process);
}

/// Receives events until one is `wanted`.
#[track_caller]
fn event(driver: &Channel, wanted: impl Fn(&Event) -> bool) -> Event {
    loop {
        let (event, _) = driver.recv_timeout::<Event>(Duration::from_secs(10)).unwrap().unwrap();
        if wanted(&event) {
            return event;
        }
        assert!(!matches!(event, Event::Refused { .. } | Event::ListenerFailed { .. }), "{event:?}");
    }
}

/// Connects a driver to the engine at `path`, as soon as it listens. Returns it with the number of shards.
fn drive(path: &Path) -> (Channel, u16) {
    let deadline = Instant::now() + Duration::from_secs(10);
    let driver = loop {
        match Channel::connect(path) {
            Ok(driver) => break driver,
            Err(error) => assert!(Instant::now() < deadline, "no engine at {}: {error}", path.display()),
        }
        std::thread::yield_now();
    };
    match event(&driver, |_| true) {
        Event::Ready { shards, version, .. } if version == VERSION => (driver, shards),
        other => panic!("{other:?}"),
    }
}

/// A child that is killed if its case fails.
struct Bounded(Child);

impl Drop for Bounded {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn engine_process() {
    let inside = Inside::new();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("engine.sock");
    let mut engine = Bounded(Command::new(this()).arg("_engine").arg(&path).spawn().unwrap());
    let (driver, shards) = drive(&path);
    let mut opener = enter(inside.pid()).unwrap();
    let (sources, descriptors) = opener.upstream(shards).unwrap();
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    let (upstream, netns_cookie) = (UpstreamId(1), opener.netns_cookie());
    driver
        .send(
            &EngineCommand::AddUpstream { upstream, netns_cookie, sources, kind: UpstreamKind::Opener },
            &borrowed,
        )
        .unwrap();
    drop((opener, descriptors));
    let target_port = NonZeroU16::new(inside.port).unwrap();
    let listens = |event: &Event| match event {
        Event::Listeners { opened, .. } => opened.iter().any(|seen| seen.port == target_port),
        _ => false,
    };
    event(&driver, listens);
    let host_port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (forward, host_port) = (ForwardId(1), NonZeroU16::new(host_port).unwrap());
    let reach = Reach { v4: true, v6: false };
    let open = EngineCommand::OpenListener { forward, upstream, host_port, target_port, reach };
    driver.send(&open, &[]).unwrap();
    event(&driver, |event| matches!(event, Event::ListenerOpened { .. }));
    let ask = || {
        let mut said = String::new();
        TcpStream::connect(Family::V4.loopback(host_port)).unwrap().read_to_string(&mut said).unwrap();
        said
    };
    assert_eq!(ask(), "inside");
    drop(driver);
    assert_eq!(ask(), "inside");
    let (driver, _) = drive(&path);
    driver.send(&EngineCommand::Describe, &[]).unwrap();
    // Nothing else happens, so the answer is the only event.
    let Event::Observed { upstream: observed, listening, more: false } = event(&driver, |_| true) else {
        panic!("the listeners come first");
    };
    assert_eq!(observed, upstream);
    assert_eq!(listening.iter().map(|seen| seen.port).collect::<Vec<_>>(), [target_port]);
    let Event::State { upstreams, forwards, more: false } = event(&driver, |_| true) else {
        panic!("the state follows");
    };
    assert_eq!(upstreams, [UpstreamState { upstream, netns_cookie }]);
    assert_eq!(forwards[0].stats.accepted, 2);
    driver.send(&EngineCommand::Stop, &[]).unwrap();
    event(&driver, |event| *event == Event::Stopped);
    assert!(engine.0.wait().unwrap().success());
}

fn unread_answers() {
    let inside = Inside::new();
    let mut opener = enter(inside.pid()).unwrap();
    let (_, descriptors) = opener.upstream(2).unwrap();
    let mut asked = 0;
    let pause = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
    // The opener stops reading when it has no room for its answers; only then does the channel stay full.
    while poll(&mut [PollFd::new(&descriptors[0], PollFlags::OUT)], Some(&pause)).unwrap() == 1 {
        while ask(descriptors[0].as_fd(), Family::V4, 1, None).is_ok() {
            asked += 1;
        }
        assert!(asked < 10_000, "the opener continues although its answers are not read");
    }
    assert_eq!(sockets(&descriptors[1], Family::V4, 1, opener.netns_cookie()).unwrap().len(), 1);
    for _ in 0..asked {
        readable(&descriptors[0]);
        let taken = take(descriptors[0].as_fd(), Family::V4, 1, opener.netns_cookie()).unwrap();
        assert_eq!(taken.map(|sockets| sockets.len()), Some(1));
    }
    assert!(take(descriptors[0].as_fd(), Family::V4, 1, opener.netns_cookie()).unwrap().is_none());
}

fn nonsense() {
    let inside = Inside::new();
    let mut opener = enter(inside.pid()).unwrap();
    let channel = Channel::try_from(channel_of(&mut opener)).unwrap();
    let patience = Duration::from_secs(10);
    for request in [
        serde_json::json!("let me in"),
        serde_json::json!({"request": "enter", "target": "path"}),
        serde_json::json!({"request": "sockets", "family": "v5", "count": 1}),
        serde_json::json!({"request": "sockets", "family": "v4", "count": 0}),
        serde_json::json!("long".repeat(2000)),
    ] {
        channel.send(&request, &[inside.child.stdin.as_ref().unwrap().as_fd()]).unwrap();
        let (answer, descriptors) = channel.recv_timeout::<Answer>(patience).unwrap().unwrap();
        assert!(matches!(answer, Answer::Failed { .. }) && descriptors.is_empty(), "{request}: {answer:?}");
    }
    channel.send(&Request::SockDiag, &[]).unwrap();
    assert_eq!(channel.recv_timeout::<Answer>(patience).unwrap().unwrap().0, Answer::SockDiag);
}

fn started_by_hand() {
    let status = Command::new(this()).arg(VERB).stdin(Stdio::null()).status().unwrap();
    assert_eq!(status.code(), Some(1));
    // The starting process sends no request.
    let (ours, theirs) = Channel::pair().unwrap();
    let mut child = Command::new(this()).arg(VERB).stdin(OwnedFd::from(theirs)).spawn().unwrap();
    drop(ours);
    assert_eq!(child.wait().unwrap().code(), Some(1));
    // The starting process sends a request other than Enter.
    let (ours, theirs) = Channel::pair().unwrap();
    let mut child = Command::new(this()).arg(VERB).stdin(OwnedFd::from(theirs)).spawn().unwrap();
    ours.send(&Request::ProcNet, &[]).unwrap();
    let (answer, descriptors) = ours.recv_timeout::<Answer>(Duration::from_secs(10)).unwrap().unwrap();
    assert!(matches!(answer, Answer::Failed { .. }) && descriptors.is_empty(), "{answer:?}");
    assert_eq!(child.wait().unwrap().code(), Some(1));
}

fn no_privilege() {
    let inside = Inside::new();
    let mut opener = enter(inside.pid()).unwrap();
    let channel = channel_of(&mut opener);
    let status = format!("/proc/{}/status", process_of(&channel).as_raw_nonzero());
    let status = std::fs::read_to_string(status).unwrap();
    for line in ["CapPrm:\t0000000000000000", "CapEff:\t0000000000000000", "CapInh:\t0000000000000000"] {
        assert!(status.contains(line), "{line} is not in\n{status}");
    }
    assert!(status.contains("NoNewPrivs:\t1") && status.contains("Threads:\t1"), "{status}");
}

fn exhausted() {
    let inside = Inside::new();
    let mut opener = enter(inside.pid()).unwrap();
    let channel = channel_of(&mut opener);
    let before = std::fs::read_dir("/proc/self/fd").unwrap().count();
    let limits = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let few = rustix::process::Rlimit { current: Some(before as u64 + 20), maximum: limits.maximum };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, few).unwrap();
    let short = sockets(&channel, Family::V4, 200, opener.netns_cookie());
    rustix::process::setrlimit(rustix::process::Resource::Nofile, limits).unwrap();
    assert!(matches!(short, Err(StockError::Exhausted(_))), "{short:?}");
    assert_eq!(std::fs::read_dir("/proc/self/fd").unwrap().count(), before);
    assert_eq!(sockets(&channel, Family::V4, 200, opener.netns_cookie()).unwrap().len(), 200);
}

fn by_file() {
    let name = format!("landfall-test-{}", std::process::id());
    assert!(Command::new("ip").args(["netns", "add", &name]).status().unwrap().success());
    let inside = Inside::run(Command::new("ip").args(["netns", "exec", &name]), "127.0.0.1:0");
    let target = Target::path(&Path::new("/run/netns").join(&name)).unwrap();
    let entered = Opener::spawn(&this(), target);
    assert!(Command::new("ip").args(["netns", "delete", &name]).status().unwrap().success());
    let mut opener = entered.unwrap();
    let channel = channel_of(&mut opener);
    let socket = sockets(&channel, Family::V4, 1, opener.netns_cookie()).unwrap().remove(0);
    assert_eq!(dial(socket, ([127, 0, 0, 1], inside.port).into()), "inside");
    // Root enters by process without a user namespace, too.
    let by_process = enter(inside.pid()).unwrap();
    assert_eq!(by_process.netns_cookie(), opener.netns_cookie());
}

/// Runs the client as `nobody` against a namespace of root's.
fn anothers_namespace() {
    let inside = Inside::run(Command::new("unshare").arg("-n"), "127.0.0.1:0");
    let output = Command::new("setpriv")
        .args(NOBODY)
        .arg(this())
        .args(["_client", &inside.pid().to_string()])
        .stdin(OwnedFd::from(Channel::pair().unwrap().0))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("belongs to another user; enter it as that user, or as root"), "{said}");
}
