use super::*;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Mutex;

use serde_json::json;
use tempfile::TempDir;
use tokio::sync::broadcast;
use tokio::time::{Instant, sleep};

use crate::docker::liveness::Liveness::{self, Alive, Gone, Unknown};

/// Answers by script: the next answer of a name, and its last one for ever.
#[derive(Default)]
pub(super) struct Script {
    pub(super) answers: Mutex<HashMap<String, VecDeque<Liveness>>>,
    asked: Mutex<Vec<(String, Instant)>>,
    /// How long each look takes.
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

/// Writes down what it is told, and takes its time where it is told to.
#[derive(Default)]
struct Companion {
    told: Mutex<Vec<String>>,
    hangs: Mutex<bool>,
    takes: Mutex<Duration>,
}

impl Companion {
    fn take_told(&self) -> Vec<String> {
        std::mem::take(&mut *self.told.lock().unwrap())
    }

    fn tell(&self, what: String) {
        self.told.lock().unwrap().push(what);
    }

    async fn take_time(&self) {
        let (hangs, takes) = (*self.hangs.lock().unwrap(), *self.takes.lock().unwrap());
        if hangs {
            std::future::pending::<()>().await;
        }
        sleep(takes).await;
    }
}

impl RegistrationObserver for Companion {
    fn name(&self) -> &'static str {
        "companion"
    }

    fn start(&self, registration: Arc<Registration>) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            self.take_time().await;
            self.tell(format!("start {} {}", registration.container_name, registration.cwd.display()));
        })
    }

    fn stop<'a>(&'a self, name: &'a ContainerName, reason: StopReason) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            self.take_time().await;
            self.tell(format!("stop {name} {reason:?}"));
        })
    }

    fn drain(&self) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            self.take_time().await;
            self.tell("drain".to_owned());
        })
    }
}

/// A registry, and everything around it that a test has a say in.
pub(super) struct Bench {
    pub(super) folder: Arc<TempDir>,
    pub(super) registry: Registry,
    pub(super) script: Arc<Script>,
    companion: Arc<Companion>,
    journal: broadcast::Receiver<Arc<str>>,
}

pub(super) const TURN: Duration = Duration::from_secs(30);

impl Bench {
    pub(super) fn new() -> Bench {
        Bench::over(Arc::new(tempfile::tempdir().unwrap()), Arc::default())
    }

    pub(super) fn over(folder: Arc<TempDir>, script: Arc<Script>) -> Bench {
        let home = Home::at(folder.path().to_owned()).unwrap();
        home.ensure_directories().unwrap();
        let (kept, companion) = (Journal::unkept(), Arc::<Companion>::default());
        let journal = kept.listen();
        let registry = Registry::open(RegistryOptions {
            approvals: Approvals::of(&home),
            home,
            grants: GrantTable::default(),
            journal: kept,
            liveness: Arc::<Script>::clone(&script),
            observers: vec![Arc::<Companion>::clone(&companion)],
            cleanup_timeout: Duration::from_secs(60),
            gc_interval: TURN,
            gc_misses: 3,
        });
        Bench { folder, registry, script, companion, journal }
    }

    /// The next daemon over the same files.
    pub(super) async fn next(self) -> Bench {
        self.registry.stop().await;
        Bench::over(self.folder, self.script)
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

    /// What the journal was told since the last look, without the times.
    fn told(&mut self) -> Vec<Value> {
        let mut told = Vec::new();
        while let Ok(line) = self.journal.try_recv() {
            let mut line: Value = serde_json::from_str(&line).unwrap();
            line.as_object_mut().unwrap().remove("time");
            told.push(line);
        }
        told
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
async fn registering_again_is_one_registration_in_its_old_place_and_new_companions() {
    let mut bench = Bench::new();
    let registry = &bench.registry;
    let mut watch = registry.watch();
    for (name, cwd) in [("b", "/1"), ("a", "/2"), ("b", "/3")] {
        registry.register(bare(name, cwd)).await.unwrap();
    }
    assert!(watch.has_changed().unwrap());
    assert_eq!(watch.borrow_and_update().entries.len(), 2);
    assert_eq!(bench.names(), ["b", "a"]);
    assert_eq!(bench.registry.list().find("b").unwrap().cwd.to_str(), Some("/3"));
    assert_eq!(bench.companion.take_told(), ["start b /1", "start a /2", "stop b Replaced", "start b /3"]);
    assert_eq!(bench.told(), [registered("b"), registered("a")]);
    assert_eq!(bench.files(), ["a.json", "b.json"]);
}

#[tokio::test(start_paused = true)]
async fn deregistering_forgets_and_an_unknown_name_is_forgotten_already() {
    let mut bench = Bench::new();
    bench.registry.register(bare("a", "/a")).await.unwrap();
    for name in ["a", "a", "never", "../etc/passwd", ""] {
        bench.registry.deregister(name, DropReason::Requested).await;
    }
    assert!(bench.names().is_empty());
    assert!(bench.files().is_empty());
    assert_eq!(bench.companion.take_told(), ["start a /a", "stop a Deregistered"]);
    assert_eq!(bench.told(), [registered("a"), deregistered("a", "requested")]);
}

#[tokio::test(start_paused = true)]
async fn requests_that_arrive_together_are_served_in_order() {
    let bench = Bench::new();
    *bench.companion.takes.lock().unwrap() = Duration::from_secs(1);
    let registry = &bench.registry;
    for _ in 0..20 {
        let (first, (), last) = tokio::join!(
            registry.register(bare("a", "/1")),
            registry.deregister("a", DropReason::Requested),
            registry.register(bare("b", "/2")),
        );
        first.unwrap();
        last.unwrap();
        assert_eq!(bench.names(), ["b"]);
        tokio::join!(registry.deregister("b", DropReason::Requested), async {
            registry.register(bare("b", "/3")).await.unwrap();
        });
        assert_eq!(bench.names(), ["b"]);
        registry.deregister("b", DropReason::Requested).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_companion_that_hangs_is_abandoned_after_a_minute_and_costs_no_other_container() {
    let mut bench = Bench::new();
    bench.registry.register(bare("a", "/1")).await.unwrap();
    *bench.companion.hangs.lock().unwrap() = true;
    let begun = Instant::now();
    let hung = bench.registry.clone();
    let hung = tokio::spawn(async move { hung.deregister("a", DropReason::Requested).await });
    tokio::task::yield_now().await;
    *bench.companion.hangs.lock().unwrap() = false;
    bench.registry.register(bare("b", "/b")).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(1), "another container had to wait");
    bench.registry.register(bare("a", "/2")).await.unwrap();
    assert_eq!(begun.elapsed().as_secs(), 60);
    hung.await.unwrap();
    assert_eq!(bench.registry.list().find("a").unwrap().cwd.to_str(), Some("/2"));
    let told = bench.told();
    let abandoned = |line: &&Value| line["text"].as_str().is_some_and(|text| text.contains("abandoned"));
    assert_eq!(told.iter().filter(abandoned).count(), 1, "{told:?}");
}

#[tokio::test(start_paused = true)]
async fn an_asker_that_goes_away_leaves_no_half_of_a_registration() {
    let bench = Bench::new();
    *bench.companion.takes.lock().unwrap() = Duration::from_secs(5);
    let impatient = bench.registry.register(bare("a", "/a"));
    assert!(tokio::time::timeout(Duration::from_secs(1), impatient).await.is_err());
    bench.registry.register(bare("a", "/b")).await.unwrap();
    assert_eq!(bench.companion.take_told(), ["start a /a", "stop a Replaced", "start a /b"]);
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_written_is_not_registered() {
    let mut bench = Bench::new();
    bench.registry.register(bare("a", "/1")).await.unwrap();
    let (registrations, away) = (bench.path(""), bench.folder.path().join("away"));
    std::fs::rename(&registrations, &away).unwrap();
    for name in ["a", "b"] {
        let error = bench.registry.register(bare(name, "/2")).await.unwrap_err().to_string();
        assert!(error.starts_with("failed to persist registration: opening "), "{error}");
    }
    std::fs::rename(&away, &registrations).unwrap();
    assert_eq!(bench.names(), ["a"]);
    assert_eq!(bench.registry.list().find("a").unwrap().cwd.to_str(), Some("/1"));
    assert_eq!(bench.told(), [registered("a")]);
    bench.registry.register(bare("b", "/2")).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_process_is_registered_with_the_moment_it_began_and_only_if_there_is_one() {
    let bench = Bench::new();
    let attach_method =
        |attach_method: Value| registration(json!({"containerName": "a", "cwd": "/a", "way": attach_method}));
    let own = std::process::id();
    bench.registry.register(attach_method(json!({"kind": "process", "pid": own}))).await.unwrap();
    let kept: Value = serde_json::from_slice(&std::fs::read(bench.path("a.json")).unwrap()).unwrap();
    assert!(kept["way"]["started"]["ticks"].is_u64(), "{kept}");
    bench.registry.register(attach_method(kept["way"].clone())).await.unwrap();
    let mut earlier = kept["way"].clone();
    earlier["started"]["ticks"] = json!(1);
    for (wrong, text) in [
        (
            json!({"kind": "process", "pid": u32::MAX}),
            "invalid register: way: there is no process 4294967295",
        ),
        (earlier, &format!("invalid register: way: process {own} is not the one that began then")),
    ] {
        assert_eq!(bench.registry.register(attach_method(wrong)).await.unwrap_err().to_string(), text);
    }
    let newer = registration(json!({"containerName": "a", "cwd": "/a", "formatVersion": 2}));
    let error = bench.registry.register(newer).await.unwrap_err().to_string();
    assert!(error.starts_with("invalid register: formatVersion: "), "{error}");
}

/// What lies on disk when the next daemon starts, one case of the table each (wire specification, A.7.5).
fn put_every_case(bench: &Bench) {
    // Replay follows the time of each file, and the name for equal times. The order here is that of the names, so that it does
    // not matter whether the clock of the file system advances between two writes.
    for (file, text) in [
        ("alive.json", r#"{"containerName":"alive","cwd":"/alive","restartToken":"t","colour":"red"}"#),
        ("alive.json.7.tmp", "half"),
        ("corrupt.json", "{\"containerName\":"),
        ("gone.json", r#"{"containerName":"gone","cwd":"/gone"}"#),
        ("mismatch.json", r#"{"containerName":"another","cwd":"/a"}"#),
        ("nowhere.json", r#"{"containerName":"nowhere"}"#),
        ("unknown.json", r#"{"containerName":"unknown","cwd":"/unknown"}"#),
    ] {
        std::fs::write(bench.path(file), text).unwrap();
    }
    bench.script.set("gone", &[Gone]);
    bench.script.set("unknown", &[Unknown]);
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_the_replay_goes_on_in_the_order_of_asking() {
    let bench = Bench::new();
    bench.registry.register(bare("a", "/a")).await.unwrap();
    *bench.script.takes.lock().unwrap() = Duration::from_secs(1);
    let bench = bench.next().await;
    let (registry, order) = (&bench.registry, &Mutex::new(Vec::new()));
    let waiting = (0..50).map(|number| async move {
        registry.replayed().await;
        order.lock().unwrap().push(number);
    });
    futures_util::future::join_all(waiting).await;
    assert_eq!(*order.lock().unwrap(), Vec::from_iter(0..50));
}

#[tokio::test(start_paused = true)]
async fn replay_takes_in_what_is_alive_or_unknown_and_tells_of_the_rest() {
    let bench = Bench::new();
    bench.registry.replayed().await;
    put_every_case(&bench);
    let mut bench = bench.next().await;
    bench.registry.replayed().await;
    assert_eq!(bench.names(), ["alive", "unknown"]);
    let alive = bench.registry.list().find("alive").cloned().unwrap();
    assert!(alive.restart_token.as_ref().unwrap().matches("t"));
    assert_eq!(alive.unknown.get("colour"), Some(&json!("red")));
    assert_eq!(bench.companion.take_told(), ["start alive /alive", "start unknown /unknown"]);
    assert_eq!(
        bench.files(),
        ["alive.json", "corrupt.json", "mismatch.json", "nowhere.json", "unknown.json"]
    );
    let (notices, told): (Vec<_>, Vec<_>) =
        bench.told().into_iter().partition(|line| line["kind"] == "notice");
    assert_eq!(
        told,
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
    bench.registry.register(bare("corrupt", "/c")).await.unwrap();
    assert_eq!(
        bench.told(),
        [
            json!({"kind": "notice", "text": "corrupt.json could not be read; it is kept as corrupt.json.bad-1"}),
            registered("corrupt"),
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn a_slow_look_at_the_start_holds_up_changes_and_nothing_else() {
    let bench = Bench::new();
    for number in 0..20 {
        bench.registry.register(bare(&format!("c{number:02}"), "/c")).await.unwrap();
    }
    *bench.script.takes.lock().unwrap() = Duration::from_secs(5);
    let bench = bench.next().await;
    let begun = Instant::now();
    assert!(bench.names().is_empty());
    bench.registry.register(bare("new", "/new")).await.unwrap();
    // Eight side by side: three rounds for twenty.
    assert_eq!(begun.elapsed().as_secs(), 15);
    assert_eq!(bench.names().len(), 21);
    assert_eq!(bench.names()[20], "new");
    // One that hangs is unknown in the end.
    *bench.script.takes.lock().unwrap() = Duration::MAX / 4;
    let bench = bench.next().await;
    let begun = Instant::now();
    bench.registry.replayed().await;
    assert_eq!(begun.elapsed().as_secs(), 30);
    assert_eq!(bench.names().len(), 21);
}

#[tokio::test(start_paused = true)]
async fn a_container_is_dropped_after_three_misses_in_a_row() {
    let mut bench = Bench::new();
    bench.registry.replayed().await;
    let begun = Instant::now();
    for name in ["gone", "flaky", "unknown"] {
        bench.registry.register(bare(name, "/c")).await.unwrap();
    }
    // The first look at each is over.
    sleep(Duration::from_secs(1)).await;
    bench.script.set("gone", &[Gone]);
    bench.script.set("flaky", &[Gone, Gone, Alive, Gone, Gone, Alive, Gone, Unknown, Gone, Alive]);
    bench.script.set("unknown", &[Unknown]);
    let mut watch = bench.registry.watch();
    watch.wait_for(|known| known.find("gone").is_none()).await.unwrap();
    assert_eq!(begun.elapsed(), TURN * 3);
    sleep(TURN * 20).await;
    assert_eq!(bench.names(), ["flaky", "unknown"]);
    assert_eq!(bench.files(), ["flaky.json", "unknown.json"]);
    assert_eq!(bench.told().last(), Some(&deregistered("gone", "gone")));
}

#[tokio::test(start_paused = true)]
async fn looks_never_overlap_however_long_they_take() {
    let bench = Bench::new();
    bench.registry.register(bare("a", "/a")).await.unwrap();
    sleep(Duration::from_secs(1)).await;
    bench.script.asked.lock().unwrap().clear();
    *bench.script.takes.lock().unwrap() = Duration::from_secs(9);
    bench.registry.look_again("a");
    sleep(Duration::from_secs(1)).await;
    for _ in 0..50 {
        bench.registry.look_again("a");
    }
    sleep(Duration::from_secs(25)).await;
    assert_eq!(bench.script.times("a").len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_hint_drops_a_container_soon_and_spares_one_that_is_made_again() {
    let bench = Bench::new();
    for name in ["gone", "again", "back"] {
        bench.registry.register(bare(name, "/c")).await.unwrap();
    }
    // The first look, after which they are known to have been there.
    sleep(Duration::from_secs(1)).await;
    let begun = Instant::now();
    for name in ["gone", "again", "back"] {
        assert_eq!(bench.script.times(name).len(), 1);
        bench.script.set(name, &[Gone]);
    }
    bench.script.set("again", &[Gone, Gone, Alive]);
    for name in ["gone", "again", "back", "never"] {
        bench.registry.look_again(name);
    }
    sleep(Duration::from_secs(3)).await;
    // Two looks have missed it; registered anew, it is a registration of its own.
    bench.registry.register(bare("back", "/new")).await.unwrap();
    let mut watch = bench.registry.watch();
    watch.wait_for(|known| known.find("gone").is_none()).await.unwrap();
    assert_eq!(begun.elapsed().as_secs(), 4);
    sleep(Duration::from_secs(20)).await;
    assert_eq!(bench.names(), ["again", "back"]);
    assert!(bench.script.times("never").is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_container_that_is_registered_before_it_is_made_has_all_its_turns() {
    let bench = Bench::new();
    bench.registry.replayed().await;
    let begun = Instant::now();
    bench.script.set("early", &[Gone]);
    bench.registry.register(bare("early", "/c")).await.unwrap();
    bench.registry.look_again("early");
    let mut watch = bench.registry.watch();
    watch.wait_for(|known| known.find("early").is_none()).await.unwrap();
    assert_eq!(begun.elapsed(), TURN * 2);
    // One that the last daemon knew to be there goes soon under the next one, too.
    bench.script.set("late", &[Alive, Alive, Gone]);
    bench.registry.register(bare("late", "/c")).await.unwrap();
    sleep(Duration::from_secs(1)).await;
    let bench = bench.next().await;
    bench.registry.replayed().await;
    let begun = Instant::now();
    bench.registry.look_again("late");
    let mut watch = bench.registry.watch();
    watch.wait_for(|known| known.find("late").is_none()).await.unwrap();
    assert_eq!(begun.elapsed().as_secs(), 4);
}

#[tokio::test(start_paused = true)]
async fn a_container_reported_gone_stays_if_it_is_there_again() {
    let mut bench = Bench::new();
    bench.registry.register(bare("a", "/a")).await.unwrap();
    bench.registry.deregister("a", DropReason::Gone).await;
    assert_eq!(bench.names(), ["a"]);
    bench.script.set("a", &[Gone]);
    bench.registry.deregister("a", DropReason::Gone).await;
    assert!(bench.names().is_empty());
    assert_eq!(bench.told().last(), Some(&deregistered("a", "gone")));
}

#[tokio::test(start_paused = true)]
async fn a_rejected_token_ends_the_registration_that_has_it_and_no_later_one() {
    let mut bench = Bench::new();
    let with = |token: &str| registration(json!({"containerName": "a", "cwd": "/a", "brokerToken": token}));
    let name = ContainerName::new("a").unwrap();
    let (old, new) = (Token::new("old").unwrap(), Token::new("new").unwrap());
    bench.registry.register(with("old")).await.unwrap();
    bench.registry.register(with("new")).await.unwrap();
    bench.registry.fatal_auth(&name, &old, "invalid token").await;
    assert_eq!(bench.names(), ["a"]);
    bench.registry.fatal_auth(&name, &new, "invalid token").await;
    assert!(bench.names().is_empty() && bench.files().is_empty());
    assert_eq!(bench.companion.take_told().last().unwrap(), "stop a FatalAuth");
    let told = bench.told();
    assert_eq!(told, [registered("a"), skipped("a", "fatal broker auth: invalid token")]);
    bench.registry.fatal_auth(&name, &new, "invalid token").await;
    bench.registry.register(bare("a", "/a")).await.unwrap();
    bench.registry.fatal_auth(&name, &new, "invalid token").await;
    assert_eq!(bench.names(), ["a"]);
}

#[tokio::test(start_paused = true)]
async fn a_stop_takes_no_more_drains_once_and_keeps_the_files() {
    let mut bench = Bench::new();
    bench.registry.register(bare("a", "/a")).await.unwrap();
    *bench.companion.takes.lock().unwrap() = Duration::from_secs(5);
    let registry = bench.registry.clone();
    let under_way = tokio::spawn(async move { registry.register(bare("b", "/b")).await });
    tokio::task::yield_now().await;
    sleep(Duration::from_secs(1)).await;
    let registry = bench.registry.clone();
    let waiting = tokio::spawn(async move { registry.register(bare("b", "/c")).await });
    tokio::task::yield_now().await;
    tokio::join!(bench.registry.stop(), bench.registry.stop());
    under_way.await.unwrap().unwrap();
    assert_eq!(waiting.await.unwrap().unwrap_err().to_string(), "daemon stopping");
    let error = bench.registry.register(bare("c", "/c")).await.unwrap_err();
    assert_eq!(error.to_string(), "daemon stopping");
    assert_eq!(bench.companion.take_told(), ["start a /a", "start b /b", "drain"]);
    assert_eq!(bench.files(), ["a.json", "b.json"]);
    bench.script.set("a", &[Gone]);
    bench.told();
    sleep(TURN * 10).await;
    assert_eq!(bench.names(), ["a", "b"]);
}

#[tokio::test(start_paused = true)]
async fn a_stop_does_not_wait_for_a_slow_start() {
    let bench = Bench::new();
    bench.registry.register(bare("a", "/a")).await.unwrap();
    *bench.script.takes.lock().unwrap() = Duration::from_secs(9);
    let bench = bench.next().await;
    let begun = Instant::now();
    bench.registry.stop().await;
    assert!(begun.elapsed() < Duration::from_secs(1));
    assert_eq!(bench.files(), ["a.json"]);
}

#[tokio::test(start_paused = true)]
async fn secrets_are_for_registered_containers() {
    let bench = Bench::new();
    let folder = tempfile::tempdir().unwrap();
    let cwd = folder.path().to_str().unwrap();
    bench.registry.register(bare("a", cwd)).await.unwrap();
    let patch = json!({"mcp": {"server": "s", "credential": {"tokens": {"access": "canary"}}}});
    bench.registry.patch_secrets("a", &patch).await.unwrap();
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
        assert_eq!(bench.registry.patch_secrets(name, &patch).await.unwrap_err().to_string(), error);
    }
    bench.registry.stop().await;
    assert_eq!(bench.registry.patch_secrets("a", &patch).await.unwrap_err().to_string(), "daemon stopping");
}
