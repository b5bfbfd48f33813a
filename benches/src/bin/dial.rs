//! Measures new connections per second: connect, send one byte, receive the same byte, close; many in flight at a time.
//!
//! `dial --to ADDRESS --in-flight N --seconds S --close fin|rst` prints one JSON object. With `fin` the client closes
//! first and keeps the TIME_WAIT; with `rst` (SO_LINGER of zero) its side leaves no TIME_WAIT behind.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use landfall_benches::{Failure, option, quantile_us};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;

/// A connection without an answer after this time is an error. The kernel retransmits lost SYNs after one second.
const ANSWER_MAX: Duration = Duration::from_secs(5);

struct Plan {
    to: SocketAddr,
    reset: bool,
    until: Instant,
}

#[derive(Default)]
struct Tally {
    latencies: Vec<Duration>,
    errors: u64,
    first_error: Option<String>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Failure> {
    let in_flight: usize = option("--in-flight", "64")?.parse()?;
    let span = Duration::from_secs_f64(option("--seconds", "5")?.parse()?);
    let reset = match option("--close", "fin")?.as_str() {
        "fin" => false,
        "rst" => true,
        other => return Err(format!("--close takes fin or rst, not {other}").into()),
    };
    let start = Instant::now();
    let plan = Rc::new(Plan { to: option("--to", "127.0.0.1:7007")?.parse()?, reset, until: start + span });
    let local = tokio::task::LocalSet::new();
    let dialers: Vec<_> = (0..in_flight).map(|_| local.spawn_local(dial(plan.clone()))).collect();
    let total = local
        .run_until(async {
            let mut total = Tally::default();
            for dialer in dialers {
                let mut tally = dialer.await?;
                total.latencies.append(&mut tally.latencies);
                total.errors += tally.errors;
                total.first_error = total.first_error.or(tally.first_error);
            }
            Ok::<Tally, tokio::task::JoinError>(total)
        })
        .await?;
    report(total, start.elapsed())
}

async fn dial(plan: Rc<Plan>) -> Tally {
    let mut tally = Tally::default();
    let mut number: u8 = 0;
    while Instant::now() < plan.until {
        let start = Instant::now();
        number = number.wrapping_add(1);
        let outcome = tokio::time::timeout(ANSWER_MAX, once(&plan, number)).await;
        match outcome.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            Ok(()) => tally.latencies.push(start.elapsed()),
            Err(error) => {
                tally.errors += 1;
                tally.first_error.get_or_insert_with(|| error.to_string());
            }
        }
    }
    tally
}

async fn once(plan: &Plan, number: u8) -> io::Result<()> {
    let mut stream = TcpSocket::new_v4()?.connect(plan.to).await?;
    stream.set_nodelay(true)?;
    stream.write_all(&[number]).await?;
    let mut byte = [0];
    stream.read_exact(&mut byte).await?;
    if byte != [number] {
        return Err(io::Error::other(format!("byte {number} came back as {}", byte[0])));
    }
    if plan.reset {
        rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO))?;
    }
    Ok(())
}

fn report(mut total: Tally, elapsed: Duration) -> Result<(), Failure> {
    total.latencies.sort_unstable();
    let count = u32::try_from(total.latencies.len())?;
    let report = serde_json::json!({
        "connections": count,
        "seconds": elapsed.as_secs_f64(),
        "per_second": f64::from(count) / elapsed.as_secs_f64(),
        "p50_us": quantile_us(&total.latencies, 50, 100),
        "p99_us": quantile_us(&total.latencies, 99, 100),
        "errors": total.errors,
        "first_error": total.first_error,
    });
    Ok(writeln!(io::stdout(), "{report}")?)
}
