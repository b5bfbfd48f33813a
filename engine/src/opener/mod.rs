//! The opener: a process that enters one network namespace and hands out sockets made there.
//!
//! A socket belongs to the network namespace of the thread that called `socket()`, for ever, wherever it is then
//! used. So one small process goes in, gives up every privilege, and makes sockets; whoever gets them over a
//! channel connects them from outside as if it stood inside. The process has no other verb.
//!
//! It is a process and not a thread because joining a user namespace takes a single-threaded one
//! (`setns(2)`: `EINVAL` otherwise), and because privilege then lives in as little code as can be.
//!
//! # The conversation
//!
//! Each message is one JSON object in one datagram of a [channel](crate::channel), at most [`ANSWER_BYTES_MAX`]
//! long, with its descriptors beside it. JSON, since one small text goes with up to 253 sockets. A request has one
//! answer, and answers come in the order of the requests.
//!
//! 1. The first request on the first channel, the opener's standard input, is [`Request::Enter`]. The target comes
//!    as a descriptor, so nothing shows in an argument list and no process id can be used again underneath us.
//! 2. The opener joins, drops every capability, forbids itself new ones, and answers [`Answer::Entered`]; or
//!    answers [`Answer::Failed`] and ends.
//! 3. From then on any channel may ask for anything else. [`Request::Channel`] makes a channel more, so that each
//!    shard has its own and none reads another's answers.
//! 4. The opener ends when every channel has been closed by its other side. Who started it does not matter.
//!
//! An agent ([`serve::agent`]) is inside already. Whoever connects to its socket begins with [`Request::Introduce`], and it
//! ends when the program that it is part of says so. A driver that dials ([`Request::Dial`]) is asked by the engine alone, and
//! answers in any order.
//!
//! A channel whose owner does not read is answered later and read no further, so it stops no other one.
//!
//! # Trust
//!
//! The opener that runs on the host is ours. The same conversation is led with an agent inside a container, which
//! is not: so [`client::take`] checks each socket, and believes no answer that it can look up itself. What cannot be
//! had is that a hostile peer keeps no duplicate of a socket and plays with it later. It gains no reach by that:
//! the socket leads into its own namespace, where it could have been the server in the first place. But it can stop the
//! shard that uses the socket, and with it the connections of every other container there:
//!
//! - `O_NONBLOCK` belongs to the open file and so to every holder, who may take it away after the check.
//! - `recv` and `send` ask for `MSG_DONTWAIT` and do not care. `connect` goes by the file alone (`__sys_connect()` in
//!   net/socket.c), and so does `splice(2)` on the socket's side, whatever `SPLICE_F_NONBLOCK` says (`tcp_splice_read()` in
//!   net/ipv4/tcp.c, `splice_to_socket()` in fs/splice.c; both were seen to block on Linux 6.18). Such a call waits for as
//!   long as the peer likes.
//! - To set the flag right before each call leaves the same race, and a timeout (`SO_RCVTIMEO`) is the holder's to change
//!   as well. `IORING_OP_CONNECT` would not block, but there is no such way for splice that does not go to a thread,
//!   and none at all over epoll. Nor can one tell whether a socket has another holder.
//!
//! - A close may wait as well: that of a socket with `SO_LINGER` set, by whoever closes it last, for as many seconds as the
//!   holder has set (`inet_release()` in net/ipv4/af_inet.c).
//!
//! So the sockets of an agent are used on a shard of its own, which shares nothing with the others and is not waited for
//! (`engine/apart.rs`). A peer that holds it up stops its own container's forwards. When the driver lets go of those, their
//! ports refuse whoever comes from then on, though the descriptors that are bound to them are closed only when the thread
//! gets to it. Openers of ours keep no duplicates, and share the common shards.
//!
//! What a driver hands over for an [`UpstreamKind::Dialler`](crate::command::UpstreamKind::Dialler) is believed as the driver
//! is, whose socket the engine obeys in all things: what is looked at there is what a mistake could make of it.

pub mod client;
pub mod serve;

use std::fmt;
use std::io;
use std::num::NonZeroU16;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::command::Family;

/// The longest request or answer, in bytes of JSON.
pub const ANSWER_BYTES_MAX: usize = 4096;

/// The most channels that one opener serves. The engine has one for each shard.
pub const CHANNELS_MAX: usize = 256;

/// The hidden verb of the program by which it becomes an opener.
pub const VERB: &str = "_opener";

/// The name of an agent's socket in the directory that it shares with the host.
pub const AGENT_SOCKET: &str = "agent.sock";

/// What the descriptor beside [`Request::Enter`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TargetKind {
    /// A pidfd: its process's network namespace, by way of its user namespace where that is needed.
    Process,
    /// An open file of a network namespace, such as `/run/netns/NAME` or `/proc/PID/ns/net`.
    Path,
}

/// What an opener is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// Join the namespace of the one descriptor that comes with it. Answer: [`Answer::Entered`].
    Enter {
        /// What the descriptor is.
        target: TargetKind,
    },
    /// TCP sockets: non-blocking, `TCP_NODELAY` and `SO_OOBINLINE` on, otherwise untouched. Answer: [`Answer::Made`].
    Sockets {
        /// Their family.
        family: Family,
        /// How many, from 1 to [`DESCRIPTORS_PER_MESSAGE_MAX`](crate::limits::DESCRIPTORS_PER_MESSAGE_MAX).
        count: u16,
        /// Their congestion control, where the kernel allows it; a host's default of BBR paces loopback.
        congestion: Option<String>,
    },
    /// A TCP socket that listens on the loopback address of a family. Answer: [`Answer::Listening`].
    Listen {
        /// The family.
        family: Family,
        /// The port; 0: one that is free.
        port: u16,
    },
    /// `/proc/net/tcp` and `/proc/net/tcp6`, opened inside. Answer: [`Answer::ProcNet`].
    ProcNet,
    /// A `NETLINK_SOCK_DIAG` socket. Answer: [`Answer::SockDiag`].
    SockDiag,
    /// One end of a new channel that is served from now on. Answer: [`Answer::Channel`].
    Channel,
    /// Say where you are: the first request to an agent, which is inside already. Answer: [`Answer::Entered`].
    Introduce,
    /// Connect to a loopback port of the container. Only a driver that is an upstream itself
    /// ([`UpstreamKind::Dialler`](crate::command::UpstreamKind::Dialler)) is asked. Answers come in any order:
    /// [`Answer::Dialled`] or [`Answer::NotDialled`].
    Dial {
        /// Which dial this is, on this channel; never used again.
        dial: u64,
        /// The port inside.
        port: NonZeroU16,
    },
}

/// What an opener answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Answer {
    /// It is inside.
    Entered {
        /// The inode of the namespace, which `ls -l /proc/PID/ns/net` shows; used again after the namespace is gone.
        netns_inode: u64,
        /// `SO_NETNS_COOKIE`, which is never used again.
        netns_cookie: u64,
    },
    /// So many sockets come with it.
    Made {
        /// How many; fewer than asked when `error` is there.
        count: u16,
        /// Why not all.
        error: Option<Failure>,
        /// The ports that the namespace gives to sockets which connect, as of now.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        ephemeral: Option<PortRange>,
    },
    /// The listening socket comes with it.
    Listening,
    /// The files that are named true come with it, in this order.
    ProcNet {
        /// `/proc/net/tcp`.
        tcp: bool,
        /// `/proc/net/tcp6`; missing where the kernel has no IPv6.
        tcp6: bool,
    },
    /// The socket comes with it.
    SockDiag,
    /// The channel's end comes with it.
    Channel,
    /// A connected, non-blocking TCP socket comes with it: what is sent there arrives at the server inside, a FIN as a FIN and
    /// a reset as a reset as far as the way there can tell.
    Dialled {
        /// Which dial.
        dial: u64,
    },
    /// The server inside was not reached; the client is reset.
    NotDialled {
        /// Which dial.
        dial: u64,
        /// Why.
        why: DialFailure,
    },
    /// Nothing comes with it.
    Failed {
        /// Why.
        failure: Failure,
    },
}

/// Ports from the first to the last, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortRange {
    /// The first.
    pub first: u16,
    /// The last.
    pub last: u16,
}

impl PortRange {
    /// Whether a port is in the range.
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

/// Why a dial did not reach the server inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DialFailure {
    /// Nothing listens on the port, or the way to the container is down.
    Refused,
    /// No answer came.
    TimedOut,
    /// Descriptors, ports or memory ran out on the way.
    Exhausted,
}

/// Why an opener could not do what was asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The kind that a program acts on.
    pub kind: FailureKind,
    /// A sentence for people.
    pub detail: String,
}

/// The kinds of [`Failure`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureKind {
    /// The kernel did not let us in (EPERM, EACCES).
    NotPermitted,
    /// The process has ended (ESRCH).
    Gone,
    /// The namespace is the one we come from: a forward would lead to itself.
    OwnNamespace,
    /// Descriptors or memory ran out (EMFILE, ENFILE, ENOBUFS, ENOMEM, ETOOMANYREFS).
    Exhausted,
    /// This kernel does not have it (EAFNOSUPPORT, EPROTONOSUPPORT, ENOPROTOOPT, ENOENT).
    Unsupported,
    /// Another socket has the port (EADDRINUSE).
    InUse,
    /// Anything else.
    Other,
}

impl Failure {
    fn new(kind: FailureKind, detail: impl Into<String>) -> Failure {
        Failure { kind, detail: detail.into() }
    }

    /// `what` could not be done, because of `error`.
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
