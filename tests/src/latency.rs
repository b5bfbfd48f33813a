//! Latency measurements: reported, without a pass or fail limit, because other processes share the machine.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::ops::Range;
use std::time::{Duration, Instant};

use crate::{Namespace, Server, TIMEOUT};

/// Measures, for each of these ports in turn, the time from the return of `listen(2)` inside to the first byte outside. A
/// port of an earlier measurement may still have a late client, so use each port once. Between two ports the case pauses for
/// one to two times `rest`, never twice the same, so that the pauses do not synchronise with the engine's scans.
///
/// # Panics
/// If a port never answers.
#[must_use]
pub fn from_listen_to_first_byte(inside: &Namespace, ports: Range<u16>, rest: Duration) -> Vec<Duration> {
    let first_byte = |port: u16| {
        std::thread::sleep(rest + rest * u32::from(port % 16) / 16);
        let server = Server::listen(inside, &format!("127.0.0.1:{port}"));
        let listens = Instant::now();
        // More often than `wait_until` polls, because its interval would dominate the measurement.
        let mut client = loop {
            match TcpStream::connect((Ipv4Addr::LOCALHOST, port)) {
                Ok(client) => break client,
                Err(error) => assert!(listens.elapsed() < TIMEOUT, "port {port}: {error}"),
            }
            std::thread::sleep(Duration::from_micros(100));
        };
        client.set_read_timeout(Some(TIMEOUT)).unwrap();
        server.accept().write_all(b"x").unwrap();
        client.read_exact(&mut [0]).unwrap();
        listens.elapsed()
    };
    ports.map(first_byte).collect()
}

/// Returns the median and the 99th percentile, in milliseconds.
///
/// # Panics
/// If `times` is empty.
#[must_use]
pub fn percentiles(mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    let at = |share: usize| times[(times.len() * share).div_ceil(100) - 1].as_secs_f64() * 1000.0;
    format!("p50 {:.1} ms, p99 {:.1} ms of {}", at(50), at(99), times.len())
}
