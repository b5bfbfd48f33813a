//! Commands under `landfall run`, and the output of both.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};

use rustix::process::{Pid, Signal, kill_process};

use crate::{TIMEOUT, wait_until};

/// A Python that every user can execute; one that a developer installed may be in a private directory.
pub const PYTHON: &str = "/usr/bin/python3";

/// The start of every script: `listen` starts a server that answers each client with a text, `say` prints a line.
const PRELUDE: &str = "
import os, socket, sys, threading, time
def say(*words): print(*words, flush=True)
def bound(host, port, family=None, reuse_port=False):
    family = family or (socket.AF_INET6 if ':' in host else socket.AF_INET)
    s = socket.socket(family, socket.SOCK_STREAM)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if reuse_port: s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    s.bind((host, port))
    return s
def serve(s, word):
    def loop():
        while True:
            try: c, _ = s.accept()
            except OSError: return
            try: c.sendall(word.encode())
            except OSError: pass
            c.close()
    threading.Thread(target=loop, daemon=True).start()
def listen(host, port, word='hello', **options):
    s = bound(host, port, **options)
    s.listen(64)
    serve(s, word)
    return s
def fetch(host, port):
    try:
        c = socket.create_connection((host, port), timeout=20)
        word = b''
        while part := c.recv(64): word += part
        return word.decode()
    except OSError as error: return type(error).__name__
def wait(): sys.stdin.read()
";

/// A running command. Dropping it kills landfall.
#[derive(Debug)]
pub struct Run {
    child: Child,
    /// The standard output of the command.
    pub out: Lines,
    /// The standard error of landfall and of the command.
    pub err: Lines,
}

impl Run {
    /// Starts `command`, a `landfall run` without its command, with a Python script. The script ends when its standard input
    /// ends.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn python(mut command: Command, script: &str) -> Run {
        command.args(["--", PYTHON, "-c", &format!("{PRELUDE}{script}")]);
        Run::start(command)
    }

    /// Starts a `landfall run`. PATH contains no programs, so that pasta is not found: its start would take most of the time of a case.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start(mut command: Command) -> Run {
        command.env("PATH", "/nonexistent").env("PYTHONDONTWRITEBYTECODE", "1");
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (out, err) = (Lines::of(child.stdout.take().unwrap()), Lines::of(child.stderr.take().unwrap()));
        Run { child, out, err }
    }

    /// The process id of landfall.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal to landfall.
    ///
    /// # Panics
    /// If it has ended.
    pub fn signal(&self, signal: Signal) {
        // Our own child, not waited for, so the process id is valid.
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Writes a line to the command's standard input.
    ///
    /// # Panics
    /// If the command has closed it.
    pub fn write(&mut self, line: &str) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    /// Closes the command's standard input, and waits until landfall exits.
    ///
    /// # Panics
    /// If it does not exit.
    #[track_caller]
    pub fn end(&mut self) -> ExitStatus {
        self.child.stdin = None;
        let (out, err) = (&self.out, &self.err);
        let child = &mut self.child;
        wait_until("the end of the command", || child.try_wait().unwrap().ok_or((out.all(), err.all())))
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("output of the command:\n{}\noutput of landfall:\n{}", self.out.all(), self.err.all());
        }
    }
}

/// The lines that a process has printed so far.
#[derive(Clone, Debug)]
pub struct Lines(Arc<Mutex<Vec<String>>>);

impl Lines {
    fn of(stream: impl Read + Send + 'static) -> Lines {
        let lines = Lines(Arc::default());
        let kept = lines.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(stream).lines().map_while(Result::ok) {
                kept.0.lock().unwrap().push(line);
            }
        });
        lines
    }

    /// Returns all lines.
    pub fn all(&self) -> String {
        self.0.lock().unwrap().join("\n")
    }

    /// Counts the lines that contain `text`.
    pub fn count(&self, text: &str) -> usize {
        self.0.lock().unwrap().iter().filter(|line| line.contains(text)).count()
    }

    /// Waits for a line that contains `text`, and returns the first one.
    ///
    /// # Panics
    /// If none appears.
    #[track_caller]
    pub fn wait_for(&self, text: &str) -> String {
        wait_until(&format!("a line with {text:?}"), || {
            let lines = self.0.lock().unwrap();
            lines.iter().find(|line| line.contains(text)).cloned().ok_or_else(|| lines.join("\n"))
        })
    }
}

/// Returns the answer of the server at an address, or the kind of the error.
///
/// # Panics
/// If the address is invalid.
#[track_caller]
pub fn fetch(at: &str) -> String {
    let at: SocketAddr = at.parse().unwrap();
    let response = TcpStream::connect_timeout(&at, TIMEOUT).and_then(|mut server| {
        let mut printed = String::new();
        server.set_read_timeout(Some(TIMEOUT))?;
        server.read_to_string(&mut printed)?;
        Ok(printed)
    });
    response.unwrap_or_else(|error| format!("{:?}", error.kind()))
}

/// Returns whether a process exists, also as a zombie.
pub fn exists(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}
