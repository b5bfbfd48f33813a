//! A broker's session without a WebSocket: the container behind it is a server on the host.

use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;

use landfall::forwarding::broker_link::{Announcement, SessionUpdate};
use landfall::forwarding::driver::Forwarding;
use landfall::model::announcement::{Announced, ForwardResult};
use landfall::model::registration::{AttachMethod, ContainerName, Registration};
use landfall_engine::channel::Channel;
use landfall_engine::opener::{Answer, DialFailure, Request};
use serde_json::json;
use tokio::sync::mpsc::Sender;

use crate::namespace::{WAIT_MAX, accept};

/// A registration with every field that a broker needs.
pub(crate) fn registration(name: &str, attach_method: Option<&AttachMethod>) -> Registration {
    let fields = json!({
        "containerName": name, "cwd": "/", "way": attach_method,
        "wsHostPort": 1, "portForward": { "allow": "*" }, "brokerToken": "x",
    });
    Registration::from_fields(fields.as_object().unwrap().clone()).unwrap()
}

pub(crate) struct Session {
    pub(crate) announce: Sender<Announcement>,
    results: mpsc::Receiver<ForwardResult>,
    /// The number of times that channels arrived.
    pub(crate) served: Arc<AtomicUsize>,
    connected: Arc<AtomicBool>,
}

impl Session {
    /// A session whose container answers as `name` on every port.
    pub(crate) fn begin(forwarding: &Forwarding, name: &str) -> Session {
        let server = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = server.local_addr().unwrap().port();
        let who = name.to_owned();
        std::thread::spawn(move || accept(&server, &who));
        let link = forwarding.broker(&ContainerName::new(name).unwrap());
        let (sender, results) = mpsc::channel();
        let served = Arc::new(AtomicUsize::new(0));
        let connected = Arc::new(AtomicBool::new(false));
        let (counted, up, mut updates) = (Arc::clone(&served), Arc::clone(&connected), link.updates);
        std::thread::spawn(move || {
            while let Some(update) = updates.blocking_recv() {
                match update {
                    SessionUpdate::Result(result) => drop(sender.send(result)),
                    SessionUpdate::Serve(channels) => {
                        counted.fetch_add(1, Ordering::SeqCst);
                        for channel in channels {
                            let up = Arc::clone(&up);
                            std::thread::spawn(move || dial(channel, port, &up));
                        }
                    }
                }
            }
        });
        Session { announce: link.announce, results, served, connected }
    }

    pub(crate) fn up(&self, ports: &[u16]) {
        self.connected.store(true, Ordering::SeqCst);
        self.announce.blocking_send(Announcement::Up).unwrap();
        self.listening(ports, &[], true);
    }

    pub(crate) fn listening(&self, opened: &[u16], closed: &[u16], whole: bool) {
        let port = |port: &u16| std::num::NonZeroU16::new(*port).unwrap();
        let opened = opened.iter().map(|number| Announced { port: port(number), loopback: true }).collect();
        let closed = closed.iter().map(port).collect();
        self.announce.blocking_send(Announcement::Listening { opened, closed, whole }).unwrap();
    }

    pub(crate) fn reserve(&self, target: u16, candidates: &[u16]) {
        let port = |port: u16| std::num::NonZeroU16::new(port).unwrap();
        let candidates = candidates.iter().map(|candidate| port(*candidate)).collect();
        self.announce.blocking_send(Announcement::Reserve { target: port(target), candidates }).unwrap();
    }

    pub(crate) fn down(&self) {
        self.connected.store(false, Ordering::SeqCst);
        self.announce.blocking_send(Announcement::Down).unwrap();
    }

    /// The next result.
    pub(crate) fn result(&self) -> (u16, Result<u16, String>) {
        let result = self.results.recv_timeout(WAIT_MAX).unwrap();
        (result.port.get(), result.result.map(std::num::NonZeroU16::get))
    }

    /// Whether no further result has arrived.
    pub(crate) fn is_silent(&self) -> bool {
        self.results.try_recv().is_err()
    }
}

fn dial(channel: OwnedFd, server: u16, connected: &AtomicBool) {
    let channel = Channel::try_from(channel).unwrap();
    while let Ok(Some((Request::Dial { dial, .. }, _))) = channel.recv() {
        let refused = Answer::NotDialled { dial, why: DialFailure::Refused };
        let stream = connected.load(Ordering::SeqCst).then(|| TcpStream::connect(("127.0.0.1", server)));
        let result = match stream.and_then(Result::ok) {
            Some(stream) => {
                stream.set_nonblocking(true).unwrap();
                channel.send(&Answer::Dialled { dial }, &[stream.as_fd()])
            }
            None => channel.send(&refused, &[]),
        };
        if result.is_err() {
            return;
        }
    }
}
