//! The ends of a connection: a server inside, a client outside, and what each can see.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::{set_socket_linger, set_socket_reuseaddr};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::{Checker, Pattern};
use crate::{Namespace, PATIENCE};

/// How what one can read of a connection ended.
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
    /// When the address cannot be had.
    #[track_caller]
    pub fn listen(namespace: &Namespace, address: &str) -> Server {
        Server::listen_backlog(namespace, address.parse().unwrap(), 4096, None)
    }

    /// The same with a backlog and a protocol (`None`: TCP) of one's own.
    ///
    /// # Panics
    /// When the address cannot be had.
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

    /// Takes a socket that listens already.
    ///
    /// # Panics
    /// When it is not bound.
    pub fn from_socket(socket: OwnedFd) -> Server {
        let listener = TcpListener::from(socket);
        let address = listener.local_addr().unwrap();
        Server { listener, address }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Takes the next connection.
    ///
    /// # Panics
    /// When none comes.
    #[track_caller]
    pub fn accept(&self) -> TcpStream {
        let patience = Timespec::try_from(PATIENCE).unwrap();
        let ready = poll(&mut [PollFd::new(&self.listener, PollFlags::IN)], Some(&patience)).unwrap();
        assert_eq!(ready, 1, "nobody connected to {} within {PATIENCE:?}", self.address);
        patient(self.listener.accept().unwrap().0)
    }

    /// Whether a connection waits to be taken.
    ///
    /// # Panics
    /// When it cannot be looked.
    pub fn has_caller(&self) -> bool {
        poll(&mut [PollFd::new(&self.listener, PollFlags::IN)], Some(&Timespec::default())).unwrap() == 1
    }

    /// Serves every connection, now and later, on `threads` threads that take them in turn.
    pub fn serve_in_turn(self, threads: usize, service: impl Fn(TcpStream) + Send + Sync + 'static) {
        let shared = std::sync::Arc::new((self.listener, service));
        for _ in 0..threads {
            let shared = shared.clone();
            std::thread::spawn(move || {
                while let Ok((stream, _)) = shared.0.accept() {
                    (shared.1)(patient(stream));
                }
            });
        }
    }

    /// Takes every connection, now and later, on a thread of its own, and serves it on another.
    pub fn serve(self, service: impl Fn(TcpStream) + Send + Sync + 'static) {
        let service = std::sync::Arc::new(service);
        std::thread::spawn(move || {
            while let Ok((stream, _)) = self.listener.accept() {
                let service = service.clone();
                std::thread::spawn(move || service(patient(stream)));
            }
        });
    }
}

/// Connects to `address` from this process's own namespace.
///
/// # Panics
/// When nobody listens there.
#[track_caller]
pub fn connect(address: impl Into<SocketAddr>) -> TcpStream {
    let address = address.into();
    patient(TcpStream::connect(address).unwrap_or_else(|error| panic!("connect to {address}: {error}")))
}

/// Connects to `address` from inside `namespace`.
///
/// # Panics
/// When nobody listens there.
#[track_caller]
pub fn connect_from(namespace: &Namespace, address: SocketAddr) -> TcpStream {
    namespace.run(|| connect(address))
}

/// A stream on which nothing waits for ever.
fn patient(stream: TcpStream) -> TcpStream {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

/// Ends a connection with a reset.
///
/// # Panics
/// When the socket does not take the option.
pub fn reset(stream: TcpStream) {
    set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
    drop(stream);
}

/// Sends a FIN.
///
/// # Panics
/// When the connection is broken.
#[track_caller]
pub fn finish(stream: &TcpStream) {
    stream.shutdown(Shutdown::Write).unwrap();
}

/// Reads what comes next, as `read(2)` does but for interruptions.
///
/// # Errors
/// Those of `read(2)`; on a socket with a timeout it is interrupted by any signal (`signal(7)`), and goes on then.
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
/// When the connection breaks, or nobody reads.
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

/// Reads up to byte `count` of the stream, and checks each.
///
/// # Panics
/// When the stream ends before, or a byte is wrong.
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
/// When others come, or none.
#[track_caller]
pub fn read_these(mut stream: &TcpStream, wanted: &[u8]) {
    let mut bytes = vec![0; wanted.len()];
    stream.read_exact(&mut bytes).unwrap_or_else(|error| panic!("{error} instead of {} bytes", wanted.len()));
    assert_eq!(String::from_utf8_lossy(&bytes), String::from_utf8_lossy(wanted));
}

/// Reads to the end, checks each byte, and tells how it ended.
///
/// # Panics
/// When a byte is wrong, or no end comes.
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

/// Whether an error says that the peer is gone rather than slow.
pub(crate) fn is_broken(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::ConnectionAborted)
}
