use landfall_engine::native::{HostAddress, NativeListener, RelayReason};

use super::*;
use crate::forwarding::planner::natives::{LINK_MAX, REPORT_MAX};
use crate::model::forward_table::ForwardPath;
use crate::model::native_state::{NativeState, Relayed};

fn desired_native(text: &str) -> DesiredContainer {
    DesiredContainer { native: true, ..desired(text, None) }
}

impl Bench {
    fn report(&mut self, text: &str, state: NativeState) -> Vec<Change> {
        self.planner.native(&name(text), state, self.now)
    }

    /// The changes that a step reports; it gives the engine no command.
    fn changes(&mut self) -> Vec<Change> {
        let (commands, changes) = self.planner.step(self.now);
        assert_eq!(commands, []);
        changes
    }
}

/// Containers with native sockets, each with a supervisor that is linked.
fn linked(names: &[&str]) -> Bench {
    let mut bench = Bench::new(names.iter().map(|text| desired_native(text)).collect());
    for (number, text) in (1..).zip(names) {
        assert_eq!(
            bench.planner.container_entered(&name(text), u64::from(number)),
            Admission::Add(UpstreamId(number))
        );
        bench.listen(number, &[], &[]);
        assert_eq!(bench.report(text, NativeState::default()), []);
    }
    bench
}

/// A native listener; the inode of its stub is that of the host's socket plus 1000.
fn listener(address: &str, inode: u64) -> NativeListener {
    let address = HostAddress { address: address.parse().unwrap(), v6_only: false };
    NativeListener { address, inode, stub_inode: inode + 1000, process: 42 }
}

fn state(listeners: &[NativeListener], relayed: &[(u16, u64)]) -> NativeState {
    let reason = RelayReason::Epoll;
    let relayed =
        relayed.iter().map(|(number, inode)| Relayed { port: port(*number), inode: *inode, reason });
    NativeState { listeners: listeners.to_vec(), relayed: relayed.collect() }
}

fn opened_native(text: &str, number: u16) -> Change {
    Change::OpenedNative { name: name(text), port: port(number), bind: "127.0.0.1" }
}

#[test]
fn native_port_is_reported_and_its_stub_is_never_relayed() {
    let reported = state(&[listener("127.0.0.1:3000", 7)], &[]);
    let stub = row(3000, "127.0.0.1", 1007);
    // The watch and the supervisor may report in either order.
    for watch_first in [true, false] {
        let mut bench = linked(&["a"]);
        if watch_first {
            bench.listen(1, &[stub], &[]);
            assert_eq!(bench.commands(), []);
        }
        assert_eq!(bench.report("a", reported.clone()), [opened_native("a", 3000)]);
        assert_eq!(bench.report("a", reported.clone()), [], "a repeated report changes nothing");
        if !watch_first {
            bench.listen(1, &[stub], &[]);
        }
        bench.now += LINK_MAX;
        assert_eq!(bench.commands(), []);
        let rows = bench.planner.rows(&name("a")).listed;
        assert_eq!(rows.len(), 1);
        assert_eq!(
            (rows[0].state, rows[0].path, rows[0].process),
            (RowState::Open, ForwardPath::Native, Some(42))
        );
        assert_eq!(rows[0].inodes, [7]);
        assert_eq!(bench.planner.open_ports(&name("a")), [port(3000)]);

        // The watch sees the end of the stub after the supervisor's report.
        assert_eq!(bench.report("a", state(&[], &[])), []);
        assert_eq!(bench.states("a"), []);
        assert_eq!(bench.commands(), []);
        assert_eq!(bench.planner.due(), Some(bench.now + LINGER));
        bench.now += LINGER;
        assert_eq!(bench.changes(), [closed_change("a", 3000, ClosedReason::ContainerReleased)]);
        bench.now += LINK_MAX;
        assert_eq!(bench.commands(), []);
        bench.listen(1, &[], &[stub]);
        // A later socket may have the same inode.
        bench.listen(1, &[stub], &[]);
        bench.report("a", state(&[], &[(3000, 1007)]));
        assert_eq!(bench.commands(), [open(1, 1, 3000)]);
    }
}

#[test]
fn port_is_relayed_at_once_on_its_supervisors_report_or_after_a_wait() {
    let mut bench = linked(&["a"]);
    bench.report("a", state(&[], &[(3000, 5)]));
    bench.listen(1, &[row(3000, "127.0.0.1", 5)], &[]);
    assert_eq!(bench.commands(), [open(1, 1, 3000)]);
    // A program whose calls the filter does not cover.
    bench.listen(1, &[row(4000, "127.0.0.1", 6)], &[]);
    assert_eq!(bench.commands(), []);
    assert_eq!(bench.planner.due(), Some(bench.now + REPORT_MAX));
    bench.now += REPORT_MAX;
    assert_eq!(bench.commands(), [open(2, 1, 4000)]);
    assert_eq!(bench.planner.due(), None);
}

#[test]
fn container_without_native_sockets_is_relayed_at_once() {
    let mut bench = Bench::with_entered(&["a"]);
    assert_eq!(bench.report("a", state(&[listener("127.0.0.1:3000", 7)], &[])), []);
    bench.listen(1, &[row(4000, "127.0.0.1", 6)], &[]);
    assert_eq!(bench.commands(), [open(1, 1, 4000)]);
}

#[test]
fn port_waits_for_a_supervisor_that_is_not_linked() {
    let mut bench = Bench::new(vec![desired_native("a")]);
    bench.planner.container_entered(&name("a"), 1);
    bench.listen(1, &[row(3000, "127.0.0.1", 1007)], &[]);
    assert_eq!(bench.commands(), []);
    bench.now += LINK_MAX / 2;
    assert_eq!(bench.commands(), []);
    let reported = state(&[listener("127.0.0.1:3000", 7)], &[]);
    assert_eq!(bench.report("a", reported), [opened_native("a", 3000)]);
    bench.now += LINK_MAX;
    assert_eq!(bench.commands(), []);
}

#[test]
fn supervisor_link_lost_for_long_closes_its_ports() {
    let mut bench = linked(&["a"]);
    let reported = state(&[listener("127.0.0.1:3000", 7)], &[]);
    bench.report("a", reported.clone());
    bench.planner.native_lost(&name("a"), bench.now);
    bench.now += LINK_MAX / 2;
    assert_eq!(bench.commands(), []);
    assert_eq!(bench.report("a", reported), [], "its link is up again");
    bench.planner.native_lost(&name("a"), bench.now);
    assert_eq!(bench.commands(), []);
    assert_eq!(bench.planner.due(), Some(bench.now + LINK_MAX));
    bench.now += LINK_MAX;
    assert_eq!(bench.changes(), [closed_change("a", 3000, ClosedReason::HostError)]);
    assert_eq!(bench.states("a"), []);
}

#[test]
fn deregistration_closes_native_ports() {
    let mut bench = linked(&["a"]);
    bench.report("a", state(&[listener("127.0.0.1:3000", 7)], &[]));
    bench.planner.desired(Vec::new());
    let (commands, changes) = bench.planner.step(bench.now);
    assert_eq!(
        (commands, changes),
        (vec![remove(1)], vec![closed_change("a", 3000, ClosedReason::Deregistered)])
    );
}

#[test]
fn native_port_is_taken_for_others_until_it_is_free() {
    let mut bench = linked(&["a", "b"]);
    bench.report("a", state(&[listener("127.0.0.1:3000", 7)], &[]));
    bench.report("b", state(&[], &[(3000, 9)]));
    bench.listen(2, &[row(3000, "127.0.0.1", 9)], &[]);
    let (commands, changes) = bench.planner.step(bench.now);
    let reason = "EADDRINUSE: port 3000 is forwarded to container \"a\", which had it first".to_owned();
    assert_eq!(commands, []);
    assert_eq!(changes, [Change::Failed { name: name("b"), port: port(3000), reason }]);
    assert_eq!(bench.states("b"), [(3000, RowState::Failed)]);
    bench.report("a", state(&[], &[]));
    assert_eq!(bench.commands(), [open(1, 2, 3000)]);
    // The end is reported before the port opens again.
    let closed = closed_change("a", 3000, ClosedReason::ContainerReleased);
    assert_eq!(bench.opened(1, 3000), [closed, opened_change("b", 3000, "127.0.0.1")]);
}

#[test]
fn native_server_that_listens_again_is_one_forward() {
    let mut bench = linked(&["a"]);
    bench.report("a", state(&[listener("127.0.0.1:3000", 7)], &[]));
    for inode in 8..20 {
        assert_eq!(bench.report("a", state(&[], &[])), []);
        assert_eq!(bench.commands(), []);
        bench.now += LINGER / 2;
        assert_eq!(bench.report("a", state(&[listener("127.0.0.1:3000", inode)], &[])), []);
        bench.now += LINGER;
        assert_eq!(bench.commands(), []);
    }
    bench.report("a", state(&[], &[]));
    assert_eq!(bench.planner.end_natives(), [closed_change("a", 3000, ClosedReason::HostError)]);
}

#[test]
fn native_ports_outlive_the_engine() {
    let mut bench = linked(&["a"]);
    bench.report("a", state(&[listener("127.0.0.1:3000", 7)], &[]));
    assert_eq!(bench.planner.detach(), []);
    assert_eq!(bench.states("a"), [(3000, RowState::Open)]);
}
