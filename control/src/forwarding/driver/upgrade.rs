//! An engine of another version is relieved by one of this build, and no connect is refused meanwhile.
//!
//! 1. A new engine starts under a name aside.
//! 2. Every container is entered anew for the new engine, under the number that it has. Where a broker's session dials, it
//!    gets new channels.
//! 3. The older one lends its listening sockets; the new one listens on the very same ones. From here on both accept.
//! 4. The new one takes the socket's name.
//! 5. The older one is told to drain: it closes its copies, and ends when its connections have finished.
//!
//! Whoever has the socket's name has everything, so that a driver that is killed leaves no doubt about which one is to go
//! on. Whatever fails before the fourth step ends the new one, and nothing has changed.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use landfall_engine::command::{Command, Event, ForwardId, UpstreamId};
use tokio::sync::watch;
use tokio::time::timeout;

use super::brokers::Handover;
use crate::forwarding::departed::Departed;
use crate::forwarding::driver::event_loop::{Driver, Engine};
use crate::forwarding::engine_link::{self, Link, LinkError};
use crate::forwarding::entry::{EntryRequest, EntryResult, TaskEvent, TaskReport};
use crate::forwarding::planner::Admission;
use crate::model::forward_table::Reachability;
use crate::model::registration::ContainerName;

/// How long all of it may take. Each container takes milliseconds.
const UPGRADE_MAX: Duration = Duration::from_secs(20);

/// What the new engine took.
struct Moved {
    upstreams: BTreeSet<UpstreamId>,
    forwards: BTreeSet<ForwardId>,
    handover: Handover,
}

/// A listener that was lent.
struct Lent {
    command: Command,
    forward: ForwardId,
    upstream: UpstreamId,
    sockets: Vec<OwnedFd>,
}

impl Driver {
    /// Relieves the engine that is attached.
    pub(super) async fn upgrade(&mut self) -> Result<(), String> {
        let told = |error: &dyn std::fmt::Display| error.to_string();
        let names = engine_link::Upgrade::new(&self.home);
        let new = names.start().await.map_err(|error| told(&error))?;
        let moved = match timeout(UPGRADE_MAX, self.move_to(&new)).await {
            Ok(moved) => moved,
            Err(_) => Err(format!("it was not done within {} s", UPGRADE_MAX.as_secs())),
        };
        let moved = moved.and_then(|moved| names.hand_over().map(|()| moved).map_err(|error| told(&error)));
        match moved {
            Ok(Moved { upstreams, forwards, handover }) => {
                let old = std::mem::replace(&mut self.engine, Engine::Attached(new, Instant::now()));
                let changes = self.planner.moved(&upstreams, &forwards);
                self.tell_all(changes);
                self.serve(handover);
                self.drain(old).await;
                names.finish().map_err(|error| told(&error))
            }
            Err(reason) => {
                let _ = new.give(&Command::Stop, &[]).await;
                Err(reason)
            }
        }
    }

    /// Lets an engine of another version end, where nobody needs one.
    pub(super) async fn dismiss_engine(&mut self) {
        let absent = Engine::Absent { again: Instant::now() };
        let old = std::mem::replace(&mut self.engine, absent);
        let changes = self.planner.detach();
        self.tell_all(changes);
        self.drain(old).await;
    }

    async fn drain(&mut self, old: Engine) {
        if let Engine::Attached(old, _) = old {
            // One that does not hear this has ended.
            let _ = old.give(&Command::Drain, &[]).await;
            old.remove_name(&self.home);
            tokio::spawn(see_off(old, Arc::clone(&self.draining), self.stop_drained.subscribe()));
        }
    }

    /// Gives `new` everything that the attached engine has; answers with what it took.
    async fn move_to(&mut self, new: &Link) -> Result<Moved, String> {
        let mut upstreams = BTreeSet::new();
        for (upstream, entered) in self.enter_for(new).await? {
            give(new, &entered.command(upstream), &entered.descriptors).await?;
            upstreams.insert(upstream);
        }
        let handover = self.dial_for(new, &mut upstreams).await?;
        let mut waits = upstreams.clone();
        while !waits.is_empty() {
            match hear(new).await? {
                Event::UpstreamAdded { upstream } => drop(waits.remove(&upstream)),
                Event::Refused { reason } => return Err(reason),
                _ => {}
            }
        }
        let mut waits = BTreeSet::new();
        for Lent { command, forward, upstream, sockets } in self.borrow_listeners().await? {
            if upstreams.contains(&upstream) && self.planner.is_open(forward) {
                give(new, &command, &sockets).await?;
                waits.insert(forward);
            }
        }
        let forwards = waits.clone();
        while !waits.is_empty() {
            match hear(new).await? {
                Event::ListenerOpened { forward, .. } => drop(waits.remove(&forward)),
                Event::ListenerFailed { failure, .. } => return Err(failure.detail),
                Event::Refused { reason } => return Err(reason),
                _ => {}
            }
        }
        Ok(Moved { upstreams, forwards, handover })
    }

    /// Has every container that is reached entered once more, for an engine that is not attached yet.
    async fn enter_for(&mut self, new: &Link) -> Result<BTreeMap<UpstreamId, EntryResult>, String> {
        let mut waits: BTreeMap<ContainerName, u64> = BTreeMap::new();
        for at in 0..self.containers.len() {
            let serial = self.next_gate().map(|entry_request| entry_request.serial);
            let Some(container) = self.containers.get(at) else { continue };
            if let (Some(task), Some(serial), Reachability::Reached) =
                (&container.task, serial, container.state)
            {
                task.entry_request.send_replace(Some(EntryRequest { serial, shards: new.shards }));
                waits.insert(container.name().clone(), serial);
            }
        }
        let mut entered = BTreeMap::new();
        while !waits.is_empty() {
            let Some(told) = self.told.recv().await else { break };
            let asked = waits.get(&told.name).copied();
            let wanted = |serial: u64| asked == Some(serial);
            match told {
                TaskReport { name, word: TaskEvent::Entered { serial, entry, .. }, .. } if wanted(serial) => {
                    waits.remove(&name);
                    match self.planner.reached(&name, entry.cookie) {
                        Admission::Known(upstream) => drop(entered.insert(upstream, entry)),
                        _ => return Err(format!("container \"{name}\" is another one now")),
                    }
                }
                TaskReport { ref name, word: TaskEvent::Left { .. } | TaskEvent::Ended, .. } => {
                    waits.remove(name);
                    Box::pin(self.hear_word(told)).await;
                }
                TaskReport { ref name, word: TaskEvent::Missed { ref reason, .. }, .. }
                    if waits.contains_key(name) =>
                {
                    return Err(format!("container \"{name}\" could not be entered: {reason}"));
                }
                other => Box::pin(self.hear_word(other)).await,
            }
        }
        Ok(entered)
    }

    /// Borrows the listening sockets of the engine that is attached; hears whatever else it says.
    async fn borrow_listeners(&mut self) -> Result<Vec<Lent>, String> {
        let Engine::Attached(old, _) = &self.engine else { return Err("it ended".to_owned()) };
        give(old, &Command::LendListeners, &[]).await?;
        let mut lent = Vec::new();
        loop {
            let Engine::Attached(old, _) = &self.engine else { return Err("it ended".to_owned()) };
            match old.recv().await.map_err(|error| error.to_string())? {
                (Event::ListenerLent { forward, upstream, host_port, target_port, reach }, sockets) => {
                    let command = Command::OpenListener { forward, upstream, host_port, target_port, reach };
                    lent.push(Lent { command, forward, upstream, sockets });
                }
                (Event::ListenersLent { .. }, _) => return Ok(lent),
                (Event::Refused { reason }, _) => return Err(reason),
                (event, _) => self.hear_engine(&event),
            }
        }
    }
}

async fn give(link: &Link, command: &Command, descriptors: &[OwnedFd]) -> Result<(), String> {
    link.give(command, descriptors).await.map_err(|error| error.to_string())
}

async fn hear(link: &Link) -> Result<Event, String> {
    link.recv().await.map(|(event, _)| event).map_err(|error: LinkError| error.to_string())
}

/// Stays with an engine that finishes its connections until it has ended; stops it when everything is to stop.
async fn see_off(old: Link, counted: Arc<()>, mut stop: watch::Receiver<bool>) {
    let ended = async { while !matches!(old.recv().await, Ok((Event::Stopped, _)) | Err(_)) {} };
    let stopping = async {
        if stop.wait_for(|stop| *stop).await.is_err() {
            // Forwarding has let go of its engines; this one ends by itself.
            std::future::pending::<()>().await;
        }
        let _ = old.give(&Command::Stop, &[]).await;
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = ended => {}
        () = stopping => {}
    }
    drop(counted);
    Departed::new(old.process(), BTreeSet::new()).ended().await;
}
