//! Reads a file that defines commands.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::geteuid;

/// The maximum size of the file, in bytes. Its text is stored in a registration's file.
const BYTES_MAX: u64 = 16 * 1024;

/// Returns the text of the file; `None` if the file does not exist. An error text follows the file name in a sentence.
pub(super) fn read(path: &Path) -> Result<Option<String>, String> {
    // Without NONBLOCK, opening a FIFO would wait for a writer.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(Errno::NOENT) => return Ok(None),
        Err(Errno::LOOP) => return Err("is a symbolic link; it must be a file".to_owned()),
        Err(errno) => return Err(format!("cannot be opened: {errno}")),
    };
    // Check the open file: the name may refer to another file by now.
    let about = file.metadata().map_err(|error| format!("cannot be inspected: {error}"))?;
    if !about.is_file() {
        return Err("is not a regular file".to_owned());
    }
    if about.uid() != geteuid().as_raw() && about.uid() != 0 {
        return Err(format!(
            "belongs to user {}; it must belong to the daemon's user or to root",
            about.uid()
        ));
    }
    if about.mode() & 0o022 != 0 {
        return Err("may be written to by others; run chmod go-w on it".to_owned());
    }
    let mut text = Vec::new();
    file.take(BYTES_MAX + 1).read_to_end(&mut text).map_err(|error| format!("cannot be read: {error}"))?;
    if text.len() as u64 > BYTES_MAX {
        return Err(format!("is longer than {BYTES_MAX} bytes"));
    }
    String::from_utf8(text).map(Some).map_err(|_| "is not UTF-8".to_owned())
}
