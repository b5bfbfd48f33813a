//! Every port that answers on the host is also offered on the user's tailnet: `tailscale serve` (wire specification,
//! A.11). It is off unless the daemon is started with `--tailscale`.
//!
//! What is to be called when is decided in `machine`; here the calls are made, one at a time, and told of. Nothing waits
//! for them: a tailscale that hangs, fails or is not there costs events and nothing else.
//!
//! # Whoever dies
//!
//! What tailscale was asked to serve it goes on serving, also when we are gone, and the next program that listens at such a
//! port would be on the tailnet without anybody's wish. So a daemon that stops turns off what it owns, and a list of what is
//! owned stands on disk before tailscale is asked ([`Home::tailscale_file`](crate::sys::paths::Home::tailscale_file)). A daemon
//! that finds the list of one that was killed turns off what no longer answers, as soon as every container had the chance
//! to be reached, and serves the rest again, which changes nothing that is served already. So does one that is started
//! without `--tailscale`, and turns off all of it.

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

/// What it works with.
#[derive(Debug)]
pub struct TailscaleOptions {
    /// Whether ports are served. If not, what an earlier daemon served is turned off, and that is all.
    pub on: bool,
    /// Where the list of what is owned stands.
    pub file: PathBuf,
    /// How long a call may take.
    pub timeout: Duration,
    /// Where events go.
    pub journal: Journal,
    /// What answers on the host.
    pub answering: watch::Receiver<OpenPorts>,
}

/// The task that serves. Dropping it kills the call that it makes.
#[derive(Debug)]
pub struct Tailscale {
    stop: CancellationToken,
    task: AbortOnDropHandle<()>,
}

impl Tailscale {
    /// Begins, as a task of the runtime that calls.
    pub fn start(options: TailscaleOptions) -> Tailscale {
        let stop = CancellationToken::new();
        let inherited = read(&options.file).unwrap_or_else(|error| {
            let text = format!("what tailscale served before is not known: {error}");
            options.journal.record(&Event::Notice { text });
            Ports::new()
        });
        let service = Service { machine: Machine::new(inherited.clone()), options, recorded: inherited };
        let task = AbortOnDropHandle::new(tokio::spawn(service.run(stop.clone())));
        Tailscale { stop, task }
    }

    /// Waits for the call that is made, and turns off everything that is owned.
    pub async fn stop(self) {
        self.stop.cancel();
        // If it panicked, there is nothing to wait for.
        let _ = self.task.await;
    }
}

struct Service {
    options: TailscaleOptions,
    machine: Machine,
    /// What the list on disk says.
    recorded: Ports,
}

impl Service {
    async fn run(mut self, stop: CancellationToken) {
        if !self.options.on {
            self.machine.stop();
        } else if self.is_settled(&stop).await {
            self.follow(&stop).await;
        }
        self.machine.stop();
        while let Some(call) = self.machine.next() {
            self.make(call).await;
        }
    }

    /// Waits until it is known what answers, so that nothing is turned off only because nobody has looked yet. False when
    /// everything stops before.
    async fn is_settled(&mut self, stop: &CancellationToken) -> bool {
        let settled = self.options.answering.wait_for(|answering| answering.complete);
        // Forwarding that has ended tells nothing any more.
        stop.run_until_cancelled(settled).await.is_some_and(|settled| settled.is_ok())
    }

    async fn follow(&mut self, stop: &CancellationToken) {
        loop {
            let wanted = self.options.answering.borrow_and_update().ports.clone();
            self.machine.wish(&wanted);
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
        // It stands on disk before it is true, and goes when it is true no longer.
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
                let text = format!("what tailscale serves cannot be noted: {error}");
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

/// The longest list, in bytes: one of every port.
const RECORD_BYTES_MAX: u64 = 16 * 1024 * 1024;
/// The format that is written. One of a newer release is not read.
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
    // What tailscale serves outlives a loss of power, too.
    aside.as_file().sync_all()?;
    aside.persist(file)?;
    Ok(())
}

#[cfg(test)]
mod tests;
