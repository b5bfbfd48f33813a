//! Who is next: what was said, in its order; then one entry of each stream in turn. Pure.

use std::collections::{HashMap, VecDeque};

use crate::broker::message::StreamId;

/// What a text costs beside its bytes, so that empty ones are bounded as well.
const TEXT_COST: usize = 64;

/// Everything that waits.
#[derive(Debug)]
pub(super) struct Schedule<E> {
    said: VecDeque<String>,
    said_bytes: usize,
    /// None of them is empty.
    lanes: HashMap<StreamId, VecDeque<E>>,
    /// Each lane once, the next one first. One that was discarded may still be named.
    turns: VecDeque<StreamId>,
}

impl<E> Default for Schedule<E> {
    fn default() -> Schedule<E> {
        Schedule { said: VecDeque::new(), said_bytes: 0, lanes: HashMap::new(), turns: VecDeque::new() }
    }
}

impl<E> Schedule<E> {
    pub(super) fn say(&mut self, text: String) {
        self.said_bytes += text.len() + TEXT_COST;
        self.said.push_back(text);
    }

    /// What the texts that wait cost, in bytes.
    pub(super) fn said_bytes(&self) -> usize {
        self.said_bytes
    }

    pub(super) fn take_said(&mut self) -> Option<String> {
        let text = self.said.pop_front()?;
        self.said_bytes -= text.len() + TEXT_COST;
        Some(text)
    }

    pub(super) fn push(&mut self, stream: StreamId, entry: E) {
        let lane = self.lanes.entry(stream).or_default();
        lane.push_back(entry);
        if lane.len() == 1 {
            self.turns.push_back(stream);
        }
    }

    /// The next entry of the stream whose turn it is.
    pub(super) fn take(&mut self) -> Option<(StreamId, E)> {
        loop {
            let stream = self.turns.pop_front()?;
            let Some(lane) = self.lanes.get_mut(&stream) else { continue };
            let entry = lane.pop_front();
            if lane.is_empty() {
                self.lanes.remove(&stream);
            } else {
                self.turns.push_back(stream);
            }
            if let Some(entry) = entry {
                return Some((stream, entry));
            }
        }
    }

    /// Takes a stream out with all that it has.
    pub(super) fn discard(&mut self, stream: StreamId) -> VecDeque<E> {
        let lane = self.lanes.remove(&stream).unwrap_or_default();
        if !lane.is_empty() {
            self.turns.retain(|turn| *turn != stream);
        }
        lane
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn streams_take_turns_and_each_keeps_its_order() {
        let mut schedule = Schedule::default();
        for (stream, entry) in [(1, 'a'), (1, 'b'), (1, 'c'), (2, 'x'), (3, 'p'), (3, 'q')] {
            schedule.push(StreamId(stream), entry);
        }
        let mut order = String::new();
        while let Some((_, entry)) = schedule.take() {
            order.push(entry);
        }
        assert_eq!(order, "axpbqc");
    }

    #[test]
    fn a_stream_that_was_discarded_has_one_turn_when_it_is_back() {
        let mut schedule = Schedule::default();
        schedule.push(StreamId(1), 'a');
        schedule.push(StreamId(2), 'x');
        assert_eq!(schedule.discard(StreamId(1)), ['a']);
        assert!(schedule.discard(StreamId(1)).is_empty());
        schedule.push(StreamId(1), 'b');
        schedule.push(StreamId(1), 'c');
        schedule.push(StreamId(2), 'y');
        let order: String = std::iter::from_fn(|| schedule.take()).map(|(_, entry)| entry).collect();
        assert_eq!(order, "xbyc");
    }

    proptest! {
        #[test]
        fn nothing_is_lost_and_a_turn_comes_after_at_most_one_of_each(
            pushed in prop::collection::vec(0..5_i64, 0..60)
        ) {
            let mut schedule = Schedule::default();
            for (number, stream) in pushed.iter().enumerate() {
                schedule.push(StreamId(*stream), number);
            }
            let mut left: HashMap<i64, usize> = HashMap::new();
            for stream in &pushed {
                *left.entry(*stream).or_default() += 1;
            }
            let mut since: HashMap<i64, usize> = HashMap::new();
            let mut last: HashMap<i64, usize> = HashMap::new();
            while let Some((StreamId(stream), number)) = schedule.take() {
                prop_assert_eq!(pushed[number], stream);
                prop_assert!(last.insert(stream, number).is_none_or(|before| before < number));
                *left.get_mut(&stream).unwrap() -= 1;
                for (other, left) in &left {
                    let since = since.entry(*other).or_default();
                    *since = if *other == stream || *left == 0 { 0 } else { *since + 1 };
                    prop_assert!(*since < 5);
                }
            }
            prop_assert!(left.values().all(|left| *left == 0));
        }
    }
}
