//! Listeners from a `NETLINK_SOCK_DIAG` socket that was created inside a namespace.
//!
//! The kernel answers for the namespace of the socket, not of the calling thread. It queues the first datagram of an answer
//! before `sendto` returns, and each further one during the receive of the one before (`netlink_dump_start`,
//! `netlink_recvmsg` in `net/netlink/af_netlink.c`). A receive therefore never needs to wait: one that would block is an
//! error, and no socket can block the watch.

use std::os::fd::OwnedFd;

use rustix::io::{Errno, retry_on_intr};
use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::sockopt::{socket_domain, socket_protocol};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recvfrom, sendto, socket_with,
};

use super::diag_message::{
    Connection, REQUEST_BYTES, connection, connections_request, listener, request, sockets,
};
use super::reading::Reading;
use super::source::{ReadError, Wholeness};
use crate::command::{Family, Listening};

/// The maximum length of the kernel's datagrams (`netlink_dump`, `net/netlink/af_netlink.c`).
const BUFFER_BYTES: usize = 32 * 1024;

/// The maximum number of datagrams of one answer. Each holds at least 40 sockets, so this is room for four million.
const DATAGRAMS_MAX: u32 = 100_000;

/// A `sock_diag` socket of one namespace.
#[derive(Debug)]
pub struct SockDiag {
    socket: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
    /// The last answer was abandoned part-way, so its rest may still be queued in the socket.
    leftover: bool,
}

/// Creates such a socket in the namespace of the calling thread.
///
/// # Errors
/// Those of `socket(2)`: EPROTONOSUPPORT where the kernel has no `sock_diag`.
pub fn open() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(netlink::SOCK_DIAG))
}

impl SockDiag {
    /// Takes the socket, which may have come from a container.
    ///
    /// # Errors
    /// [`ReadError::NotSockDiag`] for any other descriptor.
    pub fn new(socket: OwnedFd) -> Result<SockDiag, ReadError> {
        let is_netlink = socket_domain(&socket).is_ok_and(|domain| domain == AddressFamily::NETLINK);
        if !is_netlink || socket_protocol(&socket).ok().flatten() != Some(netlink::SOCK_DIAG) {
            return Err(ReadError::NotSockDiag);
        }
        Ok(SockDiag { socket, sequence: 0, buffer: vec![0; BUFFER_BYTES], leftover: true })
    }

    /// Requests both families and puts the answers into `reading`, which is cleared first.
    ///
    /// # Errors
    /// Any of [`ReadError`]. The contents of `reading` are then invalid.
    pub fn read(&mut self, reading: &mut Reading) -> Result<Wholeness, ReadError> {
        match self.read_once(reading) {
            Err(ReadError::Interrupted) => self.read_once(reading),
            result => result,
        }
    }

    fn read_once(&mut self, reading: &mut Reading) -> Result<Wholeness, ReadError> {
        reading.clear();
        self.each(|row| reading.insert(row))
    }

    /// Returns every listening socket of the namespace, on any address, including sockets that share an address.
    ///
    /// # Errors
    /// Any of [`ReadError`].
    pub fn listeners(&mut self) -> Result<Vec<Listening>, ReadError> {
        let mut listeners = Vec::new();
        match self.each(|row| listeners.push(row)) {
            Err(ReadError::Interrupted) => {
                listeners.clear();
                self.each(|row| listeners.push(row))?;
            }
            result => drop(result?),
        }
        Ok(listeners)
    }

    fn each(&mut self, mut each: impl FnMut(Listening)) -> Result<Wholeness, ReadError> {
        if std::mem::replace(&mut self.leftover, true) {
            self.empty()?;
        }
        let v4 = self.ask(Family::V4, &mut each)?;
        let v6 = self.ask(Family::V6, &mut each)?;
        self.leftover = false;
        match (v4, v6) {
            (Wholeness::Whole, Wholeness::Whole) => Ok(Wholeness::Whole),
            _ => Ok(Wholeness::Pieced),
        }
    }

    /// Passes every TCP connection of the namespace to `each`. A connection that opens or closes meanwhile may be missing.
    ///
    /// # Errors
    /// Any of [`ReadError`].
    pub fn connections(&mut self, mut each: impl FnMut(Connection)) -> Result<(), ReadError> {
        if std::mem::replace(&mut self.leftover, true) {
            self.empty()?;
        }
        for family in Family::ALL {
            let asked = self.dump(connections_request(family, self.sequence.wrapping_add(1)), |payload| {
                Ok(connection(payload)?.is_some_and(|found| {
                    each(found);
                    true
                }))
            });
            match asked {
                Ok(_) | Err(ReadError::Interrupted) => {}
                Err(error) => return Err(error),
            }
        }
        self.leftover = false;
        Ok(())
    }

    fn ask(&mut self, family: Family, each: &mut impl FnMut(Listening)) -> Result<Wholeness, ReadError> {
        self.dump(request(family, self.sequence.wrapping_add(1)), |payload| {
            Ok(listener(payload, family)?.is_some_and(|row| {
                each(row);
                true
            }))
        })
    }

    /// Sends a request, which has the next sequence number, and passes every socket of the answer to `each`. `each` returns
    /// whether the socket matches the request.
    fn dump(
        &mut self,
        request: [u8; REQUEST_BYTES],
        mut each: impl FnMut(&[u8]) -> Result<bool, ReadError>,
    ) -> Result<Wholeness, ReadError> {
        self.sequence = self.sequence.wrapping_add(1);
        let kernel = SocketAddrNetlink::new(0, 0);
        retry_on_intr(|| sendto(&self.socket, &request, SendFlags::DONTWAIT, &kernel))
            .map_err(ReadError::Diag)?;
        let mut interrupted = false;
        let mut datagrams_with_rows = 0u32;
        for _ in 0..DATAGRAMS_MAX {
            let Some(bytes) = self.receive()? else { continue };
            let mut rows = 0u32;
            let bytes = self.buffer.get(..bytes).ok_or(ReadError::Malformed("datagram too long"))?;
            let progress = sockets(bytes, self.sequence, |payload| {
                rows += u32::from(each(payload)?);
                Ok(())
            })?;
            interrupted |= progress.interrupted;
            datagrams_with_rows += u32::from(rows > 0);
            match (progress.done, interrupted, datagrams_with_rows) {
                (false, ..) => {}
                (true, true, _) => return Err(ReadError::Interrupted),
                (true, false, 0 | 1) => return Ok(Wholeness::Whole),
                (true, false, _) => return Ok(Wholeness::Pieced),
            }
        }
        Err(ReadError::TooLong)
    }

    /// Receives the next datagram and returns its length. Returns `None` if the kernel did not send it: a process in the
    /// namespace with `CAP_NET_ADMIN` can send to this socket, too.
    fn receive(&mut self) -> Result<Option<usize>, ReadError> {
        let flags = RecvFlags::DONTWAIT | RecvFlags::TRUNC;
        let (_, bytes, from) = retry_on_intr(|| recvfrom(&self.socket, self.buffer.as_mut_slice(), flags))
            .map_err(ReadError::Diag)?;
        let from_kernel =
            from.and_then(|from| SocketAddrNetlink::try_from(from).ok()).is_some_and(|from| from.pid() == 0);
        Ok(from_kernel.then_some(bytes))
    }

    /// Discards the queued datagrams. Receiving also completes an unfinished answer, before which the kernel refuses another
    /// request (EBUSY).
    fn empty(&mut self) -> Result<(), ReadError> {
        for _ in 0..DATAGRAMS_MAX {
            match self.receive() {
                Err(ReadError::Diag(Errno::AGAIN)) => return Ok(()),
                // The kernel dropped datagrams because the socket was full; the rest still has to be discarded.
                Ok(_) | Err(ReadError::Diag(Errno::NOBUFS)) => {}
                Err(error) => return Err(error),
            }
        }
        Err(ReadError::TooLong)
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn any_other_descriptor_is_refused() {
        // Protocol 0 of netlink is routing.
        let route = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None);
        let tcp = OwnedFd::from(TcpListener::bind("127.0.0.1:0").unwrap());
        for other in [OwnedFd::from(tempfile::tempfile().unwrap()), route.unwrap(), tcp] {
            assert!(matches!(SockDiag::new(other), Err(ReadError::NotSockDiag)));
        }
    }

    #[test]
    fn an_abandoned_answer_does_not_affect_the_next() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut diag = SockDiag::new(open().unwrap()).unwrap();
        // Sent, and its answer never received: the kernel would answer EBUSY to the next request.
        let request = request(Family::V4, 99);
        sendto(&diag.socket, &request, SendFlags::empty(), &SocketAddrNetlink::new(0, 0)).unwrap();
        let mut reading = Reading::default();
        diag.read(&mut reading).unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(reading.rows().iter().any(|row| row.port.get() == port));
    }
}
