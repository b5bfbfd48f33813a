//! The cost of planning, in forwards looked up and not in time.

use super::*;

/// Container "a" listens on `ports` ports, and each of `others` further containers has the most forwards allowed.
fn crowded_bench(ports: u16, others: u16) -> Bench {
    let names: Vec<String> = (0..others).map(|number| format!("other{number}")).collect();
    let names: Vec<&str> = std::iter::once("a").chain(names.iter().map(String::as_str)).collect();
    let mut bench = Bench::with_entered(&names);
    for (upstream, first) in (2..).zip((0..others).map(|number| 2_000 + 256 * number)) {
        let rows: Vec<Listening> = (first..first + 256).map(|number| row(number, "127.0.0.1", 1)).collect();
        bench.listen(upstream, &rows, &[]);
    }
    open_all(&mut bench);
    bench.listen(1, &rows(ports, 1), &[]);
    bench
}

fn rows(ports: u16, inode: u64) -> Vec<Listening> {
    (30_000..30_000 + ports).map(|number| row(number, "127.0.0.1", inode)).collect()
}

/// Steps and opens what the engine is commanded to open, until a step yields no commands.
fn open_all(bench: &mut Bench) {
    loop {
        let (commands, _) = bench.planner.step(bench.now);
        if commands.is_empty() {
            return;
        }
        for command in commands {
            if let Command::OpenListener { forward, host_port, .. } = command {
                bench.on_engine_event(&Event::ListenerOpened { forward, host_port });
            }
        }
        // Opening listeners costs credit.
        bench.now += Duration::from_secs(10);
    }
}

impl Bench {
    /// The cost of a step: the forwards that were looked up, and the commands.
    fn counted(&mut self) -> (u64, usize) {
        let before = self.planner.forwards.lookups();
        let (commands, _) = self.planner.step(self.now);
        (self.planner.forwards.lookups() - before, commands.len())
    }
}

/// The most look-ups of a plan: a few for each forward that a container may have. Ports beyond those are sorted, which
/// looks up no forward.
const STEPS_MAX: u64 = 8 * FORWARDS_MAX as u64;

#[test]
fn c24_plan_looks_up_the_forwards_of_its_container_alone_a_few_times_each() {
    for ports in [64, 512, 2_500, 20_000] {
        for others in [0, 40] {
            let mut bench = crowded_bench(ports, others);
            let (first, commands) = bench.counted();
            assert_eq!(commands, FORWARDS_MAX.min(ports.into()));
            // Open another socket on one of its ports.
            bench.listen(1, &[row(30_000, "127.0.0.1", 2)], &[row(30_000, "127.0.0.1", 1)]);
            let (again, _) = bench.counted();
            for steps in [first, again] {
                assert!(steps <= STEPS_MAX, "{steps} steps for {ports} ports beside {others} containers");
            }
        }
    }
}

#[test]
fn c24_event_of_one_container_costs_no_lookups_of_other_containers_ports() {
    let mut bench = crowded_bench(20_000, 40);
    open_all(&mut bench);
    bench.planner.desired(
        std::iter::once(desired("small", None)).chain(bench.planner.desired_containers.clone()).collect(),
    );
    let Admission::Add(UpstreamId(small)) = bench.planner.container_entered(&name("small"), 99) else {
        panic!()
    };
    bench.listen(small, &[], &[]);
    bench.counted();
    bench.planner.take_stale();
    bench.listen(small, &[row(1_500, "127.0.0.1", 1)], &[]);
    let (steps, commands) = bench.counted();
    assert_eq!(commands, 1);
    assert!(steps < 20, "{steps} steps");
    let forward = ForwardId(bench.planner.next_forward - 1);
    bench.on_engine_event(&Event::ListenerOpened { forward, host_port: port(1_500) });
    let (steps, _) = bench.counted();
    assert!(steps < 20, "{steps} steps");
    assert_eq!(bench.planner.take_stale(), [name("small")].into(), "no other one is listed again");
}

#[test]
fn c24_many_events_cause_one_plan_of_the_final_state() {
    let mut bench = crowded_bench(2_500, 0);
    let once = bench.counted();
    let mut bench = crowded_bench(2_500, 0);
    for inode in 2..50 {
        bench.listen(1, &rows(2_500, inode), &rows(2_500, inode - 1));
    }
    assert_eq!(bench.counted(), once);
}

#[test]
fn c24_container_that_cycles_its_listeners_is_planned_by_credit_and_others_at_once() {
    let mut bench = crowded_bench(0, 1);
    let cycled = |turn: u16| {
        let first = 30_000 + 300 * (turn % 50);
        (first..first + 300).map(|number| row(number, "127.0.0.1", 1)).collect::<Vec<_>>()
    };
    let (mut plans, mut commands) = (0, 0);
    for turn in 0..500 {
        bench.listen(1, &cycled(turn + 1), &cycled(turn));
        let (steps, asked) = bench.counted();
        plans += usize::from(steps > 0);
        commands += asked;
        // The other container is planned after each of its changes.
        let reach = if turn < 256 { "::1" } else { "::" };
        bench.listen(2, &[row(2_000 + turn % 256, reach, 2)], &[]);
        let (steps, _) = bench.counted();
        assert!(steps >= 256, "turn {turn}");
        bench.now += Duration::from_millis(2);
    }
    assert!(plans < 100, "{plans} plans for 500 events");
    assert!(commands < 3_000, "{commands} commands");
    // The container is planned again when its debt is paid off.
    let due = bench.planner.due().unwrap();
    assert!(due <= bench.now + Duration::from_secs(5), "{:?}", due - bench.now);
    bench.now = due;
    assert!(bench.counted().0 > 0);
}
