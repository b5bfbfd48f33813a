//! The order of queued messages: control messages first, in order of arrival; then one entry of each stream, round
//! robin. Pure.

use std::collections::{HashMap, VecDeque};

use crate::broker::message::StreamId;

/// The cost of a text in addition to its bytes, so that empty texts are bounded, too.
const TEXT_COST: usize = 64;

/// All queued messages.
#[derive(Debug)]
pub(super) struct Schedule<E> {
    control: VecDeque<String>,
    control_bytes: usize,
    /// No queue in it is empty.
    queues: HashMap<StreamId, VecDeque<E>>,
    /// Each stream with a queue once, in round-robin order.
    round_robin: VecDeque<StreamId>,
}

impl<E> Default for Schedule<E> {
    fn default() -> Schedule<E> {
        Schedule {
            control: VecDeque::new(),
            control_bytes: 0,
            queues: HashMap::new(),
            round_robin: VecDeque::new(),
        }
    }
}

impl<E> Schedule<E> {
    pub(super) fn send_control(&mut self, text: String) {
        self.control_bytes += text.len() + TEXT_COST;
        self.control.push_back(text);
    }

    /// Returns the cost of the queued control messages, in bytes.
    pub(super) fn control_bytes(&self) -> usize {
        self.control_bytes
    }

    pub(super) fn take_control(&mut self) -> Option<String> {
        let text = self.control.pop_front()?;
        self.control_bytes -= text.len() + TEXT_COST;
        Some(text)
    }

    pub(super) fn push(&mut self, stream: StreamId, entry: E) {
        let stream_queue = self.queues.entry(stream).or_default();
        stream_queue.push_back(entry);
        if stream_queue.len() == 1 {
            self.round_robin.push_back(stream);
        }
    }

    /// Returns the next entry in round-robin order.
    pub(super) fn take(&mut self) -> Option<(StreamId, E)> {
        loop {
            let stream = self.round_robin.pop_front()?;
            let Some(stream_queue) = self.queues.get_mut(&stream) else { continue };
            let entry = stream_queue.pop_front();
            if stream_queue.is_empty() {
                self.queues.remove(&stream);
            } else {
                self.round_robin.push_back(stream);
            }
            if let Some(entry) = entry {
                return Some((stream, entry));
            }
        }
    }

    /// Removes a stream with all its entries, and returns them.
    pub(super) fn discard(&mut self, stream: StreamId) -> VecDeque<E> {
        let stream_queue = self.queues.remove(&stream).unwrap_or_default();
        if !stream_queue.is_empty() {
            self.round_robin.retain(|turn| *turn != stream);
        }
        stream_queue
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn streams_are_served_round_robin_and_keep_their_order() {
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
    fn a_discarded_stream_is_scheduled_once_when_it_queues_again() {
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
        fn no_entry_is_lost_and_each_stream_waits_for_at_most_one_entry_of_each_other(
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
