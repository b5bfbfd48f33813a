use std::os::fd::BorrowedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::sync::mpsc::{Sender, channel, sync_channel};
use std::thread::JoinHandle;

use tempfile::TempDir;

use super::*;
use crate::command::{ForwardId, Reach, RingKind, RingReport, UpstreamId, UpstreamState};
use crate::limits::MESSAGE_BYTES_MAX;

/// Shorter than the driver's send timeout, so that no test passes because that one expires.
const TIMEOUT: Duration = Duration::from_secs(5);
const _: () = assert!(TIMEOUT.as_secs() < SEND_TIMEOUT.as_secs());

/// An engine that answers by a script, and reports its commands to the test.
struct Script {
    events: Sender<EventMessage>,
    applied: Sender<(Command, usize)>,
}

impl Drive for Script {
    fn apply(&self, command: Command, descriptors: Vec<OwnedFd>) {
        let answers = match &command {
            Command::Describe => vec![state()],
            Command::RemoveUpstream { upstream, .. } => {
                vec![Event::UpstreamRemoved { upstream: *upstream, reason: None }]
            }
            Command::Stop => vec![Event::Stopped],
            _ => Vec::new(),
        };
        let _ = self.applied.send((command, descriptors.len()));
        for answer in answers {
            self.events.send(answer.into()).unwrap();
        }
    }
}

fn ready() -> Event {
    let ring = RingReport { kind: RingKind::Epoll, reason: None };
    Event::Ready { ring, shards: 1, ipv6: true, version: "test".to_owned(), lacks: Vec::new() }
}

fn state() -> Event {
    Event::State {
        upstreams: vec![UpstreamState { upstream: UpstreamId(7), netns_cookie: 1 }],
        forwards: Vec::new(),
        more: false,
    }
}

/// A script that is served on threads of its own.
struct Served {
    directory: TempDir,
    events: Sender<EventMessage>,
    applied: Receiver<(Command, usize)>,
    thread: JoinHandle<Result<(), ProcessError>>,
}

impl Served {
    fn new(idle_exit: Duration) -> Served {
        let directory = tempfile::tempdir().unwrap();
        let socket = CommandSocket::bind(&directory.path().join("engine.sock")).unwrap();
        let (events, receiver) = channel();
        let (message, applied) = channel();
        let script = Script { events: events.clone(), applied: message };
        let thread = std::thread::spawn(move || serve(socket, &ready(), &script, receiver, idle_exit));
        Served { directory, events, applied, thread }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("engine.sock")
    }

    /// Connects a driver, which has received `ready`.
    fn driver(&self) -> Channel {
        let driver = Channel::connect(&self.path()).unwrap();
        assert_eq!(event(&driver), ready());
        driver
    }

    fn applied(&self) -> (Command, usize) {
        self.applied.recv_timeout(TIMEOUT).unwrap()
    }
}

#[track_caller]
fn event(driver: &Channel) -> Event {
    driver.recv_timeout::<Event>(TIMEOUT).unwrap().unwrap().0
}

#[track_caller]
fn assert_ended(driver: &Channel) {
    assert!(driver.recv_timeout::<Event>(TIMEOUT).unwrap().is_none());
}

#[test]
fn a_driver_reconnects() {
    let served = Served::new(IDLE_EXIT);
    for _ in 0..3 {
        let driver = served.driver();
        driver.send(&Command::Describe, &[]).unwrap();
        assert_eq!(event(&driver), state());
        assert_eq!(served.applied(), (Command::Describe, 0));
    }
    let driver = served.driver();
    driver.send(&Command::Stop, &[]).unwrap();
    assert_eq!(event(&driver), Event::Stopped);
    assert_ended(&driver);
    served.thread.join().unwrap().unwrap();
    assert_eq!(std::fs::read_dir(served.directory.path()).unwrap().count(), 0);
}

#[test]
fn a_newer_driver_replaces_the_older() {
    let served = Served::new(IDLE_EXIT);
    let older = served.driver();
    let newer = served.driver();
    assert_ended(&older);
    assert!(matches!(older.send(&Command::Rescan, &[]), Err(ChannelError::Gone)));
    newer.send(&Command::Describe, &[]).unwrap();
    assert_eq!(event(&newer), state());
    // The end of the older driver does not remove the newer one.
    drop(older);
    served.events.send(Event::Recovered { what: "all".to_owned() }.into()).unwrap();
    assert_eq!(event(&newer), Event::Recovered { what: "all".to_owned() });
    newer.send(&Command::Stop, &[]).unwrap();
    served.thread.join().unwrap().unwrap();
}

#[test]
fn events_without_a_driver_are_dropped() {
    let served = Served::new(IDLE_EXIT);
    drop(served.driver());
    let driver = served.driver();
    // The newer driver is installed now, so the engine's next event follows the dropped ones.
    driver.send(&Command::Describe, &[]).unwrap();
    assert_eq!(event(&driver), state());
    served.events.send(Event::Stopped.into()).unwrap();
    assert_eq!(event(&driver), Event::Stopped);
    served.thread.join().unwrap().unwrap();
}

/// The answer of an engine to a request to lend.
fn lent() -> [EventMessage; 2] {
    let port = std::num::NonZeroU16::MIN;
    let (forward, upstream, reach) = (ForwardId(1), UpstreamId(7), Reach::UNKNOWN);
    let event = Event::ListenerLent { forward, upstream, host_port: port, target_port: port, reach };
    let descriptors = vec![std::fs::File::open("/dev/null").unwrap().into()];
    [EventMessage { event, descriptors }, Event::ListenersLent { count: 1 }.into()]
}

#[test]
fn descriptors_are_attached_to_an_event() {
    let served = Served::new(IDLE_EXIT);
    let driver = served.driver();
    driver.send(&Command::LendListeners, &[]).unwrap();
    assert_eq!(served.applied(), (Command::LendListeners, 0));
    lent().into_iter().for_each(|message| served.events.send(message).unwrap());
    for count in [1, 0] {
        let (_, descriptors) = driver.recv_timeout::<Event>(TIMEOUT).unwrap().unwrap();
        assert_eq!(descriptors.len(), count);
    }
    driver.send(&Command::Stop, &[]).unwrap();
    served.thread.join().unwrap().unwrap();
}

#[test]
fn a_driver_gets_no_answers_to_its_predecessor() {
    let served = Served::new(IDLE_EXIT);
    let older = served.driver();
    older.send(&Command::LendListeners, &[]).unwrap();
    assert_eq!(served.applied(), (Command::LendListeners, 0));
    let newer = served.driver();
    newer.send(&Command::LendListeners, &[]).unwrap();
    assert_eq!(served.applied(), (Command::LendListeners, 0));
    let recovered = || Event::Recovered { what: "between the answers".to_owned() };
    lent().into_iter().for_each(|message| served.events.send(message).unwrap());
    served.events.send(recovered().into()).unwrap();
    lent().into_iter().for_each(|message| served.events.send(message).unwrap());
    assert_eq!(event(&newer), recovered());
    assert!(matches!(event(&newer), Event::ListenerLent { .. }));
    assert_eq!(event(&newer), Event::ListenersLent { count: 1 });
    newer.send(&Command::Stop, &[]).unwrap();
    assert_eq!(event(&newer), Event::Stopped);
    served.thread.join().unwrap().unwrap();
}

#[test]
fn an_engine_that_drains_without_a_driver_runs_to_its_end() {
    let served = Served::new(Duration::from_millis(20));
    let driver = served.driver();
    driver.send(&Command::Drain, &[]).unwrap();
    assert_eq!(served.applied(), (Command::Drain, 0));
    drop(driver);
    // Many times as long as an idle engine would wait for a driver.
    assert!(served.applied.recv_timeout(Duration::from_millis(500)).is_err(), "one drain is enough");
    assert!(!served.thread.is_finished());
    served.events.send(Event::Stopped.into()).unwrap();
    served.thread.join().unwrap().unwrap();
}

#[test]
fn invalid_messages_are_refused_and_end_no_connection() {
    let served = Served::new(IDLE_EXIT);
    let driver = served.driver();
    let null = std::fs::File::open("/dev/null").unwrap();
    let descriptors: Vec<BorrowedFd<'_>> = vec![null.as_fd(); 50];
    driver.send(&serde_json::json!({"command": "conquer"}), &descriptors).unwrap();
    driver.send(&serde_json::json!([[[[]]]]), &[]).unwrap();
    driver.send(&serde_json::json!({"command": "open-listener", "host_port": 0}), &[]).unwrap();
    for _ in 0..3 {
        assert!(matches!(event(&driver), Event::Refused { .. }));
    }
    let long = vec![b' '; MESSAGE_BYTES_MAX + 1];
    rustix::net::send(driver.as_fd(), &long, rustix::net::SendFlags::NOSIGNAL).unwrap();
    assert!(matches!(event(&driver), Event::Refused { reason } if reason.contains("longer than")));
    driver.send(&Command::Describe, &[]).unwrap();
    assert_eq!(event(&driver), state());
    assert_eq!(served.applied(), (Command::Describe, 0));
    driver.send(&Command::Stop, &[]).unwrap();
    served.thread.join().unwrap().unwrap();
}

#[test]
fn a_command_carries_a_hundred_descriptors() {
    let served = Served::new(IDLE_EXIT);
    let driver = served.driver();
    let null = std::fs::File::open("/dev/null").unwrap();
    driver.send(&Command::Rescan, &vec![null.as_fd(); 100]).unwrap();
    assert_eq!(served.applied(), (Command::Rescan, 100));
    driver.send(&Command::Stop, &[]).unwrap();
    served.thread.join().unwrap().unwrap();
}

#[test]
fn an_engine_without_a_driver_drains_and_releases_its_name() {
    let served = Served::new(Duration::from_millis(20));
    assert_eq!(served.applied(), (Command::Drain, 0));
    assert!(Channel::connect(&served.path()).is_err());
    served.events.send(Event::Stopped.into()).unwrap();
    served.thread.join().unwrap().unwrap();
    assert!(served.applied.try_recv().is_err(), "one drain is enough");
}

#[test]
fn a_connected_driver_prevents_the_idle_exit() {
    let served = Served::new(Duration::from_secs(1));
    let driver = served.driver();
    assert!(served.applied.recv_timeout(Duration::from_millis(1500)).is_err());
    drop(driver);
    assert_eq!(served.applied(), (Command::Drain, 0));
    served.events.send(Event::Stopped.into()).unwrap();
    served.thread.join().unwrap().unwrap();
}

#[test]
fn a_draining_engine_releases_its_name_and_keeps_its_driver() {
    let served = Served::new(IDLE_EXIT);
    let driver = served.driver();
    driver.send(&Command::Drain, &[]).unwrap();
    assert_eq!(served.applied(), (Command::Drain, 0));
    assert!(!served.path().exists());
    let path = served.path();
    let next = CommandSocket::bind(&path).unwrap();
    driver.send(&Command::Stop, &[]).unwrap();
    assert_eq!(event(&driver), Event::Stopped);
    served.thread.join().unwrap().unwrap();
    assert!(path.exists(), "the name of the next engine was removed");
    drop(next);
    assert!(!path.exists());
}

#[test]
fn a_driver_that_does_not_read_does_not_block_its_successor() {
    let slot = DriverSlot::default();
    // Without a buffer, the channel takes an event only after the forwarder has finished the previous one.
    let (events, receiver) = sync_channel(0);
    let offer = |patience| {
        let deadline = Instant::now() + patience;
        let event = Event::Degraded { what: "x".repeat(MESSAGE_BYTES_MAX / 2) };
        while events.try_send(event.clone().into()).is_err() {
            if Instant::now() > deadline {
                return false;
            }
            std::thread::yield_now();
        }
        true
    };
    let ((ours, _deaf), (theirs, successor)) = (Channel::pair().unwrap(), Channel::pair().unwrap());
    slot.install(ours, &ready());
    std::thread::scope(|scope| {
        scope.spawn(|| slot.forward(&{ receiver }).unwrap());
        while offer(Duration::from_millis(200)) {}
        slot.install(theirs, &ready());
        let continued = offer(TIMEOUT);
        assert_eq!(event(&successor), ready());
        events.send(Event::Stopped.into()).unwrap();
        assert!(continued, "the forwarder still waits for the previous driver");
    });
}

#[test]
fn a_too_long_event_is_reported_as_lost_and_ready_is_sent_once() {
    let served = Served::new(IDLE_EXIT);
    let driver = served.driver();
    served.events.send(ready().into()).unwrap();
    served.events.send(Event::Degraded { what: "x".repeat(MESSAGE_BYTES_MAX) }.into()).unwrap();
    assert!(matches!(event(&driver), Event::Refused { reason } if reason.contains("too long")));
    driver.send(&Command::Stop, &[]).unwrap();
    served.thread.join().unwrap().unwrap();
}

#[test]
fn an_engine_that_ends_early_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let socket = CommandSocket::bind(&directory.path().join("engine.sock")).unwrap();
    let (events, receiver) = channel();
    let script = Script { events: channel().0, applied: channel().0 };
    drop(events);
    let ended = serve(socket, &ready(), &script, receiver, IDLE_EXIT);
    assert!(matches!(ended, Err(ProcessError::EngineGone)));
}

#[test]
fn the_socket_is_private_and_replaces_only_sockets() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("engine.sock");
    let first = CommandSocket::bind(&path).unwrap();
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let second = CommandSocket::bind(&path).unwrap();
    drop(first);
    assert!(path.exists(), "the first one removed the name of the second");
    assert_eq!(std::fs::metadata(&path).unwrap().ino(), second.file.1);
    drop(second);
    std::fs::write(&path, "a person's file").unwrap();
    assert!(matches!(CommandSocket::bind(&path), Err(ProcessError::NotASocket { .. })));
    assert_eq!(std::fs::read(&path).unwrap(), b"a person's file");
    let missing = directory.path().join("missing/engine.sock");
    assert!(matches!(CommandSocket::bind(&missing), Err(ProcessError::Bind { .. })));
    let long = directory.path().join("x".repeat(120));
    let error = CommandSocket::bind(&long).unwrap_err();
    assert!(error.to_string().contains(&long.display().to_string()), "{error}");
}
