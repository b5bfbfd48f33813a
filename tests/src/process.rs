//! Resource usage of processes, as the kernel counts it.

use std::process::Command;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, setrlimit};
use rustix::time::{ClockId, clock_gettime};

/// Makes later mounts private to this process and its descendants; they disappear with the last of them. The process must
/// have one thread.
///
/// # Panics
/// Without root.
pub fn private_mounts() {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let private = Command::new("mount").args(["--make-rprivate", "/"]).status().unwrap();
    assert!(private.success(), "the mounts cannot be made private");
}

/// Returns the number of open descriptors of this process.
///
/// # Panics
/// If no descriptor is left to read the directory.
pub fn descriptors() -> usize {
    // The directory that is being read uses one.
    std::fs::read_dir("/proc/self/fd").unwrap().count() - 1
}

/// Returns the number of threads of this process. A joined thread may still be listed, because the kernel wakes the joining
/// thread before the exit is complete (`do_exit`, kernel/exit.c): an exiting thread does not count.
///
/// # Panics
/// If `/proc` is not mounted.
pub fn threads() -> usize {
    /// `PF_EXITING` (include/linux/sched.h) among the flags, the seventh field behind the name in `proc_pid_stat(5)`.
    const EXITING: u64 = 0x4;
    let is_exiting = |stat: &str| {
        let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
        let flags = fields.split_whitespace().nth(6).and_then(|flags| flags.parse::<u64>().ok());
        flags.is_some_and(|flags| flags & EXITING != 0)
    };
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let stats = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("stat")).ok());
    stats.filter(|stat| !is_exiting(stat)).count()
}

/// Returns the resident memory, in bytes.
///
/// # Panics
/// If `/proc` is not mounted.
pub fn resident_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<usize>().unwrap() * 1024
}

/// Returns the processor time of the engine's threads (those whose names start with `landfall-`), without that of clients
/// and servers in the same process.
///
/// # Panics
/// If `/proc` is not mounted.
pub fn engine_cpu() -> Duration {
    let mut ticks = 0;
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        let path = task.unwrap().path();
        // A thread may end after it was listed.
        let (Ok(name), Ok(stat)) =
            (std::fs::read_to_string(path.join("comm")), std::fs::read_to_string(path.join("stat")))
        else {
            continue;
        };
        if name.starts_with("landfall-") {
            // After the name, which may contain any character, utime and stime are fields 14 and 15 (proc_pid_stat(5)).
            let fields: Vec<&str> = stat[stat.rfind(')').unwrap() + 2..].split(' ').collect();
            ticks += fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        }
    }
    Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second())
}

/// Returns the share of one processor that the engine's threads use at rest.
///
/// # Panics
/// If they never come to rest, or if `/proc` is not mounted.
#[track_caller]
pub fn engine_idle_share(what: &str) -> f64 {
    idle_share(what, engine_cpu)
}

/// Returns the share of one processor that this whole process uses at rest. Needs no further descriptor.
///
/// # Panics
/// If it never comes to rest.
#[track_caller]
pub fn process_idle_share(what: &str) -> f64 {
    idle_share(what, || Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).unwrap_or_default())
}

/// Returns the share of the first window at rest, of several: a thread that spins does so in every window. A single window is
/// not reliable, because on a virtual machine stolen time may be accounted to the running thread.
#[track_caller]
fn idle_share(what: &str, used: impl Fn() -> Duration) -> f64 {
    const WINDOWS: usize = 8;
    const WINDOW: Duration = Duration::from_millis(300);
    const REST: f64 = 0.2;
    let mut loads = Vec::new();
    for _ in 0..WINDOWS {
        let (start, before) = (Instant::now(), used());
        std::thread::sleep(WINDOW);
        let load = (used() - before).as_secs_f64() / start.elapsed().as_secs_f64();
        if load < REST {
            return load;
        }
        loads.push(load);
    }
    panic!("{what}: the shares of a processor taken are {loads:.2?}");
}

/// Lowers the descriptor limit of this process to `count`.
///
/// # Panics
/// If the hard limit is lower.
pub fn limit_descriptors(count: usize) {
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: Some(count as u64), maximum }).unwrap();
}

/// Raises the descriptor limit of this process to the hard limit.
pub fn raise_descriptors() {
    let maximum = getrlimit(Resource::Nofile).maximum;
    // If the kernel refuses, the default limit stays.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}

/// Returns every descendant of this process, including zombies. If this process is a subreaper, that includes all processes
/// that it started, directly or indirectly.
pub fn descendants() -> Vec<u32> {
    let mut parents = Vec::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else { continue };
        // After the name, which may contain any character, come the state and the parent (proc_pid_stat(5)).
        let parent = stat.rfind(')').and_then(|end| stat[end + 2..].split(' ').nth(1)?.parse::<u32>().ok());
        parents.extend(parent.map(|parent| (pid, parent)));
    }
    let mut found = vec![std::process::id()];
    let mut index = 0;
    while index < found.len() {
        let children = parents.iter().filter(|(_, parent)| *parent == found[index]).map(|(pid, _)| *pid);
        let children: Vec<u32> = children.filter(|pid| !found.contains(pid)).collect();
        found.extend(children);
        index += 1;
    }
    found.remove(0);
    found
}

/// Returns the descendants that run the program with this verb as first argument. A zombie has no arguments.
pub fn running(verb: &str) -> Vec<u32> {
    let has_verb = |pid: &u32| {
        let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        arguments.split(|byte| *byte == 0).nth(1) == Some(verb.as_bytes())
    };
    descendants().into_iter().filter(has_verb).collect()
}

/// Returns the number of open descriptors of another process; 0 if it has ended.
pub fn descriptors_of(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// Returns the resident memory of another process, in bytes.
///
/// # Panics
/// If it has ended.
pub fn resident_bytes_of(pid: u32) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<usize>().unwrap() * 1024
}

/// Returns the peak resident memory of another process, in bytes.
///
/// # Panics
/// If it has ended.
pub fn peak_bytes_of(pid: u32) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<usize>().unwrap() * 1024
}

/// Kills a process with SIGKILL.
///
/// # Panics
/// If it is not a descendant of this process.
#[track_caller]
pub fn kill(pid: u32) {
    assert!(descendants().contains(&pid), "{pid} was not started here");
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
}
