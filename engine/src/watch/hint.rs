//! Hints of the kernel that something began or ceased to listen, in whichever namespace: the tracepoint
//! `sock:inet_sock_set_state`, read through an ftrace instance of our own.
//!
//! A hint says that it is worth looking, never what there is: the watch scans when it gets one. Without hints, which
//! take root and a mounted tracefs, it finds the same a little later. What our own threads do is none: for each listener
//! that is found they open and close theirs, which nobody has to look for.
//!
//! An instance (`Documentation/trace/ftrace.rst`, "Instances") has its own buffers, events and filters, so what else is
//! traced on this host continues. [`Hints`] removes it when dropped. An engine of root opens its hints before it changes to
//! another user, which may not remove the instance: it turns the event off at its end, and its driver removes the instance
//! ([`remove_leftovers`]). One that a killed process left behind is removed by the next process that opens hints. The kernel keeps those
//! that are in use (EBUSY).

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

/// Where tracefs is mounted: today, and before Linux 4.1.
const ROOTS: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];

/// The directory of the tracepoint, in tracefs and in each instance.
const EVENT: &str = "events/sock/inet_sock_set_state";

/// Into `TCP_LISTEN` (10), and from there to `TCP_CLOSE` (7, `include/net/tcp_states.h`). A connection that is accepted goes
/// from LISTEN to SYN_RECV, as a copy of its listener (`inet_csk_clone_lock`), and says nothing of that.
const FILTER: &str = "newstate==10||(oldstate==10&&newstate==7)";

/// What the names of our instances begin with.
const PREFIX: &str = "landfall-";

/// How long a hint is the last one, at least: what the kernel tells meanwhile is one more, so that no program can keep the
/// watch busy by opening and closing listeners.
const SPACING: Duration = Duration::from_millis(3);

/// How often an instance is made again that somebody else's clearing removed.
const ATTEMPTS_MAX: u32 = 4;

/// Why there are no hints. None of it is a failure: listeners are found by scanning.
#[derive(Debug, thiserror::Error)]
pub enum HintError {
    /// tracefs is not mounted, or the kernel has no such tracepoint.
    #[error("there is no tracepoint sock:inet_sock_set_state in {}", ROOTS[0])]
    Absent,
    /// Only root may trace.
    #[error("tracing the kernel takes root")]
    Forbidden,
    /// The kernel refused a step.
    #[error("{}: {source}", path.display())]
    Refused {
        /// The file of tracefs.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Where a watch gets its hints.
#[derive(Debug, Default)]
pub enum HintSource {
    /// Nowhere: it scans.
    #[default]
    Off,
    /// It opens them itself, where the kernel allows that.
    Open,
    /// They are open already.
    Opened(Hints),
}

/// The kernel's hints. Readable whenever something began or ceased to listen since they were last drained.
#[derive(Debug)]
pub struct Hints {
    // Both are closed before the instance is removed, which would be busy.
    pipe: File,
    _switch: Switch,
    _instance: Instance,
}

/// The file that turns the event on, and off when this is dropped.
#[derive(Debug)]
struct Switch(File);

impl Drop for Switch {
    fn drop(&mut self) {
        // An instance that remains records nothing then.
        let _ = self.0.write_all(b"0");
    }
}

/// A directory of tracefs that goes with it.
#[derive(Debug)]
struct Instance(PathBuf);

impl Instance {
    /// Writes one of its files, and returns it open.
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
        // What remains is removed by the next one that opens.
        let _ = fs::remove_dir(&self.0);
    }
}

impl Hints {
    /// Makes an instance and turns its one event on. Takes some ten milliseconds.
    ///
    /// # Errors
    /// Why the kernel gives no hints here.
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
        // The least there is: a hint that found no room would say the same as those that did.
        instance.set("buffer_size_kb", "4")?;
        // Readable from the first event on, not when the buffer is half full.
        instance.set("buffer_percent", "0")?;
        instance.set(&format!("{EVENT}/filter"), FILTER)?;
        let switch = Switch(instance.set(&format!("{EVENT}/enable"), "1")?);
        Ok(Hints { pipe, _switch: switch, _instance: instance })
    }

    /// Calls `look` after each hint until the other end of `stop` is closed.
    pub fn follow(self, stop: impl AsFd, look: impl Fn()) {
        follow(&self.pipe, stop, look);
    }
}

/// An instance with a name that nobody has, held open.
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
            // Another process was clearing up in this very moment.
            Err(error) if error.kind() == ErrorKind::NotFound && attempts < ATTEMPTS_MAX => attempts += 1,
            Err(source) => return Err(HintError::Refused { path, source }),
        }
    }
}

/// Removes the instances of processes that have ended; the kernel refuses for those in use. Without permission, or without tracefs,
/// it does nothing.
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
    // The text of an event, which but for whose it is says nothing that a scan does not.
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

/// Whether all of these events are of our own threads. What cannot be read is not.
fn is_ours(text: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(text) else { return false };
    text.lines()
        .all(|line| thread_of(line).is_some_and(|id| Path::new(&format!("/proc/self/task/{id}")).exists()))
}

/// The thread of one of our names of which a line of `trace_pipe` is: `landfall-engine-71 [001] ...`. The kernel numbers
/// threads as the first pid namespace does, so where we are in another one only the names keep ours and others apart.
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
    fn each_hint_is_looked_after() {
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
        assert_eq!(looked.try_iter().count(), 0, "it looks only when there is a hint");
    }

    #[test]
    fn what_our_own_threads_do_is_no_hint() {
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
    fn it_ends_with_the_kernels_end() {
        let (pipe, kernel) = io::pipe().unwrap();
        let (stop, _running) = io::pipe().unwrap();
        drop(kernel);
        follow(pipe, stop, || panic!("there was no hint"));
    }

    #[test]
    fn a_place_that_is_no_tracefs_is_refused_and_left_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let told = Hints::open_in(folder.path()).unwrap_err().to_string();
        assert!(told.contains("trace_pipe"), "{told}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
