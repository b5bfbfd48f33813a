//! Streams of a broker over a real WebSocket, with real sockets at both ends: their data, and their ends.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::io::Write as _;
use std::time::Duration;

use landfall::broker::message::Extensions;
use landfall::broker::pump::Ended;

use self::link::{Link, PATIENCE, expect, expect_end, expect_reset, finish, reset, send};

#[path = "pump/link.rs"]
mod link;
#[path = "pump/speed.rs"]
mod speed;

const MEBIBYTE: usize = 1024 * 1024;

/// The modes: a peer of the reference, landfall's own, and each extension that changes the behaviour of a stream,
/// alone.
const MODES: [Extensions; 5] = [
    Extensions::NONE,
    Extensions::ALL,
    Extensions { credit: true, ..Extensions::NONE },
    Extensions { binary: true, ..Extensions::NONE },
    Extensions { half_close: true, ..Extensions::NONE },
];

#[test]
fn every_byte_arrives_both_ways_on_parallel_streams() {
    for mode in MODES {
        let mut link = Link::new(mode);
        let streams: Vec<_> = (0..4).map(|_| link.open()).collect();
        std::thread::scope(|scope| {
            for (seed, stream) in (0..).zip(&streams) {
                let bytes = MEBIBYTE + MEBIBYTE / 4 + 12_345;
                scope.spawn(move || send(&stream.client, seed, bytes).unwrap());
                scope.spawn(move || send(&stream.server, seed + 100, bytes).unwrap());
                scope.spawn(move || expect(&stream.server, seed, bytes));
                scope.spawn(move || expect(&stream.client, seed + 100, bytes));
            }
        });
    }
}

#[test]
fn fin_without_half_close_ends_the_stream_after_its_data() {
    for mode in [Extensions::NONE, Extensions { half_close: false, ..Extensions::ALL }] {
        let mut link = Link::new(mode);
        let stream = link.open();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                send(&stream.client, 1, 5 * MEBIBYTE).unwrap();
                finish(&stream.client);
            });
            expect(&stream.server, 1, 5 * MEBIBYTE);
            expect_end(&stream.server);
        });
        assert_eq!((stream.host.wait(), stream.container.wait()), (Ended::ByUs, Ended::ByPeer));
        expect_end(&stream.client);
    }
}

#[test]
fn closed_server_is_read_to_the_end_and_refuses_later_data() {
    for mode in MODES {
        let mut link = Link::new(mode);
        let stream = link.open();
        // The data is unread when the stream ends.
        send(&stream.client, 7, 1000).unwrap();
        expect(&stream.server, 7, 1000);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                send(&stream.server, 2, 5 * MEBIBYTE).unwrap();
                finish(&stream.server);
            });
            expect(&stream.client, 2, 5 * MEBIBYTE);
            expect_end(&stream.client);
        });
        if mode.half_close {
            send(&stream.client, 3, MEBIBYTE).unwrap();
            finish(&stream.client);
            expect(&stream.server, 3, MEBIBYTE);
            expect_end(&stream.server);
            assert_eq!((stream.host.wait(), stream.container.wait()), (Ended::Complete, Ended::Complete));
        } else {
            assert_eq!((stream.host.wait(), stream.container.wait()), (Ended::ByPeer, Ended::ByUs));
            let refused = (0..).map_while(|_| (&stream.client).write(&[0; 1000]).ok()).take(100_000).count();
            assert!(refused < 100_000, "a stream that is over takes bytes");
        }
    }
}

#[test]
fn sending_client_gets_the_whole_answer_before_the_reset() {
    let mut link = Link::new(Extensions::NONE);
    let stream = link.open();
    std::thread::scope(|scope| {
        let client = &stream.client;
        // Write until the write fails.
        scope.spawn(move || while (&*client).write(&[0; 4096]).is_ok() {});
        send(&stream.server, 2, 3 * MEBIBYTE).unwrap();
        finish(&stream.server);
        expect(client, 2, 3 * MEBIBYTE);
        expect_end(client);
    });
}

#[test]
fn reset_after_data_is_delivered() {
    for side in [false, true] {
        let mut link = Link::new(Extensions::ALL);
        let stream = link.open();
        let (from, to) = if side { (stream.client, stream.server) } else { (stream.server, stream.client) };
        std::thread::scope(|scope| {
            let to = &to;
            scope.spawn(move || {
                expect(to, 3, MEBIBYTE);
                expect_reset(to);
            });
            send(&from, 3, MEBIBYTE).unwrap();
            // A reset discards data that the peer has not acknowledged yet.
            let given_up = std::time::Instant::now() + PATIENCE;
            while landfall_engine::sys::unacknowledged_bytes(&from) > 0 {
                assert!(std::time::Instant::now() < given_up, "it is never read");
                std::thread::yield_now();
            }
            reset(from);
        });
        let expected = if side { (Ended::ByUs, Ended::ByPeer) } else { (Ended::ByPeer, Ended::ByUs) };
        assert_eq!((stream.host.wait(), stream.container.wait()), expected);
    }
}

#[test]
fn reset_of_a_half_closed_client_is_noticed_without_reads() {
    let mut link = Link::new(Extensions::ALL);
    // It sends nothing after its FIN, so only the socket's error shows the reset.
    let silent = link.open();
    finish(&silent.client);
    expect_end(&silent.server);
    reset(silent.client);
    assert_eq!((silent.host.wait(), silent.container.wait()), (Ended::ByUs, Ended::ByPeer));
}

#[test]
fn lost_connection_resets_both_ends_of_a_stream() {
    for mode in MODES {
        let mut link = Link::new(mode);
        let stream = link.open();
        send(&stream.client, 1, 1000).unwrap();
        expect(&stream.server, 1, 1000);
        link.lose_host();
        expect_reset(&stream.client);
        expect_reset(&stream.server);
        assert_eq!(stream.container.wait(), Ended::Lost);
    }
}

#[test]
fn stream_over_its_bound_is_closed_and_others_continue() {
    let mut link = Link::new(Extensions::NONE);
    let stalled = link.open();
    let other = link.open();
    std::thread::scope(|scope| {
        // The client does not read, so the server's data exceeds the bound of a stream, and its write fails.
        scope.spawn(|| assert!(send(&stalled.server, 1, 200 * MEBIBYTE).is_err()));
        scope.spawn(|| send(&other.server, 2, 20 * MEBIBYTE).unwrap());
        expect(&other.client, 2, 20 * MEBIBYTE);
    });
    assert_eq!((stalled.host.wait(), stalled.container.wait()), (Ended::Overflown, Ended::ByPeer));
}

#[test]
fn slow_reader_gets_every_byte() {
    let long = std::env::var_os("LANDFALL_LONG").is_some();
    let bytes = if long { 1024 * MEBIBYTE } else { 8 * MEBIBYTE };
    for mode in [Extensions::NONE, Extensions::ALL] {
        // Without credit, the data must fit the buffer that the broker keeps for a slow reader.
        let bytes = if mode.credit { bytes } else { bytes.min(24 * MEBIBYTE) };
        let mut link = Link::new(mode);
        let stream = link.open();
        std::thread::scope(|scope| {
            scope.spawn(|| send(&stream.server, 9, bytes).unwrap());
            speed::expect_slowly(&stream.client, 9, bytes, 10_000_000);
        });
    }
}

#[test]
fn stalled_readers_do_not_slow_other_streams() {
    let share = speed::beside_stalled(200, Duration::from_millis(300), 0.8);
    assert!(share >= 0.8, "{share:.2} of the speed alone");
}
