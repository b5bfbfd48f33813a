//! The seccomp filter of a sandbox, as classic BPF. Pure.
//!
//! The filter notifies for `bind` and `listen` of the native architecture, and allows every other call. The library
//! `seccompiler` cannot express it: it has no `SECCOMP_RET_USER_NOTIF`, and it kills a process of a foreign architecture,
//! such as a 32-bit program. This filter allows such a program every call, and its servers are relayed.
//!
//! Proof that the program does no more: it has no loop (classic BPF jumps forward only), reads two fields of
//! `struct seccomp_data`, and has two return values. The tests interpret it for every system call number of each
//! architecture.

use libc::{BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W};
use libc::{SECCOMP_RET_ALLOW, SECCOMP_RET_USER_NOTIF, sock_filter};

/// `AUDIT_ARCH_*` of this build (include/uapi/linux/audit.h); absent where native sockets are not built.
#[cfg(target_arch = "x86_64")]
pub(super) const NATIVE_ARCHITECTURE: Option<u32> = Some(0xC000_003E);
/// `AUDIT_ARCH_*` of this build (include/uapi/linux/audit.h); absent where native sockets are not built.
#[cfg(target_arch = "aarch64")]
pub(super) const NATIVE_ARCHITECTURE: Option<u32> = Some(0xC000_00B7);
/// `AUDIT_ARCH_*` of this build (include/uapi/linux/audit.h); absent where native sockets are not built.
#[cfg(target_arch = "riscv64")]
pub(super) const NATIVE_ARCHITECTURE: Option<u32> = Some(0xC000_00F3);
/// `AUDIT_ARCH_*` of this build (include/uapi/linux/audit.h); absent where native sockets are not built.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64", target_arch = "riscv64")))]
pub(super) const NATIVE_ARCHITECTURE: Option<u32> = None;

/// A system call that the filter notifies for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Call {
    /// `bind(fd, address, length)`.
    Bind,
    /// `listen(fd, backlog)`.
    Listen,
}

impl Call {
    /// Returns the call that has this number in the native architecture.
    pub(super) fn of(number: i32) -> Option<Call> {
        match i64::from(number) {
            libc::SYS_bind => Some(Call::Bind),
            libc::SYS_listen => Some(Call::Listen),
            _ => None,
        }
    }

    fn number(self) -> u32 {
        let number = match self {
            Call::Bind => libc::SYS_bind,
            Call::Listen => libc::SYS_listen,
        };
        u32::try_from(number).unwrap_or(u32::MAX)
    }
}

/// Offsets in `struct seccomp_data` (include/uapi/linux/seccomp.h).
const NUMBER_OFFSET: u32 = 0;
const ARCHITECTURE_OFFSET: u32 = 4;

/// Instructions of the filter.
pub(super) const PROGRAM_LENGTH: usize = 7;

/// Returns the filter for an architecture, given as its `AUDIT_ARCH_*`.
pub(super) fn program(architecture: u32) -> [sock_filter; PROGRAM_LENGTH] {
    [
        load(ARCHITECTURE_OFFSET),
        // For a foreign architecture, jump to the return of "allow", three instructions after the next one.
        jump_if_equal(architecture, 0, 3),
        load(NUMBER_OFFSET),
        jump_if_equal(Call::Bind.number(), 2, 0),
        jump_if_equal(Call::Listen.number(), 1, 0),
        give_back(SECCOMP_RET_ALLOW),
        give_back(SECCOMP_RET_USER_NOTIF),
    ]
}

fn load(offset: u32) -> sock_filter {
    sock_filter { code: code(BPF_LD | BPF_W | BPF_ABS), jt: 0, jf: 0, k: offset }
}

/// Skips `then` instructions if the loaded value equals `value`, else `otherwise`.
fn jump_if_equal(value: u32, then: u8, otherwise: u8) -> sock_filter {
    sock_filter { code: code(BPF_JMP | BPF_JEQ | BPF_K), jt: then, jf: otherwise, k: value }
}

fn give_back(action: u32) -> sock_filter {
    sock_filter { code: code(BPF_RET | BPF_K), jt: 0, jf: 0, k: action }
}

/// Opcodes of classic BPF fit one byte.
fn code(opcode: u32) -> u16 {
    u16::try_from(opcode).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const X86_64: u32 = 0xC000_003E;

    /// Runs the filter as the kernel does, and returns its action.
    fn run(program: &[sock_filter], number: u32, architecture: u32) -> u32 {
        let (mut at, mut word) = (0, 0);
        // Jumps go forward only, so each instruction runs once at most.
        for _ in 0..program.len() {
            let step = &program[at];
            at += 1;
            match u32::from(step.code) {
                opcode if opcode == BPF_LD | BPF_W | BPF_ABS => {
                    word = match step.k {
                        NUMBER_OFFSET => number,
                        ARCHITECTURE_OFFSET => architecture,
                        other => panic!("a load at {other}"),
                    };
                }
                opcode if opcode == BPF_JMP | BPF_JEQ | BPF_K => {
                    at += usize::from(if word == step.k { step.jt } else { step.jf });
                }
                opcode if opcode == BPF_RET | BPF_K => return step.k,
                other => panic!("opcode {other:#x}"),
            }
        }
        panic!("the filter does not return")
    }

    #[test]
    fn only_bind_and_listen_of_the_native_architecture_notify() {
        let program = program(X86_64);
        for number in (0..2_048).chain([u32::MAX]) {
            let notifies = [Call::Bind.number(), Call::Listen.number()].contains(&number);
            let expected = if notifies { SECCOMP_RET_USER_NOTIF } else { SECCOMP_RET_ALLOW };
            assert_eq!(run(&program, number, X86_64), expected, "call {number}");
        }
    }

    #[test]
    fn foreign_architectures_are_allowed_everything() {
        let program = program(X86_64);
        // i386, ARM, AArch64, and numbers that no kernel uses.
        for architecture in [0x4000_0003, 0x4000_0028, 0xC000_00B7, 0, u32::MAX] {
            for number in 0..2_048 {
                assert_eq!(run(&program, number, architecture), SECCOMP_RET_ALLOW);
            }
        }
        // x32 shares the architecture of x86_64 and sets a bit of the number (arch/x86/include/uapi/asm/unistd.h).
        for call in [Call::Bind, Call::Listen] {
            assert_eq!(run(&program, call.number() | 0x4000_0000, X86_64), SECCOMP_RET_ALLOW);
        }
    }

    #[test]
    fn a_call_is_known_by_its_number() {
        for call in [Call::Bind, Call::Listen] {
            assert_eq!(Call::of(i32::try_from(call.number()).unwrap()), Some(call));
        }
        assert_eq!(Call::of(-1), None);
    }
}
