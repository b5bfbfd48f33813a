//! Reads the file in a folder. Only verbs that a user of the host runs read it, since processes in the container may be
//! able to write it.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::{BYTES_MAX, Devcontainer, DevcontainerError, DevcontainerFile};
use crate::model::trust::{ContentDigest, FolderFile};

/// The places of the file below the folder; the first one that exists is used (Dev Container reference,
/// "devcontainer.json").
const PLACES: [FolderFile; 2] = [FolderFile::Devcontainer, FolderFile::DevcontainerAtTop];

/// Reads the folder's file. Returns `None` if the file does not exist.
pub(super) fn read(folder: &Path) -> Result<Option<DevcontainerFile>, DevcontainerError> {
    for file in PLACES {
        let path = folder.join(file.path());
        let wrong = |why: String| DevcontainerError::File { path: path.clone(), why };
        let Some(text) = text(&path).map_err(wrong)? else { continue };
        let mut read = Devcontainer::parse(&text).map_err(|error| wrong(error.to_string()))?;
        // Paths in the file are relative to its directory.
        let base = path.parent().unwrap_or(folder);
        if let Some(build) = &mut read.build {
            build.dockerfile = base.join(&build.dockerfile);
            build.context = base.join(&build.context);
        }
        let sha256 = ContentDigest::of(text.as_bytes());
        return Ok(Some(DevcontainerFile { devcontainer: read, file, sha256 }));
    }
    Ok(None)
}

/// Reads the text of a file. Returns `None` if the file does not exist. The error completes a sentence that starts with
/// the file's name.
fn text(path: &Path) -> Result<Option<String>, String> {
    // Without NONBLOCK, opening a FIFO under the file's name would block.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
        Err(errno) => return Err(format!("it cannot be opened: {errno}")),
    };
    let about = file.metadata().map_err(|error| format!("its metadata cannot be read: {error}"))?;
    if !about.is_file() {
        return Err("it is not a regular file".to_owned());
    }
    let mut bytes = Vec::new();
    let limit = u64::try_from(BYTES_MAX).unwrap_or(u64::MAX);
    file.take(limit + 1).read_to_end(&mut bytes).map_err(|error| format!("it cannot be read: {error}"))?;
    String::from_utf8(bytes).map(Some).map_err(|_| "it is not UTF-8".to_owned())
}
