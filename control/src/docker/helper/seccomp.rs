//! The seccomp profile of the helper's container. Pure.
//!
//! Docker's default profile allows `mount`, `bpf` and more in a container that has `CAP_SYS_ADMIN`. This one allows the
//! calls of the helper and of its openers, and those of runc between loading the profile and executing the program. All
//! others fail with EPERM. `setns` enters network namespaces only, and `clone` creates no namespace.
//!
//! The engine documents the format (<https://docs.docker.com/engine/security/seccomp/>). It ignores names of calls that the
//! processor's architecture does not have.

use serde_json::{Value, json};

/// The namespace flags of `clone(2)`: CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET.
const NEW_NAMESPACES: u64 = 0x7e02_0000;
/// `CLONE_NEWNET`.
const NETWORK: u64 = 0x4000_0000;
/// `ENOSYS`, returned for `clone3`, whose flags are in memory that a filter cannot read. The C library then uses `clone`.
const ENOSYS: u32 = 38;

/// Returns the profile as JSON.
pub(in crate::docker) fn profile() -> String {
    let allow = |names: &[&str], arguments: Value| json!({"names": names, "action": "SCMP_ACT_ALLOW", "args": arguments});
    let masked = |mask: u64| json!([{"index": 0, "value": mask, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]);
    let network = json!([{"index": 1, "value": NETWORK, "op": "SCMP_CMP_EQ"}]);
    json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "syscalls": [
            allow(CALLS, json!([])),
            allow(&["setns"], network),
            allow(&["clone"], masked(NEW_NAMESPACES)),
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": ENOSYS},
        ],
    })
    .to_string()
}

/// The calls that are allowed with any arguments.
const CALLS: &[&str] = &[
    // Reading, writing, descriptors.
    "read",
    "readv",
    "pread64",
    "write",
    "writev",
    "pwrite64",
    "lseek",
    "close",
    "close_range",
    "dup",
    "dup2",
    "dup3",
    "fcntl",
    "ioctl",
    "pipe",
    "pipe2",
    "eventfd2",
    // Files.
    "open",
    "openat",
    "openat2",
    "stat",
    "fstat",
    "lstat",
    "newfstatat",
    "statx",
    "statfs",
    "fstatfs",
    "access",
    "faccessat",
    "faccessat2",
    "readlink",
    "readlinkat",
    "getdents64",
    "getcwd",
    "chdir",
    "fchdir",
    "umask",
    "chmod",
    "fchmod",
    "fchmodat",
    "mkdir",
    "mkdirat",
    "unlink",
    "unlinkat",
    "rename",
    "renameat",
    "renameat2",
    // Sockets.
    "socket",
    "socketpair",
    "bind",
    "listen",
    "accept",
    "accept4",
    "connect",
    "shutdown",
    "getsockname",
    "getpeername",
    "getsockopt",
    "setsockopt",
    "sendto",
    "sendmsg",
    "sendmmsg",
    "recvfrom",
    "recvmsg",
    "recvmmsg",
    // Readiness.
    "poll",
    "ppoll",
    "select",
    "pselect6",
    "epoll_create1",
    "epoll_ctl",
    "epoll_wait",
    "epoll_pwait",
    "epoll_pwait2",
    "timerfd_create",
    "timerfd_settime",
    // Memory.
    "brk",
    "mmap",
    "munmap",
    "mremap",
    "mprotect",
    "madvise",
    "membarrier",
    // Processes and threads.
    "execve",
    "execveat",
    "exit",
    "exit_group",
    "vfork",
    "wait4",
    "waitid",
    "pidfd_open",
    "pidfd_send_signal",
    "kill",
    "tgkill",
    "futex",
    "set_robust_list",
    "set_tid_address",
    "rseq",
    "arch_prctl",
    "prctl",
    "prlimit64",
    "sched_getaffinity",
    "sched_yield",
    "restart_syscall",
    // Identity, and dropping capabilities.
    "getpid",
    "getppid",
    "gettid",
    "getpgrp",
    "getpgid",
    "setpgid",
    "getsid",
    "setsid",
    "getuid",
    "geteuid",
    "getresuid",
    "getgid",
    "getegid",
    "getresgid",
    "getgroups",
    "capget",
    "capset",
    // Signals and time.
    "rt_sigaction",
    "rt_sigprocmask",
    "rt_sigreturn",
    "rt_sigtimedwait",
    "sigaltstack",
    "clock_gettime",
    "clock_getres",
    "clock_nanosleep",
    "nanosleep",
    "gettimeofday",
    "getrandom",
    "uname",
    "sysinfo",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_for_file_systems_keys_and_other_processes_are_not_listed() {
        for forbidden in [
            "mount",
            "umount2",
            "fsopen",
            "fsmount",
            "move_mount",
            "open_tree",
            "pivot_root",
            "chroot",
            "keyctl",
            "add_key",
            "request_key",
            "bpf",
            "perf_event_open",
            "ptrace",
            "process_vm_readv",
            "process_vm_writev",
            "pidfd_getfd",
            "unshare",
            "setns",
            "clone",
            "open_by_handle_at",
            "init_module",
            "finit_module",
            "io_uring_setup",
            "userfaultfd",
            "setuid",
            "setresuid",
            "mknod",
            "mknodat",
            "chown",
            "fchown",
        ] {
            assert!(!CALLS.contains(&forbidden), "{forbidden}");
        }
    }

    #[test]
    fn setns_enters_networks_only_and_clone_creates_no_namespace() {
        let profile: Value = serde_json::from_str(&profile()).unwrap();
        assert_eq!(profile["defaultAction"], "SCMP_ACT_ERRNO");
        let rule = |name: &str| {
            let rules = profile["syscalls"].as_array().unwrap();
            rules.iter().filter(|rule| rule["names"] == json!([name])).cloned().collect::<Vec<_>>()
        };
        assert_eq!(
            rule("setns")[0]["args"][0],
            json!({"index": 1, "value": 0x4000_0000, "op": "SCMP_CMP_EQ"})
        );
        assert_eq!(rule("clone")[0]["args"][0]["value"], 2_114_060_288_u64);
        assert_eq!(rule("clone3")[0]["errnoRet"], 38);
    }
}
