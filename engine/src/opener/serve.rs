//! The side inside: joins the namespace, then serves ([`main`]); or is inside already and serves whoever connects
//! ([`agent`]).
//!
//! Joining changes the calling thread and nothing brings it back, so an opener runs in a process of its own, which ends
//! when anything goes wrong on the way in.

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

/// `setns(2)` into the network namespace of another user's process asks for both, the second one because a pidfd names that
/// process. Root's opener has them until it is inside.
const TO_ENTER: CapabilitySet = CapabilitySet::SYS_ADMIN.union(CapabilitySet::SYS_PTRACE);

/// Why an opener ended before it served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// It was not started by landfall.
    #[error("standard input is not a channel; landfall starts its openers itself")]
    NotStartedByUs,
    /// Nobody said where to go.
    #[error("the process that started this opener ended before it said where to go")]
    NoTarget,
    /// It could not get in. This was also answered, so whoever asked tells the person.
    #[error("{0}")]
    Refused(Failure),
    /// An agent was given something else than a socket to take connections from.
    #[error("an agent needs a listening Unix socket of type SOCK_SEQPACKET")]
    NotAListener,
    /// The channel or the kernel failed.
    #[error(transparent)]
    Channel(#[from] ChannelError),
}

/// Joins the namespace that the first message on `stdin` names, and serves until every channel is closed.
///
/// Call it first thing in a process that has one thread and no secrets: the process stays in that namespace.
///
/// # Errors
/// See [`ServeError`]. Once it serves, the end of its channels is the only end, and no error.
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

/// Goes in, and gives up everything that was needed for it.
fn enter(request: &Request, descriptors: Vec<OwnedFd>) -> Result<Answer, Failure> {
    let Request::Enter { target } = *request else {
        return Err(Failure::new(FailureKind::Other, "the first request must be to enter a namespace"));
    };
    let Ok([descriptor]) = <[OwnedFd; 1]>::try_from(descriptors) else {
        return Err(Failure::new(FailureKind::Other, "a namespace is entered by exactly one descriptor"));
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
    give_up_privilege()
        .map_err(|error| Failure::from_io("the opener could not give up its privileges", &error))?;
    introduce()
}

/// Says where this thread is.
fn introduce() -> Result<Answer, Failure> {
    let (_, netns_inode) = own_netns()?;
    // Its family does not matter, and this one is in every kernel.
    let cookie = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
        .map_err(io::Error::from)
        .and_then(netns_cookie)
        .map_err(|error| Failure::from_io("the namespace has no cookie (Linux 5.14 is needed)", &error))?;
    Ok(Answer::Entered { netns_inode, netns_cookie: cookie })
}

/// Device and inode of the network namespace that this thread is in.
fn own_netns() -> Result<(u64, u64), Failure> {
    let own = std::fs::metadata("/proc/thread-self/ns/net").map_err(|error| {
        Failure::from_io("/proc/thread-self/ns/net cannot be read (is /proc mounted?)", &error)
    })?;
    Ok((own.dev(), own.ino()))
}

fn own_namespace() -> Failure {
    Failure::new(
        FailureKind::OwnNamespace,
        "it shares our own network namespace (host networking), where its ports answer already",
    )
}

/// Joins the network namespace of a process, with its user namespace where privilege is not enough.
///
/// Whoever made a user namespace has every capability in it (`user_namespaces(7)`), and `setns` joins it first when
/// both are asked for in one call.
fn join_process(pidfd: BorrowedFd<'_>, own: (u64, u64)) -> Result<(), Failure> {
    let network = ThreadNameSpaceType::NETWORK;
    let mut joined = rustix::thread::move_into_thread_name_spaces(pidfd, network);
    if joined == Err(Errno::PERM) {
        joined = rustix::thread::move_into_thread_name_spaces(pidfd, network | ThreadNameSpaceType::USER);
    }
    joined.map_err(|errno| match errno {
        Errno::SRCH => Failure::new(FailureKind::Gone, "the process has ended"),
        // EINVAL is what joining the user namespace that we are in already gives: it is not the user's own.
        Errno::PERM | Errno::INVAL if netns_of(pidfd) == Some(own) => own_namespace(),
        Errno::PERM | Errno::INVAL => Failure::new(
            FailureKind::NotPermitted,
            "its network namespace belongs to another user; enter it as that user, or as root",
        ),
        other => Failure::from_io("the network namespace of the process cannot be entered", &other.into()),
    })
}

/// Device and inode of a process's network namespace. Only ever used to say more of a failure, as the process may have
/// ended and its number be another's.
fn netns_of(pidfd: BorrowedFd<'_>) -> Option<(u64, u64)> {
    use std::os::fd::AsRawFd;
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd())).ok()?;
    let pid: u32 = info.lines().find_map(|line| line.strip_prefix("Pid:"))?.trim().parse().ok()?;
    let file = std::fs::metadata(format!("/proc/{pid}/ns/net")).ok()?;
    Some((file.dev(), file.ino()))
}

/// Joins the network namespace that a file stands for.
fn join_path(file: BorrowedFd<'_>) -> Result<(), Failure> {
    rustix::thread::move_into_link_name_space(file, Some(LinkNameSpaceType::Network)).map_err(|errno| match errno {
        Errno::INVAL | Errno::BADF => Failure::new(FailureKind::Other, "the file is not a network namespace"),
        Errno::PERM => Failure::new(
            FailureKind::NotPermitted,
            "a network namespace is entered by its file as root only; as its owner, by a process inside it",
        ),
        other => Failure::from_io("the network namespace cannot be entered", &other.into()),
    })
}

/// Drops every capability, for good, and closes this process to the others of the same user.
fn give_up_privilege() -> io::Result<()> {
    drop_capabilities(CapabilitySet::empty())?;
    // A process inside may have our user id, and be able to see us; it shall not trace us.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    Ok(())
}

/// A channel, and the answer that it had no room for.
struct Served {
    channel: Channel,
    owed: Option<(Answer, Vec<OwnedFd>)>,
    ended: bool,
}

/// Answers on every channel until none is left.
fn serve(first: Channel) -> Result<(), ChannelError> {
    let mut served = vec![Served::new(first)];
    while !served.is_empty() {
        let mut waits: Vec<PollFd<'_>> = served
            .iter()
            .map(|one| {
                let events = if one.owed.is_some() { PollFlags::OUT } else { PollFlags::IN };
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
        Served { channel, owed: None, ended: false }
    }

    /// Sends what is owed, or else reads one request and answers it. A channel that was asked for comes back.
    fn step(&mut self, room: bool, answer: fn(&Request) -> (Answer, Vec<OwnedFd>)) -> Option<Channel> {
        let mut made = None;
        let owed = self.owed.take().or_else(|| {
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
        if let Some((answer, descriptors)) = owed {
            self.send(answer, descriptors);
        }
        made
    }

    fn send(&mut self, answer: Answer, descriptors: Vec<OwnedFd>) {
        let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
        match self.channel.try_send(&answer, &borrowed) {
            Ok(()) => {}
            Err(ChannelError::WouldBlock) => self.owed = Some((answer, descriptors)),
            // Too many descriptors of this user are under way (ETOOMANYREFS), say: the answer goes without them.
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
        return failed(Failure::new(FailureKind::Exhausted, "no more channels are served here"));
    }
    match Channel::pair() {
        Ok((ours, theirs)) => {
            *made = Some(ours);
            (Answer::Channel, vec![theirs.into()])
        }
        Err(error) => failed(Failure::from_io("no channel could be made", &error)),
    }
}
