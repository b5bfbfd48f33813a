//! A table of slots with generations: an id outlives its entry and never refers to a later entry of the same slot. Pure.

use crate::reactor::Token;

/// The id of one entry of a [`Table`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotId {
    slot: u32,
    generation: u32,
}

/// The parts of a [`Token`]: a table, a socket of its entry, and the entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenParts {
    /// The table and the socket, below 256; each table has its own numbers.
    pub kind: u8,
    /// The entry.
    pub id: SlotId,
}

/// The bits of a token that hold the slot and the generation; the eight bits above hold the kind.
const SLOT_BITS: u32 = 28;
const GENERATION_BITS: u32 = 28;
const SLOT_MASK: u32 = (1 << SLOT_BITS) - 1;
const GENERATION_MASK: u32 = (1 << GENERATION_BITS) - 1;

impl TokenParts {
    /// Packs the parts into one number.
    pub fn pack(self) -> Token {
        let low = u64::from(self.id.slot & SLOT_MASK);
        let middle = u64::from(self.id.generation & GENERATION_MASK) << SLOT_BITS;
        Token(u64::from(self.kind) << (SLOT_BITS + GENERATION_BITS) | middle | low)
    }

    /// The reverse of [`TokenParts::pack`].
    pub fn unpack(token: Token) -> TokenParts {
        let bits = |shift: u32, mask: u32| u32::try_from(token.0 >> shift & u64::from(mask)).unwrap_or(0);
        TokenParts {
            kind: u8::try_from(token.0 >> (SLOT_BITS + GENERATION_BITS)).unwrap_or(u8::MAX),
            id: SlotId { slot: bits(0, SLOT_MASK), generation: bits(SLOT_BITS, GENERATION_MASK) },
        }
    }
}

/// A table of entries. Slots are reused, each time with a new generation.
#[derive(Debug)]
pub struct Table<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
}

#[derive(Debug)]
struct Slot<T> {
    generation: u32,
    entry: Option<T>,
}

impl<T> Table<T> {
    /// Creates an empty table.
    pub fn new() -> Table<T> {
        Table { slots: Vec::new(), free: Vec::new() }
    }

    /// Adds an entry.
    pub fn insert(&mut self, entry: T) -> SlotId {
        self.insert_with(|_| entry)
    }

    /// Adds an entry that is created from its id.
    pub fn insert_with(&mut self, make: impl FnOnce(SlotId) -> T) -> SlotId {
        if let Some(slot) = self.free.pop()
            && let Some(place) = self.slots.get_mut(slot as usize)
        {
            let id = SlotId { slot, generation: place.generation };
            place.entry = Some(make(id));
            return id;
        }
        let slot = u32::try_from(self.slots.len()).unwrap_or(SLOT_MASK) & SLOT_MASK;
        let id = SlotId { slot, generation: 0 };
        self.slots.push(Slot { generation: 0, entry: Some(make(id)) });
        id
    }

    /// Returns the entry of that id, if it still exists.
    pub fn entry(&self, id: SlotId) -> Option<&T> {
        let slot = self.slots.get(id.slot as usize)?;
        if slot.generation == id.generation { slot.entry.as_ref() } else { None }
    }

    /// Returns the entry of that id, if it still exists.
    pub fn entry_mut(&mut self, id: SlotId) -> Option<&mut T> {
        let slot = self.slots.get_mut(id.slot as usize)?;
        if slot.generation == id.generation { slot.entry.as_mut() } else { None }
    }

    /// Removes the entry and returns it. Its id is invalid from now on.
    pub fn remove(&mut self, id: SlotId) -> Option<T> {
        let slot = self.slots.get_mut(id.slot as usize)?;
        if slot.generation != id.generation {
            return None;
        }
        let entry = slot.entry.take()?;
        slot.generation = (slot.generation + 1) & GENERATION_MASK;
        self.free.push(id.slot);
        Some(entry)
    }

    /// Returns the number of entries.
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether the table is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the ids of all entries.
    pub fn ids(&self) -> Vec<SlotId> {
        let occupied = self.slots.iter().enumerate().filter(|(_, slot)| slot.entry.is_some());
        occupied
            .map(|(index, slot)| SlotId {
                slot: u32::try_from(index).unwrap_or(SLOT_MASK),
                generation: slot.generation,
            })
            .collect()
    }
}

impl<T> Default for Table<T> {
    fn default() -> Table<T> {
        Table::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_never_refers_to_the_next_entry() {
        let mut table = Table::new();
        let first = table.insert("first");
        assert_eq!(table.remove(first), Some("first"));
        let second = table.insert("second");
        assert_eq!(table.entry(first), None);
        assert_eq!(table.remove(first), None);
        assert_eq!(table.entry(second), Some(&"second"));
        assert_eq!(table.len(), 1);
    }

    #[test]
    fn unpacking_a_token_returns_its_parts() {
        let id = SlotId { slot: SLOT_MASK, generation: GENERATION_MASK - 1 };
        for kind in [0, 1, 7, u8::MAX] {
            let parts = TokenParts { kind, id };
            assert_eq!(TokenParts::unpack(parts.pack()), parts);
        }
    }
}
