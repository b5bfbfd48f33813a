//! A program on a pseudo-terminal, to test its questions to a person.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::process::{Child, Command, ExitStatus};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

use crate::TIMEOUT;

/// A program whose three standard streams are one terminal.
#[derive(Debug)]
pub struct Terminal {
    outer: File,
    child: Child,
    shown: String,
}

impl Terminal {
    /// Starts a program.
    ///
    /// # Panics
    /// If a terminal cannot be opened, or the program cannot be started.
    pub fn run(mut command: Command) -> Terminal {
        let outer = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&outer).unwrap();
        unlockpt(&outer).unwrap();
        let path = ptsname(&outer, Vec::new()).unwrap();
        let inner = OpenOptions::new().read(true).write(true).open(path.to_str().unwrap()).unwrap();
        let child = command
            .stdin(inner.try_clone().unwrap())
            .stdout(inner.try_clone().unwrap())
            .stderr(inner)
            .spawn()
            .unwrap();
        // The command holds the inner end until it is dropped; then the end of the program closes the terminal.
        drop(command);
        Terminal { outer: outer.into(), child, shown: String::new() }
    }

    /// Waits until the program has printed `text`.
    ///
    /// # Panics
    /// If it does not.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str) {
        while !self.shown.contains(text) {
            assert!(self.read_more(), "{text:?} was not shown; shown was:\n{}", self.shown);
        }
    }

    /// Types a line.
    ///
    /// # Panics
    /// If the terminal is closed.
    #[track_caller]
    pub fn type_line(&mut self, line: &str) {
        self.outer.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    /// Waits until the program exits. Returns its status and all of its output.
    ///
    /// # Panics
    /// If it does not exit.
    #[track_caller]
    pub fn end(mut self) -> (ExitStatus, String) {
        while self.read_more() {}
        (self.child.wait().unwrap(), std::mem::take(&mut self.shown))
    }

    /// Reads the available output. Returns false at the end.
    #[track_caller]
    fn read_more(&mut self) -> bool {
        let until = Instant::now() + TIMEOUT;
        let mut bytes = [0; 4096];
        loop {
            let left = until.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "nothing was shown; shown was:\n{}", self.shown);
            let mut fds = [PollFd::new(&self.outer, PollFlags::IN)];
            let limit = Timespec { tv_sec: 1, tv_nsec: 0 };
            if poll(&mut fds, Some(&limit)).unwrap() == 0 {
                continue;
            }
            // EIO: the other end is closed.
            let Ok(count) = self.outer.read(&mut bytes) else { return false };
            self.shown.push_str(&String::from_utf8_lossy(&bytes[..count]));
            return count > 0;
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
