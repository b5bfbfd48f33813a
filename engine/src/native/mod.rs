//! Sockets without a relay: the servers of a sandbox listen on sockets of the host.
//!
//! A relay costs two wake-ups and processes TCP twice. A sandbox of the same user needs none: its command runs under a
//! seccomp filter that notifies for `bind` and `listen` ([`install`]), and a supervisor on the host answers
//! ([`Supervisor`]). At `listen` it creates a socket of the host with the same port, replaces the server's own socket with
//! it in the server's descriptor table, and makes the call return 0. From then on the server accepts connections of the
//! host's loopback directly.
//!
//! ```text
//!  server            kernel                      supervisor (this module)
//!  listen(fd) ─────► notification ─────────────► pidfd_getfd: the server's socket, its options, who holds it
//!                                                a host socket on 127.0.0.1, listening
//!                                                the server's socket listens, too: it is the stub from now on
//!                    fd and its duplicates ◄──── SECCOMP_IOCTL_NOTIF_ADDFD
//!  ◄──── 0 ───────── ◄────────────────────────── answer
//! ```
//!
//! # Parts
//!
//! | File | Contents |
//! | --- | --- |
//! | `filter` | the BPF program; pure |
//! | `notify` | the system calls; unsafe |
//! | `decision` | whether a socket is replaced, and by what; pure |
//! | `tracee`, `procfs` | facts about the process and its descriptors; the parsers are pure |
//! | `host_socket` | facts about sockets; makes the host's |
//! | `serve`, `listener` | the thread, and its record of each native listener |
//! | `traffic` | counters of native ports, on demand |
//! | `stub_relay` | clients inside the sandbox, relayed to the host socket |
//!
//! # Guarantees
//!
//! - In doubt, the call continues in the kernel and the relay serves the port. Each listener is decided on its own.
//! - No socket made here is reachable from another host, and no two sandboxes share a port (`host_socket`).
//! - A port is free at once when its server closes the listener or dies: the supervisor holds no host socket, except while a
//!   parent process of the server holds the stub for its later children.
//! - The supervisor waits for nothing that a program in the sandbox controls, except that the program can delay its own
//!   calls.
//! - `connect` is not trapped: a signal before the notification is received makes the call fail with EINTR, which a
//!   non-blocking program interprets as a connection in progress. A signal at that time makes `bind` or `listen` fail with
//!   EINTR, too, before they had any effect; the kernel restarts them for handlers with SA_RESTART.
//!
//! # Limits of the isolation
//!
//! A program inside holds a socket of the host's network namespace. It can stop listening on it, and connect it to any
//! loopback service of the host.

mod decision;
mod filter;
mod host_socket;
mod listener;
mod notify;
mod procfs;
mod serve;
mod stub_relay;
mod tracee;
mod traffic;

use std::io;
use std::num::NonZeroU16;
use std::os::fd::OwnedFd;
use std::thread;

use rustix::fs::inotify::{self, CreateFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::watch::sock_diag::{self, SockDiag};
pub use decision::{Conflict, EPHEMERAL_PORTS, HostAddress, RelayReason};
pub use notify::{InstallError, install};
pub use traffic::{Traffic, traffic};

/// The maximum number of native listeners of one sandbox. Further ones are relayed, within the driver's own quota.
pub const LISTENERS_MAX: usize = 256;

/// A server's listener that is a socket of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NativeListener {
    /// Its address on the host.
    #[serde(flatten)]
    pub address: HostAddress,
    /// The inode of the host's socket.
    pub inode: u64,
    /// The inode of the stub, which listens in the sandbox.
    pub stub_inode: u64,
    /// The process that called `listen`, in the pid namespace of the supervisor.
    pub process: u32,
}

impl NativeListener {
    /// Returns its port, which is the same inside.
    pub fn port(&self) -> u16 {
        self.address.address.port()
    }
}

/// A change that the supervisor reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NativeEvent {
    /// A server listens on the host. Reported before its `listen` returns.
    Opened(NativeListener),
    /// The native listener is closed, and its stub with it.
    Closed {
        /// The inode of the host socket.
        inode: u64,
    },
    /// A server is about to listen inside, and must be relayed. Reported before its `listen` returns.
    Relayed {
        /// The port.
        port: NonZeroU16,
        /// The inode of its socket in the sandbox.
        inode: u64,
        /// The reason why it is not native.
        reason: RelayReason,
    },
    /// Clients inside the sandbox do not reach native listeners: a sentence for people.
    Degraded {
        /// The cause.
        reason: String,
    },
    /// Every process of the sandbox has ended, or the kernel's descriptor failed. This is the last event.
    Ended,
}

/// The driver of a supervisor. It is called on the supervisor's thread, so each call delays the server that listens.
pub trait Driver: Send + 'static {
    /// Whether a port may answer on the host.
    fn may_expose(&mut self, port: NonZeroU16) -> bool;

    /// Chooses the handling of a port that is in use. `inodes` are the host's other sockets that listen on it. The list is
    /// empty if they were closed meanwhile, or if a socket that does not listen holds the port.
    fn conflict(&mut self, port: NonZeroU16, inodes: &[u64]) -> Conflict;

    /// Handles a change.
    fn report(&mut self, event: NativeEvent);
}

/// The reason why a supervisor could not start.
#[derive(Debug, thiserror::Error)]
pub enum SuperviseError {
    /// The notification descriptor is unusable.
    #[error("the notifications of the sandbox cannot be read")]
    Notifications(#[source] Errno),
    /// No inotify instance could be created; it is needed to detect the end of a listener.
    #[error("no inotify instance is left (fs.inotify.max_user_instances)")]
    Inotify(#[source] Errno),
    /// A socket could not be created.
    #[error("the host's sockets cannot be listed")]
    Listing(#[source] io::Error),
    /// The thread could not be started.
    #[error("a thread could not be started")]
    Thread(#[source] io::Error),
}

/// Answers the trapped calls of one sandbox, on a thread of its own, until every process of the sandbox has ended.
///
/// [`Supervisor::prepare`] acquires the limited resources before the filter is installed: in a sandbox with a filter but
/// without a supervisor, every `listen` fails with ENOSYS.
#[derive(Debug)]
pub struct Supervisor {
    inotify: OwnedFd,
    listeners: SockDiag,
}

impl Supervisor {
    /// Acquires the descriptors that a supervisor needs. The calling thread must be in the network namespace in which the
    /// servers are to listen.
    ///
    /// # Errors
    /// See [`SuperviseError`].
    pub fn prepare() -> Result<Supervisor, SuperviseError> {
        let inotify =
            inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).map_err(SuperviseError::Inotify)?;
        let listeners = sock_diag::open().map_err(|errno| SuperviseError::Listing(errno.into()))?;
        let listeners =
            SockDiag::new(listeners).map_err(|error| SuperviseError::Listing(io::Error::other(error)))?;
        Ok(Supervisor { inotify, listeners })
    }

    /// Starts to answer. `notifications` is the descriptor from [`install`], and `netns_cookie` the `SO_NETNS_COOKIE` of the
    /// sandbox. A supervisor cannot be stopped.
    ///
    /// # Errors
    /// See [`SuperviseError`].
    pub fn start(
        self,
        notifications: OwnedFd,
        netns_cookie: u64,
        driver: impl Driver,
    ) -> Result<(), SuperviseError> {
        let serving = serve::Serving::new(self, notifications, netns_cookie, driver)?;
        let thread = thread::Builder::new().name("landfall-native".to_owned());
        thread.spawn(move || serving.run()).map(drop).map_err(SuperviseError::Thread)
    }
}
