//! The time until a server answers on the host: after `docker start`, and after it listens. Reported without a limit,
//! because other processes share the machine.

use std::time::{Duration, Instant};

use landfall_tests::case::Case;
use landfall_tests::latency::{from_listen_to_first_byte, percentiles};
use landfall_tests::{Home, Namespace, is_long, note};

use super::engine::{Engine, answers, page, refuses, until, up};

pub(crate) const CASES: &[Case] = &[Case::once("latency_until_a_server_answers", latency)];

const PORT: u16 = 3000;
/// The first of as many ports as there are rounds.
const LISTENS: u16 = 4000;
/// The pause between two rounds.
const REST: Duration = Duration::from_millis(25);

fn latency() {
    let rounds = if is_long() { 50 } else { 10 };
    let home = Home::new();
    let engine = Engine::start(&home, &["base"]);
    up(&home, &[]);
    engine.serve("server", PORT, &[]);
    answers(PORT, "server");

    // From the request of a user to the first byte; and Docker's own part of that.
    let (mut firsts, mut dockers) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        engine.docker(&["kill", "server"]);
        refuses(PORT);
        let asked = Instant::now();
        let visitor = std::thread::spawn(move || {
            until("the first byte", || page(PORT, 0).map_err(|error| error.to_string()));
            asked.elapsed()
        });
        engine.docker(&["start", "server"]);
        dockers.push(asked.elapsed());
        firsts.push(visitor.join().unwrap());
    }
    note!("from `docker start` to the first byte: {}", percentiles(firsts));
    note!("of which `docker start` itself took: {}", percentiles(dockers));

    let inside = Namespace::of(engine.first_process("server"));
    let firsts = from_listen_to_first_byte(&inside, LISTENS..LISTENS + 50, REST);
    note!("from listen() inside to the first byte outside: {}", percentiles(firsts));
}
