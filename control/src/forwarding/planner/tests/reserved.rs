//! Ports that a container reserves.

use super::announced::{dial, result};
use super::*;

/// The command for target 4848 at a host port.
fn open_at(id: u32, upstream: u32, number: u16) -> Command {
    Command::OpenListener {
        forward: ForwardId(id),
        upstream: UpstreamId(upstream),
        host_port: port(number),
        target_port: port(4848),
        reach: Reach::UNKNOWN,
    }
}

fn failed(changes: &[Change]) -> String {
    match changes.first() {
        Some(Change::Failed { name: who, port: target, reason }) => {
            assert_eq!((who, *target), (&name("a"), port(4848)));
            reason.clone()
        }
        other => panic!("{other:?}"),
    }
}

fn refused(reason: &str) -> Change {
    result("a", 4848, Err(reason))
}

fn opened_at(number: u16) -> Change {
    Change::Opened { name: name("a"), port: port(4848), host_port: port(number), bind: "127.0.0.1" }
}

fn closed_at(number: u16, why: ClosedReason) -> Change {
    Change::Closed { name: name("a"), port: port(4848), host_port: port(number), why }
}

impl Bench {
    fn reserve(&mut self, candidates: &[u16]) -> Vec<Change> {
        let candidates = candidates.iter().map(|number| port(*number)).collect();
        self.planner.reserve(&name("a"), port(4848), candidates)
    }

    /// Container "a" over its session, with 4848 reserved at 4849.
    fn reserved() -> Bench {
        let mut bench = Bench::dialled(None);
        assert_eq!(bench.reserve(&[4849]), []);
        assert_eq!(bench.step(), (vec![open_at(1, 1, 4849)], vec![]));
        assert_eq!(bench.opened(1, 4849), [opened_at(4849), result("a", 4848, Ok(4849))]);
        assert_eq!(bench.step(), (vec![], vec![]));
        bench
    }

    fn host_ports(&self) -> Vec<(u16, u16, RowState)> {
        let rows = self.planner.rows(&name("a")).listed.into_iter();
        rows.map(|row| (row.port.get(), row.host_port.get(), row.state)).collect()
    }
}

#[test]
fn first_candidate_that_binds_is_held() {
    let mut bench = Bench::dialled(None);
    assert_eq!(bench.reserve(&[4848, 4849, 4850]), []);
    assert_eq!(bench.step(), (vec![open_at(1, 1, 4848)], vec![]));
    assert_eq!(bench.failed(1, 4848), [], "no change before the last one fails");
    assert_eq!(bench.step(), (vec![open_at(2, 1, 4849)], vec![]));
    assert_eq!(bench.opened(2, 4849), [opened_at(4849), result("a", 4848, Ok(4849))]);
    assert_eq!(bench.host_ports(), [(4848, 4849, RowState::Open)]);
    assert_eq!(bench.planner.open_ports(&name("a")), [port(4849)]);
    assert_eq!(bench.reserve(&[5000]), [result("a", 4848, Ok(4849))], "it is reserved already");
    assert_eq!((bench.step(), bench.planner.due()), ((vec![], vec![]), None));
}

#[test]
fn last_error_is_reported_if_no_candidate_binds() {
    let mut bench = Bench::serving(4848);
    bench.reserve(&[4849, 4850]);
    assert_eq!(bench.step(), (vec![close(1)], vec![]), "the automatic forward closes first");
    assert_eq!(bench.closed(1), [closed_change("a", 4848, ClosedReason::ContainerReleased)]);
    assert_eq!(bench.step(), (vec![open_at(2, 1, 4849)], vec![]));
    bench.failed(2, 4849);
    bench.step();
    bench.failed(3, 4850);
    let (commands, changes) = bench.step();
    assert_eq!(commands, [dial(4, 1, 4848)], "the announced port still listens");
    let reason = failed(&changes);
    assert!(reason.starts_with("EADDRINUSE") && reason.contains("4850"), "{reason}");
    assert_eq!(changes[1..], [refused(&reason)]);
    bench.opened(4, 4848);
    assert_eq!(bench.step(), (vec![], vec![]), "its announcement was answered before");
}

#[test]
fn request_without_candidates_fails() {
    let mut bench = Bench::serving(4848);
    bench.reserve(&[]);
    let (commands, changes) = bench.step();
    assert_eq!(commands, []);
    assert_eq!(failed(&changes), "no host candidates");
    assert_eq!(changes[1..], [refused("no host candidates")]);
}

#[test]
fn refused_target_is_excluded_without_an_event() {
    let mut bench = Bench::dialled(Some("5173"));
    bench.reserve(&[4849]);
    assert_eq!(bench.step(), (vec![], vec![refused("policy excluded")]));
    let mut bench = Bench::dialled(None);
    bench.planner.reserve(&name("a"), port(8973), vec![port(4849)]);
    assert_eq!(bench.step(), (vec![], vec![result("a", 8973, Err("policy excluded"))]));
}

#[test]
fn port_below_1024_may_be_reserved_at_a_higher_host_port() {
    let mut bench = Bench::dialled(None);
    bench.planner.reserve(&name("a"), port(80), vec![port(80), port(8080)]);
    let (commands, _) = bench.step();
    assert!(
        matches!(commands.as_slice(), [Command::OpenListener { host_port, .. }] if host_port.get() == 8080)
    );
}

#[test]
fn c23_candidate_that_the_policy_refuses_is_skipped() {
    for (lists, candidate) in [
        ((None, None), 80),
        ((None, None), 8973),
        ((None, None), 8974),
        ((None, None), 8788),
        ((None, Some("5432")), 5432),
        ((Some("4848,4849"), None), 5432),
    ] {
        let mut bench = Bench::serving(4848);
        let list = |text: Option<&str>| text.map(|text| text.parse().unwrap());
        let policy = Policy { allow: list(lists.0), deny: list(lists.1).unwrap_or_default() };
        bench.planner.desired(vec![DesiredContainer { policy, ..desired("a", None) }]);
        bench.reserve(&[candidate]);
        assert_eq!(
            bench.step(),
            (vec![], vec![refused("policy excluded")]),
            "{candidate}: its forward stays"
        );
        bench.reserve(&[candidate, 4849]);
        bench.step();
        bench.closed(1);
        assert_eq!(bench.step(), (vec![open_at(2, 1, 4849)], vec![]), "{candidate}");
    }
}

#[test]
fn candidate_below_1024_is_tried_if_the_policy_lists_it() {
    let mut bench = Bench::new(vec![desired("a", Some("80,*"))]);
    bench.planner.broker_up(&name("a"));
    bench.planner.dial(&name("a")).unwrap();
    bench.reserve(&[80]);
    assert_eq!(bench.step(), (vec![open_at(1, 1, 80)], vec![]));
}

#[test]
fn c23_container_reserves_at_most_16_ports() {
    let mut bench = Bench::dialled(None);
    let most = u16::try_from(RESERVED_MAX).unwrap();
    for target in 2000..2000 + most {
        assert_eq!(bench.planner.reserve(&name("a"), port(target), vec![port(target)]), []);
    }
    let over = bench.planner.reserve(&name("a"), port(4848), vec![port(4848)]);
    assert_eq!(over, [refused("policy excluded")]);
    assert_eq!(bench.step().0.len(), 16);
}

#[test]
fn candidate_that_another_forward_has_is_skipped() {
    let mut bench = Bench::serving(5173);
    bench.reserve(&[5173, 4849]);
    assert_eq!(bench.step(), (vec![open_at(2, 1, 4849)], vec![]));
    bench.opened(2, 4849);
    bench.announce(&[4849], &[], false);
    let (_, changes) = bench.step();
    let [Change::Failed { reason, .. }, _] = changes.as_slice() else { panic!("{changes:?}") };
    assert!(reason.starts_with("EADDRINUSE") && reason.contains("4848"), "{reason}");
}

#[test]
fn one_request_for_a_port_is_in_flight_and_the_latest_is_next() {
    let mut bench = Bench::dialled(None);
    bench.reserve(&[4849]);
    assert_eq!(bench.step().0, [open_at(1, 1, 4849)]);
    assert_eq!((bench.reserve(&[1]), bench.reserve(&[4850])), (vec![], vec![]));
    assert_eq!(bench.step(), (vec![], vec![]), "it waits for the one in flight");
    bench.failed(1, 4849);
    let (commands, changes) = bench.step();
    assert_eq!(commands, [open_at(2, 1, 4850)]);
    assert_eq!(changes.len(), 2, "{changes:?}");
    bench.reserve(&[4851]);
    let answers = bench.opened(2, 4850);
    assert_eq!(answers[0], opened_at(4850));
    assert_eq!(answers[1..], vec![result("a", 4848, Ok(4850)); 3], "each request is answered");
}

#[test]
fn c24_waiting_requests_for_one_port_are_bounded() {
    let mut bench = Bench::dialled(None);
    bench.reserve(&[4849]);
    bench.step();
    let refused = (0..1_000).filter(|_| !bench.reserve(&[4850]).is_empty()).count();
    assert_eq!(refused, 1_000 - 64);
    assert_eq!(bench.opened(1, 4849).len(), 1 + 1 + 64, "an event, and the results");
}

#[test]
fn announcement_of_a_reserved_port_is_ignored() {
    let mut bench = Bench::reserved();
    assert_eq!(bench.announce(&[4848], &[], true), []);
    assert_eq!(bench.step(), (vec![], vec![]));
    assert_eq!(bench.announce(&[], &[4848], false), []);
    assert_eq!(bench.step(), (vec![], vec![]));
    let mut bench = Bench::dialled(None);
    bench.reserve(&[4849]);
    bench.step();
    bench.announce(&[4848], &[], false);
    assert_eq!(bench.step(), (vec![], vec![]), "nor while the request is in flight");
}

#[test]
fn reserved_port_outlives_its_session_but_not_its_broker() {
    let mut bench = Bench::reserved();
    bench.planner.broker_down(&name("a"));
    assert_eq!(bench.step(), (vec![], vec![]));
    bench.planner.broker_up(&name("a"));
    assert_eq!(bench.reserve(&[4849]), [result("a", 4848, Ok(4849))], "the result is repeated");
    bench.planner.broker_stopped(&name("a"));
    let removed = Command::RemoveUpstream { upstream: UpstreamId(1), ending: Ending::Reset };
    assert_eq!(bench.step(), (vec![removed], vec![]));
    assert_eq!(bench.closed(1), [closed_at(4849, ClosedReason::BrokerStopped)]);
    assert_eq!(bench.host_ports(), []);
}

#[test]
fn reserved_port_bound_after_the_broker_stopped_is_closed() {
    let mut bench = Bench::with_entered(&["a"]);
    bench.planner.broker_up(&name("a"));
    bench.reserve(&[4849]);
    assert_eq!(bench.step(), (vec![open_at(1, 1, 4849)], vec![]));
    bench.planner.broker_stopped(&name("a"));
    let cut = Command::CloseListener { forward: ForwardId(1), ending: Ending::Reset };
    assert_eq!(bench.step(), (vec![cut], vec![]));
    assert_eq!((bench.opened(1, 4849), bench.closed(1)), (vec![], vec![]));
}

#[test]
fn reserved_port_is_retried_at_the_same_host_port_until_it_is_open() {
    let mut bench = Bench::reserved();
    assert_eq!(bench.planner.detach(), [closed_at(4849, ClosedReason::HostError)]);
    assert_eq!(bench.host_ports(), [(4848, 4849, RowState::Opening)]);
    bench.planner.attach(Inventory::default());
    bench.planner.dial(&name("a")).unwrap();
    assert_eq!(bench.step(), (vec![open_at(2, 2, 4849)], vec![]));
    assert!(failed(&bench.failed(2, 4849)).starts_with("EADDRINUSE"));
    assert_eq!(bench.host_ports(), [(4848, 4849, RowState::Failed)]);
    assert_eq!(bench.step(), (vec![], vec![]));
    assert_eq!(bench.planner.due(), Some(bench.now + RETRY));
    bench.now += RETRY;
    assert_eq!(bench.step(), (vec![open_at(3, 2, 4849)], vec![]));
    assert_eq!(bench.failed(3, 4849), [], "it is reported once");
    bench.now += RETRY;
    bench.step();
    assert_eq!(bench.opened(4, 4849), [opened_at(4849)], "there was no other request");
    assert_eq!((bench.step(), bench.planner.due()), ((vec![], vec![]), None));
}

#[test]
fn port_of_an_entered_container_can_be_reserved() {
    let mut bench = Bench::with_entered(&["a"]);
    bench.listen(1, &[row(4848, "127.0.0.1", 7)], &[]);
    bench.commands();
    bench.opened(1, 4848);
    bench.planner.broker_up(&name("a"));
    bench.reserve(&[4848, 4849]);
    assert_eq!(bench.step(), (vec![close(1)], vec![]));
    bench.closed(1);
    assert_eq!(bench.step(), (vec![open_at(2, 1, 4848)], vec![]));
    bench.opened(2, 4848);
    bench.listen(1, &[], &[row(4848, "127.0.0.1", 7)]);
    bench.now += LINGER;
    assert_eq!((bench.step(), bench.planner.due()), ((vec![], vec![]), None), "no listener is needed");
    bench.planner.broker_stopped(&name("a"));
    bench.step();
    assert_eq!(bench.closed(2), [closed_at(4848, ClosedReason::BrokerStopped)]);
}

#[test]
fn reserved_port_moves_to_the_present_upstream() {
    let mut bench = Bench::reserved();
    bench.planner.container_entered(&name("a"), 9);
    assert_eq!(bench.step(), (vec![remove(1)], vec![]));
    bench.closed(1);
    assert_eq!(bench.step(), (vec![], vec![]), "the engine may not have the new upstream yet");
    bench.listen(2, &[], &[]);
    assert_eq!(bench.step(), (vec![open_at(2, 2, 4849)], vec![]));
    bench.opened(2, 4849);
    bench.planner.broker_down(&name("a"));
    bench.planner.container_lost(&name("a"));
    assert!(bench.planner.dial(&name("a")).is_some(), "it is held without a session");
    bench.step();
    bench.closed(2);
    assert_eq!(bench.step(), (vec![open_at(3, 3, 4849)], vec![]));
}

#[test]
fn reservations_count_towards_the_quota() {
    let mut bench = Bench::dialled(None);
    let many: Vec<u16> = (2000..2000 + u16::try_from(FORWARDS_MAX).unwrap()).collect();
    bench.announce(&many, &[], true);
    bench.step();
    bench.reserve(&[4849]);
    assert_eq!(bench.step(), (vec![], vec![refused("policy excluded")]));
}
