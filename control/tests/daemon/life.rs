//! Start and stop (wire specification, A.7.8 and A.7.9).

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::support::{Daemon, post, wait_until};

fn kinds(log: &[Value]) -> Vec<&str> {
    log.iter().filter_map(|event| event["kind"].as_str()).collect()
}

fn signal(daemon: &Daemon, signal: Signal) {
    kill_process(Pid::from_child(&daemon.child), signal).unwrap();
}

#[test]
fn shutdown_is_answered_and_removes_the_socket_last() {
    let home = tempfile::tempdir().unwrap();
    let mut daemon = Daemon::start(home.path(), &["--http-port", "0"]);
    let port = daemon.http_port();
    let scheduled = json!({"ok": true, "result": {"scheduled": true}});
    assert_eq!(daemon.ask(&json!({"kind": "shutdown"})), scheduled);
    wait_until("the removal of the socket", || !daemon.socket().exists());
    assert!(
        TcpListener::bind(("127.0.0.1", port)).is_ok(),
        "the port is free before the socket file is removed"
    );
    assert!(daemon.wait().success());
    assert!(!home.path().join("run/hostd.pid").exists());
    assert_eq!(
        kinds(&daemon.log()),
        ["daemon-http-listening", "daemon-listening", "shutdown-requested", "daemon-stopping"]
    );
}

#[test]
fn both_signals_stop_in_order_and_a_second_one_has_no_effect() {
    for first in [Signal::TERM, Signal::INT] {
        let home = tempfile::tempdir().unwrap();
        let mut daemon = Daemon::start(home.path(), &["--http-port", "0"]);
        signal(&daemon, first);
        signal(&daemon, Signal::TERM);
        assert!(daemon.wait().success());
        assert!(!daemon.socket().exists());
        assert_eq!(kinds(&daemon.log()).last(), Some(&"daemon-stopping"));
    }
}

#[test]
fn open_connections_do_not_delay_the_stop() {
    let home = tempfile::tempdir().unwrap();
    let mut daemon = Daemon::start(home.path(), &["--http-port", "0"]);
    let mut listening = daemon.connect();
    listening.write_all(b"{\"kind\":\"events\"}\n").unwrap();
    let silent = daemon.connect();
    let mut idle = TcpStream::connect(("127.0.0.1", daemon.http_port())).unwrap();
    idle.write_all(b"POST /rpc").unwrap();
    let started = std::time::Instant::now();
    assert_eq!(daemon.ask(&json!({"kind": "shutdown"}))["ok"], true);
    assert!(daemon.wait().success());
    assert!(started.elapsed().as_millis() < 1_900, "{:?}", started.elapsed());
    let mut rest = String::new();
    listening.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("daemon-stopping"), "{rest}");
    drop((silent, idle));
}

#[test]
fn a_second_daemon_of_a_home_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let first = Daemon::start(home.path(), &["--http-port", "0"]);
    let mut second = Daemon::spawn(home.path(), &["--http-port", "0"]);
    assert_eq!(second.wait().code(), Some(125));
    let mut stderr = String::new();
    second.child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    let expected = format!(
        "error: another typeclaw host daemon is already listening at {}\nhint: ",
        first.socket().display()
    );
    assert!(stderr.starts_with(&expected), "{stderr}");
    first.ask(&json!({"kind": "list"}));
}

#[test]
fn of_many_daemons_started_at_once_one_stays() {
    let home = tempfile::tempdir().unwrap();
    let mut all: Vec<Daemon> = (0..12).map(|_| Daemon::spawn(home.path(), &["--http-port", "0"])).collect();
    wait_until("the end of all but one", || {
        all.retain_mut(|daemon| daemon.child.try_wait().unwrap().is_none());
        all.len() == 1
    });
    let one = &all[0];
    assert_eq!(one.ask(&json!({"kind": "describe"}))["result"]["pid"], one.child.id());
}

#[test]
fn a_daemon_after_a_killed_one_restores_its_registrations() {
    let home = tempfile::tempdir().unwrap();
    let mut first = Daemon::start(home.path(), &["--http-port", "0"]);
    first.register("coder", "token");
    first.child.kill().unwrap();
    first.child.wait().unwrap();
    assert!(first.socket().exists());
    let second = Daemon::spawn(home.path(), &["--http-port", "0"]);
    wait_until("an answer of the second daemon", || {
        std::os::unix::net::UnixStream::connect(second.socket()).is_ok()
    });
    let status = second.ask(&json!({"kind": "status", "containerName": "coder"}));
    assert_eq!(status["result"]["cwd"], "/somewhere");
    let restart = "{\"kind\":\"restart\",\"containerName\":\"coder\"}";
    assert_eq!(post(second.http_port(), "Authorization: Bearer token\r\n", restart).0, 200);
}

#[test]
fn a_port_in_use_is_reported_and_another_one_used() {
    let taken = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let preferred = taken.local_addr().unwrap().port();
    let home = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(home.path(), &["--http-port", &preferred.to_string()]);
    let actual = daemon.http_port();
    assert_ne!(actual, preferred);
    let log = daemon.log();
    assert_eq!(log[0]["kind"], "daemon-http-port-fallback");
    assert_eq!((&log[0]["preferred"], &log[0]["actual"]), (&preferred.into(), &actual.into()));
    drop(daemon);
    let next = Daemon::start(home.path(), &["--http-port", &preferred.to_string()]);
    assert_eq!(next.http_port(), actual, "containers from before the restart use this port");
}

#[test]
fn a_failed_start_is_reported_in_one_line_with_a_hint() {
    let home = tempfile::tempdir().unwrap();
    let mut daemon = Daemon::spawn(home.path(), &["--http-port", "0", "--http-bind", "192.0.2.1"]);
    assert_eq!(daemon.wait().code(), Some(125));
    let mut stderr = String::new();
    daemon.child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert!(stderr.starts_with("error: cannot listen on 192.0.2.1:"), "{stderr}");
    assert!(stderr.contains("\nhint: "), "{stderr}");
    assert!(!daemon.socket().exists());
}
