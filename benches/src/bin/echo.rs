//! Echo server on one thread: `echo PORT`. The server of the ping and connect measurements.

use landfall_benches::Failure;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Failure> {
    let port = std::env::args().nth(1).ok_or("usage: echo PORT")?.parse()?;
    let listener = TcpListener::from_std(landfall_benches::listen(port)?)?;
    loop {
        let (stream, _) = listener.accept().await?;
        // The client of a broken connection counts the error; the server ignores it.
        tokio::spawn(echo(stream));
    }
}

async fn echo(mut stream: TcpStream) -> std::io::Result<()> {
    let mut buffer = [0; 256];
    loop {
        match stream.read(&mut buffer).await? {
            0 => return Ok(()),
            bytes => stream.write_all(&buffer[..bytes]).await?,
        }
    }
}
