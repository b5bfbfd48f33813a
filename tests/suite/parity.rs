//! Claim 13: both rings behave identically, and like a direct connection. HAProxy runs the same script for comparison.

use std::panic::{AssertUnwindSafe, catch_unwind};

use landfall_engine::RingChoice;
use landfall_tests::case::Case;
use landfall_tests::note;

use crate::observe::{Path, Side};
use crate::reset::SCRIPTS;

pub(crate) const CASES: &[Case] =
    &[Case::once("c13_both_rings_show_what_a_direct_connection_shows", both_rings_show_the_same)];

fn both_rings_show_the_same() {
    let direct = Path::direct();
    let rings =
        [("io_uring", Path::landfall(RingChoice::IoUring)), ("epoll", Path::landfall(RingChoice::Epoll))];
    let haproxy = Path::haproxy();
    let mut unexplained = Vec::new();
    for (name, script) in SCRIPTS {
        for side in [Side::Client, Side::Server] {
            let expected = script(&direct, side);
            for (ring, path) in &rings {
                let seen = script(path, side);
                if seen != expected {
                    unexplained
                        .push(format!("{name}, by the {side:?}: {ring} {seen:?}, direct {expected:?}"));
                }
            }
            match catch_unwind(AssertUnwindSafe(|| script(&haproxy, side))) {
                Ok(seen) if seen == expected => {}
                Ok(seen) => note!("{name}, by the {side:?}: haproxy {seen:?}, direct {expected:?}"),
                Err(_) => note!("{name}, by the {side:?}: haproxy reports no end, direct {expected:?}"),
            }
        }
    }
    assert!(unexplained.is_empty(), "{}", unexplained.join("\n"));
}
