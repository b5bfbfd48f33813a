//! The thread of a shard: creates the reactor on the thread that uses it, passes commands in and reports out.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::thread::JoinHandle;

use super::StartError;
use crate::command::RingKind;
use crate::limits::Limits;
use crate::reactor::{Epoll, Poller, Reactor, SocketIo, Unusable, Uring, Waker};
use crate::shard::{Peer, Report, Shard, ShardCommand};

/// A shard on a thread of its own.
#[derive(Debug)]
pub(super) struct ShardThread {
    commands: Sender<ShardCommand<OwnedFd>>,
    waker: Waker,
    thread: Option<JoinHandle<()>>,
    /// The number of times that the thread has looked for commands: its heartbeat.
    heartbeats: Arc<AtomicU64>,
}

impl ShardThread {
    /// Starts the thread and waits until its reactor works.
    pub(super) fn start(
        index: usize,
        kind: RingKind,
        limits: &Limits,
        report: impl FnMut(Report) + Send + 'static,
    ) -> Result<ShardThread, StartError> {
        let (commands, inbox) = mpsc::channel();
        let (started, outcome) = mpsc::channel();
        let limits = limits.clone();
        let heartbeats = Arc::new(AtomicU64::new(0));
        let counter = heartbeats.clone();
        let thread = std::thread::Builder::new().name(format!("landfall-shard-{index}")).spawn(
            move || match kind {
                RingKind::IoUring => {
                    launch(Uring::reactor(&limits), limits, &counter, &inbox, &started, report)
                }
                RingKind::Epoll => {
                    launch(Epoll::reactor(&limits), limits, &counter, &inbox, &started, report)
                }
            },
        )?;
        let waker = outcome
            .recv()
            .map_err(|_| io::Error::other("the shard's thread ended before it was ready"))??;
        Ok(ShardThread { commands, waker, thread: Some(thread), heartbeats })
    }

    /// Returns the view that the other shards have of this one.
    pub(super) fn peer(&self) -> Peer {
        let commands = self.commands.clone();
        Peer { commands, waker: self.waker.clone(), load: Arc::new(AtomicUsize::new(0)) }
    }

    /// Sends the shard a command. A shard that has ended ignores it.
    pub(super) fn send(&self, command: ShardCommand<OwnedFd>) {
        if self.commands.send(command).is_ok() {
            self.waker.wake();
        }
    }

    /// Returns the heartbeat counter, and wakes the thread.
    pub(super) fn heartbeats(&self) -> u64 {
        let heartbeats = self.heartbeats.load(Ordering::Relaxed);
        self.waker.wake();
        heartbeats
    }

    /// Detaches the thread, which then ends without a join. (Dropping `self` also sends a stop command.)
    pub(super) fn abandon(mut self) {
        // Without the handle, the drop does not join.
        drop(self.thread.take());
    }
}

impl Drop for ShardThread {
    fn drop(&mut self) {
        // The other shards hold senders of its mailbox, so dropping this sender would not stop it.
        self.send(ShardCommand::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn launch<P: Poller>(
    reactor: Result<Reactor<P>, Unusable>,
    limits: Limits,
    heartbeats: &AtomicU64,
    inbox: &Receiver<ShardCommand<OwnedFd>>,
    started: &Sender<Result<Waker, Unusable>>,
    report: impl FnMut(Report),
) {
    match reactor {
        Ok(reactor) => {
            // The starting thread waits for this message.
            let _ = started.send(Ok(reactor.waker()));
            run(Shard::new(reactor, limits), heartbeats, inbox, report);
        }
        Err(unusable) => {
            let _ = started.send(Err(unusable));
        }
    }
}

fn run<P: Poller>(
    mut shard: Shard<P>,
    heartbeats: &AtomicU64,
    inbox: &Receiver<ShardCommand<OwnedFd>>,
    mut report: impl FnMut(Report),
) {
    loop {
        heartbeats.fetch_add(1, Ordering::Relaxed);
        loop {
            match inbox.try_recv() {
                Ok(command) => {
                    let command = command.adopt(shard.reactor_mut().io());
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
            // The connections are closed with the reactor; only the report remains to be sent.
            report(Report::Degraded { what: error.to_string() });
            report(Report::Stopped);
            return;
        }
    }
}

impl ShardCommand<OwnedFd> {
    /// Returns the same command with the descriptors as sockets of a shard.
    fn adopt<I: SocketIo>(self, io: &mut I) -> ShardCommand<I::Socket> {
        match self {
            ShardCommand::AddUpstream { upstream, kind, channel, netns_cookie } => {
                let channel = channel.map(|channel| io.adopt(channel));
                ShardCommand::AddUpstream { upstream, kind, channel, netns_cookie }
            }
            ShardCommand::OpenListener { forward, upstream, host_port, target_port, reach, sockets } => {
                let sockets = sockets.into_iter().map(|socket| io.adopt(socket)).collect();
                ShardCommand::OpenListener { forward, upstream, host_port, target_port, reach, sockets }
            }
            ShardCommand::RemoveUpstream { upstream, ending } => {
                ShardCommand::RemoveUpstream { upstream, ending }
            }
            ShardCommand::Adopt { forward, socket, client_family } => {
                ShardCommand::Adopt { forward, socket: io.adopt(socket), client_family }
            }
            ShardCommand::SetPeers(peers) => ShardCommand::SetPeers(peers),
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
