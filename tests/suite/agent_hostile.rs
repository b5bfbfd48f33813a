//! Claim 25: an agent is not trusted. An invalid one is reported and its upstream is removed, without an effect on other
//! forwards.

use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use landfall_engine::RingChoice;
use landfall_engine::channel::Channel;
use landfall_engine::command::{
    Command, Ending, Event, ForwardId, Reach, UpstreamId, UpstreamKind, WatchSources,
};
use landfall_engine::limits::Limits;
use landfall_engine::opener::client::{OpenError, Opener};
use landfall_engine::opener::{AGENT_SOCKET, Answer, FailureKind, Request};
use landfall_tests::case::Case;
use landfall_tests::process::{descriptors, threads};
use landfall_tests::{
    Conversation, Driver, End, Flood, Namespace, Scripted, Server, agent_listener, answer, connect,
    honest_answer, wait_until,
};
use rustix::fs::{CWD, Mode};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use crate::observe::ends_by;

pub(crate) const CASES: &[Case] = &[
    Case::once("c25_a_path_without_an_agent_is_reported", path_without_agent),
    Case::once("c25_an_invalid_answer_of_an_agent_is_reported", invalid_answer),
    Case::once("c25_a_silent_agent_times_out", silent_agent),
    Case::once("c25_descriptors_of_an_agent_are_checked", descriptors_are_checked),
    Case::each_ring("c25_an_agent_that_turns_hostile_is_removed", turns_hostile),
    Case::each_ring("c25_an_agent_that_stops_answering_resets_only_its_own_clients", stops_answering),
    Case::each_ring("c25_a_blocking_socket_stops_no_other_forward", blocking_socket),
    Case::each_ring("c25_a_hostile_agent_reads_only_bytes_of_its_own_container", stolen_bytes),
    Case::each_ring("c25_a_wrong_number_of_channels_is_refused", wrong_channel_count),
    Case::each_ring("c25_an_engine_with_a_hanging_agent_drains", engine_drains),
    Case::each_ring("c25_an_engine_with_a_hanging_agent_stops", engine_stops),
];

/// The container with an honest agent, and its forward.
const GOOD: (UpstreamId, ForwardId, u16) = (UpstreamId(1), ForwardId(1), 3001);
/// The container with the hostile agent.
const BAD: (UpstreamId, ForwardId, u16) = (UpstreamId(2), ForwardId(2), 3002);

#[track_caller]
fn refused(directory: &Path, kind: FailureKind, words: &str) {
    let before = descriptors();
    let begun = Instant::now();
    let error = Opener::connect(directory).expect_err(words);
    // Not because of a timeout, which takes 5 s.
    assert!(begun.elapsed() < Duration::from_secs(4), "{words}: {:?}", begun.elapsed());
    assert_eq!(error.kind(), Some(kind), "{error}");
    assert!(error.to_string().contains(words), "{error}");
    assert_eq!(descriptors(), before, "{words}");
}

fn path_without_agent() {
    let place = || tempfile::tempdir().unwrap();
    let (elsewhere, directory) = (place(), place());
    let real = agent_listener(&elsewhere.path().join(AGENT_SOCKET));
    let socket = |directory: &tempfile::TempDir| directory.path().join(AGENT_SOCKET);
    refused(directory.path(), FailureKind::Gone, "no agent has created its socket there");
    refused(&directory.path().join("missing"), FailureKind::Gone, "there is no such directory");
    std::fs::write(directory.path().join("file"), "").unwrap();
    refused(&directory.path().join("file"), FailureKind::Other, "this is a file and not a directory");

    for target in [socket(&elsewhere), "/nowhere".into(), AGENT_SOCKET.into()] {
        let directory = place();
        std::os::unix::fs::symlink(target, socket(&directory)).unwrap();
        refused(directory.path(), FailureKind::Other, "it is a symbolic link");
    }
    let directory = place();
    rustix::fs::mkfifoat(CWD, socket(&directory), Mode::RUSR | Mode::WUSR).unwrap();
    refused(directory.path(), FailureKind::Other, "it is not a socket");
    let directory = place();
    std::fs::write(socket(&directory), "{}").unwrap();
    refused(directory.path(), FailureKind::Other, "it is not a socket");
    let directory = place();
    std::fs::create_dir(socket(&directory)).unwrap();
    refused(directory.path(), FailureKind::Other, "it is not a socket");
    let directory = place();
    let _stream = UnixListener::bind(socket(&directory)).unwrap();
    refused(directory.path(), FailureKind::Other, "another type than SOCK_SEQPACKET");

    let directory = place();
    drop(agent_listener(&socket(&directory)));
    refused(directory.path(), FailureKind::Gone, "no agent listens on it");
    // The listener never accepts: its backlog is full, and a further connect does not block.
    let waiting: Vec<_> = std::iter::from_fn(|| try_connect(&socket(&elsewhere))).take(100).collect();
    assert!(waiting.len() < 100);
    refused(elsewhere.path(), FailureKind::Exhausted, "the agent accepts no connection");
    drop(real);
}

fn try_connect(path: &Path) -> Option<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    let address = rustix::net::SocketAddrUnix::new(path).unwrap();
    rustix::net::connect(&socket, &address).ok().map(|()| socket)
}

fn send(channel: &Channel, (answer, descriptors): (Answer, Vec<OwnedFd>)) -> bool {
    let descriptors: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
    channel.send(&answer, &descriptors).is_ok()
}

/// Returns the error of adding an upstream whose agent answers like this. Asserts that no descriptor of it is left.
#[track_caller]
fn open_error(script: impl Fn(&Channel, &Request) -> bool + Send + Sync + 'static) -> OpenError {
    let (inside, directory) = (Namespace::new(), tempfile::tempdir().unwrap());
    let agent = Scripted::start(&inside, &directory.path().join(AGENT_SOCKET), script);
    let before = descriptors();
    let error = match Opener::connect(directory.path()) {
        Ok(mut opener) => {
            let error = opener.agent_upstream().expect_err("a hostile agent was accepted");
            drop(opener);
            error
        }
        Err(error) => error,
    };
    // Its own thread closes its side of the connection, as do the threads of its start.
    wait_until("descriptors to be as before", || match descriptors() {
        now if now <= before => Ok(()),
        now => Err((now, before)),
    });
    drop(agent);
    error
}

fn invalid_answer() {
    let error = open_error(|channel, _| channel.send(&"let me think", &[]).is_ok());
    assert!(error.to_string().contains("not a valid message"), "{error}");
    let error = open_error(|_, _| false);
    assert!(error.to_string().contains("ended without an answer"), "{error}");
    let error = open_error(|channel, _| send(channel, (Answer::Channel, Vec::new())));
    assert!(error.to_string().contains("invalid answer"), "{error}");
    let error = open_error(|channel, _| {
        while channel.try_send(&"and another thing".repeat(100), &[]).is_ok() {}
        true
    });
    assert!(error.to_string().contains("not a valid message"), "{error}");
    // It claims the cookie of our namespace, and has a socket of another namespace.
    let own = honest_answer(&Request::Introduce).0;
    let error = open_error(move |channel, request| match request {
        Request::Introduce => send(channel, (own.clone(), Vec::new())),
        other => send(channel, honest_answer(other)),
    });
    assert_eq!(error.kind(), Some(FailureKind::OwnNamespace), "{error}");
    // It claims the cookie of another container.
    let other = Namespace::new().run(|| honest_answer(&Request::Introduce).0);
    let error = open_error(move |channel, request| match request {
        Request::Introduce => send(channel, (other.clone(), Vec::new())),
        other => send(channel, honest_answer(other)),
    });
    assert!(error.to_string().contains("a socket of another network namespace"), "{error}");
}

fn silent_agent() {
    let begun = Instant::now();
    let error = open_error(|_, _| true);
    assert!(error.to_string().contains("did not answer within 5 s"), "{error}");
    assert!(begun.elapsed() >= Duration::from_secs(5), "{:?}", begun.elapsed());
}

/// Descriptors that are not unused TCP sockets of IPv4, with the text that names each in the error.
fn wrong_descriptors() -> Vec<(&'static str, Vec<OwnedFd>)> {
    let tcp = |family| socket_with(family, SocketType::STREAM, SocketFlags::NONBLOCK, None).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    // It is its own peer, so it stays connected without another socket.
    let connected = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
    rustix::net::bind(&connected, &"127.0.0.1:0".parse::<SocketAddr>().unwrap()).unwrap();
    let own = SocketAddr::try_from(rustix::net::getsockname(&connected).unwrap()).unwrap();
    rustix::net::connect(&connected, &own).unwrap();
    rustix::io::ioctl_fionbio(&connected, true).unwrap();
    let bound = tcp(AddressFamily::INET);
    rustix::net::bind(&bound, &"127.0.0.1:0".parse::<SocketAddr>().unwrap()).unwrap();
    let blocking = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
    vec![
        ("a socket that is connected", vec![connected]),
        ("a socket that listens", vec![listener.into()]),
        ("a socket that is bound", vec![bound]),
        ("a socket that blocks", vec![blocking]),
        ("a socket that is no stream", vec![UdpSocket::bind("127.0.0.1:0").unwrap().into()]),
        ("a socket of another address family", vec![UnixStream::pair().unwrap().0.into()]),
        ("a socket of another address family", vec![tcp(AddressFamily::INET6)]),
        ("a descriptor that is no socket", vec![std::fs::File::open("/proc/self/status").unwrap().into()]),
        ("a descriptor that is no socket", vec![std::fs::File::open("/dev/null").unwrap().into()]),
        ("0 descriptors instead of 1", Vec::new()),
        ("2 descriptors instead of 1", vec![tcp(AddressFamily::INET), tcp(AddressFamily::INET)]),
    ]
}

fn descriptors_are_checked() {
    for index in 0..wrong_descriptors().len() {
        let (words, _) = wrong_descriptors().swap_remove(index);
        let error = open_error(move |channel, request| match request {
            Request::Sockets { .. } => {
                let bad = wrong_descriptors().swap_remove(index).1;
                send(channel, (Answer::Made { count: 1, error: None, ephemeral: None }, bad))
            }
            other => send(channel, honest_answer(other)),
        });
        assert!(error.to_string().contains(words), "{words}: {error}");
    }
    // More descriptors than requested, of any kind.
    let tcp = || socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::NONBLOCK, None).unwrap();
    let error = open_error(move |channel, request| match request {
        Request::Sockets { .. } => send(
            channel,
            (Answer::Made { count: 100, error: None, ephemeral: None }, (0..100).map(|_| tcp()).collect()),
        ),
        other => send(channel, honest_answer(other)),
    });
    assert!(error.to_string().contains("100 sockets where 1 were asked for"), "{error}");
    for beside in [false, true] {
        let error = open_error(move |channel, request| {
            let is_it = matches!(request, Request::SockDiag) == beside;
            let (answer, mut descriptors) = honest_answer(request);
            if is_it && matches!(request, Request::Introduce | Request::SockDiag) {
                descriptors.extend((0..3).map(|_| tcp()));
            }
            send(channel, (answer, descriptors))
        });
        assert!(error.to_string().contains("descriptors instead of at most"), "{error}");
    }
    // One of our own sockets, which it received before.
    let host = Arc::new(Mutex::new(Some(honest_answer(&Request::SockDiag).1)));
    let diags: [Arc<dyn Fn() -> Vec<OwnedFd> + Send + Sync>; 4] = [
        Arc::new(|| {
            vec![socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None).unwrap()]
        }),
        Arc::new(|| vec![std::fs::File::open("/proc/self/net/tcp").unwrap().into()]),
        Arc::new(Vec::new),
        Arc::new(move || host.lock().unwrap().take().unwrap_or_default()),
    ];
    for diag in diags {
        let error = open_error(move |channel, request| match request {
            Request::SockDiag => send(channel, (Answer::SockDiag, diag())),
            other => send(channel, honest_answer(other)),
        });
        assert!(error.to_string().contains("not a sock_diag socket of the namespace"), "{error}");
    }
}

/// An engine with an honest container, whose forward is busy, and a container whose agent follows a script after its
/// upstream was added.
struct Two {
    driver: Driver,
    /// Dropped first: asserts that every connection succeeded.
    talk: Conversation,
    flood: Flood,
    bad: Namespace,
    _agent: Scripted,
    _good: Namespace,
    _directory: tempfile::TempDir,
}

impl Two {
    #[track_caller]
    fn start(
        ring: RingChoice,
        limits: Limits,
        script: impl Fn(&Channel, &Request) -> bool + Send + Sync + 'static,
    ) -> Two {
        let mut driver = Driver::start(limits, ring);
        let (good, bad, directory) = (Namespace::new(), Namespace::new(), tempfile::tempdir().unwrap());
        driver.add_upstream(GOOD.0, &good, None);
        driver.open(GOOD.1, GOOD.0, (GOOD.2, 3000), Reach { v4: true, v6: false }).unwrap();
        driver.open(ForwardId(3), GOOD.0, (3003, 3003), Reach { v4: true, v6: false }).unwrap();
        Server::listen(&good, "127.0.0.1:3000").serve(answer);
        let partner = Server::listen(&good, "127.0.0.1:3003");
        let talk = Conversation::start(3003, &partner, 7);
        let flood = Flood::start(GOOD.2, 2);
        // Honest until the engine has added it.
        let agent = Scripted::start(&bad, &directory.path().join(AGENT_SOCKET), script);
        let mut opener = Opener::connect(directory.path()).unwrap();
        let (sources, descriptors) = opener.agent_upstream().unwrap();
        let entered = (opener.netns_cookie(), sources, descriptors);
        drop(opener);
        driver.add_entered(BAD.0, UpstreamKind::Agent, entered);
        Two { driver, talk, flood, bad, _agent: agent, _good: good, _directory: directory }
    }

    /// Asserts that the other container's connections continue and new ones succeed.
    #[track_caller]
    fn assert_others_continue(&mut self) {
        self.talk.wait_for_progress();
        self.flood.wait_for_progress(20);
    }

    #[track_caller]
    fn removed(&mut self) -> Option<String> {
        self.driver.expect("the hostile upstream to be removed", |event| match event {
            Event::UpstreamRemoved { upstream, reason } if *upstream == BAD.0 => Some(reason.clone()),
            _ => None,
        })
    }

    /// Asserts that every connection of the other container succeeded.
    #[track_caller]
    fn end(self) {
        assert!(self.talk.end() > 0);
        assert!(self.flood.end() > 0);
    }
}

/// Answers the first request for sockets, which is the proof, honestly; `rest` answers all later requests.
fn after_the_proof(
    rest: impl Fn(&Channel, &Request) -> bool + Send + Sync + 'static,
) -> impl Fn(&Channel, &Request) -> bool + Send + Sync + 'static {
    move |channel, request| match request {
        Request::Sockets { count: 1, .. } | Request::Introduce | Request::SockDiag => {
            send(channel, honest_answer(request))
        }
        other => rest(channel, other),
    }
}

type AgentScript = Arc<dyn Fn(&Channel, &Request) -> bool + Send + Sync>;

fn turns_hostile(ring: RingChoice) {
    let mut scripts: Vec<(&str, AgentScript)> = vec![
        ("has ended", Arc::new(|_, _| false)),
        ("not a valid message", Arc::new(|channel, _| channel.send(&"no", &[]).is_ok())),
        (
            "not a valid message",
            Arc::new(|channel, _| {
                while channel.send(&"no".repeat(1000), &[]).is_ok() {}
                false
            }),
        ),
        (
            "where sockets were asked for",
            Arc::new(|channel, _| send(channel, honest_answer(&Request::SockDiag))),
        ),
    ];
    for index in [0, 1, 4, 5, 7] {
        scripts.push((
            "does not fit the request",
            Arc::new(move |channel, _| {
                let bad = wrong_descriptors().swap_remove(index).1;
                send(channel, (Answer::Made { count: 1, error: None, ephemeral: None }, bad))
            }),
        ));
    }
    for (words, script) in scripts {
        let mut two = Two::start(
            ring,
            Limits::default(),
            after_the_proof(move |channel, request| script(channel, request)),
        );
        let reason = two.removed().expect("removed without a request");
        assert!(reason.contains(words), "{words}: {reason}");
        two.assert_others_continue();
        // The engine reports it once, and its id is free.
        two.driver.apply(Command::RemoveUpstream { upstream: BAD.0, ending: Ending::Reset });
        assert_eq!(two.removed(), None);
        two.end();
    }
}

fn stops_answering(ring: RingChoice) {
    let limits = Limits { connect_timeout: Duration::from_millis(300), ..Limits::default() };
    let mut two = Two::start(ring, limits, after_the_proof(|_, _| true));
    two.driver.open(BAD.1, BAD.0, (BAD.2, 3000), Reach::UNKNOWN).unwrap();
    for _ in 0..3 {
        assert_eq!(ends_by(&connect(([127, 0, 0, 1], BAD.2))), End::Reset);
    }
    two.assert_others_continue();
    two.driver.remove_upstream(BAD.0, Ending::Drain);
    two.end();
}

/// An agent that keeps a duplicate of each socket and makes them blocking on request.
struct Thief {
    kept: Arc<Mutex<Vec<OwnedFd>>>,
}

impl Thief {
    fn new() -> (Thief, impl Fn(&Channel, &Request) -> bool + Send + Sync + 'static) {
        let kept = Arc::new(Mutex::new(Vec::new()));
        let keeps = kept.clone();
        let script = after_the_proof(move |channel, request| {
            let (answer, sockets) = honest_answer(request);
            keeps.lock().unwrap().extend(sockets.iter().map(|socket| socket.try_clone().unwrap()));
            send(channel, (answer, sockets))
        });
        (Thief { kept }, script)
    }

    fn make_them_block(&self) {
        for socket in self.kept.lock().unwrap().iter() {
            rustix::io::ioctl_fionbio(socket, false).unwrap();
        }
    }
}

/// Makes a server whose backlog is full: a connect to it gets no answer.
fn server_that_does_not_answer(inside: &Namespace) -> (Server, Vec<TcpStream>) {
    let address = ([127, 0, 0, 1], 3000).into();
    let server = Server::listen_backlog(inside, address, 0, None);
    let filling = inside.run(|| {
        let try_connect = || TcpStream::connect_timeout(&address, Duration::from_millis(200)).ok();
        std::iter::from_fn(try_connect).collect()
    });
    (server, filling)
}

/// Makes the shard of the hostile container block in a connect that does not return.
#[track_caller]
fn hang(two: &mut Two, thief: &Thief) -> (Server, Vec<TcpStream>, TcpStream) {
    let (server, filling) = server_that_does_not_answer(&two.bad);
    two.driver.open(BAD.1, BAD.0, (BAD.2, 3000), Reach { v4: true, v6: false }).unwrap();
    // The stock is complete; otherwise a socket would be checked after it became blocking.
    wait_until("both stocks", || match thief.kept.lock().unwrap().len() {
        8.. => Ok(()),
        few => Err(few),
    });
    two.driver.describe();
    thief.make_them_block();
    let client = connect(([127, 0, 0, 1], BAD.2));
    wait_until("the shard to hang", || {
        let stacks = std::fs::read_dir("/proc/self/task").unwrap();
        let waits = |task: std::path::PathBuf| {
            std::fs::read_to_string(task.join("wchan"))
                .is_ok_and(|place| place.contains("inet_") || place.contains("wait_woken"))
                && std::fs::read_to_string(task.join("comm"))
                    .is_ok_and(|name| name.starts_with("landfall-shard"))
        };
        if stacks.map(|task| task.unwrap().path()).any(waits) { Ok(()) } else { Err("it does not") }
    });
    (server, filling, client)
}

fn blocking_socket(ring: RingChoice) {
    let before = threads();
    let (thief, script) = Thief::new();
    let mut two = Two::start(ring, Limits::default(), script);
    let (server, filling, client) = hang(&mut two, &thief);
    two.assert_others_continue();
    // The engine answers a query of all shards without the hung shard, and includes its forward.
    let state = two.driver.describe();
    let bad = state.iter().find(|state| state.forward == BAD.1).expect("its forward");
    assert!(bad.listening && bad.host_port.get() == BAD.2);
    // Its port is free for another forward.
    two.driver.remove_upstream(BAD.0, Ending::Drain);
    let after = TcpStream::connect(("127.0.0.1", BAD.2)).expect_err("the port is closed");
    assert_eq!(after.kind(), std::io::ErrorKind::ConnectionRefused);
    two.driver.open(ForwardId(4), GOOD.0, (BAD.2, 3000), Reach { v4: true, v6: false }).unwrap();
    landfall_tests::visit(BAD.2, 2).unwrap();
    two.assert_others_continue();
    assert_eq!(two.driver.describe().len(), 3);
    // Without the container's end the thread has no descriptor left to wait for.
    drop((server, filling));
    thief.kept.lock().unwrap().clear();
    assert_eq!(ends_by(&client), End::Reset);
    two.end();
    wait_until("the threads to end", || match threads() {
        now if now <= before + 8 => Ok(()),
        now => Err((now, before)),
    });
}

/// The agent reads bytes for its own container's clients from a duplicate of a socket that blocks.
fn stolen_bytes(ring: RingChoice) {
    let (thief, script) = Thief::new();
    let mut two = Two::start(ring, Limits::default(), script);
    let server = Server::listen(&two.bad, "127.0.0.1:3000");
    two.driver.open(BAD.1, BAD.0, (BAD.2, 3000), Reach { v4: true, v6: false }).unwrap();
    let client = connect(([127, 0, 0, 1], BAD.2));
    let accepted = server.accept();
    // Bulk data, so that the engine splices.
    let pushing = std::thread::spawn(move || {
        use std::io::Write;
        let mut accepted = accepted;
        let bytes = vec![7; 256 * 1024];
        while accepted.write_all(&bytes).is_ok() {}
    });
    let mut buffer = vec![0; 64 * 1024];
    for _ in 0..200 {
        assert!(landfall_tests::read_some(&client, &mut buffer).unwrap() > 0);
    }
    thief.make_them_block();
    for _ in 0..200 {
        for socket in thief.kept.lock().unwrap().iter() {
            let _ = rustix::net::recv(socket, buffer.as_mut_slice(), rustix::net::RecvFlags::DONTWAIT);
        }
    }
    two.assert_others_continue();
    two.driver.remove_upstream(BAD.0, Ending::Reset);
    two.assert_others_continue();
    drop((client, server));
    // The sender gets an error when the last duplicate of its peer is closed.
    for socket in thief.kept.lock().unwrap().drain(..) {
        let _ = rustix::net::shutdown(&socket, rustix::net::Shutdown::Both);
    }
    pushing.join().unwrap();
    two.end();
}

fn engine_drains(ring: RingChoice) {
    engine_ends(ring, Command::Drain);
}

fn engine_stops(ring: RingChoice) {
    engine_ends(ring, Command::Stop);
}

fn engine_ends(ring: RingChoice, command: Command) {
    let (thief, script) = Thief::new();
    let mut two = Two::start(ring, Limits::default(), script);
    let (_server, _filling, _client) = hang(&mut two, &thief);
    let Two { mut driver, talk, flood, .. } = two;
    assert!(talk.end() > 0 && flood.end() > 0);
    // Every listener is lent, also that of the hung shard.
    driver.apply(Command::LendListeners);
    let count = driver.expect("the listeners", |event| match event {
        Event::ListenersLent { count } => Some(*count),
        _ => None,
    });
    assert_eq!(count, 3);
    driver.apply(command);
    driver.expect("the engine to stop", |event| (*event == Event::Stopped).then_some(()));
}

/// An upstream with an invalid number of channels is refused with a sentence.
fn wrong_channel_count(ring: RingChoice) {
    let mut driver = Driver::start(Limits::default(), ring);
    let file = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    let proc = WatchSources { proc_tcp: true, ..WatchSources::default() };
    for (kind, sources, count, words) in [
        (UpstreamKind::Agent, WatchSources::default(), 0, "expected 1, one channel to its agent"),
        (UpstreamKind::Agent, WatchSources::default(), 2, "expected 1, one channel to its agent"),
        (UpstreamKind::Agent, proc, 2, "files from an agent are not accepted"),
        (UpstreamKind::Dialler, WatchSources::default(), 0, "a channel for each of 1 shards"),
    ] {
        let before = descriptors();
        let descriptors_given = (0..count).map(|_| file()).collect();
        let add = Command::AddUpstream { upstream: BAD.0, netns_cookie: 1, sources, kind };
        driver.apply_with(add, descriptors_given);
        let reason = driver.expect("a refusal", |event| match event {
            Event::Refused { reason } => Some(reason.clone()),
            _ => None,
        });
        assert!(reason.contains(words), "{words}: {reason}");
        // The engine refuses first, and then closes the descriptors.
        wait_until("the descriptors to be closed", || match descriptors() {
            now if now == before => Ok(()),
            now => Err(now),
        });
    }
}
