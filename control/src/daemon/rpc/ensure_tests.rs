use super::*;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::time::SystemTime;

use serde_json::json;
use tempfile::TempDir;

/// A home with long timeouts. Only tests that wait for a timeout use short ones.
struct Case {
    _folder: TempDir,
    wanted: DesiredDaemon,
}

impl Case {
    fn new(program: &str) -> Case {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::at(folder.path().join("home")).unwrap();
        home.ensure_directories().unwrap();
        let long = Duration::from_secs(20);
        let poll = Duration::from_millis(5);
        let times = Times { ready: long, shutdown: long, lock: long, poll, ..Times::default() };
        let program = PathBuf::from(program);
        let wanted =
            DesiredDaemon { home, program, arguments: Vec::new(), version: "mine".to_owned(), times };
        Case { _folder: folder, wanted }
    }

    fn with_short_timeouts(program: &str) -> Case {
        let mut case = Case::new(program);
        let short = Duration::from_millis(200);
        case.wanted.times = Times { ready: short, shutdown: short, lock: short, ..case.wanted.times };
        case
    }

    fn error_text(&self) -> String {
        ensure(&self.wanted).unwrap_err().to_string()
    }

    /// Runs a daemon of some version in a thread. On `shutdown` it removes its socket if `obedient`.
    fn daemon(&self, version: &'static str, obedient: bool) {
        let path = self.wanted.home.socket();
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut line = String::new();
                BufReader::new(&stream).read_line(&mut line).unwrap();
                let asked: Value = serde_json::from_str(&line).unwrap();
                let result = match asked["kind"].as_str().unwrap() {
                    "version" => json!({ "version": version }),
                    "http-info" => json!({ "port": 8974 }),
                    _ => json!({}),
                };
                let _ = writeln!(stream, "{}", json!({ "ok": true, "result": result }));
                if asked["kind"] == "shutdown" && obedient {
                    fs::remove_file(&path).unwrap();
                    return;
                }
            }
        });
    }
}

#[test]
fn a_reachable_daemon_of_the_wanted_version_is_used() {
    let case = Case::new("/nonexistent");
    case.daemon("mine", true);
    let ensured = ensure(&case.wanted).unwrap();
    assert_eq!((ensured.http_port.get(), ensured.spawned, ensured.respawned), (8974, false, false));
}

#[test]
fn a_daemon_without_a_version_fits_each_caller() {
    let case = Case::new("/nonexistent");
    case.daemon(version::UNVERSIONED, true);
    assert!(!ensure(&case.wanted).unwrap().spawned);
}

#[test]
fn a_daemon_of_another_version_is_shut_down_and_replaced() {
    let case = Case::new("/bin/false");
    case.daemon("theirs", true);
    assert_eq!(case.error_text(), "daemon exited before becoming reachable");
    assert!(!case.wanted.home.socket().exists(), "the old daemon has ended");
}

#[test]
fn the_new_daemon_keeps_the_http_port_unless_an_argument_sets_it() {
    for (arguments, expected) in [
        (vec![], "_hostd --http-port 8974\n"),
        (vec!["--http-port".into(), "0".into()], "_hostd --http-port 0\n"),
    ] {
        let case = Case::new("");
        case.daemon("theirs", true);
        let wanted = DesiredDaemon { program: script(&case, "echo $@"), arguments, ..case.wanted.clone() };
        ensure(&wanted).unwrap_err();
        assert_eq!(fs::read_to_string(case.wanted.home.daemon_log()).unwrap(), expected);
    }
}

#[test]
fn a_daemon_of_another_version_that_does_not_end_continues() {
    let case = Case::with_short_timeouts("/nonexistent");
    case.daemon("theirs", false);
    assert_eq!(case.error_text(), "daemon version drifted but shutdown request did not complete");
    assert!(case.wanted.home.socket().exists());
}

#[test]
fn a_program_that_fails_is_an_error_and_leaves_no_pid_file() {
    let case = Case::new("/bin/false");
    assert!(case.error_text().contains("exited"));
    assert!(!case.wanted.home.pid_file().exists());
}

#[test]
fn a_missing_program_is_an_error() {
    let case = Case::new("/nonexistent");
    assert_eq!(case.error_text(), "failed to spawn daemon: No such file or directory (os error 2)");
}

#[test]
fn a_live_process_in_the_pid_file_is_waited_for_and_no_second_one_started() {
    let case = Case::with_short_timeouts("/bin/false");
    let mut sleeper = Command::new("sleep").arg("1000").spawn().unwrap();
    let text = format!("{}\n", sleeper.id());
    fs::write(case.wanted.home.pid_file(), &text).unwrap();
    assert_eq!(case.error_text(), "daemon spawned but did not become reachable yet");
    assert_eq!(fs::read_to_string(case.wanted.home.pid_file()).unwrap(), text);
    assert!(sleeper.try_wait().unwrap().is_none(), "the process was not signalled");
    sleeper.kill().unwrap();
    sleeper.wait().unwrap();
    let patient = DesiredDaemon { times: Case::new("").wanted.times, ..case.wanted.clone() };
    let error_text = ensure(&patient).unwrap_err().to_string();
    assert_eq!(error_text, "daemon exited before becoming reachable", "no process has this id");
}

#[test]
fn a_process_that_started_after_the_pid_file_was_written_is_ignored() {
    let case = Case::new("/bin/false");
    let mut sleeper = Command::new("sleep").arg("1000").spawn().unwrap();
    fs::write(case.wanted.home.pid_file(), format!("{}\n", sleeper.id())).unwrap();
    let file = File::options().write(true).open(case.wanted.home.pid_file()).unwrap();
    file.set_modified(SystemTime::now() - Duration::from_secs(3600)).unwrap();
    assert_eq!(case.error_text(), "daemon exited before becoming reachable", "a daemon was started");
    assert!(sleeper.try_wait().unwrap().is_none(), "the process was not signalled");
    sleeper.kill().unwrap();
    sleeper.wait().unwrap();
}

#[test]
fn an_invalid_process_id_is_ignored() {
    for text in ["", "x\n", "0\n", "-1\n", "99999999999\n"] {
        let case = Case::new("/bin/false");
        fs::write(case.wanted.home.pid_file(), text).unwrap();
        assert_eq!(case.error_text(), "daemon exited before becoming reachable", "{text:?}");
    }
}

#[test]
fn a_daemon_that_does_not_answer_continues_and_keeps_its_pid_file() {
    let case = Case::with_short_timeouts("/bin/sh");
    let waits = DesiredDaemon { program: script(&case, "exec sleep 5"), ..case.wanted.clone() };
    let error_text = ensure(&waits).unwrap_err().to_string();
    assert_eq!(error_text, "daemon spawned but did not become reachable yet");
    assert!(case.wanted.home.pid_file().exists());
}

#[test]
fn the_daemon_is_started_with_its_verb_and_its_output_goes_to_the_log() {
    let case = Case::new("/bin/sh");
    let program = script(&case, "echo out $@; echo err >&2; pwd; readlink /proc/self/fd/0");
    let wanted = DesiredDaemon { program, arguments: vec!["--no-restart".into()], ..case.wanted.clone() };
    ensure(&wanted).unwrap_err();
    let log = fs::read_to_string(case.wanted.home.daemon_log()).unwrap();
    assert_eq!(log, "out _hostd --no-restart\nerr\n/\n/dev/null\n");
}

#[test]
fn a_starter_that_holds_the_lock_is_waited_for_and_its_daemon_used() {
    let case = Case::new("/nonexistent");
    let lock = lock_file(case.wanted.home.spawn_lock()).unwrap();
    rustix::fs::flock(&lock, FlockOperation::LockExclusive).unwrap();
    let times = Times { lock: Duration::from_millis(20), ..case.wanted.times };
    let with_short_timeouts = DesiredDaemon { times, ..case.wanted.clone() };
    let error_text = ensure(&with_short_timeouts).unwrap_err().to_string();
    assert!(error_text.starts_with("another process has been starting the daemon"), "{error_text}");
    let wanted = case.wanted.clone();
    let waiting = std::thread::spawn(move || ensure(&wanted));
    case.daemon("mine", true);
    assert!(!waiting.join().unwrap().unwrap().spawned);
}

#[test]
fn the_lock_is_released_when_its_holder_ends_and_no_child_holds_it() {
    // The daemon outlives its starter, which holds the lock while it starts the daemon.
    let case = Case::with_short_timeouts("/bin/sh");
    let waits = DesiredDaemon { program: script(&case, "exec sleep 20"), ..case.wanted.clone() };
    ensure(&waits).unwrap_err();
    let lock = lock_file(case.wanted.home.spawn_lock()).unwrap();
    // A process that a concurrent test forks has all descriptors until it executes its program.
    let until = Instant::now() + Duration::from_secs(5);
    while rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        assert!(Instant::now() < until, "the lock is held");
        std::thread::yield_now();
    }
}

#[test]
fn a_daemon_that_is_ending_is_waited_for() {
    let mut case = Case::new("");
    let pid_file = case.wanted.home.pid_file();
    let ended = case.wanted.home.root().join("ended");
    let text = format!("while [ ! -s {} ]; do :; done; >{}; exit 1", pid_file.display(), ended.display());
    case.wanted.program = script(&case, &text);
    let held = lock_file(case.wanted.home.daemon_lock()).unwrap();
    rustix::fs::flock(&held, FlockOperation::LockExclusive).unwrap();
    let wanted = case.wanted.clone();
    let waiting = std::thread::spawn(move || ensure(&wanted));
    // The other daemon becomes reachable after the started one has ended and its pid file is gone.
    while !ended.exists() || pid_file.exists() {
        assert!(!waiting.is_finished());
        thread::sleep(case.wanted.times.poll);
    }
    case.daemon("mine", true);
    assert!(!waiting.join().unwrap().unwrap().spawned);
}

/// Writes a program by another process: a file that is open for writing here would be inherited by programs that concurrent
/// tests start, and could not be executed (ETXTBSY).
fn script(case: &Case, text: &str) -> PathBuf {
    let path = case.wanted.home.root().join("program");
    let mut install = Command::new("install");
    install.args(["-m", "755", "/dev/stdin"]).arg(&path).stdin(Stdio::piped());
    let mut install = install.spawn().unwrap();
    write!(install.stdin.take().unwrap(), "#!/bin/sh\n{text}\n").unwrap();
    assert!(install.wait().unwrap().success());
    path
}
