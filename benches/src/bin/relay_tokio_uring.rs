//! A relay on tokio-uring: `relay_tokio_uring --netns PATH PORT...`.

use std::io;
use std::net::{Shutdown, SocketAddr};

use landfall_benches::{BUFFER_BYTES, Failure, listen_then_enter, same_address};
use tokio_uring::buf::BoundedBuf;
use tokio_uring::net::{TcpListener, TcpStream};

fn main() -> Result<(), Failure> {
    let listeners = listen_then_enter()?;
    tokio_uring::start(async {
        let mut accepting = Vec::new();
        for listener in listeners {
            let to = same_address(&listener)?;
            // The ring waits for submitted operations; on a non-blocking descriptor they would fail instead.
            listener.set_nonblocking(false)?;
            accepting.push(tokio_uring::spawn(accept(TcpListener::from_std(listener), to)));
        }
        for task in accepting {
            task.await??;
        }
        Ok(())
    })
}

async fn accept(listener: TcpListener, to: SocketAddr) -> io::Result<()> {
    loop {
        let (downstream, _) = listener.accept().await?;
        tokio_uring::spawn(relay(downstream, to));
    }
}

async fn relay(downstream: TcpStream, to: SocketAddr) -> io::Result<()> {
    let upstream = TcpStream::connect(to).await?;
    upstream.set_nodelay(true)?;
    let (up, down) = tokio::join!(copy(&downstream, &upstream), copy(&upstream, &downstream));
    up.and(down)
}

async fn copy(from: &TcpStream, to: &TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let (read, filled) = from.read(buffer).await;
        let bytes = read?;
        if bytes == 0 {
            return to.shutdown(Shutdown::Write);
        }
        let (written, slice) = to.write_all(filled.slice(..bytes)).await;
        written?;
        buffer = slice.into_inner();
    }
}
