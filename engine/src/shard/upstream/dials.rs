//! The dials that a driver performs: requests that are not sent yet, and requests that wait for an answer. Pure.
//!
//! Requests are sent in order, as the channel has room; answers have any order. A dial whose client is gone is not sent any
//! more, or its answer is dropped.

use std::collections::{HashMap, VecDeque};
use std::num::NonZeroU16;

use crate::table::SlotId;

/// The dials of one shard over one channel.
#[derive(Debug, Default)]
pub(in crate::shard) struct Dials {
    /// The number of the next dial.
    next: u64,
    /// The requests to be sent, the oldest first.
    unsent: VecDeque<(u64, NonZeroU16)>,
    /// The connection that waits for each dial.
    awaited: HashMap<u64, SlotId>,
}

impl Dials {
    /// Adds a dial for a connection and returns its number.
    pub(in crate::shard) fn start(&mut self, connection: SlotId, port: NonZeroU16) -> u64 {
        let dial = self.next;
        self.next += 1;
        self.unsent.push_back((dial, port));
        self.awaited.insert(dial, connection);
        dial
    }

    /// Returns the next request to send.
    pub(super) fn next_unsent(&mut self) -> Option<(u64, NonZeroU16)> {
        while let Some(unsent) = self.unsent.pop_front() {
            if self.awaited.contains_key(&unsent.0) {
                return Some(unsent);
            }
        }
        None
    }

    /// Puts a request back that could not be sent.
    pub(super) fn put_back(&mut self, dial: u64, port: NonZeroU16) {
        self.unsent.push_front((dial, port));
    }

    /// Ends a dial, because it was answered or its client is gone; returns the connection that waited.
    pub(in crate::shard) fn end(&mut self, dial: u64) -> Option<SlotId> {
        self.awaited.remove(&dial)
    }

    /// Ends all dials; returns the connections that waited.
    pub(super) fn end_all(&mut self) -> Vec<SlotId> {
        self.unsent.clear();
        self.awaited.drain().map(|(_, connection)| connection).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::Table;

    const PORT: NonZeroU16 = NonZeroU16::new(3000).unwrap();

    #[test]
    fn a_dial_whose_client_is_gone_is_not_sent() {
        let mut table = Table::new();
        let (one, other) = (table.insert(()), table.insert(()));
        let mut dials = Dials::default();
        let (first, second) = (dials.start(one, PORT), dials.start(other, PORT));
        assert_ne!(first, second);
        assert_eq!(dials.end(first), Some(one));
        assert_eq!(dials.next_unsent(), Some((second, PORT)));
        dials.put_back(second, PORT);
        assert_eq!(dials.next_unsent(), Some((second, PORT)));
        assert_eq!(dials.next_unsent(), None);
        assert_eq!(dials.end(first), None, "a late answer has no connection");
        assert_eq!(dials.end_all(), [other]);
    }
}
