//! The watch: what begins and what ceases to listen inside namespaces.
//!
//! One thread looks after all namespaces of an engine. It never enters one: it reads through descriptors that were
//! made inside ([`Sources`]). A namespace is read when its pace (`pace.rs`) says so; the reading is compared with the
//! one before, and what differs is told.
//!
//! - The first event of a namespace tells all that listens, even if that is nothing; later ones tell only changes.
//! - A reading that fails is "no change". It never looks as if everything had closed.
//! - `sock_diag` is preferred. When it does not work, the files of `/proc/net` take over, once and for good.
//! - When nothing is left to read with, that is told once as [`WatchEvent::Lost`]; what listened is not told as closed.
//! - Between scans the thread sleeps on its channel, so that adding, removing and hurrying act at once.
//! - Where the kernel gives hints (`hint.rs`), a second thread waits for them and has everything scanned at once. Other
//!   scans then only make sure, and are rare.

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

/// What the watch tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WatchEvent {
    /// What began and what ceased to listen. A server that was replaced on its port and address is in both; who keeps
    /// a set takes out what closed before putting in what opened.
    Listeners {
        /// Where.
        upstream: UpstreamId,
        /// Newly seen, in the order of the kernel's table.
        opened: Vec<Listening>,
        /// No longer there, in the order of the table before.
        closed: Vec<Listening>,
    },
    /// The namespace is not watched any more; what listens there is not known.
    Lost {
        /// Where.
        upstream: UpstreamId,
        /// Why: a sentence for people.
        reason: String,
    },
}

/// The threads that watch. Dropping it ends them and waits for them.
#[derive(Debug)]
pub struct Watcher {
    requests: Option<Sender<Request>>,
    thread: Option<JoinHandle<()>>,
    hints: Option<Hinted>,
}

/// The thread that waits for hints.
#[derive(Debug)]
struct Hinted {
    /// Its end ends the thread.
    running: PipeWriter,
    thread: JoinHandle<()>,
}

enum Request {
    Add(UpstreamId, Sources),
    Remove(UpstreamId),
    Rescan,
    /// The kernel tells of changes from now on, or does so no longer.
    Hinted(bool),
    /// It told of one.
    Hint,
}

impl Watcher {
    /// Starts the threads. One calls `sink` for each event; a sink that blocks delays all namespaces, and one that
    /// panics ends the watch. The other one, where there are `hints`, has everything scanned when the kernel reports
    /// something new.
    ///
    /// # Errors
    /// Those of starting a thread.
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
        // One that cannot be started is as much of a lack as a kernel that gives none.
        let hints = match hints {
            HintSource::Off => None,
            HintSource::Open => Hinted::start(requests.clone(), || Hints::open().ok()).ok(),
            HintSource::Opened(hints) => Hinted::start(requests.clone(), || Some(hints)).ok(),
        };
        Ok(Watcher { requests: Some(requests), thread: Some(thread), hints })
    }

    /// Watches a namespace. One that is watched already is begun anew: its next event tells all that listens.
    pub fn add(&self, upstream: UpstreamId, sources: Sources) {
        self.request(Request::Add(upstream, sources));
    }

    /// Lets go of a namespace and closes its descriptors. An event that is on its way may still come.
    pub fn remove(&self, upstream: UpstreamId) {
        self.request(Request::Remove(upstream));
    }

    /// Scans all namespaces now, as far as their pace allows, and more often for a second.
    pub fn rescan(&self) {
        self.request(Request::Rescan);
    }

    fn request(&self, request: Request) {
        if let Some(requests) = &self.requests {
            // A thread that has ended because the sink panicked has nobody to tell either.
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
                // A watch that has ended because the sink panicked has nobody to tell either.
                let tell = |request| drop(requests.send(request));
                tell(Request::Hinted(true));
                hints.follow(stop, || tell(Request::Hint));
                tell(Request::Hinted(false));
            }
        })?;
        Ok(Hinted { running, thread })
    }

    fn end(self) {
        drop(self.running);
        // A panic was reported when it happened.
        let _ = self.thread.join();
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        // It sends requests, and without any sender the watch ends.
        if let Some(hints) = self.hints.take() {
            hints.end();
        }
        self.requests = None;
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != thread::current().id()
        {
            // The panic of a sink was reported when it happened.
            let _ = thread.join();
        }
    }
}

struct Watch<F> {
    namespaces: BTreeMap<UpstreamId, Namespace>,
    /// Takes the next reading; what it held before is of no interest.
    scratch: Reading,
    /// Whether the kernel tells of changes.
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
    /// Whether the first event was told.
    told: bool,
}

impl<F: Fn(WatchEvent)> Watch<F> {
    /// Runs until the [`Watcher`] is dropped.
    fn run(&mut self, inbox: &Receiver<Request>) {
        while let Ok(request) = self.next_request(inbox) {
            if let Some(request) = request {
                self.obey(request);
            }
            // Bounded by what was sent by now: requests that keep coming do not keep scans from happening.
            let now = Instant::now();
            while Instant::now() - now < pace::FLOOR
                && let Ok(request) = inbox.try_recv()
            {
                self.obey(request);
            }
            self.scan_due();
        }
    }

    /// Sleeps until something is asked or the next scan is due. An error means that the watch ends.
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

    fn obey(&mut self, request: Request) {
        let now = Instant::now();
        match request {
            Request::Add(upstream, sources) => match Source::new(sources) {
                Ok(source) => {
                    let namespace =
                        Namespace { source, pace: Pace::new(now), known: Reading::default(), told: false };
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
                // What was told to nobody is found.
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
                    Found::Nothing
                }
            };
            // The time since the last scan ended was spent asleep, but for waking up, which is charged as well.
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
    /// Reads, compares and tells. What listened from the beginning is no change.
    fn scan(
        &mut self,
        upstream: UpstreamId,
        scratch: &mut Reading,
        sink: &impl Fn(WatchEvent),
    ) -> Result<Found, ReadError> {
        if !self.source.read(&self.known, scratch)? {
            return Ok(Found::Nothing);
        }
        let diff::Difference { opened, closed } = diff::between(&self.known, scratch);
        let unchanged = opened.is_empty() && closed.is_empty();
        let first = !mem::replace(&mut self.told, true);
        if !unchanged {
            mem::swap(&mut self.known, scratch);
        }
        if first || !unchanged {
            sink(WatchEvent::Listeners { upstream, opened, closed });
        }
        Ok(if first || unchanged { Found::Same } else { Found::Change })
    }
}

/// The processor time that the calling thread has used.
fn processor_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default()
}
