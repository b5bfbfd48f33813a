//! Properties of native sockets, and servers that are relayed instead.

use std::net::TcpListener;
use std::process::Command;

use landfall_engine::native::{Conflict, NativeEvent, RelayReason};

use crate::sandbox::{Sandbox, fetch, refuses, spawn, until};

pub(crate) fn answers() {
    let sandbox = Sandbox::new();
    sandbox.serve("tcp4", "0.0.0.0:3000", "hello");
    let listener = sandbox.opened();
    assert_eq!(listener.address.address.to_string(), "127.0.0.1:3000");
    assert_eq!(listener.process, sandbox.child.id());
    assert_eq!(fetch("127.0.0.1:3000"), "hello");
    // Through the stub, on each address of the server's own socket inside.
    assert_eq!(sandbox.ask("connect 127.0.0.1:3000"), "hello");
    assert_eq!(sandbox.ask("connect 127.0.0.2:3000"), "hello");
    assert_eq!(fetch("127.0.0.1:3000"), "hello");
    assert!(refuses("[::1]:3000"));
}

pub(crate) fn addresses() {
    let sandbox = Sandbox::new();
    let each = |kind: &str, v6_only: Option<&str>, inside: &str, answer: &[&str], refuse: &[&str]| {
        let socket = sandbox.ask(kind);
        if let Some(only) = v6_only {
            sandbox.expect_ok(&format!("v6only {socket} {only}"));
        }
        sandbox.expect_ok(&format!("bind {socket} {inside}"));
        sandbox.expect_ok(&format!("listen {socket} 16"));
        sandbox.expect_ok(&format!("serve {socket} at"));
        let listener = sandbox.opened();
        for address in answer {
            assert_eq!(fetch(address), "at", "{inside} at {address}");
        }
        for address in refuse {
            assert!(refuses(address), "{inside} at {address}");
        }
        listener.address.address.to_string()
    };
    let one = each("tcp4", None, "127.0.0.1:3001", &["127.0.0.1:3001"], &["[::1]:3001", "127.0.0.2:3001"]);
    assert_eq!(one, "127.0.0.1:3001");
    let other = each("tcp4", None, "127.4.5.6:3002", &["127.4.5.6:3002"], &["127.0.0.1:3002"]);
    assert_eq!(other, "127.4.5.6:3002");
    let v6 = each("tcp6", Some("yes"), "[::]:3003", &["[::1]:3003"], &["127.0.0.1:3003"]);
    assert_eq!(v6, "[::1]:3003");
    let both = ["[::1]:3004", "127.0.0.1:3004", "127.0.0.2:3004"];
    assert_eq!(each("tcp6", Some("no"), "[::]:3004", &both, &[]), "[::]:3004");
    assert_eq!(each("tcp6", None, "[::1]:3005", &["[::1]:3005"], &["127.0.0.1:3005"]), "[::1]:3005");
    let mapped = each("tcp6", Some("no"), "[::ffff:127.0.0.1]:3006", &["127.0.0.1:3006"], &["[::1]:3006"]);
    assert_eq!(mapped, "[::ffff:127.0.0.1]:3006");
    let mptcp = each("mptcp4", None, "127.0.0.1:3007", &["127.0.0.1:3007"], &[]);
    assert_eq!(mptcp, "127.0.0.1:3007");
    // The sandbox's kernel chooses the port.
    let socket = sandbox.listen("tcp4", "127.0.0.1:0");
    sandbox.expect_ok(&format!("serve {socket} any"));
    assert_eq!(fetch(&sandbox.opened().address.address.to_string()), "any");
}

pub(crate) fn options() {
    let sandbox = Sandbox::new();
    let socket = sandbox.ask("tcp4");
    sandbox.expect_ok(&format!("keepidle {socket} 77"));
    let before = sandbox.ask(&format!("options {socket}"));
    assert!(before.starts_with("true 77 "), "{before}");
    sandbox.expect_ok(&format!("bind {socket} 127.0.0.1:3000"));
    sandbox.expect_ok(&format!("listen {socket} 16"));
    sandbox.opened();
    assert_eq!(sandbox.ask(&format!("options {socket}")), before);
    assert_ne!(sandbox.ask(&format!("cookie {socket}")), sandbox.cookie.to_string(), "it is the host's");
}

pub(crate) fn flags() {
    let sandbox = Sandbox::new();
    let mut port = 3000;
    for blocking in ["no", "yes"] {
        for cloexec in ["no", "yes"] {
            let socket = sandbox.ask("tcp4");
            sandbox.expect_ok(&format!("nonblocking {socket} {blocking}"));
            sandbox.expect_ok(&format!("cloexec {socket} {cloexec}"));
            let before = sandbox.ask(&format!("flags {socket}"));
            sandbox.expect_ok(&format!("bind {socket} 127.0.0.1:{port}"));
            sandbox.expect_ok(&format!("listen {socket} 16"));
            sandbox.opened();
            assert_eq!(sandbox.ask(&format!("flags {socket}")), before);
            port += 1;
        }
    }
}

pub(crate) fn duplicates() {
    let sandbox = Sandbox::new();
    let socket = sandbox.ask("tcp4");
    sandbox.expect_ok(&format!("bind {socket} 127.0.0.1:3000"));
    let duplicate = sandbox.ask(&format!("dup {socket}"));
    sandbox.expect_ok(&format!("listen {socket} 16"));
    sandbox.opened();
    sandbox.expect_ok(&format!("close {socket}"));
    sandbox.expect_ok(&format!("serve {duplicate} duplicate"));
    assert_eq!(fetch("127.0.0.1:3000"), "duplicate");
    assert_eq!(sandbox.ask("connect 127.0.0.1:3000"), "duplicate");
    // The last descriptor ends it, not the first; the thread that serves has one.
    sandbox.expect_ok(&format!("close {duplicate}"));
    assert_eq!(fetch("127.0.0.1:3000"), "duplicate");
}

/// Receives the next event, which must report a relayed port.
#[track_caller]
fn relayed(sandbox: &Sandbox, reason: RelayReason) {
    match sandbox.event() {
        NativeEvent::Relayed { reason: actual, .. } => assert_eq!(actual, reason),
        other => panic!("{other:?}"),
    }
}

pub(crate) fn epoll() {
    let sandbox = Sandbox::new();
    let socket = sandbox.ask("tcp4");
    sandbox.expect_ok(&format!("bind {socket} 127.0.0.1:3000"));
    sandbox.expect_ok(&format!("epoll {socket}"));
    sandbox.expect_ok(&format!("listen {socket} 16"));
    relayed(&sandbox, RelayReason::Epoll);
    sandbox.expect_ok(&format!("serve {socket} inside"));
    assert_eq!(sandbox.ask("connect 127.0.0.1:3000"), "inside");
    assert!(refuses("127.0.0.1:3000"));
    // The epoll instance does not watch another socket of the same process.
    sandbox.serve("tcp4", "127.0.0.1:3001", "native");
    sandbox.opened();
    assert_eq!(fetch("127.0.0.1:3001"), "native");
}

pub(crate) fn others() {
    let sandbox = Sandbox::new();
    let unix = sandbox.ask("unix");
    sandbox.expect_ok(&format!("bind {unix} @name"));
    sandbox.expect_ok(&format!("listen {unix} 16"));
    // Unbound: the kernel chooses a port at listen.
    let unbound = sandbox.ask("tcp4");
    sandbox.expect_ok(&format!("listen {unbound} 16"));
    assert_eq!(sandbox.ask(&format!("cookie {unbound}")), sandbox.cookie.to_string());
    // The kernel returns the errors.
    let twice = sandbox.ask("tcp4");
    sandbox.expect_ok(&format!("bind {twice} 127.0.0.1:3000"));
    assert_eq!(sandbox.ask(&format!("bind {twice} 127.0.0.1:3000")), "EINVAL");
    sandbox.expect_ok(&format!("listen {twice} 16"));
    let listener = sandbox.opened();
    // A host socket on which `listen` is called again, with another backlog, is not replaced.
    sandbox.expect_ok(&format!("listen {twice} 64"));
    let clash = sandbox.ask("tcp4");
    assert_eq!(sandbox.ask(&format!("bind {clash} 127.0.0.1:3000")), "EADDRINUSE");
    sandbox.expect_ok(&format!("close {twice}"));
    sandbox.closed(&listener);
    assert!(sandbox.events.try_recv().is_err(), "nothing was reported of the other sockets");
}

pub(crate) fn denied() {
    let sandbox = Sandbox::with(&[3000], Conflict::Fail);
    sandbox.serve("tcp4", "127.0.0.1:3000", "inside");
    relayed(&sandbox, RelayReason::Denied);
    assert!(refuses("127.0.0.1:3000"));
    assert_eq!(sandbox.ask("connect 127.0.0.1:3000"), "inside");
}

pub(crate) fn restarts() {
    let sandbox = Sandbox::new();
    for round in 0..20 {
        let socket = sandbox.listen("tcp4", "127.0.0.1:3000");
        let listener = sandbox.opened();
        if round % 2 == 0 {
            // The stub has a relay by now, which must release it, too.
            assert!(!refuses("127.0.0.1:3000"));
            sandbox.expect_ok("relayed-client 127.0.0.1:3000");
        }
        sandbox.expect_ok(&format!("close {socket}"));
        // The port is free for another socket of the sandbox at once, and for the host.
        let again = sandbox.ask("tcp4");
        sandbox.expect_ok(&format!("bind {again} 127.0.0.1:3000"));
        assert!(refuses("127.0.0.1:3000"));
        TcpListener::bind("127.0.0.1:3000").unwrap();
        sandbox.closed(&listener);
        sandbox.expect_ok(&format!("close {again}"));
    }
}

pub(crate) fn killed() {
    let mut sandbox = Sandbox::new();
    sandbox.serve("tcp4", "127.0.0.1:3000", "hello");
    let listener = sandbox.opened();
    assert_eq!(sandbox.ask("connect 127.0.0.1:3000"), "hello");
    sandbox.kill();
    assert!(refuses("127.0.0.1:3000"));
    sandbox.closed(&listener);
    assert_eq!(sandbox.event(), NativeEvent::Ended);
}

pub(crate) fn conflict() {
    let foreign = TcpListener::bind("127.0.0.1:3000").unwrap();
    let sandbox = Sandbox::with(&[], Conflict::Fail);
    let socket = sandbox.ask("tcp4");
    sandbox.expect_ok(&format!("bind {socket} 0.0.0.0:3000"));
    assert_eq!(sandbox.ask(&format!("listen {socket} 16")), "EADDRINUSE");
    assert_eq!(sandbox.asked.lock().unwrap().len(), 1);
    let inode = rustix::fs::fstat(&foreign).unwrap().st_ino;
    assert_eq!(sandbox.asked.lock().unwrap()[0], (3000, vec![inode]));
    // The socket is unchanged: the server can try again when the port is free.
    drop(foreign);
    sandbox.expect_ok(&format!("listen {socket} 16"));
    sandbox.opened();

    let foreign = TcpListener::bind("127.0.0.1:3001").unwrap();
    let sandbox = Sandbox::with(&[], Conflict::Relay);
    sandbox.serve("tcp4", "0.0.0.0:3001", "inside");
    relayed(&sandbox, RelayReason::Taken);
    assert_eq!(sandbox.ask("connect 127.0.0.1:3001"), "inside");
    drop(foreign);
}

/// The kernel shares a port among sockets of one user that all have SO_REUSEPORT, silently.
pub(crate) fn never_shared() {
    let (one, two) = (Sandbox::new(), Sandbox::new());
    let prepare = |sandbox: &Sandbox, kind: &str, at: &str| {
        let socket = sandbox.ask(kind);
        sandbox.expect_ok(&format!("reuseport {socket}"));
        sandbox.expect_ok(&format!("bind {socket} {at}"));
        socket
    };
    for (kind, at) in [("tcp4", "0.0.0.0:3000"), ("tcp4", "127.0.0.1:3001"), ("tcp6", "[::]:3002")] {
        let (first, second) = (prepare(&one, kind, at), prepare(&two, kind, at));
        one.expect_ok(&format!("listen {first} 16"));
        let listener = one.opened();
        assert_eq!(two.ask(&format!("listen {second} 16")), "EADDRINUSE", "{at}");
        assert_eq!(*two.asked.lock().unwrap().last().unwrap(), (listener.port(), vec![listener.inode]));
        // Also if the first sandbox has several sockets on the port.
        let third = prepare(&one, kind, at);
        one.expect_ok(&format!("listen {third} 16"));
        one.opened();
        assert_eq!(two.ask(&format!("listen {second} 16")), "EADDRINUSE", "{at}");
    }
    // If both listen at the same time, one of them gets the port.
    for port in 3100..3150 {
        let at = format!("127.0.0.1:{port}");
        let (first, second) = (prepare(&one, "tcp4", &at), prepare(&two, "tcp4", &at));
        one.request(&format!("listen {first} 16"));
        two.request(&format!("listen {second} 16"));
        let (first, second) = (one.answer(), two.answer());
        assert!(
            [(first.as_str(), second.as_str()), (second.as_str(), first.as_str())]
                .contains(&("ok", "EADDRINUSE")),
            "{at}: {first}, {second}"
        );
    }
}

pub(crate) fn shared_by_workers() {
    let sandbox = Sandbox::new();
    let names = ["one", "two", "three"];
    for name in names {
        let socket = sandbox.ask("tcp4");
        sandbox.expect_ok(&format!("reuseport {socket}"));
        sandbox.expect_ok(&format!("bind {socket} 0.0.0.0:3000"));
        sandbox.expect_ok(&format!("listen {socket} 16"));
        sandbox.opened();
        sandbox.expect_ok(&format!("serve {socket} {name}"));
    }
    let mut seen = std::collections::BTreeSet::new();
    until("an answer of each worker", || {
        seen.insert(fetch("127.0.0.1:3000"));
        seen.len() == names.len()
    });
    assert!(names.contains(&sandbox.ask("connect 127.0.0.1:3000").as_str()));
}

/// A parent binds, and its children listen: `uvicorn --workers`, node's cluster with shared handles.
pub(crate) fn parent_binds() {
    let sandbox = Sandbox::new();
    let socket = sandbox.ask("tcp4");
    sandbox.expect_ok(&format!("bind {socket} 127.0.0.1:3000"));
    let first = sandbox.ask(&format!("child {socket}"));
    sandbox.expect_ok(&format!("ask {first} listen"));
    let listener = sandbox.opened();
    sandbox.expect_ok(&format!("ask {first} serve"));
    assert_eq!(fetch("127.0.0.1:3000"), "child");
    // Between two children, the parent keeps the port open, as it does on the host: a client waits in the queue.
    let replace = |old: String| {
        sandbox.expect_ok(&format!("reap {old}"));
        let waiting = std::thread::spawn(|| fetch("127.0.0.1:3000"));
        let new = sandbox.ask(&format!("child {socket}"));
        sandbox.expect_ok(&format!("ask {new} listen"));
        sandbox.expect_ok(&format!("ask {new} serve"));
        assert_eq!(waiting.join().unwrap(), "child");
        new
    };
    let second = replace(first);
    // Two children at the same time share the host's socket.
    let third = sandbox.ask(&format!("child {socket}"));
    sandbox.expect_ok(&format!("ask {third} listen"));
    sandbox.expect_ok(&format!("reap {second}"));
    sandbox.expect_ok(&format!("ask {third} serve"));
    assert_eq!(fetch("127.0.0.1:3000"), "child");
    let last = replace(third);
    assert_eq!(sandbox.ask("connect 127.0.0.1:3000"), "child");
    assert!(sandbox.events.try_recv().is_err(), "all of it is one listener");
    // Without the parent's socket, the end of the last child closes the port.
    sandbox.expect_ok(&format!("close {socket}"));
    sandbox.expect_ok(&format!("reap {last}"));
    until("the end of the port", || refuses("127.0.0.1:3000"));
    sandbox.closed(&listener);
}

pub(crate) fn child_holds() {
    let sandbox = Sandbox::new();
    let socket = sandbox.ask("tcp4");
    sandbox.expect_ok(&format!("bind {socket} 127.0.0.1:3000"));
    let child = sandbox.ask(&format!("child {socket}"));
    sandbox.expect_ok(&format!("listen {socket} 16"));
    relayed(&sandbox, RelayReason::Child);
    sandbox.expect_ok(&format!("ask {child} serve"));
    assert_eq!(sandbox.ask("connect 127.0.0.1:3000"), "child");
}

/// A neighbour on the host's network reaches none of its native sockets, on any address.
pub(crate) fn other_host() {
    let sandbox = Sandbox::new();
    sandbox.serve("tcp4", "0.0.0.0:3000", "secret");
    sandbox.serve("tcp6", "[::]:3001", "secret");
    let only = sandbox.ask("tcp6");
    sandbox.expect_ok(&format!("v6only {only} yes"));
    sandbox.expect_ok(&format!("bind {only} [::]:3002"));
    sandbox.expect_ok(&format!("listen {only} 16"));
    sandbox.expect_ok(&format!("serve {only} secret"));
    for _ in 0..3 {
        sandbox.opened();
    }
    let neighbour = Sandbox::new();
    let pid = neighbour.child.id().to_string();
    let ip = |arguments: &str| {
        let words: Vec<&str> = arguments.split(' ').collect();
        assert!(Command::new("ip").args(&words).status().unwrap().success(), "ip {arguments}");
    };
    ip(&format!("link add ours type veth peer name theirs netns {pid}"));
    ip("addr add 10.9.0.1/24 dev ours");
    ip("addr add fd09::1/64 dev ours nodad");
    ip("link set ours up");
    for words in
        ["addr add 10.9.0.2/24 dev theirs", "addr add fd09::2/64 dev theirs nodad", "link set theirs up"]
    {
        neighbour.expect_ok(&format!("ip {words}"));
    }
    // An attacker's route that sends the neighbour's own loopback addresses over the wire.
    neighbour.expect_ok("martians theirs 10.9.0.1");
    let control = TcpListener::bind("10.9.0.1:4000").unwrap();
    assert_eq!(neighbour.ask("reach 10.9.0.1:4000"), "connected", "the wire works");
    drop(control);
    for port in [3000, 3001, 3002] {
        for address in [format!("10.9.0.1:{port}"), format!("[fd09::1]:{port}"), format!("127.0.0.5:{port}")]
        {
            let before = received("ours");
            let outcome = neighbour.ask(&format!("reach {address}"));
            assert!(received("ours") > before, "{address}: no packet came over the wire");
            // The kernel drops a packet from outside to a loopback address, and answers the others with a reset.
            let expected = if address.starts_with("127.") { "TimedOut" } else { "ConnectionRefused" };
            assert_eq!(outcome, expected, "{address}");
            if expected == "ConnectionRefused" {
                assert!(refuses(&address), "{address} answers on the host itself");
            }
        }
    }
    for address in ["127.0.0.1:3000", "127.0.0.1:3001", "[::1]:3002"] {
        assert_eq!(fetch(address), "secret");
    }
    ip("link del ours");
}

/// Returns the number of packets that a device of the host has received.
fn received(device: &str) -> u64 {
    let table = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let row = table.lines().find_map(|line| line.trim().strip_prefix(device)?.strip_prefix(':'));
    row.unwrap().split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// A sandbox in a sandbox: the inner one gets no filter of its own.
pub(crate) fn nested() {
    let (mut child, channel) =
        spawn(Command::new(std::env::current_exe().unwrap()).args(["_inside", "twice"]));
    let (message, descriptors) = channel.recv::<String>().unwrap().unwrap();
    assert_eq!(message, "another program supervises the system calls of this process already");
    assert!(descriptors.is_empty());
    child.kill().unwrap();
    child.wait().unwrap();
}

/// A filter that denies `seccomp(2)` is active, as in some containers.
pub(crate) fn forbidden() {
    let (mut child, channel) =
        spawn(Command::new(std::env::current_exe().unwrap()).args(["_inside", "denied"]));
    let (message, descriptors) = channel.recv::<String>().unwrap().unwrap();
    assert_eq!(message, "seccomp filters are not permitted here");
    assert!(descriptors.is_empty());
    child.kill().unwrap();
    child.wait().unwrap();
}
