//! The kinds of upstreams: how the engine gets sockets inside a namespace.

use std::net::{SocketAddr, TcpStream};
use std::num::NonZeroU16;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::OnceLock;
use std::thread::JoinHandle;

use landfall_engine::channel::Channel;
use landfall_engine::command::{Family, UpstreamKind, WatchSources};
use landfall_engine::opener::client::Opener;
use landfall_engine::opener::{AGENT_SOCKET, Answer, DialFailure, Request, serve};
use landfall_engine::sys::netns_cookie;
use rustix::net::{AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType, ipproto, netlink};

use crate::Namespace;

static UPSTREAM_KIND: OnceLock<UpstreamKind> = OnceLock::new();

/// Makes this case, which is a process of its own, use another kind of upstream than an opener.
///
/// # Panics
/// If it has added an upstream already.
pub fn set_upstream_kind(upstream_kind: UpstreamKind) {
    assert_eq!(
        *UPSTREAM_KIND.get_or_init(|| upstream_kind),
        upstream_kind,
        "the way of this case was chosen before"
    );
}

/// Returns the kind of upstream that this case uses.
pub fn upstream_kind() -> UpstreamKind {
    *UPSTREAM_KIND.get_or_init(UpstreamKind::default)
}

/// The other end of an upstream. Dropping it ends that end.
#[derive(Debug)]
pub struct UpstreamGuard {
    _agent: Option<Agent>,
}

/// The parts of an upstream: the cookie, the watch sources and the descriptors of the command, and the other end.
pub type Entered = (u64, WatchSources, Vec<OwnedFd>, UpstreamGuard);

/// Enters a namespace with the upstream kind of this case, for an engine with this many shards.
///
/// # Panics
/// If it cannot.
#[track_caller]
pub fn enter(namespace: &Namespace, shards: u16) -> Entered {
    match upstream_kind() {
        UpstreamKind::Opener => {
            let program = std::env::current_exe().unwrap();
            let mut opener = Opener::spawn(&program, namespace.target()).unwrap();
            let (sources, descriptors) = opener.upstream(shards).unwrap();
            (opener.netns_cookie(), sources, descriptors, UpstreamGuard { _agent: None })
        }
        UpstreamKind::Agent => {
            let directory = tempfile::tempdir().unwrap();
            let agent = Agent::start(namespace, directory.path());
            let mut opener = Opener::connect(directory.path()).unwrap();
            let (sources, descriptors) = opener.agent_upstream().unwrap();
            (opener.netns_cookie(), sources, descriptors, UpstreamGuard { _agent: Some(agent) })
        }
        UpstreamKind::Dialler => {
            let channels = (0..shards).map(|_| dialler(namespace)).collect();
            (1 << 63, WatchSources::default(), channels, UpstreamGuard { _agent: None })
        }
        UpstreamKind::Host => panic!("the host is not a container's namespace"),
    }
}

/// A thread inside that passes sockets to every client of its Unix socket. Dropping it ends the thread.
#[derive(Debug)]
pub struct Agent {
    listener: OwnedFd,
    serving: Option<JoinHandle<()>>,
}

impl Agent {
    /// Makes its socket in `directory`.
    ///
    /// # Panics
    /// If it cannot.
    pub fn start(namespace: &Namespace, directory: &Path) -> Agent {
        let listener = agent_listener(&directory.join(AGENT_SOCKET));
        let served = listener.try_clone().unwrap();
        let serving = Some(namespace.spawn(move || serve::agent(served).unwrap()));
        Agent { listener, serving }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = rustix::net::shutdown(&self.listener, Shutdown::Both);
        if let Some(serving) = self.serving.take() {
            let _ = serving.join();
        }
    }
}

/// Makes a listening socket like an agent's, at `path`.
///
/// # Panics
/// If the path cannot be bound.
pub fn agent_listener(path: &Path) -> OwnedFd {
    let kind = SocketType::SEQPACKET;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
    rustix::net::bind(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    rustix::net::listen(&socket, 16).unwrap();
    socket
}

/// Returns one end of a channel. A thread holds the other end and dials inside, as long as the engine holds its end.
fn dialler(namespace: &Namespace) -> OwnedFd {
    let (engines, ours) = Channel::pair().unwrap();
    namespace.spawn(move || {
        while let Ok(Some((request, _))) = ours.recv::<Request>() {
            let Request::Dial { dial, port } = request else { panic!("a driver was asked for {request:?}") };
            let sent = match dial_inside(port) {
                Ok(socket) => ours.send(&Answer::Dialled { dial }, &[socket.as_fd()]),
                Err(why) => ours.send(&Answer::NotDialled { dial, why }, &[]),
            };
            if sent.is_err() {
                return;
            }
        }
    });
    engines.into()
}

/// Tries 127.0.0.1 first, then `::1`.
fn dial_inside(port: NonZeroU16) -> Result<TcpStream, DialFailure> {
    let addresses: Vec<SocketAddr> = Family::ALL.into_iter().map(|family| family.loopback(port)).collect();
    let stream = TcpStream::connect(addresses.as_slice()).map_err(|_| DialFailure::Refused)?;
    // The socket connected to itself, because no server listens (RFC 9293, 3.5).
    if stream.local_addr().ok() == stream.peer_addr().ok() {
        crate::reset(stream);
        return Err(DialFailure::Refused);
    }
    stream.set_nonblocking(true).map_err(|_| DialFailure::Exhausted)?;
    Ok(stream)
}

/// An agent that answers as a script decides, which may be invalid.
#[derive(Debug)]
pub struct Scripted {
    listener: OwnedFd,
}

impl Scripted {
    /// Listens at `path`, inside. Each connection has its own thread, which calls `script` for each request; the connection
    /// ends when `script` returns false.
    ///
    /// # Panics
    /// If the path cannot be bound.
    pub fn start(
        namespace: &Namespace,
        path: &Path,
        script: impl Fn(&Channel, &Request) -> bool + Send + Sync + 'static,
    ) -> Scripted {
        let listener = agent_listener(path);
        let served = listener.try_clone().unwrap();
        let script = std::sync::Arc::new(script);
        namespace.spawn(move || {
            while let Ok(socket) = rustix::net::accept_with(&served, SocketFlags::CLOEXEC) {
                let script = script.clone();
                std::thread::spawn(move || {
                    let channel = Channel::try_from(socket).unwrap();
                    while let Ok(Some((request, _))) = channel.recv::<Request>()
                        && script(&channel, &request)
                    {}
                });
            }
        });
        Scripted { listener }
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        let _ = rustix::net::shutdown(&self.listener, Shutdown::Both);
    }
}

/// Returns the answer of an honest agent, from the namespace of this thread.
///
/// # Panics
/// If no sockets are left.
pub fn honest_answer(request: &Request) -> (Answer, Vec<OwnedFd>) {
    let make = |domain, kind, protocol| {
        rustix::net::socket_with(domain, kind, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, protocol)
            .unwrap()
    };
    match request {
        Request::Introduce => {
            use std::os::unix::fs::MetadataExt;
            let inode = std::fs::metadata("/proc/thread-self/ns/net").unwrap().ino();
            let cookie = netns_cookie(make(AddressFamily::UNIX, SocketType::DGRAM, None)).unwrap();
            (Answer::Entered { netns_inode: inode, netns_cookie: cookie }, Vec::new())
        }
        Request::Sockets { family, count, .. } => {
            let domain = if *family == Family::V4 { AddressFamily::INET } else { AddressFamily::INET6 };
            let made = (0..*count).map(|_| make(domain, SocketType::STREAM, Some(ipproto::TCP))).collect();
            (Answer::Made { count: *count, error: None, ephemeral: None }, made)
        }
        Request::SockDiag => {
            let diag = make(AddressFamily::NETLINK, SocketType::DGRAM, Some(netlink::SOCK_DIAG));
            (Answer::SockDiag, vec![diag])
        }
        other => panic!("an agent was asked for {other:?}"),
    }
}
