//! Docker engine, daemon and relay end and restart in any order; the others continue in the meantime, and in the end every
//! forward is right.

use std::sync::atomic::AtomicBool;

use landfall_tests::case::Case;
use landfall_tests::process::{kill, running};
use landfall_tests::{Home, note};
use rustix::process::Signal;

use super::engine::{
    Engine, Held, answers, described, is_open, refuses, up, wait_for_openers, wait_until_idle,
};
use super::lifecycle::{StopOnDrop, Visitors};

pub(crate) const CASES: &[Case] = &[
    Case::once("a_docker_restart_with_live_restore_affects_no_connection", live_restore),
    Case::once(
        "containers_are_forwarded_again_after_a_docker_restart_without_live_restore",
        without_live_restore,
    ),
    Case::once("forwards_recover_after_docker_daemon_and_relay_are_killed", all_killed),
];

const PORTS: [(&str, u16); 2] = [("one", 3000), ("two", 3001)];

#[track_caller]
fn serve_both(home: &Home, engine: &Engine<'_>, options: &[&str]) -> Held {
    up(home, &[]);
    let before = wait_until_idle(home, engine);
    for (name, port) in PORTS {
        engine.serve(name, port, options);
        answers(port, name);
        is_open(home, name, &[port]);
    }
    before
}

#[track_caller]
fn assert_all_forwarded(home: &Home) {
    for (name, port) in PORTS {
        answers(port, name);
        is_open(home, name, &[port]);
    }
    wait_for_openers(home, PORTS.len());
}

#[track_caller]
fn assert_released(home: &Home, engine: &Engine<'_>, before: &Held) {
    PORTS.iter().for_each(|(name, _)| drop(engine.docker(&["rm", "-f", name])));
    before.wait_until_released(home);
}

fn live_restore() {
    const KEEPS: &[&str] = &["--live-restore"];
    let home = Home::new();
    let mut engine = Engine::start_with(&home, &["base"], KEEPS);
    let before = serve_both(&home, &engine, &[]);
    let pid = engine.first_process("one");
    let over = AtomicBool::new(false);
    let visitors = Visitors::new(&over);
    std::thread::scope(|scope| {
        let over = StopOnDrop(&over);
        scope.spawn(|| visitors.connect_until_stopped(3000, "one"));
        for signal in [Signal::TERM, Signal::KILL] {
            engine.end(signal);
            visitors.wait_for_progress();
            engine.start_dockerd(KEEPS);
            assert_eq!(engine.first_process("one"), pid, "the engine did not keep its containers");
            visitors.wait_for_progress();
        }
        // Events after the outage are received again.
        engine.docker(&["restart", "-t", "0", "two"]);
        is_open(&home, "two", &[3001]);
        answers(3001, "two");
        drop(over);
    });
    assert_eq!(visitors.failed(), [""; 0], "visitors noticed");
    assert_all_forwarded(&home);
    assert_released(&home, &engine, &before);
    note!("{} clients, all of them served", visitors.served());
}

fn without_live_restore() {
    let home = Home::new();
    let mut engine = Engine::start(&home, &["base"]);
    let before = serve_both(&home, &engine, &["--restart", "always", "--stop-timeout", "1"]);
    let pid = engine.first_process("one");
    // On SIGTERM, it stops its containers.
    engine.end(Signal::TERM);
    PORTS.iter().for_each(|(_, port)| refuses(*port));
    engine.start_dockerd(&[]);
    assert_all_forwarded(&home);
    assert_ne!(engine.first_process("one"), pid);
    // On SIGKILL, it leaves them running, and stops them when it starts again.
    engine.end(Signal::KILL);
    PORTS.iter().for_each(|(name, port)| answers(*port, name));
    engine.start_dockerd(&[]);
    assert_all_forwarded(&home);
    assert_released(&home, &engine, &before);
}

fn all_killed() {
    let home = Home::new();
    let mut engine = Engine::start(&home, &["base"]);
    let before = serve_both(&home, &engine, &["--restart", "always", "--stop-timeout", "1"]);
    for round in 0..3 {
        let (relay, daemon) = (running("_engine"), running("_hostd"));
        let server = engine.first_process("two");
        assert_eq!((relay.len(), daemon.len()), (1, 1), "{round}: {relay:?} {daemon:?}");
        engine.end(Signal::KILL);
        // Which of them is killed, and which first, matters.
        match round {
            0 => kill(relay[0]),
            1 => kill(daemon[0]),
            _ => [relay[0], daemon[0]].into_iter().for_each(kill),
        }
        if round > 0 {
            // Containers that end while no daemon runs, and Docker cannot be queried.
            kill(server);
            up(&home, &[]);
        }
        engine.start_dockerd(&[]);
        // Docker may treat a container that ended in the meantime as one that a user has stopped. A running container stays
        // as it is.
        engine.docker(&["start", "two"]);
        assert_all_forwarded(&home);
    }
    assert_eq!(described(&home)["containers"].as_array().unwrap().len(), PORTS.len());
    assert_released(&home, &engine, &before);
}
