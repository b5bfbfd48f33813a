//! Listeners from `/proc/net/tcp` and `/proc/net/tcp6`, which are opened once inside a namespace and read repeatedly.
//!
//! Such a file stays bound to the namespace of the thread that opened it (`seq_open_net`, `fs/proc/proc_net.c`), so a
//! scan does not need to enter the namespace. A read from offset 0 restarts the table.
//!
//! One read returns at most a page, cut after a whole row, and only the rows of one read belong to one point in time: when a
//! listener closes between two reads, the kernel finds its position again by counting (`tcp_seek_last_pos`), and may skip a
//! row that existed throughout. A table that took several reads is therefore marked [`Wholeness::Pieced`], and a row missing
//! from it is not yet known to be gone.
//!
//! Reading ends at the first row that is not a listener's, since the kernel lists all listeners first. A namespace with ten
//! thousand connections would otherwise cost ten milliseconds a scan; so it costs one page. (In a namespace with few
//! connections the kernel still walks its hash of connections, which all namespaces of the host share.)

use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags, PROC_SUPER_MAGIC, fstatfs};
use rustix::io::{Errno, pread, retry_on_intr};

use super::parse;
use super::reading::Reading;
use super::source::{ReadError, Wholeness};

/// Holds a page of rows for any page size, and many times the longest row.
const BUFFER_BYTES: usize = 64 * 1024;

/// More than the rows of 65,535 ports on four addresses. A longer file is not the kernel's table.
const TABLE_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// The two files of one namespace.
#[derive(Debug)]
pub struct ProcFiles {
    tcp: Option<OwnedFd>,
    tcp6: Option<OwnedFd>,
    buffer: Vec<u8>,
}

/// Opens a file of `/proc/thread-self/net`, which shows the calling thread's namespace. (`/proc/net` shows that of the main
/// thread.)
///
/// # Errors
/// Those of `openat(2)`; ENOENT for `tcp6` where the kernel has no IPv6.
pub fn open(file: &str) -> Result<OwnedFd, Errno> {
    rustix::fs::open(format!("/proc/thread-self/net/{file}"), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}

impl ProcFiles {
    /// Takes the files. A missing file reads as empty, since a kernel without IPv6 has no `tcp6`.
    ///
    /// # Errors
    /// [`ReadError::Missing`] without any file, [`ReadError::NotProc`] for a file that is not on a proc file system: the
    /// descriptor came from a container, and a read of, say, a FUSE file could block the watch of all namespaces.
    pub fn new(tcp: Option<OwnedFd>, tcp6: Option<OwnedFd>) -> Result<ProcFiles, ReadError> {
        if tcp.is_none() && tcp6.is_none() {
            return Err(ReadError::Missing);
        }
        for file in [&tcp, &tcp6].into_iter().flatten() {
            if fstatfs(file).map_err(ReadError::Proc)?.f_type != PROC_SUPER_MAGIC {
                return Err(ReadError::NotProc);
            }
        }
        Ok(ProcFiles { tcp, tcp6, buffer: vec![0; BUFFER_BYTES] })
    }

    /// Reads both files into `reading`, which is cleared first.
    ///
    /// # Errors
    /// [`ReadError::Proc`] or [`ReadError::TooLong`]. The contents of `reading` are then invalid.
    pub fn read(&mut self, reading: &mut Reading) -> Result<Wholeness, ReadError> {
        reading.clear();
        let mut wholeness = Wholeness::Whole;
        for file in [&self.tcp, &self.tcp6].into_iter().flatten() {
            let at = |bytes: &mut [u8], offset| retry_on_intr(|| pread(file, &mut *bytes, offset));
            if table(at, &mut self.buffer, reading)? == Wholeness::Pieced {
                wholeness = Wholeness::Pieced;
            }
        }
        Ok(wholeness)
    }
}

/// Reads one table through `read_at`, until it ends or the rows after the listeners start.
fn table(
    mut read_at: impl FnMut(&mut [u8], u64) -> Result<usize, Errno>,
    buffer: &mut [u8],
    reading: &mut Reading,
) -> Result<Wholeness, ReadError> {
    let mut offset = 0u64;
    let mut held = 0usize;
    let mut reads_with_rows = 0u32;
    loop {
        let got = read_at(&mut buffer[held..], offset).map_err(ReadError::Proc)?;
        let text = &buffer[..held + got];
        // At the end of the file, the last row needs no newline.
        let whole =
            if got == 0 { text.len() } else { text.iter().rposition(|&b| b == b'\n').map_or(0, |at| at + 1) };
        let before = reading.rows().len();
        parse::rows(&text[..whole]).for_each(|row| reading.insert(row));
        reads_with_rows += u32::from(reading.rows().len() > before);
        let end = got == 0 || last_line(&text[..whole]).is_some_and(parse::is_past_listeners);
        if end {
            return Ok(if reads_with_rows > 1 { Wholeness::Pieced } else { Wholeness::Whole });
        }
        offset += got as u64;
        let rest = whole..text.len();
        held = rest.len();
        buffer.copy_within(rest, 0);
        if held == buffer.len() || offset > TABLE_BYTES_MAX {
            return Err(ReadError::TooLong);
        }
    }
}

/// Returns the last line of a text that ends with a newline.
fn last_line(text: &[u8]) -> Option<&[u8]> {
    text.strip_suffix(b"\n")?.rsplit(|&byte| byte == b'\n').next()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(port: u16, state: &str) -> String {
        format!(
            "   0: 00000000:{port:04X} 00000000:0000 {state} 0:0 0:0 0  1000        0 {} 1\n",
            u32::from(port) + 7
        )
    }

    /// Reads `text` in pieces of `piece_bytes`. Returns the ports, the wholeness and the offset of the last read.
    fn read_in_pieces(text: &str, piece_bytes: usize) -> (Vec<u16>, Wholeness, u64) {
        let mut reading = Reading::default();
        let mut furthest = 0;
        let read_at = |into: &mut [u8], offset: u64| {
            furthest = offset;
            let rest = &text.as_bytes()[usize::try_from(offset).unwrap()..];
            let bytes = piece_bytes.min(rest.len()).min(into.len());
            into[..bytes].copy_from_slice(&rest[..bytes]);
            Ok(bytes)
        };
        let wholeness = table(read_at, &mut [0; 512], &mut reading).unwrap();
        (reading.rows().iter().map(|row| row.port.get()).collect(), wholeness, furthest)
    }

    #[test]
    fn rows_cut_anywhere_are_read_whole() {
        let text: String = (1..=20).map(|port| row(port, "0A")).collect();
        for piece_bytes in 1..512 {
            assert_eq!(read_in_pieces(&text, piece_bytes).0, (1..=20).collect::<Vec<_>>(), "{piece_bytes}");
        }
    }

    #[test]
    fn a_table_of_several_reads_is_pieced() {
        let text: String = (1..=4).map(|port| row(port, "0A")).collect();
        assert_eq!(read_in_pieces(&text, 150).1, Wholeness::Pieced);
        assert_eq!(read_in_pieces(&text, 512).1, Wholeness::Whole);
    }

    #[test]
    fn reading_ends_where_the_established_rows_begin() {
        let listeners: String = (1..=3).map(|port| row(port, "0A")).collect();
        let text = listeners.clone() + &row(9, "01").repeat(1000);
        let (ports, _, furthest) = read_in_pieces(&text, 200);
        assert_eq!(ports, [1, 2, 3]);
        assert!(furthest < 1000, "read up to {furthest}");
    }

    #[test]
    fn a_table_without_a_final_newline_keeps_its_last_row() {
        assert_eq!(read_in_pieces(row(5, "0A").trim_end(), 512).0, [5]);
    }

    #[test]
    fn an_endless_row_and_an_endless_table_are_errors() {
        let fill = |byte: u8| {
            move |into: &mut [u8], _: u64| {
                into.fill(byte);
                Ok(into.len())
            }
        };
        let mut buffer = vec![0; BUFFER_BYTES];
        for byte in [b'x', b'\n'] {
            let result = table(fill(byte), &mut buffer, &mut Reading::default());
            assert!(matches!(result, Err(ReadError::TooLong)), "{result:?}");
        }
    }

    #[test]
    fn a_file_that_is_not_of_proc_is_refused() {
        let file = OwnedFd::from(tempfile::tempfile().unwrap());
        assert!(matches!(ProcFiles::new(Some(file), None), Err(ReadError::NotProc)));
        assert!(matches!(ProcFiles::new(None, None), Err(ReadError::Missing)));
    }
}
