//! A port of a namespace, published on the host as Docker's proxy does it: bytes, FIN and reset pass, each connection on two
//! threads.

use std::io::Write;
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::{Namespace, read_some, reset};

/// A published port; nobody is let in any more once it is dropped.
#[derive(Debug)]
pub struct Published {
    address: SocketAddr,
    over: Arc<AtomicBool>,
}

impl Published {
    /// Publishes a port of `inside` on some port of the host.
    ///
    /// # Panics
    /// When there is none to be had.
    pub fn start(inside: Namespace, port: u16) -> Published {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let over = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&over);
        std::thread::spawn(move || {
            while let Ok((outer, _)) = listener.accept() {
                if ended.load(Ordering::Relaxed) {
                    return;
                }
                let target = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
                match inside.run(|| TcpStream::connect(target)) {
                    Ok(inner) => join(outer, inner),
                    Err(_) => reset(outer),
                }
            }
        });
        Published { address, over }
    }

    /// The port on the host.
    pub fn port(&self) -> u16 {
        self.address.port()
    }
}

impl Drop for Published {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        // Wakes whoever accepts.
        let _ = TcpStream::connect(self.address);
    }
}

fn join(outer: TcpStream, inner: TcpStream) {
    for (from, to) in [(outer.try_clone().unwrap(), inner.try_clone().unwrap()), (inner, outer)] {
        from.set_nodelay(true).unwrap();
        std::thread::spawn(move || carry(&from, &to));
    }
}

fn carry(from: &TcpStream, mut to: &TcpStream) {
    let mut buffer = vec![0; 256 * 1024];
    loop {
        match read_some(from, &mut buffer) {
            // Whoever is gone needs no FIN.
            Ok(0) => return drop(to.shutdown(Shutdown::Write)),
            Ok(count) if to.write_all(&buffer[..count]).is_ok() => {}
            _ => {
                // Dissolves both connections, which their peers see as a reset.
                let _ = rustix::net::connect_unspec(from);
                let _ = rustix::net::connect_unspec(to);
                return;
            }
        }
    }
}
