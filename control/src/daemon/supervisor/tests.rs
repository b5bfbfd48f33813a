//! Restarts by commands of a folder, which need no Docker.

use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::broadcast::Receiver;

use super::*;
use crate::model::grants::Grants;
use crate::model::registration::AttachMethod;
use crate::registry::folder::test_support::TestHome;

/// A folder, its supervisor, and the events of the journal.
struct Fixture {
    home: TestHome,
    folder: TempDir,
    grants: GrantTable,
    supervisor: Supervisor,
    events: Receiver<Arc<str>>,
}

impl Fixture {
    fn new() -> Fixture {
        let journal = Journal::unkept();
        let events = journal.listen();
        let (home, grants) = (TestHome::new(), GrantTable::default());
        let docker = Docker::from_environment();
        let supervisor = Supervisor::new(docker, grants.clone(), journal, home.approvals.clone());
        Fixture { home, folder: tempfile::tempdir().unwrap(), grants, supervisor, events }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Returns the registration of a folder with these commands.
    fn registration(&self, stop: &str, start: &str, preflight: Option<&str>) -> Arc<Registration> {
        let words = |script: &str| format!("[\"sh\", \"-c\", {}]", json!(script));
        let mut text = format!("[restart]\nstop = {}\nstart = {}\n", words(stop), words(start));
        if let Some(preflight) = preflight {
            text += &format!("preflight = {}\n", words(preflight));
        }
        self.with_text(&text)
    }

    fn with_text(&self, text: &str) -> Arc<Registration> {
        self.home.register(self.path(), text)
    }

    async fn event(&mut self) -> Value {
        let line = tokio::time::timeout(Duration::from_secs(30), self.events.recv()).await.unwrap().unwrap();
        let mut event: Value = serde_json::from_str(&line).unwrap();
        event.as_object_mut().unwrap().remove("time");
        event
    }

    /// Returns the next event other than `restart-scheduled`.
    async fn outcome(&mut self) -> Value {
        loop {
            let event = self.event().await;
            if event["kind"] != "restart-scheduled" {
                return event;
            }
        }
    }

    /// Waits until a command has created a file.
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
async fn work_starts_with_the_ticket_and_stop_runs_before_start() {
    let mut fixture = Fixture::new();
    let registration = fixture.registration("echo stop >> log", "echo start$LANDFALL_BUILD >> log", None);
    let ticket = fixture.supervisor.accept(registration, Build::ByUser).unwrap();
    tokio::task::yield_now().await;
    assert!(fixture.events.try_recv().is_err());
    ticket.start();
    assert_eq!(
        fixture.event().await,
        json!({"kind": "restart-scheduled", "containerName": "coder", "build": true})
    );
    assert_eq!(fixture.event().await, completed());
    assert_eq!(fixture.read("log"), "stop\nstart1\n");
}

#[tokio::test]
async fn a_dropped_ticket_still_restarts() {
    let mut fixture = Fixture::new();
    drop(fixture.supervisor.accept(fixture.registration("true", "true", None), Build::No).unwrap());
    assert_eq!(fixture.outcome().await, completed());
}

#[tokio::test]
async fn a_failure_names_its_step() {
    let mut fixture = Fixture::new();
    for (stop, start, reason) in [
        ("echo no; exit 1", "touch started", "stop failed: no"),
        ("true", "echo never >&2; exit 2", "start failed: never"),
    ] {
        fixture.supervisor.accept(fixture.registration(stop, start, None), Build::No).unwrap().start();
        assert_eq!(fixture.outcome().await, failed(reason));
    }
    assert!(!fixture.path().join("started").exists());
}

#[tokio::test]
async fn an_invalid_configuration_passes_the_preflight_and_fails_the_restart() {
    let mut fixture = Fixture::new();
    let registration = fixture.with_text("[restart]\nstop = 7\n");
    assert_eq!(fixture.supervisor.preflight(&registration, Build::No).await, Ok(()));
    fixture.supervisor.accept(registration, Build::No).unwrap().start();
    let events = fixture.outcome().await;
    let reason = events["reason"].as_str().unwrap();
    assert!(reason.starts_with("invalid config for coder: landfall.toml line 2: "), "{reason}");
}

#[tokio::test]
async fn a_drifted_program_is_refused_before_and_after_the_promise() {
    let mut fixture = Fixture::new();
    let programs = tempfile::tempdir().unwrap();
    let journal = Journal::unkept();
    fixture.events = journal.listen();
    let drift = drift::tests::drift(programs.path());
    let (docker, grants) = (Docker::from_environment(), fixture.grants.clone());
    fixture.supervisor = Supervisor::with(docker, grants, journal, fixture.home.approvals.clone(), drift);
    let registration = fixture.registration("touch stopped", "true", None);
    assert_eq!(fixture.supervisor.preflight(&registration, Build::No).await, Ok(()));
    let ticket = fixture.supervisor.accept(registration.clone(), Build::No).unwrap();
    drift::tests::program(programs.path(), "two");
    let refusal = fixture.supervisor.preflight(&registration, Build::No).await.unwrap_err();
    ticket.start();
    assert_eq!(fixture.outcome().await, failed(&refusal.to_string()));
    assert!(!fixture.path().join("stopped").exists());
}

#[tokio::test]
async fn c23_a_container_rebuilds_with_the_right_only_and_not_after_it_was_revoked() {
    let mut fixture = Fixture::new();
    let mut registration =
        Registration::clone(&fixture.registration("true", "echo $LANDFALL_BUILD >> log", None));
    registration.attach_method = Some(AttachMethod::DOCKER);
    let registration = Arc::new(registration);
    let name = registration.container_name.clone();
    let refused = PreflightError::NotGranted(name.clone());
    let preflight = async |build| fixture.supervisor.preflight(&registration, build).await;
    assert_eq!(preflight(Build::ByContainer).await, Err(refused.clone()));
    assert_eq!((preflight(Build::No).await, preflight(Build::ByUser).await), (Ok(()), Ok(())));
    let mut grants = Grants::none(name.clone());
    grants.grant(Right::Rebuild, &registration.cwd);
    fixture.grants.put(grants);
    assert_eq!(preflight(Build::ByContainer).await, Ok(()));
    fixture.supervisor.accept(Arc::clone(&registration), Build::ByContainer).unwrap().start();
    assert_eq!(fixture.outcome().await, completed());
    let ticket = fixture.supervisor.accept(registration, Build::ByContainer).unwrap();
    fixture.grants.remove(&name);
    ticket.start();
    assert_eq!(fixture.outcome().await, failed(&refused.to_string()));
    assert_eq!(fixture.read("log"), "1\n");
}

#[tokio::test]
async fn a_failed_preflight_command_refuses_with_its_last_line() {
    let fixture = Fixture::new();
    let refusing = fixture.registration("true", "true", Some("echo first; echo a plugin is missing; exit 1"));
    assert_eq!(
        fixture.supervisor.preflight(&refusing, Build::No).await,
        Err(PreflightError::Folder(refusing.container_name.clone(), "a plugin is missing".to_owned()))
    );
    let passing = fixture.registration("true", "true", Some("true"));
    assert_eq!(fixture.supervisor.preflight(&passing, Build::No).await, Ok(()));
}

#[tokio::test]
async fn requests_during_a_restart_cause_one_further_restart() {
    let mut fixture = Fixture::new();
    let stop = "echo stop >> log; touch begun; until [ -e go ]; do sleep 0.01; done";
    let registration = fixture.registration(stop, "echo start$LANDFALL_BUILD >> log", None);
    fixture.supervisor.accept(registration.clone(), Build::No).unwrap().start();
    fixture.wait_for("begun").await;
    for build in [Build::No, Build::ByUser, Build::No] {
        fixture.supervisor.accept(registration.clone(), build).unwrap().start();
    }
    std::fs::write(fixture.path().join("go"), "").unwrap();
    assert_eq!(fixture.outcome().await, completed());
    assert_eq!(fixture.outcome().await, completed());
    fixture.supervisor.stop().await;
    assert!(fixture.events.try_recv().is_err());
    assert_eq!(fixture.read("log"), "stop\nstart0\nstop\nstart1\n");
}

#[tokio::test]
async fn stop_waits_for_promised_restarts_and_accepts_no_more() {
    let mut fixture = Fixture::new();
    let registration =
        fixture.registration("touch begun; until [ -e go ]; do sleep 0.01; done", "true", None);
    let late = fixture.supervisor.accept(registration.clone(), Build::No).unwrap();
    fixture.supervisor.accept(registration.clone(), Build::No).unwrap().start();
    fixture.wait_for("begun").await;
    let supervisor = fixture.supervisor.clone();
    let stopping = tokio::spawn(async move { supervisor.stop().await });
    while fixture.supervisor.state().refusal.is_none() {
        tokio::task::yield_now().await;
    }
    assert_eq!(fixture.supervisor.accept(registration, Build::No).err().as_deref(), Some("daemon stopping"));
    late.start();
    assert!(!stopping.is_finished());
    std::fs::write(fixture.path().join("go"), "").unwrap();
    stopping.await.unwrap();
    assert_eq!(fixture.outcome().await, completed());
    assert_eq!(fixture.outcome().await, completed());
}
