//! `landfall agent` as a static binary in containers that otherwise have only busybox, with Docker's own seccomp profile,
//! and with all privileges dropped that Docker can drop. A daemon on the host reaches them by each attach method.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use landfall::daemon::rpc::client::Client;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::ports::free_port;
use super::{Container, WAIT_MAX, docker, run, wait_until};

pub(super) const IMAGE: &str = "landfall-test-agent";
const TOKEN: &str = "a-broker-token-of-43-characters-0123456789-";
const BARE: [&str; 5] = ["--cap-drop", "ALL", "--read-only", "--user", "65534"];

/// A daemon for one test, with the Docker engine. Its relay engine ends with it.
struct Daemon {
    home: TempDir,
    child: Child,
}

impl Daemon {
    fn start() -> Daemon {
        let home = tempfile::tempdir().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_landfall"));
        command.args(["_hostd", "--http-port", "0"]).env("LANDFALL_HOME", home.path());
        let child = command.stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let daemon = Daemon { home, child };
        wait_until("the daemon's answer", || UnixStream::connect(daemon.socket()).ok());
        daemon
    }

    fn socket(&self) -> std::path::PathBuf {
        self.home.path().join("run/hostd.sock")
    }

    fn register(&self, container: &Container, attach_method: &Value) {
        let mut fields = json!({"kind": "register", "containerName": container.0.as_str(), "cwd": "/",
            "portForward": {"allow": "*"}, "brokerToken": TOKEN, "way": attach_method});
        let published = docker(&["port", container.0.as_str(), "8973/tcp"]);
        let port: u16 = published.rsplit(':').next().unwrap().parse().unwrap();
        fields["wsHostPort"] = json!(port);
        Client::new(self.socket()).call(&fields).unwrap();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Stop in order, so that its relay engine ends, too.
        let mut down = Command::new(env!("CARGO_BIN_EXE_landfall"));
        let _ = down.arg("down").env("LANDFALL_HOME", self.home.path()).output();
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns the answer of a web server at this port of the host, if it answers.
fn page(port: u16) -> Option<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(WAIT_MAX)).ok()?;
    stream.write_all(b"GET /index.html HTTP/1.0\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    answer.contains("from inside").then_some(answer)
}

/// Runs a container whose first process is the agent, with a web server on its own loopback.
fn container(name: &str, shared: &Path, options: &[&str], server: u16) -> Container {
    let mount = format!("{}:/run/landfall", shared.display());
    let token = format!("LANDFALL_HOSTD_BROKER_TOKEN={TOKEN}");
    let common = ["-p", "127.0.0.1::8973", "-e", &token, "-v", &mount];
    let script = format!("busybox httpd -p 127.0.0.1:{server} -h /www; exec /landfall agent");
    Container::run(name, &[&common[..], options].concat(), IMAGE, &["sh", "-c", &script])
}

/// Checks both attach methods for a container with these options, and a port that it requests.
#[track_caller]
fn check_reached(name: &str, options: &[&str]) {
    // Open to the container's user, below a directory that is closed to all other users.
    let closed = PermissionsExt::from_mode(0o700);
    let above = tempfile::Builder::new().permissions(closed).tempdir().unwrap();
    let shared = above.path().join("shared");
    std::fs::create_dir(&shared).unwrap();
    std::fs::set_permissions(&shared, PermissionsExt::from_mode(0o777)).unwrap();
    for attach_method in [json!({"kind": "websocket"}), json!({"kind": "agent", "directory": shared})] {
        let kind = attach_method["kind"].as_str().unwrap();
        let server = free_port();
        let container = container(&format!("{name}-{kind}"), &shared, options, server);
        let logs = || {
            let output = run(&["logs", container.0.as_str()]);
            String::from_utf8_lossy(&output.stderr).into_owned()
        };
        wait_until("the agent's start", || logs().contains("agent-listening").then_some(()));
        let daemon = Daemon::start();
        daemon.register(&container, &attach_method);
        wait_until("the page on the host", || page(server));
        let wanted = free_port();
        let ask = ["exec", container.0.as_str(), "/landfall", "agent", "forward", &server.to_string()];
        let asked = docker(&[&ask[..], &["--host", &wanted.to_string(), "--wait", "30"]].concat());
        assert_eq!(asked, wanted.to_string());
        wait_until("the page at the requested port", || page(wanted));
        assert!(!logs().contains(TOKEN), "a token was logged: {}", logs());
        // As the first process of its namespace it must handle the signal itself.
        docker(&["stop", "-t", "10", container.0.as_str()]);
        assert_eq!(container.inspect("{{.State.ExitCode}}"), "0", "{}", logs());
    }
}

#[test]
#[ignore = "needs a Docker engine: tests/docker.sh"]
fn an_agent_works_with_the_default_profile() {
    check_reached("agent", &[]);
}

#[test]
#[ignore = "needs a Docker engine: tests/docker.sh"]
fn an_agent_works_as_nobody_without_capabilities_on_a_read_only_root() {
    check_reached("agent-bare", &BARE);
}
