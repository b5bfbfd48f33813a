//! `trust.json` in the daemon's home: all approvals of the user, private to the owner (0600).
//!
//! [`TrustFile::check`] decides whether one content of one file is approved. It reads the file on each call, needs no
//! running daemon and keeps no state, so each process that starts a command decides for itself. An absent file approves
//! nothing, and neither does an untrustworthy one: a file that is not regular, belongs to another user, is writable by
//! others, or does not parse. A reader leaves such a file in place and returns the reason; the next [`TrustFile::update`]
//! renames it to `trust.json.bad-1` and so on.
//!
//! Updates run one at a time, under the kernel's lock on the home's `run` directory, which only the owner can open.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::geteuid;
use thiserror::Error;

use crate::model::trust::{ContentDigest, FolderFile, Trust, TrustFormatError};
use crate::sys::paths::Home;
use crate::sys::private_file::{self, ReadError};

/// The name of the file in the home.
const FILE: &str = "trust.json";
/// The name under which the next content is written.
const TEMPORARY: &str = "trust.json.tmp";
/// The maximum size of the file, in bytes: about 5,000 approvals.
const BYTES_MAX: u64 = 1024 * 1024;

/// The approvals of one home.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustFile {
    home: Home,
}

/// The reason why a file of a folder has no effect.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum NotTrusted {
    /// The user did not approve this content.
    #[error("is not trusted")]
    NotApproved,
    /// A container with this folder could approve its own files.
    #[error("cannot be trusted: landfall keeps its approvals in {}, inside the folder", .0.display())]
    HomeInside(PathBuf),
    /// The approvals cannot be read.
    #[error("is not trusted: {0}")]
    File(#[from] TrustFileError),
}

/// The reasons why the approvals cannot be read or written.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TrustFileError {
    /// It is a link, a pipe, a device or a directory.
    #[error("{} is not a regular file", .0.display())]
    NotAFile(PathBuf),
    /// It is larger than any list of approvals.
    #[error("{} is larger than {BYTES_MAX} bytes", .0.display())]
    TooLarge(PathBuf),
    /// The file belongs to another user.
    #[error("{} belongs to user {owner}", path.display())]
    Owner {
        /// The file.
        path: PathBuf,
        /// The user id of its owner.
        owner: u32,
    },
    /// Other users may write to the file.
    #[error("{} may be written by others", .0.display())]
    Writable(PathBuf),
    /// Its content is not a list of approvals.
    #[error("{}: {reason}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// The reason.
        reason: TrustFormatError,
    },
    /// A system call failed.
    #[error("{what} {} failed: {errno}", path.display())]
    System {
        /// The step, such as `opening`.
        what: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The error number.
        errno: Errno,
    },
}

impl TrustFileError {
    /// Returns whether no release can use the content, so that an update may start from an empty list.
    fn is_corrupt(&self) -> bool {
        match self {
            TrustFileError::Format { reason, .. } => !matches!(reason, TrustFormatError::Newer(_)),
            TrustFileError::System { .. } => false,
            TrustFileError::NotAFile(_)
            | TrustFileError::TooLarge(_)
            | TrustFileError::Owner { .. }
            | TrustFileError::Writable(_) => true,
        }
    }
}

/// The result of an update.
#[derive(Debug)]
pub struct Updated<T> {
    /// The value that the change returned.
    pub value: T,
    /// The reason why the earlier file was not used, and its new path.
    pub set_aside: Option<(TrustFileError, PathBuf)>,
}

impl TrustFile {
    /// Returns the approvals of `home`. Opens no file.
    pub fn of(home: &Home) -> TrustFile {
        TrustFile { home: home.clone() }
    }

    /// Returns the path of the file.
    pub fn path(&self) -> PathBuf {
        self.home.root().join(FILE)
    }

    /// Decides whether the user approved this content of a file. `folder` is canonical.
    ///
    /// # Errors
    /// [`NotTrusted`]: the content has no effect.
    pub fn check(&self, folder: &Path, file: FolderFile, content: &ContentDigest) -> Result<(), NotTrusted> {
        self.check_location(folder)?;
        match self.read()?.approves(folder, file, content) {
            true => Ok(()),
            false => Err(NotTrusted::NotApproved),
        }
    }

    /// Checks that a process that may write to the folder cannot write to the approvals.
    ///
    /// # Errors
    /// [`NotTrusted::HomeInside`].
    pub fn check_location(&self, folder: &Path) -> Result<(), NotTrusted> {
        // A home that does not exist holds no approvals.
        match self.home.root().canonicalize() {
            Ok(root) if root.starts_with(folder) => Err(NotTrusted::HomeInside(root)),
            _ => Ok(()),
        }
    }

    /// Reads all approvals.
    ///
    /// # Errors
    /// [`TrustFileError`]. An absent file is an empty list, not an error.
    pub fn read(&self) -> Result<Trust, TrustFileError> {
        match self.open_root() {
            Ok(root) => self.read_in(&root),
            Err(Errno::NOENT) => Ok(Trust::default()),
            Err(errno) => Err(self.system("opening", self.home.root(), errno)),
        }
    }

    /// Changes the approvals. On an error the file is unchanged, unless only the sync of the directory failed: then the new
    /// content is in place, and may be lost in a power failure.
    ///
    /// # Errors
    /// [`TrustFileError`].
    pub fn update<T>(&self, change: impl FnOnce(&mut Trust) -> T) -> Result<Updated<T>, TrustFileError> {
        let path = self.path();
        let root = self.open_root().map_err(|errno| self.system("opening", self.home.root(), errno))?;
        let _lock = self.lock()?;
        let (mut trust, corrupt) = match self.read_in(&root) {
            Ok(trust) => (trust, None),
            Err(error) if error.is_corrupt() => (Trust::default(), Some(error)),
            Err(error) => return Err(error),
        };
        let value = change(&mut trust);
        let content = trust.to_bytes();
        if content.len() as u64 > BYTES_MAX {
            return Err(TrustFileError::TooLarge(path));
        }
        let written = private_file::write_temporary(&root, TEMPORARY, &content, None).and_then(|()| {
            let aside = corrupt.as_ref().map(|_| private_file::set_aside(&root, FILE)).transpose()?;
            rustix::fs::renameat(&root, TEMPORARY, &root, FILE)?;
            Ok(aside)
        });
        let aside = written.map_err(|errno| {
            // If this fails, the next update replaces the file.
            let _ = rustix::fs::unlinkat(&root, TEMPORARY, rustix::fs::AtFlags::empty());
            self.system("writing", &path, errno)
        })?;
        rustix::fs::fsync(&root).map_err(|errno| self.system("synchronising", self.home.root(), errno))?;
        let set_aside = corrupt.zip(aside.map(|name| self.home.root().join(name)));
        Ok(Updated { value, set_aside })
    }

    fn read_in(&self, root: &OwnedFd) -> Result<Trust, TrustFileError> {
        let path = self.path();
        let failed = |error| match error {
            ReadError::NotAFile => TrustFileError::NotAFile(path.clone()),
            ReadError::TooLarge => TrustFileError::TooLarge(path.clone()),
            ReadError::Unreadable(errno) => self.system("reading", &path, errno),
        };
        let file = match private_file::open(root, FILE) {
            Err(ReadError::Unreadable(Errno::NOENT)) => return Ok(Trust::default()),
            opened => opened.map_err(failed)?,
        };
        let status = rustix::fs::fstat(&file).map_err(|errno| self.system("reading", &path, errno))?;
        // A file of root is accepted, since root can approve anything in any case.
        if status.st_uid != geteuid().as_raw() && status.st_uid != 0 {
            return Err(TrustFileError::Owner { path, owner: status.st_uid });
        }
        if Mode::from_raw_mode(status.st_mode).intersects(Mode::WGRP | Mode::WOTH) {
            return Err(TrustFileError::Writable(path));
        }
        let content = private_file::read(file, BYTES_MAX).map_err(failed)?;
        Trust::parse(&content).map_err(|reason| TrustFileError::Format { path: path.clone(), reason })
    }

    fn open_root(&self) -> Result<OwnedFd, Errno> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(self.home.root(), flags, Mode::empty())
    }

    /// Waits for other updates. The lock is released with the descriptor.
    fn lock(&self) -> Result<OwnedFd, TrustFileError> {
        let run = self.home.run();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let lock = rustix::fs::open(&run, flags, Mode::empty())
            .map_err(|errno| self.system("opening", &run, errno))?;
        rustix::io::retry_on_intr(|| rustix::fs::flock(&lock, FlockOperation::LockExclusive))
            .map_err(|errno| self.system("locking", &run, errno))?;
        Ok(lock)
    }

    fn system(&self, what: &'static str, path: &Path, errno: Errno) -> TrustFileError {
        TrustFileError::System { what, path: path.to_owned(), errno }
    }
}

#[cfg(test)]
#[path = "trust_file_tests.rs"]
mod tests;
