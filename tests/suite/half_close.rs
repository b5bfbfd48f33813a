//! Claim 2: a FIN in one direction does not affect the other direction.

use landfall_engine::RingChoice;
use landfall_tests::case::Case;
use landfall_tests::process::engine_idle_share;
use landfall_tests::{End, Pattern, finish, send_all};

use crate::observe::{Path, Route, Side, ends_by, read_rest};

pub(crate) const CASES: &[Case] = &[
    Case::each_ring("c02_ten_mebibytes_come_back_after_a_fin", ten_mebibytes_come_back_after_a_fin),
    Case::each_ring("c02_both_ends_send_a_fin_at_once", both_ends_finish_at_once),
    Case::each_ring("c02_a_fin_right_after_connect", a_fin_right_after_connect),
    Case::each_ring("c02_a_half_closed_connection_stays_open", a_half_closed_connection_stays),
];

const BOTH: [Side; 2] = [Side::Client, Side::Server];

pub(crate) fn ten_mebibytes_come_back_after_a_fin(ring: RingChoice) {
    ten_mebibytes_come_back(Path::landfall(ring));
}

pub(crate) fn ten_mebibytes_come_back(path: Path) {
    const BACK: u64 = 10 * 1024 * 1024;
    for first in BOTH {
        let (one, other) = path.pair().split(first);
        let (there, back) = (Pattern::new(1), Pattern::new(2));
        send_all(&one, there, 1000);
        finish(&one);
        assert_eq!(read_rest(&other, &mut there.checker()), (1000, End::Eof), "{first:?} finished first");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                send_all(&other, back, BACK);
                finish(&other);
            });
            assert_eq!(read_rest(&one, &mut back.checker()), (BACK, End::Eof), "{first:?} finished first");
        });
    }
    all_completed(path, 2);
}

pub(crate) fn both_ends_finish_at_once(ring: RingChoice) {
    let path = Path::landfall(ring);
    for bytes in [0, 1, 100_000] {
        for _ in 0..20 {
            let (client, server) = path.pair().split(Side::Client);
            let together = std::sync::Barrier::new(2);
            std::thread::scope(|scope| {
                for (stream, own, others) in [(&client, 1, 2), (&server, 2, 1)] {
                    let together = &together;
                    scope.spawn(move || {
                        together.wait();
                        send_all(stream, Pattern::new(own), bytes);
                        finish(stream);
                        let mut checker = Pattern::new(others).checker();
                        assert_eq!(read_rest(stream, &mut checker), (bytes, End::Eof));
                    });
                }
            });
        }
    }
    all_completed(path, 60);
}

pub(crate) fn a_fin_right_after_connect(ring: RingChoice) {
    let path = Path::landfall(ring);
    for _ in 0..50 {
        // Sent before the relay could have connected to the server.
        let client = path.client();
        finish(&client);
        let server = path.accept();
        assert_eq!(ends_by(&server), End::Eof);
        send_all(&server, Pattern::new(3), 5000);
        finish(&server);
        assert_eq!(read_rest(&client, &mut Pattern::new(3).checker()), (5000, End::Eof));
    }
    all_completed(path, 50);
}

/// A client that has sent its FIN may wait long for the answer; in the meantime no thread spins and no connection is closed.
pub(crate) fn a_half_closed_connection_stays(ring: RingChoice) {
    let path = Path::landfall(ring);
    for first in BOTH {
        let (one, other) = path.pair().split(first);
        finish(&one);
        assert_eq!(ends_by(&other), End::Eof);
        engine_idle_share("a half-closed connection");
        for round in 0..10 {
            let pattern = Pattern::new(round);
            send_all(&other, pattern, 10);
            landfall_tests::read_exactly(&one, &mut pattern.checker(), 10);
        }
        finish(&other);
        assert_eq!(ends_by(&one), End::Eof);
    }
    all_completed(path, 2);
}

#[track_caller]
fn all_completed(path: Path, count: u64) {
    let (mut relay, forward) = match path.route {
        Route::Landfall(relay, forward) => (*relay, forward),
        Route::Swapped(inside) => (inside.relay, inside.forward),
        Route::Direct(_) | Route::Haproxy { .. } => return,
    };
    let stats = relay.stats_become(forward, "every connection to have completed", |stats| stats.open == 0);
    assert_eq!(stats.completed, count, "{stats:?}");
}
