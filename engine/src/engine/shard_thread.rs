//! The thread around a shard: makes the ring where it is used, hands in commands, hands out reports.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::thread::JoinHandle;

use super::StartError;
use crate::command::RingKind;
use crate::limits::Limits;
use crate::ring::{EpollRing, Ring, Unusable, UringRing, Waker};
use crate::shard::{Peer, Report, Shard, ShardCommand};

/// A shard on a thread of its own.
#[derive(Debug)]
pub(super) struct ShardThread {
    commands: Sender<ShardCommand<OwnedFd>>,
    waker: Waker,
    thread: Option<JoinHandle<()>>,
    /// How often the thread has looked for commands.
    beats: Arc<AtomicU64>,
}

impl ShardThread {
    /// Starts the thread and waits until its ring works.
    pub(super) fn start(
        index: usize,
        kind: RingKind,
        limits: &Limits,
        report: impl FnMut(Report) + Send + 'static,
    ) -> Result<ShardThread, StartError> {
        let (commands, inbox) = mpsc::channel();
        let (started, outcome) = mpsc::channel();
        let limits = limits.clone();
        let beats = Arc::new(AtomicU64::new(0));
        let beaten = beats.clone();
        let thread = std::thread::Builder::new().name(format!("landfall-shard-{index}")).spawn(
            move || match kind {
                RingKind::IoUring => {
                    launch(UringRing::new(&limits), limits, &beaten, &inbox, &started, report)
                }
                RingKind::Epoll => launch(EpollRing::new(&limits), limits, &beaten, &inbox, &started, report),
            },
        )?;
        let waker = outcome
            .recv()
            .map_err(|_| io::Error::other("the shard's thread ended before it had begun"))??;
        Ok(ShardThread { commands, waker, thread: Some(thread), beats })
    }

    /// How the other shards see this one.
    pub(super) fn peer(&self) -> Peer {
        let commands = self.commands.clone();
        Peer { commands, waker: self.waker.clone(), load: Arc::new(AtomicUsize::new(0)) }
    }

    /// Gives the shard a command. One that has ended needs none.
    pub(super) fn send(&self, command: ShardCommand<OwnedFd>) {
        if self.commands.send(command).is_ok() {
            self.waker.wake();
        }
    }

    /// How often the thread has looked for commands so far. Has it look once more.
    pub(super) fn beats(&self) -> u64 {
        let beats = self.beats.load(Ordering::Relaxed);
        self.waker.wake();
        beats
    }

    /// Tells it to stop, and does not wait for that.
    pub(super) fn abandon(mut self) {
        // Not joined, then: dropping the handle leaves the thread to itself.
        drop(self.thread.take());
    }
}

impl Drop for ShardThread {
    fn drop(&mut self) {
        // Its peers hold its mailbox, too, so it has to be told.
        self.send(ShardCommand::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn launch<R: Ring>(
    ring: Result<R, Unusable>,
    limits: Limits,
    beats: &AtomicU64,
    inbox: &Receiver<ShardCommand<OwnedFd>>,
    started: &Sender<Result<Waker, Unusable>>,
    report: impl FnMut(Report),
) {
    match ring {
        Ok(ring) => {
            // Whoever started it waits for this.
            let _ = started.send(Ok(ring.waker()));
            run(Shard::new(ring, limits), beats, inbox, report);
        }
        Err(unusable) => {
            let _ = started.send(Err(unusable));
        }
    }
}

fn run<R: Ring>(
    mut shard: Shard<R>,
    beats: &AtomicU64,
    inbox: &Receiver<ShardCommand<OwnedFd>>,
    mut report: impl FnMut(Report),
) {
    loop {
        beats.fetch_add(1, Ordering::Relaxed);
        loop {
            match inbox.try_recv() {
                Ok(command) => {
                    let command = command.adopt(shard.ring_mut());
                    shard.command(command);
                }
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => {
                    shard.command(ShardCommand::Stop);
                    break;
                }
            }
        }
        shard.reports().for_each(&mut report);
        if shard.is_stopped() {
            return;
        }
        if let Err(error) = shard.turn() {
            // The connections are gone with the ring; saying so is all that is left.
            report(Report::Degraded { what: error.to_string() });
            report(Report::Stopped);
            return;
        }
    }
}

impl ShardCommand<OwnedFd> {
    /// The same command with the descriptors taken over by a ring.
    fn adopt<R: Ring>(self, ring: &mut R) -> ShardCommand<R::Socket> {
        match self {
            ShardCommand::AddUpstream { upstream, kind, channel, netns_cookie } => {
                ShardCommand::AddUpstream { upstream, kind, channel: ring.adopt(channel), netns_cookie }
            }
            ShardCommand::OpenListener { forward, upstream, host_port, target_port, reach, sockets } => {
                let sockets = sockets.into_iter().map(|socket| ring.adopt(socket)).collect();
                ShardCommand::OpenListener { forward, upstream, host_port, target_port, reach, sockets }
            }
            ShardCommand::RemoveUpstream { upstream, ending } => {
                ShardCommand::RemoveUpstream { upstream, ending }
            }
            ShardCommand::Adopt { forward, socket, came_by } => {
                ShardCommand::Adopt { forward, socket: ring.adopt(socket), came_by }
            }
            ShardCommand::MeetPeers(peers) => ShardCommand::MeetPeers(peers),
            ShardCommand::SetReach { forward, reach } => ShardCommand::SetReach { forward, reach },
            ShardCommand::CloseListener { forward, ending } => {
                ShardCommand::CloseListener { forward, ending }
            }
            ShardCommand::Describe => ShardCommand::Describe,
            ShardCommand::Lend => ShardCommand::Lend,
            ShardCommand::Drain => ShardCommand::Drain,
            ShardCommand::Stop => ShardCommand::Stop,
        }
    }
}
