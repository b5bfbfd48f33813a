//! The fixture of every case: a reactor, and sockets.

use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::process::Command;
use std::time::{Duration, Instant};

use landfall_engine::limits::Limits;
use landfall_engine::reactor::{
    Epoll, Event, EventKind, Held, KernelIo, Key, Poller, PooledBuffer, Reactor, Readiness, Received, Sent,
    SocketIo, Token, Transfer, TransferMode, Unusable, Uring,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Time limit for an expected event.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(20);
/// Time to wait for an event that must not come.
pub(crate) const QUIET: Duration = Duration::from_millis(30);

pub(crate) const MODES: [TransferMode; 2] = [TransferMode::Copy, TransferMode::Splice];

/// A poller over the kernel.
pub(crate) trait Real: Poller<Io = KernelIo> + Sized {
    fn make(limits: &Limits) -> Result<Reactor<Self>, Unusable>;
}

impl Real for Uring {
    fn make(limits: &Limits) -> Result<Reactor<Uring>, Unusable> {
        Uring::reactor(limits)
    }
}

impl Real for Epoll {
    fn make(limits: &Limits) -> Result<Reactor<Epoll>, Unusable> {
        Epoll::reactor(limits)
    }
}

/// A reactor under test.
pub(crate) struct Bench<P: Real> {
    pub(crate) reactor: Reactor<P>,
    next_token: u64,
    /// Every event so far.
    pub(crate) events: Vec<Event>,
}

/// Runs one case. If the machine has no io_uring, the case is skipped with a message.
pub(crate) fn run<P: Real>(limits: &Limits, case: impl FnOnce(&mut Bench<P>)) {
    let reactor = match P::make(limits) {
        Ok(reactor) => reactor,
        Err(unusable) if unusable.fall_back => {
            println!("skipped: {unusable}");
            return;
        }
        Err(unusable) => panic!("{unusable}"),
    };
    let mut bench = Bench { reactor, next_token: 0, events: Vec::new() };
    case(&mut bench);
    bench.drain_events();
    bench.assert_quiet();
    assert_eq!(bench.reactor.io().lent(), (0, 0), "buffers and pipes still lent");
}

impl<P: Real> Bench<P> {
    pub(crate) fn register(&mut self, socket: impl Into<OwnedFd>) -> Key {
        self.register_as(socket).0
    }

    pub(crate) fn register_as(&mut self, socket: impl Into<OwnedFd>) -> (Key, Token) {
        self.next_token += 1;
        let token = Token(self.next_token);
        (self.reactor.register(socket.into(), token), token)
    }

    /// Waits once, and returns the number of events.
    pub(crate) fn turn(&mut self, until: Option<Instant>) -> usize {
        let before = self.events.len();
        self.reactor.turn(until, &mut self.events).unwrap();
        self.events.len() - before
    }

    /// Turns until `condition` holds.
    #[track_caller]
    pub(crate) fn until(&mut self, what: &str, mut condition: impl FnMut(&mut Bench<P>) -> bool) {
        let until = Instant::now() + TIMEOUT;
        while !condition(self) {
            assert!(Instant::now() < until, "{what}: not within {TIMEOUT:?}");
            self.turn(Some(until));
        }
    }

    /// Waits until the reactor has reported a socket as ready for all of `readiness`.
    #[track_caller]
    pub(crate) fn await_ready(&mut self, key: Key, readiness: Readiness) {
        self.until(&format!("{readiness:?}"), |bench| bench.reactor.readiness(key).contains(readiness));
    }

    /// Waits for the event that a socket was closed.
    #[track_caller]
    pub(crate) fn await_closed(&mut self, token: Token) {
        let closed = Event { token, kind: EventKind::Closed };
        self.until("closed", |bench| bench.events.contains(&closed));
    }

    /// Receives the pending events, such as the first one of each registration.
    pub(crate) fn drain_events(&mut self) {
        while self.turn(Some(Instant::now() + QUIET)) > 0 {}
    }

    /// Submits the queued requests to the kernel.
    pub(crate) fn submit(&mut self) {
        self.turn(Some(Instant::now()));
    }

    /// Checks that no event comes for some time, and that the poller sleeps during it.
    #[track_caller]
    pub(crate) fn assert_quiet(&mut self) {
        let until = Instant::now() + QUIET;
        let mut turns = 0;
        while Instant::now() < until {
            assert_eq!(self.turn(Some(until)), 0, "an event came: {:?}", self.events.last());
            turns += 1;
        }
        assert!(turns <= 4, "the poller returned {turns} times without an event");
    }

    /// Reads once into a new buffer, after the socket was reported as readable.
    #[track_caller]
    pub(crate) fn receive(&mut self, key: Key, mode: TransferMode) -> (Received, PooledBuffer) {
        loop {
            self.until("readable", |bench| bench.reactor.is_readable(key));
            let mut buffer = self.reactor.io().lend(mode).unwrap();
            let received = self.reactor.on_socket(key, |io, socket| io.receive(socket, &mut buffer)).unwrap();
            if received != Received::Empty {
                return (received, buffer);
            }
            self.turn(Some(Instant::now() + TIMEOUT));
        }
    }

    /// Moves all bytes from one socket to another until the source ends, is empty, or the sink is blocked.
    pub(crate) fn pump(&mut self, from: Key, to: Key, mode: TransferMode) -> Pumped {
        let mut bytes = 0;
        loop {
            if !self.reactor.is_readable(from) {
                return Pumped { bytes, held: None, ended: false };
            }
            match self.reactor.transfer(from, to, mode) {
                Transfer::Moved { bytes: moved, .. } => bytes += moved,
                Transfer::Empty => return Pumped { bytes, held: None, ended: false },
                Transfer::Eof => return Pumped { bytes, held: None, ended: true },
                Transfer::Blocked { bytes: read, held } => {
                    return Pumped { bytes: bytes + read, held: Some(held), ended: false };
                }
                // A copy finds the end of a spliced stream.
                Transfer::Unavailable(TransferMode::Splice) => {
                    return self.pump(from, to, TransferMode::Copy).after(bytes);
                }
                other => panic!("{mode:?}: {other:?}"),
            }
        }
    }

    /// Writes held bytes until all are written.
    #[track_caller]
    pub(crate) fn write_out(&mut self, to: Key, mut held: PooledBuffer) {
        while self.reactor.write(to, &mut held) != Sent::All {
            assert!(held.bytes() > 0);
            self.await_ready(to, Readiness::OUT);
        }
    }
}

/// The result of [`Bench::pump`].
#[derive(Debug)]
pub(crate) struct Pumped {
    pub(crate) bytes: usize,
    pub(crate) held: Option<PooledBuffer>,
    pub(crate) ended: bool,
}

impl Pumped {
    fn after(mut self, bytes: usize) -> Pumped {
        self.bytes += bytes;
        self
    }
}

/// Returns a connected pair: the first, non-blocking, for the reactor, and its blocking peer.
pub(crate) fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let theirs = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (ours, _) = listener.accept().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_nodelay(true).unwrap();
    theirs.set_read_timeout(Some(TIMEOUT)).unwrap();
    theirs.set_write_timeout(Some(TIMEOUT)).unwrap();
    (ours, theirs)
}

/// Waits without the reactor until a socket is ready for `events`, so that the reactor's state does not change.
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

/// Runs the rest of a test in a process of its own, because it changes the whole process. Returns true in that process.
pub(crate) fn is_alone(test: &str) -> bool {
    if std::env::var_os(ALONE).is_some_and(|name| name == test) {
        return true;
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(ALONE, test)
        .output()
        .unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    print!("{printed}{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "it failed in a process of its own");
    assert!(printed.contains("1 passed"), "there is no test of the name {test}");
    false
}

const ALONE: &str = "LANDFALL_TEST_ALONE";
