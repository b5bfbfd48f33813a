//! The driver of a native-socket supervisor: applies the port policy, and finds the program that holds a port.

use std::collections::BTreeSet;
use std::num::NonZeroU16;
use std::os::unix::fs::MetadataExt;

use landfall_engine::native::{Conflict, Driver, EPHEMERAL_PORTS, NativeEvent};

use crate::cli::ui::output::{Printer, Report};
use crate::model::native_sockets::OnConflict;
use crate::model::port_policy::{ControlPorts, Decision, Policy};
use crate::sys::processes;

/// The receiver of the supervisor's events.
pub type Sink = Box<dyn FnMut(NativeEvent) + Send>;

/// The driver of one sandbox.
pub struct RunDriver {
    policy: Policy,
    control_ports: ControlPorts,
    on_conflict: Option<OnConflict>,
    printer: Printer,
    sink: Sink,
    /// Ports whose other holder has been reported.
    reported: BTreeSet<NonZeroU16>,
}

impl RunDriver {
    /// Returns a driver with this policy. `control_ports` are those of the daemon, if one runs.
    pub fn new(
        policy: Policy,
        control_ports: ControlPorts,
        on_conflict: Option<OnConflict>,
        printer: Printer,
        sink: Sink,
    ) -> RunDriver {
        RunDriver { policy, control_ports, on_conflict, printer, sink, reported: BTreeSet::new() }
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
            self.printer.report(&Report::Taken { port, holder: processes::holder_of_port(port) });
        }
        conflict
    }

    fn report(&mut self, event: NativeEvent) {
        match &event {
            // A server has the port, so a later conflict is reported again.
            NativeEvent::Opened(listener) => {
                self.reported.retain(|port| port.get() != listener.port());
            }
            NativeEvent::Degraded { reason } => {
                self.printer.report(&Report::Warning { text: reason.clone(), hint: None });
            }
            NativeEvent::Closed { .. } | NativeEvent::Relayed { .. } | NativeEvent::Ended => {}
        }
        (self.sink)(event);
    }
}

/// Decides a conflict by the holder of the port. A port of another sandbox or container of landfall stays usable
/// inside, since two worktrees may both use :3000: it is relayed. A port of any other program is in use, and a dev
/// server tries the next one. A server did not choose an ephemeral port, and does not expect it to be in use.
fn by_holder(port: NonZeroU16, inodes: &[u64]) -> Conflict {
    if inodes.is_empty() || EPHEMERAL_PORTS.contains(&port.get()) {
        return Conflict::Relay;
    }
    let owners = processes::owners_of_sockets(inodes);
    let is_landfalls = |pid: u32| is_landfall(pid) || is_in_another_network(pid);
    if owners.values().any(|owner| is_landfalls(owner.pid)) { Conflict::Relay } else { Conflict::Fail }
}

/// Returns whether a process is landfall: an engine that holds the port of a forward.
fn is_landfall(pid: u32) -> bool {
    let program = std::fs::read_link(format!("/proc/{pid}/exe"));
    let name = program.ok().and_then(|path| path.file_name().map(|name| name.to_string_lossy().into_owned()));
    // The kernel appends this suffix after the executable file was replaced.
    name.is_some_and(|name| name.trim_end_matches(" (deleted)") == "landfall")
}

/// Returns whether a process that holds a socket of this network namespace is in another one, as a server with a native
/// socket is.
fn is_in_another_network(pid: u32) -> bool {
    let namespace = |process: &str| {
        let file = std::fs::metadata(format!("/proc/{process}/ns/net")).ok()?;
        Some((file.dev(), file.ino()))
    };
    let theirs = namespace(&pid.to_string());
    theirs.is_some() && theirs != namespace("self")
}
