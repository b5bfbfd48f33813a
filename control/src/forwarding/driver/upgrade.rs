//! Replaces an engine of another version by one of this build without refusing a connection.
//!
//! 1. A new engine starts under a temporary socket name.
//! 2. Every container is entered again for the new engine, under its present upstream number. Where a broker's session
//!    dials, it gets new channels.
//! 3. The old engine lends its listening sockets, and the new one listens on the same sockets. From here on both accept.
//! 4. The new engine takes the socket's name.
//! 5. The old engine receives `Drain`: it closes its copies of the listeners, and ends after its last connection.
//!
//! The engine that has the socket's name always has everything, so if the driver is killed, the next one knows which
//! engine to keep. A failure before step 4 stops the new engine and changes nothing.

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

/// The longest duration of an upgrade. Each container takes milliseconds.
const UPGRADE_MAX: Duration = Duration::from_secs(20);

/// The upstreams and forwards of the new engine.
struct TakenOver {
    upstreams: BTreeSet<UpstreamId>,
    forwards: BTreeSet<ForwardId>,
    handover: Handover,
}

/// A listener that the old engine has lent.
struct LentListener {
    command: Command,
    forward: ForwardId,
    upstream: UpstreamId,
    sockets: Vec<OwnedFd>,
}

impl Driver {
    /// Replaces the attached engine by one of this build.
    pub(super) async fn upgrade(&mut self) -> Result<(), String> {
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let names = engine_link::Upgrade::new(&self.home);
        let new = names.start().await.map_err(|error| text(&error))?;
        let moved = match timeout(UPGRADE_MAX, self.move_to(&new)).await {
            Ok(moved) => moved,
            Err(_) => Err(format!("it was not done within {} s", UPGRADE_MAX.as_secs())),
        };
        let moved = moved.and_then(|moved| names.hand_over().map(|()| moved).map_err(|error| text(&error)));
        match moved {
            Ok(TakenOver { upstreams, forwards, handover }) => {
                let old = std::mem::replace(&mut self.engine, Engine::Attached(new, Instant::now()));
                let changes = self.planner.moved(&upstreams, &forwards);
                self.report_changes(changes);
                self.send_channels(handover);
                self.drain(old).await;
                names.finish().map_err(|error| text(&error))
            }
            Err(reason) => {
                let _ = new.send_command(&Command::Stop, &[]).await;
                Err(reason)
            }
        }
    }

    /// Drains an engine of another version that no container needs.
    pub(super) async fn drain_engine(&mut self) {
        let absent = Engine::Absent { retry_at: Instant::now() };
        let old = std::mem::replace(&mut self.engine, absent);
        let changes = self.planner.detach();
        self.report_changes(changes);
        self.drain(old).await;
    }

    async fn drain(&mut self, old: Engine) {
        if let Engine::Attached(old, _) = old {
            // If this fails, the engine has ended.
            let _ = old.send_command(&Command::Drain, &[]).await;
            old.remove_name(&self.home);
            tokio::spawn(wait_for_drained(old, Arc::clone(&self.draining), self.stop_drained.subscribe()));
        }
    }

    /// Gives `new` everything that the attached engine has. Returns what it has taken over.
    async fn move_to(&mut self, new: &Link) -> Result<TakenOver, String> {
        let mut upstreams = BTreeSet::new();
        for (upstream, entered) in self.enter_for(new).await? {
            send_command(new, &entered.command(upstream), &entered.descriptors).await?;
            upstreams.insert(upstream);
        }
        let handover = self.dial_upstreams_for(new, &mut upstreams).await?;
        let mut waits = upstreams.clone();
        while !waits.is_empty() {
            match recv(new).await? {
                Event::UpstreamAdded { upstream } => drop(waits.remove(&upstream)),
                Event::Refused { reason } => return Err(reason),
                _ => {}
            }
        }
        let mut waits = BTreeSet::new();
        for LentListener { command, forward, upstream, sockets } in self.borrow_listeners().await? {
            if upstreams.contains(&upstream) && self.planner.is_open(forward) {
                send_command(new, &command, &sockets).await?;
                waits.insert(forward);
            }
        }
        let forwards = waits.clone();
        while !waits.is_empty() {
            match recv(new).await? {
                Event::ListenerOpened { forward, .. } => drop(waits.remove(&forward)),
                Event::ListenerFailed { failure, .. } => return Err(failure.detail),
                Event::Refused { reason } => return Err(reason),
                _ => {}
            }
        }
        Ok(TakenOver { upstreams, forwards, handover })
    }

    /// Enters every reached container again, for an engine that is not attached yet.
    async fn enter_for(&mut self, new: &Link) -> Result<BTreeMap<UpstreamId, EntryResult>, String> {
        let mut waits: BTreeMap<ContainerName, u64> = BTreeMap::new();
        for at in 0..self.containers.len() {
            let serial = self.next_entry_request().map(|entry_request| entry_request.serial);
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
            let Some(report) = self.task_reports.recv().await else { break };
            let asked = waits.get(&report.name).copied();
            let wanted = |serial: u64| asked == Some(serial);
            match report {
                TaskReport { name, event: TaskEvent::Entered { serial, entry, .. }, .. }
                    if wanted(serial) =>
                {
                    waits.remove(&name);
                    match self.planner.container_entered(&name, entry.cookie) {
                        Admission::Known(upstream) => drop(entered.insert(upstream, entry)),
                        _ => return Err(format!("container \"{name}\" has another namespace now")),
                    }
                }
                TaskReport {
                    ref name,
                    event: TaskEvent::ContainerGone { .. } | TaskEvent::ProcessEnded,
                    ..
                } => {
                    waits.remove(name);
                    Box::pin(self.on_task_report(report)).await;
                }
                TaskReport { ref name, event: TaskEvent::EntryFailed { ref reason, .. }, .. }
                    if waits.contains_key(name) =>
                {
                    return Err(format!("container \"{name}\" could not be entered: {reason}"));
                }
                other => Box::pin(self.on_task_report(other)).await,
            }
        }
        Ok(entered)
    }

    /// Borrows the listening sockets of the attached engine, and handles its other events meanwhile.
    async fn borrow_listeners(&mut self) -> Result<Vec<LentListener>, String> {
        let Engine::Attached(old, _) = &self.engine else { return Err("it ended".to_owned()) };
        send_command(old, &Command::LendListeners, &[]).await?;
        let mut lent = Vec::new();
        loop {
            let Engine::Attached(old, _) = &self.engine else { return Err("it ended".to_owned()) };
            match old.recv().await.map_err(|error| error.to_string())? {
                (Event::ListenerLent { forward, upstream, host_port, target_port, reach }, sockets) => {
                    let command = Command::OpenListener { forward, upstream, host_port, target_port, reach };
                    lent.push(LentListener { command, forward, upstream, sockets });
                }
                (Event::ListenersLent { .. }, _) => return Ok(lent),
                (Event::Refused { reason }, _) => return Err(reason),
                (event, _) => self.on_engine_event(&event),
            }
        }
    }
}

async fn send_command(link: &Link, command: &Command, descriptors: &[OwnedFd]) -> Result<(), String> {
    link.send_command(command, descriptors).await.map_err(|error| error.to_string())
}

async fn recv(link: &Link) -> Result<Event, String> {
    link.recv().await.map(|(event, _)| event).map_err(|error: LinkError| error.to_string())
}

/// Waits until a draining engine has ended; stops it when forwarding stops its engines.
async fn wait_for_drained(old: Link, counted: Arc<()>, mut stop: watch::Receiver<bool>) {
    let ended = async { while !matches!(old.recv().await, Ok((Event::Stopped, _)) | Err(_)) {} };
    let stopping = async {
        if stop.wait_for(|stop| *stop).await.is_err() {
            // The driver has ended without stopping its engines; this one ends after its last connection.
            std::future::pending::<()>().await;
        }
        let _ = old.send_command(&Command::Stop, &[]).await;
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = ended => {}
        () = stopping => {}
    }
    drop(counted);
    Departed::new(old.process(), BTreeSet::new()).ended().await;
}
