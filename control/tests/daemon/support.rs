//! A daemon for one test, and clients that use only the wire.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// The limit of a bounded wait, more than ten times the usual duration.
pub(crate) const WAIT_MAX: Duration = Duration::from_secs(20);

/// Waits for a state.
pub(crate) fn wait_until(what: &str, mut state: impl FnMut() -> bool) {
    let started = Instant::now();
    while !state() {
        assert!(started.elapsed() < WAIT_MAX, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub(crate) struct Daemon {
    pub(crate) child: Child,
    home: PathBuf,
}

impl Daemon {
    /// Starts a daemon of this home, and waits until it answers.
    pub(crate) fn start(home: &Path, arguments: &[&str]) -> Daemon {
        Daemon::start_with(home, arguments, None)
    }

    /// The same, with a Docker engine at this socket.
    pub(crate) fn start_with(home: &Path, arguments: &[&str], docker: Option<&Path>) -> Daemon {
        let mut daemon = Daemon::spawn_with(home, arguments, docker);
        let socket = daemon.socket();
        wait_until("the daemon's answer", || {
            assert_eq!(daemon.child.try_wait().unwrap(), None, "the daemon has ended");
            UnixStream::connect(&socket).is_ok()
        });
        daemon
    }

    /// Starts a daemon without waiting for it.
    pub(crate) fn spawn(home: &Path, arguments: &[&str]) -> Daemon {
        Daemon::spawn_with(home, arguments, None)
    }

    fn spawn_with(home: &Path, arguments: &[&str], docker: Option<&Path>) -> Daemon {
        let docker = format!("unix://{}", docker.unwrap_or(Path::new("/nowhere/docker.sock")).display());
        let mut command = Command::new(env!("CARGO_BIN_EXE_landfall"));
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.env("LANDFALL_HOME", home).env("DOCKER_HOST", docker);
        command.arg("_hostd").args(arguments).stdin(Stdio::null()).stderr(Stdio::piped());
        Daemon { child: command.spawn().unwrap(), home: home.to_owned() }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.home.join("run/hostd.sock")
    }

    /// Sends these bytes, closes the write side, and reads the whole answer.
    pub(crate) fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        // The daemon may answer before it has read all bytes.
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(Shutdown::Write);
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    pub(crate) fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(WAIT_MAX)).unwrap();
        stream.set_write_timeout(Some(WAIT_MAX)).unwrap();
        stream
    }

    /// Sends a request and returns the whole answer.
    pub(crate) fn ask(&self, request: &Value) -> Value {
        let answer = self.raw(format!("{request}\n").as_bytes());
        assert!(answer.ends_with('\n') && answer.lines().count() == 1, "{answer:?}");
        serde_json::from_str(&answer).unwrap()
    }

    pub(crate) fn register(&self, name: &str, token: &str) {
        let request = json!({
            "kind": "register", "containerName": name, "cwd": "/somewhere", "restartToken": token
        });
        assert_eq!(self.ask(&request), json!({"ok": true}));
    }

    pub(crate) fn http_port(&self) -> u16 {
        let port = self.ask(&json!({"kind": "http-info"}))["result"]["port"].as_u64().unwrap();
        u16::try_from(port).unwrap()
    }

    /// Returns the events of the log so far.
    pub(crate) fn log(&self) -> Vec<Value> {
        let log = std::fs::read_to_string(self.home.join("log/hostd.log")).unwrap();
        log.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        wait_until("the daemon's end", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends a raw HTTP request. Checks the `content-type`, and returns the status and the body.
pub(crate) fn http(port: u16, request: &[u8]) -> (u16, Value) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(WAIT_MAX)).unwrap();
    let _ = stream.write_all(request);
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{answer:?}"));
    assert!(head.contains("content-type: application/json"), "{head}");
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, serde_json::from_str(body).unwrap())
}

/// Sends `POST /rpc` with these headers and this body.
pub(crate) fn post(port: u16, headers: &str, body: &str) -> (u16, Value) {
    let length = body.len();
    let head = format!("POST /rpc HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {length}\r\n{headers}\r\n");
    http(port, format!("{head}{body}").as_bytes())
}
