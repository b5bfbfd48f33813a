//! Restarts by commands of a folder, which need no Docker.

use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::broadcast::Receiver;

use super::*;
use crate::model::grants::Grants;
use crate::model::registration::AttachMethod;
use crate::registry::folder;
use crate::registry::folder::test_support::TestHome;

/// A folder, its supervisor, and what is told.
struct Bench {
    home: TestHome,
    folder: TempDir,
    grants: GrantTable,
    supervisor: Supervisor,
    told: Receiver<Arc<str>>,
}

impl Bench {
    fn new() -> Bench {
        let journal = Journal::unkept();
        let told = journal.listen();
        let (home, grants) = (TestHome::new(), GrantTable::default());
        let docker = Docker::from_environment();
        let supervisor = Supervisor::new(docker, grants.clone(), journal, home.approvals.clone());
        Bench { home, folder: tempfile::tempdir().unwrap(), grants, supervisor, told }
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
    let ticket = bench.supervisor.accept(registration, Build::ByUser).unwrap();
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
    drop(bench.supervisor.accept(bench.registration("true", "true", None), Build::No).unwrap());
    assert_eq!(bench.outcome().await, completed());
}

#[tokio::test]
async fn each_failure_says_which_step_it_was() {
    let mut bench = Bench::new();
    for (stop, start, reason) in [
        ("echo no; exit 1", "touch started", "stop failed: no"),
        ("true", "echo never >&2; exit 2", "start failed: never"),
    ] {
        bench.supervisor.accept(bench.registration(stop, start, None), Build::No).unwrap().begin();
        assert_eq!(bench.outcome().await, failed(reason));
    }
    assert!(!bench.path().join("started").exists());
}

#[tokio::test]
async fn a_configuration_that_means_nothing_passes_the_preflight_and_fails_the_restart() {
    let mut bench = Bench::new();
    let registration = bench.with_text("[restart]\nstop = 7\n");
    assert_eq!(bench.supervisor.preflight(&registration, Build::No).await, Ok(()));
    bench.supervisor.accept(registration, Build::No).unwrap().begin();
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
    let (docker, grants) = (Docker::from_environment(), bench.grants.clone());
    bench.supervisor = Supervisor::with(docker, grants, journal, bench.home.approvals.clone(), drift);
    let registration = bench.registration("touch stopped", "true", None);
    assert_eq!(bench.supervisor.preflight(&registration, Build::No).await, Ok(()));
    let ticket = bench.supervisor.accept(registration.clone(), Build::No).unwrap();
    drift::tests::program(programs.path(), "two");
    let refusal = bench.supervisor.preflight(&registration, Build::No).await.unwrap_err();
    ticket.begin();
    assert_eq!(bench.outcome().await, failed(&refusal.to_string()));
    assert!(!bench.path().join("stopped").exists());
}

#[tokio::test]
async fn c23_a_container_rebuilds_with_the_right_only_and_not_after_it_was_revoked() {
    let mut bench = Bench::new();
    let mut registration =
        Registration::clone(&bench.registration("true", "echo $LANDFALL_BUILD >> log", None));
    registration.attach_method = Some(AttachMethod::DOCKER);
    let registration = Arc::new(registration);
    let name = registration.container_name.clone();
    let refused = PreflightError::NotGranted(name.clone());
    let preflight = async |build| bench.supervisor.preflight(&registration, build).await;
    assert_eq!(preflight(Build::ByContainer).await, Err(refused.clone()));
    assert_eq!((preflight(Build::No).await, preflight(Build::ByUser).await), (Ok(()), Ok(())));
    let mut grants = Grants::none(name.clone());
    grants.grant(Right::Rebuild, &registration.cwd);
    bench.grants.put(grants);
    assert_eq!(preflight(Build::ByContainer).await, Ok(()));
    bench.supervisor.accept(Arc::clone(&registration), Build::ByContainer).unwrap().begin();
    assert_eq!(bench.outcome().await, completed());
    let ticket = bench.supervisor.accept(registration, Build::ByContainer).unwrap();
    bench.grants.remove(&name);
    ticket.begin();
    assert_eq!(bench.outcome().await, failed(&refused.to_string()));
    assert_eq!(bench.read("log"), "1\n");
}

#[tokio::test]
async fn the_folders_own_check_refuses_by_its_last_line() {
    let bench = Bench::new();
    let refusing = bench.registration("true", "true", Some("echo first; echo a plugin is missing; exit 1"));
    assert_eq!(
        bench.supervisor.preflight(&refusing, Build::No).await,
        Err(PreflightError::Folder(refusing.container_name.clone(), "a plugin is missing".to_owned()))
    );
    let passing = bench.registration("true", "true", Some("true"));
    assert_eq!(bench.supervisor.preflight(&passing, Build::No).await, Ok(()));
}

#[tokio::test]
async fn many_requests_during_a_restart_are_one_more_restart() {
    let mut bench = Bench::new();
    let stop = "echo stop >> log; touch begun; until [ -e go ]; do sleep 0.01; done";
    let registration = bench.registration(stop, "echo start$LANDFALL_BUILD >> log", None);
    bench.supervisor.accept(registration.clone(), Build::No).unwrap().begin();
    bench.wait_for("begun").await;
    for build in [Build::No, Build::ByUser, Build::No] {
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
    let late = bench.supervisor.accept(registration.clone(), Build::No).unwrap();
    bench.supervisor.accept(registration.clone(), Build::No).unwrap().begin();
    bench.wait_for("begun").await;
    let supervisor = bench.supervisor.clone();
    let stopping = tokio::spawn(async move { supervisor.stop().await });
    while bench.supervisor.state().refusal.is_none() {
        tokio::task::yield_now().await;
    }
    assert_eq!(bench.supervisor.accept(registration, Build::No).err().as_deref(), Some("daemon stopping"));
    late.begin();
    assert!(!stopping.is_finished());
    std::fs::write(bench.path().join("go"), "").unwrap();
    stopping.await.unwrap();
    assert_eq!(bench.outcome().await, completed());
    assert_eq!(bench.outcome().await, completed());
}
