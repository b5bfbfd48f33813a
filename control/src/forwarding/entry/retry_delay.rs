//! The pauses before a container that was not located or entered is tried again. Pure.
//!
//! Docker reports when a container starts, so one that Docker calls stopped needs no attempt until then, while Docker's
//! events are followed. Other obstacles may end without an event, so such a container is tried again after growing
//! pauses. While no events are followed, every container is tried at the same short pause.

use std::time::Duration;

/// The pause while no events are followed, and the first of the growing pauses.
pub(super) const RETRY: Duration = Duration::from_secs(2);
/// The longest pause.
const RETRY_MAX: Duration = Duration::from_secs(30);

/// The kind of failure to locate a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LocateFailure {
    /// Docker says that it does not run.
    Stopped,
    /// Docker knows it, but it cannot be located for another reason.
    Unavailable,
    /// It was not found, and no Docker events are about it.
    NotDocker,
}

/// The next pause of one container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RetryDelay {
    next: Duration,
}

impl RetryDelay {
    /// The state after something has changed.
    pub(super) fn new() -> RetryDelay {
        RetryDelay { next: RETRY }
    }

    /// The pause after this failure; `None` if only a hint starts another attempt. `followed` is whether Docker's
    /// events are followed.
    pub(super) fn pause(self, failure: LocateFailure, followed: bool) -> Option<Duration> {
        match failure {
            LocateFailure::Stopped if followed => None,
            LocateFailure::Unavailable if followed => Some(self.next),
            LocateFailure::Stopped | LocateFailure::Unavailable | LocateFailure::NotDocker => Some(RETRY),
        }
    }

    /// The state after a pause has passed.
    pub(super) fn increased(self) -> RetryDelay {
        RetryDelay { next: (2 * self.next).min(RETRY_MAX) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stopped_container_waits_for_an_event() {
        let rest = RetryDelay::new().increased();
        assert_eq!(rest.pause(LocateFailure::Stopped, true), None);
        assert_eq!(rest.pause(LocateFailure::NotDocker, true), Some(RETRY));
    }

    #[test]
    fn unavailable_container_is_tried_at_growing_pauses() {
        let mut rest = RetryDelay::new();
        let pauses = [2, 4, 8, 16, 30, 30].map(|_| {
            let pause = rest.pause(LocateFailure::Unavailable, true);
            rest = rest.increased();
            pause.map(|pause| pause.as_secs())
        });
        assert_eq!(pauses, [2, 4, 8, 16, 30, 30].map(Some));
    }

    #[test]
    fn every_container_is_tried_at_the_short_pause_without_events() {
        let rest = RetryDelay::new().increased().increased();
        for failure in [LocateFailure::Stopped, LocateFailure::Unavailable, LocateFailure::NotDocker] {
            assert_eq!(rest.pause(failure, false), Some(RETRY), "{failure:?}");
        }
    }
}
