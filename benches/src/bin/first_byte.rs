//! Measures the time from `listen()` inside to the first byte at a client outside.
//!
//! `first_byte --inside NETNS --seconds S --listeners N` prints one JSON object. A thread inside calls `listen()` at a new
//! port and sends one byte to the connection that it accepts. The main thread connects to the same port outside, again and
//! again, until it receives that byte. It repeats this for S seconds and for at least N listeners. The pause between two
//! listeners is random, so that a relay which scans at an interval is measured in every phase of it.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use landfall_benches::{Failure, enter, listen, option, quantile_us};
use landfall_pattern::Rng;

/// The ports of the listeners, used once each: above the privileged ones, below the ephemeral range and apart from the
/// servers of the other measurements.
const PORTS: std::ops::Range<u16> = 2000..5000;
/// The pause between two attempts to connect.
const ATTEMPT_PAUSE: Duration = Duration::from_micros(50);
/// A relay that has not forwarded a listener after this time has failed.
const FORWARD_MAX: Duration = Duration::from_secs(10);
/// The longest pause between two listeners.
const PAUSE_MAX_MS: u64 = 40;

fn main() -> Result<(), Failure> {
    let inside = PathBuf::from(option("--inside", "/proc/self/ns/net")?);
    let span = Duration::from_secs_f64(option("--seconds", "5")?.parse()?);
    let listeners: usize = option("--listeners", "10")?.parse()?;
    let (ask, asked) = sync_channel(0);
    let (answer, answers) = sync_channel(0);
    thread::spawn(move || serve(&inside, &asked, &answer));
    let mut random = Rng::new(std::process::id().into());
    let mut latencies = Vec::new();
    let start = Instant::now();
    for port in PORTS {
        if start.elapsed() > span && latencies.len() >= listeners {
            break;
        }
        ask.send(port)?;
        let listening_since = answers.recv()??;
        await_byte(port, listening_since).map_err(|error| format!("port {port}: {error}"))?;
        latencies.push(listening_since.elapsed());
        thread::sleep(Duration::from_millis(random.below(PAUSE_MAX_MS)));
    }
    latencies.sort_unstable();
    let report = serde_json::json!({
        "listeners": latencies.len(),
        "p50_us": quantile_us(&latencies, 50, 100),
        "p99_us": quantile_us(&latencies, 99, 100),
    });
    Ok(writeln!(io::stdout(), "{report}")?)
}

/// Opens one listener for each port that arrives and reports the time of its `listen()`.
fn serve(inside: &std::path::Path, ports: &Receiver<u16>, started: &SyncSender<Result<Instant, String>>) {
    let entered = enter(inside).map_err(|error| error.to_string());
    while let Ok(port) = ports.recv() {
        let now = Instant::now();
        match entered.clone().and_then(|()| listen(port).map_err(|error| error.to_string())) {
            Ok(listener) => {
                if started.send(Ok(now)).is_err() || send_byte(&listener, port).is_err() {
                    return;
                }
            }
            Err(error) => {
                let _ = started.send(Err(error));
                return;
            }
        }
    }
}

/// Sends the byte of `port` to connections until a client closes one of them, which is the proof that it has the byte.
fn send_byte(listener: &TcpListener, port: u16) -> io::Result<()> {
    listener.set_nonblocking(false)?;
    loop {
        let (mut stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(FORWARD_MAX))?;
        if stream.write_all(&[byte_of(port)]).is_ok() && stream.read(&mut [0]).is_ok_and(|bytes| bytes == 1) {
            return Ok(());
        }
    }
}

/// Connects until a connection brings the byte of `port`, then acknowledges it with one byte.
fn await_byte(port: u16, listening_since: Instant) -> Result<(), Failure> {
    let address = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::LOCALHOST, port));
    loop {
        let mut byte = [0];
        let received = TcpStream::connect(address).and_then(|mut stream| {
            stream.set_read_timeout(Some(FORWARD_MAX))?;
            stream.read_exact(&mut byte)?;
            stream.write_all(&[0])
        });
        match received {
            Ok(()) if byte == [byte_of(port)] => return Ok(()),
            Ok(()) => return Err("the byte of another listener arrived".into()),
            Err(error) if listening_since.elapsed() > FORWARD_MAX => return Err(error.into()),
            Err(_) => thread::sleep(ATTEMPT_PAUSE),
        }
    }
}

fn byte_of(port: u16) -> u8 {
    port.to_be_bytes()[1]
}
