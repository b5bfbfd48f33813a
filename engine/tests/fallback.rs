//! The fallback to epoll where io_uring is refused, with its reason.
//!
//! One function runs all tests in sequence: a sysctl affects the whole machine, so tests must not run in parallel.
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a test, which says what it skipped")]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use landfall_engine::command::{RingKind, RingReport};
use landfall_engine::limits::Limits;
use landfall_engine::reactor::{self, ReactorError, RingChoice, Unusable, Uring};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

/// Numbers that are the same on every architecture (asm-generic/unistd.h, and x86's table since 5.1).
const IO_URING_SETUP: i64 = 425;
const IO_URING_ENTER: i64 = 426;
const IO_URING_REGISTER: i64 = 427;

const SYSCTL: &str = "/proc/sys/kernel/io_uring_disabled";

/// Runs `what` on a thread on which the call `refused` fails with `errno`; a seccomp filter applies to one thread.
fn refusing<T: Send>(refused: i64, errno: rustix::io::Errno, what: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let code = u32::try_from(errno.raw_os_error()).unwrap();
            let filter = SeccompFilter::new(
                BTreeMap::from([(refused, Vec::new())]),
                SeccompAction::Allow,
                SeccompAction::Errno(code),
                std::env::consts::ARCH.try_into().unwrap(),
            );
            let program: BpfProgram = filter.unwrap().try_into().unwrap();
            seccompiler::apply_filter(&program).unwrap();
            what()
        });
        thread.join().unwrap()
    })
}

fn automatic() -> Result<RingReport, Unusable> {
    reactor::choose(RingChoice::Auto, &Limits::default())
}

fn assert_falls_back(report: Result<RingReport, Unusable>, why: &str) {
    let report = report.unwrap();
    assert_eq!(report.kind, RingKind::Epoll);
    let reason = report.reason.unwrap();
    assert!(reason.contains(why), "{reason:?} does not name {why:?}");
    println!("{reason}");
}

/// Restores the sysctl when dropped.
struct Restore(String);

impl Drop for Restore {
    fn drop(&mut self) {
        std::fs::write(SYSCTL, &self.0).unwrap();
    }
}

#[test]
fn a_refused_io_uring_falls_back_to_epoll_with_the_reason() {
    if let Err(unusable) = Uring::self_test(&Limits::default()) {
        println!("skipped: there is no io_uring to refuse: {unusable}");
        return;
    }
    assert_eq!(automatic().unwrap(), RingReport { kind: RingKind::IoUring, reason: None });
    use rustix::io::Errno;
    assert_falls_back(refusing(IO_URING_SETUP, Errno::PERM, automatic), "seccomp");
    assert_falls_back(refusing(IO_URING_SETUP, Errno::NOSYS, automatic), "ENOSYS");
    assert_falls_back(refusing(IO_URING_REGISTER, Errno::PERM, automatic), "seccomp");
    // Some sandboxes permit the creation of a ring and then refuse its requests.
    assert_falls_back(refusing(IO_URING_ENTER, Errno::PERM, automatic), "self-test");
    assert_falls_back(refusing(IO_URING_ENTER, Errno::NOSYS, automatic), "self-test");

    // The engine waits for locked memory that rings of ended processes still hold, and then falls back.
    let started = Instant::now();
    assert_falls_back(refusing(IO_URING_SETUP, Errno::NOMEM, automatic), "ENOMEM");
    assert!(started.elapsed() >= Duration::from_secs(1), "after {:?}", started.elapsed());

    // epoll needs descriptors, too. A caller that requires io_uring gets no other poller.
    let exhausted = refusing(IO_URING_SETUP, Errno::MFILE, automatic).unwrap_err();
    assert!(!exhausted.fall_back, "{exhausted}");
    let alone = || reactor::choose(RingChoice::IoUring, &Limits::default());
    let refused = refusing(IO_URING_SETUP, Errno::PERM, alone).unwrap_err();
    assert!(refused.to_string().contains("seccomp"), "{refused}");

    a_submission_that_keeps_failing_ends_the_reactor();
    switched_off();
}

/// The reactor must tolerate a temporary shortage of memory, and must give up after a time limit.
fn a_submission_that_keeps_failing_ends_the_reactor() {
    use rustix::io::Errno;
    for errno in [Errno::AGAIN, Errno::BUSY] {
        let error: ReactorError = refusing(IO_URING_ENTER, errno, || {
            let mut reactor = Uring::reactor(&Limits::default()).unwrap();
            let mut events = Vec::new();
            let mut turns = 0u32;
            loop {
                turns += 1;
                assert!(turns < 100, "it does not give up, or it spins");
                if let Err(error) = reactor.turn(None, &mut events) {
                    break error;
                }
            }
        });
        assert_eq!(error.source, errno);
    }
}

fn switched_off() {
    let Ok(before) = std::fs::read_to_string(SYSCTL) else {
        println!("skipped: this kernel has no sysctl kernel.io_uring_disabled");
        return;
    };
    let report = {
        let _restore = Restore(before);
        if let Err(error) = std::fs::write(SYSCTL, "2") {
            println!("skipped: kernel.io_uring_disabled cannot be set: {error}");
            return;
        }
        automatic()
    };
    assert_falls_back(report, "kernel.io_uring_disabled=2");
}
