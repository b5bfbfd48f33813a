//! Questions that every shard answers for its part, and what has been gathered of the answers.

use std::collections::{HashSet, VecDeque};

/// Questions to all shards whose answers are being gathered, the oldest first.
pub(super) struct Gatherings<T>(VecDeque<Gathering<T>>);

struct Gathering<T> {
    /// The shards whose part is still to come.
    missing: HashSet<usize>,
    parts: Vec<T>,
}

// Not derived, which would ask the same of T.
impl<T> Default for Gatherings<T> {
    fn default() -> Gatherings<T> {
        Gatherings(VecDeque::new())
    }
}

impl<T> Gatherings<T> {
    /// Notes a question to these shards.
    pub(super) fn begin(&mut self, missing: HashSet<usize>) {
        self.0.push_back(Gathering { missing, parts: Vec::new() });
    }

    /// Takes what one shard answered, and gives out the oldest answer if that completes it. A shard answers in order, but
    /// may be ahead of another one by a question.
    pub(super) fn answer(&mut self, shard: usize, parts: Vec<T>) -> Option<Vec<T>> {
        let gathering = self.0.iter_mut().find(|one| one.missing.contains(&shard))?;
        gathering.missing.remove(&shard);
        gathering.parts.extend(parts);
        self.next()
    }

    /// A shard answers no more. Its questions are complete without it; [`Gatherings::next`] gives them out.
    pub(super) fn forgo(&mut self, shard: usize) {
        for gathering in &mut self.0 {
            gathering.missing.remove(&shard);
        }
    }

    pub(super) fn next(&mut self) -> Option<Vec<T>> {
        self.0.pop_front_if(|oldest| oldest.missing.is_empty()).map(|whole| whole.parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_given_out_whole_and_in_the_order_of_the_questions() {
        let mut questions = Gatherings::default();
        questions.begin(HashSet::from([0, 1]));
        questions.begin(HashSet::from([0, 1]));
        assert_eq!(questions.answer(0, vec!["a"]), None);
        assert_eq!(questions.answer(0, vec!["c"]), None);
        assert_eq!(questions.answer(1, vec!["b"]), Some(vec!["a", "b"]));
        assert_eq!(questions.answer(1, Vec::new()), Some(vec!["c"]));
        assert_eq!(questions.answer(1, vec!["unasked"]), None);
    }

    #[test]
    fn a_shard_that_has_ended_keeps_no_answer_back() {
        let mut questions = Gatherings::default();
        questions.begin(HashSet::from([0, 1]));
        questions.begin(HashSet::from([0, 1]));
        assert_eq!(questions.answer(0, vec!["a"]), None);
        questions.forgo(1);
        assert_eq!(questions.next(), Some(vec!["a"]));
        assert_eq!(questions.next(), None);
        assert_eq!(questions.answer(0, vec!["b"]), Some(vec!["b"]));
    }
}
