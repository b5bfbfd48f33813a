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

/// A step after a step is idle, and so is one that plans every container, whatever it was marked for.
fn assert_idle(planner: &mut Planner, now: Instant) {
    assert_eq!(planner.step(now), (vec![], vec![]), "a step after a step is idle");
    let mut all = planner.clone();
    all.mark_all();
    assert_eq!(all.step(now), (vec![], vec![]), "a container was not marked");
    // A time that is noted and no longer needed costs a plan.
    let is_noted = all.due().is_none_or(|due| planner.due().is_some_and(|noted| noted <= due));
    assert!(is_noted, "a time was not noted: {:?}, {:?}", all.due(), planner.due());
}

/// A driver without an engine.
struct Bench {
    planner: Planner,
    now: Instant,
}

impl Bench {
    fn new(wishes: Vec<DesiredContainer>) -> Bench {
        let mut planner = Planner::new(ControlPorts::default());
        planner.desired(wishes);
        Bench { planner, now: Instant::now() }
    }

    /// A bench whose containers, in their order, are upstreams 1 and so on, with that cookie and nothing listening.
    fn reached(names: &[&str]) -> Bench {
        let mut bench = Bench::new(names.iter().map(|text| desired(text, None)).collect());
        for (number, text) in (1..).zip(names) {
            let added = bench.planner.reached(&name(text), u64::from(number));
            assert_eq!(added, Admission::Add(UpstreamId(number)));
            bench.listen(number, &[], &[]);
        }
        bench
    }

    fn listen(&mut self, upstream: u32, opened: &[Listening], closed: &[Listening]) {
        let (opened, closed) = (opened.to_vec(), closed.to_vec());
        let told = self.hear(&Event::Listeners { upstream: UpstreamId(upstream), opened, closed });
        assert_eq!(told, []);
    }

    fn hear(&mut self, event: &Event) -> Vec<Change> {
        self.planner.hear(event, self.now)
    }

    fn commands(&mut self) -> Vec<Command> {
        let (commands, changes) = self.planner.step(self.now);
        assert_eq!(changes, []);
        self.is_idle();
        commands
    }

    /// A step after a step is idle, and so is one that plans every container.
    fn is_idle(&mut self) {
        assert_idle(&mut self.planner, self.now);
    }

    fn opened(&mut self, id: u32, number: u16) -> Vec<Change> {
        self.hear(&Event::ListenerOpened { forward: ForwardId(id), host_port: port(number) })
    }

    fn closed(&mut self, id: u32) -> Vec<Change> {
        self.hear(&Event::ListenerClosed { forward: ForwardId(id), stats: ForwardStats::default() })
    }

    fn failed(&mut self, id: u32, number: u16) -> Vec<Change> {
        let failure = ListenFailure {
            kind: ListenFailureKind::Taken,
            address: format!("127.0.0.1:{number}").parse().unwrap(),
            detail: "EADDRINUSE: address already in use".to_owned(),
        };
        self.hear(&Event::ListenerFailed { forward: ForwardId(id), host_port: port(number), failure })
    }

    fn states(&self, text: &str) -> Vec<(u16, RowState)> {
        self.planner.rows(&name(text)).listed.into_iter().map(|row| (row.port.get(), row.state)).collect()
    }
}

use crate::model::forward_table::RowState;

fn told_opened(text: &str, number: u16, bind: &'static str) -> Change {
    Change::Opened { name: name(text), port: port(number), host_port: port(number), bind }
}

fn told_closed(text: &str, number: u16, why: ClosedReason) -> Change {
    Change::Closed { name: name(text), port: port(number), host_port: port(number), why }
}

#[test]
fn a_server_is_opened_and_closed_when_it_has_been_gone_for_a_moment() {
    let mut bench = Bench::reached(&["a"]);
    bench.listen(1, &[row(3000, "127.0.0.1", 7)], &[]);
    assert_eq!(bench.commands(), [open(1, 1, 3000)]);
    assert_eq!(bench.states("a"), [(3000, RowState::Opening)]);
    assert_eq!(bench.opened(1, 3000), [told_opened("a", 3000, "127.0.0.1")]);
    assert_eq!(bench.opened(1, 3000), []);
    bench.listen(1, &[], &[row(3000, "127.0.0.1", 7)]);
    assert_eq!(bench.commands(), []);
    assert_eq!(bench.planner.due(), Some(bench.now + LINGER));
    bench.now += LINGER;
    assert_eq!(bench.commands(), [close(1)]);
    assert_eq!(bench.planner.due(), None);
    assert_eq!(bench.states("a"), [(3000, RowState::Closing)]);
    assert_eq!(bench.closed(1), [told_closed("a", 3000, ClosedReason::ContainerReleased)]);
    assert_eq!(bench.closed(1), []);
    assert_eq!(bench.states("a"), []);
}

#[test]
fn a_port_is_said_to_listen_on_every_address_unless_one_is_loopback() {
    let mut bench = Bench::reached(&["a"]);
    bench.listen(1, &[row(3000, "0.0.0.0", 7), row(5173, "0.0.0.0", 8), row(5173, "::1", 9)], &[]);
    bench.commands();
    let bind = |told: Vec<Change>| match told.as_slice() {
        [Change::Opened { bind, .. }] => *bind,
        other => panic!("{other:?}"),
    };
    assert_eq!(bind(bench.opened(1, 3000)), "0.0.0.0");
    assert_eq!(bind(bench.opened(2, 5173)), "127.0.0.1");
}

#[test]
fn rows_of_one_port_make_one_listener_and_later_a_new_reach() {
    let mut bench = Bench::reached(&["a"]);
    bench.listen(1, &[row(3000, "127.0.0.1", 7), row(3000, "127.0.0.1", 8)], &[]);
    assert_eq!(bench.commands(), [open(1, 1, 3000)]);
    bench.listen(1, &[row(3000, "::", 9)], &[]);
    let reach = Reach { v4: true, v6: true };
    assert_eq!(bench.commands(), [Command::SetReach { forward: ForwardId(1), reach }]);
}

#[test]
fn a_port_that_comes_back_waits_until_its_forward_is_closed() {
    let mut bench = Bench::reached(&["a"]);
    bench.listen(1, &[row(3000, "127.0.0.1", 7)], &[]);
    bench.commands();
    bench.listen(1, &[], &[row(3000, "127.0.0.1", 7)]);
    bench.commands();
    bench.now += LINGER;
    assert_eq!(bench.commands(), [close(1)]);
    bench.listen(1, &[row(3000, "127.0.0.1", 8)], &[]);
    assert_eq!(bench.commands(), []);
    assert_eq!(bench.opened(1, 3000), [], "it is closing; nobody is told that it opened");
    bench.closed(1);
    assert_eq!(bench.commands(), [open(2, 1, 3000)]);
}

#[test]
fn a_server_that_restarts_keeps_its_port() {
    let mut bench = Bench::reached(&["a"]);
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
fn of_two_containers_the_first_keeps_the_port_and_the_second_follows() {
    let mut bench = Bench::reached(&["a", "b"]);
    bench.listen(2, &[row(3000, "127.0.0.1", 7)], &[]);
    assert_eq!(bench.commands(), [open(1, 2, 3000)]);
    bench.opened(1, 3000);
    bench.listen(1, &[row(3000, "127.0.0.1", 8)], &[]);
    let (commands, told) = bench.planner.step(bench.now);
    assert_eq!(commands, []);
    let [Change::Failed { name: second, reason, .. }] = told.as_slice() else { panic!("{told:?}") };
    assert_eq!(second, &name("a"));
    assert!(reason.contains("EADDRINUSE") && reason.contains("\"b\""), "{reason}");
    assert_eq!(bench.commands(), []);
    assert_eq!(bench.states("a"), [(3000, RowState::Failed)]);

    bench.planner.left(&name("b"));
    assert_eq!(bench.commands(), [remove(2)]);
    assert_eq!(bench.commands(), [], "the port is not free yet");
    assert_eq!(bench.closed(1), [told_closed("b", 3000, ClosedReason::HostError)]);
    assert_eq!(bench.commands(), [open(2, 1, 3000)]);
}

#[test]
fn a_port_that_two_want_at_once_goes_to_who_registered_first() {
    let mut bench = Bench::reached(&["a", "b"]);
    bench.listen(2, &[row(3000, "127.0.0.1", 7)], &[]);
    bench.listen(1, &[row(3000, "127.0.0.1", 8)], &[]);
    let (commands, told) = bench.planner.step(bench.now);
    assert_eq!(commands, [open(1, 1, 3000)]);
    assert!(matches!(told.as_slice(), [Change::Failed { name: second, .. }] if *second == name("b")));
}

#[test]
fn a_port_that_the_host_has_is_told_once_and_tried_again_at_its_pace() {
    let mut bench = Bench::reached(&["a"]);
    bench.listen(1, &[row(3000, "127.0.0.1", 7)], &[]);
    bench.commands();
    let told = bench.failed(1, 3000);
    assert!(
        matches!(told.as_slice(), [Change::Failed { reason, .. }] if reason.contains("EADDRINUSE")),
        "{told:?}"
    );
    assert_eq!(bench.commands(), []);
    assert_eq!(bench.planner.due(), Some(bench.now + RETRY));
    bench.now += RETRY;
    assert_eq!(bench.commands(), [open(2, 1, 3000)]);
    assert_eq!(bench.planner.due(), None, "it waits for the answer, not for the time");
    assert_eq!(bench.states("a"), [(3000, RowState::Failed)], "it flickers for nobody");
    assert_eq!(bench.failed(2, 3000), []);
    bench.now += RETRY;
    assert_eq!(bench.commands(), [open(3, 1, 3000)]);
    assert_eq!(bench.opened(3, 3000).len(), 1);
    bench.planner.left(&name("a"));
    bench.commands();
    assert_eq!(bench.planner.due(), None);
}

#[test]
fn the_guard_stands_before_every_policy() {
    let mut bench = Bench::new(vec![desired("a", Some("80,443,8973,8974,*"))]);
    bench.planner.reached(&name("a"), 1);
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
fn a_container_gets_as_many_ports_as_the_quota_and_keeps_those_it_has() {
    let mut bench = Bench::reached(&["a"]);
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
fn a_policy_that_changes_closes_at_once_and_one_that_is_gone_lets_the_container_go() {
    let mut bench = Bench::reached(&["a"]);
    bench.listen(1, &[row(3000, "127.0.0.1", 7), row(5173, "127.0.0.1", 8)], &[]);
    bench.commands();
    bench.opened(1, 3000);
    bench.opened(2, 5173);
    bench.planner.desired(vec![desired("a", Some("5173"))]);
    assert_eq!(bench.commands(), [close(1)]);
    bench.closed(1);
    bench.planner.desired(vec![]);
    assert_eq!(bench.commands(), [remove(1)]);
    assert_eq!(bench.closed(2), [told_closed("a", 5173, ClosedReason::Deregistered)]);
    assert_eq!(bench.hear(&Event::UpstreamRemoved { upstream: UpstreamId(1), reason: None }), []);
    assert_eq!(bench.planner.reached(&name("a"), 1), Admission::Unwanted);
}

#[test]
fn what_an_earlier_driver_left_is_claimed_by_its_cookie_and_numbers_continue_above_it() {
    let mut bench = Bench::new(vec![desired("a", None), desired("b", None)]);
    let upstreams = [(7, 70), (8, 80)]
        .map(|(id, netns_cookie)| UpstreamState { upstream: UpstreamId(id), netns_cookie })
        .to_vec();
    let drains = ForwardState { listening: false, ..held(40, 7, 3000) };
    let forwards = vec![held(20, 7, 3000), held(21, 7, 4000), held(30, 8, 5000), drains];
    let observed = [(UpstreamId(7), vec![row(3000, "127.0.0.1", 1)])].into();
    bench.planner.attach(Inventory { upstreams, forwards, observed });
    assert_eq!(bench.commands(), [], "nothing is let go of before everybody had the chance to claim it");
    assert_eq!(bench.planner.reached(&name("a"), 70), Admission::Known(UpstreamId(7)));
    assert_eq!(bench.planner.reached(&name("a"), 70), Admission::Known(UpstreamId(7)));
    assert_eq!(bench.states("a"), [(3000, RowState::Open), (4000, RowState::Open)]);
    assert_eq!(bench.planner.reached(&name("b"), 90), Admission::Add(UpstreamId(9)));
    assert_eq!(bench.commands(), []);
    bench.now += LINGER;
    assert_eq!(bench.commands(), [close(21)], "nothing listens on it any more");
    assert_eq!(bench.closed(21), [told_closed("a", 4000, ClosedReason::ContainerReleased)]);

    bench.listen(9, &[row(5000, "127.0.0.1", 2)], &[]);
    assert_eq!(bench.commands(), [], "the port is held by something that nobody has claimed");
    assert_eq!(bench.states("b"), [(5000, RowState::Opening)]);
    bench.planner.sweep();
    assert_eq!(bench.commands(), [remove(8)]);
    assert_eq!(bench.closed(30), [], "nobody knows whose it was");
    assert_eq!(bench.commands(), [open(41, 9, 5000)]);
}

#[test]
fn a_namespace_that_was_not_read_yet_keeps_its_forwards() {
    let mut bench = Bench::new(vec![desired("a", None)]);
    let upstreams = vec![UpstreamState { upstream: UpstreamId(1), netns_cookie: 5 }];
    let inventory = Inventory { upstreams, forwards: vec![held(1, 1, 3000)], observed: BTreeMap::new() };
    bench.planner.attach(inventory);
    bench.planner.reached(&name("a"), 5);
    bench.now += 2 * LINGER;
    assert_eq!(bench.commands(), []);
    assert_eq!(bench.planner.due(), None);
}

#[test]
fn two_containers_in_one_namespace_are_one_too_many() {
    let mut bench = Bench::reached(&["a", "b"]);
    bench.planner.left(&name("b"));
    bench.commands();
    assert_eq!(bench.planner.reached(&name("b"), 1), Admission::Shared(name("a")));
    bench.planner.left(&name("a"));
    assert_eq!(bench.planner.reached(&name("b"), 1), Admission::Add(UpstreamId(3)));
}

#[test]
fn a_container_that_starts_again_is_another_namespace() {
    let mut bench = Bench::reached(&["a"]);
    bench.listen(1, &[row(3000, "127.0.0.1", 7)], &[]);
    bench.commands();
    bench.opened(1, 3000);
    assert_eq!(bench.planner.reached(&name("a"), 100), Admission::Add(UpstreamId(2)));
    assert_eq!(bench.commands(), [remove(1)]);
    bench.listen(2, &[row(3000, "127.0.0.1", 9)], &[]);
    assert_eq!(bench.commands(), []);
    assert_eq!(bench.closed(1).len(), 1);
    assert_eq!(bench.commands(), [open(2, 2, 3000)]);
}

#[test]
fn an_engine_that_is_gone_takes_everything_along_and_its_numbers() {
    let mut bench = Bench::reached(&["a"]);
    bench.listen(1, &[row(3000, "127.0.0.1", 7)], &[]);
    bench.commands();
    bench.opened(1, 3000);
    assert_eq!(bench.planner.detach(), [told_closed("a", 3000, ClosedReason::HostError)]);
    assert_eq!(bench.commands(), []);
    bench.planner.attach(Inventory::default());
    assert_eq!(bench.planner.reached(&name("a"), 1), Admission::Add(UpstreamId(2)));
    bench.listen(2, &[row(3000, "127.0.0.1", 7)], &[]);
    assert_eq!(bench.commands(), [open(2, 2, 3000)]);
    assert_eq!((bench.commands(), bench.planner.due()), (vec![], None));
}

/// Two containers want port 3000, "b" had it, and the engine was lost. "a" is entered again first.
fn bereft() -> Bench {
    let mut bench = Bench::reached(&["a", "b"]);
    bench.listen(2, &[row(3000, "127.0.0.1", 7)], &[]);
    bench.commands();
    bench.opened(1, 3000);
    bench.planner.detach();
    bench.planner.attach(Inventory::default());
    bench.planner.reached(&name("a"), 1);
    bench.listen(3, &[row(3000, "127.0.0.1", 8)], &[]);
    let (commands, told) = bench.planner.step(bench.now);
    assert_eq!(commands, []);
    assert!(matches!(told.as_slice(), [Change::Failed { name: second, .. }] if *second == name("a")));
    assert_eq!(bench.commands(), []);
    bench
}

#[test]
fn a_port_of_a_lost_engine_is_kept_for_who_had_it() {
    let mut bench = bereft();
    bench.planner.reached(&name("b"), 2);
    bench.listen(4, &[row(3000, "127.0.0.1", 7)], &[]);
    assert_eq!(bench.commands(), [open(2, 4, 3000)]);
    bench.opened(2, 3000);
    assert_eq!((bench.commands(), bench.planner.due()), (vec![], None));
}

#[test]
fn a_port_of_a_lost_engine_is_not_kept_for_who_does_not_want_it_or_does_not_come() {
    let mut bench = bereft();
    bench.planner.reached(&name("b"), 2);
    bench.listen(4, &[], &[]);
    assert_eq!(bench.commands(), [open(2, 3, 3000)]);

    let mut bench = bereft();
    assert_eq!(bench.planner.due(), Some(bench.now + PORT_HOLD));
    bench.now += PORT_HOLD;
    assert_eq!(bench.commands(), [open(2, 3, 3000)]);

    let mut bench = bereft();
    bench.planner.desired(vec![desired("a", None)]);
    assert_eq!(bench.commands(), [open(2, 3, 3000)]);
}

#[test]
fn an_upstream_that_the_engine_lets_go_of_is_told() {
    let mut bench = Bench::reached(&["a"]);
    let told =
        bench.hear(&Event::UpstreamRemoved { upstream: UpstreamId(1), reason: Some("it ended".to_owned()) });
    assert_eq!(told, [Change::Lost { name: name("a"), dialled: false, reason: "it ended".to_owned() }]);
    assert_eq!(bench.planner.reached(&name("a"), 1), Admission::Add(UpstreamId(2)));
}

#[test]
fn an_engine_that_is_stopped_closes_its_ports_for_that_reason() {
    let mut bench = Bench::reached(&["a"]);
    bench.listen(1, &[row(3000, "127.0.0.1", 7)], &[]);
    bench.commands();
    bench.opened(1, 3000);
    bench.planner.stop();
    assert_eq!(bench.closed(1), [told_closed("a", 3000, ClosedReason::BrokerStopped)]);
}

#[test]
fn an_observation_in_parts_replaces_what_was_known() {
    let mut bench = Bench::reached(&["a"]);
    bench.listen(1, &[row(3000, "127.0.0.1", 7)], &[]);
    assert_eq!(bench.commands(), [open(1, 1, 3000)]);
    for (number, more) in [(4000, true), (5000, false)] {
        let listening = vec![row(number, "127.0.0.1", 8)];
        bench.hear(&Event::Observed { upstream: UpstreamId(1), listening, more });
    }
    assert_eq!(bench.commands(), [open(2, 1, 4000), open(3, 1, 5000)]);
    bench.now += LINGER;
    assert_eq!(bench.commands(), [close(1)]);
}

#[test]
fn another_engine_takes_over_what_it_was_lent() {
    let mut bench = Bench::reached(&["a"]);
    bench.listen(1, &[row(3000, "127.0.0.1", 7), row(4000, "127.0.0.1", 8)], &[]);
    bench.commands();
    bench.opened(1, 3000);
    bench.opened(2, 4000);
    assert!(bench.planner.is_open(ForwardId(1)));
    let told = bench.planner.moved(&[UpstreamId(1)].into(), &[ForwardId(1)].into());
    assert_eq!(told, [told_closed("a", 4000, ClosedReason::HostError)]);
    bench.now += 2 * LINGER;
    assert_eq!(bench.commands(), [], "what listens is not known yet");
    bench.listen(1, &[row(3000, "127.0.0.1", 7), row(4000, "127.0.0.1", 8)], &[]);
    assert_eq!(bench.commands(), [open(3, 1, 4000)]);
}

mod announced;
mod cost;
mod model;
mod natives;
mod reserved;

#[test]
fn what_docker_publishes_is_left_to_docker_and_shown_where_it_answers() {
    let published =
        BTreeMap::from([(port(3000), port(13_000)), (port(80), port(8080)), (port(4000), port(4000))]);
    let shop = DesiredContainer { published, ..desired("shop", Some("3000-4001")) };
    let mut bench = Bench::new(vec![shop.clone()]);
    bench.planner.reached(&name("shop"), 1);
    bench.listen(
        1,
        &[row(3000, "0.0.0.0", 1), row(80, "0.0.0.0", 2), row(4000, "127.0.0.1", 3), row(4001, "0.0.0.0", 4)],
        &[],
    );
    assert_eq!(bench.commands(), [open(1, 1, 4001)]);
    let rows = bench.planner.rows(&name("shop")).listed;
    let told: Vec<_> = rows.iter().map(|row| (row.port.get(), row.host_port.get(), row.state)).collect();
    let published = RowState::Published;
    assert_eq!(
        told,
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

    // One that is published no longer is forwarded, and one that is from now on no more.
    let published = BTreeMap::from([(port(4001), port(4001))]);
    bench.planner.desired(vec![DesiredContainer { published, ..shop }]);
    assert_eq!(bench.commands(), [close(1), open(2, 1, 3000), open(3, 1, 4000)]);
}

#[test]
fn what_a_container_has_is_its_own_under_another_name() {
    let mut bench = Bench::reached(&["a"]);
    bench.listen(1, &[row(3000, "127.0.0.1", 1), row(3001, "127.0.0.1", 2)], &[]);
    assert_eq!(bench.commands(), [open(1, 1, 3000), open(2, 1, 3001)]);
    bench.opened(1, 3000);
    bench.failed(2, 3001);
    let why = ClosedReason::Deregistered;
    let closed = Change::Closed { name: name("a"), port: port(3000), host_port: port(3000), why };
    assert_eq!(bench.planner.renamed(&name("a"), &name("b")), [closed, told_opened("b", 3000, "127.0.0.1")]);
    bench.planner.desired(vec![desired("b", None)]);
    assert_eq!(bench.commands(), [], "nothing closes, and what failed is not tried at once");
    assert_eq!(bench.states("b"), [(3000, RowState::Open), (3001, RowState::Failed)]);
    assert_eq!(bench.planner.reached(&name("b"), 1), Admission::Known(UpstreamId(1)));
    // Also in the moment in which both names are registered.
    assert_eq!(bench.planner.reached(&name("a"), 1), Admission::Unwanted);
    bench.planner.left(&name("a"));
    assert_eq!(bench.commands(), []);
    bench.planner.left(&name("b"));
    assert_eq!(bench.commands(), [remove(1)]);
}
