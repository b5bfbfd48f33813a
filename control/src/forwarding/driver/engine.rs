//! The connection to the engine: attach, lose, receive events, send commands, stop.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use landfall_engine::command::{Command, Event};
use landfall_engine::process::confinement::Lack;
use tokio::time::timeout_at;
use tokio_util::task::AbortOnDropHandle;

use super::containers::Container;
use crate::forwarding::departed::Departed;
use crate::forwarding::driver::event_loop::{Driver, Engine, START_PAUSE};
use crate::forwarding::engine_link::{self, Attached, LinkError};
use crate::model::event::Event as JournalEvent;
use crate::model::forward_table::Reachability;
use crate::version;

/// An engine that was attached for this long is started again at once when it is lost.
const STABLE_AFTER: Duration = Duration::from_secs(10);
/// The most events of the engine that are handled before the next plan.
const EVENTS_MAX: usize = 64;
/// The time that connections have to finish when the engine is stopped.
const DRAIN_MAX: Duration = Duration::from_secs(3);
/// The time that the engine has to end after that.
const STOP_MAX: Duration = Duration::from_secs(1);

impl Driver {
    pub(super) fn attach_engine(&mut self, first: bool) {
        let home = self.home.clone();
        let may_start = self.is_needed() || !first;
        let before = self.departed.clone();
        let attaching = tokio::spawn(async move { engine_link::attach(&home, may_start, before).await });
        self.engine = Engine::Attaching(AbortOnDropHandle::new(attaching));
    }

    /// Handles the result of an attempt to attach.
    pub(super) fn on_attach_result(&mut self, result: Result<Option<Attached>, LinkError>) {
        let now = Instant::now();
        match result {
            Ok(Some(Attached { link, inventory, started })) => {
                self.failure = None;
                let facts = link.facts(0);
                self.journal.record(&JournalEvent::EngineAttached {
                    version: facts.version,
                    ring: facts.ring,
                    reason: facts.reason,
                    started,
                });
                for lack in &link.lacks {
                    self.notice(confinement_lack(*lack).to_owned());
                }
                self.departed = None;
                self.planner.attach(inventory);
                self.swept = false;
                self.version_compared = false;
                self.engine = Engine::Attached(link, now);
                for at in 0..self.containers.len() {
                    if let Some(container) = self.containers.get_mut(at) {
                        container.tried = !container.has_task();
                    }
                    self.enter(at);
                }
            }
            Ok(None) => self.engine = Engine::Absent { retry_at: now },
            Err(error) => {
                self.engine = Engine::Absent { retry_at: now + self.start_pause };
                self.start_pause = (2 * self.start_pause).min(START_PAUSE.1);
                let text = error.to_string();
                if self.failure.as_ref() != Some(&text) {
                    self.journal.record(&JournalEvent::Notice { text: text.clone() });
                    self.failure = Some(text);
                }
            }
        }
    }

    pub(super) fn lose_engine(&mut self, reason: &str) {
        let now = Instant::now();
        if let Engine::Attached(link, since) = &self.engine {
            self.departed = Some(Departed::new(link.process(), self.planner.held_ports()));
            let was_stable = now.saturating_duration_since(*since) >= STABLE_AFTER;
            self.start_pause = if was_stable { START_PAUSE.0 } else { self.start_pause };
            self.journal.record(&JournalEvent::EngineLost { reason: reason.to_owned() });
            // The first attempt is made at once. An engine that ends soon after its start is started again after a
            // pause.
            let pause = if was_stable || self.start_pause == START_PAUSE.0 {
                Duration::ZERO
            } else {
                self.start_pause
            };
            self.start_pause = (2 * self.start_pause).min(START_PAUSE.1);
            self.engine = Engine::Absent { retry_at: now + pause };
        }
        let changes = self.planner.detach();
        self.report_changes(changes);
        for container in &mut self.containers {
            if let Some(task) = &container.task {
                task.entry_request.send_replace(None);
            }
            if container.state == Reachability::Reached {
                container.is_stale = true;
                container.state = Reachability::Waiting;
                container.reason = Some("the engine is being restarted".to_owned());
            }
        }
        let table = self.table();
        for answer in self.tables.drain(..) {
            let _ = answer.send(table.clone());
        }
    }

    /// Handles an event and those that have arrived after it, so that one plan follows all of them. Other tasks of this
    /// thread run in between.
    pub(super) async fn on_engine_events(&mut self, first: Result<Event, LinkError>) {
        let mut next = Some(first);
        let mut left = EVENTS_MAX;
        while let Some(event) = next {
            match event {
                Ok(event) => self.on_engine_event(&event),
                Err(error) => return self.lose_engine(&error.to_string()),
            }
            tokio::task::yield_now().await;
            left -= 1;
            next = match &self.engine {
                Engine::Attached(link, _) if left > 0 => link.try_recv(),
                _ => None,
            };
        }
    }

    pub(super) fn on_engine_event(&mut self, event: &Event) {
        match event {
            Event::Degraded { what } => self.notice(what.clone()),
            Event::Recovered { what } => self.notice(format!("recovered: {what}")),
            Event::Refused { reason } => self.notice(format!("the engine refused: {reason}")),
            Event::Stopped => return self.lose_engine("it was stopped"),
            _ => {}
        }
        let changes = self.planner.on_engine_event(event, Instant::now());
        self.report_changes(changes);
        if matches!(event, Event::State { more: false, .. }) {
            let table = self.table();
            for answer in self.tables.drain(..) {
                // The caller may have gone.
                let _ = answer.send(table.clone());
            }
        }
    }

    pub(super) fn notice(&self, text: String) {
        self.journal.record(&JournalEvent::Notice { text });
    }

    /// Sends the engine the planner's commands, and does what is due once for each engine.
    pub(super) async fn step(&mut self) {
        self.step_once().await;
        self.dial_upstreams().await;
        self.step_once().await;
        if !self.swept && self.are_all_tried() {
            self.swept = true;
            self.planner.sweep();
            self.step_once().await;
        }
        if self.swept && !self.version_compared {
            self.version_compared = true;
            self.compare_versions().await;
            self.step_once().await;
        }
    }

    /// Whether every registered container was tried, and could claim what an earlier driver left.
    pub(super) fn are_all_tried(&self) -> bool {
        let attached = matches!(self.engine, Engine::Attached(..));
        let tried = |container: &Container| container.tried || container.attach_method.is_none();
        attached && self.replayed.is_none() && self.containers.iter().all(tried)
    }

    /// Whether the engine is absent and no container needs one.
    pub(super) fn is_idle(&self) -> bool {
        matches!(self.engine, Engine::Absent { .. }) && self.replayed.is_none() && !self.is_needed()
    }

    pub(super) async fn compare_versions(&mut self) {
        let Engine::Attached(link, _) = &self.engine else { return };
        let (theirs, ours) = (link.version().to_owned(), version::current());
        if version::fits(&theirs, &ours) {
            return;
        }
        if !self.is_needed() {
            self.drain_engine().await;
            return;
        }
        match self.upgrade().await {
            Ok(()) => self.journal.record(&JournalEvent::EngineUpgraded { from: theirs, to: ours }),
            Err(reason) => self.notice(format!("the engine of version {theirs} was not replaced: {reason}")),
        }
    }

    pub(super) async fn step_once(&mut self) {
        if !matches!(self.engine, Engine::Attached(..)) {
            return;
        }
        let (commands, changes) = self.planner.step(Instant::now());
        self.report_changes(changes);
        for command in &commands {
            if !self.send_command(command, &[]).await {
                return;
            }
        }
    }

    /// Sends a command to the engine. Returns false if that failed, which loses the engine.
    pub(super) async fn send_command(&mut self, command: &Command, descriptors: &[OwnedFd]) -> bool {
        let Engine::Attached(link, _) = &self.engine else { return false };
        match link.send_command(command, descriptors).await {
            Ok(()) => true,
            Err(error) => {
                self.lose_engine(&error.to_string());
                false
            }
        }
    }

    /// Stops the engine: first it drains its connections for a bounded time, then it resets them.
    pub(super) async fn stop(&mut self) {
        self.removed.extend(std::mem::take(&mut self.containers).into_iter().map(Container::into_view));
        self.planner.stop();
        let begin = tokio::time::Instant::now();
        let process = match &self.engine {
            Engine::Attached(link, _) => link.process(),
            Engine::Absent { .. } | Engine::Attaching(_) => None,
        };
        for (command, until) in
            [(Command::Drain, begin + DRAIN_MAX), (Command::Stop, begin + DRAIN_MAX + STOP_MAX)]
        {
            if command == Command::Stop {
                self.stop_drained.send_replace(true);
            }
            if !self.send_command(&command, &[]).await {
                break;
            }
            if let Engine::Attached(link, _) = &self.engine {
                link.remove_name(&self.home);
            }
            while let Engine::Attached(link, _) = &self.engine {
                match timeout_at(until, link.recv()).await {
                    Ok(Ok((Event::Stopped, _)) | Err(_)) => {
                        self.engine = Engine::Absent { retry_at: Instant::now() };
                    }
                    Ok(Ok((event, _))) => {
                        let changes = self.planner.on_engine_event(&event, Instant::now());
                        self.report_changes(changes);
                    }
                    Err(_) => break,
                }
            }
            if !matches!(self.engine, Engine::Attached(..)) {
                break;
            }
        }
        self.stop_drained.send_replace(true);
        Departed::new(process, BTreeSet::new()).ended().await;
    }
}

/// The notice about a missing layer of confinement of root's engine.
fn confinement_lack(lack: Lack) -> &'static str {
    match lack {
        Lack::User => {
            "the engine runs as uid 0 without capabilities: this user namespace has no other uid for it"
        }
        Lack::Landlock => {
            "the engine runs without Landlock, which this kernel does not have or has switched off"
        }
        Lack::Seccomp => {
            "the engine runs without a seccomp filter, which this kernel or architecture does not have"
        }
    }
}
