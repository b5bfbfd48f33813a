//! The two ends of a connection: a server inside, a client outside, and what each observes.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::{set_socket_linger, set_socket_reuseaddr};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::{Checker, Pattern};
use crate::{Namespace, TIMEOUT};

/// How the readable side of a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// A FIN.
    Eof,
    /// A reset.
    Reset,
}

/// A listening socket inside a namespace.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
}

impl Server {
    /// Listens on `address` (port 0: any) inside `namespace`.
    ///
    /// # Panics
    /// If the address cannot be bound.
    #[track_caller]
    pub fn listen(namespace: &Namespace, address: &str) -> Server {
        Server::listen_backlog(namespace, address.parse().unwrap(), 4096, None)
    }

    /// The same with a given backlog and protocol (`None`: TCP).
    ///
    /// # Panics
    /// If the address cannot be bound.
    #[track_caller]
    pub fn listen_backlog(
        namespace: &Namespace,
        address: SocketAddr,
        backlog: i32,
        protocol: Option<rustix::net::Protocol>,
    ) -> Server {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let listener = namespace
            .run(|| -> Result<OwnedFd, rustix::io::Errno> {
                let socket =
                    rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, protocol)?;
                set_socket_reuseaddr(&socket, true)?;
                rustix::net::bind(&socket, &address)?;
                rustix::net::listen(&socket, backlog)?;
                Ok(socket)
            })
            .unwrap_or_else(|errno| panic!("{address} inside: {errno}"));
        Server::from_socket(listener)
    }

    /// Takes a listening socket.
    ///
    /// # Panics
    /// If it is not bound.
    pub fn from_socket(socket: OwnedFd) -> Server {
        let listener = TcpListener::from(socket);
        let address = listener.local_addr().unwrap();
        Server { listener, address }
    }

    /// The address of the listener.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The port of the listener.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Accepts the next connection.
    ///
    /// # Panics
    /// If none arrives.
    #[track_caller]
    pub fn accept(&self) -> TcpStream {
        let with_read_timeout = Timespec::try_from(TIMEOUT).unwrap();
        let ready =
            poll(&mut [PollFd::new(&self.listener, PollFlags::IN)], Some(&with_read_timeout)).unwrap();
        assert_eq!(ready, 1, "no connection to {} within {TIMEOUT:?}", self.address);
        with_timeouts(self.listener.accept().unwrap().0)
    }

    /// Returns whether a connection waits in the backlog.
    ///
    /// # Panics
    /// If `poll(2)` fails.
    pub fn has_pending_connection(&self) -> bool {
        poll(&mut [PollFd::new(&self.listener, PollFlags::IN)], Some(&Timespec::default())).unwrap() == 1
    }

    /// Serves every current and future connection, on `threads` threads that accept in turn.
    pub fn serve_in_turn(self, threads: usize, service: impl Fn(TcpStream) + Send + Sync + 'static) {
        let shared = std::sync::Arc::new((self.listener, service));
        for _ in 0..threads {
            let shared = shared.clone();
            std::thread::spawn(move || {
                while let Ok((stream, _)) = shared.0.accept() {
                    (shared.1)(with_timeouts(stream));
                }
            });
        }
    }

    /// Accepts every current and future connection on one thread, and serves each on another.
    pub fn serve(self, service: impl Fn(TcpStream) + Send + Sync + 'static) {
        let service = std::sync::Arc::new(service);
        std::thread::spawn(move || {
            while let Ok((stream, _)) = self.listener.accept() {
                let service = service.clone();
                std::thread::spawn(move || service(with_timeouts(stream)));
            }
        });
    }
}

/// Connects to `address` from the namespace of this process.
///
/// # Panics
/// If no listener accepts the connection.
#[track_caller]
pub fn connect(address: impl Into<SocketAddr>) -> TcpStream {
    let address = address.into();
    with_timeouts(TcpStream::connect(address).unwrap_or_else(|error| panic!("connect to {address}: {error}")))
}

/// Connects to `address` from inside `namespace`.
///
/// # Panics
/// If no listener accepts the connection.
#[track_caller]
pub fn connect_from(namespace: &Namespace, address: SocketAddr) -> TcpStream {
    namespace.run(|| connect(address))
}

/// Sets timeouts on a stream, so that no call blocks forever.
fn with_timeouts(stream: TcpStream) -> TcpStream {
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    stream.set_write_timeout(Some(TIMEOUT)).unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

/// Closes a connection with a reset.
///
/// # Panics
/// If the socket rejects the option.
pub fn reset(stream: TcpStream) {
    set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
    drop(stream);
}

/// Sends a FIN.
///
/// # Panics
/// If the connection is broken.
#[track_caller]
pub fn finish(stream: &TcpStream) {
    stream.shutdown(Shutdown::Write).unwrap();
}

/// Reads the available bytes as `read(2)` does, and retries after an interruption.
///
/// # Errors
/// Those of `read(2)`, except EINTR: any signal interrupts a read from a socket with a timeout (`signal(7)`).
pub fn read_some(mut stream: &TcpStream, buffer: &mut [u8]) -> std::io::Result<usize> {
    loop {
        match stream.read(buffer) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// Sends the first `count` bytes of a pattern.
///
/// # Panics
/// If the connection breaks, or the peer stops reading.
#[track_caller]
pub fn send_all(mut stream: &TcpStream, pattern: Pattern, count: u64) {
    let mut buffer = vec![0; 256 * 1024];
    let mut position = 0;
    while position < count {
        let now = usize::try_from((count - position).min(buffer.len() as u64)).unwrap();
        pattern.fill(position, &mut buffer[..now]);
        stream.write_all(&buffer[..now]).unwrap_or_else(|error| panic!("send at byte {position}: {error}"));
        position += now as u64;
    }
}

/// Reads up to byte `count` of the stream, and checks each byte.
///
/// # Panics
/// If the stream ends before, or a byte is wrong.
#[track_caller]
pub fn read_exactly(stream: &TcpStream, checker: &mut Checker, count: u64) {
    let mut buffer = vec![0; 256 * 1024];
    while checker.position() < count {
        let now = usize::try_from((count - checker.position()).min(buffer.len() as u64)).unwrap();
        match read_some(stream, &mut buffer[..now]) {
            Ok(0) => panic!("the stream ended at byte {} of {count}", checker.position()),
            Ok(bytes) => checker.check(&buffer[..bytes]),
            Err(error) => panic!("read at byte {} of {count}: {error}", checker.position()),
        }
    }
}

/// Reads exactly these bytes.
///
/// # Panics
/// If other bytes arrive, or none.
#[track_caller]
pub fn expect_bytes(mut stream: &TcpStream, wanted: &[u8]) {
    let mut bytes = vec![0; wanted.len()];
    stream.read_exact(&mut bytes).unwrap_or_else(|error| panic!("{error} instead of {} bytes", wanted.len()));
    assert_eq!(String::from_utf8_lossy(&bytes), String::from_utf8_lossy(wanted));
}

/// Reads to the end, checks each byte, and returns how the stream ended.
///
/// # Panics
/// If a byte is wrong, or the stream does not end.
#[track_caller]
pub fn read_to_end(stream: &TcpStream, checker: &mut Checker) -> End {
    let mut buffer = vec![0; 256 * 1024];
    loop {
        match read_some(stream, &mut buffer) {
            Ok(0) => return End::Eof,
            Ok(bytes) => checker.check(&buffer[..bytes]),
            Err(error) if is_broken(error.kind()) => return End::Reset,
            Err(error) => panic!("read at byte {}: {error}", checker.position()),
        }
    }
}

/// Returns whether an error means that the connection ended, rather than that the peer is slow.
pub(crate) fn is_broken(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::ConnectionAborted)
}
