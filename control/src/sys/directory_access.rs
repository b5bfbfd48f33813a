//! Whether a directory of the host is closed to other users.
//!
//! The socket of an agent is open to every user, since the uid in a container may be any. The directories above it decide which
//! users of the host reach it. One of them must deny search to group and others. Each directory up to that one must belong to
//! root or to this user, since the owner of a directory can replace what is in it.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::users::is_ours;
use crate::sys::processes::user_name;

/// Search permission of group and others; write permission of others; the sticky bit (`inode(7)`).
const SEARCH_BY_OTHERS: u32 = 0o011;
const WRITE_BY_OTHERS: u32 = 0o002;
const STICKY: u32 = 0o1000;
/// The uid that a user namespace shows for users that it does not have (`/proc/sys/kernel/overflowuid`).
const OVERFLOW_UID: u32 = 65_534;

/// The reason why a directory is refused.
#[derive(Debug, Error)]
pub(crate) enum DirectoryAccessError {
    /// Other users can enter it.
    #[error(
        "other users can enter {} (put it into a directory that only you can enter: install -d -m 0700 DIRECTORY)",
        .0.display()
    )]
    Open(PathBuf),
    /// Another user can replace it.
    #[error("{} can be replaced, since {} belongs to {owner}", directory.display(), above.display())]
    Owned {
        /// The directory.
        directory: PathBuf,
        /// The one that belongs to another user.
        above: PathBuf,
        /// That user.
        owner: String,
    },
    /// Every user can replace it.
    #[error("{} can be replaced, since every user may write to {}", directory.display(), above.display())]
    Writable {
        /// The directory.
        directory: PathBuf,
        /// The one that every user may write to.
        above: PathBuf,
    },
    /// Its metadata cannot be read.
    #[error("the metadata of {} cannot be read", path.display())]
    Unreadable {
        /// The path.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

/// Checks that only root and this user can reach what is in `directory`, by its real path.
///
/// # Errors
/// [`DirectoryAccessError`].
pub(crate) fn check(directory: &Path) -> Result<(), DirectoryAccessError> {
    let unreadable = |path: &Path| {
        let path = path.to_owned();
        move |source| DirectoryAccessError::Unreadable { path, source }
    };
    let real = directory.canonicalize().map_err(unreadable(directory))?;
    let mut ancestors: Vec<&Path> = real.ancestors().collect();
    ancestors.reverse();
    for above in ancestors {
        let found = above.metadata().map_err(unreadable(above))?;
        let (directory, above) = (directory.to_owned(), above.to_owned());
        if !is_ours(found.uid()) && found.uid() != OVERFLOW_UID {
            return Err(DirectoryAccessError::Owned { directory, above, owner: user_name(found.uid()) });
        }
        if found.mode() & SEARCH_BY_OTHERS == 0 {
            return Ok(());
        }
        if found.mode() & WRITE_BY_OTHERS != 0 && found.mode() & STICKY == 0 && above != real {
            return Err(DirectoryAccessError::Writable { directory, above });
        }
    }
    Err(DirectoryAccessError::Open(directory.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{Permissions, create_dir, set_permissions};
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn directory_is_closed_by_itself_or_by_a_parent() {
        let place = tempfile::tempdir().unwrap();
        let inner = place.path().join("inner");
        create_dir(&inner).unwrap();
        let with = |outer, mode| {
            set_permissions(&inner, Permissions::from_mode(mode)).unwrap();
            set_permissions(place.path(), Permissions::from_mode(outer)).unwrap();
            check(&inner)
        };
        for (outer, mode) in [(0o700, 0o777), (0o700, 0o700), (0o755, 0o700), (0o744, 0o777)] {
            with(outer, mode).unwrap();
        }
        for (outer, mode) in [(0o755, 0o755), (0o711, 0o777), (0o750, 0o750), (0o755, 0o701)] {
            let refused = with(outer, mode).unwrap_err();
            assert!(matches!(refused, DirectoryAccessError::Open(_)), "{outer:o} {mode:o}: {refused}");
            assert!(refused.to_string().contains("install -d -m 0700"), "{refused}");
        }
        assert!(matches!(with(0o777, 0o700), Err(DirectoryAccessError::Writable { .. })));
        with(0o1777, 0o700).unwrap();
        assert!(matches!(check(&place.path().join("missing")), Err(DirectoryAccessError::Unreadable { .. })));
    }
}
