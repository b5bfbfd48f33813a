//! Containers that listen on thousands of ports, or that open and close them without end. The work for them is bounded, and
//! no other container waits for it.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use landfall_tests::broker::{Container, closed, forwarded, opened, snapshot};
use landfall_tests::case::Case;
use landfall_tests::process::{peak_bytes_of, raise_descriptors};
use landfall_tests::rpc::{done, register_with};
use landfall_tests::{Home, Namespace, Server, is_long, note, wait_until};
use serde_json::{Value, json};

use crate::portbroker_host::Scene;

pub(crate) const CASES: &[Case] = &[
    Case::once("c24_a_flood_of_listeners_delays_no_other_container", listeners),
    Case::once("c24_a_flood_of_snapshots_takes_bounded_memory", snapshots),
];

/// The most ports of one container that are forwarded.
const FORWARDS_MAX: usize = 256;
/// The number of ports on which the first attacker listens.
const LISTENERS: u16 = 2_500;

fn register(home: &Home, name: &str, inside: &Namespace) {
    register_with(home, name, &json!({"way": {"kind": "netns", "path": inside.path()}}));
}

fn describe(home: &Home, name: &str) -> Value {
    let all = done(home, &json!({"kind": "describe"}));
    let containers = all["containers"].as_array().unwrap();
    containers.iter().find(|one| one["containerName"] == name).unwrap().clone()
}

/// A thread that attacks until this is dropped.
struct Attack {
    ends: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Attack {
    /// Opens and closes listeners in a namespace, about as fast as the kernel can.
    fn by_listeners(inside: &Namespace) -> Attack {
        let ends = Arc::new(AtomicBool::new(false));
        let over = Arc::clone(&ends);
        let cycle = inside.spawn(move || {
            let mut open = VecDeque::new();
            for port in (20_000..28_000).cycle().take_while(|_| !over.load(Ordering::Relaxed)) {
                open.extend(TcpListener::bind((Ipv4Addr::LOCALHOST, port)));
                if open.len() > 500 {
                    open.pop_front();
                }
            }
        });
        Attack { ends, threads: vec![cycle] }
    }

    /// Announces and withdraws listeners over a WebSocket, as fast as the daemon reads.
    fn by_messages(container: &Container) -> Attack {
        let mut peer = container.welcome();
        let ends = Arc::new(AtomicBool::new(false));
        let (over, received) = (Arc::clone(&ends), Arc::clone(&ends));
        let mut message_sender = peer.message_sender();
        let cycle = std::thread::spawn(move || {
            for port in (30_000_u16..38_000).cycle().take_while(|_| !over.load(Ordering::Relaxed)) {
                let before = if port < 30_500 { port + 7_500 } else { port - 500 };
                // A connection that the daemon has closed ends the attack.
                let printed = message_sender
                    .try_send_message(&opened(port))
                    .and_then(|()| message_sender.try_send_message(&closed(before)));
                if printed.is_err() {
                    return;
                }
            }
        });
        let hears = std::thread::spawn(move || peer.discard_until(|| received.load(Ordering::Relaxed)));
        Attack { ends, threads: vec![cycle, hears] }
    }
}

impl Drop for Attack {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // The attacker's panic was printed where it happened.
            let _ = thread.join();
        }
    }
}

fn listeners() {
    raise_descriptors();
    let home = Home::new();
    let _daemon = home.daemon();
    let (many, cycled, quiet) = (Namespace::new(), Namespace::new(), Namespace::new());
    let _server = Server::listen(&quiet, "127.0.0.1:3000");
    let bind = |port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
    let _listeners: Vec<TcpListener> = many.run(|| (10_000..10_000 + LISTENERS).map(bind).collect());
    for (name, inside) in [("many", &many), ("quiet", &quiet), ("cycled", &cycled)] {
        register(&home, name, inside);
    }
    let talker = Container::listen("token-of-the-talker");
    talker.register(&home, "talker");
    let _attacks = [Attack::by_listeners(&cycled), Attack::by_messages(&talker)];
    wait_until("as many ports as may be to be forwarded", || {
        let reported = describe(&home, "many");
        let rows = reported["forwards"].as_array().unwrap();
        let open = rows.iter().filter(|row| row["state"] == "open").count();
        let all = json!(rows.len() as u64 + reported["omitted"].as_u64().unwrap_or_default());
        if open == FORWARDS_MAX && all == LISTENERS { Ok(()) } else { Err((open, all)) }
    });
    let bytes = describe(&home, "many").to_string().len();
    assert!(bytes < 160 * 1024, "the rows of one container take {bytes} bytes");
    // The time limit applies with `--long` only, because other tests share the processors.
    let until = Instant::now() + Duration::from_secs(if is_long() { 20 } else { 1 });
    let mut took = Vec::new();
    while took.len() < 10 || Instant::now() < until {
        let asked = Instant::now();
        let status = done(&home, &json!({"kind": "status", "containerName": "quiet"}));
        took.push(asked.elapsed());
        assert_eq!(status["forwardedPorts"], json!([3000]));
    }
    took.sort_unstable();
    let (half, slowest) = (took[took.len() / 2], took[took.len() - 1]);
    note!("status of another container, {} times: {half:?} at half, {slowest:?} at most", took.len());
    took.retain(|took| *took > Duration::from_millis(250));
    // One late answer is allowed: the hypervisor may pause the machine for that long.
    assert!(!is_long() || took.len() <= 1, "{took:?}");
}

/// Messages of nearly the largest size, and snapshots of every port, from a container that reads no answer and reconnects
/// whenever it is disconnected.
fn snapshots() {
    const BYTES_MAX: usize = 100 * 1024 * 1024;
    let home = Home::new();
    let mut scene = Scene::open(&home, json!({"allow": "*"}));
    let ports: Vec<Value> =
        (1..=u16::MAX).map(|port| json!({"port": port, "bindAddr": "127.0.0.1"})).collect();
    let every_port = json!({"type": "port-listen-snapshot", "ports": ports}).to_string();
    let with = |kind: &str, list: &str, item: &str, count: usize| {
        format!(r#"{{"type":"{kind}","{list}":[{}0]}}"#, item.repeat(count))
    };
    let numbers = with("port-listen-snapshot", "ports", "1,", 7_000_000);
    let candidates = with("port-forward-request", "hostCandidates", "1,", 7_000_000);
    let listeners = with("port-listen-snapshot", "ports", r#"{"port":1},"#, 1_200_000);
    let (flood, rounds): (&[&String], usize) = match is_long() {
        true => (&[&every_port, &every_port, &numbers, &candidates, &listeners, &every_port], 20),
        false => (&[&every_port, &candidates, &every_port, &every_port], 1),
    };
    for text in std::iter::repeat_n(flood, rounds).flatten() {
        if scene.peer.try_send_text(text).is_err() {
            scene.peer = scene.container.welcome();
        }
    }
    // The container is still served.
    scene.peer.hang_up();
    let mut peer = scene.container.welcome();
    peer.send_message(&snapshot(&[5173]));
    peer.receive_exactly(&forwarded(5173, 5173));
    let most = peak_bytes_of(scene.daemon.pid());
    note!("the daemon took {} MiB at most", most >> 20);
    assert!(most < BYTES_MAX, "{} MiB", most >> 20);
}
