//! The readiness table: one entry for each registered socket. Pure.

use super::{Key, Readiness, Token};

/// The state of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// The entry is unused.
    Free,
    /// The poller reports events of the socket.
    Armed,
    /// The kernel refused to register the socket.
    Refused,
    /// The socket is closed, and the poller's last notice is outstanding.
    Leaving {
        /// Whether the shard gets a report of it.
        report: bool,
    },
}

/// One registered socket. 24 bytes where the socket is a descriptor: each connection has two.
#[derive(Debug)]
pub(super) struct Entry<S> {
    pub(super) token: Token,
    pub(super) socket: Option<S>,
    generation: u32,
    /// The reported and not disproved readiness.
    pub(super) ready: Readiness,
    pub(super) state: State,
    /// Whether it is among the sockets that may have an urgent byte.
    pub(super) doubted: bool,
}

/// The entries. They are reused, each time with a new generation.
#[derive(Debug)]
pub(super) struct Table<S> {
    entries: Vec<Entry<S>>,
    free: Vec<u32>,
}

impl<S> Table<S> {
    pub(super) fn new() -> Table<S> {
        Table { entries: Vec::new(), free: Vec::new() }
    }

    /// Adds a socket, which the caller registers next.
    pub(super) fn insert(&mut self, socket: S, token: Token) -> Key {
        let index = self.free.pop().unwrap_or_else(|| {
            let index = u32::try_from(self.entries.len()).unwrap_or(u32::MAX);
            let (ready, state) = (Readiness::empty(), State::Free);
            self.entries.push(Entry { token, socket: None, generation: 0, ready, state, doubted: false });
            index
        });
        let Some(entry) = self.entries.get_mut(index as usize) else { return Key::new(0, index) };
        entry.token = token;
        entry.socket = Some(socket);
        entry.ready = Readiness::empty();
        entry.state = State::Armed;
        entry.doubted = false;
        Key::new(entry.generation, index)
    }

    /// Returns the entry of a key, unless its generation is over.
    pub(super) fn entry(&self, key: Key) -> Option<&Entry<S>> {
        let (generation, index) = key.parts();
        let entry = self.entries.get(index as usize)?;
        (entry.generation == generation && entry.state != State::Free).then_some(entry)
    }

    /// Returns the entry of a key, unless its generation is over.
    pub(super) fn entry_mut(&mut self, key: Key) -> Option<&mut Entry<S>> {
        let (generation, index) = key.parts();
        let entry = self.entries.get_mut(index as usize)?;
        (entry.generation == generation && entry.state != State::Free).then_some(entry)
    }

    /// Ends the use of an entry. Its key is invalid from now on.
    pub(super) fn free(&mut self, key: Key) {
        let Some(entry) = self.entry_mut(key) else { return };
        entry.generation = entry.generation.wrapping_add(1);
        entry.state = State::Free;
        entry.socket = None;
        self.free.push(key.parts().1);
    }

    /// Returns the number of entries in use.
    pub(super) fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_never_finds_the_next_socket() {
        let mut table = Table::new();
        let first = table.insert("first", Token(1));
        table.free(first);
        assert!(table.entry(first).is_none());
        let second = table.insert("second", Token(2));
        assert_eq!(first.parts().1, second.parts().1, "the place is used again");
        assert!(table.entry(first).is_none());
        table.free(first);
        assert_eq!(table.entry(second).map(|entry| entry.token), Some(Token(2)));
        assert_eq!(table.len(), 1);
    }

    #[test]
    fn an_entry_is_small() {
        assert!(size_of::<Entry<std::os::fd::OwnedFd>>() <= 24);
    }
}
