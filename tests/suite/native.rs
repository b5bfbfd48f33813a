//! Claim 26: a native socket answers as the server's own socket would on the host, is never reachable from other machines
//! and never shared; a server without one is relayed. `engine/tests/native.rs` has the cases of the supervisor alone.

use std::net::TcpListener;
use std::process::Command;

use landfall_tests::case::Case;
use landfall_tests::run::{PYTHON, Run, exists, fetch};
use landfall_tests::{Home, TIMEOUT, is_long, note, wait_until};
use rustix::process::Signal;
use serde_json::Value;

pub(crate) const CASES: &[Case] = &[
    Case::once("c26_a_server_listens_on_the_host_itself", listens_itself),
    Case::once("c26_native_ports_are_shown_by_the_daemon_and_survive_its_kill", daemon_killed),
    Case::once("c26_the_death_of_landfall_ends_the_sandbox", death_ends_the_sandbox),
    Case::once("c26_a_foreign_holder_makes_listen_fail", foreign_holder),
    Case::once("c26_two_sandboxes_with_one_port_both_work_inside", two_with_one_port),
    Case::once("c26_the_choice_of_sockets_is_obeyed", choices),
    Case::once("c26_port_policy_applies_to_native_ports", policy),
    Case::once("c26_a_refusing_kernel_is_reported_and_servers_are_relayed", refused),
    Case::once("c26_a_sandbox_in_a_sandbox_is_relayed", nested),
    Case::once("c26_native_sockets_work_with_no_new_privileges", no_new_privileges),
    Case::once("c26_an_ordinary_user_has_native_sockets", ordinary_user),
    Case::once("c26_interrupted_calls_have_no_side_effect", interrupted),
    Case::once("c26_hostile_programs_harm_only_themselves", hostile),
    Case::once("c26_connections_are_counted_on_demand", counted),
    Case::once("c26_a_parent_that_bound_keeps_the_port_for_its_children", reloaded),
];

/// `landfall run` with these options, without a daemon unless one runs.
fn run(home: &Home, options: &[&str]) -> Command {
    let mut command = home.command(&["run"]);
    command.args(options);
    command
}

/// Waits until `wanted` accepts the row of a port in `landfall ls --json`.
#[track_caller]
fn row(home: &Home, name: &str, port: u16, wanted: impl Fn(&Value) -> bool) -> Value {
    wait_until(&format!("port {port} of {name} in ls"), || {
        let output = home.run(&["ls", "--json"]);
        let reported: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let containers = reported["containers"].as_array().into_iter().flatten();
        let container = containers.into_iter().find(|container| container["containerName"] == name);
        let rows = container.and_then(|container| container["forwards"].as_array()).into_iter().flatten();
        let row = rows.into_iter().find(|row| row["port"] == port).cloned();
        row.filter(&wanted).ok_or(reported)
    })
}

#[track_caller]
fn until_refused(at: &str) {
    wait_until(&format!("{at} to refuse"), || match fetch(at) {
        refused if refused == "ConnectionRefused" => Ok(()),
        other => Err(other),
    });
}

fn listens_itself() {
    let home = Home::new();
    let mut server = Run::python(
        run(&home, &["--name", "web"]),
        "listen('0.0.0.0', 3000); say(fetch('127.0.0.1', 3000)); listen('::', 3001, 'six'); wait()",
    );
    let line = server.err.wait_for("forward  http://localhost:3000");
    assert!(line.contains("→  web:3000 (python3, pid ") && line.ends_with("), native socket"), "{line}");
    server.out.wait_for("hello");
    assert_eq!(fetch("127.0.0.1:3000"), "hello");
    assert_eq!(fetch("[::1]:3000"), "ConnectionRefused", "as on the host");
    server.err.wait_for("forward  http://localhost:3001");
    assert_eq!((fetch("[::1]:3001"), fetch("127.0.0.1:3001")), ("six".to_owned(), "six".to_owned()));
    assert!(server.end().success());
    server.err.wait_for("closed   http://localhost:3000");
    assert_eq!(fetch("127.0.0.1:3000"), "ConnectionRefused");
    assert_eq!(server.err.count("forward"), 2, "neither stub was relayed: {}", server.err.all());
}

fn daemon_killed() {
    let home = Home::new();
    let daemon = home.daemon();
    let mut server = Run::python(run(&home, &["--name", "web"]), "listen('::', 3000); wait()");
    server.err.wait_for("forward  http://localhost:3000");
    assert!(server.err.count(", native socket") == 1);
    let native = |row: &Value| row["path"] == "native" && row["state"] == "open";
    let before = row(&home, "web", 3000, native);
    assert_eq!(before["addresses"], serde_json::json!(["::"]));
    assert_eq!(before["process"], "python3");
    let event = home.wait_for_event("port-forward-event", |event| event["event"]["path"] == "native");
    assert_eq!(event["event"]["kind"], "port-forward-opened");
    let shown = String::from_utf8(home.run(&["ls"]).stdout).unwrap();
    assert!(shown.contains("native") && shown.contains("every loopback address"), "{shown}");

    daemon.kill();
    assert_eq!(fetch("127.0.0.1:3000"), "hello");
    let next = home.daemon();
    let after = row(&home, "web", 3000, native);
    assert_eq!(after["pid"], before["pid"]);
    assert_eq!(fetch("127.0.0.1:3000"), "hello");
    // The stub existed before the link: the port is neither relayed nor reported as failed.
    let failed = home.events().into_iter().find(|event| event["event"]["kind"] == "port-forward-failed");
    assert_eq!(failed, None);
    assert!(server.end().success());
    home.wait_for_event("port-forward-event", |event| event["event"]["kind"] == "port-forward-closed");
    drop(next);
}

fn death_ends_the_sandbox() {
    let home = Home::new();
    let server = Run::python(
        run(&home, &[]),
        // The command ignores the kernel's signal, and a grandchild has left its session.
        "
import signal, subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
s = listen('127.0.0.1', 3000)
orphan = subprocess.Popen(['/usr/bin/setsid', '/usr/bin/sleep', '1000'], pass_fds=[s.fileno()])
say('pids', os.getpid(), orphan.pid)
wait(); time.sleep(1000)",
    );
    server.err.wait_for("forward  http://localhost:3000");
    let line = server.out.wait_for("pids ");
    let pids: Vec<u32> = line.split(' ').skip(1).map(|pid| pid.parse().unwrap()).collect();
    server.signal(Signal::KILL);
    wait_until("the end of every process", || {
        let left: Vec<u32> = pids.iter().copied().filter(|pid| exists(*pid) && !is_zombie(*pid)).collect();
        if left.is_empty() { Ok(()) } else { Err(left) }
    });
    until_refused("127.0.0.1:3000");
}

fn is_zombie(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_none_or(|(_, fields)| fields.starts_with('Z'))
}

/// A dev server that finds a free port by calling `listen`, as Vite, Next and others do.
const PROBING: &str = "
for port in range(3000, 3010):
    try: s = listen('127.0.0.1', port); break
    except OSError as error: say(port, error.errno)
say('has', port); wait()";

fn foreign_holder() {
    let home = Home::new();
    let foreign = TcpListener::bind("127.0.0.1:3000").unwrap();
    let mut server = Run::python(run(&home, &[]), PROBING);
    server.out.wait_for("3000 98");
    server.out.wait_for("has 3001");
    let line = server.err.wait_for("taken    localhost:3000 is held by");
    assert!(line.contains(&format!("pid {}", std::process::id())), "{line}");
    server.err.wait_for("forward  http://localhost:3001");
    assert!(server.end().success());

    let mut server = Run::python(run(&home, &["--on-conflict", "relay"]), PROBING);
    server.out.wait_for("has 3000");
    server.err.wait_for("taken    localhost:3000 is held by");
    drop(foreign);
    let line = server.err.wait_for("forward  http://localhost:3000");
    assert!(!line.contains("native"), "{line}");
    assert_eq!(fetch("127.0.0.1:3000"), "hello");
    assert!(server.end().success());
}

fn two_with_one_port() {
    for with_daemon in [true, false] {
        let home = Home::new();
        let daemon = with_daemon.then(|| home.daemon());
        let script = |word: &str| {
            format!("listen('127.0.0.1', 3000, '{word}'); say(fetch('127.0.0.1', 3000)); wait()")
        };
        let mut one = Run::python(run(&home, &["--name", "one"]), &script("one"));
        one.err.wait_for("forward  http://localhost:3000");
        let mut two = Run::python(run(&home, &["--name", "two"]), &script("two"));
        two.out.wait_for("two");
        if with_daemon {
            let failed = row(&home, "two", 3000, |row| row["state"] == "failed");
            let reason = failed["reason"].as_str().unwrap();
            assert!(reason.contains("forwarded to container \"one\", which had it first"), "{reason}");
        } else {
            two.err.wait_for("taken    localhost:3000 is held by python3");
        }
        assert_eq!(fetch("127.0.0.1:3000"), "one");
        assert!(one.end().success());
        let line = two.err.wait_for("forward  http://localhost:3000");
        assert!(!line.contains("native"), "{line}");
        wait_until("the other server", || match fetch("127.0.0.1:3000") {
            word if word == "two" => Ok(()),
            other => Err(other),
        });
        assert!(two.end().success());
        // The server can retry a port that failed.
        let mut one = Run::python(run(&home, &["--name", "one"]), &script("one"));
        one.err.wait_for("forward  http://localhost:3000");
        let mut two = Run::python(run(&home, &["--name", "two", "--on-conflict", "fail"]), PROBING);
        two.out.wait_for("has 3001");
        assert!(two.end().success() && one.end().success());
        drop(daemon);
    }
}

fn choices() {
    let home = Home::new();
    let path_of = |command: Command| {
        let mut server = Run::python(command, "listen('127.0.0.1', 3000); wait()");
        let line = server.err.wait_for("forward  http://localhost:3000");
        assert!(server.end().success());
        if line.ends_with("native socket") { "native" } else { "relay" }
    };
    assert_eq!(path_of(run(&home, &["--sockets", "native"])), "native");
    assert_eq!(path_of(run(&home, &["--sockets", "relay"])), "relay");
    assert_eq!(path_of(run(&home, &["--net", "none"])), "relay");
    let mut command = run(&home, &[]);
    command.env("LANDFALL_SOCKETS", "relay");
    assert_eq!(path_of(command), "relay");
    for (options, variable) in [(vec!["--net", "none", "--sockets", "native"], ""), (vec![], "fast")] {
        let mut command = run(&home, &options);
        let output = command.env("LANDFALL_SOCKETS", variable).args(["--", "true"]).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{output:?}");
    }
    let daemon = home.start().argument("--sockets").argument("relay").wait_until_ready();
    assert_eq!(path_of(run(&home, &[])), "relay");
    assert_eq!(path_of(run(&home, &["--sockets", "auto"])), "native");
    drop(daemon);
}

fn policy() {
    let home = Home::new();
    let script = "listen('127.0.0.1', 3000); listen('127.0.0.1', 4000); listen('127.0.0.1', 80); listen('127.0.0.1', 8973)
say(fetch('127.0.0.1', 3000)); wait()";
    let mut server = Run::python(run(&home, &["--deny", "3000"]), script);
    server.err.wait_for("denied   port 3000 is not forwarded");
    server.err.wait_for("denied   port 80 is not forwarded");
    server.err.wait_for("denied   port 8973 is not forwarded");
    server.err.wait_for("forward  http://localhost:4000");
    server.out.wait_for("hello");
    for at in ["127.0.0.1:3000", "127.0.0.1:80", "127.0.0.1:8973"] {
        assert_eq!(fetch(at), "ConnectionRefused", "{at}");
    }
    assert!(server.end().success());
    let mut server = Run::python(run(&home, &["--allow", "80"]), "listen('127.0.0.1', 80); wait()");
    let line = server.err.wait_for("forward  http://localhost:80");
    assert!(line.ends_with("native socket"), "{line}");
    assert_eq!(fetch("127.0.0.1:80"), "hello");
    assert!(server.end().success());
}

/// A program that installs a filter in which `seccomp(2)` fails, and then executes its remaining arguments.
pub(crate) const WITHOUT_SECCOMP: &str = "_without_seccomp";

/// [`WITHOUT_SECCOMP`].
pub(crate) fn without_seccomp(arguments: &[String]) {
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
    use std::os::unix::process::CommandExt;
    let number = if cfg!(target_arch = "x86_64") { 317 } else { 277 };
    let rules = [(number, Vec::new())].into_iter().collect();
    let errno = SeccompAction::Errno(1);
    let here = std::env::consts::ARCH.try_into().unwrap();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, errno, here).unwrap();
    seccompiler::apply_filter(&BpfProgram::try_from(filter).unwrap()).unwrap();
    panic!("{}", Command::new(&arguments[0]).args(&arguments[1..]).exec());
}

/// Returns the same command as arguments of another program, with its environment.
fn under(program: &str, before: &[&str], command: &Command) -> Command {
    let mut outer = Command::new(program);
    outer.args(before).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => outer.env(name, value),
            None => outer.env_remove(name),
        };
    }
    outer
}

fn refused() {
    let home = Home::new();
    let this = std::env::current_exe().unwrap();
    let without = |options: &[&str]| under(this.to_str().unwrap(), &[WITHOUT_SECCOMP], &run(&home, options));
    let mut server = Run::python(without(&[]), "listen('127.0.0.1', 3000); wait()");
    let line = server.err.wait_for("servers are relayed, since native sockets do not work here");
    assert!(line.ends_with("seccomp filters are not permitted here"), "{line}");
    let line = server.err.wait_for("forward  http://localhost:3000");
    assert!(!line.contains("native"), "{line}");
    assert_eq!(fetch("127.0.0.1:3000"), "hello");
    assert!(server.end().success());
    let mut command = without(&["--sockets", "native"]);
    let output = command.args(["--", "/bin/true"]).output().unwrap();
    let printed = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(125), "{printed}");
    assert!(
        printed.contains("native sockets do not work here") && printed.contains("\nhint: --sockets relay"),
        "{printed}"
    );
    let output =
        under(this.to_str().unwrap(), &[WITHOUT_SECCOMP], &home.command(&["doctor"])).output().unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    let line = printed.lines().find(|line| line.contains("native sockets")).unwrap();
    assert!(line.starts_with("lack") && line.contains("not permitted"), "{line}");
}

fn nested() {
    let home = Home::new();
    let program = Home::program();
    let inner = [program.to_str().unwrap(), "run", "--no-daemon", "--name", "inner", "--", PYTHON, "-c"];
    let script = "
import socket, sys
s = socket.create_server(('127.0.0.1', 3000))
while True:
    c, _ = s.accept(); c.sendall(b'nested'); c.close()";
    let mut command = run(&home, &["--name", "outer", "--no-daemon", "--"]);
    command.args(inner).arg(script);
    let server = Run::start(command);
    server
        .err
        .wait_for("servers are relayed, since native sockets do not work here: another program supervises");
    let line = server.err.wait_for("inner:3000");
    assert!(!line.contains("native"), "{line}");
    // The inner sandbox's relay is a server in the outer sandbox.
    let line = server.err.wait_for("outer:3000");
    assert!(line.ends_with("native socket"), "{line}");
    assert_eq!(fetch("127.0.0.1:3000"), "nested");
}

fn no_new_privileges() {
    let home = Home::new();
    let command = under("/usr/bin/setpriv", &["--no-new-privs"], &run(&home, &["--sockets", "native"]));
    let mut server = Run::python(command, "listen('127.0.0.1', 3000); wait()");
    let line = server.err.wait_for("forward  http://localhost:3000");
    assert!(line.ends_with("native socket"), "{line}");
    assert_eq!(fetch("127.0.0.1:3000"), "hello");
    assert!(server.end().success());
}

fn ordinary_user() {
    if !rustix::process::geteuid().is_root() {
        return note!("every case here is that of an ordinary user");
    }
    // The user cannot read the directory of the program.
    let directory = tempfile::Builder::new().prefix("landfall-suite-").tempdir_in("/tmp").unwrap();
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    let program = directory.path().join("landfall");
    std::fs::copy(Home::program(), &program).unwrap();
    let mut command = Command::new("/usr/bin/setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"]).arg(&program);
    command.args(["run", "--no-daemon", "--sockets", "native"]).env("HOME", directory.path());
    let mut server = Run::python(
        command,
        "listen('0.0.0.0', 3000); listen('::', 3001); say(fetch('127.0.0.1', 3000)); wait()",
    );
    server.out.wait_for("hello");
    for port in [3000, 3001] {
        let line = server.err.wait_for(&format!("forward  http://localhost:{port}"));
        assert!(line.ends_with("native socket"), "{line}");
        assert_eq!(fetch(&format!("127.0.0.1:{port}")), "hello");
    }
    assert!(server.end().success());
}

/// Binds and listens under a flood of signals, whose handler does not restart calls. Each call succeeds, or fails with EINTR
/// and without an effect.
fn interrupted() {
    let home = Home::new();
    let pairs = if is_long() { 20_000 } else { 200 };
    let script = format!(
        "
import signal
caught = 0
def catch(*_):
    global caught
    caught += 1
signal.signal(signal.SIGUSR1, catch)
signal.siginterrupt(signal.SIGUSR1, True)
me, over = os.getpid(), False
child = os.fork()
if child == 0:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    while os.getppid() == me:
        os.kill(me, signal.SIGUSR1)
        time.sleep(0.0005)
    os._exit(0)
interrupted = 0
for _ in range({pairs}):
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    while True:
        try: s.bind(('127.0.0.1', 3000)); break
        except InterruptedError:
            assert s.getsockname()[1] == 0
            interrupted += 1
    while True:
        try: s.listen(4); break
        except InterruptedError:
            assert s.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 0
            interrupted += 1
    assert s.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
    s.close()
say('done', interrupted, caught)
os.kill(child, signal.SIGKILL)
s = listen('127.0.0.1', 3001); wait()"
    );
    let mut server = Run::python(run(&home, &[]), &script);
    let printed = wait_long(&server, "done ");
    let counts: Vec<&str> = printed.split(' ').collect();
    note!("{pairs} pairs of bind and listen, {} signals: {} failed with EINTR", counts[2], counts[1]);
    server.err.wait_for("forward  http://localhost:3001");
    assert!(server.end().success());
}

/// Waits longer than usual, for cases that take longer with `--long`.
#[track_caller]
fn wait_long(server: &Run, text: &str) -> String {
    let start = std::time::Instant::now();
    let most = if is_long() { 30 * TIMEOUT } else { 3 * TIMEOUT };
    while server.out.count(text) == 0 {
        assert!(start.elapsed() < most, "no {text:?}: {}{}", server.out.all(), server.err.all());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    server.out.wait_for(text)
}

/// Programs that close, replace or swap the descriptor that a call in another thread names.
fn hostile() {
    let home = Home::new();
    let rounds = if is_long() { 5_000 } else { 60 };
    let mut honest_answer =
        Run::python(run(&home, &["--name", "honest"]), "listen('127.0.0.1', 4000, 'honest'); wait()");
    honest_answer.err.wait_for("forward  http://localhost:4000");
    let script = format!(
        "
null = os.open('/dev/null', os.O_RDONLY)
def attack(kind, fd):
    try:
        if kind == 'close': os.close(fd)
        elif kind == 'dup2': os.dup2(null, fd)
        elif kind == 'swap':
            other = bound('127.0.0.1', 0); os.dup2(other.fileno(), fd); other.close()
        elif kind == 'twice': socket.socket(fileno=os.dup(fd)).listen(4)
        elif kind == 'fork':
            if os.fork() == 0: os._exit(0)
            os.wait()
    except OSError: pass
for kind in ['close', 'dup2', 'swap', 'twice', 'fork']:
    for round in range({rounds}):
        try: s = bound('127.0.0.1', 3000)
        except OSError: continue
        fd = s.fileno()
        t = threading.Thread(target=attack, args=(kind, fd)); t.start()
        try: s.listen(4)
        except OSError: pass
        t.join()
        s.detach()
        try: os.close(fd)
        except OSError: pass
    say('survived', kind)
listen('127.0.0.1', 3001, 'after'); say(fetch('127.0.0.1', 3001)); wait()"
    );
    let mut server = Run::python(run(&home, &["--name", "hostile"]), &script);
    wait_long(&server, "survived fork");
    server.out.wait_for("after");
    server.err.wait_for("forward  http://localhost:3001");
    assert_eq!(fetch("127.0.0.1:3001"), "after");
    assert_eq!(fetch("127.0.0.1:4000"), "honest");
    assert!(server.end().success() && honest_answer.end().success());
    until_refused("127.0.0.1:3000");
}

fn counted() {
    use std::io::{Read, Write};
    let home = Home::new();
    let daemon = home.daemon();
    let mut server = Run::python(
        run(&home, &["--name", "web"]),
        "
s = bound('127.0.0.1', 3000); s.listen(8)
c, _ = s.accept()
assert c.recv(5) == b'12345'
c.sendall(b'x' * 2000)
assert c.recv(1) == b''
c.close(); wait()",
    );
    server.err.wait_for("forward  http://localhost:3000");
    let mut client = std::net::TcpStream::connect("127.0.0.1:3000").unwrap();
    client.write_all(b"12345").unwrap();
    client.read_exact(&mut [0; 2000]).unwrap();
    let counted = |row: &Value| row["connections"] == 1 && row["bytesUp"] == 5 && row["bytesDown"] == 2000;
    row(&home, "web", 3000, counted);
    drop(client);
    row(&home, "web", 3000, |row| row["connections"] == 0);
    assert!(server.end().success());
    drop(daemon);
}

/// `uvicorn --reload`: the parent binds, each child listens on the inherited socket.
fn reloaded() {
    let home = Home::new();
    let mut server = Run::python(
        run(&home, &[]),
        "
import signal
s = bound('127.0.0.1', 3000)
def child(word):
    pid = os.fork()
    if pid == 0:
        s.listen(16); serve(s, word)
        say('ready', word); time.sleep(1000)
    return pid
pid = child('first')
for word in sys.stdin:
    os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
    say('gone'); sys.stdin.readline()
    pid = child(word.strip())
os.kill(pid, signal.SIGKILL)",
    );
    server.out.wait_for("ready first");
    assert_eq!(fetch("127.0.0.1:3000"), "first");
    server.write("second");
    server.out.wait_for("gone");
    // Between two children a client waits in the backlog, as it does on the host.
    let client = std::thread::spawn(|| fetch("127.0.0.1:3000"));
    server.write("go on");
    server.out.wait_for("ready second");
    assert_eq!(client.join().unwrap(), "second");
    assert_eq!(server.err.count("forward"), 1, "{}", server.err.all());
    assert!(server.end().success());
    until_refused("127.0.0.1:3000");
}
