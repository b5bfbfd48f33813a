//! What this process uses, as the kernel counts it.

use std::process::Command;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, setrlimit};
use rustix::time::{ClockId, clock_gettime};

/// What is mounted from now on is nobody else's, and goes away with the last process of this case. No thread may run yet.
///
/// # Panics
/// When this is not root.
pub fn private_mounts() {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let private = Command::new("mount").args(["--make-rprivate", "/"]).status().unwrap();
    assert!(private.success(), "the mounts cannot be made private");
}

/// Descriptors open in this process.
///
/// # Panics
/// When none is left to count them with.
pub fn descriptors() -> usize {
    // The directory that is being read is one itself.
    std::fs::read_dir("/proc/self/fd").unwrap().count() - 1
}

/// Threads of this process. One that was joined may be listed for a moment longer, since whoever joins is woken before
/// the kernel is done with it (`do_exit`, kernel/exit.c): a thread on its way out does not count.
///
/// # Panics
/// Without `/proc`.
pub fn threads() -> usize {
    /// `PF_EXITING` (include/linux/sched.h) among the flags, the seventh field behind the name in `proc_pid_stat(5)`.
    const EXITING: u64 = 0x4;
    let is_leaving = |stat: &str| {
        let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
        let flags = fields.split_whitespace().nth(6).and_then(|flags| flags.parse::<u64>().ok());
        flags.is_some_and(|flags| flags & EXITING != 0)
    };
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let stats = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("stat")).ok());
    stats.filter(|stat| !is_leaving(stat)).count()
}

/// Resident memory, in bytes.
///
/// # Panics
/// Without `/proc`.
pub fn resident_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<usize>().unwrap() * 1024
}

/// Processor time of the engine's threads (all whose name begins with `landfall-`), so that what clients and servers of
/// the same process use does not count.
///
/// # Panics
/// Without `/proc`.
pub fn engine_cpu() -> Duration {
    let mut ticks = 0;
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        let path = task.unwrap().path();
        // A thread may end between being listed and being read.
        let (Ok(name), Ok(stat)) =
            (std::fs::read_to_string(path.join("comm")), std::fs::read_to_string(path.join("stat")))
        else {
            continue;
        };
        if name.starts_with("landfall-") {
            // Behind the name, which may hold anything, utime and stime are fields 14 and 15 (proc_pid_stat(5)).
            let fields: Vec<&str> = stat[stat.rfind(')').unwrap() + 2..].split(' ').collect();
            ticks += fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        }
    }
    Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second())
}

/// The share of one processor that the engine's threads take at rest.
///
/// # Panics
/// When they are never at rest; without `/proc`.
#[track_caller]
pub fn engine_at_rest(what: &str) -> f64 {
    at_rest(what, engine_cpu)
}

/// The share of one processor that this whole process takes at rest; needs no descriptor to look.
///
/// # Panics
/// When it is never at rest.
#[track_caller]
pub fn process_at_rest(what: &str) -> f64 {
    at_rest(what, || Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).unwrap_or_default())
}

/// What spins spins in every window. One window alone tells less: on a virtual machine the time that another one takes
/// away from us may be counted as used by whoever had the processor.
#[track_caller]
fn at_rest(what: &str, used: impl Fn() -> Duration) -> f64 {
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

/// Lets this process have no more than `count` descriptors.
///
/// # Panics
/// When the hard limit is lower.
pub fn limit_descriptors(count: usize) {
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: Some(count as u64), maximum }).unwrap();
}

/// Lets this process have as many descriptors as it may.
pub fn raise_descriptors() {
    let maximum = getrlimit(Resource::Nofile).maximum;
    // Where that is refused the default has to do.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}

/// Every process that descends from this one, those that ended and were not waited for included. Where this process
/// adopts orphans, nobody who was started here escapes.
pub fn descendants() -> Vec<u32> {
    let mut parents = Vec::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else { continue };
        // Behind the name, which may hold anything, come the state and the parent (proc_pid_stat(5)).
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

/// The descendants that run the program with this verb as its first argument. One that has ended has no arguments.
pub fn running(verb: &str) -> Vec<u32> {
    let has_verb = |pid: &u32| {
        let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        arguments.split(|byte| *byte == 0).nth(1) == Some(verb.as_bytes())
    };
    descendants().into_iter().filter(has_verb).collect()
}

/// Descriptors open in another process; none when it has ended.
pub fn descriptors_of(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// Resident memory of another process, in bytes.
///
/// # Panics
/// When it has ended.
pub fn resident_bytes_of(pid: u32) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<usize>().unwrap() * 1024
}

/// The most memory that another process had resident at a time, in bytes.
///
/// # Panics
/// When it has ended.
pub fn peak_bytes_of(pid: u32) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<usize>().unwrap() * 1024
}

/// Kills a process without a warning.
///
/// # Panics
/// When it does not descend from this one: nobody else's is ended.
#[track_caller]
pub fn kill(pid: u32) {
    assert!(descendants().contains(&pid), "{pid} was not started here");
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
}
