//! The engine: had, lost, heard, given its commands, and ended.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use landfall_engine::command::{Command, Event};
use landfall_engine::process::confinement::Lack;
use tokio::time::timeout_at;
use tokio_util::task::AbortOnDropHandle;

use super::containers::Container;
use crate::forwarding::departed::Departed;
use crate::forwarding::driver::event_loop::{Driver, Engine, REST};
use crate::forwarding::engine_link::{self, Attached, LinkError};
use crate::model::event::Event as JournalEvent;
use crate::model::forward_table::Reachability;
use crate::version;

/// An engine that has lived this long is started again at once when it is gone.
const LIVED: Duration = Duration::from_secs(10);
/// The most events of the engine that are taken in before the next plan.
const EVENTS_MAX: usize = 64;
/// How long connections may take to finish when the engine is stopped.
const DRAIN_MAX: Duration = Duration::from_secs(3);
/// How long the engine may then take to end.
const STOP_MAX: Duration = Duration::from_secs(1);

impl Driver {
    pub(super) fn look_for_engine(&mut self, first: bool) {
        let home = self.home.clone();
        let may_start = self.is_needed() || !first;
        let before = self.departed.clone();
        let coming = tokio::spawn(async move { engine_link::obtain(&home, may_start, before).await });
        self.engine = Engine::Coming(AbortOnDropHandle::new(coming));
    }

    /// An engine is here, or there is none.
    pub(super) fn welcome(&mut self, came: Result<Option<Attached>, LinkError>) {
        let now = Instant::now();
        match came {
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
                self.settled = false;
                self.compared = false;
                self.engine = Engine::Attached(link, now);
                for at in 0..self.containers.len() {
                    if let Some(container) = self.containers.get_mut(at) {
                        container.tried = !container.has_task();
                    }
                    self.enter(at);
                }
            }
            Ok(None) => self.engine = Engine::Absent { again: now },
            Err(error) => {
                self.engine = Engine::Absent { again: now + self.rest };
                self.rest = (2 * self.rest).min(REST.1);
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
            let lived = now.saturating_duration_since(*since) >= LIVED;
            self.rest = if lived { REST.0 } else { self.rest };
            self.journal.record(&JournalEvent::EngineLost { reason: reason.to_owned() });
            // The first attempt is at once; one that dies young is given time.
            let pause = if lived || self.rest == REST.0 { Duration::ZERO } else { self.rest };
            self.rest = (2 * self.rest).min(REST.1);
            self.engine = Engine::Absent { again: now + pause };
        }
        let changes = self.planner.detach();
        self.tell_all(changes);
        for container in &mut self.containers {
            if let Some(task) = &container.task {
                task.entry_request.send_replace(None);
            }
            if container.state == Reachability::Reached {
                container.is_stale = true;
                container.state = Reachability::Waiting;
                container.reason = Some("the engine is being started again".to_owned());
            }
        }
        let table = self.table();
        for answer in self.tables.drain(..) {
            let _ = answer.send(table.clone());
        }
    }

    /// Takes in an event, and those that have arrived behind it: there is one plan for all of them, and everything else on
    /// this thread runs in between.
    pub(super) async fn hear_engine_until_silent(&mut self, first: Result<Event, LinkError>) {
        let mut next = Some(first);
        let mut left = EVENTS_MAX;
        while let Some(event) = next {
            match event {
                Ok(event) => self.hear_engine(&event),
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

    pub(super) fn hear_engine(&mut self, event: &Event) {
        match event {
            Event::Degraded { what } => self.notice(what.clone()),
            Event::Recovered { what } => self.notice(format!("recovered: {what}")),
            Event::Refused { reason } => self.notice(format!("the engine refused: {reason}")),
            Event::Stopped => return self.lose_engine("it was stopped"),
            _ => {}
        }
        let changes = self.planner.hear(event, Instant::now());
        self.tell_all(changes);
        if matches!(event, Event::State { more: false, .. }) {
            let table = self.table();
            for answer in self.tables.drain(..) {
                // Whoever asked may have gone.
                let _ = answer.send(table.clone());
            }
        }
    }

    pub(super) fn notice(&self, text: String) {
        self.journal.record(&JournalEvent::Notice { text });
    }

    /// Gives the engine what the planner has, and deals with what is due once for each engine.
    pub(super) async fn step(&mut self) {
        self.step_once().await;
        self.dial_all().await;
        self.step_once().await;
        if !self.settled && self.is_settled() {
            self.settled = true;
            self.planner.sweep();
            self.step_once().await;
        }
        if self.settled && !self.compared {
            self.compared = true;
            self.compare_versions().await;
            self.step_once().await;
        }
    }

    /// Whether everybody had the chance to claim what an earlier driver left.
    pub(super) fn is_settled(&self) -> bool {
        let attached = matches!(self.engine, Engine::Attached(..));
        let tried = |container: &Container| container.tried || container.attach_method.is_none();
        attached && self.replayed.is_none() && self.containers.iter().all(tried)
    }

    /// Whether there is no engine, and nobody who needs one.
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
            self.dismiss_engine().await;
            return;
        }
        match self.upgrade().await {
            Ok(()) => self.journal.record(&JournalEvent::EngineUpgraded { from: theirs, to: ours }),
            Err(reason) => self.notice(format!("the engine of version {theirs} was not relieved: {reason}")),
        }
    }

    pub(super) async fn step_once(&mut self) {
        if !matches!(self.engine, Engine::Attached(..)) {
            return;
        }
        let (commands, changes) = self.planner.step(Instant::now());
        self.tell_all(changes);
        for command in &commands {
            if !self.give(command, &[]).await {
                return;
            }
        }
    }

    /// Gives the engine a command; one that cannot be given to is lost.
    pub(super) async fn give(&mut self, command: &Command, descriptors: &[OwnedFd]) -> bool {
        let Engine::Attached(link, _) = &self.engine else { return false };
        match link.give(command, descriptors).await {
            Ok(()) => true,
            Err(error) => {
                self.lose_engine(&error.to_string());
                false
            }
        }
    }

    /// Ends the engine: connections may finish for a while, and then they end.
    pub(super) async fn stop(&mut self) {
        self.gone.extend(std::mem::take(&mut self.containers).into_iter().map(Container::into_listed));
        self.planner.stop();
        let begin = tokio::time::Instant::now();
        let process = match &self.engine {
            Engine::Attached(link, _) => link.process(),
            Engine::Absent { .. } | Engine::Coming(_) => None,
        };
        for (command, until) in
            [(Command::Drain, begin + DRAIN_MAX), (Command::Stop, begin + DRAIN_MAX + STOP_MAX)]
        {
            if command == Command::Stop {
                self.stop_drained.send_replace(true);
            }
            if !self.give(&command, &[]).await {
                break;
            }
            if let Engine::Attached(link, _) = &self.engine {
                link.remove_name(&self.home);
            }
            while let Engine::Attached(link, _) = &self.engine {
                match timeout_at(until, link.recv()).await {
                    Ok(Ok((Event::Stopped, _)) | Err(_)) => {
                        self.engine = Engine::Absent { again: Instant::now() };
                    }
                    Ok(Ok((event, _))) => {
                        let changes = self.planner.hear(&event, Instant::now());
                        self.tell_all(changes);
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

/// A layer that the confinement of root's engine lacks, in a sentence for people.
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
