//! One registration as one file (wire specification, A.7.1): a line of JSON, readable by its owner only. The grants of a
//! container are stored in the same way, in their own directory.
//!
//! A write is `O_EXCL` temporary → write → fsync → rename → fsync of the directory. A crash at any step leaves the old or
//! the new content, and at most a temporary file that the next start removes. A name never has a partial registration. Only
//! the daemon writes here, and only in a container's queue, so writes of one name never overlap.
//!
//! An entry with a registration's name may not be a registration: invalid JSON, a file of another release in which a field
//! has another meaning, a link, a pipe, a file of a gigabyte. It is never followed, waited for, overwritten or deleted. It
//! remains, and affects only its own container. When that name is registered or deregistered, it is renamed to
//! `NAME.json.bad-1`, `-2`, and so on. A release that changes the meaning of a known field writes `formatVersion`, and this
//! release then leaves the file unchanged.
//!
//! The order of registrations survives the daemon: the modification time of a file is the time of the first registration of
//! its name, and later writes of that name keep it.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags, RawDir, Timespec};
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;
use serde_json::{Map, Value};
use thiserror::Error;

use crate::model::grants::Grants;
use crate::model::registration::{ContainerName, Registration};
use crate::sys::paths::Home;
use crate::sys::private_file::{self, ReadError};

/// The maximum size of a file that is read or written, in bytes. A request has at most 64 KiB.
const FILE_BYTES_MAX: u64 = 1024 * 1024;
/// The newest format version that this release understands.
const FORMAT_VERSION: u64 = 1;

/// The reasons why a file is not a registration.
#[derive(Debug, Error)]
pub enum InvalidFile {
    /// It is not JSON.
    #[error("not JSON: {0}")]
    NotJson(String),
    /// It is JSON, but not this registration. The text names the difference.
    #[error("schema mismatch")]
    Mismatch(String),
    /// It is not a regular file.
    #[error("not an ordinary file")]
    NotAFile,
    /// It is larger than any registration.
    #[error("larger than {FILE_BYTES_MAX} bytes")]
    TooLarge,
    /// It cannot be read.
    #[error("it cannot be read: {0}")]
    Unreadable(Errno),
}

impl From<ReadError> for InvalidFile {
    fn from(error: ReadError) -> InvalidFile {
        match error {
            ReadError::NotAFile => InvalidFile::NotAFile,
            ReadError::TooLarge => InvalidFile::TooLarge,
            ReadError::Unreadable(errno) => InvalidFile::Unreadable(errno),
        }
    }
}

/// A value that is stored as one file for each container.
pub trait Record: Serialize + Sized {
    /// Returns the directory of these files.
    fn directory(home: &Home) -> PathBuf;

    /// Parses the value from the fields of its file.
    ///
    /// # Errors
    /// A text that names the invalid field.
    fn from_fields(fields: Map<String, Value>) -> Result<Self, String>;

    /// Returns the name of the container.
    fn container_name(&self) -> &ContainerName;

    /// Returns the fields of the file that this build does not define.
    fn unknown(&self) -> &Map<String, Value>;
}

impl Record for Registration {
    fn directory(home: &Home) -> PathBuf {
        home.registrations()
    }

    fn from_fields(fields: Map<String, Value>) -> Result<Registration, String> {
        Registration::from_fields(fields).map_err(|error| error.to_string())
    }

    fn container_name(&self) -> &ContainerName {
        &self.container_name
    }

    fn unknown(&self) -> &Map<String, Value> {
        &self.unknown
    }
}

impl Record for Grants {
    fn directory(home: &Home) -> PathBuf {
        home.grants()
    }

    fn from_fields(fields: Map<String, Value>) -> Result<Grants, String> {
        serde_json::from_value(Value::Object(fields)).map_err(|error| error.to_string())
    }

    fn container_name(&self) -> &ContainerName {
        &self.container_name
    }

    fn unknown(&self) -> &Map<String, Value> {
        &self.unknown
    }
}

/// One file of a directory.
#[derive(Debug)]
pub struct Loaded<R> {
    /// The file name without `.json`.
    pub stem: String,
    /// The record in the file.
    pub found: Result<R, InvalidFile>,
}

/// A failed step, with its path.
#[derive(Debug, Error)]
#[error("{what} {path}: {errno}")]
pub struct FileError {
    what: &'static str,
    path: String,
    errno: Errno,
}

/// Parses a record from the content of the file `STEM.json`. Pure.
///
/// # Errors
/// [`InvalidFile::NotJson`] and [`InvalidFile::Mismatch`].
pub fn parse<R: Record>(stem: &str, content: &[u8]) -> Result<R, InvalidFile> {
    let value: Value =
        serde_json::from_slice(content).map_err(|error| InvalidFile::NotJson(error.to_string()))?;
    let Value::Object(fields) = value else {
        return Err(InvalidFile::Mismatch("it is not an object".to_owned()));
    };
    let record = R::from_fields(fields).map_err(InvalidFile::Mismatch)?;
    if record.container_name().as_str() != stem {
        return Err(InvalidFile::Mismatch(format!("it is about {}", record.container_name())));
    }
    check_version(&record).map_err(InvalidFile::Mismatch)?;
    Ok(record)
}

/// Checks that this release understands the format version.
///
/// # Errors
/// A text with the reason.
pub(super) fn check_version(record: &impl Record) -> Result<(), String> {
    match record.unknown().get("formatVersion") {
        None => Ok(()),
        Some(version) if version.as_u64().is_some_and(|version| version <= FORMAT_VERSION) => Ok(()),
        Some(version) => Err(format!("formatVersion {version} is of a newer release")),
    }
}

/// Removes the temporary files of an earlier daemon, and reads all other files in the order of their first registration. A
/// missing directory is empty.
///
/// # Errors
/// [`FileError`] if the directory cannot be read. An unreadable file is part of the result.
pub fn load_all<R: Record>(home: &Home) -> Result<Vec<Loaded<R>>, FileError> {
    let path = R::directory(home);
    let directory = match open_directory(&path) {
        Err(error) if error.errno == Errno::NOENT => return Ok(Vec::new()),
        opened => opened?,
    };
    let mut loaded = Vec::new();
    for name in names(&directory).map_err(failed("reading", &path))? {
        if is_temporary(&name) {
            // A temporary file that cannot be removed is harmless.
            let _ = rustix::fs::unlinkat(&directory, &name, AtFlags::empty());
        } else if let Some(stem) = name.strip_suffix(".json") {
            let found = load(&directory, stem);
            loaded.push((registered_at(&directory, &name), Loaded { stem: stem.to_owned(), found }));
        }
    }
    let paths_of = |(at, one): &(Option<Timespec>, Loaded<R>)| (*at, one.stem.clone());
    loaded.sort_by_cached_key(paths_of);
    Ok(loaded.into_iter().map(|(_, one)| one).collect())
}

/// Reads the record of a name, if it has a file.
///
/// # Errors
/// [`InvalidFile`] if the file is not a record.
pub(crate) fn load_one<R: Record>(home: &Home, name: &ContainerName) -> Result<Option<R>, InvalidFile> {
    let opened = open_directory(&R::directory(home)).map_err(|error| InvalidFile::Unreadable(error.errno));
    match opened.and_then(|directory| load(&directory, name.as_str())) {
        Err(InvalidFile::Unreadable(Errno::NOENT)) => Ok(None),
        loaded => loaded.map(Some),
    }
}

/// Writes a record, which replaces the earlier one of its name. Returns the new name of an invalid file that was set aside.
///
/// # Errors
/// [`FileError`]. The old file then remains, unless only the sync of the directory failed: then the new file is in place,
/// and may be lost in a power failure.
pub fn write<R: Record>(home: &Home, record: &R) -> Result<Option<String>, FileError> {
    let stem = record.container_name().as_str();
    let (directory, path) = paths_of::<R>(home, record.container_name());
    let directory = open_directory(&directory)?;
    let temporary = format!("{stem}.json.{}.tmp", std::process::id());
    let known =
        load::<R>(&directory, stem).ok().and_then(|_| registered_at(&directory, &format!("{stem}.json")));
    let at = known.unwrap_or_else(|| clock_gettime(ClockId::Realtime));
    let written = write_temporary(&directory, &temporary, record, at)
        .and_then(|()| set_aside_invalid::<R>(&directory, stem))
        .and_then(|set_aside| {
            rustix::fs::renameat(&directory, &temporary, &directory, format!("{stem}.json"))?;
            Ok(set_aside)
        });
    let set_aside = written.map_err(|errno| {
        // If this fails, the next start removes the file.
        let _ = rustix::fs::unlinkat(&directory, &temporary, AtFlags::empty());
        failed("writing", &path)(errno)
    })?;
    rustix::fs::fsync(&directory).map_err(failed("synchronising the directory of", &path))?;
    Ok(set_aside)
}

/// Removes the record of a name, if it exists. A file that is not a record is set aside, and its new name is returned.
///
/// # Errors
/// [`FileError`]; the file may then remain.
pub fn remove<R: Record>(home: &Home, name: &ContainerName) -> Result<Option<String>, FileError> {
    let (directory, path) = paths_of::<R>(home, name);
    let directory = match open_directory(&directory) {
        Err(error) if error.errno == Errno::NOENT => return Ok(None),
        opened => opened?,
    };
    let set_aside =
        set_aside_invalid::<R>(&directory, name.as_str()).map_err(failed("setting aside", &path))?;
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

/// Returns the directory of a record, and its path. A [`ContainerName`] has no characters that could leave the directory.
fn paths_of<R: Record>(home: &Home, name: &ContainerName) -> (PathBuf, PathBuf) {
    let directory = R::directory(home);
    let path = directory.join(format!("{name}.json"));
    (directory, path)
}

fn open_directory(path: &Path) -> Result<OwnedFd, FileError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).map_err(failed("opening", path))
}

/// Returns the names in a directory. Skips names that are not UTF-8, which this program never writes.
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

/// Returns whether a name has the form `NAME.json.PID.tmp`.
fn is_temporary(name: &str) -> bool {
    let pid = name.strip_suffix(".tmp").and_then(|rest| rest.rsplit_once(".json.")).map(|(_, pid)| pid);
    pid.is_some_and(|pid| !pid.is_empty() && pid.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Returns the time of the first registration of a name, which is the modification time of its file.
fn registered_at(directory: &OwnedFd, name: &str) -> Option<Timespec> {
    let seen = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
    Some(Timespec { tv_sec: seen.st_mtime, tv_nsec: seen.st_mtime_nsec.try_into().ok()? })
}

fn load<R: Record>(directory: &OwnedFd, stem: &str) -> Result<R, InvalidFile> {
    let content = read(directory, &format!("{stem}.json"))?;
    parse(stem, &content)
}

fn read(directory: &OwnedFd, name: &str) -> Result<Vec<u8>, InvalidFile> {
    private_file::open(directory, name)
        .and_then(|file| private_file::read(file, FILE_BYTES_MAX))
        .map_err(InvalidFile::from)
}

fn write_temporary(directory: &OwnedFd, name: &str, record: &impl Record, at: Timespec) -> Result<(), Errno> {
    // Serialisation fails only for a path that is not UTF-8, and no request can contain one.
    let mut line = serde_json::to_vec(record).map_err(|_| Errno::ILSEQ)?;
    line.push(b'\n');
    if line.len() as u64 > FILE_BYTES_MAX {
        return Err(Errno::FBIG);
    }
    private_file::write_temporary(directory, name, &line, Some(at))
}

/// Sets aside a file that has a record's name but is not a record. A valid record remains.
fn set_aside_invalid<R: Record>(directory: &OwnedFd, stem: &str) -> Result<Option<String>, Errno> {
    match load::<R>(directory, stem) {
        Ok(_) | Err(InvalidFile::Unreadable(Errno::NOENT)) => return Ok(None),
        Err(_) => {}
    }
    private_file::set_aside(directory, &format!("{stem}.json")).map(Some)
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
