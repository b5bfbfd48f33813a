//! Errors, hang-ups, wake-ups and deadlines.

use std::io::Write;
use std::net::Shutdown;
use std::time::{Duration, Instant};

use landfall_engine::limits::Limits;
use landfall_engine::reactor::{Readiness, SocketIo};

use crate::bench::{Real, reset, run, tcp_pair};

pub(crate) fn a_reset_is_an_error_and_a_fin_is_not<P: Real>(_: &str) {
    run::<P>(&Limits::default(), |bench| {
        let (ours, mut theirs) = tcp_pair();
        let key = bench.register(ours);
        bench.drain_events();
        theirs.write_all(b"bytes are no error").unwrap();
        theirs.shutdown(Shutdown::Write).unwrap();
        bench.await_ready(key, Readiness::IN | Readiness::RDHUP);
        bench.drain_events();
        assert!(!bench.reactor.readiness(key).intersects(Readiness::ERR | Readiness::HUP));
        reset(theirs);
        bench.await_ready(key, Readiness::ERR);
    });
}

pub(crate) fn two_fins_are_a_hang_up_and_no_error<P: Real>(_: &str) {
    run::<P>(&Limits::default(), |bench| {
        let (ours, theirs) = tcp_pair();
        let key = bench.register(ours);
        bench.reactor.on_socket(key, |io, socket| io.shutdown_write(socket)).unwrap().unwrap();
        bench.drain_events();
        assert!(!bench.reactor.readiness(key).intersects(Readiness::RDHUP | Readiness::HUP));
        drop(theirs);
        bench.await_ready(key, Readiness::HUP | Readiness::RDHUP);
        bench.drain_events();
        assert!(!bench.reactor.readiness(key).contains(Readiness::ERR));
    });
}

pub(crate) fn a_waker_ends_a_wait<P: Real>(_: &str) {
    run::<P>(&Limits::default(), |bench| {
        for _ in 0..100 {
            let waker = bench.reactor.waker();
            let waking = std::thread::spawn(move || waker.wake());
            assert_eq!(bench.turn(None), 0);
            waking.join().unwrap();
        }
        // The waker is used twice before the wait: one wait ends, the next does not.
        let waker = bench.reactor.waker();
        waker.wake();
        waker.wake();
        assert_eq!(bench.turn(None), 0);
        bench.assert_quiet();
    });
}

pub(crate) fn a_deadline_is_kept<P: Real>(_: &str) {
    run::<P>(&Limits::default(), |bench| {
        // The first deadline is a fraction of a millisecond away; the poller must sleep for it, too.
        for micros in [300, 1_500, 25_000] {
            let until = Instant::now() + Duration::from_micros(micros);
            let mut turns = 0;
            while Instant::now() < until {
                assert_eq!(bench.turn(Some(until)), 0);
                turns += 1;
            }
            assert!(turns <= 2, "{turns} turns for {micros} µs");
            assert!(until.elapsed() < Duration::from_secs(5));
        }
        // A deadline that has passed.
        assert_eq!(bench.turn(Some(Instant::now())), 0);
    });
}
