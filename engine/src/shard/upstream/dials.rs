//! The connects that a driver is asked for: requests that are not sent yet, and requests that wait for an answer. Pure.
//!
//! Requests are sent one after the other, as the channel has room; answers come in any order. A dial whose client is gone is
//! not sent any more, and its answer is dropped.

use std::collections::{HashMap, VecDeque};
use std::num::NonZeroU16;

use crate::table::SlotId;

/// The dials of one shard over one channel.
#[derive(Debug, Default)]
pub(in crate::shard) struct Dials {
    /// The number of the next one.
    next: u64,
    /// To be sent, the oldest first.
    unsent: VecDeque<(u64, NonZeroU16)>,
    /// The connection that waits for each.
    awaited: HashMap<u64, SlotId>,
}

impl Dials {
    /// Adds a dial for a connection and returns its number.
    pub(in crate::shard) fn begin(&mut self, connection: SlotId, port: NonZeroU16) -> u64 {
        let dial = self.next;
        self.next += 1;
        self.unsent.push_back((dial, port));
        self.awaited.insert(dial, connection);
        dial
    }

    /// Takes the next one to send.
    pub(super) fn next_to_ask(&mut self) -> Option<(u64, NonZeroU16)> {
        while let Some(unsent) = self.unsent.pop_front() {
            if self.awaited.contains_key(&unsent.0) {
                return Some(unsent);
            }
        }
        None
    }

    /// Puts one back that could not be sent.
    pub(super) fn ask_again(&mut self, dial: u64, port: NonZeroU16) {
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
        let (first, second) = (dials.begin(one, PORT), dials.begin(other, PORT));
        assert_ne!(first, second);
        assert_eq!(dials.end(first), Some(one));
        assert_eq!(dials.next_to_ask(), Some((second, PORT)));
        dials.ask_again(second, PORT);
        assert_eq!(dials.next_to_ask(), Some((second, PORT)));
        assert_eq!(dials.next_to_ask(), None);
        assert_eq!(dials.end(first), None, "a late answer has no connection");
        assert_eq!(dials.end_all(), [other]);
    }
}
