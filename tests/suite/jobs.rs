//! Jobs (wire specification, A.10): the seven rules, observed through the files that the commands write.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use landfall_tests::case::Case;
use landfall_tests::rpc::{ask, names, register};
use landfall_tests::{FakeDocker, Home, TIMEOUT, wait_until};
use rustix::process::Signal;
use serde_json::json;

pub(crate) const CASES: &[Case] = &[
    Case::once("jobs_run_at_once_on_register_and_at_every_interval", at_once_and_again),
    Case::once("jobs_run_again_after_a_daemon_restart", on_replay),
    Case::once("jobs_end_with_deregister", end_with_deregister),
    Case::once("jobs_of_a_container_registered_again_are_those_of_its_new_folder", replaced),
    Case::once("jobs_run_their_gate_first", gate),
    Case::once("jobs_never_overlap", single_flight),
    Case::once("jobs_that_succeed_restart_their_container_and_others_do_not", restart_on_success),
    Case::once("jobs_of_a_removed_container_cause_no_restart", suppressed_restart),
    Case::once("deregister_does_not_wait_for_a_running_job", stop_never_waits),
    Case::once("a_signal_drains_the_jobs_before_the_daemon_exits", drain_waits),
    Case::once("an_invalid_configuration_affects_only_its_own_container", bad_configuration),
];

fn diary(home: &Home) -> PathBuf {
    home.folder("outside").join("diary")
}

fn lines(home: &Home) -> Vec<String> {
    std::fs::read_to_string(diary(home)).unwrap_or_default().lines().map(str::to_owned).collect()
}

#[track_caller]
fn wait_for_lines(home: &Home, count: usize) -> Vec<String> {
    wait_until(&format!("{count} lines in the diary"), || {
        let lines = lines(home);
        if lines.len() >= count { Ok(lines) } else { Err((lines, home.events())) }
    })
}

/// A job that runs `script`, with the diary as `$1`, and further keys.
fn job(home: &Home, script: &str, more: &str) -> String {
    let command = json!(["sh", "-c", script, "sh", diary(home)]);
    format!("[jobs.renew]\ncommand = {command}\n{more}\n")
}

/// Writes a folder's file and approves it.
fn configure(home: &Home, name: &str, text: &str) {
    write(home, name, text);
    home.trust(&home.folder(name));
}

fn write(home: &Home, name: &str, text: &str) {
    std::fs::write(home.folder(name).join("landfall.toml"), text).unwrap();
}

/// Registers `name` with a job.
fn register_job(home: &Home, name: &str, script: &str, more: &str) {
    configure(home, name, &job(home, script, more));
    register(home, name);
}

fn deregister(home: &Home, name: &str) {
    assert_eq!(ask(home, &json!({"kind": "deregister", "containerName": name})), json!({"ok": true}));
}

fn at_once_and_again() {
    let home = Home::new();
    let _daemon = home.daemon();
    let start = Instant::now();
    register_job(&home, "a", "echo $LANDFALL_CONTAINER_NAME $PWD >> $1", "every = \"1s\"");
    let first = wait_for_lines(&home, 1);
    assert_eq!(first[0], format!("a {}", home.folder("a").display()));
    wait_for_lines(&home, 3);
    let taken = start.elapsed();
    assert!(taken >= Duration::from_millis(1800), "three runs, a second apart, in {taken:?}");
    let event = home.wait_for_event("job-tick-ok", |_| true);
    assert_eq!((&event["containerName"], &event["job"]), (&json!("a"), &json!("renew")));
    home.wait_for_event("job-tick-start", |_| true);
}

fn on_replay() {
    let home = Home::new();
    let daemon = home.daemon();
    register_job(&home, "a", "echo run >> $1", "every = \"1h\"");
    wait_for_lines(&home, 1);
    daemon.kill();
    let _daemon = home.daemon();
    wait_for_lines(&home, 2);
}

fn end_with_deregister() {
    let home = Home::new();
    let _daemon = home.daemon();
    register_job(&home, "a", "echo run >> $1", "every = \"1s\"");
    wait_for_lines(&home, 2);
    deregister(&home, "a");
    let runs = lines(&home).len();
    // Another job shows that enough time has passed for two runs of the first.
    let beat = home.folder("outside").join("beat");
    let command = json!(["sh", "-c", "echo beat >> $1", "sh", beat]);
    configure(&home, "b", &format!("[jobs.beat]\ncommand = {command}\nevery = \"1s\"\n"));
    register(&home, "b");
    wait_until("three beats", || {
        let text = std::fs::read_to_string(&beat).unwrap_or_default();
        if text.lines().count() >= 3 { Ok(()) } else { Err(text) }
    });
    assert!(lines(&home).len() <= runs + 1, "it ran on: {:?}", lines(&home));
}

fn replaced() {
    let home = Home::new();
    let _daemon = home.daemon();
    register_job(&home, "a", "echo old >> $1", "every = \"1s\"");
    wait_for_lines(&home, 1);
    let folder = home.folder("new");
    configure(&home, "new", &job(&home, "echo new $PWD >> $1", "every = \"1s\""));
    let request = json!({"kind": "register", "containerName": "a", "cwd": folder});
    assert_eq!(ask(&home, &request), json!({"ok": true}));
    let new = format!("new {}", folder.display());
    wait_until("three runs of the new one", || {
        let lines = lines(&home);
        if lines.iter().filter(|line| **line == new).count() >= 3 { Ok(()) } else { Err(lines) }
    });
    let all = lines(&home);
    let first_new = all.iter().position(|line| *line == new).unwrap();
    let late = all[first_new + 1..].iter().filter(|line| *line == "old").count();
    assert_eq!(late, 0, "{all:?}");
    // A folder without jobs ends the previous ones.
    let bare = json!({"kind": "register", "containerName": "a", "cwd": home.folder("bare")});
    assert_eq!(ask(&home, &bare), json!({"ok": true}));
    assert_eq!(names(&home), ["a"]);
}

fn gate() {
    let home = Home::new();
    let _daemon = home.daemon();
    let open = home.folder("outside").join("open");
    let gate = json!(["sh", "-c", "test -e $1", "sh", open]);
    register_job(&home, "a", "echo run >> $1", &format!("every = \"1s\"\ngate = {gate}"));
    wait_until("the gate to refuse", || {
        let asked = home.count_events("job-tick-skipped", "a");
        if asked >= 2 { Ok(()) } else { Err(home.events()) }
    });
    assert_eq!(lines(&home), Vec::<String>::new());
    std::fs::write(&open, "").unwrap();
    wait_for_lines(&home, 1);
}

fn single_flight() {
    let home = Home::new();
    let _daemon = home.daemon();
    // Each run takes longer than the interval, and prints a line when another run is active.
    let script =
        "mkdir $1.busy || echo overlap >> $1; echo begin >> $1; sleep 1.5; rmdir $1.busy; echo end >> $1";
    register_job(&home, "a", script, "every = \"1s\"");
    wait_for_lines(&home, 1);
    // Requests during a run are folded into one further run.
    register(&home, "a");
    register(&home, "a");
    let lines = wait_for_lines(&home, 5);
    assert!(!lines.contains(&"overlap".to_owned()), "{lines:?}");
    let wanted = ["begin", "end", "begin", "end", "begin"];
    assert_eq!(lines[..5], wanted);
}

fn restart_on_success() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &["good", "bad", "plain"]);
    let _daemon = home.daemon();
    let once = "every = \"1h\"\nrestart = true";
    register_job(&home, "good", "echo good >> $1", once);
    register_job(&home, "bad", "echo bad >> $1; echo no luck; exit 3", once);
    register_job(&home, "plain", "echo plain >> $1", "every = \"1h\"");
    docker.wait_for_calls("POST /containers/good/start", 1);
    home.wait_for_event("restart-completed", |event| event["containerName"] == "good");
    home.wait_for_event("job-restart-scheduled", |event| event["containerName"] == "good");
    let event = home.wait_for_event("job-tick-error", |event| event["containerName"] == "bad");
    assert!(event["error"].as_str().unwrap().contains("no luck"), "{event}");
    home.wait_for_event("job-tick-ok", |event| event["containerName"] == "plain");
    assert_eq!(docker.changes(), ["POST /containers/good/stop", "POST /containers/good/start"]);
    // A restart is not a new registration: it does not start the job again.
    assert_eq!(lines(&home).iter().filter(|line| *line == "good").count(), 1);
}

fn suppressed_restart() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &["a", "b"]);
    let _daemon = home.daemon();
    let release = home.folder("outside").join("release");
    let script = |name: &str| {
        format!(
            "echo {name} begins >> $1; while ! test -e {}; do sleep 0.02; done; echo {name} ends >> $1",
            release.display()
        )
    };
    let more = "every = \"1h\"\nrestart = true";
    register_job(&home, "a", &script("a"), more);
    register_job(&home, "b", &script("b"), more);
    wait_for_lines(&home, 2);
    // One container is removed, the other changes its folder, both during a run.
    deregister(&home, "a");
    assert_eq!(
        ask(&home, &json!({"kind": "register", "containerName": "b", "cwd": home.folder("elsewhere")})),
        json!({"ok": true})
    );
    std::fs::write(&release, "").unwrap();
    wait_until("b's first run to end", || {
        let lines = lines(&home);
        let moved = home.count_events("job-tick-ok", "b") + home.count_events("job-tick-error", "b");
        if lines.iter().any(|line| line == "b ends") || moved > 0 {
            Ok(())
        } else {
            Err((lines, home.events()))
        }
    });
    // The later restart shows that the suppressed one would have come before it.
    register_job(&home, "c", "echo c >> $1", "every = \"1h\"");
    home.wait_for_event("job-tick-ok", |event| event["containerName"] == "c");
    assert_eq!(docker.changes(), Vec::<String>::new());
}

fn stop_never_waits() {
    let home = Home::new();
    let _daemon = home.daemon();
    register_job(&home, "a", "echo begin >> $1; sleep 60", "every = \"1h\"");
    wait_for_lines(&home, 1);
    let start = Instant::now();
    deregister(&home, "a");
    register(&home, "a");
    assert!(start.elapsed() < TIMEOUT, "{:?}", start.elapsed());
    assert_eq!(names(&home), ["a"]);
}

fn drain_waits() {
    let home = Home::new();
    let mut daemon = home.daemon();
    register_job(&home, "a", "echo begin >> $1; sleep 1; echo end >> $1", "every = \"1h\"");
    wait_for_lines(&home, 1);
    daemon.signal(Signal::TERM);
    assert!(daemon.end().success());
    assert_eq!(lines(&home), ["begin", "end"]);
}

fn bad_configuration() {
    let home = Home::new();
    let _daemon = home.daemon();
    let texts = [
        "[jobs.x]\nevery = \"1s\"\n",
        "jobs = 7\n",
        "[jobs.x]\ncommand = [\"true\"]\nevery = \"1ms\"\n",
        "\u{0}",
        "[jobs.x\n",
    ];
    for (index, text) in texts.iter().enumerate() {
        let name = format!("bad{index}");
        write(&home, &name, text);
        // The container is registered nevertheless: an error in a file disables only the settings of that file.
        register(&home, &name);
    }
    register_job(&home, "good", "echo good >> $1", "every = \"1h\"");
    wait_for_lines(&home, 1);
    assert_eq!(names(&home).len(), texts.len() + 1);
    let reported = |name: &str| {
        home.events()
            .iter()
            .any(|event| event.to_string().contains("landfall.toml") && event.to_string().contains(name))
    };
    for index in 0..texts.len() {
        wait_until("the error to be reported", || {
            if reported(&format!("bad{index}")) { Ok(()) } else { Err(home.events()) }
        });
    }
    // A program in the folder could have been written by the container.
    let own = home.folder("own").join("run.sh");
    std::fs::write(&own, format!("#!/bin/sh\necho own >> {}\n", diary(&home).display())).unwrap();
    std::fs::set_permissions(&own, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    configure(&home, "own", "[jobs.x]\ncommand = [\"./run.sh\"]\nevery = \"1h\"\n");
    register(&home, "own");
    home.wait_for_event("job-tick-error", |event| event["containerName"] == "own");
    assert_eq!(lines(&home), ["good"]);
}
