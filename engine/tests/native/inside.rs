//! The program in the sandbox. It carries out one request after the other; requests and answers are lines of words.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use landfall_engine::channel::Channel;
use landfall_engine::native;
use landfall_engine::sys::netns_cookie;
use nix::sched::{CloneFlags, unshare};
use rustix::event::epoll;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, sockopt};

use crate::stress;

/// Moves this process, which has one thread, to a new network namespace; if `user`, with a user namespace in which it is
/// root.
pub(crate) fn leave(user: bool) {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let namespaces = if user { CloneFlags::CLONE_NEWUSER } else { CloneFlags::empty() };
    unshare(namespaces | CloneFlags::CLONE_NEWNET).unwrap();
    if user {
        std::fs::write("/proc/self/setgroups", "deny").unwrap();
        std::fs::write("/proc/self/uid_map", format!("0 {uid} 1")).unwrap();
        std::fs::write("/proc/self/gid_map", format!("0 {gid} 1")).unwrap();
    }
}

pub(crate) fn loopback_up() {
    let status = Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap();
    assert!(status.success());
}

/// `_inside`: creates the sandbox, installs the filter, sends its descriptor and the namespace's cookie, and serves. Without
/// a filter it sends the reason.
pub(crate) fn main(arguments: &[String]) -> ExitCode {
    let channel = Channel::try_from(std::io::stdin().as_fd().try_clone_to_owned().unwrap()).unwrap();
    leave(true);
    loopback_up();
    let any = rustix::net::socket(AddressFamily::UNIX, SocketType::DGRAM, None).unwrap();
    let cookie = netns_cookie(&any).unwrap();
    drop(any);
    match arguments.first().map(String::as_str) {
        Some("twice") => std::mem::forget(native::install().unwrap()),
        Some("denied") => deny_seccomp(),
        _ => {}
    }
    match native::install() {
        Ok(notifications) => channel.send(&cookie.to_string(), &[notifications.as_fd()]).unwrap(),
        Err(error) => channel.send(&error.to_string(), &[]).unwrap(),
    }
    let mut program = Program::default();
    while let Ok(Some((request, _))) = channel.recv::<String>() {
        let words: Vec<&str> = request.split(' ').collect();
        let answer = program.carry_out(&words);
        if channel.send(&answer, &[]).is_err() {
            break;
        }
    }
    ExitCode::SUCCESS
}

/// Makes `seccomp(2)` fail with EPERM.
fn deny_seccomp() {
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
    let rules = [(libc::SYS_seccomp, Vec::new())].into_iter().collect();
    let errno = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    let here = std::env::consts::ARCH.try_into().unwrap();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, errno, here).unwrap();
    seccompiler::apply_filter(&BpfProgram::try_from(filter).unwrap()).unwrap();
}

/// `_child`: a child of the program. Its standard input is the inherited socket, its standard output the channel of its
/// requests.
pub(crate) fn child() -> ExitCode {
    let channel = Channel::try_from(std::io::stdout().as_fd().try_clone_to_owned().unwrap()).unwrap();
    while let Ok(Some((request, _))) = channel.recv::<String>() {
        let answer = match request.as_str() {
            "listen" => result(rustix::net::listen(std::io::stdin(), 16)),
            "serve" => {
                serve(std::io::stdin().as_fd().try_clone_to_owned().unwrap(), "child");
                "ok".to_owned()
            }
            other => panic!("{other}"),
        };
        channel.send(&answer, &[]).unwrap();
    }
    ExitCode::SUCCESS
}

#[derive(Default)]
struct Program {
    sockets: BTreeMap<usize, OwnedFd>,
    epolls: Vec<OwnedFd>,
    children: BTreeMap<usize, (Child, Channel)>,
    next: usize,
}

impl Program {
    fn carry_out(&mut self, words: &[&str]) -> String {
        let number = |at: usize| words[at].parse::<usize>().unwrap();
        let socket = |program: &Program, at: usize| program.sockets[&number(at)].try_clone().unwrap();
        match words[0] {
            "tcp4" => self.keep(made(AddressFamily::INET, ipproto::TCP)),
            "tcp6" => self.keep(made(AddressFamily::INET6, ipproto::TCP)),
            "mptcp4" => self.keep(made(AddressFamily::INET, ipproto::MPTCP)),
            "unix" => {
                let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
                self.keep(Ok(socket))
            }
            "v6only" => result(sockopt::set_ipv6_v6only(socket(self, 1), words[2] == "yes")),
            "reuseport" => result(sockopt::set_socket_reuseport(socket(self, 1), true)),
            "keepidle" => {
                let socket = socket(self, 1);
                sockopt::set_socket_keepalive(&socket, true).unwrap();
                sockopt::set_socket_send_buffer_size(&socket, 100_000).unwrap();
                result(sockopt::set_tcp_keepidle(&socket, Duration::from_secs(words[2].parse().unwrap())))
            }
            "nonblocking" => result(rustix::io::ioctl_fionbio(socket(self, 1), words[2] == "yes")),
            "cloexec" => {
                let flag = rustix::io::FdFlags::CLOEXEC;
                let flags = if words[2] == "yes" { flag } else { rustix::io::FdFlags::empty() };
                result(rustix::io::fcntl_setfd(&self.sockets[&number(1)], flags))
            }
            "flags" => {
                let flags = rustix::fs::fcntl_getfl(&self.sockets[&number(1)]).unwrap();
                let blocking =
                    if flags.contains(rustix::fs::OFlags::NONBLOCK) { "nonblocking" } else { "blocking" };
                let kept = rustix::io::fcntl_getfd(&self.sockets[&number(1)]).unwrap();
                format!("{blocking} {}", if kept.is_empty() { "inherited" } else { "cloexec" })
            }
            "bind" if words[2].starts_with('@') => {
                let name = rustix::net::SocketAddrUnix::new_abstract_name(words[2].as_bytes()).unwrap();
                result(rustix::net::bind(socket(self, 1), &name))
            }
            "bind" => {
                let socket = socket(self, 1);
                let _ = sockopt::set_socket_reuseaddr(&socket, true);
                result(rustix::net::bind(socket, &words[2].parse::<SocketAddr>().unwrap()))
            }
            "listen" => {
                // On the descriptor itself and not on a duplicate, because duplicates affect the decision.
                result(rustix::net::listen(&self.sockets[&number(1)], words[2].parse().unwrap()))
            }
            "name" => {
                let name = rustix::net::getsockname(socket(self, 1)).unwrap();
                SocketAddr::try_from(name).unwrap().to_string()
            }
            "options" => {
                let socket = socket(self, 1);
                let idle = sockopt::tcp_keepidle(&socket).unwrap().as_secs();
                let buffer = sockopt::socket_send_buffer_size(&socket).unwrap();
                format!("{} {idle} {buffer}", sockopt::socket_keepalive(&socket).unwrap())
            }
            "cookie" => netns_cookie(&self.sockets[&number(1)]).unwrap().to_string(),
            "dup" => {
                let duplicate = socket(self, 1);
                self.keep(Ok(duplicate))
            }
            "epoll" => {
                let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
                let added = epoll::add(
                    &epoll,
                    &self.sockets[&number(1)],
                    epoll::EventData::new_u64(1),
                    epoll::EventFlags::IN,
                );
                self.epolls.push(epoll);
                result(added)
            }
            "serve" => {
                serve(socket(self, 1), words[2]);
                "ok".to_owned()
            }
            "accept" => {
                let listener = TcpListener::from(socket(self, 1));
                listener.set_nonblocking(false).unwrap();
                let (mut client, _) = listener.accept().unwrap();
                client.write_all(b"accepted").unwrap();
                "ok".to_owned()
            }
            "close" => {
                self.sockets.remove(&number(1)).unwrap();
                "ok".to_owned()
            }
            "connect" => fetch(words[1].parse().unwrap()),
            "child" => self.child(number(1)),
            "ask" => {
                let (_, channel) = &self.children[&number(1)];
                channel.send(&words[2].to_owned(), &[]).unwrap();
                channel.recv::<String>().unwrap().unwrap().0
            }
            "reap" => {
                let (mut child, _) = self.children.remove(&number(1)).unwrap();
                child.kill().unwrap();
                child.wait().unwrap();
                "ok".to_owned()
            }
            "descriptors" => std::fs::read_dir("/proc/self/fd").unwrap().count().to_string(),
            other => stress::carry_out(other, &words[1..]),
        }
    }

    fn keep(&mut self, socket: Result<OwnedFd, Errno>) -> String {
        match socket {
            Ok(socket) => {
                self.next += 1;
                self.sockets.insert(self.next, socket);
                self.next.to_string()
            }
            Err(errno) => name(errno),
        }
    }

    /// Starts a child that inherits a socket.
    fn child(&mut self, socket: usize) -> String {
        let socket = self.sockets[&socket].try_clone().unwrap();
        let (ours, theirs) = Channel::pair().unwrap();
        let this = std::env::current_exe().unwrap();
        let theirs = theirs.as_fd().try_clone_to_owned().unwrap();
        let mut child = Command::new(this);
        child.arg("_child").stdin(Stdio::from(socket)).stdout(Stdio::from(theirs));
        self.next += 1;
        self.children.insert(self.next, (child.spawn().unwrap(), ours));
        self.next.to_string()
    }
}

fn made(family: AddressFamily, protocol: rustix::net::Protocol) -> Result<OwnedFd, Errno> {
    rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, Some(protocol))
}

/// Answers every client with `name` until the process ends.
fn serve(socket: OwnedFd, name: &str) {
    let (listener, name) = (TcpListener::from(socket), name.to_owned());
    listener.set_nonblocking(false).unwrap();
    std::thread::spawn(move || {
        while let Ok((mut client, _)) = listener.accept() {
            let _ = client.write_all(name.as_bytes());
        }
    });
}

/// Returns the server's greeting, or the kind of the error.
pub(crate) fn fetch(at: SocketAddr) -> String {
    let fetched = TcpStream::connect_timeout(&at, Duration::from_secs(10)).and_then(|mut server| {
        let mut message = String::new();
        server.set_read_timeout(Some(Duration::from_secs(10)))?;
        server.read_to_string(&mut message)?;
        Ok(message)
    });
    fetched.unwrap_or_else(|error| format!("{:?}", error.kind()))
}

fn result(outcome: Result<(), Errno>) -> String {
    outcome.map_or_else(name, |()| "ok".to_owned())
}

/// Returns the symbolic name, such as `EADDRINUSE`.
fn name(errno: Errno) -> String {
    format!("{:?}", nix::errno::Errno::from_raw(errno.raw_os_error()))
}
