//! Errno, decoded once: what a failed operation means for a relayed connection.

use rustix::io::Errno;

/// What a failed operation means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The peer broke the connection off (ECONNRESET, EPIPE, ECONNABORTED), or the kernel gave it up.
    Reset,
    /// Nobody listens there (ECONNREFUSED).
    Refused,
    /// The address cannot be reached from there (ENETUNREACH, EHOSTUNREACH, EADDRNOTAVAIL of the target's family, EAFNOSUPPORT).
    Unreachable,
    /// No answer in time (ETIMEDOUT).
    TimedOut,
    /// Every ephemeral port to that target is in use (EADDRNOTAVAIL or EAGAIN of a connect).
    PortsExhausted,
    /// No descriptors, buffers or memory are left (EMFILE, ENFILE, ENOBUFS, ENOMEM).
    Exhausted,
    /// Anything else; the connection cannot be used.
    Other(Errno),
}

impl Fault {
    /// Decodes the error of an operation on an established connection or a listener.
    pub fn of(errno: Errno) -> Fault {
        match errno {
            Errno::CONNRESET | Errno::PIPE | Errno::CONNABORTED | Errno::NOTCONN | Errno::SHUTDOWN => {
                Fault::Reset
            }
            Errno::CONNREFUSED => Fault::Refused,
            Errno::NETUNREACH | Errno::HOSTUNREACH | Errno::NETDOWN | Errno::AFNOSUPPORT => {
                Fault::Unreachable
            }
            Errno::TIMEDOUT => Fault::TimedOut,
            Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM => Fault::Exhausted,
            other => Fault::Other(other),
        }
    }

    /// Decodes the error of a connect, where a few numbers mean something else.
    pub fn of_connect(errno: Errno) -> Fault {
        match errno {
            // Linux, __inet_hash_connect(): no free source port for this target.
            Errno::ADDRNOTAVAIL | Errno::AGAIN => Fault::PortsExhausted,
            // A reset in answer to the final ACK: the server's queue was full, or it closed at once.
            Errno::CONNRESET => Fault::Refused,
            other => Fault::of(other),
        }
    }
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Fault::Reset => f.write_str("the connection was reset"),
            Fault::Refused => f.write_str("nothing listens there"),
            Fault::Unreachable => f.write_str("the address cannot be reached"),
            Fault::TimedOut => f.write_str("no answer in time"),
            Fault::PortsExhausted => f.write_str("every ephemeral port is in use"),
            Fault::Exhausted => f.write_str("descriptors or memory ran out"),
            Fault::Other(errno) => write!(f, "{errno}"),
        }
    }
}

impl std::error::Error for Fault {}
