//! Jobs that run real commands.

use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::broadcast::Receiver;

use super::*;
use crate::docker::Docker;
use crate::registry::folder::test_support::TestHome;
use crate::registry::grants::GrantTable;

struct Fixture {
    home: TestHome,
    folder: TempDir,
    jobs: Arc<Jobs>,
    supervisor: Supervisor,
    event: Receiver<Arc<str>>,
}

/// A restart appends a line to a file.
const RESTART: &str =
    "[restart]\nstop = [\"true\"]\nstart = [\"sh\", \"-c\", \"echo started >> restarts\"]\n";

impl Fixture {
    fn new() -> Fixture {
        let journal = Journal::unkept();
        let event = journal.listen();
        let home = TestHome::new();
        let approvals = || home.approvals.clone();
        let docker = Docker::from_environment();
        let supervisor = Supervisor::new(docker, GrantTable::default(), journal.clone(), approvals());
        let jobs = Jobs::new(journal, supervisor.clone(), approvals());
        Fixture { home, folder: tempfile::tempdir().unwrap(), jobs, supervisor, event }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn registration(&self, text: &str) -> Arc<Registration> {
        self.home.register(self.path(), text)
    }

    /// Starts one job, `renew`, with this script.
    async fn start(&self, script: &str, more: &str) {
        let text = format!(
            "{RESTART}[jobs.renew]\ncommand = [\"sh\", \"-c\", {}]\nevery = \"1h\"\n{more}\n",
            json!(script)
        );
        self.jobs.start(self.registration(&text)).await;
    }

    async fn event(&mut self) -> Value {
        let line = tokio::time::timeout(Duration::from_secs(30), self.event.recv()).await.unwrap().unwrap();
        let mut event: Value = serde_json::from_str(&line).unwrap();
        event.as_object_mut().unwrap().remove("time");
        event
    }

    /// Returns the first event of a kind, and skips those before it.
    async fn event_of_kind(&mut self, kind: &str) -> Value {
        loop {
            let event = self.event().await;
            if event["kind"] == kind {
                return event;
            }
        }
    }

    fn has_no_event(&mut self) -> bool {
        self.event.try_recv().is_err()
    }
}

fn job_event(kind: &str, more: &[(&str, &str)]) -> Value {
    let mut event = json!({"kind": kind, "containerName": "coder", "job": "renew"});
    for (name, value) in more {
        event[*name] = json!(value);
    }
    event
}

#[tokio::test]
async fn a_renewal_restarts_the_container() {
    let mut fixture = Fixture::new();
    fixture.start("true", "restart = true").await;
    assert_eq!(fixture.event().await, job_event("job-tick-start", &[]));
    assert_eq!(fixture.event().await, job_event("job-tick-ok", &[]));
    assert_eq!(fixture.event().await, job_event("job-restart-scheduled", &[]));
    fixture.event_of_kind("restart-completed").await;
    assert_eq!(std::fs::read_to_string(fixture.path().join("restarts")).unwrap(), "started\n");
}

#[tokio::test]
async fn a_failed_gate_skips_the_command() {
    let mut fixture = Fixture::new();
    fixture
        .start("touch ran", "gate = [\"sh\", \"-c\", \"echo fresh_enough; exit 1\"]\nrestart = true")
        .await;
    fixture.event().await;
    assert_eq!(fixture.event().await, job_event("job-tick-skipped", &[("reason", "fresh_enough")]));
    fixture.jobs.drain().await;
    assert!(fixture.has_no_event() && !fixture.path().join("ran").exists());
}

#[tokio::test]
async fn each_status_has_its_event_and_only_success_restarts() {
    for (script, kind, field, text) in [
        ("echo busy; exit 75", "job-tick-transient-failure", "reason", "busy"),
        ("echo key_missing; exit 77", "job-tick-reauth-required", "reason", "key_missing"),
        ("exit 1", "job-tick-error", "error", "exit status: 1"),
        ("kill -9 $$", "job-tick-error", "error", "signal: 9 (SIGKILL)"),
    ] {
        let mut fixture = Fixture::new();
        fixture.start(script, "restart = true").await;
        fixture.event().await;
        assert_eq!(fixture.event().await, job_event(kind, &[(field, text)]));
        fixture.jobs.drain().await;
        assert!(fixture.has_no_event(), "{script}");
    }
}

#[tokio::test]
async fn a_command_that_takes_too_long_is_an_error() {
    let mut fixture = Fixture::new();
    fixture.start("sleep 1000", "timeout = \"1s\"").await;
    let event = fixture.event_of_kind("job-tick-error").await;
    assert_eq!(event, job_event("job-tick-error", &[("error", "it took longer than 1 s")]));
}

#[tokio::test]
async fn a_refused_restart_is_reported_as_an_event() {
    let mut fixture = Fixture::new();
    fixture.supervisor.stop().await;
    fixture.start("true", "restart = true").await;
    let event = fixture.event_of_kind("job-restart-failed").await;
    assert_eq!(event, job_event("job-restart-failed", &[("reason", "daemon stopping")]));
}

#[tokio::test]
async fn stop_returns_at_once_and_drain_waits() {
    let mut fixture = Fixture::new();
    fixture.start("until [ -e go ]; do sleep 0.01; done; touch done", "").await;
    fixture.event_of_kind("job-tick-start").await;
    fixture.jobs.stop(&ContainerName::new("coder").unwrap());
    let jobs = Arc::clone(&fixture.jobs);
    let draining = tokio::spawn(async move { jobs.drain().await });
    tokio::task::yield_now().await;
    assert!(!draining.is_finished());
    std::fs::write(fixture.path().join("go"), "").unwrap();
    draining.await.unwrap();
    assert!(fixture.path().join("done").exists());
}

#[tokio::test]
async fn a_job_runs_again_after_its_interval() {
    let mut fixture = Fixture::new();
    // The timer task sleeps for an hour when the job with the short interval is added.
    fixture.start("true", "").await;
    fixture.event_of_kind("job-tick-ok").await;
    let text = "[jobs.renew]\ncommand = [\"true\"]\nevery = \"1s\"\n";
    fixture.jobs.start(fixture.registration(text)).await;
    for _ in 0..3 {
        fixture.event_of_kind("job-tick-ok").await;
    }
}

#[tokio::test]
async fn a_folder_that_changed_after_registration_runs_its_registered_jobs() {
    let mut fixture = Fixture::new();
    let registration = fixture.registration("[jobs.renew]\ncommand = [\"true\"]\nevery = \"1h\"\n");
    std::fs::write(fixture.path().join(folder::FILE), "[jobs.evil]\ncommand = [\"true\"]\nevery = \"1h\"\n")
        .unwrap();
    fixture.jobs.start(registration).await;
    let notice = fixture.event().await;
    assert!(notice["text"].as_str().unwrap().contains("is not the one that was registered"), "{notice}");
    assert_eq!(fixture.event().await, job_event("job-tick-start", &[]));
}

#[tokio::test]
async fn an_invalid_configuration_has_no_jobs() {
    let mut fixture = Fixture::new();
    fixture.jobs.start(fixture.registration("[jobs.renew]\nevery = \"1h\"\n")).await;
    let notice = fixture.event().await;
    assert!(notice["text"].as_str().unwrap().contains("missing field `command`"), "{notice}");
    fixture.jobs.drain().await;
    assert!(fixture.has_no_event());
}
