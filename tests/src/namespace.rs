//! Network namespaces, each with its own loopback.

use std::fs::File;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

use landfall_engine::opener::client::Target;
use nix::sched::{CloneFlags, unshare};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// A network namespace whose loopback is up. The namespace exists as long as this value, or a socket made inside.
#[derive(Debug)]
pub struct Namespace {
    file: OwnedFd,
}

impl Namespace {
    /// Makes a new namespace without processes or sockets.
    ///
    /// # Panics
    /// If the kernel refuses.
    pub fn new() -> Namespace {
        // A new thread, because it cannot return to the old namespace.
        std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let namespace = Namespace::current();
            loopback_up();
            namespace
        })
        .join()
        .unwrap()
    }

    /// Returns the namespace of this thread.
    ///
    /// # Panics
    /// If `/proc` is not mounted.
    pub fn current() -> Namespace {
        Namespace { file: File::open("/proc/thread-self/ns/net").unwrap().into() }
    }

    /// Returns the namespace of a process.
    ///
    /// # Panics
    /// If the process does not exist.
    #[track_caller]
    pub fn of(pid: u32) -> Namespace {
        Namespace { file: File::open(format!("/proc/{pid}/ns/net")).unwrap().into() }
    }

    /// Runs `work` inside, on a new thread, and waits for it. A socket that it makes belongs to this namespace, wherever it
    /// is used later.
    ///
    /// # Panics
    /// If `work` panics.
    #[track_caller]
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
                work()
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Runs `work` inside, on a new thread, without waiting for it.
    ///
    /// # Panics
    /// If no descriptor or thread is left.
    pub fn spawn(&self, work: impl FnOnce() + Send + 'static) -> JoinHandle<()> {
        let file = self.file.try_clone().unwrap();
        std::thread::spawn(move || {
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            drop(file);
            work();
        })
    }

    /// Returns the target with which an opener enters it.
    ///
    /// # Panics
    /// If no descriptor is left.
    pub fn target(&self) -> Target {
        Target::Path(self.file.try_clone().unwrap())
    }

    /// Returns a second handle of the same namespace, for another thread.
    ///
    /// # Panics
    /// If no descriptor is left.
    pub fn duplicate(&self) -> Namespace {
        Namespace { file: self.file.try_clone().unwrap() }
    }

    /// Returns a path with which other programs enter it, valid as long as this value.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
    }

    /// Sets a network sysctl inside, such as `ipv4/ip_local_port_range`.
    ///
    /// # Panics
    /// If the kernel does not have it, or rejects the value.
    pub fn set_sysctl(&self, name: &str, value: &str) {
        let path = format!("/proc/sys/net/{name}");
        self.run(|| std::fs::write(&path, value)).unwrap_or_else(|error| panic!("{path} = {value}: {error}"));
    }

    /// Drops this handle, and returns a value that shows when the kernel removes the namespace: when no socket, file or
    /// process is left inside.
    ///
    /// # Panics
    /// If the kernel has no veth.
    pub fn into_end_watch(self) -> End {
        // A veth ends with the namespace of either of its ends.
        let name = format!("end{}", ENDS.fetch_add(1, Ordering::Relaxed));
        let status = Command::new("ip")
            .args(["link", "add", &name, "type", "veth", "peer", "name", "peer", "netns", &self.path()])
            .status()
            .unwrap();
        assert!(status.success(), "no veth can be made");
        End { name }
    }

    /// Returns how many bytes a connection inside has sent without an acknowledgement of its peer.
    ///
    /// # Panics
    /// If the connection does not exist.
    pub fn unacknowledged(&self, local: SocketAddr, peer: SocketAddr) -> usize {
        let table = if local.is_ipv4() { "/proc/thread-self/net/tcp" } else { "/proc/thread-self/net/tcp6" };
        let rows = self.run(|| std::fs::read_to_string(table)).unwrap();
        // Ports identify the connection, because there is only one loopback.
        let ends = |address: &str, port| address.ends_with(&format!(":{port:04X}"));
        rows.lines()
            .map(|row| row.split_whitespace().collect::<Vec<_>>())
            .find(|row| ends(row[1], local.port()) && ends(row[2], peer.port()))
            .map(|row| usize::from_str_radix(row[4].split(':').next().unwrap(), 16).unwrap())
            .unwrap_or_else(|| panic!("no connection from {local} to {peer} in\n{rows}"))
    }
}

impl Default for Namespace {
    fn default() -> Namespace {
        Namespace::new()
    }
}

static ENDS: AtomicUsize = AtomicUsize::new(0);

/// Shows whether a namespace has ended.
#[derive(Debug)]
pub struct End {
    name: String,
}

impl End {
    /// Returns whether the namespace has ended.
    pub fn is_gone(&self) -> bool {
        let devices = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
        !devices.contains(&format!("{}:", self.name))
    }
}

/// Moves this process, which must have one thread, into a new network namespace; without root, in a new user namespace.
pub(crate) fn enter_new_host() {
    let user = rustix::process::geteuid();
    if user.is_root() {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
    } else {
        let group = rustix::process::getegid();
        unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET)
            .expect("user namespaces are not allowed here");
        std::fs::write("/proc/self/setgroups", "deny").unwrap();
        std::fs::write("/proc/self/uid_map", format!("0 {} 1", user.as_raw())).unwrap();
        std::fs::write("/proc/self/gid_map", format!("0 {} 1", group.as_raw())).unwrap();
    }
    loopback_up();
}

fn loopback_up() {
    let status =
        Command::new("ip").args(["link", "set", "lo", "up"]).status().expect("ip (iproute2) is not here");
    assert!(status.success(), "the loopback does not come up");
}
