//! Measures round trips of a small message on one connection: `ping --to ADDRESS --bytes N --seconds S` prints one JSON
//! object. Each message differs from the one before it, and each answer is compared with its message.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use landfall_benches::{Failure, option, quantile_us};

/// Round trips before the measurement, in which the relay allocates its buffers and the caches fill.
const WARM_UP: u8 = 200;

fn main() -> Result<(), Failure> {
    let to: SocketAddr = option("--to", "127.0.0.1:7007")?.parse()?;
    let bytes = option("--bytes", "64")?.parse()?;
    let span = Duration::from_secs_f64(option("--seconds", "5")?.parse()?);
    let stream = TcpStream::connect(to)?;
    stream.set_nodelay(true)?;
    let mut peer = Peer { stream, message: vec![0; bytes], answer: vec![0; bytes] };
    for number in 0..WARM_UP {
        peer.round_trip(number)?;
    }
    let mut latencies = Vec::new();
    let mut number = WARM_UP;
    let start = Instant::now();
    while start.elapsed() < span {
        number = number.wrapping_add(1);
        let before = Instant::now();
        peer.round_trip(number)?;
        latencies.push(before.elapsed());
    }
    latencies.sort_unstable();
    let report = serde_json::json!({
        "round_trips": latencies.len(),
        "p50_us": quantile_us(&latencies, 50, 100),
        "p99_us": quantile_us(&latencies, 99, 100),
        "p999_us": quantile_us(&latencies, 999, 1000),
    });
    Ok(writeln!(io::stdout(), "{report}")?)
}

struct Peer {
    stream: TcpStream,
    message: Vec<u8>,
    answer: Vec<u8>,
}

impl Peer {
    fn round_trip(&mut self, number: u8) -> io::Result<()> {
        self.message.fill(number);
        self.stream.write_all(&self.message)?;
        self.stream.read_exact(&mut self.answer)?;
        if self.answer == self.message {
            Ok(())
        } else {
            Err(io::Error::other("the answer differs from the message"))
        }
    }
}
