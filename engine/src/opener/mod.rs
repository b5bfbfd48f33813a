//! The opener: a process that enters one network namespace and hands out sockets created there.
//!
//! A socket belongs for ever to the network namespace of the thread that called `socket()`, no matter which process uses it.
//! So a small process enters the namespace, drops every privilege, and creates sockets. A process that receives them over a
//! channel connects them from outside, with the same effect as from inside. The process has no other task.
//!
//! It is a process and not a thread because joining a user namespace needs a single-threaded process
//! (`setns(2)`: `EINVAL` otherwise), and because the privileges are then confined to a minimum of code.
//!
//! # Protocol
//!
//! Each message is one JSON object in one datagram of a [channel](crate::channel), at most [`ANSWER_BYTES_MAX`] long, with
//! its descriptors attached. JSON is cheap enough, since one short text accompanies up to 253 sockets. A request has one
//! answer, and answers have the order of the requests.
//!
//! 1. The first request on the first channel, the opener's standard input, is [`Request::Enter`]. The target is a
//!    descriptor, so it does not show in an argument list, and a process id that is reused meanwhile does no harm.
//! 2. The opener joins the namespace, drops every capability and the right to new ones, and answers [`Answer::Entered`]; or
//!    it answers [`Answer::Failed`] and ends.
//! 3. From then on it accepts any other request on any channel. [`Request::Channel`] creates another channel, so that each
//!    shard has its own and does not read another's answers.
//! 4. The opener ends when the other ends of all channels are closed. It does not depend on the process that started it.
//!
//! An agent ([`serve::agent`]) is inside already. A client that connects to its socket starts with [`Request::Introduce`],
//! and the agent ends when the program that contains it ends it. Only the engine sends [`Request::Dial`], to a driver that
//! dials, which answers in any order.
//!
//! If the owner of a channel does not read, its answer waits and no further request is read from it. Other channels are
//! not affected.
//!
//! # Trust
//!
//! The opener that runs on the host is part of landfall. An agent inside a container speaks the same protocol and is
//! untrusted: [`client::take`] checks each socket, and verifies itself what it can look up. It cannot prevent a hostile peer
//! from keeping a duplicate of a socket and manipulating it later. The peer gains no access by that: the socket leads into
//! its own namespace, where it could have been the server in the first place. But it can block the shard that uses the
//! socket, and with it the connections of every other container on that shard:
//!
//! - `O_NONBLOCK` belongs to the open file and so to every holder, which can clear it after the check.
//! - `recv` and `send` pass `MSG_DONTWAIT` and do not depend on the flag. `connect` uses the flag of the file only
//!   (`__sys_connect()` in net/socket.c), and so does `splice(2)` on the socket's side, regardless of `SPLICE_F_NONBLOCK`
//!   (`tcp_splice_read()` in net/ipv4/tcp.c, `splice_to_socket()` in fs/splice.c; both were seen to block on Linux 6.18).
//!   The peer decides how long such a call waits.
//! - Setting the flag right before each call leaves the same race, and another holder can change a timeout (`SO_RCVTIMEO`),
//!   too. `IORING_OP_CONNECT` would not block, but splice has no such operation except on a kernel thread, and epoll has
//!   none at all. A process cannot find out whether a socket has another holder.
//! - A close may wait, too: the last close of a socket with `SO_LINGER`, for as many seconds as a holder has set
//!   (`inet_release()` in net/ipv4/af_inet.c).
//!
//! The sockets of an agent are therefore used on an isolated shard, which shares nothing with the others and has time limits
//! (`engine/isolated.rs`). A peer that blocks it stops its own container's forwards. When the driver removes those, their
//! ports refuse connections from then on, although the blocked thread closes its descriptors of them only when it continues.
//! Openers of landfall keep no duplicates, so their sockets are used on the common shards.
//!
//! The sockets of an [`UpstreamKind::Dialler`](crate::command::UpstreamKind::Dialler) come from the driver, which controls
//! the engine anyway and is trusted. The checks there only detect mistakes.

pub mod client;
pub mod serve;

use std::fmt;
use std::io;
use std::num::NonZeroU16;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::command::Family;

/// The maximum length of a request or an answer, in bytes of JSON.
pub const ANSWER_BYTES_MAX: usize = 4096;

/// The maximum number of channels of one opener. The engine has one for each shard.
pub const CHANNELS_MAX: usize = 256;

/// The hidden verb with which the program becomes an opener.
pub const VERB: &str = "_opener";

/// The name of an agent's socket in the directory that it shares with the host.
pub const AGENT_SOCKET: &str = "agent.sock";

/// The kind of the descriptor attached to [`Request::Enter`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TargetKind {
    /// A pidfd: the network namespace of its process, joined together with its user namespace if necessary.
    Process,
    /// An open file of a network namespace, such as `/run/netns/NAME` or `/proc/PID/ns/net`.
    Path,
}

/// A request to an opener.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// Joins the namespace of the one attached descriptor. Answer: [`Answer::Entered`].
    Enter {
        /// The kind of the descriptor.
        target: TargetKind,
    },
    /// Creates TCP sockets: non-blocking, with `TCP_NODELAY` and `SO_OOBINLINE`. Answer: [`Answer::Made`].
    Sockets {
        /// Their family.
        family: Family,
        /// The number, from 1 to [`DESCRIPTORS_PER_MESSAGE_MAX`](crate::limits::DESCRIPTORS_PER_MESSAGE_MAX).
        count: u16,
        /// Their congestion control, if the kernel allows it; a host's default of BBR paces loopback.
        congestion: Option<String>,
    },
    /// Creates a TCP socket that listens on the loopback address of a family. Answer: [`Answer::Listening`].
    Listen {
        /// The family.
        family: Family,
        /// The port; 0 means any free port.
        port: u16,
    },
    /// Opens `/proc/net/tcp` and `/proc/net/tcp6` inside. Answer: [`Answer::ProcNet`].
    ProcNet,
    /// Creates a `NETLINK_SOCK_DIAG` socket. Answer: [`Answer::SockDiag`].
    SockDiag,
    /// Creates a channel, which is served from now on. Answer: [`Answer::Channel`].
    Channel,
    /// Identifies the namespace: the first request to an agent, which is inside already. Answer: [`Answer::Entered`].
    Introduce,
    /// Connects to a loopback port of the container. Sent only to a driver that is an upstream itself
    /// ([`UpstreamKind::Dialler`](crate::command::UpstreamKind::Dialler)). Answers have any order: [`Answer::Dialled`] or
    /// [`Answer::NotDialled`].
    Dial {
        /// The number of the dial, never reused on this channel.
        dial: u64,
        /// The port inside the container.
        port: NonZeroU16,
    },
}

/// An answer of an opener.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Answer {
    /// The opener is inside.
    Entered {
        /// The inode of the namespace, as in `ls -l /proc/PID/ns/net`; reused after the namespace is gone.
        netns_inode: u64,
        /// `SO_NETNS_COOKIE`, which is never reused.
        netns_cookie: u64,
    },
    /// The sockets are attached.
    Made {
        /// The number of sockets; less than requested if `error` is present.
        count: u16,
        /// The reason why it is less.
        error: Option<Failure>,
        /// The current range of ports that the namespace assigns to connecting sockets.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        ephemeral: Option<PortRange>,
    },
    /// The listening socket is attached.
    Listening,
    /// The files whose field is true are attached, in this order.
    ProcNet {
        /// `/proc/net/tcp`.
        tcp: bool,
        /// `/proc/net/tcp6`; missing where the kernel has no IPv6.
        tcp6: bool,
    },
    /// The socket is attached.
    SockDiag,
    /// The other end of the channel is attached.
    Channel,
    /// A connected, non-blocking TCP socket is attached. Data written to it arrives at the server inside; a FIN arrives as a
    /// FIN, and a reset as a reset if the connection to the container can carry one.
    Dialled {
        /// The number of the dial.
        dial: u64,
    },
    /// The server inside was not reached; the client is reset.
    NotDialled {
        /// The number of the dial.
        dial: u64,
        /// The reason.
        why: DialFailure,
    },
    /// The request failed. No descriptor is attached.
    Failed {
        /// The reason.
        failure: Failure,
    },
}

/// A range of ports, inclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortRange {
    /// The first.
    pub first: u16,
    /// The last.
    pub last: u16,
}

impl PortRange {
    /// Whether the range contains a port.
    pub fn contains(self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }

    /// Parses `net.ipv4.ip_local_port_range`.
    pub fn parse(sysctl: &str) -> Option<PortRange> {
        let mut numbers = sysctl.split_whitespace().map(str::parse);
        match (numbers.next(), numbers.next(), numbers.next()) {
            (Some(Ok(first)), Some(Ok(last)), None) => Some(PortRange { first, last }),
            _ => None,
        }
    }
}

/// The reason why a dial did not reach the server inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DialFailure {
    /// No server listens on the port, or the connection to the container is down.
    Refused,
    /// No answer came in time.
    TimedOut,
    /// Descriptors, ports or memory ran out.
    Exhausted,
}

/// The reason why an opener could not carry out a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The kind, for decisions of the caller.
    pub kind: FailureKind,
    /// A sentence for people.
    pub detail: String,
}

/// The kinds of [`Failure`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureKind {
    /// The kernel denied the access (EPERM, EACCES).
    NotPermitted,
    /// The process has ended (ESRCH).
    Gone,
    /// The namespace is the opener's original one: a forward would lead to itself.
    OwnNamespace,
    /// Descriptors or memory ran out (EMFILE, ENFILE, ENOBUFS, ENOMEM, ETOOMANYREFS).
    Exhausted,
    /// This kernel lacks the feature (EAFNOSUPPORT, EPROTONOSUPPORT, ENOPROTOOPT, ENOENT).
    Unsupported,
    /// Another socket has the port (EADDRINUSE).
    InUse,
    /// Any other error.
    Other,
}

impl Failure {
    fn new(kind: FailureKind, detail: impl Into<String>) -> Failure {
        Failure { kind, detail: detail.into() }
    }

    /// Describes the failure of `what` because of `error`.
    fn from_io(what: &str, error: &io::Error) -> Failure {
        let kind = match Errno::from_io_error(error) {
            Some(Errno::PERM | Errno::ACCESS) => FailureKind::NotPermitted,
            Some(Errno::SRCH) => FailureKind::Gone,
            Some(Errno::ADDRINUSE) => FailureKind::InUse,
            Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM | Errno::TOOMANYREFS) => {
                FailureKind::Exhausted
            }
            Some(Errno::AFNOSUPPORT | Errno::PROTONOSUPPORT | Errno::NOPROTOOPT | Errno::NOENT) => {
                FailureKind::Unsupported
            }
            _ => FailureKind::Other,
        };
        Failure::new(kind, format!("{what}: {error}"))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.detail)
    }
}
