//! Events in the life of a container, and their effect on clients on the host.

use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use landfall_tests::case::Case;
use landfall_tests::{Home, Namespace, Pattern, is_long, note};

use super::engine::{
    Engine, answers, container, is_open, is_refused, landfall, page, refuses, rows, until, up,
    wait_for_openers, wait_until_idle,
};

pub(crate) const CASES: &[Case] = &[
    Case::once("restarts_under_load_recover_every_forward", restarts),
    Case::once("a_transfer_continues_after_a_pause", pause),
    Case::once("a_killed_container_refuses_connections_at_once_and_is_released", kill),
    Case::once("a_renamed_or_recreated_container_keeps_its_ports_and_its_policy", names),
    Case::once("shared_networks_are_reported_with_a_reason", networks),
];

/// Clients of one port, one after another, until the end. Every answer must come from the right container.
pub(crate) struct Visitors<'a> {
    over: &'a AtomicBool,
    served: AtomicUsize,
    failed: Mutex<Vec<String>>,
}

impl<'a> Visitors<'a> {
    pub(crate) fn new(over: &'a AtomicBool) -> Visitors<'a> {
        Visitors { over, served: AtomicUsize::new(0), failed: Mutex::new(Vec::new()) }
    }

    pub(crate) fn connect_until_stopped(&self, port: u16, wanted: &str) {
        let mut turn = 0;
        while !self.over.load(Ordering::Relaxed) {
            match page(port, turn) {
                Ok(text) => {
                    assert_eq!(text, wanted, "port {port} led to another one");
                    self.served.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) => {
                    self.failed.lock().unwrap().push(error.to_string());
                    // A pause, because the next server needs the processor, too.
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            turn += 1;
        }
    }

    pub(crate) fn served(&self) -> usize {
        self.served.load(Ordering::Relaxed)
    }

    /// Returns the failures, in order.
    pub(crate) fn failed(&self) -> Vec<String> {
        self.failed.lock().unwrap().clone()
    }

    /// Waits until some further clients were served.
    #[track_caller]
    pub(crate) fn wait_for_progress(&self) {
        let wanted = self.served() + 5;
        until("visitors to be served", || match self.served() {
            served if served >= wanted => Ok(()),
            served => Err(served),
        });
    }
}

/// Stops the clients also when the case panics.
pub(crate) struct StopOnDrop<'a>(pub(crate) &'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn restarts() {
    const RESTARTED: u16 = 3000;
    const OTHER: u16 = 3001;
    let rounds = if is_long() { 50 } else { 8 };
    let home = Home::new();
    let engine = Engine::start(&home, &["base"]);
    up(&home, &[]);
    let before = wait_until_idle(&home, &engine);
    for (name, port) in [("restarted", RESTARTED), ("other", OTHER)] {
        engine.serve(name, port, &[]);
        answers(port, name);
        is_open(&home, name, &[port]);
    }

    let over = AtomicBool::new(false);
    let (restarted, other) = (Visitors::new(&over), Visitors::new(&over));
    std::thread::scope(|scope| {
        let over = StopOnDrop(&over);
        for _ in 0..2 {
            scope.spawn(|| restarted.connect_until_stopped(RESTARTED, "restarted"));
        }
        scope.spawn(|| other.connect_until_stopped(OTHER, "other"));
        for _ in 0..rounds {
            restarted.wait_for_progress();
            let pid = engine.first_process("restarted");
            engine.docker(&["restart", "-t", "0", "restarted"]);
            assert_ne!(engine.first_process("restarted"), pid);
        }
        // Restarted while the daemon enters it, without a wait.
        for _ in 0..2 {
            engine.docker(&["restart", "-t", "0", "restarted"]);
        }
        restarted.wait_for_progress();
        other.wait_for_progress();
        drop(over);
    });
    assert_eq!(other.failed(), [""; 0], "the other one's visitors noticed");
    is_open(&home, "restarted", &[RESTARTED]);
    is_open(&home, "other", &[OTHER]);
    answers(RESTARTED, "restarted");
    answers(OTHER, "other");
    wait_for_openers(&home, 2);
    engine.docker(&["rm", "-f", "restarted"]);
    engine.docker(&["rm", "-f", "other"]);
    before.wait_until_released(&home);
    note!(
        "{} restarts, {} visitors served and {} not, {} of another container all served",
        rounds + 2,
        restarted.served(),
        restarted.failed().len(),
        other.served()
    );
}

/// The length of a large file, in bytes: more than all buffers between the ends hold.
const BIG: u64 = 64 << 20;

fn pause() {
    const PORT: u16 = 3000;
    let home = Home::new();
    let engine = Engine::start(&home, &["base"]);
    up(&home, &[]);
    let folder = home.folder("big");
    let mut bytes = vec![0; 1 << 20];
    let mut file = File::create(folder.join("big")).unwrap();
    for position in (0..BIG).step_by(bytes.len()) {
        Pattern::new(7).fill(position, &mut bytes);
        file.write_all(&bytes).unwrap();
    }
    engine.serve("paused", PORT, &["-v", &format!("{}:/www/files", folder.display())]);
    answers(PORT, "paused");

    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, PORT)).unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    stream.write_all(b"GET /files/big HTTP/1.0\r\n\r\n").unwrap();
    let mut reader = BufReader::new(stream);
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        reader.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    let mut checker = Pattern::new(7).checker();
    read(&mut reader, &mut bytes[..1 << 20], &mut checker).unwrap();
    engine.docker(&["pause", "paused"]);
    // Data in transit still arrives, and then no more; neither end of the connection sees an error.
    let silence = loop {
        if let Err(error) = read(&mut reader, &mut bytes, &mut checker) {
            break error;
        }
    };
    assert_eq!(silence.kind(), std::io::ErrorKind::WouldBlock, "{silence}");
    let sent = checker.position();
    assert!(sent < BIG, "every byte was sent before the pause");
    // A new client waits, and is not refused.
    let waiting = std::thread::spawn(|| page(PORT, 0));
    until("the new visitor to be taken in", || match container(&home, "paused") {
        found if found["forwards"][0]["connections"] == 2 => Ok(()),
        found => Err(found),
    });
    engine.docker(&["unpause", "paused"]);
    reader.get_ref().set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    while checker.position() < BIG {
        read(&mut reader, &mut bytes, &mut checker).unwrap();
    }
    assert_eq!(waiting.join().unwrap().unwrap(), "paused");
    note!("{sent} of {BIG} bytes arrived before the pause, and all of them afterwards, every byte right");
}

/// Reads the next bytes and checks each.
fn read(
    reader: &mut impl Read,
    bytes: &mut [u8],
    checker: &mut landfall_tests::Checker,
) -> std::io::Result<()> {
    let count = reader.read(bytes)?;
    assert_ne!(count, 0, "the connection ended after {} bytes", checker.position());
    checker.check(&bytes[..count]);
    Ok(())
}

fn kill() {
    const PORT: u16 = 3000;
    /// The longest time for which a port of a killed container may still accept connections.
    const REFUSED_WITHIN: Duration = Duration::from_secs(1);
    let home = Home::new();
    let engine = Engine::start(&home, &["base"]);
    up(&home, &[]);
    let mut longest = Duration::ZERO;
    for _ in 0..5 {
        engine.serve("killed", PORT, &[]);
        answers(PORT, "killed");
        let end = Namespace::of(engine.first_process("killed")).into_end_watch();
        let asked = Instant::now();
        engine.docker(&["kill", "killed"]);
        let killed = Instant::now();
        until("the port to be refused", || if is_refused(PORT) { Ok(()) } else { Err(killed.elapsed()) });
        assert!(killed.elapsed() < REFUSED_WITHIN, "{:?}", killed.elapsed());
        longest = longest.max(asked.elapsed());
        until("the network namespace to be released", || {
            if end.is_gone() { Ok(()) } else { Err("it is there") }
        });
        engine.docker(&["rm", "-f", "killed"]);
    }
    note!("refused at most {} ms after `docker kill` was started", longest.as_millis());
}

fn networks() {
    let home = Home::new();
    let engine = Engine::start(&home, &["base"]);
    up(&home, &[]);
    // A container on the host's network answers there by itself, and must not be forwarded to itself.
    engine.serve("on-the-host", 3000, &["--network", "host"]);
    wait_for_reason(&home, "on-the-host", "host's network");
    assert_eq!(page(3000, 0).unwrap(), "on-the-host");
    // A container on another's network has that one's ports, which are forwarded once.
    engine.serve("owner", 3001, &[]);
    answers(3001, "owner");
    engine.serve("guest", 3002, &["--network", "container:owner"]);
    answers(3002, "guest");
    wait_for_reason(&home, "guest", "owner");
    is_open(&home, "owner", &[3001, 3002]);
    engine.docker(&["rm", "-f", "on-the-host"]);
    refuses(3000);
}

/// Waits until a container is not forwarded, and its reason contains this text.
#[track_caller]
fn wait_for_reason(home: &Home, name: &str, wanted: &str) {
    let reported = until(&format!("{name} to have a reason"), || match container(home, name) {
        found if found["reason"].as_str().is_some_and(|reason| reason.contains(wanted)) => Ok(found),
        found => Err(found),
    });
    assert_eq!(reported["forwards"].as_array().unwrap().len(), 0, "{reported}");
}

/// The user's settings for a container stay in effect when it is renamed, and when another one is created under its name.
fn names() {
    const ONLY: &str = "dev.landfall.allow=3000";
    let home = Home::new();
    let engine = Engine::start(&home, &["base"]);
    up(&home, &[]);
    engine.serve("labelled", 3000, &["--label", ONLY]);
    engine.exec("labelled", "busybox httpd -p 127.0.0.1:3009 -h /www");
    engine.serve_with_options("attached", 3001, &[]);
    engine.exec("attached", "busybox httpd -p 127.0.0.1:3010 -h /www");
    landfall(&home, &["attach", "attached", "--deny", "3010"]);
    let check = |labelled: &str, attached: &str| {
        for (name, port, denied) in [(labelled, 3000, 3009), (attached, 3001, 3010)] {
            until(&format!("{name} to have one of its ports open"), || match container(&home, name) {
                found
                    if rows(&found).iter().filter(|row| row.1 == "open").eq([&(port, "open".to_owned())]) =>
                {
                    Ok(())
                }
                found => Err(found),
            });
            assert!(is_refused(denied), "{denied} answers");
        }
        answers(3000, "labelled");
        answers(3001, "attached");
    };
    check("labelled", "attached");
    engine.docker(&["rename", "labelled", "labelled-2"]);
    engine.docker(&["rename", "attached", "attached-2"]);
    check("labelled-2", "attached-2");
    engine.docker(&["rename", "labelled-2", "labelled"]);
    engine.docker(&["rename", "attached-2", "attached"]);
    check("labelled", "attached");
    engine.docker(&["rm", "-f", "labelled", "attached"]);
    refuses(3000);
    refuses(3001);
    engine.serve("labelled", 3000, &["--label", ONLY]);
    engine.exec("labelled", "busybox httpd -p 127.0.0.1:3009 -h /www");
    engine.serve_with_options("attached", 3001, &[]);
    engine.exec("attached", "busybox httpd -p 127.0.0.1:3010 -h /www");
    check("labelled", "attached");
}
