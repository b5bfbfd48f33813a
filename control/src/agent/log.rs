//! The log of the agent: lines of JSON on standard error, where container runtimes collect them.
//!
//! A thread writes the lines. Standard error is often a pipe, and a full pipe must not block the ports of a container:
//! lines that exceed the queue are dropped, and their number is logged with the next line.

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

/// The maximum of queued lines.
const LINES_MAX: usize = 1024;
/// The time limit for writing the last lines when the agent ends.
const FLUSH_TIME_MAX: Duration = Duration::from_millis(500);

/// One line: the seven kinds of the wire specification (A.13), and events of the agent itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case", rename_all_fields = "camelCase")]
#[expect(missing_docs, reason = "the names of the fields describe them")]
pub enum AgentEvent {
    /// Hosts can connect to this address; one line per address.
    AgentListening { address: SocketAddr },
    /// The daemon on the host can receive sockets in this directory.
    AgentServing { directory: PathBuf },
    /// The agent works with restrictions.
    AgentNotice { text: String },
    /// The listeners cannot be read; the previous reading stays in effect.
    WatchFailed { reason: String },
    /// An orderly stop has started.
    AgentStopping,
    /// An event of one host connection.
    #[serde(untagged)]
    Host(ContainerEvent),
}

#[derive(Serialize)]
struct Line<'a> {
    /// ISO 8601, UTC, milliseconds.
    time: String,
    #[serde(flatten)]
    event: &'a AgentEvent,
    /// The number of lines that were dropped before this one.
    #[serde(skip_serializing_if = "is_zero")]
    omitted: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands a reference")]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// The log; clones write to the same queue.
#[derive(Clone, Debug)]
pub struct Log(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    lines: Mutex<Option<SyncSender<String>>>,
    omitted: AtomicU64,
    done: Mutex<Receiver<()>>,
}

impl Log {
    /// Creates a log that passes each line to `write`, on a thread of its own.
    pub fn to(mut write: impl FnMut(&str) + Send + 'static) -> Log {
        let (lines, written) = mpsc::sync_channel::<String>(LINES_MAX);
        let (finish, done) = mpsc::channel();
        let writer = move || {
            written.iter().for_each(|line| write(&line));
            drop(finish);
        };
        // If the thread cannot be started, the queue fills and lines are dropped; the agent works without a log.
        let _ = thread::Builder::new().name("landfall-log".to_owned()).spawn(writer);
        Log(Arc::new(Inner {
            lines: Mutex::new(Some(lines)),
            omitted: AtomicU64::new(0),
            done: Mutex::new(done),
        }))
    }

    /// Logs an event. Never waits.
    pub fn record(&self, event: &AgentEvent) {
        let now = Timestamp::now();
        let time = now.round(Unit::Millisecond).unwrap_or(now);
        let omitted = self.0.omitted.swap(0, Ordering::Relaxed);
        // Serialisation cannot fail: an event consists of strings and numbers.
        let line =
            serde_json::to_string(&Line { time: format!("{time:.3}"), event, omitted }).unwrap_or_default();
        let lines = self.0.lines.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.as_ref().is_none_or(|lines| lines.try_send(line).is_err()) {
            self.0.omitted.fetch_add(omitted + 1, Ordering::Relaxed);
        }
    }

    /// Counts a line that is not logged.
    pub fn omit(&self) {
        self.0.omitted.fetch_add(1, Ordering::Relaxed);
    }

    /// Waits up to `FLUSH_TIME_MAX` until all lines are written. Later events are dropped.
    pub fn close(&self) {
        drop(self.0.lines.lock().unwrap_or_else(PoisonError::into_inner).take());
        // Either the writer has finished, or the reader of the pipe is stuck.
        let _ = self.0.done.lock().unwrap_or_else(PoisonError::into_inner).recv_timeout(FLUSH_TIME_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn a_line_has_its_time_its_kind_and_its_fields() {
        let (send, received) = mpsc::channel();
        let log = Log::to(move |line| send.send(line.to_owned()).unwrap());
        let reason = "ECONNREFUSED".to_owned();
        log.record(&AgentEvent::Host(ContainerEvent::RelayOpenFailed { stream_id: 7, port: 5173, reason }));
        log.close();
        let mut line: Value = serde_json::from_str(&received.recv().unwrap()).unwrap();
        assert!(line["time"].as_str().unwrap().ends_with('Z'), "{line}");
        line["time"].take();
        let expected = json!({"time": null, "kind": "relay-open-failed", "streamId": 7, "port": 5173,
            "reason": "ECONNREFUSED"});
        assert_eq!(line, expected);
        assert!(received.recv().is_err(), "the writer has ended");
    }

    #[test]
    fn lines_above_the_limit_are_counted_without_waiting() {
        let (go, wait) = mpsc::channel::<()>();
        let (send, received) = mpsc::channel();
        let log = Log::to(move |line| {
            // The first line blocks until the test releases it.
            let _ = wait.recv();
            send.send(line.to_owned()).unwrap();
        });
        for _ in 0..LINES_MAX + 100 {
            log.record(&AgentEvent::AgentStopping);
        }
        drop(go);
        // The writer may take the first line during the loop, so more than one line can have a count.
        let omitted = |line: String| {
            let line: Value = serde_json::from_str(&line).unwrap();
            line["omitted"].as_u64().unwrap_or(0)
        };
        let written: u64 = (0..LINES_MAX).map(|_| omitted(received.recv().unwrap())).sum();
        log.record(&AgentEvent::AgentStopping);
        log.close();
        let rest: u64 = received.iter().map(omitted).sum();
        assert!((99..=100).contains(&(written + rest)), "{written} and {rest}");
    }
}
