//! Restarts by commands of a folder, which need no Docker.

use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::broadcast::Receiver;

use super::*;
use crate::folder;
use crate::folder::test_support::TestHome;

/// A folder, its supervisor, and what is told.
struct Bench {
    home: TestHome,
    folder: TempDir,
    supervisor: Supervisor,
    told: Receiver<Arc<str>>,
}

impl Bench {
    fn new() -> Bench {
        let journal = Journal::unkept();
        let told = journal.listen();
        let home = TestHome::new();
        let supervisor = Supervisor::new(Docker::from_environment(), journal, home.approvals.clone());
        Bench { home, folder: tempfile::tempdir().unwrap(), supervisor, told }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    /// The registration of a folder with these commands.
    fn registration(&self, stop: &str, start: &str, preflight: Option<&str>) -> Arc<Registration> {
        let words = |script: &str| format!("[\"sh\", \"-c\", {}]", json!(script));
        let mut text = format!("[restart]\nstop = {}\nstart = {}\n", words(stop), words(start));
        if let Some(preflight) = preflight {
            text += &format!("preflight = {}\n", words(preflight));
        }
        self.with_text(&text)
    }

    fn with_text(&self, text: &str) -> Arc<Registration> {
        std::fs::write(self.path().join(folder::FILE), text).unwrap();
        let fields = json!({"containerName": "coder", "cwd": self.path()});
        let mut registration = Registration::from_fields(fields.as_object().unwrap().clone()).unwrap();
        self.home.approve(self.path());
        folder::seal(&mut registration, self.home.approvals.file());
        Arc::new(registration)
    }

    async fn event(&mut self) -> Value {
        let line = tokio::time::timeout(Duration::from_secs(30), self.told.recv()).await.unwrap().unwrap();
        let mut event: Value = serde_json::from_str(&line).unwrap();
        event.as_object_mut().unwrap().remove("time");
        event
    }

    /// The next event but the one that says that a restart is scheduled.
    async fn outcome(&mut self) -> Value {
        loop {
            let event = self.event().await;
            if event["kind"] != "restart-scheduled" {
                return event;
            }
        }
    }

    /// Waits until a command has made a file.
    async fn wait_for(&self, name: &str) {
        let path = self.path().join(name);
        tokio::time::timeout(Duration::from_secs(30), async {
            while !path.exists() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        })
        .await
        .unwrap();
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path().join(name)).unwrap_or_default()
    }
}

fn completed() -> Value {
    json!({"kind": "restart-completed", "containerName": "coder"})
}

fn failed(reason: &str) -> Value {
    json!({"kind": "restart-failed", "containerName": "coder", "reason": reason})
}

#[tokio::test]
async fn nothing_happens_before_the_ticket_begins_and_then_stop_comes_first() {
    let mut bench = Bench::new();
    let registration = bench.registration("echo stop >> log", "echo start$LANDFALL_BUILD >> log", None);
    let ticket = bench.supervisor.accept(registration, true).unwrap();
    tokio::task::yield_now().await;
    assert!(bench.told.try_recv().is_err());
    ticket.begin();
    assert_eq!(
        bench.event().await,
        json!({"kind": "restart-scheduled", "containerName": "coder", "build": true})
    );
    assert_eq!(bench.event().await, completed());
    assert_eq!(bench.read("log"), "stop\nstart1\n");
}

#[tokio::test]
async fn a_ticket_that_is_lost_is_kept_all_the_same() {
    let mut bench = Bench::new();
    drop(bench.supervisor.accept(bench.registration("true", "true", None), false).unwrap());
    assert_eq!(bench.outcome().await, completed());
}

#[tokio::test]
async fn each_failure_says_which_step_it_was() {
    let mut bench = Bench::new();
    for (stop, start, reason) in [
        ("echo no; exit 1", "touch started", "stop failed: no"),
        ("true", "echo never >&2; exit 2", "start failed: never"),
    ] {
        bench.supervisor.accept(bench.registration(stop, start, None), false).unwrap().begin();
        assert_eq!(bench.outcome().await, failed(reason));
    }
    assert!(!bench.path().join("started").exists());
}

#[tokio::test]
async fn a_configuration_that_means_nothing_passes_the_preflight_and_fails_the_restart() {
    let mut bench = Bench::new();
    let registration = bench.with_text("[restart]\nstop = 7\n");
    assert_eq!(bench.supervisor.preflight(&registration).await, Ok(()));
    bench.supervisor.accept(registration, false).unwrap().begin();
    let told = bench.outcome().await;
    let reason = told["reason"].as_str().unwrap();
    assert!(reason.starts_with("invalid config for coder: landfall.toml line 2: "), "{reason}");
}

#[tokio::test]
async fn a_program_that_drifted_refuses_before_the_promise_and_after_it() {
    let mut bench = Bench::new();
    let programs = tempfile::tempdir().unwrap();
    let journal = Journal::unkept();
    bench.told = journal.listen();
    let drift = drift::tests::drift(programs.path());
    bench.supervisor =
        Supervisor::with(Docker::from_environment(), journal, bench.home.approvals.clone(), drift);
    let registration = bench.registration("touch stopped", "true", None);
    assert_eq!(bench.supervisor.preflight(&registration).await, Ok(()));
    let ticket = bench.supervisor.accept(registration.clone(), false).unwrap();
    drift::tests::program(programs.path(), "two");
    let refusal = bench.supervisor.preflight(&registration).await.unwrap_err();
    ticket.begin();
    assert_eq!(bench.outcome().await, failed(&refusal));
    assert!(!bench.path().join("stopped").exists());
}

#[tokio::test]
async fn the_folders_own_check_refuses_by_its_last_line() {
    let bench = Bench::new();
    let refusing = bench.registration("true", "true", Some("echo first; echo a plugin is missing; exit 1"));
    assert_eq!(
        bench.supervisor.preflight(&refusing).await,
        Err("restart refused for coder: a plugin is missing".to_owned())
    );
    let passing = bench.registration("true", "true", Some("true"));
    assert_eq!(bench.supervisor.preflight(&passing).await, Ok(()));
}

#[tokio::test]
async fn many_requests_during_a_restart_are_one_more_restart() {
    let mut bench = Bench::new();
    let stop = "echo stop >> log; touch begun; until [ -e go ]; do sleep 0.01; done";
    let registration = bench.registration(stop, "echo start$LANDFALL_BUILD >> log", None);
    bench.supervisor.accept(registration.clone(), false).unwrap().begin();
    bench.wait_for("begun").await;
    for build in [false, true, false] {
        bench.supervisor.accept(registration.clone(), build).unwrap().begin();
    }
    std::fs::write(bench.path().join("go"), "").unwrap();
    assert_eq!(bench.outcome().await, completed());
    assert_eq!(bench.outcome().await, completed());
    bench.supervisor.stop().await;
    assert!(bench.told.try_recv().is_err());
    assert_eq!(bench.read("log"), "stop\nstart0\nstop\nstart1\n");
}

#[tokio::test]
async fn a_stop_lets_what_was_promised_finish_and_accepts_no_more() {
    let mut bench = Bench::new();
    let registration = bench.registration("touch begun; until [ -e go ]; do sleep 0.01; done", "true", None);
    let late = bench.supervisor.accept(registration.clone(), false).unwrap();
    bench.supervisor.accept(registration.clone(), false).unwrap().begin();
    bench.wait_for("begun").await;
    let supervisor = bench.supervisor.clone();
    let stopping = tokio::spawn(async move { supervisor.stop().await });
    while bench.supervisor.state().refusal.is_none() {
        tokio::task::yield_now().await;
    }
    assert_eq!(bench.supervisor.accept(registration, false).err().as_deref(), Some("daemon stopping"));
    late.begin();
    assert!(!stopping.is_finished());
    std::fs::write(bench.path().join("go"), "").unwrap();
    stopping.await.unwrap();
    assert_eq!(bench.outcome().await, completed());
    assert_eq!(bench.outcome().await, completed());
}
