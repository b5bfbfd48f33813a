//! Forwarding from end to end: a server inside answers on the host.

#![expect(clippy::unwrap_used, reason = "a test that cannot continue reports the line")]

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

/// Listens on an address and port, prints `listening`, and sends its name to each client. Stops listening at the first line
/// of its standard input, and ends at the second.
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

/// Reads from a host port until the end of the stream. Returns `None` if the connection fails.
fn read(ip: IpAddr, port: u16) -> Option<String> {
    let mut stream = TcpStream::connect(SocketAddr::new(ip, port)).ok()?;
    stream.set_read_timeout(Some(WAIT_MAX)).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    Some(text)
}

fn send_line(running: &mut Running) {
    running.child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
}

pub(crate) fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + WAIT_MAX;
    while !holds() {
        assert!(Instant::now() < deadline, "timed out waiting for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_server_inside_answers_on_localhost_until_it_stops() {
    let port = free_port();
    let mut running = Running::start(serve(&["--name", "web"], "127.0.0.1", port, "hello"));
    let line = running.err("forward");
    assert!(
        line.starts_with(&format!("forward  http://localhost:{port}  →  web:{port} (python3, pid ")),
        "{line}"
    );
    assert_eq!(read(V4, port).as_deref(), Some("hello"));
    assert_eq!(read(V6, port).as_deref(), Some("hello"), "the client's family does not matter");
    send_line(&mut running);
    assert_eq!(running.err("closed"), format!("closed   http://localhost:{port}"));
    wait_until("the port being free", || read(V4, port).is_none());
    send_line(&mut running);
    assert_eq!(running.exit_code(), Some(0));
}

#[test]
fn a_server_on_the_ipv6_loopback_answers_in_both_families() {
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
fn an_unprivileged_user_can_forward() {
    let Some(nobody) = Nobody::new() else { return };
    let port = free_port();
    let mut command = nobody.landfall();
    let script = format!("require('net').createServer(c => c.end('mine')).listen({port}, '127.0.0.1')");
    command.args(["run", "--net", "none", "--name", "web", "--", "node", "-e", &script]);
    let mut running = Running::start(command);
    let line = running.err("forward");
    assert!(line.contains("(node, pid "), "{line}");
    assert_eq!(read(V4, port).as_deref(), Some("mine"));
}

#[test]
fn a_port_in_use_is_reported_with_its_holder_and_forwarded_when_it_is_free() {
    let holder = TcpListener::bind((V4, 0)).unwrap();
    let port = holder.local_addr().unwrap().port();
    let mut running = Running::start(serve(&[], "127.0.0.1", port, "inside"));
    let line = running.err("taken");
    assert!(line.starts_with(&format!("taken    localhost:{port} is held by cli-")), "{line}");
    assert!(line.contains(&format!("pid {}", std::process::id())), "{line}");
    running.err("hint:");
    running.out("listening");
    drop(holder);
    running.err("forward");
    assert_eq!(read(V4, port).as_deref(), Some("inside"));
}

#[test]
fn the_second_run_with_a_port_reports_its_holder_and_gets_it_later() {
    let port = free_port();
    let mut first = Running::start(serve(&[], "127.0.0.1", port, "first"));
    first.err("forward");
    let mut second = Running::start(serve(&[], "127.0.0.1", port, "second"));
    second.err("taken");
    second.err("hint: another landfall forwards that port");
    second.out("listening");
    assert_eq!(read(V4, port).as_deref(), Some("first"));
    send_line(&mut first);
    first.err("closed");
    second.err("forward");
    assert_eq!(read(V4, port).as_deref(), Some("second"));
}

#[test]
fn a_denied_port_is_reported_and_not_forwarded() {
    let port = free_port();
    let mut running = Running::start(serve(&["--deny", &port.to_string()], "127.0.0.1", port, "no"));
    assert_eq!(
        running.err("denied"),
        format!("denied   port {port} is not forwarded: the deny list contains it")
    );
    assert_eq!(read(V4, port), None);
}

#[test]
fn events_are_json_under_json() {
    let port = free_port();
    let mut running = Running::start(serve(&["--json", "--name", "web"], "127.0.0.1", port, "json"));
    let event: serde_json::Value = serde_json::from_str(&running.err("forward")).unwrap();
    assert_eq!(event["url"], format!("http://localhost:{port}"));
    assert_eq!(event["process"]["name"], "python3");
}

#[test]
fn data_of_a_server_that_has_ended_is_delivered() {
    // The data exceeds the client's small receive buffer and the relay's own buffer, but fits into all buffers of the path
    // together. So the server ends before its client has read anything, and the relay holds the data.
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

/// Runs a server in a sandbox that does not forward. Returns the id of the server's process.
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
fn attach_forwards_existing_listeners_and_ends_with_the_process() {
    let port = free_port();
    let (mut sandbox, pid) = sandboxed(port);
    let mut command = landfall();
    command.args(["attach", "--pid", &pid, "--name", "db"]);
    let mut attached = Running::start(command);
    let line = attached.out("forward");
    assert!(line.contains(&format!("→  db:{port} (python3, pid {pid})")), "{line}");
    assert_eq!(read(V4, port).as_deref(), Some("attached"));
    send_line(&mut sandbox);
    attached.out("closed");
    send_line(&mut sandbox);
    attached.out(&format!("process {pid} has ended"));
    assert_eq!(attached.exit_code(), Some(0));
}

#[test]
fn attach_to_a_namespace_file_ends_at_a_signal() {
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
fn the_engine_process_answers_its_driver() {
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
    let receive = || channel.recv_timeout::<Event>(WAIT_MAX).unwrap().unwrap().0;
    assert!(matches!(receive(), Event::Ready { .. }));
    channel.send(&Order::Stop, &[]).unwrap();
    assert_eq!(receive(), Event::Stopped);
    assert_eq!(engine.exit_code(), Some(0));
    // An engine of root has changed its user, and leaves the removal of the socket file to its driver.
    assert!(Channel::connect(&socket).is_err(), "the engine no longer listens at its socket");
}
