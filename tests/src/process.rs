//! What this process uses, as the kernel counts it.

use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::time::{ClockId, clock_gettime};

/// Descriptors open in this process.
///
/// # Panics
/// When none is left to count them with.
pub fn descriptors() -> usize {
    // The directory that is being read is one itself.
    std::fs::read_dir("/proc/self/fd").unwrap().count() - 1
}

/// Threads of this process.
///
/// # Panics
/// Without `/proc`.
pub fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
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

/// The share of one processor that the engine's threads take over the next `window`.
///
/// # Panics
/// Without `/proc`.
pub fn engine_load(window: Duration) -> f64 {
    let (start, before) = (Instant::now(), engine_cpu());
    std::thread::sleep(window);
    (engine_cpu() - before).as_secs_f64() / start.elapsed().as_secs_f64()
}

/// The share of one processor that this whole process takes over the next `window`; needs no descriptor to look.
pub fn process_load(window: Duration) -> f64 {
    let used = || {
        let time = clock_gettime(ClockId::ProcessCPUTime);
        Duration::try_from(time).unwrap_or_default()
    };
    let (start, before) = (Instant::now(), used());
    std::thread::sleep(window);
    (used() - before).as_secs_f64() / start.elapsed().as_secs_f64()
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
