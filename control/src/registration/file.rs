//! One registration as one file (wire specification, A.7.1): a line of JSON, for its owner alone.
//!
//! A write is `O_EXCL` temporary → write → fsync → rename → fsync of the directory. Killed at any of these steps, it leaves
//! the file as it was, or as it is to be, and at most a temporary file that the next start removes: a name never has half
//! a registration. Only the daemon writes here, and only inside a container's queue, so no two writes of a name meet.
//!
//! What lies under a registration's name and is none (not JSON, of another release that means something else by a field,
//! a link, a pipe, a gigabyte) is never followed, waited for, overwritten or deleted. It stays where it is and costs its
//! own container only; when a new registration needs its place, or somebody deregisters its name, it is set aside as
//! `NAME.json.bad-1`, `-2`, and so on. A release that changes what a known field means writes `formatVersion`, and this
//! one leaves such a file alone.
//!
//! The order of registrations outlives the daemon, too: a file's time of modification is the moment when its name was first
//! registered, and a later write of the same name keeps it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir, Timespec, Timestamps, UTIME_OMIT};
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};
use serde_json::Value;
use thiserror::Error;

use super::model::{ContainerName, Registration};
use crate::paths::Home;

/// The longest file that is read or written, in bytes. A request has at most 64 KiB.
const FILE_BYTES_MAX: u64 = 1024 * 1024;
/// The newest meaning of the fields that this release knows.
const FORMAT_VERSION: u64 = 1;
/// How many files of one name are set aside at most.
const SET_ASIDE_MAX: u32 = 1_000;

/// Why a file is not a registration.
#[derive(Debug, Error)]
pub enum Unfit {
    /// It is not JSON.
    #[error("not JSON: {0}")]
    NotJson(String),
    /// It is, and not that of this registration; the text says what does not fit.
    #[error("schema mismatch")]
    Mismatch(String),
    /// It is no ordinary file.
    #[error("not an ordinary file")]
    NotAFile,
    /// It is larger than any registration.
    #[error("larger than {FILE_BYTES_MAX} bytes")]
    TooLarge,
    /// It cannot be read.
    #[error("it cannot be read: {0}")]
    Unreadable(Errno),
}

/// One file of the directory.
#[derive(Debug)]
pub struct Loaded {
    /// Its name without `.json`.
    pub stem: String,
    /// What is in it.
    pub found: Result<Registration, Unfit>,
}

/// A step that failed, and what it was about.
#[derive(Debug, Error)]
#[error("{what} {path}: {errno}")]
pub struct FileError {
    what: &'static str,
    path: String,
    errno: Errno,
}

/// Reads a registration from the content of the file `STEM.json`. Pure.
///
/// # Errors
/// [`Unfit::NotJson`] and [`Unfit::Mismatch`].
pub fn parse(stem: &str, content: &[u8]) -> Result<Registration, Unfit> {
    let value: Value = serde_json::from_slice(content).map_err(|error| Unfit::NotJson(error.to_string()))?;
    let Value::Object(fields) = value else {
        return Err(Unfit::Mismatch("it is not an object".to_owned()));
    };
    let registration =
        Registration::from_fields(fields).map_err(|error| Unfit::Mismatch(error.to_string()))?;
    if registration.container_name.as_str() != stem {
        return Err(Unfit::Mismatch(format!("it is about {}", registration.container_name)));
    }
    check_version(&registration).map_err(Unfit::Mismatch)?;
    Ok(registration)
}

/// Whether this release knows what the fields mean.
///
/// # Errors
/// A text that says why not.
pub(super) fn check_version(registration: &Registration) -> Result<(), String> {
    match registration.unknown.get("formatVersion") {
        None => Ok(()),
        Some(version) if version.as_u64().is_some_and(|version| version <= FORMAT_VERSION) => Ok(()),
        Some(version) => Err(format!("formatVersion {version} is of a newer release")),
    }
}

/// Removes what an earlier daemon left half-written, and reads everything else, in the order in which it was first
/// registered. A directory that does not exist holds nothing.
///
/// # Errors
/// When the directory itself cannot be read. A file that cannot be is one of those returned.
pub fn load_all(home: &Home) -> Result<Vec<Loaded>, FileError> {
    let directory = match open_directory(home) {
        Err(error) if error.errno == Errno::NOENT => return Ok(Vec::new()),
        opened => opened?,
    };
    let mut loaded = Vec::new();
    for name in names(&directory).map_err(failed("reading", &home.registrations()))? {
        if is_temporary(&name) {
            // A temporary file that cannot be removed does no harm.
            let _ = rustix::fs::unlinkat(&directory, &name, AtFlags::empty());
        } else if let Some(stem) = name.strip_suffix(".json") {
            let found = load(&directory, stem);
            loaded.push((written_at(&directory, &name), Loaded { stem: stem.to_owned(), found }));
        }
    }
    let place = |(at, one): &(Option<Timespec>, Loaded)| (*at, one.stem.clone());
    loaded.sort_by_cached_key(place);
    Ok(loaded.into_iter().map(|(_, one)| one).collect())
}

/// Writes a registration in the place of what is there; what is set aside for it is named in the answer.
///
/// # Errors
/// [`FileError`]. The old file is then still there, unless it was the directory that could not be synchronised: then the
/// new one is, and may be lost when the machine loses its power.
pub fn write(home: &Home, registration: &Registration) -> Result<Option<String>, FileError> {
    let path = home.registration(&registration.container_name);
    let directory = open_directory(home)?;
    let stem = registration.container_name.as_str();
    let temporary = format!("{stem}.json.{}.tmp", std::process::id());
    let known = load(&directory, stem).ok().and_then(|_| written_at(&directory, &format!("{stem}.json")));
    let at = known.unwrap_or_else(|| clock_gettime(ClockId::Realtime));
    let written = write_temporary(&directory, &temporary, registration, at)
        .and_then(|()| make_room(&directory, stem))
        .and_then(|set_aside| {
            rustix::fs::renameat(&directory, &temporary, &directory, format!("{stem}.json"))?;
            Ok(set_aside)
        });
    let set_aside = written.map_err(|errno| {
        // The next start removes what is left of it otherwise.
        let _ = rustix::fs::unlinkat(&directory, &temporary, AtFlags::empty());
        failed("writing", &path)(errno)
    })?;
    rustix::fs::fsync(&directory).map_err(failed("synchronising the directory of", &path))?;
    Ok(set_aside)
}

/// Removes the registration of a name, if there is one. What is not a registration is set aside, and named in the answer.
///
/// # Errors
/// [`FileError`]; the file may then still be there.
pub fn remove(home: &Home, name: &ContainerName) -> Result<Option<String>, FileError> {
    let path = home.registration(name);
    let directory = match open_directory(home) {
        Err(error) if error.errno == Errno::NOENT => return Ok(None),
        opened => opened?,
    };
    let set_aside = make_room(&directory, name.as_str()).map_err(failed("setting aside", &path))?;
    match rustix::fs::unlinkat(&directory, format!("{name}.json"), AtFlags::empty()) {
        Ok(()) => {}
        Err(Errno::NOENT) if set_aside.is_none() => return Ok(None),
        Err(Errno::NOENT) => {}
        Err(errno) => return Err(failed("removing", &path)(errno)),
    }
    rustix::fs::fsync(&directory).map_err(failed("synchronising the directory of", &path))?;
    Ok(set_aside)
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(Errno) -> FileError {
    move |errno| FileError { what, path: path.display().to_string(), errno }
}

fn open_directory(home: &Home) -> Result<OwnedFd, FileError> {
    let path = home.registrations();
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(&path, flags, Mode::empty()).map_err(failed("opening", &path))
}

/// The names in a directory; those that are not UTF-8 are none of ours.
fn names(directory: &OwnedFd) -> Result<Vec<String>, Errno> {
    let mut buffer = Vec::with_capacity(8 * 1024);
    let mut entries = RawDir::new(directory, buffer.spare_capacity_mut());
    let mut names = Vec::new();
    while let Some(entry) = entries.next() {
        if let Ok(name) = entry?.file_name().to_str() {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

/// `NAME.json.PID.tmp`.
fn is_temporary(name: &str) -> bool {
    let pid = name.strip_suffix(".tmp").and_then(|rest| rest.rsplit_once(".json.")).map(|(_, pid)| pid);
    pid.is_some_and(|pid| !pid.is_empty() && pid.bytes().all(|byte| byte.is_ascii_digit()))
}

/// When the name was first registered, as far as its file says.
fn written_at(directory: &OwnedFd, name: &str) -> Option<Timespec> {
    let seen = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
    Some(Timespec { tv_sec: seen.st_mtime, tv_nsec: seen.st_mtime_nsec.try_into().ok()? })
}

fn load(directory: &OwnedFd, stem: &str) -> Result<Registration, Unfit> {
    let content = read(directory, &format!("{stem}.json"))?;
    parse(stem, &content)
}

fn read(directory: &OwnedFd, name: &str) -> Result<Vec<u8>, Unfit> {
    // Looked at before it is opened, since opening a device may have effects, and once more when it is open.
    let ordinary = |mode| FileType::from_raw_mode(mode) == FileType::RegularFile;
    let seen = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW).map_err(Unfit::Unreadable)?;
    if !ordinary(seen.st_mode) {
        return Err(Unfit::NotAFile);
    }
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let opened = rustix::fs::openat(directory, name, flags, Mode::empty()).map_err(Unfit::Unreadable)?;
    if !ordinary(rustix::fs::fstat(&opened).map_err(Unfit::Unreadable)?.st_mode) {
        return Err(Unfit::NotAFile);
    }
    let mut content = Vec::new();
    let unreadable = |error: io::Error| Unfit::Unreadable(Errno::from_io_error(&error).unwrap_or(Errno::IO));
    // One byte more than may be: a file that grows while it is read ends there, too.
    File::from(opened).take(FILE_BYTES_MAX + 1).read_to_end(&mut content).map_err(unreadable)?;
    if content.len() as u64 > FILE_BYTES_MAX {
        return Err(Unfit::TooLarge);
    }
    Ok(content)
}

fn write_temporary(
    directory: &OwnedFd,
    name: &str,
    registration: &Registration,
    at: Timespec,
) -> Result<(), Errno> {
    // A path that is not UTF-8 is the one thing that does not serialise, and no request can carry one.
    let mut line = serde_json::to_vec(registration).map_err(|_| Errno::ILSEQ)?;
    line.push(b'\n');
    if line.len() as u64 > FILE_BYTES_MAX {
        return Err(Errno::FBIG);
    }
    let mode = Mode::RUSR | Mode::WUSR;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let opened = match rustix::fs::openat(directory, name, flags, mode) {
        // Left by a write of this process that failed, or by an earlier process of the same number.
        Err(Errno::EXIST) => {
            rustix::fs::unlinkat(directory, name, AtFlags::empty())?;
            rustix::fs::openat(directory, name, flags, mode)?
        }
        opened => opened?,
    };
    // Whatever the umask is.
    rustix::fs::fchmod(&opened, mode)?;
    let mut file = File::from(opened);
    file.write_all(&line).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    // To the nanosecond: the kernel's own time of a file may be that of its last tick.
    let kept = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
    rustix::fs::futimens(&file, &Timestamps { last_access: kept, last_modification: at })?;
    rustix::fs::fsync(&file)
}

/// Sets aside what is in a registration's place and is none; a registration stays.
fn make_room(directory: &OwnedFd, stem: &str) -> Result<Option<String>, Errno> {
    match load(directory, stem) {
        Ok(_) | Err(Unfit::Unreadable(Errno::NOENT)) => return Ok(None),
        Err(_) => {}
    }
    for number in 1..=SET_ASIDE_MAX {
        let aside = format!("{stem}.json.bad-{number}");
        // Nobody else makes names here, so one that is free stays so.
        match rustix::fs::statat(directory, &aside, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => {
                rustix::fs::renameat(directory, format!("{stem}.json"), directory, &aside)?;
                return Ok(Some(aside));
            }
            Err(errno) => return Err(errno),
            Ok(_) => {}
        }
    }
    Err(Errno::NOSPC)
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
