//! A relay on monoio's io_uring driver: `relay_monoio --netns PATH PORT...`.

use std::io;
use std::net::SocketAddr;

use landfall_benches::{BUFFER_BYTES, Failure, listen_then_enter, same_address};
use monoio::buf::IoBufMut;
use monoio::io::{AsyncReadRent, AsyncWriteRent, AsyncWriteRentExt, Splitable};
use monoio::net::{TcpListener, TcpStream};

fn main() -> Result<(), Failure> {
    let listeners = listen_then_enter()?;
    let mut runtime = monoio::RuntimeBuilder::<monoio::IoUringDriver>::new().build()?;
    runtime.block_on(async {
        let mut accepting = Vec::new();
        for listener in listeners {
            let to = same_address(&listener)?;
            accepting.push(monoio::spawn(accept(TcpListener::from_std(listener)?, to)));
        }
        for task in accepting {
            task.await?;
        }
        Ok(())
    })
}

async fn accept(listener: TcpListener, to: SocketAddr) -> io::Result<()> {
    loop {
        let (downstream, _) = listener.accept().await?;
        monoio::spawn(relay(downstream, to));
    }
}

async fn relay(downstream: TcpStream, to: SocketAddr) -> io::Result<()> {
    let upstream = TcpStream::connect_addr(to).await?;
    upstream.set_nodelay(true)?;
    let (mut client_read, mut client_write) = downstream.into_split();
    let (mut server_read, mut server_write) = upstream.into_split();
    let (up, down) =
        monoio::join!(copy(&mut client_read, &mut server_write), copy(&mut server_read, &mut client_write));
    up.and(down)
}

async fn copy(from: &mut impl AsyncReadRent, to: &mut impl AsyncWriteRent) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let (read, filled) = from.read(buffer).await;
        let bytes = read?;
        if bytes == 0 {
            return to.shutdown().await;
        }
        let (written, slice) = to.write_all(filled.slice_mut(..bytes)).await;
        written?;
        buffer = slice.into_inner();
    }
}
