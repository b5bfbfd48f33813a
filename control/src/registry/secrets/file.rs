//! The secrets file of one folder, changed under its lock.
//!
//! The container can write to the folder, so nothing in it is trusted: the folder is opened once and everything else is
//! named relative to it, no link is followed, no pipe is waited for, and sizes are bounded. The file is replaced by rename,
//! so whoever reads it sees the old one or the new one, whole.
//!
//! The lock is the one that the reference's programs take, too: a directory `FILE.lock`, which only one can make. Whoever
//! holds it sets its time again and again; one that nobody has touched for half a minute is of a program that died, and is
//! taken away.

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
/// The version of the file's form.
const VERSION: u64 = 2;
/// What a file of that version is made of, beside its version.
const SLICES: [&str; 3] = ["providers", "channels", "mcp"];
/// How many names of a temporary file are tried.
const TEMPORARY_MAX: u32 = 16;

/// How a lock is held.
#[derive(Clone, Copy, Debug)]
pub struct Holder {
    /// How old the lock of somebody else has to be to be taken away.
    pub stale_after: Duration,
    /// How often our own is touched while it is held.
    pub refresh_every: Duration,
}

impl Default for Holder {
    fn default() -> Holder {
        Holder { stale_after: Duration::from_secs(30), refresh_every: Duration::from_secs(10) }
    }
}

/// What became of a try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// The file is replaced, and on disk.
    Done,
    /// Somebody else holds the lock.
    Locked,
}

/// Replaces one object in the file `name` of `folder`, which is made if it is missing. Tries the lock once.
///
/// # Errors
/// A text that says what could not be done. The file is then as it was.
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
    let done = lock.held(holder.refresh_every, || replace(&folder, name, replacement, &lock));
    lock.give_back();
    done.map(|()| Attempt::Done)
}

fn replace(folder: &OwnedFd, name: &str, replacement: &Replacement, lock: &Lock<'_>) -> Result<(), String> {
    let (mut tree, owner) = match read(folder, name)? {
        Some((content, seen)) => (parse(&content).map_err(|why| format!("{name}: {why}"))?, seen),
        None => (fresh(), rustix::fs::fstat(folder).map_err(|errno| format!("{name}: {errno}"))?),
    };
    let slice = tree.entry(replacement.slice, Tree::empty());
    let place = slice.and_then(|slice| slice.entry(&replacement.key, Tree::Null));
    // Both are objects: that has been checked.
    *place.ok_or_else(|| format!("{name}: {} is not an object", replacement.slice))? =
        replacement.block.clone();
    let mut text = serde_json::to_string_pretty(&tree).map_err(|error| format!("{name}: {error}"))?;
    text.push('\n');
    write(folder, name, &text, &owner, lock).map_err(|why| format!("{name} cannot be written: {why}"))
}

/// Takes the content of a file, of the one version that is known.
///
/// # Errors
/// A text that says what does not fit.
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

fn fresh() -> Tree {
    let version = [("version".to_owned(), Tree::Number(VERSION.into()))].into_iter();
    Tree::Object(version.chain(SLICES.map(|slice| (slice.to_owned(), Tree::empty()))).collect())
}

/// The file's content and its facts, if there is a file.
fn read(folder: &OwnedFd, name: &str) -> Result<Option<(Vec<u8>, Stat)>, String> {
    let no_file = || format!("{name} is not an ordinary file");
    match rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(None),
        Err(errno) => return Err(format!("{name} cannot be read: {errno}")),
        Ok(seen) if !is(&seen, FileType::RegularFile) => return Err(no_file()),
        Ok(_) => {}
    }
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let opened = rustix::fs::openat(folder, name, flags, Mode::empty())
        .map_err(|errno| format!("{name} cannot be read: {errno}"))?;
    // What was looked at need not be what was opened.
    let seen = rustix::fs::fstat(&opened).map_err(|errno| format!("{name} cannot be read: {errno}"))?;
    if !is(&seen, FileType::RegularFile) {
        return Err(no_file());
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
        // Left behind otherwise, and nothing worse.
        let _ = rustix::fs::unlinkat(folder, &temporary, AtFlags::empty());
        return Err(why);
    }
    rustix::fs::fsync(folder).map_err(|errno| errno.to_string())
}

/// A file that nobody else has made. Whatever lies under a name that we might take is left alone.
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
    // A daemon of root writes for whoever the file belongs to; every other one can only write its own.
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

/// A lock that we made.
struct Lock<'a> {
    folder: BorrowedFd<'a>,
    name: String,
    inode: u64,
}

impl<'a> Lock<'a> {
    /// Makes the lock; `None` if somebody has it.
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
                Ok(held) if is(&held, FileType::Directory) && age(&held) > stale_after => {
                    // Between this look and the removal a third one may do the same and take the lock: both of them
                    // then find at their end that the lock is not theirs.
                    let _ = rustix::fs::unlinkat(folder, name, AtFlags::REMOVEDIR);
                }
                Err(Errno::NOENT) => {}
                _ => return Ok(None),
            }
        }
        Ok(None)
    }

    /// Does something while the lock is kept from going stale.
    fn held<T>(&self, refresh_every: Duration, work: impl FnOnce() -> T) -> T {
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
        // A lock that is gone is noticed before the file is replaced.
        let _ = rustix::fs::utimensat(self.folder, &self.name, &times, AtFlags::SYMLINK_NOFOLLOW);
    }

    fn is_ours(&self) -> bool {
        let seen = rustix::fs::statat(self.folder, &self.name, AtFlags::SYMLINK_NOFOLLOW);
        seen.is_ok_and(|seen| seen.st_ino == self.inode)
    }

    fn give_back(self) {
        if self.is_ours() {
            // One that cannot be removed goes stale.
            let _ = rustix::fs::unlinkat(self.folder, &self.name, AtFlags::REMOVEDIR);
        }
    }
}

/// How long ago something was touched; nothing for a time that is yet to come.
fn age(seen: &Stat) -> Duration {
    let seconds = u64::try_from(seen.st_mtime).unwrap_or(0);
    let nanoseconds = u32::try_from(seen.st_mtime_nsec).unwrap_or(0).min(999_999_999);
    let touched = UNIX_EPOCH.checked_add(Duration::new(seconds, nanoseconds));
    touched.and_then(|touched| SystemTime::now().duration_since(touched).ok()).unwrap_or_default()
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
