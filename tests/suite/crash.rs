//! Claims 18 and 19: after the crash of one process the others continue, lost state is restored, and a port belongs to one
//! container.
//!
//! The daemon is the real program, containers are network namespaces, and clients connect on the host during the crashes.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use landfall_tests::case::Case;
use landfall_tests::process::{descriptors_of, kill, running};
use landfall_tests::{
    Checker, Conversation, Flood, Home, Namespace, Pattern, Rng, Server, answer, connect, is_long, note,
    read_exactly, read_to_end, rpc, seed, visit, wait_until,
};
use serde_json::{Value, json};

pub(crate) const CASES: &[Case] = &[
    Case::once("c19_connections_survive_a_killed_daemon", daemon_killed),
    Case::once("c19_connections_survive_a_daemon_killed_during_its_start", daemon_killed_at_start),
    Case::once("c19_forwards_recover_after_the_engine_is_killed", engine_killed),
    Case::once("c19_connections_recover_after_both_processes_are_killed", both_killed),
    Case::once("c19_changes_without_a_daemon_are_detected_by_the_next_one", changes_without_daemon),
    Case::once("c18_a_killed_container_is_released", killed_container),
    Case::once("the_first_of_two_containers_keeps_the_port", port_conflict),
];

/// The port of the server for short connections, and the port of the server for long ones.
pub(crate) const BUSY: u16 = 3000;
pub(crate) const QUIET: u16 = 3001;
/// The longest time until every forward answers again after the engine was killed. The delay before a restart of the engine
/// grows each time it exits soon after its start.
const BACK_WITHIN: Duration = Duration::from_secs(8);

/// The registration of a namespace by its file.
pub(crate) fn by_file(inside: &Namespace) -> Value {
    json!({"way": {"kind": "netns", "path": inside.path()}})
}

/// The registration of a namespace by a process in it.
fn by_process(process: &Child) -> Value {
    json!({"way": {"kind": "process", "pid": process.id()}})
}

/// A sleeping process inside. It ends with the case, because its standard input ends.
fn idle_inside(inside: &Namespace) -> Child {
    let start = || Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    inside.run(start)
}

/// Returns the daemon's forwards: container, port and state, in the daemon's order.
pub(crate) fn rows(description: &Value) -> Vec<(String, u16, String)> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let containers = description["containers"].as_array().unwrap();
    let rows = containers.iter().flat_map(|container| {
        let rows = container["forwards"].as_array().unwrap().iter();
        rows.map(|row| {
            let port = u16::try_from(row["port"].as_u64().unwrap()).unwrap();
            assert_eq!(row["hostPort"], port);
            (text(&container["containerName"]), port, text(&row["state"]))
        })
    });
    rows.collect()
}

pub(crate) fn describe(home: &Home) -> Value {
    rpc::done(home, &json!({"kind": "describe"}))
}

/// Waits until exactly these ports are open, each once. Returns the whole description.
#[track_caller]
pub(crate) fn wait_for_open(home: &Home, wanted: &[(&str, u16)]) -> Value {
    let wanted: Vec<_> =
        wanted.iter().map(|(name, port)| ((*name).to_owned(), *port, "open".to_owned())).collect();
    wait_until("every forward to be open, once", || {
        let description = describe(home);
        let right = description["replayed"] == true && rows(&description) == wanted;
        if right { Ok(description) } else { Err(description) }
    })
}

pub(crate) fn engine_pid(description: &Value) -> u32 {
    u32::try_from(description["engine"]["pid"].as_u64().unwrap()).unwrap()
}

/// The two containers of most cases: one by a namespace file, with the busy server; one by a process, with the quiet server.
pub(crate) struct Pair {
    pub(crate) quiet: Server,
    busy: Namespace,
    process: Child,
}

impl Pair {
    pub(crate) const OPEN: [(&str, u16); 2] = [("busy", BUSY), ("quiet", QUIET)];

    pub(crate) fn new() -> (Pair, Namespace) {
        let (busy, inside) = (Namespace::new(), Namespace::new());
        Server::listen(&busy, &format!("127.0.0.1:{BUSY}")).serve_in_turn(8, answer);
        let quiet = Server::listen(&inside, &format!("127.0.0.1:{QUIET}"));
        let process = idle_inside(&inside);
        (Pair { quiet, busy, process }, inside)
    }

    /// Registers both, and waits until both are forwarded.
    #[track_caller]
    pub(crate) fn register(&self, home: &Home) -> Value {
        rpc::register_with(home, "busy", &by_file(&self.busy));
        rpc::register_with(home, "quiet", &by_process(&self.process));
        wait_for_open(home, &Pair::OPEN)
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Resources of an engine without connections.
#[derive(Debug, PartialEq, Eq)]
struct Held {
    engines: Vec<u32>,
    descriptors: usize,
    openers: usize,
}

impl Held {
    fn now() -> Held {
        let engines = running("_engine");
        let descriptors = engines.iter().map(|pid| descriptors_of(*pid)).sum();
        Held { engines, descriptors, openers: running("_opener").len() }
    }
}

fn daemon_killed() {
    let rounds = if is_long() { 1_000 } else { 10 };
    let home = Home::new();
    let (pair, _inside) = Pair::new();
    let mut daemon = home.daemon();
    let engine = engine_pid(&pair.register(&home));
    (0..100).for_each(|seed| visit(BUSY, seed).unwrap());
    let before = wait_until("the engine to be at rest", || {
        let open: u64 = describe(&home)["containers"][0]["forwards"][0]["connections"].as_u64().unwrap();
        if open == 0 { Ok(Held::now()) } else { Err(open) }
    });
    assert_eq!(before.engines, [engine]);

    let flood = Flood::start(BUSY, 2);
    let mut talks: Vec<_> =
        (0..3).map(|number| Conversation::start(QUIET, &pair.quiet, seed() + number)).collect();
    for round in 0..rounds {
        flood.wait_for_progress(10);
        daemon.kill();
        // No daemon runs.
        flood.wait_for_progress(10);
        talks.iter_mut().for_each(Conversation::wait_for_progress);
        daemon = home.daemon();
        let description = wait_for_open(&home, &Pair::OPEN);
        assert_eq!(engine_pid(&description), engine, "another engine after {round} kills");
        assert_eq!(running("_engine"), [engine], "after {round} kills");
    }
    flood.wait_for_progress(10);
    let bytes: u64 = talks.into_iter().map(Conversation::end).sum();
    note!("{rounds} kills, {} visits, {bytes} bytes each way in lasting connections", flood.end());
    wait_until("the engine to hold what it held before", || match Held::now() {
        // Fewer are possible: sockets in stock for future connections may have expired.
        now if now.engines == before.engines
            && now.openers == before.openers
            && now.descriptors <= before.descriptors =>
        {
            Ok(())
        }
        now => Err((now, format!("before: {before:?}"))),
    });
    daemon.shut_down();
}

/// Most kills hit a daemon that has just started: it replays, attaches, enters namespaces, or is about to start an engine.
fn daemon_killed_at_start() {
    let rounds = if is_long() { 300 } else { 12 };
    let home = Home::new();
    let (pair, _inside) = Pair::new();
    let daemon = home.daemon();
    let engine = engine_pid(&pair.register(&home));
    daemon.kill();
    let mut moments = Rng::new(seed());
    let flood = Flood::start(BUSY, 2);
    let mut talk = Conversation::start(QUIET, &pair.quiet, seed());
    for _ in 0..rounds {
        let daemon = home.start().spawn();
        std::thread::sleep(Duration::from_micros(moments.below(60_000)));
        daemon.kill();
        flood.wait_for_progress(5);
        talk.wait_for_progress();
    }
    let daemon = home.daemon();
    let description = wait_for_open(&home, &Pair::OPEN);
    assert_eq!(engine_pid(&description), engine);
    flood.wait_for_progress(10);
    talk.end();
    flood.end();
    wait_until("one engine, and one opener for each container", || {
        let (engines, openers) = (running("_engine"), running("_opener"));
        if engines == [engine] && openers.len() == 2 { Ok(()) } else { Err((engines, openers)) }
    });
    daemon.shut_down();
}

/// The files of both registrations.
fn on_disk(home: &Home) -> [Option<Value>; 2] {
    ["busy", "quiet"].map(|name| home.registered(name))
}

fn engine_killed() {
    let rounds = if is_long() { 50 } else { 5 };
    let home = Home::new();
    let (pair, _inside) = Pair::new();
    let daemon = home.daemon();
    let mut engine = engine_pid(&pair.register(&home));
    let kept = on_disk(&home);
    assert!(kept.iter().all(Option::is_some));
    let mut longest = Duration::ZERO;
    for round in 0..rounds {
        let mut lost = connect((Ipv4Addr::LOCALHOST, QUIET));
        drop(pair.quiet.accept());
        kill(engine);
        let died = Instant::now();
        // Clients that were connected get an error.
        assert!(!matches!(lost.read(&mut [0]), Err(error) if error.kind() == ErrorKind::WouldBlock));
        wait_until("a visit to go well", || visit(BUSY, round));
        wait_until("the other one to answer", || TcpStream::connect((Ipv4Addr::LOCALHOST, QUIET)));
        drop(pair.quiet.accept());
        longest = longest.max(died.elapsed());
        let description = wait_for_open(&home, &Pair::OPEN);
        let next = engine_pid(&description);
        assert_ne!(next, engine);
        engine = next;
        wait_until("one engine, and one opener for each container", || {
            let (engines, openers) = (running("_engine"), running("_opener"));
            if engines == [engine] && openers.len() == 2 { Ok(()) } else { Err((engines, openers)) }
        });
        assert_eq!(rpc::names(&home), ["busy", "quiet"]);
        assert_eq!(on_disk(&home), kept);
    }
    note!("{rounds} engines were killed; every forward answered again within {} ms", longest.as_millis());
    assert!(longest < BACK_WITHIN, "{longest:?}");
    daemon.shut_down();
}

fn both_killed() {
    let rounds = if is_long() { 50 } else { 4 };
    let home = Home::new();
    let (pair, _inside) = Pair::new();
    let mut daemon = home.daemon();
    let mut engine = engine_pid(&pair.register(&home));
    let kept = on_disk(&home);
    for round in 0..rounds {
        // The order of the kills matters: an engine without a driver, or a driver that starts another engine.
        if round % 2 == 0 {
            daemon.kill();
            kill(engine);
        } else {
            kill(engine);
            daemon.kill();
        }
        daemon = home.daemon();
        engine = engine_pid(&wait_for_open(&home, &Pair::OPEN));
        visit(BUSY, round).unwrap();
        visit(BUSY, round + 1).unwrap();
        drop(connect((Ipv6Addr::LOCALHOST, QUIET)));
        drop(pair.quiet.accept());
        wait_until("one engine, and one opener for each container", || {
            let (engines, openers) = (running("_engine"), running("_opener"));
            if engines == [engine] && openers.len() == 2 { Ok(()) } else { Err((engines, openers)) }
        });
        assert_eq!(on_disk(&home), kept);
    }
    daemon.shut_down();
}

/// Changes inside while no daemon runs: one server ends, another starts, and a whole container ends.
fn changes_without_daemon() {
    let home = Home::new();
    let (one, other) = (Namespace::new(), Namespace::new());
    let (ends, stays) = (Server::listen(&one, "127.0.0.1:3000"), Server::listen(&one, "127.0.0.1:3001"));
    let mut gone = serve_inside(&other, 3003);
    let daemon = home.daemon();
    rpc::register_with(&home, "one", &by_file(&one));
    rpc::register_with(&home, "other", &by_process(&gone));
    let engine =
        engine_pid(&wait_for_open(&home, &[("one", ends.port()), ("one", stays.port()), ("other", 3003)]));
    let mut talk = Conversation::start(stays.port(), &stays, seed());
    daemon.kill();
    drop(ends);
    let begins = Server::listen(&one, "127.0.0.1:3002");
    gone.kill().unwrap();
    gone.wait().unwrap();
    talk.wait_for_progress();
    let daemon = home.daemon();
    let description = wait_for_open(&home, &[("one", stays.port()), ("one", begins.port())]);
    assert_eq!(engine_pid(&description), engine);
    assert_eq!(rpc::names(&home), ["one"]);
    for port in [3000, 3003] {
        assert!(is_refused(port), "{port} still answers");
    }
    drop(connect((Ipv4Addr::LOCALHOST, begins.port())));
    drop(begins.accept());
    talk.wait_for_progress();
    talk.end();
    daemon.shut_down();
}

/// Returns whether connections to a port are refused on both families.
fn is_refused(port: u16) -> bool {
    let refuses = |address: SocketAddr| {
        TcpStream::connect(address).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
    };
    refuses((Ipv4Addr::LOCALHOST, port).into()) && refuses((Ipv6Addr::LOCALHOST, port).into())
}

/// A server in a process of its own inside. It greets each client with the pattern of its port and waits.
fn serve_inside(inside: &Namespace, port: u16) -> Child {
    let mut child = Command::new("nsenter")
        .arg(format!("--net={}", inside.path()))
        .args(["setpriv", "--pdeathsig", "KILL"])
        .arg(std::env::current_exe().unwrap())
        .args(["_serve", &port.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // It prints a line when it listens.
    child.stdout.take().unwrap().read_exact(&mut [0]).unwrap();
    child
}

const GREETING: u64 = 100;

/// The verb of [`serve_inside`].
pub(crate) fn serve(arguments: &[String]) {
    let port: u16 = arguments[0].parse().unwrap();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
    std::io::stdout().write_all(b"!").unwrap();
    std::io::stdout().flush().unwrap();
    let mut held = Vec::new();
    for stream in listener.incoming() {
        let mut stream = stream.unwrap();
        let greeting = Pattern::new(port.into()).bytes(usize::try_from(GREETING).unwrap());
        // A client that has gone needs no greeting.
        let _ = stream.write_all(&greeting);
        held.push(stream);
    }
}

fn connect_greeted(port: u16) -> (TcpStream, Checker) {
    let stream = connect((Ipv4Addr::LOCALHOST, port));
    let mut checker = Pattern::new(port.into()).checker();
    read_exactly(&stream, &mut checker, GREETING);
    (stream, checker)
}

fn killed_container() {
    let home = Home::new();
    let daemon = home.daemon();
    for round in 0..3 {
        let inside = Namespace::new();
        let mut server = serve_inside(&inside, BUSY);
        rpc::register_with(&home, "a", &by_process(&server));
        wait_for_open(&home, &[("a", BUSY)]);
        let clients: Vec<_> = (0..20).map(|_| connect_greeted(BUSY)).collect();
        let end = inside.into_end_watch();
        assert!(!end.is_gone());
        server.kill().unwrap();
        let died = Instant::now();
        server.wait().unwrap();
        wait_until("the port to refuse", || is_refused(BUSY).then_some(()).ok_or("it answers"));
        let took = died.elapsed();
        assert!(took < Duration::from_secs(1), "the port answered for {took:?}");
        for (stream, mut checker) in clients {
            // Each connection ends in some way: none hangs, and none receives wrong bytes.
            read_to_end(&stream, &mut checker);
            assert_eq!(checker.position(), GREETING);
        }
        wait_until("the namespace to end", || end.is_gone().then_some(()).ok_or("it is there"));
        wait_until("it to be forgotten", || match rpc::names(&home) {
            names if names.is_empty() => Ok(()),
            names => Err(names),
        });
        wait_until("the end to be reported", || match home.count_events("deregister", "a") {
            count if count == round + 1 => Ok(()),
            count => Err(count),
        });
        assert!(home.registered("a").is_none());
        home.wait_for_event("deregister", |event| event["reason"] == "gone");
        wait_until("its opener to end", || match running("_opener") {
            openers if openers.is_empty() => Ok(()),
            openers => Err(openers),
        });
    }
    daemon.shut_down();
}

fn port_conflict() {
    let home = Home::new();
    let mut daemon = home.daemon();
    let (first, second) = (Namespace::new(), Namespace::new());
    let servers = [&first, &second].map(|inside| Server::listen(inside, &format!("127.0.0.1:{BUSY}")));
    let leads_to = |index: usize| {
        wait_until("a connection to lead to its server", || {
            let stream =
                TcpStream::connect((Ipv4Addr::LOCALHOST, BUSY)).map_err(|error| error.to_string())?;
            drop(servers[index].accept());
            drop(stream);
            Ok::<_, String>(())
        });
        assert!(!servers[1 - index].has_pending_connection());
    };
    let state = |name: &str| {
        let of_name = |(container, _, state): (String, u16, String)| (container == name).then_some(state);
        rows(&describe(&home)).into_iter().find_map(of_name)
    };
    rpc::register_with(&home, "first", &by_file(&first));
    wait_for_open(&home, &[("first", BUSY)]);
    rpc::register_with(&home, "second", &by_file(&second));
    let reported = home.wait_for_event("port-forward-event", |event| {
        event["event"]["kind"] == "port-forward-failed" && event["event"]["containerName"] == "second"
    });
    let reason = reported["event"]["reason"].as_str().unwrap();
    assert!(reason.contains("EADDRINUSE") && reason.contains("\"first\""), "{reason}");
    let second_fails = || {
        wait_until("the second to fail", || match (state("first"), state("second")) {
            (Some(one), Some(two)) if one == "open" && two == "failed" => Ok(()),
            states => Err(states),
        });
        leads_to(0);
    };
    second_fails();
    // The kill of a daemon does not change the owner of the port.
    for _ in 0..2 {
        daemon.kill();
        leads_to(0);
        daemon = home.daemon();
        second_fails();
    }
    let status = rpc::done(&home, &json!({"kind": "status", "containerName": "second"}));
    assert_eq!(status["forwardedPorts"], json!([]));
    rpc::done(&home, &json!({"kind": "deregister", "containerName": "first"}));
    wait_for_open(&home, &[("second", BUSY)]);
    leads_to(1);
    // The container that returns is second now.
    rpc::register_with(&home, "first", &by_file(&first));
    wait_until("the first to fail", || match state("first") {
        Some(one) if one == "failed" => Ok(()),
        other => Err(other),
    });
    leads_to(1);
    daemon.shut_down();
}
