//! The processes behind the sockets that containers listen on.
//!
//! Finding a process reads `/proc/PID/fd` of all processes, which costs as much as the host has processes and sockets,
//! and a container decides how often it opens new sockets. So sockets are looked up in batches, on another thread, and
//! after each look-up comes a pause of [`REST_FACTOR`] times its duration.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;

use crate::sys::launcher::owners_of_sockets;
use crate::sys::processes::ProcessFact;

/// The pause after a look-up, in multiples of its duration.
const REST_FACTOR: u32 = 10;

/// The owners of the listed sockets, by inode.
#[derive(Debug)]
pub(super) struct SocketOwners {
    sockets: BTreeMap<u64, Lookup>,
    lookup: Option<JoinHandle<Found>>,
    /// When the next look-up may start.
    not_before: Instant,
}

#[derive(Debug)]
enum Lookup {
    /// Waiting for a look-up.
    Wanted,
    /// Being looked up.
    Running,
    /// Looked up; `None` if no process was found.
    Done(Option<ProcessFact>),
}

/// The result of a look-up, and how long it took.
#[derive(Debug)]
pub(super) struct Found(BTreeMap<u64, ProcessFact>, Duration);

impl SocketOwners {
    pub(super) fn new() -> SocketOwners {
        SocketOwners { sockets: BTreeMap::new(), lookup: None, not_before: Instant::now() }
    }

    /// Replaces the sockets of a container. A socket belongs to one container.
    pub(super) fn replace(&mut self, before: &BTreeSet<u64>, now: &BTreeSet<u64>) {
        for inode in before.difference(now) {
            self.sockets.remove(inode);
        }
        for inode in now.difference(before) {
            self.sockets.insert(*inode, Lookup::Wanted);
        }
    }

    /// The process of a socket, if it is known.
    pub(super) fn of(&self, inode: u64) -> Option<&ProcessFact> {
        match self.sockets.get(&inode) {
            Some(Lookup::Done(owner)) => owner.as_ref(),
            _ => None,
        }
    }

    fn is_wanted(&self) -> bool {
        self.sockets.values().any(|lookup| matches!(lookup, Lookup::Wanted))
    }

    /// When the next look-up starts, if sockets wait for one.
    pub(super) fn due(&self) -> Option<Instant> {
        (self.lookup.is_none() && self.is_wanted()).then_some(self.not_before)
    }

    /// Starts a look-up if one is due.
    pub(super) fn look(&mut self) {
        if self.due().is_none_or(|due| due > Instant::now()) {
            return;
        }
        let mut inodes = Vec::new();
        for (inode, lookup) in &mut self.sockets {
            if matches!(lookup, Lookup::Wanted) {
                *lookup = Lookup::Running;
                inodes.push(*inode);
            }
        }
        self.lookup = Some(tokio::task::spawn_blocking(move || {
            let started = Instant::now();
            let found = owners_of_sockets(&inodes);
            Found(found, started.elapsed())
        }));
    }

    /// Waits for the result of the running look-up.
    pub(super) async fn found(&mut self) -> Found {
        match &mut self.lookup {
            // A look-up that panicked yields no owners; the panic is in the log.
            Some(lookup) => lookup.await.unwrap_or_else(|_| Found(BTreeMap::new(), Duration::ZERO)),
            None => std::future::pending().await,
        }
    }

    /// Takes in the result of a look-up. Returns the sockets that were looked up and are still listed.
    pub(super) fn take(&mut self, Found(mut found, took): Found) -> BTreeSet<u64> {
        self.lookup = None;
        self.not_before = Instant::now() + REST_FACTOR * took;
        let running = self.sockets.iter_mut().filter(|(_, lookup)| matches!(lookup, Lookup::Running));
        let done = running.map(|(inode, lookup)| {
            *lookup = Lookup::Done(found.remove(inode));
            *inode
        });
        done.collect()
    }
}
