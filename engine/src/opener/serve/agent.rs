//! An agent: a program inside a container that hands out sockets to clients of its own socket.
//!
//! It serves the namespace in which it runs, so it enters none and needs no privileges. Several clients are connected at
//! once, at least the daemon and the engine, and none of them is trusted to behave:
//!
//! - There are at most [`CONNECTIONS_MAX`] connections, each with at most [`CHANNELS_MAX_EACH`] further channels. Other
//!   clients wait in the kernel's queue.
//! - One request of each channel is answered per round. A client that floods delays the others by one answer per round.
//! - If a client does not read its answers, no further requests are read from its channel. The send buffer is as small as
//!   the kernel allows, so that two answers fill it (`unix_writable()` in net/unix/af_unix.c: a quarter). Descriptors in
//!   flight count for their user (`too_many_unix_fds()`), so an unread channel could otherwise use up the limit for all.
//!
//! The permissions of the socket and its directory decide who may connect. `SO_PEERCRED` is not used: it reports the user id
//! as this user namespace maps it, and in a container with user namespaces that is 65534 (`overflowuid`) for the host's root
//! and every other user of the host.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SocketFlags, sockopt};

use super::answer::{answer, failed};
use super::{ServeError, Served, introduce};
use crate::channel::{self, Channel, timespec};
use crate::opener::{Answer, Failure, FailureKind, Request};

/// The maximum number of connections at a time.
const CONNECTIONS_MAX: usize = 8;
/// The maximum number of further channels of one connection.
const CHANNELS_MAX_EACH: usize = 8;
/// The maximum number of sockets in one answer; the request may ask for more.
const SOCKETS_MAX: u16 = 64;
/// Time without accepting after descriptors ran out.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

/// Serves the clients of `listener`, a listening Unix socket of type `SOCK_SEQPACKET`, until it is shut down (`shutdown(2)`
/// on a copy of it). The thread must be in the network namespace to which the sockets are to belong.
///
/// # Errors
/// [`ServeError::NotAListener`], or an error of the kernel.
pub fn agent(listener: OwnedFd) -> Result<(), ServeError> {
    if !channel::is_channel(listener.as_fd()) || sockopt::socket_acceptconn(&listener) != Ok(true) {
        return Err(ServeError::NotAListener);
    }
    // A connection that poll(2) reported may be gone before it is accepted.
    rustix::io::ioctl_fionbio(&listener, true).map_err(|_| ServeError::NotAListener)?;
    Agent { listener, channels: Vec::new(), newest_connection: 0, paused_until: None, ended: false }.run()
}

struct Agent {
    listener: OwnedFd,
    channels: Vec<AgentChannel>,
    /// The number of the newest connection.
    newest_connection: u64,
    /// No connection is accepted before this time, because descriptors ran out.
    paused_until: Option<Instant>,
    ended: bool,
}

/// A channel, and the number of its connection.
struct AgentChannel {
    served: Served,
    connection: u64,
    /// Whether the channel is the connection itself.
    is_first: bool,
    /// The send buffer has no room for an answer.
    full: bool,
}

impl AgentChannel {
    fn new(channel: Channel, connection: u64, is_first: bool) -> AgentChannel {
        // The kernel raises the size to its minimum. If this fails, more answers are in flight.
        let _ = sockopt::set_socket_send_buffer_size(&channel, 1);
        AgentChannel { served: Served::new(channel), connection, is_first, full: false }
    }

    fn awaited_events(&self) -> PollFlags {
        if self.full || self.served.pending.is_some() { PollFlags::OUT } else { PollFlags::IN }
    }

    /// Whether the send buffer has room for an answer.
    fn has_room(&self) -> bool {
        let mut polled = [PollFd::from_borrowed_fd(self.served.channel.as_fd(), PollFlags::OUT)];
        poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready > 0)
    }
}

impl Agent {
    fn run(mut self) -> Result<(), ServeError> {
        while !self.ended {
            let accepting = self.may_accept();
            let mut waits: Vec<PollFd<'_>> = self
                .channels
                .iter()
                .map(|channel| {
                    PollFd::from_borrowed_fd(channel.served.channel.as_fd(), channel.awaited_events())
                })
                .collect();
            if accepting {
                waits.push(PollFd::new(&self.listener, PollFlags::IN));
            }
            let pause = self.paused_until.map(|until| until.saturating_duration_since(Instant::now()));
            match poll(&mut waits, pause.and_then(timespec).as_ref()) {
                Err(Errno::INTR) => continue,
                done => done.map_err(channel::ChannelError::from)?,
            };
            let mut ready: Vec<PollFlags> = waits.iter().map(PollFd::revents).collect();
            let listener_events = if accepting { ready.pop() } else { None }.unwrap_or(PollFlags::empty());
            self.serve(&ready);
            if !listener_events.is_empty() {
                self.accept();
            }
            // After a shutdown, accept(2) fails with EAGAIN like an empty queue.
            self.ended |= listener_events.intersects(PollFlags::HUP | PollFlags::ERR);
            self.paused_until = self.paused_until.filter(|until| *until > Instant::now());
        }
        Ok(())
    }

    fn may_accept(&self) -> bool {
        let connections = self.channels.iter().filter(|channel| channel.is_first).count();
        connections < CONNECTIONS_MAX && self.paused_until.is_none()
    }

    /// Answers one request of each channel that is ready.
    fn serve(&mut self, ready: &[PollFlags]) {
        for index in (0..ready.len()).filter(|index| !ready[*index].is_empty()) {
            let connection = self.channels[index].connection;
            let channels = self.channels.iter().filter(|channel| channel.connection == connection).count();
            let channel = &mut self.channels[index];
            channel.full = !channel.has_room();
            if channel.full {
                continue;
            }
            if let Some(channel) = channel.served.step(channels <= CHANNELS_MAX_EACH, agent_answer) {
                self.channels.push(AgentChannel::new(channel, connection, false));
            }
        }
        self.channels.retain(|channel| !channel.served.ended);
    }

    fn accept(&mut self) {
        while self.may_accept() {
            match rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC) {
                Ok(socket) => {
                    if let Ok(channel) = Channel::try_from(socket) {
                        self.newest_connection += 1;
                        self.channels.push(AgentChannel::new(channel, self.newest_connection, true));
                    }
                }
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(Errno::AGAIN) => return,
                Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                    self.paused_until = Some(Instant::now() + EXHAUSTED_PAUSE);
                }
                // Any other error is permanent.
                Err(_) => {
                    self.ended = true;
                    return;
                }
            }
        }
    }
}

/// Answers a request to an agent.
fn agent_answer(request: &Request) -> (Answer, Vec<OwnedFd>) {
    match request {
        Request::Introduce => match introduce() {
            Ok(entered) => (entered, Vec::new()),
            Err(failure) => failed(failure),
        },
        Request::Enter { .. } => {
            failed(Failure::new(FailureKind::Other, "an agent serves its own namespace and enters no other"))
        }
        Request::Sockets { family, count, congestion } => answer(&Request::Sockets {
            family: *family,
            count: (*count).min(SOCKETS_MAX),
            congestion: congestion.clone(),
        }),
        other => answer(other),
    }
}
