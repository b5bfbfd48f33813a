use super::*;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Mutex;

use serde_json::json;
use tempfile::TempDir;
use tokio::sync::broadcast;
use tokio::time::{Instant, sleep};

use crate::docker::liveness::Liveness::{self, Alive, Gone, Unknown};

/// A probe with scripted results: the next result of a name, the last one repeatedly.
#[derive(Default)]
pub(super) struct Script {
    pub(super) answers: Mutex<HashMap<String, VecDeque<Liveness>>>,
    asked: Mutex<Vec<(String, Instant)>>,
    /// The duration of each probe.
    pub(super) takes: Mutex<Duration>,
}

impl Script {
    pub(super) fn set(&self, name: &str, answers: &[Liveness]) {
        self.answers.lock().unwrap().insert(name.to_owned(), answers.iter().copied().collect());
    }

    fn times(&self, name: &str) -> Vec<Instant> {
        self.asked.lock().unwrap().iter().filter(|(asked, _)| asked == name).map(|(_, at)| *at).collect()
    }
}

impl Probe for Script {
    fn probe<'a>(&'a self, registration: &'a Registration) -> BoxFuture<'a, Liveness> {
        let (name, takes) = (registration.container_name.to_string(), *self.takes.lock().unwrap());
        Box::pin(async move {
            sleep(takes).await;
            self.asked.lock().unwrap().push((name.clone(), Instant::now()));
            let mut answers = self.answers.lock().unwrap();
            let Some(answers) = answers.get_mut(&name) else { return Alive };
            if answers.len() > 1 { answers.pop_front().unwrap() } else { answers[0] }
        })
    }
}

/// An observer that records its calls, and delays them if the test sets a delay.
#[derive(Default)]
struct RecordingObserver {
    events: Mutex<Vec<String>>,
    hangs: Mutex<bool>,
    takes: Mutex<Duration>,
}

impl RecordingObserver {
    fn take_calls(&self) -> Vec<String> {
        std::mem::take(&mut *self.events.lock().unwrap())
    }

    fn record(&self, what: String) {
        self.events.lock().unwrap().push(what);
    }

    async fn delay(&self) {
        let (hangs, takes) = (*self.hangs.lock().unwrap(), *self.takes.lock().unwrap());
        if hangs {
            std::future::pending::<()>().await;
        }
        sleep(takes).await;
    }
}

impl RegistrationObserver for RecordingObserver {
    fn name(&self) -> &'static str {
        "companion"
    }

    fn start(&self, registration: Arc<Registration>) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            self.delay().await;
            self.record(format!("start {} {}", registration.container_name, registration.cwd.display()));
        })
    }

    fn stop<'a>(&'a self, name: &'a ContainerName, reason: StopReason) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            self.delay().await;
            self.record(format!("stop {name} {reason:?}"));
        })
    }

    fn drain(&self) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            self.delay().await;
            self.record("drain".to_owned());
        })
    }
}

/// A registry with scripted surroundings.
pub(super) struct Fixture {
    pub(super) folder: Arc<TempDir>,
    pub(super) registry: Registry,
    pub(super) script: Arc<Script>,
    observer: Arc<RecordingObserver>,
    journal: broadcast::Receiver<Arc<str>>,
}

pub(super) const INTERVAL: Duration = Duration::from_secs(30);

impl Fixture {
    pub(super) fn new() -> Fixture {
        Fixture::over(Arc::new(tempfile::tempdir().unwrap()), Arc::default())
    }

    pub(super) fn over(folder: Arc<TempDir>, script: Arc<Script>) -> Fixture {
        let home = Home::at(folder.path().to_owned()).unwrap();
        home.ensure_directories().unwrap();
        let (kept, observer) = (Journal::unkept(), Arc::<RecordingObserver>::default());
        let journal = kept.listen();
        let registry = Registry::open(RegistryOptions {
            approvals: Approvals::of(&home),
            home,
            grants: GrantTable::default(),
            journal: kept,
            liveness: Arc::<Script>::clone(&script),
            observers: vec![Arc::<RecordingObserver>::clone(&observer)],
            cleanup_timeout: Duration::from_secs(60),
            gc_interval: INTERVAL,
            gc_misses: 3,
        });
        Fixture { folder, registry, script, observer, journal }
    }

    /// Stops the daemon and starts the next one over the same files.
    pub(super) async fn next(self) -> Fixture {
        self.registry.stop().await;
        Fixture::over(self.folder, self.script)
    }

    fn path(&self, file: &str) -> std::path::PathBuf {
        self.folder.path().join("run/registrations").join(file)
    }

    pub(super) fn names(&self) -> Vec<String> {
        self.registry.list().entries.iter().map(|entry| entry.container_name.to_string()).collect()
    }

    fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder.path().join("run/registrations")).unwrap();
        let mut files: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        files.sort();
        files
    }

    /// Returns the journal's new events, without their times.
    fn events(&mut self) -> Vec<Value> {
        let mut events = Vec::new();
        while let Ok(line) = self.journal.try_recv() {
            let mut line: Value = serde_json::from_str(&line).unwrap();
            line.as_object_mut().unwrap().remove("time");
            events.push(line);
        }
        events
    }
}

pub(super) fn registration(fields: Value) -> Registration {
    let Value::Object(fields) = fields else { panic!("an object is needed") };
    Registration::from_fields(fields).unwrap()
}

pub(super) fn bare(name: &str, cwd: &str) -> Registration {
    registration(json!({"containerName": name, "cwd": cwd}))
}

fn registered(name: &str) -> Value {
    json!({"kind": "register", "containerName": name})
}

fn skipped(name: &str, reason: &str) -> Value {
    json!({"kind": "registration-skipped", "containerName": name, "reason": reason})
}

fn deregistered(name: &str, reason: &str) -> Value {
    json!({"kind": "deregister", "containerName": name, "reason": reason})
}

#[tokio::test(start_paused = true)]
async fn registering_again_keeps_the_position_and_restarts_observers() {
    let mut fixture = Fixture::new();
    let registry = &fixture.registry;
    let mut watch = registry.watch();
    for (name, cwd) in [("b", "/1"), ("a", "/2"), ("b", "/3")] {
        registry.register(bare(name, cwd)).await.unwrap();
    }
    assert!(watch.has_changed().unwrap());
    assert_eq!(watch.borrow_and_update().entries.len(), 2);
    assert_eq!(fixture.names(), ["b", "a"]);
    assert_eq!(fixture.registry.list().find("b").unwrap().cwd.to_str(), Some("/3"));
    assert_eq!(fixture.observer.take_calls(), ["start b /1", "start a /2", "stop b Replaced", "start b /3"]);
    assert_eq!(fixture.events(), [registered("b"), registered("a")]);
    assert_eq!(fixture.files(), ["a.json", "b.json"]);
}

#[tokio::test(start_paused = true)]
async fn deregistering_removes_and_an_unknown_name_has_no_effect() {
    let mut fixture = Fixture::new();
    fixture.registry.register(bare("a", "/a")).await.unwrap();
    for name in ["a", "a", "never", "../etc/passwd", ""] {
        fixture.registry.deregister(name, DropReason::Requested).await;
    }
    assert!(fixture.names().is_empty());
    assert!(fixture.files().is_empty());
    assert_eq!(fixture.observer.take_calls(), ["start a /a", "stop a Deregistered"]);
    assert_eq!(fixture.events(), [registered("a"), deregistered("a", "requested")]);
}

#[tokio::test(start_paused = true)]
async fn concurrent_requests_are_processed_in_order() {
    let fixture = Fixture::new();
    *fixture.observer.takes.lock().unwrap() = Duration::from_secs(1);
    let registry = &fixture.registry;
    for _ in 0..20 {
        let (first, (), last) = tokio::join!(
            registry.register(bare("a", "/1")),
            registry.deregister("a", DropReason::Requested),
            registry.register(bare("b", "/2")),
        );
        first.unwrap();
        last.unwrap();
        assert_eq!(fixture.names(), ["b"]);
        tokio::join!(registry.deregister("b", DropReason::Requested), async {
            registry.register(bare("b", "/3")).await.unwrap();
        });
        assert_eq!(fixture.names(), ["b"]);
        registry.deregister("b", DropReason::Requested).await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_observer_that_hangs_is_abandoned_after_a_minute_and_delays_no_other_container() {
    let mut fixture = Fixture::new();
    fixture.registry.register(bare("a", "/1")).await.unwrap();
    *fixture.observer.hangs.lock().unwrap() = true;
    let started = Instant::now();
    let hung = fixture.registry.clone();
    let hung = tokio::spawn(async move { hung.deregister("a", DropReason::Requested).await });
    tokio::task::yield_now().await;
    *fixture.observer.hangs.lock().unwrap() = false;
    fixture.registry.register(bare("b", "/b")).await.unwrap();
    assert!(started.elapsed() < Duration::from_secs(1), "another container was delayed");
    fixture.registry.register(bare("a", "/2")).await.unwrap();
    assert_eq!(started.elapsed().as_secs(), 60);
    hung.await.unwrap();
    assert_eq!(fixture.registry.list().find("a").unwrap().cwd.to_str(), Some("/2"));
    let events = fixture.events();
    let abandoned = |line: &&Value| line["text"].as_str().is_some_and(|text| text.contains("abandoned"));
    assert_eq!(events.iter().filter(abandoned).count(), 1, "{events:?}");
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_goes_away_leaves_no_partial_registration() {
    let fixture = Fixture::new();
    *fixture.observer.takes.lock().unwrap() = Duration::from_secs(5);
    let abandoned = fixture.registry.register(bare("a", "/a"));
    assert!(tokio::time::timeout(Duration::from_secs(1), abandoned).await.is_err());
    fixture.registry.register(bare("a", "/b")).await.unwrap();
    assert_eq!(fixture.observer.take_calls(), ["start a /a", "stop a Replaced", "start a /b"]);
}

#[tokio::test(start_paused = true)]
async fn a_registration_that_cannot_be_written_is_refused() {
    let mut fixture = Fixture::new();
    fixture.registry.register(bare("a", "/1")).await.unwrap();
    let (registrations, away) = (fixture.path(""), fixture.folder.path().join("away"));
    std::fs::rename(&registrations, &away).unwrap();
    for name in ["a", "b"] {
        let error = fixture.registry.register(bare(name, "/2")).await.unwrap_err().to_string();
        assert!(error.starts_with("failed to persist registration: opening "), "{error}");
    }
    std::fs::rename(&away, &registrations).unwrap();
    assert_eq!(fixture.names(), ["a"]);
    assert_eq!(fixture.registry.list().find("a").unwrap().cwd.to_str(), Some("/1"));
    assert_eq!(fixture.events(), [registered("a")]);
    fixture.registry.register(bare("b", "/2")).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_process_is_registered_with_its_start_time_if_it_exists() {
    let fixture = Fixture::new();
    let attach_method =
        |attach_method: Value| registration(json!({"containerName": "a", "cwd": "/a", "way": attach_method}));
    let own = std::process::id();
    fixture.registry.register(attach_method(json!({"kind": "process", "pid": own}))).await.unwrap();
    let kept: Value = serde_json::from_slice(&std::fs::read(fixture.path("a.json")).unwrap()).unwrap();
    assert!(kept["way"]["started"]["ticks"].is_u64(), "{kept}");
    fixture.registry.register(attach_method(kept["way"].clone())).await.unwrap();
    let mut earlier = kept["way"].clone();
    earlier["started"]["ticks"] = json!(1);
    for (wrong, text) in [
        (
            json!({"kind": "process", "pid": u32::MAX}),
            "invalid register: way: there is no process 4294967295",
        ),
        (earlier, &format!("invalid register: way: process {own} started at another time than registered")),
    ] {
        assert_eq!(fixture.registry.register(attach_method(wrong)).await.unwrap_err().to_string(), text);
    }
    let newer = registration(json!({"containerName": "a", "cwd": "/a", "formatVersion": 2}));
    let error = fixture.registry.register(newer).await.unwrap_err().to_string();
    assert!(error.starts_with("invalid register: formatVersion: "), "{error}");
}

/// Creates the files for the next start: one for each case of the table (wire specification, A.7.5).
fn create_replay_files(fixture: &Fixture) {
    // Replay follows the modification time, and the name for equal times. The order here is the order of the names, so the
    // resolution of the file system's clock does not matter.
    for (file, text) in [
        ("alive.json", r#"{"containerName":"alive","cwd":"/alive","restartToken":"t","colour":"red"}"#),
        ("alive.json.7.tmp", "half"),
        ("corrupt.json", "{\"containerName\":"),
        ("gone.json", r#"{"containerName":"gone","cwd":"/gone"}"#),
        ("mismatch.json", r#"{"containerName":"another","cwd":"/a"}"#),
        ("nowhere.json", r#"{"containerName":"nowhere"}"#),
        ("unknown.json", r#"{"containerName":"unknown","cwd":"/unknown"}"#),
    ] {
        std::fs::write(fixture.path(file), text).unwrap();
    }
    fixture.script.set("gone", &[Gone]);
    fixture.script.set("unknown", &[Unknown]);
}

#[tokio::test(start_paused = true)]
async fn requests_that_wait_for_the_replay_continue_in_order_of_arrival() {
    let fixture = Fixture::new();
    fixture.registry.register(bare("a", "/a")).await.unwrap();
    *fixture.script.takes.lock().unwrap() = Duration::from_secs(1);
    let fixture = fixture.next().await;
    let (registry, order) = (&fixture.registry, &Mutex::new(Vec::new()));
    let waiting = (0..50).map(|number| async move {
        registry.replayed().await;
        order.lock().unwrap().push(number);
    });
    futures_util::future::join_all(waiting).await;
    assert_eq!(*order.lock().unwrap(), Vec::from_iter(0..50));
}

#[tokio::test(start_paused = true)]
async fn replay_restores_alive_and_unknown_containers_and_reports_the_others() {
    let fixture = Fixture::new();
    fixture.registry.replayed().await;
    create_replay_files(&fixture);
    let mut fixture = fixture.next().await;
    fixture.registry.replayed().await;
    assert_eq!(fixture.names(), ["alive", "unknown"]);
    let alive = fixture.registry.list().find("alive").cloned().unwrap();
    assert!(alive.restart_token.as_ref().unwrap().matches("t"));
    assert_eq!(alive.unknown.get("colour"), Some(&json!("red")));
    assert_eq!(fixture.observer.take_calls(), ["start alive /alive", "start unknown /unknown"]);
    assert_eq!(
        fixture.files(),
        ["alive.json", "corrupt.json", "mismatch.json", "nowhere.json", "unknown.json"]
    );
    let (notices, events): (Vec<_>, Vec<_>) =
        fixture.events().into_iter().partition(|line| line["kind"] == "notice");
    assert_eq!(
        events,
        [
            skipped("corrupt", "not JSON: EOF while parsing a value at line 1 column 17"),
            skipped("mismatch", "schema mismatch"),
            skipped("nowhere", "schema mismatch"),
            registered("alive"),
            skipped("gone", "container not running"),
            registered("unknown"),
        ]
    );
    let texts: Vec<_> = notices.iter().map(|line| line["text"].as_str().unwrap()).collect();
    assert_eq!(
        texts,
        [
            "mismatch.json is kept as it is: it is about another",
            "nowhere.json is kept as it is: invalid register: cwd",
        ]
    );
    fixture.registry.register(bare("corrupt", "/c")).await.unwrap();
    assert_eq!(
        fixture.events(),
        [
            json!({"kind": "notice", "text": "corrupt.json could not be read; it is kept as corrupt.json.bad-1"}),
            registered("corrupt"),
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn a_slow_probe_at_the_start_delays_changes_only() {
    let fixture = Fixture::new();
    for number in 0..20 {
        fixture.registry.register(bare(&format!("c{number:02}"), "/c")).await.unwrap();
    }
    *fixture.script.takes.lock().unwrap() = Duration::from_secs(5);
    let fixture = fixture.next().await;
    let started = Instant::now();
    assert!(fixture.names().is_empty());
    fixture.registry.register(bare("new", "/new")).await.unwrap();
    // Eight concurrent probes: three rounds for twenty.
    assert_eq!(started.elapsed().as_secs(), 15);
    assert_eq!(fixture.names().len(), 21);
    assert_eq!(fixture.names()[20], "new");
    // A probe that hangs ends as unknown.
    *fixture.script.takes.lock().unwrap() = Duration::MAX / 4;
    let fixture = fixture.next().await;
    let started = Instant::now();
    fixture.registry.replayed().await;
    assert_eq!(started.elapsed().as_secs(), 30);
    assert_eq!(fixture.names().len(), 21);
}

#[tokio::test(start_paused = true)]
async fn a_container_is_dropped_after_three_consecutive_misses() {
    let mut fixture = Fixture::new();
    fixture.registry.replayed().await;
    let started = Instant::now();
    for name in ["gone", "flaky", "unknown"] {
        fixture.registry.register(bare(name, "/c")).await.unwrap();
    }
    // The first probe of each is over.
    sleep(Duration::from_secs(1)).await;
    fixture.script.set("gone", &[Gone]);
    fixture.script.set("flaky", &[Gone, Gone, Alive, Gone, Gone, Alive, Gone, Unknown, Gone, Alive]);
    fixture.script.set("unknown", &[Unknown]);
    let mut watch = fixture.registry.watch();
    watch.wait_for(|known| known.find("gone").is_none()).await.unwrap();
    assert_eq!(started.elapsed(), INTERVAL * 3);
    sleep(INTERVAL * 20).await;
    assert_eq!(fixture.names(), ["flaky", "unknown"]);
    assert_eq!(fixture.files(), ["flaky.json", "unknown.json"]);
    assert_eq!(fixture.events().last(), Some(&deregistered("gone", "gone")));
}

#[tokio::test(start_paused = true)]
async fn probes_never_overlap() {
    let fixture = Fixture::new();
    fixture.registry.register(bare("a", "/a")).await.unwrap();
    sleep(Duration::from_secs(1)).await;
    fixture.script.asked.lock().unwrap().clear();
    *fixture.script.takes.lock().unwrap() = Duration::from_secs(9);
    fixture.registry.recheck("a");
    sleep(Duration::from_secs(1)).await;
    for _ in 0..50 {
        fixture.registry.recheck("a");
    }
    sleep(Duration::from_secs(25)).await;
    assert_eq!(fixture.script.times("a").len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_hint_drops_a_container_soon_unless_it_is_recreated() {
    let fixture = Fixture::new();
    for name in ["gone", "again", "back"] {
        fixture.registry.register(bare(name, "/c")).await.unwrap();
    }
    // After the first probe they are known to have been alive.
    sleep(Duration::from_secs(1)).await;
    let started = Instant::now();
    for name in ["gone", "again", "back"] {
        assert_eq!(fixture.script.times(name).len(), 1);
        fixture.script.set(name, &[Gone]);
    }
    fixture.script.set("again", &[Gone, Gone, Alive]);
    for name in ["gone", "again", "back", "never"] {
        fixture.registry.recheck(name);
    }
    sleep(Duration::from_secs(3)).await;
    // Two probes have missed it. A new registration starts at zero.
    fixture.registry.register(bare("back", "/new")).await.unwrap();
    let mut watch = fixture.registry.watch();
    watch.wait_for(|known| known.find("gone").is_none()).await.unwrap();
    assert_eq!(started.elapsed().as_secs(), 4);
    sleep(Duration::from_secs(20)).await;
    assert_eq!(fixture.names(), ["again", "back"]);
    assert!(fixture.script.times("never").is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_container_that_is_registered_before_it_is_created_has_all_its_intervals() {
    let fixture = Fixture::new();
    fixture.registry.replayed().await;
    let started = Instant::now();
    fixture.script.set("early", &[Gone]);
    fixture.registry.register(bare("early", "/c")).await.unwrap();
    fixture.registry.recheck("early");
    let mut watch = fixture.registry.watch();
    watch.wait_for(|known| known.find("early").is_none()).await.unwrap();
    assert_eq!(started.elapsed(), INTERVAL * 2);
    // A container that the previous daemon saw alive is dropped soon under the next daemon, too.
    fixture.script.set("late", &[Alive, Alive, Gone]);
    fixture.registry.register(bare("late", "/c")).await.unwrap();
    sleep(Duration::from_secs(1)).await;
    let fixture = fixture.next().await;
    fixture.registry.replayed().await;
    let started = Instant::now();
    fixture.registry.recheck("late");
    let mut watch = fixture.registry.watch();
    watch.wait_for(|known| known.find("late").is_none()).await.unwrap();
    assert_eq!(started.elapsed().as_secs(), 4);
}

#[tokio::test(start_paused = true)]
async fn a_container_reported_gone_stays_if_it_exists_again() {
    let mut fixture = Fixture::new();
    fixture.registry.register(bare("a", "/a")).await.unwrap();
    fixture.registry.deregister("a", DropReason::Gone).await;
    assert_eq!(fixture.names(), ["a"]);
    fixture.script.set("a", &[Gone]);
    fixture.registry.deregister("a", DropReason::Gone).await;
    assert!(fixture.names().is_empty());
    assert_eq!(fixture.events().last(), Some(&deregistered("a", "gone")));
}

#[tokio::test(start_paused = true)]
async fn a_rejected_token_drops_only_the_registration_that_has_it() {
    let mut fixture = Fixture::new();
    let with = |token: &str| registration(json!({"containerName": "a", "cwd": "/a", "brokerToken": token}));
    let name = ContainerName::new("a").unwrap();
    let (old, new) = (Token::new("old").unwrap(), Token::new("new").unwrap());
    fixture.registry.register(with("old")).await.unwrap();
    fixture.registry.register(with("new")).await.unwrap();
    fixture.registry.fatal_auth(&name, &old, "invalid token").await;
    assert_eq!(fixture.names(), ["a"]);
    fixture.registry.fatal_auth(&name, &new, "invalid token").await;
    assert!(fixture.names().is_empty() && fixture.files().is_empty());
    assert_eq!(fixture.observer.take_calls().last().unwrap(), "stop a FatalAuth");
    let events = fixture.events();
    assert_eq!(events, [registered("a"), skipped("a", "fatal broker auth: invalid token")]);
    fixture.registry.fatal_auth(&name, &new, "invalid token").await;
    fixture.registry.register(bare("a", "/a")).await.unwrap();
    fixture.registry.fatal_auth(&name, &new, "invalid token").await;
    assert_eq!(fixture.names(), ["a"]);
}

#[tokio::test(start_paused = true)]
async fn stop_refuses_new_requests_drains_once_and_keeps_the_files() {
    let mut fixture = Fixture::new();
    fixture.registry.register(bare("a", "/a")).await.unwrap();
    *fixture.observer.takes.lock().unwrap() = Duration::from_secs(5);
    let registry = fixture.registry.clone();
    let running = tokio::spawn(async move { registry.register(bare("b", "/b")).await });
    tokio::task::yield_now().await;
    sleep(Duration::from_secs(1)).await;
    let registry = fixture.registry.clone();
    let waiting = tokio::spawn(async move { registry.register(bare("b", "/c")).await });
    tokio::task::yield_now().await;
    tokio::join!(fixture.registry.stop(), fixture.registry.stop());
    running.await.unwrap().unwrap();
    assert_eq!(waiting.await.unwrap().unwrap_err().to_string(), "daemon stopping");
    let error = fixture.registry.register(bare("c", "/c")).await.unwrap_err();
    assert_eq!(error.to_string(), "daemon stopping");
    assert_eq!(fixture.observer.take_calls(), ["start a /a", "start b /b", "drain"]);
    assert_eq!(fixture.files(), ["a.json", "b.json"]);
    fixture.script.set("a", &[Gone]);
    fixture.events();
    sleep(INTERVAL * 10).await;
    assert_eq!(fixture.names(), ["a", "b"]);
}

#[tokio::test(start_paused = true)]
async fn stop_does_not_wait_for_a_slow_replay() {
    let fixture = Fixture::new();
    fixture.registry.register(bare("a", "/a")).await.unwrap();
    *fixture.script.takes.lock().unwrap() = Duration::from_secs(9);
    let fixture = fixture.next().await;
    let started = Instant::now();
    fixture.registry.stop().await;
    assert!(started.elapsed() < Duration::from_secs(1));
    assert_eq!(fixture.files(), ["a.json"]);
}

#[tokio::test(start_paused = true)]
async fn secrets_are_patched_for_registered_containers_only() {
    let fixture = Fixture::new();
    let folder = tempfile::tempdir().unwrap();
    let cwd = folder.path().to_str().unwrap();
    fixture.registry.register(bare("a", cwd)).await.unwrap();
    let patch = json!({"mcp": {"server": "s", "credential": {"tokens": {"access": "canary"}}}});
    fixture.registry.patch_secrets("a", &patch).await.unwrap();
    let kept: BTreeMap<String, Value> =
        serde_json::from_slice(&std::fs::read(folder.path().join("secrets.json")).unwrap()).unwrap();
    assert_eq!(kept["mcp"], json!({"s": {"tokens": {"access": "canary"}}}));
    for (name, patch, error) in [
        ("b", patch.clone(), "not registered: b"),
        ("../x", patch.clone(), "not registered: ../x"),
        ("b", json!(null), "not registered: b"),
        ("a", json!(null), "invalid secrets-patch"),
        ("a", json!({"mcp": {"server": "s", "credential": "canary"}}), "mcp.credential: expected an object"),
    ] {
        assert_eq!(fixture.registry.patch_secrets(name, &patch).await.unwrap_err().to_string(), error);
    }
    fixture.registry.stop().await;
    assert_eq!(fixture.registry.patch_secrets("a", &patch).await.unwrap_err().to_string(), "daemon stopping");
}
