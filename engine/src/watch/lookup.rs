//! The lookup of one TCP socket of this network namespace: which socket, and whose, receives a segment.
//!
//! A process that sends a secret over a loopback connection has to know which user reads it. The kernel reports this for the
//! listener of a port and for the other end of an established connection. The lookup needs no privilege, and its cost does
//! not depend on the number of sockets.
//!
//! An unprivileged lookup of a missing socket and a kernel without `sock_diag` for TCP give the same answer. To distinguish
//! them, a caller also looks up a socket of its own, which must be found.

use std::net::SocketAddr;

use rustix::io::{Errno, retry_on_intr};
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{RecvFlags, SendFlags, recvfrom, sendto};

pub use super::diag_message::TcpSocket;
use super::diag_message::{lookup_answer, lookup_request};
use super::sock_diag;
use super::source::ReadError;

/// The interface index of `lo` in every network namespace (`LOOPBACK_IFINDEX`, include/net/flow.h).
pub const LOOPBACK: u32 = 1;

/// Room for one answer: a header, an `inet_diag_msg` and the attributes that a kernel adds unrequested.
const ANSWER_BYTES: usize = 1024;

/// The sequence number of the only request on its socket.
const SEQUENCE: u32 = 1;

/// Looks up the socket that receives a segment from `peer` to `local`, where the segment arrives on `interface`: the
/// connection between the two, else the listener. No connection has port 0, so a `peer` with port 0 finds the listener.
/// Does not wait: the kernel has put its answer into the socket when `sendto` returns.
///
/// # Errors
/// [`ReadError`]: the kernel did not answer, so the owner of the socket is unknown.
pub fn lookup(local: SocketAddr, peer: SocketAddr, interface: u32) -> Result<Option<TcpSocket>, ReadError> {
    let socket = sock_diag::open().map_err(ReadError::Diag)?;
    let request = lookup_request(local, peer, interface, SEQUENCE);
    let kernel = SocketAddrNetlink::new(0, 0);
    retry_on_intr(|| sendto(&socket, &request, SendFlags::DONTWAIT, &kernel)).map_err(ReadError::Diag)?;
    let mut answer = [0; ANSWER_BYTES];
    let flags = RecvFlags::DONTWAIT | RecvFlags::TRUNC;
    let (_, bytes, from) =
        retry_on_intr(|| recvfrom(&socket, answer.as_mut_slice(), flags)).map_err(ReadError::Diag)?;
    // A process with CAP_NET_ADMIN can send to this socket, too.
    let is_kernel =
        from.and_then(|from| SocketAddrNetlink::try_from(from).ok()).is_some_and(|from| from.pid() == 0);
    if !is_kernel {
        return Err(ReadError::Diag(Errno::PERM));
    }
    lookup_answer(answer.get(..bytes).ok_or(ReadError::Malformed("answer too long"))?, SEQUENCE)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

    use super::*;

    fn inode(socket: impl AsFd) -> u32 {
        u32::try_from(rustix::fs::fstat(socket).unwrap().st_ino).unwrap()
    }

    fn listener_at(address: SocketAddr) -> Option<TcpSocket> {
        let any_peer = SocketAddr::new(address.ip(), 0);
        lookup(address, any_peer, LOOPBACK).unwrap()
    }

    #[test]
    fn a_listener_is_found_by_each_address_that_it_answers() {
        for bound in ["127.0.0.1:0", "0.0.0.0:0", "[::]:0", "[::1]:0"] {
            let listener = TcpListener::bind(bound).unwrap();
            let port = listener.local_addr().unwrap().port();
            for (asked, answers) in [("127.0.0.1", bound != "[::1]:0"), ("::1", bound.starts_with('['))] {
                let found = listener_at(SocketAddr::new(asked.parse().unwrap(), port));
                let found = found.map(|found| (found.is_listener, found.inode, found.uid));
                let own = (true, inode(&listener), rustix::process::geteuid().as_raw());
                assert_eq!(found, answers.then_some(own), "{bound} asked for at {asked}");
            }
        }
    }

    #[test]
    fn each_end_of_a_connection_is_found_and_an_end_that_is_not_accepted_has_no_inode() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (near, far) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
        let find = |local, peer| lookup(local, peer, LOOPBACK).unwrap().unwrap();
        assert_eq!(find(near, far).inode, inode(&client));
        assert_eq!(find(far, near).inode, 0);
        let (server, _) = listener.accept().unwrap();
        assert_eq!((find(far, near).inode, find(far, near).is_listener), (inode(&server), false));
        assert_ne!(find(far, near).cookie, listener_at(far).unwrap().cookie);
        drop((client, server, listener));
        assert_eq!(listener_at(far), None);
    }

    #[test]
    fn a_listener_that_is_bound_to_the_loopback_device_is_found() {
        // The bind that reserves the port uses another address, so no other process takes the port meanwhile.
        let reserved = TcpListener::bind("127.0.0.2:0").unwrap();
        let port = reserved.local_addr().unwrap().port();
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let socket =
            rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::STREAM, None)
                .unwrap();
        nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::BindToDevice, &"lo".into()).unwrap();
        rustix::net::bind(&socket, &address).unwrap();
        rustix::net::listen(&socket, 1).unwrap();
        assert_eq!(listener_at(address).map(|found| found.inode), Some(inode(&socket)));
        assert_eq!(lookup(address, SocketAddr::from(([127, 0, 0, 1], 0)), 0).unwrap(), None);
    }
}
