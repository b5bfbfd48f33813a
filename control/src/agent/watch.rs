//! The agent's look at what listens beside it: at once, and then at every interval, in the wire's own form (wire
//! specification, A.3.5 and A.4).
//!
//! It reads by the engine's watch: `sock_diag` where the kernel has it, else the files of `/proc/net`, which may take
//! milliseconds in a namespace with many connections; so a thread of the runtime's reads. One reading at a time, the next
//! one an interval after the last. A reading that fails is no change; where nothing is left to read from, everything is
//! opened anew at the next interval.

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
    /// Begins with a reading.
    pub(super) fn begin(interval: Duration, log: Log) -> Watch {
        // Whoever is slow to take a reading gets the next one later.
        let (tell, readings) = mpsc::channel(1);
        let task = tokio::spawn(read_on(interval, tell, log)).abort_handle();
        Watch { readings, task }
    }

    /// The next reading that worked.
    pub(super) async fn next(&mut self) -> Vec<WireListener> {
        match self.readings.recv().await {
            Some(reading) => reading,
            // The task ends with its receiver only.
            None => std::future::pending().await,
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn read_on(interval: Duration, tell: mpsc::Sender<Vec<WireListener>>, log: Log) {
    let mut reader = ListenerReader::default();
    let mut failing = false;
    loop {
        // A reading that panicked took its sources along.
        let (back, outcome) =
            spawn_blocking(move || reader.look()).await.unwrap_or((ListenerReader::default(), Ok(None)));
        reader = back;
        match outcome {
            Ok(Some(reading)) => {
                failing = false;
                if tell.send(reading).await.is_err() {
                    return;
                }
            }
            Ok(None) => {}
            Err(_) if failing => {}
            Err(error) => {
                failing = true;
                log.tell(&AgentEvent::WatchFailed { reason: error.to_string() });
            }
        }
        sleep(interval).await;
    }
}

/// What is read with, and the two readings that are compared while a table is read in pieces.
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
    async fn what_begins_and_ceases_to_listen_is_seen() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut watch = Watch::begin(SHORT, Log::to(|_| {}));
        let seen = |reading: &[WireListener]| reading.iter().any(|one| one.port.get() == port);
        assert!(seen(&watch.next().await), "the first reading is whole");
        drop(listener);
        while seen(&watch.next().await) {}
    }
}
