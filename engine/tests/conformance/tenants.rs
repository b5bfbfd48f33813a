//! Several sockets at the same time, and successive sockets with the same descriptor number.

use std::collections::{HashSet, VecDeque};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;

use landfall_engine::limits::Limits;
use landfall_engine::reactor::{Event, EventKind, Readiness, Received, TransferMode};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::bench::{Bench, MODES, Real, reset, run, tcp_pair};
use crate::bytes::fill;

pub(crate) fn both_sides_of_a_socket_are_reported<P: Real>(_: &str) {
    run::<P>(&Limits::default(), |bench| {
        let (ours, mut theirs) = tcp_pair();
        let key = bench.register(ours);
        let (held, bytes) = fill(bench, key, TransferMode::Copy);
        bench.assert_quiet();
        // Readable while writes are blocked, and writable without bytes to read.
        theirs.write_all(b"in").unwrap();
        bench.await_ready(key, Readiness::IN);
        assert!(!bench.reactor.readiness(key).contains(Readiness::OUT));
        assert_eq!(bench.receive(key, TransferMode::Copy).0, Received::Bytes(2));
        let reading = std::thread::spawn(move || {
            theirs.read_exact(&mut vec![0; bytes]).unwrap();
            theirs
        });
        bench.write_out(key, held);
        let theirs = reading.join().unwrap();
        reset(theirs);
        bench.await_ready(key, Readiness::ERR);
        assert!(matches!(bench.receive(key, TransferMode::Copy).0, Received::Failed(_)));
    });
}

pub(crate) fn a_thousand_sockets_are_all_reported<P: Real>(_: &str) {
    run::<P>(&Limits::default(), |bench| {
        // More than one batch of the kernel, and more requests than fit one submission.
        let mut theirs = Vec::new();
        let mut tokens = HashSet::new();
        for _ in 0..1_000 {
            let (near, far) = unix_pair();
            tokens.insert(bench.register_as(near).1);
            theirs.push(far);
        }
        bench.drain_events();
        bench.events.clear();
        for far in &theirs {
            rustix::io::write(far, b"all at once").unwrap();
        }
        let mut reported = HashSet::new();
        bench.until("all are reported", |bench| {
            reported.extend(bench.events.drain(..).map(|event| event.token));
            reported.len() == tokens.len()
        });
        assert_eq!(reported, tokens);
    });
}

fn unix_pair() -> (OwnedFd, OwnedFd) {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap()
}

/// A splitmix64 sequence; the same seed gives the same sequence.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        (mixed ^ (mixed >> 27)) % sides
    }
}

/// A duplicate of a descriptor that the reactor has closed, and the other end while it is open.
type HeldDuplicate = (OwnedFd, Option<OwnedFd>);

pub(crate) fn a_reused_descriptor_number_gets_no_old_events<P: Real>(_: &str) {
    run::<P>(&Limits::default(), |bench| {
        let mut dice = Dice(20_260_131);
        // A socket that was passed to another process stays open there, and still has events.
        let mut duplicates: VecDeque<HeldDuplicate> = VecDeque::new();
        for _ in 0..5_000 {
            let (near, far) = unix_pair();
            let duplicate = (dice.roll(4) == 0).then(|| near.try_clone().unwrap());
            let far = one_tenancy(bench, &mut dice, near, far);
            if let (Some(duplicate), Some(far)) = (duplicate, far) {
                duplicates.push_back((duplicate, Some(far)));
                if duplicates.len() > 8 {
                    duplicates.pop_front();
                }
            }
            cause_events(&mut dice, &mut duplicates);
        }
        duplicates.clear();
    });
}

/// Registers a new socket, checks that only its own peer causes events, and closes it. Returns the peer if it is still open.
fn one_tenancy<P: Real>(
    bench: &mut Bench<P>,
    dice: &mut Dice,
    near: OwnedFd,
    far: OwnedFd,
) -> Option<OwnedFd> {
    let mode = MODES[usize::from(dice.roll(3) == 0)];
    bench.events.clear();
    let (key, token) = bench.register_as(near);
    bench.await_ready(key, Readiness::OUT);
    let own = Event { token, kind: EventKind::Ready };
    assert!(bench.events.drain(..).all(|event| event == own), "an event of an earlier socket");
    assert!(!bench.reactor.is_readable(key), "readiness of an earlier socket");
    let far = match dice.roll(4) {
        0 => Some(far),
        1 => {
            drop(far);
            assert_eq!(bench.receive(key, mode).0, Received::Eof);
            None
        }
        rolled => {
            let text = [7; 5];
            rustix::io::write(&far, &text).unwrap();
            assert_eq!(bench.receive(key, mode).0, Received::Bytes(text.len()));
            // Sometimes the socket is closed with an edge that no call consumed.
            if rolled == 3 {
                rustix::io::write(&far, &text).unwrap();
            }
            Some(far)
        }
    };
    bench.reactor.close(key);
    far
}

/// Causes events on descriptors that the reactor has closed.
fn cause_events(dice: &mut Dice, duplicates: &mut VecDeque<HeldDuplicate>) {
    for _ in 0..dice.roll(3) {
        let Some((duplicate, far)) = duplicates.pop_front() else { return };
        match (dice.roll(3), far) {
            // The last holder closes it.
            (0, _) => {}
            // Its peer closes, and it stays open.
            (1, _) => duplicates.push_back((duplicate, None)),
            (_, far) => {
                if let Some(far) = &far {
                    let _ = rustix::io::write(far, b"boo");
                }
                duplicates.push_back((duplicate, far));
            }
        }
    }
}
