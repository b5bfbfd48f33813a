//! The watch: finds the listeners inside namespaces and reports each change.
//!
//! One thread serves all namespaces of an engine. It never enters a namespace: it reads through descriptors that were
//! created inside ([`Sources`]). A namespace is read at the times that its pace (`pace.rs`) sets. The reading is compared
//! with the one before, and the difference is reported.
//!
//! - The first event of a namespace lists all listeners, even if there are none; later events list only changes.
//! - A reading that fails counts as "no change". It is never reported as the end of all listeners.
//! - `sock_diag` is preferred. When it does not work, the watch changes to the files of `/proc/net` and stays with them.
//! - When no source is left, the watch sends one [`WatchEvent::Lost`]; it does not report the listeners as closed.
//! - Between scans the thread sleeps on its channel, so requests to add, remove and rescan act at once.
//! - Where the kernel gives hints (`hint.rs`), a second thread waits for them and requests a scan of all namespaces. The
//!   other scans are then rare and only confirm.

pub mod diag_message;
pub mod diff;
pub mod hint;
pub mod lookup;
mod pace;
pub mod parse;
pub mod procfs;
pub mod reading;
pub mod sock_diag;
mod source;

use std::collections::BTreeMap;
use std::io::{self, PipeWriter};
use std::mem;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use self::hint::{HintSource, Hints};
use self::pace::{Found, Pace, Scan};
use self::reading::Reading;
pub use self::source::{ReadError, Source, Sources, Wholeness};
use crate::command::{Listening, UpstreamId};

/// An event of the watch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WatchEvent {
    /// Listeners were opened or closed. A server that was replaced on its port and address is in both lists, so a
    /// receiver that keeps a set removes `closed` before it inserts `opened`.
    Listeners {
        /// The namespace.
        upstream: UpstreamId,
        /// The new listeners, in the order of the kernel's table.
        opened: Vec<Listening>,
        /// The listeners that are gone, in the order of the previous table.
        closed: Vec<Listening>,
    },
    /// The namespace is no longer watched; its listeners are unknown.
    Lost {
        /// The namespace.
        upstream: UpstreamId,
        /// The reason: a sentence for people.
        reason: String,
    },
}

/// The threads of the watch. Dropping the value ends them and waits for their end.
#[derive(Debug)]
pub struct Watcher {
    requests: Option<Sender<Request>>,
    thread: Option<JoinHandle<()>>,
    hints: Option<Hinted>,
}

/// The thread that waits for hints.
#[derive(Debug)]
struct Hinted {
    /// Closing it ends the thread.
    running: PipeWriter,
    thread: JoinHandle<()>,
}

enum Request {
    Add(UpstreamId, Sources),
    Remove(UpstreamId),
    Rescan,
    /// The kernel reports changes from now on (`true`), or no longer.
    Hinted(bool),
    /// The kernel reported a change.
    Hint,
}

impl Watcher {
    /// Starts the threads. The first calls `sink` for each event: a sink that blocks delays all namespaces, and one that
    /// panics ends the watch. The second, which is started where there are `hints`, requests a scan of all namespaces for
    /// each report of the kernel.
    ///
    /// # Errors
    /// The error of starting the first thread.
    pub fn start(hints: HintSource, sink: impl Fn(WatchEvent) + Send + 'static) -> io::Result<Watcher> {
        let (requests, inbox) = mpsc::channel();
        let thread = thread::Builder::new().name("landfall-watch".to_owned()).spawn(move || {
            Watch {
                namespaces: BTreeMap::new(),
                scratch: Reading::default(),
                hinted: false,
                billed: processor_time(),
                sink,
            }
            .run(&inbox);
        })?;
        // If the second thread cannot be started, the watch runs without hints.
        let hints = match hints {
            HintSource::Off => None,
            HintSource::Open => Hinted::start(requests.clone(), || Hints::open().ok()).ok(),
            HintSource::Opened(hints) => Hinted::start(requests.clone(), || Some(hints)).ok(),
        };
        Ok(Watcher { requests: Some(requests), thread: Some(thread), hints })
    }

    /// Watches a namespace. If it is watched already, the watch starts again: its next event lists all listeners.
    pub fn add(&self, upstream: UpstreamId, sources: Sources) {
        self.request(Request::Add(upstream, sources));
    }

    /// Stops watching a namespace and closes its descriptors. An event that is already being sent may still arrive.
    pub fn remove(&self, upstream: UpstreamId) {
        self.request(Request::Remove(upstream));
    }

    /// Scans all namespaces now, as far as their pace allows, and more often during the next second.
    pub fn rescan(&self) {
        self.request(Request::Rescan);
    }

    fn request(&self, request: Request) {
        if let Some(requests) = &self.requests {
            // The send fails only after the sink panicked and the thread ended. The watch is over then.
            let _ = requests.send(request);
        }
    }
}

impl Hinted {
    fn start(
        requests: Sender<Request>,
        open: impl FnOnce() -> Option<Hints> + Send + 'static,
    ) -> io::Result<Hinted> {
        let (stop, running) = io::pipe()?;
        let thread = thread::Builder::new().name("landfall-hint".to_owned()).spawn(move || {
            // Without hints the scans find everything.
            if let Some(hints) = open() {
                // The send fails only after the sink panicked and the watch ended.
                let send = |request| drop(requests.send(request));
                send(Request::Hinted(true));
                hints.follow(stop, || send(Request::Hint));
                send(Request::Hinted(false));
            }
        })?;
        Ok(Hinted { running, thread })
    }

    fn end(self) {
        drop(self.running);
        // The panic hook has reported a panic already.
        let _ = self.thread.join();
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        // The thread holds a sender, and the watch ends only when all senders are gone.
        if let Some(hints) = self.hints.take() {
            hints.end();
        }
        self.requests = None;
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != thread::current().id()
        {
            // The panic hook has reported a panic of the sink already.
            let _ = thread.join();
        }
    }
}

struct Watch<F> {
    namespaces: BTreeMap<UpstreamId, Namespace>,
    /// Holds the next reading; its contents do not outlive a scan.
    scratch: Reading,
    /// Whether the kernel reports changes.
    hinted: bool,
    /// The processor time of this thread up to which scans have been charged.
    billed: Duration,
    sink: F,
}

struct Namespace {
    source: Source,
    pace: Pace,
    /// The last reading that succeeded.
    known: Reading,
    /// Whether the first event was sent.
    first_sent: bool,
}

impl<F: Fn(WatchEvent)> Watch<F> {
    /// Runs until the [`Watcher`] is dropped.
    fn run(&mut self, inbox: &Receiver<Request>) {
        while let Ok(request) = self.next_request(inbox) {
            if let Some(request) = request {
                self.handle(request);
            }
            // The time limit keeps a steady flow of requests from starving the scans.
            let now = Instant::now();
            while Instant::now() - now < pace::FLOOR
                && let Ok(request) = inbox.try_recv()
            {
                self.handle(request);
            }
            self.scan_due();
        }
    }

    /// Sleeps until a request arrives or the next scan is due. An error means that the watch ends.
    fn next_request(&self, inbox: &Receiver<Request>) -> Result<Option<Request>, mpsc::RecvError> {
        let Some(due) = self.namespaces.values().map(|namespace| namespace.pace.due()).min() else {
            return inbox.recv().map(Some);
        };
        match inbox.recv_timeout(due.saturating_duration_since(Instant::now())) {
            Ok(request) => Ok(Some(request)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(mpsc::RecvError),
        }
    }

    fn handle(&mut self, request: Request) {
        let now = Instant::now();
        match request {
            Request::Add(upstream, sources) => match Source::new(sources) {
                Ok(source) => {
                    let namespace = Namespace {
                        source,
                        pace: Pace::new(now),
                        known: Reading::default(),
                        first_sent: false,
                    };
                    self.namespaces.insert(upstream, namespace);
                }
                Err(error) => {
                    self.namespaces.remove(&upstream);
                    (self.sink)(WatchEvent::Lost { upstream, reason: error.to_string() });
                }
            },
            Request::Remove(upstream) => {
                self.namespaces.remove(&upstream);
            }
            Request::Rescan => self.paces(|pace| pace.hurry(now)),
            Request::Hint => self.paces(|pace| pace.hint(now)),
            Request::Hinted(hinted) => {
                self.hinted = hinted;
                // Finds changes that the kernel did not report in between.
                self.paces(|pace| pace.hint(now));
            }
        }
    }

    fn paces(&mut self, change: impl Fn(&mut Pace)) {
        self.namespaces.values_mut().for_each(|namespace| change(&mut namespace.pace));
    }

    fn scan_due(&mut self) {
        let now = Instant::now();
        let watched = self.namespaces.len();
        let mut lost = Vec::new();
        for (&upstream, namespace) in &mut self.namespaces {
            if namespace.pace.due() > now {
                continue;
            }
            let found = match namespace.scan(upstream, &mut self.scratch, &self.sink) {
                Ok(found) => found,
                Err(error) => {
                    lost.push((upstream, error));
                    Found::Failed
                }
            };
            // The thread slept since the last scan ended. The cost of waking up is charged to this scan.
            let spent = processor_time();
            let cost = spent.saturating_sub(self.billed);
            namespace.pace.scanned(Instant::now(), Scan { cost, found, watched, hinted: self.hinted });
            self.billed = spent;
        }
        for (upstream, error) in lost {
            self.namespaces.remove(&upstream);
            (self.sink)(WatchEvent::Lost { upstream, reason: error.to_string() });
        }
    }
}

impl Namespace {
    /// Reads, compares and reports. The first reading is reported but does not count as a change.
    fn scan(
        &mut self,
        upstream: UpstreamId,
        scratch: &mut Reading,
        sink: &impl Fn(WatchEvent),
    ) -> Result<Found, ReadError> {
        if !self.source.read(&self.known, scratch)? {
            return Ok(Found::Failed);
        }
        let diff::Difference { opened, closed } = diff::between(&self.known, scratch);
        let unchanged = opened.is_empty() && closed.is_empty();
        let first = !mem::replace(&mut self.first_sent, true);
        if !unchanged {
            mem::swap(&mut self.known, scratch);
        }
        if first || !unchanged {
            sink(WatchEvent::Listeners { upstream, opened, closed });
        }
        Ok(if first || unchanged { Found::Same } else { Found::Change })
    }
}

/// Returns the processor time that the calling thread has used.
fn processor_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default()
}
