//! The kernel's side of a seccomp user notification: the filter's installation and the four requests of its descriptor.
//!
//! `seccomp_unotify(2)` describes the protocol. The kernel may have longer structures than the headers of this build, and
//! refuses shorter buffers than its own: [`Notifications`] requests the sizes once and keeps buffers of at least that
//! length. The structures that are passed by fixed size (`seccomp_notif_addfd`, the identifier) carry their size in the
//! request number.
//!
//! One thread reads a descriptor. `poll(2)` reports it readable only while an unreceived notification waits, and no other
//! thread receives it, so receiving after such a poll does not block. The notifying task may end in between; the result is
//! then [`Received::Vanished`].

#![expect(
    unsafe_code,
    reason = "seccomp(2) and the requests of its notification descriptor have no safe wrapper"
)]

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::filter::{self, Call};

/// `SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP` (include/uapi/linux/seccomp.h, Linux 6.6).
const SYNC_WAKE_UP: libc::c_ulong = 1;

/// The reason why a filter could not be installed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
pub enum InstallError {
    /// This build is for an architecture without native sockets.
    #[error("native sockets are not built for this processor")]
    Architecture,
    /// The kernel has no `seccomp(2)`, or no user notification with `SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV`.
    #[error("the kernel has no killable seccomp notifications (Linux 5.19 is needed)")]
    TooOld,
    /// Another supervisor has a notification descriptor for this process already (EBUSY).
    #[error("another program supervises the system calls of this process already")]
    Nested,
    /// The kernel or an active filter does not permit it.
    #[error("seccomp filters are not permitted here")]
    Forbidden,
    /// Any other error of the kernel.
    #[error("the kernel refused the seccomp filter: {}", io::Error::from_raw_os_error(*.0))]
    Other(i32),
}

impl From<Errno> for InstallError {
    fn from(errno: Errno) -> InstallError {
        match errno {
            Errno::NOSYS | Errno::INVAL => InstallError::TooOld,
            Errno::BUSY => InstallError::Nested,
            Errno::PERM | Errno::ACCESS => InstallError::Forbidden,
            other => InstallError::Other(other.raw_os_error()),
        }
    }
}

/// Installs the filter on the calling thread permanently, and returns the descriptor of its notifications.
///
/// Threads and processes that this one creates from now on inherit the filter. The caller needs CAP_SYS_ADMIN in its user
/// namespace; a process that created the namespace has it until it executes another program.
///
/// # Errors
/// [`InstallError`]; nothing is installed.
pub fn install() -> Result<OwnedFd, InstallError> {
    let architecture = filter::NATIVE_ARCHITECTURE.ok_or(InstallError::Architecture)?;
    let mut program = filter::program(architecture);
    let length = u16::try_from(program.len()).map_err(|_| InstallError::Other(libc::EINVAL))?;
    let program = libc::sock_fprog { len: length, filter: program.as_mut_ptr() };
    let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
    // SAFETY: with SECCOMP_SET_MODE_FILTER the kernel reads one sock_fprog at the third argument, and `len` instructions at
    // its `filter`. Both live until the end of this function and are not written by anything meanwhile; the kernel copies
    // them.
    let made = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, ptr::from_ref(&program))
    };
    let descriptor = libc::c_int::try_from(made).map_err(|_| InstallError::Other(libc::EINVAL))?;
    if descriptor < 0 {
        return Err(last_errno().into());
    }
    // SAFETY: the call returned a descriptor that it made for this process (`seccomp(2)`, SECCOMP_FILTER_FLAG_NEW_LISTENER),
    // so nothing else owns or closes it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// A call that waits for its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Trapped {
    /// The kernel's identifier of the notification, never reused.
    pub(super) id: u64,
    /// The id of the calling thread in our pid namespace; 0 if the thread is not in it.
    pub(super) thread: u32,
    /// The call; `None` if the filter does not notify for it.
    pub(super) call: Option<Call>,
    /// Its first argument, a descriptor of the caller.
    pub(super) descriptor: i32,
    /// Its second argument as `listen` reads it, the backlog.
    pub(super) backlog: i32,
}

/// The result of receiving.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Received {
    /// A call waits.
    Call(Trapped),
    /// The calling task has ended or its call was interrupted, or this thread received a signal.
    Vanished,
}

/// The descriptor of a filter's notifications.
#[derive(Debug)]
pub(super) struct Notifications {
    descriptor: OwnedFd,
    /// At least as long as the kernel's `struct seccomp_notif`. Words, so that it is aligned as that is.
    received: Vec<u64>,
    /// At least as long as the kernel's `struct seccomp_notif_resp`.
    response: Vec<u64>,
}

impl Notifications {
    /// Takes the descriptor that [`install`] returned, in this process or another.
    ///
    /// # Errors
    /// Those of requesting the sizes of the kernel's structures.
    pub(super) fn new(descriptor: OwnedFd) -> Result<Notifications, Errno> {
        let mut sizes =
            libc::seccomp_notif_sizes { seccomp_notif: 0, seccomp_notif_resp: 0, seccomp_data: 0 };
        // SAFETY: with SECCOMP_GET_NOTIF_SIZES the kernel writes one seccomp_notif_sizes, whose layout is fixed, to the
        // third argument; `sizes` is one, borrowed exclusively.
        let got = unsafe {
            libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_NOTIF_SIZES, 0, ptr::from_mut(&mut sizes))
        };
        if got != 0 {
            return Err(last_errno());
        }
        let words = |kernel: u16, own: usize| usize::from(kernel).max(own).div_ceil(mem::size_of::<u64>());
        let received = words(sizes.seccomp_notif, mem::size_of::<libc::seccomp_notif>());
        let response = words(sizes.seccomp_notif_resp, mem::size_of::<libc::seccomp_notif_resp>());
        let notifications =
            Notifications { descriptor, received: vec![0; received], response: vec![0; response] };
        notifications.wake_up_at_once();
        Ok(notifications)
    }

    /// Makes the kernel switch directly from the caller to this reader, on the caller's processor. A signal interrupts a
    /// call that is not received yet, so this shortens that time. Kernels before 6.6 refuse, which does no harm.
    fn wake_up_at_once(&self) {
        // SAFETY: SECCOMP_IOCTL_NOTIF_SET_FLAGS takes its flags as the argument itself and accesses no memory.
        let _ = unsafe {
            libc::ioctl(self.descriptor.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SET_FLAGS, SYNC_WAKE_UP)
        };
    }

    /// Receives the next call, after `poll(2)` reported one.
    ///
    /// # Errors
    /// Every errno except those that mean [`Received::Vanished`].
    pub(super) fn receive(&mut self) -> Result<Received, Errno> {
        // The kernel refuses a buffer that is not zeroed.
        self.received.fill(0);
        // SAFETY: SECCOMP_IOCTL_NOTIF_RECV writes one struct seccomp_notif of the kernel's size to its argument. The buffer
        // is at least that long (`new`), aligned to 8 as the structure is, and borrowed exclusively.
        let got = unsafe {
            libc::ioctl(
                self.descriptor.as_raw_fd(),
                libc::SECCOMP_IOCTL_NOTIF_RECV,
                self.received.as_mut_ptr().cast::<libc::seccomp_notif>(),
            )
        };
        if got != 0 {
            return match last_errno() {
                Errno::NOENT | Errno::INTR => Ok(Received::Vanished),
                other => Err(other),
            };
        }
        // SAFETY: the buffer is at least as long as a `libc::seccomp_notif` (`new`), aligned to 8, and initialised: every
        // byte was zeroed, and every bit pattern is a seccomp_notif, which consists of integers. A longer structure of the
        // kernel's has the fields of the shorter one at the same offsets.
        let notification = unsafe { self.received.as_ptr().cast::<libc::seccomp_notif>().read() };
        Ok(Received::Call(Trapped {
            id: notification.id,
            thread: notification.pid,
            call: Call::of(notification.data.nr),
            descriptor: low_half(notification.data.args[0]),
            backlog: low_half(notification.data.args[1]),
        }))
    }

    /// Whether the call still waits: its task lives and has not been interrupted. If so, earlier lookups by the task's id
    /// concerned that task, and not a later one with the same id.
    pub(super) fn is_waiting(&self, trapped: &Trapped) -> bool {
        // SAFETY: SECCOMP_IOCTL_NOTIF_ID_VALID reads one u64 at its argument; `id` is one and outlives the call.
        let got = unsafe {
            libc::ioctl(
                self.descriptor.as_raw_fd(),
                libc::SECCOMP_IOCTL_NOTIF_ID_VALID,
                ptr::from_ref(&trapped.id),
            )
        };
        got == 0
    }

    /// Puts a duplicate of `file` into the caller's descriptor table at `at`, and closes what is there, as `dup3(2)` does.
    ///
    /// # Errors
    /// ENOENT if the call no longer waits; EBADF if `at` is beyond the caller's limit. Neither changes the table.
    pub(super) fn replace(
        &self,
        trapped: &Trapped,
        file: BorrowedFd<'_>,
        at: i32,
        close_on_exec: bool,
    ) -> Result<(), Errno> {
        let flag = |value: libc::c_ulong| u32::try_from(value).map_err(|_| Errno::INVAL);
        let number = |descriptor: i32| u32::try_from(descriptor).map_err(|_| Errno::BADF);
        let flags = if close_on_exec { libc::O_CLOEXEC } else { 0 };
        let request = libc::seccomp_notif_addfd {
            id: trapped.id,
            flags: flag(libc::SECCOMP_ADDFD_FLAG_SETFD)?,
            srcfd: number(file.as_raw_fd())?,
            newfd: number(at)?,
            newfd_flags: number(flags)?,
        };
        // SAFETY: SECCOMP_IOCTL_NOTIF_ADDFD reads as many bytes at its argument as its number says, which is the size of the
        // structure that `request` is. `file` is borrowed, so `srcfd` stays open during the call.
        let got = unsafe {
            libc::ioctl(self.descriptor.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_ADDFD, ptr::from_ref(&request))
        };
        if got < 0 { Err(last_errno()) } else { Ok(()) }
    }

    /// Lets the kernel carry out the call as if there were no filter.
    pub(super) fn let_continue(&mut self, trapped: &Trapped) {
        let flags = u32::try_from(libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE).unwrap_or(1);
        self.respond(libc::seccomp_notif_resp { id: trapped.id, val: 0, error: 0, flags });
    }

    /// Makes the call return 0, or fail with an error.
    pub(super) fn answer(&mut self, trapped: &Trapped, result: Result<(), Errno>) {
        let error = result.err().map_or(0, |errno| errno.raw_os_error().saturating_neg());
        self.respond(libc::seccomp_notif_resp { id: trapped.id, val: 0, error, flags: 0 });
    }

    /// Sends a response. The only error is ENOENT: the task has ended and waits for no answer.
    fn respond(&mut self, response: libc::seccomp_notif_resp) {
        self.response.fill(0);
        // SAFETY: the buffer is at least as long as a seccomp_notif_resp (`new`), aligned to 8 as that is, and borrowed
        // exclusively; integers need no drop of what was there.
        unsafe { self.response.as_mut_ptr().cast::<libc::seccomp_notif_resp>().write(response) };
        // SAFETY: SECCOMP_IOCTL_NOTIF_SEND reads one struct seccomp_notif_resp of the kernel's size at its argument. The
        // buffer is at least that long (`new`) and initialised.
        let _ = unsafe {
            libc::ioctl(
                self.descriptor.as_raw_fd(),
                libc::SECCOMP_IOCTL_NOTIF_SEND,
                self.response.as_ptr().cast::<libc::seccomp_notif_resp>(),
            )
        };
    }
}

impl AsFd for Notifications {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// The kernel reads an `int` argument from the lower half of its register.
fn low_half(argument: u64) -> i32 {
    i32::from_ne_bytes(u32::try_from(argument & u64::from(u32::MAX)).unwrap_or(u32::MAX).to_ne_bytes())
}

fn last_errno() -> Errno {
    let errno = io::Error::last_os_error().raw_os_error();
    errno.map_or(Errno::IO, Errno::from_raw_os_error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_int_argument_is_the_lower_half_of_its_register() {
        assert_eq!(low_half(7), 7);
        assert_eq!(low_half(0xFFFF_FFFF), -1);
        assert_eq!(low_half(0x1234_5678_0000_0003), 3);
    }

    #[test]
    fn each_refusal_has_its_reason() {
        assert_eq!(InstallError::from(Errno::BUSY), InstallError::Nested);
        assert_eq!(InstallError::from(Errno::ACCESS), InstallError::Forbidden);
        assert_eq!(InstallError::from(Errno::INVAL), InstallError::TooOld);
        let other = InstallError::from(Errno::NOMEM).to_string();
        assert!(other.starts_with("the kernel refused the seccomp filter: "), "{other}");
    }
}
