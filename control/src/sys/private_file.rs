//! Files in the daemon's home that only their owner may read or write, and that are replaced as a whole.
//!
//! A write is `O_EXCL` temporary → write → fsync; the caller then renames the temporary file and calls fsync on the directory. A
//! process that is killed at any of these steps leaves the old content or the new one, and at most a temporary file.
//! A read never follows a link, never waits for a pipe and never reads more than its bound.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT};
use rustix::io::Errno;

/// The most files of one name that are set aside.
const SET_ASIDE_MAX: u32 = 1_000;

/// The reason that a file was not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReadError {
    /// It is a link, a pipe, a device or a directory.
    NotAFile,
    /// It has more bytes than the caller reads.
    TooLarge,
    /// A system call failed.
    Unreadable(Errno),
}

/// Returns options for opening a file of the home by its path. A new file has the mode 0600. A symbolic link in place of the file
/// is an error (ELOOP), and a pipe does not wait.
pub(crate) fn options() -> OpenOptions {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
    let mut options = OpenOptions::new();
    options.mode(0o600).custom_flags(flags.bits().cast_signed());
    options
}

/// Reads the regular file at `path`, of at most `bytes_max` bytes.
///
/// # Errors
/// The kernel's; `InvalidData` if it is not a regular file or too large.
pub(crate) fn read_path(path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    let file = options().read(true).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::ErrorKind::InvalidData.into());
    }
    read(file, bytes_max).map_err(|error| match error {
        ReadError::Unreadable(errno) => errno.into(),
        ReadError::NotAFile | ReadError::TooLarge => io::ErrorKind::InvalidData.into(),
    })
}

/// Writes `content` to the file at `path`, which is created if it is absent.
///
/// # Errors
/// The kernel's.
pub(crate) fn write_path(path: &Path, content: &str) -> io::Result<()> {
    options().write(true).create(true).truncate(true).open(path)?.write_all(content.as_bytes())
}

/// Opens the regular file `name` of a directory for reading.
///
/// # Errors
/// [`ReadError::NotAFile`] and [`ReadError::Unreadable`].
pub(crate) fn open(directory: &OwnedFd, name: &str) -> Result<File, ReadError> {
    // Checked before the open, which may have effects on a device, and again on the open file.
    let is_regular = |mode| FileType::from_raw_mode(mode) == FileType::RegularFile;
    let seen =
        rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW).map_err(ReadError::Unreadable)?;
    if !is_regular(seen.st_mode) {
        return Err(ReadError::NotAFile);
    }
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let opened = rustix::fs::openat(directory, name, flags, Mode::empty()).map_err(ReadError::Unreadable)?;
    if !is_regular(rustix::fs::fstat(&opened).map_err(ReadError::Unreadable)?.st_mode) {
        return Err(ReadError::NotAFile);
    }
    Ok(File::from(opened))
}

/// Reads an open file of at most `bytes_max` bytes.
///
/// # Errors
/// [`ReadError::TooLarge`] and [`ReadError::Unreadable`].
pub(crate) fn read(file: File, bytes_max: u64) -> Result<Vec<u8>, ReadError> {
    let mut content = Vec::new();
    // The extra byte detects a file that grows while it is read.
    file.take(bytes_max + 1)
        .read_to_end(&mut content)
        .map_err(|error| ReadError::Unreadable(errno_of(&error)))?;
    if content.len() as u64 > bytes_max { Err(ReadError::TooLarge) } else { Ok(content) }
}

/// Writes `content` to a new file `name` of mode 0600 and calls fsync on it. A file that an earlier process left under that name
/// is removed first. `modified` becomes the time of modification, to the nanosecond: the kernel's own time of a file may be
/// that of its last tick.
///
/// # Errors
/// The kernel's.
pub(crate) fn write_temporary(
    directory: &OwnedFd,
    name: &str,
    content: &[u8],
    modified: Option<Timespec>,
) -> Result<(), Errno> {
    let mode = Mode::RUSR | Mode::WUSR;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let opened = match rustix::fs::openat(directory, name, flags, mode) {
        // Left by a failed write of this process, or by an earlier process with the same id.
        Err(Errno::EXIST) => {
            rustix::fs::unlinkat(directory, name, AtFlags::empty())?;
            rustix::fs::openat(directory, name, flags, mode)?
        }
        opened => opened?,
    };
    // The mode does not depend on the umask.
    rustix::fs::fchmod(&opened, mode)?;
    let mut file = File::from(opened);
    file.write_all(content).map_err(|error| errno_of(&error))?;
    if let Some(modified) = modified {
        let kept = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
        rustix::fs::futimens(&file, &Timestamps { last_access: kept, last_modification: modified })?;
    }
    rustix::fs::fsync(&file)
}

/// Renames `name` to the first free one of `name.bad-1`, `name.bad-2` and so on, and returns the new name.
///
/// # Errors
/// The kernel's, and ENOSPC if all of these names are in use.
pub(crate) fn set_aside(directory: &OwnedFd, name: &str) -> Result<String, Errno> {
    for number in 1..=SET_ASIDE_MAX {
        let aside = format!("{name}.bad-{number}");
        // No other process creates these names, so a free one stays free.
        match rustix::fs::statat(directory, &aside, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => {
                rustix::fs::renameat(directory, name, directory, &aside)?;
                return Ok(aside);
            }
            Err(errno) => return Err(errno),
            Ok(_) => {}
        }
    }
    Err(Errno::NOSPC)
}

fn errno_of(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}
