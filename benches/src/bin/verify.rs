//! Proves that a relay delivers every byte in order: `verify --serve PORT` inside, `verify --to ADDRESS` on the host.
//!
//! Each of the parallel connections carries a known pattern in both directions at once. The server answers with one byte of
//! approval after it has compared every byte, and the client then closes. The amount is large enough for a relay to change
//! to its method for bulk. The exchange needs no half-close, which the WebSocket protocol of the reference does not have.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use landfall_benches::{Failure, option};
use landfall_pattern::Pattern;

/// Bytes in each direction of each connection.
const STREAM_BYTES: u64 = 4 * 1024 * 1024;
/// Bytes of one read or write.
const PIECE_BYTES: usize = 256 * 1024;
/// A peer that is silent for this long has failed.
const SILENCE_MAX: Duration = Duration::from_secs(20);
const APPROVAL: u8 = b'.';

fn main() -> Result<(), Failure> {
    let port = option("--serve", "")?;
    if port.is_empty() { dial() } else { serve(port.parse()?) }
}

fn serve(port: u16) -> Result<(), Failure> {
    let listener = landfall_benches::listen(port)?;
    listener.set_nonblocking(false)?;
    for stream in listener.incoming() {
        let stream = stream?;
        // An error closes the connection without the approval, which the client reports.
        thread::spawn(move || answer(stream));
    }
    Ok(())
}

fn answer(mut stream: TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(SILENCE_MAX))?;
    let mut number = [0];
    stream.read_exact(&mut number)?;
    let sending = send(stream.try_clone()?, from_server(number[0]));
    receive(&mut stream, from_client(number[0]))?;
    join(sending)?;
    stream.write_all(&[APPROVAL])?;
    stream.read(&mut [0]).map(drop)
}

fn dial() -> Result<(), Failure> {
    let to: SocketAddr = option("--to", "127.0.0.1:7008")?.parse()?;
    let streams: u8 = option("--streams", "8")?.parse()?;
    let start = Instant::now();
    let running: Vec<_> = (0..streams).map(|number| thread::spawn(move || exchange(to, number))).collect();
    for (number, stream) in running.into_iter().enumerate() {
        join(stream).map_err(|error| format!("connection {number}: {error}"))?;
    }
    let seconds = start.elapsed().as_secs_f64();
    let report = serde_json::json!({ "bytes": u64::from(streams) * 2 * STREAM_BYTES, "seconds": seconds });
    Ok(writeln!(io::stdout(), "{report}")?)
}

fn exchange(to: SocketAddr, number: u8) -> io::Result<()> {
    let mut stream = TcpStream::connect(to)?;
    stream.set_read_timeout(Some(SILENCE_MAX))?;
    stream.write_all(&[number])?;
    let sending = send(stream.try_clone()?, from_client(number));
    receive(&mut stream, from_server(number))?;
    join(sending)?;
    let mut verdict = [0];
    stream
        .read_exact(&mut verdict)
        .map_err(|error| io::Error::other(format!("no approval of the server: {error}")))?;
    stream.shutdown(Shutdown::Write)?;
    if verdict == [APPROVAL] && stream.read(&mut verdict)? == 0 {
        Ok(())
    } else {
        Err(io::Error::other("bytes after the last one"))
    }
}

fn from_client(number: u8) -> Pattern {
    Pattern::new(u64::from(number))
}

fn from_server(number: u8) -> Pattern {
    Pattern::new(u64::from(number) + 256)
}

fn send(mut stream: TcpStream, pattern: Pattern) -> thread::JoinHandle<io::Result<()>> {
    thread::spawn(move || {
        let mut piece = vec![0; PIECE_BYTES];
        for position in (0..STREAM_BYTES).step_by(PIECE_BYTES) {
            pattern.fill(position, &mut piece);
            stream.write_all(&piece)?;
        }
        Ok(())
    })
}

fn receive(stream: &mut TcpStream, pattern: Pattern) -> io::Result<()> {
    let (mut piece, mut expected) = (vec![0; PIECE_BYTES], vec![0; PIECE_BYTES]);
    for position in (0..STREAM_BYTES).step_by(PIECE_BYTES) {
        stream.read_exact(&mut piece)?;
        pattern.fill(position, &mut expected);
        if piece != expected {
            return Err(io::Error::other(format!("wrong bytes after position {position}")));
        }
    }
    Ok(())
}

fn join(running: thread::JoinHandle<io::Result<()>>) -> io::Result<()> {
    running.join().unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))
}
