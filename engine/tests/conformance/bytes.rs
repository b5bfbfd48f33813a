//! Reading and sending: nothing lost, nothing twice, the end in its place.

use std::hash::{DefaultHasher, Hasher};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Instant;

use landfall_engine::limits::Limits;
use landfall_engine::ring::{Borrowed, Op, Outcome, Received, Token, Way};
use landfall_engine::sys::SocketError;
use rustix::event::PollFlags;
use rustix::net::{SendFlags, sockopt};

use crate::bench::{Bench, PATIENCE, Real, reset, run, tcp_pair, until_ready};

const WAYS: [Way; 2] = [Way::Copy, Way::Splice];
const BULK_BYTES: usize = 24 << 20;

pub(crate) fn a_read_waits_and_then_completes<R: Real>(_: &str) {
    run::<R>(&Limits::default(), |bench| {
        for (way, eager) in [(Way::Copy, false), (Way::Copy, true), (Way::Splice, false), (Way::Splice, true)]
        {
            let (ours, mut theirs) = tcp_pair();
            let ours = bench.adopt(ours);
            for round in 0..5u8 {
                let read = bench.recv(&ours, way, eager);
                assert!(bench.is_pending(read));
                bench.assert_quiet();
                theirs.write_all(&[round; 3]).unwrap();
                let loan = bench.bytes(read);
                assert_eq!(loan.way(), way);
                assert_eq!(bench.content(loan), [round; 3]);
            }
        }
    });
}

pub(crate) fn an_eager_read_takes_what_is_there<R: Real>(_: &str) {
    run::<R>(&Limits::default(), |bench| {
        for way in WAYS {
            let (ours, mut theirs) = tcp_pair();
            let ours = bench.adopt(ours);
            theirs.write_all(b"there").unwrap();
            until_ready(&ours, PollFlags::IN);
            let read = bench.recv(&ours, way, true);
            assert!(!bench.is_pending(read), "it had to wait");
            let loan = bench.bytes(read);
            assert_eq!(bench.content(loan), b"there");
        }
    });
}

pub(crate) fn a_read_finds_what_came_before_it<R: Real>(_: &str) {
    let limits = Limits { lease_bytes: 1024, ..Limits::default() };
    run::<R>(&limits, |bench| {
        let (ours, mut theirs) = tcp_pair();
        let ours = bench.adopt(ours);
        // The one edge is used up by the first read; the bytes are not.
        let read = bench.recv(&ours, Way::Copy, false);
        theirs.write_all(&[1; 10 * 1024]).unwrap();
        theirs.shutdown(Shutdown::Write).unwrap();
        until_ready(&ours, PollFlags::RDHUP);
        let mut taken = bench.bytes(read).bytes();
        while taken < 10 * 1024 {
            let read = bench.recv(&ours, Way::Copy, false);
            taken += bench.bytes(read).bytes();
        }
        let read = bench.recv(&ours, Way::Copy, false);
        assert!(matches!(bench.received(read), Received::Eof));

        // One that comes while nobody waits, after a read that was satisfied.
        let (ours, mut theirs) = tcp_pair();
        let ours = bench.adopt(ours);
        for _ in 0..3 {
            let read = bench.recv(&ours, Way::Copy, false);
            theirs.write_all(b"first").unwrap();
            drop(bench.bytes(read));
            theirs.write_all(b"second").unwrap();
            until_ready(&ours, PollFlags::IN);
            // The edge is told to nobody.
            bench.assert_quiet();
            let read = bench.recv(&ours, Way::Splice, false);
            assert_eq!(bench.bytes(read).bytes(), 6);
        }
    });
}

pub(crate) fn eof_comes_after_the_bytes<R: Real>(_: &str) {
    run::<R>(&Limits::default(), |bench| {
        for (way, eager) in [(Way::Copy, false), (Way::Copy, true), (Way::Splice, false), (Way::Splice, true)]
        {
            let (ours, mut theirs) = tcp_pair();
            let ours = bench.adopt(ours);
            theirs.write_all(b"the last").unwrap();
            theirs.shutdown(Shutdown::Write).unwrap();
            until_ready(&ours, PollFlags::RDHUP);
            let read = bench.recv(&ours, way, eager);
            let loan = bench.bytes(read);
            assert_eq!(bench.content(loan), b"the last");
            // It stays the end.
            for _ in 0..2 {
                let read = bench.recv(&ours, way, eager);
                assert!(matches!(bench.received(read), Received::Eof));
            }
        }
    });
}

pub(crate) fn bytes_before_a_reset_come_first<R: Real>(_: &str) {
    run::<R>(&Limits::default(), |bench| {
        for way in WAYS {
            let (ours, mut theirs) = tcp_pair();
            let ours = bench.adopt(ours);
            theirs.write_all(b"the last").unwrap();
            until_ready(&ours, PollFlags::IN);
            reset(theirs);
            until_ready(&ours, PollFlags::empty());
            let read = bench.recv(&ours, way, false);
            let loan = bench.bytes(read);
            assert_eq!(bench.content(loan), b"the last");
            let read = bench.recv(&ours, way, false);
            match bench.received(read) {
                Received::Failed(SocketError::Reset) => {}
                other => panic!("{way:?}: {other:?}"),
            }
        }
        // A read that waits is told of a reset.
        let (ours, theirs) = tcp_pair();
        let ours = bench.adopt(ours);
        let read = bench.recv(&ours, Way::Copy, false);
        reset(theirs);
        assert!(matches!(bench.received(read), Received::Failed(SocketError::Reset)));
    });
}

/// Fills `ours` until a send has to wait, and gives that send and the bytes handed over so far.
pub(crate) fn fill<R: Real>(bench: &mut Bench<R>, ours: &Rc<OwnedFd>, way: Way) -> (Token, usize) {
    let (source, mut writer) = tcp_pair();
    let source = bench.adopt(source);
    sockopt::set_socket_send_buffer_size(ours, 32 * 1024).unwrap();
    // A host's default may pace, and an acknowledgement may be held back for 200 ms (TCP_DELACK_MAX): until then what was
    // sent long ago still trickles out.
    sockopt::set_tcp_congestion(ours, "reno").unwrap();
    let mut bytes = 0;
    loop {
        writer.write_all(&[9; 30_000]).unwrap();
        let read = bench.recv(&source, way, false);
        let loan = bench.bytes(read);
        bytes += loan.bytes();
        let send = bench.send(ours, loan);
        if bench.is_pending(send) {
            bench.settle(send);
        }
        if bench.is_pending(send) {
            return (send, bytes);
        }
        bench.sent(send);
    }
}

pub(crate) fn a_send_ends_when_the_last_byte_has_left<R: Real>(_: &str) {
    for way in WAYS {
        run::<R>(&Limits::default(), |bench| {
            let (ours, mut theirs) = tcp_pair();
            let ours = bench.adopt(ours);
            let (send, bytes) = fill(bench, &ours, way);
            bench.assert_quiet();
            assert!(bench.is_pending(send));
            let reader = std::thread::spawn(move || {
                let mut taken = vec![0; bytes];
                theirs.read_exact(&mut taken).unwrap();
                taken.iter().all(|byte| *byte == 9)
            });
            bench.sent(send);
            assert!(reader.join().unwrap());
        });
    }
}

pub(crate) fn a_send_to_a_broken_connection_gives_the_loan_back<R: Real>(_: &str) {
    for way in WAYS {
        run::<R>(&Limits::default(), |bench| {
            let (ours, theirs) = tcp_pair();
            let ours = bench.adopt(ours);
            let (send, _) = fill(bench, &ours, way);
            reset(theirs);
            match bench.outcome(send) {
                Outcome::Sent(loan, Err(SocketError::Reset)) => assert!(loan.bytes() > 0),
                other => panic!("{way:?}: {other:?}"),
            }
        });
    }
}

pub(crate) fn a_blocked_send_to_a_half_closed_peer_sleeps<R: Real>(_: &str) {
    for way in WAYS {
        run::<R>(&Limits::default(), |bench| {
            let (ours, mut theirs) = tcp_pair();
            let ours = bench.adopt(ours);
            theirs.shutdown(Shutdown::Write).unwrap();
            until_ready(&ours, PollFlags::RDHUP);
            let (send, bytes) = fill(bench, &ours, way);
            bench.assert_quiet();
            bench.assert_quiet();
            let reader = std::thread::spawn(move || theirs.read_exact(&mut vec![0; bytes]).unwrap());
            bench.sent(send);
            reader.join().unwrap();
            // And one that is cancelled, and one that is broken off.
            for cancels in [true, false] {
                let (ours, theirs) = tcp_pair();
                let ours = bench.adopt(ours);
                theirs.shutdown(Shutdown::Write).unwrap();
                until_ready(&ours, PollFlags::RDHUP);
                let (send, _) = fill(bench, &ours, way);
                bench.assert_quiet();
                if cancels {
                    assert!(bench.cancel(send).is_some_and(|loan| loan.bytes() > 0));
                } else {
                    reset(theirs);
                    assert!(matches!(bench.outcome(send), Outcome::Sent(_, Err(SocketError::Reset))));
                }
            }
        });
    }
}

fn pattern(state: &mut u64, bytes: &mut [u8]) {
    for chunk in bytes.chunks_mut(8) {
        // xorshift64
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        chunk.copy_from_slice(&state.to_ne_bytes()[..chunk.len()]);
    }
}

/// Relays bulk from one thread to another through the ring, and compares what went in with what came out.
fn relays<R: Real>(ways: fn(usize) -> Way) {
    run::<R>(&Limits::default(), |bench| {
        let (source, mut writer) = tcp_pair();
        let (sink, mut reader) = tcp_pair();
        let (source, sink) = (bench.adopt(source), bench.adopt(sink));
        let writing = std::thread::spawn(move || {
            let (mut state, mut hasher) = (0x9E37_79B9_7F4A_7C15, DefaultHasher::new());
            let mut block = vec![0; 256 * 1024];
            for _ in 0..BULK_BYTES / block.len() {
                pattern(&mut state, &mut block);
                hasher.write(&block);
                writer.write_all(&block).unwrap();
            }
            hasher.finish()
        });
        let reading = std::thread::spawn(move || {
            let mut arrived = Vec::with_capacity(BULK_BYTES);
            reader.read_to_end(&mut arrived).unwrap();
            let mut hasher = DefaultHasher::new();
            arrived.chunks(256 * 1024).for_each(|block| hasher.write(block));
            (arrived.len(), hasher.finish())
        });
        for round in 0.. {
            let read = bench.recv(&source, ways(round), round % 3 == 0);
            match bench.received(read) {
                Received::Bytes(loan) => {
                    let send = bench.send(&sink, loan);
                    bench.sent(send);
                }
                Received::Eof => break,
                other => panic!("{other:?}"),
            }
        }
        bench.ring.shutdown_write(&sink).unwrap();
        assert_eq!(reading.join().unwrap(), (BULK_BYTES, writing.join().unwrap()));
    });
}

pub(crate) fn copied_bytes_arrive_in_order<R: Real>(_: &str) {
    relays::<R>(|_| Way::Copy);
}

pub(crate) fn spliced_bytes_arrive_in_order<R: Real>(_: &str) {
    relays::<R>(|_| Way::Splice);
}

pub(crate) fn mixed_ways_arrive_in_order<R: Real>(_: &str) {
    relays::<R>(|round| WAYS[round / 3 % 2]);
}

pub(crate) fn an_urgent_byte_stays_in_the_stream<R: Real>(_: &str) {
    run::<R>(&Limits::default(), |bench| {
        for way in WAYS {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            listener.set_nonblocking(true).unwrap();
            // As the engine tunes its listeners; their connections inherit it.
            sockopt::set_socket_oobinline(&listener, true).unwrap();
            let address = listener.local_addr().unwrap();
            let listener = bench.adopt(listener);
            let accept = bench.submit(Op::Accept { listener });
            let mut theirs = TcpStream::connect(address).unwrap();
            let Outcome::Accepted(Ok((ours, _))) = bench.outcome(accept) else { panic!("not accepted") };
            let mut arrived = Vec::new();
            let read = bench.recv(&ours, way, false);
            theirs.write_all(b"ab").unwrap();
            rustix::net::send(&theirs, b"!", SendFlags::OOB).unwrap();
            theirs.write_all(b"cd").unwrap();
            let loan = bench.bytes(read);
            arrived.extend(bench.content(loan));
            // A read stops at the mark, so there are several.
            while arrived.len() < 5 {
                let read = bench.recv(&ours, way, false);
                match bench.received(read) {
                    Received::Bytes(loan) => arrived.extend(bench.content(loan)),
                    // No splice gets past the mark; a copy does.
                    Received::NoLoan(Way::Splice) => {
                        let read = bench.recv(&ours, Way::Copy, false);
                        let loan = bench.bytes(read);
                        arrived.extend(bench.content(loan));
                    }
                    other => panic!("{other:?}"),
                }
            }
            assert_eq!(arrived, b"ab!cd", "{way:?}");
        }
    });
}

pub(crate) fn without_a_loan_the_read_says_so_only_when_there_is_something<R: Real>(_: &str) {
    let limits = Limits { leases_max: 1, pipes_max: 1, ..Limits::default() };
    for way in WAYS {
        run::<R>(&limits, |bench| {
            let (first, mut first_peer) = tcp_pair();
            let (second, mut second_peer) = tcp_pair();
            let (first, second) = (bench.adopt(first), bench.adopt(second));
            // The second has been read before, so that its readiness is remembered and out of date.
            let read = bench.recv(&second, way, false);
            second_peer.write_all(b"early").unwrap();
            drop(bench.bytes(read));

            let read = bench.recv(&first, way, false);
            first_peer.write_all(b"held").unwrap();
            let held = bench.bytes(read);
            assert!(!bench.ring.can_lend(way));
            let read = bench.recv(&second, way, false);
            bench.assert_quiet();
            second_peer.write_all(b"waits").unwrap();
            match bench.received(read) {
                Received::NoLoan(kind) => assert_eq!(kind, way),
                other => panic!("{other:?}"),
            }
            drop(held);
            assert!(bench.ring.can_lend(way));
            let read = bench.recv(&second, way, false);
            let loan = bench.bytes(read);
            assert_eq!(bench.content(loan), b"waits");
        });
    }
}

pub(crate) fn a_pipe_that_holds_bytes_is_not_lent_again<R: Real>(_: &str) {
    let limits = Limits { pipes_max: 1, ..Limits::default() };
    run::<R>(&limits, |bench| {
        let (ours, mut theirs) = tcp_pair();
        let ours = bench.adopt(ours);
        for text in [b"old", b"new"] {
            let read = bench.recv(&ours, Way::Splice, false);
            theirs.write_all(text).unwrap();
            let loan = bench.bytes(read);
            if text == b"new" {
                assert_eq!(bench.content(loan), b"new");
            }
        }
    });
}

pub(crate) fn unacknowledged_bytes_are_counted<R: Real>(_: &str) {
    run::<R>(&Limits::default(), |bench| {
        let (ours, mut theirs) = tcp_pair();
        let ours = bench.adopt(ours);
        assert_eq!(bench.ring.unacknowledged_bytes(&ours), 0);
        let (send, bytes) = fill(bench, &ours, Way::Copy);
        assert!(bench.ring.unacknowledged_bytes(&ours) > 0);
        let reader = std::thread::spawn(move || {
            theirs.read_exact(&mut vec![0; bytes]).unwrap();
            theirs
        });
        bench.sent(send);
        let _theirs = reader.join().unwrap();
        let until = Instant::now() + PATIENCE;
        while bench.ring.unacknowledged_bytes(&ours) > 0 {
            assert!(Instant::now() < until, "never acknowledged");
            std::thread::yield_now();
        }
    });
}
