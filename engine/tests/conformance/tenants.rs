//! Several operations on one descriptor, and several descriptors in turn under one number.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Instant;

use landfall_engine::limits::Limits;
use landfall_engine::ring::{Borrowed, Outcome, Received, Way};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::bench::{Bench, Real, reset, run, tcp_pair};
use crate::bytes::fill;

pub(crate) fn three_operations_wait_on_one_socket<R: Real>(_: &str) {
    run::<R>(&Limits::default(), |bench| {
        let (ours, mut theirs) = tcp_pair();
        let ours = bench.adopt(ours);
        let watch = bench.watch(&ours);
        let read = bench.recv(&ours, Way::Copy, false);
        let (send, handed) = fill(bench, &ours, Way::Copy);
        bench.assert_quiet();
        // Each is told of its own.
        theirs.write_all(b"in").unwrap();
        let loan = bench.bytes(read);
        assert_eq!(bench.content(loan), b"in");
        assert!(bench.is_pending(send) && bench.is_pending(watch));
        let read = bench.recv(&ours, Way::Splice, false);
        let reader = std::thread::spawn(move || {
            theirs.read_exact(&mut vec![0; handed]).unwrap();
            theirs
        });
        bench.sent(send);
        let theirs = reader.join().unwrap();
        assert!(bench.is_pending(read) && bench.is_pending(watch));
        reset(theirs);
        assert!(matches!(bench.outcome(watch), Outcome::Broken));
        assert!(matches!(bench.received(read), Received::Failed(_)));
    });
}

fn unix_pair() -> (OwnedFd, OwnedFd) {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap()
}

/// A splitmix64 sequence: the same for the same seed.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        (mixed ^ (mixed >> 27)) % sides
    }
}

/// A descriptor that the ring has closed, held by somebody else, and the other end while it is open.
type Ghost = (OwnedFd, Option<OwnedFd>);

pub(crate) fn a_number_s_next_tenant_hears_nothing_of_the_last<R: Real>(_: &str) {
    run::<R>(&Limits::default(), |bench| {
        let mut dice = Dice(20_260_131);
        // What was passed on to another process stays open there, and things go on happening to it.
        let mut ghosts: VecDeque<Ghost> = VecDeque::new();
        for _ in 0..10_000 {
            let (near, far) = unix_pair();
            let ghost = (dice.roll(4) == 0).then(|| near.try_clone().unwrap());
            let socket = bench.adopt(near);
            let far = one_tenancy(bench, &mut dice, &socket, far);
            drop(socket);
            if let (Some(ghost), Some(far)) = (ghost, far) {
                ghosts.push_back((ghost, Some(far)));
                if ghosts.len() > 8 {
                    ghosts.pop_front();
                }
            }
            haunt(&mut dice, &mut ghosts);
        }
    });
}

/// Operations on a fresh socket, of which nothing may come before its own peer does something. Gives the peer back if it is
/// still open.
fn one_tenancy<R: Real>(
    bench: &mut Bench<R>,
    dice: &mut Dice,
    socket: &Rc<OwnedFd>,
    far: OwnedFd,
) -> Option<OwnedFd> {
    let way = if dice.roll(3) == 0 { Way::Splice } else { Way::Copy };
    let read = bench.recv(socket, way, dice.roll(2) == 0);
    let watch = (dice.roll(2) == 0).then(|| bench.watch(socket));
    assert_eq!(bench.turn(Some(Instant::now())).unwrap(), 0, "a stale edge was told");
    let far = match dice.roll(4) {
        0 => {
            assert!(bench.cancel(read).is_none());
            Some(far)
        }
        1 => {
            drop(far);
            assert!(matches!(bench.received(read), Received::Eof));
            None
        }
        rolled => {
            let text = [7; 5];
            rustix::io::write(&far, &text).unwrap();
            let loan = bench.bytes(read);
            assert_eq!(loan.bytes(), text.len());
            // Sometimes an edge is left behind that nobody took.
            if rolled == 3 {
                rustix::io::write(&far, &text).unwrap();
            }
            Some(far)
        }
    };
    if let Some(watch) = watch {
        if far.is_some() {
            assert!(bench.cancel(watch).is_none());
        } else {
            assert!(matches!(bench.outcome(watch), Outcome::Broken));
        }
    }
    far
}

/// Something happens to descriptors that the ring has closed.
fn haunt(dice: &mut Dice, ghosts: &mut VecDeque<Ghost>) {
    for _ in 0..dice.roll(3) {
        let Some((ghost, far)) = ghosts.pop_front() else { return };
        match (dice.roll(3), far) {
            // It ends for everybody.
            (0, _) => {}
            // It breaks, and is held on to.
            (1, _) => ghosts.push_back((ghost, None)),
            (_, far) => {
                if let Some(far) = &far {
                    let _ = rustix::io::write(far, b"boo");
                }
                ghosts.push_back((ghost, far));
            }
        }
    }
}

pub(crate) fn a_socket_given_back_can_be_adopted_again<R: Real>(_: &str) {
    run::<R>(&Limits::default(), |bench| {
        let (near, far) = unix_pair();
        let socket = bench.adopt(near);
        let read = bench.recv(&socket, Way::Copy, false);
        assert!(bench.cancel(read).is_none());
        // The same descriptor of the same file, under the same number.
        let near = Rc::into_inner(socket).unwrap();
        let socket = bench.adopt(near);
        let read = bench.recv(&socket, Way::Copy, false);
        bench.assert_quiet();
        rustix::io::write(&far, b"again").unwrap();
        let loan = bench.bytes(read);
        assert_eq!(bench.content(loan), b"again");
    });
}
