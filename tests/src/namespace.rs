//! Network namespaces, each with a loopback of its own.

use std::fs::File;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

use landfall_engine::opener::client::Target;
use nix::sched::{CloneFlags, unshare};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// A network namespace whose loopback is up. It lives as long as this, or a socket made inside.
#[derive(Debug)]
pub struct Namespace {
    file: OwnedFd,
}

impl Namespace {
    /// A new one, with nothing in it.
    ///
    /// # Panics
    /// When namespaces cannot be made.
    pub fn new() -> Namespace {
        // A thread of its own, since nothing brings the thread back.
        std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let namespace = Namespace::current();
            loopback_up();
            namespace
        })
        .join()
        .unwrap()
    }

    /// The one that this thread is in.
    ///
    /// # Panics
    /// Without `/proc`.
    pub fn current() -> Namespace {
        Namespace { file: File::open("/proc/thread-self/ns/net").unwrap().into() }
    }

    /// The one that a process is in.
    ///
    /// # Panics
    /// When there is no such process.
    #[track_caller]
    pub fn of(pid: u32) -> Namespace {
        Namespace { file: File::open(format!("/proc/{pid}/ns/net")).unwrap().into() }
    }

    /// Runs `work` inside, on a thread of its own, and waits for it. A socket that it makes belongs to this namespace
    /// wherever it is used later.
    ///
    /// # Panics
    /// When `work` does.
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

    /// Runs `work` inside, on a thread of its own that nobody waits for.
    ///
    /// # Panics
    /// When no descriptor or thread is left.
    pub fn spawn(&self, work: impl FnOnce() + Send + 'static) -> JoinHandle<()> {
        let file = self.file.try_clone().unwrap();
        std::thread::spawn(move || {
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            drop(file);
            work();
        })
    }

    /// Where an opener goes to enter it.
    ///
    /// # Panics
    /// When no descriptor is left.
    pub fn target(&self) -> Target {
        Target::Path(self.file.try_clone().unwrap())
    }

    /// The same namespace once more, for another thread.
    ///
    /// # Panics
    /// When no descriptor is left.
    pub fn again(&self) -> Namespace {
        Namespace { file: self.file.try_clone().unwrap() }
    }

    /// A path by which other programs enter it, as long as this lives.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
    }

    /// Sets a network sysctl inside, such as `ipv4/ip_local_port_range`.
    ///
    /// # Panics
    /// When the kernel does not know it, or does not take the value.
    pub fn set_sysctl(&self, name: &str, value: &str) {
        let path = format!("/proc/sys/net/{name}");
        self.run(|| std::fs::write(&path, value)).unwrap_or_else(|error| panic!("{path} = {value}: {error}"));
    }

    /// Lets go of it, and gives a way to see when the kernel does: it does so when no socket, file or process is left inside.
    ///
    /// # Panics
    /// When the kernel has no veth.
    pub fn watch_for_end(self) -> End {
        // A veth ends with the namespace of either of its ends.
        let name = format!("end{}", ENDS.fetch_add(1, Ordering::Relaxed));
        let status = Command::new("ip")
            .args(["link", "add", &name, "type", "veth", "peer", "name", "peer", "netns", &self.path()])
            .status()
            .unwrap();
        assert!(status.success(), "no veth can be made");
        End { name }
    }

    /// How many bytes a connection inside has sent that its peer has not acknowledged.
    ///
    /// # Panics
    /// When there is no such connection.
    pub fn unacknowledged(&self, local: SocketAddr, peer: SocketAddr) -> usize {
        let table = if local.is_ipv4() { "/proc/thread-self/net/tcp" } else { "/proc/thread-self/net/tcp6" };
        let rows = self.run(|| std::fs::read_to_string(table)).unwrap();
        // Ports are enough to know one by: there is one loopback.
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

/// Tells whether a namespace has ended.
#[derive(Debug)]
pub struct End {
    name: String,
}

impl End {
    /// Whether it has.
    pub fn is_gone(&self) -> bool {
        let devices = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
        !devices.contains(&format!("{}:", self.name))
    }
}

/// Puts this process, which must have one thread, into a new network namespace; without root, in a new user namespace.
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
