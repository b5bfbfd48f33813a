//! Another user of the machine: work that runs under another uid, and an impostor that listens at the place of our own program
//! listen and records what it receives.
//!
//! The kernel keeps credentials per thread, and a raw `setresuid` changes those of the calling thread only (`nptl(7)`, "C
//! library/kernel differences" of `setuid(2)`). So the other user is a thread: sockets that it makes and accepts belong to
//! the other user, and it has no capability.
//! accepts are of the other user, and it has no capability.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Gid, Uid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use tungstenite::handshake::derive_accept_key;

use crate::broker::Recorder;
use crate::wait_until;

/// The uid of the other user. The user database need not contain it.
pub const OTHER_UID: u32 = 61_234;

/// Returns whether this process can change its uid. An unprivileged user namespace maps only one uid.
pub fn can_change_user() -> bool {
    let is_root =
        std::fs::read_to_string("/proc/self/uid_map").unwrap().split_whitespace().nth(2) != Some("1");
    if !is_root {
        crate::note!("not tried: this user namespace has one user");
    }
    is_root
}

/// Runs `work` as the other user, on a new thread, and waits for it.
///
/// # Panics
/// If `work` panics, or without root.
#[track_caller]
pub fn as_other_user<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let other_user = scope.spawn(|| {
            become_other_user();
            work()
        });
        other_user.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn become_other_user() {
    let (user, group) = (Uid::from_raw(OTHER_UID), Gid::from_raw(OTHER_UID));
    set_thread_groups(&[]).unwrap();
    set_thread_res_gid(group, group, group).unwrap();
    set_thread_res_uid(user, user, user).unwrap();
}

/// How an impostor answers a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImpostorReply {
    /// Answers every WebSocket request as a container of the reference does, and acknowledges every message.
    Reference,
    /// Copies the headers of the request into that answer.
    Echo,
    /// Answers every HTTP request with success.
    Http,
}

/// A listener of another user. It records every byte that arrives.
#[derive(Debug)]
pub struct Impostor {
    address: SocketAddr,
    recorders: Arc<Mutex<Vec<Recorder>>>,
    connections: Arc<AtomicUsize>,
    over: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Impostor {
    /// Listens on this address.
    ///
    /// # Panics
    /// If the address is in use.
    #[track_caller]
    pub fn listen(address: impl Into<SocketAddr>, reply: ImpostorReply) -> Impostor {
        let address = address.into();
        let listener = as_other_user(|| TcpListener::bind(address)).unwrap();
        Impostor::serve(listener, reply)
    }

    /// Accepts connections as another user from this listener, which may belong to any user.
    ///
    /// # Panics
    /// If the listener has no address.
    pub fn serve(listener: TcpListener, reply: ImpostorReply) -> Impostor {
        Impostor::start(listener, reply, become_other_user)
    }

    /// Accepts connections from this listener as our own user, without being the program that it claims to be.
    ///
    /// # Panics
    /// If the listener has no address.
    pub fn of_our_user(listener: TcpListener, reply: ImpostorReply) -> Impostor {
        Impostor::start(listener, reply, || {})
    }

    fn start(listener: TcpListener, reply: ImpostorReply, become_user: fn()) -> Impostor {
        let mut impostor = Impostor {
            address: listener.local_addr().unwrap(),
            recorders: Arc::default(),
            connections: Arc::default(),
            over: Arc::default(),
            thread: None,
        };
        let (recorders, connections) = (Arc::clone(&impostor.recorders), Arc::clone(&impostor.connections));
        let over = Arc::clone(&impostor.over);
        impostor.thread = Some(std::thread::spawn(move || {
            become_user();
            let mut all = Vec::new();
            while !over.load(Ordering::Relaxed) {
                let tick = Timespec::try_from(Duration::from_millis(5)).unwrap();
                if poll(&mut [PollFd::new(&listener, PollFlags::IN)], Some(&tick)).unwrap() == 1 {
                    let (stream, _) = listener.accept().unwrap();
                    connections.fetch_add(1, Ordering::Relaxed);
                    let recorder = Recorder::default();
                    recorders.lock().unwrap().push(recorder.clone());
                    all.push(stream.try_clone().unwrap());
                    std::thread::spawn(move || serve_connection(&stream, reply, &recorder));
                }
            }
            for stream in all {
                // It may have closed the connection already.
                let _ = stream.shutdown(std::net::Shutdown::Both);
            }
        }));
        impostor
    }

    /// The address of the listener.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns the number of accepted connections.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    /// Returns everything that arrived so far, in readable form.
    ///
    /// # Panics
    /// If a thread of the impostor panicked.
    pub fn received(&self) -> String {
        self.recorders.lock().unwrap().iter().map(Recorder::text).collect()
    }

    /// Waits until this text has arrived.
    ///
    /// If it does not arrive.
    /// When it does not.
    #[track_caller]
    pub fn wait_for(&self, text: &str) {
        wait_until(&format!("the impostor to receive {text}"), || match self.received() {
            received if received.contains(text) => Ok(()),
            received => Err(received),
        });
    }

    /// Asserts that a secret has not arrived.
    ///
    /// # Panics
    /// If it has.
    #[track_caller]
    pub fn assert_without(&self, secret: &str) {
        let received = self.received();
        assert!(!received.contains(secret), "the impostor has {secret}: {received}");
    }
}

impl Drop for Impostor {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // The case has already seen a panic of that thread, or it no longer matters.
            let _ = thread.join();
        }
    }
}

/// Reads what arrives, and answers as configured.
fn serve_connection(mut stream: &TcpStream, reply: ImpostorReply, recorder: &Recorder) {
    let mut is_upgraded = false;
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        let head = recorder.take(&buffer[..count]);
        let answer = match head {
            Some(head) => answer(&head, reply).into_bytes(),
            // A short text frame, regardless of the request.
            None if is_upgraded => {
                let ack = br#"{"type":"broker-hello-ack"}"#;
                [&[0x81, u8::try_from(ack.len()).unwrap()][..], ack].concat()
            }
            None => continue,
        };
        is_upgraded = reply != ImpostorReply::Http;
        if stream.write_all(&answer).is_err() {
            return;
        }
    }
}

fn answer(head: &str, reply: ImpostorReply) -> String {
    let body = r#"{"ok":true}"#;
    let header = |name: &str| {
        let value = |line: &str| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
        };
        head.lines().find_map(value).unwrap_or_default()
    };
    if reply == ImpostorReply::Http {
        return format!(
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
    }
    let accept = derive_accept_key(header("sec-websocket-key").as_bytes());
    let own = ["host", "upgrade", "connection", "sec-websocket-key", "sec-websocket-version"];
    let echoed: String = match reply {
        ImpostorReply::Echo => head
            .lines()
            .skip(1)
            .filter(|line| !own.iter().any(|own| line.to_ascii_lowercase().starts_with(&format!("{own}:"))))
            .map(|line| format!("{line}\r\n"))
            .collect(),
        ImpostorReply::Reference | ImpostorReply::Http => String::new(),
    };
    format!(
        "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\nsec-websocket-accept: {accept}\r\n{echoed}\r\n"
    )
}
