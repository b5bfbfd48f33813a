//! Two TCP sockets of this machine that are connected to each other: one for the engine, which relays a client to it, and
//! one for the pump.
//!
//! TCP and not a Unix pair, because only TCP can pass a reset on. The daemon's end is set to reset when it is closed
//! (`SO_LINGER` with no time; socket(7)), so that what a daemon that is killed leaves behind never looks like a clean end:
//! an orderly end is a FIN first, which whoever relays sends.
//!
//! Any process of this machine can connect to the listener, which lives on loopback. Such connections are closed: what is
//! handed out is the one whose address is that of the socket that connected here.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Duration;

use landfall_engine::sys::tune;
use rustix::net::sockopt;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::Mutex;
use tokio::time::timeout;

/// What one end may hold for the other, in bytes; the kernel doubles it for its own account (socket(7)).
const BUFFER_BYTES: usize = 512 * 1024;
/// How long connecting to ourselves may take. Strangers may have filled the listener's queue; a new one has none.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(2);
const BACKLOG: u32 = 256;

/// Makes pairs.
#[derive(Debug, Default)]
pub struct Pairs {
    listener: Mutex<Option<TcpListener>>,
}

impl Pairs {
    /// Makes none yet.
    #[must_use]
    pub fn new() -> Pairs {
        Pairs::default()
    }

    /// A pair: the engine's end, and ours.
    ///
    /// # Errors
    /// No descriptors, no ports, no loopback, or strangers that keep the listener busy.
    pub async fn pair(&self) -> io::Result<(OwnedFd, TcpStream)> {
        // One at a time: whoever accepts must not take the other's.
        let mut listener = self.listener.lock().await;
        let current = match listener.take() {
            Some(current) => current,
            None => listen()?,
        };
        // Left out of its place while it is used: where that fails or is given up, the next pair has a new one.
        let made = timeout(CONNECT_TIME_MAX, connect(&current)).await??;
        *listener = Some(current);
        Ok(made)
    }
}

fn listen() -> io::Result<TcpListener> {
    let socket = TcpSocket::new_v4()?;
    prepare(&socket)?;
    socket.bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
    socket.listen(BACKLOG)
}

async fn connect(listener: &TcpListener) -> io::Result<(OwnedFd, TcpStream)> {
    let socket = TcpSocket::new_v4()?;
    prepare(&socket)?;
    let theirs = socket.connect(listener.local_addr()?).await?;
    let address = theirs.local_addr()?;
    loop {
        let (ours, from) = listener.accept().await?;
        if from == address {
            sockopt::set_tcp_nodelay(&ours, true)?;
            sockopt::set_socket_linger(&ours, Some(Duration::ZERO))?;
            return Ok((theirs.into_std()?.into(), ours));
        }
    }
}

/// An accepted socket takes these over from its listener, except for `TCP_NODELAY`.
fn prepare(socket: &TcpSocket) -> io::Result<()> {
    sockopt::set_socket_send_buffer_size(socket, BUFFER_BYTES)?;
    sockopt::set_socket_recv_buffer_size(socket, BUFFER_BYTES)?;
    tune(socket);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    fn blocking(end: OwnedFd) -> std::net::TcpStream {
        let end = std::net::TcpStream::from(end);
        end.set_nonblocking(false).unwrap();
        end
    }

    #[tokio::test]
    async fn both_ends_are_connected_to_each_other() {
        let pairs = Pairs::new();
        let (theirs, mut ours) = pairs.pair().await.unwrap();
        let mut theirs = blocking(theirs);
        ours.write_all(b"down").await.unwrap();
        theirs.write_all(b"up").unwrap();
        let mut four = [0; 4];
        theirs.read_exact(&mut four).unwrap();
        assert_eq!(&four, b"down");
        let mut two = [0; 2];
        ours.read_exact(&mut two).await.unwrap();
        assert_eq!(&two, b"up");
    }

    #[tokio::test]
    async fn our_end_resets_when_it_is_closed_without_a_fin() {
        let (theirs, ours) = Pairs::new().pair().await.unwrap();
        drop(ours);
        let error = blocking(theirs).read(&mut [0; 1]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn strangers_at_the_listener_are_closed() {
        let pairs = Pairs::new();
        drop(pairs.pair().await.unwrap());
        let address = pairs.listener.lock().await.as_ref().unwrap().local_addr().unwrap();
        let mut stranger = std::net::TcpStream::connect(address).unwrap();
        let (theirs, ours) = pairs.pair().await.unwrap();
        assert_eq!(ours.peer_addr().unwrap(), blocking(theirs).local_addr().unwrap());
        assert_eq!(stranger.read(&mut [0; 1]).unwrap(), 0);
    }
}
