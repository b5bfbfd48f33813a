//! A port of a namespace, published on the host as Docker's proxy does it: it passes bytes, FIN and reset on, with two
//! threads per connection.

use std::io::Write;
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::Recorder;
use crate::{Namespace, read_some, reset};

/// A published port. Dropping it stops the listener.
#[derive(Debug)]
pub struct Published {
    address: SocketAddr,
    over: Arc<AtomicBool>,
    /// The bytes that clients have sent.
    recorder: Recorder,
}

impl Published {
    /// Publishes a port of `inside` on any free port of the host.
    ///
    /// # Panics
    /// If no port is free.
    pub fn start(inside: Namespace, port: u16) -> Published {
        Published::start_at(0, inside, port)
    }

    /// Publishes a port of `inside` on this port of the host (0: any).
    ///
    /// # Panics
    /// If the port is in use.
    pub fn start_at(host: u16, inside: Namespace, port: u16) -> Published {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, host)).unwrap();
        let address = listener.local_addr().unwrap();
        let recorder = Recorder::default();
        let recording = recorder.clone();
        let over = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&over);
        std::thread::spawn(move || {
            while let Ok((outer, _)) = listener.accept() {
                if ended.load(Ordering::Relaxed) {
                    return;
                }
                let target = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
                match inside.run(|| TcpStream::connect(target)) {
                    Ok(inner) => join(outer, inner, &recording),
                    Err(_) => reset(outer),
                }
            }
        });
        Published { address, over, recorder }
    }

    /// Returns the bytes that clients have sent over a WebSocket, unmasked. Meant for one client at a time.
    pub fn recorded(&self) -> String {
        self.recorder.text()
    }

    /// The port on the host.
    pub fn port(&self) -> u16 {
        self.address.port()
    }
}

impl Drop for Published {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        // Wakes the accept call.
        let _ = TcpStream::connect(self.address);
    }
}

fn join(outer: TcpStream, inner: TcpStream, recorder: &Recorder) {
    let there = (outer.try_clone().unwrap(), inner.try_clone().unwrap(), Some(recorder.clone()));
    for (from, to, recorder) in [there, (inner, outer, None)] {
        from.set_nodelay(true).unwrap();
        std::thread::spawn(move || copy_direction(&from, &to, recorder.as_ref()));
    }
}

/// The recorded part of a connection, in bytes: handshakes are short, but the remaining data may be gigabytes.
const RECORDED_BYTES: usize = 64 * 1024;

fn copy_direction(from: &TcpStream, mut to: &TcpStream, recorder: Option<&Recorder>) {
    let mut recorded = 0;
    let mut buffer = vec![0; 256 * 1024];
    loop {
        match read_some(from, &mut buffer) {
            // A peer that has closed needs no FIN.
            Ok(0) => return drop(to.shutdown(Shutdown::Write)),
            Ok(count) => {
                if let Some(recorder) = recorder.filter(|_| recorded < RECORDED_BYTES) {
                    recorded += count;
                    recorder.take(&buffer[..count]);
                }
                if to.write_all(&buffer[..count]).is_err() {
                    return reset_both(from, to);
                }
            }
            Err(_) => return reset_both(from, to),
        }
    }
}

/// Disconnects both sockets, which their peers see as a reset.
fn reset_both(one: &TcpStream, other: &TcpStream) {
    let _ = rustix::net::connect_unspec(one);
    let _ = rustix::net::connect_unspec(other);
}
