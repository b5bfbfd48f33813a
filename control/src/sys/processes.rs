//! Facts about processes, read from `/proc`: the owner of a socket, and the start time of a process. The only file that
//! uses the `procfs` crate.
//!
//! Names and owners are for messages only: a process may be gone or hidden, and chooses its own name. The start time
//! comes from the kernel and decides whether a process is still the same one.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::{NonZeroU16, NonZeroU32};
use std::time::{Duration, SystemTime};

use landfall_engine::process::privileges::ENGINE_UID;
use nix::unistd::{Uid, User};
use procfs::ProcError;
use procfs::net::{TcpNetEntry, TcpState};
use procfs::process::{FDTarget, Process, Stat};
use serde::{Deserialize, Serialize};

use crate::model::registration::Started;

/// The most characters of a process's name, which could be as long as its command line.
const NAME_CHARS_MAX: usize = 255;

/// A process in messages. It chooses its own name: escape it before printing it to a terminal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessFact {
    /// The program that it was started as if that is one word, else the kernel's short name; the first `NAME_CHARS_MAX`
    /// characters.
    pub name: String,
    /// Its process id in this process's PID namespace.
    pub pid: u32,
}

/// The holder of a host port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Holder {
    /// A visible process, with its command line.
    Process(ProcessFact, String),
    /// A process that this user may not inspect; with the name of its user.
    User(String),
    /// No process listens there, or `/proc` could not be read.
    Unknown,
}

/// Returns the process that holds one of the sockets in `inodes`; if several share it, the one with the lowest id,
/// which is usually their parent.
pub fn owner_of_sockets(inodes: &[u64]) -> Option<ProcessFact> {
    owner(inodes).map(|process| fact(&process))
}

/// Returns the processes that hold sockets, in one walk over all processes: for each of `inodes` the one with the
/// lowest id. It takes tens of milliseconds on a machine with many processes.
pub fn owners_of_sockets(inodes: &[u64]) -> BTreeMap<u64, ProcessFact> {
    let mut owners: BTreeMap<u64, ProcessFact> = BTreeMap::new();
    let all = if inodes.is_empty() { None } else { procfs::process::all_processes().ok() };
    for process in all.into_iter().flatten().flatten() {
        let Ok(descriptors) = process.fd() else { continue };
        let sockets = descriptors.flatten().filter_map(|descriptor| match descriptor.target {
            FDTarget::Socket(inode) if inodes.contains(&inode) => Some(inode),
            _ => None,
        });
        let sockets: Vec<u64> = sockets.collect();
        if sockets.is_empty() {
            continue;
        }
        let found = fact(&process);
        for inode in sockets {
            let owner = owners.entry(inode).or_insert_with(|| found.clone());
            if found.pid < owner.pid {
                *owner = found.clone();
            }
        }
    }
    owners
}

/// Returns the holder of a port on the host's loopback addresses or on all addresses.
pub fn holder_of_port(port: NonZeroU16) -> Holder {
    let rows = procfs::net::tcp().unwrap_or_default().into_iter();
    let rows6 = procfs::net::tcp6().unwrap_or_default().into_iter();
    let mut rows: Vec<TcpNetEntry> = rows.chain(rows6).filter(|row| holds(row, port)).collect();
    // A listener is a better explanation than the end of a connection with the same local port.
    rows.sort_by_key(|row| row.state != TcpState::Listen);
    let inodes: Vec<u64> = rows.iter().map(|row| row.inode).filter(|inode| *inode != 0).collect();
    if let Some(process) = owner(&inodes) {
        let line = process.cmdline().unwrap_or_default().join(" ");
        return Holder::Process(fact(&process), line);
    }
    rows.first().map_or(Holder::Unknown, |row| Holder::User(user_name(row.uid)))
}

/// Returns the user and the inode of a listener that accepts connections to this address of the host. For a wildcard
/// address, any listener of the port counts.
pub fn listener_at(address: IpAddr, port: NonZeroU16) -> Option<(u32, u64)> {
    let rows = procfs::net::tcp().unwrap_or_default().into_iter();
    let mut rows = rows.chain(procfs::net::tcp6().unwrap_or_default());
    let takes = |row: &TcpNetEntry| {
        let (bound, at) = (row.local_address.ip().to_canonical(), row.local_address.port());
        let covers = bound == address
            || address.is_unspecified()
            || bound.is_unspecified() && (bound.is_ipv6() || address.is_ipv4());
        row.state == TcpState::Listen && at == port.get() && covers
    };
    rows.find(takes).map(|row| (row.uid, row.inode))
}

/// Returns the start time of the process with this id; `None` without such a process. A zombie, which has ended and was
/// not waited for, counts as ended: it is in no namespace.
///
/// # Errors
/// The part of `/proc` that could not be read, as text.
pub fn started(pid: NonZeroU32) -> Result<Option<Started>, String> {
    let Ok(number) = i32::try_from(pid.get()) else { return Ok(None) };
    let stat = match Process::new(number).and_then(|process| process.stat()) {
        Ok(stat) => stat,
        Err(ProcError::NotFound(_)) => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    if matches!(stat.state, 'Z' | 'X') {
        return Ok(None);
    }
    let boot = procfs::sys::kernel::random::boot_id().map_err(|error| error.to_string())?;
    Ok(Some(Started { boot, ticks: stat.starttime }))
}

/// Whether the process of a registration still runs: the one with this id and this start time, or any process with this
/// id if the registration has no start time.
///
/// # Errors
/// Those of [`started`].
pub fn still_runs(pid: NonZeroU32, meant: Option<&Started>) -> Result<bool, String> {
    Ok(started(pid)?.is_some_and(|found| meant.is_none_or(|meant| found == *meant)))
}

/// Returns the process with this id, if it runs.
pub fn process_fact(pid: u32) -> Option<ProcessFact> {
    process_name(pid).map(|name| ProcessFact { name, pid })
}

/// Returns the name of the process with this id.
pub fn process_name(pid: u32) -> Option<String> {
    let process = Process::new(i32::try_from(pid).ok()?).ok()?;
    Some(name(&process))
}

/// Returns the name of a user, or the uid as text if the user database has no name.
pub fn user_name(uid: u32) -> String {
    match User::from_uid(Uid::from_raw(uid)) {
        Ok(Some(user)) => user.name,
        _ if uid == ENGINE_UID => format!("uid {uid}, root's landfall engine"),
        _ => format!("uid {uid}"),
    }
}

/// Whether a process runs. A zombie does not.
pub fn runs(pid: u32) -> bool {
    stat(pid).is_some_and(|stat| !matches!(stat.state, 'Z' | 'X'))
}

/// Returns the start time of a process by the current wall clock.
pub fn began(pid: u32) -> Option<SystemTime> {
    let ticks_a_second = rustix::param::clock_ticks_per_second();
    let after_start = Duration::from_millis(stat(pid)?.starttime.checked_mul(1_000)? / ticks_a_second);
    // `proc_pid_stat(5)`: ticks since the boot of the machine, including the time that it was suspended.
    let running = Duration::try_from(rustix::time::clock_gettime(rustix::time::ClockId::Boottime)).ok()?;
    SystemTime::now().checked_sub(running.checked_sub(after_start)?)
}

fn stat(pid: u32) -> Option<Stat> {
    Process::new(i32::try_from(pid).ok()?).ok()?.stat().ok()
}

fn holds(row: &TcpNetEntry, port: NonZeroU16) -> bool {
    let ours = match row.local_address.ip() {
        IpAddr::V4(ip) => ip == Ipv4Addr::LOCALHOST || ip.is_unspecified(),
        IpAddr::V6(ip) => ip == Ipv6Addr::LOCALHOST || ip.is_unspecified(),
    };
    ours && row.local_address.port() == port.get() && row.state != TcpState::TimeWait
}

fn owner(inodes: &[u64]) -> Option<Process> {
    if inodes.is_empty() {
        return None;
    }
    let all = procfs::process::all_processes().ok()?;
    all.flatten().filter(|process| has_socket(process, inodes)).min_by_key(|process| process.pid)
}

fn has_socket(process: &Process, inodes: &[u64]) -> bool {
    let Ok(descriptors) = process.fd() else { return false };
    descriptors
        .flatten()
        .any(|descriptor| matches!(descriptor.target, FDTarget::Socket(inode) if inodes.contains(&inode)))
}

fn fact(process: &Process) -> ProcessFact {
    ProcessFact {
        name: name(process).chars().take(NAME_CHARS_MAX).collect(),
        pid: u32::try_from(process.pid).unwrap_or(0),
    }
}

/// The kernel's name of `node` is that of its main thread (`MainThread`), so the started program is the better name;
/// `nginx` rewrites its arguments to a sentence (`nginx: master process …`), so the kernel's name is.
fn name(process: &Process) -> String {
    let started_as = process.cmdline().ok().and_then(|words| words.into_iter().next());
    let comm = process.stat().map(|stat| stat.comm).unwrap_or_default();
    pick_name(started_as.as_deref(), &comm)
}

fn pick_name(started_as: Option<&str>, comm: &str) -> String {
    let program = started_as.and_then(|path| path.rsplit('/').next()).unwrap_or_default();
    let program = program.strip_prefix('-').unwrap_or(program);
    let one_word = !program.is_empty() && !program.contains(char::is_whitespace) && !program.ends_with(':');
    let whole = started_as.is_some_and(|path| !path.contains(char::is_whitespace));
    if one_word && whole { program.to_owned() } else { comm.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::os::fd::AsFd;

    #[test]
    fn name_is_the_program_unless_the_process_rewrote_it() {
        assert_eq!(pick_name(Some("/usr/bin/node"), "MainThread"), "node");
        assert_eq!(pick_name(Some("nginx: master process /usr/sbin/nginx"), "nginx"), "nginx");
        assert_eq!(pick_name(Some("-bash"), "bash"), "bash");
        assert_eq!(pick_name(Some(""), "kworker"), "kworker");
        assert_eq!(pick_name(None, "zombie"), "zombie");
    }

    #[test]
    fn holder_is_found_by_port_and_by_inode() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = NonZeroU16::new(listener.local_addr().unwrap().port()).unwrap();
        let Holder::Process(fact, line) = holder_of_port(port) else {
            panic!("our own listener was not found")
        };
        assert_eq!(fact.pid, std::process::id());
        assert!(!line.is_empty());
        let inode = rustix::fs::fstat(listener.as_fd()).unwrap().st_ino;
        assert_eq!(owner_of_sockets(&[inode]), Some(fact.clone()));
        assert_eq!(owners_of_sockets(&[inode, u64::MAX]), [(inode, fact)].into());
        assert!(owners_of_sockets(&[]).is_empty());
        assert_eq!(owner_of_sockets(&[]), None);
        let uid = rustix::process::geteuid().as_raw();
        assert_eq!(listener_at(Ipv4Addr::LOCALHOST.into(), port), Some((uid, inode)));
        assert_eq!(listener_at(Ipv4Addr::new(127, 0, 0, 9).into(), port), None);
        drop(listener);
        assert_eq!(holder_of_port(port), Holder::Unknown);
        assert_eq!(listener_at(Ipv4Addr::LOCALHOST.into(), port), None);
    }

    #[test]
    fn process_runs_until_its_end_and_has_a_start_time() {
        let before = SystemTime::now();
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        assert!(runs(child.id()));
        let began = began(child.id()).unwrap();
        let apart = began.duration_since(before).unwrap_or_else(|early| early.duration());
        assert!(apart < Duration::from_secs(2), "{apart:?}");
        child.kill().unwrap();
        let pid = rustix::process::Pid::from_child(&child);
        // Wait for its end, but leave it a zombie.
        let ended = rustix::process::WaitIdOptions::EXITED | rustix::process::WaitIdOptions::NOWAIT;
        rustix::process::waitid(rustix::process::WaitId::Pid(pid), ended).unwrap();
        assert!(!runs(child.id()), "nobody has waited for it");
        child.wait().unwrap();
        assert!(!runs(child.id()));
    }

    #[test]
    fn start_time_is_constant_and_absent_after_the_end() {
        let own = NonZeroU32::new(std::process::id()).unwrap();
        assert!(started(own).unwrap().is_some());
        assert_eq!(started(own), started(own));
        let mut child =
            std::process::Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        let pid = NonZeroU32::new(child.id()).unwrap();
        let began = started(pid).unwrap().unwrap();
        assert_eq!(began.boot, started(own).unwrap().unwrap().boot);
        assert!(began.ticks >= started(own).unwrap().unwrap().ticks);
        drop(child.stdin.take());
        // It ends and stays a zombie, since it is not waited for.
        let exited = rustix::process::WaitIdOptions::EXITED | rustix::process::WaitIdOptions::NOWAIT;
        let id = rustix::process::Pid::from_child(&child);
        rustix::process::waitid(rustix::process::WaitId::Pid(id), exited).unwrap();
        assert_eq!(started(pid), Ok(None));
        child.wait().unwrap();
        assert_eq!(started(pid), Ok(None));
        assert_eq!(started(NonZeroU32::MAX), Ok(None));
    }

    #[test]
    fn user_without_a_name_is_shown_by_uid() {
        assert_eq!(user_name(0), "root");
        assert_eq!(user_name(3_999_999_999), "uid 3999999999");
        assert_eq!(user_name(ENGINE_UID), "uid 2100008974, root's landfall engine");
    }
}
