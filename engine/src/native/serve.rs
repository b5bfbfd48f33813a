//! The thread that answers the calls of one sandbox, and its table of native listeners.
//!
//! inotify reports the end of a listener: a watch on the socket's inode reports `IN_CLOSE` when the last process closes the
//! last descriptor, and the event is queued before that `close` returns. Events are therefore read before each call is
//! answered, so that a server that closes its listener and binds the port again finds the stub closed. A watch keeps the
//! inode, so its number is not reused meanwhile.
//!
//! A listener is retained, which means that this process holds its host socket, too, while a process above the server holds
//! the stub: a parent that bound the socket and starts a new child when the old one ends. On the host the port would stay
//! open in between, and so it does here. Every [`RETAINED_CHECK`] the supervisor looks up whether such a process still holds
//! the stub.

use std::collections::BTreeMap;
use std::mem::MaybeUninit;
use std::num::NonZeroU16;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::inotify::{self, Reader, WatchFlags};
use rustix::io::Errno;
use rustix::net::sockopt;

use super::decision::{
    self, AboutConflict, AboutSocket, Holder, HostAddress, Injection, PortFacts, RelayReason,
};
use super::filter::Call;
use super::host_socket;
use super::listener::{Clients, Native, inode, mirror_blocking};
use super::notify::{Notifications, Received, Trapped};
use super::stub_relay::{StubRelay, StubRelayError};
use super::tracee::{self, Tracee};
use super::{Driver, LISTENERS_MAX, NativeEvent, NativeListener, SuperviseError, Supervisor};
use crate::watch::sock_diag::SockDiag;

/// The most attempts to listen on a port that is in use although no socket listens on it.
const LISTEN_ATTEMPTS: u32 = 8;
/// The interval at which the holders of stubs are looked up.
const RETAINED_CHECK: Duration = Duration::from_millis(250);

/// The answer to a call.
enum Answer {
    Continue,
    Return(Result<(), Errno>),
}

pub(super) struct Serving<D> {
    notifications: Notifications,
    inotify: OwnedFd,
    listeners: SockDiag,
    netns_cookie: u64,
    driver: D,
    /// The native listeners, by their inotify watch.
    natives: BTreeMap<i32, Native>,
    /// When the holders of stubs were last looked up.
    checked: Instant,
    relay: Option<StubRelay>,
}

impl<D: Driver> Serving<D> {
    pub(super) fn new(
        prepared: Supervisor,
        notifications: OwnedFd,
        netns_cookie: u64,
        driver: D,
    ) -> Result<Serving<D>, SuperviseError> {
        let notifications = Notifications::new(notifications).map_err(SuperviseError::Notifications)?;
        let Supervisor { inotify, listeners } = prepared;
        Ok(Serving {
            notifications,
            inotify,
            listeners,
            netns_cookie,
            driver,
            natives: BTreeMap::new(),
            checked: Instant::now(),
            relay: None,
        })
    }

    /// Answers until the sandbox has ended, and then waits for the end of its listeners: the kernel reports the end of the
    /// last process before it closes that process's descriptors.
    pub(super) fn run(mut self) {
        let mut has_ended = false;
        while !has_ended || !self.natives.is_empty() {
            let Ok(turn) = self.wait(has_ended) else { break };
            self.end_closed();
            self.check_retained();
            has_ended |= turn.call && !self.answer_next();
            for watch in turn.clients {
                self.relay_clients(watch);
            }
            // A descriptor that reports a call and the end still has calls to answer.
            has_ended |= turn.ended && !turn.call;
        }
        self.driver.report(NativeEvent::Ended);
    }

    fn wait(&self, has_ended: bool) -> Result<Turn, Errno> {
        let awaited = self.natives.iter().filter(|(_, native)| native.clients == Clients::Awaited);
        let watches: Vec<i32> = awaited.clone().map(|(watch, _)| *watch).collect();
        let mut entries = vec![PollFd::new(&self.inotify, PollFlags::IN)];
        entries.extend(awaited.map(|(_, native)| PollFd::new(&native.stub, PollFlags::IN)));
        // Polled last and only until the sandbox has ended, because the end is reported again and again.
        if !has_ended {
            entries.push(PollFd::from_borrowed_fd(self.notifications.as_fd(), PollFlags::IN));
        }
        let retains = self.natives.values().any(|native| native.retained.is_some());
        let timeout = if retains { Timespec::try_from(RETAINED_CHECK).ok() } else { None };
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut entries, timeout.as_ref()))?;
        let ready_at = |at: usize| entries.get(at).map_or(PollFlags::empty(), PollFd::revents);
        let notified = ready_at(watches.len() + 1);
        let clients = watches.into_iter().enumerate();
        Ok(Turn {
            call: notified.contains(PollFlags::IN),
            ended: notified.intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL),
            clients: clients.filter(|(at, _)| !ready_at(at + 1).is_empty()).map(|(_, watch)| watch).collect(),
        })
    }

    /// Answers one call. Returns false if no more can be received.
    fn answer_next(&mut self) -> bool {
        let trapped = match self.notifications.receive() {
            Ok(Received::Call(trapped)) => trapped,
            Ok(Received::Vanished) => return true,
            Err(_) => return false,
        };
        // An event may have arrived after the last check and before this call.
        self.end_closed();
        let answer = match trapped.call {
            Some(Call::Listen) => self.listen(&trapped),
            Some(Call::Bind) | None => Answer::Continue,
        };
        match answer {
            Answer::Continue => self.notifications.let_continue(&trapped),
            Answer::Return(result) => self.notifications.answer(&trapped, result),
        }
        true
    }

    /// Decides on a `listen`, and carries out the decision. After an error the server keeps its own socket.
    fn listen(&mut self, trapped: &Trapped) -> Answer {
        let Ok(tracee) = Tracee::of(trapped, &self.notifications) else { return Answer::Continue };
        let Ok(socket) = tracee.descriptor(trapped.descriptor) else { return Answer::Continue };
        let known = sockopt::socket_cookie(&socket).ok().and_then(|cookie| self.stub(cookie));
        let Ok(facts) = host_socket::facts(&socket, self.netns_cookie, known.is_some()) else {
            return Answer::Continue;
        };
        let has_room = self.natives.len() < LISTENERS_MAX;
        let decision = decision::about_socket(&facts, |port| self.driver.may_expose(port), has_room);
        let outcome = match decision {
            AboutSocket::Continue(reason) => Err(Refusal::Relay(reason)),
            AboutSocket::Rejoin => self.rejoin(trapped, &tracee, &socket, known),
            AboutSocket::Replace(address, _) => self.replace(trapped, &tracee, &socket, address),
        };
        match outcome {
            Ok(()) => Answer::Return(Ok(())),
            Err(Refusal::InUse) => Answer::Return(Err(Errno::ADDRINUSE)),
            Err(Refusal::Relay(RelayReason::NotOurs)) => Answer::Continue,
            Err(Refusal::Relay(reason)) => {
                let inode = rustix::fs::fstat(&socket).map(|stat| stat.st_ino);
                if let (Some(port), Ok(inode)) = (host_socket::port(&socket), inode) {
                    self.driver.report(NativeEvent::Relayed { port, inode, reason });
                }
                Answer::Continue
            }
        }
    }

    /// Replaces the server's socket with one of the host.
    fn replace(
        &mut self,
        trapped: &Trapped,
        tracee: &Tracee,
        socket: &OwnedFd,
        address: HostAddress,
    ) -> Result<(), Refusal> {
        let stub_inode = inode(socket)?;
        let injection = self.inspect(trapped, tracee, stub_inode)?;
        let host = self.host_socket(address, socket, trapped.backlog)?;
        mirror_blocking(socket, &host)?;
        let (host_inode, cookie) = (inode(&host)?, sockopt::socket_cookie(&host)?);
        let stub_cookie = sockopt::socket_cookie(socket)?;
        let watch = self.watch(&host)?;
        let listener = NativeListener { address, inode: host_inode, stub_inode, process: tracee.process() };
        // If this fails, the kernel repeats the error when the call continues. If it succeeds, a continued call only changes
        // the backlog.
        let listens = rustix::net::listen(socket, trapped.backlog);
        let injected = listens.and_then(|()| self.inject(trapped, tracee, &host, stub_inode, &injection));
        let holders = match injected {
            Ok(holders) => holders,
            Err(errno) => {
                let _ = inotify::remove_watch(&self.inotify, watch);
                return Err(errno.into());
            }
        };
        let retained = (!injection.ancestors.is_empty()).then_some(host);
        let native = Native {
            listener: listener.clone(),
            stub: socket.try_clone().map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?,
            stub_cookie,
            cookie,
            holders,
            retained,
            ancestors: injection.ancestors,
            clients: Clients::Awaited,
        };
        self.natives.insert(watch, native);
        self.driver.report(NativeEvent::Opened(listener));
        Ok(())
    }

    /// Gives the host socket of a stub to another process that listens on the stub.
    fn rejoin(
        &mut self,
        trapped: &Trapped,
        tracee: &Tracee,
        socket: &OwnedFd,
        known: Option<i32>,
    ) -> Result<(), Refusal> {
        let native =
            known.and_then(|watch| self.natives.get(&watch)).ok_or(Refusal::Relay(RelayReason::NotOurs))?;
        let (stub_inode, ancestors) = (native.listener.stub_inode, native.ancestors.clone());
        let host = native.host_socket().ok_or(Refusal::Relay(RelayReason::NotOurs))?;
        let injection = self.inspect(trapped, tracee, stub_inode)?;
        mirror_blocking(socket, &host)?;
        rustix::net::listen(&host, trapped.backlog)?;
        let holders = self.inject(trapped, tracee, &host, stub_inode, &injection)?;
        if let Some(native) = known.and_then(|watch| self.natives.get_mut(&watch)) {
            native.holders.retain(|holder| tracee::still_holds(holder, native.listener.inode));
            native.holders.extend(holders);
            let newer = injection.ancestors.into_iter().filter(|holder| !ancestors.contains(holder));
            native.ancestors.extend(newer);
            if !native.ancestors.is_empty() {
                native.retained.get_or_insert(host);
            }
        }
        Ok(())
    }

    fn inspect(&self, trapped: &Trapped, tracee: &Tracee, inode: u64) -> Result<Injection, Refusal> {
        let holders = tracee.holders(inode);
        decision::about_holders(holders, trapped.descriptor, tracee.threads()).map_err(Refusal::Relay)
    }

    /// Creates the host socket. If another socket has its port, decides on the conflict.
    fn host_socket(
        &mut self,
        address: HostAddress,
        original: &OwnedFd,
        backlog: i32,
    ) -> Result<OwnedFd, Refusal> {
        let mut attempt = 1;
        let (port, own, others) = loop {
            match host_socket::listen(address, original, backlog, false) {
                Err(Errno::ADDRINUSE) => {}
                other => return other.map_err(|_| Refusal::Relay(RelayReason::Refused)),
            }
            let port = NonZeroU16::new(address.address.port()).ok_or(Refusal::Relay(RelayReason::NotOurs))?;
            let (own, others) = self.listeners_on(port).ok_or(Refusal::Relay(RelayReason::Taken))?;
            // Of two sockets that start to listen at the same time, both may get EADDRINUSE: each sets its state before it
            // looks for the other one (`inet_csk_listen_start()`). Then no socket listens on the port afterwards.
            if attempt == LISTEN_ATTEMPTS || !own.is_empty() || !others.is_empty() {
                break (port, own, others);
            }
            attempt += 1;
        };
        let facts = PortFacts {
            has_own: !own.is_empty(),
            has_others: !others.is_empty(),
            reuse_port: sockopt::socket_reuseport(original).unwrap_or(false),
        };
        match decision::about_conflict(facts, || self.driver.conflict(port, &others)) {
            AboutConflict::InUse => Err(Refusal::InUse),
            AboutConflict::Continue(reason) => Err(Refusal::Relay(reason)),
            AboutConflict::Join => {
                let joined = host_socket::listen(address, original, backlog, true);
                let joined = joined.map_err(|_| Refusal::Relay(RelayReason::Taken))?;
                let is_own = inode(&joined)?;
                // Checks that no socket of another sandbox was bound between the lookup and the bind.
                let (_, others) = self.listeners_on(port).ok_or(Refusal::Relay(RelayReason::Taken))?;
                let shared = others.into_iter().any(|inode| inode != is_own);
                if shared { Err(Refusal::Relay(RelayReason::Taken)) } else { Ok(joined) }
            }
        }
    }

    /// Returns the inodes of the host's sockets that listen on a port: native listeners of this sandbox, and others. `None`
    /// if they cannot be listed.
    fn listeners_on(&mut self, port: NonZeroU16) -> Option<(Vec<u64>, Vec<u64>)> {
        let rows = self.listeners.listeners().ok()?.into_iter().filter(|row| row.port == port);
        let is_own = |inode: &u64| self.natives.values().any(|native| native.listener.inode == *inode);
        Some(rows.map(|row| row.inode).partition(is_own))
    }

    /// Replaces the descriptor of the call, and its duplicates. An error means that no descriptor was replaced.
    fn inject(
        &self,
        trapped: &Trapped,
        tracee: &Tracee,
        host: &OwnedFd,
        stub_inode: u64,
        injection: &Injection,
    ) -> Result<Vec<Holder>, Errno> {
        let mut holders = Vec::new();
        for reference in &injection.references {
            let at = reference.descriptor;
            // Another thread may have reused the number for another file. For the call's own descriptor this is the
            // program's risk.
            if !tracee.refers_to(at, stub_inode) {
                if holders.is_empty() {
                    return Err(Errno::BADF);
                }
                continue;
            }
            let put = self.notifications.replace(trapped, host.as_fd(), at, reference.flags.close_on_exec);
            match put {
                Ok(()) => holders.push(Holder { process: tracee.process(), descriptor: at }),
                Err(errno) if holders.is_empty() => return Err(errno),
                // A duplicate that is not replaced accepts only clients of the sandbox.
                Err(_) => {}
            }
        }
        Ok(holders)
    }

    fn watch(&self, host: &OwnedFd) -> Result<i32, Errno> {
        let path = format!("/proc/self/fd/{}", host.as_raw_fd());
        inotify::add_watch(&self.inotify, path, WatchFlags::CLOSE)
    }

    fn stub(&self, cookie: u64) -> Option<i32> {
        self.natives.iter().find(|(_, native)| native.stub_cookie == cookie).map(|(watch, _)| *watch)
    }

    /// Removes the listeners whose host sockets are closed in every process.
    fn end_closed(&mut self) {
        let mut buffer = [MaybeUninit::uninit(); 4 * 1024];
        let mut closed = Vec::new();
        let mut reader = Reader::new(&self.inotify, &mut buffer);
        // The loop ends with EAGAIN.
        while let Ok(event) = reader.next() {
            closed.push(event.wd());
        }
        for watch in closed {
            // Each watch reports twice: the close, and its own removal.
            let Some(native) = self.natives.remove(&watch) else { continue };
            let _ = inotify::remove_watch(&self.inotify, watch);
            if let (Clients::Relayed(forward), Some(relay)) = (native.clients, &self.relay) {
                relay.close(forward);
            }
            let inode = native.listener.inode;
            drop(native);
            self.driver.report(NativeEvent::Closed { inode });
        }
    }

    /// Releases host sockets whose stubs are not held by a parent process any more, if a check is due.
    fn check_retained(&mut self) {
        if self.checked.elapsed() < RETAINED_CHECK {
            return;
        }
        self.checked = Instant::now();
        self.natives.values_mut().filter(|native| native.retained.is_some()).for_each(Native::release);
        self.end_closed();
    }

    /// Passes a stub to the engine when its first client inside has come.
    fn relay_clients(&mut self, watch: i32) {
        let Some(native) = self.natives.get_mut(&watch) else { return };
        let relayed = match &self.relay {
            Some(relay) => Ok(relay),
            None => StubRelay::start().map(|relay| &*self.relay.insert(relay)),
        };
        let to = native.listener.address.to_dial();
        let adopted = relayed.and_then(|relay| relay.adopt(&native.stub, to));
        native.clients = match adopted {
            Ok(forward) => Clients::Relayed(forward),
            Err(error) => {
                self.driver.report(NativeEvent::Degraded { reason: describe(&error) });
                Clients::Stuck
            }
        };
    }
}

/// The result of one wait.
struct Turn {
    call: bool,
    ended: bool,
    /// The watches of listeners whose stubs have a first client.
    clients: Vec<i32>,
}

/// The reason why a socket was not replaced.
enum Refusal {
    Relay(RelayReason),
    InUse,
}

impl From<Errno> for Refusal {
    fn from(_: Errno) -> Refusal {
        Refusal::Relay(RelayReason::Refused)
    }
}

fn describe(error: &StubRelayError) -> String {
    format!("clients inside the sandbox do not reach its servers: {error}")
}
