//! The planner of one namespace: what listens inside, what may be exposed, and what the engine holds go in;
//! commands come out. Pure: time comes in as an argument.
//!
//! Everything is a level. [`Forwards::plan`] compares whole states, so a lost or doubled observation heals with the
//! next one, and once [`Forwards::issued`] has noted what was planned, planning again yields nothing. One port goes
//! through these states:
//!
//! ```text
//!          OpenListener            ListenerOpened
//!  absent ──────────────► Opening ───────────────► Open
//!    ▲                       │ │ ListenerFailed      │ no longer wanted for LINGER: CloseListener
//!    │ no longer wanted      │ ▼                     ▼
//!    ├──────────────────── Failed ◄─ still wanted  Closing
//!    │                       └─ OpenListener, RETRY later   │ ListenerClosed
//!    └──────────────────────────────────────────────────────┘
//! ```
//!
//! What never happens: two live forwards for one port (a port that comes back while its forward is closing waits for
//! the answer), a number used twice, and a port that failed being asked for again before [`RETRY`] has passed.

use std::collections::BTreeMap;
use std::num::NonZeroU16;
use std::time::Instant;

use landfall_engine::command::{Command, Ending, Event, ForwardId, ListenFailure, Reach, UpstreamId};

use super::observation::Observation;
use crate::policy::{Decision, Policy};

pub use super::fleet::{LINGER, RETRY};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    Opening { since: Option<Instant> },
    Open,
    Closing,
    Failed { at: Instant },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Forward {
    id: ForwardId,
    status: Status,
    reach: Reach,
    /// Since when nothing is wanted of it any more.
    unwanted: Option<Instant>,
}

impl Forward {
    fn is_live(&self) -> bool {
        matches!(self.status, Status::Opening { .. } | Status::Open)
    }
}

/// What an answer of the engine changed, as far as people are told of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// The port answers on the host.
    Opened(NonZeroU16),
    /// It no longer does.
    Closed(NonZeroU16),
    /// It could not be opened. Told once, however often it is tried again.
    Failed(NonZeroU16, ListenFailure),
}

/// The forwards of one namespace, as far as the engine was asked and has answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forwards {
    upstream: UpstreamId,
    ports: BTreeMap<NonZeroU16, Forward>,
    next: u32,
}

impl Forwards {
    /// No forwards yet.
    pub fn new(upstream: UpstreamId) -> Forwards {
        Forwards { upstream, ports: BTreeMap::new(), next: 1 }
    }

    /// The commands that close the gap between what is wanted and what is asked for already.
    pub fn plan(&self, seen: &Observation, policy: &Policy, now: Instant) -> Vec<Command> {
        let wanted = wanted(seen, policy);
        let mut next = self.next;
        let mut commands = Vec::new();
        for (port, forward) in &self.ports {
            let lingered =
                forward.unwanted.is_some_and(|since| now.saturating_duration_since(since) >= LINGER);
            if lingered && forward.is_live() && !wanted.contains_key(port) {
                commands.push(Command::CloseListener { forward: forward.id, ending: Ending::Drain });
            }
        }
        for (port, reach) in wanted {
            let open = match self.ports.get(&port).map(|forward| (forward, forward.status)) {
                None => true,
                Some((_, Status::Failed { at })) => now.saturating_duration_since(at) >= RETRY,
                Some((_, Status::Closing)) => false,
                Some((forward, Status::Opening { .. } | Status::Open)) => {
                    if forward.reach != reach {
                        commands.push(Command::SetReach { forward: forward.id, reach });
                    }
                    false
                }
            };
            if open {
                commands.push(Command::OpenListener {
                    forward: ForwardId(next),
                    upstream: self.upstream,
                    host_port: port,
                    target_port: port,
                    reach,
                });
                next = next.wrapping_add(1);
            }
        }
        commands
    }

    /// Notes that these commands, planned from `seen` and `policy`, are on their way to the engine.
    pub fn issued(&mut self, commands: &[Command], seen: &Observation, policy: &Policy, now: Instant) {
        let wanted = wanted(seen, policy);
        for (port, forward) in &mut self.ports {
            let unwanted = !wanted.contains_key(port);
            forward.unwanted = unwanted.then(|| forward.unwanted.unwrap_or(now));
        }
        // A failure is remembered only while somebody still waits for the port.
        self.ports.retain(|port, forward| {
            !matches!(forward.status, Status::Failed { .. }) || wanted.contains_key(port)
        });
        for command in commands {
            match command {
                Command::OpenListener { forward, host_port, reach, .. } => {
                    let since = self.ports.get(host_port).and_then(|before| match before.status {
                        Status::Failed { at } => Some(at),
                        _ => None,
                    });
                    let status = Status::Opening { since };
                    self.ports
                        .insert(*host_port, Forward { id: *forward, status, reach: *reach, unwanted: None });
                    self.next = forward.0.wrapping_add(1);
                }
                Command::CloseListener { forward, .. } => {
                    if let Some((_, known)) = self.find(*forward) {
                        known.status = Status::Closing;
                    }
                }
                Command::SetReach { forward, reach } => {
                    if let Some((_, known)) = self.find(*forward) {
                        known.reach = *reach;
                    }
                }
                _ => {}
            }
        }
    }

    /// Takes in an answer of the engine; what it says of an unknown forward changes nothing.
    pub fn answered(&mut self, event: &Event, now: Instant) -> Option<Change> {
        match event {
            Event::ListenerOpened { forward, .. } => {
                let (port, known) = self.find(*forward)?;
                if !matches!(known.status, Status::Opening { .. }) {
                    return None;
                }
                known.status = Status::Open;
                Some(Change::Opened(port))
            }
            Event::ListenerFailed { forward, failure, .. } => {
                let (port, known) = self.find(*forward)?;
                let Status::Opening { since } = known.status else { return None };
                known.status = Status::Failed { at: now };
                since.is_none().then(|| Change::Failed(port, failure.clone()))
            }
            Event::ListenerClosed { forward, .. } => {
                let (port, known) = self.find(*forward)?;
                let told = matches!(known.status, Status::Open | Status::Closing);
                self.ports.remove(&port);
                told.then_some(Change::Closed(port))
            }
            _ => None,
        }
    }

    /// When planning will yield something by itself: a failed port is due, or one has lingered.
    pub fn due(&self) -> Option<Instant> {
        self.ports
            .values()
            .filter_map(|forward| match forward.status {
                Status::Failed { at } => Some(at + RETRY),
                Status::Opening { .. } | Status::Open => forward.unwanted.map(|since| since + LINGER),
                Status::Closing => None,
            })
            .min()
    }

    fn find(&mut self, id: ForwardId) -> Option<(NonZeroU16, &mut Forward)> {
        self.ports.iter_mut().find(|(_, forward)| forward.id == id).map(|(port, forward)| (*port, forward))
    }
}

fn wanted(seen: &Observation, policy: &Policy) -> BTreeMap<NonZeroU16, Reach> {
    let mut ports = seen.reach();
    ports.retain(|port, _| policy.decide(*port) == Decision::Allow);
    ports
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
