//! Ports that a broker's session announces.

use super::*;
use crate::model::announcement::{Announced, ForwardResult};

pub(super) fn announced(number: u16) -> Announced {
    Announced { port: port(number), loopback: true }
}

pub(super) fn result(text: &str, number: u16, result: Result<u16, &str>) -> Change {
    let result = result.map(port).map_err(str::to_owned);
    Change::Result { name: name(text), result: ForwardResult { port: port(number), result } }
}

pub(super) fn dial(id: u32, upstream: u32, number: u16) -> Command {
    let Command::OpenListener { forward, upstream, host_port, target_port, .. } = open(id, upstream, number)
    else {
        unreachable!()
    };
    Command::OpenListener { forward, upstream, host_port, target_port, reach: Reach::UNKNOWN }
}

fn cut(id: u32) -> Command {
    Command::CloseListener { forward: ForwardId(id), ending: Ending::Reset }
}

impl Bench {
    /// A bench whose container "a" is upstream 1, over its session.
    pub(super) fn dialled(allow: Option<&str>) -> Bench {
        let mut bench = Bench::new(vec![desired("a", allow)]);
        bench.planner.broker_up(&name("a"));
        assert_eq!(bench.planner.dial(&name("a")), Some((UpstreamId(1), 1 << 63 | 1)));
        assert_eq!(bench.planner.dial(&name("a")), None, "the session has an upstream");
        bench
    }

    pub(super) fn announce(&mut self, opened: &[u16], closed: &[u16], whole: bool) -> Vec<Change> {
        let opened: Vec<Announced> = opened.iter().map(|number| announced(*number)).collect();
        let closed: Vec<NonZeroU16> = closed.iter().map(|number| port(*number)).collect();
        self.planner.announce(&name("a"), &opened, &closed, whole, self.now)
    }

    pub(super) fn step(&mut self) -> (Vec<Command>, Vec<Change>) {
        let stepped = self.planner.step(self.now);
        self.is_idle();
        stepped
    }

    /// Container "a" with this port open over its session.
    pub(super) fn serving(number: u16) -> Bench {
        let mut bench = Bench::dialled(None);
        bench.announce(&[number], &[], true);
        assert_eq!(bench.step(), (vec![dial(1, 1, number)], vec![]));
        assert_eq!(bench.opened(1, number), [opened_change("a", number, "127.0.0.1")]);
        assert_eq!(bench.step(), (vec![], vec![result("a", number, Ok(number))]));
        bench
    }
}

#[test]
fn announced_port_is_opened_once_and_gets_one_result() {
    let mut bench = Bench::dialled(None);
    let opened = [announced(3000), Announced { port: port(5173), loopback: false }];
    bench.planner.announce(&name("a"), &opened, &[], true, bench.now);
    assert_eq!(bench.step(), (vec![dial(1, 1, 3000), dial(2, 1, 5173)], vec![]));
    assert_eq!(bench.opened(1, 3000), [opened_change("a", 3000, "127.0.0.1")]);
    assert_eq!(bench.step(), (vec![], vec![result("a", 3000, Ok(3000))]));
    bench.announce(&[3000, 5173], &[], false);
    assert_eq!(bench.step(), (vec![], vec![]), "a repeated announcement changes nothing");
    assert_eq!(bench.opened(2, 5173), [opened_change("a", 5173, "127.0.0.1")]);
    assert_eq!(bench.step(), (vec![], vec![result("a", 5173, Ok(5173))]));
    bench.planner.announce(&name("a"), &opened, &[], true, bench.now);
    assert_eq!(bench.step(), (vec![], vec![]), "another address alone changes nothing");
    assert_eq!(bench.planner.due(), None);
}

#[test]
fn refused_port_gets_the_result_of_the_wire_specification() {
    let mut bench = Bench::dialled(Some("8973,8974,5000,*"));
    bench.announce(&[8973, 8974, 80, 5000], &[], true);
    let (commands, changes) = bench.step();
    assert_eq!(commands, [dial(1, 1, 5000)]);
    assert_eq!(changes, [80, 8973, 8974].map(|number| result("a", number, Err("policy excluded"))));
    let denied = [(80, RowState::Denied), (5000, RowState::Opening)];
    assert_eq!(bench.states("a")[..2], denied);
    bench.announce(&[8973], &[], false);
    assert_eq!(bench.step(), (vec![], vec![result("a", 8973, Err("policy excluded"))]), "announced again");
}

#[test]
fn announced_ports_beyond_the_quota_are_excluded() {
    let mut bench = Bench::dialled(None);
    let many: Vec<u16> = (2000..2300).collect();
    bench.announce(&many, &[], true);
    let (commands, changes) = bench.step();
    assert_eq!(commands.len(), FORWARDS_MAX);
    assert_eq!(changes.len(), 300 - FORWARDS_MAX);
    assert_eq!(changes[0], result("a", 2256, Err("policy excluded")));
}

#[test]
fn rows_of_ports_without_a_forward_are_bounded_and_the_rest_counted() {
    let mut bench = Bench::dialled(Some("1"));
    bench.announce(&(2000..3000).collect::<Vec<u16>>(), &[], true);
    bench.step();
    let rows = bench.planner.rows(&name("a"));
    assert_eq!(rows.listed.len() + rows.omitted, 1000);
    assert!(rows.listed.len() < 300, "{}", rows.listed.len());
    // Every forward has a row.
    let mut bench = Bench::serving(60_000);
    bench.announce(&(2000..3000).chain([60_000]).collect::<Vec<u16>>(), &[], true);
    bench.step();
    assert!(bench.states("a").contains(&(60_000, RowState::Open)));
}

#[test]
fn failed_port_is_tried_again_only_after_another_announcement() {
    let mut bench = Bench::dialled(None);
    bench.announce(&[3000], &[], true);
    bench.step();
    let changes = bench.failed(1, 3000);
    let [Change::Failed { reason, .. }] = changes.as_slice() else { panic!("{changes:?}") };
    assert!(reason.starts_with("EADDRINUSE"), "{reason}");
    assert_eq!(bench.step(), (vec![], vec![result("a", 3000, Err(reason))]));
    assert_eq!(bench.states("a"), [(3000, RowState::Failed)]);
    bench.now += 10 * RETRY;
    assert_eq!((bench.step(), bench.planner.due()), ((vec![], vec![]), None));
    bench.announce(&[3000], &[], true);
    assert_eq!(bench.step(), (vec![dial(2, 1, 3000)], vec![]));
    assert_eq!(bench.opened(2, 3000).len(), 1);
    assert_eq!(bench.step(), (vec![], vec![result("a", 3000, Ok(3000))]));
}

#[test]
fn closed_port_closes_its_forward_at_once_and_may_reopen() {
    let mut bench = Bench::serving(3000);
    assert_eq!(bench.announce(&[], &[3000], false), []);
    assert_eq!(bench.step(), (vec![cut(1)], vec![]));
    bench.announce(&[3000], &[], false);
    assert_eq!(bench.step(), (vec![], vec![]), "the port is not free yet");
    assert_eq!(bench.closed(1), [closed_change("a", 3000, ClosedReason::ContainerReleased)]);
    assert_eq!(bench.step(), (vec![dial(2, 1, 3000)], vec![]));
}

#[test]
fn port_that_closes_during_its_bind_is_closed_after_it() {
    for fails in [false, true] {
        let mut bench = Bench::dialled(None);
        bench.announce(&[3000], &[], true);
        bench.step();
        let changes = bench.announce(&[], &[3000], false);
        assert_eq!(changes, [result("a", 3000, Err("container-released"))]);
        assert_eq!(bench.step(), (vec![cut(1)], vec![]));
        bench.announce(&[3000], &[], false);
        assert_eq!(if fails { bench.failed(1, 3000) } else { bench.opened(1, 3000) }, []);
        bench.closed(1);
        assert_eq!(bench.step(), (vec![dial(2, 1, 3000)], vec![]), "it is another announcement");
        bench.opened(2, 3000);
        assert_eq!(bench.step(), (vec![], vec![result("a", 3000, Ok(3000))]));
    }
}

#[test]
fn whole_announcement_replaces_earlier_ones() {
    let mut bench = Bench::serving(3000);
    bench.announce(&[5173], &[], true);
    assert_eq!(bench.step(), (vec![cut(1), dial(2, 1, 5173)], vec![]));
}

#[test]
fn lost_session_closes_its_ports_and_the_next_one_gets_results_again() {
    let mut bench = Bench::serving(3000);
    bench.planner.broker_down(&name("a"));
    assert_eq!(bench.step(), (vec![cut(1)], vec![]));
    assert_eq!(bench.announce(&[3000], &[], true), [], "there is no session");
    bench.planner.broker_up(&name("a"));
    bench.announce(&[3000], &[], true);
    assert_eq!(bench.step(), (vec![], vec![]));
    assert_eq!(bench.closed(1), [closed_change("a", 3000, ClosedReason::HostError)]);
    assert_eq!(bench.step(), (vec![dial(2, 1, 3000)], vec![]));
    bench.opened(2, 3000);
    assert_eq!(bench.step(), (vec![], vec![result("a", 3000, Ok(3000))]));
}

#[test]
fn session_lost_during_a_bind_gets_no_result() {
    let mut bench = Bench::dialled(None);
    bench.announce(&[3000], &[], true);
    bench.step();
    bench.planner.broker_down(&name("a"));
    assert_eq!(bench.step(), (vec![cut(1)], vec![]));
    assert_eq!((bench.opened(1, 3000), bench.closed(1)), (vec![], vec![]));
    assert_eq!((bench.step(), bench.states("a")), ((vec![], vec![]), vec![]));
}

#[test]
fn stopped_broker_closes_its_ports() {
    let mut bench = Bench::serving(3000);
    bench.planner.broker_stopped(&name("a"));
    let removed = Command::RemoveUpstream { upstream: UpstreamId(1), ending: Ending::Reset };
    assert_eq!(bench.step(), (vec![removed], vec![]));
    assert_eq!(bench.closed(1), [closed_change("a", 3000, ClosedReason::BrokerStopped)]);
    assert_eq!(bench.on_engine_event(&Event::UpstreamRemoved { upstream: UpstreamId(1), reason: None }), []);
    assert_eq!(bench.planner.dial(&name("a")), None);
}

#[test]
fn broker_without_its_registration_counts_as_stopped() {
    let mut bench = Bench::serving(3000);
    bench.planner.desired(vec![]);
    bench.step();
    assert_eq!(bench.closed(1), [closed_change("a", 3000, ClosedReason::BrokerStopped)]);
}

#[test]
fn announcement_before_the_registration_waits_for_it() {
    let mut bench = Bench::new(vec![]);
    bench.planner.broker_up(&name("a"));
    bench.announce(&[3000, 8973], &[], true);
    assert_eq!((bench.planner.dial(&name("a")), bench.step()), (None, (vec![], vec![])));
    bench.planner.desired(vec![desired("a", None)]);
    assert!(bench.planner.dial(&name("a")).is_some());
    assert_eq!(bench.step(), (vec![dial(1, 1, 3000)], vec![result("a", 8973, Err("policy excluded"))]));
}

#[test]
fn port_of_another_container_fails_and_a_closing_one_is_awaited() {
    let mut bench = Bench::with_entered(&["b"]);
    bench.planner.desired(vec![desired("a", None), desired("b", None)]);
    bench.listen(1, &[row(3000, "127.0.0.1", 7)], &[]);
    bench.commands();
    bench.opened(1, 3000);
    bench.planner.broker_up(&name("a"));
    bench.planner.dial(&name("a")).unwrap();
    bench.announce(&[3000], &[], true);
    let (commands, changes) = bench.step();
    assert_eq!(commands, []);
    let [Change::Failed { reason, .. }, answer] = changes.as_slice() else { panic!("{changes:?}") };
    assert!(reason.starts_with("EADDRINUSE") && reason.contains("\"b\""), "{reason}");
    assert_eq!(*answer, result("a", 3000, Err(reason)));
    bench.planner.container_lost(&name("b"));
    bench.step();
    bench.announce(&[3000], &[], false);
    assert_eq!(bench.step(), (vec![], vec![]), "the one attempt waits until it can succeed");
    bench.closed(1);
    assert_eq!(bench.step(), (vec![dial(2, 2, 3000)], vec![]));
}

#[test]
fn next_engine_opens_the_ports_again_without_second_results() {
    let mut bench = Bench::serving(3000);
    bench.announce(&[5173, 4000], &[], false);
    assert_eq!(bench.step(), (vec![dial(2, 1, 4000), dial(3, 1, 5173)], vec![]));
    let changes = bench.failed(2, 4000);
    assert_eq!(changes.len(), 1);
    assert_eq!(bench.step().1.len(), 1);
    assert_eq!(bench.planner.detach(), [closed_change("a", 3000, ClosedReason::HostError)]);
    bench.planner.attach(Inventory::default());
    assert_eq!(bench.planner.dial(&name("a")), Some((UpstreamId(2), 1 << 63 | 2)));
    assert_eq!(bench.step().0, [dial(4, 2, 3000), dial(5, 2, 5173)], "a failed port is not announced again");
    bench.opened(4, 3000);
    bench.opened(5, 5173);
    assert_eq!(bench.step(), (vec![], vec![result("a", 5173, Ok(5173))]));
}

#[test]
fn dialled_upstreams_of_an_earlier_driver_are_removed_at_once() {
    let mut bench = Bench::new(vec![desired("a", None)]);
    let upstreams = vec![UpstreamState { upstream: UpstreamId(4), netns_cookie: 1 << 63 | 4 }];
    let inventory = Inventory { upstreams, forwards: vec![held(7, 4, 3000)], observed: BTreeMap::new() };
    bench.planner.attach(inventory);
    bench.planner.broker_up(&name("a"));
    bench.announce(&[3000], &[], true);
    assert_eq!(bench.planner.dial(&name("a")), Some((UpstreamId(5), 1 << 63 | 5)));
    assert_eq!(bench.step(), (vec![remove(4)], vec![]), "the port is not free yet");
    assert_eq!(bench.closed(7), [], "no container has claimed it");
    assert_eq!(bench.step(), (vec![dial(8, 5, 3000)], vec![]));
}

#[test]
fn announcements_of_an_entered_container_only_get_results() {
    let mut bench = Bench::with_entered(&["a"]);
    bench.listen(1, &[row(3000, "127.0.0.1", 7), row(4000, "127.0.0.1", 8)], &[]);
    assert_eq!(bench.commands(), [open(1, 1, 3000), open(2, 1, 4000)]);
    bench.opened(1, 3000);
    bench.planner.broker_up(&name("a"));
    assert_eq!(bench.planner.dial(&name("a")), None, "the container is entered");
    bench.announce(&[3000, 4000, 5000, 8973], &[], true);
    let changes = vec![result("a", 3000, Ok(3000)), result("a", 8973, Err("policy excluded"))];
    assert_eq!(bench.step(), (vec![], changes));
    bench.opened(2, 4000);
    assert_eq!(bench.step(), (vec![], vec![result("a", 4000, Ok(4000))]));
    assert_eq!(bench.planner.due(), Some(bench.now + RESULT_MAX), "the watch has not seen it yet");
    bench.now += RESULT_MAX;
    let (_, changes) = bench.step();
    let reason = "ECONNREFUSED: nothing was seen to listen on the port";
    assert_eq!(changes, [result("a", 5000, Err(reason))]);
    assert_eq!(bench.planner.due(), None);
    bench.announce(&[3000], &[], true);
    assert_eq!(bench.step(), (vec![], vec![]), "it is forwarded already");
    bench.announce(&[5000], &[], false);
    bench.listen(1, &[row(5000, "127.0.0.1", 9)], &[]);
    assert_eq!(bench.step(), (vec![open(3, 1, 5000)], vec![]));
    bench.failed(3, 5000);
    let (_, changes) = bench.step();
    assert!(
        matches!(changes.as_slice(), [Change::Result { result, .. }] if result.result.is_err()),
        "{changes:?}"
    );
}

#[test]
fn announced_ports_move_to_the_present_upstream() {
    let mut bench = Bench::serving(3000);
    assert_eq!(bench.planner.container_entered(&name("a"), 9), Admission::Add(UpstreamId(2)));
    assert_eq!(bench.planner.dialled(&name("a")), None);
    assert_eq!(bench.commands(), [remove(1)], "open connections may finish");
    bench.listen(2, &[row(3000, "127.0.0.1", 7)], &[]);
    assert_eq!(bench.commands(), []);
    bench.closed(1);
    assert_eq!(bench.commands(), [open(2, 2, 3000)]);
    bench.opened(2, 3000);
    assert_eq!(bench.step(), (vec![], vec![]), "it was not announced again");
    bench.planner.container_lost(&name("a"));
    assert!(bench.planner.dial(&name("a")).is_some());
    assert_eq!(bench.step(), (vec![remove(2)], vec![]));
    bench.closed(2);
    assert_eq!(bench.step(), (vec![dial(3, 3, 3000)], vec![]));
    bench.opened(3, 3000);
    assert_eq!(bench.step(), (vec![], vec![]));
}

#[test]
fn dialled_upstream_removed_by_the_engine_is_added_again() {
    let mut bench = Bench::serving(3000);
    let changes = bench
        .on_engine_event(&Event::UpstreamRemoved { upstream: UpstreamId(1), reason: Some("x".to_owned()) });
    let lost = Change::Lost { name: name("a"), dialled: true, reason: "x".to_owned() };
    assert_eq!(changes, [closed_change("a", 3000, ClosedReason::HostError), lost]);
    assert!(bench.planner.dial(&name("a")).is_some());
    assert_eq!(bench.step(), (vec![dial(2, 2, 3000)], vec![]));
}

#[test]
fn upgraded_engine_opens_ports_it_was_not_lent() {
    let mut bench = Bench::serving(3000);
    bench.announce(&[5173], &[], false);
    bench.step();
    assert_eq!(bench.planner.moved(&[UpstreamId(1)].into(), &[ForwardId(1)].into()), []);
    assert_eq!(bench.step(), (vec![dial(3, 1, 5173)], vec![]));
    bench.opened(3, 5173);
    assert_eq!(bench.step(), (vec![], vec![result("a", 5173, Ok(5173))]));
}
