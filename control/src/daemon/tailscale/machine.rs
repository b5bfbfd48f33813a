//! Which host ports are to be served on the tailnet, which are, and which call is next. Pure.
//!
//! What answers on the host is a level ([`Machine::wish`]), so a port that flaps while a call hangs costs one call and not
//! a queue of them. One call runs at a time, over all containers: two changes of tailscaled's configuration at once are a
//! conflict to it, and a port that passes from one container to another is turned off before it is served again. One host
//! port goes through these states:
//!
//! ```text
//!            answers            status: running             serve: done
//!  unserved ─────────► status ──────────────────► serve ─────────────────► owned
//!     ▲ ▲                │ skipped                  │ failed                 │ answers no longer
//!     │ └────────────────┴──────────────────────────┘                        ▼
//!     └──────────────────────────────── done ───────────────────────────── off (failed: stays owned)
//! ```
//!
//! What never happens: `off` for a port that we did not serve, and a second attempt at a port that was skipped or failed
//! before it has closed and opened again (wire specification, A.11).

use std::collections::BTreeMap;
use std::num::NonZeroU16;
use std::ops::Bound::{Excluded, Included, Unbounded};

use serde::Deserialize;

use super::Called;
use crate::model::event::TailscaleServeEvent;
use crate::model::name::escape;

/// Host ports, and the container behind each.
pub(super) type Ports = BTreeMap<NonZeroU16, String>;

/// The exit status of a program that was not found, as shells tell it.
pub(super) const NOT_FOUND: i32 = 127;

/// How long a reason may be, in characters.
const REASON_CHARS_MAX: usize = 300;

/// A call that is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Call {
    /// Whether tailscale runs, since this port is to be served.
    Status(NonZeroU16),
    /// Serve it.
    Serve(NonZeroU16),
    /// Serve it no longer.
    Off(NonZeroU16),
}

impl Call {
    /// Its arguments.
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
    /// The container whose port answers here.
    wanted: Option<String>,
    /// The one for which it was served, or tried to be.
    acted: Option<String>,
    /// The one for which tailscale serves it, as far as we know.
    owned: Option<String>,
    /// It may be served and it may not: an earlier daemon says that it was, or it could not be turned off.
    unsure: bool,
    /// It is to be turned off.
    off_due: bool,
}

/// Every host port that is wanted or owned.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Machine {
    ports: BTreeMap<NonZeroU16, Port>,
    /// The call that runs, and for whom.
    running: Option<(Call, String)>,
    /// The port for which tailscale was just found to run.
    runs: Option<NonZeroU16>,
    /// Where the last call was: ports take turns.
    last: Option<NonZeroU16>,
    stopping: bool,
}

impl Machine {
    /// A machine that owns what an earlier daemon served and did not turn off.
    pub(super) fn new(inherited: Ports) -> Machine {
        let owned =
            |(port, name)| (port, Port { owned: Some(name), unsure: true, off_due: true, ..Port::default() });
        Machine { ports: inherited.into_iter().map(owned).collect(), ..Machine::default() }
    }

    /// Takes in what answers on the host.
    pub(super) fn wish(&mut self, wanted: &Ports) {
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
        self.forget();
    }

    /// Nothing is wanted from now on, and what could not be turned off is tried once more.
    pub(super) fn stop(&mut self) {
        self.stopping = true;
        for port in self.ports.values_mut() {
            (port.wanted, port.acted) = (None, None);
            port.off_due = port.owned.is_some();
        }
        self.forget();
    }

    /// The call that is due; it runs from now on, until [`Machine::ended`].
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
        // It is served while tailscale is known to run, and not when it is its turn again.
        let first = runs.and_then(|runs| due((&runs, self.ports.get(&runs)?)));
        self.running = first.or_else(|| after.chain(before).find_map(due));
        let call = self.running.as_ref().map(|(call, _)| *call);
        self.last = call.map(Call::port).or(self.last);
        call
    }

    /// The call that ran has ended, like this.
    pub(super) fn ended(&mut self, called: &Called) -> Option<TailscaleServeEvent> {
        let (call, container_name) = self.running.take()?;
        let number = call.port();
        let port = self.ports.entry(number).or_default();
        let event = match call {
            Call::Status(_) => match running(called) {
                Ok(()) => {
                    self.runs = Some(number);
                    None
                }
                Err(reason) => {
                    port.acted = Some(container_name.clone());
                    Some(TailscaleServeEvent::TailscaleServeSkipped { container_name, port: number, reason })
                }
            },
            Call::Serve(_) => {
                port.acted = Some(container_name.clone());
                Some(match called.code {
                    0 => {
                        (port.owned, port.unsure) = (Some(container_name.clone()), false);
                        TailscaleServeEvent::TailscaleServeOpened { container_name, port: number }
                    }
                    NOT_FOUND => {
                        let reason = why(called);
                        TailscaleServeEvent::TailscaleServeSkipped { container_name, port: number, reason }
                    }
                    _ => failed(container_name, number, "serve", called),
                })
            }
            Call::Off(_) => {
                port.off_due = false;
                Some(if called.code == 0 {
                    (port.owned, port.unsure) = (None, false);
                    TailscaleServeEvent::TailscaleServeClosed { container_name, port: number }
                } else {
                    port.unsure = true;
                    failed(container_name, number, "off", called)
                })
            }
        };
        if self.stopping {
            // A call that was on its way when everything stopped may have served a port.
            port.off_due |= port.owned.is_some() && !matches!(call, Call::Off(_));
        } else {
            port.compare();
        }
        self.forget();
        event
    }

    /// Every port that tailscale may serve for us, the one that it is just asked to serve included: what has to be turned
    /// off by somebody if we die now.
    pub(super) fn record(&self) -> Ports {
        let owned = |(number, port): (&NonZeroU16, &Port)| Some((*number, port.owned.clone()?));
        let mut record: Ports = self.ports.iter().filter_map(owned).collect();
        if let Some((Call::Serve(port), name)) = &self.running {
            record.insert(*port, name.clone());
        }
        record
    }

    fn forget(&mut self) {
        self.ports.retain(|_, port| *port != Port::default());
    }
}

impl Port {
    /// Compares what is wanted with what was done.
    fn compare(&mut self) {
        if self.acted.is_some() && self.acted != self.wanted {
            self.acted = None;
            self.off_due = self.owned.is_some();
        }
        if self.wanted.is_some() && self.wanted == self.owned {
            self.off_due = false;
            if !self.unsure {
                self.acted.clone_from(&self.owned);
            }
        }
    }

    fn due(&self, number: NonZeroU16, runs: Option<NonZeroU16>) -> Option<(Call, &str)> {
        if self.off_due {
            return self.owned.as_deref().map(|name| (Call::Off(number), name));
        }
        let wanted = self.wanted.as_deref().filter(|_| self.acted != self.wanted)?;
        let call = if runs == Some(number) { Call::Serve(number) } else { Call::Status(number) };
        Some((call, wanted))
    }
}

fn failed(container_name: String, port: NonZeroU16, command: &str, called: &Called) -> TailscaleServeEvent {
    let (command, reason) = (command.to_owned(), why(called));
    TailscaleServeEvent::TailscaleServeFailed { container_name, port, command, reason }
}

/// Whether `tailscale status --json` says that it runs; if not, why it cannot serve.
fn running(called: &Called) -> Result<(), String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Status {
        #[serde(default)]
        backend_state: Option<String>,
    }
    if called.code != 0 {
        return Err(why(called));
    }
    let status: Status = serde_json::from_slice(&called.stdout)
        .map_err(|error| cut(&format!("invalid tailscale status JSON: {error}")))?;
    match status.backend_state.as_deref() {
        Some("Running") => Ok(()),
        other => Err(cut(&format!("tailscale backend is {}", other.unwrap_or("unknown")))),
    }
}

/// What a call that did not succeed says about that.
fn why(called: &Called) -> String {
    let said = [&called.stderr, &called.stdout].map(|output| String::from_utf8_lossy(output));
    let said = said.iter().map(|text| text.trim()).find(|text| !text.is_empty());
    said.map_or_else(|| format!("exit status {}", called.code), cut)
}

/// Without what a terminal would obey, and not too long.
fn cut(text: &str) -> String {
    let mut cut: String = text.chars().take(REASON_CHARS_MAX).collect();
    if cut.len() < text.len() {
        cut.push('…');
    }
    escape(&cut).into_owned()
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
