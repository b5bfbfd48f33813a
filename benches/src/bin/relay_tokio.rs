//! A relay on tokio's single-threaded runtime with `copy_bidirectional`: `relay_tokio --netns PATH PORT...`.

use std::io;
use std::net::SocketAddr;

use landfall_benches::{BUFFER_BYTES, Failure, listen_then_enter, same_address};
use tokio::net::{TcpListener, TcpStream};

fn main() -> Result<(), Failure> {
    let listeners = listen_then_enter()?;
    // The runtime has no other thread, so it creates every later socket inside.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    runtime.block_on(async {
        let mut accepting = tokio::task::JoinSet::new();
        for listener in listeners {
            let to = same_address(&listener)?;
            let listener = TcpListener::from_std(listener)?;
            accepting.spawn(accept(listener, to));
        }
        match accepting.join_next().await {
            Some(ended) => Ok(ended??),
            None => Ok(()),
        }
    })
}

async fn accept(listener: TcpListener, to: SocketAddr) -> io::Result<()> {
    loop {
        let (downstream, _) = listener.accept().await?;
        tokio::spawn(relay(downstream, to));
    }
}

async fn relay(mut downstream: TcpStream, to: SocketAddr) -> io::Result<()> {
    let mut upstream = TcpStream::connect(to).await?;
    upstream.set_nodelay(true)?;
    tokio::io::copy_bidirectional_with_sizes(&mut downstream, &mut upstream, BUFFER_BYTES, BUFFER_BYTES)
        .await?;
    Ok(())
}
