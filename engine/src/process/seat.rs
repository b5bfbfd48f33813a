//! The place of the driver, and what is told to whom sits there.
//!
//! The thread that reads commands seats drivers and notes what they ask; the one that forwards events asks who is to hear
//! each. A question whose answer takes several events belongs to the driver that asked it: its successor would take the
//! rest of such an answer for the whole of its own.

use std::os::fd::AsFd;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{ProcessError, SEND_TIMEOUT};
use crate::channel::{Channel, ChannelError};
use crate::command::{Command, Event, EventMessage};

/// The place of the driver.
#[derive(Default)]
pub(super) struct Seat(Mutex<Seated>);

#[derive(Default)]
struct Seated {
    driver: Option<Arc<Channel>>,
    /// One for each [`Question`].
    asked: [Asked; 2],
}

/// A command whose answer is many events. Half of one is worth nothing to a driver that did not ask, so it is told none.
#[derive(Clone, Copy)]
pub(super) enum Question {
    Describe,
    Lend,
}

/// How often a question was asked. Each is answered once, in the order of the asking.
#[derive(Default)]
struct Asked {
    asked: u64,
    answered: u64,
    /// As many of them were asked by drivers before.
    by_others: u64,
}

impl Question {
    pub(super) fn of(command: &Command) -> Option<Question> {
        match command {
            Command::Describe | Command::Count => Some(Question::Describe),
            Command::LendListeners => Some(Question::Lend),
            _ => None,
        }
    }

    /// The question that an event answers, and whether nothing of the answer follows.
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

impl Seat {
    fn lock(&self) -> MutexGuard<'_, Seated> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn driver(&self) -> Option<Arc<Channel>> {
        self.lock().driver.clone()
    }

    /// Notes that the driver of the moment asks something.
    pub(super) fn asks(&self, question: Question) {
        self.lock().asked[question as usize].asked += 1;
    }

    /// The driver that an event is for.
    fn hearer(&self, event: &Event) -> Option<Arc<Channel>> {
        let mut seated = self.lock();
        if let Some((question, is_last)) = Question::answered_by(event) {
            let one = &mut seated.asked[question as usize];
            let is_theirs = one.answered < one.by_others;
            one.answered += u64::from(is_last);
            if is_theirs {
                return None;
            }
        }
        seated.driver.clone()
    }

    /// Seats a driver, tells it that the engine is ready, and shows the one before it out.
    ///
    /// Both under one lock: the driver gets every event from then on, and none before.
    pub(super) fn take(&self, driver: Channel, ready: &Event) {
        let mut seated = self.lock();
        // The buffer of a new socket has room. If this fails, it hung up, and the one before it keeps its seat.
        if driver.try_send(ready, &[]).is_err() {
            return;
        }
        seated.asked.iter_mut().for_each(|one| one.by_others = one.asked);
        if let Some(before) = seated.driver.replace(Arc::new(driver)) {
            before.shutdown();
        }
    }

    /// Ends the channel of `driver`, and frees the seat if it is still its own.
    pub(super) fn vacate(&self, driver: &Arc<Channel>) {
        driver.shutdown();
        self.lock().driver.take_if(|seated| Arc::ptr_eq(seated, driver));
    }

    /// Hands every event to the driver of its moment, up to the last one.
    pub(super) fn forward(&self, events: &Receiver<EventMessage>) -> Result<(), ProcessError> {
        loop {
            let EventMessage { event, descriptors } = events.recv().map_err(|_| ProcessError::EngineGone)?;
            // Every driver was told when it was seated; the engine's own word for it would be a second one.
            if matches!(event, Event::Ready { .. }) {
                continue;
            }
            if let Some(driver) = self.hearer(&event) {
                let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
                let sent = match driver.send_timeout(&event, &descriptors, SEND_TIMEOUT) {
                    Err(error @ (ChannelError::TooLong { .. } | ChannelError::Unwritable(_))) => {
                        let reason = format!("an event was lost: {error}");
                        driver.send_timeout(&Event::Refused { reason }, &[], SEND_TIMEOUT)
                    }
                    sent => sent,
                };
                if sent.is_err() {
                    self.vacate(&driver);
                }
            }
            if event == Event::Stopped {
                return Ok(());
            }
        }
    }
}
