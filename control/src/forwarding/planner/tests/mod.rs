use super::*;
use landfall_engine::command::{Ending, Event, ListenFailure, ListenFailureKind};

fn port(number: u16) -> NonZeroU16 {
    NonZeroU16::new(number).unwrap()
}

fn name(text: &str) -> ContainerName {
    ContainerName::new(text).unwrap()
}

fn row(number: u16, address: &str, inode: u64) -> Listening {
    Listening { port: port(number), address: address.parse().unwrap(), inode, uid: 0 }
}

fn desired(text: &str, allow: Option<&str>) -> DesiredContainer {
    let allow = allow.map(|list| list.parse().unwrap());
    DesiredContainer {
        name: name(text),
        policy: Policy { allow, ..Policy::default() },
        published: BTreeMap::new(),
        native: false,
    }
}

const V4: Reach = Reach { v4: true, v6: false };

fn open(id: u32, upstream: u32, number: u16) -> Command {
    Command::OpenListener {
        forward: ForwardId(id),
        upstream: UpstreamId(upstream),
        host_port: port(number),
        target_port: port(number),
        reach: V4,
    }
}

fn close(id: u32) -> Command {
    Command::CloseListener { forward: ForwardId(id), ending: Ending::Drain }
}

fn remove(id: u32) -> Command {
    Command::RemoveUpstream { upstream: UpstreamId(id), ending: Ending::Drain }
}

fn held(id: u32, upstream: u32, number: u16) -> ForwardState {
    ForwardState {
        forward: ForwardId(id),
        upstream: UpstreamId(upstream),
        host_port: port(number),
        target_port: port(number),
        reach: V4,
        listening: true,
        stats: ForwardStats::default(),
    }
}

/// Asserts that another step yields nothing, and that a step which plans every container yields nothing either.
fn assert_idle(planner: &mut Planner, now: Instant) {
    assert_eq!(planner.step(now), (vec![], vec![]), "a step after a step is idle");
    let mut all = planner.clone();
    all.mark_all();
    assert_eq!(all.step(now), (vec![], vec![]), "a container was not marked");
    // A superfluous due time only costs a plan.
    let is_noted = all.due().is_none_or(|due| planner.due().is_some_and(|noted| noted <= due));
    assert!(is_noted, "a time was not noted: {:?}, {:?}", all.due(), planner.due());
}

/// A planner without an engine, and a clock.
struct Bench {
    planner: Planner,
    now: Instant,
}

impl Bench {
    fn new(desired_containers: Vec<DesiredContainer>) -> Bench {
        let mut planner = Planner::new(ControlPorts::default());
        planner.desired(desired_containers);
        Bench { planner, now: Instant::now() }
    }

    /// A bench whose containers are upstreams 1, 2 and so on, in this order, with the same cookies and without
    /// listeners.
    fn with_entered(names: &[&str]) -> Bench {
        let mut bench = Bench::new(names.iter().map(|text| desired(text, None)).collect());
        for (number, text) in (1..).zip(names) {
            let added = bench.planner.container_entered(&name(text), u64::from(number));
            assert_eq!(added, Admission::Add(UpstreamId(number)));
            bench.listen(number, &[], &[]);
        }
        bench
    }

    fn listen(&mut self, upstream: u32, opened: &[Listening], closed: &[Listening]) {
        let (opened, closed) = (opened.to_vec(), closed.to_vec());
        let changes =
            self.on_engine_event(&Event::Listeners { upstream: UpstreamId(upstream), opened, closed });
        assert_eq!(changes, []);
    }

    fn on_engine_event(&mut self, event: &Event) -> Vec<Change> {
        self.planner.on_engine_event(event, self.now)
    }

    fn commands(&mut self) -> Vec<Command> {
        let (commands, changes) = self.planner.step(self.now);
        assert_eq!(changes, []);
        self.is_idle();
        commands
    }

    /// Asserts that the planner is idle.
    fn is_idle(&mut self) {
        assert_idle(&mut self.planner, self.now);
    }

    fn opened(&mut self, id: u32, number: u16) -> Vec<Change> {
        self.on_engine_event(&Event::ListenerOpened { forward: ForwardId(id), host_port: port(number) })
    }

    fn closed(&mut self, id: u32) -> Vec<Change> {
        self.on_engine_event(&Event::ListenerClosed {
            forward: ForwardId(id),
            stats: ForwardStats::default(),
        })
    }

    fn failed(&mut self, id: u32, number: u16) -> Vec<Change> {
        let failure = ListenFailure {
            kind: ListenFailureKind::Taken,
            address: format!("127.0.0.1:{number}").parse().unwrap(),
            detail: "EADDRINUSE: address already in use".to_owned(),
        };
        self.on_engine_event(&Event::ListenerFailed {
            forward: ForwardId(id),
            host_port: port(number),
            failure,
        })
    }

    fn states(&self, text: &str) -> Vec<(u16, RowState)> {
        self.planner.rows(&name(text)).listed.into_iter().map(|row| (row.port.get(), row.state)).collect()
    }
}

use crate::model::forward_table::RowState;

fn opened_change(text: &str, number: u16, bind: &'static str) -> Change {
    Change::Opened { name: name(text), port: port(number), host_port: port(number), bind }
}

fn closed_change(text: &str, number: u16, why: ClosedReason) -> Change {
    Change::Closed { name: name(text), port: port(number), host_port: port(number), why }
}

#[test]
fn server_is_opened_and_closed_after_lingering() {
    let mut bench = Bench::with_entered(&["a"]);
    bench.listen(1, &[row(3000, "127.0.0.1", 7)], &[]);
    assert_eq!(bench.commands(), [open(1, 1, 3000)]);
    assert_eq!(bench.states("a"), [(3000, RowState::Opening)]);
    assert_eq!(bench.opened(1, 3000), [opened_change("a", 3000, "127.0.0.1")]);
    assert_eq!(bench.opened(1, 3000), []);
    bench.listen(1, &[], &[row(3000, "127.0.0.1", 7)]);
    assert_eq!(bench.commands(), []);
    assert_eq!(bench.planner.due(), Some(bench.now + LINGER));
    bench.now += LINGER;
    assert_eq!(bench.commands(), [close(1)]);
    assert_eq!(bench.planner.due(), None);
    assert_eq!(bench.states("a"), [(3000, RowState::Closing)]);
    assert_eq!(bench.closed(1), [closed_change("a", 3000, ClosedReason::ContainerReleased)]);
    assert_eq!(bench.closed(1), []);
    assert_eq!(bench.states("a"), []);
}

#[test]
fn bind_address_is_every_address_unless_one_is_loopback() {
    let mut bench = Bench::with_entered(&["a"]);
    bench.listen(1, &[row(3000, "0.0.0.0", 7), row(5173, "0.0.0.0", 8), row(5173, "::1", 9)], &[]);
    bench.commands();
    let bind = |changes: Vec<Change>| match changes.as_slice() {
        [Change::Opened { bind, .. }] => *bind,
        other => panic!("{other:?}"),
    };
    assert_eq!(bind(bench.opened(1, 3000)), "0.0.0.0");
    assert_eq!(bind(bench.opened(2, 5173)), "127.0.0.1");
}

#[test]
fn listeners_of_one_port_share_a_forward_and_update_its_reach() {
    let mut bench = Bench::with_entered(&["a"]);
    bench.listen(1, &[row(3000, "127.0.0.1", 7), row(3000, "127.0.0.1", 8)], &[]);
    assert_eq!(bench.commands(), [open(1, 1, 3000)]);
    bench.listen(1, &[row(3000, "::", 9)], &[]);
    let reach = Reach { v4: true, v6: true };
    assert_eq!(bench.commands(), [Command::SetReach { forward: ForwardId(1), reach }]);
}

#[test]
fn reopened_port_waits_until_its_forward_is_closed() {
    let mut bench = Bench::with_entered(&["a"]);
    bench.listen(1, &[row(3000, "127.0.0.1", 7)], &[]);
    bench.commands();
    bench.listen(1, &[], &[row(3000, "127.0.0.1", 7)]);
    bench.commands();
    bench.now += LINGER;
    assert_eq!(bench.commands(), [close(1)]);
    bench.listen(1, &[row(3000, "127.0.0.1", 8)], &[]);
    assert_eq!(bench.commands(), []);
    assert_eq!(bench.opened(1, 3000), [], "it is closing, so its opening is not reported");
    bench.closed(1);
    assert_eq!(bench.commands(), [open(2, 1, 3000)]);
}

#[test]
fn restarted_server_keeps_its_port() {
    let mut bench = Bench::with_entered(&["a"]);
    bench.listen(1, &[row(3000, "127.0.0.1", 7)], &[]);
    bench.commands();
    bench.opened(1, 3000);
    for inode in 8..12 {
        bench.listen(1, &[], &[row(3000, "127.0.0.1", inode - 1)]);
        assert_eq!(bench.commands(), []);
        bench.now += LINGER / 2;
        bench.listen(1, &[row(3000, "127.0.0.1", inode)], &[]);
        assert_eq!(bench.commands(), []);
        assert_eq!(bench.planner.due(), None);
        bench.now += LINGER;
        assert_eq!(bench.commands(), []);
    }
}

#[test]
fn first_of_two_containers_keeps_the_port_and_the_second_gets_it_next() {
    let mut bench = Bench::with_entered(&["a", "b"]);
    bench.listen(2, &[row(3000, "127.0.0.1", 7)], &[]);
    assert_eq!(bench.commands(), [open(1, 2, 3000)]);
    bench.opened(1, 3000);
    bench.listen(1, &[row(3000, "127.0.0.1", 8)], &[]);
    let (commands, changes) = bench.planner.step(bench.now);
    assert_eq!(commands, []);
    let [Change::Failed { name: second, reason, .. }] = changes.as_slice() else { panic!("{changes:?}") };
    assert_eq!(second, &name("a"));
    assert!(reason.contains("EADDRINUSE") && reason.contains("\"b\""), "{reason}");
    assert_eq!(bench.commands(), []);
    assert_eq!(bench.states("a"), [(3000, RowState::Failed)]);

    bench.planner.container_lost(&name("b"));
    assert_eq!(bench.commands(), [remove(2)]);
    assert_eq!(bench.commands(), [], "the port is not free yet");
    assert_eq!(bench.closed(1), [closed_change("b", 3000, ClosedReason::HostError)]);
    assert_eq!(bench.commands(), [open(2, 1, 3000)]);
}

#[test]
fn port_that_two_want_goes_to_the_one_registered_first() {
    let mut bench = Bench::with_entered(&["a", "b"]);
    bench.listen(2, &[row(3000, "127.0.0.1", 7)], &[]);
    bench.listen(1, &[row(3000, "127.0.0.1", 8)], &[]);
    let (commands, changes) = bench.planner.step(bench.now);
    assert_eq!(commands, [open(1, 1, 3000)]);
    assert!(matches!(changes.as_slice(), [Change::Failed { name: second, .. }] if *second == name("b")));
}

#[test]
fn port_in_use_on_the_host_is_reported_once_and_retried() {
    let mut bench = Bench::with_entered(&["a"]);
    bench.listen(1, &[row(3000, "127.0.0.1", 7)], &[]);
    bench.commands();
    let changes = bench.failed(1, 3000);
    assert!(
        matches!(changes.as_slice(), [Change::Failed { reason, .. }] if reason.contains("EADDRINUSE")),
        "{changes:?}"
    );
    assert_eq!(bench.commands(), []);
    assert_eq!(bench.planner.due(), Some(bench.now + RETRY));
    bench.now += RETRY;
    assert_eq!(bench.commands(), [open(2, 1, 3000)]);
    assert_eq!(bench.planner.due(), None, "it waits for the answer, not for the time");
    assert_eq!(bench.states("a"), [(3000, RowState::Failed)], "the row stays failed during a retry");
    assert_eq!(bench.failed(2, 3000), []);
    bench.now += RETRY;
    assert_eq!(bench.commands(), [open(3, 1, 3000)]);
    assert_eq!(bench.opened(3, 3000).len(), 1);
    bench.planner.container_lost(&name("a"));
    bench.commands();
    assert_eq!(bench.planner.due(), None);
}

#[test]
fn guard_precedes_every_policy() {
    let mut bench = Bench::new(vec![desired("a", Some("80,443,8973,8974,*"))]);
    bench.planner.container_entered(&name("a"), 1);
    let ports = [22, 80, 8973, 8974, 8976];
    bench.listen(1, &ports.map(|number| row(number, "127.0.0.1", u64::from(number))), &[]);
    assert_eq!(bench.commands(), [open(1, 1, 80), open(2, 1, 8976)]);
    let denied: Vec<u16> = bench
        .states("a")
        .into_iter()
        .filter(|(_, state)| *state == RowState::Denied)
        .map(|(number, _)| number)
        .collect();
    assert_eq!(denied, [22, 8973, 8974]);
}

#[test]
fn quota_limits_ports_and_keeps_open_ones() {
    let mut bench = Bench::with_entered(&["a"]);
    bench.listen(1, &[row(60_000, "127.0.0.1", 1)], &[]);
    bench.commands();
    bench.opened(1, 60_000);
    let many: Vec<Listening> =
        (2000..2400).map(|number| row(number, "127.0.0.1", u64::from(number))).collect();
    bench.listen(1, &many, &[]);
    assert_eq!(bench.commands().len(), FORWARDS_MAX - 1);
    let states = bench.states("a");
    assert!(states.contains(&(60_000, RowState::Open)));
    assert_eq!(states.iter().filter(|(_, state)| *state == RowState::Denied).count(), 401 - FORWARDS_MAX);
}

#[test]
fn changed_policy_closes_at_once_and_deregistration_removes_the_upstream() {
    let mut bench = Bench::with_entered(&["a"]);
    bench.listen(1, &[row(3000, "127.0.0.1", 7), row(5173, "127.0.0.1", 8)], &[]);
    bench.commands();
    bench.opened(1, 3000);
    bench.opened(2, 5173);
    bench.planner.desired(vec![desired("a", Some("5173"))]);
    assert_eq!(bench.commands(), [close(1)]);
    bench.closed(1);
    bench.planner.desired(vec![]);
    assert_eq!(bench.commands(), [remove(1)]);
    assert_eq!(bench.closed(2), [closed_change("a", 5173, ClosedReason::Deregistered)]);
    assert_eq!(bench.on_engine_event(&Event::UpstreamRemoved { upstream: UpstreamId(1), reason: None }), []);
    assert_eq!(bench.planner.container_entered(&name("a"), 1), Admission::Unwanted);
}

#[test]
fn earlier_drivers_upstream_is_claimed_by_its_cookie_and_ids_continue_above() {
    let mut bench = Bench::new(vec![desired("a", None), desired("b", None)]);
    let upstreams = [(7, 70), (8, 80)]
        .map(|(id, netns_cookie)| UpstreamState { upstream: UpstreamId(id), netns_cookie })
        .to_vec();
    let drains = ForwardState { listening: false, ..held(40, 7, 3000) };
    let forwards = vec![held(20, 7, 3000), held(21, 7, 4000), held(30, 8, 5000), drains];
    let observed = [(UpstreamId(7), vec![row(3000, "127.0.0.1", 1)])].into();
    bench.planner.attach(Inventory { upstreams, forwards, observed });
    assert_eq!(bench.commands(), [], "nothing is removed before the sweep");
    assert_eq!(bench.planner.container_entered(&name("a"), 70), Admission::Known(UpstreamId(7)));
    assert_eq!(bench.planner.container_entered(&name("a"), 70), Admission::Known(UpstreamId(7)));
    assert_eq!(bench.states("a"), [(3000, RowState::Open), (4000, RowState::Open)]);
    assert_eq!(bench.planner.container_entered(&name("b"), 90), Admission::Add(UpstreamId(9)));
    assert_eq!(bench.commands(), []);
    bench.now += LINGER;
    assert_eq!(bench.commands(), [close(21)], "it has no listener");
    assert_eq!(bench.closed(21), [closed_change("a", 4000, ClosedReason::ContainerReleased)]);

    bench.listen(9, &[row(5000, "127.0.0.1", 2)], &[]);
    assert_eq!(bench.commands(), [], "no container has claimed the port.s upstream");
    assert_eq!(bench.states("b"), [(5000, RowState::Opening)]);
    bench.planner.sweep();
    assert_eq!(bench.commands(), [remove(8)]);
    assert_eq!(bench.closed(30), [], "no container has claimed it");
    assert_eq!(bench.commands(), [open(41, 9, 5000)]);
}

#[test]
fn unread_namespace_keeps_its_forwards() {
    let mut bench = Bench::new(vec![desired("a", None)]);
    let upstreams = vec![UpstreamState { upstream: UpstreamId(1), netns_cookie: 5 }];
    let inventory = Inventory { upstreams, forwards: vec![held(1, 1, 3000)], observed: BTreeMap::new() };
    bench.planner.attach(inventory);
    bench.planner.container_entered(&name("a"), 5);
    bench.now += 2 * LINGER;
    assert_eq!(bench.commands(), []);
    assert_eq!(bench.planner.due(), None);
}

#[test]
fn second_container_of_a_namespace_is_refused() {
    let mut bench = Bench::with_entered(&["a", "b"]);
    bench.planner.container_lost(&name("b"));
    bench.commands();
    assert_eq!(bench.planner.container_entered(&name("b"), 1), Admission::Shared(name("a")));
    bench.planner.container_lost(&name("a"));
    assert_eq!(bench.planner.container_entered(&name("b"), 1), Admission::Add(UpstreamId(3)));
}

#[test]
fn restarted_container_is_another_namespace() {
    let mut bench = Bench::with_entered(&["a"]);
    bench.listen(1, &[row(3000, "127.0.0.1", 7)], &[]);
    bench.commands();
    bench.opened(1, 3000);
    assert_eq!(bench.planner.container_entered(&name("a"), 100), Admission::Add(UpstreamId(2)));
    assert_eq!(bench.commands(), [remove(1)]);
    bench.listen(2, &[row(3000, "127.0.0.1", 9)], &[]);
    assert_eq!(bench.commands(), []);
    assert_eq!(bench.closed(1).len(), 1);
    assert_eq!(bench.commands(), [open(2, 2, 3000)]);
}

#[test]
fn lost_engine_closes_every_forward_and_ids_are_not_reused() {
    let mut bench = Bench::with_entered(&["a"]);
    bench.listen(1, &[row(3000, "127.0.0.1", 7)], &[]);
    bench.commands();
    bench.opened(1, 3000);
    assert_eq!(bench.planner.detach(), [closed_change("a", 3000, ClosedReason::HostError)]);
    assert_eq!(bench.commands(), []);
    bench.planner.attach(Inventory::default());
    assert_eq!(bench.planner.container_entered(&name("a"), 1), Admission::Add(UpstreamId(2)));
    bench.listen(2, &[row(3000, "127.0.0.1", 7)], &[]);
    assert_eq!(bench.commands(), [open(2, 2, 3000)]);
    assert_eq!((bench.commands(), bench.planner.due()), (vec![], None));
}

/// Containers "a" and "b" want port 3000, "b" had it, and the engine was lost. "a" is entered first by the next engine.
fn lost_engine_bench() -> Bench {
    let mut bench = Bench::with_entered(&["a", "b"]);
    bench.listen(2, &[row(3000, "127.0.0.1", 7)], &[]);
    bench.commands();
    bench.opened(1, 3000);
    bench.planner.detach();
    bench.planner.attach(Inventory::default());
    bench.planner.container_entered(&name("a"), 1);
    bench.listen(3, &[row(3000, "127.0.0.1", 8)], &[]);
    let (commands, changes) = bench.planner.step(bench.now);
    assert_eq!(commands, []);
    assert!(matches!(changes.as_slice(), [Change::Failed { name: second, .. }] if *second == name("a")));
    assert_eq!(bench.commands(), []);
    bench
}

#[test]
fn port_of_a_lost_engine_is_held_for_its_container() {
    let mut bench = lost_engine_bench();
    bench.planner.container_entered(&name("b"), 2);
    bench.listen(4, &[row(3000, "127.0.0.1", 7)], &[]);
    assert_eq!(bench.commands(), [open(2, 4, 3000)]);
    bench.opened(2, 3000);
    assert_eq!((bench.commands(), bench.planner.due()), (vec![], None));
}

#[test]
fn hold_ends_if_its_container_does_not_want_the_port_or_does_not_come() {
    let mut bench = lost_engine_bench();
    bench.planner.container_entered(&name("b"), 2);
    bench.listen(4, &[], &[]);
    assert_eq!(bench.commands(), [open(2, 3, 3000)]);

    let mut bench = lost_engine_bench();
    assert_eq!(bench.planner.due(), Some(bench.now + PORT_HOLD));
    bench.now += PORT_HOLD;
    assert_eq!(bench.commands(), [open(2, 3, 3000)]);

    let mut bench = lost_engine_bench();
    bench.planner.desired(vec![desired("a", None)]);
    assert_eq!(bench.commands(), [open(2, 3, 3000)]);
}

#[test]
fn upstream_removed_by_the_engine_is_reported() {
    let mut bench = Bench::with_entered(&["a"]);
    let changes = bench.on_engine_event(&Event::UpstreamRemoved {
        upstream: UpstreamId(1),
        reason: Some("it ended".to_owned()),
    });
    assert_eq!(changes, [Change::Lost { name: name("a"), dialled: false, reason: "it ended".to_owned() }]);
    assert_eq!(bench.planner.container_entered(&name("a"), 1), Admission::Add(UpstreamId(2)));
}

#[test]
fn stopped_engine_closes_its_ports_as_broker_stopped() {
    let mut bench = Bench::with_entered(&["a"]);
    bench.listen(1, &[row(3000, "127.0.0.1", 7)], &[]);
    bench.commands();
    bench.opened(1, 3000);
    bench.planner.stop();
    assert_eq!(bench.closed(1), [closed_change("a", 3000, ClosedReason::BrokerStopped)]);
}

#[test]
fn observation_in_parts_replaces_the_earlier_one() {
    let mut bench = Bench::with_entered(&["a"]);
    bench.listen(1, &[row(3000, "127.0.0.1", 7)], &[]);
    assert_eq!(bench.commands(), [open(1, 1, 3000)]);
    for (number, more) in [(4000, true), (5000, false)] {
        let listening = vec![row(number, "127.0.0.1", 8)];
        bench.on_engine_event(&Event::Observed { upstream: UpstreamId(1), listening, more });
    }
    assert_eq!(bench.commands(), [open(2, 1, 4000), open(3, 1, 5000)]);
    bench.now += LINGER;
    assert_eq!(bench.commands(), [close(1)]);
}

#[test]
fn upgraded_engine_takes_over_lent_forwards() {
    let mut bench = Bench::with_entered(&["a"]);
    bench.listen(1, &[row(3000, "127.0.0.1", 7), row(4000, "127.0.0.1", 8)], &[]);
    bench.commands();
    bench.opened(1, 3000);
    bench.opened(2, 4000);
    assert!(bench.planner.is_open(ForwardId(1)));
    let changes = bench.planner.moved(&[UpstreamId(1)].into(), &[ForwardId(1)].into());
    assert_eq!(changes, [closed_change("a", 4000, ClosedReason::HostError)]);
    bench.now += 2 * LINGER;
    assert_eq!(bench.commands(), [], "the listeners are not known yet");
    bench.listen(1, &[row(3000, "127.0.0.1", 7), row(4000, "127.0.0.1", 8)], &[]);
    assert_eq!(bench.commands(), [open(3, 1, 4000)]);
}

mod announced;
mod cost;
mod model;
mod natives;
mod reserved;

#[test]
fn published_port_is_left_to_docker_and_shown_at_its_host_port() {
    let published =
        BTreeMap::from([(port(3000), port(13_000)), (port(80), port(8080)), (port(4000), port(4000))]);
    let shop = DesiredContainer { published, ..desired("shop", Some("3000-4001")) };
    let mut bench = Bench::new(vec![shop.clone()]);
    bench.planner.container_entered(&name("shop"), 1);
    bench.listen(
        1,
        &[row(3000, "0.0.0.0", 1), row(80, "0.0.0.0", 2), row(4000, "127.0.0.1", 3), row(4001, "0.0.0.0", 4)],
        &[],
    );
    assert_eq!(bench.commands(), [open(1, 1, 4001)]);
    let rows = bench.planner.rows(&name("shop")).listed;
    let changes: Vec<_> = rows.iter().map(|row| (row.port.get(), row.host_port.get(), row.state)).collect();
    let published = RowState::Published;
    assert_eq!(
        changes,
        [
            (80, 8080, published),
            (3000, 13_000, published),
            (4000, 4000, published),
            (4001, 4001, RowState::Opening)
        ]
    );
    let reasons: Vec<_> = rows.iter().filter_map(|row| row.reason.as_deref()).collect();
    assert_eq!(reasons[0], "Docker publishes it");
    assert!(reasons[2].contains("loopback"), "{reasons:?}");

    // A port that is no longer published is forwarded, and a forward whose port is now published closes.
    let published = BTreeMap::from([(port(4001), port(4001))]);
    bench.planner.desired(vec![DesiredContainer { published, ..shop }]);
    assert_eq!(bench.commands(), [close(1), open(2, 1, 3000), open(3, 1, 4000)]);
}

#[test]
fn renamed_container_keeps_its_forwards() {
    let mut bench = Bench::with_entered(&["a"]);
    bench.listen(1, &[row(3000, "127.0.0.1", 1), row(3001, "127.0.0.1", 2)], &[]);
    assert_eq!(bench.commands(), [open(1, 1, 3000), open(2, 1, 3001)]);
    bench.opened(1, 3000);
    bench.failed(2, 3001);
    let why = ClosedReason::Deregistered;
    let closed = Change::Closed { name: name("a"), port: port(3000), host_port: port(3000), why };
    assert_eq!(
        bench.planner.renamed(&name("a"), &name("b")),
        [closed, opened_change("b", 3000, "127.0.0.1")]
    );
    bench.planner.desired(vec![desired("b", None)]);
    assert_eq!(bench.commands(), [], "no forward closes, and the failed port is not tried at once");
    assert_eq!(bench.states("b"), [(3000, RowState::Open), (3001, RowState::Failed)]);
    assert_eq!(bench.planner.container_entered(&name("b"), 1), Admission::Known(UpstreamId(1)));
    // The same holds while both names are registered.
    assert_eq!(bench.planner.container_entered(&name("a"), 1), Admission::Unwanted);
    bench.planner.container_lost(&name("a"));
    assert_eq!(bench.commands(), []);
    bench.planner.container_lost(&name("b"));
    assert_eq!(bench.commands(), [remove(1)]);
}
