//! Each test stands for a row of the wire specification, A.14, "Renewal managers".

use std::time::Duration;

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::registry::folder::JOB_TIMEOUT;

const HOUR: Duration = Duration::from_secs(3_600);

fn name(text: &str) -> ContainerName {
    ContainerName::new(text).unwrap()
}

fn key(container: &str) -> Key {
    Key { container: name(container), job: "renew".to_owned() }
}

fn input(container: &str, cwd: &str) -> Input {
    let fields = json!({"containerName": container, "cwd": cwd});
    let job = Job {
        command: vec!["renew".to_owned()],
        every: HOUR,
        gate: None,
        timeout: JOB_TIMEOUT,
        restart: true,
    };
    let registration = Registration::from_fields(fields.as_object().unwrap().clone()).unwrap();
    Input { registration: Arc::new(registration), job }
}

/// A machine with one clock.
struct Bench {
    machine: Machine,
    now: Instant,
}

impl Bench {
    fn new() -> Bench {
        Bench { machine: Machine::default(), now: Instant::now() }
    }

    /// Starts the container with one job in `cwd`; the folders that begin to run.
    fn start(&mut self, container: &str, cwd: &str) -> Vec<String> {
        let jobs = vec![("renew".to_owned(), input(container, cwd))];
        folders(&self.machine.start(&name(container), jobs, self.now))
    }

    fn pass(&mut self, time: Duration) -> Vec<String> {
        self.now += time;
        folders(&self.machine.advance(self.now))
    }

    /// Ends the run; the folders that are restarted, and run again.
    fn end(&mut self, container: &str, succeeded: bool) -> (Option<String>, Option<String>) {
        let next = self.machine.ended(&key(container), succeeded);
        (
            next.restart.map(|registration| folder(&registration)),
            next.run.map(|run| folder(&run.input.registration)),
        )
    }
}

fn folder(registration: &Registration) -> String {
    registration.cwd.to_str().unwrap().to_owned()
}

fn folders(runs: &[Run]) -> Vec<String> {
    runs.iter().map(|run| folder(&run.input.registration)).collect()
}

fn nothing() -> (Option<String>, Option<String>) {
    (None, None)
}

fn restarts(cwd: &str) -> (Option<String>, Option<String>) {
    (Some(cwd.to_owned()), None)
}

#[test]
fn the_first_run_begins_at_once_and_the_next_after_the_interval() {
    let mut bench = Bench::new();
    assert_eq!(bench.start("coder", "/a"), ["/a"]);
    bench.end("coder", false);
    assert_eq!(bench.machine.next_due(), Some(bench.now + HOUR));
    assert!(bench.pass(HOUR - Duration::from_nanos(1)).is_empty());
    assert_eq!(bench.pass(Duration::from_nanos(1)), ["/a"]);
}

#[test]
fn a_success_restarts_the_container() {
    let mut bench = Bench::new();
    bench.start("coder", "/a");
    assert_eq!(bench.end("coder", true), restarts("/a"));
}

#[test]
fn what_did_not_succeed_restarts_nothing() {
    let mut bench = Bench::new();
    bench.start("coder", "/a");
    assert_eq!(bench.end("coder", false), nothing());
}

#[test]
fn a_job_that_restarts_nothing_does_not() {
    let mut bench = Bench::new();
    let mut quiet = input("coder", "/a");
    quiet.job.restart = false;
    bench.machine.start(&name("coder"), vec![("renew".to_owned(), quiet)], bench.now);
    assert_eq!(bench.end("coder", true), nothing());
}

#[test]
fn a_stop_ends_the_timer() {
    let mut bench = Bench::new();
    bench.start("coder", "/a");
    bench.end("coder", false);
    bench.machine.stop(&name("coder"));
    assert_eq!(bench.machine.next_due(), None);
    assert!(bench.pass(HOUR * 3).is_empty());
    assert!(bench.machine.jobs.is_empty());
}

#[test]
fn a_second_start_replaces_the_timer() {
    let mut bench = Bench::new();
    bench.start("coder", "/a");
    bench.end("coder", false);
    assert!(bench.pass(HOUR / 2).is_empty());
    assert_eq!(bench.start("coder", "/a"), ["/a"]);
    bench.end("coder", false);
    assert!(bench.pass(HOUR / 2).is_empty());
    assert_eq!(bench.pass(HOUR / 2), ["/a"]);
}

#[test]
fn a_drain_ends_every_timer_and_begins_nothing() {
    let mut bench = Bench::new();
    for container in ["one", "two"] {
        bench.start(container, "/a");
        bench.end(container, false);
    }
    bench.machine.drain();
    assert_eq!(bench.machine.next_due(), None);
    assert!(bench.pass(HOUR).is_empty());
    assert!(bench.start("three", "/a").is_empty());
}

#[test]
fn a_run_that_ends_during_a_drain_still_restarts_its_container() {
    let mut bench = Bench::new();
    bench.start("coder", "/a");
    bench.pass(HOUR);
    bench.machine.drain();
    assert_eq!(bench.end("coder", true), restarts("/a"));
}

#[test]
fn a_folder_without_the_job_has_no_run_and_no_timer() {
    let mut bench = Bench::new();
    assert!(bench.machine.start(&name("coder"), Vec::new(), bench.now).is_empty());
    assert_eq!(bench.machine.next_due(), None);
}

#[test]
fn a_new_folder_without_the_job_ends_it_and_does_not_restart_the_old() {
    let mut bench = Bench::new();
    bench.start("coder", "/a");
    assert!(bench.machine.start(&name("coder"), Vec::new(), bench.now).is_empty());
    assert_eq!(bench.machine.next_due(), None);
    assert_eq!(bench.end("coder", true), nothing());
}

#[test]
fn a_stop_during_a_run_forbids_the_restart_and_the_rerun() {
    let mut bench = Bench::new();
    bench.start("coder", "/a");
    bench.pass(HOUR);
    bench.machine.stop(&name("coder"));
    assert_eq!(bench.end("coder", true), nothing());
    assert!(bench.machine.jobs.is_empty());
}

#[test]
fn a_new_folder_during_a_run_is_run_next_and_the_old_not_restarted() {
    let mut bench = Bench::new();
    bench.start("coder", "/a");
    assert!(bench.start("coder", "/b").is_empty());
    assert_eq!(bench.end("coder", true), (None, Some("/b".to_owned())));
    assert_eq!(bench.end("coder", true), restarts("/b"));
}

#[test]
fn the_same_folder_registered_again_during_a_run_is_restarted_and_run_again() {
    let mut bench = Bench::new();
    bench.start("coder", "/a");
    bench.machine.stop(&name("coder"));
    assert!(bench.start("coder", "/a").is_empty());
    assert_eq!(bench.end("coder", true), (Some("/a".to_owned()), Some("/a".to_owned())));
}

#[test]
fn being_due_many_times_during_a_run_means_one_more() {
    let mut bench = Bench::new();
    bench.start("coder", "/a");
    for _ in 0..5 {
        assert!(bench.pass(HOUR).is_empty());
    }
    assert_eq!(bench.end("coder", false), (None, Some("/a".to_owned())));
    assert_eq!(bench.end("coder", false), nothing());
}

#[test]
fn jobs_of_one_container_run_side_by_side() {
    let mut bench = Bench::new();
    let jobs = ["a", "b"].map(|job| (job.to_owned(), input("coder", "/a"))).to_vec_pair();
    assert_eq!(bench.machine.start(&name("coder"), jobs, bench.now).len(), 2);
}

trait ToVecPair {
    fn to_vec_pair(self) -> Vec<(String, Input)>;
}

impl<const N: usize> ToVecPair for [(String, Input); N] {
    fn to_vec_pair(self) -> Vec<(String, Input)> {
        self.into_iter().collect()
    }
}

#[derive(Clone, Debug)]
enum Step {
    Start(usize, Option<usize>),
    Stop(usize),
    Pass(u64),
    End(usize, bool),
    Drain,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..2usize, proptest::option::weighted(0.8, 0..2usize)).prop_map(|(who, cwd)| Step::Start(who, cwd)),
        2 => (0..2usize).prop_map(Step::Stop),
        4 => (0..7_200u64).prop_map(Step::Pass),
        6 => (0..2usize, any::<bool>()).prop_map(|(who, succeeded)| Step::End(who, succeeded)),
        1 => Just(Step::Drain),
    ]
}

/// What is known of one container from outside: the rules, without the machine.
#[derive(Clone, Default)]
struct Known {
    folder: Option<&'static str>,
    runs_in: Option<String>,
    wanted: bool,
}

const NAMES: [&str; 2] = ["one", "two"];
const FOLDERS: [&str; 2] = ["/a", "/b"];

/// Runs that began: never beside another, never without an input, always with the newest.
fn take_runs(runs: Vec<Run>, known: &mut [Known; 2], drained: bool) {
    for run in runs {
        let who = NAMES.iter().position(|name| *name == run.key.container.as_str()).unwrap();
        let known = &mut known[who];
        assert!(!drained, "a run began after the drain");
        assert!(known.runs_in.is_none(), "two at a time");
        assert_eq!(known.folder.unwrap(), folder(&run.input.registration), "not the newest input");
        known.runs_in = Some(folder(&run.input.registration));
        known.wanted = false;
    }
}

proptest! {
    #[test]
    fn whatever_happens_the_rules_hold(steps in proptest::collection::vec(step(), 0..60)) {
        let mut machine = Machine::default();
        let mut now = Instant::now();
        let mut known: [Known; 2] = Default::default();
        let mut drained = false;
        for step in steps {
            match step {
                Step::Start(who, cwd) => {
                    let jobs = cwd.map(|cwd| ("renew".to_owned(), input(NAMES[who], FOLDERS[cwd])));
                    known[who].folder = cwd.map(|cwd| FOLDERS[cwd]).filter(|_| !drained);
                    known[who].wanted = known[who].folder.is_some();
                    take_runs(machine.start(&name(NAMES[who]), jobs.into_iter().collect(), now), &mut known, drained);
                }
                Step::Stop(who) => {
                    machine.stop(&name(NAMES[who]));
                    (known[who].folder, known[who].wanted) = (None, false);
                }
                Step::Pass(seconds) => {
                    now += Duration::from_secs(seconds);
                    let due = machine.next_due().is_some_and(|due| due <= now);
                    let runs = machine.advance(now);
                    // Whatever was due and did not begin runs already, and will again: seen at its end.
                    prop_assert!(!due || machine.next_due().is_none_or(|next| next > now));
                    take_runs(runs, &mut known, drained);
                }
                Step::End(who, succeeded) => {
                    let ran = known[who].runs_in.take();
                    let next = machine.ended(&key(NAMES[who]), succeeded);
                    let same = ran.is_some() && ran.as_deref() == known[who].folder;
                    prop_assert_eq!(next.restart.is_some(), succeeded && same, "rule 4");
                    let wanted = known[who].wanted && ran.is_some() && !drained;
                    prop_assert!(next.run.is_some() || !wanted, "a run was forgotten");
                    take_runs(next.run.into_iter().collect(), &mut known, drained);
                }
                Step::Drain => {
                    machine.drain();
                    drained = true;
                    prop_assert_eq!(machine.next_due(), None);
                }
            }
            // A container with an input is running, or waits for its time, unless the daemon stops.
            for (who, known) in known.iter().enumerate() {
                let state = machine.jobs.get(&key(NAMES[who]));
                prop_assert_eq!(state.is_some(), known.folder.is_some() || known.runs_in.is_some());
                if let (Some(state), Some(_), false) = (state, known.folder, drained) {
                    prop_assert!(state.due.is_some());
                }
            }
        }
    }
}
