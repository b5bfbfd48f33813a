//! Where the listeners of one namespace are read from, and what can go wrong with it.

use std::os::fd::OwnedFd;

use rustix::io::Errno;

use super::procfs::{self, ProcFiles};
use super::reading::Reading;
use super::sock_diag::{self, SockDiag};

/// What there is to read the listeners of one namespace with. Each descriptor was made inside that namespace.
#[derive(Debug, Default)]
pub struct Sources {
    /// `/proc/net/tcp`.
    pub tcp: Option<OwnedFd>,
    /// `/proc/net/tcp6`; absent where the kernel has no IPv6.
    pub tcp6: Option<OwnedFd>,
    /// A `NETLINK_SOCK_DIAG` socket: preferred, a hundred times cheaper.
    pub sock_diag: Option<OwnedFd>,
}

impl Sources {
    /// Opens all that the namespace of the calling thread offers.
    pub fn open_here() -> Sources {
        let file = |name| procfs::open(name).ok();
        Sources { tcp: file("tcp"), tcp6: file("tcp6"), sock_diag: sock_diag::open().ok() }
    }
}

/// Why a reading failed. A failed reading says nothing about what listens.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// A file of `/proc/net` could not be read.
    #[error("reading /proc/net/tcp failed: {0}")]
    Proc(Errno),
    /// The socket could not be used.
    #[error("asking the kernel for its sockets (sock_diag) failed: {0}")]
    Diag(Errno),
    /// The kernel does not answer.
    #[error("the kernel refused to list its sockets (sock_diag): {0}")]
    Refused(Errno),
    /// Not what a kernel sends.
    #[error("the answer of sock_diag is malformed: {0}")]
    Malformed(&'static str),
    /// The table changed while it was read, twice in a row.
    #[error("the table of sockets changed while it was read")]
    Interrupted,
    /// More than a namespace can hold.
    #[error("the table of sockets has no end")]
    TooLong,
    /// A descriptor is not what it was said to be.
    #[error("a file that was handed over as /proc/net/tcp is not from a proc file system")]
    NotProc,
    /// A descriptor is not what it was said to be.
    #[error("a descriptor that was handed over as a sock_diag socket is not one")]
    NotSockDiag,
    /// There is nothing to read from.
    #[error("there is no file and no socket to read listeners from")]
    Missing,
}

impl ReadError {
    /// Whether to try again is of no use.
    fn is_final(&self) -> bool {
        match self {
            ReadError::NotProc | ReadError::NotSockDiag | ReadError::Missing => true,
            // EBUSY: the answer before is not taken out yet. The others are shortages.
            ReadError::Diag(errno) | ReadError::Refused(errno) => {
                !matches!(*errno, Errno::BUSY | Errno::NOMEM | Errno::NOBUFS | Errno::AGAIN)
            }
            ReadError::Proc(_) | ReadError::Malformed(_) | ReadError::Interrupted | ReadError::TooLong => {
                false
            }
        }
    }
}

/// Whether a reading shows one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wholeness {
    /// The rows of each family were read at once.
    Whole,
    /// The rows were read in several pieces; one may be missing that was there all the time.
    Pieced,
}

/// Readings in a row that may fail before a source is given up.
const FAILURES_MAX: u32 = 8;

/// The best of the sources that still works.
#[derive(Debug)]
pub struct Source {
    diag: Option<SockDiag>,
    files: Option<ProcFiles>,
    failures: u32,
    /// Holds a reading while a second one confirms what is missing from it.
    spare: Reading,
}

impl Source {
    /// Takes what works. A refused descriptor is closed; what refused it is told only if nothing is left.
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

    /// Reads what listens. `older` is the reading before: what a pieced reading misses of it is looked for again.
    ///
    /// `Ok(false)` is "no change": the reading failed and will be tried again. An error means that no source is left.
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

/// Reads, and reads again when the first reading was pieced and misses something of `older`: then only what both
/// miss is gone.
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

    /// What is told when 1, 2 and 3 listened before and the readings come as scripted; and how many were made.
    fn told(script: &[(&[u16], Wholeness)]) -> (Vec<u16>, usize) {
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
    fn what_a_pieced_reading_misses_is_looked_for_again() {
        use Wholeness::{Pieced, Whole};
        assert_eq!(told(&[(&[1, 3], Pieced), (&[1, 2, 3], Pieced)]), (vec![1, 3, 2], 2));
        assert_eq!(told(&[(&[1, 3], Pieced), (&[1, 3], Pieced)]), (vec![1, 3], 2));
        assert_eq!(told(&[(&[1, 2, 3, 4], Pieced)]), (vec![1, 2, 3, 4], 1));
        assert_eq!(told(&[(&[1, 3], Whole)]), (vec![1, 3], 1));
    }

    #[test]
    fn a_failing_file_is_no_change_until_it_has_failed_often() {
        // Some other file of proc, which cannot be read from: a directory.
        let directory = || OwnedFd::from(std::fs::File::open("/proc/self").unwrap());
        let mut source = Source::new(Sources { tcp: Some(directory()), ..Sources::default() }).unwrap();
        let mut into = Reading::default();
        for _ in 1..FAILURES_MAX {
            assert_eq!(source.read(&reading(&[1]), &mut into), Ok(false));
        }
        assert_eq!(source.read(&reading(&[1]), &mut into), Err(ReadError::Proc(Errno::ISDIR)));
    }

    #[test]
    fn shortages_pass_and_refusals_stay() {
        assert!(!ReadError::Diag(Errno::NOBUFS).is_final() && !ReadError::Refused(Errno::BUSY).is_final());
        assert!(ReadError::Refused(Errno::NOENT).is_final() && ReadError::Refused(Errno::PERM).is_final());
    }
}
