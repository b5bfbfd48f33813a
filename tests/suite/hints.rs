//! Claim 14: a new listener is usable at once, with the kernel's hints and without, and no tracing instance is left behind.
//!
//! Each case mounts or hides tracefs in its own mount namespace; the instances in it belong to the whole machine.

use std::fs;
use std::net::{Ipv4Addr, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use landfall_engine::watch::hint::Hints;
use landfall_tests::case::Case;
use landfall_tests::latency::{from_listen_to_first_byte, percentiles};
use landfall_tests::process::{kill, private_mounts};
use landfall_tests::{Home, Namespace, Server, TIMEOUT, is_long, note, rpc, wait_until};

use crate::crash::{by_file, describe, engine_pid};

pub(crate) const CASES: &[Case] = &[
    Case::once("c14_a_listener_in_another_namespace_causes_a_hint", causes_hint),
    Case::once("c14_connections_cause_no_hints", connections),
    Case::once("c14_a_new_listener_is_usable_at_once", usable_at_once),
    Case::once("c14_no_tracing_instance_outlives_an_engine", instance_is_removed),
];

/// A port that no other case uses.
const QUIET: u16 = 3917;

const TRACING: &str = "/sys/kernel/tracing";

/// Hides tracefs from this case.
fn hide_tracing() {
    private_mounts();
    for place in [TRACING, "/sys/kernel/debug"] {
        mount(&["-t", "tmpfs", "none", place]);
    }
}

/// Mounts tracefs, whether it was hidden or not.
fn show_tracing() {
    mount(&["-t", "tracefs", "none", TRACING]);
}

fn mount(arguments: &[&str]) {
    assert!(Command::new("mount").args(arguments).status().unwrap().success(), "mount {arguments:?}");
}

/// Returns whether this process can mount and trace: only root of the whole machine can, not root of a user namespace, in
/// which cases run without root.
fn may_trace() -> bool {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap();
    let may = map.split_whitespace().eq(["0", "0", "4294967295"]);
    if !may {
        note!("tracing takes root");
    }
    may
}

fn causes_hint() {
    if !may_trace() {
        return;
    }
    hide_tracing();
    assert!(Hints::open().is_err(), "no hints are available from");
    show_tracing();
    let hints = Hints::open().unwrap();
    let (stop, running) = std::io::pipe().unwrap();
    let (looks, looked) = mpsc::channel();
    let thread = std::thread::spawn(move || hints.follow(stop, || looks.send(()).unwrap()));
    let inside = Namespace::new();
    for port in 3000..3010 {
        // Other cases cause hints, too.
        looked.try_iter().for_each(drop);
        let server = Server::listen(&inside, &format!("127.0.0.1:{port}"));
        looked.recv_timeout(TIMEOUT).expect("it listens");
        looked.try_iter().for_each(drop);
        drop(server);
        looked.recv_timeout(TIMEOUT).expect("it listens no more");
    }
    drop(running);
    thread.join().unwrap();
}

fn connections() {
    if !may_trace() {
        return;
    }
    hide_tracing();
    show_tracing();
    let _hints = Hints::open().unwrap();
    let inside = Namespace::new();
    let server = Server::listen(&inside, &format!("127.0.0.1:{QUIET}"));
    let clients: Vec<_> =
        inside.run(|| (0..3).map(|_| TcpStream::connect((Ipv4Addr::LOCALHOST, QUIET)).unwrap()).collect());
    for _ in &clients {
        server.accept();
    }
    drop((clients, server));
    // The trace is not consumed: it contains every event that fit into the buffer.
    let reported = fs::read_to_string(instance(std::process::id()).join("trace")).unwrap();
    let ours: Vec<&str> = reported.lines().filter(|line| line.contains(&format!("sport={QUIET} "))).collect();
    assert!(
        ours.last().is_some_and(|last| last.contains("oldstate=TCP_LISTEN newstate=TCP_CLOSE")),
        "{reported}"
    );
    let is_hint = |line: &&&str| {
        ["newstate=TCP_LISTEN", "newstate=TCP_CLOSE"].iter().any(|end| line.trim_end().ends_with(end))
    };
    assert_eq!(ours.iter().filter(is_hint).count(), ours.len(), "{ours:?}");
}

/// Reported without a limit, because other processes share the machine.
fn usable_at_once() {
    if !may_trace() {
        return;
    }
    hide_tracing();
    for hints in [false, true] {
        if hints {
            show_tracing();
        }
        let home = Home::new();
        let daemon = home.daemon();
        let inside = Namespace::new();
        rpc::register_with(&home, "a", &by_file(&inside));
        let pid = wait_for_engine(&home, None);
        if hints {
            wait_for_instance(pid);
        }
        let rounds = if is_long() { 500 } else { 50 };
        let with = if hints { "with" } else { "without" };
        for (first, rest) in [(4000, Duration::ZERO), (5000, Duration::from_millis(25))] {
            let times = from_listen_to_first_byte(&inside, first..first + rounds, rest);
            let times = percentiles(times);
            note!("from listen() to the first byte {with} hints, {} ms apart: {times}", rest.as_millis());
        }
        daemon.shut_down();
    }
}

fn instance_is_removed() {
    if !may_trace() {
        return;
    }
    hide_tracing();
    show_tracing();
    let home = Home::new();
    let daemon = home.daemon();
    let inside = Namespace::new();
    rpc::register_with(&home, "a", &by_file(&inside));
    let first = wait_for_engine(&home, None);
    wait_for_instance(first);
    // The next engine removes the instance of a killed one.
    kill(first);
    let second = wait_for_engine(&home, Some(first));
    wait_for_instance(second);
    assert!(!instance(first).exists(), "that of the killed engine is left");
    rpc::done(&home, &serde_json::json!({"kind": "shutdown", "engine": "drain"}));
    assert!(daemon.end().success());
    wait_until("the engine's own to be removed", || match instance(second).exists() {
        true => Err("it is there"),
        false => Ok(()),
    });
}

fn instance(pid: u32) -> PathBuf {
    PathBuf::from(format!("{TRACING}/instances/landfall-{pid}-0"))
}

/// Waits until an engine has made its tracing instance.
fn wait_for_instance(pid: u32) {
    let enabled = instance(pid).join("events/sock/inet_sock_set_state/enable");
    wait_until("the event to be enabled", || match fs::read_to_string(&enabled) {
        Ok(text) if text.trim() == "1" => Ok(()),
        other => Err(format!("{other:?}")),
    });
}

/// Waits for an engine other than `before`.
fn wait_for_engine(home: &Home, before: Option<u32>) -> u32 {
    wait_until("an engine", || {
        let description = describe(home);
        match description["engine"]["pid"].is_u64().then(|| engine_pid(&description)) {
            Some(pid) if Some(pid) != before => Ok(pid),
            _ => Err(description),
        }
    })
}
