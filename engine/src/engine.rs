//! The engine as a handle: commands go in, events come out, threads do the rest.
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
//! The conductor is the only one that knows of all: it binds listeners, lets the shard with the fewest accept for each,
//! joins what the shards answer into one event, and never waits for a container. The shard that accepts hands each
//! connection to the one that has the fewest. An upstream of kind
//! [`Agent`](crate::command::UpstreamKind::Agent) has a shard of its own, which is asked and ended, and never waited for
//! long. [`crate::process`] puts the same contract on a socket.

mod apart;
mod conductor;
mod gathering;
mod shard_thread;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;

use rustix::process::{Resource, getrlimit};

use crate::command::{Command, Event, RingKind, RingReport, Told};
use crate::limits::Limits;
use crate::process::Drive;
use crate::reactor::{self, RingChoice, Unusable};
use crate::shard::{Peer, Peers, ShardCommand};
use crate::watch::Watcher;
use crate::watch::hint::HintSource;
use apart::Apart;
use conductor::{Conductor, Message};
use shard_thread::ShardThread;

/// How an engine is started.
#[derive(Debug, Default)]
pub struct EngineOptions {
    /// Its bounds.
    pub limits: Limits,
    /// Its ring.
    pub ring: RingChoice,
    /// Where hints about new listeners come from ([`crate::watch::hint`]).
    pub hints: HintSource,
    /// Which build of the program this is, for [`Event::Ready`].
    pub version: String,
}

/// Why an engine could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No ring works.
    #[error("{0}")]
    Ring(#[from] Unusable),
    /// A thread could not be started.
    #[error("could not start a thread: {0}")]
    Thread(#[from] std::io::Error),
    /// A limit makes no sense.
    #[error("{0}")]
    Limits(&'static str),
}

/// A running engine. Dropping it, and every [`Handle`] of it, resets what is open and ends its threads.
#[derive(Debug)]
pub struct Engine {
    handle: Handle,
    ready: Event,
    events: Receiver<Told>,
}

/// Gives an engine its commands.
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
            // A ring worked and a second one does not: the kernel has no more locked memory for this user.
            Err(StartError::Ring(unusable)) if ring == RingChoice::Auto && unusable.fall_back => {
                report = RingReport { kind: RingKind::Epoll, reason: Some(unusable.reason) };
                start_shards(report.kind, &limits, &messages)?
            }
            started => started?,
        };
        if shards.len() > 1 {
            let peers: Vec<Peer> = shards.iter().map(ShardThread::peer).collect();
            for (own, shard) in shards.iter().enumerate() {
                shard.send(ShardCommand::MeetPeers(Peers::new(own, peers.clone())));
            }
        }
        let watch_messages = messages.clone();
        let watcher = Watcher::start(hints, move |event| {
            let _ = watch_messages.send(Message::Watch(event));
        })?;
        let apart = Apart::new(&limits, messages.clone());
        let ready = Event::Ready {
            ring: report,
            shards: limits.shards,
            ipv6: crate::listener::host_has_ipv6(),
            version,
            lacks: Vec::new(),
        };
        let (told, events) = mpsc::channel();
        // The receiver is held here, so it takes the event.
        let _ = told.send(ready.clone().into());
        let conductor = Conductor::new(shards, apart, watcher, limits.backlog, told);
        let thread = std::thread::Builder::new().name("landfall-engine".to_owned());
        let conductor = thread.spawn(move || conductor.run(&inbox))?;
        let handle = Handle(Arc::new(Threads { messages, conductor: Some(conductor) }));
        Ok(Engine { handle, ready, events })
    }

    /// Gives it a command. Commands are carried out in the order in which they are given.
    pub fn apply(&self, command: Command, descriptors: Vec<OwnedFd>) {
        self.handle.apply(command, descriptors);
    }

    /// What it tells.
    pub fn events(&self) -> &Receiver<Told> {
        &self.events
    }

    /// [`Event::Ready`], for those who come later.
    pub fn ready(&self) -> &Event {
        &self.ready
    }

    /// The two ends apart, to be used by different threads.
    pub fn into_parts(self) -> (Handle, Receiver<Told>) {
        (self.handle, self.events)
    }
}

impl Drive for Handle {
    fn apply(&self, command: Command, descriptors: Vec<OwnedFd>) {
        // It fails only after the engine has told that it stopped; the descriptors are closed with the message.
        let _ = self.0.messages.send(Message::Command(command, descriptors));
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        let _ = self.messages.send(Message::Command(Command::Stop, Vec::new()));
        if let Some(conductor) = self.conductor.take() {
            // A conductor that panicked has said so on the way.
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
            // A conductor that has ended needs no reports.
            let _ = messages.send(Message::Report(index, report));
        })
    };
    (0..usize::from(limits.shards)).map(start).collect()
}

/// Bounds the connections of a shard by the descriptors there are: two for each, and some for everything else. Clients
/// beyond that wait in the kernel's queue instead of holding one descriptor each and waiting for the second.
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

/// Descriptors of a shard for listeners, stocks, the ring, and the files of the watch.
const DESCRIPTORS_RESERVED: usize = 128;
