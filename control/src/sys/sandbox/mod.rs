//! A command in a user namespace and a network namespace of its own, with or without root.
//!
//! Two processes exchange messages over one `SOCK_SEQPACKET` pair. The inner one is this program again, as `landfall
//! _sandbox`, since only a process with a single thread may enter a new user namespace; at the end it becomes the
//! command.
//!
//!
//! ```text
//!  outside (this module)                      inside (`inside`)
//!  spawn, with the pair as standard input
//!  the real standard input ──────────────►    becomes standard input
//!                          ◄────── Unshared   unshare(user, net)
//!  writes uid_map, gid_map, Mapped ───────►   brings lo up
//!                          ◄────────── Ready
//!  Filter, if sockets may be native ──────►   installs the filter
//!                          ◄─────── Filtered, with the descriptor of its notifications
//!  starts forwarding, pasta
//!  Go ────────────────────────────────────►   exec COMMAND
//!                          ◄─ end of file     the pair is closed on exec: success
//! ```
//!
//! The pair is passed as standard input, because that is the one descriptor which safe code can give to a child and
//! take out again by name. Each process ends when the other end closes, so no incomplete sandbox is left.
//!
//! Users inside: an ordinary user stays the same and only user (a one-line map, `setgroups` denied, as
//! `user_namespaces(7)` demands of the unprivileged). Root keeps every user that it has outside, so that a server can
//! start as root and change to `www-data`.

pub mod inside;
pub mod keeper;
mod link;
pub mod pasta;
pub mod remains;
mod wire;

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use landfall_engine::native::InstallError;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use thiserror::Error;

use wire::Message;
pub use wire::Step;

/// The reason that a sandbox or its command could not be started.
#[derive(Debug, Error)]
pub enum SandboxError {
    /// The inner process could not be started, or the channel to it failed.
    #[error("cannot start a process for the sandbox")]
    Start(#[source] io::Error),
    /// The inner process ended before it became the command.
    #[error("the process of the sandbox ended before the command started")]
    Ended,
    /// One step of the inner process failed.
    #[error("{step}: {}", io::Error::from_raw_os_error(*.errno))]
    Step {
        /// The step.
        step: Step,
        /// The kernel's answer.
        errno: i32,
    },
    /// The users of the new user namespace could not be set.
    #[error("cannot write {}", .0.display())]
    Map(PathBuf, #[source] io::Error),
}

/// The filter of a command that has not started.
#[derive(Debug)]
pub struct Filtered {
    /// The descriptor of its notifications.
    pub notifications: OwnedFd,
    /// `SO_NETNS_COOKIE` of the sandbox.
    pub netns_cookie: u64,
}

/// A sandbox whose command has not started.
#[derive(Debug)]
pub struct Sandbox {
    // The channel is dropped first: the inner process ends when it closes, and is waited for after that.
    channel: Option<OwnedFd>,
    child: Option<Child>,
    has_user_namespace: bool,
}

impl Sandbox {
    /// Creates the namespaces, with `lo` up. `command` is started by [`Sandbox::start`]; it may be empty for a sandbox
    /// that only shows whether namespaces can be created.
    ///
    /// The command's parent-death signal follows the calling thread: it must live as long as the command.
    pub fn make(command: &[OsString]) -> Result<Sandbox, SandboxError> {
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
            .map_err(|errno| SandboxError::Start(errno.into()))?;
        let child = Command::new("/proc/self/exe")
            .arg0("landfall")
            .args(["_sandbox", "--"])
            .args(command)
            .stdin(Stdio::from(theirs))
            .spawn()
            .map_err(SandboxError::Start)?;
        let mut sandbox = Sandbox { channel: Some(ours), child: Some(child), has_user_namespace: false };
        wire::send_descriptor(sandbox.channel()?, rustix::stdio::stdin())
            .map_err(|errno| SandboxError::Start(errno.into()))?;
        sandbox.has_user_namespace =
            sandbox.expect_message(Message::Unshared { user: true })? == (Message::Unshared { user: true });
        if sandbox.has_user_namespace {
            map_users(sandbox.pid())?;
        }
        sandbox.send_message(Message::Mapped)?;
        sandbox.expect_message(Message::Ready)?;
        Ok(sandbox)
    }

    /// Whether the sandbox has a user namespace. Root does without one if they are forbidden.
    pub fn has_user_namespace(&self) -> bool {
        self.has_user_namespace
    }

    /// The process inside.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().map_or(0, Child::id)
    }

    /// Installs the filter of native sockets for the command. The caller must answer the notifications as soon as the
    /// command starts.
    ///
    /// # Errors
    /// The kernel's refusal: then the command runs without the filter. [`SandboxError`] if the sandbox has ended.
    pub fn filter(&self) -> Result<Result<Filtered, InstallError>, SandboxError> {
        self.send_message(Message::Filter)?;
        let start = |errno: Errno| SandboxError::Start(errno.into());
        match wire::receive(self.channel()?).map_err(start)? {
            Some(Message::Filtered { netns_cookie }) => {
                let notifications = wire::receive_descriptor(self.channel()?).map_err(start)?;
                let notifications = notifications.ok_or(SandboxError::Ended)?;
                Ok(Ok(Filtered { notifications, netns_cookie }))
            }
            Some(Message::NotFiltered { error }) => Ok(Err(error)),
            Some(Message::Failed { step, errno }) => Err(SandboxError::Step { step, errno }),
            _ => Err(SandboxError::Ended),
        }
    }

    /// Makes the inner process become the command. Returns when it has.
    pub fn start(mut self) -> Result<Child, SandboxError> {
        self.send_message(Message::Go)?;
        match wire::receive(self.channel()?).map_err(|errno| SandboxError::Start(errno.into()))? {
            None => self.child.take().ok_or(SandboxError::Ended),
            Some(Message::Failed { step, errno }) => Err(SandboxError::Step { step, errno }),
            Some(_) => Err(SandboxError::Ended),
        }
    }

    fn channel(&self) -> Result<&OwnedFd, SandboxError> {
        self.channel.as_ref().ok_or(SandboxError::Ended)
    }

    fn send_message(&self, message: Message) -> Result<(), SandboxError> {
        wire::send(self.channel()?, message).map_err(|_| SandboxError::Ended)
    }

    /// Waits for the expected message; [`Message::Unshared`] may have either value.
    fn expect_message(&self, due: Message) -> Result<Message, SandboxError> {
        let received = wire::receive(self.channel()?).map_err(|errno| SandboxError::Start(errno.into()))?;
        match (received, due) {
            (Some(Message::Failed { step, errno }), _) => Err(SandboxError::Step { step, errno }),
            (Some(message @ Message::Unshared { .. }), Message::Unshared { .. }) => Ok(message),
            (Some(message), due) if message == due => Ok(message),
            _ => Err(SandboxError::Ended),
        }
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        self.channel = None;
        if let Some(mut child) = self.child.take() {
            // It ends by itself when the channel closes; waiting leaves no zombie.
            let _ = child.wait();
        }
    }
}

/// Writes the maps from outside: only there can root map more than itself.
fn map_users(pid: u32) -> Result<(), SandboxError> {
    let base = PathBuf::from(format!("/proc/{pid}"));
    let write = |name: &str, text: &str| {
        let path = base.join(name);
        fs::write(&path, text).map_err(|error| SandboxError::Map(path, error))
    };
    let uid = rustix::process::geteuid().as_raw();
    let gid = rustix::process::getegid().as_raw();
    if uid == 0 {
        let users = identity(&fs::read_to_string("/proc/self/uid_map").unwrap_or_default());
        let groups = identity(&fs::read_to_string("/proc/self/gid_map").unwrap_or_default());
        // Root without CAP_SETUID may map no more than an ordinary user, and continues as one below.
        if write("uid_map", &users).is_ok() {
            return write("gid_map", &groups);
        }
    }
    write("setgroups", "deny")?;
    write("uid_map", &format!("{uid} {uid} 1\n"))?;
    write("gid_map", &format!("{gid} {gid} 1\n"))
}

/// Converts the map of this namespace (`inside outside count`) into one that gives a child the same users.
fn identity(map: &str) -> String {
    let mut lines = String::new();
    for line in map.lines() {
        let mut words = line.split_whitespace();
        if let (Some(inside), Some(_), Some(count)) = (words.next(), words.next(), words.next()) {
            lines.push_str(&format!("{inside} {inside} {count}\n"));
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn child_gets_the_same_users() {
        assert_eq!(identity("         0          0 4294967295\n"), "0 0 4294967295\n");
        assert_eq!(identity("0 1000 1\n1 100000 65536\n"), "0 0 1\n1 1 65536\n");
        assert_eq!(identity(""), "");
    }
}
