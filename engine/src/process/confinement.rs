//! The confinement of an engine that root started: which requests the kernel still grants it once it serves.
//!
//! # Layers
//!
//! | Layer | When | Denies |
//! | --- | --- | --- |
//! | another user, no capability ([`super::privileges`]) | before the first thread | root's files, processes and sockets |
//! | Landlock | before the first thread | every file, signals and abstract sockets of other processes |
//! | seccomp | when all threads run | every call that a relay does not make: files, programs, namespaces, Unix sockets, new rings |
//!
//! Each layer alone stops the attacks of the tests (`tests/suite/engine_confinement.rs`), except that only seccomp denies a
//! connection to a Unix socket that is open to every user. The engine opens other resources before it is confined: its
//! command socket, and the tracepoint for hints.
//!
//! # io_uring
//!
//! Requests on a ring do not pass seccomp (`io_uring_setup(2)`). Every ring of the engine accepts two kinds of request
//! (`IORING_REGISTER_RESTRICTIONS`), and the filter forbids new rings. Isolated shards, which start later, use epoll in any
//! case.
//!
//! # Missing layers
//!
//! An old kernel, another architecture or a user namespace may lack a layer. The engine then runs with the others and
//! reports the [`Lack`] in [`Event::Ready`](crate::command::Event::Ready).

use std::collections::BTreeMap;
use std::ffi::c_int;
use std::io;

use landlock::{
    ABI, Access, AccessFs, PathBeneath, PathFd, RestrictionStatus, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetError, RulesetStatus, Scope,
};
use rustix::process::getpid;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};
use serde::{Deserialize, Serialize};

use super::privileges::{EngineUser, become_engine};

/// A layer that is unavailable on this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Lack {
    /// The engine remains uid 0: the user namespace does not map the engine's uid.
    User,
    /// The kernel has no Landlock, or it is switched off.
    Landlock,
    /// The kernel has no seccomp filters, or not for this architecture.
    Seccomp,
}

/// An engine that is being confined. It is created while the process has one thread, and [`Confinement::seal`]ed after the
/// engine has started its threads.
#[derive(Debug)]
#[must_use]
pub struct Confinement {
    lacks: Vec<Lack>,
}

impl Confinement {
    /// Changes the user, drops every capability except `CAP_NET_BIND_SERVICE`, and closes the file system (Landlock) for the
    /// calling thread, which must be the only one, and for those that it starts.
    ///
    /// # Errors
    /// Those of [`become_engine`]. A layer that this machine lacks does not fail the call.
    pub fn start(user: EngineUser) -> io::Result<Confinement> {
        let mut lacks = Vec::new();
        if !become_engine(user)? {
            lacks.push(Lack::User);
        }
        if !close_files().is_ok_and(|status| status.ruleset != RulesetStatus::NotEnforced) {
            lacks.push(Lack::Landlock);
        }
        Ok(Confinement { lacks })
    }

    /// Installs the seccomp filter in every thread of the process, and returns what the confinement lacks.
    pub fn seal(mut self) -> Vec<Lack> {
        if filter_calls().is_err() {
            self.lacks.push(Lack::Seccomp);
        }
        self.lacks
    }
}

/// Denies the calling thread every access to a file by its name, except reading sysctls, from which the engine determines
/// the congestion control and the reason why io_uring is unavailable.
fn close_files() -> Result<RestrictionStatus, RulesetError> {
    // The crate omits rights that this kernel does not know.
    let ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(ABI::V10))?
        .scope(Scope::from_all(ABI::V10))?
        .create()?;
    let ruleset = match PathFd::new("/proc/sys") {
        Ok(sysctls) => ruleset.add_rule(PathBeneath::new(sysctls, AccessFs::ReadFile))?,
        // Without procfs there are no sysctls to read.
        Err(_) => ruleset,
    };
    ruleset.restrict_self()
}

/// The filter could not be installed.
#[derive(Debug, thiserror::Error)]
#[error("no seccomp filter: {0}")]
struct FilterError(String);

/// Installs the filter in all threads (`SECCOMP_FILTER_FLAG_TSYNC`).
fn filter_calls() -> Result<(), FilterError> {
    let failed = |error: &dyn std::fmt::Display| FilterError(error.to_string());
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(|error| failed(&error))?;
    let compile = |filter: Result<SeccompFilter, seccompiler::BackendError>| {
        filter.and_then(BpfProgram::try_from).map_err(|error| failed(&error))
    };
    // The arguments of clone3 are in memory, which a filter cannot read. Without clone3 the C library uses clone.
    let no_clone3 = SeccompFilter::new(
        [(libc::SYS_clone3, Vec::new())].into(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS.unsigned_abs()),
        arch,
    );
    // The filter returns an error instead of ending the process: a C library may try a call and continue without it.
    let listed = allowed().map_err(|error| failed(&error)).map(|calls| {
        SeccompFilter::new(
            calls,
            SeccompAction::Errno(libc::EPERM.unsigned_abs()),
            SeccompAction::Allow,
            arch,
        )
    })?;
    // The order matters: the second filter forbids installing another.
    for filter in [compile(no_clone3)?, compile(listed)?] {
        seccompiler::apply_filter_all_threads(&filter).map_err(|error| failed(&error))?;
    }
    Ok(())
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Returns the calls of an engine that serves; some of them only with certain arguments.
fn allowed() -> Result<Rules, seccompiler::BackendError> {
    let mut calls: Rules =
        ALWAYS.iter().chain(OF_THIS_ARCHITECTURE).map(|call| (*call, Vec::new())).collect();
    let mut only = |call: i64, rules: Vec<SeccompRule>| drop(calls.insert(call, rules));
    // TCP listeners only: no Unix socket on which other processes listen, no netlink, no packet socket.
    only(
        libc::SYS_socket,
        each(&[libc::AF_INET, libc::AF_INET6], |family| {
            rule(&[is(0, family)?, masked(1, SOCKET_TYPE, libc::SOCK_STREAM)?])
        })?,
    );
    // Threads of this process in its current namespaces.
    only(
        libc::SYS_clone,
        vec![rule(&[masked(0, libc::CLONE_THREAD | NEW_NAMESPACES, libc::CLONE_THREAD)?])?],
    );
    // No executable memory.
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        only(call, vec![rule(&[masked(2, libc::PROT_EXEC, 0)?])?]);
    }
    only(libc::SYS_ioctl, each(&IOCTLS, |request| rule(&[word(1, request)?]))?);
    only(libc::SYS_fcntl, each(&FCNTLS, |command| rule(&[is(1, command)?]))?);
    only(libc::SYS_prctl, each(&[libc::PR_SET_NAME, libc::PR_SET_VMA], |option| rule(&[is(0, option)?]))?);
    // Reading a limit of this process.
    let own = [is(0, 0)?, SeccompCondition::new(2, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)?];
    only(libc::SYS_prlimit64, vec![rule(&own)?]);
    // abort(3) signals its own process.
    only(libc::SYS_tgkill, vec![rule(&[is(0, getpid().as_raw_nonzero().get())?])?]);
    Ok(calls)
}

const SOCKET_TYPE: c_int = 0xf;
const NEW_NAMESPACES: c_int = libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET;
/// `TIOCOUTQ`, which for a socket is `SIOCOUTQ`, and `FIONBIO` of `asm-generic/ioctls.h`.
const IOCTLS: [u64; 2] = [0x5411, 0x5421];
const FCNTLS: [c_int; 7] = [
    libc::F_DUPFD_CLOEXEC,
    libc::F_GETFD,
    libc::F_SETFD,
    libc::F_GETFL,
    libc::F_SETFL,
    libc::F_SETPIPE_SZ,
    libc::F_GETPIPE_SZ,
];

/// The calls that are allowed with any arguments. The kernel caches this and does not run the filter for them (Linux 5.11),
/// so the calls that move bytes cost no more than without a filter.
const ALWAYS: &[i64] = &[
    // Bytes.
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_lseek,
    libc::SYS_splice,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
    // Sockets and descriptors.
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_connect,
    libc::SYS_shutdown,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_pipe2,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    // Metadata of a file, but not its contents.
    libc::SYS_newfstatat,
    libc::SYS_statx,
    // Readiness.
    libc::SYS_ppoll,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    // Memory, threads, time.
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_membarrier,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_geteuid,
    libc::SYS_getuid,
    libc::SYS_getrandom,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // The other filter denies it.
    libc::SYS_clone3,
];

/// Calls that newer architectures lack.
#[cfg(target_arch = "x86_64")]
const OF_THIS_ARCHITECTURE: &[i64] = &[libc::SYS_poll, libc::SYS_epoll_wait];
#[cfg(not(target_arch = "x86_64"))]
const OF_THIS_ARCHITECTURE: &[i64] = &[];

type Condition = Result<SeccompCondition, seccompiler::BackendError>;

/// The lower 32 bits of argument `at` are `value`.
fn word(at: u8, value: u64) -> Condition {
    SeccompCondition::new(at, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
}

/// Argument `at`, a C int, is `value`.
fn is(at: u8, value: c_int) -> Condition {
    word(at, u64::from(value.cast_unsigned()))
}

/// Argument `at`, a C int, is `value` in the bits of `mask`.
fn masked(at: u8, mask: c_int, value: c_int) -> Condition {
    let mask = u64::from(mask.cast_unsigned());
    SeccompCondition::new(
        at,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::MaskedEq(mask),
        u64::from(value.cast_unsigned()),
    )
}

/// A rule that matches if all conditions hold.
fn rule(conditions: &[SeccompCondition]) -> Result<SeccompRule, seccompiler::BackendError> {
    SeccompRule::new(conditions.to_vec())
}

/// One rule for each value; one of them has to match.
fn each<T: Copy>(
    values: &[T],
    rule: impl Fn(T) -> Result<SeccompRule, seccompiler::BackendError>,
) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    values.iter().map(|value| rule(*value)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_compiles_and_contains_no_file_program_or_namespace_calls() {
        let calls = allowed().unwrap();
        for forbidden in [
            libc::SYS_openat,
            libc::SYS_openat2,
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_mount,
            libc::SYS_move_mount,
            libc::SYS_ptrace,
            libc::SYS_process_vm_writev,
            libc::SYS_pidfd_getfd,
            libc::SYS_pidfd_open,
            libc::SYS_kill,
            libc::SYS_keyctl,
            libc::SYS_bpf,
            libc::SYS_perf_event_open,
            libc::SYS_io_uring_setup,
            libc::SYS_seccomp,
            libc::SYS_setuid,
            libc::SYS_setresuid,
            libc::SYS_capset,
            libc::SYS_socketpair,
            libc::SYS_unlinkat,
            libc::SYS_renameat2,
        ] {
            assert!(!calls.contains_key(&forbidden), "call {forbidden}");
        }
        let arch = TargetArch::try_from(std::env::consts::ARCH).unwrap();
        let filter = SeccompFilter::new(calls, SeccompAction::Errno(1), SeccompAction::Allow, arch).unwrap();
        assert!(!BpfProgram::try_from(filter).unwrap().is_empty());
    }
}
