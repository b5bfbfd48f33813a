//! A socket of the HTTP endpoint for one container: `run/http/NAME/http.sock`, whose directory is mounted into the container.
//!
//! Another user can take a TCP port while the daemon is away, but cannot make a file in this directory. The directory is mounted
//! and not the socket: a mounted file would stay the old socket after a restart of the daemon. The directory exists as long as
//! the container does, and each daemon makes its socket in it.
//!
//! The container's user may be any, so the socket is open to every user (0666) and the directory can be entered by every user
//! (0755). On the host, `run/http` above it is closed (0700). Inside, the mount is read-only. Someone may mount it writable
//! all the same, so nothing here follows a link below `run/http`: directories are opened by their own name, the socket is made
//! under a random name relative to the open directory, and renamed.

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

/// The beginning of the name that a socket has before it is renamed.
const TEMPORARY: &str = ".socket-";

/// The reason why a container has no socket.
#[derive(Debug, Error)]
#[error("{} cannot be made", path.display())]
pub struct SocketError {
    path: PathBuf,
    source: io::Error,
}

/// The sockets of all containers that have one.
pub struct ContainerSockets {
    home: Home,
    docker: Docker,
    journal: Journal,
    /// The endpoint is opened later than the first registrations are taken in.
    http: Arc<SetOnce<Http>>,
    served: Mutex<BTreeMap<ContainerName, CancellationToken>>,
    /// Held while a directory is made or removed, so that none is removed that was just made.
    changing: tokio::sync::Mutex<()>,
}

impl ContainerSockets {
    /// No sockets yet.
    pub fn new(home: Home, docker: Docker, journal: Journal) -> Arc<ContainerSockets> {
        let (http, served, changing) = (Arc::default(), Mutex::default(), tokio::sync::Mutex::default());
        Arc::new(ContainerSockets { home, docker, journal, http, served, changing })
    }

    /// Connects the sockets to the endpoint. Only the first one counts.
    pub fn connect(&self, http: Http) {
        let _ = self.http.set(http);
    }

    /// Makes the directory and the socket of a container, unless it has them already.
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
        let made = tokio::task::spawn_blocking(move || appear(&home, &of)).await;
        let made = made.unwrap_or_else(|error| Err(io::Error::other(error)));
        made.and_then(UnixListener::from_std).map_err(|source| SocketError { path, source })
    }

    /// Closes the socket. The directory goes with the container, which may be registered again.
    async fn end(&self, name: &ContainerName) {
        let Some(served) = self.lock().remove(name) else { return };
        served.cancel();
        let is_gone = self.docker.probe(name).await == Liveness::Gone;
        self.disappear(name, is_gone).await;
    }

    /// Removes the socket of a container that is not served, and the directory as well if the container is gone. What stays
    /// is replaced when the container is registered again.
    async fn disappear(&self, name: &ContainerName, is_gone: bool) {
        let _changing = self.changing.lock().await;
        if !self.lock().contains_key(name) {
            let (home, name) = (self.home.clone(), name.clone());
            let _ = tokio::task::spawn_blocking(move || disappear(&home, &name, is_gone)).await;
        }
    }

    /// Removes the directories of containers that are gone and not among `known`, such as those that were removed while no
    /// daemon ran.
    pub async fn sweep(&self, known: &[ContainerName]) {
        let Ok(entries) = std::fs::read_dir(self.home.http()) else { return };
        let names =
            entries.flatten().filter_map(|entry| ContainerName::new(entry.file_name().to_str()?).ok());
        for name in names.filter(|name| !known.contains(name)) {
            if self.docker.probe(&name).await == Liveness::Gone {
                self.disappear(&name, true).await;
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
            let remove = move || names.iter().for_each(|name| drop(disappear(&home, name, false)));
            let _ = tokio::task::spawn_blocking(remove).await;
        })
    }
}

/// Makes a listening socket and replaces any file of its name with it. Blocks on the file system.
fn appear(home: &Home, name: &ContainerName) -> io::Result<std::os::unix::net::UnixListener> {
    let directory = directory(home, name)?;
    sweep(&directory)?;
    let temporary = format!("{TEMPORARY}{:016x}", u64::from_ne_bytes(random()?));
    // A path below the home may be too long for a socket's address (`unix(7)`); this one is short.
    let through = format!("/proc/self/fd/{}/{temporary}", directory.as_raw_fd());
    let listener = std::os::unix::net::UnixListener::bind(through)?;
    let named = open_to_all(&directory, &temporary)
        .and_then(|()| Ok(rustix::fs::renameat(&directory, &temporary, &directory, SOCKET)?));
    if let Err(error) = named {
        // The next attempt removes what stays.
        let _ = rustix::fs::unlinkat(&directory, &temporary, AtFlags::empty());
        return Err(error);
    }
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Opens the directory of one container, and makes it if need be.
fn directory(home: &Home, name: &ContainerName) -> io::Result<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let above = rustix::fs::openat(CWD, home.http(), flags, Mode::empty())?;
    let mode = Mode::RWXU | Mode::RGRP | Mode::XGRP | Mode::ROTH | Mode::XOTH;
    match rustix::fs::mkdirat(&above, name.as_str(), mode) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(errno.into()),
    }
    let directory = rustix::fs::openat(&above, name.as_str(), flags, Mode::empty())?;
    // The mode at its making is subject to the umask.
    rustix::fs::fchmod(&directory, mode)?;
    Ok(directory)
}

/// Lets every user connect to the socket of this name. Works on a descriptor of the file itself, so that a symbolic link of this
/// name is not followed.
fn open_to_all(directory: impl AsFd, name: &str) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(directory, name, flags, Mode::empty())?;
    if FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode) != FileType::Socket {
        return Err(io::Error::other("another file has replaced the socket"));
    }
    let mode = Mode::from_raw_mode(0o666);
    Ok(rustix::fs::chmod(format!("/proc/self/fd/{}", file.as_raw_fd()), mode)?)
}

/// Removes what an earlier daemon left half-made.
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
        // One that cannot be removed does no harm.
        let _ = rustix::fs::unlinkat(directory, name, AtFlags::empty());
    }
    Ok(())
}

/// Removes the socket, and the directory as well if it is empty and its container is gone.
fn disappear(home: &Home, name: &ContainerName, is_gone: bool) -> io::Result<()> {
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
    fn the_directory_is_open_below_one_that_is_closed_and_survives_the_socket() {
        let (_place, home) = home();
        // As long as a name may be, so the path is too long for an address.
        let shop = name(&"s".repeat(200));
        let directory = home.http_directory(&shop);
        let first = appear(&home, &shop).unwrap();
        assert_eq!(
            (mode(&home.http()), mode(&directory), mode(&directory.join(SOCKET))),
            (0o700, 0o755, 0o666)
        );
        let inode = identity(&directory);
        // The next daemon, after one that was killed.
        drop(first);
        fs::write(directory.join(".socket-0123"), "").unwrap();
        let listener = appear(&home, &shop).unwrap();
        assert_eq!(identity(&directory), inode);
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 1, "nothing is left beside it");
        let file = fs::File::open(&directory).unwrap();
        UnixStream::connect(format!("/proc/self/fd/{}/{SOCKET}", file.as_raw_fd())).unwrap();
        drop(listener);
        disappear(&home, &shop, false).unwrap();
        assert!(directory.exists() && !directory.join(SOCKET).exists());
        disappear(&home, &shop, true).unwrap();
        assert!(!directory.exists());
    }

    fn identity(path: &Path) -> Option<(u64, u64)> {
        crate::sys::paths::identity_of_name(path)
    }

    #[test]
    fn what_a_container_puts_into_its_directory_harms_it_alone() {
        let (place, home) = home();
        let shop = name("shop");
        let victim = place.path().join("victim");
        fs::write(&victim, "precious").unwrap();
        fs::set_permissions(&victim, fs::Permissions::from_mode(0o600)).unwrap();
        let directory = home.http_directory(&shop);
        drop(appear(&home, &shop).unwrap());
        for plant in [
            |victim: &Path, at: &Path| symlink(victim, at).unwrap(),
            |victim: &Path, at: &Path| fs::hard_link(victim, at).unwrap(),
            |_: &Path, at: &Path| fs::write(at, "mine").unwrap(),
        ] {
            let _ = fs::remove_file(directory.join(SOCKET));
            plant(&victim, &directory.join(SOCKET));
            let _listener = appear(&home, &shop).unwrap();
            assert!(directory.join(SOCKET).symlink_metadata().unwrap().file_type().is_socket());
            assert_eq!((fs::read_to_string(&victim).unwrap().as_str(), mode(&victim)), ("precious", 0o600));
        }
        // A directory of the socket's name stays, and the container has no socket.
        fs::remove_file(directory.join(SOCKET)).unwrap();
        fs::create_dir(directory.join(SOCKET)).unwrap();
        appear(&home, &shop).unwrap_err();
        // A link of the directory's name is not followed.
        let elsewhere = place.path().join("elsewhere");
        fs::create_dir(&elsewhere).unwrap();
        symlink(&elsewhere, home.http_directory(&name("other"))).unwrap();
        appear(&home, &name("other")).unwrap_err();
        assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 0);
    }
}
