//! Pairs of connected TCP sockets on this machine: one end for the engine, which relays a client to it, and one end for
//! the pump.
//!
//! They are TCP sockets and not Unix sockets, because only TCP can pass a reset on. The daemon's end is set to reset on
//! close (`SO_LINGER` with zero time; socket(7)), so that the end of a killed daemon never looks orderly: an orderly
//! end is a FIN, which the relaying side sends first.
//!
//! Any process of this machine can connect to the listener, which is on loopback. Such connections are closed: only the
//! connection whose address is that of the socket that connected here is returned.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Duration;

use landfall_engine::sys::tune;
use rustix::net::sockopt;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::Mutex;
use tokio::time::timeout;

/// The size of each buffer in bytes; the kernel doubles it for its bookkeeping (socket(7)).
const BUFFER_BYTES: usize = 512 * 1024;
/// The time limit for connecting to our own listener. Other processes may have filled its queue; a new listener has an
/// empty one.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(2);
const BACKLOG: u32 = 256;

/// Creates pairs, one at a time.
#[derive(Debug, Default)]
pub struct Pairs {
    listener: Mutex<Option<TcpListener>>,
}

impl Pairs {
    /// Returns a factory without a listener; the first pair creates it.
    #[must_use]
    pub fn new() -> Pairs {
        Pairs::default()
    }

    /// Returns a pair: the engine's end and the pump's end.
    ///
    /// # Errors
    /// No descriptors, no ports, no loopback, or other processes that keep the listener's queue full.
    pub async fn pair(&self) -> io::Result<(OwnedFd, TcpStream)> {
        // One pair at a time, so that no call accepts the connection of another one.
        let mut listener = self.listener.lock().await;
        let current = match listener.take() {
            Some(current) => current,
            None => listen()?,
        };
        // The listener is taken out while it is used. If connecting fails or is cancelled, the next pair creates a new
        // listener.
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

/// Sets the options that an accepted socket inherits from its listener; it does not inherit `TCP_NODELAY`.
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
    async fn connections_of_other_processes_are_closed() {
        let pairs = Pairs::new();
        drop(pairs.pair().await.unwrap());
        let address = pairs.listener.lock().await.as_ref().unwrap().local_addr().unwrap();
        let mut other_process = std::net::TcpStream::connect(address).unwrap();
        let (theirs, ours) = pairs.pair().await.unwrap();
        assert_eq!(ours.peer_addr().unwrap(), blocking(theirs).local_addr().unwrap());
        assert_eq!(other_process.read(&mut [0; 1]).unwrap(), 0);
    }
}
