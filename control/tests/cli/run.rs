//! `landfall run` with the real binary: the identity, the streams, the network and the end of the command.

#![expect(clippy::unwrap_used, reason = "a test that cannot continue reports the line")]

use std::io::Write;
use std::process::{Command, Stdio};

use crate::support::{Nobody, Running, landfall, output, stderr, stdout, with_default_signals};
use rustix::process::Signal;

fn run(script: &str) -> Command {
    let mut command = landfall();
    command.args(["run", "--net", "none", "--", "sh", "-c", script]);
    command
}

#[test]
fn the_exit_code_is_the_commands() {
    let code = |script: &str| output(&["run", "--net", "none", "--", "sh", "-c", script]).status.code();
    assert_eq!(code("exit 0"), Some(0));
    assert_eq!(code("exit 77"), Some(77));
    assert_eq!(code("kill -TERM $$"), Some(128 + 15));
    assert_eq!(code("kill -KILL $$"), Some(128 + 9));
}

#[test]
fn the_standard_streams_are_the_commands() {
    let mut command = run("cat; echo talk >&2");
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"data\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(stdout(&output), "data\n");
    assert_eq!(stderr(&output), "talk\n", "landfall prints nothing");
}

#[test]
fn a_pipe_ends_when_the_command_closes_it() {
    let mut running = Running::start(run("echo ready; exec >&-; read line"));
    running.out("ready");
    running.out_ends();
    drop(running.child.stdin.take());
    assert_eq!(running.exit_code(), Some(1));
}

#[test]
fn only_the_network_and_the_user_namespace_are_new() {
    const NAMESPACES: [&str; 7] = ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"];
    let script = NAMESPACES.map(|name| format!("readlink /proc/self/ns/{name}")).join("; ");
    let outside = stdout(&Command::new("sh").args(["-c", &script]).output().unwrap());
    let inside = stdout(&run(&script).output().unwrap());
    assert_eq!(inside.lines().count(), NAMESPACES.len(), "{inside}");
    let lines = outside.lines().zip(inside.lines()).zip(NAMESPACES);
    let own: Vec<&str> =
        lines.filter(|((outside, inside), _)| outside != inside).map(|(_, name)| name).collect();
    // A command of root has no new user namespace if those are forbidden.
    assert!(own == ["net", "user"] || (own == ["net"] && rustix::process::geteuid().is_root()), "{own:?}");
}

#[test]
fn a_command_keeps_its_user_and_gains_no_privileges() {
    let Some(nobody) = Nobody::new() else { return };
    let script =
        "id -u; id -g; grep -E 'Cap(Inh|Prm|Eff|Amb)|SigBlk' /proc/self/status; ls /proc/self/fd | wc -l";
    let output = nobody
        .landfall()
        .args(["run", "--net", "none", "--", "sh", "-c", script])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let zero = "0000000000000000";
    let listing = stdout(
        &Command::new("sh").args(["-c", "ls /proc/self/fd | wc -l"]).stdin(Stdio::null()).output().unwrap(),
    );
    assert_eq!(
        stdout(&output),
        format!(
            "65534\n65534\nSigBlk:\t{zero}\nCapInh:\t{zero}\nCapPrm:\t{zero}\nCapEff:\t{zero}\nCapAmb:\t{zero}\n{listing}"
        ),
        "{}",
        stderr(&output)
    );
}

#[test]
fn a_command_of_root_can_change_to_other_users() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let output = output(&[
        "run",
        "--net",
        "none",
        "--",
        "setpriv",
        "--reuid=33",
        "--regid=33",
        "--clear-groups",
        "id",
        "-u",
    ]);
    assert_eq!(stdout(&output), "33\n", "{}", stderr(&output));
}

/// Listens on a port inside, prints `listening`, and waits for the end of its standard input.
const LISTEN: &str = "
import socket, sys
s = socket.create_server(('127.0.0.1', int(sys.argv[1])))
c = socket.create_connection(s.getsockname())
print('listening', flush=True)
sys.stdin.read()";

#[test]
fn two_commands_listen_on_the_same_port_each_in_its_own_loopback() {
    let start = || {
        let mut command = landfall();
        command.args(["run", "--net", "none", "--deny", "*", "--", "python3", "-c", LISTEN, "3000"]);
        Running::start(command)
    };
    let (mut one, mut two) = (start(), start());
    one.out("listening");
    two.out("listening");
    for running in [&mut one, &mut two] {
        drop(running.child.stdin.take());
        assert_eq!(running.exit_code(), Some(0));
    }
}

#[test]
fn an_unprivileged_user_has_a_loopback_inside() {
    let Some(nobody) = Nobody::new() else { return };
    let mut command = nobody.landfall();
    // The python of a developer may be in a directory that `nobody` cannot read.
    command.args(["run", "--net", "none", "--deny", "*", "--", "/usr/bin/env", "-S", "bash", "-c"]);
    command.arg("exec 3<>/dev/tcp/127.0.0.1/1");
    let output = command.output().unwrap();
    assert!(stderr(&output).contains("Connection refused"), "the loopback is up: {}", stderr(&output));
}

#[test]
fn signals_sent_to_landfall_reach_the_command() {
    for (signal, name) in [
        (Signal::TERM, "TERM"),
        (Signal::HUP, "HUP"),
        (Signal::INT, "INT"),
        (Signal::USR1, "USR1"),
        (Signal::USR2, "USR2"),
    ] {
        let mut running = Running::start(with_default_signals(&run(&format!(
            "trap 'echo got {name}; exit 3' {name}; echo ready; while :; do sleep 0.05; done"
        ))));
        running.out("ready");
        running.signal(signal);
        running.out(&format!("got {name}"));
        assert_eq!(running.exit_code(), Some(3));
    }
}

#[test]
fn the_command_ends_when_landfall_is_killed() {
    let mut running = Running::start(run("echo ready; exec sleep 1000"));
    running.out("ready");
    running.signal(Signal::KILL);
    running.out_ends();
    assert_eq!(running.exit_code(), None);
}

#[test]
fn processes_that_the_command_left_are_ended() {
    // One ends at SIGTERM, one ignores it; both have standard output open.
    let mut running = Running::start(run(
        "sleep 1000 & (trap '' TERM; echo ready; while :; do sleep 1; done) & read line; exit 5",
    ));
    running.out("ready");
    drop(running.child.stdin.take());
    running.err("note     the command left sleep (pid ");
    assert_eq!(running.exit_code(), Some(5));
    running.out_ends();
}

#[test]
fn processes_that_a_stopped_command_left_are_ended() {
    let server = "trap 'echo bye; exit' TERM; echo ready; while :; do sleep 0.05; done";
    let mut running = Running::start(run(&format!("sh -c \"{server}\"; true")));
    running.out("ready");
    running.signal(Signal::TERM);
    running.out("bye");
    assert_eq!(running.exit_code(), Some(128 + 15), "the outer shell ends without passing the signal on");
    running.out_ends();
}

/// Prints whether a second SIGINT arrived within 0.5 s of the first.
const COUNT_INTERRUPTS: &str = "
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
print('ready', flush=True)
signal.sigwait([signal.SIGINT])
print('twice' if signal.sigtimedwait([signal.SIGINT], 0.5) else 'once', flush=True)";

#[test]
fn ctrl_c_reaches_the_command_once() {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    grantpt(&terminal).unwrap();
    unlockpt(&terminal).unwrap();
    let path = ptsname(&terminal, Vec::new()).unwrap();
    let inner = std::fs::OpenOptions::new().read(true).write(true).open(path.to_str().unwrap()).unwrap();

    let mut command = Command::new("setsid");
    command.args(["--ctty", "--wait", env!("CARGO_BIN_EXE_landfall"), "run", "--net", "none", "--"]);
    command.args(["python3", "-c", COUNT_INTERRUPTS]);
    let mut child = command.stdin(inner).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let out = child.stdout.take().unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(out));
    assert_eq!(lines.next().unwrap().unwrap(), "ready");
    rustix::io::write(&terminal, b"\x03").unwrap();
    assert_eq!(lines.next().unwrap().unwrap(), "once");
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_missing_pasta_is_reported_once() {
    let run = |net: &str| {
        let mut command = landfall();
        command.env("PATH", "/nonexistent").args(["run", "--net", net, "--", "/bin/true"]);
        command.stdin(Stdio::null()).output().unwrap()
    };
    let auto = run("auto");
    assert_eq!(auto.status.code(), Some(0));
    assert_eq!(
        stderr(&auto),
        "note     the command has no outbound network: pasta is not installed\n\
         hint: install passt, which contains pasta, or use --net none\n"
    );
    let pasta = run("pasta");
    assert_eq!(pasta.status.code(), Some(125));
    assert!(stderr(&pasta).starts_with("error: pasta is not installed\nhint: "), "{}", stderr(&pasta));
    assert_eq!(stderr(&run("none")), "");
}

#[test]
fn pasta_provides_an_interface_and_ends_with_the_command() {
    if landfall::sys::sandbox::pasta::find().is_none() || !landfall::sys::sandbox::pasta::tun_is_usable() {
        return;
    }
    let mut command = landfall();
    command.args(["run", "--net", "pasta", "--", "sh", "-c"]);
    command.arg("pgrep -P $PPID '^pas'; grep -c : /proc/self/net/dev");
    let output = command.stdin(Stdio::null()).output().unwrap();
    let text = stdout(&output);
    let mut lines = text.lines();
    let pasta = lines.next().unwrap_or_default();
    assert_eq!(lines.next(), Some("2"), "lo, and the interface of pasta: {}", stderr(&output));
    assert!(!std::path::Path::new(&format!("/proc/{pasta}")).exists(), "pasta {pasta} has ended");
}

/// Runs `then` as root of a user namespace in which no further user namespaces can be created.
fn where_user_namespaces_are_forbidden(then: &str) -> std::process::Output {
    let script = format!("echo 0 >/proc/sys/user/max_user_namespaces && exec {then}");
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "sh", "-c", &script]).stdin(Stdio::null());
    command.output().unwrap()
}

#[test]
fn root_needs_no_user_namespace() {
    let landfall = env!("CARGO_BIN_EXE_landfall");
    let script = format!("{landfall} run --net none -- grep -c : /proc/self/net/dev");
    let output = where_user_namespaces_are_forbidden(&script);
    assert_eq!(stdout(&output), "1\n", "only lo: {}", stderr(&output));
}

#[test]
fn forbidden_user_namespaces_are_reported_with_the_setting_to_change() {
    let landfall = env!("CARGO_BIN_EXE_landfall");
    let script = format!("setpriv --bounding-set=-all --inh-caps=-all {landfall} run --net none -- true");
    let output = where_user_namespaces_are_forbidden(&script);
    assert_eq!(output.status.code(), Some(125));
    assert_eq!(
        stderr(&output),
        "error: cannot make a user and network namespace: No space left on device\n\
         hint: user namespaces are disabled: sysctl -w user.max_user_namespaces=10000\n"
    );
}
