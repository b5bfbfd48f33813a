//! Asking a driver to dial, and hearing what came of it.

use std::num::NonZeroU16;
use std::os::fd::{AsFd, OwnedFd};

use landfall_engine::channel::Channel;
use landfall_engine::limits::Limits;
use landfall_engine::opener::{Answer, DialFailure, Request};
use landfall_engine::ring::{Dialled, Op, Outcome};

use crate::bench::{Real, run, tcp_pair};

const PORT: NonZeroU16 = NonZeroU16::new(3000).unwrap();

pub(crate) fn answers_to_dials_come_in_any_order<R: Real>(_: &str) {
    run::<R>(&Limits::default(), |bench| {
        let (ours, driver) = Channel::pair().unwrap();
        let channel = bench.adopt(OwnedFd::from(ours));
        let hear = bench.submit(Op::Hear { channel: channel.clone() });
        for dial in [1, 2] {
            let ask = bench.submit(Op::Ask { channel: channel.clone(), dial, port: PORT });
            assert!(matches!(bench.outcome(ask), Outcome::Asked(Ok(()))));
            let (request, _) = driver.recv::<Request>().unwrap().unwrap();
            assert_eq!(request, Request::Dial { dial, port: PORT });
        }
        bench.assert_quiet();
        let (socket, _peer) = tcp_pair();
        // Both are there before either is heard.
        driver.send(&Answer::Dialled { dial: 2 }, &[socket.as_fd()]).unwrap();
        driver.send(&Answer::NotDialled { dial: 1, why: DialFailure::Refused }, &[]).unwrap();
        let Outcome::Heard(Ok(Dialled { dial: 2, result: Ok(_) })) = bench.outcome(hear) else {
            panic!("the first answer was not heard");
        };
        let hear = bench.submit(Op::Hear { channel: channel.clone() });
        let Outcome::Heard(Ok(Dialled { dial: 1, result: Err(DialFailure::Refused) })) = bench.outcome(hear)
        else {
            panic!("the second answer was not heard");
        };
        let hear = bench.submit(Op::Hear { channel: channel.clone() });
        bench.assert_quiet();
        assert!(bench.cancel(hear).is_none());
        let hear = bench.submit(Op::Hear { channel: channel.clone() });
        drop(driver);
        assert!(matches!(bench.outcome(hear), Outcome::Heard(Err(_))));
        let ask = bench.submit(Op::Ask { channel, dial: 3, port: PORT });
        assert!(matches!(bench.outcome(ask), Outcome::Asked(Err(_))));
    });
}

pub(crate) fn a_request_waits_while_the_channel_is_full<R: Real>(_: &str) {
    run::<R>(&Limits::default(), |bench| {
        let (ours, driver) = Channel::pair().unwrap();
        let channel = bench.adopt(OwnedFd::from(ours));
        let hear = bench.submit(Op::Hear { channel: channel.clone() });
        let mut sent = 0;
        let waiting = loop {
            let ask = bench.submit(Op::Ask { channel: channel.clone(), dial: sent, port: PORT });
            if bench.is_pending(ask) {
                break ask;
            }
            assert!(matches!(bench.outcome(ask), Outcome::Asked(Ok(()))));
            sent += 1;
            assert!(sent < 100_000, "the channel is never full");
        };
        bench.assert_quiet();
        for dial in 0..sent {
            let (request, _) = driver.recv::<Request>().unwrap().unwrap();
            assert_eq!(request, Request::Dial { dial, port: PORT });
        }
        assert!(matches!(bench.outcome(waiting), Outcome::Asked(Ok(()))));
        let (request, _) = driver.recv::<Request>().unwrap().unwrap();
        assert_eq!(request, Request::Dial { dial: sent, port: PORT });
        assert!(bench.cancel(hear).is_none());
    });
}
