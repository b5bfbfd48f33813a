//! One queue for everything that `run` and `attach` wait for: the engine's events, signals, and processes that end.
//!
//! Two small threads fill it. Signals are blocked in all threads and read from a signalfd, which tells who sent
//! them: the terminal's Ctrl-C goes to the whole foreground group, so the command has it already and must not get
//! it twice; what another process sent to us alone is to be passed on. Processes are watched by pidfd.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender};
use std::thread;

use landfall_engine::command::{Event, EventMessage};
use landfall_engine::native::NativeEvent;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags};

/// Signals that are somebody's wish, and so the command's to hear. SIGTSTP, SIGCONT and their like are left alone:
/// job control stops and continues us together with the command, since we share its process group.
const PASSED_ON: [Signal; 8] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGALRM,
    Signal::SIGWINCH,
];

/// Who sent a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The kernel: a terminal, to its whole foreground group.
    Kernel,
    /// A process.
    Process,
}

/// Which process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Watched {
    /// The command of `run`.
    Command,
    /// The one that `attach` was given.
    Target,
    /// pasta.
    Pasta,
}

/// Something that was waited for.
#[derive(Debug)]
pub enum LoopEvent {
    /// The engine says something.
    Engine(Event),
    /// The engine says nothing more.
    EngineEnded,
    /// The daemon may have something to tell.
    DaemonHints,
    /// A supervisor reports something about native sockets.
    Native(NativeEvent),
    /// A signal came.
    Signal(Signal, Origin),
    /// A process ended.
    Ended(Watched),
}

/// Signals that no thread takes any more.
#[derive(Debug)]
pub struct Signals(SignalFd);

impl Signals {
    /// Blocks the signals; to be called before any other thread is made, since threads inherit what is blocked.
    pub fn block() -> io::Result<Signals> {
        let set: SigSet = PASSED_ON.into_iter().collect();
        set.thread_block()?;
        Ok(Signals(SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?))
    }
}

/// Lets the signals through again. What is blocked is inherited by a program that is started, so the processes that
/// become other programs call this first.
pub fn unblock() -> io::Result<()> {
    Ok(PASSED_ON.into_iter().collect::<SigSet>().thread_unblock()?)
}

/// Starts to tell `queue` of signals and of the processes behind `pidfds`.
pub fn watch(
    signals: Signals,
    pidfds: BTreeMap<Watched, OwnedFd>,
    queue: Sender<LoopEvent>,
) -> io::Result<()> {
    let work = move || {
        // The queue's other end going away is the only end of this thread, and that of the program.
        let _ = watch_all(&signals, pidfds, &queue);
    };
    thread::Builder::new().name("waiting".to_owned()).spawn(work).map(drop)
}

/// Starts to tell `queue` what the engine says.
pub fn relay_events(events: Receiver<EventMessage>, queue: Sender<LoopEvent>) -> io::Result<()> {
    let work = move || {
        for told in events {
            if queue.send(LoopEvent::Engine(told.event)).is_err() {
                return;
            }
        }
        let _ = queue.send(LoopEvent::EngineEnded);
    };
    thread::Builder::new().name("events".to_owned()).spawn(work).map(drop)
}

fn watch_all(
    signals: &Signals,
    mut pidfds: BTreeMap<Watched, OwnedFd>,
    queue: &Sender<LoopEvent>,
) -> Result<(), Box<dyn std::error::Error>> {
    loop {
        let mut waiting = vec![PollFd::from_borrowed_fd(signals.0.as_fd(), PollFlags::IN)];
        waiting.extend(pidfds.values().map(|pidfd| PollFd::new(pidfd, PollFlags::IN)));
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut waiting, None))?;
        let ready: Vec<bool> = waiting.iter().map(|descriptor| !descriptor.revents().is_empty()).collect();
        drop(waiting);

        while let Some(info) = signals.0.read_signal()? {
            // `kill`, `sigqueue` and `tgkill` have a code of 0 or less; the kernel's are above (`sigaction(2)`).
            let origin = if info.ssi_code <= 0 { Origin::Process } else { Origin::Kernel };
            let number = i32::try_from(info.ssi_signo)?;
            queue.send(LoopEvent::Signal(Signal::try_from(number)?, origin))?;
        }
        let ended: Vec<Watched> = pidfds
            .keys()
            .zip(ready.iter().skip(1))
            .filter(|(_, ready)| **ready)
            .map(|(who, _)| *who)
            .collect();
        for who in ended {
            pidfds.remove(&who);
            queue.send(LoopEvent::Ended(who))?;
        }
    }
}
