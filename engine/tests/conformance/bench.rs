//! What every case works with: a ring that is watched for telling each operation once, and sockets.

use std::collections::HashMap;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::process::Command;
use std::rc::Rc;
use std::time::{Duration, Instant};

use landfall_engine::limits::Limits;
use landfall_engine::ring::{
    Borrowed, Completion, EpollRing, Loan, Op, OpKey, Outcome, Received, Ring, RingError, Submitted, Token,
    Unusable, UringRing, Way,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// How long something that must happen may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// How long is waited for something that must not happen.
pub(crate) const QUIET: Duration = Duration::from_millis(30);

/// A ring over the kernel.
pub(crate) trait Real: Ring<Socket = Rc<OwnedFd>, Loan = Loan> + Sized {
    fn make(limits: &Limits) -> Result<Self, Unusable>;
    fn lent(&self) -> (usize, usize);
}

impl Real for UringRing {
    fn make(limits: &Limits) -> Result<Self, Unusable> {
        UringRing::new(limits)
    }
    fn lent(&self) -> (usize, usize) {
        UringRing::lent(self)
    }
}

impl Real for EpollRing {
    fn make(limits: &Limits) -> Result<Self, Unusable> {
        EpollRing::new(limits)
    }
    fn lent(&self) -> (usize, usize) {
        EpollRing::lent(self)
    }
}

/// A ring under test.
pub(crate) struct Bench<R: Real> {
    pub(crate) ring: R,
    next_token: u64,
    pending: HashMap<Token, Option<OpKey>>,
    over: HashMap<Token, Outcome<R>>,
}

/// Runs one case. Where the machine has no io_uring its ring cannot be tested, which is said.
pub(crate) fn run<R: Real>(limits: &Limits, case: impl FnOnce(&mut Bench<R>)) {
    let ring = match R::make(limits) {
        Ok(ring) => ring,
        Err(unusable) if unusable.fall_back => {
            println!("skipped: {unusable}");
            return;
        }
        Err(unusable) => panic!("{unusable}"),
    };
    let mut bench = Bench { ring, next_token: 0, pending: HashMap::new(), over: HashMap::new() };
    case(&mut bench);
    assert!(bench.pending.is_empty(), "still in flight: {:?}", bench.pending);
    bench.over.clear();
    bench.assert_quiet();
    assert_eq!(bench.ring.lent(), (0, 0), "leases and pipes still lent");
}

impl<R: Real> Bench<R> {
    pub(crate) fn adopt(&mut self, descriptor: impl Into<OwnedFd>) -> Rc<OwnedFd> {
        self.ring.adopt(descriptor.into())
    }

    /// Submits under a token of its own, whether it is over at once or not.
    pub(crate) fn submit(&mut self, op: Op<R>) -> Token {
        self.next_token += 1;
        let token = Token(self.next_token);
        match self.ring.submit(token, op) {
            Submitted::Done(outcome) => {
                self.over.insert(token, outcome);
            }
            Submitted::Pending(key) => {
                self.pending.insert(token, Some(key));
            }
        }
        token
    }

    pub(crate) fn recv(&mut self, socket: &Rc<OwnedFd>, way: Way, eager: bool) -> Token {
        self.submit(Op::Recv { socket: socket.clone(), way, eager })
    }

    pub(crate) fn send(&mut self, socket: &Rc<OwnedFd>, loan: Loan) -> Token {
        self.submit(Op::Send { socket: socket.clone(), loan })
    }

    pub(crate) fn watch(&mut self, socket: &Rc<OwnedFd>) -> Token {
        self.submit(Op::Watch { socket: socket.clone() })
    }

    pub(crate) fn is_pending(&self, token: Token) -> bool {
        self.pending.contains_key(&token)
    }

    pub(crate) fn key(&self, token: Token) -> OpKey {
        self.pending[&token].unwrap()
    }

    pub(crate) fn turn(&mut self, until: Option<Instant>) -> Result<usize, RingError> {
        let mut completions: Vec<Completion<R>> = Vec::new();
        self.ring.turn(until, &mut completions)?;
        let told = completions.len();
        for Completion { token, outcome } in completions {
            assert!(self.pending.remove(&token).is_some(), "{token:?} was told, but is not in flight");
            assert!(self.over.insert(token, outcome).is_none(), "{token:?} was told twice");
        }
        Ok(told)
    }

    /// What an operation came to.
    pub(crate) fn outcome(&mut self, token: Token) -> Outcome<R> {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(outcome) = self.over.remove(&token) {
                return outcome;
            }
            assert!(Instant::now() < until, "{token:?} is not over after {PATIENCE:?}");
            self.turn(Some(until)).unwrap();
        }
    }

    /// Gives an operation the time that TCP takes to come to rest.
    pub(crate) fn settle(&mut self, token: Token) {
        let until = Instant::now() + Duration::from_millis(300);
        while self.is_pending(token) && Instant::now() < until {
            self.turn(Some(until)).unwrap();
        }
    }

    pub(crate) fn received(&mut self, token: Token) -> Received<Loan> {
        match self.outcome(token) {
            Outcome::Received(received) => received,
            other => panic!("a read came to {other:?}"),
        }
    }

    pub(crate) fn bytes(&mut self, token: Token) -> Loan {
        match self.received(token) {
            Received::Bytes(loan) => {
                assert!(loan.bytes() > 0);
                loan
            }
            other => panic!("bytes were expected and {other:?} came"),
        }
    }

    pub(crate) fn sent(&mut self, token: Token) {
        match self.outcome(token) {
            Outcome::Sent(loan, Ok(())) => assert_eq!(loan.bytes(), 0),
            other => panic!("a send came to {other:?}"),
        }
    }

    /// Cancels and gives the loan that comes back.
    pub(crate) fn cancel(&mut self, token: Token) -> Option<Loan> {
        let key = self.key(token);
        self.ring.cancel(key);
        match self.outcome(token) {
            Outcome::Cancelled(loan) => loan,
            other => panic!("an operation was cancelled and came to {other:?}"),
        }
    }

    /// Nothing is told for a while, and the ring sleeps all that while.
    pub(crate) fn assert_quiet(&mut self) {
        let until = Instant::now() + QUIET;
        let mut turns = 0;
        while Instant::now() < until {
            assert_eq!(self.turn(Some(until)).unwrap(), 0, "something was told: {:?}", self.over.keys());
            turns += 1;
        }
        // What is ready without being enough ends a wait now and then.
        assert!(turns <= 4, "the ring went round {turns} times and told nothing");
    }

    /// What a loan holds, by sending it through a pair of sockets.
    pub(crate) fn content(&mut self, loan: Loan) -> Vec<u8> {
        let (near, far) = tcp_pair();
        let near = self.adopt(near);
        let mut held = vec![0; loan.bytes()];
        let token = self.send(&near, loan);
        let reader = std::thread::spawn(move || {
            std::io::Read::read_exact(&mut &far, &mut held).unwrap();
            held
        });
        self.sent(token);
        reader.join().unwrap()
    }
}

/// A connected pair: ours, which does not block, and theirs, which does.
pub(crate) fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let theirs = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (ours, _) = listener.accept().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_nodelay(true).unwrap();
    theirs.set_read_timeout(Some(PATIENCE)).unwrap();
    theirs.set_write_timeout(Some(PATIENCE)).unwrap();
    (ours, theirs)
}

/// Waits until a socket is ready for `events`; without a ring, so that the ring is told nothing by it.
pub(crate) fn until_ready(socket: impl AsFd, events: PollFlags) {
    let mut fds = [PollFd::from_borrowed_fd(socket.as_fd(), events)];
    let limit = Timespec { tv_sec: 20, tv_nsec: 0 };
    assert_eq!(poll(&mut fds, Some(&limit)).unwrap(), 1, "not {events:?} within 20 s");
}

/// Makes the close of `socket` a reset, and closes it.
pub(crate) fn reset(socket: TcpStream) {
    rustix::net::sockopt::set_socket_linger(&socket, Some(Duration::ZERO)).unwrap();
    drop(socket);
}

/// Runs the rest of a test in a process of its own, for what changes a whole process. True in that process.
pub(crate) fn is_alone(test: &str) -> bool {
    if std::env::var_os(ALONE).is_some_and(|name| name == test) {
        return true;
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(ALONE, test)
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    print!("{told}{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "it failed in a process of its own");
    assert!(told.contains("1 passed"), "there is no test of the name {test}");
    false
}

const ALONE: &str = "LANDFALL_TEST_ALONE";
