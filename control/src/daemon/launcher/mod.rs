//! `landfall _launcher`: the process of a root daemon that keeps capabilities.
//!
//! `crate::sys::launcher` has the reasons and the protocol. This side is small, since an attacker who controls the daemon
//! can send it requests. One thread reads requests of bounded size. Each request that takes time has a thread of its own,
//! and the number of running requests is bounded for each kind. The launcher never parses data that a container wrote: of a
//! folder it reads approved text only. It starts two kinds of programs: its own executable, with arguments that are fixed
//! except for a checked socket name, and the commands of approved settings ([`crate::registry::folder`]).
//!
//! It ends when the daemon ends, and kills the commands that run. Openers and the engine continue, since they serve open
//! connections.

mod command;

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::{Component, Path};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use landfall_engine::channel::{Channel, ChannelError};
use landfall_engine::opener::{self, Answer, Failure, FailureKind};
use landfall_engine::process as engine;
use rustix::fs::{Mode, OFlags};
use rustix::process::{DumpableBehavior, Pid, PidfdFlags};

use command::Commands;

use crate::sys::launcher::{ANSWER_MAX, OWNERS_MAX, PROGRAM, Refusal, Reply, Request};
use crate::sys::paths::Home;
use crate::sys::processes;

/// The maximum number of openers: one for each container that is entered, and twice as many during an upgrade of the engine.
const OPENERS_MAX: usize = 1_024;
/// The maximum number of engines: the current one, and earlier ones that drain their connections.
const ENGINES_MAX: usize = 16;
/// The maximum number of concurrent lookups.
const LOOKUPS_MAX: usize = 4;
/// The stack size of a thread that waits for a process.
const STACK_BYTES: usize = 64 * 1024;
/// The file system of namespaces (`NSFS_MAGIC` in `linux/magic.h`).
const NSFS: u64 = 0x6e73_6673;

/// Serves the daemon at the other end of standard input until the daemon ends.
///
/// # Errors
/// Standard input is not a channel: a daemon did not start this process.
pub fn main(home: &Home) -> io::Result<()> {
    // The daemon has the same uid. It must not trace this process, which has capabilities that the daemon lacks.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    let channel =
        Channel::try_from(rustix::stdio::stdin().try_clone_to_owned()?).map_err(io::Error::other)?;
    let slots = Slots::default();
    loop {
        match channel.recv::<Request>() {
            Ok(Some((request, descriptors))) => serve(home, &slots, request, descriptors),
            // The daemon has ended.
            Ok(None) | Err(ChannelError::Gone | ChannelError::System(_)) => break,
            // The request was dropped together with its descriptors. This closes the channel on which its answer is
            // expected.
            Err(_) => {}
        }
    }
    slots.commands.end();
    Ok(())
}

/// The counters of running requests, one for each kind.
#[derive(Debug, Default)]
struct Slots {
    openers: Arc<AtomicUsize>,
    engines: Arc<AtomicUsize>,
    lookups: Arc<AtomicUsize>,
    commands: Commands,
}

/// A slot for one running request. Dropping it frees the slot.
struct Slot(Arc<AtomicUsize>);

impl Slot {
    fn take(in_use: &Arc<AtomicUsize>, max: usize) -> Result<Slot, Refusal> {
        // Only the thread that reads requests calls this, so the load and the add cannot race.
        if in_use.load(Ordering::Acquire) >= max {
            return Err(Refusal::Busy(max));
        }
        in_use.fetch_add(1, Ordering::AcqRel);
        Ok(Slot(Arc::clone(in_use)))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

fn serve(home: &Home, slots: &Slots, request: Request, descriptors: Vec<OwnedFd>) {
    let mut descriptors = descriptors.into_iter();
    let Some(channel) = descriptors.next().and_then(|end| Channel::try_from(end).ok()) else { return };
    let second = descriptors.next();
    match request {
        Request::Opener {} => {
            if let Err(refusal) = start_opener(slots, &channel) {
                let failure = Failure { kind: FailureKind::Other, detail: format!("no opener: {refusal}") };
                send(&channel, &Answer::Failed { failure });
            }
        }
        Request::Engine { socket } => match start_engine(home, slots, &socket, second) {
            Ok(pidfd) => drop(channel.try_send(&Reply::Started, &[pidfd.as_fd()])),
            Err(refusal) => send(&channel, &Reply::Refused { refusal }),
        },
        Request::Command { invocation, settings } => {
            slots.commands.run(home, channel, invocation, settings, second);
        }
        Request::Owners { inodes } => look_up(slots, channel, move |channel| {
            if inodes.len() > OWNERS_MAX {
                return Err(Refusal::Invalid);
            }
            for (inode, process) in processes::owners_of_sockets(&inodes) {
                send(channel, &Reply::Owner { inode, process });
            }
            send(channel, &Reply::Done);
            Ok(())
        }),
        Request::Namespace { path } => look_up(slots, channel, move |channel| {
            let file = open_namespace(&path)?;
            // A caller that has gone does not need the descriptor.
            let _ = channel.send(&Reply::Done, &[file.as_fd()]);
            Ok(())
        }),
    }
}

/// Sends an answer. An error is ignored: the caller has gone.
fn send(channel: &Channel, message: &impl serde::Serialize) {
    let _ = channel.send_timeout(message, &[], ANSWER_MAX);
}

/// Starts an opener, and a thread that waits for its end.
fn start_opener(slots: &Slots, channel: &Channel) -> Result<(), Refusal> {
    let slot = Slot::take(&slots.openers, OPENERS_MAX)?;
    let stdin = channel.as_fd().try_clone_to_owned();
    let stdin = stdin.map_err(|error| Refusal::system("no descriptor", &error))?;
    let mut command = own_program(opener::VERB);
    command.stdin(Stdio::from(stdin)).stdout(Stdio::null()).stderr(Stdio::null());
    spawn(command, slot).map(drop)
}

/// Starts an engine that listens at a socket in the home's `run` directory, and a thread that waits for its end. Returns its
/// pidfd.
fn start_engine(home: &Home, slots: &Slots, socket: &str, log: Option<OwnedFd>) -> Result<OwnedFd, Refusal> {
    let log = log.filter(|_| is_engine_socket(socket)).ok_or(Refusal::Invalid)?;
    let slot = Slot::take(&slots.engines, ENGINES_MAX)?;
    let out = log.try_clone().map_err(|error| Refusal::system("no descriptor", &error))?;
    let mut command = own_program(engine::VERB);
    command.arg("--socket").arg(home.run().join(socket)).stdin(Stdio::null()).stdout(out).stderr(log);
    // The version that the engine reports, and whether a panic logs a backtrace.
    command.envs(
        ["RUST_BACKTRACE", crate::version::VARIABLE]
            .iter()
            .filter_map(|name| Some((name, std::env::var_os(name)?))),
    );
    let pid = spawn(command, slot)?;
    rustix::process::pidfd_open(pid, PidfdFlags::empty())
        .map_err(|errno| Refusal::system("no pidfd", &errno.into()))
}

/// Returns whether a name is the engine's socket or one of the sockets that its upgrade uses.
fn is_engine_socket(name: &str) -> bool {
    let Some(end) = name.strip_prefix("engine.") else { return false };
    end == "sock" || end.strip_suffix(['+', '-']).is_some_and(is_number)
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// Returns a command for this program with a hidden verb, in a new process group and with an empty environment.
fn own_program(verb: &str) -> Command {
    let mut command = Command::new(PROGRAM);
    command.arg0("landfall").arg(verb).env_clear().current_dir("/").process_group(0);
    command
}

/// Starts a process that holds its slot until it ends. Returns its process id.
fn spawn(mut command: Command, slot: Slot) -> Result<Pid, Refusal> {
    let mut child = command.spawn().map_err(|error| Refusal::system("it cannot be started", &error))?;
    let pid = Pid::from_child(&child);
    let waiting = thread::Builder::new().stack_size(STACK_BYTES).spawn(move || {
        let _ = child.wait();
        drop(slot);
    });
    // If no thread could be started, the process runs and remains a zombie after its end.
    drop(waiting);
    Ok(pid)
}

/// Runs a lookup on a thread of its own.
fn look_up(
    slots: &Slots,
    channel: Channel,
    work: impl FnOnce(&Channel) -> Result<(), Refusal> + Send + 'static,
) {
    let slot = match Slot::take(&slots.lookups, LOOKUPS_MAX) {
        Ok(slot) => slot,
        Err(refusal) => return send(&channel, &Reply::Refused { refusal }),
    };
    // If no thread can be started, the channel is closed, which the caller detects.
    let _ = thread::Builder::new().spawn(move || {
        if let Err(refusal) = work(&channel) {
            send(&channel, &Reply::Refused { refusal });
        }
        drop(slot);
    });
}

/// Opens `/proc/PID/ns/net` or `/proc/PID/fd/N`, if it is a namespace.
fn open_namespace(path: &Path) -> Result<OwnedFd, Refusal> {
    if !is_namespace_path(path) {
        return Err(Refusal::Invalid);
    }
    let failed = |errno: rustix::io::Errno| Refusal::system("the namespace cannot be opened", &errno.into());
    // Open with O_PATH first: a full open of a device or a pipe may have side effects.
    let found = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(failed)?;
    let kind = rustix::fs::fstatfs(&found).map_err(failed)?.f_type;
    if u64::try_from(kind).ok() != Some(NSFS) {
        return Err(Refusal::Invalid);
    }
    let again = format!("/proc/self/fd/{}", found.as_raw_fd());
    rustix::fs::open(again, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(failed)
}

/// Returns whether a path is `/proc/PID/ns/net`, `/proc/PID/task/TID/ns/net` or `/proc/PID/fd/N`.
fn is_namespace_path(path: &Path) -> bool {
    let parts: Vec<&str> = path
        .components()
        .map(|part| match part {
            Component::RootDir => "/",
            Component::Normal(name) => name.to_str().unwrap_or_default(),
            Component::Prefix(_) | Component::CurDir | Component::ParentDir => "",
        })
        .collect();
    match parts.as_slice() {
        ["/", "proc", pid, "ns", "net"] => is_number(pid),
        ["/", "proc", pid, "task", thread, "ns", "net"] => is_number(pid) && is_number(thread),
        ["/", "proc", pid, "fd", number] => is_number(pid) && is_number(number),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_engines_own_socket_names_are_accepted() {
        for name in ["engine.sock", "engine.4711+", "engine.4711-"] {
            assert!(is_engine_socket(name), "{name}");
        }
        for name in [
            "",
            "engine.",
            "engine.+",
            "hostd.sock",
            "engine.sock+",
            "engine.47/../x+",
            "engine.4711",
            "engine.4711~",
            "../engine.sock",
            "engine.x+",
            "engine.4711++",
        ] {
            assert!(!is_engine_socket(name), "{name}");
        }
    }

    #[test]
    fn only_namespaces_of_processes_are_opened() {
        for path in ["/proc/1/ns/net", "/proc/12/task/13/ns/net", "/proc/1/fd/3"] {
            assert!(is_namespace_path(Path::new(path)), "{path}");
        }
        for path in [
            "/proc/1/ns/mnt",
            "/proc/1/root/etc/shadow",
            "/proc/1/fd/../root/etc/shadow",
            "/proc/self/ns/net",
            "/etc/shadow",
            "/run/netns/x",
            "proc/1/ns/net",
            "/proc/1/mem",
        ] {
            assert!(!is_namespace_path(Path::new(path)), "{path}");
        }
        let own = std::process::id();
        assert!(open_namespace(Path::new(&format!("/proc/{own}/ns/net"))).is_ok());
        let file = std::fs::File::open("/dev/null").unwrap();
        let path = format!("/proc/{own}/fd/{}", file.as_raw_fd());
        assert_eq!(open_namespace(Path::new(&path)).unwrap_err(), Refusal::Invalid);
    }

    #[test]
    fn slots_are_bounded_and_freed_on_drop() {
        let in_use = Arc::default();
        let first = Slot::take(&in_use, 1).unwrap();
        assert_eq!(Slot::take(&in_use, 1).err(), Some(Refusal::Busy(1)));
        drop(first);
        assert!(Slot::take(&in_use, 1).is_ok());
    }
}
