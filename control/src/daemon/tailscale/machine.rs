//! The state of `tailscale serve` for each host port, and the choice of the next call. Pure.
//!
//! The set of ports that answer on the host is a level ([`Machine::set_wanted`]). A port that flaps while a call hangs
//! therefore costs one call and not a queue of calls. One call runs at a time over all containers: tailscaled reports two
//! concurrent changes of its configuration as a conflict, and a port that passes from one container to another is turned off
//! before it is served again. A host port has these states:
//!
//! ```text
//!            answers            status: running             serve: done
//!  unserved ─────────► status ──────────────────► serve ─────────────────► owned
//!     ▲ ▲                │ skipped                  │ failed                 │ stops answering
//!     │ └────────────────┴──────────────────────────┘                        ▼
//!     └──────────────────────────────── done ───────────────────────────── off (failed: stays owned)
//! ```
//!
//! Never happens: `off` for a port that this program did not serve, and a second attempt at a port that was skipped or
//! failed until it has closed and opened again (wire specification, A.11).

use std::collections::BTreeMap;
use std::num::NonZeroU16;
use std::ops::Bound::{Excluded, Included, Unbounded};

use serde::Deserialize;

use super::Called;
use crate::model::event::TailscaleServeEvent;
use crate::model::name::escape;

/// Host ports, each with its container.
pub(super) type Ports = BTreeMap<NonZeroU16, String>;

/// The exit status of a program that was not found, as in shells.
pub(super) const NOT_FOUND: i32 = 127;

/// The maximum length of a reason, in characters.
const REASON_CHARS_MAX: usize = 300;

/// A call to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Call {
    /// Ask whether tailscale runs, before this port is served.
    Status(NonZeroU16),
    /// Serve the port.
    Serve(NonZeroU16),
    /// Stop serving the port.
    Off(NonZeroU16),
}

impl Call {
    /// Returns the arguments of the call.
    pub(super) fn words(self) -> Vec<String> {
        match self {
            Call::Status(_) => vec!["status".to_owned(), "--json".to_owned()],
            Call::Serve(port) => {
                vec!["serve".to_owned(), "--bg".to_owned(), format!("--tcp={port}"), port.to_string()]
            }
            Call::Off(port) => vec!["serve".to_owned(), format!("--tcp={port}"), "off".to_owned()],
        }
    }

    fn port(self) -> NonZeroU16 {
        match self {
            Call::Status(port) | Call::Serve(port) | Call::Off(port) => port,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Port {
    /// The container whose port answers on this host port.
    wanted: Option<String>,
    /// The container for which serving was last attempted.
    attempted: Option<String>,
    /// The container for which tailscale serves the port, by the results so far.
    owned: Option<String>,
    /// Whether the port is served is uncertain: an earlier daemon recorded it, or turning it off failed.
    uncertain: bool,
    /// The port is to be turned off.
    off_due: bool,
}

/// All host ports that are wanted or owned.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Machine {
    ports: BTreeMap<NonZeroU16, Port>,
    /// The current call and its container.
    running: Option<(Call, String)>,
    /// The port for which tailscale was just found to be running.
    runs: Option<NonZeroU16>,
    /// The port of the last call; the search for the next call starts after it.
    last: Option<NonZeroU16>,
    stopping: bool,
}

impl Machine {
    /// Returns a machine that owns the ports that an earlier daemon served and did not turn off.
    pub(super) fn new(inherited: Ports) -> Machine {
        let owned = |(port, name)| {
            (port, Port { owned: Some(name), uncertain: true, off_due: true, ..Port::default() })
        };
        Machine { ports: inherited.into_iter().map(owned).collect(), ..Machine::default() }
    }

    /// Sets the ports that answer on the host.
    pub(super) fn set_wanted(&mut self, wanted: &Ports) {
        if self.stopping {
            return;
        }
        for port in wanted.keys() {
            self.ports.entry(*port).or_default();
        }
        for (number, port) in &mut self.ports {
            port.wanted = wanted.get(number).cloned();
            port.compare();
        }
        self.drop_unused();
    }

    /// Clears the wanted ports, and schedules one more attempt for ports that could not be turned off.
    pub(super) fn stop(&mut self) {
        self.stopping = true;
        for port in self.ports.values_mut() {
            (port.wanted, port.attempted) = (None, None);
            port.off_due = port.owned.is_some();
        }
        self.drop_unused();
    }

    /// Returns the next call, which runs until [`Machine::ended`].
    pub(super) fn next(&mut self) -> Option<Call> {
        if self.running.is_some() {
            return None;
        }
        let last = self.last.unwrap_or(NonZeroU16::MIN);
        let after = self.ports.range((Excluded(last), Unbounded));
        let before = self.ports.range((Unbounded, Included(last)));
        let runs = self.runs.take();
        let due = |(number, port): (&NonZeroU16, &Port)| {
            port.due(*number, runs).map(|(call, name)| (call, name.to_owned()))
        };
        // Serve at once while tailscale is known to run, before the other ports.
        let first = runs.and_then(|runs| due((&runs, self.ports.get(&runs)?)));
        self.running = first.or_else(|| after.chain(before).find_map(due));
        let call = self.running.as_ref().map(|(call, _)| *call);
        self.last = call.map(Call::port).or(self.last);
        call
    }

    /// Records the result of the current call.
    pub(super) fn ended(&mut self, called: &Called) -> Option<TailscaleServeEvent> {
        let (call, container_name) = self.running.take()?;
        let number = call.port();
        let port = self.ports.entry(number).or_default();
        let event = match call {
            Call::Status(_) => match check_running(called) {
                Ok(()) => {
                    self.runs = Some(number);
                    None
                }
                Err(reason) => {
                    port.attempted = Some(container_name.clone());
                    Some(TailscaleServeEvent::TailscaleServeSkipped { container_name, port: number, reason })
                }
            },
            Call::Serve(_) => {
                port.attempted = Some(container_name.clone());
                Some(match called.code {
                    0 => {
                        (port.owned, port.uncertain) = (Some(container_name.clone()), false);
                        TailscaleServeEvent::TailscaleServeOpened { container_name, port: number }
                    }
                    NOT_FOUND => {
                        let reason = reason_of(called);
                        TailscaleServeEvent::TailscaleServeSkipped { container_name, port: number, reason }
                    }
                    _ => failed(container_name, number, "serve", called),
                })
            }
            Call::Off(_) => {
                port.off_due = false;
                Some(if called.code == 0 {
                    (port.owned, port.uncertain) = (None, false);
                    TailscaleServeEvent::TailscaleServeClosed { container_name, port: number }
                } else {
                    port.uncertain = true;
                    failed(container_name, number, "off", called)
                })
            }
        };
        if self.stopping {
            // A call that was running at the stop may have served a port.
            port.off_due |= port.owned.is_some() && !matches!(call, Call::Off(_));
        } else {
            port.compare();
        }
        self.drop_unused();
        event
    }

    /// Returns the ports that tailscale may serve for this program, including the port of a running serve call. After a
    /// crash, the next daemon has to turn these off.
    pub(super) fn record(&self) -> Ports {
        let owned = |(number, port): (&NonZeroU16, &Port)| Some((*number, port.owned.clone()?));
        let mut record: Ports = self.ports.iter().filter_map(owned).collect();
        if let Some((Call::Serve(port), name)) = &self.running {
            record.insert(*port, name.clone());
        }
        record
    }

    fn drop_unused(&mut self) {
        self.ports.retain(|_, port| *port != Port::default());
    }
}

impl Port {
    /// Compares the wanted state with the last attempt.
    fn compare(&mut self) {
        if self.attempted.is_some() && self.attempted != self.wanted {
            self.attempted = None;
            self.off_due = self.owned.is_some();
        }
        if self.wanted.is_some() && self.wanted == self.owned {
            self.off_due = false;
            if !self.uncertain {
                self.attempted.clone_from(&self.owned);
            }
        }
    }

    fn due(&self, number: NonZeroU16, runs: Option<NonZeroU16>) -> Option<(Call, &str)> {
        if self.off_due {
            return self.owned.as_deref().map(|name| (Call::Off(number), name));
        }
        let wanted = self.wanted.as_deref().filter(|_| self.attempted != self.wanted)?;
        let call = if runs == Some(number) { Call::Serve(number) } else { Call::Status(number) };
        Some((call, wanted))
    }
}

fn failed(container_name: String, port: NonZeroU16, command: &str, called: &Called) -> TailscaleServeEvent {
    let (command, reason) = (command.to_owned(), reason_of(called));
    TailscaleServeEvent::TailscaleServeFailed { container_name, port, command, reason }
}

/// Checks that `tailscale status --json` reports a running tailscale; otherwise returns the reason.
fn check_running(called: &Called) -> Result<(), String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Status {
        #[serde(default)]
        backend_state: Option<String>,
    }
    if called.code != 0 {
        return Err(reason_of(called));
    }
    let status: Status = serde_json::from_slice(&called.stdout)
        .map_err(|error| bounded(&format!("invalid tailscale status JSON: {error}")))?;
    match status.backend_state.as_deref() {
        Some("Running") => Ok(()),
        other => Err(bounded(&format!("tailscale backend is {}", other.unwrap_or("unknown")))),
    }
}

/// Returns the reason of a failed call from its output.
fn reason_of(called: &Called) -> String {
    let output = [&called.stderr, &called.stdout].map(|output| String::from_utf8_lossy(output));
    let output = output.iter().map(|text| text.trim()).find(|text| !text.is_empty());
    output.map_or_else(|| format!("exit status {}", called.code), bounded)
}

/// Escapes control characters, and limits the length.
fn bounded(text: &str) -> String {
    let mut bounded: String = text.chars().take(REASON_CHARS_MAX).collect();
    if bounded.len() < text.len() {
        bounded.push('…');
    }
    escape(&bounded).into_owned()
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
