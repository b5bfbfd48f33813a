//! The folder of a build, as the tar that Docker takes.
//!
//! The folder may be written to by a container while it is read, so each name is opened in the directory that was opened
//! before it and never through a link; links travel as links. A file that shrinks or grows meanwhile is filled up or cut to
//! the size that its header tells. Owners do not travel, as with Docker's own client.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use tar::{Builder, EntryType, Header};

use super::BuildFrom;
use super::ignore::Ignored;

/// What Docker builds by, unless something else is said.
pub(super) const DOCKERFILE: &str = "Dockerfile";
/// What it leaves out by.
const DOCKERIGNORE: &str = ".dockerignore";
/// The largest of either, in bytes.
const TEXT_BYTES_MAX: u64 = 1024 * 1024;

/// A folder that can be built.
#[derive(Debug)]
pub(super) struct Context {
    folder: OwnedFd,
    ignored: Ignored,
    /// The text of the Dockerfile, and where it lies.
    dockerfile: String,
    place: PathBuf,
}

impl Context {
    /// Looks at what is to be built of a folder: there is a Dockerfile, and `.dockerignore` means something.
    ///
    /// # Errors
    /// What is missing or wrong, as people are to read it.
    pub(super) fn open(path: &Path, from: &BuildFrom) -> Result<Context, String> {
        let unusable =
            |errno: Errno| format!("{} cannot be opened: {errno}", path.join(&from.context).display());
        if ![&from.context, &from.dockerfile].into_iter().all(|path| leads_down(path)) {
            return Err(format!("{} cannot be built: a path leads out of it", path.display()));
        }
        let directory = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut folder = rustix::fs::open(path, directory, Mode::empty()).map_err(unusable)?;
        if from.context != Path::new("") {
            let context =
                rustix::fs::openat2(&folder, &from.context, directory, Mode::empty(), STRAIGHT_DOWN);
            folder = context.map_err(unusable)?;
        }
        let dockerfile = text(&folder, &from.dockerfile)?.ok_or_else(|| {
            format!("there is no {} in {}", from.dockerfile.display(), path.join(&from.context).display())
        })?;
        let ignored = Ignored::parse(&text(&folder, Path::new(DOCKERIGNORE))?.unwrap_or_default())?;
        Ok(Context { folder, ignored, dockerfile, place: from.dockerfile.clone() })
    }

    /// Where the Dockerfile lies.
    pub(super) fn dockerfile(&self) -> &Path {
        &self.place
    }

    /// Whether a stage of the build starts from the image: building under that name would put it on top of itself.
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

    /// Writes the tar.
    ///
    /// # Errors
    /// Those of reading the folder, and of writing.
    pub(super) fn write(&self, to: impl Write) -> io::Result<()> {
        let mut tar = Builder::new(to);
        self.add_directory(&mut tar, self.folder.try_clone()?, Path::new(""))?;
        tar.into_inner()?.flush()
    }

    fn add_directory(
        &self,
        tar: &mut Builder<impl Write>,
        directory: OwnedFd,
        below: &Path,
    ) -> io::Result<()> {
        let mut names: Vec<Vec<u8>> = Vec::new();
        for entry in Dir::read_from(&directory)? {
            let name = entry?.file_name().to_bytes().to_vec();
            if name != b"." && name != b".." {
                names.push(name);
            }
        }
        // The same folder makes the same tar.
        names.sort();
        for name in names {
            let name = OsStr::from_bytes(&name);
            let path = below.join(name);
            match self.add(tar, &directory, name, &path) {
                // It was there a moment ago.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    return Err(io::Error::new(error.kind(), format!("{}: {error}", path.display())));
                }
                Ok(()) => {}
            }
        }
        Ok(())
    }

    fn add(
        &self,
        tar: &mut Builder<impl Write>,
        within: &OwnedFd,
        name: &OsStr,
        path: &Path,
    ) -> io::Result<()> {
        let kind =
            FileType::from_raw_mode(rustix::fs::statat(within, name, AtFlags::SYMLINK_NOFOLLOW)?.st_mode);
        let belongs = self.belongs(path);
        match kind {
            FileType::Directory
                if belongs || self.ignored.has_exceptions() || self.place.starts_with(path) =>
            {
                let directory = open(within, name, OFlags::DIRECTORY)?;
                if belongs {
                    let mut header = header(&directory.try_clone()?.into(), EntryType::Directory)?;
                    header.set_size(0);
                    tar.append_data(&mut header, path, io::empty())?;
                }
                self.add_directory(tar, directory, path)
            }
            FileType::RegularFile if belongs => {
                let file = File::from(open(within, name, OFlags::NONBLOCK)?);
                if !file.metadata()?.is_file() {
                    return Ok(());
                }
                let mut header = header(&file, EntryType::Regular)?;
                let bytes = header.size()?;
                tar.append_data(&mut header, path, file.take(bytes).chain(io::repeat(0)).take(bytes))
            }
            FileType::Symlink if belongs => {
                let target = rustix::fs::readlinkat(within, name, Vec::new())?;
                let mut header = Header::new_gnu();
                header.set_entry_type(EntryType::Symlink);
                header.set_mode(0o777);
                header.set_size(0);
                tar.append_link(&mut header, path, PathBuf::from(OsStr::from_bytes(target.as_bytes())))
            }
            // Sockets, pipes and devices are nothing that an image could hold a copy of.
            _ => Ok(()),
        }
    }

    /// The two files that Docker itself reads always travel; Docker leaves them out of the image if they are ignored.
    fn belongs(&self, path: &Path) -> bool {
        path == self.place
            || path == Path::new(DOCKERIGNORE)
            || !self.ignored.ignores(&path.to_string_lossy())
    }
}

fn open(within: &OwnedFd, name: &OsStr, more: OFlags) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | more;
    Ok(rustix::fs::openat(within, name, flags, Mode::empty())?)
}

fn header(file: &File, kind: EntryType) -> io::Result<Header> {
    let about = file.metadata()?;
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(about.mode() & 0o7777);
    header.set_mtime(u64::try_from(about.mtime()).unwrap_or(0));
    header.set_size(about.len());
    Ok(header)
}

/// No link on the way, and nothing above.
const STRAIGHT_DOWN: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS);

/// Whether a path is relative and goes nowhere but down.
fn leads_down(path: &Path) -> bool {
    path.components().all(|component| matches!(component, Component::Normal(_)))
}

/// A small text in the folder; none where there is no such file.
fn text(folder: &OwnedFd, name: &Path) -> Result<Option<String>, String> {
    let wrong = |why: &dyn std::fmt::Display| format!("{} cannot be read: {why}", name.display());
    let file = match rustix::fs::openat2(
        folder,
        name,
        OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC,
        Mode::empty(),
        STRAIGHT_DOWN,
    ) {
        Ok(file) => File::from(file),
        Err(Errno::NOENT) => return Ok(None),
        Err(Errno::LOOP) => return Err(wrong(&"it is a symbolic link")),
        Err(errno) => return Err(wrong(&errno)),
    };
    if !file.metadata().map_err(|error| wrong(&error))?.is_file() {
        return Err(wrong(&"it is not a regular file"));
    }
    let mut text = String::new();
    file.take(TEXT_BYTES_MAX + 1).read_to_string(&mut text).map_err(|error| wrong(&error))?;
    if text.len() as u64 > TEXT_BYTES_MAX {
        return Err(wrong(&"it is too long"));
    }
    Ok(Some(text))
}

#[cfg(test)]
#[path = "context_tests.rs"]
mod tests;
