//! Reading a file that commands are taken from.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::geteuid;

/// The largest configuration, in bytes. It travels in a registration's file.
const BYTES_MAX: u64 = 16 * 1024;

/// The text of the file; none where there is no file. The error completes a sentence that begins with the file's name.
pub(super) fn read(path: &Path) -> Result<Option<String>, String> {
    // Without NONBLOCK, a FIFO in the file's place would keep us waiting for a writer.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(Errno::NOENT) => return Ok(None),
        Err(Errno::LOOP) => return Err("is a symbolic link; it must be a file".to_owned()),
        Err(errno) => return Err(format!("cannot be opened: {errno}")),
    };
    // Of the open file: what the name stands for may have changed since.
    let about = file.metadata().map_err(|error| format!("cannot be looked at: {error}"))?;
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
