//! Counters of native ports, summed from the kernel's counters of each connection. The data path has no counters of its own.

use std::collections::{BTreeMap, BTreeSet};

use crate::watch::ReadError;
use crate::watch::sock_diag::{self, SockDiag};

/// Counters of the open connections of a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// The number of open connections.
    pub connections: u64,
    /// Bytes from clients to the server, over these connections.
    pub bytes_up: u64,
    /// Bytes from the server to clients, over these connections.
    pub bytes_down: u64,
}

/// Reads the counters of these ports in the network namespace of the calling thread. A connection that has ended is not
/// counted any more.
///
/// # Errors
/// Any of [`ReadError`].
pub fn traffic(ports: &BTreeSet<u16>) -> Result<BTreeMap<u16, Traffic>, ReadError> {
    let mut found: BTreeMap<u16, Traffic> = ports.iter().map(|port| (*port, Traffic::default())).collect();
    let socket = sock_diag::open().map_err(ReadError::Diag)?;
    // The server's end of a connection has the server's port.
    SockDiag::new(socket)?.connections(|connection| {
        if let Some(traffic) = found.get_mut(&connection.port) {
            traffic.connections += 1;
            traffic.bytes_up = traffic.bytes_up.saturating_add(connection.bytes_received);
            traffic.bytes_down = traffic.bytes_down.saturating_add(connection.bytes_acked);
        }
    })?;
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn bytes_of_open_connections_are_counted_at_the_servers_end() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        client.write_all(&[1; 1000]).unwrap();
        server.read_exact(&mut [0; 1000]).unwrap();
        server.write_all(&[1; 3000]).unwrap();
        client.read_exact(&mut [0; 3000]).unwrap();
        // The answer acknowledges the data before it.
        client.write_all(&[1; 7]).unwrap();
        server.read_exact(&mut [0; 7]).unwrap();
        let counted = traffic(&BTreeSet::from([port])).unwrap()[&port];
        assert_eq!((counted.connections, counted.bytes_up, counted.bytes_down), (1, 1007, 3000));
        drop((client, server));
        let other = traffic(&BTreeSet::from([1])).unwrap();
        assert_eq!(other[&1], Traffic::default());
    }
}
