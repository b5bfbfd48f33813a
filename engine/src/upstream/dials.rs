//! What a driver is asked to connect for: the requests that still have to be sent, and those that wait for an answer.
//!
//! Requests are sent one after the other, as the channel has room; answers come in any order. A dial that nobody waits for
//! any more (its client's time was up) is not asked for if that can still be helped, and its answer is not wanted.

use std::collections::{HashMap, VecDeque};
use std::num::NonZeroU16;

use crate::ring::OpKey;
use crate::table::SlotId;

/// The dials of one shard over one channel.
#[derive(Debug, Default)]
pub(crate) struct Dials {
    /// The number of the next one.
    next: u64,
    /// To be asked for, the oldest first.
    unasked: VecDeque<(u64, NonZeroU16)>,
    /// Who waits for which.
    awaited: HashMap<u64, SlotId>,
    /// The request that is being sent.
    pub(crate) asking: Option<OpKey>,
    /// The wait for answers, which also tells the driver's end.
    pub(crate) hearing: Option<OpKey>,
}

impl Dials {
    /// Notes a dial for a connection, and gives its number.
    pub(crate) fn begin(&mut self, connection: SlotId, port: NonZeroU16) -> u64 {
        let dial = self.next;
        self.next += 1;
        self.unasked.push_back((dial, port));
        self.awaited.insert(dial, connection);
        dial
    }

    /// The next one to ask for, unless one is being asked for already.
    pub(crate) fn next_to_ask(&mut self) -> Option<(u64, NonZeroU16)> {
        if self.asking.is_some() {
            return None;
        }
        while let Some(unasked) = self.unasked.pop_front() {
            if self.awaited.contains_key(&unasked.0) {
                return Some(unasked);
            }
        }
        None
    }

    /// It was answered, or is not waited for any more; tells who waited.
    pub(crate) fn end(&mut self, dial: u64) -> Option<SlotId> {
        self.awaited.remove(&dial)
    }

    /// Ends them all; tells who waited.
    pub(crate) fn end_all(&mut self) -> Vec<SlotId> {
        self.unasked.clear();
        self.awaited.drain().map(|(_, connection)| connection).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::Table;

    const PORT: NonZeroU16 = NonZeroU16::new(3000).unwrap();

    #[test]
    fn a_dial_that_nobody_waits_for_is_not_asked_for() {
        let mut table = Table::new();
        let (one, other) = (table.insert(()), table.insert(()));
        let mut dials = Dials::default();
        let (first, second) = (dials.begin(one, PORT), dials.begin(other, PORT));
        assert_ne!(first, second);
        assert_eq!(dials.end(first), Some(one));
        assert_eq!(dials.next_to_ask(), Some((second, PORT)));
        assert_eq!(dials.next_to_ask(), None);
        assert_eq!(dials.end(first), None, "an answer that comes late is nobody's");
        assert_eq!(dials.end_all(), [other]);
    }
}
