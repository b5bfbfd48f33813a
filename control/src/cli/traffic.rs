//! Counters of native ports, for the verbs that show them. The daemon cannot count these connections, since they bypass
//! the relay.

use std::collections::BTreeSet;

use crate::daemon::rpc::request_handler::DescribedContainer;
use crate::model::forward_table::{ForwardPath, ForwardRow};

/// Sets the counters of native ports to those of the open connections. If the kernel does not report them, they stay 0.
pub(super) fn count(containers: &mut [DescribedContainer]) {
    let rows = containers.iter_mut().flat_map(|container| &mut container.state.forwards);
    let rows: Vec<&mut ForwardRow> = rows.filter(|row| row.path == ForwardPath::Native).collect();
    let ports: BTreeSet<u16> = rows.iter().map(|row| row.host_port).collect();
    if ports.is_empty() {
        return;
    }
    let Ok(traffic) = landfall_engine::native::traffic(&ports) else { return };
    for row in rows {
        if let Some(counted) = traffic.get(&row.host_port) {
            row.connections = counted.connections;
            row.accepted = counted.connections;
            row.bytes_up = counted.bytes_up;
            row.bytes_down = counted.bytes_down;
        }
    }
}
