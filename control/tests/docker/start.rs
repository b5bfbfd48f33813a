//! `landfall start` and `stop` from the command line, and a restart that a process in the container requests.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;

use super::ports::free_port;
use super::{WAIT_MAX, docker, run, wait_until};

/// A folder with its daemon and its container. All are removed at the end of the test.
pub(super) struct Shop {
    root: TempDir,
    pub(super) name: String,
    port: u16,
}

impl Shop {
    /// Creates a folder that serves `www` on its own loopback, with the configuration of a dev container.
    pub(super) fn new(name: &str, command: &str) -> Shop {
        Shop::of(super::BASE, name, command)
    }

    /// The same, from this base image with further Dockerfile lines.
    fn of(base: &str, name: &str, command: &str) -> Shop {
        let name = format!("lf-{}-{name}", std::process::id());
        let shop = Shop { root: tempfile::tempdir().unwrap(), name, port: free_port() };
        let command = command.replace("PORT", &shop.port.to_string());
        std::fs::create_dir_all(shop.folder().join(".devcontainer")).unwrap();
        std::fs::create_dir(shop.folder().join("www")).unwrap();
        let dockerfile = format!("FROM {base}\nCOPY www /www\nCMD [\"sh\", \"-c\", \"{command}\"]\n");
        shop.write(".devcontainer/Dockerfile", &dockerfile);
        let said = format!(
            r#"{{
                // The build context is the whole folder.
                "build": {{ "dockerfile": "Dockerfile", "context": "..", "args": {{}} }},
                "portsAttributes": {{ "{}": {{ "label": "Web" }}, }},
            }}"#,
            shop.port
        );
        shop.write(".devcontainer/devcontainer.json", &said);
        shop.write("www/index.html", "one");
        // No two folders share a layer: if it were removed with one image, the build of the other would fail.
        shop.write("www/name", &shop.name);
        // Any port for HTTP, since another daemon of this machine may use the default one.
        assert!(shop.landfall(&["up", "--http-port", "0"]).status.success());
        shop
    }

    pub(super) fn folder(&self) -> PathBuf {
        self.root.path().join(&self.name)
    }

    fn home(&self) -> PathBuf {
        self.root.path().join("home")
    }

    pub(super) fn write(&self, name: &str, text: &str) {
        std::fs::write(self.folder().join(name), text).unwrap();
    }

    pub(super) fn landfall(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_landfall"));
        command.args(arguments).env("LANDFALL_HOME", self.home());
        let folder = self.folder();
        command.current_dir(if folder.exists() { folder.as_path() } else { Path::new("/") });
        command.output().unwrap()
    }

    #[track_caller]
    pub(super) fn stdout_of(&self, arguments: &[&str]) -> String {
        let output = self.landfall(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Returns the answer of the container's web server on the host.
    fn page(&self) -> Option<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).ok()?;
        stream.set_read_timeout(Some(WAIT_MAX)).ok()?;
        stream.write_all(b"GET /index.html HTTP/1.0\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        answer.split_once("\r\n\r\n").map(|(_, page)| page.trim().to_owned()).filter(|page| !page.is_empty())
    }

    fn started_at(&self) -> Option<String> {
        let output = run(&["inspect", "-f", "{{.State.Running}} {{.State.StartedAt}}", &self.name]);
        let state = String::from_utf8(output.stdout).unwrap();
        state.starts_with("true").then_some(state)
    }

    /// Requests a restart from a process in the container with a token. Returns the output with the answer.
    pub(super) fn ask(&self, build: bool, token: &str) -> Output {
        let script = format!(
            "busybox wget -q -O - --header \"Authorization: Bearer {token}\" --post-data \
             \"{{\\\"kind\\\":\\\"restart\\\",\\\"containerName\\\":\\\"$LANDFALL_CONTAINER_NAME\\\",\\\"build\\\":{build}}}\" \
             $LANDFALL_HOSTD_URL/rpc"
        );
        run(&["exec", &self.name, "sh", "-c", &script])
    }

    fn registration(&self) -> PathBuf {
        self.home().join(format!("run/registrations/{}.json", self.name))
    }
}

impl Drop for Shop {
    fn drop(&mut self) {
        run(&["rm", "-f", "-v", &self.name, &format!("{}.landfall-old", self.name)]);
        self.landfall(&["down"]);
        run(&["rmi", "-f", &format!("landfall-{}", self.name)]);
    }
}

/// The first process of a container receives no signal without a handler.
const SERVE: &str = "trap 'exit 0' TERM; busybox httpd -f -p 127.0.0.1:PORT -h /www & wait";

#[test]
#[ignore = "needs a Docker engine: tests/docker.sh"]
fn a_started_folder_restarts_itself_and_keeps_its_port() {
    let shop = Shop::new("shop", SERVE);
    let started = shop.landfall(&["start", "--allow-rebuild"]);
    let stderr = String::from_utf8_lossy(&started.stderr);
    assert!(
        started.status.success() && stderr.contains("build.args"),
        "the unused setting is reported: {stderr}"
    );
    wait_until("the first page", || shop.page().filter(|page| page == "one"));
    let again = shop.landfall(&["start"]);
    assert_eq!(again.status.code(), Some(6), "{}", String::from_utf8_lossy(&again.stderr));

    let listed: Value = serde_json::from_str(&shop.stdout_of(&["ls", "--json"])).unwrap();
    assert_eq!(listed["containers"][0]["forwards"][0]["label"], "Web", "{listed}");
    let environment = docker(&["exec", &shop.name, "busybox", "env"]);
    let value = |name: &str| {
        let mut lines = environment.lines().filter_map(|line| line.split_once('='));
        lines.find(|(known, _)| *known == name).unwrap().1.to_owned()
    };
    for name in ["CONTAINER_NAME", "HOSTD_URL", "HOSTD_TOKEN", "HOSTD_BROKER_TOKEN"] {
        assert_eq!(value(&format!("LANDFALL_{name}")), value(&format!("TYPECLAW_{name}")));
    }

    let refused = shop.ask(false, "somebody-elses-token");
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && said.contains("403"), "{refused:?}");

    // Without a rebuild: the same image, whatever the folder contains now.
    shop.write("www/index.html", "two");
    let before = shop.started_at().unwrap();
    let output = shop.ask(false, "$LANDFALL_HOSTD_TOKEN");
    assert!(String::from_utf8_lossy(&output.stdout).contains("\"scheduled\":true"), "{output:?}");
    wait_until("the restart", || shop.started_at().filter(|now| *now != before));
    wait_until("the page after it", || shop.page().filter(|page| page == "one"));

    // With a rebuild: from the present folder, by the same Dockerfile. The token remains valid.
    let output = shop.ask(true, "$LANDFALL_HOSTD_TOKEN");
    assert!(String::from_utf8_lossy(&output.stdout).contains("\"scheduled\":true"), "{output:?}");
    wait_until("the page of the new image", || shop.page().filter(|page| page == "two"));
    wait_until("the removal of its old container", || {
        let old = run(&["inspect", &format!("{}.landfall-old", shop.name)]);
        (!old.status.success()).then_some(())
    });
    let log = std::fs::read_to_string(shop.home().join("log/hostd.log")).unwrap();
    for token in [value("LANDFALL_HOSTD_TOKEN"), value("LANDFALL_HOSTD_BROKER_TOKEN")] {
        assert!(!log.contains(&token), "a token was logged: {log}");
    }

    shop.stdout_of(&["stop"]);
    wait_until("the release of the port", || {
        TcpStream::connect(("127.0.0.1", shop.port)).is_err().then_some(())
    });
    assert!(!run(&["inspect", &shop.name]).status.success(), "the container still exists");
    assert!(!shop.registration().exists());
    assert_eq!(shop.landfall(&["stop"]).status.code(), Some(3));
}

/// An agent next to the web server, as an unprivileged user of the container.
const SERVE_WITH_AGENT: &str = "busybox httpd -p 127.0.0.1:PORT -h /www; exec /landfall agent";

#[test]
#[ignore = "needs a Docker engine: tests/docker.sh"]
fn c31_a_started_container_has_its_own_socket_and_answers_the_challenge() {
    let base = format!("{}\nUSER 1234:1234", super::agent::IMAGE);
    let shop = Shop::of(&base, "socket", SERVE_WITH_AGENT);
    shop.stdout_of(&["start"]);
    wait_until("the first page", || shop.page());
    // Only the folder and the directory of the container's socket are mounted, the latter read-only.
    let mounts = docker(&[
        "inspect",
        "-f",
        "{{range .Mounts}}{{.Destination}} {{.RW}} {{.Source}}{{println}}{{end}}",
        &shop.name,
    ]);
    let mut mounts: Vec<&str> = mounts.lines().filter(|line| !line.is_empty()).collect();
    mounts.sort_unstable();
    let directory = shop.home().join("run/http").join(&shop.name);
    assert_eq!(mounts.len(), 2, "{mounts:?}");
    assert_eq!(mounts[0], format!("/run/landfall-http false {}", directory.display()));
    let touched = run(&["exec", "-u", "0", &shop.name, "touch", "/run/landfall-http/file"]);
    assert!(String::from_utf8_lossy(&touched.stderr).contains("Read-only file system"), "{touched:?}");
    // The agent has answered the broker's challenge through Docker's proxy.
    let log = || std::fs::read_to_string(shop.home().join("log/hostd.log")).unwrap();
    let connected = format!("[portbroker:{}] connected", shop.name);
    wait_until("the broker", || log().contains(&connected).then_some(()));
    let registered: Value = serde_json::from_slice(&std::fs::read(shop.registration()).unwrap()).unwrap();
    assert_eq!((&registered["challengeRequired"], &registered["httpSocket"]), (&true.into(), &true.into()));
    for token in ["brokerToken", "restartToken"] {
        assert!(!log().contains(registered[token].as_str().unwrap()));
    }
    // The agent sends requests over the socket, also after another daemon has replaced the first.
    let restart = || {
        let before = shop.started_at().unwrap();
        docker(&["exec", &shop.name, "/landfall", "agent", "restart"]);
        wait_until("the restart", || shop.started_at().filter(|now| *now != before));
        wait_until("the page after it", || shop.page());
    };
    restart();
    shop.stdout_of(&["down"]);
    let refused = run(&["exec", &shop.name, "/landfall", "agent", "restart"]);
    assert_eq!(refused.status.code(), Some(5), "{refused:?}");
    shop.stdout_of(&["up", "--http-port", "0"]);
    wait_until("the page of the next daemon", || shop.page());
    restart();
    shop.stdout_of(&["stop"]);
    assert!(!directory.exists());
}

#[test]
#[ignore = "needs a Docker engine: tests/docker.sh"]
fn c31_a_port_that_is_taken_while_a_container_is_stopped_does_not_prevent_its_start() {
    let shop = Shop::new("squatted", SERVE);
    shop.stdout_of(&["start"]);
    wait_until("the first page", || shop.page());
    let published = || docker(&["port", &shop.name, "8973/tcp"]);
    let before = published();
    docker(&["stop", "-t", "1", &shop.name]);
    let _squatter = std::net::TcpListener::bind(&before).unwrap();
    shop.stdout_of(&["restart", &shop.name]);
    assert_ne!(published(), before);
    wait_until("the page after it", || shop.page());
}

#[test]
#[ignore = "needs a Docker engine: tests/docker.sh"]
fn a_container_that_ends_at_once_reports_the_reason_and_is_removed() {
    let shop = Shop::new("broken", "echo no such module; exit 3");
    let output = shop.landfall(&["start"]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(6), "{stderr}");
    assert!(stderr.contains("ended at once with status 3: no such module"), "{stderr}");
    assert!(!run(&["inspect", &shop.name]).status.success(), "the container still exists");
    assert!(!shop.registration().exists());
}

#[test]
#[ignore = "needs a Docker engine: tests/docker.sh"]
fn stop_removes_only_a_container_that_start_created() {
    let shop = Shop::new("own", SERVE);
    docker(&["run", "-d", "--name", &shop.name, super::BASE, "sleep", "100000"]);
    let output = shop.landfall(&["stop", &shop.name]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(6), "{stderr}");
    let output = shop.landfall(&["start"]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("another container has the name"), "{stderr}");
    assert!(run(&["inspect", &shop.name]).status.success(), "it was removed");
}
