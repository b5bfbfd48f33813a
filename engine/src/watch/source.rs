//! The sources from which the listeners of one namespace are read, with the change from one source to the other.

use std::os::fd::OwnedFd;

use rustix::io::Errno;

use super::procfs::{self, ProcFiles};
use super::reading::Reading;
use super::sock_diag::{self, SockDiag};

/// Descriptors for reading the listeners of one namespace. Each was created inside that namespace.
#[derive(Debug, Default)]
pub struct Sources {
    /// `/proc/net/tcp`.
    pub tcp: Option<OwnedFd>,
    /// `/proc/net/tcp6`; absent where the kernel has no IPv6.
    pub tcp6: Option<OwnedFd>,
    /// A `NETLINK_SOCK_DIAG` socket: preferred, since it is a hundred times cheaper.
    pub sock_diag: Option<OwnedFd>,
}

impl Sources {
    /// Opens all sources that the namespace of the calling thread offers.
    pub fn open_here() -> Sources {
        let file = |name| procfs::open(name).ok();
        Sources { tcp: file("tcp"), tcp6: file("tcp6"), sock_diag: sock_diag::open().ok() }
    }
}

/// The reason why a reading failed. The listeners are then unknown.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// A file of `/proc/net` could not be read.
    #[error("reading /proc/net/tcp failed: {0}")]
    Proc(Errno),
    /// The socket could not be used.
    #[error("asking the kernel for its sockets (sock_diag) failed: {0}")]
    Diag(Errno),
    /// The kernel rejected the request.
    #[error("the kernel refused to list its sockets (sock_diag): {0}")]
    Refused(Errno),
    /// The message is not one that a kernel sends.
    #[error("the answer of sock_diag is malformed: {0}")]
    Malformed(&'static str),
    /// The table changed while it was read, twice in a row.
    #[error("the table of sockets changed while it was read")]
    Interrupted,
    /// The table is longer than a namespace can fill.
    #[error("the table of sockets has no end")]
    TooLong,
    /// The descriptor is not a file of a proc file system.
    #[error("a file that was handed over as /proc/net/tcp is not from a proc file system")]
    NotProc,
    /// The descriptor is not a `sock_diag` socket.
    #[error("a descriptor that was handed over as a sock_diag socket is not one")]
    NotSockDiag,
    /// There is no source.
    #[error("there is no file and no socket to read listeners from")]
    Missing,
}

impl ReadError {
    /// Whether another attempt would fail, too.
    fn is_final(&self) -> bool {
        match self {
            ReadError::NotProc | ReadError::NotSockDiag | ReadError::Missing => true,
            // EBUSY: the previous answer is not drained yet. The others are shortages.
            ReadError::Diag(errno) | ReadError::Refused(errno) => {
                !matches!(*errno, Errno::BUSY | Errno::NOMEM | Errno::NOBUFS | Errno::AGAIN)
            }
            ReadError::Proc(_) | ReadError::Malformed(_) | ReadError::Interrupted | ReadError::TooLong => {
                false
            }
        }
    }
}

/// Whether a reading shows one point in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wholeness {
    /// The rows of each family were read at once.
    Whole,
    /// The rows were read in several pieces; a row that existed throughout may be missing.
    Pieced,
}

/// The number of consecutive failed readings after which a source is abandoned.
const FAILURES_MAX: u32 = 8;

/// The best source that still works.
#[derive(Debug)]
pub struct Source {
    diag: Option<SockDiag>,
    files: Option<ProcFiles>,
    failures: u32,
    /// Holds a reading while a second one confirms which rows are missing.
    spare: Reading,
}

impl Source {
    /// Takes the sources that work. Closes a refused descriptor; returns its error only if no source is left.
    pub fn new(sources: Sources) -> Result<Source, ReadError> {
        let diag = sources.sock_diag.map(SockDiag::new).transpose();
        let files = ProcFiles::new(sources.tcp, sources.tcp6);
        match (diag, files) {
            (Err(refused), Err(_)) | (Ok(None), Err(refused)) => Err(refused),
            (diag, files) => Ok(Source {
                diag: diag.ok().flatten(),
                files: files.ok(),
                failures: 0,
                spare: Reading::default(),
            }),
        }
    }

    /// Reads the listeners. `older` is the previous reading: if a pieced reading lacks some of its rows, a second reading
    /// confirms.
    ///
    /// `Ok(false)` means "no change": the reading failed and will be retried. An error means that no source is left.
    pub fn read(&mut self, older: &Reading, into: &mut Reading) -> Result<bool, ReadError> {
        match self.read_confirmed(older, into) {
            Ok(()) => {
                self.failures = 0;
                Ok(true)
            }
            Err(error) => {
                self.failures += 1;
                if !error.is_final() && self.failures < FAILURES_MAX {
                    return Ok(false);
                }
                self.failures = 0;
                match (self.diag.take(), &self.files) {
                    (Some(_), Some(_)) => self.read(older, into),
                    _ => Err(error),
                }
            }
        }
    }

    fn read_confirmed(&mut self, older: &Reading, into: &mut Reading) -> Result<(), ReadError> {
        let mut spare = std::mem::take(&mut self.spare);
        let result = confirmed(|reading| self.read_once(reading), older, into, &mut spare);
        self.spare = spare;
        result
    }

    fn read_once(&mut self, into: &mut Reading) -> Result<Wholeness, ReadError> {
        match (&mut self.diag, &mut self.files) {
            (Some(diag), _) => diag.read(into),
            (None, Some(files)) => files.read(into),
            (None, None) => Err(ReadError::Missing),
        }
    }
}

/// Reads, and reads again if the first reading was pieced and lacks a row of `older`. Only rows that both readings lack are
/// gone.
fn confirmed(
    mut read: impl FnMut(&mut Reading) -> Result<Wholeness, ReadError>,
    older: &Reading,
    into: &mut Reading,
    spare: &mut Reading,
) -> Result<(), ReadError> {
    let missing =
        |newer: &Reading| older.rows().iter().any(|row| newer.at((row.port, row.address)).is_none());
    if read(into)? == Wholeness::Pieced && missing(into) {
        read(spare)?;
        spare.rows().iter().for_each(|&row| into.insert(row));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU16;

    use super::*;
    use crate::command::Listening;

    fn reading(ports: &[u16]) -> Reading {
        let row = |&port: &u16| Listening {
            port: NonZeroU16::new(port).unwrap(),
            address: [127, 0, 0, 1].into(),
            inode: 1,
            uid: 0,
        };
        ports.iter().map(row).collect()
    }

    /// Reads `script` after a reading of the ports 1, 2 and 3. Returns the resulting ports and the number of readings made.
    fn read_script(script: &[(&[u16], Wholeness)]) -> (Vec<u16>, usize) {
        let (mut into, mut reads) = (Reading::default(), 0);
        let read = |reading_of: &mut Reading| {
            *reading_of = reading(script[reads].0);
            reads += 1;
            Ok(script[reads - 1].1)
        };
        confirmed(read, &reading(&[1, 2, 3]), &mut into, &mut Reading::default()).unwrap();
        (into.rows().iter().map(|row| row.port.get()).collect(), reads)
    }

    #[test]
    fn rows_missing_from_a_pieced_reading_are_confirmed_by_a_second() {
        use Wholeness::{Pieced, Whole};
        assert_eq!(read_script(&[(&[1, 3], Pieced), (&[1, 2, 3], Pieced)]), (vec![1, 3, 2], 2));
        assert_eq!(read_script(&[(&[1, 3], Pieced), (&[1, 3], Pieced)]), (vec![1, 3], 2));
        assert_eq!(read_script(&[(&[1, 2, 3, 4], Pieced)]), (vec![1, 2, 3, 4], 1));
        assert_eq!(read_script(&[(&[1, 3], Whole)]), (vec![1, 3], 1));
    }

    #[test]
    fn a_failing_file_counts_as_unchanged_until_the_failure_limit() {
        // A file of proc that cannot be read: a directory.
        let directory = || OwnedFd::from(std::fs::File::open("/proc/self").unwrap());
        let mut source = Source::new(Sources { tcp: Some(directory()), ..Sources::default() }).unwrap();
        let mut into = Reading::default();
        for _ in 1..FAILURES_MAX {
            assert_eq!(source.read(&reading(&[1]), &mut into), Ok(false));
        }
        assert_eq!(source.read(&reading(&[1]), &mut into), Err(ReadError::Proc(Errno::ISDIR)));
    }

    #[test]
    fn shortages_are_retried_and_refusals_are_final() {
        assert!(!ReadError::Diag(Errno::NOBUFS).is_final() && !ReadError::Refused(Errno::BUSY).is_final());
        assert!(ReadError::Refused(Errno::NOENT).is_final() && ReadError::Refused(Errno::PERM).is_final());
    }
}
