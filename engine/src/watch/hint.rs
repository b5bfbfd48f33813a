//! Hints of the kernel that a listener was opened or closed in some namespace: the tracepoint `sock:inet_sock_set_state`,
//! read through a private ftrace instance.
//!
//! A hint triggers a scan and carries no other information. Hints need root and a mounted tracefs; without them the scans
//! find the same changes a little later. Events of our own threads are ignored: for each listener that the watch finds, they
//! open and close a listener of the relay, which needs no scan.
//!
//! An instance (`Documentation/trace/ftrace.rst`, "Instances") has its own buffers, events and filters, so other tracing on
//! this host is not disturbed. [`Hints`] removes its instance when dropped. An engine that was started by root opens its
//! hints before it changes to another user. That user may not remove the instance: the engine turns the event off at its
//! end, and its driver removes the instance ([`remove_leftovers`]). The next process that opens hints removes an instance
//! that a killed process left behind. The kernel refuses to remove instances that are in use (EBUSY).

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::channel::timespec;

/// The mount points of tracefs: the current one, and the one before Linux 4.1.
const ROOTS: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];

/// The directory of the tracepoint, in tracefs and in each instance.
const EVENT: &str = "events/sock/inet_sock_set_state";

/// Transitions to `TCP_LISTEN` (10), and from there to `TCP_CLOSE` (7, `include/net/tcp_states.h`). The socket of an
/// accepted connection is a copy of its listener (`inet_csk_clone_lock`) and goes from LISTEN to SYN_RECV, which passes no
/// tracepoint.
const FILTER: &str = "newstate==10||(oldstate==10&&newstate==7)";

/// The prefix of the names of our instances.
const PREFIX: &str = "landfall-";

/// The shortest time between two hints. Events of the kernel within this time make one further hint, so a program that
/// keeps opening and closing listeners cannot keep the watch busy.
const SPACING: Duration = Duration::from_millis(3);

/// The number of times an instance is created again after another process removed it.
const ATTEMPTS_MAX: u32 = 4;

/// The reason why hints are unavailable. This is not a failure: the scans find listeners without hints.
#[derive(Debug, thiserror::Error)]
pub enum HintError {
    /// tracefs is not mounted, or the kernel has no such tracepoint.
    #[error("there is no tracepoint sock:inet_sock_set_state in {}", ROOTS[0])]
    Absent,
    /// Tracing needs root.
    #[error("tracing the kernel takes root")]
    Forbidden,
    /// The kernel refused a step.
    #[error("{}: {source}", path.display())]
    Refused {
        /// The file in tracefs.
        path: PathBuf,
        /// The error of the step.
        source: io::Error,
    },
}

/// The source of a watch's hints.
#[derive(Debug, Default)]
pub enum HintSource {
    /// No hints: the watch only scans.
    #[default]
    Off,
    /// The watch opens hints itself, where the kernel allows it.
    Open,
    /// Hints that are open already.
    Opened(Hints),
}

/// The kernel's hints. Readable after a listener was opened or closed since the last read.
#[derive(Debug)]
pub struct Hints {
    // Fields drop in this order: an instance whose files are open cannot be removed.
    pipe: File,
    _switch: Switch,
    _instance: Instance,
}

/// The file that enables the event. Dropping it disables the event.
#[derive(Debug)]
struct Switch(File);

impl Drop for Switch {
    fn drop(&mut self) {
        // If the instance cannot be removed, it at least records no more events.
        let _ = self.0.write_all(b"0");
    }
}

/// A directory of tracefs. Dropping it removes the directory.
#[derive(Debug)]
struct Instance(PathBuf);

impl Instance {
    /// Writes to a file of the instance, and returns the file.
    fn set(&self, name: &str, value: &str) -> Result<File, HintError> {
        let path = self.0.join(name);
        let written = OpenOptions::new().write(true).open(&path).and_then(|mut file| {
            file.write_all(value.as_bytes())?;
            Ok(file)
        });
        written.map_err(|source| HintError::Refused { path, source })
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        // The next process that opens hints removes an instance that remains.
        let _ = fs::remove_dir(&self.0);
    }
}

impl Hints {
    /// Creates an instance and enables its one event. Takes some ten milliseconds.
    ///
    /// # Errors
    /// The reason why the kernel gives no hints.
    pub fn open() -> Result<Hints, HintError> {
        let mut why = HintError::Absent;
        for root in ROOTS.map(Path::new) {
            match fs::metadata(root.join(EVENT)) {
                Ok(_) => return Hints::open_in(&root.join("instances")),
                Err(error) if error.kind() == ErrorKind::PermissionDenied => why = HintError::Forbidden,
                Err(_) => {}
            }
        }
        Err(why)
    }

    fn open_in(instances: &Path) -> Result<Hints, HintError> {
        remove_leftovers_in(instances);
        let (instance, pipe) = make(instances)?;
        // The minimum: an event that was dropped for lack of space would only repeat the hint.
        instance.set("buffer_size_kb", "4")?;
        // Readable from the first event on, instead of when the buffer is half full.
        instance.set("buffer_percent", "0")?;
        instance.set(&format!("{EVENT}/filter"), FILTER)?;
        let switch = Switch(instance.set(&format!("{EVENT}/enable"), "1")?);
        Ok(Hints { pipe, _switch: switch, _instance: instance })
    }

    /// Calls `look` after each hint, until the other end of `stop` is closed.
    pub fn follow(self, stop: impl AsFd, look: impl Fn()) {
        follow(&self.pipe, stop, look);
    }
}

/// Creates an instance with an unused name and opens it.
fn make(instances: &Path) -> Result<(Instance, File), HintError> {
    let (mut number, mut attempts) = (0_u32, 0);
    loop {
        let path = instances.join(format!("{PREFIX}{}-{number}", std::process::id()));
        match fs::create_dir(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::AlreadyExists && number < u32::MAX => {
                number += 1;
                continue;
            }
            Err(error) if error.kind() == ErrorKind::PermissionDenied => return Err(HintError::Forbidden),
            Err(source) => return Err(HintError::Refused { path, source }),
        }
        let instance = Instance(path);
        let path = instance.0.join("trace_pipe");
        let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or_default();
        match OpenOptions::new().read(true).custom_flags(flags).open(&path) {
            Ok(pipe) => return Ok((instance, pipe)),
            // Another process removed the new instance as a leftover between the two calls.
            Err(error) if error.kind() == ErrorKind::NotFound && attempts < ATTEMPTS_MAX => attempts += 1,
            Err(source) => return Err(HintError::Refused { path, source }),
        }
    }
}

/// Removes the instances of processes that have ended; the kernel refuses to remove those in use. Does nothing without
/// permission or without tracefs.
pub fn remove_leftovers() {
    for root in ROOTS.map(Path::new) {
        remove_leftovers_in(&root.join("instances"));
    }
}

fn remove_leftovers_in(instances: &Path) {
    for entry in fs::read_dir(instances).into_iter().flatten().flatten() {
        if entry.file_name().as_encoded_bytes().starts_with(PREFIX.as_bytes()) {
            let _ = fs::remove_dir(entry.path());
        }
    }
}

fn follow(mut pipe: impl Read + AsFd, stop: impl AsFd, look: impl Fn()) {
    // The text of the events. Only the thread that caused an event is read from it; a scan finds the rest.
    let mut text = [0; 4096];
    loop {
        let mut waits = [
            PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(pipe.as_fd(), PollFlags::IN),
        ];
        match poll(&mut waits, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => return,
        }
        let [stopped, hinted] = waits.map(|wait| !wait.revents().is_empty());
        if stopped {
            return;
        }
        if !hinted {
            continue;
        }
        match pipe.read(&mut text) {
            Ok(0) => return,
            Ok(read) if text.get(..read).is_some_and(is_ours) => continue,
            Ok(_) => look(),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => continue,
            Err(_) => return,
        }
        let mut waits = [PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN)];
        if poll(&mut waits, timespec(SPACING).as_ref()).is_ok_and(|ready| ready > 0) {
            return;
        }
    }
}

/// Whether our own threads caused all of these events. A line that cannot be parsed counts as another process's.
fn is_ours(text: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(text) else { return false };
    text.lines()
        .all(|line| thread_of(line).is_some_and(|id| Path::new(&format!("/proc/self/task/{id}")).exists()))
}

/// Returns the id of the thread that caused the event of a `trace_pipe` line (`landfall-engine-71 [001] ...`), if it has one
/// of our names. The ids are those of the initial pid namespace, so in another pid namespace only the name separates our
/// threads from others.
fn thread_of(line: &str) -> Option<u32> {
    let (task, _) = line.trim_start().split_once(" [")?;
    let (name, id) = task.trim_end().rsplit_once('-')?;
    id.parse().ok().filter(|_| name.starts_with(PREFIX))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn each_hint_causes_one_look() {
        let (pipe, mut kernel) = io::pipe().unwrap();
        let (stop, running) = io::pipe().unwrap();
        let (looks, looked) = mpsc::channel();
        let thread = std::thread::spawn(move || follow(pipe, stop, || looks.send(()).unwrap()));
        for _ in 0..3 {
            kernel.write_all(b"a line of the kernel's").unwrap();
            looked.recv_timeout(Duration::from_secs(20)).unwrap();
        }
        drop(running);
        thread.join().unwrap();
        assert_eq!(looked.try_iter().count(), 0, "looks without a hint");
    }

    #[test]
    fn events_of_our_own_threads_are_ignored() {
        let ours = std::process::id();
        let line = |task: &str| {
            format!("{task:>24}    [001] .....  4711.042: inet_sock_set_state: family=AF_INET\n")
        };
        let own = line(&format!("landfall-engine-{ours}"));
        assert!(is_ours(own.as_bytes()));
        for others in ["landfall-engine-1", &format!("node-{ours}"), "[x] [y-1", "landfall-", ""].map(line) {
            assert!(!is_ours(others.as_bytes()), "{others}");
            assert!(!is_ours(format!("{own}{others}").as_bytes()), "{others}");
        }
        assert!(!is_ours(&own.as_bytes()[..20]) && !is_ours(&[0xff]));
    }

    #[test]
    fn following_ends_when_the_pipe_ends() {
        let (pipe, kernel) = io::pipe().unwrap();
        let (stop, _running) = io::pipe().unwrap();
        drop(kernel);
        follow(pipe, stop, || panic!("there was no hint"));
    }

    #[test]
    fn a_directory_without_tracefs_is_refused_and_unchanged() {
        let folder = tempfile::tempdir().unwrap();
        let message = Hints::open_in(folder.path()).unwrap_err().to_string();
        assert!(message.contains("trace_pipe"), "{message}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
