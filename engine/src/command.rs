//! The contract between the engine and its driver: commands in, events out. Pure.
//!
//! Both are plain data. Inside one process they travel over channels; between processes, as one JSON object in one
//! `SOCK_SEQPACKET` datagram, with descriptors attached (`SCM_RIGHTS`). The engine uses numbers, never names: the driver
//! maps an [`UpstreamId`] to a container, and decides whether a port may be exposed.
//!
//! Commands state a desired level where possible: opening a listener that is open already, or closing one that is closed,
//! changes nothing and is answered like a change. A driver that lost its state can therefore read [`Event::Observed`] and
//! [`Event::State`] and repeat its commands.
//!
//! # Guarantees to a new driver
//!
//! A new driver receives [`Event::Ready`], sends [`Command::Describe`], and reads until the last part of [`Event::State`].
//! The answer is one uninterrupted run of events, first every [`Event::Observed`], then every [`Event::State`]. It is
//! consistent with its position in the stream:
//!
//! - An [`Event::Listeners`] before the answer is contained in it; one after the answer is a change to it. The answer
//!   replaces what the driver knew of listeners before.
//! - An event on a forward or an upstream before the answer is contained in it, too, with one exception: a forward that was
//!   opened after the request may be reported as open before the answer and be absent from it.
//! - Answers to requests of the previous driver are not sent to the new one.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

use crate::process::confinement::Lack;

/// One upstream: a means of connecting into one container. Numbered by the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UpstreamId(pub u32);

/// One forward: a host port, and the port of an upstream to which it leads. Numbered by the driver.
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
    /// Both families, in the order in which they are tried by default.
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

/// The loopback addresses of a container on which a server was seen listening.
///
/// The relay dials the family of the client's connection if the server listens on it, else the other family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reach {
    /// A server listens on 127.0.0.1 or 0.0.0.0.
    pub v4: bool,
    /// A server listens on `::1` or `::`.
    pub v6: bool,
}

impl Reach {
    /// The families are unknown, so both are tried.
    pub const UNKNOWN: Reach = Reach { v4: true, v6: true };

    /// Whether a server listens on `family`.
    pub fn has(self, family: Family) -> bool {
        match family {
            Family::V4 => self.v4,
            Family::V6 => self.v6,
        }
    }
}

/// The end of the connections of a forward or upstream that is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ending {
    /// No connection is accepted any more; open ones continue until they end.
    Drain,
    /// Open connections are reset at once.
    Reset,
}

/// The files that follow the opener channels of [`Command::AddUpstream`], in this order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchSources {
    /// `/proc/net/tcp`, opened inside the namespace.
    pub proc_tcp: bool,
    /// `/proc/net/tcp6`, opened inside the namespace; absent where the kernel has no IPv6.
    pub proc_tcp6: bool,
    /// A `NETLINK_SOCK_DIAG` socket created inside the namespace.
    pub sock_diag: bool,
}

impl WatchSources {
    /// Returns the number of descriptors.
    pub fn count(self) -> usize {
        usize::from(self.proc_tcp) + usize::from(self.proc_tcp6) + usize::from(self.sock_diag)
    }
}

/// The programs behind the channels of an upstream: which requests the engine sends them, and how far it trusts them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UpstreamKind {
    /// Openers of landfall. They create sockets in advance ([`opener::Request::Sockets`](crate::opener::Request::Sockets)).
    #[default]
    Opener,
    /// An untrusted program inside the container, which speaks the protocol of an opener. Its sockets are used on an
    /// isolated shard, so manipulating them affects no other container. It has one channel.
    Agent,
    /// The host: the engine creates the sockets itself, in its own namespace, without a channel. With
    /// [`Command::AdoptListener`], a listener inside a container leads to a server on the host: the same relay with the
    /// roles swapped.
    Host,
    /// The driver itself, which connects for each client ([`opener::Request::Dial`](crate::opener::Request::Dial)): the
    /// container is reachable only through the driver.
    Dialler,
}

/// A command of the driver.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case")]
pub enum Command {
    /// Adds an upstream. Its descriptors, in this order: one channel for each shard of the engine (the number is in
    /// [`Event::Ready`]; an [`UpstreamKind::Agent`] has one channel, an [`UpstreamKind::Host`] has no channel), then the
    /// files that `sources` names. Answer: [`Event::UpstreamAdded`], or [`Event::Refused`].
    AddUpstream {
        /// An unused number.
        upstream: UpstreamId,
        /// `SO_NETNS_COOKIE` of the namespace; every socket from an opener channel must carry it. For an
        /// [`UpstreamKind::Dialler`] or [`UpstreamKind::Host`] a number that the driver chooses, which is not checked.
        netns_cookie: u64,
        /// The programs behind the channels.
        #[serde(default)]
        kind: UpstreamKind,
        /// The sources for the watch. If all are absent, the upstream is not watched.
        sources: WatchSources,
    },
    /// Removes an upstream: its stock of sockets, its channels, its files, every forward into it.
    /// Answer: [`Event::ListenerClosed`] for each forward, then [`Event::UpstreamRemoved`].
    RemoveUpstream {
        /// The upstream. The removal of an unknown one is confirmed.
        upstream: UpstreamId,
        /// How its connections end.
        ending: Ending,
    },
    /// Listens on 127.0.0.1 and `::1`. Answer: [`Event::ListenerOpened`] or [`Event::ListenerFailed`].
    ///
    /// Its descriptors are listening sockets that another engine lent ([`Event::ListenerLent`]); each is used instead of
    /// binding a new one for its family. The command fails if one of them is not a TCP socket of this network namespace that
    /// listens on the loopback address of its family and on the host port. If the forward is open already, they are closed.
    OpenListener {
        /// An unused number.
        forward: ForwardId,
        /// The upstream to which connections go.
        upstream: UpstreamId,
        /// The port on the host.
        host_port: NonZeroU16,
        /// The port inside the container.
        target_port: NonZeroU16,
        /// The families on which a server listens inside.
        reach: Reach,
    },
    /// Accepts from sockets that listen in another network namespace, which are its descriptors: those of a server that a
    /// native socket replaced, or [`Opener::listen`](crate::opener::client::Opener::listen)'s. The engine binds no socket,
    /// and connections go to `target_port` of the upstream. Answer: [`Event::ListenerOpened`] with `target_port` as the host
    /// port, or [`Event::ListenerFailed`] if a descriptor is not a listening TCP socket. At [`Event::ListenerClosed`] every
    /// descriptor is closed.
    ///
    /// Another process that holds the same socket can make calls on it block, and with them everything that this engine
    /// relays. Sockets that an untrusted process holds go to a separate engine.
    AdoptListener {
        /// An unused number.
        forward: ForwardId,
        /// The upstream to which connections go.
        upstream: UpstreamId,
        /// The port of the upstream.
        target_port: NonZeroU16,
    },
    /// Sets the families on which a server listens inside. No answer.
    SetReach {
        /// The forward; an unknown one is ignored.
        forward: ForwardId,
        /// The new reach.
        reach: Reach,
    },
    /// Stops listening. Answer: [`Event::ListenerClosed`] as soon as the port is free; connections may continue to drain.
    CloseListener {
        /// The forward. The closing of an unknown one is confirmed.
        forward: ForwardId,
        /// How its connections end.
        ending: Ending,
    },
    /// Requests a description. Answer: [`Event::Observed`] for each upstream that has been read, then [`Event::State`].
    Describe,
    /// Requests the counters. Answer: [`Event::State`] without [`Event::Observed`], which can be a thousand times as long.
    Count,
    /// Lends the listening sockets to a driver, which passes them to another engine, so that a port never closes between the
    /// two. Answer: [`Event::ListenerLent`] for each open forward, then [`Event::ListenersLent`].
    ///
    /// The lender continues to accept until [`Command::Drain`]. It then closes its copies without `shutdown(2)`, so
    /// connections that are not accepted yet go to the other holders.
    LendListeners,
    /// Scans for listeners now instead of at the time that the pace sets.
    Rescan,
    /// Closes every listener, lets connections finish, then ends the engine. Answer at the end: [`Event::Stopped`].
    Drain,
    /// Resets every connection and ends the engine. Answer at the end: [`Event::Stopped`].
    Stop,
}

/// The kernel interface that reports readiness.
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

/// The ring that was chosen, and why it is not io_uring.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingReport {
    /// The ring in use.
    pub kind: RingKind,
    /// The reason why io_uring is not in use: a sentence for people.
    pub reason: Option<String>,
}

/// One socket in LISTEN state inside a namespace, on a loopback or unspecified address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Listening {
    /// The port.
    pub port: NonZeroU16,
    /// The address to which it is bound: 127.0.0.1, 0.0.0.0, `::1` or `::`.
    pub address: IpAddr,
    /// The socket's inode, which identifies its process (`/proc/PID/fd`).
    pub inode: u64,
    /// The user who created the socket, in the user namespace of the reader.
    pub uid: u32,
}

/// The reason why the engine cannot listen on a host port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListenFailure {
    /// The kind, for the driver's decisions.
    pub kind: ListenFailureKind,
    /// The address that failed.
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
    /// Descriptors or memory ran out (EMFILE, ENFILE, ENOBUFS, ENOMEM).
    Exhausted,
    /// Any other error.
    Other,
}

/// Counters of one forward, since its listener was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForwardStats {
    /// Connections accepted.
    pub accepted: u64,
    /// Connections open now, including those that wait for a socket.
    pub open: u64,
    /// Bytes relayed from clients to the server.
    pub bytes_up: u64,
    /// Bytes relayed from the server to clients.
    pub bytes_down: u64,
    /// Ended with a FIN in each direction.
    pub completed: u64,
    /// Ended by a reset from the client.
    pub reset_by_downstream: u64,
    /// Ended by a reset from the server.
    pub reset_by_upstream: u64,
    /// Reset because no server listens inside, or it did not answer in time.
    pub refused: u64,
    /// Reset because ports, descriptors or slots ran out on the relay's side.
    pub exhausted: u64,
}

impl ForwardStats {
    /// Adds the counters of another shard.
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

/// One upstream in [`Event::State`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpstreamState {
    /// Its number.
    pub upstream: UpstreamId,
    /// `SO_NETNS_COOKIE` of the namespace, by which a driver recognises it.
    pub netns_cookie: u64,
}

/// One forward in [`Event::State`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForwardState {
    /// Its number.
    pub forward: ForwardId,
    /// The upstream to which connections go.
    pub upstream: UpstreamId,
    /// The port on the host.
    pub host_port: NonZeroU16,
    /// The port inside the container.
    pub target_port: NonZeroU16,
    /// The families on which a server listens inside, as last set.
    pub reach: Reach,
    /// Whether the listener is open; false while the forward drains.
    pub listening: bool,
    /// Its counters.
    pub stats: ForwardStats,
}

/// An event with its descriptors, as it travels between threads. Dropping it closes them.
#[derive(Debug)]
pub struct EventMessage {
    /// The event.
    pub event: Event,
    /// The attached descriptors; only [`Event::ListenerLent`] has any.
    pub descriptors: Vec<OwnedFd>,
}

impl From<Event> for EventMessage {
    fn from(event: Event) -> EventMessage {
        EventMessage { event, descriptors: Vec::new() }
    }
}

/// An event of the engine, for its driver.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// The engine is ready: the first event of an engine, and the first one that a new driver receives.
    Ready {
        /// The ring in use.
        ring: RingReport,
        /// The number of opener channels that [`Command::AddUpstream`] must bring.
        shards: u16,
        /// Whether the host has `::1`; without it the engine listens only on 127.0.0.1.
        ipv6: bool,
        /// The engine's build, as its program named it, so that a driver recognises another version.
        version: String,
        /// The layers that the confinement of root's engine lacks; an engine of another user reports no layers.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        lacks: Vec<Lack>,
    },
    /// The upstream was added: answer to [`Command::AddUpstream`].
    UpstreamAdded {
        /// The upstream.
        upstream: UpstreamId,
    },
    /// The upstream is removed: answer to [`Command::RemoveUpstream`], or an event with a `reason` when its channel ended.
    UpstreamRemoved {
        /// The upstream.
        upstream: UpstreamId,
        /// The reason, if the driver did not request the removal.
        reason: Option<String>,
    },
    /// Listeners were opened or closed inside. The first event after [`Command::AddUpstream`] lists all listeners, even if
    /// there are none.
    Listeners {
        /// The upstream.
        upstream: UpstreamId,
        /// The new listeners, in the order of the kernel's table.
        opened: Vec<Listening>,
        /// The listeners that are gone.
        closed: Vec<Listening>,
    },
    /// The forward listens on the host.
    ListenerOpened {
        /// The forward.
        forward: ForwardId,
        /// The port on the host.
        host_port: NonZeroU16,
    },
    /// The engine could not listen on the port; the forward does not exist.
    ListenerFailed {
        /// The forward.
        forward: ForwardId,
        /// The port on the host.
        host_port: NonZeroU16,
        /// The reason.
        failure: ListenFailure,
    },
    /// The host port is free again.
    ListenerClosed {
        /// The forward.
        forward: ForwardId,
        /// Its counters at this time.
        stats: ForwardStats,
    },
    /// All listeners inside, at this position in the stream of events: part of the answer to [`Command::Describe`], sent
    /// before [`Event::State`]. A long list is sent in parts; `more` is set on all but the last.
    ///
    /// The event is not sent for an upstream that is not watched or has not been read yet. Its first [`Event::Listeners`],
    /// which lists all listeners, then follows later.
    Observed {
        /// The upstream.
        upstream: UpstreamId,
        /// The listeners, by port.
        listening: Vec<Listening>,
        /// Another part follows.
        more: bool,
    },
    /// The listening sockets of a forward, as descriptors attached to the event: at least one, and one for each family.
    ListenerLent {
        /// The forward.
        forward: ForwardId,
        /// The upstream to which connections go.
        upstream: UpstreamId,
        /// The port on the host.
        host_port: NonZeroU16,
        /// The port inside the container.
        target_port: NonZeroU16,
        /// The families on which a server listens inside, as last set.
        reach: Reach,
    },
    /// The end of the answer to [`Command::LendListeners`]: every listener that could be duplicated has been lent.
    ListenersLent {
        /// The number of [`Event::ListenerLent`] before this event.
        count: u32,
    },
    /// The upstreams and forwards of the engine. A long list is sent in parts; `more` is set on all but the last.
    State {
        /// All upstreams, in every part. This includes upstreams that are being removed; their [`Event::UpstreamRemoved`]
        /// follows.
        upstreams: Vec<UpstreamState>,
        /// The forwards, including those that drain.
        forwards: Vec<ForwardState>,
        /// Another part follows.
        more: bool,
    },
    /// A resource ran out; sent once until it recovers.
    Degraded {
        /// The resource, and the remedy: a sentence for people.
        what: String,
    },
    /// The shortage that [`Event::Degraded`] reported is over.
    Recovered {
        /// The resource.
        what: String,
    },
    /// A command failed and changed no state.
    Refused {
        /// The reason: a sentence for people.
        reason: String,
    },
    /// The engine has ended; this is the last event.
    Stopped,
}
