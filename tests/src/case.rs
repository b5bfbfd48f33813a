//! Test cases and their runner: each case is a process of its own, selected by name, with a time limit.
//!
//! The program that contains the cases is also the helper program that they need: with `_opener` it is an opener, with
//! `_case NAME` it is that case alone, with a verb of the suite it is a helper process.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use landfall_engine::limits::Limits;
use landfall_engine::opener::{VERB, serve};
use landfall_engine::reactor::{self, RingChoice};
use libtest_mimic::{Arguments, Failed, Trial};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, set_parent_process_death_signal};

/// A test case for one behaviour.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    name: &'static str,
    run: Run,
}

#[derive(Clone, Copy, Debug)]
enum Run {
    EachRing(fn(RingChoice)),
    Once(fn()),
}

/// A first argument of the program, and the function that it runs; the function gets the remaining arguments.
pub type Verb = (&'static str, fn(&[String]));

impl Case {
    /// A case that runs on io_uring and on epoll.
    pub const fn each_ring(name: &'static str, run: fn(RingChoice)) -> Case {
        Case { name, run: Run::EachRing(run) }
    }

    /// A case that chooses its rings itself, or needs none.
    pub const fn once(name: &'static str, run: fn()) -> Case {
        Case { name, run: Run::Once(run) }
    }

    /// Its name on each ring.
    fn instances(&self) -> Vec<(String, RingChoice)> {
        match self.run {
            Run::Once(_) => vec![(self.name.to_owned(), RingChoice::Auto)],
            Run::EachRing(_) => vec![
                (format!("{}::io_uring", self.name), RingChoice::IoUring),
                (format!("{}::epoll", self.name), RingChoice::Epoll),
            ],
        }
    }
}

const CASE: &str = "_case";
const NOTE: &str = "landfall-note: ";

/// The main function of a suite.
///
/// # Panics
/// If a case panics, in that case's process.
pub fn main(cases: &[&[Case]], verbs: &[Verb]) -> ExitCode {
    run(cases, verbs, false)
}

/// The main function of a suite that needs more than an ordinary machine: its cases are ignored unless the caller passes
/// `--ignored`.
///
/// # Panics
/// If a case panics, in that case's process.
pub fn main_ignored(cases: &[&[Case]], verbs: &[Verb]) -> ExitCode {
    run(cases, verbs, true)
}

fn run(cases: &[&[Case]], verbs: &[Verb], when_asked: bool) -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let verb = arguments.first().map_or("", String::as_str);
    let all = || cases.iter().copied().flatten();
    if verb == VERB {
        return serve::main(std::io::stdin().as_fd()).map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS);
    }
    if verb == CASE {
        run_in_process(all(), &arguments[1]);
        return ExitCode::SUCCESS;
    }
    if let Some((_, helper)) = verbs.iter().find(|(name, _)| *name == verb) {
        helper(&arguments[1..]);
        return ExitCode::SUCCESS;
    }
    let io_uring = reactor::choose(RingChoice::IoUring, &Limits::default());
    if let Err(unusable) = &io_uring {
        println!("io_uring cannot be used here, so its cases are ignored: {unusable}");
    }
    let trials = all().flat_map(Case::instances).map(|(name, ring)| {
        let ignored = when_asked || (ring == RingChoice::IoUring && io_uring.is_err());
        Trial::test(name.clone(), move || run_in_child(&name)).with_ignored_flag(ignored)
    });
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit_code()
}

/// Prints a note that is shown even when the case passes.
pub fn note(text: &str) {
    println!("{NOTE}{text}");
}

/// Runs a case in this process, in a new network namespace.
fn run_in_process<'a>(mut all: impl Iterator<Item = &'a Case>, wanted: &str) {
    // The case ends when its runner is killed.
    set_parent_process_death_signal(Some(Signal::KILL)).unwrap();
    crate::process::raise_descriptors();
    crate::namespace::enter_new_host();
    let (case, ring) = all
        .find_map(|case| {
            case.instances().into_iter().find(|(name, _)| name == wanted).map(|(_, ring)| (case, ring))
        })
        .unwrap_or_else(|| panic!("there is no case {wanted}"));
    match case.run {
        Run::EachRing(run) => run(ring),
        Run::Once(run) => run(),
    }
}

/// Runs a case in a child process. Returns its output if it fails.
fn run_in_child(name: &str) -> Result<(), Failed> {
    let (mut printed, theirs) = std::io::pipe()?;
    let mut child = Command::new(std::env::current_exe()?)
        .args([CASE, name])
        .stdin(Stdio::null())
        .stdout(theirs.try_clone()?)
        .stderr(theirs)
        .spawn()?;
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        printed.read_to_end(&mut text).map(|_| String::from_utf8_lossy(&text).into_owned())
    });
    let with_read_timeout =
        if crate::is_long() { Duration::from_secs(3600) } else { Duration::from_secs(240) };
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).unwrap();
    // Our own child, and no other thread waits for it, so the process id is valid.
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    let patient = Timespec::try_from(with_read_timeout).unwrap();
    let ended = poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&patient))? == 1;
    if !ended {
        child.kill()?;
    }
    let status = child.wait()?;
    let text = reader.join().unwrap()?;
    if ended && status.success() {
        for line in text.lines().filter(|line| line.starts_with(NOTE)) {
            // One write, so that the lines of concurrent cases do not mix.
            std::io::stderr().write_all(format!("  {name}: {}\n", &line[NOTE.len()..]).as_bytes())?;
        }
        return Ok(());
    }
    let how = if ended { status.to_string() } else { format!("killed after {with_read_timeout:?}") };
    Err(format!("{how}\n{text}").into())
}
