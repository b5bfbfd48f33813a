//! Claim 20, with the real program: a daemon of another version takes over, the old engine finishes its connections, and no
//! new connection is refused, even if processes are killed in between.

use std::time::Duration;

use landfall_tests::case::Case;
use landfall_tests::process::running;
use landfall_tests::{Conversation, Flood, Home, Rng, is_long, note, rpc, seed, wait_until};
use serde_json::{Value, json};

use crate::crash::{BUSY, Pair, QUIET, describe, engine_pid, rows};

pub(crate) const CASES: &[Case] = &[
    Case::once("c20_up_of_another_version_refuses_no_connection", up_refuses_no_connection),
    Case::once("c20_a_killed_upgrade_refuses_no_connection", killed_upgrade_refuses_no_connection),
];

const VERSION: &str = "LANDFALL_VERSION";

/// Waits until the daemon and its engine have a version and every port is open, once. Returns the process id of the engine.
#[track_caller]
fn wait_for_version(home: &Home, version: &str) -> u32 {
    let wanted: Vec<_> =
        Pair::OPEN.iter().map(|(name, port)| ((*name).to_owned(), *port, "open".to_owned())).collect();
    let description = wait_until("the engine of the new version", || {
        let description = describe(home);
        let right = description["version"] == version
            && description["engine"]["version"] == version
            && rows(&description) == wanted;
        if right { Ok(description) } else { Err(description) }
    });
    engine_pid(&description)
}

/// Waits until this engine is the only one.
#[track_caller]
fn wait_for_one(home: &Home, engine: u32) {
    wait_until("the other engines to end", || match running("_engine") {
        engines if engines == [engine] => Ok(()),
        engines => Err((engines, describe(home))),
    });
    wait_until("the daemon to know", || match describe(home) {
        description if description["engine"]["draining"] == 0 => Ok(()),
        description => Err(description),
    });
    wait_until("one opener for each container", || match running("_opener") {
        openers if openers.len() == Pair::OPEN.len() => Ok(()),
        openers => Err(openers),
    });
}

fn up_refuses_no_connection() {
    let rounds = if is_long() { 50 } else { 4 };
    let home = Home::new();
    let (pair, _inside) = Pair::new();
    let first = home.start().variable(VERSION, "v0").wait_until_ready();
    pair.register(&home);
    let mut engine = wait_for_version(&home, "v0");
    let flood = Flood::start(BUSY, 3);
    let mut talks = Vec::new();
    for round in 1..=rounds {
        talks.push(Conversation::start(QUIET, &pair.quiet, seed() + round));
        let version = format!("v{round}");
        flood.wait_for_progress(10);
        let up = home.command(&["up", "--json"]).env(VERSION, &version).output().unwrap();
        assert!(up.status.success(), "{}", String::from_utf8_lossy(&up.stderr));
        let reported: Value = serde_json::from_slice(&up.stdout).unwrap();
        assert_eq!(reported["outcome"], "upgraded", "{reported}");
        let next = wait_for_version(&home, &version);
        assert_ne!(next, engine);
        assert!(running("_engine").contains(&engine), "the old engine ended before its connections did");
        engine = next;
        // The new engine accepts, while the old ones finish their connections.
        flood.wait_for_progress(10);
        talks.iter_mut().for_each(Conversation::wait_for_progress);
    }
    assert!(first.end().success());
    for talk in talks.drain(..) {
        assert!(talk.end() > 0);
    }
    wait_for_one(&home, engine);
    note!("{} visits during {rounds} upgrades", flood.end());
    rpc::done(&home, &json!({"kind": "shutdown"}));
}

/// The next daemon has another version and is killed at an arbitrary step; the one after it has yet another version.
fn killed_upgrade_refuses_no_connection() {
    let rounds = if is_long() { 300 } else { 15 };
    let home = Home::new();
    let (pair, _inside) = Pair::new();
    let daemon = home.start().variable(VERSION, "v0").wait_until_ready();
    pair.register(&home);
    wait_for_version(&home, "v0");
    let mut moments = Rng::new(seed());
    let flood = Flood::start(BUSY, 2);
    let mut talk = Conversation::start(QUIET, &pair.quiet, seed());
    daemon.kill();
    for round in 1..=rounds {
        let daemon = home.start().variable(VERSION, &format!("v{round}")).spawn();
        std::thread::sleep(Duration::from_micros(moments.below(250_000)));
        daemon.kill();
        flood.wait_for_progress(5);
        talk.wait_for_progress();
    }
    let daemon = home.start().variable(VERSION, "last").wait_until_ready();
    let engine = wait_for_version(&home, "last");
    flood.wait_for_progress(10);
    assert!(talk.end() > 0);
    note!("{} visits while {rounds} upgrades were killed", flood.end());
    wait_for_one(&home, engine);
    daemon.shut_down();
}
