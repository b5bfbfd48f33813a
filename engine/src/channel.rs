//! A channel between two processes of landfall: one JSON object in one datagram, with descriptors attached.
//!
//! The socket is `AF_UNIX`, `SOCK_SEQPACKET`: connected, ordered, lossless, and a message arrives complete or not at all.
//! Descriptors are sent in `SCM_RIGHTS` (`unix(7)`). The kernel's behaviour determines the rules here:
//!
//! - The receiver must close each descriptor that arrived, even if it rejects the message. Every return of [`receive`]
//!   therefore closes the descriptors that it does not pass on, so a rejected message leaks none.
//! - When the descriptor table is full, the kernel delivers those that fit and sets `MSG_CTRUNC`. Part of a delivery is
//!   useless here, so this is an error, and the delivered descriptors are closed.
//! - A datagram longer than the buffer is truncated, and `MSG_TRUNC` is set: also an error.
//! - `recvmsg` returns zero both at the end and for an empty datagram. No peer of landfall sends an empty one, so it counts
//!   as the end.
//! - A peer that closes before it has read everything leaves `ECONNRESET`, which is reported ahead of the messages that it
//!   sent before. The error is reported once and then cleared, so the read is repeated and loses no message.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sockopt,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::limits::{DESCRIPTORS_PER_MESSAGE_MAX, MESSAGE_BYTES_MAX};

/// The reason why a message could not be sent or received. After all but [`ChannelError::Gone`] the channel still works.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The descriptor is not a connected `SOCK_SEQPACKET` Unix socket.
    #[error("this descriptor is not a channel: a Unix socket of type SOCK_SEQPACKET is needed")]
    NotAChannel,
    /// The message to be sent is longer than [`MESSAGE_BYTES_MAX`].
    #[error("a message of {bytes} bytes is too long; the maximum is {MESSAGE_BYTES_MAX}")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// The message that arrived is longer than the receiver accepts; the kernel truncated it, and it was discarded.
    #[error("a message arrived that is longer than {bytes_max} bytes")]
    Cut {
        /// The maximum that the receiver accepts.
        bytes_max: usize,
    },
    /// More descriptors than [`DESCRIPTORS_PER_MESSAGE_MAX`] were to be sent.
    #[error("{count} descriptors are too many for one message; the maximum is {DESCRIPTORS_PER_MESSAGE_MAX}")]
    TooManyDescriptors {
        /// The number of descriptors.
        count: usize,
    },
    /// Descriptors were lost on arrival (`MSG_CTRUNC`), nearly always because the process has no free ones.
    #[error("descriptors did not fit into this process (see `ulimit -n`), so the message was discarded")]
    DescriptorsLost,
    /// The message does not have the expected form.
    #[error("not a valid message: {0}")]
    Malformed(serde_json::Error),
    /// The message to be sent cannot be serialised: a bug of this program.
    #[error("this message cannot be written as JSON: {0}")]
    Unwritable(serde_json::Error),
    /// No message has arrived, or the send buffer is full.
    #[error("the operation would block")]
    WouldBlock,
    /// The time limit is over.
    #[error("no answer in time")]
    TimedOut,
    /// The peer has closed its end.
    #[error("the other end of the channel is closed")]
    Gone,
    /// Any other error of the kernel.
    #[error("the channel failed: {0}")]
    System(io::Error),
}

impl From<Errno> for ChannelError {
    fn from(errno: Errno) -> ChannelError {
        match errno {
            Errno::AGAIN => ChannelError::WouldBlock,
            Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN => ChannelError::Gone,
            other => ChannelError::System(other.into()),
        }
    }
}

/// The result of a receiving call: the message and its descriptors, or `None` if the peer has closed its end.
pub type Received<T> = Result<Option<(T, Vec<OwnedFd>)>, ChannelError>;

/// One end of a channel.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
}

impl Channel {
    /// Creates a channel and returns both ends; close-on-exec, blocking.
    pub fn pair() -> io::Result<(Channel, Channel)> {
        let (one, other) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((Channel { socket: one }, Channel { socket: other }))
    }

    /// Connects to a process that listens at `path`.
    pub fn connect(path: &Path) -> io::Result<Channel> {
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(Channel { socket })
    }

    /// Sends one message. Waits while the send buffer is full.
    pub fn send(&self, message: &impl Serialize, descriptors: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
        send(self.as_fd(), message, descriptors, SendFlags::empty())
    }

    /// Sends one message. Returns [`ChannelError::WouldBlock`] if the send buffer is full.
    pub fn try_send(
        &self,
        message: &impl Serialize,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        send(self.as_fd(), message, descriptors, SendFlags::DONTWAIT)
    }

    /// Sends one message. Waits for at most `timeout` while the send buffer is full, then returns
    /// [`ChannelError::TimedOut`].
    pub fn send_timeout(
        &self,
        message: &impl Serialize,
        descriptors: &[BorrowedFd<'_>],
        timeout: Duration,
    ) -> Result<(), ChannelError> {
        let deadline = Instant::now() + timeout;
        loop {
            match self.try_send(message, descriptors) {
                Err(ChannelError::WouldBlock) => wait(self.as_fd(), PollFlags::OUT, deadline)?,
                done => return done,
            }
        }
    }

    /// Waits for a message.
    pub fn recv<T: DeserializeOwned>(&self) -> Received<T> {
        receive(self.as_fd(), MESSAGE_BYTES_MAX, RecvFlags::empty())
    }

    /// Returns a message that has arrived, or [`ChannelError::WouldBlock`].
    pub fn try_recv<T: DeserializeOwned>(&self) -> Received<T> {
        receive(self.as_fd(), MESSAGE_BYTES_MAX, RecvFlags::DONTWAIT)
    }

    /// Waits for a message for at most `timeout`, then returns [`ChannelError::TimedOut`].
    pub fn recv_timeout<T: DeserializeOwned>(&self, timeout: Duration) -> Received<T> {
        let deadline = Instant::now() + timeout;
        loop {
            match self.try_recv() {
                Err(ChannelError::WouldBlock) => wait(self.as_fd(), PollFlags::IN, deadline)?,
                done => return done,
            }
        }
    }

    /// Waits until a message has arrived or the peer has closed its end, for at most `timeout`, then returns
    /// [`ChannelError::TimedOut`].
    pub(crate) fn wait_readable(&self, timeout: Duration) -> Result<(), ChannelError> {
        wait(self.as_fd(), PollFlags::IN, Instant::now() + timeout)
    }

    /// Ends the channel in both directions for every holder of this end: a thread that waits on it wakes up.
    pub fn shutdown(&self) {
        // The only error is that the channel has ended already.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
    }
}

impl TryFrom<OwnedFd> for Channel {
    type Error = ChannelError;

    /// Takes a descriptor, which must be a Unix socket of type `SOCK_SEQPACKET`.
    fn try_from(socket: OwnedFd) -> Result<Channel, ChannelError> {
        if !is_channel(socket.as_fd()) {
            return Err(ChannelError::NotAChannel);
        }
        Ok(Channel { socket })
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl From<Channel> for OwnedFd {
    fn from(channel: Channel) -> OwnedFd {
        channel.socket
    }
}

/// Whether `socket` is a Unix socket of type `SOCK_SEQPACKET`.
pub fn is_channel(socket: BorrowedFd<'_>) -> bool {
    sockopt::socket_domain(socket) == Ok(AddressFamily::UNIX)
        && sockopt::socket_type(socket) == Ok(SocketType::SEQPACKET)
}

/// Sends one message on a descriptor that is a channel. Never raises `SIGPIPE`.
pub fn send(
    socket: BorrowedFd<'_>,
    message: &impl Serialize,
    descriptors: &[BorrowedFd<'_>],
    flags: SendFlags,
) -> Result<(), ChannelError> {
    let text = serde_json::to_vec(message).map_err(ChannelError::Unwritable)?;
    send_bytes(socket, &text, descriptors, flags)
}

pub(crate) fn send_bytes(
    socket: BorrowedFd<'_>,
    text: &[u8],
    descriptors: &[BorrowedFd<'_>],
    flags: SendFlags,
) -> Result<(), ChannelError> {
    if text.len() > MESSAGE_BYTES_MAX {
        return Err(ChannelError::TooLong { bytes: text.len() });
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_PER_MESSAGE_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let too_many = descriptors.len() > DESCRIPTORS_PER_MESSAGE_MAX;
    if too_many || !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(ChannelError::TooManyDescriptors { count: descriptors.len() });
    }
    rustix::io::retry_on_intr(|| {
        rustix::net::sendmsg(socket, &[IoSlice::new(text)], &mut control, flags | SendFlags::NOSIGNAL)
    })?;
    Ok(())
}

/// Receives one message of at most `bytes_max` on a descriptor that is a channel.
///
/// Every descriptor that arrives is close-on-exec, and is closed if the message is rejected.
pub fn receive<T: DeserializeOwned>(
    socket: BorrowedFd<'_>,
    bytes_max: usize,
    flags: RecvFlags,
) -> Received<T> {
    let Some((text, descriptors)) = receive_bytes(socket, bytes_max, flags)? else { return Ok(None) };
    let value = serde_json::from_slice(&text).map_err(ChannelError::Malformed)?;
    Ok(Some((value, descriptors)))
}

/// Receives the bytes of one message and its descriptors; `None` if the peer has closed its end.
pub(crate) fn receive_bytes(socket: BorrowedFd<'_>, bytes_max: usize, flags: RecvFlags) -> Received<Vec<u8>> {
    let mut text = vec![0; bytes_max];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_PER_MESSAGE_MAX))];
    // Dropping the buffer closes the descriptors that are not drained from it.
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = loop {
        let iov = &mut [IoSliceMut::new(&mut text)];
        match rustix::net::recvmsg(socket, iov, &mut control, flags | RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR | Errno::CONNRESET) => {}
            done => break done?,
        }
    };
    let mut descriptors = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = part {
            descriptors.extend(received);
        }
    }
    if message.flags.contains(ReturnFlags::CTRUNC) {
        return Err(ChannelError::DescriptorsLost);
    }
    if message.flags.contains(ReturnFlags::TRUNC) {
        return Err(ChannelError::Cut { bytes_max });
    }
    if message.bytes == 0 {
        return Ok(None);
    }
    text.truncate(message.bytes);
    Ok(Some((text, descriptors)))
}

/// Waits until `socket` is ready for `events` or has hung up; returns [`ChannelError::TimedOut`] after `deadline`.
fn wait(socket: BorrowedFd<'_>, events: PollFlags, deadline: Instant) -> Result<(), ChannelError> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ChannelError::TimedOut);
        }
        match poll(&mut [PollFd::from_borrowed_fd(socket, events)], timespec(left).as_ref()) {
            Err(Errno::INTR) | Ok(0) => {}
            done => return done.map(drop).map_err(ChannelError::from),
        }
    }
}

/// Converts a poll timeout. A duration that does not fit the kernel's type means no timeout.
pub(crate) fn timespec(duration: Duration) -> Option<Timespec> {
    Timespec::try_from(duration).ok()
}

#[cfg(test)]
mod tests;
