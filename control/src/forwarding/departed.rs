//! An engine that has ended, until nothing of it is left: the next one needs its ports.
//!
//! The channel to an engine that is killed ends before the engine has. The kernel closes the channel and the listening
//! sockets in no order that helps (`exit_files`, kernel/exit.c), and where an `io_uring` had a socket in its hands, a worker
//! lets go of it after the process has ended (`io_ring_exit_work`, io_uring/io_uring.c): at once where nobody else has work
//! to do; on a busy machine, ports were taken for up to 25 ms longer. Meanwhile nobody else can have them, and a container
//! that is reached over a WebSocket has one attempt for each port that it announces (wire specification, A.6.3).

use std::collections::BTreeSet;
use std::io;
use std::num::NonZeroU16;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use landfall_engine::watch::hint::remove_leftovers;
use landfall_engine::watch::reading::Reading;
use landfall_engine::watch::{Source, Sources};
use rustix::process::{Pid, PidfdFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use crate::sys::readiness::watched;

/// How long the process may take to end. One that hangs may have ports that nobody needs.
const END_MAX: Duration = Duration::from_secs(5);
/// How long the ports may take to be free after that. Another program may have taken one meanwhile.
const RELEASE_MAX: Duration = Duration::from_secs(1);
/// How often they are looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);

/// A process that is seen to end.
#[derive(Clone, Debug)]
pub(super) struct Process(Arc<AsyncFd<OwnedFd>>);

impl Process {
    /// The one with this number; none where it has ended or cannot be watched.
    pub(super) fn of(pid: u32) -> Option<Process> {
        let pid = Pid::from_raw(i32::try_from(pid).ok()?)?;
        Process::by(rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()?).ok()
    }

    /// The one that a pidfd refers to.
    pub(super) fn by(pidfd: OwnedFd) -> io::Result<Process> {
        Ok(Process(Arc::new(watched(pidfd, Interest::READABLE)?)))
    }

    /// Waits for its end.
    pub(super) async fn ended(&self) {
        // A pidfd that cannot be watched any more is taken for one whose process has ended.
        let _ = self.0.readable().await;
    }
}

/// An engine whose channel has ended.
#[derive(Clone, Debug)]
pub(super) struct Departed {
    process: Option<Process>,
    ports: BTreeSet<NonZeroU16>,
}

impl Departed {
    /// One that had these ports of the host.
    pub(super) fn new(process: Option<Process>, ports: BTreeSet<NonZeroU16>) -> Departed {
        Departed { process, ports }
    }

    /// Waits until its process has ended, for a bounded time, and removes its tracing instance, which an engine of root may not
    /// remove itself.
    pub(super) async fn ended(&self) {
        if let Some(process) = &self.process {
            // Whether it ended or not: no more can be done about it.
            let _ = timeout(END_MAX, process.ended()).await;
        }
        let _ = spawn_blocking(remove_leftovers).await;
    }

    /// Waits until it has ended and its ports are free, for a bounded time.
    pub(super) async fn gone(self) {
        self.ended().await;
        let ports = self.ports;
        // Where that cannot be seen, there is nothing to wait for.
        let _ = spawn_blocking(move || wait_until_free(&ports)).await;
    }
}

fn wait_until_free(ports: &BTreeSet<NonZeroU16>) {
    let Ok(mut source) = Source::new(Sources::open_here()) else { return };
    let (older, mut reading) = (Reading::default(), Reading::default());
    let until = Instant::now() + RELEASE_MAX;
    while Instant::now() < until {
        match source.read(&older, &mut reading) {
            Ok(true) if !reading.rows().iter().any(|row| ports.contains(&row.port)) => return,
            Ok(_) => std::thread::sleep(LOOK_INTERVAL),
            Err(_) => return,
        }
    }
}
