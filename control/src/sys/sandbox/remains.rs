//! Processes that a command leaves in its sandbox, and their end.
//!
//! A command can end before the processes that it started: `npx` passes SIGTERM to the shell between it and the dev
//! server, and the server keeps running. Outside a sandbox it would hold its port; in a sandbox whose forward is closed
//! it could be neither reached nor found. So a sandbox ends with its command, as a container does.
//!
//! The processes of a sandbox are those in its network namespace. A process in a namespace of its own (the renderers of
//! a browser) is left to the process that started it. If landfall itself is killed, the keeper ends a sandbox with
//! native sockets; another sandbox keeps running.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal};

use crate::sys::processes::{ProcessFact, process_name};

/// The time that the remaining processes have to end by themselves: the other end of a pipe, or the last child of a script,
/// is about to end, and needs neither a signal nor a message.
const GRACE: Duration = Duration::from_millis(100);

/// The network namespace of a sandbox, identified by device and inode, which stay its own while the file is open.
#[derive(Debug)]
pub struct Namespace {
    file: File,
    /// The processes in it before the command started: the opener, and pasta if it works from inside. They end with
    /// landfall.
    ours: BTreeSet<u32>,
}

/// Processes that outlived the command, held by what cannot come to mean another process.
#[derive(Debug)]
pub struct Remains {
    processes: Vec<(ProcessFact, OwnedFd)>,
}

impl Namespace {
    /// Opens the namespace that a process is in. The processes in it now count as landfall's own: call it before the
    /// command starts.
    pub fn of(pid: u32) -> io::Result<Namespace> {
        let file = File::open(format!("/proc/{pid}/ns/net"))?;
        let mut namespace = Namespace { file, ours: BTreeSet::new() };
        namespace.ours = namespace.processes().into_iter().map(|(fact, _)| fact.pid).collect();
        Ok(namespace)
    }

    /// Opens the namespace that a process is in. None of its processes count as landfall's own.
    ///
    /// # Errors
    /// Those of the system.
    pub fn around(pid: u32) -> io::Result<Namespace> {
        Ok(Namespace { file: File::open(format!("/proc/{pid}/ns/net"))?, ours: BTreeSet::new() })
    }

    /// Returns the processes in it that remain `GRACE` after the end of the command.
    pub fn remains(&self) -> Remains {
        let mut remains = Remains { processes: self.processes() };
        remains.wait(Instant::now() + GRACE);
        remains
    }

    /// Kills the processes in it. Call it after they were asked to end and had time to.
    pub fn clear(&self) {
        Remains { processes: self.processes() }.signal(Signal::KILL);
    }

    fn processes(&self) -> Vec<(ProcessFact, OwnedFd)> {
        let Ok(namespace) = self.file.metadata() else { return Vec::new() };
        let is_it = |pid: u32| {
            fs::metadata(format!("/proc/{pid}/ns/net"))
                .is_ok_and(|other| (other.dev(), other.ino()) == (namespace.dev(), namespace.ino()))
        };
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        pids.filter(|pid| !self.ours.contains(pid))
            .filter_map(|pid| {
                // The pidfd is opened before the check, so it means the process that was checked, or that one has
                // ended.
                let pidfd = rustix::process::pidfd_open(
                    Pid::from_raw(i32::try_from(pid).ok()?)?,
                    PidfdFlags::empty(),
                );
                let pidfd = pidfd.ok()?;
                is_it(pid).then(|| {
                    let name = process_name(pid).unwrap_or_else(|| "a process".to_owned());
                    (ProcessFact { name, pid }, pidfd)
                })
            })
            .collect()
    }
}

impl Remains {
    /// The processes, for messages.
    pub fn facts(&self) -> impl Iterator<Item = &ProcessFact> {
        self.processes.iter().map(|(fact, _)| fact)
    }

    /// Sends them SIGTERM.
    pub fn ask_to_end(&self) {
        self.signal(Signal::TERM);
    }

    /// Waits for their ends until the deadline, and removes those that have ended. Returns whether all have.
    pub fn wait(&mut self, deadline: Instant) -> bool {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut ends: Vec<PollFd<'_>> =
                self.processes.iter().map(|(_, pidfd)| PollFd::new(pidfd, PollFlags::IN)).collect();
            if ends.is_empty() {
                return true;
            }
            let timeout = Timespec::try_from(left).ok();
            let ready = rustix::io::retry_on_intr(|| rustix::event::poll(&mut ends, timeout.as_ref()));
            let mut ended = ends.iter().map(|end| !end.revents().is_empty()).collect::<Vec<_>>().into_iter();
            self.processes.retain(|_| !ended.next().unwrap_or(false));
            if !matches!(ready, Ok(1..)) {
                return self.processes.is_empty();
            }
        }
    }

    fn signal(&self, signal: Signal) {
        for (_, pidfd) in &self.processes {
            // It may have ended, or belong to a user whom this one may not signal.
            let _ = rustix::process::pidfd_send_signal(pidfd, signal);
        }
    }
}
