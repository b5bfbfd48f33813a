//! The secrets file of one folder, replaced under its lock.
//!
//! The container can write to the folder, so its content is not trusted: the folder is opened once and all paths are
//! relative to it, links are not followed, opening never waits for a pipe, and sizes are bounded. The file is replaced by
//! rename, so a reader sees the whole old file or the whole new one.
//!
//! The lock is the one of the reference's programs: a directory `FILE.lock`, which only one program can create. Its holder
//! updates the modification time repeatedly. A lock that has not been updated for half a minute belongs to a program that
//! has died, and is removed.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat, Timespec, Timestamps, UTIME_NOW};
use rustix::io::Errno;

use super::patch::Replacement;
use super::tree::Tree;

/// The longest file that is read, in bytes.
const FILE_BYTES_MAX: u64 = 4 * 1024 * 1024;
/// The version of the file format.
const VERSION: u64 = 2;
/// The members of a file of that version, in addition to the version.
const SLICES: [&str; 3] = ["providers", "channels", "mcp"];
/// The number of names to try for a temporary file.
const TEMPORARY_MAX: u32 = 16;

/// The timing of a lock.
#[derive(Clone, Copy, Debug)]
pub struct Holder {
    /// The age at which the lock of another program is removed.
    pub stale_after: Duration,
    /// The interval at which a held lock is updated.
    pub refresh_every: Duration,
}

impl Default for Holder {
    fn default() -> Holder {
        Holder { stale_after: Duration::from_secs(30), refresh_every: Duration::from_secs(10) }
    }
}

/// The result of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// The file was replaced, and is on disk.
    Done,
    /// Another program holds the lock.
    Locked,
}

/// Replaces one object in the file `name` of `folder`, which is created if it is missing. Tries the lock once.
///
/// # Errors
/// A text that names the failed step. The file is then unchanged.
pub fn attempt(
    folder: &Path,
    name: &str,
    replacement: &Replacement,
    holder: &Holder,
) -> Result<Attempt, String> {
    if name.is_empty() || name == "." || name == ".." || name.contains('/') || name.contains('\0') {
        return Err(format!("'{name}' is not the name of a file in the registered folder"));
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = rustix::fs::open(folder, flags, Mode::empty())
        .map_err(|errno| format!("the registered folder cannot be opened: {errno}"))?;
    let Some(lock) = Lock::take(&folder, &format!("{name}.lock"), holder.stale_after)? else {
        return Ok(Attempt::Locked);
    };
    let done = lock.with_refresh(holder.refresh_every, || replace(&folder, name, replacement, &lock));
    lock.release();
    done.map(|()| Attempt::Done)
}

fn replace(folder: &OwnedFd, name: &str, replacement: &Replacement, lock: &Lock<'_>) -> Result<(), String> {
    let (mut tree, owner) = match read(folder, name)? {
        Some((content, seen)) => (parse(&content).map_err(|why| format!("{name}: {why}"))?, seen),
        None => (new_tree(), rustix::fs::fstat(folder).map_err(|errno| format!("{name}: {errno}"))?),
    };
    let slice = tree.entry(replacement.slice, Tree::empty());
    let place = slice.and_then(|slice| slice.entry(&replacement.key, Tree::Null));
    // Both are objects, as checked by `parse`.
    *place.ok_or_else(|| format!("{name}: {} is not an object", replacement.slice))? =
        replacement.block.clone();
    let mut text = serde_json::to_string_pretty(&tree).map_err(|error| format!("{name}: {error}"))?;
    text.push('\n');
    write(folder, name, &text, &owner, lock).map_err(|why| format!("{name} cannot be written: {why}"))
}

/// Parses the content of a file of the known version.
///
/// # Errors
/// A text that names the mismatch.
pub fn parse(content: &[u8]) -> Result<Tree, String> {
    let mut tree: Tree = serde_json::from_slice(content).map_err(|error| format!("not JSON: {error}"))?;
    match tree.find("version") {
        Some(Tree::Number(number)) if number.as_f64() == Some(2.0) => {}
        _ => return Err(format!("not a secrets file of version {VERSION}; it is left as it is")),
    }
    for slice in SLICES {
        if !matches!(tree.entry(slice, Tree::empty()), Some(Tree::Object(_))) {
            return Err(format!("{slice} is not an object; the file is left as it is"));
        }
    }
    Ok(tree)
}

fn new_tree() -> Tree {
    let version = [("version".to_owned(), Tree::Number(VERSION.into()))].into_iter();
    Tree::Object(version.chain(SLICES.map(|slice| (slice.to_owned(), Tree::empty()))).collect())
}

/// Returns the content and the status of the file, if it exists.
fn read(folder: &OwnedFd, name: &str) -> Result<Option<(Vec<u8>, Stat)>, String> {
    let not_a_file = || format!("{name} is not an ordinary file");
    match rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(None),
        Err(errno) => return Err(format!("{name} cannot be read: {errno}")),
        Ok(seen) if !is(&seen, FileType::RegularFile) => return Err(not_a_file()),
        Ok(_) => {}
    }
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let opened = rustix::fs::openat(folder, name, flags, Mode::empty())
        .map_err(|errno| format!("{name} cannot be read: {errno}"))?;
    // The name may refer to another file than before.
    let seen = rustix::fs::fstat(&opened).map_err(|errno| format!("{name} cannot be read: {errno}"))?;
    if !is(&seen, FileType::RegularFile) {
        return Err(not_a_file());
    }
    let mut content = Vec::new();
    let limited = File::from(opened).take(FILE_BYTES_MAX + 1).read_to_end(&mut content);
    limited.map_err(|error| format!("{name} cannot be read: {error}"))?;
    if content.len() as u64 > FILE_BYTES_MAX {
        return Err(format!("{name} is larger than {FILE_BYTES_MAX} bytes"));
    }
    Ok(Some((content, seen)))
}

fn write(folder: &OwnedFd, name: &str, text: &str, owner: &Stat, lock: &Lock<'_>) -> Result<(), String> {
    let (temporary, file) = make_temporary(folder, name).map_err(|errno| errno.to_string())?;
    let written = fill(file, text, owner).map_err(|errno| errno.to_string()).and_then(|()| {
        if !lock.is_ours() {
            return Err("the lock was taken away".to_owned());
        }
        rustix::fs::renameat(folder, &temporary, folder, name).map_err(|errno| errno.to_string())
    });
    if let Err(why) = written {
        // A file that cannot be removed is harmless.
        let _ = rustix::fs::unlinkat(folder, &temporary, AtFlags::empty());
        return Err(why);
    }
    rustix::fs::fsync(folder).map_err(|errno| errno.to_string())
}

/// Creates a temporary file. Existing files of the candidate names are left unchanged.
fn make_temporary(folder: &OwnedFd, name: &str) -> Result<(String, File), Errno> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    for number in 0..TEMPORARY_MAX {
        let temporary = format!("{name}.{}.{number}.tmp", std::process::id());
        match rustix::fs::openat(folder, &temporary, flags, Mode::RUSR | Mode::WUSR) {
            Err(Errno::EXIST) => {}
            opened => return Ok((temporary, File::from(opened?))),
        }
    }
    Err(Errno::EXIST)
}

fn fill(mut file: File, text: &str, owner: &Stat) -> Result<(), Errno> {
    rustix::fs::fchmod(&file, Mode::RUSR | Mode::WUSR)?;
    // A root daemon keeps the owner of the file. Another daemon can only write its own files.
    if rustix::process::geteuid().is_root() {
        let (uid, gid) = (rustix::fs::Uid::from_raw(owner.st_uid), rustix::fs::Gid::from_raw(owner.st_gid));
        rustix::fs::fchown(&file, Some(uid), Some(gid))?;
    }
    file.write_all(text.as_bytes()).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    rustix::fs::fsync(&file)
}

fn is(seen: &Stat, kind: FileType) -> bool {
    FileType::from_raw_mode(seen.st_mode) == kind
}

/// A lock that this process holds.
struct Lock<'a> {
    folder: BorrowedFd<'a>,
    name: String,
    inode: u64,
}

impl<'a> Lock<'a> {
    /// Takes the lock; `None` if another program holds it.
    fn take(folder: &'a OwnedFd, name: &str, stale_after: Duration) -> Result<Option<Lock<'a>>, String> {
        let failed = |errno: Errno| format!("{name} cannot be made: {errno}");
        for _ in 0..2 {
            match rustix::fs::mkdirat(folder, name, Mode::RWXU) {
                Ok(()) => {
                    let made = rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
                    return Ok(Some(Lock {
                        folder: folder.as_fd(),
                        name: name.to_owned(),
                        inode: made.st_ino,
                    }));
                }
                Err(Errno::EXIST) => {}
                Err(errno) => return Err(failed(errno)),
            }
            match rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(with_refresh)
                    if is(&with_refresh, FileType::Directory) && age(&with_refresh) > stale_after =>
                {
                    // Between the check and the removal another program may do the same and take the lock. In that case both
                    // find before the rename that the lock is not theirs.
                    let _ = rustix::fs::unlinkat(folder, name, AtFlags::REMOVEDIR);
                }
                Err(Errno::NOENT) => {}
                _ => return Ok(None),
            }
        }
        Ok(None)
    }

    /// Runs `work` while a thread keeps the lock from becoming stale.
    fn with_refresh<T>(&self, refresh_every: Duration, work: impl FnOnce() -> T) -> T {
        let (done, is_done) = mpsc::channel::<()>();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                while is_done.recv_timeout(refresh_every) == Err(RecvTimeoutError::Timeout) {
                    self.touch();
                }
            });
            let result = work();
            drop(done);
            result
        })
    }

    fn touch(&self) {
        let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
        let times = Timestamps { last_access: now, last_modification: now };
        // A lock that was removed is detected before the file is replaced.
        let _ = rustix::fs::utimensat(self.folder, &self.name, &times, AtFlags::SYMLINK_NOFOLLOW);
    }

    fn is_ours(&self) -> bool {
        let seen = rustix::fs::statat(self.folder, &self.name, AtFlags::SYMLINK_NOFOLLOW);
        seen.is_ok_and(|seen| seen.st_ino == self.inode)
    }

    fn release(self) {
        if self.is_ours() {
            // A lock that cannot be removed becomes stale.
            let _ = rustix::fs::unlinkat(self.folder, &self.name, AtFlags::REMOVEDIR);
        }
    }
}

/// Returns the time since the last update; zero for a time in the future.
fn age(seen: &Stat) -> Duration {
    let seconds = u64::try_from(seen.st_mtime).unwrap_or(0);
    let nanoseconds = u32::try_from(seen.st_mtime_nsec).unwrap_or(0).min(999_999_999);
    let touched = UNIX_EPOCH.checked_add(Duration::new(seconds, nanoseconds));
    touched.and_then(|touched| SystemTime::now().duration_since(touched).ok()).unwrap_or_default()
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
