//! How soon a server answers on the host: after `docker start`, and after it listens. Told, not judged: the machine has other
//! things to do.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::time::{Duration, Instant};

use landfall_tests::case::Case;
use landfall_tests::{Home, Namespace, PATIENCE, Server, is_long, note};

use super::engine::{Engine, answers, page, refuses, until, up};

pub(crate) const CASES: &[Case] = &[Case::once("how_soon_a_server_answers", latency)];

const PORT: u16 = 3000;
/// The first of as many as there are rounds: a port that was visited before may have a visitor on the way who is too late.
const LISTENS: u16 = 4000;

fn latency() {
    let rounds = if is_long() { 50 } else { 10 };
    let home = Home::new();
    let engine = Engine::start(&home, &["base"]);
    up(&home, &[]);
    engine.serve("server", PORT, &[]);
    answers(PORT, "server");

    // From the moment at which a person asks for it to the first byte; and how much of that is Docker's own.
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
    note!("from `docker start` to the first byte: {}", told(&mut firsts));
    note!("of which `docker start` itself took: {}", told(&mut dockers));

    // From the return of listen(2) inside to the first byte outside.
    let inside = Namespace::of(engine.first_process("server"));
    let mut firsts = Vec::new();
    for port in LISTENS..LISTENS + 50 {
        let server = Server::listen(&inside, &format!("127.0.0.1:{port}"));
        let listens = Instant::now();
        let mut client = until("the port to be had", || TcpStream::connect((Ipv4Addr::LOCALHOST, port)));
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        server.accept().write_all(b"x").unwrap();
        client.read_exact(&mut [0]).unwrap();
        firsts.push(listens.elapsed());
    }
    note!("from listen() inside to the first byte outside: {}", told(&mut firsts));
}

/// The median and the 99th percentile, in milliseconds.
fn told(times: &mut [Duration]) -> String {
    times.sort_unstable();
    let at = |share: usize| times[(times.len() * share).div_ceil(100) - 1].as_secs_f64() * 1000.0;
    format!("p50 {:.1} ms, p99 {:.1} ms of {}", at(50), at(99), times.len())
}
