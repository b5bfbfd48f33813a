//! Brings up the loopback interface of this thread's network namespace.
//!
//! One `RTM_NEWLINK` of 32 bytes over rtnetlink, and its acknowledgement (`rtnetlink(7)`, `netlink(7)`,
//! `include/uapi/linux/rtnetlink.h`). Written out here, since a netlink crate would bring a hundred message kinds
//! for this one.

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

/// `lo` is created with its namespace and is always its first interface (`LOOPBACK_IFINDEX`, `include/linux/if.h`).
const LOOPBACK_INDEX: i32 = 1;
const RTM_NEWLINK: u16 = 16;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLMSG_ERROR: u16 = 2;
const IFF_UP: u32 = 1;
const MESSAGE_BYTES: u32 = 32;

/// Sets `IFF_UP` on `lo`; needs CAP_NET_ADMIN in this network namespace.
pub(super) fn bring_loopback_up() -> Result<(), Errno> {
    let flags = SocketFlags::CLOEXEC;
    // The default protocol 0 is NETLINK_ROUTE.
    let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
    rustix::net::send(&socket, &request(), SendFlags::empty())?;
    let mut answer = [0; 256];
    let (bytes, _) =
        rustix::io::retry_on_intr(|| rustix::net::recv(&socket, answer.as_mut_slice(), RecvFlags::empty()))?;
    acknowledged(answer.get(..bytes).unwrap_or_default())
}

/// `struct nlmsghdr` (length, kind, flags, sequence, port) and `struct ifinfomsg` (family and padding, device type,
/// index, flags, which flags to change), all in the byte order of the machine.
fn request() -> Vec<u8> {
    let mut message = Vec::with_capacity(32);
    message.extend(MESSAGE_BYTES.to_ne_bytes());
    message.extend(RTM_NEWLINK.to_ne_bytes());
    message.extend((NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
    message.extend(1u32.to_ne_bytes());
    message.extend(0u32.to_ne_bytes());
    message.extend([0; 4]);
    message.extend(LOOPBACK_INDEX.to_ne_bytes());
    message.extend(IFF_UP.to_ne_bytes());
    message.extend(IFF_UP.to_ne_bytes());
    message
}

/// An acknowledgement is an `NLMSG_ERROR` with code 0; any other code is a negated errno.
fn acknowledged(answer: &[u8]) -> Result<(), Errno> {
    let kind = answer.get(4..6).and_then(|bytes| bytes.try_into().ok()).map(u16::from_ne_bytes);
    let code = answer.get(16..20).and_then(|bytes| bytes.try_into().ok()).map(i32::from_ne_bytes);
    match (kind, code) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(code)) => Err(Errno::from_raw_os_error(code.saturating_neg())),
        _ => Err(Errno::BADMSG),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_has_the_length_in_its_header() {
        assert_eq!(request().len(), 32);
        assert_eq!(request().get(..4), Some(32u32.to_ne_bytes().as_slice()));
    }

    #[test]
    fn answer_other_than_an_acknowledgement_is_an_error() {
        let mut answer = vec![0; 36];
        answer.splice(4..6, NLMSG_ERROR.to_ne_bytes());
        assert_eq!(acknowledged(&answer), Ok(()));
        answer.splice(16..20, (-1i32).to_ne_bytes());
        assert_eq!(acknowledged(&answer), Err(Errno::PERM));
        assert_eq!(acknowledged(&answer[..10]), Err(Errno::BADMSG));
        assert_eq!(acknowledged(&[]), Err(Errno::BADMSG));
    }
}
