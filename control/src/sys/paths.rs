//! The paths of the daemon's files (wire specification, A.12). A home is a directory; every name below it is fixed.

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

/// The variables that name the home; the second one is the reference's, so that its clients find this daemon's socket.
const HOME_VARIABLES: [&str; 2] = ["LANDFALL_HOME", "TYPECLAW_HOME"];

/// The most bytes that a Unix socket's path may have: `sun_path` less its NUL (`unix(7)`).
const SOCKET_PATH_MAX: usize = 107;

/// The reason that the home cannot be used.
#[derive(Debug, Error)]
pub enum HomeError {
    /// No variable is set, and the user has no home directory.
    #[error("no home is known: none of LANDFALL_HOME, TYPECLAW_HOME and HOME is set")]
    Unknown,
    /// A relative path would name another home in every directory.
    #[error("the home {} is not an absolute path", .0.display())]
    Relative(PathBuf),
    /// The path of a socket would exceed its limit.
    #[error("the home {} is too long: its socket's path may have {SOCKET_PATH_MAX} bytes", .0.display())]
    TooLong(PathBuf),
    /// Another user could decide where root's daemon writes.
    #[error("root's daemon does not use the home {}: {} belongs to {owner}", home.display(), path.display())]
    Owner {
        /// The home.
        home: PathBuf,
        /// The home, or a directory above it.
        path: PathBuf,
        /// Its user.
        owner: String,
    },
    /// Other users could decide where root's daemon writes.
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
    /// A directory could not be created, or its mode not be set.
    #[error("{} cannot be created", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

/// Returns device and inode of the file with this name, without following a link. It identifies the very file that was
/// put there.
pub fn identity_of_name(path: &Path) -> Option<(u64, u64)> {
    std::fs::symlink_metadata(path).ok().map(|found| (found.dev(), found.ino()))
}

/// Returns device and inode of the file that a path leads to.
pub fn identity_of_file(path: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(path).ok().map(|found| (found.dev(), found.ino()))
}

/// A home of one daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Home {
    root: PathBuf,
}

impl Home {
    /// Returns the home that the environment names: `$LANDFALL_HOME`, else `$TYPECLAW_HOME`, else `~/.landfall`. An
    /// empty variable counts as unset.
    ///
    /// # Errors
    /// See [`HomeError`]. No file is created.
    pub fn from_environment() -> Result<Home, HomeError> {
        Home::from_variables(|name| std::env::var_os(name))
    }

    fn from_variables(read: impl Fn(&str) -> Option<OsString>) -> Result<Home, HomeError> {
        let set = |name: &str| read(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let named = HOME_VARIABLES.iter().find_map(|name| set(name));
        let root = named.or_else(|| set("HOME").map(|home| home.join(".landfall")));
        Home::at(root.ok_or(HomeError::Unknown)?)
    }

    /// Returns the home at `root`.
    ///
    /// # Errors
    /// See [`HomeError`]. No file is created.
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

    /// Creates every directory of the home, for its owner alone (0700). Links below the home are not followed.
    ///
    /// # Errors
    /// [`HomeError`]. For root also if another user can change the home or a directory above it.
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
            // The mode of the home itself is not changed: the user may share that directory with other programs.
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

    /// Checks that only root can change the home and the directories that its path leads through, including those that
    /// its links lead to.
    fn check_for_root(&self) -> Result<(), HomeError> {
        let failed = |source| HomeError::Directory { path: self.root.clone(), source };
        let home = self.root.canonicalize().map_err(failed)?;
        // In a user namespace, the machine's root is an unmapped user.
        let roots = [0, std::fs::metadata("/").map_err(failed)?.uid()];
        for path in self.root.ancestors().chain(home.ancestors()) {
            let about = std::fs::metadata(path).map_err(failed)?;
            let is_home = path == home || path == self.root;
            let (home, path) = (self.root.clone(), path.to_owned());
            if about.uid() != 0 && (is_home || !roots.contains(&about.uid())) {
                return Err(HomeError::Owner { home, path, owner: user_name(about.uid()) });
            }
            // In a directory with the sticky bit, such as /tmp, only the owner of a name can change it.
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

    /// The directory of a running daemon's files.
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

    /// The daemon's process id. A hint for users; no code relies on it.
    pub fn pid_file(&self) -> PathBuf {
        self.run().join("hostd.pid")
    }

    /// The HTTP port of the last daemon, which the next one tries after the preferred port.
    pub fn http_port_file(&self) -> PathBuf {
        self.run().join("hostd.port")
    }

    /// The ports that tailscale serves for the daemon; absent if there are none.
    pub fn tailscale_file(&self) -> PathBuf {
        self.run().join("tailscale.json")
    }

    /// Held by `flock` while a client starts a daemon. Never unlinked.
    pub fn spawn_lock(&self) -> PathBuf {
        self.run().join("hostd.lock")
    }

    /// Held by `flock` for the life of a daemon. Never unlinked.
    pub fn daemon_lock(&self) -> PathBuf {
        self.run().join("hostd.alive")
    }

    /// The directory that is shared with the helper's container; absent without a helper.
    pub fn helper_directory(&self) -> PathBuf {
        self.run().join("helper")
    }

    /// The directories of the containers' own HTTP sockets.
    pub fn http(&self) -> PathBuf {
        self.run().join("http")
    }

    /// The directory of one container's HTTP socket, which is mounted into the container.
    pub fn http_directory(&self, name: &ContainerName) -> PathBuf {
        self.http().join(name.as_str())
    }

    /// The directory of the registrations.
    pub fn registrations(&self) -> PathBuf {
        self.run().join("registrations")
    }

    /// The file of one registration. A [`ContainerName`] cannot lead out of the directory.
    pub fn registration(&self, name: &ContainerName) -> PathBuf {
        self.registrations().join(format!("{name}.json"))
    }

    /// The rights that the host's user granted to containers, apart from their registrations.
    pub fn grants(&self) -> PathBuf {
        self.run().join("grants")
    }

    /// The directory of the logs.
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
    fn first_set_variable_names_the_home() {
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
    fn names_below_a_home_are_those_of_the_reference() {
        let home = home(&[("TYPECLAW_HOME", "/t")]).unwrap();
        assert_eq!(home.socket(), Path::new("/t/run/hostd.sock"));
        assert_eq!(home.pid_file(), Path::new("/t/run/hostd.pid"));
        assert_eq!(home.spawn_lock(), Path::new("/t/run/hostd.lock"));
        assert_eq!(home.registrations(), Path::new("/t/run/registrations"));
        assert_eq!(home.daemon_log(), Path::new("/t/log/hostd.log"));
    }

    #[test]
    fn directories_get_mode_0700() {
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
