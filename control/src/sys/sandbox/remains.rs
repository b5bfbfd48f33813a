//! What a command leaves behind in its sandbox, and the end of it.
//!
//! A command that ends is not always the end of what it started: `npx` passes SIGTERM to the shell between it and
//! the dev server, and the server lives on. Anywhere else it would hold its port; in a sandbox whose forward is gone
//! nobody could reach it, or find it. So a sandbox ends with its command, as a container does.
//!
//! What belongs to it is what lives in its network namespace. A process that made a namespace of its own (the
//! renderers of a browser) is left to the process that started it. If landfall itself is killed, the keeper ends a sandbox with
//! native sockets, and another one is left as it is.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal};

use crate::sys::processes::{ProcessFact, process_name};

/// How long what is left may take to end by itself: the other end of a pipe, or the last child of a script, is about
/// to, and needs neither a signal nor a word.
const GRACE: Duration = Duration::from_millis(100);

/// The network namespace of a sandbox, by what makes it one: device and inode, which stay its own while it is open.
#[derive(Debug)]
pub struct Namespace {
    file: File,
    /// Who was in it before the command began: the opener, and pasta where it works from inside. They end with us.
    ours: BTreeSet<u32>,
}

/// Processes that outlived the command, held by what cannot come to mean another process.
#[derive(Debug)]
pub struct Remains {
    processes: Vec<(ProcessFact, OwnedFd)>,
}

impl Namespace {
    /// The one that a process is in. Whoever is in it now is ours: to be called before the command begins.
    pub fn of(pid: u32) -> io::Result<Namespace> {
        let file = File::open(format!("/proc/{pid}/ns/net"))?;
        let mut namespace = Namespace { file, ours: BTreeSet::new() };
        namespace.ours = namespace.processes().into_iter().map(|(fact, _)| fact.pid).collect();
        Ok(namespace)
    }

    /// The one that a process is in, with every process in it.
    ///
    /// # Errors
    /// Those of the system.
    pub fn around(pid: u32) -> io::Result<Namespace> {
        Ok(Namespace { file: File::open(format!("/proc/{pid}/ns/net"))?, ours: BTreeSet::new() })
    }

    /// Whom the command has left in it, a moment after its end.
    pub fn remains(&self) -> Remains {
        let mut remains = Remains { processes: self.processes() };
        remains.wait(Instant::now() + GRACE);
        remains
    }

    /// Kills who is in it now. To be called when they have been asked to end, and had their time.
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
                // Held first and looked at then: what was looked at is what is held, or it has ended.
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
    /// Who they are.
    pub fn facts(&self) -> impl Iterator<Item = &ProcessFact> {
        self.processes.iter().map(|(fact, _)| fact)
    }

    /// Asks them to end, by SIGTERM.
    pub fn ask_to_end(&self) {
        self.signal(Signal::TERM);
    }

    /// Waits for their ends, at most until then. Forgets those that have ended; tells whether all have.
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
            // It may have ended, or belong to a user whom we may not signal; no more can be done then.
            let _ = rustix::process::pidfd_send_signal(pidfd, signal);
        }
    }
}
