//! Facts about the process of a trapped call: its copy of the socket, and the other references to it.
//!
//! Every path below goes through a descriptor of `/proc/TID`, opened while the call was known to wait, so a reused process
//! id leads to an error and not to another process. The work is bounded: servers of a process with more descriptors, threads
//! or children than the limits are relayed. No read here waits for the process: the kernel generates links, `status`,
//! `children` and `fdinfo`. The `fdinfo` of an epoll instance takes that instance's lock, which the program can hold for any
//! time (by a page fault that it serves itself, while the kernel delivers events to it). It then delays only its own calls
//! of `listen`, since each sandbox has its own supervisor.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{CWD, Mode, OFlags, RawDir};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags};

use super::decision::{Holder, Holders, Reference};
use super::notify::{Notifications, Trapped};
use super::procfs::{self, Status};

/// `PIDFD_THREAD` (Linux 6.9): the pidfd refers to a thread, and `pidfd_getfd` uses that thread's table.
const PIDFD_THREAD: u32 = libc::O_EXCL as u32;

/// The maximum number of descriptors to examine in one process.
const DESCRIPTORS_MAX: usize = 4_096;
/// The maximum number of threads whose children are looked up.
const THREADS_MAX: u32 = 512;
/// The maximum number of children whose descriptors are examined.
const CHILDREN_MAX: usize = 64;
/// The maximum number of ancestors whose descriptors are examined.
const ANCESTORS_MAX: usize = 16;
/// The maximum length of a file in `/proc`, in bytes. An epoll instance with 600 targets exceeds it.
const FILE_BYTES_MAX: usize = 64 * 1024;

/// The process of a trapped call.
#[derive(Debug)]
pub(super) struct Tracee {
    /// `/proc/TID`.
    directory: OwnedFd,
    pidfd: OwnedFd,
    status: Status,
}

impl Tracee {
    /// Opens the process of a waiting call.
    ///
    /// # Errors
    /// ESRCH if the call no longer waits; EPERM if the process may not be inspected.
    pub(super) fn of(trapped: &Trapped, notifications: &Notifications) -> Result<Tracee, Errno> {
        let directory = open_directory(CWD, &format!("/proc/{}", trapped.thread))?;
        let status = status(&directory)?;
        let thread = pid(trapped.thread)?;
        let pidfd = match rustix::process::pidfd_open(thread, PidfdFlags::from_bits_retain(PIDFD_THREAD)) {
            // A kernel before 6.9. The first thread shares its descriptor table with the others, unless the program unshared
            // it; the caller checks the inode.
            Err(Errno::INVAL) => rustix::process::pidfd_open(pid(status.process)?, PidfdFlags::empty())?,
            other => other?,
        };
        // The lookups above used the thread's id, which is that of the caller while the call waits.
        if notifications.is_waiting(trapped) {
            Ok(Tracee { directory, pidfd, status })
        } else {
            Err(Errno::SRCH)
        }
    }

    /// Returns the process id.
    pub(super) fn process(&self) -> u32 {
        self.status.process
    }

    /// Returns the number of threads.
    pub(super) fn threads(&self) -> u32 {
        self.status.threads
    }

    /// Duplicates a descriptor of the process into this one.
    ///
    /// # Errors
    /// EBADF if the number is not open; EPERM if it is not permitted.
    pub(super) fn descriptor(&self, number: i32) -> Result<OwnedFd, Errno> {
        rustix::process::pidfd_getfd(&self.pidfd, number, PidfdGetfdFlags::empty())
    }

    /// Whether this number refers to the socket with this inode.
    pub(super) fn refers_to(&self, number: i32, inode: u64) -> bool {
        refers_to(self.directory.as_fd(), number, inode)
    }

    /// Finds the references to the socket with this inode that decide whether it can be replaced.
    pub(super) fn holders(&self, inode: u64) -> Holders {
        let mut holders = Holders::default();
        let mut own = Vec::new();
        let complete = each_descriptor(self.directory.as_fd(), |number, link| {
            if procfs::socket_inode(link) == Some(inode) {
                let flags = self.fdinfo(number).and_then(|text| procfs::flags(&text));
                own.push((number, flags));
            } else if procfs::is_epoll(link) {
                // An instance that cannot be read in full may watch the socket.
                let text = self.fdinfo(number);
                holders.is_watched |= text.is_none_or(|text| procfs::epoll_watches(&text, inode));
            }
        });
        let known = own
            .into_iter()
            .map(|(descriptor, flags)| Some(Reference { descriptor, flags: flags? }))
            .collect::<Option<Vec<Reference>>>();
        holders.own = known.filter(|_| complete.is_ok());
        holders.child_holds = self.child_holds(inode);
        holders.ancestors = self.ancestors(inode);
        holders
    }

    fn fdinfo(&self, number: i32) -> Option<String> {
        read(&self.directory, &format!("fdinfo/{number}")).ok()
    }

    /// Whether a child has the socket, or may have it. A kernel without `children` counts as one without children: a child
    /// then holds a stub, which still accepts clients of the sandbox.
    fn child_holds(&self, inode: u64) -> bool {
        if self.status.threads > THREADS_MAX {
            return true;
        }
        let Ok(tasks) = open_directory(&self.directory, "task") else { return true };
        let mut threads = Vec::new();
        if each_entry(tasks.as_fd(), |name| threads.push(name)).is_err() {
            return true;
        }
        let mut children = Vec::new();
        for thread in threads {
            match read(&tasks, &format!("{thread}/children")) {
                Ok(text) => {
                    children.extend(text.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()))
                }
                Err(Errno::NOENT | Errno::SRCH) => {}
                Err(_) => return true,
            }
            if children.len() > CHILDREN_MAX {
                return true;
            }
        }
        children.into_iter().any(|child| find(child, inode).is_some())
    }

    /// Returns the processes above that hold the socket. Those outside the sandbox never hold it.
    fn ancestors(&self, inode: u64) -> Vec<Holder> {
        let (mut found, mut next) = (Vec::new(), self.status.parent);
        for _ in 0..ANCESTORS_MAX {
            if next == 0 || next == std::process::id() {
                break;
            }
            if let Some(descriptor) = find(next, inode) {
                found.push(Holder { process: next, descriptor });
            }
            let above =
                open_directory(CWD, &format!("/proc/{next}")).and_then(|directory| status(&directory));
            let Ok(above) = above else { break };
            next = above.parent;
        }
        found
    }
}

/// Whether a process still holds the socket with this inode under the same descriptor number. A later process with the same
/// id does not.
pub(super) fn still_holds(holder: &Holder, inode: u64) -> bool {
    let directory = open_directory(CWD, &format!("/proc/{}", holder.process));
    directory.is_ok_and(|directory| refers_to(directory.as_fd(), holder.descriptor, inode))
}

/// Duplicates the descriptor of a process into this one; the caller checks the socket.
///
/// # Errors
/// Those of the system.
pub(super) fn take(holder: &Holder) -> Result<OwnedFd, Errno> {
    let pidfd = rustix::process::pidfd_open(pid(holder.process)?, PidfdFlags::empty())?;
    rustix::process::pidfd_getfd(&pidfd, holder.descriptor, PidfdGetfdFlags::empty())
}

/// Finds a descriptor of a process that refers to the socket with this inode.
fn find(process: u32, inode: u64) -> Option<i32> {
    let directory = open_directory(CWD, &format!("/proc/{process}")).ok()?;
    let mut found = None;
    // In a process with too many descriptors, only those that were read count.
    let _ = each_descriptor(directory.as_fd(), |number, link| {
        if procfs::socket_inode(link) == Some(inode) {
            found = Some(number);
        }
    });
    found
}

fn refers_to(directory: BorrowedFd<'_>, number: i32, inode: u64) -> bool {
    let mut buffer = [MaybeUninit::uninit(); LINK_BYTES_MAX];
    let link = rustix::fs::readlinkat_raw(directory, format!("fd/{number}"), buffer.as_mut_slice());
    link.is_ok_and(|(link, _)| procfs::socket_inode(link) == Some(inode))
}

/// Long enough for the links of sockets and epoll instances. A longer link is truncated, and then matches neither.
const LINK_BYTES_MAX: usize = 64;

/// Calls `each` with the number and the link of every descriptor of a process.
///
/// # Errors
/// E2BIG if there are more than [`DESCRIPTORS_MAX`]; those of the system.
fn each_descriptor(process: BorrowedFd<'_>, mut each: impl FnMut(i32, &[u8])) -> Result<(), Errno> {
    let directory = open_directory(process, "fd")?;
    let mut count = 0;
    let mut too_many = false;
    each_entry(directory.as_fd(), |number| {
        count += 1;
        too_many |= count > DESCRIPTORS_MAX;
        let mut buffer = [MaybeUninit::uninit(); LINK_BYTES_MAX];
        if too_many {
            return;
        }
        let (Ok(number), name) = (i32::try_from(number), number.to_string()) else { return };
        // A descriptor that was closed meanwhile is skipped.
        if let Ok((link, _)) = rustix::fs::readlinkat_raw(&directory, name, buffer.as_mut_slice()) {
            each(number, link);
        }
    })?;
    if too_many { Err(Errno::TOOBIG) } else { Ok(()) }
}

/// Calls `each` for every name in a directory that is a number.
fn each_entry(directory: BorrowedFd<'_>, mut each: impl FnMut(u32)) -> Result<(), Errno> {
    let mut buffer = [MaybeUninit::uninit(); 8 * 1024];
    let mut entries = RawDir::new(directory, buffer.as_mut_slice());
    while let Some(entry) = entries.next() {
        let entry = entry?;
        if let Some(number) = entry.file_name().to_str().ok().and_then(|name| name.parse().ok()) {
            each(number);
        }
    }
    Ok(())
}

fn open_directory(at: impl AsFd, path: &str) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(at, path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

fn status(directory: &OwnedFd) -> Result<Status, Errno> {
    procfs::status(&read(directory, "status")?).ok_or(Errno::PROTO)
}

/// Reads a file of `/proc`.
///
/// # Errors
/// EFBIG if it is longer than [`FILE_BYTES_MAX`]; those of the system.
fn read(directory: impl AsFd, path: &str) -> Result<String, Errno> {
    let file = rustix::fs::openat(directory, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let mut bytes = Vec::new();
    let mut chunk = [0; 4 * 1024];
    loop {
        let count = rustix::io::retry_on_intr(|| rustix::io::read(&file, chunk.as_mut_slice()))?;
        if count == 0 {
            // A process name may contain any bytes.
            return Ok(String::from_utf8_lossy(&bytes).into_owned());
        }
        bytes.extend_from_slice(chunk.get(..count).unwrap_or_default());
        if bytes.len() > FILE_BYTES_MAX {
            return Err(Errno::FBIG);
        }
    }
}

fn pid(number: u32) -> Result<Pid, Errno> {
    i32::try_from(number).ok().and_then(Pid::from_raw).ok_or(Errno::SRCH)
}
