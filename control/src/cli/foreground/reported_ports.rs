//! Derives reports from the daemon's rows: each call compares the rows with the last reported state of each port. Pure.

use std::collections::{BTreeMap, BTreeSet};

use crate::model::forward_table::{ForwardRow, RowState};

/// A change to report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum PortChange {
    /// A port is forwarded.
    Open(ForwardRow),
    /// A host port is no longer forwarded.
    Closed(u16),
    /// A host port could not be opened.
    Failed(ForwardRow),
    /// The policy denies a port.
    Denied(ForwardRow),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Last {
    Open,
    Failed(Option<String>),
}

/// The last reported state of each port.
#[derive(Debug, Default)]
pub(super) struct ReportedPorts {
    /// By the port on the host.
    ports: BTreeMap<u16, Last>,
    /// The denied ports, each of which is reported once, however often its server restarts.
    denied: BTreeSet<u16>,
}

impl ReportedPorts {
    /// Compares the rows with the last state, and returns the changes.
    pub(super) fn update(&mut self, rows: &[ForwardRow]) -> Vec<PortChange> {
        let gone: Vec<u16> =
            self.ports.keys().copied().filter(|port| rows.iter().all(|row| row.host_port != *port)).collect();
        let mut changes = Vec::new();
        for port in gone {
            if self.ports.remove(&port) == Some(Last::Open) {
                changes.push(PortChange::Closed(port));
            }
        }
        for row in rows {
            changes.extend(self.update_port(row));
        }
        changes
    }

    fn update_port(&mut self, row: &ForwardRow) -> Vec<PortChange> {
        let port = row.host_port;
        let mut changes = Vec::new();
        let next = match row.state {
            // These are transitions between two states.
            RowState::Opening | RowState::Closing => return changes,
            RowState::Denied | RowState::Published => None,
            // Silent ports are not reported.
            RowState::Open if row.silent => None,
            RowState::Open => Some(Last::Open),
            RowState::Failed => Some(Last::Failed(row.reason.clone())),
        };
        if row.state == RowState::Denied && self.denied.insert(row.port) {
            changes.push(PortChange::Denied(row.clone()));
        }
        let last = match &next {
            Some(next) => self.ports.insert(port, next.clone()),
            None => self.ports.remove(&port),
        };
        if last == next {
            return changes;
        }
        if last == Some(Last::Open) {
            changes.push(PortChange::Closed(port));
        }
        match next {
            Some(Last::Open) => changes.push(PortChange::Open(row.clone())),
            Some(Last::Failed(_)) => changes.push(PortChange::Failed(row.clone())),
            None => {}
        }
        changes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::forward_table::ForwardPath;

    fn row(port: u16, state: RowState) -> ForwardRow {
        let counters = (0, 0, 0, 0);
        ForwardRow {
            port,
            host_port: port,
            state,
            path: ForwardPath::Relay,
            addresses: Vec::new(),
            reason: None,
            process: None,
            pid: None,
            label: None,
            silent: false,
            connections: counters.0,
            accepted: counters.1,
            bytes_up: counters.2,
            bytes_down: counters.3,
        }
    }

    #[test]
    fn a_port_is_reported_only_when_it_opens_and_when_it_closes() {
        let mut reported = ReportedPorts::default();
        assert_eq!(reported.update(&[row(80, RowState::Opening)]), []);
        let open = row(80, RowState::Open);
        assert_eq!(reported.update(std::slice::from_ref(&open)), [PortChange::Open(open.clone())]);
        let busy = ForwardRow { connections: 5, ..open.clone() };
        assert_eq!(reported.update(&[busy]), [], "counters are not reported");
        assert_eq!(reported.update(&[row(80, RowState::Closing)]), []);
        assert_eq!(reported.update(&[]), [PortChange::Closed(80)]);
        assert_eq!(reported.update(&[]), []);
    }

    #[test]
    fn a_failure_is_reported_once_for_each_reason() {
        let mut reported = ReportedPorts::default();
        let because =
            |reason: &str| ForwardRow { reason: Some(reason.to_owned()), ..row(80, RowState::Failed) };
        assert_eq!(reported.update(&[because("a")]), [PortChange::Failed(because("a"))]);
        assert_eq!(reported.update(&[because("a")]), []);
        assert_eq!(reported.update(&[because("b")]), [PortChange::Failed(because("b"))]);
        let open = row(80, RowState::Open);
        assert_eq!(reported.update(std::slice::from_ref(&open)), [PortChange::Open(open.clone())]);
        assert_eq!(
            reported.update(&[because("b")]),
            [PortChange::Closed(80), PortChange::Failed(because("b"))]
        );
        assert_eq!(reported.update(&[]), [], "a failed port does not close");
    }

    #[test]
    fn a_silent_port_is_reported_only_when_it_fails() {
        let mut reported = ReportedPorts::default();
        let silent = |state| ForwardRow { silent: true, ..row(80, state) };
        assert_eq!(reported.update(&[silent(RowState::Open)]), []);
        assert_eq!(
            reported.update(&[silent(RowState::Failed)]),
            [PortChange::Failed(silent(RowState::Failed))]
        );
        assert_eq!(reported.update(&[silent(RowState::Open)]), []);
        assert_eq!(reported.update(&[]), []);
    }

    #[test]
    fn a_denied_port_is_reported_once() {
        let mut reported = ReportedPorts::default();
        let denied = row(22, RowState::Denied);
        assert_eq!(reported.update(std::slice::from_ref(&denied)), [PortChange::Denied(denied.clone())]);
        assert_eq!(reported.update(&[]), []);
        assert_eq!(reported.update(std::slice::from_ref(&denied)), []);
    }
}
