use super::*;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::time::SystemTime;

use serde_json::json;
use tempfile::TempDir;

/// A home, and times that only a test which waits for their end makes short.
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

    fn impatient(program: &str) -> Case {
        let mut case = Case::new(program);
        let short = Duration::from_millis(200);
        case.wanted.times = Times { ready: short, shutdown: short, lock: short, ..case.wanted.times };
        case
    }

    fn why(&self) -> String {
        ensure(&self.wanted).unwrap_err().to_string()
    }

    /// A daemon of some version, in a thread. On `shutdown` it takes its socket away, if it is an obedient one.
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
fn a_daemon_without_a_version_of_its_own_is_used_by_everybody() {
    let case = Case::new("/nonexistent");
    case.daemon(version::UNVERSIONED, true);
    assert!(!ensure(&case.wanted).unwrap().spawned);
}

#[test]
fn a_daemon_of_another_version_is_asked_to_end_and_another_one_started() {
    let case = Case::new("/bin/false");
    case.daemon("theirs", true);
    assert_eq!(case.why(), "daemon exited before becoming reachable");
    assert!(!case.wanted.home.socket().exists(), "the old one has ended");
}

#[test]
fn the_next_daemon_listens_where_the_last_one_did_unless_it_is_told_otherwise() {
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
fn a_daemon_of_another_version_that_does_not_end_is_left_alone() {
    let case = Case::impatient("/nonexistent");
    case.daemon("theirs", false);
    assert_eq!(case.why(), "daemon version drifted but shutdown request did not complete");
    assert!(case.wanted.home.socket().exists());
}

#[test]
fn a_bad_entry_ends_at_once_and_leaves_no_pid_file() {
    let case = Case::new("/bin/false");
    assert!(case.why().contains("exited"));
    assert!(!case.wanted.home.pid_file().exists());
}

#[test]
fn a_program_that_is_not_there_is_told() {
    let case = Case::new("/nonexistent");
    assert_eq!(case.why(), "failed to spawn daemon: No such file or directory (os error 2)");
}

#[test]
fn a_live_process_in_the_pid_file_is_polled_and_no_second_one_is_started() {
    let case = Case::impatient("/bin/false");
    let mut sleeper = Command::new("sleep").arg("1000").spawn().unwrap();
    let text = format!("{}\n", sleeper.id());
    fs::write(case.wanted.home.pid_file(), &text).unwrap();
    assert_eq!(case.why(), "daemon spawned but did not become reachable yet");
    assert_eq!(fs::read_to_string(case.wanted.home.pid_file()).unwrap(), text);
    assert!(sleeper.try_wait().unwrap().is_none(), "it was not signalled");
    sleeper.kill().unwrap();
    sleeper.wait().unwrap();
    let patient = DesiredDaemon { times: Case::new("").wanted.times, ..case.wanted.clone() };
    let why = ensure(&patient).unwrap_err().to_string();
    assert_eq!(why, "daemon exited before becoming reachable", "its number is nobody's any more");
}

#[test]
fn a_process_that_began_after_the_pid_file_was_written_is_a_stranger() {
    let case = Case::new("/bin/false");
    let mut sleeper = Command::new("sleep").arg("1000").spawn().unwrap();
    fs::write(case.wanted.home.pid_file(), format!("{}\n", sleeper.id())).unwrap();
    let file = File::options().write(true).open(case.wanted.home.pid_file()).unwrap();
    file.set_modified(SystemTime::now() - Duration::from_secs(3600)).unwrap();
    assert_eq!(case.why(), "daemon exited before becoming reachable", "one was started");
    assert!(sleeper.try_wait().unwrap().is_none(), "it was not signalled");
    sleeper.kill().unwrap();
    sleeper.wait().unwrap();
}

#[test]
fn what_is_no_process_id_is_nobody() {
    for text in ["", "x\n", "0\n", "-1\n", "99999999999\n"] {
        let case = Case::new("/bin/false");
        fs::write(case.wanted.home.pid_file(), text).unwrap();
        assert_eq!(case.why(), "daemon exited before becoming reachable", "{text:?}");
    }
}

#[test]
fn a_daemon_that_runs_and_does_not_answer_is_left_alone_with_its_pid_file() {
    let case = Case::impatient("/bin/sh");
    let waits = DesiredDaemon { program: script(&case, "exec sleep 5"), ..case.wanted.clone() };
    let why = ensure(&waits).unwrap_err().to_string();
    assert_eq!(why, "daemon spawned but did not become reachable yet");
    assert!(case.wanted.home.pid_file().exists());
}

#[test]
fn the_daemon_is_started_with_its_verb_and_its_words_go_to_the_log() {
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
    let impatient = DesiredDaemon { times, ..case.wanted.clone() };
    let why = ensure(&impatient).unwrap_err().to_string();
    assert!(why.starts_with("another process has been starting the daemon"), "{why}");
    let wanted = case.wanted.clone();
    let waiting = std::thread::spawn(move || ensure(&wanted));
    case.daemon("mine", true);
    assert!(!waiting.join().unwrap().unwrap().spawned);
}

#[test]
fn a_lock_is_released_however_its_holder_ends_and_no_child_holds_it() {
    // The daemon outlives its starter, which has the lock while it starts it.
    let case = Case::impatient("/bin/sh");
    let waits = DesiredDaemon { program: script(&case, "exec sleep 20"), ..case.wanted.clone() };
    ensure(&waits).unwrap_err();
    let lock = lock_file(case.wanted.home.spawn_lock()).unwrap();
    // A process that another test starts at this moment has every descriptor until it executes its program.
    let until = Instant::now() + Duration::from_secs(5);
    while rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        assert!(Instant::now() < until, "the lock is held");
        std::thread::yield_now();
    }
}

#[test]
fn a_daemon_that_is_about_to_end_is_waited_for() {
    let mut case = Case::new("");
    let pid_file = case.wanted.home.pid_file();
    let ended = case.wanted.home.root().join("ended");
    let text = format!("while [ ! -s {} ]; do :; done; >{}; exit 1", pid_file.display(), ended.display());
    case.wanted.program = script(&case, &text);
    let held = lock_file(case.wanted.home.daemon_lock()).unwrap();
    rustix::fs::flock(&held, FlockOperation::LockExclusive).unwrap();
    let wanted = case.wanted.clone();
    let waiting = std::thread::spawn(move || ensure(&wanted));
    // Somebody else's daemon comes up when ours has ended, and its number with it.
    while !ended.exists() || pid_file.exists() {
        assert!(!waiting.is_finished());
        thread::sleep(case.wanted.times.poll);
    }
    case.daemon("mine", true);
    assert!(!waiting.join().unwrap().unwrap().spawned);
}

/// A program. Another process writes it: while a file is open for writing here, it would be in every program that
/// another test starts just then, and could not be executed (ETXTBSY).
fn script(case: &Case, text: &str) -> PathBuf {
    let path = case.wanted.home.root().join("program");
    let mut install = Command::new("install");
    install.args(["-m", "755", "/dev/stdin"]).arg(&path).stdin(Stdio::piped());
    let mut install = install.spawn().unwrap();
    write!(install.stdin.take().unwrap(), "#!/bin/sh\n{text}\n").unwrap();
    assert!(install.wait().unwrap().success());
    path
}
