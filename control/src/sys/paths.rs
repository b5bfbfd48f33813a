//! Where the daemon keeps what it keeps (wire specification, A.12). A home is a directory; every name below it is fixed.

use std::ffi::OsString;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::geteuid;
use thiserror::Error;

use crate::model::registration::ContainerName;
use crate::sys::processes::user_name;

/// Names the home; the second one is the reference's, so that its clients find our socket where they expect theirs.
const HOME_VARIABLES: [&str; 2] = ["LANDFALL_HOME", "TYPECLAW_HOME"];

/// The most bytes that a Unix socket's path may have: `sun_path` less its NUL (`unix(7)`).
const SOCKET_PATH_MAX: usize = 107;

/// Why there is no home.
#[derive(Debug, Error)]
pub enum HomeError {
    /// Neither a variable nor a home directory of the user.
    #[error("no home is known: none of LANDFALL_HOME, TYPECLAW_HOME and HOME is set")]
    Unknown,
    /// A relative path would mean another home in every directory.
    #[error("the home {} is not an absolute path", .0.display())]
    Relative(PathBuf),
    /// A socket's path has a limit of its own.
    #[error("the home {} is too long: its socket's path may have {SOCKET_PATH_MAX} bytes", .0.display())]
    TooLong(PathBuf),
    /// Root's daemon would write where another user decides what a name leads to.
    #[error("root's daemon does not use the home {}: {} belongs to {owner}", home.display(), path.display())]
    Owner {
        /// The home.
        home: PathBuf,
        /// The home, or a directory above it.
        path: PathBuf,
        /// Its user.
        owner: String,
    },
    /// Likewise.
    #[error("root's daemon does not use the home {}: others may write to {}", home.display(), path.display())]
    Writable {
        /// The home.
        home: PathBuf,
        /// The home, or a directory above it.
        path: PathBuf,
    },
    /// A link could lead to a directory of another user.
    #[error("{} is not a directory", .0.display())]
    NotADirectory(PathBuf),
    /// A directory could not be made, or its mode not be set.
    #[error("{} cannot be made", path.display())]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Device and inode of whatever has this name itself, even if it leads elsewhere: whether it is the very thing that was put
/// there.
pub fn identity_of_name(path: &Path) -> Option<(u64, u64)> {
    std::fs::symlink_metadata(path).ok().map(|found| (found.dev(), found.ino()))
}

/// Device and inode of the file that a name leads to: whether it still means the same.
pub fn identity_of_file(path: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(path).ok().map(|found| (found.dev(), found.ino()))
}

/// A home of one daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Home {
    root: PathBuf,
}

impl Home {
    /// The home that the environment names: `$LANDFALL_HOME`, else `$TYPECLAW_HOME`, else `~/.landfall`. A variable
    /// that is empty counts as not set.
    ///
    /// # Errors
    /// See [`HomeError`]; nothing is made.
    pub fn from_environment() -> Result<Home, HomeError> {
        Home::from_variables(|name| std::env::var_os(name))
    }

    fn from_variables(read: impl Fn(&str) -> Option<OsString>) -> Result<Home, HomeError> {
        let set = |name: &str| read(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let named = HOME_VARIABLES.iter().find_map(|name| set(name));
        let root = named.or_else(|| set("HOME").map(|home| home.join(".landfall")));
        Home::at(root.ok_or(HomeError::Unknown)?)
    }

    /// The home at `root`.
    ///
    /// # Errors
    /// See [`HomeError`]; nothing is made.
    pub fn at(root: PathBuf) -> Result<Home, HomeError> {
        if !root.is_absolute() {
            return Err(HomeError::Relative(root));
        }
        let home = Home { root };
        if home.engine_socket().as_os_str().len() > SOCKET_PATH_MAX {
            return Err(HomeError::TooLong(home.root));
        }
        Ok(home)
    }

    /// Makes every directory of the home, for its owner alone (0700). A directory below the home is never entered by a link.
    ///
    /// # Errors
    /// [`HomeError`]. Of root also where another user may change the home or a directory above it.
    pub fn ensure_directories(&self) -> Result<(), HomeError> {
        for path in [
            self.root.clone(),
            self.run(),
            self.registrations(),
            self.grants(),
            self.http(),
            self.log(),
            self.keys(),
        ] {
            let failed = |source| HomeError::Directory { path: path.clone(), source };
            // The home itself may be a directory that the user made for something larger: its mode is left alone.
            if path == self.root {
                std::fs::create_dir_all(&path).map_err(failed)?;
                if geteuid().is_root() {
                    self.check_for_root()?;
                }
                continue;
            }
            match rustix::fs::mkdir(&path, Mode::RWXU) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(failed(errno.into())),
            }
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let opened = rustix::fs::open(&path, flags, Mode::empty()).map_err(|errno| match errno {
                Errno::NOTDIR | Errno::LOOP => HomeError::NotADirectory(path.clone()),
                errno => failed(errno.into()),
            })?;
            rustix::fs::fchmod(opened, Mode::RWXU).map_err(|errno| failed(errno.into()))?;
        }
        Ok(())
    }

    /// Checks that only root may change the home and what its path leads through: the directories of the path, and those
    /// that its links lead to.
    fn check_for_root(&self) -> Result<(), HomeError> {
        let failed = |source| HomeError::Directory { path: self.root.clone(), source };
        let home = self.root.canonicalize().map_err(failed)?;
        // In a user namespace, the root of the machine is an unmapped user.
        let roots = [0, std::fs::metadata("/").map_err(failed)?.uid()];
        for path in self.root.ancestors().chain(home.ancestors()) {
            let about = std::fs::metadata(path).map_err(failed)?;
            let is_home = path == home || path == self.root;
            let (home, path) = (self.root.clone(), path.to_owned());
            if about.uid() != 0 && (is_home || !roots.contains(&about.uid())) {
                return Err(HomeError::Owner { home, path, owner: user_name(about.uid()) });
            }
            // In a directory such as /tmp, only the owner of a name may change it.
            let is_sticky = !is_home && about.mode() & 0o1000 != 0;
            let by_group = about.gid() != 0 && about.mode() & 0o020 != 0;
            if !is_sticky && (by_group || about.mode() & 0o002 != 0) {
                return Err(HomeError::Writable { home, path });
            }
        }
        Ok(())
    }

    /// The home itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// What belongs to a running daemon.
    pub fn run(&self) -> PathBuf {
        self.root.join("run")
    }

    /// The daemon's socket.
    pub fn socket(&self) -> PathBuf {
        self.run().join("hostd.sock")
    }

    /// The engine's socket.
    pub fn engine_socket(&self) -> PathBuf {
        self.run().join("engine.sock")
    }

    /// The daemon's process id: a hint for people, nothing else.
    pub fn pid_file(&self) -> PathBuf {
        self.run().join("hostd.pid")
    }

    /// The HTTP port that the last daemon had: where the next one is looked for first, after the preferred port.
    pub fn http_port_file(&self) -> PathBuf {
        self.run().join("hostd.port")
    }

    /// Which ports tailscale serves for the daemon; not there where there are none.
    pub fn tailscale_file(&self) -> PathBuf {
        self.run().join("tailscale.json")
    }

    /// Held by `flock` while somebody starts a daemon. Never unlinked.
    pub fn spawn_lock(&self) -> PathBuf {
        self.run().join("hostd.lock")
    }

    /// Held by `flock` for the life of a daemon. Never unlinked.
    pub fn daemon_lock(&self) -> PathBuf {
        self.run().join("hostd.alive")
    }

    /// What is shared with the helper's container; not there where there is none.
    pub fn helper_directory(&self) -> PathBuf {
        self.run().join("helper")
    }

    /// Directories with a socket each, for containers.
    pub fn http(&self) -> PathBuf {
        self.run().join("http")
    }

    /// The directory with a socket for one container, which is mounted into it.
    pub fn http_directory(&self, name: &ContainerName) -> PathBuf {
        self.http().join(name.as_str())
    }

    /// The registrations.
    pub fn registrations(&self) -> PathBuf {
        self.run().join("registrations")
    }

    /// One registration. A name cannot leave the directory: [`ContainerName`] holds no other ones.
    pub fn registration(&self, name: &ContainerName) -> PathBuf {
        self.registrations().join(format!("{name}.json"))
    }

    /// What the host's user granted to containers, apart from their registrations.
    pub fn grants(&self) -> PathBuf {
        self.run().join("grants")
    }

    /// The logs.
    pub fn log(&self) -> PathBuf {
        self.root.join("log")
    }

    /// The daemon's log.
    pub fn daemon_log(&self) -> PathBuf {
        self.log().join("hostd.log")
    }

    /// Keys that never enter a container.
    pub fn keys(&self) -> PathBuf {
        self.root.join("keys")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn home(variables: &[(&str, &str)]) -> Result<Home, HomeError> {
        Home::from_variables(|name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| OsString::from(value))
        })
    }

    #[test]
    fn the_first_variable_that_is_set_names_the_home() {
        let root = |variables: &[(&str, &str)]| home(variables).unwrap().root().to_owned();
        let all = [("LANDFALL_HOME", "/l"), ("TYPECLAW_HOME", "/t"), ("HOME", "/h")];
        assert_eq!(root(&all), Path::new("/l"));
        assert_eq!(root(&all[1..]), Path::new("/t"));
        assert_eq!(root(&all[2..]), Path::new("/h/.landfall"));
        assert_eq!(root(&[("LANDFALL_HOME", ""), ("HOME", "/h")]), Path::new("/h/.landfall"));
        assert!(matches!(home(&[]), Err(HomeError::Unknown)));
        assert!(matches!(home(&[("LANDFALL_HOME", "x")]), Err(HomeError::Relative(_))));
        assert!(matches!(
            home(&[("LANDFALL_HOME", &format!("/{}", "x".repeat(100)))]),
            Err(HomeError::TooLong(_))
        ));
    }

    #[test]
    fn the_names_below_a_home_are_those_of_the_reference() {
        let home = home(&[("TYPECLAW_HOME", "/t")]).unwrap();
        assert_eq!(home.socket(), Path::new("/t/run/hostd.sock"));
        assert_eq!(home.pid_file(), Path::new("/t/run/hostd.pid"));
        assert_eq!(home.spawn_lock(), Path::new("/t/run/hostd.lock"));
        assert_eq!(home.registrations(), Path::new("/t/run/registrations"));
        assert_eq!(home.daemon_log(), Path::new("/t/log/hostd.log"));
    }

    #[test]
    fn directories_are_for_their_owner_alone_even_where_they_were_not() {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::at(folder.path().join("deep/home")).unwrap();
        std::fs::create_dir_all(home.run()).unwrap();
        std::fs::set_permissions(home.run(), std::fs::Permissions::from_mode(0o755)).unwrap();
        home.ensure_directories().unwrap();
        home.ensure_directories().unwrap();
        for path in [home.run(), home.registrations(), home.grants(), home.http(), home.log(), home.keys()] {
            let mode = std::fs::metadata(&path).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o700, "{}", path.display());
        }
    }
}
