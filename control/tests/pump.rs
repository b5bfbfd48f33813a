//! Streams of a broker over a real WebSocket, with real sockets at both ends: what arrives, and how it ends.

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

/// The modes that there are: a peer of the reference, ours, and each extension that changes what a stream does, alone.
const MODES: [Extensions; 5] = [
    Extensions::NONE,
    Extensions::ALL,
    Extensions { credit: true, ..Extensions::NONE },
    Extensions { binary: true, ..Extensions::NONE },
    Extensions { half_close: true, ..Extensions::NONE },
];

#[test]
fn every_byte_arrives_both_ways_on_many_streams_at_once() {
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
fn without_half_close_a_fin_ends_the_stream_behind_what_it_follows() {
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
fn a_server_that_closes_is_read_to_the_end_and_refuses_what_comes_after() {
    for mode in MODES {
        let mut link = Link::new(mode);
        let stream = link.open();
        // It lies unread when the stream ends.
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
fn a_client_that_keeps_sending_gets_all_of_the_answer_before_it_is_refused() {
    let mut link = Link::new(Extensions::NONE);
    let stream = link.open();
    std::thread::scope(|scope| {
        let client = &stream.client;
        // Until it is refused.
        scope.spawn(move || while (&*client).write(&[0; 4096]).is_ok() {});
        send(&stream.server, 2, 3 * MEBIBYTE).unwrap();
        finish(&stream.server);
        expect(client, 2, 3 * MEBIBYTE);
        expect_end(client);
    });
}

#[test]
fn a_reset_is_a_reset_on_the_other_side_after_what_it_follows() {
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
            // A reset throws away what was not yet taken from it.
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
fn a_client_that_is_gone_is_noticed_while_the_server_reads_nothing() {
    let mut link = Link::new(Extensions::ALL);
    // It sends nothing after its FIN, so only the socket's error tells.
    let silent = link.open();
    finish(&silent.client);
    expect_end(&silent.server);
    reset(silent.client);
    assert_eq!((silent.host.wait(), silent.container.wait()), (Ended::ByUs, Ended::ByPeer));
}

#[test]
fn a_lost_connection_resets_both_ends_of_a_stream() {
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
fn what_exceeds_its_bound_without_credit_is_closed_and_others_go_on() {
    let mut link = Link::new(Extensions::NONE);
    let stalled = link.open();
    let other = link.open();
    std::thread::scope(|scope| {
        // Nobody reads it. What it has sent when it is refused is beyond the bound of a stream.
        scope.spawn(|| assert!(send(&stalled.server, 1, 200 * MEBIBYTE).is_err()));
        scope.spawn(|| send(&other.server, 2, 20 * MEBIBYTE).unwrap());
        expect(&other.client, 2, 20 * MEBIBYTE);
    });
    assert_eq!((stalled.host.wait(), stalled.container.wait()), (Ended::Overflown, Ended::ByPeer));
}

#[test]
fn a_slow_reader_gets_every_byte() {
    let long = std::env::var_os("LANDFALL_LONG").is_some();
    let bytes = if long { 1024 * MEBIBYTE } else { 8 * MEBIBYTE };
    for mode in [Extensions::NONE, Extensions::ALL] {
        // A reference peer can only be read up to what is kept for it.
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
fn stalled_readers_leave_the_others_their_speed() {
    let share = speed::beside_stalled(200, Duration::from_millis(300), 0.8);
    assert!(share >= 0.8, "{share:.2} of the speed alone");
}
