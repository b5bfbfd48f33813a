//! Background traffic: short connections in sequence, and long-lived connections.
//!
//! Both check every byte, and both report failures at their end, so that a case which kills processes in the meantime needs
//! no checks of its own.

use std::io::Write;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crate::tcp::{End, Server, connect, finish, read_exactly, read_some, read_to_end, send_all};
use crate::{Pattern, Rng, TIMEOUT, wait_until};

/// The length of the answer to one short connection, in bytes.
const ANSWER: u64 = 2_000;
/// The longest piece of a [`Conversation`], in bytes. Two of them fit into the buffers of any socket.
const PIECE_MAX: u64 = 16 * 1024;

/// Serves a client of a [`Flood`]: answers a seed with its pattern.
pub fn answer(stream: TcpStream) {
    let mut seed = [0; 8];
    let mut filled = 0;
    while filled < seed.len() {
        // A client that ends early gets no answer.
        let Ok(bytes @ 1..) = read_some(&stream, &mut seed[filled..]) else { return };
        filled += bytes;
    }
    send_all(&stream, Pattern::new(u64::from_le_bytes(seed)), ANSWER);
    finish(&stream);
    // The server sends its FIN first and waits for the client's.
    let _ = read_some(&stream, &mut [0]);
}

/// Makes one short connection to a port of the host; the seed selects the address family.
///
/// # Errors
/// The error, and the step at which it occurred.
pub fn visit(port: u16, seed: u64) -> Result<(), String> {
    let address = if seed.is_multiple_of(2) {
        SocketAddr::from((Ipv4Addr::LOCALHOST, port))
    } else {
        SocketAddr::from((Ipv6Addr::LOCALHOST, port))
    };
    let mut stream = TcpStream::connect(address).map_err(|error| format!("connect to {address}: {error}"))?;
    let reported =
        stream.set_read_timeout(Some(TIMEOUT)).and_then(|()| stream.write_all(&seed.to_le_bytes()));
    reported.map_err(|error| format!("send to {address}: {error}"))?;
    let mut checker = Pattern::new(seed).checker();
    match read_to_end(&stream, &mut checker) {
        End::Eof if checker.position() == ANSWER => Ok(()),
        end => Err(format!("read from {address}: {end:?} after {} bytes", checker.position())),
    }
}

#[derive(Debug, Default)]
struct Visits {
    over: AtomicBool,
    begun: AtomicU64,
    failures: Mutex<Vec<String>>,
}

/// Clients that connect to one port in sequence, several at once, until it is dropped.
#[derive(Debug)]
pub struct Flood {
    visits: Arc<Visits>,
    threads: Vec<JoinHandle<()>>,
}

impl Flood {
    /// Starts this many clients at a time.
    pub fn start(port: u16, at_once: usize) -> Flood {
        let visits = Arc::new(Visits::default());
        let visitor = |visits: Arc<Visits>| {
            move || {
                while !visits.over.load(Ordering::Relaxed) {
                    let seed = visits.begun.fetch_add(1, Ordering::Relaxed);
                    if let Err(failure) = visit(port, seed) {
                        visits.failures.lock().unwrap_or_else(PoisonError::into_inner).push(failure);
                    }
                }
            }
        };
        let threads = (0..at_once).map(|_| std::thread::spawn(visitor(Arc::clone(&visits)))).collect();
        Flood { visits, threads }
    }

    /// Waits for this many further connections.
    ///
    /// # Panics
    /// If they do not happen, or one has failed.
    #[track_caller]
    pub fn wait_for_progress(&self, count: u64) {
        let until = self.visits.begun.load(Ordering::Relaxed) + count;
        wait_until("more visits", || match self.visits.begun.load(Ordering::Relaxed) {
            visits if visits >= until => Ok(()),
            visits => Err(visits),
        });
        self.check();
    }

    /// Stops the clients, and returns the number of connections, all of which succeeded.
    ///
    /// # Panics
    /// If one failed.
    #[track_caller]
    pub fn end(mut self) -> u64 {
        self.visits.over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
        self.check();
        self.visits.begun.load(Ordering::Relaxed)
    }

    #[track_caller]
    fn check(&self) {
        let failures = self.visits.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let some = &failures[..failures.len().min(5)];
        assert!(failures.is_empty(), "{} visits failed: {some:#?}", failures.len());
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.visits.over.store(true, Ordering::Relaxed);
    }
}

#[derive(Debug, Default)]
struct Progress {
    over: AtomicBool,
    bytes: AtomicU64,
}

/// A connection on which both ends send and check without end: a piece in one direction, then as many bytes back.
#[derive(Debug)]
pub struct Conversation {
    progress: Arc<Progress>,
    client: Option<JoinHandle<()>>,
    server: Option<JoinHandle<()>>,
}

impl Conversation {
    /// Connects to a port of the host that leads to `server`.
    ///
    /// # Panics
    /// If the connection fails.
    #[track_caller]
    pub fn start(port: u16, server: &Server, seed: u64) -> Conversation {
        let (client, accepted) = (connect((Ipv4Addr::LOCALHOST, port)), server.accept());
        let progress = Arc::new(Progress::default());
        let (there, back) = (Pattern::new(2 * seed), Pattern::new(2 * seed + 1));
        let shared = Arc::clone(&progress);
        Conversation {
            progress,
            client: Some(std::thread::spawn(move || run_client(&client, there, back, &shared))),
            server: Some(std::thread::spawn(move || run_server(&accepted, there, back))),
        }
    }

    /// Waits until more bytes have been exchanged.
    ///
    /// # Panics
    /// If none are, or a byte is wrong.
    #[track_caller]
    pub fn wait_for_progress(&mut self) {
        let until = self.progress.bytes.load(Ordering::Relaxed) + PIECE_MAX;
        wait_until("more of a conversation", || {
            if self.client.as_ref().is_some_and(JoinHandle::is_finished) {
                self.join();
            }
            match self.progress.bytes.load(Ordering::Relaxed) {
                bytes if bytes >= until => Ok(()),
                bytes => Err(bytes),
            }
        });
    }

    /// Closes the connection with FINs, and returns how many bytes went in each direction, all of them right.
    ///
    /// # Panics
    /// If a byte was wrong, or the connection ended before.
    #[track_caller]
    pub fn end(mut self) -> u64 {
        self.progress.over.store(true, Ordering::Relaxed);
        self.join();
        self.progress.bytes.load(Ordering::Relaxed)
    }

    fn join(&mut self) {
        for thread in [self.client.take(), self.server.take()].into_iter().flatten() {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
    }
}

impl Drop for Conversation {
    fn drop(&mut self) {
        self.progress.over.store(true, Ordering::Relaxed);
    }
}

fn run_client(stream: &TcpStream, there: Pattern, back: Pattern, progress: &Progress) {
    let mut lengths = Rng::new(crate::seed());
    let mut checker = back.checker();
    let mut printed = 0;
    while !progress.over.load(Ordering::Relaxed) {
        let until = printed + 1 + lengths.below(PIECE_MAX);
        send_pattern(stream, there, printed, until);
        read_exactly(stream, &mut checker, until);
        printed = until;
        progress.bytes.store(printed, Ordering::Relaxed);
    }
    finish(stream);
    assert_eq!(read_to_end(stream, &mut checker), End::Eof);
    assert_eq!(checker.position(), printed);
}

fn run_server(stream: &TcpStream, there: Pattern, back: Pattern) {
    let mut checker = there.checker();
    let mut buffer = vec![0; usize::try_from(PIECE_MAX).unwrap()];
    loop {
        let before = checker.position();
        match read_some(stream, &mut buffer) {
            Ok(0) => return finish(stream),
            Ok(count) => checker.check(&buffer[..count]),
            Err(error) => panic!("read inside at byte {before}: {error}"),
        }
        send_pattern(stream, back, before, checker.position());
    }
}

/// Sends the bytes of a pattern from one position to another.
fn send_pattern(mut stream: &TcpStream, pattern: Pattern, from: u64, until: u64) {
    let mut bytes = vec![0; usize::try_from(until - from).unwrap()];
    pattern.fill(from, &mut bytes);
    stream.write_all(&bytes).unwrap_or_else(|error| panic!("send at byte {from}: {error}"));
}
