//! Large transfers, and out-of-band data.

use std::io::{Read, Write};

use landfall_engine::RingChoice;
use landfall_tests::case::Case;
use landfall_tests::{End, Pattern, finish, is_long, read_to_end, send_all};
use rustix::net::SendFlags;

use crate::observe::{Path, Side};

pub(crate) const CASES: &[Case] = &[
    Case::each_ring("c01_large_transfers_in_both_directions_are_unchanged", large_transfers),
    Case::each_ring("c01_an_urgent_byte_stays_in_the_stream", urgent_byte),
];

fn large_transfers(ring: RingChoice) {
    let count = if is_long() { 1 << 30 } else { 64 << 20 };
    let path = Path::landfall(ring);
    for side in [Side::Client, Side::Server] {
        let (sender, receiver) = path.pair().split(side);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                send_all(&sender, Pattern::new(1), count);
                finish(&sender);
            });
            let mut checker = Pattern::new(1).checker();
            assert_eq!(read_to_end(&receiver, &mut checker), End::Eof);
            assert_eq!(checker.position(), count, "sent by the {side:?}");
        });
    }
}

/// To the server inside the urgent byte is an ordinary byte at its position. A relay without SO_OOBINLINE would lose it.
fn urgent_byte(ring: RingChoice) {
    let path = Path::landfall(ring);
    for side in [Side::Client, Side::Server] {
        let (mut sender, mut receiver) = path.pair().split(side);
        sender.write_all(b"before ").unwrap();
        assert_eq!(rustix::net::send(&sender, b"!", SendFlags::OOB).unwrap(), 1);
        sender.write_all(b" after").unwrap();
        finish(&sender);
        let mut text = String::new();
        receiver.read_to_string(&mut text).unwrap();
        assert_eq!(text, "before ! after", "sent by the {side:?}");
    }
}
