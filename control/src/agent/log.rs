//! What the agent tells: lines of JSON on standard error, where whoever runs containers collects them.
//!
//! A thread writes. Standard error is often a pipe, and one that nobody drains must not stop the ports of a container: lines
//! that find no room are left out, and their number is told with the next one that does.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use jiff::{Timestamp, Unit};
use serde::Serialize;

use crate::broker::container::ContainerEvent;

/// Lines that wait for a reader.
const LINES_MAX: usize = 1024;
/// How long the last lines may take when the agent ends.
const FLUSH_TIME_MAX: Duration = Duration::from_millis(500);

/// One line. Beside the seven kinds of the wire specification (A.13), what the agent says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case", rename_all_fields = "camelCase")]
#[expect(missing_docs, reason = "the fields say what they are")]
pub enum AgentEvent {
    /// Hosts may connect here; one line for each address.
    AgentListening { address: SocketAddr },
    /// The daemon of this machine may fetch sockets in this directory.
    AgentServing { directory: PathBuf },
    /// Something is not as it might be.
    AgentNotice { text: String },
    /// What listens cannot be read; what was known stays.
    WatchFailed { reason: String },
    /// An orderly stop has begun.
    AgentStopping,
    /// Of one host.
    #[serde(untagged)]
    Host(ContainerEvent),
}

#[derive(Serialize)]
struct Line<'a> {
    /// ISO 8601, UTC, milliseconds.
    time: String,
    #[serde(flatten)]
    event: &'a AgentEvent,
    /// Lines that were left out before this one.
    #[serde(skip_serializing_if = "is_zero")]
    omitted: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands a reference")]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// Where lines go; clones write to the same place.
#[derive(Clone, Debug)]
pub struct Log(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    lines: Mutex<Option<SyncSender<String>>>,
    omitted: AtomicU64,
    done: Mutex<Receiver<()>>,
}

impl Log {
    /// Writes each line by `write`, on a thread of its own.
    pub fn to(mut write: impl FnMut(&str) + Send + 'static) -> Log {
        let (lines, written) = mpsc::sync_channel::<String>(LINES_MAX);
        let (finish, done) = mpsc::channel();
        let writer = move || {
            written.iter().for_each(|line| write(&line));
            drop(finish);
        };
        // Without a thread there is no log, and the agent serves all the same: its queue fills and is left alone.
        let _ = thread::Builder::new().name("landfall-log".to_owned()).spawn(writer);
        Log(Arc::new(Inner {
            lines: Mutex::new(Some(lines)),
            omitted: AtomicU64::new(0),
            done: Mutex::new(done),
        }))
    }

    /// Tells one thing; never waits.
    pub fn tell(&self, event: &AgentEvent) {
        let now = Timestamp::now();
        let time = now.round(Unit::Millisecond).unwrap_or(now);
        let omitted = self.0.omitted.swap(0, Ordering::Relaxed);
        // An event is strings and numbers; it serialises.
        let line =
            serde_json::to_string(&Line { time: format!("{time:.3}"), event, omitted }).unwrap_or_default();
        let lines = self.0.lines.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.as_ref().is_none_or(|lines| lines.try_send(line).is_err()) {
            self.0.omitted.fetch_add(omitted + 1, Ordering::Relaxed);
        }
    }

    /// Counts a line that is not written.
    pub fn omit(&self) {
        self.0.omitted.fetch_add(1, Ordering::Relaxed);
    }

    /// Waits, for a bounded time, until everything is written. Nothing is told after it.
    pub fn close(&self) {
        drop(self.0.lines.lock().unwrap_or_else(PoisonError::into_inner).take());
        // Either the writer has finished, or nobody reads.
        let _ = self.0.done.lock().unwrap_or_else(PoisonError::into_inner).recv_timeout(FLUSH_TIME_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn a_line_has_its_time_its_kind_and_its_fields() {
        let (send, told) = mpsc::channel();
        let log = Log::to(move |line| send.send(line.to_owned()).unwrap());
        let reason = "ECONNREFUSED".to_owned();
        log.tell(&AgentEvent::Host(ContainerEvent::RelayOpenFailed { stream_id: 7, port: 5173, reason }));
        log.close();
        let mut line: Value = serde_json::from_str(&told.recv().unwrap()).unwrap();
        assert!(line["time"].as_str().unwrap().ends_with('Z'), "{line}");
        line["time"].take();
        let expected = json!({"time": null, "kind": "relay-open-failed", "streamId": 7, "port": 5173,
            "reason": "ECONNREFUSED"});
        assert_eq!(line, expected);
        assert!(told.recv().is_err(), "the writer has ended");
    }

    #[test]
    fn lines_that_find_no_room_are_counted_and_nobody_waits() {
        let (go, wait) = mpsc::channel::<()>();
        let (send, told) = mpsc::channel();
        let log = Log::to(move |line| {
            // The first line takes until the test says so.
            let _ = wait.recv();
            send.send(line.to_owned()).unwrap();
        });
        for _ in 0..LINES_MAX + 100 {
            log.tell(&AgentEvent::AgentStopping);
        }
        drop(go);
        // The writer may take the first line in the middle of the loop, so more than one line can have a count.
        let omitted = |line: String| {
            let line: Value = serde_json::from_str(&line).unwrap();
            line["omitted"].as_u64().unwrap_or(0)
        };
        let written: u64 = (0..LINES_MAX).map(|_| omitted(told.recv().unwrap())).sum();
        log.tell(&AgentEvent::AgentStopping);
        log.close();
        let rest: u64 = told.iter().map(omitted).sum();
        assert!((99..=100).contains(&(written + rest)), "{written} and {rest}");
    }
}
