//! `landfall _launcher`: the process of a root daemon that keeps capabilities.
//!
//! `crate::sys::launcher` has the reasons and the protocol. This side is kept small, since it is the part that an attacker
//! who has taken over the daemon talks to: one thread reads requests of bounded size, each request that takes time has a thread
//! of its own, and the number of requests that run is bounded for each kind. It parses nothing that a container wrote: of a
//! folder it reads approved text only. The programs that it starts are its own file, with arguments that are fixed except for a
//! socket's name, which is checked, and the commands of approved settings ([`crate::registry::folder`]).
//!
//! It ends when the daemon does, and kills the commands that run. Openers and the engine continue, since they serve what is
//! connected.

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

/// Openers that run: one for each container that is entered, and for an upgrade of the engine twice as many.
const OPENERS_MAX: usize = 1_024;
/// Engines that run: one, and those that finish their connections.
const ENGINES_MAX: usize = 16;
/// Lookups that run.
const LOOKUPS_MAX: usize = 4;
/// The stack of a thread that waits for a process.
const STACK_BYTES: usize = 64 * 1024;
/// The file system of namespaces (`NSFS_MAGIC` in `linux/magic.h`).
const NSFS: u64 = 0x6e73_6673;

/// Serves the daemon at the other end of standard input until it has ended.
///
/// # Errors
/// Standard input is not a channel: the process was not started by a daemon.
pub fn main(home: &Home) -> io::Result<()> {
    // The daemon has the same uid: it may not trace this process, whose capabilities it lacks.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    let channel =
        Channel::try_from(rustix::stdio::stdin().try_clone_to_owned()?).map_err(io::Error::other)?;
    let places = Places::default();
    loop {
        match channel.recv::<Request>() {
            Ok(Some((request, descriptors))) => serve(home, &places, request, descriptors),
            // The daemon has ended.
            Ok(None) | Err(ChannelError::Gone | ChannelError::System(_)) => break,
            // The request was dropped with its descriptors, which ends the channel for its answer.
            Err(_) => {}
        }
    }
    places.commands.end();
    Ok(())
}

/// The requests that run.
#[derive(Debug, Default)]
struct Places {
    openers: Arc<AtomicUsize>,
    engines: Arc<AtomicUsize>,
    lookups: Arc<AtomicUsize>,
    commands: Commands,
}

/// One of them. Dropping it makes room for another.
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(taken: &Arc<AtomicUsize>, max: usize) -> Result<Place, Refusal> {
        // Only the thread that reads requests takes places.
        if taken.load(Ordering::Acquire) >= max {
            return Err(Refusal::Busy(max));
        }
        taken.fetch_add(1, Ordering::AcqRel);
        Ok(Place(Arc::clone(taken)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

fn serve(home: &Home, places: &Places, request: Request, descriptors: Vec<OwnedFd>) {
    let mut descriptors = descriptors.into_iter();
    let Some(channel) = descriptors.next().and_then(|end| Channel::try_from(end).ok()) else { return };
    let second = descriptors.next();
    match request {
        Request::Opener {} => {
            if let Err(refusal) = start_opener(places, &channel) {
                let failure = Failure { kind: FailureKind::Other, detail: format!("no opener: {refusal}") };
                send(&channel, &Answer::Failed { failure });
            }
        }
        Request::Engine { socket } => match start_engine(home, places, &socket, second) {
            Ok(pidfd) => drop(channel.try_send(&Reply::Started, &[pidfd.as_fd()])),
            Err(refusal) => send(&channel, &Reply::Refused { refusal }),
        },
        Request::Command { invocation, settings } => {
            places.commands.run(home, channel, invocation, settings, second);
        }
        Request::Owners { inodes } => look_up(places, channel, move |channel| {
            if inodes.len() > OWNERS_MAX {
                return Err(Refusal::Invalid);
            }
            for (inode, process) in processes::owners_of_sockets(&inodes) {
                send(channel, &Reply::Owner { inode, process });
            }
            send(channel, &Reply::Done);
            Ok(())
        }),
        Request::Namespace { path } => look_up(places, channel, move |channel| {
            let file = open_namespace(&path)?;
            // A caller that has gone needs none.
            let _ = channel.send(&Reply::Done, &[file.as_fd()]);
            Ok(())
        }),
    }
}

/// Answers. A caller that has gone needs no answer.
fn send(channel: &Channel, message: &impl serde::Serialize) {
    let _ = channel.send_timeout(message, &[], ANSWER_MAX);
}

/// Starts an opener, and a thread that waits for its end.
fn start_opener(places: &Places, channel: &Channel) -> Result<(), Refusal> {
    let place = Place::take(&places.openers, OPENERS_MAX)?;
    let stdin = channel.as_fd().try_clone_to_owned();
    let stdin = stdin.map_err(|error| Refusal::system("no descriptor", &error))?;
    let mut command = own_program(opener::VERB);
    command.stdin(Stdio::from(stdin)).stdout(Stdio::null()).stderr(Stdio::null());
    spawn(command, place).map(drop)
}

/// Starts an engine that listens at a socket in the home's `run` directory, and a thread that waits for its end; its pidfd.
fn start_engine(
    home: &Home,
    places: &Places,
    socket: &str,
    log: Option<OwnedFd>,
) -> Result<OwnedFd, Refusal> {
    let log = log.filter(|_| is_engine_socket(socket)).ok_or(Refusal::Invalid)?;
    let place = Place::take(&places.engines, ENGINES_MAX)?;
    let out = log.try_clone().map_err(|error| Refusal::system("no descriptor", &error))?;
    let mut command = own_program(engine::VERB);
    command.arg("--socket").arg(home.run().join(socket)).stdin(Stdio::null()).stdout(out).stderr(log);
    // Which build it reports, and what of a panic it writes to its log.
    command.envs(
        ["RUST_BACKTRACE", crate::version::VARIABLE]
            .iter()
            .filter_map(|name| Some((name, std::env::var_os(name)?))),
    );
    let pid = spawn(command, place)?;
    rustix::process::pidfd_open(pid, PidfdFlags::empty())
        .map_err(|errno| Refusal::system("no pidfd", &errno.into()))
}

/// The name of the engine's socket, or one of those that its upgrade uses.
fn is_engine_socket(name: &str) -> bool {
    let Some(end) = name.strip_prefix("engine.") else { return false };
    end == "sock" || end.strip_suffix(['+', '-']).is_some_and(is_number)
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// This program with a hidden verb, in a process group of its own and without an environment.
fn own_program(verb: &str) -> Command {
    let mut command = Command::new(PROGRAM);
    command.arg0("landfall").arg(verb).env_clear().current_dir("/").process_group(0);
    command
}

/// Starts a process, which has its place until it ends; its id.
fn spawn(mut command: Command, place: Place) -> Result<Pid, Refusal> {
    let mut child = command.spawn().map_err(|error| Refusal::system("it cannot be started", &error))?;
    let pid = Pid::from_child(&child);
    let waiting = thread::Builder::new().stack_size(STACK_BYTES).spawn(move || {
        let _ = child.wait();
        drop(place);
    });
    // Without a thread it runs all the same, and is a zombie when it has ended.
    drop(waiting);
    Ok(pid)
}

/// Does a lookup on a thread of its own.
fn look_up(
    places: &Places,
    channel: Channel,
    work: impl FnOnce(&Channel) -> Result<(), Refusal> + Send + 'static,
) {
    let place = match Place::take(&places.lookups, LOOKUPS_MAX) {
        Ok(place) => place,
        Err(refusal) => return send(&channel, &Reply::Refused { refusal }),
    };
    // Without a thread the channel is closed, which the caller sees.
    let _ = thread::Builder::new().spawn(move || {
        if let Err(refusal) = work(&channel) {
            send(&channel, &Reply::Refused { refusal });
        }
        drop(place);
    });
}

/// Opens `/proc/PID/ns/net` or a descriptor of a process, if it is a namespace.
fn open_namespace(path: &Path) -> Result<OwnedFd, Refusal> {
    if !is_of_a_process(path) {
        return Err(Refusal::Invalid);
    }
    let failed = |errno: rustix::io::Errno| Refusal::system("the namespace cannot be opened", &errno.into());
    // Opened for nothing first: to open a device or a pipe may have effects.
    let found = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(failed)?;
    let kind = rustix::fs::fstatfs(&found).map_err(failed)?.f_type;
    if u64::try_from(kind).ok() != Some(NSFS) {
        return Err(Refusal::Invalid);
    }
    let again = format!("/proc/self/fd/{}", found.as_raw_fd());
    rustix::fs::open(again, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(failed)
}

/// Whether a path is `/proc/PID/ns/net`, `/proc/PID/task/TID/ns/net` or `/proc/PID/fd/N`.
fn is_of_a_process(path: &Path) -> bool {
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
    fn an_engine_listens_at_its_own_names_only() {
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
            assert!(is_of_a_process(Path::new(path)), "{path}");
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
            assert!(!is_of_a_process(Path::new(path)), "{path}");
        }
        let own = std::process::id();
        assert!(open_namespace(Path::new(&format!("/proc/{own}/ns/net"))).is_ok());
        let file = std::fs::File::open("/dev/null").unwrap();
        let path = format!("/proc/{own}/fd/{}", file.as_raw_fd());
        assert_eq!(open_namespace(Path::new(&path)).unwrap_err(), Refusal::Invalid);
    }

    #[test]
    fn places_are_bounded_and_come_back() {
        let taken = Arc::default();
        let first = Place::take(&taken, 1).unwrap();
        assert_eq!(Place::take(&taken, 1).err(), Some(Refusal::Busy(1)));
        drop(first);
        assert!(Place::take(&taken, 1).is_ok());
    }
}
