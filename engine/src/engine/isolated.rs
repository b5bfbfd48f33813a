//! Isolated shards: each serves the upstream of one untrusted agent.
//!
//! The agent holds duplicates of its sockets, so it can make a call on them block for ever (see [`crate::opener`]). An
//! isolated shard therefore has its own thread, reactor, mailbox and bounds, receives no connections of other upstreams, and
//! has time limits. After [`ANSWER_TIMEOUT`] the conductor answers a question from its own records. After
//! [`COMMAND_TIMEOUT`] it abandons the shard, and closes the ports that the shard was to close. The abandoned thread ends
//! when its call returns, at the latest when the container ends: a call on a socket whose peer is gone does not block.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use super::StartError;
use super::conductor::Message;
use super::shard_thread::ShardThread;
use crate::command::RingKind;
use crate::limits::Limits;

/// Time limit for the answer to a question. A healthy shard needs microseconds.
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_millis(100);
/// Time limit for closing a port, for removing an upstream, and for the next heartbeat while the shard drains.
pub(super) const COMMAND_TIMEOUT: Duration = Duration::from_secs(1);
/// The poller of isolated shards. A ring needs locked memory, which is scarce for a user, and a confined engine may not
/// create one.
const KIND: RingKind = RingKind::Epoll;
/// The maximum number of isolated shards, including abandoned ones that still block. Each has a thread, a reactor and
/// buffers.
const THREADS_MAX: usize = 256;

/// All isolated shards. Their numbers follow those of the common shards and are never reused.
pub(super) struct IsolatedShards {
    limits: Limits,
    messages: Sender<Message>,
    threads: BTreeMap<usize, IsolatedShard>,
    next: usize,
    /// Each thread holds a clone, so the strong count is the number of threads plus one.
    alive: Arc<()>,
}

/// One isolated shard.
struct IsolatedShard {
    thread: ShardThread,
    /// The deadline of a shard that was stopped.
    due: Option<Instant>,
    /// The next check of the heartbeat of a shard that drains, and the count at the last check.
    probe: Option<(Instant, u64)>,
}

impl IsolatedShards {
    pub(super) fn new(limits: &Limits, messages: Sender<Message>) -> IsolatedShards {
        let limits = Limits {
            // The share of one container. Clients beyond it wait in the kernel's queue.
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
        IsolatedShards { limits, messages, threads: BTreeMap::new(), next, alive: Arc::new(()) }
    }

    /// Starts an isolated shard, and returns its number.
    ///
    /// # Errors
    /// There are too many, or its thread or reactor could not be created: a sentence for people.
    pub(super) fn start(&mut self) -> Result<usize, String> {
        if Arc::strong_count(&self.alive) > THREADS_MAX {
            return Err(format!("there are {THREADS_MAX} agents already, including blocked ones"));
        }
        let (number, messages, alive) = (self.next, self.messages.clone(), self.alive.clone());
        let report = move |report| {
            let _held = &alive;
            // The send fails only after the conductor has ended, which then needs no reports.
            let _ = messages.send(Message::Report(number, report));
        };
        let thread =
            ShardThread::start(number, KIND, &self.limits, report).map_err(|error: StartError| {
                format!("could not start a thread for the agent's sockets: {error}")
            })?;
        self.next += 1;
        self.threads.insert(number, IsolatedShard { thread, due: None, probe: None });
        Ok(number)
    }

    pub(super) fn thread(&self, number: usize) -> Option<&ShardThread> {
        self.threads.get(&number).map(|shard| &shard.thread)
    }

    pub(super) fn numbers(&self) -> impl Iterator<Item = usize> {
        self.threads.keys().copied()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.threads.is_empty()
    }

    /// Sets the deadline after all shards were stopped.
    pub(super) fn set_end_deadline(&mut self, now: Instant) {
        for shard in self.threads.values_mut() {
            shard.due.get_or_insert(now + COMMAND_TIMEOUT);
        }
    }

    /// Starts the heartbeat checks after all shards were drained, which may take as long as their connections last.
    pub(super) fn start_heartbeat_checks(&mut self, now: Instant) {
        for shard in self.threads.values_mut() {
            shard.probe.get_or_insert((now + COMMAND_TIMEOUT, shard.thread.heartbeats()));
        }
    }

    /// Returns when [`IsolatedShards::on_deadline`] is due.
    pub(super) fn due(&self) -> Option<Instant> {
        let times = |shard: &IsolatedShard| [shard.due, shard.probe.map(|(at, _)| at)];
        self.threads.values().flat_map(times).flatten().min()
    }

    /// Returns the shards that missed a deadline.
    pub(super) fn on_deadline(&mut self, now: Instant) -> Vec<usize> {
        let mut blocked = Vec::new();
        for (number, shard) in &mut self.threads {
            let is_overdue = shard.due.is_some_and(|due| due <= now);
            let mut is_blocked = false;
            if let Some((at, heartbeats)) = &mut shard.probe
                && *at <= now
            {
                let now_beats = shard.thread.heartbeats();
                is_blocked = now_beats == *heartbeats;
                (*at, *heartbeats) = (now + COMMAND_TIMEOUT, now_beats);
            }
            if is_overdue || is_blocked {
                blocked.push(*number);
            }
        }
        blocked
    }

    /// Detaches a shard, which ends when its current call returns.
    pub(super) fn abandon(&mut self, number: usize) {
        if let Some(shard) = self.threads.remove(&number) {
            shard.thread.abandon();
        }
    }
}
