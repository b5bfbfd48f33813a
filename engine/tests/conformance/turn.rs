//! Watches, wake-ups and deadlines.

use std::io::Write;
use std::net::Shutdown;
use std::time::{Duration, Instant};

use landfall_engine::limits::Limits;
use landfall_engine::ring::{Outcome, Way};
use rustix::event::PollFlags;

use crate::bench::{PATIENCE, Real, reset, run, tcp_pair, until_ready};

pub(crate) fn a_watch_tells_a_reset_and_no_fin<R: Real>(_: &str) {
    run::<R>(&Limits::default(), |bench| {
        let (ours, theirs) = tcp_pair();
        let ours = bench.adopt(ours);
        let broken = bench.watch(&ours);
        bench.assert_quiet();
        reset(theirs);
        assert!(matches!(bench.outcome(broken), Outcome::Broken));

        let (ours, mut theirs) = tcp_pair();
        let ours = bench.adopt(ours);
        let watch = bench.watch(&ours);
        theirs.write_all(b"bytes are no break").unwrap();
        theirs.shutdown(Shutdown::Write).unwrap();
        until_ready(&ours, PollFlags::RDHUP);
        bench.assert_quiet();
        // From its first FIN on, a watch sleeps; whoever sends then is told by the send.
        reset(theirs);
        until_ready(&ours, PollFlags::empty());
        bench.assert_quiet();
        assert!(bench.cancel(watch).is_none());
    });
}

pub(crate) fn a_watch_tells_two_fins<R: Real>(_: &str) {
    run::<R>(&Limits::default(), |bench| {
        let (ours, theirs) = tcp_pair();
        let ours = bench.adopt(ours);
        bench.ring.shutdown_write(&ours).unwrap();
        let watch = bench.watch(&ours);
        bench.assert_quiet();
        drop(theirs);
        assert!(matches!(bench.outcome(watch), Outcome::Broken));
    });
}

pub(crate) fn a_watch_finds_a_break_that_came_before<R: Real>(_: &str) {
    run::<R>(&Limits::default(), |bench| {
        // Registered for a read, with a FIN remembered, and broken while nobody watches.
        let (ours, theirs) = tcp_pair();
        let ours = bench.adopt(ours);
        let read = bench.recv(&ours, Way::Copy, false);
        theirs.shutdown(Shutdown::Write).unwrap();
        drop(bench.received(read));
        reset(theirs);
        until_ready(&ours, PollFlags::empty());
        let watch = bench.watch(&ours);
        assert!(matches!(bench.outcome(watch), Outcome::Broken));
    });
}

pub(crate) fn a_waker_ends_a_wait<R: Real>(_: &str) {
    run::<R>(&Limits::default(), |bench| {
        for _ in 0..100 {
            let waker = bench.ring.waker();
            let waking = std::thread::spawn(move || waker.wake());
            assert_eq!(bench.turn(None).unwrap(), 0);
            waking.join().unwrap();
        }
        // Used before the wait, and more than once: one wait ends, the next does not.
        let waker = bench.ring.waker();
        waker.wake();
        waker.wake();
        assert_eq!(bench.turn(None).unwrap(), 0);
        bench.assert_quiet();
    });
}

pub(crate) fn a_deadline_is_kept<R: Real>(_: &str) {
    run::<R>(&Limits::default(), |bench| {
        // One of a fraction of a millisecond as well, which must be waited for and not be spun for.
        for micros in [300, 1_500, 25_000] {
            let until = Instant::now() + Duration::from_micros(micros);
            let mut turns = 0;
            while Instant::now() < until {
                assert_eq!(bench.turn(Some(until)).unwrap(), 0);
                turns += 1;
            }
            assert!(turns <= 2, "{turns} turns for {micros} µs");
            assert!(until.elapsed() < Duration::from_secs(5));
        }
        // One that has passed.
        assert_eq!(bench.turn(Some(Instant::now())).unwrap(), 0);
    });
}

pub(crate) fn what_is_settled_is_told_at_once<R: Real>(_: &str) {
    run::<R>(&Limits::default(), |bench| {
        let (ours, theirs) = tcp_pair();
        let ours = bench.adopt(ours);
        // Sleeping after a FIN, so that the cancel needs nothing from the kernel.
        let watch = bench.watch(&ours);
        theirs.shutdown(Shutdown::Write).unwrap();
        until_ready(&ours, PollFlags::RDHUP);
        bench.assert_quiet();
        let key = bench.key(watch);
        bench.ring.cancel(key);
        assert_eq!(bench.turn(None).unwrap(), 1);
        assert!(matches!(bench.outcome(watch), Outcome::Cancelled(None)));
        // A cancel of what waits in the kernel ends a wait for ever, too.
        let (quiet, _theirs) = tcp_pair();
        let quiet = bench.adopt(quiet);
        let read = bench.recv(&quiet, Way::Copy, false);
        let key = bench.key(read);
        bench.ring.cancel(key);
        let started = Instant::now();
        assert!(matches!(bench.outcome(read), Outcome::Cancelled(None)));
        assert!(started.elapsed() < PATIENCE / 2);
    });
}
