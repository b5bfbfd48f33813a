//! A sandbox with its supervisor, and the host's view of it.

use std::collections::BTreeSet;
use std::net::{SocketAddr, TcpStream};
use std::num::NonZeroU16;
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use landfall_engine::channel::Channel;
use landfall_engine::native::{Conflict, Driver, NativeEvent, NativeListener, Supervisor};

const TIMEOUT: Duration = Duration::from_secs(20);

/// A port in use, and the inodes in the question to the driver.
type Asked = (u16, Vec<u64>);

/// A driver that records its questions and events.
pub(crate) struct RecordingDriver {
    pub(crate) denied: BTreeSet<u16>,
    pub(crate) conflict: Conflict,
    pub(crate) asked: Arc<Mutex<Vec<Asked>>>,
    events: Sender<NativeEvent>,
}

impl Driver for RecordingDriver {
    fn may_expose(&mut self, port: NonZeroU16) -> bool {
        !self.denied.contains(&port.get())
    }

    fn conflict(&mut self, port: NonZeroU16, inodes: &[u64]) -> Conflict {
        self.asked.lock().unwrap().push((port.get(), inodes.to_vec()));
        self.conflict
    }

    fn report(&mut self, event: NativeEvent) {
        let _ = self.events.send(event);
    }
}

/// A sandbox with a program that carries out requests.
pub(crate) struct Sandbox {
    pub(crate) child: Child,
    channel: Channel,
    pub(crate) events: Receiver<NativeEvent>,
    pub(crate) asked: Arc<Mutex<Vec<Asked>>>,
    pub(crate) cookie: u64,
}

impl Sandbox {
    pub(crate) fn new() -> Sandbox {
        Sandbox::with(&[], Conflict::Fail)
    }

    pub(crate) fn with(denied: &[u16], conflict: Conflict) -> Sandbox {
        let (child, channel) = spawn(Command::new(std::env::current_exe().unwrap()).arg("_inside"));
        let (message, mut descriptors) = channel.recv::<String>().unwrap().expect("the sandbox has ended");
        let cookie = message.parse().unwrap_or_else(|_| panic!("no filter: {message}"));
        let (events, received) = mpsc::channel();
        let asked = Arc::default();
        let driver = RecordingDriver {
            denied: denied.iter().copied().collect(),
            conflict,
            asked: Arc::clone(&asked),
            events,
        };
        Supervisor::prepare().unwrap().start(descriptors.remove(0), cookie, driver).unwrap();
        Sandbox { child, channel, events: received, asked, cookie }
    }

    #[track_caller]
    pub(crate) fn ask(&self, request: &str) -> String {
        self.request(request);
        self.answer()
    }

    /// Sends a request without waiting for the answer.
    pub(crate) fn request(&self, request: &str) {
        self.channel.send(&request.to_owned(), &[]).unwrap();
    }

    #[track_caller]
    pub(crate) fn answer(&self) -> String {
        let answer = self.channel.recv_timeout::<String>(4 * TIMEOUT);
        answer.unwrap_or_else(|error| panic!("{error}")).expect("the program inside has ended").0
    }

    /// Sends a request, which must succeed.
    #[track_caller]
    pub(crate) fn expect_ok(&self, request: &str) {
        assert_eq!(self.ask(request), "ok", "{request}");
    }

    /// Creates a listening socket inside, and returns its number there.
    #[track_caller]
    pub(crate) fn listen(&self, kind: &str, at: &str) -> String {
        let socket = self.ask(kind);
        self.expect_ok(&format!("bind {socket} {at}"));
        self.expect_ok(&format!("listen {socket} 16"));
        socket
    }

    /// Starts a server inside that sends `name`.
    #[track_caller]
    pub(crate) fn serve(&self, kind: &str, at: &str, name: &str) -> String {
        let socket = self.listen(kind, at);
        self.expect_ok(&format!("serve {socket} {name}"));
        socket
    }

    #[track_caller]
    pub(crate) fn event(&self) -> NativeEvent {
        self.events.recv_timeout(TIMEOUT).expect("nothing was reported")
    }

    /// Receives the next event, which must report a native listener.
    #[track_caller]
    pub(crate) fn opened(&self) -> NativeListener {
        match self.event() {
            NativeEvent::Opened(listener) => listener,
            other => panic!("not native: {other:?}"),
        }
    }

    #[track_caller]
    pub(crate) fn closed(&self, listener: &NativeListener) {
        assert_eq!(self.event(), NativeEvent::Closed { inode: listener.inode });
    }

    /// Ends the program.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts a program with a channel at its standard input.
pub(crate) fn spawn(command: &mut Command) -> (Child, Channel) {
    let (ours, theirs) = Channel::pair().unwrap();
    let theirs = theirs.as_fd().try_clone_to_owned().unwrap();
    (command.stdin(Stdio::from(theirs)).spawn().unwrap(), ours)
}

/// Whether an address of the host accepts no connection.
pub(crate) fn refuses(at: &str) -> bool {
    let at: SocketAddr = at.parse().unwrap();
    TcpStream::connect_timeout(&at, TIMEOUT)
        .is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
}

/// Returns the text that the server at an address of the host sends.
pub(crate) fn fetch(at: &str) -> String {
    crate::inside::fetch(at.parse().unwrap())
}

/// Waits until `holds` returns true.
#[track_caller]
pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + TIMEOUT;
    while !holds() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
}
