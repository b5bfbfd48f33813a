//! Round trips of a small message on one connection: `ping --to ADDRESS --bytes N --seconds S` prints one JSON object.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use landfall_benches::{Failure, option, quantile_us};

/// Round trips that do not count: the relay makes its buffers, the caches fill.
const WARM_UP: u32 = 200;

fn main() -> Result<(), Failure> {
    let to: SocketAddr = option("--to", "127.0.0.1:7007")?.parse()?;
    let bytes = option("--bytes", "64")?.parse()?;
    let span = Duration::from_secs_f64(option("--seconds", "5")?.parse()?);
    let mut stream = TcpStream::connect(to)?;
    stream.set_nodelay(true)?;
    let mut message = vec![b'x'; bytes];
    for _ in 0..WARM_UP {
        round_trip(&mut stream, &mut message)?;
    }
    let mut latencies = Vec::new();
    let start = Instant::now();
    while start.elapsed() < span {
        let before = Instant::now();
        round_trip(&mut stream, &mut message)?;
        latencies.push(before.elapsed());
    }
    latencies.sort_unstable();
    let report = serde_json::json!({
        "round_trips": latencies.len(),
        "p50_us": quantile_us(&latencies, 50, 100),
        "p99_us": quantile_us(&latencies, 99, 100),
        "p999_us": quantile_us(&latencies, 999, 1000),
    });
    Ok(writeln!(std::io::stdout(), "{report}")?)
}

fn round_trip(stream: &mut TcpStream, message: &mut [u8]) -> std::io::Result<()> {
    stream.write_all(message)?;
    stream.read_exact(message)
}
