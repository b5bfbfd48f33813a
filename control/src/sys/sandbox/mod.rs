//! A command in a user and a network namespace of its own, with or without root.
//!
//! Two processes meet over one `SOCK_SEQPACKET` pair. The inner one is this program again, as `landfall _sandbox`,
//! since only a process with a single thread may move into a new user namespace; in the end it becomes the command.
//!
//! ```text
//!  outside (this module)                      inside (`inside`)
//!  spawn, with the pair as standard input
//!  the real standard input ──────────────►    puts it where it belongs
//!                          ◄────── Unshared   unshare(user, net)
//!  writes uid_map, gid_map, Mapped ───────►   brings lo up
//!                          ◄────────── Ready
//!  Filter, where sockets may be native ──►    installs the filter
//!                          ◄─────── Filtered, with the descriptor of its notifications
//!  starts forwarding, pasta
//!  Go ────────────────────────────────────►   exec COMMAND
//!                          ◄─ end of file     the pair is closed on exec: it worked
//! ```
//!
//! The pair travels as standard input, because that is the one descriptor which safe code can give to a child and
//! take out again by name. Whoever sees the other end close ends: no half-made sandbox is left behind.
//!
//! Who one is inside: a user stays that user, the only one there is (a one-line map, `setgroups` denied, as
//! `user_namespaces(7)` demands of the unprivileged). Root keeps every user that it has outside, so that a server
//! which starts as root and goes on as `www-data` can.

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

/// Why there is no sandbox, or no command in it.
#[derive(Debug, Error)]
pub enum SandboxError {
    /// The inner process could not be made or talked to.
    #[error("cannot start a process for the sandbox")]
    Start(#[source] io::Error),
    /// The inner process ended before it was told to become the command.
    #[error("the process of the sandbox ended before the command began")]
    Ended,
    /// One step of the inner process failed.
    #[error("{step}: {}", io::Error::from_raw_os_error(*.errno))]
    Step {
        /// Which one.
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
    /// The descriptor that its notifications come from.
    pub notifications: OwnedFd,
    /// `SO_NETNS_COOKIE` of the sandbox.
    pub netns_cookie: u64,
}

/// A sandbox whose command has not begun.
#[derive(Debug)]
pub struct Sandbox {
    // The channel goes first: the inner process ends when it sees it close, and is waited for after that.
    channel: Option<OwnedFd>,
    child: Option<Child>,
    has_user_namespace: bool,
}

impl Sandbox {
    /// Makes the namespaces, with `lo` up. `command` is what [`Sandbox::start`] will begin; it may be empty for a
    /// sandbox that is only looked at.
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
            sandbox.hear(Message::Unshared { user: true })? == (Message::Unshared { user: true });
        if sandbox.has_user_namespace {
            map_users(sandbox.pid())?;
        }
        sandbox.say(Message::Mapped)?;
        sandbox.hear(Message::Ready)?;
        Ok(sandbox)
    }

    /// Whether there is a user namespace, too. Root does without one where those are forbidden.
    pub fn has_user_namespace(&self) -> bool {
        self.has_user_namespace
    }

    /// The process inside.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().map_or(0, Child::id)
    }

    /// Has the command run under the filter of native sockets. The notifications have to be answered from the moment at which
    /// the command starts.
    ///
    /// # Errors
    /// The kernel's refusal; the command then runs without the filter. [`SandboxError`] where the sandbox has ended.
    pub fn filter(&self) -> Result<Result<Filtered, InstallError>, SandboxError> {
        self.say(Message::Filter)?;
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

    /// Lets the inner process become the command; returns when it has.
    pub fn start(mut self) -> Result<Child, SandboxError> {
        self.say(Message::Go)?;
        match wire::receive(self.channel()?).map_err(|errno| SandboxError::Start(errno.into()))? {
            None => self.child.take().ok_or(SandboxError::Ended),
            Some(Message::Failed { step, errno }) => Err(SandboxError::Step { step, errno }),
            Some(_) => Err(SandboxError::Ended),
        }
    }

    fn channel(&self) -> Result<&OwnedFd, SandboxError> {
        self.channel.as_ref().ok_or(SandboxError::Ended)
    }

    fn say(&self, word: Message) -> Result<(), SandboxError> {
        wire::send(self.channel()?, word).map_err(|_| SandboxError::Ended)
    }

    /// Waits for the word that is due; [`Message::Unshared`] may come in either form.
    fn hear(&self, due: Message) -> Result<Message, SandboxError> {
        let heard = wire::receive(self.channel()?).map_err(|errno| SandboxError::Start(errno.into()))?;
        match (heard, due) {
            (Some(Message::Failed { step, errno }), _) => Err(SandboxError::Step { step, errno }),
            (Some(word @ Message::Unshared { .. }), Message::Unshared { .. }) => Ok(word),
            (Some(word), due) if word == due => Ok(word),
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
        // Root without CAP_SETUID may map no more than anybody else, and goes on as such below.
        if write("uid_map", &users).is_ok() {
            return write("gid_map", &groups);
        }
    }
    write("setgroups", "deny")?;
    write("uid_map", &format!("{uid} {uid} 1\n"))?;
    write("gid_map", &format!("{gid} {gid} 1\n"))
}

/// Turns the map of our own namespace (`inside outside count`) into one that gives a child the same users.
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
    fn a_child_gets_the_users_that_we_have() {
        assert_eq!(identity("         0          0 4294967295\n"), "0 0 4294967295\n");
        assert_eq!(identity("0 1000 1\n1 100000 65536\n"), "0 0 1\n1 1 65536\n");
        assert_eq!(identity(""), "");
    }
}
