//! The difference between two readings. Pure.
//!
//! Port and address identify a row. If they have another inode than before, the server was restarted or replaced between the
//! two readings, so its owner must be determined again. Such a row is in both lists: the old one as closed, the new one as
//! opened. A receiver that keeps a set by port and address therefore removes the closed rows before it inserts the opened
//! ones. A receiver that uses only port numbers (the wire, specification A.3.5) compares the ports before and after, and
//! sees no change.

use super::reading::Reading;
use crate::command::Listening;

/// The rows that only one of two readings has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// The new rows, in the order of the newer reading.
    pub opened: Vec<Listening>,
    /// The rows that are gone, in the order of the older reading.
    pub closed: Vec<Listening>,
}

impl Difference {
    /// Whether the two readings have the same rows.
    pub fn is_empty(&self) -> bool {
        self.opened.is_empty() && self.closed.is_empty()
    }
}

/// Compares two readings, in time linear in their sizes. Allocates only if something changed.
pub fn between(older: &Reading, newer: &Reading) -> Difference {
    Difference { opened: missing_from(older, newer), closed: missing_from(newer, older) }
}

/// Returns the rows of `of` that `other` lacks or has with another inode or user.
fn missing_from(other: &Reading, of: &Reading) -> Vec<Listening> {
    of.rows().iter().filter(|row| other.at((row.port, row.address)) != Some(row)).copied().collect()
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU16;

    use proptest::prelude::*;

    use super::*;

    fn row(port: u16, address: &str, inode: u64) -> Listening {
        let port = NonZeroU16::new(port).unwrap();
        Listening { port, address: address.parse().unwrap(), inode, uid: 0 }
    }

    fn reading(rows: &[Listening]) -> Reading {
        rows.iter().copied().collect()
    }

    #[test]
    fn opened_rows_follow_the_newer_reading_and_closed_rows_the_older() {
        let a = [row(9, "127.0.0.1", 1), row(3, "::", 2), row(5, "0.0.0.0", 3)];
        let b = [row(8, "127.0.0.1", 4), row(3, "::", 2), row(1, "0.0.0.0", 5)];
        let difference = between(&reading(&a), &reading(&b));
        assert_eq!(difference.opened, [b[0], b[2]]);
        assert_eq!(difference.closed, [a[0], a[2]]);
    }

    #[test]
    fn the_same_port_on_another_address_is_another_row() {
        let difference = between(&reading(&[row(80, "::1", 1)]), &reading(&[row(80, "127.0.0.1", 1)]));
        assert_eq!(difference.opened, [row(80, "127.0.0.1", 1)]);
        assert_eq!(difference.closed, [row(80, "::1", 1)]);
    }

    #[test]
    fn a_restarted_server_is_closed_and_opened() {
        let difference = between(&reading(&[row(80, "::1", 1)]), &reading(&[row(80, "::1", 2)]));
        assert_eq!(
            (difference.opened, difference.closed),
            (vec![row(80, "::1", 2)], vec![row(80, "::1", 1)])
        );
    }

    #[test]
    fn another_order_is_no_change() {
        let (a, b) = (row(80, "::1", 1), row(81, "::1", 2));
        assert!(between(&reading(&[a, b]), &reading(&[b, a])).is_empty());
    }

    fn readings() -> impl Strategy<Value = Reading> {
        let address = prop::sample::select(vec!["127.0.0.1", "0.0.0.0", "::1", "::"]);
        let row = (1u16..6, address, 1u64..4).prop_map(|(port, address, inode)| row(port, address, inode));
        prop::collection::vec(row, 0..12).prop_map(|rows| rows.into_iter().collect())
    }

    proptest! {
        #[test]
        fn removing_closed_and_inserting_opened_rows_gives_the_newer_reading(a in readings(), b in readings()) {
            let difference = between(&a, &b);
            let kept = a.rows().iter().filter(|row| !difference.closed.contains(row)).copied();
            let result: Reading = kept.chain(difference.opened.iter().copied()).collect();
            prop_assert!(between(&result, &b).is_empty());
            prop_assert_eq!(result.rows().len(), b.rows().len());
        }
    }
}
