//! The commands of folders that the launcher runs for the daemon. Each has a thread that waits until the command ends or the
//! daemon closes the channel.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt as _;
use std::process::Child;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use landfall_engine::channel::Channel;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use super::{Slot, send};
use crate::registry::folder::verified;
use crate::registry::trust_file::TrustFile;
use crate::sys::launcher::{Invocation, Refusal, Reply};
use crate::sys::paths::Home;

/// The maximum number of concurrent commands. The daemon runs four jobs at a time, and restarts.
const COMMANDS_MAX: usize = 64;

/// The commands that run.
#[derive(Debug, Default)]
pub(super) struct Commands {
    in_use: Arc<AtomicUsize>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Commands {
    /// Runs a command if its approval is valid, and reports its end on `channel`.
    pub(super) fn run(
        &self,
        home: &Home,
        channel: Channel,
        invocation: Invocation,
        settings: String,
        output: Option<OwnedFd>,
    ) {
        let slot = match Slot::take(&self.in_use, COMMANDS_MAX) {
            Ok(slot) => slot,
            Err(refusal) => return send(&channel, &Reply::Refused { refusal }),
        };
        let trust = TrustFile::of(home);
        // Reading the folder may block: it may be on a file system that does not answer.
        let thread = thread::Builder::new().spawn(move || {
            match start(&invocation, &settings, &trust, output) {
                Ok(group) => {
                    send(&channel, &Reply::Started);
                    wait_for_end(group, &channel);
                }
                Err(refusal) => send(&channel, &Reply::Refused { refusal }),
            }
            drop(slot);
        });
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        threads.retain(|thread| !thread.is_finished());
        threads.extend(thread);
    }

    /// Waits for the threads. The daemon has ended, so each thread kills its command.
    pub(super) fn end(self) {
        let threads = self.threads.into_inner().unwrap_or_else(PoisonError::into_inner);
        threads.into_iter().for_each(|thread| drop(thread.join()));
    }
}

fn start(
    invocation: &Invocation,
    settings: &str,
    trust: &TrustFile,
    output: Option<OwnedFd>,
) -> Result<Group, Refusal> {
    let mut command = verified(invocation, settings, trust, output.ok_or(Refusal::Invalid)?)?;
    let leader = command.spawn().map_err(|error| Refusal::system("it cannot be started", &error))?;
    Ok(Group { leader, waited: false })
}

/// A command that leads its process group. Dropping it kills the group, unless the command was waited for; then the
/// processes that it left behind continue.
struct Group {
    leader: Child,
    waited: bool,
}

impl Drop for Group {
    fn drop(&mut self) {
        if !self.waited {
            // Until the leader is waited for, the id of its group cannot be reused.
            let _ = kill_process_group(Pid::from_child(&self.leader), Signal::KILL);
            let _ = self.leader.wait();
        }
    }
}

/// Waits until the command ends, and reports its status. Returns early if the other end of `channel` is closed.
fn wait_for_end(mut group: Group, channel: &Channel) {
    let Ok(process) = pidfd_open(Pid::from_child(&group.leader), PidfdFlags::empty()) else { return };
    loop {
        let mut waits =
            [PollFd::new(&process, PollFlags::IN), PollFd::from_borrowed_fd(channel.as_fd(), PollFlags::IN)];
        match poll(&mut waits, None) {
            Err(Errno::INTR) => continue,
            Err(_) => return,
            Ok(_) => {}
        }
        let [ended, closed] = waits.map(|wait| !wait.revents().is_empty());
        if ended {
            if let Ok(status) = group.leader.wait() {
                group.waited = true;
                send(channel, &Reply::Exited { status: status.into_raw() });
            }
            return;
        }
        // The daemon sends nothing else on this channel, so readable means closed.
        if closed {
            return;
        }
    }
}
