//! The cases of containers whose broker's session announces ports.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use landfall::forwarding::broker_link::Announcement;
use landfall::model::forward_table::{Reachability, RowState};
use landfall::model::registration::{AttachMethod, Registration};
use landfall::registry::store::Registered;
use rustix::net::sockopt::socket_acceptconn;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::cases::{Case, answers, refused};
use crate::namespace::{Client, Namespace, until};
use crate::ports::free_port;
use crate::session::{Session, registration};
use crate::world::{Drive, World, attach_method_of, pid};

pub(crate) const ALL: &[Case] = &[
    ("announced_ports_are_forwarded", announced_ports_are_forwarded),
    ("reserved_port_outlives_sessions_and_engines", reserved_port_outlives_sessions_and_engines),
    (
        "announcements_of_an_entered_container_only_get_results",
        announcements_of_an_entered_container_only_get_results,
    ),
    ("upgraded_engine_dials_over_the_session", upgraded_engine_dials_over_the_session),
    ("agent_directory_is_entered", agent_directory_is_entered),
    (
        "ports_of_a_killed_engine_are_opened_when_they_are_free",
        ports_of_a_killed_engine_are_opened_when_they_are_free,
    ),
];

fn register(world: &World, entries: Vec<Registration>) {
    let entries = entries.into_iter().map(Arc::new).collect();
    world.registered.send_replace(Arc::new(Registered { entries }));
}

fn attach_method(world: &World) -> (Option<String>, Reachability) {
    world.container("a").map(|container| (container.attach_method, container.state)).unwrap()
}

fn announced_ports_are_forwarded() {
    let mut world = World::new();
    world.start();
    let (port, other) = (free_port(), free_port());
    // The broker starts before its registration.
    let session = Session::begin(world.forwarding(), "a");
    session.up(&[port, 8973]);
    register(&world, vec![registration("a", Some(&AttachMethod::Websocket))]);
    answers(port, "a");
    let mut results = [session.result(), session.result()];
    results.sort();
    let mut expected = [(port, Ok(port)), (8973, Err("policy excluded".to_owned()))];
    expected.sort();
    assert_eq!(results, expected);
    assert_eq!(attach_method(&world), (Some("websocket".to_owned()), Reachability::Reached));

    world.lose_engine();
    answers(port, "a");
    session.listening(&[other], &[], false);
    assert_eq!(session.result(), (other, Ok(other)));
    assert_eq!(session.served.load(Ordering::SeqCst), 2, "each engine has its own channels");
    let mut client = Client::connect(other).unwrap();
    assert!(client.works());
    session.listening(&[], &[other], false);
    refused(other);
    assert!(!client.works(), "who is connected is cut off");

    session.down();
    refused(port);
    assert_eq!(attach_method(&world).1, Reachability::Waiting);
    session.up(&[port]);
    assert_eq!(session.result(), (port, Ok(port)));
    answers(port, "a");
    let (done, stopped) = tokio::sync::oneshot::channel();
    session.announce.blocking_send(Announcement::Stop(done)).unwrap();
    world.runtime.block_on(stopped).unwrap();
    refused(port);
    assert!(session.is_silent());
    let reasons = world.wait_for_lines("port-forward-closed", 4);
    assert_eq!(reasons.len(), 4, "{reasons:?}");
    for (line, reason) in
        reasons.iter().zip(["host-error", "container-released", "host-error", "broker-stopped"])
    {
        assert!(line.contains(reason), "{line}");
    }
}

fn reserved_port_outlives_sessions_and_engines() {
    let mut world = World::new();
    world.start();
    register(&world, vec![registration("a", Some(&AttachMethod::Websocket))]);
    let (first, second) = (free_port(), free_port());
    let _taken = std::net::TcpListener::bind(("127.0.0.1", first)).unwrap();
    let session = Session::begin(world.forwarding(), "a");
    session.up(&[]);
    session.reserve(4848, &[first, second]);
    assert_eq!(session.result(), (4848, Ok(second)));
    answers(second, "a");
    let row = world.container("a").unwrap().forwards.remove(0);
    assert_eq!((row.port, row.host_port, row.state), (4848, second, RowState::Open));
    assert_eq!(world.forwarding().forwarded_ports("a"), [second]);
    session.down();
    until("a client is closed", || {
        assert!(std::net::TcpStream::connect(("127.0.0.1", second)).is_ok(), "it still listens");
        Client::connect(second).is_none().then_some(())
    });
    session.up(&[]);
    session.reserve(4848, &[first]);
    assert_eq!(session.result(), (4848, Ok(second)));
    world.lose_engine();
    answers(second, "a");
    assert!(session.is_silent(), "nobody is answered twice");
    drop(session);
    refused(second);
    let closed = until("the end is recorded", || {
        world.log("port-forward-closed").pop().filter(|line| line.contains("broker-stopped"))
    });
    assert!(closed.contains("4848"), "{closed}");
    assert!(closed.contains(&second.to_string()), "{closed}");
}

fn announcements_of_an_entered_container_only_get_results() {
    let mut world = World::new();
    let mut namespace = Namespace::new("inside");
    world.start();
    let session = Session::begin(world.forwarding(), "a");
    register(&world, vec![registration("a", Some(&attach_method_of(&namespace)))]);
    until("it is entered", || (world.container("a")?.state == Reachability::Reached).then_some(()));
    let (port, reserved, ghost) = (free_port(), free_port(), free_port());
    session.up(&[]);
    session.listening(&[port, ghost], &[], false);
    namespace.listen(port);
    assert_eq!(session.result(), (port, Ok(port)));
    answers(port, "inside");
    let (port_of_result, result) = session.result();
    assert!(port_of_result == ghost && result.unwrap_err().contains("ECONNREFUSED"));
    session.reserve(port, &[reserved]);
    assert_eq!(session.result(), (port, Ok(reserved)));
    answers(reserved, "inside");
    refused(port);
    assert_eq!(session.served.load(Ordering::SeqCst), 0, "nothing is dialled for it");
    drop(session);
    refused(reserved);
    answers(port, "inside");
}

fn upgraded_engine_dials_over_the_session() {
    let mut world = World::new();
    let mut namespace = Namespace::new("b");
    let (port, direct) = (free_port(), free_port());
    namespace.listen(direct);
    let mut drive = Drive::start(&world.home, "another", "b", &namespace, direct);
    drive.kill();
    register(
        &world,
        vec![
            registration("a", Some(&AttachMethod::Websocket)),
            crate::world::registration("b", &attach_method_of(&namespace)),
        ],
    );
    world.start();
    let session = Session::begin(world.forwarding(), "a");
    session.up(&[port]);
    let ours = landfall::version::current();
    until("ours has relieved it", || (world.table().engine?.version == ours).then_some(()));
    answers(port, "a");
    answers(direct, "b");
    assert_eq!(session.result(), (port, Ok(port)));
    assert!(session.is_silent());
    assert_eq!(world.log("port-forward-closed"), [""; 0]);
}

fn agent_directory_is_entered() {
    let mut world = World::new();
    let folder = tempfile::tempdir().unwrap();
    let directory = folder.path().join("shared");
    let attach_method = AttachMethod::Agent { directory: directory.clone() };
    world.start();
    register(&world, vec![crate::world::registration("a", &attach_method)]);
    let state = |wanted: &str| {
        until(wanted, || {
            let container = world.container("a")?;
            container.reason.filter(|reason| reason.contains(wanted))
        })
    };
    state("there is no directory");
    // The daemon refuses an agent directory that other users can enter.
    std::fs::DirBuilder::new().mode(0o700).create(&directory).unwrap();
    state("agent.sock");
    assert_eq!(world.container("a").unwrap().attach_method, Some(attach_method.to_string()));
}

/// On a busy machine the kernel releases the ports milliseconds after the engine has ended; here this test holds them.
fn ports_of_a_killed_engine_are_opened_when_they_are_free() {
    let mut world = World::new();
    world.start();
    let port = free_port();
    let session = Session::begin(world.forwarding(), "a");
    session.up(&[port]);
    register(&world, vec![registration("a", Some(&AttachMethod::Websocket))]);
    answers(port, "a");
    let engine = until("the engine runs", || world.engine());
    let held = listeners_of(engine, port);
    assert!(!held.is_empty(), "the engine listens on {port}");
    world.kill_engine(engine);
    world.wait_for_lines("engine-lost", 1);
    // Long enough for another engine to start and to fail.
    std::thread::sleep(Duration::from_millis(300));
    drop(held);
    answers(port, "a");
    assert_eq!(world.log("port-forward-failed"), [""; 0]);
}

/// Copies of a process's sockets that listen on a port.
fn listeners_of(process: u32, port: u16) -> Vec<OwnedFd> {
    let pidfd = pidfd_open(pid(process), PidfdFlags::empty()).unwrap();
    let numbers = std::fs::read_dir(format!("/proc/{process}/fd")).unwrap();
    let numbers = numbers.map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap());
    let copies = numbers.filter_map(|number| pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty()).ok());
    let listens = |copy: &OwnedFd| {
        let address = rustix::net::getsockname(copy).and_then(SocketAddr::try_from);
        address.is_ok_and(|address| address.port() == port) && socket_acceptconn(copy).unwrap()
    };
    copies.filter(listens).collect()
}
