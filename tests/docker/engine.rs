//! A Docker engine for one case, its containers, and the clients that connect to them.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use landfall_tests::process::{private_mounts, running};
use landfall_tests::{Home, note, rpc};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use serde_json::{Value, json};
use tempfile::TempDir;

/// The timeout of a call to Docker. On an idle machine a successful call needs less than a tenth of it.
const TIMEOUT: Duration = Duration::from_secs(60);

/// The label with which a container is forwarded.
pub(crate) const LABEL: &str = "dev.landfall.forward=true";

/// Calls `look` repeatedly until it returns `Ok`.
#[track_caller]
pub(crate) fn until<T, S: std::fmt::Debug>(what: &str, mut look: impl FnMut() -> Result<T, S>) -> T {
    let start = Instant::now();
    loop {
        match look() {
            Ok(found) => return found,
            Err(seen) => {
                assert!(start.elapsed() < TIMEOUT, "waited {TIMEOUT:?} for {what}; last seen: {seen:?}");
            }
        }
        // Pauses between two calls, so that the awaited process can run.
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// An engine that listens where `home` expects Docker. Dropping it removes its containers and ends it.
pub(crate) struct Engine<'a> {
    home: &'a Home,
    files: TempDir,
    child: Option<Child>,
}

impl<'a> Engine<'a> {
    /// Starts an engine with these images (names of files that `images.sh` made).
    #[track_caller]
    pub(crate) fn start(home: &'a Home, images: &[&str]) -> Engine<'a> {
        Engine::start_with(home, images, &[])
    }

    /// The same with options of `dockerd`.
    #[track_caller]
    pub(crate) fn start_with(home: &'a Home, images: &[&str], options: &[&str]) -> Engine<'a> {
        private_mounts();
        let files = tempfile::Builder::new().prefix("landfall-docker-").tempdir().unwrap();
        let mut engine = Engine { home, files, child: None };
        engine.start_dockerd(options);
        for image in images {
            let from = images_directory().join(format!("{image}.tar"));
            engine.docker(&["import", from.to_str().unwrap(), image]);
        }
        engine
    }

    /// Starts `dockerd` on the data of an earlier one, and waits until it answers.
    #[track_caller]
    pub(crate) fn start_dockerd(&mut self, options: &[&str]) {
        assert!(self.child.is_none(), "one at a time");
        let printed = std::fs::File::options().create(true).append(true).open(self.path("log")).unwrap();
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "dockerd", "--data-root"])
            .arg(self.path("data"))
            .arg("--exec-root")
            .arg(self.path("exec"))
            .arg("--pidfile")
            .arg(self.path("pid"))
            .arg("-H")
            .arg(self.address())
            .args(options)
            .stdin(Stdio::null())
            .stdout(printed.try_clone().unwrap())
            .stderr(printed);
        self.child = Some(command.spawn().unwrap());
        until("the engine's answer", || {
            let output = self.try_docker(&["version", "-f", "{{.Server.Version}}"]);
            if output.status.success() { Ok(()) } else { Err(self.log_tail()) }
        });
    }

    /// Stops `dockerd` with SIGTERM or SIGKILL.
    #[track_caller]
    pub(crate) fn end(&mut self, signal: Signal) {
        let mut child = self.child.take().unwrap();
        let containerd = std::fs::read_to_string(self.path("exec/containerd/containerd.pid")).unwrap();
        let containerd = Pid::from_raw(containerd.trim().parse().unwrap()).unwrap();
        kill_process(Pid::from_child(&child), signal).unwrap();
        until("the engine's end", || match child.try_wait().unwrap() {
            Some(_) => Ok(()),
            None => Err(self.log_tail()),
        });
        // Its own child, containerd, is reparented to this process, which must reap it, as every orphan here: the next
        // engine takes a zombie for a running containerd.
        until("the end of containerd", || match waitpid(Some(containerd), WaitOptions::NOHANG) {
            Ok(None) => Err("it runs"),
            Ok(Some(_)) | Err(_) => Ok(()),
        });
    }

    fn path(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }

    fn address(&self) -> String {
        format!("unix://{}", self.home.docker_socket().display())
    }

    fn log_tail(&self) -> String {
        let text = std::fs::read_to_string(self.path("log")).unwrap_or_default();
        let lines: Vec<_> = text.lines().rev().take(5).collect();
        lines.join("\n")
    }

    fn try_docker(&self, arguments: &[&str]) -> Output {
        Command::new("docker")
            .args(arguments)
            .env("DOCKER_HOST", self.address())
            .env_remove("DOCKER_CONTEXT")
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    /// Runs the Docker client, and returns its output.
    #[track_caller]
    pub(crate) fn docker(&self, arguments: &[&str]) -> String {
        let output = self.try_docker(arguments);
        let wrong = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "docker {arguments:?}: {wrong}\n{}", self.log_tail());
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// Runs a command in a container.
    #[track_caller]
    pub(crate) fn exec(&self, name: &str, script: &str) -> String {
        self.docker(&["exec", name, "sh", "-c", script])
    }

    /// Starts a container with the label, whose web server answers with the container's first name, on the container's
    /// loopback only.
    #[track_caller]
    pub(crate) fn serve(&self, name: &str, port: u16, options: &[&str]) {
        self.serve_with_options(name, port, &[&["--label", LABEL], options].concat());
    }

    /// The same with these options, and without the label.
    #[track_caller]
    pub(crate) fn serve_with_options(&self, name: &str, port: u16, options: &[&str]) {
        let script = format!(
            "mkdir -p /www; echo {name} >/www/index.html; exec busybox httpd -f -p 127.0.0.1:{port} -h /www"
        );
        self.run(name, options, "base", &["sh", "-c", &script]);
    }

    /// Starts a container with any content.
    #[track_caller]
    pub(crate) fn run(&self, name: &str, options: &[&str], image: &str, command: &[&str]) {
        let head = ["run", "-d", "--name", name];
        self.docker(&[&head[..], options, &[image], command].concat());
    }

    /// Returns the pid of the container's first process.
    #[track_caller]
    pub(crate) fn first_process(&self, name: &str) -> u32 {
        self.docker(&["inspect", "--type", "container", "-f", "{{.State.Pid}}", name]).parse().unwrap()
    }
}

impl Drop for Engine<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let list = self.try_docker(&["ps", "-a"]);
            let containers = String::from_utf8_lossy(&list.stdout);
            note!("the end of the engine's log:\n{}\nits containers:\n{containers}", self.log_tail());
        }
        let list = self.try_docker(&["ps", "-aq"]);
        let text = String::from_utf8_lossy(&list.stdout);
        let ids: Vec<_> = text.split_whitespace().collect();
        if !ids.is_empty() {
            self.try_docker(&[&["rm", "-f", "-v"], &ids[..]].concat());
        }
        if let Some(child) = &mut self.child {
            let _ = kill_process(Pid::from_child(child), Signal::TERM);
            let _ = child.wait();
        }
        // Mounts below the directory must be removed first: the handle on the host's network, and those of a killed engine.
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let below = mounts.lines().filter_map(|line| line.split(' ').nth(1));
        for path in below.filter(|path| Path::new(path).starts_with(self.files.path())) {
            let _ = Command::new("umount").args(["-l", path]).output();
        }
    }
}

/// The directory in which `images.sh` has put the images.
pub(crate) fn images_directory() -> PathBuf {
    std::env::var_os("LANDFALL_IMAGES").expect("LANDFALL_IMAGES names them; run tests/docker.sh").into()
}

/// Starts the daemon with `landfall up`.
#[track_caller]
pub(crate) fn up(home: &Home, options: &[&str]) {
    landfall(home, &[&["up"], options].concat());
}

/// Runs a verb that must succeed, and returns its output.
#[track_caller]
pub(crate) fn landfall(home: &Home, arguments: &[&str]) -> String {
    let output = home.run(arguments);
    let (printed, wrong) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "landfall {arguments:?}: {}\n{printed}{wrong}", output.status);
    printed.into_owned()
}

/// Returns the resources of the relay after it has had a container and some clients, and both are gone.
#[track_caller]
pub(crate) fn wait_until_idle(home: &Home, engine: &Engine<'_>) -> Held {
    const PORT: u16 = 2999;
    engine.serve("warm", PORT, &[]);
    answers(PORT, "warm");
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..50).for_each(|turn| drop(page(PORT, turn).unwrap())));
        }
    });
    engine.docker(&["rm", "-f", "warm"]);
    Held::without_containers(home)
}

/// Fetches the page of a web server on the host by one address, and returns it without trailing white space.
pub(crate) fn page_at(address: IpAddr, port: u16, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(SocketAddr::new(address, port))?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: localhost:{port}\r\nconnection: close\r\n\r\n")?;
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head)? == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
    }
    if head.split_whitespace().nth(1) != Some("200") {
        return Err(std::io::Error::other(head));
    }
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        if name.eq_ignore_ascii_case("content-length") { value.trim().parse::<u64>().ok() } else { None }
    });
    let mut body = String::new();
    reader.take(length.unwrap_or(u64::MAX)).read_to_string(&mut body)?;
    let is_whole = length.is_none_or(|length| body.len() as u64 == length);
    if is_whole { Ok(body.trim_end().to_owned()) } else { Err(ErrorKind::UnexpectedEof.into()) }
}

/// Fetches the page by IPv4 or IPv6, alternating with the number: a browser uses either.
pub(crate) fn page(port: u16, turn: usize) -> std::io::Result<String> {
    let address: IpAddr =
        if turn.is_multiple_of(2) { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
    page_at(address, port, "/")
}

/// Waits until both addresses return this container's page.
#[track_caller]
pub(crate) fn answers(port: u16, wanted: &str) {
    for turn in 0..2 {
        until(&format!("{wanted}'s page at port {port}"), || match page(port, turn) {
            Ok(text) if text == wanted => Ok(()),
            other => Err(other),
        });
    }
}

/// Returns whether both addresses refuse connections.
pub(crate) fn is_refused(port: u16) -> bool {
    let refuses = |address: IpAddr| {
        TcpStream::connect((address, port)).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
    };
    refuses(Ipv4Addr::LOCALHOST.into()) && refuses(Ipv6Addr::LOCALHOST.into())
}

/// Waits until both addresses refuse connections.
#[track_caller]
pub(crate) fn refuses(port: u16) {
    until(
        &format!("port {port} to be refused"),
        || if is_refused(port) { Ok(()) } else { Err("it answers") },
    );
}

/// Returns the daemon's whole description.
pub(crate) fn described(home: &Home) -> Value {
    rpc::done(home, &json!({"kind": "describe"}))
}

/// Returns a container's part of the description, or null.
pub(crate) fn container(home: &Home, name: &str) -> Value {
    let description = described(home);
    let mut all = description["containers"].as_array().unwrap().iter();
    all.find(|one| one["containerName"] == name).cloned().unwrap_or_default()
}

/// Returns a container's rows: port and state, the lowest port first.
pub(crate) fn rows(container: &Value) -> Vec<(u16, String)> {
    let rows = container["forwards"].as_array().into_iter().flatten();
    rows.map(|row| {
        let port = u16::try_from(row["port"].as_u64().unwrap()).unwrap();
        (port, row["state"].as_str().unwrap().to_owned())
    })
    .collect()
}

/// Waits until exactly these ports of a container are open.
#[track_caller]
pub(crate) fn is_open(home: &Home, name: &str, ports: &[u16]) {
    let wanted: Vec<_> = ports.iter().map(|port| (*port, "open".to_owned())).collect();
    until(&format!("{name} to have {ports:?} open"), || match container(home, name) {
        found if rows(&found) == wanted && found["state"] == "reached" => Ok(()),
        found => Err(found),
    });
}

/// Resources of the relay engine and its openers.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Held {
    engines: usize,
    openers: usize,
    connections: u64,
    /// The number of descriptors of each kind.
    descriptors: BTreeMap<String, usize>,
}

impl Held {
    fn now(home: &Home) -> Held {
        let description = described(home);
        let containers = description["containers"].as_array().unwrap().iter();
        let rows = containers.flat_map(|one| one["forwards"].as_array().unwrap());
        let engines = running("_engine");
        Held {
            engines: engines.len(),
            openers: running("_opener").len(),
            connections: rows.map(|row| row["connections"].as_u64().unwrap()).sum(),
            descriptors: kinds_of_descriptors(&engines),
        }
    }

    /// Waits until the relay holds no resource for a container, and returns its resources. At least one container must have
    /// existed, because the relay is started for the first one.
    #[track_caller]
    pub(crate) fn without_containers(home: &Home) -> Held {
        until("the relay to release every resource", || match Held::now(home) {
            held if (held.engines, held.openers, held.connections) == (1, 0, 0)
                && described(home)["containers"].as_array().unwrap().is_empty() =>
            {
                Ok(held)
            }
            held => Err(held),
        })
    }

    /// Waits until the relay holds no more than `self`.
    #[track_caller]
    pub(crate) fn wait_until_released(&self, home: &Home) {
        let few =
            |(kind, count): (&String, &usize)| *count <= self.descriptors.get(kind).copied().unwrap_or(0);
        until("no more to be held than before", || match Held::without_containers(home) {
            now if now.descriptors.iter().all(few) => Ok(()),
            now => Err((now, format!("before: {self:?}"))),
        });
    }
}

/// Waits until one relay has one opener for each of this many containers, and no connection is open.
#[track_caller]
pub(crate) fn wait_for_openers(home: &Home, count: usize) {
    until("one relay and its openers", || match Held::now(home) {
        held if (held.engines, held.openers, held.connections) == (1, count, 0) => Ok(()),
        held => Err(held),
    });
}

/// Counts the descriptors of processes by their targets: `socket`, `pipe`, `anon_inode:[eventfd]`, a path.
fn kinds_of_descriptors(pids: &[u32]) -> BTreeMap<String, usize> {
    let mut kinds = BTreeMap::new();
    for pid in pids {
        let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        for target in entries.filter_map(|entry| std::fs::read_link(entry.path()).ok()) {
            let target = target.to_string_lossy();
            // Without the number in `socket:[4242]`, and without process ids.
            let kind = match target.split_once(":[") {
                Some((kind, _)) if !target.starts_with("anon_inode") => kind,
                _ => &target,
            };
            let kind = if kind.starts_with("/proc/") { "/proc" } else { kind };
            *kinds.entry(kind.to_owned()).or_default() += 1;
        }
    }
    kinds
}
