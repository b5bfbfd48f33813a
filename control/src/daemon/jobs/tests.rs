//! Jobs that run real commands.

use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::broadcast::Receiver;

use super::*;
use crate::docker::Docker;
use crate::registry::folder::test_support::TestHome;
use crate::registry::grants::GrantTable;

struct Bench {
    home: TestHome,
    folder: TempDir,
    jobs: Arc<Jobs>,
    supervisor: Supervisor,
    told: Receiver<Arc<str>>,
}

/// Restarting writes to a file.
const RESTART: &str =
    "[restart]\nstop = [\"true\"]\nstart = [\"sh\", \"-c\", \"echo started >> restarts\"]\n";

impl Bench {
    fn new() -> Bench {
        let journal = Journal::unkept();
        let told = journal.listen();
        let home = TestHome::new();
        let approvals = || home.approvals.clone();
        let docker = Docker::from_environment();
        let supervisor = Supervisor::new(docker, GrantTable::default(), journal.clone(), approvals());
        let jobs = Jobs::new(journal, supervisor.clone(), approvals());
        Bench { home, folder: tempfile::tempdir().unwrap(), jobs, supervisor, told }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn registration(&self, text: &str) -> Arc<Registration> {
        std::fs::write(self.path().join(folder::FILE), text).unwrap();
        let fields = json!({"containerName": "coder", "cwd": self.path()});
        let mut registration = Registration::from_fields(fields.as_object().unwrap().clone()).unwrap();
        self.home.approve(self.path());
        folder::seal(&mut registration, self.home.approvals.file());
        Arc::new(registration)
    }

    /// Starts one job, `renew`, of this script.
    async fn start(&self, script: &str, more: &str) {
        let text = format!(
            "{RESTART}[jobs.renew]\ncommand = [\"sh\", \"-c\", {}]\nevery = \"1h\"\n{more}\n",
            json!(script)
        );
        self.jobs.start(self.registration(&text)).await;
    }

    async fn event(&mut self) -> Value {
        let line = tokio::time::timeout(Duration::from_secs(30), self.told.recv()).await.unwrap().unwrap();
        let mut event: Value = serde_json::from_str(&line).unwrap();
        event.as_object_mut().unwrap().remove("time");
        event
    }

    /// Waits for the first event of a kind; what was told before it is passed over.
    async fn until(&mut self, kind: &str) -> Value {
        loop {
            let event = self.event().await;
            if event["kind"] == kind {
                return event;
            }
        }
    }

    fn silent(&mut self) -> bool {
        self.told.try_recv().is_err()
    }
}

fn told(kind: &str, more: &[(&str, &str)]) -> Value {
    let mut event = json!({"kind": kind, "containerName": "coder", "job": "renew"});
    for (name, value) in more {
        event[*name] = json!(value);
    }
    event
}

#[tokio::test]
async fn a_renewal_restarts_the_container() {
    let mut bench = Bench::new();
    bench.start("true", "restart = true").await;
    assert_eq!(bench.event().await, told("job-tick-start", &[]));
    assert_eq!(bench.event().await, told("job-tick-ok", &[]));
    assert_eq!(bench.event().await, told("job-restart-scheduled", &[]));
    bench.until("restart-completed").await;
    assert_eq!(std::fs::read_to_string(bench.path().join("restarts")).unwrap(), "started\n");
}

#[tokio::test]
async fn what_is_fresh_is_skipped_and_its_command_not_run() {
    let mut bench = Bench::new();
    bench.start("touch ran", "gate = [\"sh\", \"-c\", \"echo fresh_enough; exit 1\"]\nrestart = true").await;
    bench.event().await;
    assert_eq!(bench.event().await, told("job-tick-skipped", &[("reason", "fresh_enough")]));
    bench.jobs.drain().await;
    assert!(bench.silent() && !bench.path().join("ran").exists());
}

#[tokio::test]
async fn each_status_has_its_event_and_none_but_success_restarts() {
    for (script, kind, field, text) in [
        ("echo busy; exit 75", "job-tick-transient-failure", "reason", "busy"),
        ("echo key_missing; exit 77", "job-tick-reauth-required", "reason", "key_missing"),
        ("exit 1", "job-tick-error", "error", "exit status: 1"),
        ("kill -9 $$", "job-tick-error", "error", "signal: 9 (SIGKILL)"),
    ] {
        let mut bench = Bench::new();
        bench.start(script, "restart = true").await;
        bench.event().await;
        assert_eq!(bench.event().await, told(kind, &[(field, text)]));
        bench.jobs.drain().await;
        assert!(bench.silent(), "{script}");
    }
}

#[tokio::test]
async fn a_command_that_takes_too_long_is_an_error() {
    let mut bench = Bench::new();
    bench.start("sleep 1000", "timeout = \"1s\"").await;
    let event = bench.until("job-tick-error").await;
    assert_eq!(event, told("job-tick-error", &[("error", "it took longer than 1 s")]));
}

#[tokio::test]
async fn a_restart_that_is_refused_is_told_and_not_thrown() {
    let mut bench = Bench::new();
    bench.supervisor.stop().await;
    bench.start("true", "restart = true").await;
    let event = bench.until("job-restart-failed").await;
    assert_eq!(event, told("job-restart-failed", &[("reason", "daemon stopping")]));
}

#[tokio::test]
async fn a_stop_does_not_wait_and_a_drain_does() {
    let mut bench = Bench::new();
    bench.start("until [ -e go ]; do sleep 0.01; done; touch done", "").await;
    bench.until("job-tick-start").await;
    bench.jobs.stop(&ContainerName::new("coder").unwrap());
    let jobs = Arc::clone(&bench.jobs);
    let draining = tokio::spawn(async move { jobs.drain().await });
    tokio::task::yield_now().await;
    assert!(!draining.is_finished());
    std::fs::write(bench.path().join("go"), "").unwrap();
    draining.await.unwrap();
    assert!(bench.path().join("done").exists());
}

#[tokio::test]
async fn the_interval_passes() {
    let mut bench = Bench::new();
    // The clock sleeps for an hour when the job with the short interval comes.
    bench.start("true", "").await;
    bench.until("job-tick-ok").await;
    let text = "[jobs.renew]\ncommand = [\"true\"]\nevery = \"1s\"\n";
    bench.jobs.start(bench.registration(text)).await;
    for _ in 0..3 {
        bench.until("job-tick-ok").await;
    }
}

#[tokio::test]
async fn a_folder_that_was_changed_after_it_was_registered_runs_as_it_was() {
    let mut bench = Bench::new();
    let registration = bench.registration("[jobs.renew]\ncommand = [\"true\"]\nevery = \"1h\"\n");
    std::fs::write(bench.path().join(folder::FILE), "[jobs.evil]\ncommand = [\"true\"]\nevery = \"1h\"\n")
        .unwrap();
    bench.jobs.start(registration).await;
    let notice = bench.event().await;
    assert!(notice["text"].as_str().unwrap().contains("is not the one that was registered"), "{notice}");
    assert_eq!(bench.event().await, told("job-tick-start", &[]));
}

#[tokio::test]
async fn a_configuration_that_means_nothing_has_no_jobs() {
    let mut bench = Bench::new();
    bench.jobs.start(bench.registration("[jobs.renew]\nevery = \"1h\"\n")).await;
    let notice = bench.event().await;
    assert!(notice["text"].as_str().unwrap().contains("missing field `command`"), "{notice}");
    bench.jobs.drain().await;
    assert!(bench.silent());
}
