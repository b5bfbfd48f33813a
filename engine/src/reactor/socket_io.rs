//! The calls of a reactor on sockets. None of them waits.

use std::fmt;
use std::net::SocketAddr;
use std::time::Instant;

use rustix::fd::OwnedFd;

use crate::channel::ChannelError;
use crate::command::Family;
use crate::sys::{SocketError, SocketFacts};

/// The method with which a direction moves its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransferMode {
    /// Through a buffer.
    Copy,
    /// Through a pipe, by splice(2), which moves pages instead of copying bytes.
    Splice,
}

/// Memory borrowed from a pool: a buffer or a pipe. It returns to the pool when it is dropped.
pub trait Held: fmt::Debug {
    /// Returns the number of bytes that are not yet written.
    fn bytes(&self) -> usize;
    /// Returns whether it is a buffer or a pipe.
    fn mode(&self) -> TransferMode;
}

/// The result of one read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// At least one byte was added.
    Bytes(usize),
    /// The socket has no bytes at present.
    Empty,
    /// The peer's FIN, after every byte.
    Eof,
    /// The connection is broken; every byte that preceded the break was read.
    Failed(SocketError),
}

/// The result of one write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// Everything is written.
    All,
    /// The socket accepts no more bytes at present; a notice follows when it does.
    Blocked,
    /// The connection is broken.
    Failed(SocketError),
}

/// The result of a connect that was in progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connected {
    /// The connection is established.
    Established,
    /// It was established and reset since. Bytes that preceded the reset can still be read.
    Reset,
    /// It was not established.
    Failed(SocketError),
}

/// Calls on sockets. None of them waits.
pub trait SocketIo: fmt::Debug {
    /// A socket, or another descriptor. Dropping it closes it.
    type Socket: fmt::Debug;
    /// A buffer or a pipe.
    type Buffer: Held;

    /// Returns the time: the kernel's monotonic clock, or the simulation's.
    fn now(&self) -> Instant;

    /// Accepts one connection; `None` if the backlog is empty.
    fn accept(&mut self, listener: &Self::Socket) -> Option<Result<Self::Socket, SocketError>>;

    /// Creates an unconnected TCP socket in the network namespace of this process.
    ///
    /// # Errors
    /// Descriptors or memory ran out, or the family is missing here.
    fn host_socket(&mut self, family: Family) -> Result<Self::Socket, SocketError>;

    /// Starts to connect; `None` while the connect is in progress. Writable, hang-up or error then reports its end.
    fn connect(&mut self, socket: &Self::Socket, address: SocketAddr) -> Option<Connected>;

    /// Returns the result of a connect that was in progress.
    fn connect_result(&mut self, socket: &Self::Socket) -> Connected;

    /// Reads once into `buffer`, whose content is replaced; a pipe must be empty.
    fn receive(&mut self, socket: &Self::Socket, buffer: &mut Self::Buffer) -> Received;

    /// Writes the contents of `buffer`.
    fn send(&mut self, socket: &Self::Socket, buffer: &mut Self::Buffer) -> Sent;

    /// Borrows an empty buffer or pipe; `None` at the bound of the pool, or if no pipe can be created.
    fn lend(&mut self, mode: TransferMode) -> Option<Self::Buffer>;

    /// Whether the pool is below its bound for this mode.
    fn can_lend(&self, mode: TransferMode) -> bool;

    /// Creates the shard's warm buffer, which does not count against the bound of the pool.
    fn warm_buffer(&mut self) -> Self::Buffer;

    /// Moves the contents of the warm buffer into a pooled one; `None` at the bound of the pool.
    fn keep(&mut self, warm: &mut Self::Buffer) -> Option<Self::Buffer>;

    /// Returns, for each socket, whether it has an urgent byte.
    fn have_urgent(&mut self, sockets: &[&Self::Socket]) -> Vec<bool>;

    /// Sends the FIN.
    ///
    /// # Errors
    /// The connection is broken.
    fn shutdown_write(&mut self, socket: &Self::Socket) -> Result<(), SocketError>;

    /// Makes the close of `socket` a reset (`SO_LINGER` with zero seconds), which also discards unacknowledged bytes.
    fn reset_on_close(&mut self, socket: &Self::Socket);

    /// Returns the number of bytes that the peer has not acknowledged; 0 if the kernel does not report it.
    fn unacknowledged_bytes(&mut self, socket: &Self::Socket) -> usize;

    /// Whether a socket that is connected to `address` is its own peer: a possible result of a connect to a loopback port of
    /// the ephemeral range on which no socket listens (simultaneous open, RFC 9293 3.5).
    fn is_own_peer(&mut self, socket: &Self::Socket, address: SocketAddr) -> bool;

    /// Records that both sockets belong to one relayed connection. A kernel does not need this; a simulation uses it to
    /// check that each end is connected to the right one.
    fn pair(&mut self, _: &Self::Socket, _: &Self::Socket) {}

    /// Sends one datagram on a channel (`SOCK_SEQPACKET`).
    ///
    /// # Errors
    /// See [`ChannelError`]; [`ChannelError::WouldBlock`] while the channel is full.
    fn send_message(&mut self, channel: &Self::Socket, text: &[u8]) -> Result<(), ChannelError>;

    /// Receives one datagram of at most `bytes_max` and the attached descriptors from a channel.
    ///
    /// # Errors
    /// See [`ChannelError`]; [`ChannelError::WouldBlock`] if none has arrived, [`ChannelError::Gone`] at the end.
    fn receive_message(
        &mut self,
        channel: &Self::Socket,
        bytes_max: usize,
    ) -> Result<(Vec<u8>, Vec<Self::Socket>), ChannelError>;

    /// Returns the kernel's data on a socket.
    fn facts(&self, socket: &Self::Socket) -> SocketFacts;

    /// Returns the cookie of a socket's network namespace, if the kernel reports one.
    fn netns_cookie(&self, socket: &Self::Socket) -> Option<u64>;

    /// Prepares a socket that another process connected: makes it non-blocking, and sets the options of the relay's own
    /// sockets.
    fn tune(&mut self, socket: &Self::Socket);

    /// Takes over a descriptor from another part of the engine.
    fn adopt(&mut self, descriptor: OwnedFd) -> Self::Socket;

    /// Releases a socket, to be adopted by another shard.
    ///
    /// # Errors
    /// The socket itself, if it is not a descriptor.
    fn disown(&mut self, socket: Self::Socket) -> Result<OwnedFd, Self::Socket>;

    /// Returns a second descriptor of a socket for another process; `None` if none is left, or it is not a descriptor.
    fn duplicate(&self, socket: &Self::Socket) -> Option<OwnedFd>;
}
