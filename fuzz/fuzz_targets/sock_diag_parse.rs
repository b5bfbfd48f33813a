//! A datagram of `NETLINK_SOCK_DIAG`: no panic, no more sockets than fit, none after the end of the answer.
//! The first byte selects the family; every message is also tried with the sequence number that it contains.

#![no_main]

use landfall_engine::command::{Family, Listening};
use landfall_engine::watch::diag_message::{REQUEST_BYTES, datagram, lookup_answer, request};
use libfuzzer_sys::fuzz_target;

const MESSAGE_BYTES_MIN: usize = 16 + 72;

fuzz_target!(|data: &[u8]| {
    let Some((&choice, bytes)) = data.split_first() else { return };
    let family = if choice & 1 == 0 { Family::V4 } else { Family::V6 };
    let carried =
        bytes.get(8..12).map_or(0, |field| u32::from_ne_bytes(field.try_into().expect("four bytes")));
    for sequence in [carried, 0, carried.wrapping_add(1)] {
        let found = lookup_answer(bytes, sequence);
        assert!(!found.is_ok_and(|found| found.is_some()) || bytes.len() >= MESSAGE_BYTES_MIN);
        let mut rows: Vec<Listening> = Vec::new();
        let first = datagram(bytes, sequence, family, |row| rows.push(row));
        assert!(rows.len() <= bytes.len() / MESSAGE_BYTES_MIN + 1);
        assert!(rows.iter().all(|row| row.address.is_ipv4() == (family == Family::V4)));
        if first.is_ok_and(|progress| progress.done) {
            // Bytes after the end are ignored.
            let mut longer = bytes.to_vec();
            longer.extend([0xff; 7]);
            let mut again: Vec<Listening> = Vec::new();
            let second = datagram(&longer, sequence, family, |row| again.push(row));
            assert!(second.is_ok() && again == rows);
        }
    }
    // Our own request has a valid header, but is not an answer.
    let own: [u8; REQUEST_BYTES] = request(family, carried);
    let _ = datagram(&own, carried, family, |_| panic!("a request was parsed as a socket"));
});
