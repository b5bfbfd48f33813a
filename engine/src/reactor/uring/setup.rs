//! Creates a ring: sets it up with the features of this kernel, restricts its requests, and tests it once.

use std::io;
use std::time::{Duration, Instant};

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue};
use rustix::event::EventfdFlags;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::time::{TimerfdClockId, TimerfdFlags, timerfd_create};

use super::{COMPLETION_ENTRIES, SUBMISSION_ENTRIES, Uring};
use crate::limits::Limits;
use crate::reactor::choice::ran_out;
use crate::reactor::{Event, EventKind, Reactor, Token, Unusable};

/// The longest wait for locked memory. The kernel frees the rings of ended processes asynchronously.
const MEMORY_TIMEOUT: Duration = Duration::from_secs(1);
/// The pause after the first attempt, doubled each time.
const MEMORY_PAUSE_FIRST: Duration = Duration::from_millis(5);
const MEMORY_PAUSE_MAX: Duration = Duration::from_millis(200);
/// Time limit for a completion in the self-test.
const TEST_TIMEOUT: Duration = Duration::from_secs(2);

impl Uring {
    /// Creates a ring and checks that it reports a readable socket and the removal of a registration, on which every relayed
    /// connection depends. Some sandboxes permit the creation of a ring and then refuse its requests.
    ///
    /// # Errors
    /// The reason why io_uring is unusable.
    pub fn self_test(limits: &Limits) -> Result<(), Unusable> {
        let mut reactor = Uring::reactor(limits)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, theirs) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(|errno| ran_out("a socket pair", errno))?;
        let key = reactor.register(ours, Token(1));
        rustix::io::write(&theirs, b"!").map_err(|errno| ran_out("room for one byte", errno))?;
        await_event(&mut reactor, "readiness was not reported", |reactor, event| {
            event == EventKind::Ready && reactor.is_readable(key)
        })?;
        reactor.close_and_report(key);
        await_event(&mut reactor, "a removal was not reported", |_, event| event == EventKind::Closed)
    }
}

/// Turns until an event is the expected one.
fn await_event(
    reactor: &mut Reactor<Uring>,
    otherwise: &str,
    expected: impl Fn(&Reactor<Uring>, EventKind) -> bool,
) -> Result<(), Unusable> {
    let failed =
        |what: &str| Unusable { reason: format!("io_uring failed its self-test: {what}"), fall_back: true };
    let until = Instant::now() + TEST_TIMEOUT;
    let mut events: Vec<Event> = Vec::new();
    while Instant::now() < until {
        reactor.turn(Some(until), &mut events).map_err(|error| failed(&error.to_string()))?;
        if events.drain(..).any(|event| expected(reactor, event.kind)) {
            return Ok(());
        }
    }
    Err(failed(&format!("{otherwise} within {} s", TEST_TIMEOUT.as_secs())))
}

pub(super) fn eventfd() -> Result<OwnedFd, Unusable> {
    rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
        .map_err(|errno| ran_out("an eventfd", errno))
}

pub(super) fn timer() -> Result<OwnedFd, Unusable> {
    timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)
        .map_err(|errno| ran_out("a timer", errno))
}

pub(super) fn set_up() -> Result<IoUring, Unusable> {
    let until = Instant::now() + MEMORY_TIMEOUT;
    let mut pause = MEMORY_PAUSE_FIRST;
    let uring = loop {
        match build() {
            Err(error) if is_out_of_memory(&error) && Instant::now() < until => {
                std::thread::sleep(pause);
                pause = (2 * pause).min(MEMORY_PAUSE_MAX);
            }
            built => break built.map_err(|error| explain(&error))?,
        }
    };
    let parameters = uring.params();
    if !parameters.is_feature_nodrop() {
        return Err(too_old("may lose completions", "5.5"));
    }
    if !parameters.is_feature_skip_cqe_on_success() {
        return Err(too_old("lacks IOSQE_CQE_SKIP_SUCCESS", "5.17"));
    }
    let mut allowed = [
        Restriction::sqe_op(opcode::PollAdd::CODE),
        Restriction::sqe_op(opcode::AsyncCancel::CODE),
        Restriction::sqe_flags_allowed(squeue::Flags::SKIP_SUCCESS.bits()),
    ];
    uring
        .submitter()
        .register_restrictions(&mut allowed)
        .and_then(|()| uring.submitter().register_enable_rings())
        .map_err(|error| explain(&error))?;
    Ok(uring)
}

fn build() -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder
        .dontfork()
        .setup_cqsize(COMPLETION_ENTRIES)
        .setup_submit_all()
        .setup_r_disabled()
        .setup_single_issuer();
    // Kernel 6.1: completions are processed when this thread requests them, not at every interrupt.
    let deferred = builder.clone().setup_defer_taskrun().setup_taskrun_flag().build(SUBMISSION_ENTRIES);
    // Kernel 6.0 has SINGLE_ISSUER but not DEFER_TASKRUN; 5.19 has neither. Only EINVAL means that a flag is unknown.
    let unknown = |error: &io::Error| error.raw_os_error() == Some(Errno::INVAL.raw_os_error());
    match deferred {
        Err(error) if unknown(&error) => {}
        built => return built,
    }
    match builder.clone().setup_coop_taskrun().setup_taskrun_flag().build(SUBMISSION_ENTRIES) {
        Err(error) if unknown(&error) => {}
        built => return built,
    }
    IoUring::builder()
        .dontfork()
        .setup_cqsize(COMPLETION_ENTRIES)
        .setup_r_disabled()
        .setup_coop_taskrun()
        .setup_taskrun_flag()
        .build(SUBMISSION_ENTRIES)
}

fn is_out_of_memory(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::NOMEM.raw_os_error())
}

fn too_old(what: &str, version: &str) -> Unusable {
    let reason = format!("this kernel's io_uring {what} (it is older than {version})");
    Unusable { reason, fall_back: true }
}

fn explain(error: &io::Error) -> Unusable {
    let errno = error.raw_os_error().map_or(Errno::IO, Errno::from_raw_os_error);
    let reason = match errno {
        Errno::PERM | Errno::ACCESS => forbidden_by(),
        Errno::NOSYS => "this kernel, or the sandbox around this process, has no io_uring (ENOSYS)".into(),
        Errno::INVAL => {
            "this kernel's io_uring is older than 5.19 and lacks required features (EINVAL)".into()
        }
        Errno::NOMEM => format!(
            "the kernel had no locked memory for an io_uring within {} s (ENOMEM): other rings of this user hold it; \
             raise `ulimit -l`",
            MEMORY_TIMEOUT.as_secs()
        ),
        errno => return ran_out("an io_uring", errno),
    };
    Unusable { reason, fall_back: true }
}

fn forbidden_by() -> String {
    let sysctl = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
    match sysctl.trim() {
        "2" => "io_uring is switched off (sysctl kernel.io_uring_disabled=2)".into(),
        "1" => {
            "io_uring is reserved for a group that this user is not in (sysctl kernel.io_uring_disabled=1)"
                .into()
        }
        _ => {
            "io_uring is forbidden here (EPERM; a seccomp profile such as Docker's default does that)".into()
        }
    }
}
