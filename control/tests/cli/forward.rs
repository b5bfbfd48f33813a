//! Forwarding, end to end: a server inside answers on the host.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::net;
use rustix::process::Signal;

use crate::ports::free_port;
use crate::support::{Nobody, Running, WAIT_MAX, landfall};

const V4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

/// Listens on an address and port, says so, greets whoever comes by name, and stops at the first line it reads from
/// its standard input; at the second it ends.
const SERVER: &str = "
import socket, sys, threading
address, port, name = sys.argv[1], int(sys.argv[2]), sys.argv[3]
family = socket.AF_INET6 if ':' in address else socket.AF_INET
server = socket.create_server((address, port), family=family)
def serve():
    while True:
        client, _ = server.accept()
        client.sendall(name.encode())
        client.close()
threading.Thread(target=serve, daemon=True).start()
print('listening', flush=True)
sys.stdin.readline()
server.shutdown(socket.SHUT_RDWR)
server.close()
print('stopped', flush=True)
sys.stdin.readline()";

fn serve(options: &[&str], address: &str, port: u16, name: &str) -> Command {
    let mut command = landfall();
    command.args(["run", "--net", "none"]).args(options).args(["--", "python3", "-c", SERVER]);
    command.args([address, &port.to_string(), name]);
    command
}

/// What is read from a host port until the end; none if there is no connection to be had.
fn read(ip: IpAddr, port: u16) -> Option<String> {
    let mut stream = TcpStream::connect(SocketAddr::new(ip, port)).ok()?;
    stream.set_read_timeout(Some(WAIT_MAX)).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    Some(text)
}

fn line(running: &mut Running) {
    running.child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
}

pub(crate) fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + WAIT_MAX;
    while !holds() {
        assert!(Instant::now() < deadline, "{what} did not come to pass");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_server_inside_answers_on_localhost_until_it_stops() {
    let port = free_port();
    let mut running = Running::start(serve(&["--name", "web"], "127.0.0.1", port, "hello"));
    let told = running.err("forward");
    assert!(
        told.starts_with(&format!("forward  http://localhost:{port}  →  web:{port} (python3, pid ")),
        "{told}"
    );
    assert_eq!(read(V4, port).as_deref(), Some("hello"));
    assert_eq!(read(V6, port).as_deref(), Some("hello"), "the client's family does not matter");
    line(&mut running);
    assert_eq!(running.err("closed"), format!("closed   http://localhost:{port}"));
    wait_until("the port being free", || read(V4, port).is_none());
    line(&mut running);
    assert_eq!(running.exit_code(), Some(0));
}

#[test]
fn a_server_on_the_ipv6_loopback_alone_answers_too() {
    let port = free_port();
    let mut running = Running::start(serve(&[], "::1", port, "six"));
    running.err("forward");
    assert_eq!(read(V4, port).as_deref(), Some("six"));
    assert_eq!(read(V6, port).as_deref(), Some("six"));
}

#[test]
fn both_rings_serve() {
    for ring in ["io_uring", "epoll"] {
        let port = free_port();
        let mut running = Running::start(serve(&["--ring", ring], "0.0.0.0", port, ring));
        running.err("forward");
        assert_eq!(read(V4, port).as_deref(), Some(ring));
    }
}

#[test]
fn a_user_without_privilege_forwards_too() {
    let Some(nobody) = Nobody::new() else { return };
    let port = free_port();
    let mut command = nobody.landfall();
    let script = format!("require('net').createServer(c => c.end('mine')).listen({port}, '127.0.0.1')");
    command.args(["run", "--net", "none", "--name", "web", "--", "node", "-e", &script]);
    let mut running = Running::start(command);
    let told = running.err("forward");
    assert!(told.contains("(node, pid "), "{told}");
    assert_eq!(read(V4, port).as_deref(), Some("mine"));
}

#[test]
fn a_taken_port_is_told_with_its_holder_and_taken_over_when_it_is_free() {
    let holder = TcpListener::bind((V4, 0)).unwrap();
    let port = holder.local_addr().unwrap().port();
    let mut running = Running::start(serve(&[], "127.0.0.1", port, "inside"));
    let told = running.err("taken");
    assert!(told.starts_with(&format!("taken    localhost:{port} is held by cli-")), "{told}");
    assert!(told.contains(&format!("pid {}", std::process::id())), "{told}");
    running.err("hint:");
    running.out("listening");
    drop(holder);
    running.err("forward");
    assert_eq!(read(V4, port).as_deref(), Some("inside"));
}

#[test]
fn two_runs_with_one_port_are_both_told_who_has_it() {
    let port = free_port();
    let mut first = Running::start(serve(&[], "127.0.0.1", port, "first"));
    first.err("forward");
    let mut second = Running::start(serve(&[], "127.0.0.1", port, "second"));
    second.err("taken");
    second.err("hint: another landfall forwards that port");
    second.out("listening");
    assert_eq!(read(V4, port).as_deref(), Some("first"));
    line(&mut first);
    first.err("closed");
    second.err("forward");
    assert_eq!(read(V4, port).as_deref(), Some("second"));
}

#[test]
fn a_denied_port_is_told_and_not_forwarded() {
    let port = free_port();
    let mut running = Running::start(serve(&["--deny", &port.to_string()], "127.0.0.1", port, "no"));
    assert_eq!(
        running.err("denied"),
        format!("denied   port {port} is not forwarded: the deny list contains it")
    );
    assert_eq!(read(V4, port), None);
}

#[test]
fn what_happens_is_told_as_json_where_that_is_asked_for() {
    let port = free_port();
    let mut running = Running::start(serve(&["--json", "--name", "web"], "127.0.0.1", port, "json"));
    let event: serde_json::Value = serde_json::from_str(&running.err("forward")).unwrap();
    assert_eq!(event["url"], format!("http://localhost:{port}"));
    assert_eq!(event["process"]["name"], "python3");
}

#[test]
fn what_a_server_sent_just_before_it_ended_still_arrives() {
    // Too much for the client's small buffer and the relay's own, and little enough for all on the way together: the
    // server ends before its client has read anything, and the relay holds what it sent.
    const SENT: usize = 6_000_000;
    let port = free_port();
    let script = format!(
        "import socket
server = socket.create_server(('127.0.0.1', {port}))
client, _ = server.accept()
client.sendall(b'x' * {SENT})"
    );
    let mut command = landfall();
    command.args(["run", "--net", "none", "--", "python3", "-c", &script]);
    let mut running = Running::start(command);
    running.err("forward");
    let client = net::socket(net::AddressFamily::INET, net::SocketType::STREAM, None).unwrap();
    net::sockopt::set_socket_recv_buffer_size(&client, 65_536).unwrap();
    net::connect(&client, &SocketAddr::new(V4, port)).unwrap();
    let mut client = TcpStream::from(client);
    running.err("closed");
    client.set_read_timeout(Some(WAIT_MAX)).unwrap();
    let mut received = Vec::new();
    client.read_to_end(&mut received).unwrap();
    assert_eq!(received.len(), SENT);
    drop(client);
    assert_eq!(running.exit_code(), Some(0));
}

/// Runs a server in a sandbox that forwards nothing itself, and tells the process inside.
fn sandboxed(port: u16) -> (Running, String) {
    let script = format!("import os; print('pid', os.getpid(), flush=True){SERVER}");
    let mut command = landfall();
    command.args(["run", "--net", "none", "--deny", "*", "--", "python3", "-c", &script]);
    command.args(["127.0.0.1", &port.to_string(), "attached"]);
    let mut running = Running::start(command);
    let pid = running.out("pid ").replace("pid ", "");
    running.out("listening");
    (running, pid)
}

#[test]
fn attach_forwards_what_listens_already_and_ends_with_the_process() {
    let port = free_port();
    let (mut sandbox, pid) = sandboxed(port);
    let mut command = landfall();
    command.args(["attach", "--pid", &pid, "--name", "db"]);
    let mut attached = Running::start(command);
    let told = attached.out("forward");
    assert!(told.contains(&format!("→  db:{port} (python3, pid {pid})")), "{told}");
    assert_eq!(read(V4, port).as_deref(), Some("attached"));
    line(&mut sandbox);
    attached.out("closed");
    line(&mut sandbox);
    attached.out(&format!("process {pid} has ended"));
    assert_eq!(attached.exit_code(), Some(0));
}

#[test]
fn attach_takes_a_file_and_ends_when_it_is_asked_to() {
    let port = free_port();
    let (_sandbox, pid) = sandboxed(port);
    let mut command = landfall();
    command.args(["attach", "--netns", &format!("/proc/{pid}/ns/net"), "--name", "file"]);
    let mut attached = Running::start(command);
    attached.out("forward");
    assert_eq!(read(V4, port).as_deref(), Some("attached"));
    attached.signal(Signal::INT);
    assert_eq!(attached.exit_code(), Some(0));
    wait_until("the port being free", || read(V4, port).is_none());
}

#[test]
fn the_engine_is_a_process_that_a_driver_can_talk_to() {
    use landfall_engine::channel::Channel;
    use landfall_engine::command::{Command as Order, Event};
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("engine.sock");
    let mut command = landfall();
    command.args(["_engine", "--socket", socket.to_str().unwrap()]);
    let mut engine = Running::start(command);
    let mut channel = None;
    wait_until("an engine that listens", || {
        channel = Channel::connect(&socket).ok();
        channel.is_some()
    });
    let channel = channel.unwrap();
    let hear = || channel.recv_timeout::<Event>(WAIT_MAX).unwrap().unwrap().0;
    assert!(matches!(hear(), Event::Ready { .. }));
    channel.send(&Order::Stop, &[]).unwrap();
    assert_eq!(hear(), Event::Stopped);
    assert_eq!(engine.exit_code(), Some(0));
    // Root's engine has changed its user and leaves the name to its driver.
    assert!(Channel::connect(&socket).is_err(), "it leaves its address");
}
