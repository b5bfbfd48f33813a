//! Shards that serve one upstream each, since others hold duplicates of its sockets and may stop whoever uses them.
//!
//! Such a shard may be in a call that never returns (see [`crate::opener`]). So each has a ring, a mailbox and bounds of its
//! own, it is handed no connection of others, and what it is asked has an end: after [`ANSWER_PATIENCE`] the conductor says
//! what it knows itself, and after [`OBEY_PATIENCE`] it goes on without it, having closed the ports that the shard was to
//! close. The thread is then left to itself. It ends when the call does, at the latest when the container does: a socket whose
//! other end is gone holds nobody up.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use super::StartError;
use super::conductor::Message;
use super::shard_thread::ShardThread;
use crate::command::RingKind;
use crate::limits::Limits;

/// How long a question waits for its answer; a shard that is well needs microseconds.
pub(super) const ANSWER_PATIENCE: Duration = Duration::from_millis(100);
/// How long it may take to close a port or to let go of an upstream, and to give a sign of life when it drains.
pub(super) const OBEY_PATIENCE: Duration = Duration::from_secs(1);
/// Their poller. A ring takes locked memory, of which a user has little, and a confined engine may not create one.
const KIND: RingKind = RingKind::Epoll;
/// The most of them, those that were left to themselves and still hang included: each is a thread, a ring and its buffers.
const THREADS_MAX: usize = 256;

/// All of them. Their numbers follow those of the shards that serve everybody, and are never used again.
pub(super) struct Apart {
    limits: Limits,
    messages: Sender<Message>,
    threads: BTreeMap<usize, Lone>,
    next: usize,
    /// Held by each of the threads.
    alive: Arc<()>,
}

/// One of them.
struct Lone {
    thread: ShardThread,
    /// It was told to stop, and is waited for until then.
    due: Option<Instant>,
    /// It drains, and must have looked for commands again by then.
    probe: Option<(Instant, u64)>,
}

impl Apart {
    pub(super) fn new(limits: &Limits, messages: Sender<Message>) -> Apart {
        let limits = Limits {
            // A container's share; beyond it, its clients wait in the kernel's queue.
            connections_max: limits.connections_max.min(4_096),
            buffers_max: limits.buffers_max.min(512),
            buffers_kept: limits.buffers_kept.min(64),
            pipes_max: limits.pipes_max.min(16),
            pipes_kept: limits.pipes_kept.min(8),
            stock_max: limits.stock_max.min(64),
            stock_min: limits.stock_min.min(4),
            ..limits.clone()
        };
        let next = usize::from(limits.shards);
        Apart { limits, messages, threads: BTreeMap::new(), next, alive: Arc::new(()) }
    }

    /// Starts one, and gives its number.
    ///
    /// # Errors
    /// There are too many, or there is no thread or ring for it: a sentence for people.
    pub(super) fn start(&mut self) -> Result<usize, String> {
        if Arc::strong_count(&self.alive) > THREADS_MAX {
            return Err(format!("there are {THREADS_MAX} agents already, those that hang included"));
        }
        let (number, messages, alive) = (self.next, self.messages.clone(), self.alive.clone());
        let report = move |report| {
            let _held = &alive;
            // A conductor that has ended needs no reports.
            let _ = messages.send(Message::Report(number, report));
        };
        let thread = ShardThread::start(number, KIND, &self.limits, report)
            .map_err(|error: StartError| format!("there is no thread for an agent's sockets: {error}"))?;
        self.next += 1;
        self.threads.insert(number, Lone { thread, due: None, probe: None });
        Ok(number)
    }

    pub(super) fn thread(&self, number: usize) -> Option<&ShardThread> {
        self.threads.get(&number).map(|lone| &lone.thread)
    }

    pub(super) fn numbers(&self) -> impl Iterator<Item = usize> {
        self.threads.keys().copied()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.threads.is_empty()
    }

    /// All were told to stop at once.
    pub(super) fn expect_end(&mut self, now: Instant) {
        for lone in self.threads.values_mut() {
            lone.due.get_or_insert(now + OBEY_PATIENCE);
        }
    }

    /// All were told to drain, which may take as long as their connections do.
    pub(super) fn expect_signs_of_life(&mut self, now: Instant) {
        for lone in self.threads.values_mut() {
            lone.probe.get_or_insert((now + OBEY_PATIENCE, lone.thread.beats()));
        }
    }

    /// When [`Apart::on_time`] has something to do.
    pub(super) fn due(&self) -> Option<Instant> {
        let times = |lone: &Lone| [lone.due, lone.probe.map(|(at, _)| at)];
        self.threads.values().flat_map(times).flatten().min()
    }

    /// Those whose time is up.
    pub(super) fn on_time(&mut self, now: Instant) -> Vec<usize> {
        let mut hang = Vec::new();
        for (number, lone) in &mut self.threads {
            let is_over = lone.due.is_some_and(|due| due <= now);
            let mut is_dead = false;
            if let Some((at, beats)) = &mut lone.probe
                && *at <= now
            {
                let now_beats = lone.thread.beats();
                is_dead = now_beats == *beats;
                (*at, *beats) = (now + OBEY_PATIENCE, now_beats);
            }
            if is_over || is_dead {
                hang.push(*number);
            }
        }
        hang
    }

    /// Leaves one to itself, which ends as soon as it can.
    pub(super) fn abandon(&mut self, number: usize) {
        if let Some(lone) = self.threads.remove(&number) {
            lone.thread.abandon();
        }
    }
}
