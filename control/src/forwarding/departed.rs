//! Waits until an engine that was lost has released its ports, which the next engine needs.
//!
//! The channel to an engine that is killed ends before its process has. The kernel closes the channel and the listening
//! sockets in no useful order (`exit_files`, kernel/exit.c). A socket that an `io_uring` operation holds is released by
//! a kernel worker after the process has ended (`io_ring_exit_work`, io_uring/io_uring.c): at once on an idle machine;
//! on a busy one, ports were taken for up to 25 ms longer. Until then no other process can bind them, and a container
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

/// The longest wait for the process to end. One that hangs may hold ports that no container needs.
const END_MAX: Duration = Duration::from_secs(5);
/// The longest wait for the ports after that. Another program may have taken one meanwhile.
const RELEASE_MAX: Duration = Duration::from_secs(1);
/// The interval at which the ports are checked.
const CHECK_INTERVAL: Duration = Duration::from_millis(5);

/// A process whose end can be awaited.
#[derive(Clone, Debug)]
pub(super) struct Process(Arc<AsyncFd<OwnedFd>>);

impl Process {
    /// The process of this id; `None` if it has ended or cannot be watched.
    pub(super) fn of(pid: u32) -> Option<Process> {
        let pid = Pid::from_raw(i32::try_from(pid).ok()?)?;
        Process::by(rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()?).ok()
    }

    /// The process that a pidfd refers to.
    pub(super) fn by(pidfd: OwnedFd) -> io::Result<Process> {
        Ok(Process(Arc::new(watched(pidfd, Interest::READABLE)?)))
    }

    /// Waits for its end.
    pub(super) async fn ended(&self) {
        // An error of the watch counts as the end of the process.
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
    /// Creates the record of an engine that had these host ports.
    pub(super) fn new(process: Option<Process>, ports: BTreeSet<NonZeroU16>) -> Departed {
        Departed { process, ports }
    }

    /// Waits, for a bounded time, until its process has ended, and removes its tracing instance, which an engine of
    /// root may not remove itself.
    pub(super) async fn ended(&self) {
        if let Some(process) = &self.process {
            // After the timeout the caller continues as if it had ended.
            let _ = timeout(END_MAX, process.ended()).await;
        }
        let _ = spawn_blocking(remove_leftovers).await;
    }

    /// Waits, for a bounded time, until it has ended and its ports are free.
    pub(super) async fn ports_released(self) {
        self.ended().await;
        let ports = self.ports;
        // If the listeners cannot be read, the ports count as free.
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
            Ok(_) => std::thread::sleep(CHECK_INTERVAL),
            Err(_) => return,
        }
    }
}
