//! Claim 1: every byte arrives once, in order.

use std::net::TcpStream;
use std::path::PathBuf;
use std::time::Duration;

use landfall_engine::RingChoice;
use landfall_engine::command::{Ending, Family};
use landfall_engine::limits::Limits;
use landfall_tests::case::Case;
use landfall_tests::{End, Pattern, Relay, Rng, Server, connect, finish, is_long, note, read_to_end, seed};

pub(crate) const CASES: &[Case] = &[
    Case::each_ring("c01_every_byte_arrives_once_in_order", every_byte_arrives_once_in_order),
    Case::each_ring("c01_shards_share_the_connections", shards_share_the_connections),
];

/// The number of concurrent streams.
const AT_ONCE: u64 = 20;

pub(crate) fn every_byte_arrives_once_in_order(ring: RingChoice) {
    relay_streams(Relay::start(ring));
}

/// One shard accepts, and each shard gets a share of the connections.
fn shards_share_the_connections(ring: RingChoice) {
    let mut relay = relay_streams(Relay::start_with(Limits { shards: 3, ..Limits::default() }, ring));
    let work: Vec<u64> = threads_named("landfall-shard").into_iter().map(run_time).collect();
    assert_eq!(work.len(), 3);
    let most = work.iter().max().unwrap();
    assert!(work.iter().all(|part| part * 10 > *most), "nanoseconds of each shard: {work:?}");
    // Every shard has counted, and the engine reports the sum.
    let forward = relay.driver.describe().first().unwrap().clone();
    let stats = relay.driver.close(forward.forward, Ending::Drain);
    assert_eq!(stats, forward.stats);
}

fn threads_named(name: &str) -> Vec<PathBuf> {
    let threads = std::fs::read_dir("/proc/self/task").unwrap().map(|thread| thread.unwrap().path());
    threads.filter(|path| std::fs::read_to_string(path.join("comm")).unwrap().starts_with(name)).collect()
}

/// Returns how long a thread has run, in nanoseconds (`/proc/PID/task/TID/schedstat`, its first number).
fn run_time(thread: PathBuf) -> u64 {
    let schedstat = std::fs::read_to_string(thread.join("schedstat")).unwrap();
    schedstat.split(' ').next().unwrap().parse().unwrap()
}

fn relay_streams(mut relay: Relay) -> Relay {
    let count = if is_long() { 1000 } else { 200 };
    let server = Server::listen(&relay.inside, "[::]:0");
    let forward = relay.forward(server.port());
    let mut bytes = [0; 2];
    for batch in 0..count / AT_ONCE {
        std::thread::scope(|scope| {
            let mut running = Vec::new();
            for index in 0..AT_ONCE {
                let seed = seed() ^ ((batch * AT_ONCE + index) << 32);
                let family = Family::ALL[(seed >> 32) as usize % 2];
                // Connected and accepted one by one, so that the two ends of a connection can be matched.
                let client = connect(forward.at(family));
                let accepted = server.accept();
                running.push((scope.spawn(move || duplex(client, seed, 1)), 0));
                running.push((scope.spawn(move || duplex(accepted, seed, 0)), 1));
            }
            for (end, direction) in running {
                bytes[direction] += end.join().unwrap();
            }
        });
    }
    let stats = relay.stats_become(forward, "every connection to have completed", |stats| stats.open == 0);
    assert_eq!(stats.completed, count, "{stats:?}");
    assert_eq!([stats.bytes_up, stats.bytes_down], [bytes[1], bytes[0]], "{stats:?}");
    note!("{count} streams, {} MB up, {} MB down", bytes[1] / 1_000_000, bytes[0] / 1_000_000);
    relay
}

/// One end of a stream: sends its own pattern and a FIN while it checks the other's. Returns how many bytes it received.
fn duplex(stream: TcpStream, seed: u64, end: u64) -> u64 {
    std::thread::scope(|scope| {
        let sending = scope.spawn(|| send_in_fits(&stream, seed ^ end));
        let mut checker = Pattern::new(seed ^ end ^ 1).checker();
        let mut rng = Rng::new(seed ^ end ^ 2);
        // Some ends do not read for a while, so that bytes queue up for them.
        if rng.one_in(4) {
            pause(&mut rng);
        }
        let ended = read_to_end(&stream, &mut checker);
        assert_eq!(ended, End::Eof, "stream {seed:#x}, byte {}", checker.position());
        let length = Rng::new(seed ^ end ^ 1).length(LENGTH_MAX) as u64;
        assert_eq!(checker.position(), length, "stream {seed:#x} ended early or late");
        sending.join().unwrap();
        length
    })
}

const LENGTH_MAX: usize = 4 * 1024 * 1024;

/// Sends a whole pattern in pieces of random sizes, with pauses, then a FIN. The first number of the seed is its length.
fn send_in_fits(mut stream: &TcpStream, seed: u64) {
    use std::io::Write;
    let mut rng = Rng::new(seed);
    let length = rng.length(LENGTH_MAX) as u64;
    let mut position = 0;
    let mut buffer = Vec::new();
    while position < length {
        let piece = (1 + rng.length(512 * 1024) as u64).min(length - position);
        buffer.resize(usize::try_from(piece).unwrap(), 0);
        Pattern::new(seed).fill(position, &mut buffer);
        stream.write_all(&buffer).unwrap();
        position += piece;
        if rng.one_in(8) {
            pause(&mut rng);
        }
    }
    finish(stream);
}

/// A pause of a random length: a part of the load, not a wait for a state.
fn pause(rng: &mut Rng) {
    std::thread::sleep(Duration::from_micros(rng.below(4000)));
}
