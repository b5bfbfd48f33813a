//! The build context: a folder as the tar that Docker expects.
//!
//! A container may write to the folder while it is read. Each name is therefore opened relative to its open directory and
//! never through a link; links are sent as links. If a file shrinks or grows meanwhile, its content is padded or truncated
//! to the size in its header. Owners are not sent, as with Docker's own client.
//!
//! A container may also make the folder as large as it can: a sparse file can have a size of terabytes without blocks, and
//! counts by its size, which is what the tar contains. The bytes of the tar, the number of names and the depth are therefore
//! bounded. The folder is measured before any of it is sent, and the same bounds apply while it is sent.

use std::ffi::OsStr;
use std::fs::{File, Metadata};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use tar::{Builder, EntryType, Header};
use thiserror::Error;

use super::BuildFrom;
use super::ignore::Ignored;
use crate::model::size::ByteSize;

/// The default name of the Dockerfile.
pub(super) const DOCKERFILE: &str = "Dockerfile";
/// The name of the file with the patterns to exclude.
const DOCKERIGNORE: &str = ".dockerignore";
/// The maximum size of either file, in bytes.
const TEXT_BYTES_MAX: u64 = 1024 * 1024;

/// The maximum nesting of directories. Each has an open descriptor while its descendants are read.
const DEPTH_MAX: usize = 256;
/// The maximum number of names that are listed, including ignored ones. The names of a directory are in memory while it is
/// read.
const NAMES_MAX: u64 = 1_000_000;
/// The block size of a tar, in bytes: a header takes one block, and the content is padded to whole blocks.
const BLOCK_BYTES: u64 = 512;

/// The reasons why a folder cannot be sent to a build.
#[derive(Debug, Error)]
pub(super) enum ContextError {
    /// The folder has too many bytes.
    #[error("{TOO_LARGE} {}: {} has {}", ByteSize(*bytes_max), path.display(), ByteSize(*bytes))]
    TooLarge {
        /// The first file beyond the limit.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The limit for the folder.
        bytes_max: u64,
    },
    /// Its directories are nested too deeply.
    #[error("the folder of the build has more than {DEPTH_MAX} nested directories: {}", .0.display())]
    TooDeep(PathBuf),
    /// The folder has too many files.
    #[error("the folder of the build has more than {NAMES_MAX} files, the last in {}", .0.display())]
    TooMany(PathBuf),
    /// A name cannot be opened or read.
    #[error("{}: {source}", path.display())]
    Unreadable {
        /// The name.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// The tar cannot be written.
    #[error("{0}")]
    Write(io::Error),
}

/// The start of the text of [`ContextError::TooLarge`], by which the command line recognises it.
pub(crate) const TOO_LARGE: &str = "the folder of the build has more than";

/// A folder that can be built.
#[derive(Debug)]
pub(super) struct Context {
    bytes_max: u64,
    folder: OwnedFd,
    ignored: Ignored,
    /// The text of the Dockerfile, and its path.
    dockerfile: String,
    place: PathBuf,
}

impl Context {
    /// Opens a folder to build. Checks that a Dockerfile exists and that `.dockerignore` is valid. At most `bytes_max` bytes
    /// of it are ever sent.
    ///
    /// # Errors
    /// A text for the user that names what is missing or invalid.
    pub(super) fn open(path: &Path, from: &BuildFrom, bytes_max: u64) -> Result<Context, String> {
        let unusable =
            |errno: Errno| format!("{} cannot be opened: {errno}", path.join(&from.context).display());
        if ![&from.context, &from.dockerfile].into_iter().all(|path| is_below(path)) {
            return Err(format!("{} cannot be built: a path leads out of it", path.display()));
        }
        let directory = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut folder = rustix::fs::open(path, directory, Mode::empty()).map_err(unusable)?;
        if from.context != Path::new("") {
            let context =
                rustix::fs::openat2(&folder, &from.context, directory, Mode::empty(), BELOW_WITHOUT_LINKS);
            folder = context.map_err(unusable)?;
        }
        let dockerfile = text(&folder, &from.dockerfile)?.ok_or_else(|| {
            format!("there is no {} in {}", from.dockerfile.display(), path.join(&from.context).display())
        })?;
        let ignored = Ignored::parse(&text(&folder, Path::new(DOCKERIGNORE))?.unwrap_or_default())?;
        Ok(Context { bytes_max, folder, ignored, dockerfile, place: from.dockerfile.clone() })
    }

    /// Returns the path of the Dockerfile.
    pub(super) fn dockerfile(&self) -> &Path {
        &self.place
    }

    /// Returns whether a stage of the build starts from the image. Building under that name would stack the image on itself.
    pub(super) fn starts_from(&self, image: &str) -> bool {
        let bare = |name: &str| name.strip_suffix(":latest").unwrap_or(name).to_owned();
        self.dockerfile
            .lines()
            .map(|line| line.split_whitespace())
            .filter_map(|mut words| {
                words.next().filter(|word| word.eq_ignore_ascii_case("FROM")).map(|_| words)
            })
            .filter_map(|words| words.into_iter().find(|word| !word.starts_with("--")))
            .any(|base| bare(base) == bare(image))
    }

    /// Checks the bounds of the folder without reading its files.
    ///
    /// # Errors
    /// [`ContextError`].
    pub(super) fn measure(&self) -> Result<(), ContextError> {
        self.traverse(None::<Builder<io::Sink>>).map(drop)
    }

    /// Writes the tar.
    ///
    /// # Errors
    /// [`ContextError`].
    pub(super) fn write(&self, to: impl Write) -> Result<(), ContextError> {
        let tar = self.traverse(Some(Builder::new(to)))?;
        let flushed = tar.map(|tar| tar.into_inner().and_then(|mut to| to.flush()));
        flushed.unwrap_or(Ok(())).map_err(ContextError::Write)
    }

    fn traverse<W: Write>(&self, tar: Option<Builder<W>>) -> Result<Option<Builder<W>>, ContextError> {
        let top = self.folder.try_clone().map_err(ContextError::Write)?;
        let mut traverse =
            Traversal { context: self, tar, bytes_left: self.bytes_max, names_left: NAMES_MAX };
        traverse.add_directory(&top, Path::new(""), 0)?;
        Ok(traverse.tar)
    }

    /// Returns whether a path is sent. The two files that Docker reads are always sent; Docker excludes them from the image
    /// if they are ignored.
    fn is_included(&self, path: &Path) -> bool {
        path == self.place
            || path == Path::new(DOCKERIGNORE)
            || !self.ignored.ignores(&path.to_string_lossy())
    }
}

/// One traversal of a folder. Without a tar it only measures.
struct Traversal<'a, W: Write> {
    context: &'a Context,
    tar: Option<Builder<W>>,
    bytes_left: u64,
    names_left: u64,
}

impl<W: Write> Traversal<'_, W> {
    fn add_directory(&mut self, directory: &OwnedFd, below: &Path, depth: usize) -> Result<(), ContextError> {
        if depth > DEPTH_MAX {
            return Err(ContextError::TooDeep(below.to_owned()));
        }
        for name in self.names(directory, below)? {
            let name = OsStr::from_bytes(&name);
            let path = below.join(name);
            match self.add(directory, name, &path, depth) {
                // The file was removed after it was listed.
                Err(ContextError::Unreadable { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                added => added?,
            }
        }
        Ok(())
    }

    /// Returns the names in a directory in a stable order.
    fn names(&mut self, directory: &OwnedFd, path: &Path) -> Result<Vec<Vec<u8>>, ContextError> {
        let mut names: Vec<Vec<u8>> = Vec::new();
        for entry in Dir::read_from(directory).map_err(unreadable(path))? {
            let name = entry.map_err(unreadable(path))?.file_name().to_bytes().to_vec();
            if name != b"." && name != b".." {
                self.names_left =
                    self.names_left.checked_sub(1).ok_or_else(|| ContextError::TooMany(path.to_owned()))?;
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    fn add(&mut self, within: &OwnedFd, name: &OsStr, path: &Path, depth: usize) -> Result<(), ContextError> {
        let seen = rustix::fs::statat(within, name, AtFlags::SYMLINK_NOFOLLOW).map_err(unreadable(path))?;
        let context = self.context;
        let is_included = context.is_included(path);
        match FileType::from_raw_mode(seen.st_mode) {
            FileType::Directory
                if is_included || context.ignored.has_exceptions() || context.place.starts_with(path) =>
            {
                let directory = open(within, name, OFlags::DIRECTORY).map_err(unreadable(path))?;
                if is_included {
                    self.count(path, 0)?;
                    self.append_directory(&directory, path)?;
                }
                self.add_directory(&directory, path, depth + 1)
            }
            FileType::RegularFile if is_included && self.tar.is_none() => {
                self.count(path, u64::try_from(seen.st_size).unwrap_or(0))
            }
            FileType::RegularFile if is_included => {
                let file = File::from(open(within, name, OFlags::NONBLOCK).map_err(unreadable(path))?);
                let about = file.metadata().map_err(|source| unreadable_because(path, source))?;
                if !about.is_file() {
                    return Ok(());
                }
                self.count(path, about.len())?;
                self.append_file(file, &about, path)
            }
            FileType::Symlink if is_included => {
                self.count(path, 0)?;
                let target = rustix::fs::readlinkat(within, name, Vec::new()).map_err(unreadable(path))?;
                self.append_link(Path::new(OsStr::from_bytes(target.as_bytes())), path)
            }
            // An image cannot contain a socket, a pipe or a device.
            _ => Ok(()),
        }
    }

    /// Counts an entry of the tar: its header, and its content in whole blocks.
    fn count(&mut self, path: &Path, bytes: u64) -> Result<(), ContextError> {
        let entry =
            bytes.checked_next_multiple_of(BLOCK_BYTES).and_then(|bytes| bytes.checked_add(BLOCK_BYTES));
        let left = entry.and_then(|entry| self.bytes_left.checked_sub(entry));
        let bytes_max = self.context.bytes_max;
        self.bytes_left =
            left.ok_or_else(|| ContextError::TooLarge { path: path.to_owned(), bytes, bytes_max })?;
        Ok(())
    }

    fn append_directory(&mut self, directory: &OwnedFd, path: &Path) -> Result<(), ContextError> {
        let Some(tar) = &mut self.tar else { return Ok(()) };
        let about = directory.try_clone().and_then(|directory| File::from(directory).metadata());
        let mut header =
            header(&about.map_err(|source| unreadable_because(path, source))?, EntryType::Directory);
        header.set_size(0);
        tar.append_data(&mut header, path, io::empty()).map_err(ContextError::Write)
    }

    fn append_file(&mut self, file: File, about: &Metadata, path: &Path) -> Result<(), ContextError> {
        let Some(tar) = &mut self.tar else { return Ok(()) };
        let mut header = header(about, EntryType::Regular);
        let bytes = about.len();
        let content = file.take(bytes).chain(io::repeat(0)).take(bytes);
        tar.append_data(&mut header, path, content).map_err(ContextError::Write)
    }

    fn append_link(&mut self, target: &Path, path: &Path) -> Result<(), ContextError> {
        let Some(tar) = &mut self.tar else { return Ok(()) };
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::Symlink);
        header.set_mode(0o777);
        header.set_size(0);
        tar.append_link(&mut header, path, target).map_err(ContextError::Write)
    }
}

fn unreadable(path: &Path) -> impl FnOnce(Errno) -> ContextError {
    move |errno| unreadable_because(path, errno.into())
}

fn unreadable_because(path: &Path, source: io::Error) -> ContextError {
    ContextError::Unreadable { path: path.to_owned(), source }
}

fn open(within: &OwnedFd, name: &OsStr, more: OFlags) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | more;
    rustix::fs::openat(within, name, flags, Mode::empty())
}

fn header(about: &Metadata, kind: EntryType) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(about.mode() & 0o7777);
    header.set_mtime(u64::try_from(about.mtime()).unwrap_or(0));
    header.set_size(about.len());
    header
}

/// Resolution without links and without leaving the directory.
const BELOW_WITHOUT_LINKS: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS);

/// Returns whether a path is relative and contains no `..`.
fn is_below(path: &Path) -> bool {
    path.components().all(|component| matches!(component, Component::Normal(_)))
}

/// Returns the text of a small file in the folder; `None` if it does not exist.
fn text(folder: &OwnedFd, name: &Path) -> Result<Option<String>, String> {
    let read_error = |why: &dyn std::fmt::Display| format!("{} cannot be read: {why}", name.display());
    let file = match rustix::fs::openat2(
        folder,
        name,
        OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC,
        Mode::empty(),
        BELOW_WITHOUT_LINKS,
    ) {
        Ok(file) => File::from(file),
        Err(Errno::NOENT) => return Ok(None),
        Err(Errno::LOOP) => return Err(read_error(&"it is a symbolic link")),
        Err(errno) => return Err(read_error(&errno)),
    };
    if !file.metadata().map_err(|error| read_error(&error))?.is_file() {
        return Err(read_error(&"it is not a regular file"));
    }
    let mut text = String::new();
    file.take(TEXT_BYTES_MAX + 1).read_to_string(&mut text).map_err(|error| read_error(&error))?;
    if text.len() as u64 > TEXT_BYTES_MAX {
        return Err(read_error(&"it is too long"));
    }
    Ok(Some(text))
}

#[cfg(test)]
#[path = "context_tests.rs"]
mod tests;
