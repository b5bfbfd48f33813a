//! A peer over a byte stream: the common part of the clients of the daemon's Unix socket and of its HTTP endpoint.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::TIMEOUT;

/// A stream with timeouts.
pub trait Stream: Read + Write {
    /// Sets the timeout of reads.
    ///
    /// # Errors
    /// Those of `setsockopt(2)`.
    fn wait_to_read(&self, timeout: Duration) -> std::io::Result<()>;

    /// Sets the timeout of writes.
    ///
    /// # Errors
    /// Those of `setsockopt(2)`.
    fn wait_to_write(&self, timeout: Duration) -> std::io::Result<()>;
}

impl Stream for TcpStream {
    fn wait_to_read(&self, timeout: Duration) -> std::io::Result<()> {
        self.set_read_timeout(Some(timeout))
    }

    fn wait_to_write(&self, timeout: Duration) -> std::io::Result<()> {
        self.set_write_timeout(Some(timeout))
    }
}

impl Stream for UnixStream {
    fn wait_to_read(&self, timeout: Duration) -> std::io::Result<()> {
        self.set_read_timeout(Some(timeout))
    }

    fn wait_to_write(&self, timeout: Duration) -> std::io::Result<()> {
        self.set_write_timeout(Some(timeout))
    }
}

/// A connection, and bytes that were read from it in advance.
#[derive(Debug)]
pub struct Peer<S> {
    pub(crate) stream: S,
    pub(crate) unread: Vec<u8>,
}

impl<S: Stream> Peer<S> {
    /// Takes a connected stream.
    ///
    /// # Errors
    /// Those of `setsockopt(2)`.
    pub(crate) fn new(stream: S) -> std::io::Result<Peer<S>> {
        stream.wait_to_read(TIMEOUT)?;
        stream.wait_to_write(TIMEOUT)?;
        Ok(Peer { stream, unread: Vec::new() })
    }

    /// Sets the timeout of reads.
    ///
    /// # Panics
    /// If it is zero.
    #[must_use]
    pub fn with_read_timeout(self, timeout: Duration) -> Peer<S> {
        self.stream.wait_to_read(timeout).unwrap();
        self
    }

    /// Sends bytes.
    ///
    /// # Panics
    /// If the peer does not accept them.
    #[track_caller]
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).unwrap();
    }

    /// Sends bytes as long as the peer accepts them, for cases in which the peer may refuse.
    ///
    /// # Errors
    /// Those of `write(2)`.
    pub fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> std::io::Result<()> {
        self.stream.write_all(bytes.as_ref())
    }

    /// Returns whether nothing has arrived, not even the end of the stream.
    ///
    /// # Panics
    /// If the stream fails.
    pub fn is_silent(&self) -> bool
    where
        S: std::os::fd::AsFd,
    {
        let mut ready = [rustix::event::PollFd::new(&self.stream, rustix::event::PollFlags::IN)];
        let now = rustix::event::Timespec::default();
        self.unread.is_empty() && rustix::event::poll(&mut ready, Some(&now)).unwrap() == 0
    }

    /// Reads more bytes. Returns false at the end of the stream or after a reset.
    #[track_caller]
    pub(crate) fn read_more(&mut self) -> bool {
        let mut buffer = [0; 4096];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => return false,
                Ok(count) => {
                    self.unread.extend_from_slice(&buffer[..count]);
                    return true;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if crate::tcp::is_broken(error.kind()) => return false,
                Err(error) => panic!("{error} after {:?}", String::from_utf8_lossy(&self.unread)),
            }
        }
    }
}
