use super::*;
use landfall_engine::command::{ForwardStats, ListenFailureKind, Listening};
use proptest::prelude::*;

fn port(number: u16) -> NonZeroU16 {
    NonZeroU16::new(number).unwrap()
}

fn row(number: u16, address: &str, inode: u64) -> Listening {
    Listening { port: port(number), address: address.parse().unwrap(), inode, uid: 0 }
}

fn failure() -> ListenFailure {
    ListenFailure {
        kind: ListenFailureKind::Taken,
        address: "127.0.0.1:3000".parse().unwrap(),
        detail: "EADDRINUSE: address already in use".to_owned(),
    }
}

/// A driver without an engine: plans, notes what was planned, and hands it over.
struct Bench {
    forwards: Forwards,
    seen: Observation,
    policy: Policy,
    now: Instant,
}

impl Bench {
    fn new() -> Bench {
        Bench {
            forwards: Forwards::new(UpstreamId(1)),
            seen: Observation::default(),
            policy: Policy::default(),
            now: Instant::now(),
        }
    }

    fn step(&mut self) -> Vec<Command> {
        let commands = self.forwards.plan(&self.seen, &self.policy, self.now);
        self.forwards.issued(&commands, &self.seen, &self.policy, self.now);
        commands
    }

    /// Lets a port that is gone linger.
    fn linger(&mut self) {
        assert_eq!(self.step(), []);
        assert_eq!(self.forwards.due(), Some(self.now + LINGER));
        self.now += LINGER;
    }

    fn answer(&mut self, event: Event) -> Option<Change> {
        self.forwards.answered(&event, self.now)
    }

    fn opened(&mut self, id: u32, number: u16) -> Option<Change> {
        self.answer(Event::ListenerOpened { forward: ForwardId(id), host_port: port(number) })
    }

    fn failed(&mut self, id: u32, number: u16) -> Option<Change> {
        self.answer(Event::ListenerFailed {
            forward: ForwardId(id),
            host_port: port(number),
            failure: failure(),
        })
    }

    fn closed(&mut self, id: u32) -> Option<Change> {
        self.answer(Event::ListenerClosed { forward: ForwardId(id), stats: ForwardStats::default() })
    }
}

fn open(id: u32, number: u16, v4: bool, v6: bool) -> Command {
    Command::OpenListener {
        forward: ForwardId(id),
        upstream: UpstreamId(1),
        host_port: port(number),
        target_port: port(number),
        reach: Reach { v4, v6 },
    }
}

fn close(id: u32) -> Command {
    Command::CloseListener { forward: ForwardId(id), ending: Ending::Drain }
}

#[test]
fn rows_of_one_port_make_one_listener_and_later_a_new_reach() {
    let mut bench = Bench::new();
    bench.seen.update(&[row(3000, "::1", 7), row(3000, "::1", 8)], &[]);
    assert_eq!(bench.step(), [open(1, 3000, false, true)]);
    bench.seen.update(&[row(3000, "0.0.0.0", 9)], &[]);
    let reach = Reach { v4: true, v6: true };
    assert_eq!(bench.step(), [Command::SetReach { forward: ForwardId(1), reach }]);
    assert_eq!(bench.step(), []);
}

#[test]
fn a_port_that_ceases_to_listen_is_closed_and_told_once() {
    let mut bench = Bench::new();
    bench.seen.update(&[row(3000, "127.0.0.1", 7)], &[]);
    bench.step();
    assert_eq!(bench.opened(1, 3000), Some(Change::Opened(port(3000))));
    assert_eq!(bench.opened(1, 3000), None);
    bench.seen.update(&[], &[row(3000, "127.0.0.1", 7)]);
    bench.linger();
    assert_eq!(bench.step(), [close(1)]);
    assert_eq!(bench.closed(1), Some(Change::Closed(port(3000))));
    assert_eq!(bench.closed(1), None);
}

#[test]
fn a_port_that_comes_back_waits_until_its_forward_is_closed() {
    let mut bench = Bench::new();
    bench.seen.update(&[row(3000, "127.0.0.1", 7)], &[]);
    bench.step();
    bench.seen.update(&[], &[row(3000, "127.0.0.1", 7)]);
    bench.linger();
    assert_eq!(bench.step(), [close(1)]);
    bench.seen.update(&[row(3000, "127.0.0.1", 8)], &[]);
    assert_eq!(bench.step(), []);
    assert_eq!(bench.opened(1, 3000), None, "it is closing; nobody is told that it opened");
    bench.closed(1);
    assert_eq!(bench.step(), [open(2, 3000, true, false)]);
}

#[test]
fn a_server_that_restarts_keeps_its_port() {
    let mut bench = Bench::new();
    bench.seen.update(&[row(3000, "127.0.0.1", 7)], &[]);
    bench.step();
    bench.opened(1, 3000);
    for inode in 8..12 {
        bench.seen.update(&[], &[row(3000, "127.0.0.1", inode - 1)]);
        assert_eq!(bench.step(), []);
        bench.now += LINGER / 2;
        bench.seen.update(&[row(3000, "127.0.0.1", inode)], &[]);
        assert_eq!(bench.step(), []);
        assert_eq!(bench.forwards.due(), None);
        bench.now += LINGER;
        assert_eq!(bench.step(), []);
    }
}

#[test]
fn a_taken_port_is_told_once_and_tried_again_at_its_pace() {
    let mut bench = Bench::new();
    bench.seen.update(&[row(3000, "127.0.0.1", 7)], &[]);
    bench.step();
    assert_eq!(bench.failed(1, 3000), Some(Change::Failed(port(3000), failure())));
    assert_eq!(bench.step(), []);
    assert_eq!(bench.forwards.due(), Some(bench.now + RETRY));
    bench.now += RETRY;
    assert_eq!(bench.step(), [open(2, 3000, true, false)]);
    assert_eq!(bench.failed(2, 3000), None, "people were told already");
    bench.now += RETRY;
    assert_eq!(bench.step(), [open(3, 3000, true, false)]);
    assert_eq!(bench.opened(3, 3000), Some(Change::Opened(port(3000))));
    assert_eq!(bench.forwards.due(), None);
}

#[test]
fn a_failure_is_forgotten_with_its_listener() {
    let mut bench = Bench::new();
    bench.seen.update(&[row(3000, "127.0.0.1", 7)], &[]);
    bench.step();
    bench.failed(1, 3000);
    bench.seen.update(&[], &[row(3000, "127.0.0.1", 7)]);
    assert_eq!(bench.step(), []);
    assert_eq!(bench.forwards.due(), None);
    bench.seen.update(&[row(3000, "127.0.0.1", 8)], &[]);
    assert_eq!(bench.step(), [open(2, 3000, true, false)]);
    assert!(bench.failed(2, 3000).is_some(), "it is a new server; people are told anew");
}

#[test]
fn a_denied_port_is_never_asked_for() {
    let mut bench = Bench::new();
    bench.policy.deny = "3000".parse().unwrap();
    bench.seen.update(&[row(3000, "127.0.0.1", 7), row(22, "0.0.0.0", 8), row(3001, "::", 9)], &[]);
    assert_eq!(bench.step(), [open(1, 3001, false, true)]);
}

#[derive(Clone, Debug)]
enum Happening {
    Listen(u16, u64),
    Cease(u16, u64),
    Succeed(u32),
    Fail(u32),
    Close(u32),
    Wait,
    Deny(u16),
}

fn happening() -> impl Strategy<Value = Happening> {
    prop_oneof![
        (1020u16..1030, 0u64..3).prop_map(|(p, i)| Happening::Listen(p, i)),
        (1020u16..1030, 0u64..3).prop_map(|(p, i)| Happening::Cease(p, i)),
        (1u32..20).prop_map(Happening::Succeed),
        (1u32..20).prop_map(Happening::Fail),
        (1u32..20).prop_map(Happening::Close),
        Just(Happening::Wait),
        (1020u16..1030).prop_map(Happening::Deny),
    ]
}

proptest! {
    #[test]
    fn planning_again_after_applying_yields_nothing(story in proptest::collection::vec(happening(), 0..60)) {
        let mut bench = Bench::new();
        let mut used = std::collections::BTreeSet::new();
        for happening in story {
            match happening {
                Happening::Listen(p, i) => bench.seen.update(&[row(p, "127.0.0.1", i)], &[]),
                Happening::Cease(p, i) => bench.seen.update(&[], &[row(p, "127.0.0.1", i)]),
                Happening::Succeed(id) => { bench.opened(id, 1); }
                Happening::Fail(id) => { bench.failed(id, 1); }
                Happening::Close(id) => { bench.closed(id); }
                Happening::Wait => bench.now += RETRY,
                Happening::Deny(p) => bench.policy.deny = p.to_string().parse().unwrap(),
            }
            for command in bench.step() {
                if let Command::OpenListener { forward, host_port, .. } = command {
                    prop_assert!(used.insert(forward), "a number was used twice");
                    prop_assert_eq!(bench.policy.decide(host_port), Decision::Allow);
                }
            }
            prop_assert_eq!(bench.step(), Vec::<Command>::new());
        }
    }
}
