//! A minimal container: a process in a network namespace of its own, which listens on command.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::num::NonZeroU32;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// The bound of every wait; none takes a tenth of it normally.
pub(crate) const WAIT_MAX: Duration = Duration::from_secs(30);

pub(crate) struct Namespace {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Namespace {
    /// Creates a namespace. Its servers send `name` to each client, and then echo every byte.
    pub(crate) fn new(name: &str) -> Namespace {
        Namespace::start(Command::new("unshare").arg("--net"), name)
    }

    /// Joins the namespace at `path`.
    pub(crate) fn at(path: &Path, name: &str) -> Namespace {
        Namespace::start(Command::new("nsenter").arg(format!("--net={}", path.display())), name)
    }

    fn start(command: &mut Command, name: &str) -> Namespace {
        let program = std::env::current_exe().unwrap();
        let mut child = command
            .args(["sh", "-c", "ip link set lo up && exec \"$0\" _serve \"$1\""])
            .arg(program)
            .arg(name)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let orders = child.stdin.take().unwrap();
        let answers = BufReader::new(child.stdout.take().unwrap());
        let mut namespace = Namespace { child, orders, answers };
        assert_eq!(namespace.answer(), "ready");
        namespace
    }

    pub(crate) fn pid(&self) -> NonZeroU32 {
        NonZeroU32::new(self.child.id()).unwrap()
    }

    pub(crate) fn listen(&mut self, port: u16) {
        self.order(&format!("listen {port}"));
    }

    pub(crate) fn close(&mut self, port: u16) {
        self.order(&format!("close {port}"));
    }

    fn order(&mut self, order: &str) {
        writeln!(self.orders, "{order}").unwrap();
        assert_eq!(self.answer(), "done");
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The process inside the namespace.
pub(crate) fn serve(arguments: &[String]) -> ExitCode {
    let name = arguments[0].clone();
    println!("ready");
    let mut listeners = std::collections::BTreeMap::new();
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let (word, port) = line.split_once(' ').unwrap();
        let port: u16 = port.parse().unwrap();
        match word {
            "listen" => {
                let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
                let (accepting, name) = (listener.try_clone().unwrap(), name.clone());
                std::thread::spawn(move || accept(&accepting, &name));
                listeners.insert(port, listener);
            }
            _ => {
                let listener = listeners.remove(&port).unwrap();
                // It wakes the accepting thread, which holds the other copy.
                let _ = rustix::net::shutdown(&listener, rustix::net::Shutdown::Both);
            }
        }
        println!("done");
    }
    ExitCode::SUCCESS
}

pub(crate) fn accept(listener: &TcpListener, name: &str) {
    while let Ok((mut stream, _)) = listener.accept() {
        let name = format!("{name}\n");
        std::thread::spawn(move || {
            let _ = stream.write_all(name.as_bytes());
            let mut buffer = [0; 1024];
            while let Ok(count @ 1..) = stream.read(&mut buffer) {
                if stream.write_all(&buffer[..count]).is_err() {
                    return;
                }
            }
        });
    }
}

/// The name that the server on the host's `port` sends, if one is open.
pub(crate) fn ask(port: u16) -> Option<String> {
    Client::connect(port).map(|client| client.name)
}

/// A connection that was accepted.
pub(crate) struct Client {
    stream: BufReader<TcpStream>,
    pub(crate) name: String,
}

impl Client {
    pub(crate) fn connect(port: u16) -> Option<Client> {
        let stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
        stream.set_read_timeout(Some(WAIT_MAX)).unwrap();
        let mut stream = BufReader::new(stream);
        let mut name = String::new();
        stream.read_line(&mut name).ok()?;
        let name = name.trim_end().to_owned();
        (!name.is_empty()).then_some(Client { stream, name })
    }

    /// Whether the server echoes bytes.
    pub(crate) fn works(&mut self) -> bool {
        let mut back = [0; 5];
        self.stream.get_mut().write_all(b"hello").is_ok()
            && self.stream.read_exact(&mut back).is_ok()
            && back == *b"hello"
    }
}

/// Waits until `wanted` holds.
pub(crate) fn until<T>(what: &str, mut wanted: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(found) = wanted() {
            return found;
        }
        assert!(begin.elapsed() < WAIT_MAX, "{what} has not happened");
        std::thread::sleep(Duration::from_millis(5));
    }
}
