//! Connections from the agent to servers in the same container: to 127.0.0.1, and to `::1` if 127.0.0.1 fails (wire
//! specification, A.3.6 and A.4: a server that listens only on `::1` is reported as one on 127.0.0.1).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroU16;
use std::time::Duration;

use landfall_engine::sys::tune;
use nix::errno::Errno;
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

/// The time limit of one attempt. On loopback, connecting is slow only if the server's queue is full.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(10);

/// Connects to a port.
///
/// # Errors
/// The error for 127.0.0.1, as a text with its symbolic name.
pub(super) async fn dial(port: NonZeroU16) -> Result<TcpStream, String> {
    let v4 = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port.get());
    let v6 = SocketAddr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), port.get());
    match connect(v4).await {
        Ok(stream) => Ok(stream),
        Err(error) if error.kind() == io::ErrorKind::TimedOut => Err(describe(&error, v4)),
        Err(error) => connect(v6).await.map_err(|_| describe(&error, v4)),
    }
}

async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    tune(&socket);
    let stream = timeout(CONNECT_TIME_MAX, socket.connect(address))
        .await
        .unwrap_or_else(|_| Err(io::Error::from(Errno::ETIMEDOUT)))?;
    // If the port is in the ephemeral range, the kernel may choose it for this socket, which is then connected to
    // itself.
    if stream.local_addr()? == stream.peer_addr()? {
        return Err(io::Error::from(Errno::ECONNREFUSED));
    }
    Ok(stream)
}

fn describe(error: &io::Error, address: SocketAddr) -> String {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(errno) => format!("{errno:?}: {} ({address})", errno.desc()),
        None => format!("{error} ({address})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    fn port(listener: &TcpListener) -> NonZeroU16 {
        NonZeroU16::new(listener.local_addr().unwrap().port()).unwrap()
    }

    #[tokio::test]
    async fn a_server_on_either_loopback_is_reached() {
        for address in ["127.0.0.1:0", "[::1]:0", "0.0.0.0:0"] {
            let listener = TcpListener::bind(address).await.unwrap();
            let (dialled, accepted) = tokio::join!(dial(port(&listener)), listener.accept());
            assert_eq!(dialled.unwrap().local_addr().unwrap(), accepted.unwrap().1);
        }
    }

    #[tokio::test]
    async fn a_port_without_a_listener_is_refused_with_its_error_name() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = port(&listener);
        drop(listener);
        let expected = format!("ECONNREFUSED: Connection refused (127.0.0.1:{port})");
        assert_eq!(dial(port).await.unwrap_err(), expected);
    }
}
