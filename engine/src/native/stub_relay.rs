//! The relay from clients inside the sandbox to the host socket that replaced their server's.
//!
//! A stub is the server's own socket, which still listens in the sandbox. Health checks, proxies and scripts inside connect
//! to it. A separate [`Engine`] accepts from it and requests a dial from this module for each client, like from a driver of
//! an upstream of kind [`UpstreamKind::Dialler`]. The engine starts with the first client, so most sandboxes have none.
//!
//! The port in a request to dial is the number of a stub, since two stubs may have the same port on different addresses.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, sockopt};

use crate::channel::{Channel, ChannelError};
use crate::command::{
    Command, Ending, Event, EventMessage, ForwardId, UpstreamId, UpstreamKind, WatchSources,
};
use crate::engine::{Engine, EngineOptions, Handle, StartError};
use crate::limits::Limits;
use crate::opener::{Answer, DialFailure, Request};
use crate::process::Drive;

/// Time limit for closing a stub, which takes one turn of the engine.
const CLOSE_MAX: Duration = Duration::from_secs(1);
/// Time limit for the server to accept a client from inside.
const DIAL_MAX: Duration = Duration::from_secs(10);
/// The maximum number of dials in flight; further clients are reset.
const DIALS_MAX: usize = 1_024;
/// The only upstream of this engine.
const HOST: UpstreamId = UpstreamId(1);

/// The reason why the stubs of a sandbox have no relay.
#[derive(Debug, thiserror::Error)]
pub(super) enum StubRelayError {
    /// The engine did not start.
    #[error(transparent)]
    Engine(#[from] StartError),
    /// A channel, a thread or a descriptor could not be created.
    #[error(transparent)]
    System(#[from] io::Error),
    /// The numbers of stubs are used up.
    #[error("too many servers listened in this sandbox")]
    Numbers,
}

/// The address to which each stub's clients are relayed, by the stub's number.
type Targets = Arc<Mutex<BTreeMap<NonZeroU16, SocketAddr>>>;

/// The engine that relays the clients of stubs.
pub(super) struct StubRelay {
    engine: Handle,
    events: Receiver<EventMessage>,
    targets: Targets,
}

impl StubRelay {
    /// Starts the engine, and the thread that dials.
    ///
    /// # Errors
    /// See [`StubRelayError`].
    pub(super) fn start() -> Result<StubRelay, StubRelayError> {
        let limits = Limits { shards: 1, ..Limits::default() };
        let (engine, events) =
            Engine::start(EngineOptions { limits, ..EngineOptions::default() })?.into_parts();
        let (ours, theirs) = Channel::pair()?;
        let targets = Targets::default();
        let of_thread = Arc::clone(&targets);
        thread::Builder::new()
            .name("landfall-stubs".to_owned())
            .spawn(move || dial_all(&ours, &of_thread))?;
        // The driver chooses the number of an upstream of this kind.
        let (kind, sources) = (UpstreamKind::Dialler, WatchSources::default());
        let add = Command::AddUpstream { upstream: HOST, netns_cookie: u64::MAX, kind, sources };
        engine.apply(add, vec![theirs.as_fd().try_clone_to_owned()?]);
        Ok(StubRelay { engine, events, targets })
    }

    /// Relays the clients of a stub from now on.
    ///
    /// # Errors
    /// See [`StubRelayError`].
    pub(super) fn adopt(&self, stub: &OwnedFd, target: SocketAddr) -> Result<ForwardId, StubRelayError> {
        let socket = stub.try_clone()?;
        let mut targets = self.targets.lock().unwrap_or_else(PoisonError::into_inner);
        let numbers = (1..=u16::MAX).filter_map(NonZeroU16::new);
        let number = numbers.into_iter().find(|number| !targets.contains_key(number));
        let number = number.ok_or(StubRelayError::Numbers)?;
        targets.insert(number, target);
        let forward = ForwardId(u32::from(number.get()));
        let adopt = Command::AdoptListener { forward, upstream: HOST, target_port: number };
        self.engine.apply(adopt, vec![socket]);
        Ok(forward)
    }

    /// Stops accepting from a stub; connections continue. When this returns, the engine does not hold the stub any more,
    /// unless the close exceeded its time limit.
    pub(super) fn close(&self, forward: ForwardId) {
        self.engine.apply(Command::CloseListener { forward, ending: Ending::Drain }, Vec::new());
        let deadline = Instant::now() + CLOSE_MAX;
        loop {
            match self.events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(message) => match message.event {
                    Event::ListenerClosed { forward: closed, .. } if closed == forward => break,
                    _ => {}
                },
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return,
            }
        }
        let mut targets = self.targets.lock().unwrap_or_else(PoisonError::into_inner);
        targets.retain(|number, _| u32::from(number.get()) != forward.0);
    }
}

/// A connect in progress.
struct Dial {
    number: u64,
    socket: OwnedFd,
    deadline: Instant,
}

/// Dials for the engine until it closes the channel.
fn dial_all(channel: &Channel, targets: &Targets) {
    let mut dials: Vec<Dial> = Vec::new();
    loop {
        let due = dials.iter().map(|dial| dial.deadline).min();
        let timeout =
            due.and_then(|due| Timespec::try_from(due.saturating_duration_since(Instant::now())).ok());
        let mut ready = vec![PollFd::from_borrowed_fd(channel.as_fd(), PollFlags::IN)];
        ready.extend(dials.iter().map(|dial| PollFd::new(&dial.socket, PollFlags::OUT)));
        if rustix::io::retry_on_intr(|| rustix::event::poll(&mut ready, timeout.as_ref())).is_err() {
            return;
        }
        let ready: Vec<bool> = ready.iter().map(|entry| !entry.revents().is_empty()).collect();
        let (asked, connected) =
            ready.split_first().map_or((false, [].as_slice()), |(asked, rest)| (*asked, rest));
        let mut connected = connected.iter();
        let now = Instant::now();
        let mut ended = Vec::new();
        let mut at = 0;
        while at < dials.len() {
            let is_ready = connected.next().copied().unwrap_or(false);
            if is_ready || dials.get(at).is_some_and(|dial| dial.deadline <= now) {
                // The removal keeps the order of the others, which must match `connected`.
                ended.push((dials.remove(at), is_ready));
            } else {
                at += 1;
            }
        }
        for (dial, is_ready) in ended {
            let outcome =
                if is_ready { sockopt::socket_error(&dial.socket) } else { Ok(Err(Errno::TIMEDOUT)) };
            let outcome = outcome.and_then(|error| error);
            if answer(channel, dial.number, outcome.map(|()| dial.socket)).is_err() {
                return;
            }
        }
        if asked && take_requests(channel, targets, &mut dials).is_err() {
            return;
        }
    }
}

/// Starts a connect for each request that has arrived.
fn take_requests(channel: &Channel, targets: &Targets, dials: &mut Vec<Dial>) -> Result<(), ChannelError> {
    loop {
        let (number, port) = match channel.try_recv::<Request>() {
            Ok(Some((Request::Dial { dial, port }, _))) => (dial, port),
            // All requests to an upstream of this kind are dials.
            Ok(Some(_)) => continue,
            Ok(None) => return Err(ChannelError::Gone),
            Err(ChannelError::WouldBlock) => return Ok(()),
            Err(error) => return Err(error),
        };
        let target = targets.lock().unwrap_or_else(PoisonError::into_inner).get(&port).copied();
        let Some(target) = target else {
            answer(channel, number, Err(Errno::CONNREFUSED))?;
            continue;
        };
        if dials.len() >= DIALS_MAX {
            answer(channel, number, Err(Errno::MFILE))?;
            continue;
        }
        match connect(target) {
            Ok((socket, true)) => answer(channel, number, Ok(socket))?,
            Ok((socket, false)) => dials.push(Dial { number, socket, deadline: Instant::now() + DIAL_MAX }),
            Err(errno) => answer(channel, number, Err(errno))?,
        }
    }
}

/// Starts to connect without waiting. Returns whether the socket is connected already.
fn connect(target: SocketAddr) -> Result<(OwnedFd, bool), Errno> {
    let family = if target.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP))?;
    match rustix::net::connect(&socket, &target) {
        Ok(()) => Ok((socket, true)),
        Err(Errno::INPROGRESS) => Ok((socket, false)),
        Err(errno) => Err(errno),
    }
}

fn answer(channel: &Channel, dial: u64, outcome: Result<OwnedFd, Errno>) -> Result<(), ChannelError> {
    match outcome {
        // A socket may have connected to itself if the port is in the ephemeral range.
        Ok(socket)
            if rustix::net::getsockname(&socket).ok() != rustix::net::getpeername(&socket).ok().flatten() =>
        {
            channel.send(&Answer::Dialled { dial }, &[socket.as_fd()])
        }
        Ok(_) => channel.send(&Answer::NotDialled { dial, why: DialFailure::Refused }, &[]),
        Err(errno) => {
            let why = match errno {
                Errno::TIMEDOUT => DialFailure::TimedOut,
                Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM | Errno::ADDRNOTAVAIL => {
                    DialFailure::Exhausted
                }
                _ => DialFailure::Refused,
            };
            channel.send(&Answer::NotDialled { dial, why }, &[])
        }
    }
}
