//! One queue for all events that `run` and `attach` wait for: the engine's events, signals, and ended processes.
//!
//! Two small threads fill it. Signals are blocked in all threads and read from a signalfd, which reports the sender.
//! The terminal's Ctrl-C goes to the whole foreground group, so the command has it already and must not get it twice; a
//! signal that another process sent to this one alone is passed on. Processes are watched by pidfd.

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

/// Signals that another process or the user sends on purpose, and that the command should get. SIGTSTP, SIGCONT and
/// similar ones are not in the list: job control stops and continues this process together with the command, which is
/// in the same process group.
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

/// The sender of a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The kernel: a terminal, to its whole foreground group.
    Kernel,
    /// A process.
    Process,
}

/// A watched process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Watched {
    /// The command of `run`.
    Command,
    /// The process that `attach` was given.
    Target,
    /// pasta.
    Pasta,
}

/// An event of the loop.
#[derive(Debug)]
pub enum LoopEvent {
    /// An event of the engine.
    Engine(Event),
    /// The engine sends no further events.
    EngineEnded,
    /// The daemon may have new events.
    DaemonHints,
    /// An event of the supervisor of native sockets.
    Native(NativeEvent),
    /// A signal arrived.
    Signal(Signal, Origin),
    /// A process ended.
    Ended(Watched),
}

/// Signals that are blocked in every thread and read here.
#[derive(Debug)]
pub struct Signals(SignalFd);

impl Signals {
    /// Blocks the signals. Call it before another thread is started: threads inherit the signal mask.
    pub fn block() -> io::Result<Signals> {
        let set: SigSet = PASSED_ON.into_iter().collect();
        set.thread_block()?;
        Ok(Signals(SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?))
    }
}

/// Unblocks the signals. A program inherits the signal mask across `exec`, so a process that becomes another program
/// calls this first.
pub fn unblock() -> io::Result<()> {
    Ok(PASSED_ON.into_iter().collect::<SigSet>().thread_unblock()?)
}

/// Starts a thread that sends `queue` the signals and the ends of the processes behind `pidfds`.
pub fn watch(
    signals: Signals,
    pidfds: BTreeMap<Watched, OwnedFd>,
    queue: Sender<LoopEvent>,
) -> io::Result<()> {
    let work = move || {
        // Sending fails only when the receiver is gone, which ends this thread and the program.
        let _ = watch_all(&signals, pidfds, &queue);
    };
    thread::Builder::new().name("waiting".to_owned()).spawn(work).map(drop)
}

/// Starts a thread that sends `queue` the engine's events.
pub fn relay_events(events: Receiver<EventMessage>, queue: Sender<LoopEvent>) -> io::Result<()> {
    let work = move || {
        for message in events {
            if queue.send(LoopEvent::Engine(message.event)).is_err() {
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
            .map(|(watched, _)| *watched)
            .collect();
        for watched in ended {
            pidfds.remove(&watched);
            queue.send(LoopEvent::Ended(watched))?;
        }
    }
}
