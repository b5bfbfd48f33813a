//! The driver of a sandbox's supervisor: it knows the port policy, and looks up which program holds a port.

use std::collections::BTreeSet;
use std::num::NonZeroU16;
use std::os::unix::fs::MetadataExt;

use landfall_engine::native::{Conflict, Driver, EPHEMERAL_PORTS, NativeEvent};

use crate::cli::ui::output::{Report, Talk};
use crate::model::native_sockets::OnConflict;
use crate::model::port_policy::{ControlPorts, Decision, Policy};
use crate::sys::processes;

/// Receives the supervisor's events.
pub type Sink = Box<dyn FnMut(NativeEvent) + Send>;

/// The driver of one sandbox.
pub struct RunDriver {
    policy: Policy,
    control_ports: ControlPorts,
    on_conflict: Option<OnConflict>,
    talk: Talk,
    sink: Sink,
    /// Ports whose other holder has been reported.
    reported: BTreeSet<NonZeroU16>,
}

impl RunDriver {
    /// A driver with this policy. `control_ports` are those of the daemon, where one runs.
    pub fn new(
        policy: Policy,
        control_ports: ControlPorts,
        on_conflict: Option<OnConflict>,
        talk: Talk,
        sink: Sink,
    ) -> RunDriver {
        RunDriver { policy, control_ports, on_conflict, talk, sink, reported: BTreeSet::new() }
    }
}

impl Driver for RunDriver {
    fn may_expose(&mut self, port: NonZeroU16) -> bool {
        self.policy.decide(port, &self.control_ports) == Decision::Allow
    }

    fn conflict(&mut self, port: NonZeroU16, inodes: &[u64]) -> Conflict {
        let conflict = match self.on_conflict {
            Some(OnConflict::Fail) => Conflict::Fail,
            Some(OnConflict::Relay) => Conflict::Relay,
            None => by_holder(port, inodes),
        };
        if conflict == Conflict::Fail && self.reported.insert(port) {
            self.talk.report(&Report::Taken { port, holder: processes::holder_of_port(port) });
        }
        conflict
    }

    fn report(&mut self, event: NativeEvent) {
        match &event {
            // A server has the port, so another holder of it is news again.
            NativeEvent::Opened(listener) => {
                self.reported.retain(|port| port.get() != listener.port());
            }
            NativeEvent::Degraded { reason } => {
                self.talk.report(&Report::Warning { text: reason.clone(), hint: None });
            }
            NativeEvent::Closed { .. } | NativeEvent::Relayed { .. } | NativeEvent::Ended => {}
        }
        (self.sink)(event);
    }
}

/// A port of another sandbox or container of landfall's stays usable inside, as two worktrees both have a :3000. A port of
/// any other program is in use, and a dev server moves on to the next one. A server with an ephemeral port did not choose
/// it, and does not expect it to be in use.
fn by_holder(port: NonZeroU16, inodes: &[u64]) -> Conflict {
    if inodes.is_empty() || EPHEMERAL_PORTS.contains(&port.get()) {
        return Conflict::Relay;
    }
    let owners = processes::owners_of_sockets(inodes);
    let is_landfalls = |pid: u32| is_landfall(pid) || is_in_another_network(pid);
    if owners.values().any(|owner| is_landfalls(owner.pid)) { Conflict::Relay } else { Conflict::Fail }
}

/// Whether a process is landfall: an engine that has the port of a forward.
fn is_landfall(pid: u32) -> bool {
    let program = std::fs::read_link(format!("/proc/{pid}/exe"));
    let name = program.ok().and_then(|path| path.file_name().map(|name| name.to_string_lossy().into_owned()));
    // A program that was replaced has this behind its name.
    name.is_some_and(|name| name.trim_end_matches(" (deleted)") == "landfall")
}

/// Whether a process that holds a socket of this network namespace is in another one: a server with a native socket.
fn is_in_another_network(pid: u32) -> bool {
    let namespace = |process: &str| {
        let file = std::fs::metadata(format!("/proc/{process}/ns/net")).ok()?;
        Some((file.dev(), file.ino()))
    };
    let theirs = namespace(&pid.to_string());
    theirs.is_some() && theirs != namespace("self")
}
