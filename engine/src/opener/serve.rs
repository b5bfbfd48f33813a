//! The server side: an opener that joins the namespace and then serves its channels ([`main`]), or an agent that is inside
//! already and serves the clients that connect ([`agent`]).
//!
//! A thread cannot return from joining a namespace, so an opener runs in a process of its own, which ends if it cannot
//! enter.

mod agent;
mod answer;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};
use rustix::process::DumpableBehavior;
use rustix::thread::{CapabilitySet, LinkNameSpaceType, ThreadNameSpaceType};

use super::{ANSWER_BYTES_MAX, Answer, CHANNELS_MAX, Failure, FailureKind, Request, TargetKind};
use crate::channel::{self, Channel, ChannelError};
use crate::process::privileges::drop_capabilities;
use crate::sys::netns_cookie;
pub use agent::agent;
use answer::{answer, failed};

/// The capabilities that `setns(2)` needs for the network namespace of another user's process; the second is needed because
/// a pidfd names that process. Root's opener keeps them until it is inside.
const TO_ENTER: CapabilitySet = CapabilitySet::SYS_ADMIN.union(CapabilitySet::SYS_PTRACE);

/// The reason why an opener ended before it served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The process was not started by landfall.
    #[error("standard input is not a channel; landfall starts its openers itself")]
    NotStartedByUs,
    /// No target arrived.
    #[error("the process that started this opener ended before it sent a target")]
    NoTarget,
    /// The opener could not enter. The answer reports this, too.
    #[error("{0}")]
    Refused(Failure),
    /// The descriptor given to an agent is not a listening socket.
    #[error("an agent needs a listening Unix socket of type SOCK_SEQPACKET")]
    NotAListener,
    /// The channel or the kernel failed.
    #[error(transparent)]
    Channel(#[from] ChannelError),
}

/// Joins the namespace that the first message on `stdin` names, and serves until every channel is closed.
///
/// Call it at the start of a process that has one thread and no secrets: the process stays in that namespace.
///
/// # Errors
/// See [`ServeError`]. The end of all channels is the normal end, which is not an error.
pub fn main(stdin: BorrowedFd<'_>) -> Result<(), ServeError> {
    let stdin = stdin.try_clone_to_owned().map_err(|_| ServeError::NotStartedByUs)?;
    let first = Channel::try_from(stdin).map_err(|_| ServeError::NotStartedByUs)?;
    drop_capabilities(TO_ENTER).map_err(|error| ServeError::Channel(ChannelError::System(error)))?;
    let request = channel::receive::<Request>(first.as_fd(), ANSWER_BYTES_MAX, RecvFlags::empty())?;
    let (request, descriptors) = request.ok_or(ServeError::NoTarget)?;
    match enter(&request, descriptors) {
        Ok(entered) => first.send(&entered, &[])?,
        Err(failure) => {
            first.send(&Answer::Failed { failure: failure.clone() }, &[])?;
            return Err(ServeError::Refused(failure));
        }
    }
    Ok(serve(first)?)
}

/// Enters the namespace, and drops the privileges.
fn enter(request: &Request, descriptors: Vec<OwnedFd>) -> Result<Answer, Failure> {
    let Request::Enter { target } = *request else {
        return Err(Failure::new(FailureKind::Other, "the first request must be to enter a namespace"));
    };
    let Ok([descriptor]) = <[OwnedFd; 1]>::try_from(descriptors) else {
        return Err(Failure::new(FailureKind::Other, "a namespace is entered with exactly one descriptor"));
    };
    let own = own_netns()?;
    match target {
        TargetKind::Process => join_process(descriptor.as_fd(), own)?,
        TargetKind::Path => join_path(descriptor.as_fd())?,
    }
    let joined = own_netns()?;
    if joined == own {
        return Err(own_namespace());
    }
    drop_privileges()
        .map_err(|error| Failure::from_io("the opener could not give up its privileges", &error))?;
    introduce()
}

/// Identifies the namespace of this thread.
fn introduce() -> Result<Answer, Failure> {
    let (_, netns_inode) = own_netns()?;
    // Sockets of all families have the same cookie, and every kernel has this one.
    let cookie = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
        .map_err(io::Error::from)
        .and_then(netns_cookie)
        .map_err(|error| Failure::from_io("the namespace has no cookie (Linux 5.14 is needed)", &error))?;
    Ok(Answer::Entered { netns_inode, netns_cookie: cookie })
}

/// Returns device and inode of the network namespace of this thread.
fn own_netns() -> Result<(u64, u64), Failure> {
    let own = std::fs::metadata("/proc/thread-self/ns/net").map_err(|error| {
        Failure::from_io("/proc/thread-self/ns/net cannot be read (is /proc mounted?)", &error)
    })?;
    Ok((own.dev(), own.ino()))
}

fn own_namespace() -> Failure {
    Failure::new(
        FailureKind::OwnNamespace,
        "it shares our own network namespace (host networking), so its ports are already reachable",
    )
}

/// Joins the network namespace of a process, together with its user namespace if the privileges require it.
///
/// The creator of a user namespace has every capability in it (`user_namespaces(7)`), and `setns` joins it first when one
/// call names both.
fn join_process(pidfd: BorrowedFd<'_>, own: (u64, u64)) -> Result<(), Failure> {
    let network = ThreadNameSpaceType::NETWORK;
    let mut joined = rustix::thread::move_into_thread_name_spaces(pidfd, network);
    if joined == Err(Errno::PERM) {
        joined = rustix::thread::move_into_thread_name_spaces(pidfd, network | ThreadNameSpaceType::USER);
    }
    joined.map_err(|errno| match errno {
        Errno::SRCH => Failure::new(FailureKind::Gone, "the process has ended"),
        // Joining the user namespace in which the caller already is fails with EINVAL; the target is then not in a user
        // namespace of the caller's own.
        Errno::PERM | Errno::INVAL if netns_of(pidfd) == Some(own) => own_namespace(),
        Errno::PERM | Errno::INVAL => Failure::new(
            FailureKind::NotPermitted,
            "its network namespace belongs to another user; enter it as that user, or as root",
        ),
        other => Failure::from_io("the network namespace of the process cannot be entered", &other.into()),
    })
}

/// Returns device and inode of a process's network namespace. Used only to describe a failure, since the process may have
/// ended and its id may be reused.
fn netns_of(pidfd: BorrowedFd<'_>) -> Option<(u64, u64)> {
    use std::os::fd::AsRawFd;
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd())).ok()?;
    let pid: u32 = info.lines().find_map(|line| line.strip_prefix("Pid:"))?.trim().parse().ok()?;
    let file = std::fs::metadata(format!("/proc/{pid}/ns/net")).ok()?;
    Some((file.dev(), file.ino()))
}

/// Joins the network namespace of a file.
fn join_path(file: BorrowedFd<'_>) -> Result<(), Failure> {
    rustix::thread::move_into_link_name_space(file, Some(LinkNameSpaceType::Network)).map_err(|errno| match errno {
        Errno::INVAL | Errno::BADF => Failure::new(FailureKind::Other, "the file is not a network namespace"),
        Errno::PERM => Failure::new(
            FailureKind::NotPermitted,
            "only root may enter a network namespace by its file; its owner may enter it by a process inside",
        ),
        other => Failure::from_io("the network namespace cannot be entered", &other.into()),
    })
}

/// Drops every capability permanently, and denies other processes of the same user to trace this one.
fn drop_privileges() -> io::Result<()> {
    drop_capabilities(CapabilitySet::empty())?;
    // A process inside may have the same user id and see this process; it must not trace it.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    Ok(())
}

/// A channel, and its pending answer, which did not fit the send buffer.
struct Served {
    channel: Channel,
    pending: Option<(Answer, Vec<OwnedFd>)>,
    ended: bool,
}

/// Answers on every channel until all are closed.
fn serve(first: Channel) -> Result<(), ChannelError> {
    let mut served = vec![Served::new(first)];
    while !served.is_empty() {
        let mut waits: Vec<PollFd<'_>> = served
            .iter()
            .map(|one| {
                let events = if one.pending.is_some() { PollFlags::OUT } else { PollFlags::IN };
                PollFd::from_borrowed_fd(one.channel.as_fd(), events)
            })
            .collect();
        match poll(&mut waits, None) {
            Err(Errno::INTR) => continue,
            done => done?,
        };
        let ready: Vec<bool> = waits.iter().map(|wait| !wait.revents().is_empty()).collect();
        let mut room = CHANNELS_MAX.saturating_sub(served.len());
        let mut added = Vec::new();
        for (one, _) in served.iter_mut().zip(ready).filter(|(_, ready)| *ready) {
            if let Some(channel) = one.step(room > 0, answer) {
                room -= 1;
                added.push(Served::new(channel));
            }
        }
        served.retain(|one| !one.ended);
        served.append(&mut added);
    }
    Ok(())
}

impl Served {
    fn new(channel: Channel) -> Served {
        Served { channel, pending: None, ended: false }
    }

    /// Sends the pending answer, or else reads one request and answers it. Returns a newly created channel.
    fn step(&mut self, room: bool, answer: fn(&Request) -> (Answer, Vec<OwnedFd>)) -> Option<Channel> {
        let mut made = None;
        let pending = self.pending.take().or_else(|| {
            let received =
                channel::receive::<Request>(self.channel.as_fd(), ANSWER_BYTES_MAX, RecvFlags::DONTWAIT);
            match received {
                Ok(Some((Request::Channel, _))) => Some(new_channel(room, &mut made)),
                Ok(Some((request, _))) => Some(answer(&request)),
                Err(ChannelError::WouldBlock) => None,
                Ok(None) | Err(ChannelError::Gone | ChannelError::System(_)) => {
                    self.ended = true;
                    None
                }
                Err(error) => Some(failed(Failure::new(FailureKind::Other, error.to_string()))),
            }
        });
        if let Some((answer, descriptors)) = pending {
            self.send(answer, descriptors);
        }
        made
    }

    fn send(&mut self, answer: Answer, descriptors: Vec<OwnedFd>) {
        let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
        match self.channel.try_send(&answer, &borrowed) {
            Ok(()) => {}
            Err(ChannelError::WouldBlock) => self.pending = Some((answer, descriptors)),
            // For example, too many descriptors of this user are in flight (ETOOMANYREFS): send a failure without them.
            Err(ChannelError::System(error)) if !descriptors.is_empty() => {
                let failure = Failure::from_io("the descriptors could not be sent", &error);
                let (answer, none) = failed(failure);
                drop(descriptors);
                self.send(answer, none);
            }
            Err(_) => self.ended = true,
        }
    }
}

fn new_channel(room: bool, made: &mut Option<Channel>) -> (Answer, Vec<OwnedFd>) {
    if !room {
        return failed(Failure::new(FailureKind::Exhausted, "the maximum number of channels is in use"));
    }
    match Channel::pair() {
        Ok((ours, theirs)) => {
            *made = Some(ours);
            (Answer::Channel, vec![theirs.into()])
        }
        Err(error) => failed(Failure::from_io("no channel could be made", &error)),
    }
}
