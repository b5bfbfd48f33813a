//! The schedule of jobs, by the seven rules of the wire specification (A.10). Pure: the current time is an argument.
//!
//! Each job of each container has a state: the input of its last start, its due time, the input of the current run, and
//! whether to run again. A job never has two runs at a time.
//!
//! 1. A start cancels the timers of the container and drops the inputs. A job that the new folder does not define never
//!    runs.
//! 2. A job that the folder defines is stored with its input, gets a timer and is due at once.
//! 3. One run at a time: a job that is due during a run runs once more afterwards, with the newest input, however often it
//!    was due.
//! 4. A run uses the input with which it started. After a success, the container is restarted only if the stored input has
//!    the same folder.
//! 5. A run that did not succeed never restarts the container.
//! 6. A stop cancels the timers, drops the inputs, and does not wait for runs.
//! 7. A drain cancels the timers and lets the runs finish. Inputs are kept until then, so a run still restarts its
//!    container.

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

/// The input of a run.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Input {
    pub(super) registration: Arc<Registration>,
    pub(super) job: Job,
}

/// A run to start.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) key: Key,
    pub(super) input: Arc<Input>,
}

/// The actions after the end of a run, in this order.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Next {
    pub(super) restart: Option<Arc<Registration>>,
    pub(super) run: Option<Run>,
}

/// The states of all jobs.
#[derive(Debug, Default)]
pub(super) struct Machine {
    jobs: BTreeMap<Key, State>,
    draining: bool,
}

#[derive(Debug, Default)]
struct State {
    /// The input of the last start; `None` after a stop.
    input: Option<Arc<Input>>,
    /// When the timer fires.
    due: Option<Instant>,
    /// The input of the current run.
    running: Option<Arc<Input>>,
    /// The job became due during the current run.
    again: bool,
}

impl State {
    fn clear(&mut self) {
        self.input = None;
        self.due = None;
        self.again = false;
    }

    /// Starts a run with the newest input, or records that one is due after the current run.
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
    /// Starts the jobs of a container that was registered (rules 1 and 2).
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

    /// Stops the jobs of a container that is no longer registered (rule 6).
    pub(super) fn stop(&mut self, container: &ContainerName) {
        self.jobs.retain(|key, state| {
            if key.container == *container {
                state.clear();
            }
            state.input.is_some() || state.running.is_some()
        });
    }

    /// Drains all jobs, since the daemon stops (rule 7).
    pub(super) fn drain(&mut self) {
        self.draining = true;
        for state in self.jobs.values_mut() {
            state.due = None;
            state.again = false;
        }
    }

    /// Returns the time of the next due job, at which [`Machine::advance`] is to be called.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.jobs.values().filter_map(|state| state.due).min()
    }

    /// Starts the jobs that are due at `now`. After several missed intervals a job runs once.
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

    /// Records the end of a run (rules 3 to 5).
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
