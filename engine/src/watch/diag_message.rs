//! The messages of `NETLINK_SOCK_DIAG`: a list of the TCP sockets in LISTEN state, and the lookup of one TCP socket. Pure.
//!
//! A request is a `nlmsghdr` and an `inet_diag_req_v2` (`linux/netlink.h`, `linux/inet_diag.h`); an answer is a sequence of
//! datagrams with a `nlmsghdr` and an `inet_diag_msg` for each socket, closed by `NLMSG_DONE`. Headers are in the byte order
//! of the machine, ports and addresses in that of the network. Of the attributes that follow an `inet_diag_msg`,
//! [`connection`] reads `INET_DIAG_INFO`. A message that does not fit its datagram is an error, never a panic.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroU16;

use rustix::io::Errno;

use super::source::ReadError;
use crate::command::{Family, Listening};

/// Length of [`request`]: 16 bytes of header and 56 of request.
pub const REQUEST_BYTES: usize = 72;

/// Requests all listening TCP sockets of one family. The kernel then does not walk the hash of connections
/// (`inet_diag_dump_icsk`, `net/ipv4/inet_diag.c`), which makes the request cheap.
pub fn request(family: Family, sequence: u32) -> [u8; REQUEST_BYTES] {
    let mut bytes = [0; REQUEST_BYTES];
    bytes[0..4].copy_from_slice(&72u32.to_ne_bytes());
    bytes[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes[6..8].copy_from_slice(&(NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
    bytes[16] = address_family(family);
    bytes[17] = IPPROTO_TCP;
    bytes[20..24].copy_from_slice(&(1u32 << TCP_LISTEN).to_ne_bytes());
    bytes
}

/// Requests all TCP connections of one family, with their counters. The kernel walks its hash of connections, which takes
/// about a millisecond on an idle machine.
pub fn connections_request(family: Family, sequence: u32) -> [u8; REQUEST_BYTES] {
    let mut bytes = request(family, sequence);
    bytes[18] = 1 << (INET_DIAG_INFO - 1);
    bytes[20..24].copy_from_slice(&CONNECTION_STATES.to_ne_bytes());
    bytes
}

/// Requests the one TCP socket that would receive a segment from `peer` to `local` on `interface`: the connection between
/// the two addresses, else the listener on `local`. The kernel makes the same lookup as for an arriving segment
/// (`inet_diag_find_one_icsk`, `net/ipv4/inet_diag.c`), so one answer covers the wildcard addresses, a dual-stack listener
/// and a listener that is bound to a device.
///
/// Both addresses are of the family of `local`. Interface 0 finds no socket that is bound to a device.
pub fn lookup_request(
    local: SocketAddr,
    peer: SocketAddr,
    interface: u32,
    sequence: u32,
) -> [u8; REQUEST_BYTES] {
    let family = if local.is_ipv4() { Family::V4 } else { Family::V6 };
    let mut bytes = request(family, sequence);
    bytes[6..8].copy_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    bytes[20..24].fill(0xff);
    bytes[24..26].copy_from_slice(&local.port().to_be_bytes());
    bytes[26..28].copy_from_slice(&peer.port().to_be_bytes());
    for (address, at) in [(local.ip(), 28), (peer.ip(), 44)] {
        match address {
            IpAddr::V4(v4) => bytes[at..at + 4].copy_from_slice(&v4.octets()),
            IpAddr::V6(v6) => bytes[at..at + 16].copy_from_slice(&v6.octets()),
        }
    }
    bytes[60..64].copy_from_slice(&interface.to_ne_bytes());
    // `INET_DIAG_NOCOOKIE`: matches any cookie.
    bytes[64..72].fill(0xff);
    bytes
}

/// One TCP socket, as the kernel describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpSocket {
    /// Whether the socket is a listener, not a connection.
    pub is_listener: bool,
    /// The user who created a listener or accepted a connection, in the user namespace of the reader.
    pub uid: u32,
    /// The inode that `/proc/PID/fd` shows. 0: no process holds the socket, because it is not accepted yet or is closed.
    pub inode: u32,
    /// The socket's cookie, which the kernel gives to no other socket.
    pub cookie: u64,
}

/// Reads the answer to [`lookup_request`]. `None` means that the socket is missing, or that this kernel lacks `sock_diag`
/// for TCP: the kernel reports both with the same error number.
///
/// # Errors
/// [`ReadError::Refused`] with the kernel's reason, [`ReadError::Malformed`] for a message that no kernel sends.
pub fn lookup_answer(mut bytes: &[u8], sequence: u32) -> Result<Option<TcpSocket>, ReadError> {
    let message = Message::split(&mut bytes)?;
    match message.kind {
        _ if message.sequence != sequence => Err(ReadError::Malformed("an answer to another request")),
        NLMSG_ERROR => match refusal(message.payload) {
            Err(ReadError::Refused(Errno::NOENT)) => Ok(None),
            Err(error) => Err(error),
            Ok(()) => Err(ReadError::Malformed("an acknowledgement without an answer")),
        },
        SOCK_DIAG_BY_FAMILY => tcp_socket(message.payload).map(Some),
        _ => Err(ReadError::Malformed("a message of another type")),
    }
}

fn tcp_socket(payload: &[u8]) -> Result<TcpSocket, ReadError> {
    const SHORT: ReadError = ReadError::Malformed("socket cut short");
    if payload.len() < SOCKET_BYTES {
        return Err(SHORT);
    }
    Ok(TcpSocket {
        is_listener: payload[1] == TCP_LISTEN,
        uid: u32::from_ne_bytes(field(payload, 64).ok_or(SHORT)?),
        inode: u32::from_ne_bytes(field(payload, 68).ok_or(SHORT)?),
        cookie: u64::from_ne_bytes(field(payload, 44).ok_or(SHORT)?),
    })
}

/// The state of an answer after one of its datagrams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The answer is complete.
    pub done: bool,
    /// The table changed during the dump, so the answer is inconsistent (`NLM_F_DUMP_INTR`): send the request again.
    pub interrupted: bool,
}

/// Parses one datagram of the answer to [`request`] and passes its listeners to `each`. Skips messages of another
/// sequence, which belong to an abandoned request.
///
/// # Errors
/// [`ReadError::Refused`] with the kernel's reason, [`ReadError::Malformed`] for a message that no kernel sends.
pub fn datagram(
    bytes: &[u8],
    sequence: u32,
    family: Family,
    mut each: impl FnMut(Listening),
) -> Result<Progress, ReadError> {
    sockets(bytes, sequence, |payload| {
        if let Some(row) = listener(payload, family)? {
            each(row);
        }
        Ok(())
    })
}

/// Parses one datagram of an answer and passes each `inet_diag_msg`, with its attributes, to `each`.
///
/// # Errors
/// Those of [`datagram`], and those of `each`.
pub fn sockets(
    mut bytes: &[u8],
    sequence: u32,
    mut each: impl FnMut(&[u8]) -> Result<(), ReadError>,
) -> Result<Progress, ReadError> {
    let mut progress = Progress { done: false, interrupted: false };
    while !bytes.is_empty() {
        let message = Message::split(&mut bytes)?;
        if message.sequence != sequence {
            continue;
        }
        progress.interrupted |= message.flags & NLM_F_DUMP_INTR != 0;
        match message.kind {
            NLMSG_ERROR => refusal(message.payload)?,
            NLMSG_DONE => {
                // The kernel appends the result of the dump; older kernels may omit it.
                if !message.payload.is_empty() {
                    refusal(message.payload)?;
                }
                progress.done = true;
                return Ok(progress);
            }
            NLMSG_OVERRUN => return Err(ReadError::Malformed("answer overran")),
            SOCK_DIAG_BY_FAMILY => each(message.payload)?,
            _ => {}
        }
    }
    Ok(progress)
}

/// Counters of one TCP connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    /// The local port.
    pub port: u16,
    /// Bytes received from the peer.
    pub bytes_received: u64,
    /// Bytes that its peer has acknowledged.
    pub bytes_acked: u64,
}

/// Parses the counters of a connection from an `inet_diag_msg`. Returns `None` if the kernel sent no counters.
///
/// # Errors
/// [`ReadError::Malformed`] for a message that no kernel sends.
pub fn connection(payload: &[u8]) -> Result<Option<Connection>, ReadError> {
    const SHORT: ReadError = ReadError::Malformed("socket cut short");
    let mut attributes = payload.get(SOCKET_BYTES..).ok_or(SHORT)?;
    let port = u16::from_be_bytes(field(payload, 4).ok_or(SHORT)?);
    // `struct rtattr`: length and kind, then the value, padded to four bytes.
    while !attributes.is_empty() {
        let length = usize::from(u16::from_ne_bytes(field(attributes, 0).ok_or(SHORT)?));
        let kind = u16::from_ne_bytes(field(attributes, 2).ok_or(SHORT)?);
        let value = attributes.get(4..length).ok_or(SHORT)?;
        if kind == INET_DIAG_INFO {
            let bytes_acked = field(value, TCP_INFO_BYTES_ACKED).map(u64::from_ne_bytes);
            let bytes_received = field(value, TCP_INFO_BYTES_RECEIVED).map(u64::from_ne_bytes);
            let counters = bytes_acked.zip(bytes_received);
            return Ok(counters.map(|(bytes_acked, bytes_received)| Connection {
                port,
                bytes_received,
                bytes_acked,
            }));
        }
        attributes = attributes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(None)
}

struct Message<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    payload: &'a [u8],
}

impl<'a> Message<'a> {
    /// Splits the first message off `bytes`, with its padding to four bytes.
    fn split(bytes: &mut &'a [u8]) -> Result<Message<'a>, ReadError> {
        const SHORT: ReadError = ReadError::Malformed("message cut short");
        let length = usize::try_from(u32::from_ne_bytes(field(bytes, 0).ok_or(SHORT)?)).map_err(|_| SHORT)?;
        let message = bytes.get(..length).ok_or(SHORT)?;
        let payload = message.get(HEADER_BYTES..).ok_or(SHORT)?;
        let kind = u16::from_ne_bytes(field(message, 4).ok_or(SHORT)?);
        let flags = u16::from_ne_bytes(field(message, 6).ok_or(SHORT)?);
        let sequence = u32::from_ne_bytes(field(message, 8).ok_or(SHORT)?);
        *bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Ok(Message { kind, flags, sequence, payload })
    }
}

/// Converts the result code of a message: an error if it is negative.
fn refusal(payload: &[u8]) -> Result<(), ReadError> {
    let code = i32::from_ne_bytes(field(payload, 0).ok_or(ReadError::Malformed("error cut short"))?);
    if code >= 0 {
        return Ok(());
    }
    Err(ReadError::Refused(Errno::from_raw_os_error(code.checked_neg().unwrap_or(i32::MAX).min(ERRNO_MAX))))
}

/// Parses a listener from an `inet_diag_msg`. Returns `None` for a socket of another family or state, or without a port.
///
/// # Errors
/// [`ReadError::Malformed`] for a message that no kernel sends.
pub fn listener(payload: &[u8], family: Family) -> Result<Option<Listening>, ReadError> {
    const SHORT: ReadError = ReadError::Malformed("socket cut short");
    if payload.len() < SOCKET_BYTES {
        return Err(SHORT);
    }
    let port = NonZeroU16::new(u16::from_be_bytes(field(payload, 4).ok_or(SHORT)?));
    let (true, Some(port)) = (payload[0] == address_family(family) && payload[1] == TCP_LISTEN, port) else {
        return Ok(None);
    };
    let address = match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::from(field::<4>(payload, 8).ok_or(SHORT)?)),
        Family::V6 => IpAddr::V6(Ipv6Addr::from(field::<16>(payload, 8).ok_or(SHORT)?)),
    };
    let uid = u32::from_ne_bytes(field(payload, 64).ok_or(SHORT)?);
    let inode = u64::from(u32::from_ne_bytes(field(payload, 68).ok_or(SHORT)?));
    Ok(Some(Listening { port, address, inode, uid }))
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

fn address_family(family: Family) -> u8 {
    match family {
        Family::V4 => 2,
        Family::V6 => 10,
    }
}

const HEADER_BYTES: usize = 16;
const SOCKET_BYTES: usize = 72;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLMSG_OVERRUN: u16 = 4;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_DUMP: u16 = 0x300;
const IPPROTO_TCP: u8 = 6;
const TCP_LISTEN: u8 = 10;
/// ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK and CLOSING (`include/net/tcp_states.h`).
const CONNECTION_STATES: u32 = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11;
/// The attribute that holds a `struct tcp_info`, and the offsets of two of its fields (`linux/tcp.h`, Linux 4.1).
const INET_DIAG_INFO: u16 = 2;
const TCP_INFO_BYTES_ACKED: usize = 120;
const TCP_INFO_BYTES_RECEIVED: usize = 128;
/// `MAX_ERRNO` of the kernel (`include/linux/err.h`).
const ERRNO_MAX: i32 = 4095;

#[cfg(test)]
#[path = "diag_message_tests.rs"]
mod tests;
