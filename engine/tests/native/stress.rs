//! Many calls at once, and the program's part of the case about other hosts.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use crate::sandbox::{Sandbox, fetch, until};

fn is_long() -> bool {
    std::env::var_os("LANDFALL_LONG").is_some()
}

pub(crate) fn threads() {
    let sandbox = Sandbox::new();
    assert_eq!(sandbox.ask("threads 200 10000"), "200");
    // The first ones fill the sandbox's quota of native listeners, and 200 are within it.
    for _ in 0..200 {
        sandbox.opened();
    }
    assert_eq!(fetch("127.0.0.1:10000"), "10000");
    assert_eq!(fetch("127.0.0.1:10199"), "10199");
}

pub(crate) fn short_lived() {
    let sandbox = Sandbox::new();
    let before = descriptors();
    let rounds = if is_long() { 1_000 } else { 200 };
    assert_eq!(sandbox.ask(&format!("short-lived {rounds} 10000")), rounds.to_string());
    for _ in 0..2 * rounds {
        sandbox.event();
    }
    until("the end of every descriptor", || descriptors() <= before);
    assert!(sandbox.events.try_recv().is_err());
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

// ---------------------------------------------------------------- inside

/// Carries out a request of these cases in the program inside.
pub(crate) fn carry_out(verb: &str, words: &[&str]) -> String {
    let number = |at: usize| words[at].parse::<usize>().unwrap();
    match verb {
        "threads" => listen_on_threads(words[0].parse().unwrap(), words[1].parse().unwrap()),
        "short-lived" => live_shortly(number(0), words[1].parse().unwrap()),
        "ip" => {
            assert!(Command::new("ip").args(words).status().unwrap().success());
            "ok".to_owned()
        }
        "martians" => martians(words[0], words[1]),
        "reach" => reach(words[0].parse().unwrap()),
        "relayed-client" => {
            let client = std::net::TcpStream::connect(words[0]).unwrap();
            drop(client);
            "ok".to_owned()
        }
        other => panic!("{other}"),
    }
}

fn bound(port: u16) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    rustix::net::bind(&socket, &SocketAddr::from(([127, 0, 0, 1], port)))?;
    Ok(socket)
}

fn listen_on_threads(threads: u16, first: u16) -> String {
    let done = Arc::new(AtomicUsize::new(0));
    let together = Arc::new(std::sync::Barrier::new(usize::from(threads)));
    for port in first..first + threads {
        let (done, together) = (Arc::clone(&done), Arc::clone(&together));
        std::thread::spawn(move || {
            use std::io::Write;
            let socket = bound(port).unwrap();
            together.wait();
            rustix::net::listen(&socket, 4).unwrap();
            done.fetch_add(1, Ordering::Relaxed);
            let listener = std::net::TcpListener::from(socket);
            while let Ok((mut client, _)) = listener.accept() {
                let _ = client.write_all(port.to_string().as_bytes());
            }
        });
    }
    until("every listener", || done.load(Ordering::Relaxed) == usize::from(threads));
    done.load(Ordering::Relaxed).to_string()
}

fn live_shortly(rounds: usize, port: u16) -> String {
    let mut done = 0;
    for _ in 0..rounds {
        let socket = bound(port).unwrap();
        rustix::net::listen(&socket, 4).unwrap();
        done += 1;
    }
    done.to_string()
}

/// Routes the neighbour's loopback addresses over a wire.
fn martians(device: &str, gateway: &str) -> String {
    std::fs::write(format!("/proc/sys/net/ipv4/conf/{device}/route_localnet"), "1").unwrap();
    let words = ["route", "replace", "127.0.0.5/32", "via", gateway, "dev", device];
    let _ = Command::new("ip")
        .args(["route", "del", "local", "127.0.0.0/8", "dev", "lo", "table", "local"])
        .status();
    assert!(Command::new("ip").args(words).status().unwrap().success());
    "ok".to_owned()
}

fn reach(at: SocketAddr) -> String {
    match std::net::TcpStream::connect_timeout(&at, Duration::from_millis(300)) {
        Ok(_) => "connected".to_owned(),
        Err(error) => format!("{:?}", error.kind()),
    }
}
