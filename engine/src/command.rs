//! The contract between the engine and whoever drives it: commands in, events out.
//!
//! Both are plain data. Inside one process they travel over channels; between processes, as one JSON object in
//! one `SOCK_SEQPACKET` datagram, with descriptors beside it (`SCM_RIGHTS`). The engine knows numbers, never names:
//! which container an [`UpstreamId`] stands for, and whether a port may be exposed, is the driver's business.
//!
//! Commands are levels where they can be: opening a listener that is open as asked, or closing one that is
//! closed, changes nothing and is answered as if it had just happened. That lets a driver that lost its memory
//! read [`Event::Observed`] and [`Event::State`] and say again what it wants.
//!
//! # What a driver that arrives can rely on
//!
//! It is told [`Event::Ready`], sends [`Command::Describe`], and reads on until the [`Event::State`] that is the last
//! of its parts. The answer is one run of events with nothing between them, first every [`Event::Observed`], then every
//! [`Event::State`], and it is true at its place in the stream:
//!
//! - An [`Event::Listeners`] before it is contained in it, and one after it is a change to it. What was known of
//!   listeners before is replaced by it.
//! - An event on a forward or an upstream before it is contained in it as well, but for one: a forward that was opened
//!   after the description was asked for may be told as open before it and be absent from it.
//! - The answer to a question of the driver before is not told to this one.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

use crate::process::confinement::Lack;

/// One way into one container, as numbered by the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UpstreamId(pub u32);

/// One forward: a host port, and the port inside an upstream that it leads to. Numbered by the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ForwardId(pub u32);

impl fmt::Display for UpstreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "upstream {}", self.0)
    }
}

impl fmt::Display for ForwardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "forward {}", self.0)
    }
}

/// An address family of TCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Family {
    /// IPv4; the loopback address is 127.0.0.1.
    V4,
    /// IPv6; the loopback address is `::1`.
    V6,
}

impl Family {
    /// Both families, in the order in which they are tried when nothing else is known.
    pub const ALL: [Family; 2] = [Family::V4, Family::V6];

    /// The other family.
    pub fn other(self) -> Family {
        match self {
            Family::V4 => Family::V6,
            Family::V6 => Family::V4,
        }
    }

    /// The loopback address of this family with `port`.
    pub fn loopback(self, port: NonZeroU16) -> SocketAddr {
        let ip = match self {
            Family::V4 => IpAddr::from([127, 0, 0, 1]),
            Family::V6 => IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]),
        };
        SocketAddr::new(ip, port.get())
    }
}

/// On which loopback addresses of a container a server was seen listening.
///
/// A connection is dialled to the family by which the client came, if that one is reached, else to the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reach {
    /// Something listens on 127.0.0.1 or 0.0.0.0.
    pub v4: bool,
    /// Something listens on `::1` or `::`.
    pub v6: bool,
}

impl Reach {
    /// Nothing is known: both families are tried.
    pub const UNKNOWN: Reach = Reach { v4: true, v6: true };

    /// Whether `family` is worth dialling.
    pub fn has(self, family: Family) -> bool {
        match family {
            Family::V4 => self.v4,
            Family::V6 => self.v6,
        }
    }
}

/// How the connections of something that goes away end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ending {
    /// Nothing new is accepted; what is open finishes in its own time.
    Drain,
    /// What is open is reset at once.
    Reset,
}

/// Which files follow the opener channels of [`Command::AddUpstream`], in this order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchSources {
    /// `/proc/net/tcp`, opened inside the namespace.
    pub proc_tcp: bool,
    /// `/proc/net/tcp6`, opened inside the namespace; absent where the kernel has no IPv6.
    pub proc_tcp6: bool,
    /// A `NETLINK_SOCK_DIAG` socket made inside the namespace.
    pub sock_diag: bool,
}

impl WatchSources {
    /// How many descriptors these are.
    pub fn count(self) -> usize {
        usize::from(self.proc_tcp) + usize::from(self.proc_tcp6) + usize::from(self.sock_diag)
    }
}

/// The programs behind the channels of an upstream: what the engine asks them, and how far it trusts them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UpstreamKind {
    /// Openers of ours. They make sockets ahead of need ([`opener::Request::Sockets`](crate::opener::Request::Sockets)).
    #[default]
    Opener,
    /// A program inside the container, which speaks as an opener does and may be anybody. Its sockets are used on a shard of
    /// its own, so that what it does to them behind our back stops nobody else. It has one channel.
    Agent,
    /// The host: the engine creates the sockets itself, in its own namespace, and there is no channel. With
    /// [`Command::AdoptListener`], a listener inside a container leads to a server on the host: the same relay with the roles
    /// swapped.
    Host,
    /// The driver itself, which connects for each client
    /// ([`opener::Request::Dial`](crate::opener::Request::Dial)): the container is reached through it alone.
    Dialler,
}

/// What a driver asks of the engine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case")]
pub enum Command {
    /// A way into a namespace. Its descriptors, in this order: one channel for each shard of the engine
    /// ([`Event::Ready`] says how many; an [`UpstreamKind::Agent`] has one, an [`UpstreamKind::Host`] none), then the files that
    /// `sources` names.
    /// Answer: [`Event::UpstreamAdded`], or [`Event::Refused`].
    AddUpstream {
        /// A number that is not in use.
        upstream: UpstreamId,
        /// `SO_NETNS_COOKIE` of the namespace; every socket from an opener channel must carry it. For an
        /// [`UpstreamKind::Dialler`] or [`UpstreamKind::Host`] a number that the driver chooses, which is not checked.
        netns_cookie: u64,
        /// Who is behind the channels.
        #[serde(default)]
        kind: UpstreamKind,
        /// What to watch for listeners with; all absent means that nothing is watched.
        sources: WatchSources,
    },
    /// Lets go of a namespace: its stock of sockets, its channels, its files, every forward into it.
    /// Answer: [`Event::ListenerClosed`] for each, then [`Event::UpstreamRemoved`].
    RemoveUpstream {
        /// Which one; an unknown one is answered as removed.
        upstream: UpstreamId,
        /// What becomes of its connections.
        ending: Ending,
    },
    /// Listens on 127.0.0.1 and `::1`. Answer: [`Event::ListenerOpened`] or [`Event::ListenerFailed`].
    ///
    /// Its descriptors are listening sockets that another engine lent ([`Event::ListenerLent`]); each takes the place of
    /// the one that would be bound for its family. One that is not a TCP socket of this network namespace, listening on
    /// the loopback address of its family and the host port, fails the command. Where the forward is open already, they
    /// are closed.
    OpenListener {
        /// A number that is not in use.
        forward: ForwardId,
        /// Where connections go.
        upstream: UpstreamId,
        /// The port on the host.
        host_port: NonZeroU16,
        /// The port inside.
        target_port: NonZeroU16,
        /// Which families listen inside.
        reach: Reach,
    },
    /// Accepts from sockets that listen in another network namespace, which are its descriptors: those of a server that a
    /// native socket replaced, or [`Opener::listen`](crate::opener::client::Opener::listen)'s. Nothing is bound, and
    /// connections go to `target_port` of the upstream. Answer: [`Event::ListenerOpened`] with `target_port` as the port of the
    /// host, or [`Event::ListenerFailed`] where a descriptor is not a listening TCP socket. At
    /// [`Event::ListenerClosed`] every descriptor is closed.
    ///
    /// A process that holds the same socket can make its calls block, and with them everything that this engine relays.
    /// Sockets that an untrusted process holds go to an engine of their own.
    AdoptListener {
        /// A number that is not in use.
        forward: ForwardId,
        /// Where connections go.
        upstream: UpstreamId,
        /// The port there.
        target_port: NonZeroU16,
    },
    /// Tells which families listen inside now. No answer.
    SetReach {
        /// Which forward; an unknown one is ignored.
        forward: ForwardId,
        /// The new reach.
        reach: Reach,
    },
    /// Stops listening. Answer: [`Event::ListenerClosed`] as soon as the port is free, while connections may drain on.
    CloseListener {
        /// Which forward; an unknown one is answered as closed.
        forward: ForwardId,
        /// What becomes of its connections.
        ending: Ending,
    },
    /// Answer: [`Event::Observed`] for each upstream that has been read, then [`Event::State`].
    Describe,
    /// Answer: [`Event::State`], for its counters. What listens is reported by itself, and can be a thousand times as long.
    Count,
    /// Lends the listening sockets to a driver, which gives them to another engine, so that a port never closes between
    /// the two. Answer: [`Event::ListenerLent`] for each open forward, then [`Event::ListenersLent`].
    ///
    /// The lender goes on accepting until it is told to drain; it then closes its copies without `shutdown(2)`, which
    /// leaves connections that nobody has accepted to the other holders.
    LendListeners,
    /// Scan for listeners now rather than when the pace says so.
    Rescan,
    /// Closes every listener, lets connections finish, then ends the engine. Answer at the end: [`Event::Stopped`].
    Drain,
    /// Resets every connection and ends the engine. Answer at the end: [`Event::Stopped`].
    Stop,
}

/// Which ring moves the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RingKind {
    /// io_uring.
    IoUring,
    /// epoll, the fallback.
    Epoll,
}

impl fmt::Display for RingKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            RingKind::IoUring => "io_uring",
            RingKind::Epoll => "epoll",
        })
    }
}

/// Which ring was chosen, and why it is not io_uring where it is not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingReport {
    /// The ring in use.
    pub kind: RingKind,
    /// Why io_uring is not in use: a sentence for people.
    pub reason: Option<String>,
}

/// One socket in LISTEN state inside a namespace, on a loopback or unspecified address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Listening {
    /// The port.
    pub port: NonZeroU16,
    /// The address it is bound to: 127.0.0.1, 0.0.0.0, `::1` or `::`.
    pub address: IpAddr,
    /// The socket's inode, by which its process is found (`/proc/PID/fd`).
    pub inode: u64,
    /// The user id that made the socket, as seen by the reader.
    pub uid: u32,
}

/// Why a host port could not be listened on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListenFailure {
    /// The kind that a driver acts on.
    pub kind: ListenFailureKind,
    /// The address that refused.
    pub address: SocketAddr,
    /// The symbolic error name (`EADDRINUSE`) and its text.
    pub detail: String,
}

/// The kinds of [`ListenFailure`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ListenFailureKind {
    /// Another socket has the port (EADDRINUSE).
    Taken,
    /// The port needs a privilege (EACCES, EPERM).
    Forbidden,
    /// No descriptors or memory (EMFILE, ENFILE, ENOBUFS, ENOMEM).
    Exhausted,
    /// Anything else.
    Other,
}

/// Counters of one forward, since its listener was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForwardStats {
    /// Connections accepted.
    pub accepted: u64,
    /// Connections open now, waiting ones included.
    pub open: u64,
    /// Bytes relayed from clients to the server.
    pub bytes_up: u64,
    /// Bytes relayed from the server to clients.
    pub bytes_down: u64,
    /// Ended with a FIN in each direction.
    pub completed: u64,
    /// Ended by a reset from the client's side.
    pub reset_by_downstream: u64,
    /// Ended by a reset from the server's side.
    pub reset_by_upstream: u64,
    /// Reset because nothing listened inside, or it did not answer in time.
    pub refused: u64,
    /// Reset because ports, descriptors or slots were used up on our side.
    pub exhausted: u64,
}

impl ForwardStats {
    /// Adds what another shard counted.
    pub fn add(&mut self, other: &ForwardStats) {
        let ForwardStats {
            accepted,
            open,
            bytes_up,
            bytes_down,
            completed,
            reset_by_downstream,
            reset_by_upstream,
            refused,
            exhausted,
        } = other;
        self.accepted += accepted;
        self.open += open;
        self.bytes_up += bytes_up;
        self.bytes_down += bytes_down;
        self.completed += completed;
        self.reset_by_downstream += reset_by_downstream;
        self.reset_by_upstream += reset_by_upstream;
        self.refused += refused;
        self.exhausted += exhausted;
    }
}

/// One upstream, as [`Event::State`] tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpstreamState {
    /// Its number.
    pub upstream: UpstreamId,
    /// `SO_NETNS_COOKIE` of the namespace, by which a driver knows which one it is.
    pub netns_cookie: u64,
}

/// One forward, as [`Event::State`] tells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForwardState {
    /// Its number.
    pub forward: ForwardId,
    /// Where connections go.
    pub upstream: UpstreamId,
    /// The port on the host.
    pub host_port: NonZeroU16,
    /// The port inside.
    pub target_port: NonZeroU16,
    /// Which families listen inside, as last told.
    pub reach: Reach,
    /// Whether it still listens; false while it drains.
    pub listening: bool,
    /// Its counters.
    pub stats: ForwardStats,
}

/// An event and the descriptors beside it, as it travels between threads. Whoever drops it closes them.
#[derive(Debug)]
pub struct Told {
    /// The event.
    pub event: Event,
    /// Only [`Event::ListenerLent`] has any.
    pub descriptors: Vec<OwnedFd>,
}

impl From<Event> for Told {
    fn from(event: Event) -> Told {
        Told { event, descriptors: Vec::new() }
    }
}

/// What the engine tells its driver.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// The first event of an engine, and the first one that a new driver gets.
    Ready {
        /// The ring in use.
        ring: RingReport,
        /// How many opener channels [`Command::AddUpstream`] must bring.
        shards: u16,
        /// Whether the host has `::1`; without it only 127.0.0.1 is listened on.
        ipv6: bool,
        /// The engine's build, as its program named it, to tell a driver of another version.
        version: String,
        /// What an engine of root lacks of its confinement; an engine of another user reports nothing.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        lacks: Vec<Lack>,
    },
    /// Answer to [`Command::AddUpstream`].
    UpstreamAdded {
        /// Which one.
        upstream: UpstreamId,
    },
    /// The namespace is let go. Unasked when its channel ended: `reason` then says why.
    UpstreamRemoved {
        /// Which one.
        upstream: UpstreamId,
        /// Why, where nobody asked for it.
        reason: Option<String>,
    },
    /// What began and what ceased to listen inside. The first one after [`Command::AddUpstream`] tells all there is, even nothing.
    Listeners {
        /// Where.
        upstream: UpstreamId,
        /// Newly seen, in the order of the kernel's table.
        opened: Vec<Listening>,
        /// No longer there.
        closed: Vec<Listening>,
    },
    /// The port answers on the host.
    ListenerOpened {
        /// Which forward.
        forward: ForwardId,
        /// The port on the host.
        host_port: NonZeroU16,
    },
    /// The port could not be listened on; the forward does not exist.
    ListenerFailed {
        /// Which forward.
        forward: ForwardId,
        /// The port on the host.
        host_port: NonZeroU16,
        /// Why.
        failure: ListenFailure,
    },
    /// The port is free again.
    ListenerClosed {
        /// Which forward.
        forward: ForwardId,
        /// Its counters at that moment.
        stats: ForwardStats,
    },
    /// All that listens inside, as of this place in the stream of events: part of the answer to [`Command::Describe`], and
    /// told before [`Event::State`]. What does not fit a message is told in parts; `more` is set on all but the last.
    ///
    /// An upstream that is not watched has none, nor has one that has not been read yet: its first [`Event::Listeners`],
    /// which tells all there is, is still to come.
    Observed {
        /// Where.
        upstream: UpstreamId,
        /// What listens, by port.
        listening: Vec<Listening>,
        /// Another part follows.
        more: bool,
    },
    /// The listening sockets of a forward, as descriptors beside the event: at least one, and one for each family.
    ListenerLent {
        /// Which forward.
        forward: ForwardId,
        /// Where connections go.
        upstream: UpstreamId,
        /// The port on the host.
        host_port: NonZeroU16,
        /// The port inside.
        target_port: NonZeroU16,
        /// Which families listen inside, as last told.
        reach: Reach,
    },
    /// Every listener has been lent that could be.
    ListenersLent {
        /// How many [`Event::ListenerLent`] came before.
        count: u32,
    },
    /// What the engine holds. One that does not fit a message is told in parts; `more` is set on all but the last.
    State {
        /// The upstreams, in every part all of them. One that is being let go of is among them, and [`Event::UpstreamRemoved`]
        /// follows.
        upstreams: Vec<UpstreamState>,
        /// The forwards, those that drain included.
        forwards: Vec<ForwardState>,
        /// Another part follows.
        more: bool,
    },
    /// Something is used up; told once until it has recovered.
    Degraded {
        /// What, and what to do about it: a sentence for people.
        what: String,
    },
    /// What [`Event::Degraded`] told is over.
    Recovered {
        /// What.
        what: String,
    },
    /// A command could not be carried out; nothing changed.
    Refused {
        /// Why: a sentence for people.
        reason: String,
    },
    /// The engine has ended; nothing follows.
    Stopped,
}
