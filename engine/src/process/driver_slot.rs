//! The slot of the connected driver, which decides to whom each event is sent.
//!
//! The thread that reads commands installs drivers and records their questions; the thread that forwards events looks up the
//! recipient. A question whose answer takes several events belongs to the driver that asked it: its successor would mistake
//! the rest of such an answer for the answer to its own.

use std::os::fd::AsFd;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{ProcessError, SEND_TIMEOUT};
use crate::channel::{Channel, ChannelError};
use crate::command::{Command, Event, EventMessage};

/// The slot of the connected driver.
#[derive(Default)]
pub(super) struct DriverSlot(Mutex<SlotState>);

#[derive(Default)]
struct SlotState {
    driver: Option<Arc<Channel>>,
    /// The counters of each [`Question`].
    asked: [QuestionCounters; 2],
}

/// A command whose answer is several events. They are sent only to the driver that asked.
#[derive(Clone, Copy)]
pub(super) enum Question {
    Describe,
    Lend,
}

/// The counters of one question. Each is answered once, in the order of asking.
#[derive(Default)]
struct QuestionCounters {
    asked: u64,
    answered: u64,
    /// The number of them that previous drivers asked.
    asked_before: u64,
}

impl Question {
    pub(super) fn of(command: &Command) -> Option<Question> {
        match command {
            Command::Describe | Command::Count => Some(Question::Describe),
            Command::LendListeners => Some(Question::Lend),
            _ => None,
        }
    }

    /// Returns the question that an event answers, and whether the event is the last of the answer.
    fn answered_by(event: &Event) -> Option<(Question, bool)> {
        match event {
            Event::Observed { .. } => Some((Question::Describe, false)),
            Event::State { more, .. } => Some((Question::Describe, !more)),
            Event::ListenerLent { .. } => Some((Question::Lend, false)),
            Event::ListenersLent { .. } => Some((Question::Lend, true)),
            _ => None,
        }
    }
}

impl DriverSlot {
    fn lock(&self) -> MutexGuard<'_, SlotState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn driver(&self) -> Option<Arc<Channel>> {
        self.lock().driver.clone()
    }

    /// Records a question of the current driver.
    pub(super) fn record_question(&self, question: Question) {
        self.lock().asked[question as usize].asked += 1;
    }

    /// Returns the driver to which an event is sent.
    fn recipient(&self, event: &Event) -> Option<Arc<Channel>> {
        let mut state = self.lock();
        if let Some((question, is_last)) = Question::answered_by(event) {
            let counters = &mut state.asked[question as usize];
            let is_previous_drivers = counters.answered < counters.asked_before;
            counters.answered += u64::from(is_last);
            if is_previous_drivers {
                return None;
            }
        }
        state.driver.clone()
    }

    /// Installs a driver, sends it `ready`, and disconnects the previous driver.
    ///
    /// One lock covers these steps, so the driver gets every event from then on, and no earlier one.
    pub(super) fn install(&self, driver: Channel, ready: &Event) {
        let mut state = self.lock();
        // The buffer of a new socket has room, so a failure means that the driver has closed it. The previous driver then
        // stays.
        if driver.try_send(ready, &[]).is_err() {
            return;
        }
        state.asked.iter_mut().for_each(|counters| counters.asked_before = counters.asked);
        if let Some(previous) = state.driver.replace(Arc::new(driver)) {
            previous.shutdown();
        }
    }

    /// Ends the channel of `driver`, and empties the slot if that driver still has it.
    pub(super) fn remove(&self, driver: &Arc<Channel>) {
        driver.shutdown();
        self.lock().driver.take_if(|current| Arc::ptr_eq(current, driver));
    }

    /// Forwards every event to the driver that is connected at the time, up to the last event.
    pub(super) fn forward(&self, events: &Receiver<EventMessage>) -> Result<(), ProcessError> {
        loop {
            let EventMessage { event, descriptors } = events.recv().map_err(|_| ProcessError::EngineGone)?;
            // Each driver received `ready` when it was installed; the engine's own event would be a second one.
            if matches!(event, Event::Ready { .. }) {
                continue;
            }
            if let Some(driver) = self.recipient(&event) {
                let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
                let sent = match driver.send_timeout(&event, &descriptors, SEND_TIMEOUT) {
                    Err(error @ (ChannelError::TooLong { .. } | ChannelError::Unwritable(_))) => {
                        let reason = format!("an event was lost: {error}");
                        driver.send_timeout(&Event::Refused { reason }, &[], SEND_TIMEOUT)
                    }
                    sent => sent,
                };
                if sent.is_err() {
                    self.remove(&driver);
                }
            }
            if event == Event::Stopped {
                return Ok(());
            }
        }
    }
}
