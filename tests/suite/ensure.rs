//! Starting the daemon with the real command line (wire specification, A.8): all callers get the same daemon.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use landfall_tests::case::Case;
use landfall_tests::rpc::{self, done, names, register};
use landfall_tests::{Home, wait_until};
use rustix::fs::FlockOperation;
use serde_json::json;

pub(crate) const CASES: &[Case] = &[
    Case::once("up_starts_the_daemon_and_down_ends_it", up_and_down),
    Case::once("up_reuses_a_reachable_daemon_when_the_version_matches", reuse),
    Case::once("up_replaces_a_daemon_of_another_version_and_keeps_registrations", drift),
    Case::once("c22_a_hundred_concurrent_starts_start_one_daemon", a_hundred_starts),
    Case::once("c22_a_hundred_concurrent_starts_replace_a_daemon_once", a_hundred_replacements),
    Case::once("c22_a_stale_socket_does_not_prevent_a_start", stale_socket),
    Case::once("c22_a_stale_pid_file_signals_no_process", foreign_pid),
    Case::once("c22_a_start_waits_for_the_lock", held_lock),
    Case::once("c22_a_killed_daemon_does_not_block_the_next_one", after_a_kill),
    Case::once("up_reports_the_error_of_a_daemon_that_exits", exits_at_once),
    Case::once("a_signal_stops_the_daemon_cleanly", signals),
];

/// Returns the daemon processes of this case.
fn daemons() -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Ok(line) = std::fs::read(entry.path().join("cmdline")) else { continue };
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        // In the same network namespace; a daemon of another case is in a different one.
        let here = |path: &Path| std::fs::read_link(path.join("ns/net")).ok();
        if line.contains(" _hostd") && here(&entry.path()) == here(Path::new("/proc/self")) {
            found.push(format!("{}: {line}", entry.file_name().to_string_lossy()));
        }
    }
    found
}

#[track_caller]
fn up(home: &Home) {
    let output = home.run(&["up"]);
    assert!(output.status.success(), "{output:?}; the log:\n{:?}", home.events());
}

fn pid_file(home: &Home) -> Option<u32> {
    std::fs::read_to_string(home.path().join("run/hostd.pid")).ok()?.trim().parse().ok()
}

fn up_and_down() {
    let home = Home::new();
    assert!(daemons().is_empty());
    up(&home);
    assert_eq!(rpc::http_port(&home), 8974);
    let running = daemons();
    assert_eq!(running.len(), 1, "{running:?}");
    let pid = pid_file(&home).expect("a pid file");
    assert!(running[0].starts_with(&format!("{pid}:")), "{running:?} is not {pid}");
    // It has its own session, no terminal and no standard input.
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let session = stat[stat.rfind(')').unwrap() + 2..].split(' ').nth(3).unwrap().to_owned();
    assert_eq!(session, pid.to_string(), "it would end with our terminal");
    assert_eq!(std::fs::read_link(format!("/proc/{pid}/fd/0")).unwrap(), Path::new("/dev/null"));
    let output = home.run(&["down"]);
    assert!(output.status.success(), "{output:?}");
    assert!(!home.socket().exists());
    wait_until("the daemon to end", || if daemons().is_empty() { Ok(()) } else { Err(daemons()) });
    // A second `down` succeeds, too.
    assert!(home.run(&["down"]).status.success());
}

fn reuse() {
    let home = Home::new();
    up(&home);
    let pid = pid_file(&home);
    register(&home, "a");
    up(&home);
    assert_eq!((pid_file(&home), daemons().len()), (pid, 1));
    assert_eq!(names(&home), ["a"]);
}

fn drift() {
    let home = Home::new();
    let old = home.start().variable("LANDFALL_VERSION", "another").wait_until_ready();
    register(&home, "a");
    up(&home);
    assert!(old.end().success(), "it was asked, not killed");
    assert_eq!(rpc::http_port(&home), 8974, "the URL that containers hold");
    let version = done(&home, &json!({"kind": "version"}))["version"].as_str().unwrap().to_owned();
    assert_ne!(version, "another");
    assert_eq!(done(&home, &json!({"kind": "status", "containerName": "a"}))["containerName"], "a");
    assert_eq!(daemons().len(), 1);
    // A client without a version of its own accepts every version.
    let output = home.command(&["up"]).env("LANDFALL_VERSION", "unversioned").output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(daemons().len(), 1);
}

/// Starts this many `up`s before waiting for any, and checks that each succeeded.
fn up_at_once(home: &Home, count: usize) {
    let start = Instant::now();
    let children: Vec<Child> = (0..count)
        .map(|_| home.command(&["up"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
        .collect();
    for child in children {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "after {:?}: {output:?}; {:?}", start.elapsed(), home.events());
    }
}

fn a_hundred_starts() {
    let home = Home::new();
    up_at_once(&home, 100);
    let running = daemons();
    assert_eq!(running.len(), 1, "{running:?}");
    let listening = home.events().into_iter().filter(|event| event["kind"] == "daemon-listening").count();
    assert_eq!(listening, 1, "more than one daemon was there");
    assert_eq!(rpc::http_port(&home), 8974);
    assert!(running[0].starts_with(&format!("{}:", pid_file(&home).unwrap())));
}

fn a_hundred_replacements() {
    let home = Home::new();
    let old = home.start().variable("LANDFALL_VERSION", "another").wait_until_ready();
    register(&home, "a");
    up_at_once(&home, 100);
    assert!(old.end().success());
    assert_eq!(daemons().len(), 1);
    let listening = home.events().into_iter().filter(|event| event["kind"] == "daemon-listening").count();
    assert_eq!(listening, 2, "the old one and one new one");
    assert_eq!(names(&home), ["a"]);
    assert_eq!(rpc::http_port(&home), 8974);
}

fn stale_socket() {
    let home = Home::new();
    std::fs::create_dir_all(home.path().join("run")).unwrap();
    drop(UnixListener::bind(home.socket()).unwrap());
    assert!(home.socket().exists());
    up(&home);
    assert_eq!(names(&home), Vec::<String>::new());
    assert!(home.run(&["down"]).status.success());
    // Not a socket, but another kind of file at its path.
    std::fs::write(home.socket(), "").unwrap();
    let _daemon = home.daemon();
    assert_eq!(home.mode("run/hostd.sock"), 0o600);
}

fn foreign_pid() {
    let home = Home::new();
    std::fs::create_dir_all(home.path().join("run")).unwrap();
    let file = home.path().join("run/hostd.pid");
    // A process with a handler for every signal would print it.
    let mut foreign_pid = Command::new("sh")
        .args([
            "-c",
            "trap 'echo signalled' TERM INT HUP USR1 QUIT; echo ready; while :; do sleep 0.05; done",
        ])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut printed = std::io::BufReader::new(foreign_pid.stdout.take().unwrap());
    let mut line = String::new();
    std::io::BufRead::read_line(&mut printed, &mut line).unwrap();
    // The file is older than the process: the kernel reused the process id after its daemon had ended.
    std::fs::write(&file, format!("{}\n", foreign_pid.id())).unwrap();
    let yesterday = std::time::SystemTime::now() - Duration::from_secs(86_400);
    std::fs::File::options().write(true).open(&file).unwrap().set_modified(yesterday).unwrap();
    up(&home);
    assert_ne!(pid_file(&home), Some(foreign_pid.id()));
    assert!(home.run(&["down"]).status.success());
    // Process ids without a process, and content that is not a number.
    for content in ["4194304\n", "0\n", "-1\n", "1e3\n", "", "x"] {
        std::fs::write(&file, content).unwrap();
        up(&home);
        assert!(home.run(&["down"]).status.success(), "{content:?}");
    }
    assert!(foreign_pid.try_wait().unwrap().is_none(), "the stranger was ended");
    foreign_pid.kill().unwrap();
    foreign_pid.wait().unwrap();
    let mut received = String::new();
    std::io::Read::read_to_string(&mut printed, &mut received).unwrap();
    assert_eq!(received, "", "the foreign process was signalled");
}

fn held_lock() {
    let home = Home::new();
    std::fs::create_dir_all(home.path().join("run")).unwrap();
    let path = home.path().join("run/hostd.lock");
    let lock = std::fs::File::create(&path).unwrap();
    rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
    let mut child = home.command(&["up"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    // It waits at the lock.
    wait_until("a process to wait at the lock", || {
        let inode = std::os::unix::fs::MetadataExt::ino(&lock.metadata().unwrap()).to_string();
        let open =
            std::fs::read_dir(format!("/proc/{}/fd", child.id())).map_err(|error| error.to_string())?;
        let at_lock = open.flatten().any(|entry| {
            std::fs::metadata(entry.path())
                .is_ok_and(|file| std::os::unix::fs::MetadataExt::ino(&file).to_string() == inode)
        });
        if at_lock { Ok(()) } else { Err("not yet".to_owned()) }
    });
    assert!(child.try_wait().unwrap().is_none());
    assert!(daemons().is_empty(), "started without the lock");
    drop(lock);
    assert!(child.wait().unwrap().success());
    assert_eq!(daemons().len(), 1);
    assert!(path.exists(), "the lock is never unlinked");
}

fn after_a_kill() {
    let home = Home::new();
    for round in 0..3 {
        up(&home);
        register(&home, &format!("c{round}"));
        let pid = i32::try_from(pid_file(&home).unwrap()).unwrap();
        assert_eq!(daemons().len(), 1);
        // Our own descendant, adopted by this process, which does not reap it.
        rustix::process::kill_process(
            rustix::process::Pid::from_raw(pid).unwrap(),
            rustix::process::Signal::KILL,
        )
        .unwrap();
        wait_until("the daemon to end", || if rpc::answers(&home) { Err("it answers") } else { Ok(()) });
        assert!(home.socket().exists(), "a killed daemon cannot tidy up");
    }
    up(&home);
    done(&home, &json!({"kind": "status", "containerName": "c0"}));
    assert_eq!(names(&home), ["c0", "c1", "c2"]);
}

fn exits_at_once() {
    let home = Home::new();
    // A directory cannot be created at the path of a file.
    std::fs::create_dir_all(home.path()).unwrap();
    std::fs::write(home.path().join("run"), "in the way").unwrap();
    let output = home.run(&["up"]);
    assert!(!output.status.success());
    let printed = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(printed.contains("run") && !printed.contains("panicked"), "{printed}");
    assert!(daemons().is_empty());
}

fn signals() {
    let home = Home::new();
    for signal in [rustix::process::Signal::TERM, rustix::process::Signal::INT] {
        let mut daemon = home.daemon();
        register(&home, "a");
        daemon.signal(signal);
        let status = daemon.end();
        assert!(status.success(), "{signal:?}: {status}");
        assert!(!home.socket().exists());
        assert!(home.registration("a").exists());
    }
    let stopping = home.events().into_iter().filter(|event| event["kind"] == "daemon-stopping").count();
    assert_eq!(stopping, 2);
    assert!(home.events().iter().all(|event| event["kind"] != "shutdown-requested"));
}
