//! An agent: a program inside a container that hands out sockets to whoever connects to its own.
//!
//! It is where it serves, so there is no entering and no privilege. Several may be connected at once, the daemon and the
//! engine at least, and none of them is believed to be well-behaved:
//!
//! - There are [`CONNECTIONS_MAX`] connections, each with [`CHANNELS_MAX_EACH`] channels more. Who comes after that waits in
//!   the kernel's queue.
//! - Each channel in its turn has one request answered. So one that floods makes the others wait for one answer at a time.
//! - A channel whose answers are not taken is read no further: its send buffer is as small as the kernel allows, so that
//!   two answers make it full (`unix_writable()` in net/unix/af_unix.c: a quarter). Descriptors on their way count for
//!   their user (`too_many_unix_fds()`), and so one that takes none would else use up what the others need.
//!
//! Who may connect is decided by the permissions of the socket and its directory. `SO_PEERCRED` would tell the user id of
//! who connects as this user namespace sees it: the host's root is 65534 (`overflowuid`) in a container with user
//! namespaces, as is every other user of the host, so nothing is decided by that here.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SocketFlags, sockopt};

use super::answer::{answer, failed};
use super::{ServeError, Served, introduce};
use crate::channel::{self, Channel, timespec};
use crate::opener::{Answer, Failure, FailureKind, Request};

/// The most connections at a time.
const CONNECTIONS_MAX: usize = 8;
/// The most channels that are served for one connection, itself not counted.
const CHANNELS_MAX_EACH: usize = 8;
/// The most sockets in one answer; fewer may come than were asked for.
const SOCKETS_MAX: u16 = 64;
/// How long nobody is taken in after descriptors ran out.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

/// Serves whoever connects to `listener`, a bound and listening Unix socket of type `SOCK_SEQPACKET`, until that is shut
/// down (`shutdown(2)` on a copy of it). The thread must be in the network namespace that the sockets are to be of.
///
/// # Errors
/// [`ServeError::NotAListener`], or the kernel's.
pub fn agent(listener: OwnedFd) -> Result<(), ServeError> {
    if !channel::is_channel(listener.as_fd()) || sockopt::socket_acceptconn(&listener) != Ok(true) {
        return Err(ServeError::NotAListener);
    }
    // Who was told of by poll(2) may be gone by the time it is accepted.
    rustix::io::ioctl_fionbio(&listener, true).map_err(|_| ServeError::NotAListener)?;
    Agent { listener, guests: Vec::new(), numbers: 0, resting_until: None, ended: false }.run()
}

struct Agent {
    listener: OwnedFd,
    guests: Vec<Guest>,
    /// The number of the connection that came last.
    numbers: u64,
    /// Descriptors ran out.
    resting_until: Option<Instant>,
    ended: bool,
}

/// A channel and the connection by which it came.
struct Guest {
    served: Served,
    connection: u64,
    /// It is the connection itself.
    is_first: bool,
    /// There is no room for an answer.
    full: bool,
}

impl Guest {
    fn new(channel: Channel, connection: u64, is_first: bool) -> Guest {
        // The kernel makes it as much as its least. Where that fails, more is on its way.
        let _ = sockopt::set_socket_send_buffer_size(&channel, 1);
        Guest { served: Served::new(channel), connection, is_first, full: false }
    }

    fn awaits(&self) -> PollFlags {
        if self.full || self.served.owed.is_some() { PollFlags::OUT } else { PollFlags::IN }
    }

    /// Whether there is room for an answer now.
    fn has_room(&self) -> bool {
        let mut polled = [PollFd::from_borrowed_fd(self.served.channel.as_fd(), PollFlags::OUT)];
        poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready > 0)
    }
}

impl Agent {
    fn run(mut self) -> Result<(), ServeError> {
        while !self.ended {
            let takes = self.takes_guests();
            let mut waits: Vec<PollFd<'_>> = self
                .guests
                .iter()
                .map(|guest| PollFd::from_borrowed_fd(guest.served.channel.as_fd(), guest.awaits()))
                .collect();
            if takes {
                waits.push(PollFd::new(&self.listener, PollFlags::IN));
            }
            let rest = self.resting_until.map(|until| until.saturating_duration_since(Instant::now()));
            match poll(&mut waits, rest.and_then(timespec).as_ref()) {
                Err(Errno::INTR) => continue,
                done => done.map_err(channel::ChannelError::from)?,
            };
            let mut ready: Vec<PollFlags> = waits.iter().map(PollFd::revents).collect();
            let knocks = if takes { ready.pop() } else { None }.unwrap_or(PollFlags::empty());
            self.serve(&ready);
            if !knocks.is_empty() {
                self.take_guests();
            }
            // It was shut down: accept(2) says EAGAIN then, as if one only had to wait.
            self.ended |= knocks.intersects(PollFlags::HUP | PollFlags::ERR);
            self.resting_until = self.resting_until.filter(|until| *until > Instant::now());
        }
        Ok(())
    }

    fn takes_guests(&self) -> bool {
        let connections = self.guests.iter().filter(|guest| guest.is_first).count();
        connections < CONNECTIONS_MAX && self.resting_until.is_none()
    }

    /// One answer for each guest that is ready.
    fn serve(&mut self, ready: &[PollFlags]) {
        for index in (0..ready.len()).filter(|index| !ready[*index].is_empty()) {
            let connection = self.guests[index].connection;
            let channels = self.guests.iter().filter(|guest| guest.connection == connection).count();
            let guest = &mut self.guests[index];
            guest.full = !guest.has_room();
            if guest.full {
                continue;
            }
            if let Some(channel) = guest.served.step(channels <= CHANNELS_MAX_EACH, agents_answer) {
                self.guests.push(Guest::new(channel, connection, false));
            }
        }
        self.guests.retain(|guest| !guest.served.ended);
    }

    fn take_guests(&mut self) {
        while self.takes_guests() {
            match rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC) {
                Ok(socket) => {
                    if let Ok(channel) = Channel::try_from(socket) {
                        self.numbers += 1;
                        self.guests.push(Guest::new(channel, self.numbers, true));
                    }
                }
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(Errno::AGAIN) => return,
                Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                    self.resting_until = Some(Instant::now() + EXHAUSTED_PAUSE);
                }
                // Any other error would stay.
                Err(_) => {
                    self.ended = true;
                    return;
                }
            }
        }
    }
}

/// What an agent makes of a request.
fn agents_answer(request: &Request) -> (Answer, Vec<OwnedFd>) {
    match request {
        Request::Introduce => match introduce() {
            Ok(entered) => (entered, Vec::new()),
            Err(failure) => failed(failure),
        },
        Request::Enter { .. } => {
            failed(Failure::new(FailureKind::Other, "an agent is where it is, and enters no other namespace"))
        }
        Request::Sockets { family, count, congestion } => answer(&Request::Sockets {
            family: *family,
            count: (*count).min(SOCKETS_MAX),
            congestion: congestion.clone(),
        }),
        other => answer(other),
    }
}
