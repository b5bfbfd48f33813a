//! Tests with a real Docker engine: containers, builds, events. They need an engine at `DOCKER_HOST` and the image
//! `landfall-test-base`, which `tests/docker.sh` provides, so they run only on request.
#![cfg(test)]

#[path = "docker/agent.rs"]
mod agent;
#[path = "docker/helper.rs"]
mod helper;
#[path = "support/ports.rs"]
mod ports;
#[path = "docker/rebuild.rs"]
mod rebuild;
#[path = "docker/start.rs"]
mod start;

use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::{Duration, Instant};

use landfall::daemon::supervisor::{Build, Supervisor};
use landfall::docker::liveness::Liveness;
use landfall::docker::rebuild::{UserOfRebuild, own_image};
use landfall::docker::{Docker, DockerError, LifeEvent, Network};
use landfall::model::registration::{ContainerName, Registration};
use landfall::registry::folder::Approvals;
use landfall::registry::grants::GrantTable;
use landfall::sys::journal::Journal;
use landfall::sys::paths::Home;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::{UnixListener, UnixStream};

const WAIT_MAX: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(20);
const LONG: Duration = Duration::from_secs(60);
const BASE: &str = "landfall-test-base";

#[track_caller]
fn wait_until<T>(what: &str, mut state: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(reached) = state() {
            return reached;
        }
        assert!(started.elapsed() < WAIT_MAX, "{what} did not happen");
        std::thread::sleep(PAUSE);
    }
}

fn host() -> String {
    std::env::var("DOCKER_HOST").expect("DOCKER_HOST names the engine; run tests/docker.sh")
}

fn run(arguments: &[&str]) -> Output {
    Command::new("docker").args(arguments).output().unwrap()
}

#[track_caller]
fn docker(arguments: &[&str]) -> String {
    let output = run(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// A container that is removed at the end of the test, with its image and its replacement.
struct Container(ContainerName);

impl Container {
    fn run(name: &str, options: &[&str], image: &str, command: &[&str]) -> Container {
        let name = format!("lf-{}-{name}", std::process::id());
        let container = Container(ContainerName::new(&name).unwrap());
        // One second to stop: the shell ignores the signal.
        docker(
            &[&["run", "-d", "--stop-timeout", "1", "--name", &name], options, &[image], command].concat(),
        );
        container
    }

    fn sleeping(name: &str, options: &[&str]) -> Container {
        Container::run(name, options, BASE, &["sleep", "100000"])
    }

    fn inspect(&self, format: &str) -> String {
        docker(&["inspect", "--type", "container", "-f", format, self.0.as_str()])
    }

    fn id(&self) -> String {
        self.inspect("{{.Id}}")
    }

    fn exec(&self, script: &str) -> String {
        docker(&["exec", self.0.as_str(), "sh", "-c", script])
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        run(&["rm", "-f", "-v", self.0.as_str()]);
        run(&["rm", "-f", "-v", &format!("{}.landfall-old", self.0)]);
        run(&["rmi", "-f", &own_image(&self.0)]);
    }
}

/// A folder that is built, and the name of its image.
struct Built {
    folder: TempDir,
    image: String,
}

impl Built {
    fn new(name: &str, dockerfile: &str) -> Built {
        Built::with_files(name, dockerfile, &[])
    }

    fn with_files(name: &str, dockerfile: &str, files: &[(&str, &str)]) -> Built {
        let built = Built {
            folder: tempfile::tempdir().unwrap(),
            image: format!("lf-{}-{name}:1", std::process::id()),
        };
        for (file, text) in files {
            std::fs::write(built.path().join(file), text).unwrap();
        }
        built.dockerfile(dockerfile);
        docker(&["build", "-q", "-t", &built.image, built.path().to_str().unwrap()]);
        built
    }

    /// Writes the Dockerfile with a first layer that no other test shares: a layer is removed with the last image that has
    /// it, even if a concurrent build is about to use it.
    fn dockerfile(&self, text: &str) {
        let (from, rest) = text.split_once('\n').unwrap();
        let text = format!("{from}\nLABEL case={}\n{rest}", self.image);
        std::fs::write(self.path().join("Dockerfile"), text).unwrap();
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }
}

impl Drop for Built {
    fn drop(&mut self) {
        run(&["rmi", "-f", &self.image]);
    }
}

fn engine() -> Docker {
    Docker::at(Some(host()))
}

#[tokio::test]
#[ignore = "needs a Docker engine: tests/docker.sh"]
async fn a_container_is_alive_while_it_exists_under_its_exact_name() {
    let container = Container::sleeping("probe.x", &[]);
    let engine = engine();
    let probe = async |name: String| engine.probe(&ContainerName::new(&name).unwrap()).await;
    let name = container.0.to_string();
    assert_eq!(probe(name.clone()).await, Liveness::Alive);
    for other in
        [name.replace("probe.x", "probe-x"), name.replace(".x", ""), format!("{name}x"), container.id()]
    {
        assert_eq!(probe(other).await, Liveness::Gone);
    }
    docker(&["stop", "-t", "0", &name]);
    assert_eq!(probe(name.clone()).await, Liveness::Alive);
    docker(&["rm", &name]);
    assert_eq!(probe(name.clone()).await, Liveness::Gone);
    let nowhere = Docker::at(Some("unix:///nowhere/docker.sock".to_owned()));
    assert_eq!(nowhere.probe(&container.0).await, Liveness::Unknown);
}

#[tokio::test]
#[ignore = "needs a Docker engine: tests/docker.sh"]
async fn the_first_process_is_returned_and_a_missing_part_is_named() {
    let container = Container::sleeping("first", &[]);
    let engine = engine();
    let first = engine.first_process(&container.0).await.unwrap();
    assert_eq!(first.id, container.id());
    assert_eq!(first.pid.to_string(), container.inspect("{{.State.Pid}}"));
    assert_eq!(first.started_at, container.inspect("{{.State.StartedAt}}"));
    assert_eq!(first.network, Network::Own);
    let shared = Container::sleeping("shared", &["--network", "host"]);
    assert_eq!(engine.first_process(&shared.0).await.unwrap().network, Network::Host);
    docker(&["stop", "-t", "0", container.0.as_str()]);
    let error = engine.first_process(&container.0).await.unwrap_err();
    assert_eq!(error, DockerError::NotRunning(container.0.to_string()));
    let other = ContainerName::new("no-such-container").unwrap();
    let error = engine.first_process(&other).await.unwrap_err();
    assert_eq!(error, DockerError::NoSuchContainer(other.to_string()));
    let nowhere = Docker::at(Some("unix:///nowhere/docker.sock".to_owned()));
    assert!(matches!(nowhere.first_process(&other).await, Err(DockerError::Unreachable { .. })));
}

#[tokio::test]
#[ignore = "needs a Docker engine: tests/docker.sh"]
async fn a_restart_starts_another_process_in_the_same_container() {
    for options in [&[][..], &["--rm"]] {
        let container = Container::sleeping("restart", options);
        let (id, pid) = (container.id(), container.inspect("{{.State.Pid}}"));
        engine().restart(&container.0).await.unwrap();
        assert_eq!(container.id(), id);
        assert_ne!(container.inspect("{{.State.Pid}}"), pid);
        assert_eq!(container.inspect("{{.State.Running}}"), "true");
    }
}

#[tokio::test]
#[ignore = "needs a Docker engine: tests/docker.sh"]
async fn a_container_that_ends_at_once_is_a_failed_start() {
    let script = "if [ -e /ran ]; then echo it is broken; exit 3; fi; touch /ran; sleep 100000";
    let container = Container::run("broken", &[], BASE, &["sh", "-c", script]);
    while run(&["exec", container.0.as_str(), "test", "-e", "/ran"]).status.code() != Some(0) {}
    let error = engine().restart(&container.0).await.unwrap_err().to_string();
    let name = &container.0;
    assert_eq!(error, format!("start failed: container {name} ended at once with status 3: it is broken"));
}

#[tokio::test]
#[ignore = "needs a Docker engine: tests/docker.sh"]
async fn a_rebuild_keeps_the_containers_own_configuration() {
    let dockerfile = |version: u32| {
        format!(
            "FROM {BASE}\nENV VERSION={version} FIXED=image\nVOLUME /data\nCOPY . /app\n\
             CMD [\"sh\", \"-c\", \"echo {version} > /version; sleep 100000\"]\n"
        )
    };
    let built = Built::new("keeps", &dockerfile(1));
    let network = format!("lf-{}-net", std::process::id());
    run(&["network", "rm", &network]);
    docker(&["network", "create", "--subnet", "10.213.7.0/24", &network]);
    let options = [
        "-e",
        "OWN=1",
        "-e",
        "FIXED=own",
        "--label",
        "mine=yes",
        "-p",
        "127.0.0.1::8973",
        "--network",
        &network,
        "--ip",
        "10.213.7.9",
        "--network-alias",
        "web",
        "--memory",
        "64m",
        "--init",
    ];
    let container = Container::run("keeps", &options, &built.image, &[]);
    docker(&["network", "connect", "bridge", container.0.as_str()]);
    container.exec("echo kept > /data/file");
    let (id, own) = (container.id(), container.inspect("{{json .HostConfig.PortBindings}}"));

    built.dockerfile(&dockerfile(2));
    std::fs::write(built.path().join("new"), "new").unwrap();
    engine().rebuild(&container.0, built.path(), UserOfRebuild::Images).await.unwrap();

    assert_ne!(container.id(), id);
    assert_eq!(container.exec("cat /version /data/file /app/new"), "2\nkept\nnew");
    assert_eq!(
        container.exec("echo $VERSION $OWN $FIXED $(hostname)"),
        format!("2 1 own {}", &container.id()[..12])
    );
    assert_eq!(
        container.inspect("{{.Config.Image}} {{index .Config.Labels \"mine\"}}"),
        format!("{} yes", own_image(&container.0))
    );
    assert_eq!(container.inspect("{{json .HostConfig.PortBindings}}"), own);
    assert_eq!(
        container.inspect("{{.HostConfig.Memory}} {{.HostConfig.Init}} {{.Config.StopTimeout}}"),
        "67108864 true 1"
    );
    let networks: Value =
        serde_json::from_str(&container.inspect("{{json .NetworkSettings.Networks}}")).unwrap();
    assert_eq!(networks[&network]["IPAddress"], "10.213.7.9");
    assert!(networks[&network]["Aliases"].as_array().unwrap().contains(&json!("web")));
    assert!(networks["bridge"]["IPAddress"].as_str().is_some_and(|address| !address.is_empty()));
    assert!(!run(&["inspect", &format!("{}.landfall-old", container.0)]).status.success());
    drop(container);
    docker(&["network", "rm", &network]);
}

#[tokio::test]
#[ignore = "needs a Docker engine: tests/docker.sh"]
async fn a_failed_build_changes_nothing() {
    let built = Built::new("fails", &format!("FROM {BASE}\nCMD [\"sleep\", \"100000\"]\n"));
    let container = Container::run("fails", &[], &built.image, &[]);
    let (id, pid) = (container.id(), container.inspect("{{.State.Pid}}"));
    for (dockerfile, expected) in [
        (format!("FROM {BASE}\nRUN [\"sh\", \"-c\", \"echo the reason; exit 7\"]\n"), "the reason"),
        ("FROM nothing at all\n".to_owned(), "the image cannot be built"),
    ] {
        built.dockerfile(&dockerfile);
        let error = engine()
            .rebuild(&container.0, built.path(), UserOfRebuild::Images)
            .await
            .unwrap_err()
            .to_string();
        assert!(error.starts_with("start failed: ") && error.contains(expected), "{error}");
        assert_eq!((container.id(), container.inspect("{{.State.Pid}}")), (id.clone(), pid.clone()));
    }
    std::fs::remove_file(built.path().join("Dockerfile")).unwrap();
    let error =
        engine().rebuild(&container.0, built.path(), UserOfRebuild::Images).await.unwrap_err().to_string();
    assert!(error.contains("there is no Dockerfile in"), "{error}");
}

#[tokio::test]
#[ignore = "needs a Docker engine: tests/docker.sh"]
async fn a_new_container_that_does_not_start_is_replaced_by_the_old_one() {
    let built = Built::new("back", &format!("FROM {BASE}\nCMD [\"sleep\", \"100000\"]\n"));
    let container = Container::run("back", &["-p", "127.0.0.1::8973"], &built.image, &[]);
    let (id, image) = (container.id(), container.inspect("{{.Image}}"));
    container.exec("touch /own-layer");
    built.dockerfile(&format!("FROM {BASE}\nCMD [\"sh\", \"-c\", \"echo bad version; exit 1\"]\n"));
    let error =
        engine().rebuild(&container.0, built.path(), UserOfRebuild::Images).await.unwrap_err().to_string();
    let name = &container.0;
    assert_eq!(error, format!("start failed: container {name} ended at once with status 1: bad version"));
    assert_eq!((container.id(), container.inspect("{{.State.Running}}").as_str()), (id, "true"));
    container.exec("test -e /own-layer");
    assert_eq!(docker(&["inspect", "-f", "{{.Id}}", &built.image]), image);
    assert!(
        !run(&["image", "inspect", &own_image(name)]).status.success(),
        "an image of a failed rebuild remains"
    );
    assert!(!run(&["inspect", &format!("{name}.landfall-old")]).status.success());
}

#[tokio::test]
#[ignore = "needs a Docker engine: tests/docker.sh"]
async fn a_container_left_aside_is_alive_and_restored_by_the_next_restart() {
    let container = Container::sleeping("left", &[]);
    let (id, aside) = (container.id(), format!("{}.landfall-old", container.0));
    docker(&["rename", container.0.as_str(), &aside]);
    docker(&["create", "--name", container.0.as_str(), BASE, "false"]);
    let engine = engine();
    assert_eq!(engine.probe(&container.0).await, Liveness::Alive);
    docker(&["rm", container.0.as_str()]);
    assert_eq!(engine.probe(&container.0).await, Liveness::Alive);
    engine.restart(&container.0).await.unwrap();
    assert_eq!(container.id(), id);
}

/// Compares the files of a build with those that Docker's own client selects.
#[tokio::test]
#[ignore = "needs a Docker engine: tests/docker.sh"]
async fn the_files_of_a_build_are_those_of_dockers_own_client() {
    let ignores = [
        "*/temp*\n",
        "**/*.go\n!keep/**\n",
        "a\n!a/b\na/b/c*\n",
        "**\n!Dockerfile\n!x?y\n",
        "/a/\n./b.txt\n*.md\n!R*.md\n",
        "[a-m]*\n!b[^x]*\n",
        "\\*star\na/**/c.txt\n",
        ".*\nDockerfile\n#a\n",
        "a/*\n!a/b\n",
        "**/b*\n!a/b/c.txt\n",
        "*\n!a\n",
    ];
    let built = Built::new("same", &format!("FROM {BASE}\nCMD [\"sleep\", \"100000\"]\n"));
    let container = Container::run("same", &[], &built.image, &[]);
    for name in [
        "a/b/c.txt",
        "a/temp/x",
        "b.txt",
        "keep/x.go",
        "x.go",
        "x1y",
        "README.md",
        "a.md",
        "*star",
        "#a",
        ".env",
    ] {
        let path = built.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, name).unwrap();
    }
    std::os::unix::fs::symlink("b.txt", built.path().join("link")).unwrap();
    built.dockerfile(&format!("FROM {BASE}\nCOPY . /app\nCMD [\"sleep\", \"100000\"]\n"));
    let (mut all, mut different) = (0, 0);
    for ignore in std::iter::once("").chain(ignores) {
        std::fs::write(built.path().join(".dockerignore"), ignore).unwrap();
        let theirs = format!("lf-{}-theirs", std::process::id());
        docker(&["build", "-q", "-t", &theirs, built.path().to_str().unwrap()]);
        let list = "cd /app && find . | sort";
        let expected = docker(&["run", "--rm", &theirs, "sh", "-c", list]);
        run(&["rmi", "-f", &theirs]);
        engine().rebuild(&container.0, built.path(), UserOfRebuild::Images).await.unwrap();
        assert_eq!(container.exec(list), expected, "{ignore:?}");
        let count = expected.lines().count();
        all = all.max(count);
        different += usize::from(count < all);
    }
    assert_eq!(different, ignores.len(), "each pattern excludes a file");
}

/// A proxy socket in front of the engine's, which is closed when it is dropped.
struct EngineProxy(tokio::task::JoinSet<()>);

impl EngineProxy {
    fn open(at: &Path) -> EngineProxy {
        let _ = std::fs::remove_file(at);
        let listener = UnixListener::bind(at).unwrap();
        let socket = host().strip_prefix("unix://").unwrap().to_owned();
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let (mut ours, _) = listener.accept().await.unwrap();
                let mut theirs = UnixStream::connect(&socket).await.unwrap();
                connections.spawn(async move {
                    let _ = tokio::io::copy_bidirectional(&mut ours, &mut theirs).await;
                });
            }
        });
        EngineProxy(tasks)
    }
}

#[tokio::test]
#[ignore = "needs a Docker engine: tests/docker.sh"]
async fn life_events_are_reported_and_survive_outages() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("docker.sock");
    let engine = Docker::at(Some(format!("unix://{}", socket.display())));
    let mut proxy = EngineProxy::open(&socket);
    let mut life = engine.life_events();
    assert_eq!(tokio::time::timeout(LONG, life.recv()).await.unwrap(), Some(LifeEvent::Resync));
    let container = Container::sleeping("life", &[]);
    let mut until = async |wanted: LifeEvent| {
        tokio::time::timeout(LONG, async { while life.recv().await.unwrap() != wanted {} }).await.unwrap();
    };
    let id = container.inspect("{{.Id}}");
    let changed = |what: &str| LifeEvent::Changed {
        id: id.clone(),
        name: container.0.to_string(),
        what: what.to_owned(),
    };
    until(changed("start")).await;
    docker(&["kill", container.0.as_str()]);
    until(changed("die")).await;

    proxy.0.shutdown().await;
    assert_eq!(engine.probe(&container.0).await, Liveness::Unknown);
    docker(&["start", container.0.as_str()]);
    let _proxy = EngineProxy::open(&socket);
    until(LifeEvent::Resync).await;
    assert_eq!(engine.probe(&container.0).await, Liveness::Alive);
    docker(&["rm", "-f", container.0.as_str()]);
    until(changed("destroy")).await;
}

#[tokio::test]
#[ignore = "needs a Docker engine: tests/docker.sh"]
async fn a_hanging_engine_is_unknown_within_the_time_limit() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("docker.sock");
    // It accepts connections into its backlog and never answers.
    let _listener = UnixListener::bind(&socket).unwrap();
    let engine = Docker::at(Some(format!("unix://{}", socket.display())));
    let name = ContainerName::new("coder").unwrap();
    assert_eq!(tokio::time::timeout(LONG, engine.probe(&name)).await.unwrap(), Liveness::Unknown);
}

#[tokio::test]
#[ignore = "needs a Docker engine: tests/docker.sh"]
async fn bridge_has_a_gateway() {
    let hosts = docker(&["run", "--rm", "--add-host", "the-host:host-gateway", BASE, "cat", "/etc/hosts"]);
    let gateway = hosts.lines().find_map(|line| line.strip_suffix("the-host")).unwrap().trim();
    assert_eq!(engine().bridge_gateway().await, Some(gateway.parse().unwrap()));
}

#[tokio::test]
#[ignore = "needs a Docker engine: tests/docker.sh"]
async fn a_restart_is_reported_from_its_promise_to_its_end() {
    let container = Container::sleeping("reported", &[]);
    let pid = container.inspect("{{.State.Pid}}");
    let journal = Journal::unkept();
    let mut events = journal.listen();
    let home = tempfile::tempdir().unwrap();
    let approvals = Approvals::of(&Home::at(home.path().to_owned()).unwrap());
    let supervisor = Supervisor::new(engine(), GrantTable::default(), journal, approvals);
    let fields = json!({"containerName": container.0.as_str(), "cwd": "/"});
    let registration = Registration::from_fields(fields.as_object().unwrap().clone()).unwrap();
    let registration = Arc::new(registration);
    supervisor.preflight(&registration, Build::No).await.unwrap();
    supervisor.accept(registration, Build::No).unwrap().start();
    supervisor.stop().await;
    let kinds: Vec<Value> = std::iter::from_fn(|| events.try_recv().ok())
        .map(|line| serde_json::from_str::<Value>(&line).unwrap()["kind"].clone())
        .collect();
    assert_eq!(kinds, ["restart-scheduled", "restart-completed"]);
    assert_ne!(container.inspect("{{.State.Pid}}"), pid);
}
