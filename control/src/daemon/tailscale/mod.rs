//! Offers host ports that answer on the user's tailnet, by `tailscale serve` (wire specification, A.11). Off unless the
//! daemon is started with `--tailscale`.
//!
//! `machine` chooses the calls; this module makes them, one at a time, and reports events. No other part of the daemon waits
//! for the calls: if tailscale hangs, fails or is missing, events are the only effect.
//!
//! # Crashes
//!
//! tailscale continues to serve a port after the daemon has ended. Another program that later listens at that port would
//! then be exposed to the tailnet without the user's consent. Therefore a daemon that stops turns off the ports that it
//! owns, and it writes the list of owned ports to disk before it calls tailscale
//! ([`Home::tailscale_file`](crate::sys::paths::Home::tailscale_file)). A daemon that finds the list of a killed daemon
//! waits until all containers could be reached, turns off the ports that no longer answer, and serves the others again,
//! which does not change a port that is already served. A daemon that is started without `--tailscale` turns off all of
//! them.

mod call;
mod machine;

use std::collections::BTreeMap;
use std::io;
use std::num::NonZeroU16;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::forwarding::driver::OpenPorts;
use crate::model::event::Event;
use crate::sys::journal::Journal;
use crate::sys::private_file;
use call::Called;
use machine::{Call, Machine, Ports};

/// How long a call may take unless the daemon's environment says otherwise (wire specification, A.11).
pub const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// The program, found on PATH.
const PROGRAM: &str = "tailscale";

/// The options of the service.
#[derive(Debug)]
pub struct TailscaleOptions {
    /// Whether ports are served. If not, the ports of an earlier daemon are turned off, and no others are served.
    pub on: bool,
    /// The path of the list of owned ports.
    pub file: PathBuf,
    /// How long a call may take.
    pub timeout: Duration,
    /// The journal for events.
    pub journal: Journal,
    /// The ports that answer on the host.
    pub answering: watch::Receiver<OpenPorts>,
}

/// The task that serves. Dropping it kills the current call.
#[derive(Debug)]
pub struct Tailscale {
    stop: CancellationToken,
    task: AbortOnDropHandle<()>,
}

impl Tailscale {
    /// Starts the task on the current runtime.
    pub fn start(options: TailscaleOptions) -> Tailscale {
        let stop = CancellationToken::new();
        let inherited = read(&options.file).unwrap_or_else(|error| {
            let text = format!("the list of ports that tailscale served before cannot be read: {error}");
            options.journal.record(&Event::Notice { text });
            Ports::new()
        });
        let service = Service { machine: Machine::new(inherited.clone()), options, recorded: inherited };
        let task = AbortOnDropHandle::new(tokio::spawn(service.run(stop.clone())));
        Tailscale { stop, task }
    }

    /// Waits for the current call, and turns off all owned ports.
    pub async fn stop(self) {
        self.stop.cancel();
        // An error means that the task panicked and has ended.
        let _ = self.task.await;
    }
}

struct Service {
    options: TailscaleOptions,
    machine: Machine,
    /// The content of the list on disk.
    recorded: Ports,
}

impl Service {
    async fn run(mut self, stop: CancellationToken) {
        if !self.options.on {
            self.machine.stop();
        } else if self.wait_until_settled(&stop).await {
            self.follow(&stop).await;
        }
        self.machine.stop();
        while let Some(call) = self.machine.next() {
            self.make(call).await;
        }
    }

    /// Waits until the answering ports are complete, so that no port is turned off only because its container has not been
    /// reached yet. Returns false if the daemon stops first.
    async fn wait_until_settled(&mut self, stop: &CancellationToken) -> bool {
        let settled = self.options.answering.wait_for(|answering| answering.complete);
        // An error means that forwarding has ended.
        stop.run_until_cancelled(settled).await.is_some_and(|settled| settled.is_ok())
    }

    async fn follow(&mut self, stop: &CancellationToken) {
        loop {
            let wanted = self.options.answering.borrow_and_update().ports.clone();
            self.machine.set_wanted(&wanted);
            match self.machine.next() {
                Some(call) => self.make(call).await,
                None => {
                    let changed = self.options.answering.changed();
                    if !matches!(stop.run_until_cancelled(changed).await, Some(Ok(()))) {
                        return;
                    }
                }
            }
            if stop.is_cancelled() {
                return;
            }
        }
    }

    async fn make(&mut self, call: Call) {
        // The list on disk includes a port before it is served, and until it is turned off.
        self.record().await;
        let called = call::call(Path::new(PROGRAM), &call.words(), self.options.timeout).await;
        if let Some(event) = self.machine.ended(&called) {
            self.options.journal.record(&Event::TailscaleServeEvent { event });
        }
        self.record().await;
    }

    async fn record(&mut self) {
        let record = self.machine.record();
        if record == self.recorded {
            return;
        }
        let (file, written) = (self.options.file.clone(), record.clone());
        let done = tokio::task::spawn_blocking(move || write(&file, written)).await;
        match done.map_err(io::Error::from).and_then(|done| done) {
            Ok(()) => self.recorded = record,
            Err(error) => {
                let text = format!("the list of ports that tailscale serves cannot be written: {error}");
                self.options.journal.record(&Event::Notice { text });
            }
        }
    }
}

/// The list on disk.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Served {
    format_version: u32,
    ports: BTreeMap<NonZeroU16, String>,
}

/// The maximum size of the list, in bytes; enough for all ports.
const RECORD_BYTES_MAX: u64 = 16 * 1024 * 1024;
/// The format that is written. The format of a newer release is refused.
const FORMAT_VERSION: u32 = 1;

fn read(file: &Path) -> io::Result<Ports> {
    let content = match private_file::read_path(file, RECORD_BYTES_MAX) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Ports::new()),
        content => content?,
    };
    let served: Served = serde_json::from_slice(&content)?;
    if served.format_version > FORMAT_VERSION {
        return Err(io::Error::other(format!("format {} is of a newer release", served.format_version)));
    }
    Ok(served.ports)
}

fn write(file: &Path, ports: Ports) -> io::Result<()> {
    if ports.is_empty() {
        return match std::fs::remove_file(file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
    }
    let mut aside = tempfile::NamedTempFile::new_in(file.parent().unwrap_or(Path::new("/")))?;
    serde_json::to_writer(&mut aside, &Served { format_version: FORMAT_VERSION, ports })?;
    // The ports that tailscale serves persist over a loss of power, so the list must, too.
    aside.as_file().sync_all()?;
    aside.persist(file)?;
    Ok(())
}

#[cfg(test)]
mod tests;
