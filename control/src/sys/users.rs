//! The users of this machine that may receive a secret of this daemon.

use std::fmt;

use landfall_engine::process::privileges::own_uids;

use super::launcher::owners_of_sockets;
use crate::model::name::escape;
use crate::sys::processes::{self, ProcessFact};

/// Whether a socket of this user may receive a secret. That is true for root, from which the daemon cannot keep a
/// secret, for the daemon's own user, and for the user that root's engine changes to. Docker publishes ports as root
/// or, if rootless, as the daemon's user.
pub(crate) fn is_ours(uid: u32) -> bool {
    uid == 0 || own_uids().contains(&uid)
}

/// The user who holds a socket, and the process where it is visible.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Holder {
    /// The user's id.
    pub(crate) uid: u32,
    /// The socket's inode.
    pub(crate) inode: u64,
    /// `None` if `/proc` does not show the process to this user.
    pub(crate) process: Option<ProcessFact>,
}

impl Holder {
    /// Finds the process, on another thread: a walk over all processes may take tens of milliseconds.
    pub(crate) async fn find_process(&mut self) {
        let inode = self.inode;
        let found = tokio::task::spawn_blocking(move || owners_of_sockets(&[inode])).await;
        self.process = found.ok().and_then(|mut owners| owners.remove(&inode));
    }
}

impl fmt::Display for Holder {
    /// Such as `nc (pid 4300) of mallory (uid 1001)`. A process chooses its own name, so it is escaped.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.process {
            Some(process) => write!(f, "{} (pid {})", escape(&process.name), process.pid)?,
            None => f.write_str("a process")?,
        }
        let (name, number) = (processes::user_name(self.uid), format!("uid {}", self.uid));
        match name == number {
            true => write!(f, " of {number}"),
            false => write!(f, " of {name} ({number})"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holder_is_shown_with_process_user_and_uid() {
        let process = Some(ProcessFact { name: "nc\u{1b}[2J".to_owned(), pid: 7 });
        assert_eq!(Holder { uid: 0, inode: 1, process }.to_string(), "nc\\u{1b}[2J (pid 7) of root (uid 0)");
        let nameless = Holder { uid: 3_999_999_999, inode: 1, process: None };
        assert_eq!(nameless.to_string(), "a process of uid 3999999999");
    }

    #[test]
    fn root_and_this_user_may_receive_secrets() {
        assert!(is_ours(0) && is_ours(rustix::process::geteuid().as_raw()));
        assert!(!is_ours(3_999_999_999));
    }
}
