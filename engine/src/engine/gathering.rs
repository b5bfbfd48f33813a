//! Questions that every shard answers for its part, and what has been gathered of the answers.
//!
//! A shard that may be held up by what it serves is waited for no longer than until a time; what stands in for its part is
//! said by whoever asks, and its answer, when it comes, is thrown away.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::Instant;

/// Questions to all shards whose answers are being gathered, the oldest first.
pub(super) struct Gatherings<T> {
    questions: VecDeque<Gathering<T>>,
    /// How many answers of a shard will come too late.
    late: HashMap<usize, u32>,
}

struct Gathering<T> {
    /// The shards whose part is still to come.
    missing: HashSet<usize>,
    /// Those of them that are not waited for any longer than until then.
    hasty: HashSet<usize>,
    until: Instant,
    parts: Vec<T>,
}

// Not derived, which would ask the same of T.
impl<T> Default for Gatherings<T> {
    fn default() -> Gatherings<T> {
        Gatherings { questions: VecDeque::new(), late: HashMap::new() }
    }
}

impl<T> Gatherings<T> {
    /// Notes a question to these shards, of which the `hasty` ones are waited for `until` then.
    pub(super) fn begin(&mut self, mut missing: HashSet<usize>, hasty: HashSet<usize>, until: Instant) {
        missing.extend(&hasty);
        self.questions.push_back(Gathering { missing, hasty, until, parts: Vec::new() });
    }

    /// Takes what one shard answered, and gives out the oldest answer if that completes it. A shard answers in order, but
    /// may be ahead of another one by a question.
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
        gathering.hasty.remove(&shard);
        gathering.parts.extend(parts);
        self.next()
    }

    /// A shard answers no more. Its questions are complete without it; [`Gatherings::next`] gives them out.
    pub(super) fn forgo(&mut self, shard: usize) {
        self.late.remove(&shard);
        for gathering in &mut self.questions {
            gathering.missing.remove(&shard);
            gathering.hasty.remove(&shard);
        }
    }

    /// When a shard is not waited for any longer.
    pub(super) fn due(&self) -> Option<Instant> {
        self.questions.iter().filter(|one| !one.hasty.is_empty()).map(|one| one.until).min()
    }

    /// Has `instead` stand in for the shards that are not waited for any longer; [`Gatherings::next`] gives out what is whole.
    pub(super) fn on_time(&mut self, now: Instant, mut instead: impl FnMut(usize) -> Vec<T>) {
        for gathering in self.questions.iter_mut().filter(|one| one.until <= now) {
            for shard in gathering.hasty.drain() {
                gathering.missing.remove(&shard);
                gathering.parts.extend(instead(shard));
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
    fn answers_are_given_out_whole_and_in_the_order_of_the_questions() {
        let mut questions = Gatherings::default();
        questions.begin(HashSet::from([0, 1]), HashSet::new(), Instant::now());
        questions.begin(HashSet::from([0, 1]), HashSet::new(), Instant::now());
        assert_eq!(questions.answer(0, vec!["a"]), None);
        assert_eq!(questions.answer(0, vec!["c"]), None);
        assert_eq!(questions.answer(1, vec!["b"]), Some(vec!["a", "b"]));
        assert_eq!(questions.answer(1, Vec::new()), Some(vec!["c"]));
        assert_eq!(questions.answer(1, vec!["unasked"]), None);
    }

    #[test]
    fn a_shard_that_has_ended_keeps_no_answer_back() {
        let mut questions = Gatherings::default();
        questions.begin(HashSet::from([0, 1]), HashSet::new(), Instant::now());
        questions.begin(HashSet::from([0, 1]), HashSet::new(), Instant::now());
        assert_eq!(questions.answer(0, vec!["a"]), None);
        questions.forgo(1);
        assert_eq!(questions.next(), Some(vec!["a"]));
        assert_eq!(questions.next(), None);
        assert_eq!(questions.answer(0, vec!["b"]), Some(vec!["b"]));
    }

    #[test]
    fn a_shard_that_is_held_up_holds_up_no_answer_and_spoils_none() {
        let mut questions = Gatherings::default();
        let now = Instant::now();
        let later = now + std::time::Duration::from_millis(100);
        questions.begin(HashSet::from([0]), HashSet::from([7]), later);
        assert_eq!(questions.due(), Some(later));
        assert_eq!(questions.answer(0, vec!["a"]), None);
        questions.on_time(now, |_| panic!("it has time"));
        questions.on_time(later, |shard| {
            assert_eq!(shard, 7);
            vec!["known of 7"]
        });
        assert_eq!(questions.next(), Some(vec!["a", "known of 7"]));
        assert_eq!(questions.due(), None);
        questions.begin(HashSet::from([0]), HashSet::from([7]), later);
        assert_eq!(questions.answer(7, vec!["too late"]), None);
        assert_eq!(questions.answer(7, vec!["b of 7"]), None);
        assert_eq!(questions.answer(0, vec!["b"]), Some(vec!["b of 7", "b"]));
    }
}
