//! The agent's readings of the listeners in its container: one at once, and one at every interval, in the form of the
//! wire (wire specification, A.3.5 and A.4).
//!
//! It uses the engine's watch: `sock_diag` if the kernel has it, otherwise the files of `/proc/net`. A reading may take
//! milliseconds in a namespace with many connections, so it runs on a blocking thread of the runtime. There is one
//! reading at a time; the next one starts an interval after the last. A failed reading is not a change; if no source is
//! left, all sources are opened again at the next interval.

use std::time::Duration;

use landfall_engine::watch::parse::{WireListener, to_wire};
use landfall_engine::watch::reading::Reading;
use landfall_engine::watch::{ReadError, Source, Sources};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, spawn_blocking};
use tokio::time::sleep;

use super::log::{AgentEvent, Log};

/// A watch that runs until it is dropped.
#[derive(Debug)]
pub(super) struct Watch {
    readings: mpsc::Receiver<Vec<WireListener>>,
    task: AbortHandle,
}

impl Watch {
    /// Starts with an immediate reading.
    pub(super) fn begin(interval: Duration, log: Log) -> Watch {
        // A slow receiver delays the next reading.
        let (sender, readings) = mpsc::channel(1);
        let task = tokio::spawn(read_on(interval, sender, log)).abort_handle();
        Watch { readings, task }
    }

    /// Returns the next successful reading.
    pub(super) async fn next(&mut self) -> Vec<WireListener> {
        match self.readings.recv().await {
            Some(reading) => reading,
            // The task ends only with its receiver.
            None => std::future::pending().await,
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn read_on(interval: Duration, sender: mpsc::Sender<Vec<WireListener>>, log: Log) {
    let mut reader = ListenerReader::default();
    let mut failing = false;
    loop {
        // A reading that panicked has lost its sources.
        let (back, outcome) =
            spawn_blocking(move || reader.look()).await.unwrap_or((ListenerReader::default(), Ok(None)));
        reader = back;
        match outcome {
            Ok(Some(reading)) => {
                failing = false;
                if sender.send(reading).await.is_err() {
                    return;
                }
            }
            Ok(None) => {}
            Err(_) if failing => {}
            Err(error) => {
                failing = true;
                log.record(&AgentEvent::WatchFailed { reason: error.to_string() });
            }
        }
        sleep(interval).await;
    }
}

/// The source, and the two readings that are compared while a table is read in pieces.
#[derive(Default)]
struct ListenerReader {
    source: Option<Source>,
    last: Reading,
    next: Reading,
}

impl ListenerReader {
    fn look(mut self) -> (ListenerReader, Result<Option<Vec<WireListener>>, ReadError>) {
        let mut source = match self.source.take().map_or_else(|| Source::new(Sources::open_here()), Ok) {
            Ok(source) => source,
            Err(error) => return (self, Err(error)),
        };
        match source.read(&self.last, &mut self.next) {
            Ok(true) => {
                std::mem::swap(&mut self.last, &mut self.next);
                self.source = Some(source);
                let wire = to_wire(self.last.rows());
                (self, Ok(Some(wire)))
            }
            Ok(false) => {
                self.source = Some(source);
                (self, Ok(None))
            }
            Err(error) => (self, Err(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    const SHORT: Duration = Duration::from_millis(1);

    #[tokio::test]
    async fn new_and_closed_listeners_are_detected() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut watch = Watch::begin(SHORT, Log::to(|_| {}));
        let seen = |reading: &[WireListener]| reading.iter().any(|one| one.port.get() == port);
        assert!(seen(&watch.next().await), "the first reading is complete");
        drop(listener);
        while seen(&watch.next().await) {}
    }
}
