//! Holds idle connections: `idle --to ADDRESS --connections N` opens them one after the other, receives one byte on each
//! as proof that it is relayed, prints their number, and keeps them open until its standard input ends.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use landfall_benches::{Failure, option};

fn main() -> Result<(), Failure> {
    let to: SocketAddr = option("--to", "127.0.0.1:7007")?.parse()?;
    let connections: usize = option("--connections", "2000")?.parse()?;
    let held = (0..connections).map(|_| open(to)).collect::<std::io::Result<Vec<TcpStream>>>()?;
    writeln!(std::io::stdout(), "{}", serde_json::json!({ "held": held.len() }))?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

fn open(to: SocketAddr) -> std::io::Result<TcpStream> {
    let mut stream = TcpStream::connect(to)?;
    stream.write_all(b"x")?;
    stream.read_exact(&mut [0])?;
    Ok(stream)
}
