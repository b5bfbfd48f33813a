//! The engine as a handle: commands go in, events come out, and its threads do the work.
//!
//! ```text
//!  Handle::apply ──┐
//!                  ▼
//!  watch thread ─► conductor thread ─► events
//!                  ▲        │
//!                  │reports │commands, descriptors
//!                  └── shard threads (one ring each)
//! ```
//!
//! Only the conductor has the state of the whole engine: it binds listeners, assigns each to the shard with the fewest
//! forwards, joins the shards' answers into one event, and never waits for a container. The shard that accepts passes each
//! connection to the shard that has the fewest. An upstream of kind [`Agent`](crate::command::UpstreamKind::Agent) has an
//! isolated shard (`isolated.rs`); the conductor waits for its answers with a time limit. [`crate::process`] provides the
//! same contract on a socket.

mod conductor;
mod gathering;
mod isolated;
mod shard_thread;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;

use rustix::process::{Resource, getrlimit};

use crate::command::{Command, Event, EventMessage, RingKind, RingReport};
use crate::limits::Limits;
use crate::process::Drive;
use crate::reactor::{self, RingChoice, Unusable};
use crate::shard::{Peer, Peers, ShardCommand};
use crate::watch::Watcher;
use crate::watch::hint::HintSource;
use conductor::{Conductor, Message};
use isolated::IsolatedShards;
use shard_thread::ShardThread;

/// The options of an engine.
#[derive(Debug, Default)]
pub struct EngineOptions {
    /// The bounds.
    pub limits: Limits,
    /// The choice of the ring.
    pub ring: RingChoice,
    /// The source of hints about new listeners ([`crate::watch::hint`]).
    pub hints: HintSource,
    /// The build of the program, for [`Event::Ready`].
    pub version: String,
}

/// The reason why an engine cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No ring is usable.
    #[error("{0}")]
    Ring(#[from] Unusable),
    /// A thread could not be started.
    #[error("could not start a thread: {0}")]
    Thread(#[from] std::io::Error),
    /// A limit is invalid.
    #[error("{0}")]
    Limits(&'static str),
}

/// A running engine. Dropping it and every [`Handle`] of it resets open connections and ends the threads.
#[derive(Debug)]
pub struct Engine {
    handle: Handle,
    ready: Event,
    events: Receiver<EventMessage>,
}

/// Sends commands to an engine.
#[derive(Clone, Debug)]
pub struct Handle(Arc<Threads>);

#[derive(Debug)]
struct Threads {
    messages: Sender<Message>,
    conductor: Option<JoinHandle<()>>,
}

impl Engine {
    /// Starts the threads of an engine. Its first event is [`Event::Ready`].
    ///
    /// # Errors
    /// See [`StartError`].
    pub fn start(options: EngineOptions) -> Result<Engine, StartError> {
        let EngineOptions { limits, ring, hints, version } = options;
        if limits.shards == 0 || limits.buffers_max == 0 || limits.buffer_bytes == 0 {
            return Err(StartError::Limits("an engine needs at least one shard and one buffer of one byte"));
        }
        let mut report = reactor::choose(ring, &limits)?;
        let limits = within_descriptors(limits);
        let (messages, inbox) = mpsc::channel();
        let shards = match start_shards(report.kind, &limits, &messages) {
            // One ring works and a second one does not: the kernel grants this user no more locked memory.
            Err(StartError::Ring(unusable)) if ring == RingChoice::Auto && unusable.fall_back => {
                report = RingReport { kind: RingKind::Epoll, reason: Some(unusable.reason) };
                start_shards(report.kind, &limits, &messages)?
            }
            started => started?,
        };
        if shards.len() > 1 {
            let peers: Vec<Peer> = shards.iter().map(ShardThread::peer).collect();
            for (own, shard) in shards.iter().enumerate() {
                shard.send(ShardCommand::SetPeers(Peers::new(own, peers.clone())));
            }
        }
        let watch_messages = messages.clone();
        let watcher = Watcher::start(hints, move |event| {
            let _ = watch_messages.send(Message::Watch(event));
        })?;
        let isolated = IsolatedShards::new(&limits, messages.clone());
        let ready = Event::Ready {
            ring: report,
            shards: limits.shards,
            ipv6: crate::listener::host_has_ipv6(),
            version,
            lacks: Vec::new(),
        };
        let (events_sender, events) = mpsc::channel();
        // The send succeeds: the receiver exists.
        let _ = events_sender.send(ready.clone().into());
        let conductor = Conductor::new(shards, isolated, watcher, limits.backlog, events_sender);
        let thread = std::thread::Builder::new().name("landfall-engine".to_owned());
        let conductor = thread.spawn(move || conductor.run(&inbox))?;
        let handle = Handle(Arc::new(Threads { messages, conductor: Some(conductor) }));
        Ok(Engine { handle, ready, events })
    }

    /// Sends a command. Commands are carried out in the order of these calls.
    pub fn apply(&self, command: Command, descriptors: Vec<OwnedFd>) {
        self.handle.apply(command, descriptors);
    }

    /// Returns the receiver of the engine's events.
    pub fn events(&self) -> &Receiver<EventMessage> {
        &self.events
    }

    /// Returns [`Event::Ready`], for a driver that connects later.
    pub fn ready(&self) -> &Event {
        &self.ready
    }

    /// Splits the engine into its two ends, for use by different threads.
    pub fn into_parts(self) -> (Handle, Receiver<EventMessage>) {
        (self.handle, self.events)
    }
}

impl Drive for Handle {
    fn apply(&self, command: Command, descriptors: Vec<OwnedFd>) {
        // The send fails only after Event::Stopped; dropping the message closes the descriptors.
        let _ = self.0.messages.send(Message::Command(command, descriptors));
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        let _ = self.messages.send(Message::Command(Command::Stop, Vec::new()));
        if let Some(conductor) = self.conductor.take() {
            // The panic hook has reported a panic already.
            let _ = conductor.join();
        }
    }
}

/// Starts the common shards.
fn start_shards(
    kind: RingKind,
    limits: &Limits,
    messages: &Sender<Message>,
) -> Result<Vec<ShardThread>, StartError> {
    let start = |index| {
        let messages = messages.clone();
        ShardThread::start(index, kind, limits, move |report| {
            // The send fails only after the conductor has ended, which then needs no reports.
            let _ = messages.send(Message::Report(index, report));
        })
    };
    (0..usize::from(limits.shards)).map(start).collect()
}

/// Limits the connections of a shard to the available descriptors: two for each connection, and some for other uses. Further
/// clients wait in the kernel's queue instead of holding one descriptor while they wait for the second.
fn within_descriptors(mut limits: Limits) -> Limits {
    if let Some(descriptors) = getrlimit(Resource::Nofile).current {
        let descriptors = usize::try_from(descriptors).unwrap_or(usize::MAX) / usize::from(limits.shards);
        let reserved = DESCRIPTORS_RESERVED + 2 * limits.pipes_max.min(descriptors / 16);
        let connections = descriptors.saturating_sub(reserved) / 2;
        limits.connections_max =
            limits.connections_max.min(u32::try_from(connections.max(1)).unwrap_or(u32::MAX));
        limits.pipes_max = limits.pipes_max.min(descriptors / 16);
    }
    limits
}

/// Descriptors of a shard for listeners, stocks, the reactor, and the files of the watch.
const DESCRIPTORS_RESERVED: usize = 128;
