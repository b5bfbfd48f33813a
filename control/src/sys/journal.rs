//! The journal of events: each event is a line of JSON in the log, and is sent to every subscriber.
//!
//! The log is rotated by size: `hostd.log` becomes `hostd.log.1`, that one `hostd.log.2`, and so on; the oldest is
//! removed. A full disk loses lines of the log and has no other effect.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use jiff::{Timestamp, Unit};
use serde::Serialize;
use tokio::sync::broadcast;

use crate::model::event::Event;
use crate::sys::private_file;

/// The size in bytes at which a log is rotated.
const LOG_BYTES_MAX: u64 = 8 * 1024 * 1024;
/// The number of rotated logs that are kept.
const LOGS_KEPT: u32 = 3;
/// The number of lines that a subscriber may lag behind before it loses the oldest.
const LISTENER_LAG_MAX: usize = 1_024;

/// The journal of one daemon; clones write to the same one.
#[derive(Clone, Debug)]
pub struct Journal(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    log: Mutex<Option<Log>>,
    live: broadcast::Sender<Arc<str>>,
}

#[derive(Serialize)]
struct Line<'a> {
    /// ISO 8601, UTC, milliseconds.
    time: String,
    #[serde(flatten)]
    event: &'a Event,
}

impl Journal {
    /// Opens a journal that appends to the log at `path`.
    ///
    /// # Errors
    /// Those of opening the file.
    pub fn open(path: &Path) -> io::Result<Journal> {
        Ok(Journal::with(Some(Log::open(path, LOG_BYTES_MAX)?)))
    }

    /// Creates a journal without a log.
    pub fn unkept() -> Journal {
        Journal::with(None)
    }

    fn with(log: Option<Log>) -> Journal {
        let (live, _) = broadcast::channel(LISTENER_LAG_MAX);
        Journal(Arc::new(Inner { log: Mutex::new(log), live }))
    }

    /// Returns an event with the current time as a line, without its newline.
    pub fn line(event: &Event) -> String {
        let now = Timestamp::now();
        let time = now.round(Unit::Millisecond).unwrap_or(now);
        // An event is strings and numbers; it serialises.
        serde_json::to_string(&Line { time: format!("{time:.3}"), event }).unwrap_or_default()
    }

    /// Appends an event to the log and sends it to every subscriber.
    pub fn record(&self, event: &Event) {
        let line = Journal::line(event);
        if let Some(log) = self.0.log.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            // Nothing can be done about a full disk, least of all by writing to it.
            let _ = log.append(&line);
        }
        // It fails without subscribers.
        let _ = self.0.live.send(line.into());
    }

    /// Subscribes to every line from now on, without its newline.
    pub fn listen(&self) -> broadcast::Receiver<Arc<str>> {
        self.0.live.subscribe()
    }
}

#[derive(Debug)]
struct Log {
    path: PathBuf,
    file: File,
    bytes: u64,
    bytes_max: u64,
}

impl Log {
    fn open(path: &Path, bytes_max: u64) -> io::Result<Log> {
        let file = open(path)?;
        let bytes = file.metadata()?.len();
        Ok(Log { path: path.to_owned(), file, bytes, bytes_max })
    }

    fn append(&mut self, line: &str) -> io::Result<()> {
        if self.bytes >= self.bytes_max {
            self.rotate()?;
        }
        let text = format!("{line}\n");
        // One call for one line: with O_APPEND, lines of two writers do not mix.
        self.file.write_all(text.as_bytes())?;
        self.bytes += text.len() as u64;
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        let name = |number: u32| {
            let mut name = self.path.clone().into_os_string();
            if number > 0 {
                name.push(format!(".{number}"));
            }
            PathBuf::from(name)
        };
        for number in (0..LOGS_KEPT).rev() {
            match std::fs::rename(name(number), name(number + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        self.file = open(&self.path)?;
        self.bytes = 0;
        Ok(())
    }
}

fn open(path: &Path) -> io::Result<File> {
    private_file::options().append(true).create(true).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_is_json_with_time_and_kind() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hostd.log");
        let journal = Journal::open(&path).unwrap();
        let mut live = journal.listen();
        journal.record(&Event::Register { container_name: "coder".to_owned() });
        let kept = std::fs::read_to_string(&path).unwrap();
        assert_eq!(kept.trim_end(), &*live.try_recv().unwrap());
        let line: serde_json::Value = serde_json::from_str(&kept).unwrap();
        assert_eq!(line["kind"], "register");
        assert_eq!(line["containerName"], "coder");
        let time = line["time"].as_str().unwrap();
        assert!(time.ends_with('Z') && time.len() == "2026-01-02T03:04:05.678Z".len(), "{time}");
    }

    #[test]
    fn full_log_is_rotated_and_the_oldest_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hostd.log");
        let mut log = Log::open(&path, 10).unwrap();
        for number in 0..6 {
            log.append(&format!("line {number} and more")).unwrap();
        }
        let mut names: Vec<_> = std::fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["hostd.log", "hostd.log.1", "hostd.log.2", "hostd.log.3"]);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "line 5 and more\n");
        assert_eq!(std::fs::read_to_string(folder.path().join("hostd.log.3")).unwrap(), "line 2 and more\n");
    }
}
