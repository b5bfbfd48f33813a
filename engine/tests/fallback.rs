//! Where io_uring is refused, epoll takes its place and the report says why.
//!
//! One test after the other in one function: a sysctl is one for the whole machine, so nothing here may run beside it.
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

/// Runs `what` on a thread for which `refused` fails with `errno`: a seccomp filter is a thread's own.
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

/// Puts the sysctl back, whatever happens.
struct Restore(String);

impl Drop for Restore {
    fn drop(&mut self) {
        std::fs::write(SYSCTL, &self.0).unwrap();
    }
}

#[test]
fn a_refused_io_uring_is_replaced_and_the_reason_told() {
    if let Err(unusable) = Uring::self_test(&Limits::default()) {
        println!("skipped: there is no io_uring to refuse: {unusable}");
        return;
    }
    assert_eq!(automatic().unwrap(), RingReport { kind: RingKind::IoUring, reason: None });
    use rustix::io::Errno;
    assert_falls_back(refusing(IO_URING_SETUP, Errno::PERM, automatic), "seccomp");
    assert_falls_back(refusing(IO_URING_SETUP, Errno::NOSYS, automatic), "ENOSYS");
    assert_falls_back(refusing(IO_URING_REGISTER, Errno::PERM, automatic), "seccomp");
    // Sandboxes exist that let a ring be made and then refuse to run it.
    assert_falls_back(refusing(IO_URING_ENTER, Errno::PERM, automatic), "self-test");
    assert_falls_back(refusing(IO_URING_ENTER, Errno::NOSYS, automatic), "self-test");

    // Locked memory that rings of ended processes still hold is waited for, and then done without.
    let started = Instant::now();
    assert_falls_back(refusing(IO_URING_SETUP, Errno::NOMEM, automatic), "ENOMEM");
    assert!(started.elapsed() >= Duration::from_secs(1), "after {:?}", started.elapsed());

    // Descriptors are needed by epoll as well, and a caller that asks for io_uring alone gets no other poller.
    let exhausted = refusing(IO_URING_SETUP, Errno::MFILE, automatic).unwrap_err();
    assert!(!exhausted.fall_back, "{exhausted}");
    let alone = || reactor::choose(RingChoice::IoUring, &Limits::default());
    let refused = refusing(IO_URING_SETUP, Errno::PERM, alone).unwrap_err();
    assert!(refused.to_string().contains("seccomp"), "{refused}");

    a_submission_that_keeps_failing_ends_the_reactor();
    switched_off();
}

/// Not at once, since the kernel may be short of memory for a while; but not never.
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
