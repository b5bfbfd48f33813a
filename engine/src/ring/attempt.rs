//! The system calls of both real rings: each tried once, without waiting.
//!
//! `None` means "not now": the caller waits for readiness and tries again. A call that the kernel interrupted before
//! it did anything (EINTR) is tried again at once.

use std::net::SocketAddr;

use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketAddrAny, SocketFlags, sockopt};
use rustix::pipe::SpliceFlags;

use super::pool::{Contents, Loan, Pool};
use super::{Borrowed, Received, Way};
use crate::command::Family;
use crate::sys::SocketError;

/// One splice asks for at most this much; what the pipe's slots hold decides.
const SPLICE_BYTES_MAX: usize = 1024 * 1024;

fn settle<T>(result: Result<T, Errno>) -> Option<Result<T, Errno>> {
    match result {
        Err(Errno::AGAIN) => None,
        other => Some(other),
    }
}

pub(super) fn accept(listener: &OwnedFd) -> Option<Result<(OwnedFd, Family), SocketError>> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    loop {
        let accepted = rustix::net::acceptfrom_with(listener, flags);
        match accepted {
            // The client gave up while it waited in the queue, or a signal came: on to the next one.
            Err(Errno::INTR | Errno::CONNABORTED) => {}
            accepted => {
                return settle(accepted).map(|result| {
                    result.map(|(socket, peer)| (socket, family_of(peer.as_ref()))).map_err(SocketError::of)
                });
            }
        }
    }
}

fn family_of(peer: Option<&SocketAddrAny>) -> Family {
    match peer.map(SocketAddrAny::address_family) {
        Some(rustix::net::AddressFamily::INET6) => Family::V6,
        _ => Family::V4,
    }
}

/// Starts a connect. `None`: under way; writable means that it is over, and [`connected`] tells how.
pub(super) fn connect(socket: &OwnedFd, address: SocketAddr) -> Option<Result<(), SocketError>> {
    // Loopback has answered by the time the first call returns, but that call looks before it handles the answer
    // (__inet_stream_connect() in net/ipv4/af_inet.c); a second one finds it, and saves a wait.
    let mut result = rustix::net::connect(socket, &address);
    if result == Err(Errno::INPROGRESS) {
        result = rustix::net::connect(socket, &address);
    }
    match result {
        // An interrupted connect goes on by itself.
        Err(Errno::INPROGRESS | Errno::ALREADY | Errno::INTR) => None,
        Err(Errno::ISCONN) => Some(Ok(())),
        Err(errno) => Some(Err(SocketError::of_connect(errno))),
        Ok(()) => Some(Ok(())),
    }
}

/// How a connect that was under way ended.
pub(super) fn connected(socket: &OwnedFd) -> Result<(), SocketError> {
    match sockopt::socket_error(socket) {
        Ok(Ok(())) => Ok(()),
        Ok(Err(errno)) | Err(errno) => Err(SocketError::of_connect(errno)),
    }
}

/// Reads what is there into a new loan. What can only be copied is no splice's: `NoLoan`.
pub(super) fn recv(socket: &OwnedFd, way: Way, pool: &Pool) -> Option<Received<Loan>> {
    let Some(mut loan) = pool.lend(way) else { return Some(Received::NoLoan(way)) };
    let mut was_there = false;
    loop {
        let result = match loan.contents() {
            Contents::Buffer(bytes) => {
                rustix::net::recv(socket, bytes, RecvFlags::DONTWAIT).map(|(taken, _)| taken)
            }
            Contents::Pipe { write, .. } => splice(socket, write, SPLICE_BYTES_MAX),
        };
        return match result {
            // tcp_read_sock() never gets past an urgent byte, which splice(2) would wait for the whole connection long. Bytes
            // that were there before a splice and that it did not take are behind one; others may just have come.
            Err(Errno::AGAIN) if way == Way::Splice && was_there => Some(Received::NoLoan(way)),
            Err(Errno::AGAIN) if way == Way::Splice && is_anything_there(socket) => {
                was_there = true;
                continue;
            }
            Err(Errno::AGAIN) => None,
            Err(Errno::INTR) => continue,
            Ok(0) => Some(Received::Eof),
            Ok(bytes) => {
                loan.filled(bytes);
                Some(Received::Bytes(loan))
            }
            Err(errno) => Some(Received::Failed(SocketError::of(errno))),
        };
    }
}

fn is_anything_there(socket: &OwnedFd) -> bool {
    rustix::io::ioctl_fionread(socket).is_ok_and(|bytes| bytes > 0)
}

/// Sends until the loan is empty, the socket is full (`None`), or the connection is broken.
pub(super) fn send(socket: &OwnedFd, loan: &mut Loan) -> Option<Result<(), SocketError>> {
    while loan.bytes() > 0 {
        let held = loan.bytes();
        let result = match loan.way() {
            Way::Copy => rustix::net::send(socket, loan.held(), SendFlags::NOSIGNAL | SendFlags::DONTWAIT),
            Way::Splice => match loan.contents() {
                Contents::Pipe { read, .. } => splice(read, socket, held),
                Contents::Buffer(_) => return Some(Err(SocketError::Other(Errno::INVAL))),
            },
        };
        match settle(result)? {
            Ok(0) => return Some(Err(SocketError::Reset)),
            Ok(bytes) => loan.sent(bytes),
            Err(Errno::INTR) => {}
            Err(errno) => return Some(Err(SocketError::of(errno))),
        }
    }
    Some(Ok(()))
}

fn splice(from: impl AsFd, to: impl AsFd, bytes: usize) -> Result<usize, Errno> {
    rustix::pipe::splice(from, None, to, None, bytes, SpliceFlags::MOVE | SpliceFlags::NONBLOCK)
}

pub(super) fn shutdown_write(socket: &OwnedFd) -> Result<(), SocketError> {
    rustix::net::shutdown(socket, rustix::net::Shutdown::Write).map_err(SocketError::of)
}

pub(super) fn reset_on_close(socket: &OwnedFd) {
    // It fails only on what is no socket; then there is nothing to reset.
    let _ = sockopt::set_socket_linger(socket, Some(std::time::Duration::ZERO));
}

pub(super) fn is_own_peer(socket: &OwnedFd) -> bool {
    match (rustix::net::getsockname(socket), rustix::net::getpeername(socket)) {
        (Ok(name), Ok(Some(peer))) => name == peer,
        _ => false,
    }
}
