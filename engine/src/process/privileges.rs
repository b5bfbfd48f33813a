//! The privileges of a process: capabilities that are dropped permanently, and the user to which root's engine changes.
//!
//! # Sets
//!
//! A thread has five capability sets (`capabilities(7)`). Dropping a capability from `permitted` and `effective` is not
//! enough: `execve(2)` as uid 0 fills them again from the bounding set. [`drop_capabilities`] therefore also empties
//! `inheritable`, `ambient` and the bounding set, locks the secure bits so that uid 0 grants nothing (`SECBIT_NOROOT`), and
//! sets `no_new_privs`. All of it belongs to one thread and is inherited by the threads and programs that it starts, so it
//! is done while the process has a single thread.
//!
//! # The user of root's engine
//!
//! A process of uid 0 without any capability still owns root's files: it may write `/proc/sys/kernel/core_pattern`, and the
//! next crash gives it root's privileges again. An engine that root starts therefore changes to a user that owns no files
//! ([`EngineUser`]). `nobody` is not suitable: NFS, user namespaces and other daemons use it, too, and processes of one user
//! may signal each other.

use std::io;

use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Gid, Uid, geteuid};
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets};

/// The uid, and the gid, of an engine that root starts, where no system user [`ENGINE_USER_NAME`] exists.
///
/// The number is outside of every range that Linux systems assign: below 2³¹, since some tools read a uid as signed; above
/// the ranges of `useradd` (1000 to 60000), systemd-homed (60001 to 60513), `DynamicUser` (61184 to 65519), `/etc/subuid`
/// (100000 to 600099999), systemd-nspawn (524288 to 1879048191) and SSSD (200000 to 2000199999); below the range for foreign
/// disk images (from 2147352576). See <https://systemd.io/UIDS-GIDS/>, `login.defs(5)` and `sssd-ldap(5)`.
pub const ENGINE_UID: u32 = 2_100_008_974;

/// The system user that an administrator may create for root's engine. It is used if its uid and gid are those of a system
/// account (1 to 999), so that the account of a person with this name is never used.
pub const ENGINE_USER_NAME: &str = "landfall";

/// The uids and gids of system accounts (`SYS_UID_MAX` in `login.defs(5)`).
const SYSTEM_IDS: std::ops::RangeInclusive<u32> = 1..=999;

/// The user to which root's engine changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineUser {
    /// Its uid.
    pub uid: u32,
    /// Its only group.
    pub gid: u32,
}

impl EngineUser {
    /// The number that landfall reserves.
    const FIXED: EngineUser = EngineUser { uid: ENGINE_UID, gid: ENGINE_UID };

    /// Returns the user on this machine: the system user [`ENGINE_USER_NAME`] if `/etc/passwd` has one, else [`ENGINE_UID`].
    ///
    /// The file is read directly: a name service would load libraries into a process that still has every privilege.
    pub fn of_this_machine() -> EngineUser {
        named_user().unwrap_or(EngineUser::FIXED)
    }
}

fn named_user() -> Option<EngineUser> {
    system_user(&std::fs::read_to_string("/etc/passwd").unwrap_or_default())
}

/// Finds the engine's user in the text of `passwd(5)`.
fn system_user(passwd: &str) -> Option<EngineUser> {
    let line = passwd.lines().find(|line| line.split(':').next() == Some(ENGINE_USER_NAME))?;
    let mut numbers =
        line.split(':').skip(2).map(|field| field.parse().ok().filter(|id| SYSTEM_IDS.contains(id)));
    let (uid, gid) = (numbers.next()??, numbers.next()??);
    Some(EngineUser { uid, gid })
}

/// Returns the uids whose processes act for the calling user: its own, and for root those that root's engine may have.
///
/// A listening socket of one of them belongs to a landfall of this user. Root's engine may have either of its two uids,
/// since the system user may have been created after the engine started.
pub fn own_uids() -> Vec<u32> {
    let own = geteuid();
    let engines =
        if own.is_root() { vec![EngineUser::FIXED, EngineUser::of_this_machine()] } else { Vec::new() };
    let mut uids: Vec<u32> =
        std::iter::once(own.as_raw()).chain(engines.into_iter().map(|engine| engine.uid)).collect();
    uids.sort_unstable();
    uids.dedup();
    uids
}

/// Drops every capability of the calling thread except `keep` from all five sets, and ensures that it never regains one.
///
/// Call it while the process has a single thread. The capabilities in `keep` remain in `permitted` and `effective` only, so
/// a program that this process executes starts without them. An ordinary user may not change the bounding set;
/// `no_new_privs` covers what that set would allow.
///
/// # Errors
/// Those of `capset(2)` and `prctl(2)`, which do not fail for a thread that only drops capabilities.
pub fn drop_capabilities(keep: CapabilitySet) -> io::Result<()> {
    let had = rustix::thread::capabilities(None)?;
    if had.effective.contains(CapabilitySet::SETPCAP) {
        empty_bounding_set()?;
        rustix::thread::set_capabilities_secure_bits(LOCKED)?;
    }
    rustix::thread::clear_ambient_capability_set()?;
    let kept = had.permitted & keep;
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    rustix::thread::set_capabilities(None, sets)?;
    rustix::thread::set_no_new_privs(true)?;
    Ok(())
}

/// Uid 0 grants no capability at `execve(2)`, a change of uid keeps none, and none becomes ambient; all of it permanently.
const LOCKED: CapabilitiesSecureBits = CapabilitiesSecureBits::NO_ROOT
    .union(CapabilitiesSecureBits::NO_ROOT_LOCKED)
    .union(CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED)
    .union(CapabilitiesSecureBits::KEEP_CAPS_LOCKED)
    .union(CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE)
    .union(CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED);

fn empty_bounding_set() -> io::Result<()> {
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // This kernel has no capability with this number or a higher one.
            Err(Errno::INVAL) => break,
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// Gives the calling thread, which must be the only one of its process, the privileges of an engine: it changes to `user` if
/// it is root's, and drops every capability except `CAP_NET_BIND_SERVICE`. Returns whether the user was changed, or did not
/// need to be.
///
/// In a user namespace that does not map the uid the thread remains uid 0, which is root there only.
///
/// # Errors
/// Those of [`drop_capabilities`].
pub fn become_engine(user: EngineUser) -> io::Result<bool> {
    let changed = !geteuid().is_root() || change_user(user).is_ok();
    drop_capabilities(CapabilitySet::NET_BIND_SERVICE)?;
    Ok(changed)
}

/// Changes every uid and gid of the calling thread, and keeps its capabilities.
fn change_user(user: EngineUser) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    // The uid is changed last: afterwards the groups cannot be changed any more.
    rustix::thread::set_keep_capabilities(true)?;
    rustix::thread::set_thread_groups(&[])?;
    rustix::thread::set_thread_res_gid(gid, gid, gid)?;
    rustix::thread::set_thread_res_uid(uid, uid, uid)?;
    // The change cleared the effective set; the following calls need CAP_SETPCAP.
    let kept = rustix::thread::capabilities(None)?;
    rustix::thread::set_capabilities(None, CapabilitySets { effective: kept.permitted, ..kept })?;
    // Another engine has the same uid: it may not trace this one or read its memory.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_system_account_of_that_name_is_used() {
        let user = |line: &str| system_user(&format!("root:x:0:0:root:/root:/bin/sh\n{line}\n"));
        assert_eq!(
            user("landfall:x:121:130::/nonexistent:/usr/sbin/nologin"),
            Some(EngineUser { uid: 121, gid: 130 })
        );
        for refused in [
            "landfall:x:0:0::/:/bin/sh",
            "landfall:x:121:0::/:/bin/sh",
            "landfall:x:1000:1000:A person:/home/landfall:/bin/sh",
            "landfall:x:65534:65534::/:/bin/sh",
            "landfall2:x:121:121::/:/bin/sh",
            "landfall:x:121",
            "",
        ] {
            assert_eq!(user(refused), None, "{refused}");
        }
    }

    #[test]
    fn the_fixed_uid_is_outside_the_ranges_of_the_system() {
        for assigned in [0..=65_535, 100_000..=600_099_999, 524_288..=1_879_048_191, 200_000..=2_000_199_999]
        {
            assert!(!assigned.contains(&ENGINE_UID));
        }
    }

    #[test]
    fn the_uids_of_a_user_are_its_own_and_those_of_its_engine() {
        let uids = own_uids();
        assert!(uids.contains(&geteuid().as_raw()));
        assert_eq!(uids.contains(&ENGINE_UID), geteuid().is_root());
    }

    #[test]
    fn an_engine_of_root_keeps_only_low_ports_and_no_set_grants_more() {
        // The changes belong to a thread, so a new one makes them.
        let left = std::thread::spawn(|| {
            let was_root = geteuid().is_root();
            become_engine(EngineUser::FIXED).unwrap();
            let bounding = (0..u64::BITS)
                .filter(|number| {
                    let capability = CapabilitySet::from_bits_retain(1 << number);
                    rustix::thread::capability_is_in_bounding_set(capability).unwrap_or(false)
                })
                .count();
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            (was_root, rustix::thread::capabilities(None).unwrap(), bounding, status)
        });
        let (was_root, left, bounding, status) = left.join().unwrap();
        assert!(CapabilitySet::NET_BIND_SERVICE.contains(left.permitted));
        assert_eq!(left.permitted, left.effective);
        assert!(left.inheritable.is_empty());
        assert!(status.contains("NoNewPrivs:\t1"), "{status}");
        if was_root {
            assert_eq!(bounding, 0);
        }
    }
}
