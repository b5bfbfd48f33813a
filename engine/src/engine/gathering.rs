//! Questions to all shards, and the answers that have arrived so far. Pure.
//!
//! The wait for an isolated shard has a time limit. After it, the caller supplies a replacement for the shard's part, and
//! the shard's own answer is discarded when it arrives.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::Instant;

/// The open questions, the oldest first.
pub(super) struct Gatherings<T> {
    questions: VecDeque<Gathering<T>>,
    /// The number of answers to discard for each shard that exceeded the time limit.
    late: HashMap<usize, u32>,
}

struct Gathering<T> {
    /// The shards that have not answered.
    missing: HashSet<usize>,
    /// Those of them with a time limit.
    limited: HashSet<usize>,
    until: Instant,
    parts: Vec<T>,
}

// Not derived: the derived implementation would require T: Default.
impl<T> Default for Gatherings<T> {
    fn default() -> Gatherings<T> {
        Gatherings { questions: VecDeque::new(), late: HashMap::new() }
    }
}

impl<T> Gatherings<T> {
    /// Records a question to the shards `missing` and `limited`. The wait for the `limited` ones ends at `until`.
    pub(super) fn start(&mut self, mut missing: HashSet<usize>, limited: HashSet<usize>, until: Instant) {
        missing.extend(&limited);
        self.questions.push_back(Gathering { missing, limited, until, parts: Vec::new() });
    }

    /// Records the answer of one shard, and returns the oldest answer if that completes it. A shard answers in order, but
    /// may be one question ahead of another shard.
    pub(super) fn answer(&mut self, shard: usize, parts: Vec<T>) -> Option<Vec<T>> {
        if let Some(late) = self.late.get_mut(&shard) {
            *late -= 1;
            if *late == 0 {
                self.late.remove(&shard);
            }
            return None;
        }
        let gathering = self.questions.iter_mut().find(|one| one.missing.contains(&shard))?;
        gathering.missing.remove(&shard);
        gathering.limited.remove(&shard);
        gathering.parts.extend(parts);
        self.next()
    }

    /// Removes a shard that has ended from all questions; [`Gatherings::next`] returns those that this completes.
    pub(super) fn remove_shard(&mut self, shard: usize) {
        self.late.remove(&shard);
        for gathering in &mut self.questions {
            gathering.missing.remove(&shard);
            gathering.limited.remove(&shard);
        }
    }

    /// Returns when the next time limit ends.
    pub(super) fn due(&self) -> Option<Instant> {
        self.questions.iter().filter(|one| !one.limited.is_empty()).map(|one| one.until).min()
    }

    /// Calls `replacement` for each shard that exceeded its time limit; [`Gatherings::next`] returns the questions that this
    /// completes.
    pub(super) fn on_deadline(&mut self, now: Instant, mut replacement: impl FnMut(usize) -> Vec<T>) {
        for gathering in self.questions.iter_mut().filter(|one| one.until <= now) {
            for shard in gathering.limited.drain() {
                gathering.missing.remove(&shard);
                gathering.parts.extend(replacement(shard));
                *self.late.entry(shard).or_default() += 1;
            }
        }
    }

    pub(super) fn next(&mut self) -> Option<Vec<T>> {
        self.questions.pop_front_if(|oldest| oldest.missing.is_empty()).map(|whole| whole.parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_complete_and_in_the_order_of_the_questions() {
        let mut questions = Gatherings::default();
        questions.start(HashSet::from([0, 1]), HashSet::new(), Instant::now());
        questions.start(HashSet::from([0, 1]), HashSet::new(), Instant::now());
        assert_eq!(questions.answer(0, vec!["a"]), None);
        assert_eq!(questions.answer(0, vec!["c"]), None);
        assert_eq!(questions.answer(1, vec!["b"]), Some(vec!["a", "b"]));
        assert_eq!(questions.answer(1, Vec::new()), Some(vec!["c"]));
        assert_eq!(questions.answer(1, vec!["unasked"]), None);
    }

    #[test]
    fn an_ended_shard_does_not_delay_answers() {
        let mut questions = Gatherings::default();
        questions.start(HashSet::from([0, 1]), HashSet::new(), Instant::now());
        questions.start(HashSet::from([0, 1]), HashSet::new(), Instant::now());
        assert_eq!(questions.answer(0, vec!["a"]), None);
        questions.remove_shard(1);
        assert_eq!(questions.next(), Some(vec!["a"]));
        assert_eq!(questions.next(), None);
        assert_eq!(questions.answer(0, vec!["b"]), Some(vec!["b"]));
    }

    #[test]
    fn a_blocked_shard_neither_delays_nor_corrupts_answers() {
        let mut questions = Gatherings::default();
        let now = Instant::now();
        let later = now + std::time::Duration::from_millis(100);
        questions.start(HashSet::from([0]), HashSet::from([7]), later);
        assert_eq!(questions.due(), Some(later));
        assert_eq!(questions.answer(0, vec!["a"]), None);
        questions.on_deadline(now, |_| panic!("the time limit has not ended"));
        questions.on_deadline(later, |shard| {
            assert_eq!(shard, 7);
            vec!["known of 7"]
        });
        assert_eq!(questions.next(), Some(vec!["a", "known of 7"]));
        assert_eq!(questions.due(), None);
        questions.start(HashSet::from([0]), HashSet::from([7]), later);
        assert_eq!(questions.answer(7, vec!["too late"]), None);
        assert_eq!(questions.answer(7, vec!["b of 7"]), None);
        assert_eq!(questions.answer(0, vec!["b"]), Some(vec!["b of 7", "b"]));
    }
}
