//! The watch in real namespaces, without root: each test runs itself again as the root of a user and network namespace of
//! its own (`unshare --map-root-user --net`), and creates the watched namespaces there.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::collections::BTreeSet;
use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use landfall_engine::command::{Listening, UpstreamId};
use landfall_engine::watch::hint::HintSource;
use landfall_engine::watch::procfs::ProcFiles;
use landfall_engine::watch::reading::Reading;
use landfall_engine::watch::sock_diag::SockDiag;
use landfall_engine::watch::{Sources, WatchEvent, Watcher};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

const WAIT: Duration = Duration::from_secs(20);
const INSIDE: &str = "LANDFALL_TEST_INSIDE";

/// Runs `body` in a process that may make network namespaces.
fn alone(test: &str, body: impl FnOnce()) {
    if env::var_os(INSIDE).is_some() {
        return body();
    }
    let mut again = Command::new("unshare");
    again.args(["--map-root-user", "--net", "--"]).arg(env::current_exe().unwrap());
    again.args(["--exact", test, "--nocapture", "--include-ignored"]).env(INSIDE, "1");
    assert!(again.status().unwrap().success(), "{test} failed inside its namespace");
}

/// A network namespace, kept by a process that waits for its standard input to end.
struct Namespace {
    keeper: Child,
}

impl Namespace {
    fn new() -> Namespace {
        let script = "ip link set lo up && echo ready && read -r _";
        let mut keeper = Command::new("unshare");
        keeper.args(["--net", "sh", "-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut keeper = keeper.spawn().unwrap();
        let mut ready = [0; 6];
        keeper.stdout.as_mut().unwrap().read_exact(&mut ready).unwrap();
        Namespace { keeper }
    }

    /// Runs `body` on a thread inside.
    fn run<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        let file = fs::File::open(format!("/proc/{}/ns/net", self.keeper.id())).unwrap();
        let inside = || {
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            body()
        };
        thread::scope(|scope| scope.spawn(inside).join().unwrap())
    }

    fn sources(&self, kind: Kind) -> Sources {
        let all = self.run(Sources::open_here);
        assert!(all.tcp.is_some() && all.tcp6.is_some() && all.sock_diag.is_some(), "{all:?}");
        match kind {
            Kind::Files => Sources { sock_diag: None, ..all },
            Kind::SockDiag => Sources { tcp: None, tcp6: None, ..all },
        }
    }

    fn listen(&self, address: &str) -> TcpListener {
        self.run(|| TcpListener::bind(address).unwrap())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        drop(self.keeper.stdin.take());
        let _ = self.keeper.wait();
    }
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Files,
    SockDiag,
}

const KINDS: [Kind; 2] = [Kind::Files, Kind::SockDiag];

type Events = Receiver<(WatchEvent, Instant)>;

fn watcher() -> (Watcher, Events) {
    let (sender, receiver) = mpsc::channel();
    let sink = move |event| drop(sender.send((event, Instant::now())));
    (Watcher::start(HintSource::Off, sink).unwrap(), receiver)
}

/// Receives the next event, which must list listeners of `from`. Returns the opened and the closed ones.
fn listeners(events: &Events, from: u32) -> (Vec<Listening>, Vec<Listening>) {
    match events.recv_timeout(WAIT).expect("an event in time").0 {
        WatchEvent::Listeners { upstream, opened, closed } if upstream == UpstreamId(from) => {
            (opened, closed)
        }
        other => panic!("{other:?}"),
    }
}

/// The expected row of a listener that this process opened as the root of its user namespace.
fn expected(listener: &TcpListener) -> Listening {
    let address = listener.local_addr().unwrap();
    let port = address.port().try_into().unwrap();
    Listening { port, address: address.ip(), inode: rustix::fs::fstat(listener).unwrap().st_ino, uid: 0 }
}

#[test]
fn both_sources_find_exactly_the_listeners_on_loopback_and_any() {
    alone("both_sources_find_exactly_the_listeners_on_loopback_and_any", || {
        let namespace = Namespace::new();
        let addresses =
            ["127.0.0.1:3000", "[::1]:3000", "127.0.0.1:1", "0.0.0.0:65535", "[::1]:5173", "[::]:8080"];
        let found = addresses.map(|address| namespace.listen(address));
        let _other = ["127.0.0.2:9000", "127.0.0.53:53"].map(|address| namespace.listen(address));
        let _stream = namespace.run(|| TcpStream::connect("127.0.0.1:3000").unwrap());
        let found: BTreeSet<_> = found.iter().map(expected).collect();
        for kind in KINDS {
            let (watcher, events) = watcher();
            watcher.add(UpstreamId(1), namespace.sources(kind));
            let (opened, closed) = listeners(&events, 1);
            assert_eq!((opened.len(), closed.len()), (found.len(), 0), "{kind:?}");
            assert_eq!(opened.into_iter().collect::<BTreeSet<_>>(), found, "{kind:?}");
        }
    });
}

#[test]
fn opened_and_closed_listeners_are_reported() {
    alone("opened_and_closed_listeners_are_reported", || {
        for kind in KINDS {
            let namespace = Namespace::new();
            let (watcher, events) = watcher();
            watcher.add(UpstreamId(7), namespace.sources(kind));
            assert_eq!(
                listeners(&events, 7),
                (vec![], vec![]),
                "the first event is sent even if it is empty"
            );
            let listener = namespace.listen("127.0.0.1:5173");
            let row = expected(&listener);
            assert_eq!(listeners(&events, 7), (vec![row], vec![]), "{kind:?}");
            drop(listener);
            assert_eq!(listeners(&events, 7), (vec![], vec![row]), "{kind:?}");
        }
    });
}

#[test]
fn namespaces_are_separate_and_restart_when_added_again() {
    alone("namespaces_are_separate_and_restart_when_added_again", || {
        let (a, b) = (Namespace::new(), Namespace::new());
        let (in_a, in_b) = (a.listen("127.0.0.1:80"), b.listen("[::1]:80"));
        let (watcher, events) = watcher();
        watcher.add(UpstreamId(1), a.sources(Kind::SockDiag));
        assert_eq!(listeners(&events, 1).0, [expected(&in_a)]);
        watcher.add(UpstreamId(2), b.sources(Kind::Files));
        assert_eq!(listeners(&events, 2).0, [expected(&in_b)]);
        watcher.add(UpstreamId(1), a.sources(Kind::Files));
        assert_eq!(listeners(&events, 1).0, [expected(&in_a)]);
        // Changes in a namespace that is no longer watched are not reported: each further event is of the other one.
        watcher.remove(UpstreamId(1));
        drop(in_a);
        let more = b.listen("127.0.0.1:81");
        assert_eq!(listeners(&events, 2).0, [expected(&more)]);
        drop(in_b);
        assert_eq!(listeners(&events, 2).1.len(), 1);
    });
}

#[test]
fn a_refused_socket_falls_back_to_files_and_no_source_is_lost() {
    alone("a_refused_socket_falls_back_to_files_and_no_source_is_lost", || {
        let namespace = Namespace::new();
        let listener = namespace.listen("127.0.0.1:80");
        let no_netlink = || Some(OwnedFd::from(TcpListener::bind("0.0.0.0:0").unwrap()));
        let (watcher, events) = watcher();
        watcher.add(UpstreamId(1), Sources { sock_diag: no_netlink(), ..namespace.sources(Kind::Files) });
        assert_eq!(listeners(&events, 1).0, [expected(&listener)]);
        watcher.add(UpstreamId(2), Sources { sock_diag: no_netlink(), ..Sources::default() });
        let (event, _) = events.recv_timeout(WAIT).unwrap();
        assert!(matches!(event, WatchEvent::Lost { upstream: UpstreamId(2), .. }), "{event:?}");
    });
}

/// A table of many pages. Rows disappear from its middle while it is read.
#[test]
fn churn_never_closes_a_listener_that_stays() {
    alone("churn_never_closes_a_listener_that_stays", || {
        for kind in KINDS {
            let namespace = Namespace::new();
            let bind = |port: u16| TcpListener::bind(("127.0.0.1", port)).unwrap();
            let stay = namespace.run(|| (1000..1600).map(bind).collect::<Vec<_>>());
            let (watcher, events) = watcher();
            watcher.add(UpstreamId(1), namespace.sources(kind));
            assert_eq!(listeners(&events, 1).0.len(), stay.len(), "{kind:?}");
            namespace.run(|| {
                for round in 0..40u16 {
                    let come_and_go: Vec<_> = (0..50).map(|i| bind(2000 + round * 50 + i)).collect();
                    watcher.rescan();
                    drop(come_and_go);
                }
            });
            let last = namespace.listen("127.0.0.1:1999");
            watcher.rescan();
            loop {
                let (opened, closed) = listeners(&events, 1);
                assert!(closed.iter().all(|row| row.port.get() >= 2000), "{kind:?}: {closed:?}");
                if opened.contains(&expected(&last)) {
                    break;
                }
            }
        }
    });
}

/// `cargo test --release -p landfall-engine --test watch -- --ignored --nocapture`
#[test]
#[ignore = "measures this machine for two minutes"]
fn figures_of_delay_and_cost() {
    alone("figures_of_delay_and_cost", || {
        for (kind, pause_ms, rounds) in [
            (Kind::SockDiag, 37, 200),
            (Kind::Files, 37, 60),
            (Kind::SockDiag, 1_337, 15),
            (Kind::Files, 1_337, 15),
        ] {
            let delays = delays(kind, Duration::from_millis(pause_ms), rounds);
            let at = |part: usize| delays[(delays.len() - 1) * part / 100];
            println!(
                "{kind:?}, {rounds} listeners, one in {pause_ms} ms: p50 {:?}, p99 {:?}, max {:?}",
                at(50),
                at(99),
                at(100)
            );
        }
        for (kind, count) in [(Kind::SockDiag, 1), (Kind::Files, 1), (Kind::SockDiag, 50), (Kind::Files, 50)]
        {
            println!("{kind:?}, {count} idle namespaces: {:.2} % of a core", idle_percent(kind, count));
        }
    });
}

/// `cargo test --release -p landfall-engine --test watch -- --ignored --nocapture`
#[test]
#[ignore = "prints figures of this machine"]
fn figures_of_one_scan() {
    alone("figures_of_one_scan", || {
        let namespace = Namespace::new();
        let _listener = namespace.listen("127.0.0.1:5173");
        let print = |what: &str| {
            let files = namespace.sources(Kind::Files);
            let mut files = ProcFiles::new(files.tcp, files.tcp6).unwrap();
            println!("{what}: files {:?}", scan_time(|reading| assert!(files.read(reading).is_ok())));
            let mut diag = SockDiag::new(namespace.sources(Kind::SockDiag).sock_diag.unwrap()).unwrap();
            println!("{what}: sock_diag {:?}", scan_time(|reading| assert!(diag.read(reading).is_ok())));
        };
        print("one listener");
        let server = namespace.listen("127.0.0.1:80");
        let _streams: Vec<_> = namespace.run(|| {
            (0..400)
                .map(|_| (TcpStream::connect("127.0.0.1:80").unwrap(), server.accept().unwrap()))
                .collect()
        });
        print("two listeners, 800 connected sockets");
    });
}

/// Measures the processor time of a scan two hundred times. Returns the median and the maximum.
fn scan_time(mut scan: impl FnMut(&mut Reading)) -> (Duration, Duration) {
    let mut reading = Reading::default();
    let mut times: Vec<_> = (0..200)
        .map(|_| {
            let before = processor_time();
            scan(&mut reading);
            processor_time() - before
        })
        .collect();
    times.sort();
    (times[100], times[199])
}

/// Measures the times from before `bind` to the event, sorted.
fn delays(kind: Kind, pause: Duration, rounds: u32) -> Vec<Duration> {
    let namespace = Namespace::new();
    let (watcher, events) = watcher();
    watcher.add(UpstreamId(1), namespace.sources(kind));
    listeners(&events, 1);
    let mut delays: Vec<Duration> = (0..rounds)
        .map(|round| {
            // Keeps the rounds from running in step with the scans.
            thread::sleep(pause + Duration::from_micros(u64::from(round) * 733 % 23_000));
            let (listener, started) = namespace.run(|| {
                let started = Instant::now();
                (TcpListener::bind("127.0.0.1:5173").unwrap(), started)
            });
            let (event, reported) = events.recv_timeout(WAIT).unwrap();
            assert!(matches!(event, WatchEvent::Listeners { ref opened, .. } if opened.len() == 1));
            drop(listener);
            assert_eq!(listeners(&events, 1).1.len(), 1);
            reported.saturating_duration_since(started)
        })
        .collect();
    delays.sort();
    delays
}

/// Measures the processor time that the watch of `count` idle namespaces uses in ten seconds, in percent of a core.
fn idle_percent(kind: Kind, count: u32) -> f64 {
    let namespaces: Vec<_> = (0..count).map(|_| Namespace::new()).collect();
    let (watcher, events) = watcher();
    for (id, namespace) in (0..).zip(&namespaces) {
        watcher.add(UpstreamId(id), namespace.sources(kind));
    }
    namespaces.iter().for_each(|_| drop(events.recv_timeout(WAIT).unwrap()));
    let (before, started) = (processor_time(), Instant::now());
    thread::sleep(Duration::from_secs(10));
    (processor_time() - before).as_secs_f64() * 100.0 / started.elapsed().as_secs_f64()
}

fn processor_time() -> Duration {
    rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime).try_into().unwrap()
}
