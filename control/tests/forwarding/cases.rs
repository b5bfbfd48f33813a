//! The cases of containers that are entered.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use landfall::model::forward_table::{Reachability, RowState};
use landfall::model::registration::AttachMethod;

use crate::namespace::{Client, Namespace, ask, until};
use crate::ports::free_port;
use crate::world::{Drive, World, attach_method_of};

pub(crate) type Case = (&'static str, fn());

pub(crate) const ALL: &[Case] = &[
    ("no_engine_is_started_without_registrations", no_engine_is_started_without_registrations),
    ("first_of_two_namespaces_keeps_the_port", first_of_two_namespaces_keeps_the_port),
    ("killed_engine_is_restarted", killed_engine_is_restarted),
    ("c19_restarted_driver_makes_no_duplicate", restarted_driver_makes_no_duplicate),
    ("c20_engine_of_another_version_is_replaced", engine_of_another_version_is_replaced),
    ("c18_ended_process_is_deregistered", ended_process_is_deregistered),
    ("deregistered_namespace_is_closed", deregistered_namespace_is_closed),
    ("file_of_another_namespace_is_entered_again", file_of_another_namespace_is_entered_again),
    ("c17_namespace_is_forwarded_once", namespace_is_forwarded_once),
    ("stopped_engine_closes_its_ports", stopped_engine_closes_its_ports),
];

pub(crate) fn answers(port: u16, name: &str) {
    until(&format!("{name} answers on {port}"), || (ask(port)? == name).then_some(()));
}

pub(crate) fn refused(port: u16) {
    until(&format!("{port} is refused"), || {
        std::net::TcpStream::connect(("127.0.0.1", port)).is_err().then_some(())
    });
}

/// A world without a driver, and a namespace with a server.
fn listening() -> (World, Namespace, u16) {
    let mut namespace = Namespace::new("a");
    let port = free_port();
    namespace.listen(port);
    (World::new(), namespace, port)
}

/// The same with a driver, and the server is open on the host.
fn forwarded() -> (World, Namespace, u16) {
    let (mut world, namespace, port) = listening();
    world.start();
    world.register(&[("a", &attach_method_of(&namespace))]);
    answers(port, "a");
    // The engine opens the listener before the driver receives its event.
    until("its driver has received the event", || {
        (world.row_state("a", port)? == RowState::Open).then_some(())
    });
    (world, namespace, port)
}

fn no_engine_is_started_without_registrations() {
    let mut world = World::new();
    world.start();
    assert_eq!(world.engine(), None);
    let namespace = Namespace::new("a");
    world.register(&[("a", &attach_method_of(&namespace))]);
    until("an engine runs", || world.engine());
}

fn first_of_two_namespaces_keeps_the_port() {
    let mut world = World::new();
    let (mut one, mut two) = (Namespace::new("one"), Namespace::new("two"));
    world.start();
    world.register(&[("one", &attach_method_of(&one)), ("two", &attach_method_of(&two))]);
    let port = free_port();
    two.listen(port);
    answers(port, "two");
    one.listen(port);
    until("the failure is recorded", || (world.row_state("one", port)? == RowState::Failed).then_some(()));
    let [line] = <[String; 1]>::try_from(world.wait_for_lines("port-forward-failed", 1)).unwrap();
    assert!(line.contains("EADDRINUSE") && line.contains("\\\"two\\\""), "{line}");
    let row = world.container("two").unwrap().forwards.into_iter().find(|row| row.port == port).unwrap();
    assert_eq!((row.state, row.accepted > 0), (RowState::Open, true));
    let owner = until("its owner is found", || {
        world.container("two")?.forwards.into_iter().find(|row| row.port == port)?.pid
    });
    assert_eq!(owner, two.pid().get());
    assert_eq!(world.forwarding().forwarded_ports("two"), [port]);
    two.close(port);
    answers(port, "one");
    let closed = world.wait_for_lines("port-forward-closed", 1).remove(0);
    assert!(closed.contains("container-released"), "{closed}");
}

fn killed_engine_is_restarted() {
    let (world, _namespace, port) = forwarded();
    for _ in 0..2 {
        world.lose_engine();
        answers(port, "a");
    }
    assert_eq!(world.wait_for_lines("engine-lost", 2).len(), 2);
    assert!(world.wait_for_lines("port-forward-closed", 1)[0].contains("host-error"));
}

/// Connects continuously until it is dropped; counts refused and reset connections.
struct Flood {
    stop: Arc<AtomicBool>,
    connects: Arc<AtomicUsize>,
    failures: Arc<AtomicUsize>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Flood {
    fn start(port: u16) -> Flood {
        let (stop, connects, failures) =
            (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
        let mine = (Arc::clone(&stop), Arc::clone(&connects), Arc::clone(&failures));
        let thread = std::thread::spawn(move || {
            let (stop, connects, failures) = mine;
            while !stop.load(Ordering::Relaxed) {
                connects.fetch_add(1, Ordering::Relaxed);
                if ask(port).is_none() {
                    failures.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        Flood { stop, connects, failures, thread: Some(thread) }
    }

    /// Waits for `count` further connects.
    fn more(&self, count: usize) {
        let begin = self.connects.load(Ordering::Relaxed);
        until("connects", || (self.connects.load(Ordering::Relaxed) >= begin + count).then_some(()));
    }

    fn stop(&mut self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
        self.failures.load(Ordering::Relaxed)
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.stop();
    }
}

fn restarted_driver_makes_no_duplicate() {
    let (mut world, mut namespace, port) = listening();
    let version = landfall::version::current();
    let mut drive = Drive::start(&world.home, &version, "a", &namespace, port);
    let mut client = Client::connect(port).unwrap();
    let mut flood = Flood::start(port);
    flood.more(20);
    drive.kill();
    world.register(&[("a", &attach_method_of(&namespace))]);
    for _ in 0..3 {
        world.start();
        until("it is open", || (world.row_state("a", port)? == RowState::Open).then_some(()));
        flood.more(20);
        world.detach();
        flood.more(5);
    }
    assert_eq!(flood.stop(), 0);
    assert!(client.works());
    world.start();
    until("it is open", || (world.row_state("a", port)? == RowState::Open).then_some(()));
    assert_eq!(world.container("a").unwrap().forwards.len(), 1);
    let attached = world.wait_for_lines("engine-attached", 4);
    assert_eq!(attached.iter().filter(|line| line.contains("\"started\":true")).count(), 1, "{attached:?}");
    assert_eq!(world.log("port-forward-closed"), [""; 0]);
    assert_eq!(world.wait_for_lines("port-forward-opened", 1).len(), 1);
    namespace.close(port);
    refused(port);
}

fn engine_of_another_version_is_replaced() {
    let (mut world, namespace, port) = listening();
    world.register(&[("a", &attach_method_of(&namespace))]);
    let mut flood: Option<Flood> = None;
    for round in 0..3 {
        // The engine of the previous round has this version; a driver of an older version replaces it in turn.
        let mut drive = Drive::start(&world.home, &format!("{round}{round}"), "a", &namespace, port);
        let flood = flood.get_or_insert_with(|| Flood::start(port));
        flood.more(20);
        drive.kill();
        let mut client = Client::connect(port).unwrap();
        world.start();
        let ours = landfall::version::current();
        until("this version has replaced it", || {
            let engine = world.table().engine?;
            (engine.version == ours && engine.draining == 1).then_some(())
        });
        flood.more(20);
        assert!(client.works(), "what the older engine relays goes on");
        until("it is open", || (world.row_state("a", port)? == RowState::Open).then_some(()));
        drop(client);
        until("the older one has ended", || (world.table().engine?.draining == 0).then_some(()));
        flood.more(20);
        world.detach();
    }
    let mut flood = flood.unwrap();
    assert_eq!(flood.stop(), 0);
    world.wait_for_lines("engine-upgraded", 3);
    assert_eq!(world.log("port-forward-closed"), [""; 0]);
    let names = std::fs::read_dir(world.home.run()).unwrap().map(|entry| entry.unwrap().file_name());
    let engines = names.filter(|name| name.to_string_lossy().starts_with("engine."));
    assert_eq!(engines.collect::<Vec<_>>(), ["engine.sock"], "names of the upgrade are left");
}

fn ended_process_is_deregistered() {
    let (world, mut namespace, port) = forwarded();
    let mut ended = world.forwarding().ended();
    namespace.kill();
    let begin = Instant::now();
    refused(port);
    assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
    let name = world.runtime.block_on(ended.recv()).unwrap();
    assert_eq!(name.as_str(), "a");
}

fn deregistered_namespace_is_closed() {
    let mut world = World::new();
    let (mut one, mut two) = (Namespace::new("one"), Namespace::new("two"));
    let (first, second) = (free_port(), free_port());
    one.listen(first);
    two.listen(second);
    world.start();
    world.register(&[("one", &attach_method_of(&one)), ("two", &attach_method_of(&two))]);
    answers(first, "one");
    answers(second, "two");
    // The listener is open before the driver receives the engine's event.
    world.wait_for_lines("port-forward-opened", 2);
    world.register(&[("one", &attach_method_of(&one))]);
    refused(second);
    let closed = world.wait_for_lines("port-forward-closed", 1).remove(0);
    assert!(closed.contains("deregistered"), "{closed}");
    // Also without a driver.
    world.detach();
    assert_eq!(ask(first).as_deref(), Some("one"));
    world.register(&[]);
    world.start();
    refused(first);
}

fn file_of_another_namespace_is_entered_again() {
    let mut world = World::new();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ns");
    std::fs::write(&path, "").unwrap();
    let run = |program: &str, arguments: &[&str]| {
        assert!(Command::new(program).args(arguments).status().unwrap().success());
    };
    let text = path.to_str().unwrap();
    run("unshare", &[&format!("--net={text}"), "true"]);
    let mut first = Namespace::at(&path, "first");
    let port = free_port();
    first.listen(port);
    world.start();
    world.register(&[("a", &AttachMethod::Netns { path: path.clone() })]);
    answers(port, "first");
    run("umount", &[text]);
    refused(port);
    run("unshare", &[&format!("--net={text}"), "true"]);
    let mut second = Namespace::at(&path, "second");
    second.listen(port);
    answers(port, "second");
    run("umount", &[text]);
    std::fs::remove_file(&path).unwrap();
    refused(port);
    until("it is gone", || (world.container("a")?.state == Reachability::Waiting).then_some(()));
}

fn namespace_is_forwarded_once() {
    let (world, namespace, _port) = forwarded();
    let own = AttachMethod::Process { pid: std::process::id().try_into().unwrap(), started: None };
    world.register(&[
        ("a", &attach_method_of(&namespace)),
        ("b", &attach_method_of(&namespace)),
        ("host", &own),
    ]);
    for (name, why) in [("b", "container \"a\""), ("host", "daemon's own network")] {
        let reason = until("it is refused", || world.container(name)?.reason);
        assert!(reason.contains(why), "{reason}");
        assert_eq!(world.container(name).unwrap().state, Reachability::Unreachable);
    }
}

fn stopped_engine_closes_its_ports() {
    let (world, _namespace, port) = forwarded();
    world.runtime.block_on(world.forwarding().stop_engine());
    refused(port);
    assert!(world.wait_for_lines("port-forward-closed", 1)[0].contains("broker-stopped"));
    assert!(!world.home.engine_socket().exists());
}
