//! Getting a ring that can be relied on: set up with what this kernel has, restricted, tried once.

use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode};
use rustix::fd::OwnedFd;
use rustix::io::Errno;

use super::{COMPLETION_ENTRIES, SUBMISSION_ENTRIES, UringRing};
use crate::limits::Limits;
use crate::ring::{Op, Outcome, Received, Ring, Submitted, Token, Unusable, Way, ran_out};

impl UringRing {
    /// Makes a ring, and has it tell that a socket became readable and that a wait was cancelled: what every relayed
    /// connection rests on. Some sandboxes let a ring be made and then refuse its requests.
    ///
    /// # Errors
    /// Why io_uring cannot be used here.
    pub fn self_test(limits: &Limits) -> Result<(), Unusable> {
        let mut ring = UringRing::new(limits)?;
        let failed = |what: &str| Unusable {
            reason: format!("io_uring failed its self-test: {what}"),
            fall_back: true,
        };
        let (ours, theirs) = rustix::net::socketpair(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::STREAM,
            rustix::net::SocketFlags::CLOEXEC | rustix::net::SocketFlags::NONBLOCK,
            None,
        )
        .map_err(|errno| ran_out("a socket pair", errno))?;
        let ours = ring.adopt(ours);
        let recv = |socket: &Rc<OwnedFd>| Op::Recv { socket: socket.clone(), way: Way::Copy, eager: false };
        let wait = |ring: &mut UringRing, what| {
            let mut over = Vec::new();
            ring.turn(Some(Instant::now() + Duration::from_secs(2)), &mut over)
                .map_err(|error| failed(&error.to_string()))?;
            over.pop().map(|completion| completion.outcome).ok_or_else(|| failed(what))
        };
        let Submitted::Pending(_) = ring.submit(Token(1), recv(&ours)) else {
            return Err(failed("a read from an empty socket did not wait"));
        };
        rustix::io::write(&theirs, b"!").map_err(|errno| ran_out("a byte's room", errno))?;
        match wait(&mut ring, "readiness was not told within two seconds")? {
            Outcome::Received(Received::Bytes(_)) => {}
            other => return Err(failed(&format!("a byte was sent and {other:?} came"))),
        }
        let Submitted::Pending(key) = ring.submit(Token(2), recv(&ours)) else {
            return Err(failed("a second read did not wait"));
        };
        ring.cancel(key);
        match wait(&mut ring, "a cancel was not told within two seconds")? {
            Outcome::Cancelled(None) => Ok(()),
            other => Err(failed(&format!("a read was cancelled and {other:?} came"))),
        }
    }
}

pub(super) fn set_up() -> Result<IoUring, Unusable> {
    let mut builder = IoUring::builder();
    builder
        .dontfork()
        .setup_cqsize(COMPLETION_ENTRIES)
        .setup_submit_all()
        .setup_r_disabled()
        .setup_single_issuer();
    // Kernel 6.1: completions are worked off when this thread asks for them, not whenever it is interrupted.
    let deferred = builder.clone().setup_defer_taskrun().setup_taskrun_flag().build(SUBMISSION_ENTRIES);
    // Kernel 6.0 knows SINGLE_ISSUER and not DEFER_TASKRUN; 5.19 knows neither.
    let uring = deferred
        .or_else(|_| builder.clone().setup_coop_taskrun().setup_taskrun_flag().build(SUBMISSION_ENTRIES))
        .or_else(|_| {
            IoUring::builder()
                .dontfork()
                .setup_cqsize(COMPLETION_ENTRIES)
                .setup_r_disabled()
                .setup_coop_taskrun()
                .setup_taskrun_flag()
                .build(SUBMISSION_ENTRIES)
        })
        .map_err(|error| explain(&error))?;
    if !uring.params().is_feature_nodrop() || !uring.params().is_feature_ext_arg() {
        return Err(Unusable {
            reason: "this kernel's io_uring may lose completions (it is older than 5.11)".into(),
            fall_back: true,
        });
    }
    let mut allowed = [opcode::PollAdd::CODE, opcode::AsyncCancel::CODE].map(Restriction::sqe_op);
    uring
        .submitter()
        .register_restrictions(&mut allowed)
        .and_then(|()| uring.submitter().register_enable_rings())
        .map_err(|error| explain(&error))?;
    Ok(uring)
}

fn explain(error: &io::Error) -> Unusable {
    let errno = error.raw_os_error().map_or(Errno::IO, Errno::from_raw_os_error);
    match errno {
        Errno::PERM | Errno::ACCESS => Unusable { reason: forbidden_by(), fall_back: true },
        Errno::NOSYS => Unusable {
            reason: "this kernel, or the sandbox around us, has no io_uring (ENOSYS)".into(),
            fall_back: true,
        },
        Errno::INVAL => Unusable {
            reason: "this kernel's io_uring is older than 5.19 and lacks what is needed (EINVAL)".into(),
            fall_back: true,
        },
        errno => ran_out("an io_uring", errno),
    }
}

fn forbidden_by() -> String {
    let sysctl = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
    match sysctl.trim() {
        "2" => "io_uring is switched off (sysctl kernel.io_uring_disabled=2)".into(),
        "1" => "io_uring is kept for a group that we are not in (sysctl kernel.io_uring_disabled=1)".into(),
        _ => {
            "io_uring is forbidden here (EPERM; a seccomp profile such as Docker's default does that)".into()
        }
    }
}
