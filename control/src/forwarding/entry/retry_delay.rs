//! How long a container that is not there rests before it is looked for again. Pure.
//!
//! Docker tells when a container starts, so one that it said is stopped needs no look until then, as long as Docker's events
//! are followed. What else keeps somebody out may end without a word: that is tried again by itself, at longer and longer
//! pauses. While nobody tells anything, everything is looked at at the same short pause.

use std::time::Duration;

/// The pause while nobody tells anything, and the first of those that grow.
pub(super) const RETRY: Duration = Duration::from_secs(2);
/// The longest pause.
const RETRY_MAX: Duration = Duration::from_secs(30);

/// What a look came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LookResult {
    /// Docker says that it does not run.
    Stopped,
    /// It is Docker's, and is not to be had.
    Withheld,
    /// It is not there, and no events tell of it.
    Untold,
}

/// The pauses of one container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RetryDelay {
    next: Duration,
}

impl RetryDelay {
    /// As after something has changed.
    pub(super) fn new() -> RetryDelay {
        RetryDelay { next: RETRY }
    }

    /// The pause after this finding; none where it is looked at again only when that is asked for. `followed` is whether
    /// Docker's events are.
    pub(super) fn pause(self, finding: LookResult, followed: bool) -> Option<Duration> {
        match finding {
            LookResult::Stopped if followed => None,
            LookResult::Withheld if followed => Some(self.next),
            LookResult::Stopped | LookResult::Withheld | LookResult::Untold => Some(RETRY),
        }
    }

    /// A pause is over.
    pub(super) fn passed(self) -> RetryDelay {
        RetryDelay { next: (2 * self.next).min(RETRY_MAX) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_docker_tells_of_is_not_looked_at_by_itself() {
        let rest = RetryDelay::new().passed();
        assert_eq!(rest.pause(LookResult::Stopped, true), None);
        assert_eq!(rest.pause(LookResult::Untold, true), Some(RETRY));
    }

    #[test]
    fn what_may_end_without_a_word_is_tried_at_longer_and_longer_pauses() {
        let mut rest = RetryDelay::new();
        let pauses = [2, 4, 8, 16, 30, 30].map(|_| {
            let pause = rest.pause(LookResult::Withheld, true);
            rest = rest.passed();
            pause.map(|pause| pause.as_secs())
        });
        assert_eq!(pauses, [2, 4, 8, 16, 30, 30].map(Some));
    }

    #[test]
    fn without_events_everything_is_looked_at_all_the_time() {
        let rest = RetryDelay::new().passed().passed();
        for finding in [LookResult::Stopped, LookResult::Withheld, LookResult::Untold] {
            assert_eq!(rest.pause(finding, false), Some(RETRY), "{finding:?}");
        }
    }
}
