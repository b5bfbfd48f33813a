//! When a job runs, as the wire specification's seven rules have it (A.10). Pure: time comes in as an argument.
//!
//! Each job of each container is one small machine: what it was last started with (its input), when it is due, what runs,
//! and whether to run again.
//!
//! 1. A start ends the timers that the container had and forgets their inputs; a job that the new folder does not have
//!    does not happen at all.
//! 2. A job that it has is remembered, gets a timer and is due at once.
//! 3. One run at a time: being due while one runs means one more run afterwards, with the newest input, however often.
//! 4. A run works on the input that it began with. When it has succeeded, the container is restarted only if what is
//!    remembered by then lies in the same folder.
//! 5. A run that has not succeeded restarts nothing.
//! 6. A stop ends the timers, forgets the inputs, and waits for nobody.
//! 7. A drain ends the timers and lets what runs finish; inputs stay until it has, so that it still restarts its container.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use crate::model::registration::{ContainerName, Registration};
use crate::registry::folder::Job;

/// One job of one container.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) container: ContainerName,
    pub(super) job: String,
}

/// What a job works on.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Input {
    pub(super) registration: Arc<Registration>,
    pub(super) job: Job,
}

/// A run that has to begin.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) key: Key,
    pub(super) input: Arc<Input>,
}

/// What follows the end of a run, in this order.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Next {
    pub(super) restart: Option<Arc<Registration>>,
    pub(super) run: Option<Run>,
}

/// Every job.
#[derive(Debug, Default)]
pub(super) struct Machine {
    jobs: BTreeMap<Key, State>,
    draining: bool,
}

#[derive(Debug, Default)]
struct State {
    /// What the job was last started with; none when it was stopped.
    input: Option<Arc<Input>>,
    /// When the timer fires.
    due: Option<Instant>,
    /// What the run that is under way began with.
    running: Option<Arc<Input>>,
    /// It was due while it ran.
    again: bool,
}

impl State {
    fn forget(&mut self) {
        self.input = None;
        self.due = None;
        self.again = false;
    }

    /// Begins a run with the newest input, or remembers that one is wanted.
    fn tick(&mut self, key: &Key) -> Option<Run> {
        let input = self.input.as_ref()?;
        if self.running.is_some() {
            self.again = true;
            return None;
        }
        self.running = Some(Arc::clone(input));
        Some(Run { key: key.clone(), input: Arc::clone(input) })
    }
}

impl Machine {
    /// The container was registered, and its folder has these jobs (rules 1 and 2).
    pub(super) fn start(
        &mut self,
        container: &ContainerName,
        jobs: Vec<(String, Input)>,
        now: Instant,
    ) -> Vec<Run> {
        self.stop(container);
        if self.draining {
            return Vec::new();
        }
        let mut runs = Vec::new();
        for (job, input) in jobs {
            let key = Key { container: container.clone(), job };
            let state = self.jobs.entry(key.clone()).or_default();
            state.due = now.checked_add(input.job.every);
            state.input = Some(Arc::new(input));
            runs.extend(state.tick(&key));
        }
        runs
    }

    /// The container is not registered any more (rule 6).
    pub(super) fn stop(&mut self, container: &ContainerName) {
        self.jobs.retain(|key, state| {
            if key.container == *container {
                state.forget();
            }
            state.input.is_some() || state.running.is_some()
        });
    }

    /// The daemon stops (rule 7).
    pub(super) fn drain(&mut self) {
        self.draining = true;
        for state in self.jobs.values_mut() {
            state.due = None;
            state.again = false;
        }
    }

    /// When [`Machine::advance`] has something to do.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.jobs.values().filter_map(|state| state.due).min()
    }

    /// Time has passed. A machine that slept through several intervals runs a job once.
    pub(super) fn advance(&mut self, now: Instant) -> Vec<Run> {
        let mut runs = Vec::new();
        for (key, state) in &mut self.jobs {
            if state.due.is_some_and(|due| due <= now) {
                state.due = state.input.as_ref().and_then(|input| now.checked_add(input.job.every));
                runs.extend(state.tick(key));
            }
        }
        runs
    }

    /// A run has ended (rules 3 to 5).
    pub(super) fn ended(&mut self, key: &Key, succeeded: bool) -> Next {
        let Some(state) = self.jobs.get_mut(key) else { return Next::default() };
        let Some(ran) = state.running.take() else { return Next::default() };
        let mut next = Next::default();
        if let Some(newest) = &state.input {
            if succeeded && ran.job.restart && newest.registration.cwd == ran.registration.cwd {
                next.restart = Some(Arc::clone(&newest.registration));
            }
            if std::mem::take(&mut state.again) {
                next.run = state.tick(key);
            }
        } else {
            self.jobs.remove(key);
        }
        next
    }
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
