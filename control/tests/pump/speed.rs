//! The speed of streams, alone and in parallel.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use landfall::broker::message::Extensions;
use landfall_pattern::Pattern;

use crate::link::{Link, PATIENCE, Stream};

/// Reads at this rate in bytes per second, and checks every byte.
pub(crate) fn expect_slowly(socket: &TcpStream, seed: u64, bytes: usize, speed: u32) {
    let started = Instant::now();
    let mut found = vec![0; 50_000];
    let mut checker = Pattern::new(seed).checker();
    let mut read = 0;
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    while read < bytes {
        let piece = found.len().min(bytes - read);
        (&*socket).read_exact(&mut found[..piece]).unwrap();
        checker.check(&found[..piece]);
        read += piece;
        let due = Duration::from_secs_f64(read as f64 / f64::from(speed));
        // This is the rate of the reader, not a wait for an event.
        std::thread::sleep(due.saturating_sub(started.elapsed()));
    }
}

/// Bytes per second from server to client, over all `streams` together, and the share of the slowest stream in the
/// mean.
fn downloads(streams: &[Stream], time: Duration) -> (f64, f64) {
    measure(streams.iter().map(|stream| (&stream.server, &stream.client)).collect(), time)
}

fn uploads(streams: &[Stream], time: Duration) -> (f64, f64) {
    measure(streams.iter().map(|stream| (&stream.client, &stream.server)).collect(), time)
}

fn measure(ways: Vec<(&TcpStream, &TcpStream)>, time: Duration) -> (f64, f64) {
    let stop = AtomicBool::new(false);
    let counts: Vec<AtomicU64> = ways.iter().map(|_| AtomicU64::new(0)).collect();
    let mut measured = Vec::new();
    std::thread::scope(|scope| {
        for ((from, to), count) in ways.iter().copied().zip(&counts) {
            let stop = &stop;
            scope.spawn(move || {
                let block = vec![7; 256 * 1024];
                while !stop.load(Ordering::Relaxed) {
                    (&*from).write_all(&block).unwrap();
                }
                // Another value marks the last byte.
                (&*from).write_all(&[1]).unwrap();
            });
            scope.spawn(move || {
                let mut buffer = vec![0; 256 * 1024];
                loop {
                    let bytes = (&*to).read(&mut buffer).unwrap();
                    count.fetch_add(bytes as u64, Ordering::Relaxed);
                    if bytes == 0 || buffer[bytes - 1] == 1 {
                        return;
                    }
                }
            });
        }
        let read = || counts.iter().map(|count| count.load(Ordering::Relaxed)).collect::<Vec<u64>>();
        std::thread::sleep(time / 4);
        let (before, started) = (read(), Instant::now());
        std::thread::sleep(time);
        let (after, elapsed) = (read(), started.elapsed().as_secs_f64());
        measured =
            before.iter().zip(after).map(|(before, after)| (after - before) as f64 / elapsed).collect();
        stop.store(true, Ordering::Relaxed);
    });
    let total: f64 = measured.iter().sum();
    let slowest = measured.iter().copied().fold(f64::INFINITY, f64::min);
    (total, slowest / (total / measured.len() as f64))
}

/// The round trip time of 64 bytes on one stream in parallel with `count` downloads: the median and the 99th
/// percentile.
fn round_trips(count: usize, time: Duration) -> (Duration, Duration) {
    let mut link = Link::new(Extensions::ALL);
    let busy: Vec<Stream> = (0..count).map(|_| link.open()).collect();
    let quiet = link.open();
    let mut taken = Vec::new();
    std::thread::scope(|scope| {
        let answering = scope.spawn(|| {
            let mut question = [0; 64];
            while (&quiet.server).read_exact(&mut question).is_ok() {
                (&quiet.server).write_all(&question).unwrap();
            }
        });
        if count > 0 {
            scope.spawn(|| downloads(&busy, time));
        }
        let begun = Instant::now();
        while begun.elapsed() < time {
            let asked = Instant::now();
            (&quiet.client).write_all(&[7; 64]).unwrap();
            (&quiet.client).read_exact(&mut [0; 64]).unwrap();
            taken.push(asked.elapsed());
        }
        quiet.client.shutdown(std::net::Shutdown::Write).unwrap();
        answering.join().unwrap();
    });
    taken.sort_unstable();
    (taken[taken.len() / 2], taken[taken.len() * 99 / 100])
}

/// The speed of one stream while `count` others are full and unread, as a share of its speed just before: the best of
/// several attempts, since the machine runs other programs. Stops at the first attempt that reaches `enough`.
pub(crate) fn beside_stalled(count: usize, time: Duration, enough: f64) -> f64 {
    let mut best: f64 = 0.0;
    for _ in 0..10 {
        let mut link = Link::new(Extensions::ALL);
        let streams = [link.open()];
        let alone = downloads(&streams, time).0;
        let stalled: Vec<Stream> = (0..count).map(|_| link.open()).collect();
        fill(&stalled);
        best = best.max(downloads(&streams, time).0 / alone);
        if best >= enough {
            break;
        }
    }
    best
}

/// Writes to all servers until no write makes progress.
fn fill(streams: &[Stream]) {
    let block = vec![7; 64 * 1024];
    let mut full_since = Instant::now();
    while full_since.elapsed() < Duration::from_millis(200) {
        for mut socket in streams.iter().map(|stream| &stream.server) {
            socket.set_nonblocking(true).unwrap();
            while socket.write(&block).is_ok() {
                full_since = Instant::now();
            }
        }
        std::thread::yield_now();
    }
}

/// Prints the speeds. Without credit no sender is slowed down, so that a slow reader loses its stream and cannot be
/// measured.
#[test]
#[ignore = "a measurement: run it by name, in a release build"]
fn speed() {
    let time = Duration::from_secs(2);
    for (name, mode) in
        [("credit, text", Extensions { binary: false, ..Extensions::ALL }), ("all", Extensions::ALL)]
    {
        for count in [1, 8, 32] {
            let mut link = Link::new(mode);
            let streams: Vec<Stream> = (0..count).map(|_| link.open()).collect();
            let gigabits = |bytes: f64| bytes * 8.0 / 1e9;
            let (down, down_fair) = downloads(&streams, time);
            let (up, up_fair) = uploads(&streams, time);
            eprintln!(
                "{name}, {count} streams: down {:.2} Gb/s (slowest {down_fair:.2} of the mean), up {:.2} Gb/s ({up_fair:.2})",
                gigabits(down),
                gigabits(up),
            );
        }
    }
    for count in [0, 1, 8] {
        let (median, most) = round_trips(count, time);
        eprintln!("64 bytes there and back beside {count} downloads: {median:?}, 99 of 100 within {most:?}");
    }
    eprintln!("200 stalled: {:.2} of the speed alone", beside_stalled(200, time, 1.0));
}
