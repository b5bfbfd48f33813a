//! The messages between the two processes of a sandbox: one JSON value in one datagram.

use std::fmt;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use landfall_engine::native::InstallError;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use serde::{Deserialize, Serialize};

/// The most bytes of a message.
const MESSAGE_BYTES_MAX: usize = 256;

/// The steps of the inner process that can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// Taking over the real standard input.
    Input,
    /// Entering new namespaces.
    Unshare,
    /// Bringing up the loopback interface.
    Loopback,
    /// Sending the notifications of the filter to the outer process.
    Filter,
    /// Requesting a signal at the parent's death.
    ParentDeath,
    /// Unblocking signals.
    Signals,
    /// Becoming the command.
    Exec,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Step::Input => "cannot take over the standard input",
            Step::Unshare => "cannot make a user and network namespace",
            Step::Loopback => "cannot bring up the loopback interface",
            Step::Filter => "cannot pass on the notifications of the command's system calls",
            Step::ParentDeath => "cannot tie the command to this process",
            Step::Signals => "cannot unblock the signals of the command",
            Step::Exec => "cannot start the command",
        })
    }
}

/// One message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Message {
    /// The namespaces exist; `user` is whether a user namespace is among them.
    Unshared { user: bool },
    /// The users are mapped.
    Mapped,
    /// The loopback interface is up.
    Ready,
    /// Install the filter of native sockets.
    Filter,
    /// It is installed; the descriptor of its notifications follows. The namespace has this `SO_NETNS_COOKIE`.
    Filtered { netns_cookie: u64 },
    /// It could not be installed; the process is unchanged.
    NotFiltered { error: InstallError },
    /// Become the command.
    Go,
    /// A step failed; no messages follow.
    Failed { step: Step, errno: i32 },
}

/// Sends one message.
pub(super) fn send(channel: impl AsFd, message: Message) -> Result<(), Errno> {
    let text = serde_json::to_vec(&message).map_err(|_| Errno::INVAL)?;
    rustix::io::retry_on_intr(|| rustix::net::send(&channel, &text, SendFlags::NOSIGNAL)).map(drop)
}

/// Receives one message; `None` at the end of the channel.
pub(super) fn receive(channel: impl AsFd) -> Result<Option<Message>, Errno> {
    let mut text = [0; MESSAGE_BYTES_MAX];
    let (bytes, _) = match rustix::io::retry_on_intr(|| {
        rustix::net::recv(&channel, text.as_mut_slice(), RecvFlags::empty())
    }) {
        Err(Errno::CONNRESET) => return Ok(None),
        other => other?,
    };
    if bytes == 0 {
        return Ok(None);
    }
    serde_json::from_slice(text.get(..bytes).unwrap_or_default()).map(Some).map_err(|_| Errno::BADMSG)
}

/// Sends one descriptor.
pub(super) fn send_descriptor(channel: impl AsFd, descriptor: BorrowedFd<'_>) -> Result<(), Errno> {
    let descriptors = [descriptor];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(Errno::NOBUFS);
    }
    let body = [IoSlice::new(b"0")];
    rustix::net::sendmsg(channel, &body, &mut control, SendFlags::NOSIGNAL).map(drop)
}

/// Receives one descriptor; `None` if the channel ended or the message has no descriptor.
pub(super) fn receive_descriptor(channel: impl AsFd) -> Result<Option<OwnedFd>, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0; 1];
    let mut body = [IoSliceMut::new(&mut byte)];
    rustix::net::recvmsg(channel, &mut body, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    Ok(control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    }))
}
