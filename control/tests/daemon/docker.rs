//! The daemon with a fake Docker engine that has only a bridge.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use crate::support::{Daemon, wait_until};

/// Serves an engine at `socket` whose bridge has this gateway, and which never sends an event.
fn engine(socket: &Path, gateway: &'static str) {
    let listener = UnixListener::bind(socket).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            std::thread::spawn(move || serve(stream.unwrap(), gateway));
        }
    });
}

fn serve(mut stream: UnixStream, gateway: &str) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    while let Some(Ok(request)) = lines.next() {
        while lines.next().is_some_and(|line| line.is_ok_and(|line| !line.is_empty())) {}
        let answer = if request.contains("/events") {
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
                .to_owned()
        } else {
            let (status, body) = if request.contains("/networks/bridge") {
                (
                    200,
                    format!(
                        "{{\"Name\":\"bridge\",\"IPAM\":{{\"Config\":[{{\"Gateway\":\"{gateway}\"}}]}}}}"
                    ),
                )
            } else if request.contains("/version") {
                (200, "{\"ApiVersion\":\"1.47\",\"Version\":\"27\"}".to_owned())
            } else {
                (404, "{\"message\":\"nothing here\"}".to_owned())
            };
            let length = body.len();
            format!(
                "HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
            )
        };
        if stream.write_all(answer.as_bytes()).is_err() {
            return;
        }
    }
}

fn listens_on(daemon: &Daemon, host: &str) -> bool {
    daemon.log().iter().any(|event| event["kind"] == "daemon-http-listening" && event["host"] == host)
}

#[test]
fn the_daemon_listens_on_dockers_bridge() {
    let home = tempfile::tempdir().unwrap();
    let socket = home.path().join("docker.sock");
    engine(&socket, "127.0.0.77");
    let daemon = Daemon::start_with(home.path(), &["--http-port", "0"], Some(&socket));
    assert!(listens_on(&daemon, "127.0.0.77"));
    std::net::TcpStream::connect(("127.0.0.77", daemon.http_port())).unwrap();
}

#[test]
fn the_bridge_of_a_docker_that_starts_later_is_added() {
    let home = tempfile::tempdir().unwrap();
    let socket = home.path().join("docker.sock");
    let daemon = Daemon::start_with(home.path(), &["--http-port", "0"], Some(&socket));
    assert!(!listens_on(&daemon, "127.0.0.78"));
    engine(&socket, "127.0.0.78");
    wait_until("listening on the bridge", || listens_on(&daemon, "127.0.0.78"));
    std::net::TcpStream::connect(("127.0.0.78", daemon.http_port())).unwrap();
}

#[test]
fn a_bridge_that_is_not_an_address_of_this_machine_is_skipped() {
    let home = tempfile::tempdir().unwrap();
    let socket = home.path().join("docker.sock");
    engine(&socket, "192.0.2.1");
    let daemon = Daemon::start_with(home.path(), &["--http-port", "0"], Some(&socket));
    let is_reported = || {
        daemon.log().iter().any(|event| event["text"].as_str().is_some_and(|text| text.contains("192.0.2.1")))
    };
    wait_until("the notice that containers cannot reach the daemon", is_reported);
    assert!(!listens_on(&daemon, "192.0.2.1"));
}

#[test]
fn a_configured_address_replaces_the_bridge() {
    let home = tempfile::tempdir().unwrap();
    let socket = home.path().join("docker.sock");
    engine(&socket, "127.0.0.79");
    let arguments = ["--http-port", "0", "--http-bind", "127.0.0.80"];
    let daemon = Daemon::start_with(home.path(), &arguments, Some(&socket));
    assert!(listens_on(&daemon, "127.0.0.1") && listens_on(&daemon, "127.0.0.80"));
    assert!(!listens_on(&daemon, "127.0.0.79"));
}
