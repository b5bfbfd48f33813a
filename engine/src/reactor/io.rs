//! The calls on sockets of both kernel pollers: each tried once, without waiting.
//!
//! A call that a signal interrupted before it had an effect (EINTR) is repeated.

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto, sockopt};
use rustix::pipe::SpliceFlags;

use super::pool::{Content, Pool, PooledBuffer};
use super::{Connected, Held, Received, Sent, SocketIo, TransferMode};
use crate::channel::{self, ChannelError};
use crate::command::Family;
use crate::limits::Limits;
use crate::sys::{self, SocketError, SocketFacts};

/// The maximum of one splice; the number of pipe slots is the actual limit.
const SPLICE_BYTES_MAX: usize = 1024 * 1024;

/// The system calls, and the memory pool of the shard.
#[derive(Debug)]
pub struct KernelIo {
    pool: Pool,
}

impl KernelIo {
    /// Creates the calls with an empty pool.
    pub fn new(limits: &Limits) -> KernelIo {
        KernelIo { pool: Pool::new(limits) }
    }

    /// Returns the numbers of lent buffers and pipes.
    pub fn lent(&self) -> (usize, usize) {
        self.pool.lent()
    }
}

impl SocketIo for KernelIo {
    type Socket = OwnedFd;
    type Buffer = PooledBuffer;

    fn now(&self) -> Instant {
        Instant::now()
    }

    fn accept(&mut self, listener: &OwnedFd) -> Option<Result<OwnedFd, SocketError>> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        loop {
            match rustix::net::accept_with(listener, flags) {
                // The client gave up while it was queued, or a signal arrived: take the next one.
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(Errno::AGAIN) => return None,
                accepted => return Some(accepted.map_err(SocketError::of)),
            }
        }
    }

    fn host_socket(&mut self, family: Family) -> Result<OwnedFd, SocketError> {
        let domain = match family {
            Family::V4 => AddressFamily::INET,
            Family::V6 => AddressFamily::INET6,
        };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(domain, SocketType::STREAM, flags, Some(ipproto::TCP))
            .map_err(SocketError::of)?;
        sys::tune(&socket);
        Ok(socket)
    }

    fn connect(&mut self, socket: &OwnedFd, address: SocketAddr) -> Option<Connected> {
        match rustix::net::connect(socket, &address) {
            Ok(()) => Some(Connected::Established),
            // An interrupted connect continues in the kernel. On loopback the server has answered by now, but the call
            // checks for signals before it handles the answer (__inet_stream_connect() in net/ipv4/af_inet.c); the first
            // notice reports it.
            Err(Errno::INPROGRESS | Errno::INTR) => None,
            Err(errno) => Some(Connected::Failed(SocketError::of_connect(errno))),
        }
    }

    fn connect_result(&mut self, socket: &OwnedFd) -> Connected {
        match sockopt::socket_error(socket) {
            Ok(Ok(())) => match rustix::net::getpeername(socket) {
                Ok(_) => Connected::Established,
                Err(errno) => Connected::Failed(SocketError::of_connect(errno)),
            },
            // tcp_reset(): ECONNREFUSED before the connection is established, ECONNRESET or EPIPE after it.
            Ok(Err(Errno::CONNRESET | Errno::PIPE)) => Connected::Reset,
            Ok(Err(errno)) | Err(errno) => Connected::Failed(SocketError::of_connect(errno)),
        }
    }

    fn receive(&mut self, socket: &OwnedFd, buffer: &mut PooledBuffer) -> Received {
        loop {
            let result = match buffer.space() {
                Some(Content::Buffer(bytes)) => {
                    rustix::net::recv(socket, spare_capacity(bytes), RecvFlags::DONTWAIT).map(|taken| taken.0)
                }
                Some(Content::Pipe(write)) => splice(socket, write, SPLICE_BYTES_MAX),
                None => Err(Errno::INVAL),
            };
            return match result {
                Err(Errno::AGAIN) => Received::Empty,
                Err(Errno::INTR) => continue,
                Ok(0) => Received::Eof,
                Ok(bytes) => {
                    buffer.filled_pipe(bytes);
                    Received::Bytes(bytes)
                }
                Err(errno) => Received::Failed(SocketError::of(errno)),
            };
        }
    }

    fn send(&mut self, socket: &OwnedFd, buffer: &mut PooledBuffer) -> Sent {
        loop {
            let held = buffer.bytes();
            if held == 0 {
                return Sent::All;
            }
            let result = match buffer.pipe() {
                None => {
                    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
                    rustix::net::send(socket, buffer.slice(), flags)
                }
                Some(read) => splice(read, socket, held),
            };
            match result {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Sent::Blocked,
                Ok(0) => return Sent::Failed(SocketError::Reset),
                Ok(bytes) => {
                    buffer.sent(bytes);
                    // tcp_sendmsg_locked() sends everything, or stops where the send queue is full and requests a report of
                    // free space (SOCK_NOSPACE). A splice may also stop at the end of a slot.
                    if bytes < held && buffer.mode() == TransferMode::Copy {
                        return Sent::Blocked;
                    }
                }
                Err(errno) => return Sent::Failed(SocketError::of(errno)),
            }
        }
    }

    fn lend(&mut self, mode: TransferMode) -> Option<PooledBuffer> {
        self.pool.lend(mode)
    }

    fn can_lend(&self, mode: TransferMode) -> bool {
        self.pool.can_lend(mode)
    }

    fn warm_buffer(&mut self) -> PooledBuffer {
        self.pool.warm_buffer()
    }

    fn keep(&mut self, warm: &mut PooledBuffer) -> Option<PooledBuffer> {
        let mut held = self.pool.lend(TransferMode::Copy)?;
        held.fill_from(warm.slice());
        Some(held)
    }

    fn have_urgent(&mut self, sockets: &[&OwnedFd]) -> Vec<bool> {
        let mut fds: Vec<PollFd<'_>> =
            sockets.iter().map(|socket| PollFd::new(*socket, PollFlags::PRI)).collect();
        // A poll that fails reports no urgent byte; the next short read causes another one.
        let _ = rustix::event::poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
        fds.iter().map(|fd| fd.revents().contains(PollFlags::PRI)).collect()
    }

    fn shutdown_write(&mut self, socket: &OwnedFd) -> Result<(), SocketError> {
        rustix::net::shutdown(socket, rustix::net::Shutdown::Write).map_err(SocketError::of)
    }

    fn reset_on_close(&mut self, socket: &OwnedFd) {
        // The call fails only on a descriptor that is not a socket, which has no connection to reset.
        let _ = sockopt::set_socket_linger(socket, Some(Duration::ZERO));
    }

    fn unacknowledged_bytes(&mut self, socket: &OwnedFd) -> usize {
        sys::unacknowledged_bytes(socket)
    }

    fn is_own_peer(&mut self, socket: &OwnedFd, address: SocketAddr) -> bool {
        rustix::net::getsockname(socket).is_ok_and(|local| SocketAddr::try_from(local) == Ok(address))
    }

    fn send_message(&mut self, channel: &OwnedFd, text: &[u8]) -> Result<(), ChannelError> {
        channel::send_bytes(channel.as_fd(), text, &[], SendFlags::DONTWAIT)
    }

    fn receive_message(
        &mut self,
        channel: &OwnedFd,
        bytes_max: usize,
    ) -> Result<(Vec<u8>, Vec<OwnedFd>), ChannelError> {
        channel::receive_bytes(channel.as_fd(), bytes_max, RecvFlags::DONTWAIT)?.ok_or(ChannelError::Gone)
    }

    fn facts(&self, socket: &OwnedFd) -> SocketFacts {
        SocketFacts::of(socket)
    }

    fn netns_cookie(&self, socket: &OwnedFd) -> Option<u64> {
        sys::netns_cookie(socket).ok()
    }

    fn tune(&mut self, socket: &OwnedFd) {
        // The caller checks with SocketFacts whether the socket is non-blocking afterwards.
        let _ = rustix::io::ioctl_fionbio(socket, true);
        sys::tune(socket);
    }

    fn adopt(&mut self, descriptor: OwnedFd) -> OwnedFd {
        descriptor
    }

    fn disown(&mut self, socket: OwnedFd) -> Result<OwnedFd, OwnedFd> {
        Ok(socket)
    }

    fn duplicate(&self, socket: &OwnedFd) -> Option<OwnedFd> {
        socket.try_clone().ok()
    }
}

fn splice(from: impl AsFd, to: impl AsFd, bytes: usize) -> Result<usize, Errno> {
    rustix::pipe::splice(from, None, to, None, bytes, SpliceFlags::MOVE | SpliceFlags::NONBLOCK)
}
