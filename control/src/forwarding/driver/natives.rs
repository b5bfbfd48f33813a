//! The links of supervisors: each carries the state of a sandbox's native listeners while its `run` is connected.

use std::time::Instant;

use tokio::sync::mpsc;

use super::Request;
use crate::forwarding::driver::event_loop::Driver;
use crate::model::native_state::NativeState;
use crate::model::registration::ContainerName;

/// A report of one link.
#[derive(Debug)]
pub(super) struct NativeReport {
    name: ContainerName,
    /// The number of the link: one that was replaced may end later.
    number: u64,
    /// `None` at the end of the link.
    state: Option<NativeState>,
}

/// The link of one sandbox. Dropping it removes its native listeners.
#[derive(Debug)]
pub struct NativeLink {
    pub(super) name: ContainerName,
    pub(super) number: u64,
    pub(super) requests: mpsc::UnboundedSender<Request>,
}

impl NativeLink {
    /// Reports the current listeners.
    pub fn report(&self, state: NativeState) {
        self.send(Some(state));
    }

    fn send(&self, state: Option<NativeState>) {
        let report = NativeReport { name: self.name.clone(), number: self.number, state };
        // A task that has ended keeps no state.
        let _ = self.requests.send(Request::Native(report));
    }
}

impl Drop for NativeLink {
    fn drop(&mut self) {
        self.send(None);
    }
}

impl Driver {
    pub(super) fn on_native_report(&mut self, report: NativeReport) {
        let NativeReport { name, number, state } = report;
        let current = self.native_links.get(&name).copied().unwrap_or(0);
        if number < current {
            return;
        }
        let Some(state) = state else {
            self.native_links.remove(&name);
            return self.planner.native_lost(&name, Instant::now());
        };
        self.native_links.insert(name.clone(), number);
        let changes = self.planner.native(&name, state, Instant::now());
        self.report_changes(changes);
    }
}
