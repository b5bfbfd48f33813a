//! The helper's container, for a user who is not root and has only access to Docker's socket.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use landfall_engine::channel::Channel;
use landfall_engine::opener::client::{OpenError, Opener, Target};
use tempfile::TempDir;

use super::ports::free_port;
use super::{Container, docker, host, run, wait_until};

const IMAGE: &str = "landfall-test-agent";
/// A user id without an account.
const USER: u32 = 54_321;

/// A user's home, and the static program that the user runs.
struct User {
    folder: TempDir,
    program: PathBuf,
    group: u32,
    /// The version that the program reports.
    version: &'static str,
}

impl User {
    fn new() -> User {
        let folder = tempfile::tempdir().unwrap();
        std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let program = folder.path().join("landfall");
        let built = std::env::var_os("LANDFALL_TEST_STATIC").expect("a static build; run tests/docker.sh");
        std::fs::copy(built, &program).unwrap();
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
        let socket = host().strip_prefix("unix://").unwrap().to_owned();
        let group = std::fs::metadata(socket).unwrap().gid();
        let user = User { folder, program, group, version: "one" };
        std::fs::create_dir(user.home()).unwrap();
        std::os::unix::fs::chown(user.home(), Some(USER), Some(USER)).unwrap();
        user
    }

    fn home(&self) -> PathBuf {
        self.folder.path().join("home")
    }

    fn socket(&self) -> PathBuf {
        self.home().join("run/helper/opener.sock")
    }

    /// Runs `program` as that user.
    fn run(&self, program: &Path, arguments: &[&str]) -> Output {
        let (user, group) = (USER.to_string(), self.group.to_string());
        Command::new("setpriv")
            .args(["--reuid", &user, "--regid", &user, "--groups", &group, "--inh-caps=-all"])
            .args(["--bounding-set=-all", "--no-new-privs"])
            .arg(program)
            .args(arguments)
            .env("LANDFALL_HOME", self.home())
            .env("LANDFALL_VERSION", self.version)
            .env_remove("HOME")
            .current_dir("/")
            .output()
            .unwrap()
    }

    #[track_caller]
    fn landfall(&self, arguments: &[&str]) -> String {
        let output = self.run(&self.program, arguments);
        let said =
            format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{arguments:?}: {said}");
        said
    }

    fn helper(&self) -> Option<String> {
        let filter = format!("label=dev.landfall.helper={}", self.home().display());
        let listed = docker(&["ps", "-a", "--no-trunc", "-q", "--filter", &filter]);
        listed.lines().next().map(str::to_owned)
    }

    fn helper_runs(&self) -> Option<String> {
        let status: serde_json::Value = serde_json::from_str(&self.landfall(&["status", "--json"])).unwrap();
        (status["dockerHelper"]["state"] == "running").then(|| self.helper()).flatten()
    }
}

impl Drop for User {
    fn drop(&mut self) {
        let _ = self.run(&self.program, &["down"]);
        if let Some(helper) = self.helper() {
            run(&["rm", "-f", &helper]);
        }
    }
}

/// Returns whether the test can change its user id. Without root, the other cases still run.
fn can_change_user() -> bool {
    rustix::process::geteuid().is_root()
}

/// Returns the answer of a web server at this port of the host, if it answers.
fn page(port: u16) -> Option<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    stream.write_all(b"GET /index.html HTTP/1.0\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    answer.contains("from inside").then_some(answer)
}

/// Runs a container with a web server on its own loopback.
fn server(name: &str, port: u16, options: &[&str]) -> Container {
    let address = format!("127.0.0.1:{port}");
    Container::run(name, options, IMAGE, &["busybox", "httpd", "-f", "-p", &address, "-h", "/www"])
}

#[test]
#[ignore = "needs a Docker engine: tests/docker.sh"]
fn an_unprivileged_docker_user_reaches_containers_through_the_helper() {
    if !can_change_user() {
        return;
    }
    let mut user = User::new();
    // Without the helper, the advice names it.
    let (one, other) = (free_port(), free_port());
    let web = server("helped", one, &[]);
    user.landfall(&["up", "--http-port", "0"]);
    user.landfall(&["register", web.0.as_str(), "--docker", "--cwd", "/"]);
    wait_until("the advice", || {
        user.landfall(&["ls"])
            .contains("another user; enter it as that user, or as root (landfall up --docker-helper")
            .then_some(())
    });
    user.landfall(&["down"]);

    let up = user.landfall(&["up", "--http-port", "0", "--docker-helper"]);
    assert!(up.contains("the network namespace of any process (CAP_SYS_ADMIN, CAP_SYS_PTRACE)"), "{up}");
    let first = user.helper_runs().expect("a running helper");
    let given = "{{.HostConfig.NetworkMode}} {{.HostConfig.CapAdd}} {{.HostConfig.CapDrop}} {{.HostConfig.ReadonlyRootfs}} \
                 {{.HostConfig.Privileged}} {{len .Mounts}}";
    let privileges = docker(&["inspect", "-f", given, &first]);
    // Docker may write the names with the prefix `CAP_`.
    assert_eq!(privileges.replace("CAP_", ""), "none [SYS_ADMIN SYS_PTRACE] [ALL] true false 1");

    calls_of_others_are_refused(&user, &first);

    // A usual container, and one of another user without any capability.
    let bare =
        server("helped-bare", other, &["--user", "4242:4242", "--cap-drop", "ALL", "--network", "none"]);
    user.landfall(&["register", bare.0.as_str(), "--docker", "--cwd", "/"]);
    wait_until("the page on the host", || page(one));
    wait_until("the other page on the host", || page(other));
    let status = user.landfall(&["status", web.0.as_str()]);
    assert!(status.contains("docker, helper"), "{status}");

    // The containers are restarted, and the helper is killed and then removed. Each time the pages return.
    docker(&["restart", "-t", "0", web.0.as_str()]);
    wait_until("the page after a restart", || page(one));
    docker(&["kill", &first]);
    let second = wait_until("another helper", || user.helper_runs().filter(|id| *id != first));
    docker(&["restart", "-t", "0", web.0.as_str(), bare.0.as_str()]);
    wait_until("the page through another helper", || page(one));
    wait_until("the other page through another helper", || page(other));
    docker(&["rm", "-f", &second]);
    wait_until("a third helper", || user.helper_runs().filter(|id| *id != second));
    wait_until("the page through a third helper", || page(one));
    wait_until("the other page through a third helper", || page(other));

    // Another build, started without the option, keeps the helper.
    user.version = "another";
    let up = user.landfall(&["up"]);
    assert!(up.contains("replaces a daemon of another build") && up.contains("CAP_SYS_ADMIN"), "{up}");
    wait_until("the page from another build", || page(one));

    let name = docker(&["inspect", "-f", "{{.Name}}", &user.helper().unwrap()]);
    let name = name.trim_start_matches('/');
    assert_eq!(docker(&["images", "-q", name]).lines().count(), 1);
    user.landfall(&["down"]);
    assert_eq!(user.helper(), None);
    assert_eq!(docker(&["images", "-q", name]), "");
    assert!(!user.socket().parent().unwrap().exists());
}

/// Prints the error number of each call that a helper does not make, and of the one that it makes. Each call succeeds with
/// the helper's capabilities and without a seccomp profile.
const ATTEMPTS: &str = r#"
import ctypes, json, os
libc = ctypes.CDLL(None, use_errno=True)
keyctl = 219 if os.uname().machine == "aarch64" else 250
network, uts = (os.open("/proc/self/ns/" + name, os.O_RDONLY) for name in ("net", "uts"))
itself = os.pidfd_open(os.getpid())
attempts = {
    "enter a network": lambda: libc.setns(network, 0x40000000),
    "enter a namespace of any type": lambda: libc.setns(network, 0),
    "enter a uts namespace": lambda: libc.setns(uts, 0x04000000),
    "make a mount namespace": lambda: libc.unshare(0x00020000),
    "mount": lambda: libc.mount(b"none", b"/tmp", b"tmpfs", 0, None),
    "open a file system": lambda: libc.syscall(430, b"tmpfs", 0),
    "join a keyring": lambda: libc.syscall(keyctl, 1, None),
    "take a descriptor": lambda: libc.syscall(438, itself, 0, 0),
    "be traced": lambda: libc.ptrace(0, 0, 0, 0),
}
print(json.dumps({name: ctypes.get_errno() if call() == -1 else 0 for name, call in attempts.items()}))
"#;

/// Makes the calls of [`ATTEMPTS`] in a container with the helper's privileges, but this profile, and the host's Python.
fn attempts(profile: &str) -> BTreeMap<String, i32> {
    let profile = format!("seccomp={profile}");
    let output = Command::new("docker")
        .args(["run", "--rm", "--network", "none", "--cap-drop", "ALL"])
        .args(["--cap-add", "SYS_ADMIN", "--cap-add", "SYS_PTRACE"])
        .args(["--security-opt", "no-new-privileges", "--security-opt", "apparmor=unconfined"])
        .args(["--security-opt", &profile])
        .args(
            ["/usr", "/lib", "/lib64"].iter().flat_map(|path| ["-v".to_owned(), format!("{path}:{path}:ro")]),
        )
        .args([IMAGE, "/usr/bin/python3", "-c", ATTEMPTS])
        .output()
        .unwrap();
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

/// Checks the seccomp profile of a running helper with another program.
fn calls_of_others_are_refused(user: &User, helper: &str) {
    const PERMISSION: i32 = 1;
    let options = docker(&["inspect", "-f", "{{json .HostConfig.SecurityOpt}}", helper]);
    let options: Vec<String> = serde_json::from_str(&options).unwrap();
    let profile = options.iter().find_map(|option| option.strip_prefix("seccomp="));
    let file = user.folder.path().join("profile.json");
    std::fs::write(&file, profile.expect("the helper has a seccomp profile")).unwrap();
    for (attempt, errno) in attempts("unconfined") {
        assert_eq!(errno, 0, "{attempt}, without a profile");
    }
    for (attempt, errno) in attempts(file.to_str().unwrap()) {
        let wanted = if attempt == "enter a network" { 0 } else { PERMISSION };
        assert_eq!(errno, wanted, "{attempt}, with the helper's profile");
    }
}

/// Moves a process out of the control groups of its container, to the root of each hierarchy. That requires privilege.
fn leave_control_groups(pid: &str) {
    let root = Path::new("/sys/fs/cgroup");
    let hierarchies = std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path());
    // With version 2 alone, the mount is the only hierarchy, and its directories are groups.
    let is_unified = root.join("cgroup.procs").exists();
    let roots: Vec<PathBuf> =
        if is_unified { vec![root.to_owned()] } else { hierarchies.filter(|path| path.is_dir()).collect() };
    for procs in roots.iter().map(|root| root.join("cgroup.procs")).filter(|procs| procs.exists()) {
        std::fs::write(&procs, pid).unwrap_or_else(|error| panic!("{}: {error}", procs.display()));
    }
}

#[test]
#[ignore = "needs a Docker engine: tests/docker.sh"]
fn c25_the_helper_enters_no_process_outside_the_control_group_of_its_container() {
    if !can_change_user() {
        return;
    }
    let user = User::new();
    user.landfall(&["up", "--http-port", "0", "--docker-helper"]);
    user.helper_runs().expect("a running helper");
    let port = free_port();
    let web = server("moved", port, &[]);
    leave_control_groups(&web.inspect("{{.State.Pid}}"));
    user.landfall(&["register", web.0.as_str(), "--docker", "--cwd", "/"]);
    wait_until("the reason", || {
        user.landfall(&["ls"]).contains("its control group does not name the container").then_some(())
    });
    assert_eq!(page(port), None);
    // A restart puts its process into its own control group.
    docker(&["restart", "-t", "0", web.0.as_str()]);
    wait_until("the page on the host", || page(port));
}

#[test]
#[ignore = "needs a Docker engine: tests/docker.sh"]
fn the_helper_accepts_only_its_user_and_survives_any_input() {
    if !can_change_user() {
        return;
    }
    let user = User::new();
    user.landfall(&["up", "--http-port", "0", "--docker-helper"]);
    let helper = user.helper_runs().expect("a running helper");
    let port = free_port();
    let web = server("hostile", port, &[]);
    let pid: u32 = web.inspect("{{.State.Pid}}").parse().unwrap();
    // Root can open the socket, but is another user.
    let refused = Opener::spawn_by_helper(&user.socket(), Target::process(pid).unwrap());
    assert!(matches!(refused, Err(OpenError::Helper { .. })), "{refused:?}");
    for _ in 0..500 {
        let channel = Channel::connect(&user.socket()).unwrap();
        let _ = channel.send(&serde_json::json!({"request": "enter", "target": "process"}), &[]);
    }
    // Any other user cannot open the socket.
    let other = Command::new("setpriv")
        .args(["--reuid", "54322", "--regid", "54322", "--clear-groups", "test", "-e"])
        .arg(user.socket())
        .status()
        .unwrap();
    assert!(!other.success());
    user.landfall(&["register", web.0.as_str(), "--docker", "--cwd", "/"]);
    wait_until("the page on the host", || page(port));
    assert_eq!(user.helper_runs(), Some(helper.clone()), "the helper was replaced");
    let processes = docker(&["top", &helper, "-eo", "pid,args"]);
    assert_eq!(processes.lines().filter(|line| line.contains("_opener")).count(), 1, "{processes}");
}

#[test]
#[ignore = "needs a Docker engine: tests/docker.sh"]
fn a_program_that_is_not_static_is_refused_before_the_start() {
    if !can_change_user() {
        return;
    }
    let user = User::new();
    let program = user.folder.path().join("dynamic");
    std::fs::copy(env!("CARGO_BIN_EXE_landfall"), &program).unwrap();
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    let output = user.run(&program, &["up", "--http-port", "0", "--docker-helper"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("crt-static"), "{said}");
    assert!(!user.home().join("run/hostd.sock").exists());
}
