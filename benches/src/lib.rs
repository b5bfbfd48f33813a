//! Code shared by the comparison relays, the load generators and the report of `compare`.
//!
//! A comparison relay crosses namespaces in the cheapest possible way: it binds its listeners, then moves its only thread
//! into the container's network namespace for good. A listener stays in the namespace that created it, and every later
//! socket is created inside, so no connection pays for the crossing. landfall serves many containers at a time and cannot
//! do that; the comparison favours the other relays here.

pub mod report;

use std::error::Error;
use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener};
use std::path::Path;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

/// The error of a program of this package. The harness shows its text.
pub type Failure = Box<dyn Error>;

/// The bytes that a comparison relay moves at a time in each direction, as many as a pooled buffer of landfall holds.
pub const BUFFER_BYTES: usize = 64 * 1024;

/// Long enough for every burst of the load generators; the kernel caps it at `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// Reads `--netns PATH PORT...` from the command line, listens at each port on 127.0.0.1, and moves the calling
/// thread into the namespace. It must be called before any other thread exists.
///
/// # Errors
/// When the arguments have another form, a port is taken, or the namespace cannot be entered.
pub fn listen_then_enter() -> Result<Vec<TcpListener>, Failure> {
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() != Some("--netns") {
        return Err("usage: --netns PATH PORT...".into());
    }
    let path = arguments.next().ok_or("--netns needs a path")?;
    let listeners = arguments.map(|port| Ok(listen(port.parse()?)?)).collect::<Result<Vec<_>, Failure>>()?;
    if listeners.is_empty() {
        return Err("give at least one port".into());
    }
    enter(Path::new(&path))?;
    Ok(listeners)
}

/// Moves the calling thread into the network namespace of the file `path`.
///
/// # Errors
/// When the file cannot be opened or the namespace cannot be entered.
pub fn enter(path: &Path) -> Result<(), Failure> {
    let namespace = File::open(path).map_err(|error| format!("{}: {error}", path.display()))?;
    setns(namespace, CloneFlags::CLONE_NEWNET).map_err(|error| format!("{}: {error}", path.display()).into())
}

/// Listens at `port` on 127.0.0.1. Accepted sockets inherit `TCP_NODELAY` from the listener.
///
/// # Errors
/// Errors of the kernel, such as a port that is taken.
pub fn listen(port: u16) -> io::Result<TcpListener> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    sockopt::set_tcp_nodelay(&socket, true)?;
    rustix::net::bind(&socket, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, port))?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(TcpListener::from(socket))
}

/// The address that a relay dials for the connections of `listener`: the same one, inside.
///
/// # Errors
/// Errors of the kernel.
pub fn same_address(listener: &TcpListener) -> io::Result<SocketAddr> {
    listener.local_addr()
}

/// Returns the value of `--name` from the command line, or `default`.
///
/// # Errors
/// When the option is the last argument and has no value.
pub fn option(name: &str, default: &str) -> Result<String, Failure> {
    let mut arguments = std::env::args().skip_while(|argument| argument != name);
    match arguments.next() {
        None => Ok(default.to_owned()),
        Some(_) => arguments.next().ok_or_else(|| format!("{name} needs a value").into()),
    }
}

/// Returns the quantile `parts / of` of sorted durations in microseconds, by the nearest rank; `None` for an empty slice.
pub fn quantile_us(sorted: &[Duration], parts: usize, of: usize) -> Option<f64> {
    let rank = (sorted.len() * parts).div_ceil(of).max(1);
    sorted.get(rank - 1).map(|duration| duration.as_secs_f64() * 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_is_the_nearest_rank() {
        let sorted: Vec<Duration> = (1..=200).map(Duration::from_micros).collect();
        assert_eq!(quantile_us(&sorted, 50, 100), Some(100.0));
        assert_eq!(quantile_us(&sorted, 99, 100), Some(198.0));
        assert_eq!(quantile_us(&sorted[..1], 99, 100), Some(1.0));
        assert_eq!(quantile_us(&sorted[..3], 50, 100), Some(2.0));
        assert_eq!(quantile_us(&[], 99, 100), None);
    }
}
