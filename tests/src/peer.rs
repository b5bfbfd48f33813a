//! A peer over a stream of bytes: what the clients of the daemon's two doors have in common.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::PATIENCE;

/// A stream that can be told how long to wait.
pub trait Stream: Read + Write {
    /// How long a read waits from now on.
    ///
    /// # Errors
    /// Those of `setsockopt(2)`.
    fn wait_to_read(&self, patience: Duration) -> std::io::Result<()>;

    /// How long a write waits from now on.
    ///
    /// # Errors
    /// Those of `setsockopt(2)`.
    fn wait_to_write(&self, patience: Duration) -> std::io::Result<()>;
}

impl Stream for TcpStream {
    fn wait_to_read(&self, patience: Duration) -> std::io::Result<()> {
        self.set_read_timeout(Some(patience))
    }

    fn wait_to_write(&self, patience: Duration) -> std::io::Result<()> {
        self.set_write_timeout(Some(patience))
    }
}

impl Stream for UnixStream {
    fn wait_to_read(&self, patience: Duration) -> std::io::Result<()> {
        self.set_read_timeout(Some(patience))
    }

    fn wait_to_write(&self, patience: Duration) -> std::io::Result<()> {
        self.set_write_timeout(Some(patience))
    }
}

/// A connection, and what was read of it ahead of its time.
#[derive(Debug)]
pub struct Peer<S> {
    pub(crate) stream: S,
    pub(crate) unread: Vec<u8>,
}

impl<S: Stream> Peer<S> {
    /// Takes a stream that is connected.
    ///
    /// # Errors
    /// When it cannot be told how long to wait.
    pub(crate) fn new(stream: S) -> std::io::Result<Peer<S>> {
        stream.wait_to_read(PATIENCE)?;
        stream.wait_to_write(PATIENCE)?;
        Ok(Peer { stream, unread: Vec::new() })
    }

    /// How long a read waits.
    ///
    /// # Panics
    /// When it is no time at all.
    #[must_use]
    pub fn patience(self, patience: Duration) -> Peer<S> {
        self.stream.wait_to_read(patience).unwrap();
        self
    }

    /// Sends bytes.
    ///
    /// # Panics
    /// When the peer does not take them.
    #[track_caller]
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).unwrap();
    }

    /// Sends bytes for as long as the peer takes them; that it may refuse to is part of the case.
    ///
    /// # Errors
    /// Those of `write(2)`.
    pub fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> std::io::Result<()> {
        self.stream.write_all(bytes.as_ref())
    }

    /// Whether nothing has come, not even the end.
    ///
    /// # Panics
    /// When the stream cannot be asked.
    pub fn is_silent(&self) -> bool
    where
        S: std::os::fd::AsFd,
    {
        let mut ready = [rustix::event::PollFd::new(&self.stream, rustix::event::PollFlags::IN)];
        let now = rustix::event::Timespec::default();
        self.unread.is_empty() && rustix::event::poll(&mut ready, Some(&now)).unwrap() == 0
    }

    /// Reads more; false at the end, a reset included.
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
