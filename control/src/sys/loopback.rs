//! Checks whether the other end of a loopback connection belongs to a user who may receive a secret.
//!
//! While a container is stopped, its published port has no owner: any local user can listen on it and then receives
//! connections. So two checks precede the sending of a secret:
//!
//! 1. [`Destination::look_up`], before the connection: the listener belongs to root or to this user, or does not exist.
//! 2. [`Destination::verify`], over the connection, right before the secret: the process that accepted the connection
//!    belongs to root or to this user, and the port still has the same listener. The socket at the other end of a
//!    connection never changes, so it cannot be swapped after this check.
//!
//! A port without a listener that accepts a connection all the same is redirected by a rule of root's (NAT, as Docker
//! sets it up with `userland-proxy` off). Such a connection has no other end in this network namespace; it is accepted.

use std::net::SocketAddr;
use std::os::fd::AsFd;

use landfall_engine::watch::ReadError;
use landfall_engine::watch::lookup::{LOOPBACK, TcpSocket, lookup};
use thiserror::Error;
use tokio::net::TcpStream;

use super::users::{Holder, is_ours};

/// The reason that no secret is sent to a port.
#[derive(Debug, Error)]
pub(crate) enum DestinationError {
    /// Another user holds the port, or has accepted the connection.
    #[error("port {port} is held by {holder}, who is neither root nor the user of this daemon")]
    Stranger {
        /// The port.
        port: u16,
        /// Its holder.
        holder: Holder,
    },
    /// The listener of the first check is gone.
    #[error("port {0} got another listener while it was connected to")]
    Replaced(u16),
    /// No process holds the other end.
    #[error("the connection to port {0} was closed from the other end")]
    Closed(u16),
    /// The kernel does not report the owner of a socket.
    #[error("the user who holds port {port} cannot be looked up")]
    Unknown {
        /// The port.
        port: u16,
        /// The cause.
        source: ReadError,
    },
    /// This process's own connection is not found either.
    #[error(
        "the user who holds port {0} cannot be looked up: this kernel has no sock_diag for TCP (module tcp_diag)"
    )]
    NoDiag(u16),
}

impl DestinationError {
    /// Adds the process that holds the port to the error, if it is visible.
    pub(crate) async fn identified(mut self) -> DestinationError {
        if let DestinationError::Stranger { holder, .. } = &mut self {
            holder.find_process().await;
        }
        self
    }
}

/// A loopback address that is about to be connected to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Destination {
    address: SocketAddr,
    /// The cookie of its listener, which no other socket ever has.
    listener: Option<u64>,
}

impl Destination {
    /// Looks up the listener of a loopback address.
    ///
    /// # Errors
    /// [`DestinationError::Stranger`] and [`DestinationError::Unknown`].
    pub(crate) fn look_up(address: SocketAddr) -> Result<Destination, DestinationError> {
        let listener = find(address, SocketAddr::new(address.ip(), 0), address.port())?;
        if let Some(listener) = &listener {
            check(listener, address.port())?;
        }
        Ok(Destination { address, listener: listener.map(|listener| listener.cookie) })
    }

    /// Looks up the other end of a connection to this address, and its listener again.
    ///
    /// # Errors
    /// Each [`DestinationError`].
    pub(crate) fn verify(&self, stream: &TcpStream) -> Result<(), DestinationError> {
        let port = self.address.port();
        let near = stream.local_addr().map_err(|_| DestinationError::Closed(port))?;
        // The lookup must find this connection's own socket; otherwise its "no such socket" for the other end proves
        // nothing.
        let own = find(near, self.address, port)?.map(|own| u64::from(own.inode));
        let inode = rustix::fs::fstat(stream.as_fd()).map(|status| status.st_ino).ok();
        if own.is_none() || own != inode {
            return Err(DestinationError::NoDiag(port));
        }
        if let Some(far) = find(self.address, near, port)?.filter(|far| !far.is_listener) {
            if far.inode == 0 {
                return Err(DestinationError::Closed(port));
            }
            check(&far, port)?;
        }
        match Destination::look_up(self.address)? == *self {
            true => Ok(()),
            false => Err(DestinationError::Replaced(port)),
        }
    }
}

fn find(local: SocketAddr, peer: SocketAddr, port: u16) -> Result<Option<TcpSocket>, DestinationError> {
    lookup(local, peer, LOOPBACK).map_err(|source| DestinationError::Unknown { port, source })
}

fn check(socket: &TcpSocket, port: u16) -> Result<(), DestinationError> {
    match is_ours(socket.uid) {
        true => Ok(()),
        false => {
            let holder = Holder { uid: socket.uid, inode: socket.inode.into(), process: None };
            Err(DestinationError::Stranger { port, holder })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    #[tokio::test]
    async fn own_port_is_accepted_until_it_has_another_listener() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let destination = Destination::look_up(address).unwrap();
        let stream = TcpStream::connect(address).await.unwrap();
        assert!(matches!(destination.verify(&stream), Err(DestinationError::Closed(_))), "not accepted yet");
        let (accepted, _) = listener.accept().await.unwrap();
        destination.verify(&stream).unwrap();
        drop(listener);
        assert!(matches!(destination.verify(&stream), Err(DestinationError::Replaced(_))));
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(address).unwrap();
        let _next = socket.listen(1).unwrap();
        assert!(matches!(destination.verify(&stream), Err(DestinationError::Replaced(_))));
        drop(accepted);
    }

    #[tokio::test]
    async fn absent_listener_is_accepted_and_a_later_one_counts_as_replaced() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let destination = Destination::look_up(address).unwrap();
        assert_eq!(destination.listener, None);
        let listener = TcpListener::bind(address).await.unwrap();
        let stream = TcpStream::connect(address).await.unwrap();
        let (_accepted, _) = listener.accept().await.unwrap();
        assert!(matches!(destination.verify(&stream), Err(DestinationError::Replaced(_))));
    }
}
