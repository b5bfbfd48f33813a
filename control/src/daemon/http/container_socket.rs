//! The HTTP endpoint as a Unix socket for one container: `run/http/NAME/http.sock`. Its directory is mounted into the
//! container.
//!
//! Another user can bind a TCP port while the daemon is down, but cannot create a file in this directory. The directory is
//! mounted rather than the socket, since a mounted file would remain the old socket after a restart of the daemon. The
//! directory exists as long as the container, and each daemon creates its socket in it.
//!
//! The container's user may have any uid, so the socket is open to all users (0666) and the directory can be entered by all
//! users (0755). On the host, `run/http` above it is closed (0700). In the container, the mount is read-only. It may still
//! be mounted writable, so this module never follows a link below `run/http`: it opens directories by their own name, and
//! creates the socket under a random name relative to the open directory before it renames it.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::future::BoxFuture;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use thiserror::Error;
use tokio::net::UnixListener;
use tokio::sync::SetOnce;
use tokio_util::sync::CancellationToken;

use super::Http;
use crate::docker::Docker;
use crate::docker::liveness::Liveness;
use crate::error::chain;
use crate::launch::SOCKET;
use crate::model::event::Event;
use crate::model::registration::{ContainerName, Registration};
use crate::registry::store::{RegistrationObserver, StopReason};
use crate::sys::journal::Journal;
use crate::sys::paths::Home;
use crate::sys::random::random;

/// The prefix of the temporary name of a socket.
const TEMPORARY: &str = ".socket-";

/// The reason why a container has no socket.
#[derive(Debug, Error)]
#[error("{} cannot be created", path.display())]
pub struct SocketError {
    path: PathBuf,
    source: io::Error,
}

/// The sockets of all containers that have one.
pub struct ContainerSockets {
    home: Home,
    docker: Docker,
    journal: Journal,
    /// Set when the endpoint is open, which is after the first registrations were replayed.
    http: Arc<SetOnce<Http>>,
    served: Mutex<BTreeMap<ContainerName, CancellationToken>>,
    /// Held while a directory is created or removed, so that a directory that was just created is not removed.
    changing: tokio::sync::Mutex<()>,
}

impl ContainerSockets {
    /// Returns an empty set of sockets.
    pub fn new(home: Home, docker: Docker, journal: Journal) -> Arc<ContainerSockets> {
        let (http, served, changing) = (Arc::default(), Mutex::default(), tokio::sync::Mutex::default());
        Arc::new(ContainerSockets { home, docker, journal, http, served, changing })
    }

    /// Connects the sockets to the endpoint. Later calls have no effect.
    pub fn connect(&self, http: Http) {
        let _ = self.http.set(http);
    }

    /// Creates the directory and the socket of a container, unless they exist.
    async fn serve(&self, name: &ContainerName) {
        let _changing = self.changing.lock().await;
        if self.lock().contains_key(name) {
            return;
        }
        let stop = CancellationToken::new();
        match self.listen(name).await {
            Ok(listener) => {
                self.lock().insert(name.clone(), stop.clone());
                let http = Arc::clone(&self.http);
                tokio::spawn(stop.run_until_cancelled_owned(async move {
                    http.wait().await.serve_container(listener).await;
                }));
            }
            Err(error) => self.notice(format!("{name} has no socket to the daemon: {}", chain(&error))),
        }
    }

    async fn listen(&self, name: &ContainerName) -> Result<UnixListener, SocketError> {
        let (home, of) = (self.home.clone(), name.clone());
        let path = home.http_directory(name).join(SOCKET);
        let made = tokio::task::spawn_blocking(move || create_socket(&home, &of)).await;
        let made = made.unwrap_or_else(|error| Err(io::Error::other(error)));
        made.and_then(UnixListener::from_std).map_err(|source| SocketError { path, source })
    }

    /// Closes the socket. The directory remains while the container exists, since it may be registered again.
    async fn end(&self, name: &ContainerName) {
        let Some(served) = self.lock().remove(name) else { return };
        served.cancel();
        let is_gone = self.docker.probe(name).await == Liveness::Gone;
        self.remove_socket(name, is_gone).await;
    }

    /// Removes the socket of a container that is not served, and the directory if the container is gone. Files that could
    /// not be removed are replaced at the next registration of the container.
    async fn remove_socket(&self, name: &ContainerName, is_gone: bool) {
        let _changing = self.changing.lock().await;
        if !self.lock().contains_key(name) {
            let (home, name) = (self.home.clone(), name.clone());
            let _ = tokio::task::spawn_blocking(move || remove_socket(&home, &name, is_gone)).await;
        }
    }

    /// Removes the directories of containers that are gone and not in `known`, for example of those that were removed while
    /// no daemon ran.
    pub async fn sweep(&self, known: &[ContainerName]) {
        let Ok(entries) = std::fs::read_dir(self.home.http()) else { return };
        let names =
            entries.flatten().filter_map(|entry| ContainerName::new(entry.file_name().to_str()?).ok());
        for name in names.filter(|name| !known.contains(name)) {
            if self.docker.probe(&name).await == Liveness::Gone {
                self.remove_socket(&name, true).await;
            }
        }
    }

    fn notice(&self, text: String) {
        self.journal.record(&Event::Notice { text });
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ContainerName, CancellationToken>> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RegistrationObserver for ContainerSockets {
    fn name(&self) -> &'static str {
        "HTTP socket"
    }

    fn start(&self, registration: Arc<Registration>) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            let name = &registration.container_name;
            match registration.http_socket {
                true => self.serve(name).await,
                false => self.end(name).await,
            }
        })
    }

    fn stop<'a>(&'a self, name: &'a ContainerName, _reason: StopReason) -> BoxFuture<'a, ()> {
        Box::pin(self.end(name))
    }

    fn drain(&self) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            let served: Vec<_> = std::mem::take(&mut *self.lock()).into_iter().collect();
            let home = self.home.clone();
            let names: Vec<ContainerName> = served
                .into_iter()
                .map(|(name, stop)| {
                    stop.cancel();
                    name
                })
                .collect();
            let remove = move || names.iter().for_each(|name| drop(remove_socket(&home, name, false)));
            let _ = tokio::task::spawn_blocking(remove).await;
        })
    }
}

/// Creates a listening socket that replaces any file of its name. Blocks on the file system.
fn create_socket(home: &Home, name: &ContainerName) -> io::Result<std::os::unix::net::UnixListener> {
    let directory = directory(home, name)?;
    sweep(&directory)?;
    let temporary = format!("{TEMPORARY}{:016x}", u64::from_ne_bytes(random()?));
    // The path below the home may exceed the limit of a socket address (`unix(7)`). This one is short.
    let through = format!("/proc/self/fd/{}/{temporary}", directory.as_raw_fd());
    let listener = std::os::unix::net::UnixListener::bind(through)?;
    let named = open_to_all(&directory, &temporary)
        .and_then(|()| Ok(rustix::fs::renameat(&directory, &temporary, &directory, SOCKET)?));
    if let Err(error) = named {
        // If this fails, the next attempt removes the file.
        let _ = rustix::fs::unlinkat(&directory, &temporary, AtFlags::empty());
        return Err(error);
    }
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Opens the directory of one container, and creates it if needed.
fn directory(home: &Home, name: &ContainerName) -> io::Result<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let above = rustix::fs::openat(CWD, home.http(), flags, Mode::empty())?;
    let mode = Mode::RWXU | Mode::RGRP | Mode::XGRP | Mode::ROTH | Mode::XOTH;
    match rustix::fs::mkdirat(&above, name.as_str(), mode) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(errno.into()),
    }
    let directory = rustix::fs::openat(&above, name.as_str(), flags, Mode::empty())?;
    // The umask applies to the mode of mkdirat.
    rustix::fs::fchmod(&directory, mode)?;
    Ok(directory)
}

/// Permits all users to connect to the socket of this name. Works on a descriptor of the file itself, so a symbolic link of
/// this name is not followed.
fn open_to_all(directory: impl AsFd, name: &str) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(directory, name, flags, Mode::empty())?;
    if FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode) != FileType::Socket {
        return Err(io::Error::other("another file has replaced the socket"));
    }
    let mode = Mode::from_raw_mode(0o666);
    Ok(rustix::fs::chmod(format!("/proc/self/fd/{}", file.as_raw_fd()), mode)?)
}

/// Removes temporary sockets of an earlier daemon.
fn sweep(directory: &OwnedFd) -> io::Result<()> {
    let mut buffer = Vec::with_capacity(4096);
    let mut entries = rustix::fs::RawDir::new(directory, buffer.spare_capacity_mut());
    let mut left = Vec::new();
    while let Some(entry) = entries.next() {
        let entry = entry?;
        if entry.file_name().to_bytes().starts_with(TEMPORARY.as_bytes()) {
            left.push(entry.file_name().to_owned());
        }
    }
    for name in left {
        // A file that cannot be removed is harmless.
        let _ = rustix::fs::unlinkat(directory, name, AtFlags::empty());
    }
    Ok(())
}

/// Removes the socket, and the directory if it is empty and its container is gone.
fn remove_socket(home: &Home, name: &ContainerName, is_gone: bool) -> io::Result<()> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let above = rustix::fs::openat(CWD, home.http(), flags, Mode::empty())?;
    let directory = rustix::fs::openat(&above, name.as_str(), flags, Mode::empty())?;
    match rustix::fs::unlinkat(&directory, SOCKET, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(errno) => return Err(errno.into()),
    }
    match is_gone {
        true => Ok(rustix::fs::unlinkat(&above, name.as_str(), AtFlags::REMOVEDIR)?),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
    use std::os::unix::net::UnixStream;
    use std::path::Path;

    fn home() -> (tempfile::TempDir, Home) {
        let place = tempfile::tempdir().unwrap();
        let home = Home::at(place.path().join("home")).unwrap();
        home.ensure_directories().unwrap();
        (place, home)
    }

    fn name(text: &str) -> ContainerName {
        ContainerName::new(text).unwrap()
    }

    fn mode(path: &Path) -> u32 {
        path.symlink_metadata().unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn the_directory_is_open_below_a_closed_one_and_survives_the_socket() {
        let (_place, home) = home();
        // The longest name, so the path exceeds the limit of a socket address.
        let shop = name(&"s".repeat(200));
        let directory = home.http_directory(&shop);
        let first = create_socket(&home, &shop).unwrap();
        assert_eq!(
            (mode(&home.http()), mode(&directory), mode(&directory.join(SOCKET))),
            (0o700, 0o755, 0o666)
        );
        let inode = identity(&directory);
        // The next daemon, after one that was killed.
        drop(first);
        fs::write(directory.join(".socket-0123"), "").unwrap();
        let listener = create_socket(&home, &shop).unwrap();
        assert_eq!(identity(&directory), inode);
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 1, "the temporary file was removed");
        let file = fs::File::open(&directory).unwrap();
        UnixStream::connect(format!("/proc/self/fd/{}/{SOCKET}", file.as_raw_fd())).unwrap();
        drop(listener);
        remove_socket(&home, &shop, false).unwrap();
        assert!(directory.exists() && !directory.join(SOCKET).exists());
        remove_socket(&home, &shop, true).unwrap();
        assert!(!directory.exists());
    }

    fn identity(path: &Path) -> Option<(u64, u64)> {
        crate::sys::paths::identity_of_name(path)
    }

    #[test]
    fn files_that_a_container_plants_in_its_directory_affect_only_itself() {
        let (place, home) = home();
        let shop = name("shop");
        let victim = place.path().join("victim");
        fs::write(&victim, "precious").unwrap();
        fs::set_permissions(&victim, fs::Permissions::from_mode(0o600)).unwrap();
        let directory = home.http_directory(&shop);
        drop(create_socket(&home, &shop).unwrap());
        for plant in [
            |victim: &Path, at: &Path| symlink(victim, at).unwrap(),
            |victim: &Path, at: &Path| fs::hard_link(victim, at).unwrap(),
            |_: &Path, at: &Path| fs::write(at, "mine").unwrap(),
        ] {
            let _ = fs::remove_file(directory.join(SOCKET));
            plant(&victim, &directory.join(SOCKET));
            let _listener = create_socket(&home, &shop).unwrap();
            assert!(directory.join(SOCKET).symlink_metadata().unwrap().file_type().is_socket());
            assert_eq!((fs::read_to_string(&victim).unwrap().as_str(), mode(&victim)), ("precious", 0o600));
        }
        // A directory of the socket's name remains, and the container has no socket.
        fs::remove_file(directory.join(SOCKET)).unwrap();
        fs::create_dir(directory.join(SOCKET)).unwrap();
        create_socket(&home, &shop).unwrap_err();
        // A link of the directory's name is not followed.
        let elsewhere = place.path().join("elsewhere");
        fs::create_dir(&elsewhere).unwrap();
        symlink(&elsewhere, home.http_directory(&name("other"))).unwrap();
        create_socket(&home, &name("other")).unwrap_err();
        assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 0);
    }
}
