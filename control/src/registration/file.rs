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

use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, Mode, OFlags, RawDir, Timespec};
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};
use serde_json::Value;
use thiserror::Error;

use super::model::{ContainerName, Registration};
use crate::paths::Home;
use crate::sys::private_file::{self, ReadError};

/// The longest file that is read or written, in bytes. A request has at most 64 KiB.
const FILE_BYTES_MAX: u64 = 1024 * 1024;
/// The newest meaning of the fields that this release knows.
const FORMAT_VERSION: u64 = 1;

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

impl From<ReadError> for Unfit {
    fn from(error: ReadError) -> Unfit {
        match error {
            ReadError::NotAFile => Unfit::NotAFile,
            ReadError::TooLarge => Unfit::TooLarge,
            ReadError::Unreadable(errno) => Unfit::Unreadable(errno),
        }
    }
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
    private_file::open(directory, name)
        .and_then(|file| private_file::read(file, FILE_BYTES_MAX))
        .map_err(Unfit::from)
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
    private_file::write_temporary(directory, name, &line, Some(at))
}

/// Sets aside what is in a registration's place and is none; a registration stays.
fn make_room(directory: &OwnedFd, stem: &str) -> Result<Option<String>, Errno> {
    match load(directory, stem) {
        Ok(_) | Err(Unfit::Unreadable(Errno::NOENT)) => return Ok(None),
        Err(_) => {}
    }
    private_file::set_aside(directory, &format!("{stem}.json")).map(Some)
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
