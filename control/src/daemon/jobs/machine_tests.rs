//! Each test covers a row of the wire specification, A.14, "Renewal managers".

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

/// A machine and its clock.
struct Fixture {
    machine: Machine,
    now: Instant,
}

impl Fixture {
    fn new() -> Fixture {
        Fixture { machine: Machine::default(), now: Instant::now() }
    }

    /// Starts the container with one job in `cwd`. Returns the folders whose runs start.
    fn start(&mut self, container: &str, cwd: &str) -> Vec<String> {
        let jobs = vec![("renew".to_owned(), input(container, cwd))];
        folders(&self.machine.start(&name(container), jobs, self.now))
    }

    fn pass(&mut self, time: Duration) -> Vec<String> {
        self.now += time;
        folders(&self.machine.advance(self.now))
    }

    /// Ends the run. Returns the folder that is restarted and the folder that runs again.
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

fn no_action() -> (Option<String>, Option<String>) {
    (None, None)
}

fn restarts(cwd: &str) -> (Option<String>, Option<String>) {
    (Some(cwd.to_owned()), None)
}

#[test]
fn the_first_run_starts_at_once_and_the_next_after_the_interval() {
    let mut fixture = Fixture::new();
    assert_eq!(fixture.start("coder", "/a"), ["/a"]);
    fixture.end("coder", false);
    assert_eq!(fixture.machine.next_due(), Some(fixture.now + HOUR));
    assert!(fixture.pass(HOUR - Duration::from_nanos(1)).is_empty());
    assert_eq!(fixture.pass(Duration::from_nanos(1)), ["/a"]);
}

#[test]
fn a_success_restarts_the_container() {
    let mut fixture = Fixture::new();
    fixture.start("coder", "/a");
    assert_eq!(fixture.end("coder", true), restarts("/a"));
}

#[test]
fn a_failed_run_does_not_restart_the_container() {
    let mut fixture = Fixture::new();
    fixture.start("coder", "/a");
    assert_eq!(fixture.end("coder", false), no_action());
}

#[test]
fn a_job_without_restart_does_not_restart_the_container() {
    let mut fixture = Fixture::new();
    let mut quiet = input("coder", "/a");
    quiet.job.restart = false;
    fixture.machine.start(&name("coder"), vec![("renew".to_owned(), quiet)], fixture.now);
    assert_eq!(fixture.end("coder", true), no_action());
}

#[test]
fn a_stop_cancels_the_timer() {
    let mut fixture = Fixture::new();
    fixture.start("coder", "/a");
    fixture.end("coder", false);
    fixture.machine.stop(&name("coder"));
    assert_eq!(fixture.machine.next_due(), None);
    assert!(fixture.pass(HOUR * 3).is_empty());
    assert!(fixture.machine.jobs.is_empty());
}

#[test]
fn a_second_start_replaces_the_timer() {
    let mut fixture = Fixture::new();
    fixture.start("coder", "/a");
    fixture.end("coder", false);
    assert!(fixture.pass(HOUR / 2).is_empty());
    assert_eq!(fixture.start("coder", "/a"), ["/a"]);
    fixture.end("coder", false);
    assert!(fixture.pass(HOUR / 2).is_empty());
    assert_eq!(fixture.pass(HOUR / 2), ["/a"]);
}

#[test]
fn a_drain_cancels_all_timers_and_starts_no_run() {
    let mut fixture = Fixture::new();
    for container in ["one", "two"] {
        fixture.start(container, "/a");
        fixture.end(container, false);
    }
    fixture.machine.drain();
    assert_eq!(fixture.machine.next_due(), None);
    assert!(fixture.pass(HOUR).is_empty());
    assert!(fixture.start("three", "/a").is_empty());
}

#[test]
fn a_run_that_ends_during_a_drain_still_restarts_its_container() {
    let mut fixture = Fixture::new();
    fixture.start("coder", "/a");
    fixture.pass(HOUR);
    fixture.machine.drain();
    assert_eq!(fixture.end("coder", true), restarts("/a"));
}

#[test]
fn a_folder_without_the_job_has_no_run_and_no_timer() {
    let mut fixture = Fixture::new();
    assert!(fixture.machine.start(&name("coder"), Vec::new(), fixture.now).is_empty());
    assert_eq!(fixture.machine.next_due(), None);
}

#[test]
fn a_new_folder_without_the_job_removes_it_and_prevents_the_restart() {
    let mut fixture = Fixture::new();
    fixture.start("coder", "/a");
    assert!(fixture.machine.start(&name("coder"), Vec::new(), fixture.now).is_empty());
    assert_eq!(fixture.machine.next_due(), None);
    assert_eq!(fixture.end("coder", true), no_action());
}

#[test]
fn a_stop_during_a_run_prevents_restart_and_rerun() {
    let mut fixture = Fixture::new();
    fixture.start("coder", "/a");
    fixture.pass(HOUR);
    fixture.machine.stop(&name("coder"));
    assert_eq!(fixture.end("coder", true), no_action());
    assert!(fixture.machine.jobs.is_empty());
}

#[test]
fn a_new_folder_during_a_run_runs_next_without_a_restart() {
    let mut fixture = Fixture::new();
    fixture.start("coder", "/a");
    assert!(fixture.start("coder", "/b").is_empty());
    assert_eq!(fixture.end("coder", true), (None, Some("/b".to_owned())));
    assert_eq!(fixture.end("coder", true), restarts("/b"));
}

#[test]
fn the_same_folder_registered_again_during_a_run_is_restarted_and_run_again() {
    let mut fixture = Fixture::new();
    fixture.start("coder", "/a");
    fixture.machine.stop(&name("coder"));
    assert!(fixture.start("coder", "/a").is_empty());
    assert_eq!(fixture.end("coder", true), (Some("/a".to_owned()), Some("/a".to_owned())));
}

#[test]
fn a_job_due_many_times_during_a_run_runs_once_afterwards() {
    let mut fixture = Fixture::new();
    fixture.start("coder", "/a");
    for _ in 0..5 {
        assert!(fixture.pass(HOUR).is_empty());
    }
    assert_eq!(fixture.end("coder", false), (None, Some("/a".to_owned())));
    assert_eq!(fixture.end("coder", false), no_action());
}

#[test]
fn jobs_of_one_container_run_concurrently() {
    let mut fixture = Fixture::new();
    let jobs = ["a", "b"].map(|job| (job.to_owned(), input("coder", "/a"))).to_vec_pair();
    assert_eq!(fixture.machine.start(&name("coder"), jobs, fixture.now).len(), 2);
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
        4 => (0..2usize, proptest::option::weighted(0.8, 0..2usize)).prop_map(|(index, cwd)| Step::Start(index, cwd)),
        2 => (0..2usize).prop_map(Step::Stop),
        4 => (0..7_200u64).prop_map(Step::Pass),
        6 => (0..2usize, any::<bool>()).prop_map(|(index, succeeded)| Step::End(index, succeeded)),
        1 => Just(Step::Drain),
    ]
}

/// The expected state of one container by the rules, independent of the machine.
#[derive(Clone, Default)]
struct Expected {
    folder: Option<&'static str>,
    running_in: Option<String>,
    wanted: bool,
}

const NAMES: [&str; 2] = ["one", "two"];
const FOLDERS: [&str; 2] = ["/a", "/b"];

/// Checks runs that started: one at a time for a job, with an input, and with the newest.
fn check_runs(runs: Vec<Run>, expected: &mut [Expected; 2], drained: bool) {
    for run in runs {
        let index = NAMES.iter().position(|name| *name == run.key.container.as_str()).unwrap();
        let expected = &mut expected[index];
        assert!(!drained, "a run started after the drain");
        assert!(expected.running_in.is_none(), "two at a time");
        assert_eq!(expected.folder.unwrap(), folder(&run.input.registration), "not the newest input");
        expected.running_in = Some(folder(&run.input.registration));
        expected.wanted = false;
    }
}

proptest! {
    #[test]
    fn the_rules_hold_for_all_sequences(steps in proptest::collection::vec(step(), 0..60)) {
        let mut machine = Machine::default();
        let mut now = Instant::now();
        let mut expected: [Expected; 2] = Default::default();
        let mut drained = false;
        for step in steps {
            match step {
                Step::Start(index, cwd) => {
                    let jobs = cwd.map(|cwd| ("renew".to_owned(), input(NAMES[index], FOLDERS[cwd])));
                    expected[index].folder = cwd.map(|cwd| FOLDERS[cwd]).filter(|_| !drained);
                    expected[index].wanted = expected[index].folder.is_some();
                    check_runs(machine.start(&name(NAMES[index]), jobs.into_iter().collect(), now), &mut expected, drained);
                }
                Step::Stop(index) => {
                    machine.stop(&name(NAMES[index]));
                    (expected[index].folder, expected[index].wanted) = (None, false);
                }
                Step::Pass(seconds) => {
                    now += Duration::from_secs(seconds);
                    let due = machine.next_due().is_some_and(|due| due <= now);
                    let runs = machine.advance(now);
                    // A job that was due and did not start is running, and its second run is checked at the end of the
                    // first.
                    prop_assert!(!due || machine.next_due().is_none_or(|next| next > now));
                    check_runs(runs, &mut expected, drained);
                }
                Step::End(index, succeeded) => {
                    let ran = expected[index].running_in.take();
                    let next = machine.ended(&key(NAMES[index]), succeeded);
                    let same = ran.is_some() && ran.as_deref() == expected[index].folder;
                    prop_assert_eq!(next.restart.is_some(), succeeded && same, "rule 4");
                    let wanted = expected[index].wanted && ran.is_some() && !drained;
                    prop_assert!(next.run.is_some() || !wanted, "a run was forgotten");
                    check_runs(next.run.into_iter().collect(), &mut expected, drained);
                }
                Step::Drain => {
                    machine.drain();
                    drained = true;
                    prop_assert_eq!(machine.next_due(), None);
                }
            }
            // A container with an input has a run or a timer, unless the daemon stops.
            for (index, expected) in expected.iter().enumerate() {
                let state = machine.jobs.get(&key(NAMES[index]));
                prop_assert_eq!(state.is_some(), expected.folder.is_some() || expected.running_in.is_some());
                if let (Some(state), Some(_), false) = (state, expected.folder, drained) {
                    prop_assert!(state.due.is_some());
                }
            }
        }
    }
}
